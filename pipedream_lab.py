#!/usr/bin/env python3
"""Beyond the guide: more schedules, files for other tools, an honest clock, measured memory.

    python pipedream_lab.py compare              every schedule on the same batches, and a picture
    python pipedream_lab.py export my.csv        the rows of a schedule, as PyTorch reads them
    python pipedream_lab.py compare --schedule my.csv   a schedule out of such a file, beside ours
    python pipedream_lab.py profile              how long do the stages take on this device?
    python pipedream_lab.py balance              cut a network so that its slowest stage is fast
    python pipedream_lab.py trace run.json       the simulated run, for Perfetto

CONFIG and its flags are those of pipedream_simple.py; here the schedules are also interleaved and
zb-h1, or a CSV file, and there is one more key, chunks_per_gpu. COMMAND --help says more.

Read it from top to bottom: CONFIG, schedules, files, plan, then a room for each command.
"""

import argparse
import csv
import itertools
import json
import math
import re
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from pipedream_simple import (
    MAX_FORWARDS,
    SCHEDULES,
    Event,
    Op,
    Residual,
    Row,
    Run,
    Schedule,
    UserError,
    Worker,
    build_schedule,
    build_stages,
    check_config,
    choose_device,
    format_table,
    is_whole,
    make_batches,
    make_parser,
    make_workers,
    makespan,
    memory_held,
    nearest,
    parse_config,
    per_stage,
    pin_versions,
    run_main,
    simulate,
    split_batches,
    staleness,
    train,
    utilization,
)
from pipedream_visual import (
    IDLE,
    KINDS,
    LEFT,
    LINE,
    RIGHT,
    add_heading,
    add_lanes,
    add_legend,
    draw_ops,
    house_style,
    make_folder,
    new_picture,
    plot_width,
    rounded,
    save,
)

# ------------------------------------------------------------------------------------- CONFIG

LAB_CONFIG = {  # besides that of pipedream_simple.py
    "chunks_per_gpu": 3,  # stages on a GPU, for interleaved: must divide layers_per_stage
}


# ---------------------------------------------------------------------------------- schedules


def interleaved(
    device: int, num_devices: int, num_microbatches: int, num_batches: int, chunks_per_gpu: int
) -> Row:
    """1F1B on a network that goes round: device d holds the stages d, d + D, d + 2D ...

    A stage is then only 1 / V of what the GPU holds, and the pipeline fills V times as fast: a
    batch takes (V * M + D - 1) / V turns, for V times as many messages. M must be a multiple of D.
    Megatron-LM (Narayanan et al., SC 2021), section 2.2.2.

    >>> from pipedream_simple import format_rows
    >>> print(format_rows(interleaved(device, 2, 2, 1, 2) for device in range(2)))  # D=2, M=2, V=2
    GPU0: F0 F1 F0 F1 B0 B1 B0 B1
    GPU1: F0 F1 F0 B0 F1 B1 B0 B1
    """
    total = num_microbatches * chunks_per_gpu  # forwards of this device in a batch
    warmup = min((chunks_per_gpu - 1) * num_devices + 2 * (num_devices - 1 - device), total)

    def place(k: int, backward: bool) -> tuple[int, int]:
        """(stage, microbatch) of the k-th forward or backward: D microbatches a chunk, in turn."""
        group, within = divmod(k, num_devices)
        round_of_all, chunk = divmod(group, chunks_per_gpu)
        if backward:
            chunk = chunks_per_gpu - 1 - chunk
        return chunk * num_devices + device, round_of_all * num_devices + within

    def op(kind: str, k: int, first: int) -> tuple[int, str, int]:
        stage, m = place(k, backward=kind == "B")
        return stage, kind, first + m

    for first in range(0, num_microbatches * num_batches, num_microbatches):
        for k in range(warmup):
            yield op("F", k, first)
        for k in range(total - warmup):
            yield op("F", k + warmup, first)
            yield op("B", k, first)
        for k in range(total - warmup, total):
            yield op("B", k, first)


def zb_h1(stage: int, num_stages: int, num_microbatches: int, num_batches: int) -> Row:
    """1F1B with its backward in halves: I, the gradient of the input, goes out at once; W waits.

    Only I is needed by others. W, the gradient of the weights, fills time that would be idle: stage
    s does it s microbatches later. So every stage keeps S microbatches, as many as GPU0 anyway, and
    about two thirds of the bubble are gone: with f = I = W = 1 a batch takes 3M + S - 1.
    Zero Bubble Pipeline Parallelism (Qi et al., ICLR 2024), the handcrafted schedule ZB-H1.

    >>> from pipedream_simple import format_rows
    >>> print(format_rows(zb_h1(stage, 2, 3, 1) for stage in range(2)))  # S=2, M=3, N=1
    GPU0: F0 F1 I0 W0 F2 I1 W1 I2 W2
    GPU1: F0 I0 F1 I1 W0 F2 I2 W1 W2
    """
    warmup = min(num_stages - 1 - stage, num_microbatches)
    for first in range(0, num_microbatches * num_batches, num_microbatches):
        for m in range(warmup):
            yield stage, "F", first + m
        for m in range(num_microbatches):
            if m + warmup < num_microbatches:
                yield stage, "F", first + m + warmup
            yield stage, "I", first + m
            if m >= stage:
                yield stage, "W", first + m - stage
        for m in range(max(0, num_microbatches - stage), num_microbatches):
            yield stage, "W", first + m


