"""How is a backward cut in two? I, the gradient of the input, and W, of the weights."""

import itertools
from collections import Counter

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from pipedream.schedules.plans import Plan
from pipedream_simple import Op, Run, Weights, Worker, train


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

    One that enters more than once is its own entry: the paths to it overlap, so all of them are
    for I.
    """
    behind = names_behind(output, {id(w): name for name, w in weights.items()})
    uses = Counter(itertools.chain.from_iterable(behind.values()))
    entries = {edge: [n for n in names if uses[n] == 1] for edge, names in behind.items()}
    entries |= {get_gradient_edge(weights[name]): [name] for name in uses if uses[name] > 1}
    return {edge: names for edge, names in entries.items() if names}


def names_behind(output: Tensor, name_of: dict[int, str]) -> dict[GradientEdge, list[str]]:
    """Every edge of output's graph -> the weights that enter right behind it."""
    behind: dict[GradientEdge, list[str]] = {}
    todo = [get_gradient_edge(output)]
    while todo:
        edge = todo.pop()
        if edge in behind:
            continue
        behind[edge] = []
        for node, number in edge.node.next_functions:
            if name := name_of.get(id(leaf_behind(node))):
                behind[edge].append(name)
            elif node is not None:
                todo.append(GradientEdge(node, number))
    return behind


def leaf_behind(node: Node | None) -> Tensor | None:
    """The leaf in which a chain of nodes ends, if each of them has no other input.

    A weight may enter through such a chain, for example through the transpose in a Linear.
    """
    while node is not None and len(node.next_functions) == 1:
        node = node.next_functions[0][0]
    return getattr(node, "variable", None)


def train_plan(plan: Plan, dtype: torch.dtype = torch.float32, **settings) -> Run:
    """Train on the plan's schedule. settings: as of train, such as watch."""
    return train(plan.config, dtype, events=plan.events, worker_class=SplitWorker, **settings)
