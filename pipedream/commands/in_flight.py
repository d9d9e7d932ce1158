"""What if each GPU ran one more forward ahead?

    python -m pipedream in_flight --comm_time 0.5

1f1b and pipedream, with limits up to 2 S - 1, where every result has a turn to travel.
"""

import math

from pipedream.backstage.measures import tick
from pipedream.schedules.plans import SUMMARY, make_plan, summarize
from pipedream_simple import RECOMPUTED, format_table, makespan

LEGEND = """\
   limit: microbatches in flight on GPU0, at most (--in_flight). It falls evenly
   to 1 on the last GPU. *: the default, num_stages. A limit of 1 is naive. With
   a flush, a GPU never holds more than the microbatches of one batch."""


def main(config: dict) -> None:
    naive = make_plan({**config, "schedule": "naive"})
    for name in ("1f1b", "pipedream"):
        settings, table, times = {**config, "schedule": name}, [["  limit", *SUMMARY]], {}
        for limit in limits(config["num_stages"]):
            plan = make_plan({**settings, "in_flight": limit})
            mark = "*" if limit == config["num_stages"] else " "
            table.append([f"{mark} {limit}", *summarize(plan, naive)])
            times[limit] = tick(makespan(plan.events))
        print("\n".join([name, *format_table(table)]))
        print(f"   Fastest with a limit of {min(times, key=times.__getitem__)}.\n")
    print("\n".join([LEGEND, *[RECOMPUTED] * config["recompute"]]))


def limits(num_stages: int) -> list[int]:
    """At most 18 of them, from 1 to 2 S - 1, S included."""
    most = 2 * num_stages - 1
    return sorted({*range(1, most, math.ceil(most / 16)), num_stages, most})