# -------------------------------------------------------------------------------------- files
#
# The format of torch.distributed.pipelining, compute only: a line a GPU, a cell an op: 0F0, 1B3,
# 2I1, 2W1; an empty cell is an idle slot, and says nothing here: time comes from the simulator.

CELL = re.compile(r"([0-9]{1,6})([FBIW])([0-9]{1,6})")
OVERLAPPED = re.compile(r"\((.+);(.+)\)OVERLAP_F_B")  # two ops at once: here one after the other


def read_csv(path: Path) -> list[list[tuple[int, str, int]]]:
    """The rows of one batch in a CSV file, checked. UserError names what is wrong, and where."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = list(csv.reader(file))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is no CSV file: {error}") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        row = []
        for column, cell in enumerate(line, start=1):
            both = OVERLAPPED.fullmatch(cell.strip())
            for text in both.groups() if both else [cell.strip()]:
                op = CELL.fullmatch(text)
                if text and not op:
                    raise UserError(
                        f"{path}, line {number}, column {column}: {text[:40]!r} is no op: they "
                        "look like 0F0, 1B3, 2I1 or 2W1"
                    )
                if op:
                    row.append((int(op[1]), op[2], int(op[3])))
        rows.append(row)
    while rows and not rows[-1]:
        rows.pop()  # empty lines at the end
    check_rows(rows, str(path))
    return rows


def check_rows(rows: list[list[tuple[int, str, int]]], name: str) -> None:
    """Raise a UserError unless every op stands there once, in an order that can be run."""
    device_of, seen = {}, {}
    for device, row in enumerate(rows):
        if not row:
            raise UserError(f"{name}: GPU{device} has nothing to do")
        for stage, kind, m in row:
            if device_of.setdefault(stage, device) != device:
                raise UserError(
                    f"{name}: stage {stage} is on GPU{device_of[stage]} and GPU{device}"
                )
            if (stage, kind, m) in seen:
                raise UserError(f"{name}: {stage}{kind}{m} stands there twice")
            seen[stage, kind, m] = len(seen)
    if not seen:
        raise UserError(f"{name}: there is no op in it")
    stages = 1 + max(stage for stage, _, _ in seen)
    microbatches = 1 + max(m for _, _, m in seen)
    if stages * microbatches > len(seen):  # at least F of each has to be there
        missing = next(
            f"{s}F{m}"
            for s in range(stages)
            for m in range(microbatches)
            if (s, "F", m) not in seen
        )
        raise UserError(f"{name}: {missing} is missing")
    for s, m in itertools.product(range(stages), range(microbatches)):
        forward, whole = seen.get((s, "F", m)), seen.get((s, "B", m))
        halves = seen.get((s, "I", m)), seen.get((s, "W", m))
        if forward is None:
            raise UserError(f"{name}: {s}F{m} is missing")
        if whole is None and None in halves:
            raise UserError(f"{name}: {s}B{m} is missing, or {s}I{m} with {s}W{m}")
        if whole is not None and halves != (None, None):
            raise UserError(f"{name}: {s}B{m} stands there and one of its halves too")
        order = [forward, whole] if whole is not None else [forward, *halves]
        if order != sorted(order):
            raise UserError(f"{name}: {s}F{m} must stand before its backward, and I before W")


def write_csv(rows: Iterable[Iterable[tuple]], path: Path) -> None:
    """Rows of (stage, kind, microbatch, ...) of one batch, in PyTorch's format, without idles."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerows([f"{stage}{kind}{m}" for stage, kind, m, *_ in row] for row in rows)


# --------------------------------------------------------------------------------------- plan

LAB_SCHEDULES = ("interleaved", "zb-h1")


class Plan(NamedTuple):
    """What simulator and trainer need: a config whose num_stages counts all stages, and rows."""

    name: str
    config: dict
    schedule: Schedule


