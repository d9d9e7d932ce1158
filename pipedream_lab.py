#!/usr/bin/env python3
"""Which schedule? More of them, files for other tools, and memory in bytes.

    python pipedream_lab.py compare              every schedule on the same batches, and a picture
    python pipedream_lab.py why                  why are the GPUs idle? or --gpu 1 --time 4
    python pipedream_lab.py in_flight            what if each GPU ran one more forward ahead?
    python pipedream_lab.py export my.csv        write a schedule as PyTorch reads it
    python pipedream_lab.py compare --schedule my.csv   read one, and compare it with ours
    python pipedream_lab.py papers               do the numbers agree with the papers?
    python pipedream_lab.py trace run.json       the simulated run, for Perfetto
    python pipedream_lab.py worth                loss against simulated time: does no flush pay?
    python pipedream_lab.py staleness            what do old gradients cost? by optimizer, remedy

CONFIG and its flags are those of pipedream_simple.py. Here the schedule may also be interleaved,
zb-h1, zb-h2 or a CSV file, and there are three more keys: chunks_per_gpu, in_flight and
weight_gradient_time. COMMAND --help says more.
"""

import csv
import io
import itertools
import json
import math
import re
import signal
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import NamedTuple
from weakref import WeakSet

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during a slow import: no traceback

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge, saved_tensors_hooks
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector

from pipedream_simple import (
    CAUSES,
    CONFIG,
    RECOMPUTED,
    RULES,
    SCHEDULES,
    SUMMARY,
    Event,
    Idle,
    Op,
    Residual,
    Run,
    Schedule,
    Step,
    UserError,
    Weights,
    Worker,
    build_schedule,
    build_stages,
    check_config,
    check_value,
    choose_device,
    clock,
    count,
    dependencies,
    format_per_gpu,
    format_table,
    idle_times,
    input_of,
    makespan,
    memory_held,
    nearest,
    one_f_one_b,
    parse_config,
    parse_value,
    peak_versions,
    per_stage,
    pin_versions,
    result_of,
    rounded,
    run_main,
    short_name,
    shorten,
    shown,
    simulate,
    split_batches,
    staleness,
    summarize,
    tick,
    train,
    utilization,
    variants,
)

LAB_CONFIG = {
    **CONFIG,
    "chunks_per_gpu": 3,  # stages on each GPU, for the interleaved schedule
    "in_flight": 0,  # microbatches in flight on GPU0, for 1f1b and pipedream; 0: num_stages
    "weight_gradient_time": 0,  # W's part of a backward, or one per stage; 0: half of it
}
LAB_RULES = {
    **RULES,
    "chunks_per_gpu": (int, 1, 1_000_000),
    "in_flight": (int, 0, 1_000_000),
    "weight_gradient_time": RULES["comm_time"],
}


# ---------------------------------------------------------------------------------- schedules
#
# Each function lists what one GPU does in one batch. All flush: the update comes after the batch.


def interleaved(
    device: int, num_devices: int, num_microbatches: int, chunks_per_gpu: int
) -> Iterator[Step]:
    """1F1B with several small stages per GPU: device d holds the stages d, d + D, d + 2D ...

    With V chunks per GPU a stage is 1 / V of what the GPU holds, so the pipeline fills V times as
    fast: a batch takes (V * M + D - 1) / V turns. The price is V times as many messages, and in a
    long batch (D - 1) / (D * V) more activations than 1F1B. M must be a multiple of D.
    Megatron-LM (Narayanan et al., SC 2021), section 2.2.2.

    >>> from pipedream_simple import format_rows
    >>> print(format_rows(interleaved(device, 2, 2, 2) for device in range(2)))  # D=2, M=2, V=2
    GPU0: F0 F1 F0 F1 B0 B1 B0 B1
    GPU1: F0 F1 F0 B0 F1 B1 B0 B1
    """

    def order(kind: str, chunks: range) -> list[Step]:
        """D microbatches on the first of these chunks, then on the next one, and so on."""
        groups, turns = range(0, num_microbatches, num_devices), range(num_devices)
        places = itertools.product(groups, chunks, turns)
        return [(chunk * num_devices + device, kind, first + i) for first, chunk, i in places]

    forwards = order("F", range(chunks_per_gpu))
    backwards = order("B", range(chunks_per_gpu)[::-1])
    ahead = (chunks_per_gpu - 1) * num_devices + 2 * (num_devices - 1 - device)
    steady = [*zip(forwards[ahead:], backwards, strict=False)]
    yield from forwards[:ahead]  # warmup
    yield from itertools.chain.from_iterable(steady)
    yield from backwards[len(steady) :]  # cooldown


def zb_h1(stage: int, num_stages: int, num_microbatches: int, times: int = 1) -> Iterator[Step]:
    """1F1B with each backward cut in half: I, the gradient of the input, and W, of the weights.

    Other GPUs wait for I only. W fills time that would otherwise be idle: stage s runs it s
    microbatches later. So every stage holds S microbatches, as GPU0 does in any case, and about two
    thirds of the bubble are gone: with f = I = W = 1 a batch takes 3M + S - 1.
    Zero Bubble Pipeline Parallelism (Qi et al., ICLR 2024), the handcrafted schedule ZB-H1.

    >>> from pipedream_simple import format_rows
    >>> print(format_rows(zb_h1(stage, 2, 3) for stage in range(2)))  # S=2, M=3
    GPU0: F0 F1 I0 W0 F2 I1 W1 I2 W2
    GPU1: F0 I0 F1 I1 W0 F2 I2 W1 W2
    """
    ahead, later = times * (num_stages - 1 - stage), times * stage
    for _, kind, m in one_f_one_b(0, 1 + ahead, num_microbatches, num_batches=1):
        yield stage, "I" if kind == "B" else "F", m
        if kind == "B" and m >= later:
            yield stage, "W", m - later
    for m in range(max(0, num_microbatches - later), num_microbatches):
        yield stage, "W", m


def zb_h2(stage: int, num_stages: int, num_microbatches: int) -> Iterator[Step]:
    """ZB-H1 with twice the warmup, and each W twice as late: no bubble, for twice the memory.

    A GPU that has started is never idle, if f = I = W, links are free and M >= 2S - 1. Then it
    holds 2S - 1 microbatches. Stage s starts s turns after stage 0, and is done with a batch as
    much later. So one batch takes as long as with ZB-H1, but the next one begins on each GPU right
    after its own update: N batches take 3MN + S - 1. Same paper, schedule ZB-H2.

    >>> from pipedream_simple import format_rows
    >>> print(format_rows(zb_h2(stage, 2, 3) for stage in range(2)))  # S=2, M=3
    GPU0: F0 F1 F2 I0 W0 I1 W1 I2 W2
    GPU1: F0 I0 F1 I1 F2 I2 W0 W1 W2
    """
    return zb_h1(stage, num_stages, num_microbatches, times=2)


