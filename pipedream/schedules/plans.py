"""What do the GPUs do in the whole run, and when? Any schedule or CSV file, simulated."""

import contextlib
import inspect
import itertools
import math
import textwrap
from collections import Counter
from collections.abc import Callable, Container, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

import pipedream_simple as simple
from pipedream.backstage.measures import in_short, peak_in_flight, peak_versions, rounded, staleness
from pipedream.backstage.text import shorten, shown
from pipedream.schedules.files import check_rows, file_of, read_csv, what_was_skipped
from pipedream.schedules.rows import LIBRARY, limited

PLAN_CONFIG = {
    **simple.CONFIG,
    "chunks_per_gpu": 3,  # stages on each GPU: interleaved, looped-bfs, interleaved-zb
    "overlap_time": 1,  # of a forward and a backward at once (dualpipe-v): a part of the two alone
    "in_flight": 0,  # microbatches in flight on GPU0, for 1f1b and pipedream; 0: num_stages
    "weight_gradient_time": 0,  # W's part of a backward, or one per stage; 0: half of it
}
PLAN_RULES = {
    **simple.RULES,
    "chunks_per_gpu": (int, 1, 1_000_000),
    "in_flight": (int, 0, 1_000_000),
    "overlap_time": (float, 0.01, 1),
    "weight_gradient_time": simple.RULES["comm_time"],
}


class Plan(NamedTuple):
    """A schedule that can be simulated and trained, and its simulated run."""

    name: str  # of the schedule, or of the file: short, in letters that every font has
    config: dict  # PLAN_CONFIG's keys; num_stages counts stages, not GPUs
    schedule: simple.Schedule
    events: list[simple.Event]
    links: dict[tuple[int, int], list[simple.Event]]  # (from, to) -> messages, as simulate has them
    pairs: frozenset[simple.Step] = frozenset()  # the F that run at the same time as the next op

    def rounded(self) -> "Plan":
        """The same with times as in tick: ops and messages that follow each other meet."""
        links = {ends: rounded(link) for ends, link in self.links.items()}
        return self._replace(events=rounded(self.events), links=links)

    def __str__(self) -> str:
        time, busy = simple.makespan(self.events), simple.utilization(self.events)
        return f"{self.name.strip()}: {time:.7g} time units, {busy:.1%} busy"

    def __repr__(self) -> str:
        return f"Plan({self})"


def make_plan(config: dict) -> Plan:
    """What the GPUs do in the whole run, and when. UserError: a bad config, or a deadlock.

    config has the keys of PLAN_CONFIG. num_stages is the number of GPUs, with layers_per_stage
    layers each; where a GPU holds several stages, they share its layers and its times evenly. A CSV
    file has its own number of GPUs and microbatches; those of config are not used.
    """
    config = settle({key: value for key, value in config.items() if key in PLAN_CONFIG})
    name = config["schedule"]
    num_devices, in_batch, num_batches = (config[key] for key in simple.SIZES)
    list_batch, flush = batch_lister(config)
    few = min(in_batch, 2 * num_devices)  # microbatches: enough to see who holds which stage
    config = in_stages(config, simple.list_run(list_batch, True, num_devices, few, 1))
    rows = simple.list_run(list_batch, flush, num_devices, in_batch, num_batches)
    check_rows(rows, name[-200:])
    pairs = frozenset((s, "F", m) for row in rows for s, kind, m in row if kind == "F&")
    rows = [[(s, kind.rstrip("&"), m) for s, kind, m in row] for row in rows]
    switches = config["weight_stashing"], config["vertical_sync"]
    schedule = simple.pin_versions(rows, in_batch, *switches)
    try:
        events, links = run_rows(schedule, config, pairs)
    except ValueError as error:  # a deadlock
        waits = ", ".join(shorten(str(error).split(", "), 4, "GPUs"))
        raise simple.UserError(f"{name[-200:]}: {waits}") from None
    return Plan(label(name), config, schedule, events, links, pairs)


def run_rows(schedule: simple.Schedule, config: dict, pairs: Container, times: dict | None = None):
    """The events of a schedule, as simulate finds them, and what the links carry meanwhile.

    pairs: each of these F is one op with the backward that comes next in its row. It starts when
    both inputs are there, and takes overlap_time times as long as the two alone; then both results
    are there. times: as of times_of, which they replace.
    """
    times, links = times or times_of(config), dict[tuple[int, int], list[simple.Event]]()
    neighbors = itertools.chain.from_iterable(map(itertools.pairwise, schedule))
    second = {op: other for op, other in neighbors if op[:3] in pairs}
    seconds = {*second.values()}

    def takes(op: simple.Op) -> float:
        alone = times[op.kind][op.stage]
        if other := second.get(op):
            return config["overlap_time"] * (alone + times[other.kind][other.stage])
        return 0 if op in seconds else alone

    def inputs(op: simple.Op, num_stages: int) -> list[simple.Step]:
        ops = [op, second[op]] if op in second else [] if op in seconds else [op]
        return [step for each in ops for step in simple.inputs_of(each, num_stages)]

    events = simple.simulate(schedule, config, takes, inputs, links)
    start = {second[e.op]: e.start for e in events if e.op in second}
    events = [e._replace(start=start.get(e.op, e.start)) for e in events]
    return sorted(events, key=lambda event: event.start), links