def check_lab_config(config: dict) -> None:
    """Like check_config; the schedule may also be one of the lab's, or a CSV file."""
    name, known = config["schedule"], [*SCHEDULES, *LAB_SCHEDULES]
    if isinstance(name, str):
        if name not in known and not name.endswith(".csv"):
            hint = nearest(name, known) or f": it must be one of {', '.join(known)}, or a .csv file"
            raise UserError(f"unknown schedule {name!r}{hint}")
        config = {**config, "schedule": "1f1b"}  # any that check_config knows
    check_config(config)


def with_sizes_of(rows: list[list[tuple[int, str, int]]], config: dict) -> dict:
    """The config with as many GPUs and microbatches as these rows have."""
    count = 1 + max(m for row in rows for _, _, m in row)
    return {**config, "num_stages": len(rows), "num_microbatches": count}


def make_plan(config: dict, chunks_per_gpu: int) -> Plan:
    """The rows of config["schedule"] for the whole run, and what they run on.

    config["num_stages"] is the number of GPUs, with layers_per_stage layers each. Where a GPU holds
    several stages they share its layers, and its times, evenly. A CSV file says itself for how many
    GPUs and microbatches it is. The weights are updated after every batch, with a flush.
    """
    name = config["schedule"]
    if name in SCHEDULES:
        return Plan(name, config, build_schedule(config))
    if name == "interleaved":
        rows = list(interleaved_rows(config, chunks_per_gpu))
    elif name == "zb-h1":
        sizes = config["num_stages"], config["num_microbatches"], 1
        rows = [list(zb_h1(stage, *sizes)) for stage in range(config["num_stages"])]
    else:
        rows = read_csv(Path(name))
        config = with_sizes_of(rows, config)
        check_lab_config(config)
    config = spread_stages(config, rows)
    plan = Plan(name, config, repeat(rows, config))
    try:
        simulate(plan.schedule, config)
    except ValueError as error:  # a deadlock
        raise UserError(f"{name}: {error}") from None
    return plan


def interleaved_rows(config: dict, chunks_per_gpu: int) -> Iterable[list[tuple[int, str, int]]]:
    """One batch of it; UserError where the sizes do not allow it."""
    devices, microbatches = config["num_stages"], config["num_microbatches"]
    if microbatches % devices:
        raise UserError(
            f"num_microbatches={microbatches} must be a multiple of num_stages={devices} for the "
            "interleaved schedule"
        )
    check_size(devices * chunks_per_gpu, config)
    for device in range(devices):
        yield list(interleaved(device, devices, microbatches, 1, chunks_per_gpu))


def spread_stages(config: dict, rows: list[list[tuple[int, str, int]]]) -> dict:
    """The config of the stages that these rows name: the same network and times, cut finer."""
    device_of = {stage: device for device, row in enumerate(rows) for stage, _, _ in row}
    on_device = Counter(device_of.values())
    devices, stages = len(rows), len(device_of)
    num_layers = devices * config["layers_per_stage"]
    if num_layers % stages:
        raise UserError(
            f"layers_per_stage={config['layers_per_stage']}: {num_layers} layers on {devices} GPUs "
            f"cannot be split evenly into {stages} stages"
        )
    times = {}
    for key in ("forward_time", "backward_time", "comm_time"):
        per_gpu = per_stage(config[key], devices)
        share = Counter(dict.fromkeys(on_device, 1)) if key == "comm_time" else on_device
        gpus = [device_of[stage] for stage in range(stages)]
        times[key] = [per_gpu[gpu] / share[gpu] for gpu in gpus]
    return {**config, **times, "num_stages": stages, "layers_per_stage": num_layers // stages}


def check_size(num_stages: int, config: dict) -> None:
    """Raise a UserError if that many stages are more than one run may hold."""
    count = num_stages * config["num_microbatches"] * config["num_batches"]
    if count > MAX_FORWARDS:
        what = f"{num_stages:,} stages * num_microbatches * num_batches is {count:,}"
        raise UserError(f"{what}: at most {MAX_FORWARDS:,} fit")


def repeat(rows: list[list[tuple[int, str, int]]], config: dict) -> Schedule:
    """The rows of one batch, batch after batch, with an update after each."""
    check_size(config["num_stages"], config)
    count, batches = config["num_microbatches"], range(config["num_batches"])
    whole = [
        [(stage, kind, m + b * count) for b in batches for stage, kind, m in row] for row in rows
    ]
    return pin_versions(whole, count)


# ------------------------------------------------------------------------------------- memory


class Bytes(NamedTuple):
    """What a GPU holds, each at its own peak over the run."""

    weights: int  # of all versions alive
    activations: int  # kept for the backwards of the microbatches in flight
    gradients: int  # of the batch so far


class MemoryMeter:
    """Counts real bytes while train runs: give it as watch, inside `with meter.hooks()`.

    PyTorch tells the hooks every tensor that autograd saves for a backward. Two tensors in one
    piece of memory count once per GPU, and weights, which a layer saves too, count as weights.
    """

    def __init__(self, schedule: Schedule):
        self.device_of = {op.stage: device for device, row in enumerate(schedule) for op in row}
        self.saved: list[torch.Tensor] = []  # by the op that runs
        self.kept: dict[tuple[int, int], dict[int, int]] = {}  # (stage, microbatch) -> {at: bytes}
        self.weights, self.gradients = Counter(), Counter()  # by stage
        self.peak = [Bytes(0, 0, 0) for _ in schedule]

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        def pack(tensor: torch.Tensor) -> torch.Tensor:
            self.saved.append(tensor.detach())
            return tensor

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)

    def __call__(self, op: Op, worker: Worker) -> None:
        versions = [w for weights in worker.versions.values() for w in weights.values()]
        if op.kind == "F":
            own = {w.data_ptr() for w in versions}
            pieces = {t.data_ptr(): size(t) for t in self.saved if t.data_ptr() not in own}
            self.kept[op.stage, op.microbatch] = pieces
        elif op.kind in ("B", "W"):
            del self.kept[op.stage, op.microbatch]
        self.saved.clear()
        self.weights[op.stage] = sum(map(size, versions))
        self.gradients[op.stage] = sum(map(size, worker.gradient.values()))
        device = self.device_of[op.stage]
        here = {stage for stage, d in self.device_of.items() if d == device}
        activations = {}
        for (stage, _), pieces in self.kept.items():
            if stage in here:
                activations.update(pieces)
        now = Bytes(
            sum(self.weights[stage] for stage in here),
            sum(activations.values()),
            sum(self.gradients[stage] for stage in here),
        )
        self.peak[device] = Bytes(*map(max, self.peak[device], now))


