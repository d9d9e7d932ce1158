#!/usr/bin/env python3
"""Does it hold in real processes? The same rows, one process per GPU, on PyTorch's engine.

    python pipedream_distributed.py                       starts one process per GPU
    torchrun --nproc-per-node 4 pipedream_distributed.py  the same, started by torchrun
    python pipedream_distributed.py --schedule zb-h1      any schedule of the lab, or a CSV file
    python pipedream_distributed.py --num_stages 2 --hidden_size 1024 --batch_size 1024
                                                          enough work for a speed-up

Every process takes a GPU, or where there are too few of them a share of the CPU. It runs its row of
the schedule on torch.distributed.pipelining, PyTorch's engine, which computes, sends and receives.
Then rank 0 does it all again on one device, as pipedream_simple.py does, and compares: the order of
the ops, the weight versions that they read, losses and weights bit by bit, real and simulated time.

CONFIG and its flags are those of pipedream_lab.py, and two more:
    --timeout 60   seconds until the run ends when a process has died, hangs or is stopped
    --repeats 3    timed runs, after one to warm up; the results are those of the last
Without effect: forward_time, backward_time, weight_gradient_time, comm_time (time is real) and
verbose. Not possible: weight_stashing False, recompute where a backward is split (zb-h1, zb-h2),
and a device that is a single GPU (cuda:N, mps).

A rank is the number of a process. gloo (CPU) and nccl (GPU) carry tensors between ranks. Read the
first three rooms: stage, engine, one process of many. The others serve them: the proof, the clock,
the launcher that starts and watches the processes, and main.
"""

import contextlib
import copy
import itertools
import logging
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import IO, NamedTuple, NoReturn, TypeVar

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during a slow import: no traceback
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # what fails is told in one line
    if "PIPEDREAM_LAUNCHED" in os.environ:  # launch() holds stdin: end with it, at any time
        threading.Thread(target=lambda: os._exit(1 + len(os.read(0, 1))), daemon=True).start()

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining import schedules as engines
from torch.nn.functional import cross_entropy
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.checkpoint import checkpoint

import pipedream_lab as lab
import pipedream_planner as planner
from pipedream_lab import Plan
from pipedream_planner import now
from pipedream_simple import (
    Audit,
    Op,
    UserError,
    Weights,
    batches_shown,
    build_stages,
    count,
    format_loss,
    format_per_gpu,
    format_table,
    leaves_of,
    make_batches,
    makespan,
    run_main,
    schedule_name,
    simulate,
)

T = TypeVar("T")

# -------------------------------------------------------------------------------------- stage


