#!/usr/bin/env python3
"""From simulation to real processes: the same rows, one process per GPU, on PyTorch's engine.

    python pipedream_distributed.py                       starts a process per GPU
    torchrun --nproc-per-node 4 pipedream_distributed.py  the same, by hand
    python pipedream_distributed.py --schedule zb-h1      any of the lab, or a CSV file
    python pipedream_distributed.py --num_stages 2 --hidden_size 1024 --batch_size 1024
                                                          enough work for a speed-up

CONFIG and its flags are those of pipedream_simple.py. Without effect here: forward_time,
backward_time, comm_time (time is real) and verbose. Refused: weight_stashing False, cuda:N.

Every process takes a GPU, or if there are not enough of them a share of the CPU, and runs its row
of the schedule on torch.distributed.pipelining, PyTorch's engine: that computes, sends and
receives. Then rank 0 does the same as pipedream_simple.py, on one device, and compares: the order
of all operations, the weight versions that they read, losses and weights, bit by bit; and the time
it took with the time that was simulated.

Words: a rank is the number of a process; torchrun starts them; gloo (CPU) and nccl (GPU) carry
tensors from one to another; a row is the list of operations of one GPU, schedule[rank].

This file runs twice: main() first becomes torchrun (launch), which starts it again in every
process; there main() goes on to run_process, run_rank and, on rank 0, print_results.
"""

import copy
import itertools
import logging
import math
import os
import re
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining import schedules as engines
from torch.distributed.run import main as torchrun
from torch.nn.functional import cross_entropy

from pipedream_lab import Plan, make_plan, measure_stages, now, parse_lab_config
from pipedream_simple import (
    Op,
    Run,
    UserError,
    Weights,
    batches_shown,
    build_stages,
    format_loss,
    format_table,
    is_number,
    is_whole,
    make_batches,
    make_parser,
    makespan,
    run_main,
    schedule_name,
    simulate,
    train,
)

# -------------------------------------------------------------------------------------- stage