def size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def memory_formula(plan: Plan) -> list[Bytes]:
    """What the meter should find, from rows and shapes alone.

    A Linear layer saves its input, tanh its output, and the loss its log-probabilities and labels.
    """
    config, stages = plan.config, build_stages(plan.config)
    images = config["batch_size"] // config["num_microbatches"]
    weights = [sum(map(size, stage.parameters())) for stage in stages]
    numbers = [
        sum(
            2 * layer.linear.in_features if isinstance(layer, Residual) else layer.in_features
            for layer in stage
        )
        for stage in stages
    ]
    activations = [4 * images * count for count in numbers]
    activations[-1] += (
        images * (10 * 4 + 8) + 4
    )  # 10 log-probabilities, a label; the sum of weights
    peaks = []
    for row in plan.schedule:
        last = {(op.stage, op.version): op for op in row}
        held = {
            "weights": sum(weights[stage] for stage in {op.stage for op in row}),
            "activations": 0,
            "gradients": 0,
        }
        most, summed = dict(held), set()
        for op in row:
            held["activations"] += {"F": 1, "B": -1, "W": -1}.get(op.kind, 0) * activations[
                op.stage
            ]
            if op.kind in ("B", "W") and op.stage not in summed:
                summed.add(op.stage)
                held["gradients"] += weights[op.stage]
            if op.kind == "U":
                summed.remove(op.stage)
                held["gradients"] -= weights[op.stage]
                held["weights"] += weights[op.stage]
            if last[op.stage, op.version] is op:
                held["weights"] -= weights[op.stage]
            most = {key: max(most[key], held[key]) for key in held}
        peaks.append(Bytes(**most))
    return peaks


# ------------------------------------------------------------------------------------ compare


def plain_sgd(config: dict) -> torch.Tensor:
    """The weights after training without a pipeline, on whole batches, in float64: one vector."""
    network = nn.Sequential(*build_stages(config)).double()
    optimizer = torch.optim.SGD(network.parameters(), lr=config["learning_rate"])
    for x, y in make_batches(config):
        optimizer.zero_grad()
        cross_entropy(network(x.double()), y).backward()
        optimizer.step()
    return torch.cat([w.detach().flatten() for w in network.parameters()])


def weights_of(run: Run) -> torch.Tensor:
    return torch.cat([w.detach().cpu().flatten() for stage in run.weights for w in stage.values()])