class VersionedStage(PipelineStage):
    """PyTorch's stage knows one set of weights. This one keeps versions, as PipeDream needs them.

    A version is a module with its own parameters. The engine works on self.submod: before every op
    that becomes the version which the op has to read. (A backward reads what the graph of its
    forward holds, whatever self.submod is.) An update makes a new module and leaves the old ones
    alone, so nothing changes under a graph.

    versions    number -> module, kept while a batch or the next update needs it
    pins        batch -> the version that it reads here. Unless this is known from the start, the
                first forward of the batch pins the newest version that exists (weight stashing)
    gradient    of the weights, summed over the microbatches of the batch so far
    velocity    with momentum: the last update
    siblings    the stages of this rank, this one included: they update together
    done        what this rank has done, in order, and the version that each op read: the tensors
                tell which, not the pins
    first_microbatch    of the engine's step: the engine counts from 0 in every step, we do not
    """

    def __init__(self, stage: int, plan: Plan, device: torch.device, siblings: list, done: list):
        self.plan, self.siblings, self.done = plan, siblings, done
        self.num_microbatches = plan.config["num_microbatches"]
        size = plan.config["batch_size"] // self.num_microbatches
        # Tell the engine what comes in and goes out, or it runs an extra forward to find out. On
        # meta, where tensors have shapes but no values, that costs next to nothing.
        modules, ends = build_stages(plan.config), [torch.empty(size, 64, device="meta")]
        for module in copy.deepcopy(modules):
            ends.append(module.to("meta")(ends[-1]))
        x, output = (torch.empty_like(end, device=device) for end in ends[stage : stage + 2])
        x.requires_grad_(stage > 0), output.requires_grad_()
        module = modules[stage].to(device)
        super().__init__(module, stage, plan.config["num_stages"], device, x, output)

    def restart(self) -> None:
        """Back to version 0, as if nothing had happened."""
        self.submod = build_stages(self.plan.config)[self.stage_index].to(self.device)
        self.versions: dict[int, nn.Module] = {0: self.submod}
        self.pins, self.gradient, self.velocity = given_pins(self.plan), Weights(), Weights()
        self.first_microbatch, self.num_backwards, self.peak_versions = 0, 0, 0
        self.in_memory: weakref.WeakSet = weakref.WeakSet()  # storages, one per version

    def select_version(self, chunk: int) -> None:
        """Give the engine the weights that its next op has to read."""
        batch = (self.first_microbatch + chunk) // self.num_microbatches
        self.submod = self.versions[self.pins.setdefault(batch, max(self.versions))]
        if self.plan.config["recompute"]:
            self.submod = Recomputed(self.submod)

    # The engine calls these. It calls a microbatch a chunk; full_backward is False where a schedule
    # has the two halves of a backward, I and W, as zb-h1 does.

    def forward_one_chunk(self, fwd_chunk_id, *args, **kwargs):
        self.select_version(fwd_chunk_id)
        output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        self.note("F", fwd_chunk_id, self.version_in(output))
        return output

    def backward_one_chunk(self, bwd_chunk_id, loss=None, full_backward=True, last_backward=False):
        self.select_version(bwd_chunk_id)
        version = self.version_in(self.fwd_cache[bwd_chunk_id][0][0])
        super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
        if not full_backward:
            self.note("I", bwd_chunk_id, version)
            return
        if loss is not None:  # the engine keeps the losses, and their graphs would keep weights
            loss.detach_()
        self.finish_backward("B", bwd_chunk_id)

    def backward_weight_one_chunk(self, bwd_chunk_id, last_backward=False):
        self.select_version(bwd_chunk_id)
        super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
        self.finish_backward("W", bwd_chunk_id)

    def version_in(self, output: Tensor) -> int:
        """The version that the graph of this output holds; -1 for none of those that are kept."""
        leaves = {id(leaf) for leaf in leaves_of(output)}
        held = [v for v, m in self.versions.items() if leaves & {id(w) for w in m.parameters()}]
        return held[0] if len(held) == 1 else -1

    def finish_backward(self, kind: str, chunk: int) -> None:
        """After the last backward of a batch on this rank, all its stages update.

        Two batches may read one version, but their gradients do not mix: on a stage, the backwards
        of a batch are all done before those of the next one begin.
        """
        self.note(kind, chunk, self.take_gradient())
        self.num_backwards += 1
        if all(stage.num_backwards == self.num_microbatches for stage in self.siblings):
            for stage in self.siblings:
                stage.update(chunk)

    def take_gradient(self) -> int:
        """Add what the backward left in .grad to self.gradient; the version that it was left on."""
        left_on = set()
        for version, module in self.versions.items():
            for name, w in module.named_parameters():
                if w.grad is not None:
                    left_on.add(version)
                    known, gradient, w.grad = self.gradient.get(name), w.grad, None
                    self.gradient[name] = gradient if known is None else known.add_(gradient)
        return left_on.pop() if len(left_on) == 1 else -1

    def update(self, chunk: int) -> None:
        """Make the next version, and drop those that nothing needs any more."""
        newest = max(self.versions)
        self.submod = self.next_version()
        self.num_backwards = 0
        del self.pins[(self.first_microbatch + chunk) // self.num_microbatches]
        kept = {v: module for v, module in self.versions.items() if v in self.pins.values()}
        self.versions = {**kept, newest + 1: self.submod}
        self.note("U", chunk, newest)

    @torch.no_grad()
    def next_version(self) -> nn.Module:
        """W(v+1) = W(v) - learning_rate * (all gradients of the batch).

        With momentum the step is u = momentum * u + gradients.
        """
        module = copy.deepcopy(self.versions[max(self.versions)])
        momentum = self.plan.config["momentum"]
        for name, w in module.named_parameters():
            step = self.gradient.pop(name)
            if momentum:
                step = self.velocity[name] = step + momentum * self.velocity.get(name, 0)
            w.sub_(step, alpha=self.plan.config["learning_rate"])
        return module

    def note(self, kind: str, chunk: int, version: int) -> None:
        """Write down an op, and count the versions that are in memory now, whoever holds them."""
        self.done.append(Op(self.stage_index, kind, self.first_microbatch + chunk, version))
        firsts = (next(module.parameters()) for module in self.versions.values())
        self.in_memory.update(w.untyped_storage() for w in firsts)
        self.peak_versions = max(self.peak_versions, len(self.in_memory))


class Recomputed(nn.Module):
    """The same module, which keeps only its input, and runs again when a backward needs the rest.

    PyTorch's checkpoint does that, on the version that the forward read: the graph holds it.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.module, x, use_reentrant=False, preserve_rng_state=False)


# ------------------------------------------------------------------------------------- engine
#
# PyTorch has a runtime that takes any schedule as data, but under private names: only this room
# uses them. Its public classes (ScheduleGPipe, Schedule1F1B ...) know one schedule each.


def check_engine() -> None:
    """Raise a UserError unless this PyTorch has what make_engine needs."""
    runtime = getattr(engines, "_PipelineScheduleRuntime", None)
    names = {"_Action", "_add_send_recv", "_prepare_schedule_with_comms"}
    # A TorchVersion: "2.9" < "2.13". Torch 2.9 has the names, but fails on gloo.
    if torch.__version__ < "2.13" or not names <= {*dir(engines), *dir(runtime)}:
        what = f"torch {torch.__version__} does not run a schedule given as data as torch 2.13 does"
        raise UserError(f"{what}: this needs 2.13, or a newer one with the same private names")


def make_engine(plan: Plan, stages: list[VersionedStage]):
    """PyTorch's runtime for the stages of this rank, and the rows that one step of it runs."""
    in_step, in_batch = microbatches_in_step(plan), plan.config["num_microbatches"]
    rank_of = {op.stage: rank for rank, row in enumerate(plan.schedule) for op in row}
    # All steps run the same rows, each on its own microbatches. Updates are up to the stages.
    # PyTorch reads the notation that str(op) writes: 2F0 is the forward of microbatch 0 on stage 2.
    ops = [
        [op for op in row if op.kind != "U" and op.microbatch < in_step] for row in plan.schedule
    ]
    actions = {r: [engines._Action.from_str(str(op)) for op in row] for r, row in enumerate(ops)}
    # What has to be sent and received. (The engine would add it too, in quadratic time.)
    actions = engines._add_send_recv(actions, rank_of.__getitem__, plan.config["num_stages"])

    def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(logits, labels) / in_batch

    # scale_grads would divide by the microbatches of a step; loss_of divides by those of a batch.
    engine = engines._PipelineScheduleRuntime(stages, in_step, loss_fn=loss_of, scale_grads=False)
    engine._prepare_schedule_with_comms(actions, format="compute_comms")
    return engine


def microbatches_in_step(plan: Plan) -> int:
    """A step of the engine is a batch; without a flush it is the whole stream of microbatches."""
    num_microbatches, num_batches = plan.config["num_microbatches"], plan.config["num_batches"]
    return num_microbatches * (num_batches if plan.config["schedule"] == "pipedream" else 1)


# ------------------------------------------------------------------------ one process of many


class Report(NamedTuple):
    """What a rank has to tell at the end."""

    done: list[Op]  # what it ran, in order, and the version that each op read
    losses: list[float]  # per batch, from the rank that has the last stage
    stages: dict[int, tuple[Weights, int]]  # -> after the last update; most versions in memory
    seconds: list[float]  # of each run


def run_rank(plan: Plan, device: torch.device, num_runs: int = 1) -> Report:
    """Train on this rank's row of the schedule; several times, each from the start, to time it."""
    config, stages, done = plan.config, list[VersionedStage](), list[Op]()
    for number in sorted({op.stage for op in plan.schedule[dist.get_rank()]}):
        stages.append(VersionedStage(number, plan, device, stages, done))
    engine = make_engine(plan, stages)
    in_step, size = microbatches_in_step(plan), config["num_microbatches"]
    images_in_step = in_step * config["batch_size"] // size
    data = (torch.cat(part).to(device) for part in zip(*make_batches(config), strict=True))
    xs, ys = (part.split(images_in_step) for part in data)
    seconds = []
    for _ in range(num_runs):
        of_chunks: list[Tensor] = []
        done.clear()
        for stage in stages:
            stage.restart()
        dist.all_reduce(torch.zeros(1))  # wait for all; on the CPU, so that gloo carries it
        start = now(device)
        for x, y in zip(xs, ys, strict=True):
            images = [x] if stages[0].is_first else []  # only the last stage uses the labels
            of_step: list[Tensor] = []
            engine.step(*images, target=y, losses=of_step, return_outputs=False)
            of_chunks += [loss.detach() for loss in of_step]
            for stage in stages:
                stage.first_microbatch += in_step
        seconds.append(now(device) - start)
    losses = [loss.item() for loss in of_chunks]
    batches = [losses[k : k + size] for k in range(0, len(losses), size)]
    ends = {}
    for stage in stages:
        last = stage.versions[max(stage.versions)]
        weights = {name: w.detach().cpu() for name, w in last.named_parameters()}
        ends[stage.stage_index] = weights, stage.peak_versions
    return Report(done, [*map(sum, batches)], ends, seconds)


def given_pins(plan: Plan) -> dict[int, int]:
    """With vertical sync: batch -> the version that stage 0 reads, from its row; else nothing.

    (In the paper the number travels with the microbatch. The engine sends activations only.)
    """
    if not plan.config["vertical_sync"]:
        return {}
    forwards = (op for op in plan.schedule[0] if op.kind == "F")
    return {op.microbatch // plan.config["num_microbatches"]: op.version for op in forwards}


def gather(report: T) -> list[T]:
    """The reports of all ranks on rank 0, an empty list on the others."""
    reports = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(report, reports)
    return reports or []  # type: ignore[return-value]


# -------------------------------------------------------------------------------------- proof


def prove(reports: list[Report], plan: Plan, device: torch.device) -> tuple[bool, str]:
    """Do it again on one device, and compare: do they agree? And all that this rests on."""
    config = {**plan.config, "device": str(device)}
    audit = Audit(config)  # looks at the tensors that were used, as VersionedStage does
    alone = lab.train_plan(plan._replace(config=config), watch=audit)
    rows = zip((report.done for report in reports), plan.schedule, strict=True)
    pairs = [pair for did, row in rows for pair in itertools.zip_longest(did, row, fillvalue=())]
    in_order = [did[:3] == op[:3] for did, op in pairs]
    read = {op[:3]: op.version for report in reports for op in report.done}
    same_version = [read.get(step) == version for step, version in audit.read.items()]
    of_stage = dict(item for report in reports for item in report.stages.items())
    weights, peaks = zip(*(of_stage[stage] for stage in sorted(of_stage)), strict=True)
    at_start = [stage.state_dict() for stage in build_stages(config)]
    off = [*map(difference, weights, alone.weights)]
    moved = map(difference, at_start, alone.weights)
    # Rounding may be up to a thousandth of the distance that training moved the weights of a stage.
    close = all(d == 0 or d <= 1e-3 * distance for d, distance in zip(off, moved, strict=True))
    losses = [loss for report in reports for loss in report.losses]
    off_loss = difference(*({"": torch.tensor(each)} for each in (losses, alone.losses)))
    same_peaks = [*peaks] == alone.peak_versions
    holds = all(in_order) and all(same_version) and same_peaks and close and off_loss < 1e-4
    exact = ", BUT FOR ROUNDING" if any([off_loss, *off]) else ", TO THE BIT"
    verdict = f"{'✅' if holds else '❌ NOT'} THE SAME AS pipedream_simple.py{exact * holds}"
    compared = "(the same)" if same_peaks else f"NOT {format_per_gpu(alone.peak_versions)}"
    table = [
        ["operations in the order of the schedule", f"{sum(in_order)} of {len(in_order)}"],
        ["forwards and backwards on its versions", f"{sum(same_version)} of {len(same_version)}"],
        ["most weight versions alive, each stage", f"{format_per_gpu([*peaks])} {compared}"],
        ["largest difference of a loss", f"{off_loss:.1g}"],
        ["largest difference of a weight, each stage", format_per_gpu([f"{d:.1g}" for d in off])],
    ]
    return holds, "\n".join([verdict, *format_table(table, gap=3)])


def difference(ours: Weights, theirs: Weights) -> float:
    """The largest absolute difference; 0 only if all bits are equal, or both are NaN."""
    a, b = (torch.cat([ws[name].flatten().cpu() for name in theirs]) for ws in (ours, theirs))
    both_nan = a.isnan() & b.isnan()
    a, b = a.detach().masked_fill(both_nan, 0), b.detach().masked_fill(both_nan, 0)
    if a.numpy().tobytes() == b.numpy().tobytes():
        return 0.0
    return (a - b).abs().max().item() or math.ulp(0)  # 0.0 and -0.0 differ by the least there is


# -------------------------------------------------------------------------------------- clock


def one_process(config: dict) -> float:
    """Seconds of plain training on the same batches, from the first forward on: no pipeline."""
    device, started = torch.device(config["device"]), list[float]()

    def begin(*_) -> None:
        hook.remove()
        started.append(now(device))

    hook = register_module_forward_pre_hook(begin)
    lab.plain_training(config)
    return now(device) - started[0]


def simulated_time(plan: Plan, times: dict[str, list[float]], message: float) -> float:
    """The time of a batch, when the ops of each stage and a message between ranks take so long."""
    measured = {**times, "comm_time": message, "weight_gradient_time": 0}  # 0: half a backward
    events = simulate(plan.schedule, {**plan.config, **measured})
    return makespan(events) / plan.config["num_batches"]


def time_message(plan: Plan, device: torch.device) -> float:
    """Milliseconds of a message from rank 0 to rank 1, while rank 0 goes on with a forward."""
    if len(plan.schedule) == 1:
        return 0.0
    size = planner.microbatch_size(plan.config)
    stage, x = build_stages(plan.config)[0].to(device), torch.zeros(size, 64, device=device)
    return planner.measure_message(stage(x).detach(), lambda: stage(x))


def format_clock(
    reports: list[Report], plan: Plan, device: torch.device, message: float = 0
) -> str:
    """The time of a batch: real and simulated, in a pipeline and without one."""
    num_batches, num_ranks = plan.config["num_batches"], len(reports)
    runs = [max(took) for took in zip(*(report.seconds for report in reports), strict=True)][1:]
    config = {**plan.config, "device": str(device)}
    plain = [one_process(config) for _ in range(len(runs) + 1)][1:]  # the first warms up
    times = planner.measure_stages(config)
    simulated = simulated_time(plan, times, message)
    forward, backward, update = map(sum, times.values())
    one_by_one = config["num_microbatches"] * (forward + backward) + update
    one, real = (1000 * statistics.median(took) / num_batches for took in (plain, runs))
    lowest, highest = (1000 * took / num_batches for took in (min(runs), max(runs)))
    ranks, spread = count(num_ranks, "process"), f"({lowest:.4g} to {highest:.4g})"
    table = [
        ["", "ms per batch", "speed-up"],
        ["plain training, 1 process", f"{one:.4g}", "1.00x"],
        [f"the pipeline, {ranks}", f"{real:.4g} {spread}", f"{one / real:.2f}x"],
        ["simulated, 1 process", f"{one_by_one:.4g}", "1.00x"],
        [f"simulated, {ranks}", f"{simulated:.4g}", f"{one_by_one / simulated:.2f}x"],
    ]
    lines = [
        *format_table(table),
        f"   Real: time of a run / batches, median of {len(runs)} (lowest to highest).",
        "   Simulated: from forward, backward and update of each stage, measured while",
        f"   nothing else ran, and from a message from rank 0 to 1 ({message:.2g} ms), which",
        "   rank 0 sends and works on; without the engine's own work for each op.",
    ]
    cores = num_cores() if device.type == "cpu" else num_ranks
    if cores < num_ranks:
        lines.append(f"   {ranks} share {count(cores, 'core')}: the speed-up is {cores}x at most.")
    small = config["hidden_size"] < 1024 and config["network"] == "residual"
    if real > 2 * max(simulated, one_by_one / cores) and small:
        lines.append("   Ops this small hide a speed-up: try --hidden_size 1024 --batch_size 1024")
    return "\n".join(lines)


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ----------------------------------------------------------------------------------- launcher
#
# What torchrun does, for one machine and with a clock: start the ranks, watch them, end all of them
# when one fails or hangs, and say in one line which rank it was and why. A rank that waits in vain
# for another one gives up after two thirds of --timeout; one that has not given up when it is over
# is to blame. A rank that is stopped (SIGSTOP) while no other waits for it has --timeout, too.

LOST = 3  # exit status of a rank that waited in vain for another one
LOST_WORDS = re.compile("gloo|NCCL|timed? ?out|connection|socket|port must", re.IGNORECASE)
MAX_PROCESSES = 16  # that this program starts by itself
POLL = 0.05  # seconds


def launch(num_ranks: int, timeout: float) -> int:
    """Start this program again in so many processes, and wait for them. Returns exit status."""
    if num_ranks > MAX_PROCESSES:
        what = f"{num_ranks} processes are more than the {MAX_PROCESSES} that this starts by itself"
        raise UserError(f"{what}: try torchrun --nproc-per-node {num_ranks}")
    print(f"Starting {count(num_ranks, 'process')}, which takes some seconds ...", flush=True)
    ranks, files = list[subprocess.Popen](), list[IO[str]]()
    try:
        # The store is where the ranks meet. It finds a free port, and needs no host name.
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "PIPEDREAM_LAUNCHED": "1"}
        environment |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}  # the store is not rank 0's
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
        environment |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(num_ranks))
        for rank in range(num_ranks):
            environment |= dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
            command = [sys.executable, *sys.argv]
            pipe = subprocess.PIPE  # it closes when this process ends, however it ends
            files.append(tempfile.TemporaryFile("w+", errors="replace"))  # noqa: SIM115
            ranks.append(subprocess.Popen(command, env=environment, stdin=pipe, stderr=files[-1]))
        silent = wait_for(ranks, timeout)
        statuses = [process.returncode for process in ranks]
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot start {count(num_ranks, 'process')}: {error}") from None
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    for file in files:
        file.seek(0)
    said = [file.read() for file in files]
    print(*explain(statuses, said, silent, timeout), sep="", end="", file=sys.stderr)
    return int(any(status != 0 for status in statuses))


