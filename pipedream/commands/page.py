"""Why is this GPU idle? A page that plays every schedule.

    python -m pipedream page                    then open pipeline.html in a browser
    python -m pipedream page --num_stages 6     with a run of your own, beside the sizes it has
    python -m pipedream page --out pages        in another folder, created if necessary

The page is one file and needs no network. It has 2, 4 or 8 GPUs, 4 to 16 microbatches, and slow
backwards and links to choose from. Point at an op: what did it need, and which weights did it read?
Point at an idle GPU: what does it wait for? Put two schedules under each other on one time axis, or
hide the future and guess what a GPU does next.

It is page.html, which lies beside this file, with the simulated runs of all schedules in it. The
page only draws them: rows, times, causes and sentences come from the package.
"""

import base64
import gzip
import itertools
import json
from functools import partial
from importlib.resources import files
from pathlib import Path

from pipedream.backstage.measures import CAUSES, Idle, held_by, idle_times, in_short
from pipedream.backstage.output import write
from pipedream.backstage.text import progress
from pipedream.schedules.files import file_of
from pipedream.schedules.plans import PLAN_CONFIG, Plan, all_plans, schedule_name, variant_of
from pipedream.schedules.reasons import SAYS, Reasons, critical_path
from pipedream.schedules.rows import LIBRARY
from pipedream_simple import NAMES, Op, UserError, count, last_readers, utilization

FLAGS = {"--out DIR": "folder for the page"}

CHOICES: dict[str, tuple[str, list]] = {  # key -> its name in the page, and what it may be there
    "num_stages": ("GPUs", [2, 4, 8]),
    "num_microbatches": ("microbatches", [4, 8, 16]),
    "backward_time": ("a backward takes", [1, 2]),
    "comm_time": ("a message takes", [0, 0.5]),
}
CUT = {"layers_per_stage": 4, "chunks_per_gpu": 2}  # so that every schedule can be shown
MOST_OPS = 60_000  # of all schedules together: more would be slow to draw
TEMPLATE = files("pipedream.commands") / "page.html"


def main(config: dict, out: Path = Path()) -> None:
    path = out / "pipeline.html"
    own = config if config != PLAN_CONFIG else None
    write(path, partial(write_page, own, sizes()), file_of(config))
    progress("")
    print(f"{path}: open it in a browser")