def limited(
    stage: int, num_stages: int, num_microbatches: int, num_batches: int, in_flight: int
) -> Iterator[Step]:
    """1F1B with another limit of microbatches in flight: in_flight on GPU0, and 1 on the last.

    The limit falls evenly in between, rounded down. in_flight = S is 1F1B, and 1 is naive. 2S - 1
    leaves every result a second turn to arrive: eager 1F1B (Zhuang et al., MLSys 2023), which
    hides slow links at the price of almost twice the memory.

    >>> from pipedream_simple import format_rows
    >>> print(format_rows(limited(stage, 2, 4, 1, in_flight=3) for stage in range(2)))  # S=2, M=4
    GPU0: F0 F1 F2 B0 F3 B1 B2 B3
    GPU1: F0 B0 F1 B1 F2 B2 F3 B3
    """
    behind = (in_flight - 1) * (num_stages - 1 - stage) // max(1, num_stages - 1)
    # The row of a stage that has so many stages behind it.
    return one_f_one_b(stage, stage + 1 + behind, num_microbatches, num_batches)


LAB_SCHEDULES: dict[str, Callable[..., Iterator[Step]]] = {
    "interleaved": interleaved,
    "zb-h1": zb_h1,
    "zb-h2": zb_h2,
}


# -------------------------------------------------------------------------------------- files
#
# The format of torch.distributed.pipelining, without sends and receives: one line per GPU, one cell
# per op (0F0, 1B3, 2I1, 2W1). An empty cell is an idle slot, and skipped: the simulator finds them.

CELL = re.compile(r"([0-9]{1,6})([FBIW])([0-9]{1,6})")
OVERLAPPED = re.compile(r"\((.+);(.+)\)OVERLAP_F_B")  # two ops at once: here one after the other


def read_text(path: Path) -> str:
    """What is in a file. UserError: why it cannot be read."""
    name = str(path)[-200:]
    try:
        if not path.is_file():
            raise UserError(f"cannot read {name}: missing, or not a regular file")
        return path.read_bytes().decode().removeprefix("\ufeff")
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not a text file: {error}") from None


def read_cells(text: str, path: Path) -> list[list[str]]:
    """The lines of a CSV file, each a list of its cells."""
    try:
        return [*csv.reader(io.StringIO(text, newline=""))]
    except csv.Error as error:
        raise UserError(f"{str(path)[-200:]} is not a CSV file: {error}") from None


def read_csv(path: Path) -> list[list[Step]]:
    """The rows of one batch in a CSV file. UserError: what is wrong with the file, and where."""
    name, lines = str(path)[-200:], read_cells(read_text(path), path)
    rows = []
    for number, line in enumerate(lines, start=1):
        row: list[Step] = []
        for column, cell in enumerate(map(str.strip, line), start=1):
            both = OVERLAPPED.fullmatch(cell)
            for text in both.groups() if both else [cell] if cell else []:
                step = CELL.fullmatch(text)
                if not step:
                    place = f"{name}, line {number}, column {column}"
                    raise UserError(f"{place}: {shown(text)} is not an op such as 0F0 or 2W1")
                row.append((int(step[1]), step[2], int(step[3])))
        rows.append(row)
    while rows and not rows[-1]:
        rows.pop()  # empty lines at the end
    check_rows(rows, name)
    return rows


def check_rows(rows: list[list[Step]], name: str) -> None:
    """Raise a UserError unless each stage runs each microbatch once, on one GPU, in order."""
    host: dict[int, int] = {}
    kinds: dict[tuple[int, int], str] = {}  # (stage, microbatch) -> F, then B or I and W
    for device, row in enumerate(rows):
        if not row:
            raise UserError(f"{name}: GPU{device} has nothing to do")
        for stage, kind, m in row:
            if host.setdefault(stage, device) != device:
                raise UserError(f"{name}: stage {stage} is on GPU{host[stage]} and on GPU{device}")
            kinds[stage, m] = kinds.get((stage, m), "") + kind
    if not kinds:
        raise UserError(f"{name} has no ops")
    for stage, m in itertools.product(range(1 + max(host)), range(1 + max(m for _, m in kinds))):
        found = kinds.get((stage, m), "")
        if found not in ("FB", "FIW"):
            must = f"stage {stage} must run F B or F I W on microbatch {m}, in this order"
            raise UserError(f"{name}: {must}; it runs {' '.join(found[:9]) or 'nothing'}")


def write_csv(rows: Iterable[Iterable[tuple]], path: Path) -> None:
    """Rows of (stage, kind, microbatch, ...) of one batch, in PyTorch's format, without idles."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerows([f"{stage}{kind}{m}" for stage, kind, m, *_ in row] for row in rows)


# --------------------------------------------------------------------------------------- plan


SIZES = "num_stages", "num_microbatches", "num_batches"


class Plan(NamedTuple):
    """A schedule that can be simulated and trained, and its simulated run."""

    name: str  # of the schedule, or of the file: short, in letters that every font has
    config: dict  # CONFIG's keys, num_stages counting stages, not GPUs; and weight_gradient_time
    schedule: Schedule
    events: list[Event]

    def __repr__(self) -> str:
        time, busy = makespan(self.events), utilization(self.events)
        return f"Plan({self.name.strip()}: {time:.7g} time units, {busy:.1%} busy)"


def file_of(config: dict) -> Path | None:
    """The CSV file that the schedule is, if it is one."""
    name = config.get("schedule") if isinstance(config, dict) else check_config(config)
    return Path(name) if isinstance(name, str) and name.endswith(".csv") else None


def sizes_of(rows: list[list[Step]]) -> dict:
    """For how many GPUs and microbatches these rows are."""
    num_microbatches = 1 + max(m for row in rows for _, _, m in row)
    return {"num_stages": len(rows), "num_microbatches": num_microbatches}


def check_lab_config(config: dict, rules: dict = LAB_RULES) -> None:
    """Like check_config; the schedule may also be one of the lab's, or a CSV file."""
    files = [config["schedule"]] if file_of(config) else []
    check_config(config, [*LAB_SCHEDULES, "FILE.csv", *files], rules)
    halves = (per_stage(config, key) for key in ("weight_gradient_time", "backward_time"))
    if any(w and not 0.001 <= w / b <= 0.999 for w, b in zip(*halves, strict=True)):
        what = f"weight_gradient_time={shown(config['weight_gradient_time'])} must be a part of"
        times = f"backward_time={shown(config['backward_time'])}, from 0.001 to 0.999 of it"
        raise UserError(f"{what} {times}; 0 stands for half")