def wait_for(ranks: list[subprocess.Popen], timeout: float) -> list[int]:
    """Wait until all ranks have ended, or one has failed; return those that do not answer."""
    waited = 0.0  # polls, not the clock: Ctrl-Z stops this process, too
    while running := [rank for rank, process in enumerate(ranks) if process.poll() is None]:
        failed = {process.returncode for process in ranks} - {None, 0}
        stopped = [rank for rank in running if is_stopped(ranks[rank])]
        if failed - {LOST}:  # it failed by itself, and says why
            return []
        waited = waited + POLL if failed or stopped else 0
        if waited > (timeout / 3 if failed else timeout):
            return stopped or running
        time.sleep(POLL)
    return []


def is_stopped(process: subprocess.Popen) -> bool:
    """As by SIGSTOP. Where Python has no waitid (Windows), nothing counts as stopped."""
    if not hasattr(os, "waitid"):
        return False
    look = os.WSTOPPED | os.WEXITED | os.WNOHANG | os.WNOWAIT
    state = os.waitid(os.P_PID, process.pid, look)
    return state is not None and state.si_code == os.CLD_STOPPED


def explain(statuses: list[int], said: list[str], silent: list[int], timeout: float) -> list[str]:
    """Why the run ended: what to write to stderr, given what the ranks wrote there."""
    if silent:
        names = " and ".join(f"rank {rank}" for rank in silent)
        why = f"did not answer within --timeout {timeout:g} s: stopped, stuck or slow"
        return [f"{program()}: {names} {why}\n"]
    own = [rank for rank, status in enumerate(statuses) if status not in (None, 0, LOST)]
    lost = [rank for rank, status in enumerate(statuses) if status == LOST][:1]
    # Ranks that failed by themselves come first: the others only lost those.
    lines = [said[rank] for rank in own or lost or range(len(said))]
    for rank in own:
        if statuses[rank] < 0:
            name = signal.Signals(-statuses[rank]).name
            lines.append(f"{program()}: rank {rank} was ended by {name}\n")
    return [*dict.fromkeys(lines)]  # each only once


