#!/usr/bin/env python3
"""How does pipeline parallelism really work? From the first idle GPU to weight stashing.

    python pipedream_simple.py                           train a 4-stage pipeline and watch it
    python pipedream_simple.py --num_microbatches 8      every CONFIG key is also a flag
    python pipedream_simple.py --schedule gpipe          naive, gpipe, 1f1b or pipedream
    python pipedream_simple.py --weight_stashing False   the wrong gradients that it prevents

A network that is too large for one GPU is cut into stages, one per GPU. This file lists what each
GPU does and in which order (a schedule), finds out when it could do so (a simulator), and then does
it, on one device (a trainer). Time is simulated; the arithmetic is real: real digits, real forward
and backward passes, real weight updates. The story ends at the banner that says so; what follows
serves it: data, measures, report, checks, main.

Letters: S stages, M microbatches per batch, N batches in the run, K = M * N microbatches in the
run; s, m, b and v are one stage, microbatch, batch and weight version.
"""

import ast
import codecs
import gc
import importlib
import inspect
import math
import os
import re
import shutil
import signal
import sys
from argparse import SUPPRESS, ArgumentParser, RawDescriptionHelpFormatter
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
    "comm_time": 0,  # time to send a result to the neighboring GPU, one at a time; or one per stage
    "verbose": True,  # False: no timeline, and no details of the first batch
}


# ---------------------------------------------------------------------------------- schedules
#
# A schedule function lists what each GPU does in one batch, in order and without times. GPU s holds
# stage s. Of the three below, the second and the third fix a flaw of the one before. The formulas
# for utilization assume that all stages take equal time, and that links are free.


class Op(NamedTuple):
    """One thing that a GPU does.

    >>> str(Op(stage=2, kind="F", microbatch=0, version=0))  # PyTorch's notation
    '2F0'
    """

    stage: int
    kind: str  # F forward, B backward (in halves: I and W), U weight update, R a forward again
    microbatch: int  # numbered through the run: batch b has b*M to (b+1)*M - 1; of a U, the last
    version: int  # of the weights it reads: version v has received v updates

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"


Schedule = list[list[Op]]  # schedule[device]: what that GPU does, in order; no times, no idle slots
Step = tuple[int, str, int]  # (stage, kind, microbatch): an Op whose version is still open


def naive(device: int, num_devices: int, num_microbatches: int) -> Iterator[Step]:
    """One microbatch at a time: the next starts when the previous one has returned.

    One GPU works while S - 1 wait. Their idle time is the bubble: utilization 1 / S.

    >>> print(format_rows(naive(device, 2, 3) for device in range(2)))  # S=2, M=3
    GPU0: F0 B0 F1 B1 F2 B2
    GPU1: F0 B0 F1 B1 F2 B2
    """
    for m in range(num_microbatches):
        yield device, "F", m
        yield device, "B", m


def gpipe(device: int, num_devices: int, num_microbatches: int) -> Iterator[Step]:
    """All forwards, then all backwards: GPU0 starts a microbatch while GPU1 has the previous one.

    A batch takes M + S - 1 turns each way instead of M * S: utilization M / (M + S - 1). The wait
    for all backwards before an update is called a flush. The price is memory: a microbatch is in
    flight from its forward to its backward, and a GPU keeps the activations of all M until then.
    GPipe (Huang et al., NeurIPS 2019), section 2.2. (Its figure 2 has the backwards in reverse.)

    >>> print(format_rows(gpipe(device, 2, 3) for device in range(2)))  # S=2, M=3
    GPU0: F0 F1 F2 B0 B1 B2
    GPU1: F0 F1 F2 B0 B1 B2
    """
    for m in range(num_microbatches):
        yield device, "F", m
    for m in range(num_microbatches):
        yield device, "B", m


def one_f_one_b(device: int, num_devices: int, num_microbatches: int) -> Iterator[Step]:
    """1F1B: let each microbatch return as early as possible, then one forward per backward.

    Less memory than GPipe: stage s holds at most S - s microbatches, however large M is. The bubble
    is the same: the first microbatch still needs S - 1 hops to the last stage, and the last
    gradient S - 1 hops back; 1F1B only reorders what lies between. (With slow links, S - s are too
    few to cover the round trip, and GPipe is often faster.) It is PipeDream's order (SOSP 2019,
    section 3.2); with a flush, PipeDream-Flush (ICML 2021, section 3.2), Megatron-LM's default.

    >>> print(format_rows(one_f_one_b(device, 2, 3) for device in range(2)))  # S=2, M=3
    GPU0: F0 F1 B0 F2 B1 B2
    GPU1: F0 B0 F1 B1 F2 B2
    """
    warmup = min(num_devices - 1 - device, num_microbatches)  # 0 on the last stage
    steady = num_microbatches - warmup
    for m in range(warmup):
        yield device, "F", m
    for m in range(steady):
        yield device, "F", m + warmup
        yield device, "B", m
    for m in range(steady, num_microbatches):  # cooldown: the backwards still owed
        yield device, "B", m