def sizes() -> list[dict]:
    """A config for each of the CHOICES; the more microbatches in a batch, the fewer batches."""
    configs = []
    for values in itertools.product(*(values for _, values in CHOICES.values())):
        chosen = dict(zip(CHOICES, values, strict=True))
        batches = {"num_batches": max(2, 20 // chosen["num_microbatches"])}
        configs.append({**PLAN_CONFIG, **CUT, **chosen, **batches})
    return configs


def write_page(own: dict | None, configs: list[dict], path: Path) -> None:
    """Put the runs of all these configs into the template, each packed; it opens on the own one."""
    runs = {"own": packed(page_data(own))} if own else {}
    for number, config in enumerate(configs, 1):
        progress(f"page: {number} of {len(configs)} sizes")
        runs[" ".join(str(config[key]) for key in CHOICES)] = packed(page_data(config))
    default = " ".join(str(PLAN_CONFIG[key]) for key in CHOICES)
    shared = {
        "choices": [*CHOICES.values()],
        "default": default,
        "opens": "own" if own else default,
        "story": NAMES,
        "causes": CAUSES,
        "says": SAYS,
        "looks": looks(),
        "runs": runs,
    }
    data = json.dumps(shared).replace("<", "\\u003c")
    path.write_text(TEMPLATE.read_text("utf-8").replace("{{data}}", data), "utf-8")


def packed(run: dict) -> str:
    """A run as text. The rows of its plans become columns, and each number the step from the last.

    Those are alike from op to op and from plan to plan, so they pack into two bytes an op.
    """
    columns = {}
    for key in ("ops", "idle"):
        table = zip(*(row for plan in run["plans"] for row in plan[key]), strict=True)
        columns[key] = [[b - a for a, b in itertools.pairwise([0, *column])] for column in table]
    plans = [{**p, "ops": len(p["ops"]), "idle": len(p["idle"])} for p in run["plans"]]
    text = json.dumps({**run, **columns, "plans": plans}, default=float, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def page_data(config: dict) -> dict:
    """All that the page shows at this CONFIG. UserError: a bad config, or too many ops."""
    plans, reasons = all_plans(config)
    num_ops = sum(len(plan.events) for plan in plans)
    if num_ops > MOST_OPS:
        ops = f"the schedules have {num_ops:,} ops, and a page holds {MOST_OPS:,} at most"
        raise UserError(f"{ops}: try fewer num_batches or num_microbatches")
    own = plans[-1].name if file_of(config) else variant_of(config)
    opens = "1f1b" if own == PLAN_CONFIG["schedule"] else own  # unless the reader named another
    return {
        "settings": settings(config, plans[-1]),
        "left_out": " ".join(reasons),
        "first": [plan.name for plan in plans].index(opens),
        "plans": [*map(plan_data, plans)],
    }


def settings(config: dict, plan: Plan) -> str:
    """The sizes of the plan, and the times."""
    in_batch = count(plan.config["num_microbatches"], "microbatch")
    sizes = count(len(plan.schedule), "GPU"), f"{in_batch} per batch"
    f, b, message = (config[key] for key in ("forward_time", "backward_time", "comm_time"))
    times = f"a forward takes {f}, a backward {b}, a message {message}"
    return ", ".join([*sizes, count(config["num_batches"], "batch"), times])


def looks() -> dict:
    """What color may say -> kind of op -> colors of box and label, one pair for each hue."""
    from matplotlib.colors import to_hex

    from pipedream_visual import HUES, KINDS, VERSION_HUES, colors

    found: dict[str, dict] = {}
    for versions, (what, hues) in enumerate({"microbatch": HUES, "version": VERSION_HUES}.items()):
        for kind in KINDS:
            pairs = [colors(Op(0, kind, n, n), versions) for n in range(len(hues))]
            found.setdefault(what, {})[kind] = [(to_hex(fill), ink) for fill, ink in pairs]
    return {**found, "kinds": KINDS}


def plan_data(plan: Plan) -> dict:
    """The run of one schedule, in numbers.

    times   when something begins or ends; ops and idle times name a time by its place in this list
    texts   words and sentences, named in the same way
    stages  GPU by GPU how the names of its ops begin, for each of its stages: 5 in 5F3
    ops     GPU by GPU: [gpu, which of its stages, kind, microbatch, version, start, end, op needed
            (its place here, or -1), why this version, in flight and versions alive afterwards]
    idle    [gpu, start, end, cause, the op that comes next, the op needed, why in this order, and
            the op that could have run]
    path    the ops of the critical path
    batch   when the first batch ends
    opens   the idle time to begin with: one that ends halfway through the first batch, or nearly
    asks    a GPU, and a time at which its next step is worth a guess
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
    events = sorted(plan.events, key=lambda event: event.device)
    number_of = {event: i for i, event in enumerate(events)}
    in_flight = [in_short(number for number, _ in held_by(row)) for row in plan.schedule]
    kept = map(kept_versions, plan.schedule)
    held = [zip(*both, strict=True) for both in zip(in_flight, kept, strict=True)]
    stages = [sorted({op.stage for op in row}) for row in plan.schedule]
    ops, idle = [], []
    for event in events:
        (op, device, begin, end), needed = event, reasons.starts[event].needed
        what = [device, stages[device].index(op.stage), number(op.kind), op.microbatch, op.version]
        when = [place[begin], place[end], number_of[needed] if needed else -1]
        ops.append([*what, *when, number(reasons.reads(op)), *map(number, next(held[device]))])
    for gap in gaps:
        order, other = reasons.order(gap)
        when = [place[gap.start], place[gap.end], number(gap.cause)]
        named = [number_of[e] if e else -1 for e in (gap.next, gap.needed, other)]
        idle.append([gap.device, *when, *named[:2], number(order), named[2]])
    path = [number_of[event] for event in critical_path(plan)]
    names = {"name": plan.name.strip(), "about": about(plan), "gpus": len(plan.schedule)}
    names["stages"] = [[str(s) * (s != gpu) for s in row] for gpu, row in enumerate(stages)]
    names["busy"] = f"{utilization(plan.events):.1%}"
    first = [e.end for e in events if e.op.microbatch < plan.config["num_microbatches"]]
    waits = [gap for gap in gaps if gap.cause in ("wait", "send", "link")] or gaps
    halfway = max(first) / 2
    telling = min(waits, key=lambda gap: (abs(gap.end - halfway), gap.device), default=None)
    names["batch"] = place[max(first)]
    names["opens"] = gaps.index(telling) if telling else -1
    gpu, time = asks(plan, telling)
    names["asks"] = gpu, place[time]
    return {**names, "times": times, "texts": [*texts], "ops": ops, "idle": idle, "path": path}


def asks(plan: Plan, gap: Idle | None) -> tuple[int, float]:
    """The GPU and the time of a good question: what does it do next?

    Where one stage after another runs, or all forwards first: when it begins to wait. With 1F1B:
    when its wait is over. Without a flush: when the first batch's forwards are done on GPU0.
    """
    if plan.config["schedule"] == "pipedream":
        rows = [e for e in plan.events if e.device == 0 and e.op.kind == "F"]
        return 0, rows[plan.config["num_microbatches"] - 1].end
    if gap is None:
        return 0, 0
    return gap.device, gap.start if plan.name in ("naive", "gpipe") else gap.end


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
