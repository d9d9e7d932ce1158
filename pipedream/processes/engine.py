"""How a row runs in a process, on PyTorch's engine. A rank is the number of a process."""

import copy
from inspect import signature
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining import schedules as engines
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from pipedream.backstage.audit import leaves_of
from pipedream.backstage.storages import Storages
from pipedream.planning.clock import microbatch_size, now
from pipedream.schedules.plans import Plan
from pipedream_simple import Op, UserError, Weights, build_stages, make_batches

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
    state       of the optimizer, here the last update: it goes from version to version
    siblings    the stages of this rank, this one included: they update together
    done        what this rank has done, in order, and the version that each op read: the tensors
                tell which, not the pins
    first_microbatch    of the engine's step: the engine counts from 0 in every step, we do not
    """

    def __init__(self, stage: int, plan: Plan, device: torch.device, siblings: list, done: list):
        self.plan, self.siblings, self.done = plan, siblings, done
        self.num_microbatches = plan.config["num_microbatches"]
        # Tell the engine what comes in and goes out, or it runs an extra forward to find out. On
        # meta, where tensors have shapes but no values, that costs next to nothing.
        modules = build_stages(plan.config)
        ends = [torch.empty(microbatch_size(plan.config), 64, device="meta")]
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
        # With vertical sync a batch reads the version that stage 0 reads: it is in the row of that.
        # (In the paper it travels with the microbatch. The engine sends activations only.)
        given = self.plan.schedule[0] if self.plan.config["vertical_sync"] else []
        reads = ((op.microbatch, op.version) for op in given if op.kind == "F")
        self.pins = {m // self.num_microbatches: version for m, version in reads}
        self.gradient, self.state = Weights(), dict[str, Any]()
        self.first_microbatch, self.num_backwards, self.peak_versions = 0, 0, 0
        self.in_memory = Storages()  # one per version

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
        """W(v+1) = W(v) - learning_rate * (all gradients of the batch), or the same with momentum.

        As Worker.update does it, but into a module.
        """
        module, step = copy.deepcopy(self.versions[max(self.versions)]), self.gradient
        self.gradient = Weights()
        if mu := self.plan.config["momentum"]:
            u = self.state
            step = self.state = {name: g + mu * u.get(name, 0) for name, g in step.items()}
        for name, w in module.named_parameters():
            w.sub_(step[name], alpha=self.plan.config["learning_rate"])
        return module

    def note(self, kind: str, chunk: int, version: int) -> None:
        """Write down an op, and count the versions that are in memory now, whoever holds them."""
        self.done.append(Op(self.stage_index, kind, self.first_microbatch + chunk, version))
        self.in_memory.note(next(module.parameters()) for module in self.versions.values())
        self.peak_versions = max(self.peak_versions, len(self.in_memory))


class Recomputed(nn.Module):
    """The same module, which keeps only its input, and runs again when a backward needs the rest.

    PyTorch's checkpoint does that, on the version that the forward read: the graph holds it. The
    state of the random generators is not kept: only right as no layer here draws from them.
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
    """Raise a UserError unless this PyTorch has what make_engine needs; 2.12 is the oldest.

    Before 2.10 (no return_outputs) a step fails. Before 2.12 (no get_mesh) a stage holds on to the
    graphs of what it has sent, and so to every weight version.
    """
    runtime = getattr(engines, "_PipelineScheduleRuntime", None)
    names = {"_Action", "_add_send_recv", "_prepare_schedule_with_comms"} - {*dir(engines)}
    if names - {*dir(runtime)} or "get_mesh" not in signature(PipelineStage).parameters:
        what = f"torch {torch.__version__} does not run a schedule given as data as torch 2.12 does"
        raise UserError(f"{what}: this needs 2.12, or a newer one with the same private names")


def make_engine(plan: Plan, stages: list[VersionedStage]):
    """PyTorch's runtime for the stages of this rank, and the rows that one step of it runs."""
    in_step, in_batch = microbatches_in_step(plan), plan.config["num_microbatches"]
    rank_of = {op.stage: rank for rank, row in enumerate(plan.schedule) for op in row}
    # All steps run the same rows, each on its own microbatches. Updates are up to the stages.
    # PyTorch reads the notation that str(op) writes: 2F0 is the forward of microbatch 0 on stage 2.
    actions = {}
    for rank, row in enumerate(plan.schedule):
        ops = [op for op in row if op.kind != "U" and op.microbatch < in_step]
        actions[rank] = [engines._Action.from_str(str(op)) for op in ops]
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
    stages, done = list[VersionedStage](), list[Op]()
    for number in sorted({op.stage for op in plan.schedule[dist.get_rank()]}):
        stages.append(VersionedStage(number, plan, device, stages, done))
    engine, steps, seconds = make_engine(plan, stages), split_steps(plan, device), list[float]()
    for _ in range(num_runs):
        done.clear()
        for stage in stages:
            stage.restart()
        dist.all_reduce(torch.zeros(1))  # wait for all; on the CPU, so that gloo carries it
        start = now(device)
        losses = train_steps(engine, stages, steps)
        seconds.append(now(device) - start)
    ends = dict[int, tuple[Weights, int]]()
    for stage in stages:  # each has its last version at hand
        weights = {name: w.detach().cpu() for name, w in stage.submod.named_parameters()}
        ends[stage.stage_index] = weights, stage.peak_versions
    numbers, size = [loss.item() for loss in losses], plan.config["num_microbatches"]
    batches = [sum(numbers[k : k + size]) for k in range(0, len(numbers), size)]
    return Report(done, batches, ends, seconds)


def split_steps(plan: Plan, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """(images, labels) of each step of the engine, on the device."""
    size = microbatches_in_step(plan) * microbatch_size(plan.config)
    data = (torch.cat(part).to(device) for part in zip(*make_batches(plan.config), strict=True))
    return [*zip(*(part.split(size) for part in data), strict=True)]


def train_steps(engine, stages: list[VersionedStage], steps: list) -> list[Tensor]:
    """The whole run on this rank; the losses of all microbatches, where the last stage is."""
    losses: list[Tensor] = []
    for x, y in steps:
        images = [x] if stages[0].is_first else []  # only the last stage uses the labels
        of_step: list[Tensor] = []
        engine.step(*images, target=y, losses=of_step, return_outputs=False)
        losses += [loss.detach() for loss in of_step]
        for stage in stages:
            stage.first_microbatch += microbatches_in_step(stage.plan)
    return losses


def gather(report: T) -> list[T]:
    """The reports of all ranks on rank 0, an empty list on the others."""
    reports: Any = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(report, reports)
    return reports or []


def difference(ours: Weights, theirs: Weights) -> float:
    """The largest absolute difference; two that are both NaN do not differ."""
    pair = ([each[name].detach().flatten().cpu() for name in theirs] for each in (ours, theirs))
    a, b = map(torch.cat, pair)
    same = (a == b) | (a.isnan() & b.isnan())
    return (a - b).masked_fill(same, 0).abs().max().item()
