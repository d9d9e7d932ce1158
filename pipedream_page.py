#!/usr/bin/env python3
"""Why is this GPU idle? A page that plays every schedule, step by step: pipeline.html.

    python pipedream_page.py                    then open pipeline.html in a browser
    python pipedream_page.py --num_stages 8     every CONFIG key is also a flag
    python pipedream_page.py --out pages        in another folder, created if necessary

The page is one file and needs no network. Point at an op: what did it need, and which weights did
it read? Point at an idle GPU: what does it wait for? Put two schedules under each other on one time
axis, or hide the future and guess what a GPU does next.

It is pipedream_page.html with the simulated runs of all schedules in it. The page only draws them:
rows, times, causes and sentences come from here, that is from pipedream_simple.py and the lab.
"""

import base64
import gzip
import itertools
import json
import signal
import sys
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during a slow import: no traceback

from matplotlib.colors import to_hex

from pipedream_lab import (
    LAB_SCHEDULES,
    SAYS,
    Plan,
    Reasons,
    all_plans,
    critical_path,
    file_of,
    parse_lab_config,
    write,
)
from pipedream_simple import (
    CAUSES,
    SCHEDULES,
    Op,
    UserError,
    count,
    dependencies,
    idle_times,
    memory_held,
    rounded,
    run_main,
    schedule_name,
    short_name,
    utilization,
    variant_of,
)
from pipedream_visual import HUES, KINDS, colors

MOST_OPS = 60_000  # of all schedules together: more would be slow to draw
TEMPLATE = Path(__file__).resolve().with_name("pipedream_page.html")


class Numbered(dict):
    """Texts by number, each kept once."""

    def number(self, text: str) -> int:
        return self.setdefault(text, len(self))


def kept_versions(row: list[Op]) -> list[str]:
    """The weight versions alive on a GPU after each op of its row: "v0 v1"."""
    last_reader = {op.version: place for place, op in enumerate(row)}
    alive, kept = {0}, []
    for place, op in enumerate(row):
        alive |= {op.version + 1} if op.kind == "U" else set()
        alive -= {version for version in alive if last_reader.get(version) == place}
        kept.append(" ".join(f"v{version}" for version in sorted(alive)))
    return kept


def about(plan: Plan) -> str:
    """The first sentence of the schedule's docstring; of a variant, what it does with weights."""
    makers = {**SCHEDULES, **LAB_SCHEDULES}
    if plan.name != plan.name.strip():
        return ", ".join(schedule_name(plan.config)) + "."
    doc = makers[plan.name].__doc__ if plan.name in makers else "The rows of a file."
    return (doc or "").partition("\n")[0]


def plan_data(plan: Plan) -> dict:
    """The run of one schedule, in numbers.

    times   when something begins or ends; ops and idle times name a time by its place in this list
    texts   sentences, named in the same way
    ops     in order of start: [gpu, name, kind, microbatch, version, start, end, op needed (its
            place here, or -1), why this version, in flight and versions alive afterwards]
    idle    [gpu, start, end, cause, the op that comes next, the op needed, why in this order, and
            the op that could have run]
    path    the ops of the critical path
    """
    plan = plan._replace(events=rounded(plan.events))
    reasons, texts = Reasons(plan), Numbered()
    times = sorted({time for event in plan.events for time in (event.start, event.end)})
    place = {time: number for number, time in enumerate(times)}
    number_of = {event: number for number, event in enumerate(plan.events)}
    held = [zip(memory_held(row), kept_versions(row), strict=True) for row in plan.schedule]
    ops, idle = [], []
    for event, _, needed in dependencies(plan.events):
        op, device, start, end = event
        (in_flight, _), kept = next(held[device])
        what = [device, short_name(event), op.kind, op.microbatch, op.version]
        when = [place[start], place[end], number_of[needed] if needed else -1]
        why = texts.number(reasons.reads(op))
        ops.append([*what, *when, why, in_flight, texts.number(kept)])
    for gap in idle_times(plan.events):
        order, other = reasons.order(gap)
        when = [place[gap.start], place[gap.end]]
        named = [number_of[e] if e else -1 for e in (gap.next, gap.needed, other)]
        idle.append([gap.device, *when, gap.cause, *named[:2], texts.number(order), named[2]])
    path = [number_of[event] for event in critical_path(plan.events)]
    names = {"name": plan.name.strip(), "about": about(plan), "gpus": len(plan.schedule)}
    names["busy"] = f"{utilization(plan.events):.1%}"
    return {**names, "times": times, "texts": [*texts], "ops": ops, "idle": idle, "path": path}


def page_data(config: dict) -> dict:
    """All that the page shows at this CONFIG. UserError: a bad config, or too many ops."""
    plans, reasons = all_plans(config)
    num_ops = sum(len(plan.events) for plan in plans)
    if num_ops > MOST_OPS:
        ops = f"the schedules have {num_ops:,} ops, and a page holds {MOST_OPS:,} at most"
        raise UserError(f"{ops}: try fewer num_batches or num_microbatches")
    looks = {}  # kind and hue -> colors of box and label
    for kind, number in itertools.product(KINDS, range(len(HUES))):
        fill, ink = colors(Op(0, kind, number, 0))
        looks[f"{kind}{number}"] = to_hex(fill), ink
    sizes = (
        count(len(plans[-1].schedule), "GPU"),
        f"{count(plans[-1].config['num_microbatches'], 'microbatch')} per batch",
        count(config["num_batches"], "batch"),
        *(f"{key}={config[key]}" for key in ("forward_time", "backward_time", "comm_time")),
    )
    own = plans[-1].name if file_of(config) else variant_of(config)
    return {
        "settings": ", ".join(sizes),
        "left_out": " ".join(reasons),
        "first": [plan.name for plan in plans].index(own),
        "causes": CAUSES,
        "says": SAYS,
        "kinds": {**KINDS, "U": "weight update"},
        "looks": looks,
        "hues": len(HUES),
        "plans": [*map(plan_data, plans)],
    }


def write_page(config: dict, path: Path) -> None:
    """Put the data into the template, packed: 8 GPUs and 160 microbatches are many ops."""
    text = json.dumps(page_data(config), default=float)
    packed = base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()
    path.write_text(TEMPLATE.read_text("utf-8").replace("{{data}}", packed), "utf-8")


def main() -> None:
    out = {"type": Path, "metavar": "DIR", "help": "folder for the page (default: .)"}
    config, flags = parse_lab_config(__doc__, sys.argv[1:], other={"--out": out})
    path = flags.get("out", Path()) / "pipeline.html"
    write(path, partial(write_page, config), config)
    print(f"{path}: open it in a browser")


if __name__ == "__main__":
    sys.exit(run_main(main))
