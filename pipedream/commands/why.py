"""Why are the GPUs idle, by cause? Which ops set the time?

    python -m pipedream why --schedule gpipe --comm_time 0.5
    python -m pipedream why --gpu 1 --time 4

With --gpu and --time: what that GPU does at that time, and why.
"""

import itertools
import textwrap
from collections.abc import Sequence

from pipedream.backstage.measures import CAUSES, Idle, idle_times, short_name
from pipedream.backstage.text import shorten
from pipedream.schedules.plans import Plan, make_plan
from pipedream.schedules.reasons import critical_path, explain_moment
from pipedream_simple import RECOMPUTED, Event, UserError, check_value, format_table, makespan

FLAGS = {"--gpu D": "a GPU; 0 is the first", "--time T": "a time, in time units"}

LEGEND = """\
   Times are simulated; the row "all" adds up the GPUs. Idle: fill, before the
   first op of a GPU; wait, for a result that another GPU has yet to make; link,
   for a link that is busy with other results; send, for a result on its way;
   drain, after its last op. critical: time on a critical path, a chain of ops
   that sets the makespan."""


def main(config: dict, gpu: int | None = None, time: float | None = None) -> None:
    plan = make_plan(config).rounded()
    if (gpu is None) != (time is None):
        raise UserError("--gpu and --time go together: --gpu 0 --time 4")
    if gpu is not None and time is not None:
        print("\n".join(answer(plan, gpu, time)))
        return
    path, again = critical_path(plan), [RECOMPUTED] * config["recompute"]
    print(plan, *format_bubble(plan, path), LEGEND, *again, "", sep="\n")
    print("\n".join(shorten(format_table(path_table(plan, path)), 16, "steps")))


def answer(plan: Plan, gpu: int, time: float) -> list[str]:
    """What that GPU does at that time, in lines of 80 characters."""
    over = makespan(plan.events)
    check_value("gpu", gpu, (int, 0, len(plan.schedule) - 1))
    check_value("time", time, (float, 0, over))
    lines = explain_moment(plan, gpu, time) if time < over else ["The run is over."]
    return [textwrap.fill(line, 80, subsequent_indent="   ") for line in lines]


def format_bubble(plan: Plan, path: list[Event]) -> list[str]:
    """Where the time of each GPU went, and of all together."""
    over, gaps = makespan(plan.events), idle_times(plan.events, plan.links)
    by_cause = ([gap for gap in gaps if gap.cause == cause] for cause in CAUSES)
    busy = [*{event[1:]: event for event in plan.events}.values()]  # of a pair only one
    columns: list[Sequence[Event | Idle]] = [busy, *by_cause, gaps, path]
    rows = {
        f"GPU{gpu}": [sum(e.end - e.start for e in found if e.device == gpu) for found in columns]
        for gpu in range(len(plan.schedule))
    }
    rows["all"] = sums = [sum(column) for column in zip(*rows.values(), strict=True)]
    parts = [f"{time / (over * len(plan.schedule)):.1%}" for time in sums[:-1]]
    table = [["", "busy", *CAUSES, "idle", "critical"]]
    table += [[name, *(f"{time:.7g}" for time in times)] for name, times in rows.items()]
    *lines, total, percent = format_table([*table, ["", *parts, f"{sums[-1] / over:.1%}"]])
    return [*shorten(lines, 24, "GPUs"), total, percent]


def path_table(plan: Plan, path: list[Event]) -> list[list[str]]:
    """The ops of the critical path, a line for each time that it changes GPUs."""
    of_stage = " (7F0: F0 on stage 7)" * (plan.config["num_stages"] > len(plan.schedule))
    table = [[f"A critical path{of_stage}", "", ""]]
    ops = (event for event in path if event.op.kind != "U")
    for device, same in itertools.groupby(ops, key=lambda event: event.device):
        events = [*same]
        names = " ".join(shorten([*map(short_name, events)], 8, "ops"))
        table.append([f"from t{events[0].start:.7g}", f"GPU{device}", names])
    return table