def program() -> str:
    """The name of the running script, which begins every line on stderr."""
    return Path(sys.argv[0]).name


def in_group(work: Callable[[], T], backend: str, timeout: float) -> T:
    """What work() returns, done by a rank among the others: from the first handshake to the end."""
    alarm = threading.Timer(timeout, lose, ["no answer at MASTER_ADDR:MASTER_PORT"])
    alarm.daemon = True
    alarm.start()  # a server that is no store may never answer
    try:
        try:
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout * 2 / 3))
        finally:
            alarm.cancel()
        result = work()
        dist.destroy_process_group()  # the other ranks have nothing more to do, and leave
    except (RuntimeError, ValueError) as error:
        if LOST_WORDS.search(str(error)):
            lose(str(error))
        raise
    return result


def lose(error: str) -> NoReturn:
    """Say that this rank waits for others in vain, and end it, whatever its threads wait for."""
    print(f"{program()}: lost the other ranks:", *error.split(), file=sys.stderr)
    sys.stderr.flush()
    os._exit(LOST)


# --------------------------------------------------------------------------------------- main


def place(name: str, local_rank: int, processes_here: int) -> torch.device:
    """The device of a rank: a GPU of its own, if every process on this machine can have one."""
    num_gpus = torch.cuda.device_count()
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"device={name!r} is one GPU, and every process needs its own: try cuda")
    if name != "cpu" and num_gpus >= processes_here:
        return torch.device("cuda", local_rank)
    if name == "cuda":
        needed = f"{processes_here} processes need a GPU each, torch finds {num_gpus}"
        raise UserError(f"device='cuda': {needed}: try cpu")
    return torch.device("cpu")