def make_plan(config: dict) -> Plan:
    """What the GPUs do in the whole run, and when. UserError: a bad config, or a deadlock.

    config has the keys of LAB_CONFIG. num_stages is the number of GPUs, with layers_per_stage
    layers each; where a GPU holds several stages, they share its layers and its times evenly. A CSV
    file has its own number of GPUs and microbatches; those of config are not used.
    """
    file = file_of(config)
    rows = read_csv(file) if file else []
    config = {key: value for key, value in config.items() if key in LAB_RULES}
    config |= sizes_of(rows) if file else {}
    check_lab_config(config)
    name = config["schedule"]
    if name == "interleaved":
        multiples = {"num_microbatches": "num_stages", "layers_per_stage": "chunks_per_gpu"}
        for key, of in multiples.items():
            if config[key] % config[of]:
                rule = f"{key}={config[key]} must be a multiple of {of}={config[of]}"
                raise UserError(f"{rule} for interleaved")
    chunks = config["chunks_per_gpu"] if name == "interleaved" else 1
    in_flight = config["in_flight"] if name in ("1f1b", "pipedream") else 0
    config = {key: config[key] for key in (*CONFIG, "weight_gradient_time")}
    if name in SCHEDULES:
        schedule = build_schedule({key: config[key] for key in CONFIG})
        if in_flight:
            num_stages, in_row, batches = (config[key] for key in SIZES)
            if name == "pipedream":  # the run is one row of microbatches
                in_row, batches = in_row * batches, 1
            rows = [
                [*limited(s, num_stages, in_row, batches, in_flight)] for s in range(num_stages)
            ]
            switches = config["weight_stashing"], config["vertical_sync"]
            schedule = pin_versions(rows, config["num_microbatches"], *switches)
        return Plan(name, config, schedule, simulate(schedule, config))

    num_devices, num_microbatches = config["num_stages"], config["num_microbatches"]
    devices = range(num_devices)
    host = {d + lap * num_devices: d for d in devices for lap in range(chunks)}
    if file:
        host = {stage: device for device, row in enumerate(rows) for stage, _, _ in row}
        name = file.name[-16:].encode("ascii", "replace").decode().replace("$", "?")
    config = in_stages(config, [host[stage] for stage in range(len(host))])
    if name == "interleaved":
        rows = [[*interleaved(d, num_devices, num_microbatches, chunks)] for d in devices]
    elif not file:
        rows = [[*LAB_SCHEDULES[name](d, num_devices, num_microbatches)] for d in devices]
    starts = range(0, num_microbatches * config["num_batches"], num_microbatches)
    whole = [[(stage, kind, m + b) for b in starts for stage, kind, m in row] for row in rows]
    schedule = pin_versions(whole, num_microbatches)
    try:
        return Plan(name, config, schedule, simulate(schedule, config))
    except ValueError as error:  # a deadlock
        waits = ", ".join(shorten(str(error).split(", "), 4, "GPUs"))
        raise UserError(f"{config['schedule'][-200:]}: {waits}") from None


