#!/usr/bin/env python3
"""How does pipeline parallelism really work? From the first idle GPU to weight stashing.

    python pipedream_simple.py                           train a 4-stage pipeline and watch it
    python pipedream_simple.py --num_microbatches 8      every CONFIG key is also a flag
    python pipedream_simple.py --schedule gpipe          naive, gpipe, 1f1b or pipedream
    python pipedream_simple.py --weight_stashing False   the wrong gradients it prevents, measured

A network that is too large for one GPU is cut into stages, one per GPU. This file lists what each
GPU does and in which order (a schedule), finds out when it could do so (a simulator), and then does
it, on one device (a trainer). Time is simulated; the arithmetic is real: real digits, real forward
and backward passes, real weight updates.

Read it from here to the banner "the story ends here". What follows the banner serves the story:
data, measures, report, checks, main.

Letters: S stages, M microbatches per batch, N batches in the run, K = M * N microbatches in the
run; s, m, b and v are one stage, microbatch, batch and weight version.
"""

import argparse
import ast
import codecs
import contextlib
import difflib
import gc
import inspect
import io
import itertools
import math
import numbers
import os
import re
import shutil
import signal
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during a slow import: no traceback

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector

# ------------------------------------------------------------------------------------- CONFIG

CONFIG = {
    "num_stages": 4,  # pipeline stages, one GPU each. Try 2, 4, 8
    "num_microbatches": 4,  # slices of a batch: the more, the smaller the bubble. Try 2, 4, 8
    "layers_per_stage": 3,  # layers on each GPU: more stages or more layers, a larger network
    "hidden_size": 64,  # width of the network: more to compute, more to remember
    "batch_size": 32,  # images in a batch: a multiple of num_microbatches
    "num_batches": 5,  # batches to train on, one weight update each. Try 200
    "learning_rate": 0.15,  # size of an update: the more staleness, the smaller it has to be
    "momentum": 0,  # 0.9: also repeats 0.9 of the last update; divide learning_rate by ten
    "seed": 0,  # same seed, same weights and same batches, to the bit
    "device": "auto",  # auto (a GPU if there is one), cpu, cuda, cuda:1 or mps
    "network": "residual",  # residual, or transformer: an image as 64 tokens, with attention
    "schedule": "pipedream",  # naive, gpipe, 1f1b or pipedream
    "weight_stashing": True,  # False: a backward may meet newer weights than its forward did
    "vertical_sync": False,  # True: every stage uses the version that stage 0 used (pipedream)
    "recompute": False,  # True: keep inputs only, and run each forward again before its backward
    "forward_time": 1,  # simulated time of a microbatch's forward; or one per stage: 1,1,2,1
    "backward_time": 1,  # time of its backward: 2 is closer to the truth (two matrix products)
    "comm_time": 0,  # time to send a result to the neighboring GPU; or one per stage
    "verbose": True,  # False: no timeline, and one line per batch
}


# ---------------------------------------------------------------------------------- schedules
#
# Each function lists what one stage does, from its first forward to its last backward, and each
# after the first fixes a flaw of the previous one. All four are one pattern: some forwards ahead
# (the warmup), then one forward and one backward in turn, then the backwards still owed. Their
# warmups: 0, M, min(S-1-s, M), and min(S-1-s, K) for pipedream, to which the run is one batch. The
# formulas for utilization assume that all stages take equal time and that links are free.


class Op(NamedTuple):
    """One thing that a GPU does.

    >>> str(Op(stage=2, kind="F", microbatch=0, version=0))  # PyTorch's notation
    '2F0'
    """

    stage: int
    kind: str  # F forward, B backward, U weight update (the lab splits B into two halves, I and W)
    microbatch: int  # numbered through the run: batch b has b*M to (b+1)*M - 1; of a U, the last
    version: int  # of the weights it reads: version v has received v updates

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"

    def __repr__(self) -> str:
        return f"{self} v{self.version}"


Schedule = list[list[Op]]  # schedule[device]: what that GPU does, in order; no times, no idle slots
Step = tuple[int, str, int]  # (stage, kind, microbatch): an Op whose version is still open
Row = Iterator[Step]  # what one stage does, in order


def naive(stage: int, num_stages: int, num_microbatches: int, num_batches: int) -> Row:
    """One microbatch at a time: the next starts when the previous one has returned.

    One GPU works while S - 1 wait. Their idle time is the bubble: utilization 1 / S.

    >>> print(format_rows(naive(stage, 2, 3, 1) for stage in range(2)))  # S=2, M=3, N=1
    GPU0: F0 B0 F1 B1 F2 B2
    GPU1: F0 B0 F1 B1 F2 B2
    """
    for m in range(num_microbatches * num_batches):
        yield stage, "F", m
        yield stage, "B", m


def gpipe(stage: int, num_stages: int, num_microbatches: int, num_batches: int) -> Row:
    """All forwards, then all backwards: GPU0 starts a microbatch while GPU1 has the previous one.

    A batch takes M + S - 1 turns each way instead of M * S: utilization M / (M + S - 1). The wait
    for all backwards before an update is called a flush. The price is memory: a microbatch is in
    flight from its forward to its backward, and a GPU keeps the activations of all M until then.
    GPipe (Huang et al., NeurIPS 2019), section 2.2. (Backwards run first in, first out, as in
    PyTorch; the paper's figure 2 has last in, first out. Time and gradients are the same.)

    >>> print(format_rows(gpipe(stage, 2, 3, 1) for stage in range(2)))  # S=2, M=3, N=1
    GPU0: F0 F1 F2 B0 B1 B2
    GPU1: F0 F1 F2 B0 B1 B2
    """
    for first in range(0, num_microbatches * num_batches, num_microbatches):
        for m in range(num_microbatches):
            yield stage, "F", first + m
        for m in range(num_microbatches):
            yield stage, "B", first + m


def one_f_one_b(stage: int, num_stages: int, num_microbatches: int, num_batches: int) -> Row:
    """1F1B: let each microbatch return as early as possible, then one forward per backward.

    Same bubble as GPipe, less memory: stage s holds at most S - s microbatches, however large M is.
    (With slow links that is too few to cover the round trip, and GPipe is faster.) The order is
    PipeDream's (SOSP 2019, section 3.2). With a flush after each batch it is PipeDream-Flush
    (Narayanan et al., ICML 2021, section 3.2), the default of Megatron-LM.

    >>> print(format_rows(one_f_one_b(stage, 2, 3, 1) for stage in range(2)))  # S=2, M=3, N=1
    GPU0: F0 F1 B0 F2 B1 B2
    GPU1: F0 B0 F1 B1 F2 B2
    """
    warmup = min(num_stages - 1 - stage, num_microbatches)  # 0 on the last stage
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
    """1F1B without a flush: the batches of the run are one stream of microbatches.

    The pipeline fills once and drains once: utilization K / (K + S - 1), closer to 1 the longer the
    run. The price is old weights: a stage updates while microbatches are in flight on it. Which
    weights do those read? See pin_versions. PipeDream (SOSP 2019), sections 3.2 and 3.3.

    >>> print(format_rows(pipedream(stage, 2, 2, 2) for stage in range(2)))  # S=2, M=2, N=2
    GPU0: F0 F1 B0 F2 B1 F3 B2 B3
    GPU1: F0 B0 F1 B1 F2 B2 F3 B3
    """
    return one_f_one_b(stage, num_stages, num_microbatches * num_batches, num_batches=1)


SCHEDULES: dict[str, Callable[[int, int, int, int], Iterable[Step]]] = {
    "naive": naive,
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "pipedream": pipedream,
}