def label(name: str) -> str:
    """A schedule's name; or a short one for a file, different from those of the schedules."""
    if name in LIBRARY:
        return name
    ascii_stem = Path(name).stem.strip().encode("ascii", "replace").decode()
    stem = ascii_stem[:16].strip().replace("$", "?")  # in a picture $ would begin a formula
    return f"{stem or 'file'}.csv" if stem in ("", *LIBRARY) else stem


def batch_lister(config: dict) -> tuple[Callable[..., Iterable[simple.Step]], bool]:
    """What lists one batch of a GPU: (device, num_devices, num_microbatches); and does it flush?"""
    if file := file_of(config):
        rows = read_csv(file)
        return (lambda device, *_: rows[device]), True
    list_batch, flush = LIBRARY[config["schedule"]]
    if list_batch is simple.one_f_one_b and config["in_flight"]:
        list_batch = partial(limited, in_flight=config["in_flight"])
    if "stages_per_gpu" in inspect.signature(list_batch).parameters:
        layers, stages = config["layers_per_stage"], config["chunks_per_gpu"]
        if layers % stages:
            rule = f"must be a multiple of chunks_per_gpu={stages} for {config['schedule']}"
            raise simple.UserError(f"layers_per_stage={layers} {rule}")
        list_batch = partial(list_batch, stages_per_gpu=stages)
    return list_batch, flush