def checked_plan(config: dict) -> Plan:
    """The plan, or a UserError for what can be known to fail before any process starts."""
    if not config["weight_stashing"]:
        why = "PyTorch does not let weights change under a graph"
        raise UserError(f"weight_stashing=False is only for the simulation: {why}")
    if not dist.is_available() or not dist.is_gloo_available():
        raise UserError("this PyTorch has no gloo, through which the processes would talk")
    check_engine()
    plan = lab.make_plan(config)
    ops = (op for row in plan.schedule for op in row)
    if config["recompute"] and any(op.kind == "I" for row in plan.schedule for op in row):
        why = "PyTorch's checkpoint would run the forward again for I, and once more for W"
        raise UserError(f"recompute=True is not possible with {plan.name}: {why}")
    forwards = [op for op in ops if op.kind == "F" and op.stage == plan.config["num_stages"] - 1]
    for before, op in itertools.pairwise(forwards):
        if before.microbatch > op.microbatch:  # PyTorch numbers the losses in the order they come
            why = "PyTorch's engine needs the forwards of the last stage in order"
            raise UserError(f"{plan.name}: {before} is before {op}, but {why}")
    return plan


def told_by_torchrun(plan: Plan) -> tuple[int, int]:
    """(local rank, number of processes on this machine). UserError: not what the plan needs."""
    names = "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"
    try:
        rank, world_size, local_rank, here, _ = (int(os.environ[name]) for name in names)
        os.environ["MASTER_ADDR"]
    except (KeyError, ValueError):
        why = f"MASTER_ADDR is not, or {', '.join(names)} are not all numbers"
        raise UserError(f"RANK is set, but {why}: use torchrun, or unset RANK") from None
    needed = len(plan.schedule)
    if world_size != needed or not 0 <= rank < world_size:
        given = f"RANK={rank}, WORLD_SIZE={world_size}, but {plan.name} is for {needed} processes"
        raise UserError(f"{given}: try torchrun --nproc-per-node {needed}")
    return local_rank, here