# The three are one pattern: some forwards ahead (the warmup), then one forward and one backward in
# turn, then the backwards still owed. Only the warmup differs: 0, M, and min(S - 1 - s, M).
# PipeDream is the third without a flush: its warmup is min(S - 1 - s, K), once in the whole run.
SCHEDULES: dict[str, tuple[Callable, bool]] = {  # -> (row of a GPU, does a flush end each batch?)
    "naive": (naive, True),
    "gpipe": (gpipe, True),
    "1f1b": (one_f_one_b, True),
    "pipedream": (one_f_one_b, False),
}


def list_run(
    list_batch: Callable, flush: bool, num_devices: int, num_microbatches: int, num_batches: int
) -> list[list[Step]]:
    """The rows of the whole run, one per GPU: batch after batch, or without a flush in one stream.

    PipeDream (SOSP 2019, sections 3.2 and 3.3) leaves out the flush: to 1F1B the run is one batch
    of K microbatches. The pipeline fills once and drains once: utilization K / (K + S - 1), closer
    to 1 the longer the run. The price is old weights: a stage updates while microbatches are in
    flight on it. Which weights do those read? See pin_versions.

    >>> print(format_rows(list_run(one_f_one_b, False, 2, 2, 2)))  # S=2, M=2, N=2
    GPU0: F0 F1 B0 F2 B1 F3 B2 B3
    GPU1: F0 B0 F1 B1 F2 B2 F3 B3
    """
    in_row = num_microbatches if flush else num_microbatches * num_batches
    firsts = range(0, num_microbatches * num_batches, in_row)
    batches = [[*list_batch(device, num_devices, in_row)] for device in range(num_devices)]
    return [[(s, kind, first + m) for first in firsts for s, kind, m in row] for row in batches]