def all_plans(config: dict, chunks_per_gpu: int) -> tuple[list[Plan], list[str]]:
    """A plan for every schedule at this CONFIG, and why some cannot be had.

    A CSV file comes last; then all the others get its number of GPUs and microbatches.
    """
    plans, reasons = [], []
    if config["schedule"].endswith(".csv"):
        from_file = make_plan(config, chunks_per_gpu)
        plans.append(from_file)
        count = from_file.config["num_microbatches"]
        config = {**config, "num_stages": len(from_file.schedule), "num_microbatches": count}
    stashing = {"weight_stashing": True, "vertical_sync": False}
    variants = [(name, {"schedule": name, **stashing}) for name in (*SCHEDULES, *LAB_SCHEDULES)]
    variants += [
        ("  vertical sync", {**stashing, "schedule": "pipedream", "vertical_sync": True}),
        ("  no stashing", {**stashing, "schedule": "pipedream", "weight_stashing": False}),
    ]
    variants.sort(key=lambda variant: "pipedream" in variant[1]["schedule"])  # flushes first
    for place, (label, settings) in enumerate(variants):
        try:
            plan = make_plan({**config, **settings}, chunks_per_gpu)
            plans.insert(place - len(reasons), plan._replace(name=label))
        except UserError as error:
            reasons.append(f"{label} is not here: {error}")
    return plans, reasons


def measure_plan(plan: Plan, naive_time: float, reference: torch.Tensor) -> tuple[list[str], list]:
    """A line of the table, and the memory of each GPU, as measured and as the formula says."""
    config, schedule = plan.config, plan.schedule
    events = simulate(schedule, config)
    busy = utilization(events)
    meter = MemoryMeter(schedule)
    with meter.hooks():
        run = train(config, watch=meter, schedule=schedule)
    exact = weights_of(train({**config, "device": "cpu"}, torch.float64, schedule=schedule))
    line = [
        plan.name,
        f"{makespan(events):.10g}",
        f"{naive_time / makespan(events):.2f}x",
        f"{busy:.1%}",
        f"{1 - busy:.1%}",
        f"{max(sum(peak) for peak in meter.peak) / 1024:,.0f} KiB",
        str(max(run.peak_versions)),
        str(max(staleness(schedule, config["num_microbatches"]))),
        f"{run.losses[-1]:.4f}",
        f"{run.test_accuracy:.1%}",
        f"{(exact - reference).abs().max():.1e}",
    ]
    return line, [*zip(meter.peak, memory_formula(plan), strict=True)]


COMPARE_HEAD = "schedule|time|speed-up|busy|bubble|memory|versions|stale|loss|accuracy|to SGD"
COMPARE_LEGEND = """\
   Time is simulated, all else measured. memory: weights, activations and gradients of the fullest
   GPU, each at its peak. versions: of one stage. stale: updates missed. loss: of the last batch.
   to SGD: largest difference of a weight from plain training without a pipeline, in float64."""


def compare(config: dict, chunks_per_gpu: int, out: Path) -> None:
    """Every schedule on the same batches, in one table and in one picture (schedules.png)."""
    make_folder(out)
    plans, reasons = all_plans(config, chunks_per_gpu)
    naive_time = makespan(simulate(plans[0].schedule, plans[0].config))
    reference = plain_sgd(plans[0].config)
    table, memory = [COMPARE_HEAD.split("|")], []
    for plan in plans:
        line, per_gpu = measure_plan(plan, naive_time, reference)
        table.append(line)
        memory.append((plan.name, per_gpu))
    print("\n".join([*format_table(table, gap=2), *reasons, COMPARE_LEGEND]))
    print(
        "\nMemory of GPU0 and of the last GPU at their peaks, in KiB: measured (from the formula)"
    )
    print("\n".join(format_table(memory_table(memory), gap=2)))
    with house_style():
        figure = draw_plans(plans)
        save(out / "schedules.png", partial(figure.savefig))
    print(f"\n{out / 'schedules.png'}: {figure.texts[0].get_text()}")


def memory_table(memory: list[tuple[str, list[tuple[Bytes, Bytes]]]]) -> list[list[str]]:
    table = [["schedule", "", *Bytes._fields]]
    for name, per_gpu in memory:
        for device in sorted({0, len(per_gpu) - 1}):
            measured, formula = per_gpu[device]
            cells = (
                f"{a / 1024:,.1f} ({b / 1024:,.1f})" for a, b in zip(measured, formula, strict=True)
            )
            table.append([name, f"GPU{device}", *cells])
            name = ""
    return table


def plain(name: str) -> str:
    """The name of a schedule or file in letters that every font has, and without formulas."""
    return name.encode("ascii", "replace").decode().replace("$", "?")


