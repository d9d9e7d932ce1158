"""What does a GPU hold, send and compute, however the GPUs divide a model and a batch?

Memory follows from what layers keep and from the rows of a schedule; times are FLOPs, simulated.
"""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from pipedream.backstage.measures import peak_versions
from pipedream.backstage.sent import in_ring, sent_in_layers, sent_to_replicas
from pipedream.schedules.plans import PLAN_CONFIG, Plan, make_plan, run_rows
from pipedream_simple import Op, UserError, count

from .measuring import Activations, Measured, activations_in_stage
from .profiles import Layer
from .search import best_partition

RECOMPUTE = "none", "layer", "stage"
NO_PIPELINE = "no pipeline"
MOST_SIMULATED = 16_384  # GPUs * microbatches
Sizes = tuple[int, int, int]  # bytes of a weight, its gradient, and the optimizer's state


class Layout(NamedTuple):
    """How GPUs divide a model and a batch."""

    replicas: int  # of all the rest; they share the batch
    tensor: int  # GPUs that share each layer
    stages: int  # of a pipeline
    zero: int  # its stage: what replicas divide
    machine: int  # GPUs that fast links join
    microbatches: int  # of the whole batch

    @property
    def each(self) -> int:
        """Microbatches of a replica."""
        return max(1, self.microbatches // self.replicas)

    @property
    def shards(self) -> int:
        """Replicas that divide. Stages 2 and 3 send for each microbatch: only inside a machine."""
        near = max(1, self.machine // self.tensor)
        if self.zero < 2 or self.replicas <= near:
            return self.replicas if self.zero else 1
        return math.gcd(self.replicas, near)

    def __str__(self) -> str:
        zero = f" with ZeRO stage {self.zero}" * (self.zero > 0)
        groups = f" in groups of {self.shards}" * (self.zero > 0 and self.shards < self.replicas)
        parts = [
            f"tensor parallelism over {self.tensor} GPUs" * (self.tensor > 1),
            f"a pipeline of {self.stages} stages" * (self.stages > 1),
            f"{self.replicas} replicas{zero}{groups}" * (self.replicas > 1),
        ]
        return ", ".join(filter(None, parts)) or "one GPU"


class Need(NamedTuple):
    """Bytes on a GPU at its fullest moment."""

    gpu: int
    weights: float
    gradients: float
    optimizer: float
    stash: float  # older versions of the weights
    activations: float  # of microbatches in flight
    working: float  # more, while a layer runs

    @property
    def total(self) -> float:
        return sum(self[1:])


class Way(NamedTuple):
    """A schedule. Of its fullest GPU the memory, by the kind of recompute; of a batch the time."""

    name: str
    needs: dict[str, Need]
    times: dict[str, float]
    sent: dict[str, list[float]]  # bytes in a batch: to replicas, inside layers, at cuts


def gigabytes(size: float) -> str:
    """72.3; of a small model 0.005."""
    return f"{size / 1e9:.1f}" if size >= 5e7 else f"{size / 1e9:.1g}"


# ------------------------------------------------------------------------------------- stages


class StageCost(NamedTuple):
    """What a stage has, and does with one microbatch."""

    layers: dict[int, Measured]  # by their numbers
    flops: dict[str, int]  # F, I and W
    activations: dict[str, Activations]  # by the kind of recompute


def cut(
    layers: list[Measured], ends: tuple[int, int], gpus: list[list[int]], even: bool
) -> list[StageCost]:
    """A stage for each number in gpus, which has the stages of each GPU.

    As even as can be; or the planner's, if its slowest GPU is faster and an even cut is not asked.
    """
    (first, last), number = ends, sum(map(len, gpus))
    blocks, cuts = len(layers) - first - last, list[list[int]]()
    if number <= blocks:
        cuts.append([first + blocks * stage // number for stage in range(1, number)])
    if not even and number <= len(layers):
        chain = [
            Layer(each.name, float(each.forward_flops), each.input_flops + each.weight_flops, 0, 0)
            for each in layers
        ]
        stages = best_partition(chain, [number], [1e18], straight=True).stages
        cuts.append([stage.first for stage in stages[1:]])
    if not cuts:
        what = f"{blocks} blocks" if even else count(len(layers), "layer")
        raise UserError(f"{what} cannot be cut into {number} stages")
    numbered = dict(enumerate(layers))
    found = []
    for bounds in cuts:
        spans = (range(*pair) for pair in pairwise([0, *bounds, len(layers)]))
        found.append([cost_of({n: numbered[n] for n in span}) for span in spans])

    def slowest(stages: list[StageCost]) -> int:
        return max(sum(sum(stages[s].flops.values()) for s in mine) for mine in gpus)

    return min(found, key=slowest)  # of two that are as fast, the even one


def cost_of(layers: dict[int, Measured]) -> StageCost:
    row = [*layers.values()]
    parts = ((each.forward_flops, each.input_flops, each.weight_flops) for each in row)
    flops = dict(zip("FIW", map(sum, zip(*parts, strict=True)), strict=True))
    kept = {kind: activations_in_stage(row, kind) for kind in RECOMPUTE}
    return StageCost(layers, flops, kept)


def parameters_on(stages: list[StageCost]) -> tuple[int, int]:
    """Of a GPU with these stages: all, and those that are trained. Tied ones count once on it."""
    here = {number: layer for stage in stages for number, layer in stage.layers.items()}
    seen, own, trained = {*here}, 0, 0
    for each in here.values():
        new = each.parameters - each.tied * (each.tied_to in seen)
        seen.add(each.tied_to)
        own, trained = own + new, trained + max(0, new - each.frozen)
    return own, trained


# ------------------------------------------------------------------------------ ways to run them


def way_of(
    name: str, layout: Layout, layers: list[Measured], ends: tuple, sizes: Sizes, even: bool
) -> Way:
    """UserError: why this schedule is impossible. ends: of Model; even: as in cut."""
    batches = {"num_microbatches": layout.each, "batch_size": layout.each, "num_batches": 2}
    settings: dict = {"schedule": "1f1b" if name == NO_PIPELINE else name, **batches}
    if name == "pipedream 2BW":
        settings |= {"schedule": "pipedream", "vertical_sync": True, "num_batches": 3}
    elif name == "pipedream 2019":
        one_each = {"num_microbatches": 1, "batch_size": 1, "num_batches": 2 * layout.stages}
        settings = {"schedule": "pipedream", **one_each}
    settings |= {"num_stages": layout.stages, "layers_per_stage": 2, "chunks_per_gpu": 2}
    plan = make_plan({**PLAN_CONFIG, **settings})
    stages = cut(layers, ends, [sorted({op.stage for op in row}) for row in plan.schedule], even)
    blocks = {n for n in range(ends[0], len(layers) - ends[1]) if layers[n].parameters}
    needs, times, sent = dict[str, Need](), dict[str, float](), dict[str, list[float]]()
    for kind in RECOMPUTE:
        per_gpu, forwards = needs_of(plan, stages, kind, sizes, layout), 1 + (kind != "none")
        needs[kind] = max(per_gpu, key=lambda need: need.total)
        if kind != "stage":  # which runs as much again as layer
            times[kind] = time_of_batch(plan, stages, forwards, layout.each)
        sent[kind] = max(sent_by(plan, stages, forwards, sizes, layout, blocks), key=sum)
    return Way(name, needs, {**times, "stage": times["layer"]}, sent)


def time_of_batch(plan: Plan, stages: list[StageCost], forwards: int, number: int) -> float:
    """The time that the second batch adds, or of pipedream, that one takes in a full pipeline.

    In units of what the FLOPs take if every GPU has as many and is never idle.
    """
    times: dict = {kind: [stage.flops[kind] for stage in stages] for kind in "FIW"}
    if forwards == 2:
        times["I"] = [f + i for f, i in zip(times["F"], times["I"], strict=True)]
    times["B"] = [i + w for i, w in zip(times["I"], times["W"], strict=True)]
    whole = sum(sum(stage.flops.values()) for stage in stages) / len(plan.schedule)
    if plan.config["schedule"] == "pipedream":  # then its slowest GPU is never idle
        return max(f + b for f, b in zip(times["F"], times["B"], strict=True)) / whole
    events, _ = run_rows(plan.schedule, plan.config, plan.pairs, {**times, "U": [0] * len(stages)})
    ends = [max(e.end for e in events if e.op.microbatch // number == batch) for batch in (0, 1)]
    return (ends[1] - ends[0]) / (whole * number)


def needs_of(
    plan: Plan, stages: list[StageCost], kind: str, sizes: Sizes, layout: Layout
) -> Iterator[Need]:
    """Of each GPU.

    Tensor parallelism divides all of it, with sequence parallelism (Korthikanti et al., 2022, eq.
    4). Norms and biases stay whole, less than 0.1 %. What ZeRO divides is in Figure 1 of its paper.
    """
    tensor, versions_of = layout.tensor, peak_versions(plan.schedule)
    for gpu, (row, versions) in enumerate(zip(plan.schedule, versions_of, strict=True)):
        own, trained = parameters_on([stages[stage] for stage in {op.stage for op in row}])
        weights, gradients, optimizer = (
            number * size / tensor / (layout.shards if layout.zero >= stage else 1)
            for number, size, stage in zip((own, trained, trained), sizes, (3, 2, 1), strict=True)
        )
        held = [stage.activations[kind] for stage in stages]
        halved = [stage.activations["none"].whole for stage in stages]
        activations, working = (each / tensor for each in fullest_moment(row, held, halved))
        stash = weights * (versions - 1)
        yield Need(gpu, weights, gradients, optimizer, stash, activations, working)


def sent_by(
    plan: Plan,
    stages: list[StageCost],
    forwards: int,
    sizes: Sizes,
    layout: Layout,
    blocks: set[int],
) -> Iterator[list[float]]:
    """Of each GPU, bytes in a batch: to replicas, inside layers (these blocks), between stages."""
    gpu_of = {op.stage: gpu for gpu, row in enumerate(plan.schedule) for op in row}
    cuts = [stage for stage in range(1, len(stages)) if gpu_of[stage] != gpu_of[stage - 1]]
    home = {n: gpu_of[number] for number, stage in enumerate(stages) for n in stage.layers}
    every = {n: layer for stage in stages for n, layer in stage.layers.items()}
    ties = [(each.tied, {home[n], home[each.tied_to]}) for n, each in every.items() if each.tied]
    for gpu in range(len(plan.schedule)):
        mine = [stages[stage] for stage in gpu_of if gpu_of[stage] == gpu]
        own, trained = parameters_on(mine)
        weights, gradients = (own if layout.zero == 3 else trained) * sizes[0], trained * sizes[1]
        near = sent_to_replicas(layout.shards, layout.zero, weights, gradients, layout.each)
        far = sent_to_replicas(layout.replicas // layout.shards, 0, 0, gradients / layout.shards)
        here = {n: layer for stage in mine for n, layer in stage.layers.items()}
        split = layout.each * sum(here[n].output for n in blocks & {*here})
        behind = [stages[cut] for cut in cuts if gpu in (gpu_of[cut - 1], gpu_of[cut])]
        sent: float = layout.each * sum(stage.layers[min(stage.layers)].input for stage in behind)
        for tied, ends in ties:  # their gradients are added up
            sent += 2 * in_ring(2, tied * sizes[1]) * (gpu in ends and len(ends) == 2)
        inside = sent_in_layers(layout.tensor, split, forwards)
        yield [(near + far) / layout.tensor, inside, sent / layout.tensor]


def fullest_moment(row: list[Op], held: list[Activations], halved: list[int]) -> tuple[int, int]:
    """Bytes of microbatches, and of the layer that runs, when there are most of both.

    A microbatch waits from its F on, and is whole in its B. From its I until its W it is halved:
    all layers have run again, and W needs what all of them kept.
    """
    now, most = 0, (0, 0)
    for stage, kind, *_ in row:
        waiting, whole, working = held[stage]
        if kind == "U":
            continue
        now += {"B": -waiting, "I": halved[stage] - waiting}.get(kind, 0)
        there = now + (whole if kind in "FB" else 0)
        most = max(most, (there, working), key=sum)
        now += {"F": waiting, "W": -halved[stage]}.get(kind, 0)
    return most
