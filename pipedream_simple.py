#!/usr/bin/env python3
"""How does pipeline parallelism really work? PipeDream, from the first idle GPU to weight stashing.

    python pipedream_simple.py                           train a 4-stage pipeline and watch it
    python pipedream_simple.py --num_microbatches 8      every CONFIG key is also a flag
    python pipedream_simple.py --schedule gpipe          naive, gpipe, 1f1b or pipedream
    python pipedream_simple.py --weight_stashing False   what goes wrong without it, measured
    python pipedream_simple.py --help                    every key and what turning it changes

A network that is too large for one GPU is cut into stages, one stage a GPU. This file lists what
each GPU does and in which order (a schedule), finds out when it could do it (a simulator), and does
it on one device (a trainer). Time is simulated; the arithmetic is real: real digits, real forward
and backward passes, real weight updates.

Read it from top to bottom: CONFIG, vocabulary, schedules, simulator, measures, model and data,
trainer; then, if you like, the rooms that only serve: report, bad input, main.

Letters: S stages, M microbatches in a batch, N batches in the run, K = M * N microbatches in the
run; s, m, b, v is one stage, microbatch, batch, weight version.
"""

import argparse
import codecs
import difflib
import gc
import io
import itertools
import math
import os
import re
import shutil
import statistics
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

# ------------------------------------------------------------------------------------- CONFIG

CONFIG = {
    "num_stages": 4,  # pipeline stages, one GPU each. Try 2, 4, 8
    "num_microbatches": 4,  # slices of a batch: more of them keep more GPUs busy. Try 2, 4, 8
    "layers_per_stage": 3,  # layers on each GPU: more stages or more layers, a larger model
    "hidden_size": 64,  # width of the network: more to compute, more to remember
    "batch_size": 32,  # images in a batch: a multiple of num_microbatches
    "num_batches": 5,  # batches to train on, one weight update each. Try 200
    "learning_rate": 0.15,  # size of an update: the more staleness, the smaller it has to be
    "seed": 0,  # same seed, same weights and same batches, to the bit
    "device": "auto",  # auto (a GPU if there is one), cpu, cuda or cuda:1
    "schedule": "pipedream",  # naive, gpipe, 1f1b or pipedream
    "weight_stashing": True,  # False: backwards meet newer weights than their forward (pipedream)
    "vertical_sync": False,  # True: every stage uses the version that stage 0 used (pipedream)
    "forward_time": 1,  # simulated time of a microbatch's forward; 1,1,2,1 is one a stage
    "backward_time": 1,  # time of its backward: 2 is nearer the truth (two matrix products)
    "comm_time": 0,  # time to send a result to the neighbouring GPU
    "verbose": True,  # False: no timeline, and one line a batch
}


# --------------------------------------------------------------------------------- vocabulary


class Op(NamedTuple):
    """One thing that a GPU does.

    >>> str(Op(stage=2, kind="F", microbatch=0, version=0))  # as PyTorch prints it
    '2F0'
    """

    stage: int
    kind: str  # F forward, B backward, U weight update (I and W: the two halves of a backward)
    microbatch: int  # numbered through the run: batch b has microbatches b*M to (b+1)*M - 1
    version: int  # of the weights it reads: version v has received v updates

    def __str__(self):
        return f"{self.stage}{self.kind}{self.microbatch}"


Schedule = list[list[Op]]  # schedule[device]: what that device does, in order; no times, no idles


class Event(NamedTuple):
    """An op, the device that runs it, and when: simulated time, in units of the CONFIG's times."""

    op: Op
    device: int
    start: float
    end: float