def in_stages(config: dict, rows: list[list[simple.Step]]) -> dict:
    """config for the stages in these rows, instead of GPUs: the same network, cut finer."""
    host = {stage: device for device, row in enumerate(rows) for stage, _, _ in row}
    hosts = [host[stage] for stage in sorted(host)]
    num_stages, on_device = len(hosts), Counter(hosts)
    if hosts == [*range(num_stages)]:  # one on each GPU, in order
        return config
    num_layers = config["num_stages"] * config["layers_per_stage"]
    if num_layers % num_stages:
        what = f"num_stages * layers_per_stage is {simple.count(num_layers, 'layer')}"
        step = num_stages // math.gcd(num_stages, config["num_stages"])  # a multiple of it divides
        advice = f"try --layers_per_stage {step * math.ceil(config['layers_per_stage'] / step)}"
        stages = f"{num_stages} stages, on {simple.count(config['num_stages'], 'GPU')}"
        raise simple.UserError(f"{what}, which cannot be split evenly into {stages}: {advice}")
    cut = {**config, "num_stages": num_stages, "layers_per_stage": num_layers // num_stages}
    for key in ("forward_time", "backward_time", "weight_gradient_time", "comm_time"):
        per_gpu = simple.per_stage(config, key)
        cut[key] = [per_gpu[d] / (1 if key == "comm_time" else on_device[d]) for d in hosts]
    check_plan_config(cut)
    return cut


def times_of(config: dict) -> dict[str, list[float]]:
    """How long an op of each kind takes on each stage: as op_times, with I and W.

    W takes weight_gradient_time, or half of backward_time, and I the rest of B. An update takes no
    time, unless config has an update_time.
    """
    config = {"weight_gradient_time": 0, "update_time": 0, **config}
    times, backward = simple.op_times(config), simple.per_stage(config, "backward_time")
    given = simple.per_stage(config, "weight_gradient_time")
    w = [w or b / 2 for w, b in zip(given, backward, strict=True)]
    i = [b - w for b, w in zip(times["B"], w, strict=True)]
    return {**times, "I": i, "W": w, "U": simple.per_stage(config, "update_time")}


# ------------------------------------------------------------------------------------- config


def story_config(config: dict) -> dict:
    """The keys that pipedream_simple.py knows."""
    return {key: config[key] for key in simple.CONFIG}


def settle(config: dict, given: Iterable[str] = ()) -> dict:
    """config, checked, and with the sizes of the CSV file that its schedule may be.

    given: the keys that the reader set. UserError if the file has other sizes than these.
    """
    if not isinstance(config, dict):
        raise simple.UserError(f"config={shown(config)} must be a dict, such as PLAN_CONFIG")
    config = {k: v.item() if isinstance(v, np.generic) else v for k, v in config.items()}
    file, sizes = file_of(config), dict[str, int]()
    if file:
        rows = read_csv(file)
        num_microbatches = 1 + max(m for row in rows for _, _, m in row)
        sizes = {"num_stages": len(rows), "num_microbatches": num_microbatches}
    for key, size in sizes.items():
        if key in given and config[key] != size:
            file_has = f"in {str(file)[-200:]} it is {size}: leave out the flag"
            raise simple.UserError(f"{key}={shown(config[key])}, but {file_has}")
    number, batch_size = sizes.get("num_microbatches", 1), config.get("batch_size")
    if isinstance(batch_size, int) and batch_size % number:
        rule = f"must be a multiple of the {number} microbatches in {str(file)[-200:]}"
        advice = f"try --batch_size {number * math.ceil(batch_size / number)}"
        raise simple.UserError(f"batch_size={batch_size} {rule}: {advice}")
    check_plan_config({**config, **sizes})
    return {**config, **sizes}


def describe_file(config: dict) -> list[str]:
    """Of a CSV file: which schedule's rows these are, and what was left out of it."""
    if not (file := file_of(config)):
        return []
    rows, names = read_csv(file), []
    sizes = len(rows), 1 + max(m for row in rows for _, _, m in row)
    stages = len({stage for stage, *_ in rows[0]})
    for name, (list_batch, flush) in LIBRARY.items():
        more = [stages] * ("stages_per_gpu" in inspect.signature(list_batch).parameters)
        with contextlib.suppress(simple.UserError):  # not at these sizes
            if flush and rows == [
                [*list_batch(device, *sizes, *more)] for device in range(len(rows))
            ]:
                names.append(name)
    said = f"{label(config['schedule'])}: these are the rows of {', '.join(names)}."
    return [said] * bool(names) + [*filter(None, [what_was_skipped(file)])]


def check_plan_config(config: dict) -> None:
    """Like check_config; the schedule may also be one of the library's, or a CSV file."""
    files = [config["schedule"]] if file_of(config) else []
    simple.check_config(config, {**PLAN_RULES, "schedule": [*LIBRARY, "FILE.csv", *files]})
    halves = (simple.per_stage(config, key) for key in ("weight_gradient_time", "backward_time"))
    if any(w and not 0.001 <= w / b <= 0.999 for w, b in zip(*halves, strict=True)):
        what = f"weight_gradient_time={shown(config['weight_gradient_time'])} must be a part of"
        times = f"backward_time={shown(config['backward_time'])}, from 0.001 to 0.999 of it"
        raise simple.UserError(f"{what} {times}; 0 stands for half")


# ----------------------------------------------------------------------------------- variants


def variants(schedules: Iterable[str]) -> dict[str, dict]:
    """name -> settings: the schedules, and PipeDream's other ways with its weights."""
    switches = {"weight_stashing": True, "vertical_sync": False}
    named = {name: {"schedule": name, **switches} for name in schedules}
    named["  vertical sync"] = {**named["pipedream"], "vertical_sync": True}
    named["  no stashing"] = {**named["pipedream"], "weight_stashing": False}
    return named


def variant_of(config: dict) -> str:
    """The name of this config among the variants. With a flush the switches change nothing."""
    if config["schedule"] != "pipedream" or config["weight_stashing"] > config["vertical_sync"]:
        return config["schedule"]
    return "  vertical sync" if config["vertical_sync"] else "  no stashing"


def schedule_name(config: dict) -> tuple[str, str]:
    """How people write the schedule's name, and what it does about weight versions."""
    keeps = {
        "pipedream": "weight stashing",
        "  vertical sync": "weight stashing with vertical sync",
        "  no stashing": "NO weight stashing",
    }.get(variant_of(config), "a flush before every update, so one weight version is enough")
    return simple.NAMES.get(config["schedule"], config["schedule"]), keeps


def all_plans(config: dict) -> tuple[list[Plan], list[str]]:
    """A plan for each schedule at this CONFIG, and the reasons why some are impossible.

    A CSV file comes last, and the others get its number of GPUs and microbatches.
    """
    config = settle(config)
    plans, reasons = [], list[str]()
    names = [name for name in LIBRARY if name != "pipedream"]  # its variants follow it
    for label, settings in variants([*names, "pipedream"]).items():
        try:
            plans.append(make_plan({**config, **settings})._replace(name=label))
        except simple.UserError as error:
            reasons.append(textwrap.fill(f"{label.strip()} is left out: {error}", 80))
    return [*plans, *([make_plan(config)] if file_of(config) else [])], reasons


def format_plans(heading: str, plans: dict[str, Plan], naive: Plan) -> list[str]:
    """A table, one line per plan: speed-up over naive; the last three per GPU, at their peaks."""
    table = [[heading, "time", "speed-up", "busy", "in flight", "versions", "stale"]]
    for name, plan in plans.items():
        _, config, schedule, events, *_ = plan
        time, busy = simple.makespan(events), simple.utilization(events)
        cells = [f"{time:.7g}", f"{simple.makespan(naive.events) / time:.2f}x", f"{busy:.1%}"]
        stale = staleness(schedule, config["num_microbatches"])
        per_gpu = in_short(peak_in_flight(schedule)), peak_versions(schedule), stale
        table.append([name, *cells, *(simple.format_per_gpu([*each]) for each in per_gpu)])
    return simple.format_table(table)