def draw_plans(plans: list[Plan]):
    """The simulated runs one below the other on one time axis, until the slowest but naive ends."""
    plans = [plan for plan in plans if plan.name == plan.name.strip()]  # variants look the same
    runs = [(plan, rounded(simulate(plan.schedule, plan.config))) for plan in plans]
    others = [makespan(events) for plan, events in runs if plan.name != "naive"]
    until = max(others, default=makespan(runs[0][1]))
    devices = max(len(plan.schedule) for plan in plans)
    lane = min(42, 3000 / (devices * len(plans)))
    panel = LINE + lane * devices + 50
    top = 3 * LINE
    width = LEFT + plot_width(runs[0][1], until) + RIGHT
    least = min(makespan(events) for _, events in runs)
    fastest = [plain(plan.name) for plan, events in runs if makespan(events) == least]
    title = f"{len(plans)} schedules, one time axis. The fastest: {', '.join(fastest)}"
    lines = [
        "Simulated; a long naive run is cut off. F3: forward of microbatch 3; 8F3: of stage 8, "
        "where a GPU has several."
    ]
    figure = new_picture(width, top + panel * len(plans) + 60, title, lines)
    for row, (plan, events) in enumerate(runs):
        place = top + row * panel
        time = f"{makespan(events):.10g} time units, {utilization(events):.1%} utilization"
        add_heading(figure, place, f"{plain(plan.name)}: {time}")
        axes = add_lanes(figure, place + LINE, lane * len(plan.schedule), len(plan.schedule), until)
        several = plan.config["num_stages"] > len(plan.schedule)
        draw_ops(axes, [event for event in events if event.start < until], stages=several)
    add_legend(figure, [event.op for _, events in runs for event in events], [IDLE])
    return figure


# ------------------------------------------------------------------------------------- export


def export(config: dict, chunks_per_gpu: int, path: Path) -> None:
    """The rows of one batch as a CSV file that torch.distributed.pipelining loads."""
    plan = make_plan({**config, "num_batches": 1}, chunks_per_gpu)
    rows = [[op for op in row if op.kind != "U"] for row in plan.schedule]
    save(path, partial(write_csv, rows))
    ops = sum(map(len, rows))
    print(f"{path}: {plan.name}, {len(rows)} GPUs, {plan.config['num_stages']} stages, {ops} ops")
    if plan.name == "pipedream":
        print("One batch: whoever reads it flushes after it, and has 1F1B.")


# ------------------------------------------------------------------------------------ profile


def measure_stages(config: dict, repeats: int = 20) -> tuple[list[float], list[float]]:
    """Milliseconds of a microbatch's forward and backward on each stage: medians of warm runs."""
    workers = make_workers(config, torch.float32)
    device = choose_device(config["device"])
    x, labels = split_batches({**config, "num_batches": 1}, torch.float32)[0]
    forward, backward = [], []
    for stage, worker in enumerate(workers):
        last = stage == len(workers) - 1
        taken = defaultdict(list)
        for _ in range(3 + repeats):
            op = Op(stage, "F", 0, 0)
            start = now(device)
            output = worker.forward(op, x, labels if last else None)
            middle = now(device)
            worker.backward(op._replace(kind="B"), None if last else torch.ones_like(output))
            taken["F"].append(middle - start)
            taken["B"].append(now(device) - middle)
        forward.append(1000 * statistics.median(taken["F"][3:]))  # the first three warm up
        backward.append(1000 * statistics.median(taken["B"][3:]))
        x = output
    return forward, backward


