"""How much memory does a GPU need? Bytes that exist, counted in a run, and a formula for them."""

import itertools
from typing import NamedTuple

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from pipedream.backstage.measures import peak_versions
from pipedream.backstage.storages import Storages
from pipedream.schedules.halves import SplitWorker
from pipedream.schedules.plans import Plan
from pipedream_simple import Op, Residual, Run, Schedule, Worker, build_stages, train


class Bytes(NamedTuple):
    """What a GPU holds, each at its own peak over the run."""

    weights: int  # of all versions that exist
    activations: int  # kept for the backwards to come; with gradients kept by I for W
    gradients: int  # of the weights, for the batch so far
    velocities: int = 0  # of the weights, with momentum


class MeteredWorker(SplitWorker):
    """Sends and receives copies, as a GPU does. Here they would share one tensor."""

    def forward(self, op: Op, x: Tensor, labels: Tensor | None = None) -> Tensor:
        labels = None if labels is None else labels.clone()
        return super().forward(op, x.clone(), labels).clone()


class MemoryMeter:
    """Counts bytes that exist: after every op, the storages of each GPU that are still alive.

    With recompute it also counts between a forward's second run and the backward.

    A storage counts until the last tensor that uses it is gone, whoever holds that. PyTorch's hooks
    tell about tensors that autograd saves for a backward.
    """

    def __init__(self, schedule: Schedule):
        self.device_of = {op.stage: device for device, row in enumerate(schedule) for op in row}
        self.alive = [[Storages() for _ in Bytes._fields] for _ in schedule]
        self.saved = Storages()  # by the op that runs
        self.peak = [Bytes(0, 0, 0) for _ in schedule]

    def train(self, plan: Plan) -> Run:
        def note(tensor: Tensor) -> Tensor:
            self.saved.note([tensor])
            return tensor.detach()  # with its graph it would keep itself alive

        with saved_tensors_hooks(note, lambda tensor: tensor):
            return train(plan.config, watch=self, events=plan.events, worker_class=MeteredWorker)

    def __call__(self, op: Op, worker: Worker) -> None:
        assert isinstance(worker, SplitWorker)
        device = self.device_of[op.stage]
        weights, activations, gradients, velocities = self.alive[device]
        weights.note(w for version in worker.versions.values() for w in version.values())
        gradients.note(worker.gradient.values())
        velocities.note(worker.velocity.values())
        for x, output, _ in worker.in_flight.values():
            activations.note([x] if output is None else [x, output])
        activations.note(arrived for _, kept in worker.kept.values() for _, arrived, _ in kept)
        activations |= self.saved
        activations -= weights  # a Linear saves its weights, too
        self.saved.clear()
        held = (storages.nbytes for storages in self.alive[device])
        self.peak[device] = Bytes(*map(max, self.peak[device], held))


class StageBytes(NamedTuple):
    """What a stage keeps, in bytes, from the shapes of its layers in the residual network."""

    weights: int  # a version
    x: int  # the input of a microbatch
    graph: int  # all that its forward leaves, x included
    halfway: int  # what is left of that between I and W, with the gradients that I keeps for W


def stage_bytes(layers: list[nn.Module], images: int, is_last: bool) -> StageBytes:
    """In float32, for a microbatch of so many images.

    A Linear saves its input, tanh its output, and the loss its log-probabilities, its labels and
    the sum of their weights. Between I and W the graph stays up to the last Linear, with a gradient
    for the output of each.
    """
    linears: list = [getattr(layer, "linear", layer) for layer in layers]
    inputs, outputs = [w.in_features for w in linears], [w.out_features for w in linears]
    tanhs = [isinstance(layers[i], Residual) * size for i, size in enumerate(outputs)]
    loss = 8 * images + 4 + 4 if is_last else 0
    return StageBytes(
        weights=4 * sum(w.weight.numel() + w.bias.numel() for w in linears),
        x=4 * images * inputs[0],
        graph=4 * images * (sum(inputs) + sum(tanhs) + outputs[-1]) + loss,
        halfway=4 * images * (sum(inputs) + sum(tanhs[:-1]) + sum(outputs)),
    )


def changes(stage: StageBytes, recompute: bool) -> dict[str, list[int]]:
    """What an op of each kind adds to the activations, step by step.

    With recompute a forward keeps x, and the backward begins with R, its second run: the rest.
    """
    by_f = stage.x if recompute else stage.graph
    by_r = stage.graph - by_f
    halves = {"I": [by_r, stage.halfway - stage.graph], "W": [-stage.halfway]}
    return {"F": [by_f], "B": [by_r, -stage.graph], **halves, "U": [0]}


def memory_formula(plan: Plan) -> list[Bytes]:
    """What the meter should find, from rows and shapes alone, in the residual network."""
    config = plan.config
    images = config["batch_size"] // config["num_microbatches"]
    modules = [[*stage.children()] for stage in build_stages(config)]
    stages = [stage_bytes(layers, images, layers is modules[-1]) for layers in modules]
    by_op = [changes(stage, config["recompute"]) for stage in stages]
    peaks = []
    for row, versions in zip(plan.schedule, peak_versions(plan.schedule), strict=True):
        one = sum(stages[stage].weights for stage in {op.stage for op in row})
        held = itertools.accumulate(c for op in row for c in by_op[op.stage][op.kind])
        peaks.append(Bytes(one * versions, max(held), one, one if config["momentum"] else 0))
    return peaks
