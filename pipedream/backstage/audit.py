"""What a run really used: watch training from outside, and believe the tensors only."""

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector

from pipedream_simple import Op, Step, Weights, Worker, build_stages, choose_device, split_batches

from .storages import Storages


class VersionCount:
    """How many weight versions exist at once? Give this to train as watch.

    It counts storages, one per version: a version that was deleted may live on elsewhere.

    peak    per stage, the most so far
    """

    def __init__(self) -> None:
        self.alive: dict[int, Storages] = {}
        self.most: dict[int, int] = {}

    def __call__(self, op: Op, worker: Worker) -> None:
        alive = self.alive.setdefault(op.stage, Storages())
        alive.note(next(iter(weights.values())) for weights in worker.versions.values())
        self.most[op.stage] = max(self.most.get(op.stage, 0), len(alive))

    @property
    def peak(self) -> list[int]:
        return [self.most[stage] for stage in sorted(self.most)]


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
        self.copies: dict[tuple[int, int], Weights] = {}  # (stage, microbatch) -> weights
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
        if kind in ("B", "I"):
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
                output = cross_entropy(output, labels) / worker.config["num_microbatches"]
            self.true_output[microbatch], self.copies[stage, microbatch] = output, copy
        elif kind in ("B", "W"):
            copies, output = self.copies.pop((stage, microbatch)), self.true_output[microbatch]
            gradients = torch.autograd.grad(output, [*copies.values()], retain_graph=True)
            true = parameters_to_vector(gradients)
            summed = parameters_to_vector([worker.gradient[name] for name in copies])
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