def pin_versions(
    rows: Iterable[list[Step]], num_microbatches: int, weight_stashing=True, vertical_sync=False
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
    SGD would read version b for batch b. The number of updates missed is the staleness. With a
    flush nothing is in flight at an update, and all three are the same. M = 1 with stashing is the
    paper's PipeDream, vertical sync with M >= S is PipeDream-2BW (ICML 2021, section 3.1), and what
    lies between, such as stashing with M = 4 (the default), is ours.

    >>> row = list_run(one_f_one_b, False, 2, num_microbatches=1, num_batches=3)[0]
    >>> stashed = pin_versions([row], num_microbatches=1)
    >>> print(*(f"{op.kind}{op.microbatch}(v{op.version})" for op in stashed[0]))
    F0(v0) F1(v0) B0(v0) U0(v0) F2(v1) B1(v0) U1(v1) B2(v1) U2(v2)
    """
    pinned: dict[tuple[int, int], int] = {}  # (stage, batch) -> version
    schedule = []
    for row in rows:
        stages = sorted({stage for stage, _, _ in row})  # one, unless a GPU holds several
        owed = Counter(m // num_microbatches for _, kind, m in row if kind in ("B", "W"))
        newest, ops = 0, []
        for stage, kind, microbatch in row:
            version, batch = newest, microbatch // num_microbatches
            if weight_stashing:
                pinned_by = 0 if vertical_sync else stage  # row 0 comes first: stage 0 has pinned
                version = pinned.setdefault((pinned_by, batch), newest)
            ops.append(Op(stage, kind, microbatch, version))
            owed[batch] -= kind in ("B", "W")
            if kind in ("B", "W") and owed[batch] == 0:
                ops += [Op(s, "U", microbatch, newest) for s in stages]
                newest += 1
        schedule.append(ops)
    return schedule


def build_schedule(config: dict) -> Schedule:
    """The rows of config["schedule"], with updates and weight versions. ValueError: bad config."""
    check_config(config)
    num_stages, in_batch, num_batches = (int(config[key]) for key in SIZES)
    rows = list_run(*SCHEDULES[config["schedule"]], num_stages, in_batch, num_batches)
    for stage, row in enumerate(rows):
        if sorted(row) != [(stage, k, m) for k in "BF" for m in range(in_batch * num_batches)]:
            raise UserError(f"stage {stage} must run the F and the B of each microbatch once")
    return pin_versions(rows, in_batch, config["weight_stashing"], config["vertical_sync"])


# ---------------------------------------------------------------------------------- simulator


class Event(NamedTuple):
    """An op, the device that runs it, and when: simulated time, in units of the CONFIG's times."""

    op: Op
    device: int
    start: float
    end: float


def inputs_of(op: Op, num_stages: int) -> list[Step]:
    """The steps whose results this op needs: a microbatch goes F0 ... F(S-1) B(S-1) ... B0."""
    stage, kind, m, _ = op
    if kind == "F":
        return [(stage - 1, "F", m)] if stage > 0 else []
    if kind in ("B", "I"):
        return [(stage + 1, "B", m)] if stage < num_stages - 1 else [(stage, "F", m)]
    return []  # U follows its batch's backwards, and W its I, in the same row


def result_of(op: Op) -> Step:
    """The step that others wait for. They need only the gradient of the input, so I counts as B."""
    return op.stage, "B" if op.kind == "I" else op.kind, op.microbatch


def op_times(config: dict) -> dict[str, list[float]]:
    """How long each kind of op takes on each stage. An update takes no time."""
    forward, backward = per_stage(config, "forward_time"), per_stage(config, "backward_time")
    if config["recompute"]:  # a backward runs its forward again
        backward = [f + b for f, b in zip(forward, backward, strict=True)]
    return {"F": forward, "B": backward, "U": [0] * config["num_stages"]}


def simulate(
    schedule: Schedule, config: dict, takes=None, inputs: Callable = inputs_of, links=None
) -> list[Event]:
    """When would the GPUs run these rows? The only place where time comes from.

    An op starts when its GPU is free and its input has arrived. A link carries one result at a time
    in each direction, while the GPUs go on. Nothing here knows schedules or bubbles: a GPU is idle
    while its next op waits. Returns the events sorted by start, each after the one it needs; links,
    a dict, gets the messages: (from, to) -> [Event(op whose result it is, to, start, end), ...].
    takes(op) and inputs(op, S) stand in for op_times and inputs_of. ValueError: a deadlock.

    >>> config = {**CONFIG, "num_stages": 2, "num_microbatches": 1, "num_batches": 1}
    >>> print(*(f"{e.op}@{e.start}-{e.end}" for e in simulate(build_schedule(config), config)))
    0F0@0-1 1F0@1-2 1B0@2-3 1U0@3-3 0B0@3-4 0U0@4-4
    """
    num_stages, devices = config["num_stages"], range(len(schedule))
    times, comm_time = op_times(config), per_stage(config, "comm_time")
    takes, links = takes or (lambda op: times[op.kind][op.stage]), {} if links is None else links
    ops = ((device, op) for device in devices for op in schedule[device])
    needs = ((step, device, op) for device, op in ops for step in inputs(op, num_stages))
    goes_to = {step: device for step, device, op in needs if step[0] != op.stage}
    todo, events = [row[::-1] for row in schedule], list[Event]()  # todo: the next op is the last
    free_at: list[float] = [0 for _ in devices]
    done, arrived = dict[Step, float](), dict[Step, float]()  # result -> made; where it is needed
    while any(todo):
        num_before = len(events)
        for device in (*devices, *reversed(devices)):  # any order works: this one needs few rounds
            row, now = todo[device], free_at[device]
            while row:
                op, start = row[-1], now
                needed = inputs(op, num_stages)
                if not all(step in done for step in needed):
                    break  # look at the other devices first
                for step in needed:  # the wait, if any, is bubble
                    start = max(start, (done if step[0] == op.stage else arrived)[step])
                now, result = start + takes(op), result_of(op)
                events.append(Event(op, device, start, now))
                done[result] = arrived[result] = now
                if (to := goes_to.get(result, device)) != device:
                    link = links.setdefault((device, to), [])
                    leaves = max([now, *(message.end for message in link[-1:])])
                    link.append(Event(op, to, leaves, leaves + comm_time[op.stage]))
                    arrived[result] = link[-1].end
                row.pop()
            free_at[device] = now
        if len(events) == num_before:
            heads = ((d, s) for d in devices for op in todo[d][-1:] for s in inputs(op, num_stages))
            waits = (f"GPU{d} waits for {''.join(map(str, s))}" for d, s in heads if s not in done)
            raise ValueError("deadlock: " + ", ".join(waits))
    return sorted(events, key=lambda event: event.start)  # stable: an op stays behind its input


# ------------------------------------------------------------------------------------ network


class Residual(nn.Module):
    """x + scale * tanh(W x + b). With scale 2 / sqrt(depth) signals keep their size."""

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


def find_network(name: str) -> Callable[[int, int], list[nn.Module]]:
    """residual_network, or make_layers of the file of that name in pipedream/networks."""
    module = importlib.import_module(f"pipedream.networks.{name}") if name != "residual" else None
    return module.make_layers if module else residual_network


def build_stages(config: dict) -> list[nn.Module]:
    """One ordinary network, (n, 64) pixels in and (n, 10) logits out, cut into slices of layers.

    The same seed gives the same bits, however it is cut.
    """
    size, num_layers = config["hidden_size"], config["layers_per_stage"]
    depth = config["num_stages"] * num_layers
    with torch.random.fork_rng(devices=[]):  # leaves the caller's random numbers alone
        torch.manual_seed(config["seed"])
        layers = find_network(config["network"])(size, depth)
    return [nn.Sequential(*layers[cut : cut + num_layers]) for cut in range(0, depth, num_layers)]


# ------------------------------------------------------------------------------------ trainer

Weights = dict[str, Tensor]  # one version of a stage: parameter name -> leaf tensor


class Worker:
    """What one GPU does. It knows no schedule: it runs whatever op it is given.

    in_flight is the stash: for each microbatch whose backward is still to come its input, its
    output (and the graph between them; with recompute neither), and the weights that turned one
    into the other. It copies nothing: an update makes new tensors, and the old ones live on.
    """

    def __init__(self, module: nn.Module, config: dict):
        self.versions: dict[int, Weights] = {0: dict(module.named_parameters())}  # still needed
        self.module = module.to("meta")  # it keeps shapes but no weights: every call brings them
        self.in_flight: dict[int, tuple[Tensor, Any, Weights]] = {}
        self.gradient = Weights()  # summed over the microbatches of the batch so far
        self.velocity = Weights()  # with momentum: the last update. It is not stashed, weights are
        self.losses = [0.0] * config["num_batches"]  # filled in on the last stage
        self.config = config

    def forward(self, op: Op, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Run the stage on weight version op.version. The last one gets labels, and adds the loss.

        A microbatch's loss is divided by M: over a batch it adds up to the batch's mean. With
        recompute (GPipe, section 2.2) an F leaves no graph: an R, right before the backward, does.
        """
        weights, num_microbatches = self.versions[op.version], self.config["num_microbatches"]
        keep_graph = op.kind == "R" or not self.config["recompute"]
        # Autograd stops at x: what came before belongs to another GPU, or is the images.
        x = x.detach().requires_grad_(op.stage > 0)
        with torch.set_grad_enabled(keep_graph):
            output = functional_call(self.module, weights, (x,))
            if labels is not None:
                output = cross_entropy(output, labels) / num_microbatches
        if labels is not None and op.kind == "F":
            self.losses[op.microbatch // num_microbatches] += output.item()
        self.in_flight[op.microbatch] = x, output if keep_graph else None, weights
        return output.detach()

    def backward(self, op: Op, output_gradient: Tensor | None) -> Tensor | None:
        """Add this microbatch's gradient to self.gradient, and return the gradient of its input.

        Autograd walks back through the graph that the forward left, and reads the weights in it as
        they are now. With stashing they are what the forward read: no update writes to a version.
        """
        x, output, weights = self.in_flight.pop(op.microbatch)
        if output_gradient is not None:  # None on the last stage, where the output is the loss
            # With g held fixed, the gradient of output . g is g times d(output): the chain rule.
            output = torch.dot(output.flatten(), output_gradient.flatten())
        inputs = [*weights.values(), x] if x.requires_grad else [*weights.values()]
        gradients = torch.autograd.grad(output, inputs)
        for name, gradient in zip(weights, gradients, strict=False):  # x has the last
            self.gradient[name] = self.gradient.get(name, 0) + gradient
        return gradients[-1] if x.requires_grad else None

    @torch.no_grad()
    def update(self, op: Op) -> None:
        """W(v+1) = W(v) - learning_rate * (all gradients of the batch, summed).

        W(v) is the newest version. The gradients may come from an older one, which the batch read:
        that is staleness. With momentum the step is u = momentum * u + gradients.
        """
        weights, step, self.gradient = self.versions[op.version], self.gradient, {}
        if self.config["momentum"]:
            u, mu = self.velocity, self.config["momentum"]
            step = self.velocity = {name: g + mu * u.get(name, 0) for name, g in step.items()}
        new, rate = Weights(), self.config["learning_rate"]
        for name, w in weights.items():
            if self.config["weight_stashing"]:
                new[name] = torch.sub(w, step[name], alpha=rate).requires_grad_()
            else:
                # In place, under the graphs of microbatches in flight. PyTorch refuses this bug
                # ("modified by an inplace operation"): .data is the way around its guard.
                w.data.sub_(step[name], alpha=rate)
                new[name] = w
        self.versions[op.version + 1] = new


class Run(NamedTuple):
    """What a training run leaves behind."""

    losses: list[float]  # of each batch: the mean over its images, on the weights that it read
    weights: list[Weights]  # per stage, after the last update
    test_accuracy: float  # 0 to 1, on the images held out

    def __repr__(self) -> str:
        return f"Run(last loss {self.losses[-1]:.4f}, test accuracy {self.test_accuracy:.1%})"


def train(
    config: dict,
    dtype: torch.dtype = torch.float32,
    watch: Callable[[Op, Worker], object] = lambda op, worker: None,
    events: list[Event] | None = None,
    worker_class: Callable[[nn.Module, dict], Worker] = Worker,
) -> Run:
    """Run a schedule on real tensors in simulated order; watch(op, worker) sees each op, R too."""
    events = events or simulate(build_schedule(config), config)
    config = {key: np.asarray(value).tolist() for key, value in config.items()}  # Python's numbers
    last_reader, device = last_readers(op for op, *_ in events), choose_device(config["device"])
    workers = [worker_class(stage.to(device, dtype), config) for stage in build_stages(config)]
    microbatches = split_batches(config, dtype)
    last_stage = config["num_stages"] - 1
    sent: dict[Step, Tensor] = {}  # activations go down the stages, their gradients back up

    for op, *_ in events:
        worker, (images, labels) = workers[op.stage], microbatches[op.microbatch]
        arrived = next((step for step in inputs_of(op, last_stage + 1) if step in sent), None)
        targets = labels if op.stage == last_stage else None
        if config["recompute"] and op.kind in ("B", "I"):
            again = op._replace(kind="R")
            worker.forward(again, worker.in_flight[op.microbatch][0], targets)
            watch(again, worker)
        if op.kind == "U":
            worker.update(op)
        elif op.kind == "F":
            output = worker.forward(op, sent.pop(arrived) if arrived else images, targets)
            sent |= {result_of(op): output} if op.stage < last_stage else {}
        else:
            x_gradient = worker.backward(op, sent.pop(arrived) if arrived else None)  # None: loss
            sent |= {result_of(op): x_gradient} if x_gradient is not None else {}
        if last_reader[op.stage, op.version] is op:
            del worker.versions[op.version]  # no longer needed
        watch(op, worker)

    assert not any([sent, *(worker.in_flight for worker in workers)]), "something was left behind"
    weights = [worker.versions.pop(config["num_batches"]) for worker in workers]
    return Run(workers[-1].losses, weights, accuracy([w.module for w in workers], weights, config))


# ======================== the story ends here; the rest serves it ==========================

# --------------------------------------------------------------------------------------- data

Images = tuple[Tensor, Tensor]  # x (n, 64) float and y (n,) int64, 0 to 9


def load_digits(config: dict) -> tuple[Images, Images, torch.Generator]:
    """The 1,797 digits in digits.npz, shuffled: to train on, a fifth held out; and the shuffler."""
    with np.load(Path(__file__).resolve().with_name("digits.npz")) as file:
        x = torch.from_numpy(file["images"].reshape(-1, 64) / 16.0).float()
        y = torch.from_numpy(file["labels"].astype(np.int64))
    generator = torch.Generator().manual_seed(config["seed"])
    test, train = torch.randperm(len(y), generator=generator).tensor_split([len(y) // 5])
    mean, spread = x[train].mean(0), x[train].std(0) + 0.1  # some corner pixels are always blank
    x = (x - mean) / spread if config["network"] != "transformer" else 16 * x  # grey, 0 to 16
    return (x[train], y[train]), (x[test], y[test]), generator


def make_batches(config: dict) -> list[Images]:
    """num_batches pairs of x (batch_size, 64) and y (batch_size,), epoch after shuffled epoch."""
    (x, y), _, generator = load_digits(config)
    num_images = config["batch_size"] * config["num_batches"]
    epochs = range(math.ceil(num_images / len(y)))
    order = torch.cat([torch.randperm(len(y), generator=generator) for _ in epochs])
    return [(x[chosen], y[chosen]) for chosen in order[:num_images].split(config["batch_size"])]


def split_batches(config: dict, dtype: torch.dtype) -> list[Images]:
    """(x, y) of every microbatch of the run, on the device, microbatch 0 first."""
    device, microbatches = choose_device(config["device"]), list[Images]()
    for x, y in make_batches(config):
        both = x.to(device, dtype), y.to(device)
        microbatches += zip(*(part.chunk(config["num_microbatches"]) for part in both), strict=True)
    return microbatches


def find_devices() -> list[str]:
    gpus, apple = torch.cuda.device_count(), torch.backends.mps.is_available()
    return [*["cuda"] * bool(gpus), *(f"cuda:{n}" for n in range(gpus)), *["mps"] * apple, "cpu"]


def choose_device(name: str) -> torch.device:
    return torch.device(find_devices()[0] if name == "auto" else name)


@torch.no_grad()
def accuracy(stages: list[nn.Module], weights: list[Weights], config: dict) -> float:
    """The share of the held-out images, 0 to 1, that the network gets right; nan if it diverged."""
    _, (x, y), _ = load_digits(config)
    x = x.to(next(iter(weights[0].values())))
    for stage, stage_weights in zip(stages, weights, strict=True):
        x = functional_call(stage, stage_weights, (x,))
    return (x.argmax(1).cpu() == y).double().mean().item() if x.isfinite().all() else math.nan


# ----------------------------------------------------------------------------------- measures


def makespan(events: list[Event]) -> float:
    return max(event.end for event in events)


def utilization(events: list[Event]) -> float:
    """The share of all device time, 0 to 1, in which a device computes; the rest is the bubble."""
    num_devices = 1 + max(event.device for event in events)
    busy = sum(end - start for _, start, end in {event[1:] for event in events})  # a pair once
    return busy / (num_devices * makespan(events))


def last_readers(ops: Iterable[Op]) -> dict[tuple[int, int], Op]:
    """(stage, version) -> the last of these ops that reads it. After that the version can go."""
    return {(op.stage, op.version): op for op in ops}


def memory_held(row: list[Op]) -> list[tuple[int, int]]:
    """(microbatches in flight, weight versions alive) on a device after each op of its row."""
    last_reader, held = last_readers(row), []
    in_flight, alive = (0, len({op.stage for op in row}))  # every stage starts with version 0
    for op in row:
        in_flight += {"F": 1, "B": -1, "W": -1}.get(op.kind, 0)
        alive += (op.kind == "U") - (last_reader[op.stage, op.version] is op)
        held.append((in_flight, alive))
    return held


# ------------------------------------------------------------------------------------- report

NAMES = {"naive": "Naive", "gpipe": "GPipe", "1f1b": "1F1B", "pipedream": "PipeDream"}
ROOMY = "GPU{0} (Stage {0})", "MB{} forward", "MB{} backward", "idle", "| "
NARROW = "{}", "F{}", "B{}", ".", " "
RECOMPUTED = "   Busy time includes the forwards that recompute runs a second time."
DIVERGED = "The loss diverged: try a smaller learning_rate, less momentum or staleness"
LEGEND = """\
   *: this run. busy: utilization. GPU by GPU, at most: microbatches in flight,
   weight versions kept, how many updates old a forward's weights are (stale).

💡 WHAT TO TRY NEXT: --num_microbatches 8, --num_stages 8, --schedule 1f1b,
   --weight_stashing False, and --num_batches 200 --verbose False
💡 WHY DOES A GPU WAIT? python -m pipedream why, with the same flags"""


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "es" if noun[-1] in "hs" else "s")


def format_rows(rows: Iterable[Iterable[tuple]]) -> str:
    lines = (" ".join(f"{kind}{m}" for _, kind, m, *_ in row) for row in rows)
    return "\n".join(f"GPU{device}: {line}" for device, line in enumerate(lines))


def format_table(table: list[list[str]], separator: str = "  ") -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [separator.join(map(str.ljust, cells, widths)).rstrip() for cells in table]


def format_per_gpu(values: list, limit: int = 5) -> str:
    """4 3 2 1, GPU0 first; of many GPUs only some: 8 7 .. 1."""
    some = values if len(values) <= limit else [*values[: limit - 3], "..", values[-1]]
    return " ".join(map(str, some))


def format_timeline(events: list[Event], width: int = 80) -> str:
    """A row per moment and a column per GPU: abbreviated beyond width, and folded in the middle."""
    gpus = range(1 + max(event.device for event in events))
    heading, *names, idle, separator = ROOMY if 16 * len(gpus) + 16 <= width else NARROW
    spans = [(op, gpu, round(start, 9), round(end, 9)) for op, gpu, start, end in events]
    times = sorted({time for *_, start, end in spans for time in (start, end)})
    table = [["Time", *(heading.format(gpu) for gpu in gpus)]]
    table += [[f"t{time:.12g}", *[idle] * len(gpus)] for time in times[:-1]]
    row_of = {time: row for row, time in enumerate(times, start=1)}
    for op, gpu, start, end in spans:
        for row in range(row_of[start], row_of[end]):
            table[row][1 + gpu] = names[op.kind != "F"].format(op.microbatch)
    for cells in table[1:]:
        if idle not in cells:
            cells[-1] = cells[-1].ljust(len(table[0][-1])) + " ← All busy!"
    lines, first, last = format_table(table, separator), min(2 * len(gpus) + 4, 40), len(gpus) + 1
    if len(lines) > first + last + 1:  # how the pipeline fills, and how it drains
        lines[first:-last] = [f"...  ({len(lines) - first - last} more rows)"]
    note = ["(a column is a GPU; F3: forward of microbatch 3, B3: its backward)"] * (idle == ".")
    return "\n".join([*note, *lines])


def main() -> None:
    config, _ = parse_config(__doc__)
    check_config(config)
    schedules = {name: build_schedule({**config, "schedule": name}) for name in SCHEDULES}
    runs = {name: simulate(schedule, config) for name, schedule in schedules.items()}
    num_stages, in_batch, num_batches, chosen = (config[key] for key in (*SIZES, "schedule"))
    events, used = runs[chosen], {name: utilization(run) for name, run in runs.items()}
    name, gpus = NAMES.get(chosen, chosen), count(num_stages, "GPU")
    here = "CPU" if choose_device(config["device"]).type == "cpu" else "1 GPU"
    at_work = "One GPU" if chosen == "naive" or num_stages == 1 else f"All {gpus}"
    print(f"""\
🚀 {name} Pipeline Created!
{gpus}: {used["naive"]:.1%} busy with one microbatch at a time, {used["1f1b"]:.1%} with a flush
per batch (1F1B), {used["pipedream"]:.1%} without a flush (PipeDream)
⚠️  SIMULATION MODE: Running on {here} (simulating {gpus})
Pipeline stages: {num_stages} (would be {gpus} in real setup)
Microbatches: {in_batch}

💡 In real {name}:
   - Each stage would be on a separate GPU
   - {at_work} would work {"at a time" if at_work == "One GPU" else "in parallel"}
💡 In this simulation:
   - All stages are on {here} (for learning); the arithmetic is real
   - Timeline shows what WOULD happen on {gpus}; time is simulated
""")
    if config["verbose"]:
        timeline = format_timeline(events, shutil.get_terminal_size().columns)
        print(f"📊 PIPELINE TIMELINE VISUALIZATION\n{timeline}\n", flush=True)
    losses, newest = list[float](), 0

    def watch(op: Op, worker: Worker) -> None:
        nonlocal losses, newest
        losses = worker.losses if op.stage == num_stages - 1 else losses
        newest = max(newest, op.version + (op.kind == "U"))
        batch, every = op.version, math.ceil(num_batches / 20)
        if op.kind != "U" or op.stage or (batch % every and batch < num_batches - 1):
            return  # stage 0 is the last to update
        if batch == 0 and config["verbose"]:
            microbatches = count(in_batch, "microbatch")
            print(f"BATCH 1/{num_batches}\nAverage loss across {microbatches}: {losses[0]:.4f}")
            for (stage, kind, _, version), _, _, end in events:
                if (kind, version) == ("U", 0):
                    print(f"Stage {stage}: Updated weights v0 → v1  (at t{end:.10g})")
            print(f"✅ Batch complete! All stages now at version 1{' or newer' * (newest > 1)}\n")
        if batch == 0:
            heading = f"Training results ({count(num_batches, 'batch')}):"
            print(f"{heading:<45}weights read by F; by B, if others")
        ops = sorted(op for op, *_ in events if op.microbatch == batch * in_batch)
        read = [format_per_gpu([f"v{op.version}" for op in ops if op.kind == k]) for k in "FB"]
        loss = f"Batch {batch + 1}: Loss {losses[batch]:.4f} (weights v{batch} → v{batch + 1})"
        print(f"- {loss:<40}", *dict.fromkeys(read), sep="   ", flush=True)

    run, slowest = train(config, watch=watch, events=events), makespan(runs["naive"])
    print("\n📊 WHAT THE SIMULATION MEASURED\nMakespan: ", end="")
    print(f"{makespan(events):.10g} time units (naive, one microbatch at a time: {slowest:.10g})")
    print(f"GPU utilization: {used[chosen]:.1%}, bubble (idle): {1 - used[chosen]:.1%}")
    print(end=f"{RECOMPUTED}\n" * config["recompute"])
    print(f"Test accuracy: {run.test_accuracy:.1%} of the digits that it was not trained on")
    print(end=f"{DIVERGED}\n" * (not run.losses[-1] < 10 * run.losses[0]))  # it may be NaN
    if not config["weight_stashing"] and not SCHEDULES[chosen][1] and num_stages > 1:
        print("Gradients are wrong where F and B differ: python -m pipedream audit, same flags")
        print("   (A few batches do not show the harm: the loss may even be lower by chance.)")
    table = [["  schedule", "time", "busy", "in flight", "versions", "stale"]]
    for name, schedule in schedules.items():
        peaks = [[max(held[i] for held in memory_held(row)) for row in schedule] for i in range(2)]
        peaks += [[max(op.microbatch // in_batch - op.version for op in row) for row in schedule]]
        cells = f"{makespan(runs[name]):.7g}", f"{used[name]:.1%}", *map(format_per_gpu, peaks)
        table.append([("* " if name == chosen else "  ") + name, *cells])
    print("\n📊 ALL SCHEDULES AT THIS CONFIG", *format_table(table), LEGEND, sep="\n")


# ----------------------------------------------------------------- checks and the command line


class UserError(ValueError):
    """Something that the reader can correct: one line, without a traceback."""


SIZES = "num_stages", "num_microbatches", "num_batches"
LIMITS = {SIZES: 500_000, ("batch_size", "num_batches"): 10_000_000}  # what one run may hold
LIMITS |= {("num_stages", "layers_per_stage", "hidden_size", "hidden_size"): 500_000_000}
SWITCH, COUNT, FILES = [True, False], (int, 1, 10_000_000), "pipedream/networks/[a-z]*.py"
RULES: dict[str, Any] = {  # key -> (type, least, most), list: or one per stage; or all choices
    **dict.fromkeys((*SIZES, "layers_per_stage", "hidden_size", "batch_size"), COUNT),
    **{"learning_rate": (float, 1e-30, 1e30), "momentum": (float, 0, 1), "seed": (int, 0, 2**62)},
    **{"device": ["auto", *find_devices()], "schedule": SCHEDULES},
    "network": ["residual", *(file.stem for file in Path(__file__).parent.glob(FILES))],
    **dict.fromkeys(("weight_stashing", "vertical_sync", "recompute", "verbose"), SWITCH),
    **dict.fromkeys(("forward_time", "backward_time"), (list, 1e-9, 1e12)),
    "comm_time": (list, 0, 1e12),
}


def check_value(key: str, value: Any, rule: Any) -> None:
    """Raise a UserError unless the value keeps its rule."""
    if not isinstance(rule, tuple):
        good, must = repr(value) in map(repr, rule), f"one of {', '.join(map(str, rule))}"
    else:
        kind, least, most = rule
        items = value if kind is list and isinstance(value, list) else [value]
        types = (int, np.integer) if kind is int else (int, float, np.integer, np.floating)
        numbers = (isinstance(x, types) and not isinstance(x, bool) for x in items)  # bool is int
        good = all(numbers) and all(least <= x <= most for x in items)
        words = {int: "a whole number", float: "a number", list: "a number, or one per stage,"}
        form = "," if kind is int else "g"
        must = f"{words[kind]} from {least:{form}} to {most:{form}}"
    if not good:
        more = " (others, and CSV files: python -m pipedream why)" if rule is SCHEDULES else ""
        raise UserError(f"{key}={value!r} must be {must}{more}")


def per_stage(config: dict, key: str) -> list[float]:
    """A time for each stage, from one for all or a list. UserError for a time that cannot be."""
    times, num_stages = config[key], config["num_stages"]
    check_value(key, times, RULES.get(key, RULES["comm_time"]))
    if isinstance(times, list) and len(times) != num_stages:
        raise UserError(f"{key}={times} must have num_stages={num_stages} entries")
    return times if isinstance(times, list) else [times] * num_stages


def check_config(config: dict, rules: dict[str, Any] = RULES) -> None:
    """Raise a UserError (a ValueError) of one sentence for the first wrong thing in config."""
    for key in {**config, **rules}:
        if key not in rules:
            raise UserError(f"unknown key {key!r} in CONFIG: its keys are {', '.join(rules)}")
        if key not in config:
            raise UserError(f"CONFIG has no {key!r}: every key needs a value")
        check_value(key, config[key], rules[key])
    for key in ("forward_time", "backward_time", "comm_time"):
        per_stage(config, key)
    if config["vertical_sync"] and not config["weight_stashing"]:
        raise UserError("vertical_sync=True needs weight_stashing=True: it reads stashed versions")
    for keys, most in LIMITS.items():
        if (number := math.prod(int(config[key]) for key in keys)) > most:
            raise UserError(f"{' * '.join(keys)} is {number:,}: at most {most:,} fit")
    batch_size, parts = config["batch_size"], config["num_microbatches"]
    if batch_size % parts:
        fitting = ", ".join(str(d) for d in range(1, batch_size + 1) if batch_size % d == 0)
        split = f"batch_size={batch_size} cannot be split evenly into num_microbatches={parts}"
        raise UserError(f"{split}: try {fitting}")


def parse_value(text: str) -> object:
    """What Python would read: 4, 0.5, True, 1,2,1,1 (a list); everything else stays text."""
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        return text
    return list(value) if isinstance(value, tuple) else value


def throw(error: BaseException) -> NoReturn:
    raise error


def parse_config(
    doc: str | None, config: dict = CONFIG, flags: dict | None = None, argv: list | None = None
) -> tuple[dict, dict]:
    """config with the flags of the command line on top; and what flags, {name: details}, said."""
    source, look = inspect.getsource(sys.modules[__name__]), RawDescriptionHelpFormatter
    text = "Each key is also a flag:" + source.partition("\nCONFIG =")[2].partition("\n}")[0]
    parser = ArgumentParser(description=doc, epilog=text, formatter_class=look, allow_abbrev=False)
    parser.error = lambda message: throw(UserError(message))  # type: ignore[method-assign]
    for key in config:  # no value unless a flag gives one, and no line of help
        parser.add_argument(f"--{key}", type=parse_value, default=SUPPRESS, help=SUPPRESS)
    for name, details in (flags or {}).items():
        parser.add_argument(name, **details)
    texts = sys.argv[1:] if argv is None else argv
    if odd := [text for text in texts if re.search("[\0-\x1f\x7f-\x9f\ud800-\udfff]", text)]:
        raise UserError(f"{odd[0]!r} contains a character that cannot be printed")
    given = vars(parser.parse_args(argv))
    return {key: given.pop(key, value) for key, value in config.items()}, given


def run_main(main: Callable[[], object]) -> int:
    """Call main; what the reader can correct ends in one line on stderr and exit status 2."""
    plain: Any = {"→": "->", "←": "<-"}  # on a terminal that cannot show them; emoji are left out
    codecs.register_error("plain", lambda e: (plain.get(e.object[e.start], ""), e.start + 1))  # type: ignore[attr-defined]
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="plain")
    for number in {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGINT)}:
        if signal.getsignal(number) != signal.SIG_IGN:  # it is under nohup; else clean up and end
            signal.signal(number, lambda number, _: throw(KeyboardInterrupt(number)))
    gc.set_threshold(100_000)  # a long schedule is a million tuples: search cycles less often
    try:
        main()
        print(end="", flush=True)
        return 0
    except UserError as error:
        message = str(error)
    except OSError as error:  # stdout is full, or it is | head, which has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return 0
        message = f"{error.filename or 'output'}: {error.strerror}"
    except Exception as error:
        if not re.search("MemoryError|out of memory|Allocator|Error -4 ", repr(error)):  # -4: zlib
            raise
        message = "out of memory: try a smaller batch_size or hidden_size, or --device cpu"
    except KeyboardInterrupt as error:
        message, number = "stopped", (*error.args, signal.SIGINT)[0]
    print(f"{Path(sys.argv[0]).name}:", *message.split(), file=sys.stderr, flush=True)
    return 128 + number if message == "stopped" else 2


if __name__ == "__main__":
    sys.modules["pipedream_simple"] = sys.modules["__main__"]  # for networks that import it
    sys.exit(run_main(main))