def in_stages(config: dict, hosts: list[int]) -> dict:
    """config for stages instead of GPUs: the same network, cut finer. hosts[stage] is its GPU."""
    num_stages, on_device = len(hosts), Counter(hosts)
    num_layers = config["num_stages"] * config["layers_per_stage"]
    if num_layers % num_stages:
        what = f"num_stages * layers_per_stage is {count(num_layers, 'layer')}"
        raise UserError(f"{what}, which cannot be split evenly into {num_stages} stages")
    config = {**config, "num_stages": num_stages, "layers_per_stage": num_layers // num_stages}
    for key in ("forward_time", "backward_time", "weight_gradient_time", "comm_time"):
        per_gpu = per_stage({**config, "num_stages": 1 + max(hosts)}, key)
        config[key] = [per_gpu[d] / (1 if key == "comm_time" else on_device[d]) for d in hosts]
    of_simple = {key: config[key] for key in CONFIG}
    check_config({**of_simple, "schedule": "1f1b"})  # its limits; any schedule that it knows
    return config


def all_plans(config: dict) -> tuple[list[Plan], list[str]]:
    """A plan for each schedule at this CONFIG, and the reasons why some are impossible.

    A CSV file comes last, and the others get its number of GPUs and microbatches.
    """
    plans, reasons = [], []
    extra, file = [], file_of(config)
    if file:
        config = {**config, **sizes_of(read_csv(file))}
        extra = [make_plan(config)]
    flushing = [name for name in SCHEDULES if name != "pipedream"]
    for label, settings in variants([*flushing, *LAB_SCHEDULES, "pipedream"]).items():
        try:
            plans.append(make_plan({**config, **settings})._replace(name=label))
        except UserError as error:
            reasons.append(textwrap.fill(f"{label.strip()} is left out: {error}", 80))
    return [*plans, *extra], reasons


# ------------------------------------------------------------------------ training and memory


class SplitWorker(Worker):
    """A Worker that can also run the halves of a backward, I and W.

    I walks back through the graph to the input of the stage. It does not follow the weights, but
    keeps the gradient that arrives where they enter. W goes on from there. So the two compute what
    B computes, and nothing twice.

    kept    of each microbatch between its I and its W: the weights, and for every edge of the graph
            that leads to where some of them enter: edge, gradient that arrived, their names
    """

    def __init__(self, module: nn.Module, config: dict):
        super().__init__(module, config)
        self.kept: dict[int, tuple[Weights, list[tuple[GradientEdge, Tensor, list[str]]]]] = {}

    def backward(self, op: Op, output_gradient: Tensor | None) -> Tensor | None:
        if op.kind == "I":
            return self.backward_to_input(op, output_gradient)
        if op.kind == "W":
            self.backward_to_weights(op)
            return None
        return super().backward(op, output_gradient)

    def backward_to_input(self, op: Op, output_gradient: Tensor | None) -> Tensor | None:
        """Return the gradient of the input, and keep what W needs."""
        x, output, weights = self.in_flight.pop(op.microbatch)
        if output_gradient is not None:  # as in Worker.backward
            output = torch.dot(output.flatten(), output_gradient.flatten())
        entries = weight_entries(output, weights)
        inputs: list = [*entries, x] if x.requires_grad else [*entries]
        gradients = torch.autograd.grad(output, inputs, retain_graph=True)
        kept = [*zip(entries, gradients, entries.values(), strict=False)]
        self.kept[op.microbatch] = weights, kept
        return gradients[-1] if x.requires_grad else None

    def backward_to_weights(self, op: Op) -> None:
        """Add the gradients of the weights to self.gradient."""
        weights, kept = self.kept.pop(op.microbatch)
        for edge, arrived, names in kept:
            gradients = torch.autograd.grad([edge], [weights[name] for name in names], [arrived])
            for name, gradient in zip(names, gradients, strict=True):
                self.gradient[name] = self.gradient.get(name, 0) + gradient


def weight_entries(output: Tensor, weights: Weights) -> dict[GradientEdge, list[str]]:
    """The edges in output's graph that lead to where weights enter -> the names of those weights.

    A weight may enter through nodes with no other input, such as the transpose in a Linear. One
    that enters more than once is its own entry: the paths to it overlap, so all of them are for I.
    """
    name_of = {id(w): name for name, w in weights.items()}

    def name_behind(node: Node | None) -> str | None:
        while node is not None and len(node.next_functions) == 1:
            node = node.next_functions[0][0]
        return name_of.get(id(getattr(node, "variable", None)))

    entries: dict[GradientEdge, list[str]] = {}
    todo = [get_gradient_edge(output)]
    while todo:
        edge = todo.pop()
        if edge in entries:
            continue
        entries[edge] = []
        for node, number in edge.node.next_functions:
            name = name_behind(node)
            if name:
                entries[edge].append(name)
            elif node is not None:
                todo.append(GradientEdge(node, number))
    uses = Counter(itertools.chain.from_iterable(entries.values()))
    once = {edge: [n for n in names if uses[n] == 1] for edge, names in entries.items()}
    more = {get_gradient_edge(weights[name]): [name] for name in uses if uses[name] > 1}
    return {edge: names for edge, names in {**once, **more}.items() if names}


def train_plan(plan: Plan, dtype: torch.dtype = torch.float32, watch=None) -> Run:
    """Train on the plan's schedule."""
    return train(plan.config, dtype, watch, plan.events, SplitWorker)


def plain_training(config: dict, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """The same network and batches without a pipeline: SGD that adds up microbatch gradients."""
    network = nn.Sequential(*build_stages(config)).to(choose_device(config["device"]), dtype)
    rates = {"lr": config["learning_rate"], "momentum": config["momentum"]}
    optimizer = torch.optim.SGD(network.parameters(), **rates)
    for number, (x, y) in enumerate(split_batches(config, dtype), start=1):
        (cross_entropy(network(x), y) / config["num_microbatches"]).backward()
        if number % config["num_microbatches"] == 0:
            optimizer.step()
            optimizer.zero_grad()
    return network


class Bytes(NamedTuple):
    """What a GPU holds, each at its own peak over the run."""

    weights: int  # of all versions that exist
    activations: int  # kept for the backwards to come; with gradients kept by I for W
    gradients: int  # of the weights, for the batch so far
    velocities: int = 0  # of the weights, with momentum


class MeteredWorker(SplitWorker):
    """Sends and receives copies, as a GPU does. Here they would share one tensor."""

    def forward(self, op: Op, x: Tensor, labels: Tensor | None = None) -> Tensor:
        return super().forward(op, x.clone(), labels if labels is None else labels.clone()).clone()


class MemoryMeter:
    """Counts bytes that exist: after every op, the storages of each GPU that are still alive.

    With recompute it also counts between a forward's second run and the backward.

    A storage counts until the last tensor that uses it is gone, whoever holds that. PyTorch's hooks
    tell about tensors that autograd saves for a backward.
    """

    def __init__(self, schedule: Schedule):
        self.device_of = {op.stage: device for device, row in enumerate(schedule) for op in row}
        self.alive: list[list[WeakSet]] = [[WeakSet() for _ in Bytes._fields] for _ in schedule]
        self.saved: WeakSet = WeakSet()  # by the op that runs
        self.peak = [Bytes(0, 0, 0) for _ in schedule]

    def train(self, plan: Plan) -> Run:
        def note(tensor: Tensor) -> Tensor:
            self.saved.add(tensor.untyped_storage())
            return tensor.detach()  # with its graph it would keep itself alive

        with saved_tensors_hooks(note, lambda tensor: tensor):
            return train(plan.config, watch=self, events=plan.events, worker_class=MeteredWorker)

    def __call__(self, op: Op, worker: Worker) -> None:
        assert isinstance(worker, SplitWorker)
        device = self.device_of[op.stage]
        weights, activations, gradients, velocities = self.alive[device]
        for version in worker.versions.values():
            weights.update(map(Tensor.untyped_storage, version.values()))
        gradients.update(map(Tensor.untyped_storage, worker.gradient.values()))
        velocities.update(map(Tensor.untyped_storage, worker.velocity.values()))
        for x, output, _ in worker.in_flight.values():
            kept = [x] if output is None else [x, output]
            activations.update(map(Tensor.untyped_storage, kept))
        for _, entries in worker.kept.values():
            activations.update(arrived.untyped_storage() for _, arrived, _ in entries)
        activations |= self.saved
        activations -= weights  # a Linear saves its weights, too
        self.saved.clear()
        held = (sum(storage.nbytes() for storage in group) for group in self.alive[device])
        self.peak[device] = Bytes(*map(max, self.peak[device], held))


def memory_formula(plan: Plan) -> list[Bytes]:
    """What the meter should find, from rows and shapes alone, in float32, in the residual network.

    A Linear saves its input, tanh its output, and the loss its log-probabilities, its labels and
    the sum of their weights. Between I and W the graph stays up to the last Linear, with a gradient
    for the output of each. With recompute a forward saves its input, and R, its second run, the
    rest.
    """
    images = plan.config["batch_size"] // plan.config["num_microbatches"]
    stages = [[*stage.children()] for stage in build_stages(plan.config)]
    weights, changes = [], []  # per stage: bytes of a version; what an op adds to activations
    for layers in stages:
        linears: list = [getattr(layer, "linear", layer) for layer in layers]
        inputs, outputs = [w.in_features for w in linears], [w.out_features for w in linears]
        tanhs = [isinstance(layers[i], Residual) * size for i, size in enumerate(outputs)]
        numbers = sum(inputs) + sum(tanhs)
        by_f = 4 * images * (numbers + outputs[-1])
        by_f += (8 * images + 4 + 4) * (layers is stages[-1])
        by_i = 4 * images * (numbers - tanhs[-1] + sum(outputs))
        x = 4 * images * inputs[0] if plan.config["recompute"] else by_f
        of_kind = {"F": [x], "B": [by_f - x, -by_f], "I": [by_f - x, by_i - by_f]}
        changes.append({**of_kind, "W": [-by_i], "U": [0]})
        weights.append(4 * sum(w.weight.numel() + w.bias.numel() for w in linears))
    peaks = []
    for row, versions in zip(plan.schedule, peak_versions(plan.schedule), strict=True):
        one = sum(weights[stage] for stage in {op.stage for op in row})
        held = itertools.accumulate(c for op in row for c in changes[op.stage][op.kind])
        velocities = one if plan.config["momentum"] else 0
        peaks.append(Bytes(one * versions, max(held), one, velocities))
    return peaks


# ------------------------------------------------------------------------------------ compare

COMPARE_LEGEND = """\
   From GPU0 to the last, each at its peak: microbatches in flight (interleaved:
   each on one chunk of the GPU), weight versions kept, and updates missed
   (stale). KiB: bytes that exist, counted; in all: activations, weights, their
   gradients and velocities. loss: of the last batch. to SGD: the largest
   difference of a weight from plain training without a pipeline, in float64."""


def compare(config: dict, out: Path = Path()) -> None:
    """Every schedule on the same batches, in two tables and in one picture (schedules.png)."""
    import pipedream_visual as visual

    plans, reasons = all_plans(config)
    with visual.house_style():
        figure = draw_plans(plans)
        write(out / "schedules.png", figure.savefig, config)
    alone = {**plans[0].config, "device": "cpu", "num_microbatches": 1}
    reference = parameters_to_vector(plain_training(alone, torch.float64).parameters())
    simulated = [["schedule", *SUMMARY, "stale"]]
    measured = [["schedule", "loss", "accuracy", "to SGD", "KiB of activations", "KiB in all"]]
    agree: list[bool] = []
    for plan in plans:
        stale = staleness(plan.schedule, plan.config["num_microbatches"])
        cells = summarize(plan.schedule, plan.events, plans[0].events)
        simulated.append([plan.name, *cells, format_per_gpu(stale)])
        meter = MemoryMeter(plan.schedule)
        run = meter.train(plan)
        on_cpu = plan._replace(config={**plan.config, "device": "cpu"})
        exact = [w for stage in train_plan(on_cpu, torch.float64).weights for w in stage.values()]
        error = (parameters_to_vector(exact) - reference).abs().max()
        cells = [f"{run.losses[-1]:.4f}", f"{run.test_accuracy:.1%}", f"{error:.1e}"]
        activations = [f"{held.activations / 1024:,.0f}" for held in meter.peak]
        in_all = [f"{sum(held) / 1024:,.0f}" for held in meter.peak]
        measured.append([plan.name, *cells, format_per_gpu(activations), format_per_gpu(in_all)])
        if config["network"] == "residual":
            agree += map(Bytes.__eq__, meter.peak, memory_formula(plan))
    print("\n".join(["Simulated:", *format_table(simulated), "", "Trained and measured:"]))
    again = [RECOMPUTED] * config["recompute"]
    lines = [*format_table(measured), COMPARE_LEGEND, *again]
    if agree:
        lines += [f"   Memory is as memory_formula predicts on {sum(agree)} of {len(agree)} GPUs."]
    print("\n".join([*lines, *reasons]))
    print(f"\n{out / 'schedules.png'}: {figure.texts[0].get_text()}")


def draw_plans(plans: list[Plan]):
    """The simulated runs one below the other on one time axis, until the slowest but naive ends."""
    import pipedream_visual as visual

    plans = [plan for plan in plans if plan.name == plan.name.strip()]  # variants look the same
    runs = [(plan, visual.rounded(plan.events)) for plan in plans]
    ends = {plan.name: makespan(events) for plan, events in runs}
    until = max([end for name, end in ends.items() if name != "naive"], default=ends["naive"])
    devices = max(len(plan.schedule) for plan in plans)
    lane, top = min(42, 3000 / (devices * len(plans))), 3 * visual.LINE
    panel = visual.LINE + lane * devices + 50
    width = visual.LEFT + visual.plot_width(runs[0][1], until) + visual.RIGHT
    fastest = ", ".join(name for name, end in ends.items() if end == min(ends.values()))
    title = f"{count(len(plans), 'schedule')}, one time axis. The fastest: {fastest}"
    lines = [
        "Simulated; a long naive run is cut off. F3: forward of microbatch 3; 8F3: on stage 8."
    ]
    figure = visual.new_picture(width, top + panel * len(plans) + 60, title, lines)
    for row, (plan, events) in enumerate(runs):
        place = top + row * panel
        length = f"{makespan(events):.7g} time units, {utilization(events):.1%} utilization"
        visual.add_heading(figure, place, f"{plan.name}: {length}")
        lanes = len(plan.schedule)
        axes = visual.add_lanes(figure, place + visual.LINE, lane * lanes, lanes, until)
        shown = [event for event in events if event.start < until]
        visual.draw_ops(axes, shown, stages=plan.config["num_stages"] > lanes)
    visual.add_legend(figure, [event.op for _, events in runs for event in events], [visual.IDLE])
    return figure


# ---------------------------------------------------------------------------------------- why


def critical_path(events: list[Event]) -> list[Event]:
    """A chain of ops that sets the makespan: none of them could have started any earlier.

    Each starts when the previous one has ended, on the same GPU, or when its result arrives. There
    may be several such chains. The events' times are rounded, so that ops that follow each other
    meet.
    """
    before = {event: (previous, needed) for event, previous, needed in dependencies(events)}
    event: Event | None = max(events, key=lambda event: event.end)
    path = []
    while event:
        path.append(event)
        previous, needed = before[event]
        event = previous if previous and previous.end == event.start else needed
    return path[::-1]


ORDER = {  # why does another op have to wait? About Idle.next {next} and the other op {other}
    "none": "Nothing else is ready to run.",
    "flush": "{other} could run{since}, but it belongs to the next batch, which waits for the "
    "update: the flush.",
    "limit": "{other} could run{since}, but GPU{device} already holds {held} in flight, its limit "
    "in this schedule.",
    "row": "{other} could run{since}, but this schedule puts {next} first.",
}
READS = {  # why does an op read its weight version {v}? Said of the op; {new} is the newest then
    "first": "It reads v{v}, the initial weights.",
    "fresh": "It reads v{v}, up to date, as in plain SGD.",
    "stale": "It reads v{v}, the newest here. Plain SGD would read v{batch}, but that still waits "
    "for microbatches in flight.",
    "pinned": "It reads v{v}, which the first forward of its batch pinned, though v{new} exists.",
    "synced": "It reads v{v}, which stage 0 pinned for its batch. (The newest here is v{new}.)",
    "same": "It reads v{v}, as its forward did.",
    "stashed": "It reads v{v}, as its forward did: v{v} was stashed for it. (v{new} is newer.)",
    "wrong": "It reads v{v}, the newest, but its forward read v{forward}: the gradient is wrong.",
    "W": "It reads no weights, only what its forward and its I left.",
    "U": "It turns v{v} into v{made}: the batch has no more backwards on this GPU.",
}


SAYS = {  # of an op
    "runs": "GPU{gpu} runs {op} from {start} to {end}.",
    "needed": "Its input is from {op} of GPU{gpu}, done at {end}.",
    "needed by": "Its result goes to {op} of GPU{gpu}, at {start}.",
}


def said(key: str, event: Event) -> str:
    start, end = clock(event.start), clock(event.end)
    return SAYS[key].format(gpu=event.device, op=short_name(event), start=start, end=end)


class Reasons:
    """Why a GPU runs its ops in this order, and on these weights: all from rows and events."""

    def __init__(self, plan: Plan):
        self.plan = plan
        comm_time = per_stage(plan.config, "comm_time")
        self.ready: dict[Op, float] = {}  # when the input of an op is there
        self.place: dict[Op, int] = {}  # in its row
        self.newest: dict[Op, int] = {}  # version on the op's stage
        ended: dict[Step, float] = {}
        for (op, device, _, end), _, needed in dependencies(plan.events):
            travel = comm_time[needed.op.stage] if needed and needed.device != device else 0
            arrived = needed.end + travel if needed else 0
            self.ready[op] = ended[op.stage, "I", op.microbatch] if op.kind == "W" else arrived
            ended[op[:3]] = end
        for row in plan.schedule:
            made = {op.stage: 0 for op in row}
            for place, op in enumerate(row):
                self.place[op], self.newest[op] = place, made[op.stage]
                made[op.stage] += op.kind == "U"
        self.event_of = {event.op: event for event in plan.events}
        self.held = [[0, *(held for held, _ in memory_held(row))] for row in plan.schedule]
        self.flushes = plan.config["schedule"] != "pipedream"
        self.forward = {op[::2]: op for op in self.place if op.kind == "F"}

    def order(self, idle: Idle) -> tuple[str, Event | None]:
        """Of an idle time: why does the row not put another op first? And which one could run?"""
        if idle.next is None:
            return "", None
        row, place = self.plan.schedule[idle.device], self.place[idle.next.op]
        start, end = tick(idle.start), tick(idle.end)
        others = (op for op in row[place + 1 :] if op.kind != "U" and tick(self.ready[op]) < end)
        other, held = next(others, None), self.held[idle.device]
        if other is None:
            return ORDER["none"], None
        key = "row"
        if other.kind == "F" and self.flushes and other.version > self.newest[idle.next.op]:
            key = "flush"
        elif other.kind == "F" and held[place] == max(held):
            key = "limit"
        ready = tick(self.ready[other])
        since = f" from {clock(ready)} on" if ready > start else ""
        words = {"held": count(held[place], "microbatch"), "since": since, "device": idle.device}
        text = ORDER[key].format(next="{next}", other="{other}", **words)
        return text, self.event_of[other]

    def reads(self, op: Op) -> str:
        """Why does this op read the weight version that it reads?"""
        v, new, config = op.version, self.newest[op], self.plan.config
        batch, forward = op.microbatch // config["num_microbatches"], self.forward[op[::2]].version
        if op.kind in "WU":
            key = op.kind
        elif op.kind != "F":
            key = "wrong" if v != forward else "stashed" if v < new else "same"
        elif v == batch:
            key = "fresh" if v else "first"
        elif config["vertical_sync"] and v < new:
            key = "synced"
        else:
            key = "pinned" if v < new else "stale"
        return READS[key].format(v=v, new=new, batch=batch, forward=forward, made=v + 1)

    def explain_idle(self, idle: Idle) -> str:
        """One or two sentences: what the GPU waits for, and why it runs nothing else meanwhile."""
        text, other = self.order(idle)
        names = {"next": idle.next and short_name(idle.next), "other": other and short_name(other)}
        return f"{idle}. {text.format(**names)}".strip()


def explain(plan: Plan, device: int, time: float) -> list[str]:
    """What a GPU does at a time before the makespan, and why; if it waits, then also for whom."""
    plan = plan._replace(events=rounded(plan.events))
    reasons, time = Reasons(plan), tick(time)
    found_at: list[Event | Idle] = [*plan.events, *idle_times(plan.events)]

    def at(device: int) -> Event | Idle:
        mine = (found for found in found_at if found.device == device)
        return next(found for found in mine if found.start <= time < found.end)

    found = at(device)
    if isinstance(found, Event):
        lines = [said("runs", found) + " " + reasons.reads(found.op)]
        for event, _, needed in dependencies(plan.events):
            if event == found and needed:
                lines.append(said("needed", needed))
            if needed == found:
                lines.append(said("needed by", event))
        return lines
    lines = [reasons.explain_idle(found)]
    while isinstance(found, Idle) and found.needed and found.needed.end > time:
        needed, found = found.needed, at(found.needed.device)
        if isinstance(found, Idle):
            lines.append(f"{found}.")
        else:
            line = f"GPU{found.device} runs {short_name(found)} until {clock(found.end)}"
            batch, later = (
                e.op.microbatch // plan.config["num_microbatches"] for e in (found, needed)
            )
            then = "after the flush" if reasons.flushes and batch < later else "after that"
            lines.append(line + (f", and {short_name(needed)} {then}." if found != needed else "."))
    return lines


WHY_LEGEND = """\
   Times are simulated; the row "all" adds up the GPUs. Idle: fill, before the
   first op of a GPU; wait, for a result that another GPU has yet to make; send,
   for one that is on its way; drain, after its last op. critical: time on a
   critical path, a chain of ops that sets the makespan."""


def why(config: dict, gpu: int | None = None, time: float | None = None) -> None:
    """Why are the GPUs idle? The bubble by cause, and the chain of ops that sets the makespan.

    With --gpu 0 --time 4: what that GPU does at that time, and why.
    """
    plan = make_plan(config)
    plan = plan._replace(events=rounded(plan.events))
    over, devices = makespan(plan.events), range(len(plan.schedule))
    if (gpu is None) != (time is None):
        raise UserError("--gpu and --time go together: --gpu 0 --time 4")
    if gpu is not None and time is not None:
        check_value("gpu", gpu, (int, 0, len(devices) - 1))
        check_value("time", time, (float, 0, over))
        lines = explain(plan, gpu, time) if time < over else ["The run is over."]
        print("\n".join(textwrap.fill(line, 80, subsequent_indent="   ") for line in lines))
        return
    gaps, path = idle_times(plan.events), critical_path(plan.events)
    rows = []
    for device in devices:
        busy, critical = (
            sum(end - start for _, place, start, end in events if place == device)
            for events in (plan.events, path)
        )
        mine = [gap for gap in gaps if gap.device == device]
        by_cause = [sum(g.end - g.start for g in mine if g.cause == cause) for cause in CAUSES]
        rows.append([busy, *by_cause, sum(by_cause), critical])
    sums = [sum(column) for column in zip(*rows, strict=True)]
    parts = [f"{time / (over * len(devices)):.1%}" for time in sums[:-1]]
    table = [["", "busy", *CAUSES, "idle", "critical"]]
    table += [[f"GPU{d}", *(f"{t:.7g}" for t in row)] for d, row in enumerate(rows)]
    table += [["all", *(f"{t:.7g}" for t in sums)], ["", *parts, f"{sums[-1] / over:.1%}"]]
    *lines, total, percent = format_table(table)
    print(f"{plan.name}: {over:.7g} time units, {utilization(plan.events):.1%} busy")
    again = [RECOMPUTED] * config["recompute"]
    print("\n".join([*shorten(lines, 24, "GPUs"), total, percent, WHY_LEGEND, *again, ""]))

    of_stage = " (7F0: F0 on stage 7)" * (plan.config["num_stages"] > len(devices))
    table = [[f"A critical path{of_stage}", "", ""]]
    ops = (event for event in path if event.op.kind != "U")
    for device, same in itertools.groupby(ops, key=lambda event: event.device):
        first, *more = same
        names = " ".join(shorten([*map(short_name, (first, *more))], 8, "ops"))
        table.append([f"from t{first.start:.7g}", f"GPU{device}", names])
    print("\n".join(shorten(format_table(table), 16, "steps")))


IN_FLIGHT_LEGEND = """\
   limit: microbatches in flight on GPU0, at most (--in_flight). It falls evenly
   to 1 on the last GPU. *: the default, num_stages. A limit of 1 is naive. With
   a flush, a GPU never holds more than the microbatches of one batch."""


def in_flight(config: dict) -> None:
    """What if a GPU did not wait, but ran one more forward? 1f1b and pipedream with other limits.

    The limits go up to 2 S - 1, where every result has a turn to travel. Try --comm_time 0.5.
    """
    num_stages = config["num_stages"]
    most = 2 * num_stages - 1
    limits = sorted({*range(1, most, math.ceil(most / 16)), num_stages, most})
    naive = make_plan({**config, "schedule": "naive"})
    for name in ("1f1b", "pipedream"):
        table = [["  limit", *SUMMARY, "stale"]]
        times = {}
        for limit in limits:
            plan = make_plan({**config, "schedule": name, "in_flight": limit})
            times[limit] = makespan(plan.events)
            cells = summarize(plan.schedule, plan.events, naive.events)
            stale = staleness(plan.schedule, plan.config["num_microbatches"])
            mark = "*" if limit == num_stages else " "
            table.append([f"{mark} {limit}", *cells, format_per_gpu(stale)])
        best = min(times, key=lambda limit: tick(times[limit]))
        print("\n".join([name, *format_table(table)]))
        print(f"   Fastest with a limit of {best}.\n")
    print("\n".join([IN_FLIGHT_LEGEND, *[RECOMPUTED] * config["recompute"]]))


# --------------------------------------------------------------------------- export and trace


def export(config: dict, file: Path) -> None:
    """The rows of one batch as a CSV file that torch.distributed.pipelining loads."""
    plan = make_plan({**config, "num_batches": 1})
    rows = [[op for op in row if op.kind != "U"] for row in plan.schedule]
    write(file, partial(write_csv, rows), config, ".csv")
    sizes = count(len(rows), "GPU"), count(plan.config["num_stages"], "stage")
    print(f"{file}: {plan.name}, {', '.join(sizes)}, {count(sum(map(len, rows)), 'op')}")
    if plan.name == "pipedream":
        print("The file has one batch, and then a flush. So its rows are those of 1F1B.")


def write(path: Path, content: Callable[[Path], object], config: dict, suffix: str = "") -> None:
    """Save a file; UserError for another suffix, maybe a slip, or the schedule's own file."""
    from pipedream_visual import save  # here: what imports the lab may not need matplotlib

    if not path.name.endswith(suffix):
        raise UserError(f"cannot write {shown(str(path))}: the name must end in {suffix}")
    file = file_of(config)
    save({path: content}, read=[file] if file else [])


def check_output(path: Path) -> None:
    """Raise a UserError now, and not after minutes, where a picture cannot be written."""
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"cannot write {path}: it is not a regular file")
        folder = next(folder for folder in path.absolute().parents if folder.exists())
        with TemporaryFile(dir=folder) as file:
            file.write(bytes(1_000_000))  # is there room?
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def trace(config: dict, file: Path) -> None:
    """The simulated run as a Chrome trace: open it at ui.perfetto.dev or chrome://tracing."""
    plan = make_plan(config)
    content = {"traceEvents": [*trace_events(plan)], "displayTimeUnit": "ms"}
    text = json.dumps(content, default=float)  # NumPy's numbers, too
    write(file, lambda part: part.write_text(text, "utf-8"), config, ".json")
    events = count(len(content["traceEvents"]), "event")
    print(f"{file}: {plan.name}, {events}; open it at ui.perfetto.dev")


def trace_events(plan: Plan) -> Iterator[dict]:
    """One track per GPU, one event per op, arrows for what is sent, counters for what is held.

    A time unit of the simulation is a millisecond of the trace, whose own unit is the microsecond.
    """
    from pipedream_visual import KINDS

    for device in range(len(plan.schedule)):
        yield {"ph": "M", "name": "process_name", "pid": device, "args": {"name": f"GPU{device}"}}
    made = {result_of(event.op): event for event in plan.events}
    sent, held_by = itertools.count(), [iter(memory_held(row)) for row in plan.schedule]
    for op, device, start, end in plan.events:
        counters = "microbatches in flight", "weight versions"
        for what, held in zip(counters, next(held_by[device]), strict=True):
            yield {"ph": "C", "name": what, "pid": device, "ts": 1000 * end, "args": {"held": held}}
        here = {"pid": device, "tid": 0, "ts": 1000 * start, "args": op._asdict()}
        if op.kind == "U":
            yield {**here, "ph": "i", "s": "p", "name": f"update to v{op.version + 1}"}
            continue
        name = {"name": str(op), "cat": KINDS[op.kind]}
        yield {**here, **name, "ph": "X", "dur": 1000 * (end - start)}
        needed = input_of(op, plan.config["num_stages"])
        if needed and made[needed].device != device:
            _, sender, began, ended = made[needed]
            what = "activations" if op.kind == "F" else "gradients"
            arrow = {"name": what, "cat": "sent", "id": next(sent), "tid": 0}
            yield {**arrow, "ph": "s", "pid": sender, "ts": 500 * (began + ended)}  # the middle
            yield {**arrow, "ph": "f", "pid": device, "ts": 500 * (start + end), "bp": "e"}


# ------------------------------------------------------------------------------------- papers


def papers(config: dict) -> None:
    """Published figures beside ours, and how far apart they are. It takes no flags.

    Exit status 1: a figure that must agree to the last digit does not.
    """
    import pipedream_papers  # here: it imports this file

    pipedream_papers.main()


# --------------------------------------------------------------------------------------- main


def worth(config: dict, **flags) -> None:
    """Is PipeDream worth it? Every schedule's loss over simulated time: pipedream_worth.py."""
    import pipedream_worth  # here: it imports this file

    pipedream_worth.worth(config, **flags)


def stale(config: dict, **flags) -> None:
    """What do old gradients cost? By delay, optimizer and remedy: pipedream_staleness.py.

    --quick leaves out the remedies. --search asks another question, on networks of its own: where
    does training without weight stashing get worse?
    """
    import pipedream_staleness

    pipedream_staleness.staleness_cost(config, **flags)


OUT = {"--out": {"type": Path, "metavar": "DIR", "help": "for the picture"}}
COMMANDS: dict[str, tuple[Callable, dict]] = {  # -> (function, its flags besides the config's)
    "compare": (compare, OUT),
    "in_flight": (in_flight, {}),
    "why": (
        why,
        {
            "--gpu": {"type": parse_value, "metavar": "D", "help": "0 is the first"},
            "--time": {"type": parse_value, "metavar": "T", "help": "in time units"},
        },
    ),
    "export": (export, {"file": {"type": Path, "metavar": "my.csv"}}),
    "papers": (papers, {}),
    "trace": (trace, {"file": {"type": Path, "metavar": "run.json"}}),
    "worth": (worth, {**OUT, "--loss": {"type": parse_value, "metavar": "X", "help": "target"}}),
    "staleness": (
        stale,
        {**OUT, "--quick": {"action": "store_true"}, "--search": {"action": "store_true"}},
    ),
}
KEYS: dict[str, tuple[str, ...]] = {  # which of the config's flags a command takes; the others: all
    "papers": (),
    "staleness": (
        *("num_stages", "layers_per_stage", "hidden_size", "batch_size", "num_batches"),
        *("seed", "device", "network"),
    ),
}
DEFAULTS = {  # of a command, where they are not CONFIG's
    "worth": {"num_batches": 200, "backward_time": 2},
    "staleness": {
        **{"num_batches": 200, "num_stages": 8, "layers_per_stage": 2, "hidden_size": 32},
        "num_microbatches": 1,
    },
}


class Default:
    """A value that no flag gave."""

    def __init__(self, value: object):
        self.value = value

    def __repr__(self) -> str:
        return repr(self.value)


def parse_lab_config(
    doc: str | None,
    argv: list | None = None,
    config=LAB_CONFIG,
    rules=LAB_RULES,
    other=None,
    command: str = "",
    keys: Iterable[str] | None = None,
) -> tuple[dict, dict]:
    """Like parse_config. A CSV file sets num_stages and num_microbatches; flags must agree.

    keys: those of config that have a flag.
    """
    if not isinstance(config, dict):
        check_lab_config(config, rules)
    keys = config if keys is None else keys
    more = [
        f"--{key} (default {LAB_CONFIG[key]})" for key in keys if key in {*LAB_CONFIG} - {*CONFIG}
    ]
    if more:
        doc = f"{doc}\n\n" + textwrap.fill(f"More flags: {', '.join(more)}; see LAB_CONFIG.", 80)
    offered: dict = {key: value for key, value in config.items() if key in keys}
    offered |= {key: Default(config[key]) for key in SIZES[:2] if key in offered}
    given, flags = parse_config(doc, argv, offered, lambda config: None, other, command)
    given = {key: value for key, value in given.items() if not isinstance(value, Default)}
    file = file_of(given)
    sizes = sizes_of(read_csv(file)) if file else {}
    for key, size in sizes.items():
        if given.get(key, size) != size:
            file_has = f"in {str(file)[-200:]} it is {size}"
            raise UserError(f"{key}={shown(given[key])}, but {file_has}: leave out the flag")
    config = {**config, **given, **sizes}
    check_lab_config(config, rules)
    return config, flags


def choose_command(doc: str | None, commands: dict) -> str | None:
    """Which of the commands the command line names. None: it asks for help, which is printed."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(doc)
        return None
    if name not in commands:
        hint = nearest(name, commands) or f": it must be one of {', '.join(commands)}"
        raise UserError(f"unknown command {shown(name)}{hint}")
    return name


def main() -> None:
    name = choose_command(__doc__, COMMANDS)
    if name:
        command, other = COMMANDS[name]
        config = {**LAB_CONFIG, **DEFAULTS.get(name, {})}
        keys = KEYS.get(name, LAB_CONFIG)
        config, flags = parse_lab_config(
            command.__doc__, sys.argv[2:], config, other=other, command=name, keys=keys
        )
        command(config, **flags)


if __name__ == "__main__":
    sys.exit(run_main(main))