class VersionedStage(PipelineStage):
    """PyTorch's stage knows one set of weights. This one keeps versions, as PipeDream needs them.

    A version is a module with parameters of its own. The engine works on self.submod: before every
    operation that becomes the version which it has to read. (A whole backward reads what the graph
    of its forward holds, whatever self.submod is.) An update makes a new module and leaves the old
    ones alone, so nothing changes under a graph.

    pins    batch -> the version that it reads here. A batch that is not in it is pinned by its
            first forward, to the newest version that there is by then (weight stashing)
    done    what this rank did so far, operation by operation
    first_microbatch    of the engine's step: the engine counts from 0 in every step, we do not
    """

    def __init__(
        self, stage: int, config: dict, device: torch.device, pins: dict[int, int], done: list[Op]
    ):
        self.module = build_stages(config)[stage].to(device)
        # No memory for weights: copied for each new version, which then gets its weights assigned.
        self.skeleton = copy.deepcopy(self.module).to("meta")
        self.num_microbatches = config["num_microbatches"]
        self.learning_rate = config["learning_rate"]
        self.pins_at_start, self.done = pins, done
        size = config["batch_size"] // self.num_microbatches
        matrices = [w for w in self.module.parameters() if w.dim() == 2]  # (out, in)
        width_in, width_out = matrices[0].shape[1], matrices[-1].shape[0]
        # The engine is told what comes in and goes out, or else it finds out by one more forward.
        super().__init__(
            self.module,
            stage,
            config["num_stages"],
            device,
            input_args=torch.empty(size, width_in, device=device, requires_grad=stage > 0),
            output_args=torch.empty(size, width_out, device=device, requires_grad=True),
        )
        self.reset()

    def reset(self) -> None:
        """Back to version 0, as if nothing had happened."""
        self.first_microbatch, self.backwards, self.newest, self.peak_versions = 0, 0, 0, 1
        self.versions = {0: copy.deepcopy(self.module)}
        self.pins = dict(self.pins_at_start)

    def select_version(self, kind: str, chunk: int) -> None:
        """Give the engine the weights that this operation has to read, and note it down."""
        microbatch = self.first_microbatch + chunk
        version = self.pins.setdefault(microbatch // self.num_microbatches, self.newest)
        self.submod = self.versions[version]
        self.done.append(Op(self.stage_index, kind, microbatch, version))

    # What the engine calls. It calls a microbatch a chunk; full_backward is False where a schedule
    # has the two halves of a backward, I and W, as zb-h1 does.

    def forward_one_chunk(self, fwd_chunk_id: int, *args, **kwargs):
        self.select_version("F", fwd_chunk_id)
        return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Tensor | None = None, full_backward: bool = True, **kwargs
    ) -> None:
        self.select_version("B" if full_backward else "I", bwd_chunk_id)
        super().backward_one_chunk(bwd_chunk_id, loss, full_backward, **kwargs)
        if full_backward:
            if loss is not None:  # the engine keeps the losses, their graphs would keep weights
                loss.detach_()
            self.finish_backward()

    def backward_weight_one_chunk(self, bwd_chunk_id: int, **kwargs) -> None:
        self.select_version("W", bwd_chunk_id)
        super().backward_weight_one_chunk(bwd_chunk_id, **kwargs)
        self.finish_backward()

    def finish_backward(self) -> None:
        """After the last backward of a batch: update, and forget what no batch needs any more.

        Two batches may have read one version. Their gradients do not mix: on a stage the backwards
        of a batch are all done before those of the next begin.
        """
        self.backwards += 1
        if self.backwards % self.num_microbatches == 0:
            op = self.done[-1]
            del self.pins[op.microbatch // self.num_microbatches]
            self.update(self.versions[op.version])
            self.done.append(op._replace(kind="U", version=self.newest))
            self.newest += 1
            needed = {self.newest, *self.pins.values()}
            self.versions = {v: module for v, module in self.versions.items() if v in needed}
            self.peak_versions = max(self.peak_versions, len(self.versions))

    @torch.no_grad()
    def update(self, read: nn.Module) -> None:
        """W(v+1) = W(v) - learning_rate * (all gradients of the batch, at the version it read)."""
        weights = dict(self.versions[self.newest].named_parameters())
        for name, source in read.named_parameters():
            gradient, source.grad = source.grad, None
            # Into the memory of the gradient, which nobody needs any more.
            torch.sub(weights[name], gradient, alpha=self.learning_rate, out=gradient)
            weights[name] = gradient
        new = copy.deepcopy(self.skeleton)
        new.load_state_dict(weights, assign=True)
        self.versions[self.newest + 1] = new


# ------------------------------------------------------------------------------------- engine
#
# PyTorch has a runtime that takes any schedule as data, under private names: only this room touches
# them. Its public classes (ScheduleGPipe, Schedule1F1B ...) know one schedule each.


def check_engine() -> None:
    """Raise a UserError unless this PyTorch has what make_engine needs."""
    runtime = getattr(engines, "_PipelineScheduleRuntime", None)
    found = [hasattr(engines, "_Action"), hasattr(engines, "_add_send_recv")]
    found += [hasattr(runtime, "_prepare_schedule_with_comms")]
    # A TorchVersion: "2.9" < "2.13". Torch 2.9 has the names, but fails on gloo.
    if not all(found) or torch.__version__ < "2.13":
        raise UserError(
            f"torch {torch.__version__} does not run a schedule given as data as torch 2.13 does: "
            "this needs 2.13, or a newer one that still has the same private names"
        )


def make_engine(plan: Plan, stages: list[VersionedStage]):
    """PyTorch's runtime for the stages of this rank, and the rows that one step of it runs."""
    in_step, in_batch = microbatches_in_step(plan), plan.config["num_microbatches"]
    rank_of = {op.stage: rank for rank, row in enumerate(plan.schedule) for op in row}
    # All steps run the same rows, each on its own microbatches. Updates are the stage's own affair.
    # PyTorch reads the notation that str(op) writes: 2F0 is forward of microbatch 0 on stage 2.
    actions = {
        rank: [
            engines._Action.from_str(str(op))
            for op in row
            if op.kind != "U" and op.microbatch < in_step
        ]
        for rank, row in enumerate(plan.schedule)
    }
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
    count, num_batches = plan.config["num_microbatches"], plan.config["num_batches"]
    return count * num_batches if plan.config["schedule"] == "pipedream" else count


# ------------------------------------------------------------------------ one process of many


class Report(NamedTuple):
    """What a rank has to tell at the end."""

    done: list[Op]  # what it ran, in order
    losses: list[float]  # of the microbatches, from the rank that has the last stage
    weights: dict[int, Weights]  # stage -> after the last update
    peak_versions: dict[int, int]  # stage -> the most versions alive at once
    seconds: list[float]  # of each run


def run_rank(plan: Plan, device: torch.device, num_runs: int = 1) -> Report:
    """Train on this rank's row of the schedule; several times, each from the start, to time it."""
    config, row = plan.config, plan.schedule[dist.get_rank()]
    done: list[Op] = []
    mine = sorted({op.stage for op in row})
    stages = [VersionedStage(stage, config, device, given_pins(plan), done) for stage in mine]
    engine = make_engine(plan, stages)
    xs, ys = zip(*make_batches(config), strict=True)
    x, y = torch.cat(xs).to(device), torch.cat(ys).to(device)
    images_in_step = microbatches_in_step(plan) * config["batch_size"] // config["num_microbatches"]
    seconds = []
    for _ in range(num_runs):
        losses: list[Tensor] = []
        done.clear()
        for stage in stages:
            stage.reset()
        meet()
        start = now(device)
        for x_part, y_part in zip(x.split(images_in_step), y.split(images_in_step), strict=True):
            images = [x_part] if stages[0].is_first else []  # the labels serve the last stage only
            of_step: list[Tensor] = []
            engine.step(*images, target=y_part, losses=of_step, return_outputs=False)
            losses += [loss.detach() for loss in of_step]
            for stage in stages:
                stage.first_microbatch += microbatches_in_step(plan)
        seconds.append(now(device) - start)
    return Report(
        list(done),
        [loss.item() for loss in losses],
        {stage.stage_index: weights_on_cpu(stage.versions[stage.newest]) for stage in stages},
        {stage.stage_index: stage.peak_versions for stage in stages},
        seconds,
    )


def given_pins(plan: Plan) -> dict[int, int]:
    """With vertical sync: batch -> the version that stage 0 reads, from its row; else nothing.

    (In the paper the number travels with the microbatch. The engine sends activations only.)
    """
    if not plan.config["vertical_sync"]:
        return {}
    forwards = (op for op in plan.schedule[0] if op.kind == "F")
    return {op.microbatch // plan.config["num_microbatches"]: op.version for op in forwards}


def weights_on_cpu(module: nn.Module) -> Weights:
    return {name: w.detach().cpu() for name, w in module.named_parameters()}


def meet() -> None:
    """Wait until all ranks are here: a sum over all, on the CPU, so that gloo carries it."""
    dist.all_reduce(torch.zeros(1))


def gather(report: Report) -> list[Report]:
    """The reports of all ranks on rank 0, an empty list on the others."""
    reports = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(report, reports)
    return reports or []


def as_run(reports: list[Report], plan: Plan) -> Run:
    """What all ranks did together, in the form in which the simulation tells what it did."""
    count, num_batches = plan.config["num_microbatches"], plan.config["num_batches"]
    losses = [loss for report in reports for loss in report.losses]
    weights = {stage: w for report in reports for stage, w in report.weights.items()}
    peaks = {stage: peak for report in reports for stage, peak in report.peak_versions.items()}
    done = [op for report in reports for op in report.done]
    updates = Counter(op.stage for op in done if op.kind == "U")
    return Run(
        losses=[sum(losses[b * count : (b + 1) * count]) for b in range(num_batches)],
        newest=[updates[stage] for stage in sorted(weights)],
        peak_versions=[peak for _, peak in sorted(peaks.items())],
        versions_read={op[:3]: op.version for op in done if op.kind != "U"},
        weights=[w for _, w in sorted(weights.items())],
    )


# -------------------------------------------------------------------------------------- proof


class Proof(NamedTuple):
    """What the ranks did beside what pipedream_simple.py does with the same rows on one device."""

    in_order: int  # operations that stand where the schedule has them, with the version it has
    num_ops: int
    same_versions: int  # forwards and backwards that read the same version
    num_read: int
    peaks: list[int]  # the most versions alive at once, stage by stage
    expected_peaks: list[int]
    of_losses: float  # largest difference
    of_weights: list[float]  # largest difference, stage by stage
    moved: list[float]  # how far the training moved a weight, at most, stage by stage

    def holds(self) -> bool:
        """Order and versions are the same, and so are losses and weights, but for rounding.

        For weights that is a thousandth of the way that they have gone.
        """
        counts = self.in_order == self.num_ops and self.same_versions == self.num_read
        weights = zip(self.of_weights, self.moved, strict=True)
        close = all(off == 0 or off <= 1e-3 * moved for off, moved in weights)
        return counts and self.peaks == self.expected_peaks and close and self.of_losses < 1e-4


def prove(reports: list[Report], plan: Plan, device: torch.device) -> Proof:
    """Do it again on one device, and compare."""
    real = as_run(reports, plan)
    alone = train({**plan.config, "device": str(device)}, schedule=plan.schedule)
    rows = zip((report.done for report in reports), plan.schedule, strict=True)
    in_order = [a == b for did, row in rows for a, b in itertools.zip_longest(did, row)]
    read = alone.versions_read
    expected = [{name: w.detach().cpu() for name, w in stage.items()} for stage in alone.weights]
    at_start = [weights_on_cpu(stage) for stage in build_stages(plan.config)]
    return Proof(
        in_order=sum(in_order),
        num_ops=len(in_order),
        same_versions=sum(real.versions_read.get(op) == read[op] for op in read),
        num_read=len(read),
        peaks=real.peak_versions,
        expected_peaks=alone.peak_versions,
        of_losses=difference(*(torch.tensor(run.losses) for run in (real, alone))),
        of_weights=list(map(largest_difference, real.weights, expected)),
        moved=list(map(largest_difference, at_start, expected)),
    )


def largest_difference(ours: Weights, theirs: Weights) -> float:
    """Between two states of a stage."""
    return max(difference(ours[name], theirs[name]) for name in theirs)


def format_proof(proof: Proof) -> str:
    """The verdict, and all that it rests on."""
    exact = not any((proof.of_losses, *proof.of_weights))
    verdict = "✅ THE SAME AS pipedream_simple.py" + (
        ", TO THE BIT" if exact else ", BUT FOR ROUNDING"
    )
    if not proof.holds():
        verdict = "❌ NOT THE SAME AS pipedream_simple.py"
    peaks = " ".join(map(str, proof.peaks))
    peaks += (
        " (the same)" if proof.peaks == proof.expected_peaks else f" NOT {proof.expected_peaks}"
    )
    table = [
        ["operations in the order of the schedule", f"{proof.in_order} of {proof.num_ops}"],
        ["forwards and backwards on its versions", f"{proof.same_versions} of {proof.num_read}"],
        ["most weight versions alive, each stage", peaks],
        ["largest difference of a loss", f"{proof.of_losses:.1g}"],
        [
            "largest difference of a weight, each stage",
            " ".join(f"{d:.1g}" for d in proof.of_weights),
        ],
    ]
    return "\n".join([verdict, *format_table(table)])


def difference(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference; 0 only if all bits are equal."""
    if a.numpy().tobytes() == b.numpy().tobytes():
        return 0.0
    return (a - b).abs().max().item() or math.ulp(0)  # 0.0 and -0.0 differ by the least there is


# -------------------------------------------------------------------------------------- clock


def one_process(config: dict, num_runs: int) -> list[float]:
    """Seconds for plain training on the same batches: one process, no pipeline."""
    device = torch.device(config["device"])
    network = nn.Sequential(*build_stages(config)).to(device)
    optimizer = torch.optim.SGD(network.parameters(), lr=config["learning_rate"])
    count = config["num_microbatches"]
    data = [(x.to(device).chunk(count), y.to(device).chunk(count)) for x, y in make_batches(config)]
    seconds = []
    for _ in range(num_runs):
        start = now(device)
        for parts in data:
            for x, y in zip(*parts, strict=True):
                (cross_entropy(network(x), y) / count).backward()
            optimizer.step()
            optimizer.zero_grad()
        seconds.append(now(device) - start)
    return seconds


def simulated_time(plan: Plan, forward: list[float], backward: list[float]) -> float:
    """The time of a batch, when a forward and a backward take so long on each stage."""
    measured = {"forward_time": forward, "backward_time": backward, "comm_time": 0}
    events = simulate(plan.schedule, {**plan.config, **measured})
    return makespan(events) / plan.config["num_batches"]


def format_clock(reports: list[Report], plan: Plan, device: torch.device) -> str:
    """The time of a batch: of the run, of plain training, and simulated. Each with its speed-up."""
    num_batches, processes = plan.config["num_batches"], len(reports)
    runs = [max(took) for took in zip(*(report.seconds for report in reports), strict=True)][1:]
    config = {**plan.config, "device": str(device)}
    plain = one_process(config, len(runs) + 1)[1:]
    times = measure_stages(config)
    simulated = simulated_time(plan, *times)
    one_by_one = config["num_microbatches"] * sum(map(sum, times))
    one, real = (1000 * statistics.median(took) / num_batches for took in (plain, runs))
    lowest, highest = (1000 * took / num_batches for took in (min(runs), max(runs)))
    spread = f" ({lowest:.4g} to {highest:.4g})" if len(runs) > 1 else ""
    table = [
        ["", "ms a batch", "speed-up"],
        ["plain training, 1 process", f"{one:.4g}", "1.00x"],
        [f"the pipeline, {count(processes)}", f"{real:.4g}{spread}", f"{one / real:.2f}x"],
        ["simulated, 1 process", f"{one_by_one:.4g}", "1.00x"],
        [f"simulated, {count(processes)}", f"{simulated:.4g}", f"{one_by_one / simulated:.2f}x"],
    ]
    runs_are = f"median of {len(runs)} (lowest to highest)" if spread else "one run"
    lines = [
        *format_table(table),
        f"   Real: time of a run / batches, {runs_are}.",
        "   Simulated: from each stage's forward and backward, measured while nothing",
        "   else ran; without sending, updates, and the engine's work for each operation.",
    ]
    cores = num_cores() if device.type == "cpu" else processes
    if cores < processes:
        lines.append(
            f"   {processes} processes share {cores} core{'s' * (cores > 1)} and take turns:"
        )
        lines.append(f"   the simulated speed-up cannot show, only up to {cores}x.")
    if real > 2 * max(simulated, one_by_one / cores) and config["hidden_size"] < 1024:
        lines.append("   Operations are so small here that these three take most of the time.")
        lines.append("   They weigh less in larger ones: --hidden_size 1024 --batch_size 1024")
    return "\n".join(lines)


def count(processes: int) -> str:
    return f"{processes} process" + "es" * (processes > 1)


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ------------------------------------------------------------------------------------- faults
#
# When a rank dies or hangs, a second waits for it, a third for the second, and none of them knows
# where this ends. So every rank that gives up notes that down in the store (a small server of keys
# and values, which torchrun runs for the ranks), and the one that notes nothing is to blame.

LOST = re.compile("gloo|NCCL|timed? ?out|connection|socket", re.IGNORECASE)  # in a RuntimeError


class Watch:
    """Ends the job, and says which rank is to blame, when a rank does not answer any more.

    timeout     seconds, for all of it: two thirds for a rank to wait for another one, one third for
                all others to give up too
    """

    def __init__(self, rank: int, world_size: int, timeout: float):
        self.rank, self.world_size, self.timeout = rank, world_size, timeout
        self.patience = timedelta(seconds=timeout * 2 / 3)
        try:
            self.store, *_ = next(dist.rendezvous("env://", timeout=self.patience))
        except (ValueError, RuntimeError) as error:  # not told where to meet, or nobody came
            raise UserError(f"rank {rank} does not find the others: {error}") from None

    @contextmanager
    def blaming(self) -> Iterator[None]:
        """What is done inside waits for other ranks: where that is in vain, find out for whom."""
        try:
            yield
        except Exception as error:
            if isinstance(error, RuntimeError) and LOST.search(str(error)):
                self.give_up(str(error))
            self.store.set("failed", "")  # by itself, and says why: no need to wonder
            raise

    def give_up(self, error: str) -> NoReturn:
        """Note down that this rank waits in vain, see who else does not, and end the job."""
        deadline = time.monotonic() + self.timeout / 3
        ranks = range(self.world_size)
        try:
            self.store.set(f"gave up {self.rank}", "")
            while True:
                silent = [rank for rank in ranks if not self.store.check([f"gave up {rank}"])]
                failed = self.store.check(["failed"])
                if failed or len(silent) <= 1 or time.monotonic() > deadline:
                    break
                time.sleep(0.05)
            if self.rank == min({*ranks} - {*silent}) and not failed:  # one speaks for all
                self.end(silent, error)
            else:
                time.sleep(1)  # torchrun ends this process when that one has spoken
        except RuntimeError:  # the store is gone too
            print(f"rank {self.rank}: the others are gone: {error}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)  # at once, whatever other threads wait for

    def end(self, silent: list[int], error: str) -> None:
        """Name the silent ranks, and kill them: torchrun's SIGTERM does not end a stopped one."""
        ranks = " and ".join(f"rank {rank}" for rank in silent)
        why = f"{ranks} did not answer within --timeout {self.timeout:g} s: stopped, stuck or slow"
        if not re.search("timed? ?out", error, re.IGNORECASE):
            why = f"lost {ranks}"
        why = why if silent else " ".join(f"rank {self.rank}: {error}".split())
        print(f"{Path(__file__).name}: {why}; the job ends", file=sys.stderr)
        for pid in itertools.chain(*map(processes_of, silent)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def keep_meeting(self, finished: threading.Event | None) -> None:
        """All ranks meet again and again until rank 0 has finished: whoever fails is noticed."""
        with self.blaming():
            over = torch.zeros(1)
            while not over:
                if finished:  # rank 0: time between two meetings
                    over += finished.wait(self.timeout / 20)
                dist.all_reduce(over)

    @contextmanager
    def others_waiting(self) -> Iterator[None]:
        """Inside, rank 0 works alone. A thread meets the others meanwhile."""
        finished = threading.Event()
        meeting = threading.Thread(target=self.keep_meeting, args=[finished], daemon=True)
        meeting.start()
        try:
            yield
        finally:
            finished.set()
            meeting.join()


def processes_of(rank: int) -> Iterator[int]:
    """The processes of a rank of this job on this machine; on Linux only.

    Elsewhere a stopped process ends some 30 seconds later, when torchrun loses patience with it.
    """
    job = {f"{name}={os.environ.get(name)}" for name in ("MASTER_ADDR", "MASTER_PORT")}
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # not ours, or it has just ended
            if job | {f"RANK={rank}"} <= {*path.read_text(errors="replace").split("\0")}:
                yield int(path.parent.name)


def end_with(parent: int) -> None:
    """End this process when torchrun has gone: nobody else would, if it hung."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


# --------------------------------------------------------------------------------------- main

MAX_PROCESSES = 16  # that this program starts by itself
TIMEOUT, REPEATS = 60, 3


def place(config: dict, local_rank: int, processes_here: int) -> torch.device:
    """The device of a rank: a GPU of its own, if every process on this machine can have one."""
    name, num_gpus = config["device"], torch.cuda.device_count()
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"device={name!r} is one GPU, and every process needs its own: try cuda")
    if name == "cuda" and num_gpus < processes_here:
        raise UserError(
            f"device='cuda': {processes_here} processes need a GPU each, torch finds {num_gpus}: "
            "try cpu"
        )
    if name == "cpu" or num_gpus < processes_here:
        return torch.device("cpu")
    return torch.device("cuda", local_rank)


def checked_plan(config: dict, chunks_per_gpu: int, timeout: float, repeats: int) -> Plan:
    """The plan, or a UserError for what can be known to fail before a process group is made."""
    if not is_number(timeout) or not 1 <= timeout <= 86400:
        raise UserError(f"timeout={timeout!r} must be a number of seconds, 1 to 86,400")
    if not is_whole(repeats, 1, 1000):
        raise UserError(f"repeats={repeats!r} must be a whole number, 1 to 1,000")
    if not config["weight_stashing"]:
        raise UserError(
            "weight_stashing=False is only for the simulation: PyTorch does not let weights change "
            "under a graph"
        )
    if not dist.is_available() or not dist.is_gloo_available():
        raise UserError("this PyTorch has no gloo, through which the processes would talk")
    check_engine()
    plan = make_plan(config, chunks_per_gpu)
    ops = (op for row in plan.schedule for op in row)
    forwards = [op for op in ops if op.kind == "F" and op.stage == plan.config["num_stages"] - 1]
    for before, op in itertools.pairwise(forwards):
        if before.microbatch > op.microbatch:  # PyTorch numbers the losses in the order they come
            raise UserError(
                f"{plan.name}: {before} stands before {op}, but PyTorch's engine needs the "
                "forwards of the last stage in order"
            )
    return plan


def check_world_size(plan: Plan, world_size: int) -> None:
    """Raise a UserError unless there are as many processes as the schedule has rows."""
    needed = len(plan.schedule)
    if not 0 <= from_torchrun("RANK") < world_size:
        raise UserError(f"RANK={os.environ['RANK']} is not one of WORLD_SIZE={world_size} ranks")
    if world_size != needed:
        raise UserError(
            f"WORLD_SIZE={world_size}, but the schedule {plan.name} is for {needed} processes: try "
            f"torchrun --nproc-per-node {needed}"
        )


def from_torchrun(name: str) -> int:
    """What torchrun tells a process by its environment."""
    try:
        return int(os.environ[name])
    except (KeyError, ValueError):
        raise UserError(
            f"RANK is set, but {name} is not a number: start with torchrun, or unset RANK"
        ) from None


def launch(num_processes: int) -> None:
    """Do what torchrun does: start this file in so many processes, end all of them if one fails."""
    if num_processes > MAX_PROCESSES:
        raise UserError(
            f"{num_processes} processes are more than the {MAX_PROCESSES} that this starts by "
            f"itself: try torchrun --nproc-per-node {num_processes}"
        )
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # if the job fails, one line says why
    print(f"Starting {count(num_processes)}, which takes some seconds ...", flush=True)
    try:
        with tempfile.TemporaryDirectory() as logs:  # torchrun would leave one behind
            flags = ["--standalone", f"--nproc-per-node={num_processes}", f"--log-dir={logs}"]
            torchrun([*flags, __file__, *sys.argv[1:]])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            how = signal.Signals(-failure.exitcode).name
            print(f"{Path(__file__).name}: rank {rank} was ended by {how}", file=sys.stderr)
        sys.exit(1)
    except SignalException:
        raise KeyboardInterrupt from None


def describe(device: torch.device) -> str:
    """What the processes run on, and talk through."""
    if device.type == "cuda":
        return f"a GPU each, {torch.cuda.get_device_name(device)}; nccl"
    cores, threads = num_cores(), torch.get_num_threads()
    plural = "s" * (cores > 1), "s" * (threads > 1)
    return f"{cores} core{plural[0]}, {threads} thread{plural[1]} a process; gloo"


def format_start(plan: Plan, device: torch.device) -> str:
    """What is about to run, and on what."""
    name, keeps = schedule_name(plan.config)
    processes = len(plan.schedule)
    return f"""\
🚀 {name} on {count(processes)}, real ones ({describe(device)})
Engine: torch.distributed.pipelining of torch {torch.__version__}
Pipeline stages: {plan.config["num_stages"]}
Microbatches: {plan.config["num_microbatches"]} in a batch
Schedule: {plan.name} ({keeps})
"""


def run_process(plan: Plan, device: torch.device, timeout: float, repeats: int) -> None:
    """One process of many, from the first handshake to the end."""
    rank, world_size = from_torchrun("RANK"), from_torchrun("WORLD_SIZE")
    watch = Watch(rank, world_size, timeout)
    if rank == 0:
        say(format_start(plan, device))
    with watch.blaming():
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        group = {"store": watch.store, "rank": rank, "world_size": world_size}
        dist.init_process_group(backend, **group, timeout=watch.patience)
        reports = gather(run_rank(plan, device, num_runs=1 + repeats))
    holds = True
    if rank > 0:
        watch.keep_meeting(None)
    else:
        with watch.others_waiting():
            holds = print_results(reports, plan, device)
    dist.destroy_process_group()
    if not holds:
        sys.exit(1)


def print_results(reports: list[Report], plan: Plan, device: torch.device) -> bool:
    """Print what came out; does the proof hold?"""
    run, num_batches = as_run(reports, plan), plan.config["num_batches"]
    losses = (f"- {format_loss(batch, run)}" for batch in batches_shown(num_batches))
    say("\n".join([f"Training results ({num_batches} batches):", *losses]))
    proof = prove(reports, plan, device)
    say("\n" + format_proof(proof))
    say(f"\n📊 REAL AND SIMULATED TIME ({describe(device)})\n{format_clock(reports, plan, device)}")
    return proof.holds()


def say(text: str) -> None:
    """Print; where nobody reads any more (| head), go on in silence: the other ranks wait."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main() -> None:
    parser = make_parser(__doc__)
    says = "seconds after which the job ends when a rank dies or hangs; a third of that is what an "
    says += f"operation may take (now {TIMEOUT})"
    parser.add_argument("--timeout", type=float, default=TIMEOUT, metavar="X", help=says)
    says = f"timed runs, after one to warm up; the results are of the last (now {REPEATS})"
    parser.add_argument("--repeats", type=int, default=REPEATS, metavar="X", help=says)
    logging.disable()  # when a rank fails, PyTorch would print the whole schedule
    is_rank = "RANK" in os.environ  # started by torchrun
    try:
        config, chunks, other = parse_lab_config(parser)
        plan = checked_plan(config, chunks, other["timeout"], other["repeats"])
        if is_rank:
            check_world_size(plan, from_torchrun("WORLD_SIZE"))
        processes_here = from_torchrun("LOCAL_WORLD_SIZE") if is_rank else len(plan.schedule)
        device = place(config, from_torchrun("LOCAL_RANK") if is_rank else 0, processes_here)
    except UserError:
        if dist.is_torchelastic_launched() and from_torchrun("RANK") > 0:
            sys.exit(2)  # rank 0 says it
        raise
    if not is_rank:
        return launch(len(plan.schedule))
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # at once and without a word: torchrun says it
    if dist.is_torchelastic_launched():
        threading.Thread(target=end_with, args=[os.getppid()], daemon=True).start()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    run_process(plan, device, other["timeout"], other["repeats"])


if __name__ == "__main__":
    sys.exit(run_main(main))
