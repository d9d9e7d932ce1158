"""What if each GPU ran one more forward ahead?

    python -m pipedream in_flight --comm_time 0.5

1f1b and pipedream, with limits up to 2 S - 1, where every result has a turn to travel.
"""

import math

from pipedream.backstage.measures import tick
from pipedream.schedules.plans import format_plans, make_plan, settle
from pipedream_simple import RECOMPUTED, makespan

REFUSES = "schedule in_flight"
LEGEND = """\
   limit: microbatches in flight on GPU0, at most (--in_flight). It falls evenly
   to 1 on the last GPU. *: the default, num_stages. A limit of 1 is naive. With
   a flush, a GPU never holds more than the microbatches of one batch."""


def main(config: dict) -> None:
    config = settle(config)
    naive = make_plan({**config, "schedule": "naive"})
    for name in ("1f1b", "pipedream"):
        times, plans = {}, {}
        for limit in limits(config["num_stages"]):
            plan = make_plan({**config, "schedule": name, "in_flight": limit})
            plans[f"{'*' if limit == config['num_stages'] else ' '} {limit}"] = plan
            times[limit] = tick(makespan(plan.events))
        print(name, *format_plans("  limit", plans, naive), sep="\n")
        print(f"   Fastest with a limit of {min(times, key=times.__getitem__)}.\n")
    print(LEGEND, *[RECOMPUTED] * config["recompute"], sep="\n")


def limits(num_stages: int) -> list[int]:
    """At most 18 of them, from 1 to 2 S - 1, S included."""
    most = 2 * num_stages - 1
    return sorted({*range(1, most, math.ceil(most / 16)), num_stages, most})