@contextmanager
def cycle_collector_paused():
    """Keep Python from searching a million small tuples for cycles that cannot be there.

    On a long schedule that search takes as long as all the rest.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


# ---------------------------------------------------------------------------------- schedules
#
# Each function is what the GPU of one stage does, from its first forward to its last backward, and
# each mends the fault of the one before. Updates and weight versions follow: see pin_versions. The
# formulas for utilization hold where all stages take the same time and comm_time is 0.

Row = Iterator[tuple[int, str, int]]  # (stage, kind, microbatch): an Op, its version still open


def naive(stage: int, num_stages: int, num_microbatches: int, num_batches: int) -> Row:
    """One microbatch at a time: the next sets out when the last has come back.

    Nothing can go wrong, but one GPU works while S - 1 wait: utilization 1 / S.

    >>> print(format_rows(naive(stage, 2, 3, 1) for stage in range(2)))  # S=2, M=3, N=1
    GPU0: F0 B0 F1 B1 F2 B2
    GPU1: F0 B0 F1 B1 F2 B2
    """
    for m in range(num_microbatches * num_batches):
        yield stage, "F", m
        yield stage, "B", m


def gpipe(stage: int, num_stages: int, num_microbatches: int, num_batches: int) -> Row:
    """All forwards of the batch, then all backwards: GPU0 has the next while GPU1 has the last.

    A batch takes M + S - 1 turns each way instead of M * S: utilization M / (M + S - 1). The price
    is memory: a GPU keeps the activations of all M microbatches until their backwards come.
    GPipe (Huang et al., NeurIPS 2019), sections 2.2 and 2.3. (Backwards come first in, first out,
    as in PyTorch; in the paper's figure 2 last in, first out. Time and gradient are the same.)

    >>> print(format_rows(gpipe(stage, 2, 3, 1) for stage in range(2)))  # S=2, M=3, N=1
    GPU0: F0 F1 F2 B0 B1 B2
    GPU1: F0 F1 F2 B0 B1 B2
    """
    for first in range(0, num_microbatches * num_batches, num_microbatches):
        batch = range(first, first + num_microbatches)
        for m in batch:
            yield stage, "F", m
        for m in batch:
            yield stage, "B", m


def one_f_one_b(stage: int, num_stages: int, num_microbatches: int, num_batches: int) -> Row:
    """1F1B: let a microbatch come back as soon as it can, then one forward for every backward.

    Same bubble as GPipe, less memory: stage s keeps at most S - s microbatches, however large M is.
    (With slow links that is too few to hide the way there and back, and GPipe is the faster one.)
    The order is PipeDream's (SOSP 2019, section 3.2). Used inside a batch, with a flush at its end,
    it is PipeDream-Flush (Narayanan et al., ICML 2021, section 3.2), Megatron-LM's default.

    >>> print(format_rows(one_f_one_b(stage, 2, 3, 1) for stage in range(2)))  # S=2, M=3, N=1
    GPU0: F0 F1 B0 F2 B1 B2
    GPU1: F0 B0 F1 B1 F2 B2
    """
    warmup = min(num_stages - 1 - stage, num_microbatches)  # the last stage turns at once: 0
    steady = num_microbatches - warmup
    for first in range(0, num_microbatches * num_batches, num_microbatches):
        for m in range(warmup):
            yield stage, "F", first + m
        for m in range(steady):
            yield stage, "F", first + m + warmup
            yield stage, "B", first + m
        for m in range(steady, num_microbatches):  # cooldown: the backwards still owed
            yield stage, "B", first + m


def pipedream(stage: int, num_stages: int, num_microbatches: int, num_batches: int) -> Row:
    """1F1B that never flushes: the whole run is one stream of K microbatches.

    The pipeline fills once and drains once: utilization K / (K + S - 1). The price is in the
    weights: a stage now updates while microbatches are in flight on it. Which weights do they read?
    PipeDream (Narayanan et al., SOSP 2019), sections 3.2 and 3.3; the answer is pin_versions.

    >>> print(format_rows(pipedream(stage, 2, 2, 2) for stage in range(2)))  # S=2, M=2, N=2
    GPU0: F0 F1 B0 F2 B1 F3 B2 B3
    GPU1: F0 B0 F1 B1 F2 B2 F3 B3
    """
    return one_f_one_b(stage, num_stages, num_microbatches * num_batches, num_batches=1)


SCHEDULES: dict[str, Callable[[int, int, int, int], Row]] = {
    "naive": naive,
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "pipedream": pipedream,
}


def pin_versions(
    rows: Iterable[Iterable[tuple[int, str, int]]],
    num_microbatches: int,
    weight_stashing: bool = True,
    vertical_sync: bool = False,
) -> Schedule:
    """Add the updates, and say which weight version every op reads.

    A stage updates (U: version v becomes v + 1) right after its last backward of a batch. Without a
    flush there are then microbatches in flight whose forward read version v. Three ways on:

    - No stashing: everybody reads the newest. The backward of those microbatches then meets other
      weights than their forward did, and computes no gradient of the loss: neither at the old
      weights nor at the new.
    - Weight stashing (PipeDream, SOSP 2019, section 3.3): the first forward of a batch pins the
      newest version that this stage has; every forward and backward of the batch here reads it.
      (The paper does not split its minibatches: M = 1. With M > 1 gradients add up before U.)
    - Vertical sync (same section): the version that stage 0 pinned holds for all stages, so that a
      batch meets one network. The others have it: they update earlier, and now keep it for longer.
      With M >= S - 1 > 0 that is PipeDream-2BW (ICML 2021, section 3.1).

    After a flush nothing is in flight, and all three are the same.

    >>> row = pipedream(0, num_stages=2, num_microbatches=1, num_batches=3)
    >>> stashed = pin_versions([row], num_microbatches=1)
    >>> print(*(f"{op.kind}{op.microbatch}(v{op.version})" for op in stashed[0]))
    F0(v0) F1(v0) B0(v0) U0(v0) F2(v1) B1(v0) U1(v1) B2(v1) U2(v2)
    """
    newest = defaultdict(int)  # stage -> version
    backwards = defaultdict(int)  # stage -> how many so far
    pinned = {}  # (stage, batch) -> version
    schedule = []
    for row in rows:
        ops = []
        for stage, kind, microbatch in row:
            version = newest[stage]
            if weight_stashing:
                who = 0 if vertical_sync else stage  # stage 0 has pinned: its row is the first
                version = pinned.setdefault((who, microbatch // num_microbatches), version)
            ops.append(Op(stage, kind, microbatch, version))
            if kind in ("B", "W"):
                backwards[stage] += 1
                if backwards[stage] % num_microbatches == 0:
                    ops.append(Op(stage, "U", microbatch, newest[stage]))
                    newest[stage] += 1
        schedule.append(ops)
    return schedule


@cycle_collector_paused()
def build_schedule(config: dict) -> Schedule:
    """The rows of config["schedule"], with updates and weight versions."""
    sizes = config["num_stages"], config["num_microbatches"], config["num_batches"]
    rows = (SCHEDULES[config["schedule"]](stage, *sizes) for stage in range(config["num_stages"]))
    return pin_versions(rows, sizes[1], config["weight_stashing"], config["vertical_sync"])


def format_rows(rows: Iterable[Iterable[tuple]]) -> str:
    """What each GPU does, in order and without times, a line a GPU."""
    lines = (" ".join(f"{kind}{m}" for _, kind, m, *_ in row) for row in rows)
    return "\n".join(f"GPU{device}: {line}" for device, line in enumerate(lines))


# ---------------------------------------------------------------------------------- simulator


def input_of(op: Op, num_stages: int) -> tuple[int, str, int] | None:
    """The (stage, kind, microbatch) of the op whose result this one needs.

    A microbatch travels down the stages and back, F0 F1 ... F(S-1) B(S-1) ... B1 B0: every op needs
    the one before it. (That its own activations are there when B comes follows from this.)
    """
    stage, kind, microbatch, _ = op
    if kind == "F":
        return (stage - 1, "F", microbatch) if stage > 0 else None
    if kind in ("B", "I"):
        return (stage + 1, "B", microbatch) if stage < num_stages - 1 else (stage, "F", microbatch)
    return None  # an update follows its batch's backwards, W its I: the row says so


def result_of(op: Op) -> tuple[int, str, int]:
    """The name under which others wait for what op makes: for an I they wait as for a B."""
    return op.stage, "B" if op.kind == "I" else op.kind, op.microbatch


@cycle_collector_paused()
def simulate(schedule: Schedule, config: dict) -> list[Event]:
    """When would the GPUs run these rows? The only place where time comes from.

    An op starts when its device is free and its input has arrived. Nothing here knows a schedule or
    a bubble: an idle GPU is one whose next op still waits. Updates take no time. Returns the events
    sorted by start (an op never before the one it needs); ValueError if rows wait in a circle.

    >>> config = {**CONFIG, "num_stages": 2, "num_microbatches": 1, "num_batches": 1}
    >>> for event in simulate(build_schedule(config), config):
    ...     print(event.op, event.start, event.end)
    0F0 0 1
    1F0 1 2
    1B0 2 3
    1U0 3 3
    0B0 3 4
    0U0 4 4
    """
    num_stages = config["num_stages"]
    duration = {
        "F": per_stage(config["forward_time"], num_stages),
        "B": per_stage(config["backward_time"], num_stages),
        "U": [0] * num_stages,
    }
    duration["I"] = duration["W"] = [time / 2 for time in duration["B"]]
    comm_time = per_stage(config["comm_time"], num_stages)
    # Let each GPU run until its next op lacks an input; whoever makes that input wakes it again.
    events = []
    runnable = deque(range(len(schedule)))  # devices
    done = {}  # (stage, kind, microbatch) -> (device, end), until the op that needs it has come
    waiting = {}  # (stage, kind, microbatch) -> the device that waits for it

    def run(device: int) -> Iterator[tuple[int, str, int]]:
        """One GPU: do the row op by op; where an input is not there yet, yield what is missing."""
        now = 0
        for op in schedule[device]:
            needed = input_of(op, num_stages)
            if needed is not None:
                if needed not in done:
                    yield needed
                sender, arrival = done.pop(needed)
                if sender != device:
                    arrival += comm_time[needed[0]]
                if arrival > now:
                    now = arrival  # the bubble
            start, now = now, now + duration[op.kind][op.stage]
            events.append(Event(op, device, start, now))
            result = result_of(op)
            done[result] = device, now
            if result in waiting:
                runnable.append(waiting.pop(result))

    gpus = [run(device) for device in range(len(schedule))]
    while runnable:
        device = runnable.popleft()
        needed = next(gpus[device], None)
        if needed is not None:
            waiting[needed] = device
    if waiting:
        stuck = [f"GPU{device} waits for {s}{kind}{m}" for (s, kind, m), device in waiting.items()]
        raise ValueError("deadlock: " + ", ".join(sorted(stuck)))
    events.sort(key=lambda event: event.start)  # stable: an op stays behind the one it needs
    return events


def per_stage(time: float | list[float], num_stages: int) -> list[float]:
    """A time for each stage, from one for all or a list."""
    return time if isinstance(time, list) else [time] * num_stages


# ----------------------------------------------------------------------------------- measures


def makespan(events: list[Event]) -> float:
    """The time at which the last op ends."""
    return max(event.end for event in events)


def utilization(events: list[Event]) -> float:
    """The part of all device time, 0 to 1, in which a device computes; the rest is the bubble."""
    num_devices = 1 + max(event.device for event in events)
    return sum(event.end - event.start for event in events) / (num_devices * makespan(events))


def last_readers(schedule: Schedule) -> dict[tuple[int, int], Op]:
    """(stage, version) -> the last op that reads it; then the stage can forget it."""
    return {(op.stage, op.version): op for row in schedule for op in row}  # the last one stays


def memory_held(row: list[Op]) -> list[tuple[int, int]]:
    """(microbatches in flight, weight versions alive) on a device after each op of its row.

    A microbatch is in flight from its forward to its backward: the device keeps its activations.

    >>> row = pipedream(0, num_stages=2, num_microbatches=1, num_batches=3)
    >>> memory_held(pin_versions([row], num_microbatches=1)[0])  # F0 F1 B0 U0 F2 B1 U1 B2 U2
    [(1, 1), (2, 1), (1, 1), (1, 2), (2, 2), (1, 1), (1, 2), (0, 1), (0, 1)]
    """
    last_reader = last_readers([row])
    in_flight, alive = 0, len({op.stage for op in row})  # every stage starts with version 0
    held = []
    for op in row:
        in_flight += {"F": 1, "B": -1, "W": -1}.get(op.kind, 0)
        alive += op.kind == "U"
        alive -= last_reader[op.stage, op.version] is op
        held.append((in_flight, alive))
    return held


def peak_in_flight(schedule: Schedule) -> list[int]:
    """The most microbatches that each device holds at once."""
    return [max(in_flight for in_flight, _ in memory_held(row)) for row in schedule]


def peak_versions(schedule: Schedule) -> list[int]:
    """The most weight versions that each device holds at once."""
    return [max(alive for _, alive in memory_held(row)) for row in schedule]


def mismatches(schedule: Schedule) -> list[Op]:
    """The backwards that read another weight version than their forward did. Stashing: none."""
    ops = [op for row in schedule for op in row]
    forward_read = {(op.stage, op.microbatch): op.version for op in ops if op.kind == "F"}
    return [
        op for op in ops if op.kind == "B" and forward_read[op.stage, op.microbatch] != op.version
    ]


def staleness(schedule: Schedule, num_microbatches: int) -> list[int]:
    """Per device, the most updates that a forward misses: plain SGD reads version b for batch b."""
    return [
        max(op.microbatch // num_microbatches - op.version for op in row if op.kind == "F")
        for row in schedule
    ]


# ----------------------------------------------------------------------------- model and data


class Residual(nn.Module):
    """x + scale * tanh(W x + b): a layer that changes what it gets, but never drowns it.

    With a scale that falls as 1 / sqrt(depth), activations and gradients keep their size through
    any number of layers. Twelve plain Linear + ReLU layers shrink them instead, and never learn.
    """

    def __init__(self, size: int, scale: float):
        super().__init__()
        self.linear = nn.Linear(size, size)
        nn.init.xavier_uniform_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:  # (microbatch_size, size) in and out
        return x + self.scale * torch.tanh(self.linear(x))


def build_stages(config: dict) -> list[nn.Module]:
    """One ordinary network, cut into num_stages slices of layers_per_stage layers.

    Applied one after the other the stages are the network: (n, 64) pixels in, (n, 10) logits out.
    The same seed gives the same bits; the cut does not change them.
    """
    depth = config["num_stages"] * config["layers_per_stage"]
    size = config["hidden_size"]
    with torch.random.fork_rng(devices=[]):  # leaves the caller's random numbers alone
        torch.manual_seed(config["seed"])
        if depth == 1:
            layers = [nn.Linear(64, 10)]
        else:
            between = [Residual(size, scale=2 / math.sqrt(depth)) for _ in range(depth - 2)]
            layers = [nn.Linear(64, size), *between, nn.Linear(size, 10)]
    cuts = range(0, depth, config["layers_per_stage"])
    return [nn.Sequential(*layers[cut : cut + config["layers_per_stage"]]) for cut in cuts]


def load_digits(generator: torch.Generator) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The 1,797 handwritten digits of digits.npz, shuffled: (x, y) to train on, (x, y) held out.

    x is (n, 64) float, every pixel with mean 0 and a spread of about 1 over the training part;
    y is (n,) int64, 0 to 9. A fifth is held out for the test accuracy. UserError without the file.
    """
    path = Path(__file__).resolve().with_name("digits.npz")
    try:
        with np.load(path) as file:
            images, labels = file["images"], file["labels"]
        shapes_fit = labels.ndim == 1 and images.shape == (len(labels), 8, 8)
        if not shapes_fit or len(labels) < 10 or {images.dtype.kind, labels.dtype.kind} - set("ui"):
            raise ValueError("expected whole numbers, images (n, 8, 8) and labels (n,)")
        if not 0 <= labels.min() <= labels.max() <= 9:
            raise ValueError("expected labels from 0 to 9")
        x = torch.from_numpy(images.reshape(len(labels), 64) / 16.0).float()
        y = torch.from_numpy(labels.astype(np.int64))
    except FileNotFoundError:
        raise UserError(f"{path} is not there: it belongs next to pipedream_simple.py") from None
    except Exception as error:  # a broken archive raises whatever the part that broke raises
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise UserError(f"{path} does not hold the handwritten digits: {reason}") from None
    order = torch.randperm(len(y), generator=generator)
    test, train = order.split([len(y) // 5, len(y) - len(y) // 5])
    mean, spread = x[train].mean(0), x[train].std(0) + 0.1  # some corner pixels are always blank
    x = (x - mean) / spread
    return (x[train], y[train]), (x[test], y[test])


def make_batches(config: dict) -> list[tuple[Tensor, Tensor]]:
    """num_batches pairs of x (batch_size, 64) and y (batch_size,), epoch after shuffled epoch."""
    generator = torch.Generator().manual_seed(config["seed"])
    (x, y), _ = load_digits(generator)
    num_images = config["batch_size"] * config["num_batches"]
    epochs = range(math.ceil(num_images / len(y)))
    order = torch.cat([torch.randperm(len(y), generator=generator) for _ in epochs])
    return [(x[chosen], y[chosen]) for chosen in order[:num_images].split(config["batch_size"])]


def choose_device(name: str) -> torch.device:
    """The torch device of that name; "auto" is a CUDA GPU if there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


# ------------------------------------------------------------------------------------ trainer

Weights = dict[str, Tensor]  # one version of a stage: parameter name -> leaf tensor


class Worker:
    """What one GPU does. It knows no schedule: it runs whatever op it is given.

    versions    the weight versions that this stage still needs, by number
    in_flight   of each microbatch between its forward and its backward: the input, the output, and
                the weights that turned one into the other. That is the stash. It copies nothing: an
                update makes new tensors, and the old ones live while somebody holds them.
    gradient    of the weights, summed over the microbatches of the batch so far
    """

    def __init__(self, stage: nn.Module, weights: Weights, config: dict):
        self.stage = stage
        self.versions = {0: weights}
        self.in_flight: dict[int, tuple[Tensor, Tensor, Weights]] = {}
        self.gradient: Weights = {}
        self.learning_rate = config["learning_rate"]
        self.num_microbatches = config["num_microbatches"]
        self.stashing = config["weight_stashing"]

    def forward(self, op: Op, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Run the stage on weight version op.version; given labels (last stage), on to the loss.

        A microbatch's loss is divided by M, so that over a batch it adds up to the batch's mean.
        """
        weights = self.versions[op.version]
        # Autograd stops at x: what came before is another GPU's, or the images.
        x = x.detach().requires_grad_(op.stage > 0)
        output = functional_call(self.stage, weights, (x,), tie_weights=False)  # there are none
        if labels is not None:
            output = cross_entropy(output, labels) / self.num_microbatches
        self.in_flight[op.microbatch] = x, output, weights
        return output.detach()

    def backward(self, op: Op, output_gradient: Tensor | None) -> Tensor | None:
        """Add this microbatch's gradient to self.gradient, and return the gradient of its input.

        Autograd walks back through the graph that the forward left, and reads the weights in it as
        they are by now. With stashing they are what the forward saw: nobody writes on a version.
        """
        x, output, weights = self.in_flight.pop(op.microbatch)
        assert weights is self.versions[op.version], f"{op} does not read version {op.version}"
        if output_gradient is not None:
            # The chain rule. output.backward(output_gradient) is the same to the bit, but torch
            # imports sympy for it, which takes longer than all the training of the default run.
            output = torch.dot(output.flatten(), output_gradient.flatten())
        if op.kind == "I":  # only the gradient of x for now, which others wait for
            self.in_flight[op.microbatch] = x, output, weights
            if x.requires_grad:
                output.backward(inputs=[x], retain_graph=True)
            return x.grad
        for name, w in weights.items():
            w.grad = self.gradient.get(name)  # autograd adds to what is there
        output.backward(inputs=[*weights.values()] if op.kind == "W" else None)
        for name, w in weights.items():
            self.gradient[name], w.grad = w.grad, None
        return x.grad

    @torch.no_grad()
    def update(self, op: Op) -> None:
        """W(v+1) = W(v) - learning_rate * (all gradients of the batch).

        W(v) is the newest version. The gradients may come from an older one, the one that the batch
        read: that is staleness.
        """
        weights, rate = self.versions[op.version], self.learning_rate
        new = {} if self.stashing else weights
        for name, w in weights.items():
            gradient = self.gradient.pop(name)
            if self.stashing:
                # Into memory of its own: that of the gradient, which nobody needs any more.
                new[name] = torch.sub(w, gradient, alpha=rate, out=gradient).requires_grad_()
            else:
                # In place, under the graphs of microbatches in flight. PyTorch refuses this bug
                # ("modified by an inplace operation"): .data is the way around its guard.
                w.data.sub_(gradient, alpha=rate)
        self.versions[op.version + 1] = new


@dataclass
class Run:
    """What a training run leaves behind, noted down while it ran."""

    losses: list[float]  # of each batch: the mean over its images, before its update
    newest: list[int]  # per stage: its newest version by now
    peak_versions: list[int]  # per stage: the most versions alive at once
    versions_read: dict[tuple[int, str, int], int] = field(default_factory=dict)
    # (stage, "F" or "B", microbatch) -> the version whose tensors that op used
    newest_at_backward: dict[tuple[int, int], int] = field(default_factory=dict)
    # (stage, microbatch) -> the newest version that the stage had by the time of its backward
    weights: list[Weights] = field(default_factory=list)  # per stage, after the last update
    test_accuracy: float = math.nan  # 0 to 1, on the images held out, after the last update


def train(
    config: dict,
    dtype: torch.dtype = torch.float32,
    on_batch: Callable[[int, Run], None] | None = None,
    watch: Callable[[Op, Worker], None] | None = None,
    schedule: Schedule | None = None,
) -> Run:
    """Execute a schedule, by default that of config, on tensors: op after op in simulated order.

    on_batch(batch, run) is called whenever all stages have made their update for a batch;
    watch(op, worker) after every op.
    """
    num_stages, num_microbatches = config["num_stages"], config["num_microbatches"]
    schedule = schedule or build_schedule(config)
    last_reader = last_readers(schedule)
    microbatches = split_batches(config, dtype)
    workers = make_workers(config, dtype)
    sent = {}  # (stage, kind, microbatch) -> what that op hands on to the next
    batches_complete = 0
    run = Run(
        [0.0] * config["num_batches"], newest=[0] * num_stages, peak_versions=[1] * num_stages
    )

    for op, *_ in simulate(schedule, config):
        worker = workers[op.stage]
        batch = op.microbatch // num_microbatches
        on_last_stage = op.stage == num_stages - 1
        needed = input_of(op, num_stages)
        if op.kind == "F":
            images, labels = microbatches[op.microbatch]
            x = images if needed is None else sent.pop(needed)
            sent[op[:3]] = worker.forward(op, x, labels if on_last_stage else None)
        elif op.kind in ("B", "I"):
            received = sent.pop(needed)
            if on_last_stage:  # its own loss: the loss is the output, and no gradient arrives
                run.losses[batch] += received.item()
                received = None
            x_gradient = worker.backward(op, received)
            if op.stage > 0:
                sent[result_of(op)] = x_gradient
            run.newest_at_backward[op.stage, op.microbatch] = run.newest[op.stage]
        elif op.kind == "W":
            worker.backward(op, None)
        else:
            worker.update(op)
            run.newest[op.stage] += 1

        if op.kind != "U":
            run.versions_read[op[:3]] = op.version
        if last_reader[op.stage, op.version] is op:
            del worker.versions[op.version]
        run.peak_versions[op.stage] = max(run.peak_versions[op.stage], len(worker.versions))
        if watch:
            watch(op, worker)
        if on_batch and op.kind == "U" and min(run.newest) > batches_complete:
            on_batch(batches_complete, run)
            batches_complete += 1

    assert not sent, "a message was left behind"
    assert not any(worker.in_flight for worker in workers), "a microbatch was left behind"
    run.weights = [worker.versions.pop(config["num_batches"]) for worker in workers]
    assert not any(worker.versions for worker in workers), "a weight version was left behind"
    run.test_accuracy = accuracy([worker.stage for worker in workers], run.weights, config)
    return run


def make_workers(config: dict, dtype: torch.dtype) -> list[Worker]:
    """A worker for every stage, with version 0 of its weights as leaf tensors on the device."""
    device = choose_device(config["device"])
    workers = []
    for stage in build_stages(config):
        parameters = {name: w.detach().to(device, dtype) for name, w in stage.named_parameters()}
        weights = {name: w.requires_grad_() for name, w in parameters.items()}
        workers.append(Worker(stage, weights, config))
    return workers


def split_batches(config: dict, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """(x, y) of every microbatch of the run, on the device, microbatch 0 first."""
    device, num_microbatches = choose_device(config["device"]), config["num_microbatches"]
    microbatches = []
    for x, y in make_batches(config):
        x, y = x.to(device, dtype), y.to(device)
        microbatches += zip(x.chunk(num_microbatches), y.chunk(num_microbatches), strict=True)
    return microbatches


def run_network(stages: list[nn.Module], weights: list[Weights], x: Tensor) -> Tensor:
    """The whole network, stage after stage, each on its weights: x (n, 64) to logits (n, 10)."""
    for stage, stage_weights in zip(stages, weights, strict=True):
        x = functional_call(stage, stage_weights, (x,))
    return x


@torch.no_grad()
def accuracy(stages: list[nn.Module], weights: list[Weights], config: dict) -> float:
    """The part of the held-out images, 0 to 1, that the network with these weights gets right."""
    _, (x, y) = load_digits(torch.Generator().manual_seed(config["seed"]))
    any_weight = next(iter(weights[0].values()))
    guesses = run_network(stages, weights, x.to(any_weight)).argmax(1)
    return (guesses.cpu() == y).double().mean().item()


class GradientAudit:
    """How wrong is a gradient? Give this to train as watch, and each is compared with the true one.

    True is backpropagation through the whole network, every stage on a copy of the weights that its
    forward read for the same microbatch. error[stage, microbatch] is |gradient - true| / |true|
    over the weights of the stage. With weight stashing it is 0 up to rounding.
    """

    def __init__(self, config: dict, dtype: torch.dtype = torch.float32):
        self.stages = build_stages(config)
        self.microbatches = split_batches(config, dtype)
        self.num_microbatches = config["num_microbatches"]
        self.read: dict[tuple[int, int], Weights] = {}  # (stage, microbatch) -> copy
        self.used: dict[tuple[int, int], Tensor] = {}  # (stage, microbatch) -> gradient, flat
        self.summed: dict[int, Tensor] = {}  # stage -> gradient of the batch so far, flat
        self.error: dict[tuple[int, int], float] = {}

    def __call__(self, op: Op, worker: Worker) -> None:
        if op.kind == "F":
            _, _, weights = worker.in_flight[op.microbatch]
            copy = {name: w.detach().clone().requires_grad_() for name, w in weights.items()}
            self.read[op.stage, op.microbatch] = copy
        elif op.kind == "B":
            summed = flat(worker.gradient)
            self.used[op.stage, op.microbatch] = summed - self.summed.get(op.stage, 0)
            self.summed[op.stage] = summed
            if op.stage == 0:  # the microbatch has come back
                self.compare(op.microbatch)
        else:
            del self.summed[op.stage]

    def compare(self, microbatch: int) -> None:
        """Fill in the error of every stage for a microbatch whose backward is done."""
        x, labels = self.microbatches[microbatch]
        read = [self.read.pop((stage, microbatch)) for stage in range(len(self.stages))]
        loss = cross_entropy(run_network(self.stages, read, x), labels) / self.num_microbatches
        loss.backward()
        for stage, weights in enumerate(read):
            true = flat({name: w.grad for name, w in weights.items()})
            difference = self.used.pop((stage, microbatch)) - true
            self.error[stage, microbatch] = (difference.norm() / true.norm()).item()


def flat(tensors: Weights) -> Tensor:
    """All of them as one vector."""
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


# ------------------------------------------------------------------------------------- report
#
# Text from values. No schedule, time or loss is worked out here.

TIMELINE_STYLES = [  # heading, forward, backward, idle, separator: from roomy to narrow
    ("GPU{0} (Stage {0})", "MB{0} forward", "MB{0} backward", "idle", " | "),
    ("GPU{0} (Stage {0})", "MB{0} forward", "MB{0} backward", "idle", "| "),
    ("GPU{0}", "F{0}", "B{0}", ".", " | "),
    ("{0}", "F{0}", "B{0}", ".", " "),
]
ALL_BUSY = " ← All busy!"


def format_timeline(events: list[Event], width: int = 100, max_rows: int = 60) -> str:
    """A table: a row for every time at which something begins or ends, a column a GPU.

    The first of TIMELINE_STYLES that fits in width; GPUs that do not fit even in the narrowest, and
    rows beyond max_rows, are left out and counted.
    """
    times = sorted({tick(time) for event in events for time in (event.start, event.end)})
    row_of = {time: row for row, time in enumerate(times)}
    num_devices = 1 + max(event.device for event in events)
    running: list[dict[int, Op]] = [{} for _ in times[:-1]]  # at the last time all is over
    for op, device, start, end in events:
        for row in range(row_of[tick(start)], row_of[tick(end)]):
            running[row][device] = op
    head, hidden, tail = shorten(range(len(running)), max_rows)

    for heading, forward, backward, idle, separator in TIMELINE_STYLES:
        texts = {"F": forward, "B": backward}
        table = [["Time", *(heading.format(device) for device in range(num_devices))]]
        for row in [*head, *tail]:
            ops = [running[row].get(device) for device in range(num_devices)]
            cells = (texts[op.kind].format(op.microbatch) if op else idle for op in ops)
            table.append([f"t{times[row]:.12g}", *cells])
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        if sum(widths) + len(separator) * num_devices + len(ALL_BUSY) <= width:
            break
    room = width - len(ALL_BUSY)
    while len(widths) > 2 and sum(widths) + len(separator) * (len(widths) - 1) > room:
        widths.pop()

    lines = [separator.join(map(str.ljust, cells, widths)) for cells in table]
    for line, row in enumerate([*head, *tail], start=1):
        lines[line] = (
            lines[line] + ALL_BUSY if len(running[row]) == num_devices else lines[line].rstrip()
        )
    if hidden:
        lines.insert(1 + len(head), f"...  ({hidden} more rows)")
    if len(widths) <= num_devices:
        lines[0] += f" (+{num_devices + 1 - len(widths)} GPUs)"
    if forward == "F{0}":
        lines.insert(0, "(F3: MB3 forward, B3: backward, .: idle)")
    return "\n".join(lines)


def tick(time: float) -> float:
    """A time without the last digits of rounding, so that 0.1 + 0.2 and 0.3 are one row."""
    return float(f"{time:.12g}")


def shorten(items: Sequence, limit: int) -> tuple[Sequence, int, Sequence]:
    """(the first ones, how many are left out, the last ones): limit items at the most."""
    if len(items) <= limit:
        return items, 0, []
    num_last = max(1, limit // 4)
    return items[: limit - num_last], len(items) - limit, items[-num_last:]


def schedule_name(config: dict) -> tuple[str, str]:
    """How people write the schedule's name, and what it does about weight versions."""
    names = {"naive": "Naive", "gpipe": "GPipe", "1f1b": "1F1B", "pipedream": "PipeDream"}
    name = names.get(config["schedule"], config["schedule"])
    if config["schedule"] != "pipedream":
        return name, "a flush before every update, so one weight version is enough"
    if config["vertical_sync"]:
        return name, "weight stashing with vertical sync"
    return name, "weight stashing" if config["weight_stashing"] else "NO weight stashing"


def format_banner(config: dict) -> str:
    """What is about to run, on what, and what of it is real."""
    num_stages = config["num_stages"]
    gpus = f"{num_stages} GPU" + "s" * (num_stages > 1)
    device = choose_device(config["device"])
    here = "CPU" if device.type == "cpu" else "1 GPU"
    on = "the CPU" if device.type == "cpu" else "1 GPU"
    modules = build_stages(config)
    num_weights = sum(w.numel() for stage in modules for w in stage.parameters())
    name, keeps = schedule_name(config)
    one_by_one = num_stages == 1 or config["schedule"] == "naive"
    parallel = (
        "One GPU would work at a time" if one_by_one else f"All {gpus} would work in parallel"
    )
    return f"""\
🚀 {name} Pipeline Created!
⚠️  SIMULATION MODE: Running on {here} (simulating {gpus})
Pipeline stages: {num_stages} (would be {gpus} in real setup)
Microbatches: {config["num_microbatches"]}
Schedule: {config["schedule"]} ({keeps})
Network: {num_stages} x {config["layers_per_stage"]} layers, {num_weights:,} weights

💡 In real {name}:
   - Each stage would be on a separate GPU
   - {parallel}

💡 In this simulation:
   - All stages are on {on} (for learning); the arithmetic is real
   - Timeline shows what WOULD happen on {gpus}; time is simulated"""


def worst(errors: list[float]) -> float:
    """The largest, and not a number if one of them is none."""
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def format_versions(versions: list[int], short: bool = False) -> str:
    """Versions stage by stage: "v0 v0 v0 v1", or in short "v0x3 v1".

    >>> format_versions([0, 0, 0, 1]), format_versions([0, 0, 0, 1], short=True)
    ('v0 v0 v0 v1', 'v0x3 v1')
    """
    if not short:
        return " ".join(f"v{v}" for v in versions)
    runs = ((v, len(list(same))) for v, same in itertools.groupby(versions))
    return " ".join(f"v{v}x{length}" if length > 1 else f"v{v}" for v, length in runs)


def format_table(table: list[list[str]], gap: int = 3) -> list[str]:
    """Lines of left-aligned columns."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [(" " * gap).join(map(str.ljust, cells, widths)).rstrip() for cells in table]


def format_batch(
    batch: int,
    run: Run,
    config: dict,
    events: list[Event],
    gradient_error: dict[tuple[int, int], float],
    width: int = 100,
) -> str:
    """What happened to one batch: versions read, loss, updates in order of (simulated) time."""
    num_microbatches, stages = config["num_microbatches"], range(config["num_stages"])
    first = batch * num_microbatches
    head, hidden, tail = shorten(range(first, first + num_microbatches), 16)
    for short in (False, True):
        table = [
            [
                "",
                "forward read",
                "backward read",
                "newest at backward",
                "gradient" * bool(gradient_error),
            ]
        ]
        for m in [*head, *tail]:
            read = [[run.versions_read[s, kind, m] for s in stages] for kind in "FB"]
            newest = [run.newest_at_backward[s, m] for s in stages]
            errors = [gradient_error[s, m] for s in stages] if gradient_error else []
            note = f"{worst(errors):.1%} off" if errors else ""
            table.append([f"MB{m}", *(format_versions(v, short) for v in (*read, newest)), note])
        lines = format_table(table)
        if max(map(len, lines)) <= width:
            break
    if hidden:
        lines.insert(1 + len(head), f"...  ({hidden} more microbatches)")
    note = "stage 0 first; v0x3: v0 on three stages" if short else "stage 0 first"
    lines.insert(0, f"BATCH {batch + 1}/{config['num_batches']}  (weight versions, {note})")
    count = f"{num_microbatches} microbatch" + "es" * (num_microbatches > 1)
    lines.append(f"Average loss across {count}: {run.losses[batch]:.4f}")
    updates = [event for event in events if event.op.kind == "U" and event.op.version == batch]
    head, hidden, tail = shorten(updates, 8)
    for op, _, _, end in [*head, *tail]:
        lines.append(f"Stage {op.stage}: Updated weights v{batch} → v{batch + 1}  (at t{end:.10g})")
    if hidden:
        lines.insert(len(lines) - len(tail), f"...  ({hidden} more stages)")
    lines.append("")
    if min(run.newest) == max(run.newest):
        lines.append(f"✅ Batch complete! All stages now at version {batch + 1}")
    else:
        lines.append(f"✅ Batch complete! All stages have version {batch + 1}, some a newer one:")
        lines.append("   " + format_versions(run.newest, short))
    return "\n".join(lines)


def batches_shown(num_batches: int) -> list[int]:
    """The batches that get a line: of a long run only every so many, and the last."""
    step = math.ceil(num_batches / 20)
    return sorted({*range(0, num_batches, step), num_batches - 1})


def format_loss(batch: int, run: Run) -> str:
    """The one line that is left of a batch."""
    return f"Batch {batch + 1}: Loss {run.losses[batch]:.4f} (weights v{batch} → v{batch + 1})"


def format_measures(
    config: dict,
    schedule: Schedule,
    events: list[Event],
    run: Run,
    gradient_error: dict[tuple[int, int], float],
    width: int = 100,
) -> str:
    """What the simulated GPUs did with their time and memory, and what the training reached."""
    one_by_one = makespan(simulate(build_schedule({**config, "schedule": "naive"}), config))
    time = makespan(events)
    devices = range(len(schedule))
    busy = [0.0 for _ in devices]
    for event in events:
        busy[event.device] += (event.end - event.start) / time
    per_gpu = {
        "": [f"GPU{device}" for device in devices],
        "busy": [f"{part:.0%}" for part in busy],
        "microbatches in flight, peak": peak_in_flight(schedule),
        "weight versions alive, peak": run.peak_versions,
        "staleness (updates missed)": staleness(schedule, config["num_microbatches"]),
    }
    if gradient_error:
        errors = [[e for (s, _), e in gradient_error.items() if s == stage] for stage in devices]
        per_gpu["gradient error, mean"] = [f"{statistics.fmean(e):.1%}" for e in errors]
        per_gpu["gradient error, worst"] = [f"{worst(e):.1%}" for e in errors]
    cell_width = 1 + max(len(str(cell)) for row in per_gpu.values() for cell in row)
    first, hidden, last = shorten(devices, max(2, (width - 28 - 4) // cell_width))
    for name, row in per_gpu.items():
        cells = [str(row[device]).rjust(cell_width) for device in (*first, *last)]
        cells.insert(len(first), " ..." * bool(hidden))
        per_gpu[name] = f"{name:<28}" + "".join(cells)
    lines = [
        f"Makespan: {time:.10g} time units (naive, one microbatch at a time: {one_by_one:.10g})",
        f"GPU utilization: {utilization(events):.1%}, bubble (idle): {1 - utilization(events):.1%}",
        f"Speed-up over naive: {one_by_one / time:.2f}x",
        *per_gpu.values(),
        f"Test accuracy: {run.test_accuracy:.1%} of the digits that it was not trained on",
    ]
    if gradient_error:
        lines.append(GRADIENT_ERROR)
    if not all(map(math.isfinite, run.losses)):
        lines.append("The loss left all bounds: try a smaller learning_rate, or less staleness")
    elif run.losses[-1] > run.losses[0]:
        lines.append("The loss grew: try a smaller learning_rate, or less staleness")
    return "\n".join(lines)


GRADIENT_ERROR = """\
   Gradient error: |gradient - true| / |true|, true being backpropagation on the
   weights that the forward read. Where an update comes in between, here or on a
   later stage, the backward reads other weights: its result is no gradient of the
   loss, neither at the old weights nor at the new. With weight stashing it is 0."""


def format_comparison(config: dict) -> str:
    """All schedules at this CONFIG, a line each, from their rows and their simulated times."""
    default = {"weight_stashing": True, "vertical_sync": False}
    variants = [(name, {"schedule": name, **default}) for name in SCHEDULES]
    variants += [
        ("  vertical sync", {"schedule": "pipedream", **default, "vertical_sync": True}),
        ("  no stashing", {"schedule": "pipedream", **default, "weight_stashing": False}),
    ]
    columns = "  schedule|time|speed-up|busy|in flight|versions|stale|F/B differ"
    table = [columns.split("|")]
    naive_time = None
    num_backwards = config["num_stages"] * config["num_microbatches"] * config["num_batches"]
    legend = COMPARISON_LEGEND.format(num_backwards=num_backwards)
    for name, settings in variants:
        schedule = build_schedule({**config, **settings})
        events = simulate(schedule, config)
        naive_time = naive_time or makespan(events)  # naive is the first
        keys = settings if config["schedule"] == "pipedream" else ["schedule"]  # a flush: no switch
        this_run = all(config[key] == settings[key] for key in keys)
        table.append(
            [
                ("* " if this_run else "  ") + name,
                f"{makespan(events):.10g}",
                f"{naive_time / makespan(events):.2f}x",
                f"{utilization(events):.1%}",
                str(max(peak_in_flight(schedule))),
                str(max(peak_versions(schedule))),
                str(max(staleness(schedule, config["num_microbatches"]))),
                str(len(mismatches(schedule))),
            ]
        )
    return "\n".join([*format_table(table, gap=2), legend])


COMPARISON_LEGEND = """\
   * this run. busy: utilization. in flight, versions: peak of the fullest GPU.
   stale: updates missed. F/B differ: of the {num_backwards} backwards, those that
   read other weights than their forward did."""


# ---------------------------------------------------------------------------------- bad input


class UserError(ValueError):
    """Something that the reader can put right: told in one line, without a traceback."""


def is_number(value) -> bool:
    """An int or float up to 1e30; no bool, which is an int to Python and none to a reader."""
    is_real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_real and -1e30 <= value <= 1e30


def is_whole(value, least: int, most: int) -> bool:
    """An int from least to most."""
    return is_number(value) and isinstance(value, int) and least <= value <= most


def is_time(value, zero_allowed: bool = False) -> bool:
    """A number above 0 (and not so large that a sum of them is none), or a list of such."""
    times = value if isinstance(value, list) else [value]
    return all(is_number(t) and (0 < t <= 1e12 or (zero_allowed and t == 0)) for t in times)


COUNT = (lambda value: is_whole(value, 1, 10**9), "must be a whole number, 1 to 1,000,000,000")
TIME = (is_time, "must be a number greater than 0, up to 1e12, or a list of such, one a stage")
SWITCH = (lambda value: isinstance(value, bool), "must be True or False")
RULES = {  # key -> (does a value keep the rule?, the rule)
    "num_stages": COUNT,
    "num_microbatches": COUNT,
    "layers_per_stage": COUNT,
    "hidden_size": COUNT,
    "batch_size": COUNT,
    "num_batches": COUNT,
    "learning_rate": (
        lambda value: is_number(value) and value > 0,
        "must be a number greater than 0, up to 1e30",
    ),
    "seed": (lambda value: is_whole(value, 0, 2**63 - 1), "must be a whole number, 0 to 2**63 - 1"),
    "device": (lambda value: isinstance(value, str), "must be auto, cpu, cuda or cuda:N"),
    "schedule": (lambda value: isinstance(value, str), "must be the name of a schedule"),
    "weight_stashing": SWITCH,
    "vertical_sync": SWITCH,
    "forward_time": TIME,
    "backward_time": TIME,
    "comm_time": (
        lambda value: is_time(value, zero_allowed=True),
        "must be a number, 0 to 1e12, or a list of such, one a stage",
    ),
    "verbose": SWITCH,
}


MAX_LAYERS, MAX_FORWARDS, MAX_IMAGES = 10_000, 500_000, 10_000_000  # that one run may hold


def check_config(config: dict) -> None:
    """Raise a UserError (a ValueError) of one sentence for the first wrong thing in config."""
    for key in config:
        if key not in RULES:
            raise UserError(f"unknown key {key!r} in CONFIG{nearest(key, RULES)}")
    for key, (keeps, rule) in RULES.items():
        if key not in config:
            raise UserError(f"CONFIG has no {key!r}: every key needs a value")
        if not keeps(config[key]):
            raise UserError(f"{key}={config[key]!r} {rule}")
    check_device(config["device"])
    if config["schedule"] not in SCHEDULES:
        raise UserError(f"schedule={config['schedule']!r} must be one of {', '.join(SCHEDULES)}")

    num_stages, num_microbatches = config["num_stages"], config["num_microbatches"]
    num_batches, batch_size = config["num_batches"], config["batch_size"]
    for key in ("forward_time", "backward_time", "comm_time"):
        if isinstance(config[key], list) and len(config[key]) != num_stages:
            raise UserError(f"{key}={config[key]!r} must have num_stages={num_stages} entries")
    if config["vertical_sync"] and not config["weight_stashing"]:
        raise UserError("vertical_sync=True needs weight_stashing=True: it reads stashed versions")
    for what, count, most in (
        ("num_stages * num_microbatches", num_stages * num_microbatches, MAX_FORWARDS),
        ("batch_size", batch_size, MAX_IMAGES),
    ):
        if count * num_batches > most:
            raise UserError(
                f"{what} * num_batches is {count * num_batches:,}: at most {most:,} fit"
            )
    num_layers = num_stages * config["layers_per_stage"]
    if num_layers > MAX_LAYERS:
        rule = f"at most {MAX_LAYERS:,} fit"
        raise UserError(f"num_stages * layers_per_stage is {num_layers:,}: {rule}")
    if batch_size % num_microbatches:
        *most, last = (str(d) for d in range(1, batch_size + 1) if batch_size % d == 0)
        choices = f"{', '.join(most)} or {last}" if most else last
        raise UserError(
            f"batch_size={batch_size} cannot be split evenly into num_microbatches="
            f"{num_microbatches}: try {choices}"
        )


def check_device(name: str) -> None:
    """Raise a UserError unless this machine has that device."""
    if name in ("auto", "cpu"):
        return
    if not re.fullmatch(r"cuda(:\d{1,3})?", name):
        raise UserError(f"device={name!r} must be auto, cpu, cuda or cuda:N")
    num_gpus = torch.cuda.device_count()
    if int(name.partition(":")[2] or 0) >= num_gpus:
        raise UserError(f"device={name!r}: torch finds {num_gpus} CUDA GPUs here, try cpu")


def nearest(word: str, words: Iterable[str]) -> str:
    """A question that names the word most like this one; nothing where none is like it."""
    close = difflib.get_close_matches(str(word), words, n=1)
    return f": did you mean {close[0]}?" if close else ""


# --------------------------------------------------------------------------------------- main

NEXT_STEPS = """\
   --num_microbatches 8                          a fuller pipeline
   --num_stages 8                                a deeper one
   --schedule gpipe                              what a flush costs
   --num_microbatches 1 --weight_stashing False  what stashing is for
   --num_batches 200 --verbose False             how well it learns"""


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser with a flag for every CONFIG key; --help shows the comments beside them."""
    source = Path(__file__).read_text("utf-8", "replace")
    comments = dict(re.findall(r'^    "(\w+)": .*?  # (.*)$', source, re.M))
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for key in RULES:
        help = f"{comments.get(key, '')} (now {CONFIG.get(key)})".replace("%", "%%")
        only_true = {"nargs": "?", "const": True} if RULES[key] is SWITCH else {}
        names = dict.fromkeys([f"--{key}", f"--{key.replace('_', '-')}"])
        parser.add_argument(*names, type=parse_value, metavar="X", help=help, **only_true)

    def fail(message: str) -> NoReturn:
        raise UserError(message.replace("\n", " "))

    parser.error = fail
    return parser


def parse_value(text: str) -> int | float | bool | str | list:
    """What Python would read: 4, 0.5, True, 1,2,1,1 (a list); everything else stays text."""
    if "," in text or text.startswith("["):
        return [parse_value(part) for part in text.strip("[] ").split(",")]
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            pass
    return {"true": True, "false": False}.get(text.strip().lower(), text)


def parse_config(
    parser: argparse.ArgumentParser,
    argv: list[str] | None = None,
    check: Callable[[dict], None] = check_config,
) -> tuple[dict, dict]:
    """CONFIG with the flags of the command line on top, checked; and what other flags said."""
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = unknown[0].partition("=")[0]
        hint = nearest(flag, [f"--{key}" for key in RULES]) or ", --help lists them"
        raise UserError(f"unknown flag {flag!r}{hint}")
    config = CONFIG | {key: value for key, value in vars(given).items() if key in RULES}
    check(config)
    return config, {key: value for key, value in vars(given).items() if key not in RULES}


def main() -> None:
    config, _ = parse_config(make_parser(__doc__))
    verbose, num_batches = config["verbose"], config["num_batches"]
    width = shutil.get_terminal_size((100, 24)).columns
    schedule = build_schedule(config)
    events = simulate(schedule, config)
    unstashed = config["schedule"] == "pipedream" and not config["weight_stashing"]
    audit = GradientAudit(config) if unstashed else None
    gradient_error = audit.error if audit else {}
    shown = batches_shown(num_batches)

    def on_batch(batch: int, run: Run) -> None:
        if not verbose and batch in shown:
            print(format_loss(batch, run), flush=True)
        if verbose and (batch < 5 or batch == num_batches - 1):
            print(
                "\n" + format_batch(batch, run, config, events, gradient_error, width), flush=True
            )
        if verbose and batch == 5 < num_batches - 1:
            print(f"\n... batches 6 to {num_batches - 1} go the same way ...", flush=True)

    print(format_banner(config) + "\n", flush=True)
    if verbose:
        print("📊 PIPELINE TIMELINE VISUALIZATION\n" + format_timeline(events, width), flush=True)
    run = train(config, on_batch=on_batch, watch=audit)
    if verbose:
        print(f"\nTraining results ({num_batches} batches):")
        print("\n".join(f"- {format_loss(batch, run)}" for batch in shown))
    print("\n📊 WHAT THE SIMULATION MEASURED")
    print(format_measures(config, schedule, events, run, gradient_error, width))
    print("\n📊 ALL SCHEDULES AT THIS CONFIG")
    print(format_comparison(config))
    print("\n💡 WHAT TO TRY NEXT: python pipedream_simple.py with\n" + NEXT_STEPS)


def run_main(main: Callable[[], None]) -> int:
    """Call main; whatever the reader can put right ends in one line on stderr and exit status 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="plain_text")
    status = 2
    try:
        main()
        print(end="", flush=True)
        return 0
    except UserError as error:
        message = str(error)
    except KeyboardInterrupt:
        message, status = "stopped", 130
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search(
            "out of memory|DefaultCPUAllocator", str(error)
        ):
            raise
        message = "out of memory: try a smaller batch_size or hidden_size, or --device cpu"
    except OSError as error:  # stdout is full, or it is | head, which has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return 0
        message = f"cannot write: {error.strerror}"
    one_line = " ".join(message.splitlines())
    print(f"{Path(sys.argv[0]).name}: {one_line}", file=sys.stderr)
    return status


def plain_text(error: UnicodeEncodeError) -> tuple[str, int]:
    """For a terminal that cannot show an emoji or an arrow: what to print in its place."""
    text = error.object[error.start : error.end]
    return "".join({"→": "->", "←": "<-"}.get(character, "") for character in text), error.end


codecs.register_error("plain_text", plain_text)

if __name__ == "__main__":
    sys.exit(run_main(main))
