"""Why is this GPU idle? A page that plays every schedule.

    python -m pipedream page                    then open pipeline.html in a browser
    python -m pipedream page --num_stages 8
    python -m pipedream page --out pages        in another folder, created if necessary

The page is one file and needs no network. Point at an op: what did it need, and which weights did
it read? Point at an idle GPU: what does it wait for? Put two schedules under each other on one time
axis, or hide the future and guess what a GPU does next.

It is page.html, which lies beside this file, with the simulated runs of all schedules in it. The
page only draws them: rows, times, causes and sentences come from the package.
"""

import base64
import gzip
import json
from functools import partial
from importlib.resources import files
from pathlib import Path

from pipedream.backstage.measures import CAUSES, held_by, idle_times, short_name
from pipedream.backstage.output import write
from pipedream.schedules.files import file_of
from pipedream.schedules.plans import Plan, all_plans, schedule_name, variant_of
from pipedream.schedules.reasons import SAYS, Reasons, critical_path
from pipedream.schedules.rows import LIBRARY
from pipedream_simple import Op, UserError, count, last_readers, utilization

FLAGS = {"--out DIR": "folder for the page"}

MOST_OPS = 60_000  # of all schedules together: more would be slow to draw
TEMPLATE = files("pipedream.commands") / "page.html"


def main(config: dict, out: Path = Path()) -> None:
    path = out / "pipeline.html"
    write(path, partial(write_page, config), file_of(config))
    print(f"{path}: open it in a browser")


def write_page(config: dict, path: Path) -> None:
    """Put the data into the template, packed: 8 GPUs and 160 microbatches are many ops."""
    text = json.dumps(page_data(config), default=float)
    packed = base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()
    path.write_text(TEMPLATE.read_text("utf-8").replace("{{data}}", packed), "utf-8")


def page_data(config: dict) -> dict:
    """All that the page shows at this CONFIG. UserError: a bad config, or too many ops."""
    from pipedream_visual import HUES, KINDS

    plans, reasons = all_plans(config)
    num_ops = sum(len(plan.events) for plan in plans)
    if num_ops > MOST_OPS:
        ops = f"the schedules have {num_ops:,} ops, and a page holds {MOST_OPS:,} at most"
        raise UserError(f"{ops}: try fewer num_batches or num_microbatches")
    own = plans[-1].name if file_of(config) else variant_of(config)
    return {
        "settings": settings(config, plans[-1]),
        "left_out": " ".join(reasons),
        "first": [plan.name for plan in plans].index(own),
        "causes": CAUSES,
        "says": SAYS,
        "kinds": {**KINDS, "U": "weight update"},
        "looks": looks(),
        "hues": len(HUES),
        "plans": [*map(plan_data, plans)],
    }


def settings(config: dict, plan: Plan) -> str:
    """The sizes of the plan, and the times."""
    in_batch = count(plan.config["num_microbatches"], "microbatch")
    sizes = count(len(plan.schedule), "GPU"), f"{in_batch} per batch"
    times = [f"{key}={config[key]}" for key in ("forward_time", "backward_time", "comm_time")]
    return ", ".join([*sizes, count(config["num_batches"], "batch"), *times])


def looks() -> dict[str, tuple[str, str]]:
    """Kind and number of a hue -> colors of box and label."""
    from matplotlib.colors import to_hex

    from pipedream_visual import HUES, KINDS, colors

    pairs = [(kind, number) for kind in KINDS for number in range(len(HUES))]
    found = {f"{kind}{number}": colors(Op(0, kind, number, 0)) for kind, number in pairs}
    return {name: (to_hex(fill), ink) for name, (fill, ink) in found.items()}


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
    plan = plan.rounded()
    reasons, texts = Reasons(plan), dict[str, int]()  # each text once -> its number

    def number(text: str) -> int:
        return texts.setdefault(text, len(texts))

    gaps = idle_times(plan.events, plan.links)
    spans = [(found.start, found.end) for found in plan.events]
    spans += [(gap.start, gap.end) for gap in gaps]
    times = sorted({time for span in spans for time in span})
    place = {time: i for i, time in enumerate(times)}
    number_of = {event: i for i, event in enumerate(plan.events)}
    held = [zip(held_by(row), kept_versions(row), strict=True) for row in plan.schedule]
    ops, idle = [], []
    for event, start in reasons.starts.items():
        op, device, begin, end = event
        (in_flight, _), kept = next(held[device])
        what = [device, short_name(event), op.kind, op.microbatch, op.version]
        when = [place[begin], place[end], number_of[start.needed] if start.needed else -1]
        ops.append([*what, *when, number(reasons.reads(op)), in_flight, number(kept)])
    for gap in gaps:
        order, other = reasons.order(gap)
        when = [place[gap.start], place[gap.end]]
        named = [number_of[e] if e else -1 for e in (gap.next, gap.needed, other)]
        idle.append([gap.device, *when, gap.cause, *named[:2], number(order), named[2]])
    path = [number_of[event] for event in critical_path(plan)]
    names = {"name": plan.name.strip(), "about": about(plan), "gpus": len(plan.schedule)}
    names["busy"] = f"{utilization(plan.events):.1%}"
    return {**names, "times": times, "texts": [*texts], "ops": ops, "idle": idle, "path": path}


def kept_versions(row: list[Op]) -> list[str]:
    """The weight versions alive on a GPU after each op of its row: "v0 v1"."""
    last_reader, kept = last_readers(row), []
    alive = {(op.stage, 0) for op in row}
    for op in row:
        alive |= {(op.stage, op.version + 1)} if op.kind == "U" else set()
        alive -= {(op.stage, op.version)} if last_reader[op.stage, op.version] is op else set()
        kept.append(" ".join(f"v{v}" for v in sorted({version for _, version in alive})))
    return kept


def about(plan: Plan) -> str:
    """One sentence: the first of the schedule's docstring; of a variant, what it does."""
    if plan.name != plan.name.strip():
        return ", ".join(schedule_name(plan.config)) + "."
    if plan.name not in LIBRARY:
        return "The rows of a file."
    if plan.name == "pipedream":  # its function is that of 1F1B
        return "1F1B without a flush: the batches of the run are one stream of microbatches."
    return (LIBRARY[plan.name][0].__doc__ or "").partition("\n")[0]