def format_start(plan: Plan, device: torch.device) -> str:
    """What is about to run, and on what."""
    name, keeps = schedule_name(plan.config)
    cores, threads = count(num_cores(), "core"), count(torch.get_num_threads(), "thread")
    where = f"{cores}, {threads} per process; gloo"
    microbatches = count(plan.config["num_microbatches"], "microbatch")
    if device.type == "cuda":
        where = f"a GPU each, {torch.cuda.get_device_name(device)}; nccl"
    return f"""\
🚀 {name} on {count(len(plan.schedule), "process")}, real ones ({where})
Engine: torch.distributed.pipelining of torch {torch.__version__}
Pipeline: {count(plan.config["num_stages"], "stage")}, {microbatches} per batch
Schedule: {plan.name} ({keeps})
"""


def run_process(plan: Plan, device: torch.device, config: dict) -> bool:
    """One process of many, from the first handshake to the end; does the proof hold?"""
    messages: list[float] = []

    def work() -> list[Report]:
        if dist.get_rank() == 0:
            with contextlib.suppress(BrokenPipeError):  # | head: go on, the other ranks wait
                print(format_start(plan, device), flush=True)
        messages.append(time_message(plan, device))
        return gather(run_rank(plan, device, num_runs=1 + config["repeats"]))

    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    reports = in_group(work, backend, config["timeout"])
    return not reports or print_results(reports, plan, device, *messages)  # rank 0 has them


