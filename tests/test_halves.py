"""A backward in two halves: the bits and the matrix products of a whole one."""

import pytest
import torch
from pytorch import halves_of_pytorch
from small import SMALL, plan_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pipedream.schedules.halves import SplitWorker, train_plan
from pipedream_simple import Op, build_stages


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        names = "aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm"
        self.count += str(function).startswith(names)
        return function(*args, **(kwargs or {}))


class Network(nn.Module):
    """Parts with weights, and what to do with them."""

    def __init__(self, compute, **parts):
        super().__init__()
        self.compute = compute
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.compute(self, x)


def weight(*size):
    return nn.Parameter(torch.randn(size))


def twice(net, x):
    """A weight that enters the graph at two places, and one that x does not meet first."""
    x = torch.tanh(net.linear(x) * (net.scale * net.shift))
    return net.linear(x) + net.shift


def split(net, x):
    """Weights enter at a node with two outputs that are both used."""
    q, r = torch.linalg.qr(x.mT @ x + net.weight)
    return x @ q @ r


MODULES = {
    "stage": lambda: build_stages({**SMALL, "hidden_size": 6})[1],
    "mlp": lambda: nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.LayerNorm(9), nn.Linear(9, 6)),
    "transformer": lambda: nn.TransformerEncoderLayer(6, 2, 12, dropout=0.0, batch_first=True),
    "shared weights": lambda: Network(
        twice, linear=nn.Linear(6, 6), scale=weight(6), shift=weight(6)
    ),
    "lstm": lambda: Network(lambda net, x: net.lstm(x)[0], lstm=nn.LSTM(6, 6, batch_first=True)),
    "split output": lambda: Network(split, weight=weight(6, 6)),
}


def gradients_of(kinds, make_module, stage, images=5):
    """(gradient of x, gradients of the weights, products per op) of a microbatch on that stage."""
    torch.manual_seed(0)
    worker = SplitWorker(make_module(), {**SMALL, "num_microbatches": 1})
    x, gradient, labels = torch.randn(images, 4, 6), torch.randn(images, 4, 6), None
    if stage == 3:
        gradient, labels = None, torch.randint(4, (images, 6))  # 4 classes, 6 labels per image
    counts, back = [], None
    for kind in kinds:
        op = Op(stage, kind, 0, 0)
        with Products() as products:
            if kind == "F":
                worker.forward(op, x, labels)
            else:
                result = worker.backward(op, gradient)
                back = result if kind in "BI" else back
        counts.append(products.count)
    assert not worker.in_flight
    assert not worker.kept
    return back, worker.gradient, counts


@pytest.mark.parametrize("stage", [0, 1, 3], ids=["first", "middle", "last"])
@pytest.mark.parametrize("name", MODULES)
def test_the_halves_of_a_backward_are_a_whole_one_in_bits_and_products(name, stage):
    x_whole, whole, (_, of_whole) = gradients_of("FB", MODULES[name], stage)
    x_halves, halves, (forward, i, w) = gradients_of("FIW", MODULES[name], stage)
    assert (x_whole is None) == (x_halves is None) == (stage == 0)
    assert stage == 0 or x_halves.equal(x_whole)
    assert whole.keys() == halves.keys()
    assert all(halves[key].equal(gradient) for key, gradient in whole.items())
    if name in ("stage", "mlp", "transformer"):  # none twice
        assert i + w == of_whole
    if (name, stage) == ("stage", 1):  # three layers: one product for x, one for W
        assert (forward, i, w) == (3, 3, 3)


@pytest.mark.parametrize("name", ["stage", "mlp", "transformer"])
def test_the_halves_of_a_backward_give_the_bits_of_pytorchs_own_split(name):
    x_ours, ours, _ = gradients_of("FIW", MODULES[name], 1)
    torch.manual_seed(0)
    module, x, gradient = MODULES[name](), torch.randn(5, 4, 6), torch.randn(5, 4, 6)
    x_theirs, theirs = halves_of_pytorch(module, x.requires_grad_(), gradient)
    assert x_ours.equal(x_theirs)
    for (key, _), gradient in zip(module.named_parameters(), theirs, strict=True):
        assert ours[key].equal(gradient)


@pytest.mark.parametrize("schedule", ["zb-h1", "zb-h2", "interleaved-zb", "zb-v", "dualpipe-v"])
def test_zero_bubble_trains_to_the_bits_of_1f1b(schedule):
    """However the network is cut: each weight adds up its gradients in the same order."""
    sizes = {"num_stages": 3, "num_microbatches": 6, "momentum": 0.9, "layers_per_stage": 2}
    sizes |= {"batch_size": 24}
    whole, halves = (train_plan(plan_of(name, 2, **sizes)) for name in ("1f1b", schedule))
    assert whole.losses == halves.losses
    ours, theirs = ([w for stage in r.weights for w in stage.values()] for r in (halves, whole))
    assert all(map(torch.equal, ours, theirs))
    assert len(ours) == len(theirs) == 12