def now(device: torch.device) -> float:
    """Seconds, when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def profile(config: dict, chunks_per_gpu: int) -> None:
    """Measure the stages on this device; what would as many of it reach with each schedule?"""
    forward, backward = measure_stages(config)
    device = choose_device(config["device"])
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    size = config["batch_size"] // config["num_microbatches"]
    print(f"Measured on {name}: a microbatch of {size} images, milliseconds, medians of warm runs")
    table = [["", "forward", "backward", "backward / forward"]]
    for stage, (f, b) in enumerate(zip(forward, backward, strict=True)):
        table.append([f"stage {stage}", f"{f:.3f}", f"{b:.3f}", f"{b / f:.2f}"])
    print("\n".join(format_table(table)))
    both = [f + b for f, b in zip(forward, backward, strict=True)]
    slowest = both.index(max(both))
    excess = max(both) / statistics.fmean(both) - 1
    if len(both) > 1:
        print(f"Bottleneck: stage {slowest}, {excess:.0%} slower than the mean: all wait for it")

    measured = {**config, "forward_time": forward, "backward_time": backward}
    plans, reasons = all_plans(measured, chunks_per_gpu)
    one_gpu = config["num_microbatches"] * sum(both)
    print(
        f"\nSimulated with these times, {config['num_stages']} such GPUs, one GPU: {one_gpu:.3g} ms"
    )
    table = [["schedule", "ms a batch", "busy", "speed-up over one GPU"]]
    for plan in plans:
        events = simulate(plan.schedule, plan.config)
        batch = makespan(events) / config["num_batches"]
        cells = f"{batch:.3g}", f"{utilization(events):.1%}", f"{one_gpu / batch:.2f}x"
        table.append([plan.name, *cells])
    print("\n".join([*format_table(table), *reasons]))


# ------------------------------------------------------------------------------------ balance


def partition(costs: list[float], num_stages: int) -> list[int]:
    """Where to cut a row of layers into stages so that the slowest stage is as fast as it can be.

    Returns the number of layers in each stage, at least one. Exact, by dynamic programming over the
    first layers and stages: PipeDream's planner (SOSP 2019, section 3.1) without replication and
    without the time to send.

    >>> partition([1, 1, 1, 1, 4], 2)
    [4, 1]
    """
    sums = [0, *itertools.accumulate(costs)]
    best = [0.0] + [math.inf] * len(costs)  # of the first so many layers, in no stage
    cuts = []  # cuts[stages - 1][layers]: where the last of so many stages begins
    for stages in range(1, num_stages + 1):
        longer, cut = [math.inf] * len(best), [0] * len(best)
        before = stages - 1
        for layers in range(stages, len(best)):

            def slowest(begin: int, best=best, layers=layers) -> float:
                return max(best[begin], sums[layers] - sums[begin])

            # More layers before the last stage: those before it slow down, it gets faster. So the
            # best place is where they meet, and moves only forward as layers are added.
            while before + 1 < layers and slowest(before + 1) <= slowest(before):
                before += 1
            longer[layers], cut[layers] = slowest(before), before
        best = longer
        cuts.append(cut)
    counts, layers = [], len(costs)
    for stages in range(num_stages, 0, -1):
        counts.append(layers - cuts[stages - 1][layers])
        layers = cuts[stages - 1][layers]
    return counts[::-1]


def uneven_layers(config: dict) -> list[nn.Module]:
    """A network whose layers differ in cost: as many as CONFIG has, the later the narrower."""
    depth, width = config["num_stages"] * config["layers_per_stage"], config["hidden_size"]
    widths = [64, *(max(10, round(8 * width * (1 - k / depth))) for k in range(depth - 1)), 10]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config["seed"])
        return [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]


def measure_layers(layers: list[nn.Module], config: dict, repeats: int = 20) -> list[tuple]:
    """Milliseconds of forward and backward of single layers: medians of warm runs."""
    device = choose_device(config["device"])
    images = config["batch_size"] // config["num_microbatches"]
    times = []
    for layer in layers:
        layer = layer.to(device)
        x = torch.randn(images, layer.in_features, device=device, requires_grad=True)
        taken = []
        for _ in range(3 + repeats):
            start = now(device)
            output = layer(x).sum()
            middle = now(device)
            output.backward()
            taken.append((1000 * (middle - start), 1000 * (now(device) - middle)))
        times.append(tuple(map(statistics.median, zip(*taken[3:], strict=True))))
    return times


def balance(config: dict, chunks_per_gpu: int) -> None:
    """Measure the layers of a network whose layers differ; cut it evenly, and by their cost."""
    if make_plan(config, chunks_per_gpu).config["num_stages"] != config["num_stages"]:
        raise UserError(
            f"{config['schedule']} has several stages on a GPU: balance cuts one for each"
        )
    times = measure_layers(uneven_layers(config), config)
    costs = [forward + backward for forward, backward in times]
    num_stages = config["num_stages"]
    even = [config["layers_per_stage"]] * num_stages
    print(f"{len(costs)} layers, milliseconds: " + " ".join(f"{cost:.3f}" for cost in costs))
    table = [["", "layers a stage", "ms a stage", "ms a batch", "busy", "speed-up"]]
    first = None
    for name, counts in (("even", even), ("balanced", partition(costs, num_stages))):
        ends = [*itertools.accumulate(counts)]
        parts = [times[end - count : end] for count, end in zip(counts, ends, strict=True)]
        forward, backward = (
            [sum(layer[half] for layer in part) for part in parts] for half in (0, 1)
        )
        settings = {**config, "forward_time": forward, "backward_time": backward}
        plan = make_plan(settings, chunks_per_gpu)
        events = simulate(plan.schedule, plan.config)
        batch = makespan(events) / config["num_batches"]
        first = first or batch
        stages = " ".join(f"{f + b:.3f}" for f, b in zip(forward, backward, strict=True))
        cells = f"{batch:.3g}", f"{utilization(events):.1%}", f"{first / batch:.2f}x"
        table.append([name, " ".join(map(str, counts)), stages, *cells])
    print("\n".join(format_table(table)))


# -------------------------------------------------------------------------------------- trace


def trace(config: dict, chunks_per_gpu: int, path: Path) -> None:
    """The simulated run as a Chrome trace: open it at ui.perfetto.dev or chrome://tracing."""
    plan = make_plan(config, chunks_per_gpu)
    events = simulate(plan.schedule, plan.config)
    content = {"traceEvents": [*trace_events(plan, events)], "displayTimeUnit": "ms"}
    save(path, lambda part: part.write_text(json.dumps(content), "utf-8"))
    print(
        f"{path}: {plan.name}, {len(content['traceEvents']):,} events; open it at ui.perfetto.dev"
    )


