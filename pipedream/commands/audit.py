"""Did every op read the right weights? How wrong are gradients?

    python -m pipedream audit
    python -m pipedream audit --weight_stashing False
    python -m pipedream audit --schedule zb-h1 --num_stages 8

The tensors tell, not the schedule: a forward used the weights at the leaves of the graph that it
left, and its backward used the same tensors, with what was in them by then. Each gradient is
compared with backpropagation on copies of the weights that its forward read.
"""

import itertools
import sys
from statistics import fmean

from pipedream.backstage.audit import Audit, VersionCount
from pipedream.backstage.text import diverged, shorten
from pipedream.schedules.halves import train_plan
from pipedream.schedules.plans import Plan, make_plan
from pipedream_simple import DIVERGED, Op, Worker, format_per_gpu, format_table

GRADIENT_ERROR = """\
   |gradient - true| / |true|, true being backpropagation on the weights that
   the forward read. An update between forward and backward, on this stage or a
   later one, makes it wrong. With weight stashing the error is 0."""


def main(config: dict) -> None:
    plan = make_plan(config)
    audit, versions = Audit(plan.config, gradients=True), VersionCount()

    def watch(op: Op, worker: Worker) -> None:
        audit(op, worker)
        versions(op, worker)

    run = train_plan(plan, watch=watch)
    print(f"{plan.name}: weight versions, stage 0 first, and how wrong the gradients are\n")
    print("\n".join(shorten(format_table(read_table(plan, audit), "   "), 24, "rows")))
    ops = [op for row in plan.schedule for op in row if op[:3] in audit.read]
    agree = sum(audit.read[op[:3]] == op.version for op in ops)
    print(f"\nOps that read the version of the schedule: {agree} of {len(ops)}")
    print(f"Weight versions in memory, at most, counted: {format_per_gpu(versions.peak, 12)}")
    stages = range(plan.config["num_stages"])
    errors = [[e for (s, _), e in audit.error.items() if s == stage] for stage in stages]
    for name, measure in (("mean", fmean), ("worst", max)):
        values = [f"{measure(of_stage):.1%}" for of_stage in errors]
        print(f"Gradient error, stage by stage, {name}: {format_per_gpu(values, 8)}")
    print(GRADIENT_ERROR)
    print(end=f"{DIVERGED}\n" * diverged(run.losses))
    if agree < len(ops):
        sys.exit(1)


def read_table(plan: Plan, audit: Audit) -> list[list[str]]:
    """What the ops of each microbatch read, and its largest gradient error; equal rows joined."""
    stages = range(plan.config["num_stages"])

    def cells_of(m: int) -> list[str]:
        versions = [[audit.read[stage, "F", m] for stage in stages]]
        kinds = ["B" if (stage, "B", m) in audit.read else "I" for stage in stages]  # W reads none
        versions.append([audit.read[stage, kinds[stage], m] for stage in stages])
        versions.append([audit.newest_then[stage, m] for stage in stages])
        cells = [format_per_gpu([f"v{v}" for v in of_stages]) for of_stages in versions]
        return [*cells, f"{max(audit.error[stage, m] for stage in stages):.1%} off"]

    table = [["", "forward read", "backward read", "newest at backward", "gradient"]]
    for cells, same in itertools.groupby(range(1 + max(m for _, m in audit.error)), cells_of):
        first, *more = same
        table.append([f"MB{first} to {more[-1]}" if more else f"MB{first}", *cells])
    return table
