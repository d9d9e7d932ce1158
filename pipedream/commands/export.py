"""How does a schedule get into PyTorch? One batch as a CSV file.

    python -m pipedream export my.csv --schedule zb-h1

torch.distributed.pipelining loads such a file; so does --schedule my.csv.
"""

from functools import partial
from pathlib import Path

from pipedream.backstage.output import write
from pipedream.schedules.files import file_of, write_csv
from pipedream.schedules.plans import make_plan
from pipedream_simple import count

FLAGS = {"FILE": "to write: a name that ends in .csv"}


def main(config: dict, file: Path) -> None:
    plan = make_plan({**config, "num_batches": 1})
    ops = [[op for op in row if op.kind != "U"] for row in plan.schedule]
    rows = [[(s, k + "&" * ((s, k, m) in plan.pairs), m) for s, k, m, _ in row] for row in ops]
    write(file, partial(write_csv, rows), file_of(config), ".csv")
    sizes = count(len(rows), "GPU"), count(plan.config["num_stages"], "stage")
    print(f"{file}: {plan.name}, {', '.join(sizes)}, {count(sum(map(len, rows)), 'op')}")
    if plan.name == "pipedream":
        print("The file has one batch, and then a flush. So its rows are those of 1F1B.")