def trace_events(plan: Plan, events: list[Event]) -> Iterable[dict]:
    """A track a GPU, an event an op, arrows for what is sent, counters for what is held.

    A time unit of the simulation is a millisecond of the trace, whose own unit is the microsecond.
    """
    for device in range(len(plan.schedule)):
        name = {"name": f"GPU{device}"}
        yield {"ph": "M", "name": "process_name", "pid": device, "args": name}
    at = {}
    for op, device, start, end in events:
        at[op.stage, op.kind, op.microbatch] = device, start, end
        if op.kind == "U":
            args = {"version": f"v{op.version} -> v{op.version + 1}"}
            yield {"ph": "i", "s": "p", "name": f"update stage {op.stage}", "pid": device, "tid": 0,
                   "ts": 1000 * start, "args": args}  # fmt: skip
        else:
            args = {"stage": op.stage, "microbatch": op.microbatch, "version": op.version}
            yield {"ph": "X", "name": str(op), "cat": KINDS[op.kind], "pid": device, "tid": 0,
                   "ts": 1000 * start, "dur": 1000 * (end - start), "args": args}  # fmt: skip
    number = itertools.count()
    for (stage, kind, m), (device, start, end) in at.items():
        to = (stage + 1, ["F"]) if kind == "F" else (stage - 1, ["B", "I"])
        for receiver in [at.get((to[0], other, m)) for other in to[1] if kind in "FBI"]:
            if receiver and receiver[0] != device:
                flow = {"name": "activations" if kind == "F" else "gradients", "cat": "sent",
                        "id": next(number), "tid": 0}  # fmt: skip
                yield {**flow, "ph": "s", "pid": device, "ts": 1000 * (start + end) / 2}
                there = 1000 * (receiver[1] + receiver[2]) / 2
                yield {**flow, "ph": "f", "bp": "e", "pid": receiver[0], "ts": there}
    ended = {event.op: event.end for event in events}
    for device, row in enumerate(plan.schedule):
        for op, (in_flight, alive) in zip(row, memory_held(row), strict=True):
            each = " (of each stage)" if len({op.stage for op in row}) > 1 else ""
            held = {f"microbatches in flight{each}": in_flight, f"weight versions{each}": alive}
            for name, count in held.items():
                yield {"ph": "C", "name": name, "pid": device, "ts": 1000 * ended[op],
                       "args": {"count": count}}  # fmt: skip


# --------------------------------------------------------------------------------------- main

COMMANDS: dict[str, Callable] = {
    "compare": compare,
    "export": export,
    "profile": profile,
    "balance": balance,
    "trace": trace,
}
FILES = {
    "export": "my.csv",
    "trace": "run.json",
}  # commands that write the file that they are given


def parse_lab_config(
    parser: argparse.ArgumentParser, argv: list[str] | None = None
) -> tuple[dict, int, dict]:
    """The checked config, chunks_per_gpu, and what other flags said. A CSV file sets its sizes."""
    help = f"stages on a GPU, for interleaved (now {LAB_CONFIG['chunks_per_gpu']})"
    parser.add_argument("--chunks_per_gpu", "--chunks-per-gpu", type=int, metavar="X", help=help)
    config, other = parse_config(parser, argv, check=lambda config: None)
    if isinstance(config["schedule"], str) and config["schedule"].endswith(".csv"):
        config = with_sizes_of(read_csv(Path(config["schedule"])), config)
    check_lab_config(config)
    chunks = other.pop("chunks_per_gpu", LAB_CONFIG["chunks_per_gpu"])
    if not is_whole(chunks, 1, 10**6):
        raise UserError(f"chunks_per_gpu={chunks!r} must be a whole number, 1 to 1,000,000")
    return config, chunks, other


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("", "-h", "--help"):
        print(__doc__)
        return
    if name not in COMMANDS:
        hint = nearest(name, COMMANDS) or f": it must be one of {', '.join(COMMANDS)}"
        raise UserError(f"unknown command {name!r}{hint}")
    parser = make_parser(COMMANDS[name].__doc__)
    parser.prog = f"{Path(sys.argv[0]).name} {name}"
    if name in FILES:
        parser.add_argument("file", type=Path, metavar=FILES[name], help="the file to write")
    if name == "compare":
        parser.add_argument("--out", type=Path, metavar="DIR", help="folder for schedules.png")
    config, chunks, other = parse_lab_config(parser, sys.argv[2:])
    extra = [other["file"]] if name in FILES else []
    if name == "compare":
        extra = [other.get("out", Path())]
    COMMANDS[name](config, chunks, *extra)


if __name__ == "__main__":
    sys.exit(run_main(main))