def print_results(reports: list[Report], plan: Plan, device: torch.device, message: float) -> bool:
    """Print what came out; does the proof hold?"""
    losses = [loss for report in reports for loss in report.losses]
    print(f"Training results ({count(len(losses), 'batch')}):")
    print("\n".join(f"- {format_loss(batch, losses)}" for batch in batches_shown(len(losses))))
    holds, proof = prove(reports, plan, device)
    print(f"\n{proof}\n", flush=True)
    print(f"📊 REAL AND SIMULATED TIME\n{format_clock(reports, plan, device, message)}", flush=True)
    return holds


def main() -> None:
    logging.disable()  # when a rank fails, PyTorch would print the whole schedule
    is_rank = "RANK" in os.environ
    known = lab.LAB_CONFIG
    config: dict = {**known, "timeout": 60, "repeats": 3} if isinstance(known, dict) else known
    rules = {**lab.LAB_RULES, "timeout": (float, 1, 86_400), "repeats": (int, 1, 1_000)}
    try:
        config, _ = lab.parse_lab_config(__doc__, config=config, rules=rules)
        plan = checked_plan(config)
        local_rank, here = told_by_torchrun(plan) if is_rank else (0, len(plan.schedule))
        device = place(config["device"], local_rank, here)
    except UserError:
        if dist.is_torchelastic_launched() and os.environ.get("RANK") != "0":
            sys.exit(2)  # rank 0 says it
        raise
    if not is_rank:
        sys.exit(launch(len(plan.schedule), config["timeout"]))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # at once and without a word: the launcher says it
    if device.type == "cuda":
        torch.cuda.set_device(device)
    sys.exit(not run_process(plan, device, config))


if __name__ == "__main__":
    sys.exit(run_main(main))