def pin_versions(
    rows: Iterable[Iterable[Step]],
    num_microbatches: int,
    weight_stashing: bool = True,
    vertical_sync: bool = False,
) -> Schedule:
    """Add the updates, and say which weight version every op reads.

    A GPU updates (U: version v becomes v + 1) right after its last backward of a batch. Without a
    flush, other microbatches are then in flight, whose forwards read version v. A backward needs
    weights, too: through y = W x, the gradient of x is W^T times the gradient of y. Which version?

    - No stashing: the newest. Old activations meet new weights, and the result is not the gradient
      at the old weights, nor at the new ones.
    - Weight stashing (PipeDream, SOSP 2019, section 3.3): the version that the forward read. The
      first forward of a batch pins the newest version of its stage, for the whole batch.
    - Vertical sync (same section): the version that stage 0 pinned, so that a batch sees the same
      version on every stage. Later stages have it, too, but must keep it for longer.

    Stashing makes a gradient right for the weights that its batch read, but these stay old: plain
    SGD would read version b for batch b. The number of updates missed is the staleness.

    M = 1 with stashing is the paper's PipeDream. Vertical sync with M >= S is PipeDream-2BW (ICML
    2021, section 3.1). Everything in between, such as stashing with M = 4 (the default), is ours.
    With a flush nothing is in flight at an update, and all three are the same.

    >>> row = pipedream(0, num_stages=2, num_microbatches=1, num_batches=3)
    >>> stashed = pin_versions([row], num_microbatches=1)
    >>> print(*(f"{op.kind}{op.microbatch}(v{op.version})" for op in stashed[0]))
    F0(v0) F1(v0) B0(v0) U0(v0) F2(v1) B1(v0) U1(v1) B2(v1) U2(v2)
    """
    pinned: dict[tuple[int, int], int] = {}  # (stage, batch) -> version
    schedule = []
    for row in map(list, rows):
        stages = sorted({stage for stage, _, _ in row})  # one, except in the lab's interleaved
        left = Counter(m // num_microbatches for _, kind, m in row if kind in ("B", "W"))
        newest, ops = 0, []
        for stage, kind, microbatch in row:
            version, batch = newest, microbatch // num_microbatches
            if weight_stashing:
                pinned_by = 0 if vertical_sync else stage  # row 0 comes first: stage 0 has pinned
                version = pinned.setdefault((pinned_by, batch), newest)
            ops.append(Op(stage, kind, microbatch, version))
            left[batch] -= kind in ("B", "W")
            if kind in ("B", "W") and left[batch] == 0:
                ops += [Op(s, "U", microbatch, newest) for s in stages]
                newest += 1
        schedule.append(ops)
    return schedule


def build_schedule(config: dict) -> Schedule:
    """The rows of config["schedule"], with updates and weight versions. ValueError: bad config."""
    check_config(config)
    sizes = config["num_stages"], config["num_microbatches"], config["num_batches"]
    rows = [[*SCHEDULES[config["schedule"]](stage, *sizes)] for stage in range(sizes[0])]
    once = {(kind, m) for kind in "FB" for m in range(sizes[1] * sizes[2])}
    for stage, row in enumerate(rows):
        if len(row) != len(once) or {step[1:] for step in row} != once:
            raise UserError(f"stage {stage} must run the F and the B of each microbatch once")
    return pin_versions(rows, sizes[1], config["weight_stashing"], config["vertical_sync"])


# ---------------------------------------------------------------------------------- simulator


class Event(NamedTuple):
    """An op, the device that runs it, and when: simulated time, in units of the CONFIG's times."""

    op: Op
    device: int
    start: float
    end: float


def input_of(op: Op, num_stages: int) -> Step | None:
    """The step whose result this op needs, if any.

    A microbatch travels down the stages and back, F0 F1 ... F(S-1) B(S-1) ... B1 B0, and every step
    needs the previous one.
    """
    stage, kind, microbatch, _ = op
    if kind == "F":
        return (stage - 1, "F", microbatch) if stage > 0 else None
    if kind in ("B", "I"):
        return (stage + 1, "B", microbatch) if stage < num_stages - 1 else (stage, "F", microbatch)
    return None  # U follows its batch's backwards, and W its I, in the same row


def result_of(op: Op) -> Step:
    """The step that others wait for. They need only the gradient of the input, so I counts as B."""
    return op.stage, "B" if op.kind == "I" else op.kind, op.microbatch


def simulate(schedule: Schedule, config: dict) -> list[Event]:
    """When would the GPUs run these rows? The only place where time comes from.

    An op starts when its GPU is free and its input has arrived. Nothing here knows schedules or
    bubbles: a GPU is idle while its next op waits. Updates take no time, unless the config has an
    update_time, and W half of its backward, unless it has a weight_gradient_time. Returns the
    events sorted by start, each after the one it needs; ValueError if GPUs wait for each other.

    >>> config = {**CONFIG, "num_stages": 2, "num_microbatches": 1, "num_batches": 1}
    >>> print(*(f"{e.op}@{e.start}-{e.end}" for e in simulate(build_schedule(config), config)))
    0F0@0-1 1F0@1-2 1B0@2-3 1U0@3-3 0B0@3-4 0U0@4-4
    """
    num_stages, devices = config["num_stages"], range(len(schedule))
    duration: dict[str, list[float]] = {
        "F": per_stage(config, "forward_time"),
        "B": per_stage(config, "backward_time"),
        "U": per_stage({"update_time": 0, **config}, "update_time"),
    }
    given = per_stage({"weight_gradient_time": 0, **config}, "weight_gradient_time")
    duration["W"] = [w or b / 2 for w, b in zip(given, duration["B"], strict=True)]
    duration["I"] = [b - w for w, b in zip(duration["W"], duration["B"], strict=True)]
    comm_time = per_stage(config, "comm_time")
    todo = [row[::-1] for row in schedule]  # the next op is the last
    free_at: list[float] = [0 for _ in devices]
    done: dict[Step, tuple[int, float]] = {}  # -> (device, end)
    copies = Counter(stage for row in schedule for stage in {op.stage for op in row})
    met: dict[tuple[int, int], dict[int, float]] = {}  # (stage, version) -> {device: its arrival}
    events: list[Event] = []
    while any(todo):
        num_before = len(events)
        for device in (*devices, *reversed(devices)):  # any order works: this one needs few rounds
            row, now = todo[device], free_at[device]
            while row:
                op, start = row[-1], now
                needed = input_of(op, num_stages)
                if needed:
                    if needed not in done:
                        break  # look at the other devices first
                    sender, arrival = done[needed]
                    if sender != device:
                        arrival += comm_time[needed[0]]
                    start = max(now, arrival)  # the wait, if any, is bubble
                if op.kind == "U" and copies[op.stage] > 1:  # the planner's replicas of a stage
                    arrivals = met.setdefault((op.stage, op.version), {})
                    arrivals[device] = now
                    if len(arrivals) < copies[op.stage]:
                        break
                    start = max(arrivals.values())  # they update together
                now = start + duration[op.kind][op.stage]
                if config["recompute"] and op.kind in ("B", "I"):
                    now += duration["F"][op.stage]  # its forward again
                events.append(Event(op, device, start, now))
                done[result_of(op)] = device, now
                row.pop()
            free_at[device] = now
        if len(events) == num_before:
            heads = [(d, input_of(row[-1], num_stages)) for d, row in enumerate(todo) if row]
            waits = (f"GPU{device} waits for {Op(*step, 0)}" for device, step in heads if step)
            raise ValueError("deadlock: " + ", ".join(waits))
    if met:
        events.sort(key=lambda event: event.op.kind != "U")  # before what reads their result
    events.sort(key=lambda event: event.start)  # stable: an op stays behind the one it needs
    return events


def makespan(events: list[Event]) -> float:
    """The time at which the last op ends."""
    return max(event.end for event in events)


def utilization(events: list[Event]) -> float:
    """The share of all device time, 0 to 1, in which a device computes; the rest is the bubble."""
    num_devices = 1 + max(event.device for event in events)
    return sum(event.end - event.start for event in events) / (num_devices * makespan(events))


# ------------------------------------------------------------------------------------ network


class Residual(nn.Module):
    """x + scale * tanh(W x + b). With scale 2 / sqrt(depth), signals keep their size at any depth.

    (Twelve plain Linear + ReLU layers shrink them: the loss was still 2.30 after 200 batches.)
    """

    def __init__(self, size: int, scale: float):
        super().__init__()
        self.linear = nn.Linear(size, size)
        nn.init.xavier_uniform_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:  # (microbatch_size, size) in and out
        return x + self.scale * torch.tanh(self.linear(x))


def residual_network(size: int, depth: int) -> list[nn.Module]:
    between = [Residual(size, scale=2 / math.sqrt(depth)) for _ in range(depth - 2)]
    ends = [nn.Linear(64, size), nn.Linear(size, 10)] if depth > 1 else [nn.Linear(64, 10)]
    return [*ends[:1], *between, *ends[1:]]


def build_stages(config: dict) -> list[nn.Module]:
    """One ordinary network, cut into num_stages slices of layers_per_stage layers.

    Applied one after the other the stages are the network: (n, 64) pixels in, (n, 10) logits out.
    The same seed gives the same bits; the cut does not change them.
    """
    size, num_layers = config["hidden_size"], config["layers_per_stage"]
    depth = config["num_stages"] * num_layers
    with torch.random.fork_rng(devices=[]):  # leaves the caller's random numbers alone
        torch.manual_seed(config["seed"])
        layers = NETWORKS[config["network"]](size, depth)
    return [nn.Sequential(*layers[cut : cut + num_layers]) for cut in range(0, depth, num_layers)]


# ------------------------------------------------------------------------------------ trainer

Weights = dict[str, Tensor]  # one version of a stage: parameter name -> leaf tensor


class Worker:
    """What one GPU does. It knows no schedule: it runs whatever op it is given.

    versions    the weight versions that this stage still needs, by number
    in_flight   for each microbatch whose backward is still to come: its input, its output (with the
                graph between them; recompute: neither), and the weights that turned one into the
                other. That is the stash. It copies nothing: an update makes new tensors, and the
                old ones live while something refers to them.
    gradient    of the weights, summed over the microbatches of the batch so far
    velocity    with momentum: the last update. One per stage: weights are stashed, this is not
    losses      per batch, filled in on the last stage
    """

    def __init__(self, module: nn.Module, config: dict):
        self.versions: dict[int, Weights] = {0: dict(module.named_parameters())}
        self.module = module.to("meta")  # it keeps shapes but no weights: every call brings them
        self.in_flight: dict[int, tuple[Tensor, Any, Weights]] = {}
        self.gradient, self.velocity = Weights(), Weights()
        self.losses = [0.0] * config["num_batches"]
        self.learning_rate, self.momentum = config["learning_rate"], config["momentum"]
        self.recompute = config["recompute"]
        self.num_microbatches = config["num_microbatches"]
        self.stashing = config["weight_stashing"]

    def forward(self, op: Op, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Run the stage on weight version op.version. The last one gets labels, and adds the loss.

        A microbatch's loss is divided by M, so that over a batch it adds up to the batch's mean.
        With recompute (GPipe, section 2.2) an F leaves no graph. An R is the forward again, right
        before the backward and on the version that this reads, for the graph.
        """
        weights, keep_graph = self.versions[op.version], op.kind == "R" or not self.recompute
        # Autograd stops at x: what came before belongs to another GPU, or is the images.
        x = x.detach().requires_grad_(op.stage > 0)
        with torch.set_grad_enabled(keep_graph):
            output = functional_call(self.module, weights, (x,))
            if labels is not None:
                output = cross_entropy(output, labels) / self.num_microbatches
        if labels is not None and op.kind == "F":
            self.losses[op.microbatch // self.num_microbatches] += output.item()
        self.in_flight[op.microbatch] = x, output if keep_graph else None, weights
        return output.detach()

    def backward(self, op: Op, output_gradient: Tensor | None) -> Tensor | None:
        """Add this microbatch's gradient to self.gradient, and return the gradient of its input.

        Autograd walks back through the graph that the forward left, and reads the weights in it as
        they are now. With stashing they are what the forward read: no update writes to a version.
        """
        x, output, weights = self.in_flight.pop(op.microbatch)
        if output_gradient is not None:  # None on the last stage, where the output is the loss
            # The gradient of output . g with g held fixed is g times d(output): the chain rule.
            # (grad_outputs=g gives the same bits, but torch imports sympy for it.)
            output = torch.dot(output.flatten(), output_gradient.flatten())
        inputs = [*weights.values(), x] if x.requires_grad else [*weights.values()]
        gradients = torch.autograd.grad(output, inputs)
        for name, gradient in zip(weights, gradients, strict=False):  # x has the last
            self.gradient[name] = self.gradient.get(name, 0) + gradient
        return gradients[-1] if x.requires_grad else None

    @torch.no_grad()
    def update(self, op: Op) -> None:
        """W(v+1) = W(v) - learning_rate * (all gradients of the batch, summed).

        W(v) is the newest version. The gradients may come from an older one, the version that the
        batch read: that is staleness. With momentum the step is u = momentum * u + gradients.
        """
        weights, step, self.gradient = self.versions[op.version], self.gradient, {}
        if self.momentum:
            u = self.velocity
            step = self.velocity = {k: g + self.momentum * u.get(k, 0) for k, g in step.items()}
        if self.stashing:
            new = {}
            for name, w in weights.items():
                new[name] = torch.sub(w, step[name], alpha=self.learning_rate).requires_grad_()
            weights = new
        else:
            # In place, under the graphs of microbatches in flight. PyTorch refuses this bug
            # ("modified by an inplace operation"): .data is the way around its guard.
            for name, w in weights.items():
                w.data.sub_(step[name], alpha=self.learning_rate)
        self.versions[op.version + 1] = weights


class Run(NamedTuple):
    """What a training run leaves behind."""

    losses: list[float]  # of each batch: the mean over its images, on the weights that it read
    peak_versions: list[int]  # per stage: the most weight versions in memory at once, counted
    weights: list[Weights]  # per stage, after the last update
    test_accuracy: float  # 0 to 1, on the images held out

    def __repr__(self) -> str:
        return f"Run(last loss {self.losses[-1]:.4f}, test accuracy {self.test_accuracy:.1%})"


def train(
    config: dict,
    dtype: torch.dtype = torch.float32,
    watch: Callable[[Op, Worker], None] | None = None,
    events: list[Event] | None = None,
    worker_class: Callable[[nn.Module, dict], Worker] = Worker,
) -> Run:
    """Run a schedule, by default that of config, on real tensors, in simulated order.

    watch(op, worker) is called after every op, an R included. ValueError for a bad config.
    """
    events = events or simulate(build_schedule(config), config)
    last_reader = {(op.stage, op.version): op for op, *_ in events}  # the last of equal keys
    microbatches, torch_device = split_batches(config, dtype), choose_device(config["device"])
    stages = [module.to(torch_device, dtype) for module in build_stages(config)]
    workers = [worker_class(stage, config) for stage in stages]
    last_stage = config["num_stages"] - 1
    in_memory: list[weakref.WeakSet] = [weakref.WeakSet() for _ in workers]
    peak_versions = [0] * len(workers)
    sent: dict[Step | None, Tensor] = {}  # activations go down the stages, their gradients back up

    for op, *_ in events:
        worker, needed = workers[op.stage], input_of(op, config["num_stages"])
        labels = microbatches[op.microbatch][1] if op.stage == last_stage else None
        if config["recompute"] and op.kind in ("B", "I"):
            again = op._replace(kind="R")
            worker.forward(again, worker.in_flight[op.microbatch][0], labels)
            if watch:
                watch(again, worker)
        if op.kind == "F":
            x = sent.pop(needed) if needed else microbatches[op.microbatch][0]
            result = worker.forward(op, x, labels)
            if op.stage < last_stage:
                sent[result_of(op)] = result
        elif op.kind == "U":
            worker.update(op)
        else:
            x_gradient = worker.backward(op, sent.pop(needed, None))  # none: the loss
            if x_gradient is not None:
                sent[result_of(op)] = x_gradient
        if last_reader[op.stage, op.version] is op:
            del worker.versions[op.version]  # no longer needed
        # Count the storages that exist, one per version: a deleted version may live on elsewhere.
        firsts = (next(iter(weights.values())) for weights in worker.versions.values())
        in_memory[op.stage].update(w.untyped_storage() for w in firsts)
        peak_versions[op.stage] = max(peak_versions[op.stage], len(in_memory[op.stage]))
        if watch:
            watch(op, worker)

    assert not any([sent, *(worker.in_flight for worker in workers)]), "something was left behind"
    weights = [worker.versions.pop(config["num_batches"]) for worker in workers]
    test_accuracy = accuracy([worker.module for worker in workers], weights, config)
    return Run(workers[-1].losses, peak_versions, weights, test_accuracy)


# ======================== the story ends here; the rest serves it ==========================


# ---------------------------------------------------------------------------- another network

NUM_HEADS = 4


class Embedding(nn.Module):
    """A vector for the grey value of a pixel, 0 to 16, plus one for its place in the image."""

    def __init__(self, size: int):
        super().__init__()
        self.value, self.place = nn.Embedding(17, size), nn.Embedding(64, size)

    def forward(self, x: Tensor) -> Tensor:  # (microbatch_size, 64) in, one token per pixel out
        return self.value(x.long()) + self.place.weight


def transformer(size: int, depth: int) -> list[nn.Module]:
    """Layers of attention and MLP. The first one also embeds, and the last one has the head."""
    layers: list[nn.Module] = [
        nn.TransformerEncoderLayer(size, NUM_HEADS, size, 0.0, batch_first=True, norm_first=True)
        for _ in range(depth)
    ]
    norm = nn.LayerNorm(size)
    nn.init.constant_(norm.weight, 1 / 8)  # or SGD diverges: all 64 tokens go into each logit
    layers[0] = nn.Sequential(Embedding(size), layers[0])
    layers[-1] = nn.Sequential(layers[-1], norm, nn.Flatten(), nn.Linear(64 * size, 10))
    return layers


NETWORKS = {"residual": residual_network, "transformer": transformer}

# --------------------------------------------------------------------------------------- data


Images = tuple[Tensor, Tensor]  # x (n, 64) and y (n,)


def load_digits(generator: torch.Generator, network: str = "residual") -> tuple[Images, Images]:
    """The 1,797 handwritten digits of digits.npz, shuffled: (x, y) to train on, (x, y) held out.

    x is (n, 64) float, every pixel with mean 0 and a spread of about 1 over the training part; for
    the transformer it is the grey values, 0 to 16. y is (n,) int64, 0 to 9. A fifth is held out for
    the test accuracy. UserError: a bad file.
    """
    path = Path(__file__).resolve().with_name("digits.npz")
    if not path.is_file():
        raise UserError(f"{path} is missing, or no regular file")
    try:
        with np.load(path) as file:
            images, labels = file["images"], file["labels"]
        for array, shape, most in ((images, (8, 8), 16), (labels, (), 9)):
            fits = array.shape == (len(labels), *shape) and array.dtype.kind in "ui"
            if not fits or len(array) < 10 or array.min() < 0 or array.max() > most:
                raise ValueError(f"expected whole numbers from 0 to {most}, each {shape}")
    except Exception as error:  # a broken archive raises whatever the broken part raises
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise UserError(f"{path} does not hold the handwritten digits: {reason}") from None
    x = torch.from_numpy(images.reshape(-1, 64) / 16.0).float()
    y = torch.from_numpy(labels.astype(np.int64))
    order = torch.randperm(len(y), generator=generator)
    test, train = order.split([len(y) // 5, len(y) - len(y) // 5])
    mean, spread = x[train].mean(0), x[train].std(0) + 0.1  # some corner pixels are always blank
    x = 16 * x if network == "transformer" else (x - mean) / spread
    return (x[train], y[train]), (x[test], y[test])


def make_batches(config: dict) -> list[tuple[Tensor, Tensor]]:
    """num_batches pairs of x (batch_size, 64) and y (batch_size,), epoch after shuffled epoch."""
    generator = torch.Generator().manual_seed(config["seed"])
    (x, y), _ = load_digits(generator, config["network"])
    num_images = config["batch_size"] * config["num_batches"]
    epochs = range(math.ceil(num_images / len(y)))
    order = torch.cat([torch.randperm(len(y), generator=generator) for _ in epochs])
    return [(x[chosen], y[chosen]) for chosen in order[:num_images].split(config["batch_size"])]


def split_batches(config: dict, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """(x, y) of every microbatch of the run, on the device, microbatch 0 first."""
    device, num_microbatches = choose_device(config["device"]), config["num_microbatches"]
    microbatches: list[tuple[Tensor, Tensor]] = []
    for x, y in make_batches(config):
        x, y = x.to(device, dtype), y.to(device)
        microbatches += zip(x.chunk(num_microbatches), y.chunk(num_microbatches), strict=True)
    return microbatches


def choose_device(name: str) -> torch.device:
    """The torch device of that name; "auto": a CUDA or Apple GPU if there is one, else the CPU."""
    if name == "auto":
        apple = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else apple
    return torch.device(name)


# ----------------------------------------------------------------------------------- measures


def memory_held(row: list[Op]) -> list[tuple[int, int]]:
    """(microbatches in flight, weight versions alive) on a device after each op of its row.

    A microbatch is in flight from its forward to its backward: the device keeps its activations.

    >>> row = pipedream(0, num_stages=2, num_microbatches=1, num_batches=3)
    >>> memory_held(pin_versions([row], num_microbatches=1)[0])  # F0 F1 B0 U0 F2 B1 U1 B2 U2
    [(1, 1), (2, 1), (1, 1), (1, 2), (2, 2), (1, 1), (1, 2), (0, 1), (0, 1)]
    """
    last_reader = {(op.stage, op.version): op for op in row}
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
    """The most weight versions that each device holds at once, of each of its stages."""
    stages = [len({op.stage for op in row}) for row in schedule]
    alive = [max(alive for _, alive in memory_held(row)) for row in schedule]
    return [total // per_device for total, per_device in zip(alive, stages, strict=True)]


class Idle(NamedTuple):
    """A time in which a GPU computes nothing, and why. str() says it in a sentence."""

    device: int
    start: float
    end: float
    cause: str  # a key of CAUSES
    next: Event | None  # what the GPU runs afterwards
    needed: Event | None  # whose result that waits for

    def __str__(self) -> str:
        ops = [event and short_name(event) for event in (self.next, self.needed)]
        sender, until = self.needed and self.needed.device, clock(self.end)
        return CAUSES[self.cause].format(self.device, *ops, sender, until)


def short_name(event: Event) -> str:
    """F3, for microbatch 3; on a GPU that holds several stages also 5F3, for stage 5."""
    op = event.op
    return f"{op.kind}{op.microbatch}" if op.stage == event.device else str(op)


CAUSES = {  # of idle time
    "fill": "GPU{0} cannot start until {4}: its first op, {1}, needs {2} of GPU{3}",
    "wait": "GPU{0} waits until {4}: its next op, {1}, needs {2} of GPU{3}",
    "send": "GPU{0} waits until {4}: what {1} needs is on its way from GPU{3}",
    "drain": "GPU{0} is done: nothing is left for it to run",
}


def dependencies(events: list[Event]) -> Iterator[tuple[Event, Event | None, Event | None]]:
    """Each event, the previous one on its GPU, and the one whose result it needs, if any."""
    num_stages = 1 + max(event.op.stage for event in events)
    latest: dict[int, Event] = {}
    computed: dict[int, Event] = {}  # as latest, without updates
    made: dict[Step | None, Event] = {}
    for event in events:
        previous, needed = latest.get(event.device), made.get(input_of(event.op, num_stages))
        if event.op.kind == "U" and previous and previous.end < event.start:
            # Replicas update together, once the last of them has computed its gradients.
            peers = (e for e in computed.values() if e.op.stage == event.op.stage)
            needed = next((e for e in peers if e.end == event.start), None)
        yield event, previous, needed
        latest[event.device] = made[result_of(event.op)] = event
        if event.op.kind != "U":
            computed[event.device] = event


def idle_times(events: list[Event]) -> list[Idle]:
    """When was a GPU idle, and why? Sorted by start; together they are the bubble.

    >>> config = {**CONFIG, "num_stages": 2, "num_microbatches": 1, "num_batches": 1}
    >>> for idle in idle_times(simulate(build_schedule(config), config)):
    ...     print(f"t{idle.start}: {idle}")
    t0: GPU1 cannot start until t1: its first op, F0, needs F0 of GPU0
    t1: GPU0 waits until t3: its next op, B0, needs B0 of GPU1
    t3: GPU1 is done: nothing is left for it to run
    """
    idle, last, over = [], {}, makespan(events)
    for event, previous, needed in dependencies(events):
        device, free_at = event.device, previous.end if previous else 0
        ready_at = max(free_at, needed.end) if needed else free_at  # and then it has to travel
        waits = ("wait" if previous else "fill", free_at, ready_at), ("send", ready_at, event.start)
        idle += [Idle(device, a, b, cause, event, needed) for cause, a, b in waits if a < b]
        last[device] = event
    ends = ((device, event.end) for device, event in last.items())
    idle += [Idle(device, end, over, "drain", None, None) for device, end in ends if end < over]
    return sorted(idle, key=lambda wait: (wait.start, wait.device))


def mismatches(schedule: Schedule) -> list[Op]:
    """The backwards that read another weight version than their forward did. Stashing: none."""
    ops = [op for row in schedule for op in row]
    read = {op[:3]: op.version for op in ops}
    return [op for op in ops if op.kind == "B" and op.version != read[op.stage, "F", op.microbatch]]


def staleness(schedule: Schedule, num_microbatches: int) -> list[int]:
    """Per device, the most updates that a forward misses: plain SGD reads version b for batch b."""
    forwards = [[op for op in row if op.kind == "F"] for row in schedule]
    return [max(op.microbatch // num_microbatches - op.version for op in row) for row in forwards]


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


@torch.no_grad()
def accuracy(stages: list[nn.Module], weights: list[Weights], config: dict) -> float:
    """The share of the held-out images, 0 to 1, that the network gets right; nan if it diverged."""
    _, (x, y) = load_digits(torch.Generator().manual_seed(config["seed"]), config["network"])
    x = x.to(next(iter(weights[0].values())))
    for stage, stage_weights in zip(stages, weights, strict=True):
        x = functional_call(stage, stage_weights, (x,))
    return (x.argmax(1).cpu() == y).double().mean().item() if x.isfinite().all() else math.nan


class Audit:
    """What did each op really use? Give this to train as watch: the tensors tell, not the schedule.

    A forward used the weights at the leaves of the graph that it left; its backward used the same
    tensors, with what was in them by then. (With recompute a forward leaves no graph, but names its
    weights; the graph is that of its second run.) With gradients, each gradient is also compared
    with the true one: backpropagation on copies of the weights that the forwards read.

    read            (stage, kind, microbatch) -> version, of all but U; -1 if it is no longer kept
    newest_then     (stage, microbatch) -> the newest version of the stage when the backward ran
    error           (stage, microbatch) -> |gradient - true| / |true|; 0 with weight stashing
    newest, losses  so far, per stage and per batch
    """

    def __init__(self, config: dict, dtype: torch.dtype = torch.float32, gradients: bool = False):
        self.read: dict[Step, int] = {}
        self.newest_then: dict[tuple[int, int], int] = {}
        self.error: dict[tuple[int, int], float] = {}
        self.newest, self.losses = [0] * config["num_stages"], [0.0]
        self.version_of: dict[int, dict[int, int]] = {}  # stage -> {id of a tensor: version}
        self.used: dict[tuple[int, int], set[int]] = {}  # (stage, microbatch) -> ids of tensors
        self.microbatches = split_batches(config, dtype) if gradients else []
        self.copies: dict[tuple[int, int], list[Tensor]] = {}  # (stage, microbatch) -> weights
        self.true_output: dict[int, Tensor] = {}  # microbatch -> of the stages so far
        self.summed: dict[int, Tensor] = {}  # stage -> gradient of the batch so far, flat

    def __call__(self, op: Op, worker: Worker) -> None:
        stage, kind, microbatch, _ = op
        if kind in ("F", "U"):
            versions = sorted(worker.versions.items())
            self.version_of[stage] = {id(w): v for v, ws in versions for w in ws.values()}
            self.newest[stage] = max(worker.versions)
        if kind in ("F", "R"):
            _, output, weights = worker.in_flight[microbatch]
            tensors = weights.values() if output is None else leaves_of(output)
            leaves = {id(tensor) for tensor in tensors}
            self.used[stage, microbatch] = leaves & self.version_of[stage].keys()
        if kind not in ("R", "U"):
            used = self.used[stage, microbatch]
            (self.read[op[:3]],) = {self.version_of[stage].get(tensor, -1) for tensor in used}
        if kind == "B":
            self.newest_then[stage, microbatch] = self.newest[stage]
        if stage == len(self.newest) - 1:
            self.losses = worker.losses
        if self.microbatches:
            self.compare(op, worker)

    def compare(self, op: Op, worker: Worker) -> None:
        stage, kind, microbatch, _ = op
        if kind == "F":
            images, labels = self.microbatches[microbatch]
            weights = worker.in_flight[microbatch][2]
            copy = {name: w.detach().clone().requires_grad_() for name, w in weights.items()}
            x = self.true_output.get(microbatch, images)
            output = functional_call(worker.module, copy, (x,))
            if stage == len(self.newest) - 1:
                output = cross_entropy(output, labels) / worker.num_microbatches
            self.true_output[microbatch], self.copies[stage, microbatch] = output, [*copy.values()]
        elif kind in ("B", "W"):
            copies, output = self.copies.pop((stage, microbatch)), self.true_output[microbatch]
            true = parameters_to_vector(torch.autograd.grad(output, copies, retain_graph=True))
            summed = parameters_to_vector(worker.gradient.values())
            wrong = (summed - self.summed.get(stage, 0) - true).norm()
            self.error[stage, microbatch] = (wrong / true.norm()).item() if wrong else 0.0
            self.summed[stage] = summed
            if all(m != microbatch for _, m in self.copies):
                del self.true_output[microbatch]
        elif kind == "U":
            del self.summed[stage]


def leaves_of(output: Tensor) -> list[Tensor]:
    """The tensors for which a backward from output can compute gradients."""
    todo, seen, leaves = [output.grad_fn], set(), []
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            leaves += [node.variable] if hasattr(node, "variable") else []
            todo += [child for child, _ in node.next_functions]
    return leaves


# ------------------------------------------------------------------------------------- report
#
# Text from values.


def count(number: int, noun: str) -> str:
    """1 GPU, 4 GPUs, 4 batches."""
    plural = "" if number == 1 else "es" if noun.endswith(("ch", "ss")) else "s"
    return f"{number:,} {noun}{plural}"


def shorten(items: list, limit: int, what: str) -> list:
    """Of too many items the first and the last ones, and between them how many are left out."""
    if len(items) <= limit + 1:  # a line about one item is no shorter than the item
        return items
    first, last = limit - limit // 4, limit // 4
    return [*items[:first], f"... ({len(items) - limit} more {what})", *items[-last:]]


def format_rows(rows: Iterable[Iterable[tuple]]) -> str:
    """What each GPU does, in order and without times, one line per GPU."""
    lines = (" ".join(f"{kind}{m}" for _, kind, m, *_ in row) for row in rows)
    return "\n".join(f"GPU{device}: {line}" for device, line in enumerate(lines))


def format_table(table: list[list[str]], gap: int = 2) -> list[str]:
    """Lines of left-aligned columns."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [(" " * gap).join(map(str.ljust, cells, widths)).rstrip() for cells in table]


def format_per_gpu(values: list, limit: int = 5) -> str:
    """4 3 2 1, GPU0 first; of many GPUs only some: 8 7 .. 1."""
    some = values if len(values) <= limit else [*values[: limit - 3], "..", values[-1]]
    return " ".join(map(str, some))


def clock(time: float) -> str:
    """A time as it is told: t4, t0.3333333."""
    return f"t{float(time):.7g}" if time < 1e6 else f"t{float(time):.12g}"


def rounded(events: list[Event]) -> list[Event]:
    """Events with times as in tick, so that ops that follow each other meet."""
    return [Event(op, device, tick(start), tick(end)) for op, device, start, end in events]


def tick(time: float) -> float:
    """A time without the last digits of rounding, so that 0.1 + 0.2 and 0.3 are one row."""
    return float(f"{float(time):.12g}")


ROOMY = ("GPU{0} (Stage {0})", "MB{0} forward", "MB{0} backward", "idle")
NARROW = ("{0}", "F{0}", "B{0}", ".")
ALL_BUSY = " ← All busy!"


def format_timeline(events: list[Event], width: int = 100) -> str:
    """A table: a row for every time at which something begins or ends, a column for every GPU.

    Where it would be wider than width, cells are abbreviated, and then GPUs are left out. Of many
    rows, those in the middle are folded. Notes below say why a GPU is idle, one for each cause.
    """
    times = sorted({tick(time) for event in events for time in (event.start, event.end)})
    row_of = {time: row for row, time in enumerate(times)}
    num_devices = 1 + max(event.device for event in events)
    running: list[dict[int, Op]] = [{} for _ in times[:-1]]  # at the last time all is over
    for op, device, start, end in events:
        for row in range(row_of[tick(start)], row_of[tick(end)]):
            running[row][device] = op
    first, last = min(3 * num_devices + 2, 50), min(2 * num_devices - 1, 31)  # fill and drain
    hidden = max(0, len(running) - first - last)
    shown = [row for row in range(len(running)) if not first <= row < first + hidden]

    for style, separator in ((ROOMY, " | "), (ROOMY, "| "), (NARROW, " ")):
        heading, *texts, idle = style
        table = [["Time", *(heading.format(device) for device in range(num_devices))]]
        for row in shown:
            ops = [running[row].get(device) for device in range(num_devices)]
            cells = (texts["FB".index(op.kind)].format(op.microbatch) if op else idle for op in ops)
            table.append([f"t{times[row]:.12g}", *cells])
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        room = width - len(ALL_BUSY)
        if sum(widths) + len(separator) * num_devices <= room:
            break
    while len(widths) > 2 and sum(widths) + len(separator) * (len(widths) - 1) > room:
        widths.pop()

    head, *lines = [separator.join(map(str.ljust, cells, widths)) for cells in table]
    notes: dict[str, str] = {}  # the first time of each cause
    marks = {row: ALL_BUSY for row in shown if len(running[row]) == num_devices}
    for gap in idle_times(events):
        row = row_of[tick(gap.start)]
        if gap.cause not in notes and row in shown and row not in marks:
            marks[row] = f" ← why ({len(notes) + 1})"
            notes[gap.cause] = f"({len(notes) + 1}) {gap}"
    for line, row in enumerate(shown):
        lines[line] = lines[line] + marks[row] if row in marks else lines[line].rstrip()
    if hidden:
        lines.insert(first, f"...  ({count(hidden, 'more row')})")
    if len(widths) <= num_devices:
        head += f" (+{count(num_devices + 1 - len(widths), 'GPU')})"
    if style is NARROW:
        head = "(a column is a GPU; F3: forward of microbatch 3, B3: backward, .: idle)\n" + head
    return "\n".join([head.rstrip(), *lines, *notes.values()])


def schedule_name(config: dict) -> tuple[str, str]:
    """How people write the schedule's name, and what it does about weight versions."""
    names = {"naive": "Naive", "gpipe": "GPipe", "1f1b": "1F1B", "pipedream": "PipeDream"}
    keeps = {
        "pipedream": "weight stashing",
        "  vertical sync": "weight stashing with vertical sync",
        "  no stashing": "NO weight stashing",
    }.get(variant_of(config), "a flush before every update, so one weight version is enough")
    return names.get(config["schedule"], config["schedule"]), keeps


Runs = dict[str, tuple[Schedule, list[Event]]]  # by the names of variants()


def format_banner(config: dict, runs: Runs) -> str:
    """What is about to run, on what, and what of it is real."""
    num_stages, layers = config["num_stages"], count(config["layers_per_stage"], "layer")
    gpus = count(num_stages, "GPU")
    one, flush, no_flush = (utilization(runs[key][1]) for key in ("naive", "1f1b", "pipedream"))
    on_cpu = choose_device(config["device"]).type == "cpu"
    num_weights = sum(w.numel() for stage in build_stages(config) for w in stage.parameters())
    name, keeps = schedule_name(config)
    network = "transformer, " if config["network"] == "transformer" else ""
    serial = num_stages == 1 or config["schedule"] == "naive"
    parallel = "One GPU would work at a time" if serial else f"All {gpus} would work in parallel"
    busy = f"{one:.1%} busy with one microbatch at a time, {flush:.1%} with a flush per batch\n"
    busy += f"(1F1B), {no_flush:.1%} without a flush (PipeDream)"
    return f"""\
🚀 {name} Pipeline Created!
{gpus}: {busy if num_stages > 1 else "always busy"}
⚠️  SIMULATION MODE: Running on {"CPU" if on_cpu else "1 GPU"} (simulating {gpus})
Pipeline stages: {num_stages} (would be {gpus} in real setup)
Microbatches: {config["num_microbatches"]}
Schedule: {config["schedule"]} ({keeps})
Network: {network}{num_stages} x {layers}, {num_weights:,} weights

💡 In real {name}:
   - Each stage would be on a separate GPU
   - {parallel}

💡 In this simulation:
   - All stages are on {"the CPU" if on_cpu else "1 GPU"} (for learning); the arithmetic is real
   - Timeline shows what WOULD happen on {gpus}; time is simulated"""


def format_batch(batch: int, audit: Audit, config: dict, events: list[Event]) -> str:
    """What happened to one batch: versions read, loss, updates in order of (simulated) time."""
    num_microbatches, stages = config["num_microbatches"], range(config["num_stages"])

    def cells_of(m: int) -> list[str]:
        versions = [[audit.read[s, kind, m] for s in stages] for kind in "FB"]
        versions.append([audit.newest_then[s, m] for s in stages])
        cells = [format_per_gpu([f"v{v}" for v in of_stages], 6) for of_stages in versions]
        error = np.max([audit.error.get((s, m), 0) for s in stages])
        return [*cells, f"{error:.1%} off"][: 4 if audit.error else 3]

    table = [["", "forward read", "backward read", "newest at backward", "gradient"]]
    microbatches = range(batch * num_microbatches, (batch + 1) * num_microbatches)
    for cells, same in itertools.groupby(microbatches, cells_of):
        first, *more = same
        table.append([f"MB{first} to {more[-1]}" if more else f"MB{first}", *cells])
    table[0] = table[0][: len(table[1])]
    forward_read = {row[1] for row in table[1:]}
    read = forward_read.pop() if len(forward_read) == 1 else "as above"
    loss = f"Average loss across {count(num_microbatches, 'microbatch')}: {audit.losses[batch]:.4f}"
    updates = [event for event in events if event.op.kind == "U" and event.op.version == batch]
    then = f"v{batch} → v{batch + 1}"
    changes = [f"Stage {op.stage}: Updated weights {then}  (at t{t:.10g})" for op, *_, t in updates]
    newer = " or newer" * (max(audit.newest) > batch + 1)
    return "\n".join(
        [
            f"BATCH {batch + 1}/{config['num_batches']}  (weight versions, stage 0 first)",
            *shorten(format_table(table, gap=3), 16, "rows"),
            f"{loss}, on weights {read}",
            *shorten(changes, 8, "stages"),
            f"✅ Batch complete! All stages now at version {batch + 1}{newer}",
        ]
    )


def batches_shown(num_batches: int) -> list[int]:
    """The batches that get a line: of a long run only every so many, and the last."""
    return sorted({*range(0, num_batches, math.ceil(num_batches / 20)), num_batches - 1})


def format_loss(batch: int, losses: list[float]) -> str:
    """The one line that is left of a batch."""
    return f"Batch {batch + 1}: Loss {losses[batch]:.4f} (weights v{batch} → v{batch + 1})"


def format_measures(
    events: list[Event], runs: Runs, run: Run, audit: Audit, recompute: bool = False
) -> str:
    """What the simulated GPUs did with their time and memory, and what the training reached."""
    time, one_by_one = makespan(events), makespan(runs["naive"][1])
    stages = range(len(run.peak_versions))
    busy = [sum(e.end - e.start for e in events if e.device == d) / time for d in stages]
    lines = [
        f"Makespan: {time:.10g} time units (naive, one microbatch at a time: {one_by_one:.10g})",
        f"GPU utilization: {utilization(events):.1%}, bubble (idle): {1 - utilization(events):.1%}",
        f"Busy, GPU by GPU: {format_per_gpu([f'{part:.0%}' for part in busy], 12)}",
        *[RECOMPUTED] * recompute,
        f"Weight versions in memory, at most, counted: {format_per_gpu(run.peak_versions, 12)}",
    ]
    if audit.error:
        of_stages = [[e for (s, _), e in audit.error.items() if s == stage] for stage in stages]
        for name, measure in (("mean", np.mean), ("worst", np.max)):
            values = [f"{measure(errors):.1%}" for errors in of_stages]
            lines.append(f"Gradient error, GPU by GPU, {name}: {format_per_gpu(values, 8)}")
        lines.append(GRADIENT_ERROR)
    lines.append(f"Test accuracy: {run.test_accuracy:.1%} of the digits that it was not trained on")
    if math.isnan(run.test_accuracy) or not run.losses[-1] < 10 * run.losses[0]:
        lines.append("The loss diverged: try a smaller learning_rate, less momentum or staleness")
    return "\n".join(lines)


RECOMPUTED = "   Busy time includes the forwards that recompute runs a second time."
GRADIENT_ERROR = """\
   |gradient - true| / |true|, true being backpropagation on the weights that
   the forward read. An update between forward and backward, on this stage or a
   later one, makes it wrong. With weight stashing the error is 0."""
SUMMARY = ["time", "speed-up", "busy", "in flight", "versions"]


def summarize(schedule: Schedule, events: list[Event], naive: list[Event]) -> list[str]:
    """Cells of a table: speed-up over naive; in flight and versions at the peak of each GPU."""
    return [
        f"{makespan(events):.7g}",
        f"{makespan(naive) / makespan(events):.2f}x",
        f"{utilization(events):.1%}",
        format_per_gpu(peak_in_flight(schedule)),
        format_per_gpu(peak_versions(schedule)),
    ]


def format_comparison(config: dict, runs: Runs) -> str:
    """All schedules at this CONFIG, one line each, from their rows and their simulated times."""
    table = [["  schedule", *SUMMARY, "stale", "differ"]]
    for name, (schedule, events) in runs.items():
        cells = summarize(schedule, events, runs["naive"][1])
        stale = format_per_gpu(staleness(schedule, config["num_microbatches"]))
        mark = "* " if name == variant_of(config) else "  "
        table.append([mark + name, *cells, stale, str(len(mismatches(schedule)))])
    return "\n".join([*format_table(table), COMPARISON_LEGEND])


COMPARISON_LEGEND = """\
   * this run. busy: utilization. GPU by GPU, at the peak: microbatches in
   flight, weight versions kept, updates missed (stale). differ: backwards that
   read other weights than their forward did."""


def format_next_steps(config: dict) -> str:
    """What to try next, beside the settings of this run."""
    lines = ["💡 WHAT TO TRY NEXT: the same command with"]
    for settings, why in (
        ({"num_microbatches": 2 * config["num_microbatches"]}, "more microbatches"),
        ({"num_stages": 2 * config["num_stages"]}, "a longer pipeline"),
        ({"schedule": "gpipe"}, "a flush after every batch"),
        ({"schedule": "pipedream"}, "no flush"),
        ({"schedule": "pipedream", "weight_stashing": False}, "what stashing is for"),
        ({"num_batches": 200, "verbose": False}, "how well it learns"),
    ):
        new = {key: value for key, value in settings.items() if value != config[key]}
        with contextlib.suppress(UserError):
            check_config({**config, **new})
            if new:
                flags = " ".join(f"--{key} {value}" for key, value in new.items())
                lines.append(f"   {flags:<45} {why}")
    return "\n".join(
        [*lines, "💡 WHY A GPU WAITS: python pipedream_lab.py why, with the same flags"]
    )


# ------------------------------------------------------------------------------------- checks


class UserError(ValueError):
    """Something that the reader can correct: one line, without a traceback."""


COUNT, TIME, SWITCH = (int, 1, 10_000_000), (list, 1e-9, 1e12), (bool,)
RULES: dict[str, tuple] = {  # key -> (type, least, most); a list is one number, or one per stage
    **dict.fromkeys(("num_stages", "num_microbatches", "layers_per_stage", "hidden_size"), COUNT),
    **dict.fromkeys(("batch_size", "num_batches"), COUNT),
    "learning_rate": (float, 1e-30, 1e30),
    "momentum": (float, 0, 1),
    "seed": (int, 0, 2**63 - 1),
    **dict.fromkeys(("device", "network", "schedule"), (str,)),
    **dict.fromkeys(("weight_stashing", "vertical_sync", "recompute", "verbose"), SWITCH),
    **dict.fromkeys(("forward_time", "backward_time"), TIME),
    "comm_time": (list, 0, 1e12),
}
LIMITS = {  # what one run may hold
    "num_stages * num_microbatches * num_batches": 500_000,
    "batch_size * num_batches": 10_000_000,
    "num_stages * layers_per_stage": 10_000,
    "num_stages * layers_per_stage * hidden_size * hidden_size": 500_000_000,
}
MOST_UNEQUAL = 1e5  # times that differ by more leave the short ones no row of the timeline
SENTENCES = {
    int: "a whole number from {:,} to {:,}",
    float: "a number from {:g} to {:g}",
    list: "a number from {:g} to {:g}, or a list of them, one per stage",
    bool: "True or False",
    str: "text",
}


def check_value(key: str, value: object, rule: tuple) -> None:
    """Raise a UserError unless the value keeps its rule. Numbers of NumPy are numbers."""
    kind, *limits = rule
    wanted = {int: numbers.Integral, float: numbers.Real, list: numbers.Real}.get(kind, kind)
    for item in value if kind is list and isinstance(value, list) else [value]:
        good = isinstance(item, wanted) and isinstance(item, bool) == (kind is bool)
        if not good or (limits and not limits[0] <= item <= limits[1]):
            sentence = SENTENCES[kind].format(*limits)
            raise UserError(f"{key}={shown(value)} must be {sentence}")


def shown(value: object) -> str:
    """The value as Python writes it, cut off where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else text[:57] + "..."


def per_stage(config: dict, key: str) -> list[float]:
    """A time for each stage, from one for all or a list. UserError for a time that cannot be."""
    times, num_stages = config[key], config["num_stages"]
    check_value(key, times, RULES.get(key, RULES["comm_time"]))
    if isinstance(times, list) and len(times) != num_stages:
        raise UserError(f"{key}={shown(times)} must have num_stages={num_stages} entries")
    return times if isinstance(times, list) else [times] * num_stages


def check_config(config: dict, schedules: Iterable[str] = (), rules: dict | None = None) -> None:
    """Raise a UserError (a ValueError) of one sentence for the first wrong thing in config."""
    rules, schedules = rules or RULES, [*SCHEDULES, *schedules]
    if not isinstance(config, dict):
        raise UserError(f"CONFIG={shown(config)} must be a dict")
    for key in config:
        if key not in rules:
            raise UserError(f"unknown key {shown(key)} in CONFIG{nearest(key, rules)}")
    for key, rule in rules.items():
        if key not in config:
            raise UserError(f"CONFIG has no {key!r}: every key needs a value")
        check_value(key, config[key], rule)
    check_device(config["device"])
    for key, choices in (("network", NETWORKS), ("schedule", schedules)):
        if config[key] not in choices:
            raise UserError(f"{key}={shown(config[key])} must be one of {', '.join(choices)}")
    if config["network"] == "transformer" and config["hidden_size"] % NUM_HEADS:
        multiple = f"a multiple of {NUM_HEADS} for the transformer, which has {NUM_HEADS} heads"
        raise UserError(f"hidden_size={config['hidden_size']} must be {multiple}")
    times = [per_stage(config, key) for key in ("forward_time", "backward_time", "comm_time")]
    if max(map(max, times)) > MOST_UNEQUAL * min(map(min, times[:2])):
        what = "forward_time, backward_time and comm_time differ too much"
        raise UserError(f"{what}: the longest may be {MOST_UNEQUAL:,.0f} times the shortest")
    if config["vertical_sync"] and not config["weight_stashing"]:
        raise UserError("vertical_sync=True needs weight_stashing=True: it reads stashed versions")
    for product, most in LIMITS.items():
        number = math.prod(config[key] for key in product.split(" * "))
        if config["network"] == "transformer" and "hidden_size" in product:
            most //= 6  # a layer has six times the weights
        if number > most:
            raise UserError(f"{product} is {number:,}: at most {most:,} fit")
    batch_size, num_microbatches = config["batch_size"], config["num_microbatches"]
    if batch_size % num_microbatches:
        fitting = [str(d) for d in range(1, batch_size + 1) if batch_size % d == 0]
        choices = ", ".join(fitting[:-1]) + " or " * (batch_size > 1) + fitting[-1]
        raise UserError(
            f"batch_size={batch_size} cannot be split evenly into num_microbatches="
            f"{num_microbatches}: try {choices}"
        )


def check_device(name: str) -> None:
    """Raise a UserError unless this machine has that device."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", name):
        raise UserError(f"device={shown(name)} must be auto, cpu, cuda, cuda:N or mps")
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("device='mps': torch finds no Apple GPU here, try cpu")
    if name.startswith("cuda") and int(name[5:] or 0) >= torch.cuda.device_count():
        gpus = count(torch.cuda.device_count(), "CUDA GPU")
        raise UserError(f"device={name!r}: torch finds {gpus} here, try cpu")


def nearest(word: object, words: Iterable[str]) -> str:
    """A question that names the word most like this one; nothing where none is like it."""
    close = difflib.get_close_matches(str(word), words, n=1, cutoff=0.75)
    return f": did you mean {close[0]}?" if close else ""


# --------------------------------------------------------------------------------------- main


def parse_value(text: str) -> object:
    """What Python would read: 4, 0.5, True, 1,2,1,1 (a list); everything else stays text."""
    try:
        value = ast.literal_eval({"true": "True", "false": "False"}.get(text, text.strip()))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text
    return list(value) if isinstance(value, tuple) else value


def parse_config(
    doc: str | None,
    argv: list[str] | None = None,
    config: dict = CONFIG,
    check: Callable[[dict], None] = check_config,
    other: dict[str, dict] | None = None,
    command: str = "",
) -> tuple[dict, dict]:
    """config with the flags of the command line on top, checked; and what other flags said.

    other: name of a flag or an argument -> what argparse's add_argument wants to know of it.
    command: of a script with several, for the line on usage.
    """
    if not isinstance(config, dict):
        check_config(config)  # says so
    source = Path(__file__).read_text("utf-8", "replace")
    block = re.search(r"\nCONFIG = \{.*?\n\}", source, re.S)
    lines = []
    for line in (block[0] if block else "").splitlines():
        parts = re.match(r'( +"(\w+)": )(.*?)(,(?:  #.*)?)$', line)
        if parts and parts[2] in config:  # with the default of this command
            value = shown(config[parts[2]]).replace("'", '"')
            lines.append(f"{parts[1]}{value}{parts[4]}")
        elif not parts:
            lines.append(line)
    keys = "\n".join(["Each of these keys is also a flag: --num_batches 8.", *lines])
    parser = argparse.ArgumentParser(
        prog=f"{Path(sys.argv[0]).name} {command}".strip(),
        description=inspect.cleandoc(doc or ""),
        epilog=keys if "seed" in config else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for key in config:
        parser.add_argument(f"--{key}", type=parse_value, metavar="X", help=argparse.SUPPRESS)
    for name, details in (other or {}).items():
        parser.add_argument(name, **details)

    def fail(message: str) -> NoReturn:
        hint = ": write --key=value if it begins with -" if "expected one arg" in message else ""
        raise UserError(message + hint)

    parser.error = fail  # type: ignore[method-assign]
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = unknown[0].partition("=")[0]
        hint = nearest(flag, [f"--{key}" for key in config]) or ", --help lists them"
        raise UserError(f"unknown flag {shown(flag)}{hint}")
    flags = vars(given)
    config = {key: flags.pop(key, value) for key, value in config.items()}
    check(config)
    return config, flags


def main() -> None:
    config, _ = parse_config(__doc__)
    verbose, num_batches = config["verbose"], config["num_batches"]
    runs: Runs = {}
    for name, settings in variants(SCHEDULES).items():
        schedule = build_schedule({**config, **settings})
        runs[name] = schedule, simulate(schedule, config)
    _, events = runs[variant_of(config)]
    audit = Audit(config, gradients=variant_of(config) == "  no stashing")

    def watch(op: Op, worker: Worker) -> None:
        audit(op, worker)
        batch = op.version
        if op.kind != "U" or min(audit.newest) <= batch:
            return  # no batch is complete
        if not verbose and batch in batches_shown(num_batches):
            print(format_loss(batch, audit.losses), flush=True)
        if verbose and batch in (0, 1, num_batches - 1):
            print("\n" + format_batch(batch, audit, config, events), flush=True)
        elif verbose and batch == 2:
            print(f"\n... and so on until batch {num_batches - 1} ...", flush=True)

    print(format_banner(config, runs) + "\n", flush=True)
    if verbose:
        width = shutil.get_terminal_size((100, 24)).columns
        print("📊 PIPELINE TIMELINE VISUALIZATION\n" + format_timeline(events, width), flush=True)
    run = train(config, watch=watch, events=events)
    if verbose:
        print(f"\nTraining results ({count(num_batches, 'batch')}):")
        print("\n".join(f"- {format_loss(b, run.losses)}" for b in batches_shown(num_batches)))
    print("\n📊 WHAT THE SIMULATION MEASURED")
    print(format_measures(events, runs, run, audit, config["recompute"]))
    print("\n📊 ALL SCHEDULES AT THIS CONFIG")
    print(format_comparison(config, runs))
    print("\n" + format_next_steps(config))


def run_main(main: Callable[[], None]) -> int:
    """Call main; what the reader can correct ends in one line on stderr and exit status 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="plain_text")
    for number in (signal.SIGINT, signal.SIGTERM):  # temporary files are removed on the way out
        signal.signal(number, signal.default_int_handler)
    gc.freeze()  # a long schedule is a million small tuples: search them for cycles less often
    gc.set_threshold(100_000)
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
        out_of_memory = re.search("out of memory|DefaultCPUAllocator", str(error))
        if not out_of_memory and isinstance(error, RuntimeError):
            raise
        message = "out of memory: try a smaller batch_size or hidden_size, or --device cpu"
    except OSError as error:  # stdout is full, or it is | head, which has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return 0
        message = f"{error.strerror or error}"
    one_line = " ".join(message.split())
    print(f"{Path(sys.argv[0]).name}: {one_line}", file=sys.stderr, flush=True)
    return status


def plain_text(error: UnicodeError) -> tuple[str, int]:
    """For a terminal that cannot show an emoji or an arrow: what to print in its place."""
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end]
    return "".join({"→": "->", "←": "<-"}.get(character, "") for character in text), error.end


codecs.register_error("plain_text", plain_text)

if __name__ == "__main__":
    sys.exit(run_main(main))
