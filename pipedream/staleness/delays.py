"""Training with old gradients: optimizers, and the recurrence of a delay per stage.

It is what a pipeline with weight stashing computes (the tests prove it): stage s gets the gradient
of batch b at its weights of d_s updates before. No schedule, no microbatches. All learning rates
and seeds are trained at once: each weight has one more dimension, in front, that counts these runs.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn, vmap
from torch.func import functional_call, stack_module_state
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from pipedream_simple import Op, Weights, Worker, build_stages, choose_device, make_batches

# --------------------------------------------------------------------------------- optimizers
#
# gradient, what the optimizer remembers of this weight, batches so far -> direction of the step,
# for every run at once. A step is W = W - rate * direction.


def sgd(g: Tensor, state: dict, batch: int) -> Tensor:
    """The gradient itself."""
    return g


def momentum(g: Tensor, state: dict, batch: int, beta=0.9) -> Tensor:
    """The average of recent gradients: torch.optim.SGD with 1 - beta of its rate."""
    u = state["mean"] = beta * state.get("mean", 0) + (1 - beta) * g
    return u


def adam(g: Tensor, state: dict, batch: int) -> Tensor:
    """Momentum over the size of recent gradients, weight by weight (Kingma and Ba, ICLR 2015)."""
    u = momentum(g, state, batch) / (1 - 0.9 ** (batch + 1))
    v = state["squares"] = 0.999 * state.get("squares", 0) + 0.001 * g * g
    return u / ((v / (1 - 0.999 ** (batch + 1))).sqrt() + 1e-8)


def muon(g: Tensor, state: dict, batch: int, beta=0.95) -> Tensor:
    """Nesterov's momentum with all singular values close to 1; Adam for vectors (Jordan, 2024).

    Five Newton-Schulz steps do it, without a decomposition. The last factor gives the step the size
    of Adam's (Liu et al., 2025), so that one rate fits both. (Jordan leaves the first and the last
    layer to Adam, too.)
    """
    if g.ndim < 3:  # (runs, size): a bias
        return adam(g, state, batch)
    u = beta * momentum(g, state, batch, beta) + (1 - beta) * g
    x = u if g.shape[1] <= g.shape[2] else u.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (2.0315 * a @ a - 4.7750 * a) @ x
    x = x if g.shape[1] <= g.shape[2] else x.mT
    return 0.2 * max(g.shape[1:]) ** 0.5 * x


OPTIMIZERS: dict[str, tuple[Callable, list[float]]] = {  # -> (function, learning rates to try)
    "SGD": (sgd, [0.8 / 2**k for k in range(5)]),
    "momentum": (momentum, [0.8 / 2**k for k in range(5)]),
    "Adam": (adam, [0.032 / 2**k for k in range(6)]),
    "Muon": (muon, [0.032 / 2**k for k in range(5)]),
}

# ----------------------------------------------------------------------------------- training


class Training(NamedTuple):
    """What is trained, and how. Rates and seeds, of which there are several at once, come later."""

    config: dict
    delays: list[int]  # by stage: how many updates the weights are old that a forward reads
    optimizer: Callable
    stashing: bool = True  # False: backwards read the newest weights, whatever the forwards read


class StackedStage:
    """One stage of every run at once. modules: the stage of each run; rate: (runs,).

    newest    its weights after the last update, (runs, ...) each
    versions  what forwards still read, oldest first
    read      the copy that this batch's forward read. It is in the graph, and is the stash
    states    what the optimizer remembers of each weight
    """

    def __init__(self, training: Training, delay: int, rate: Tensor, modules: list[nn.Module]):
        self.training, self.delay, self.rate, self.module = training, delay, rate, modules[0]
        stacked, _ = stack_module_state(modules)
        self.newest: Weights = {name: w.detach().to(rate) for name, w in stacked.items()}
        self.versions, self.read = [self.newest], Weights()
        self.states = defaultdict[str, dict](dict)

    def forward(self, x: Tensor) -> Tensor:
        """(runs, images, size) in and out, on the weights of delay updates ago."""
        self.read = {name: w.clone().requires_grad_() for name, w in self.versions[0].items()}
        with sdpa_kernel(SDPBackend.MATH):  # vmap knows no other attention
            return vmap(partial(functional_call, self.module))(self.read, (x,))

    def update(self, gradients: Weights, batch: int) -> None:
        """A step of the newest weights, along the gradients of old ones."""
        new = Weights()
        for name, w in self.newest.items():
            direction = self.training.optimizer(gradients[name], self.states[name], batch)
            new[name] = w - self.rate.view(-1, *[1] * (w.ndim - 1)) * direction
        self.newest = new
        self.versions = [*self.versions, new][-1 - self.delay :]


def delayed_training(
    training: Training,
    rates: list[float],
    seeds: Sequence[int],
    dtype: torch.dtype = torch.float32,
    watch: Callable[[Tensor], bool] = lambda losses: False,
) -> tuple[Tensor, list[Weights]]:
    """Losses (rates, seeds, batches) of training with these delays, and each stage's last weights.

    Stage s reads version max(0, b - delays[s]) for batch b. Ends early when watch(losses) is true,
    which is asked every ten batches.
    """

    def of_runs(make: Callable[[dict], list]) -> Iterator[tuple]:
        """Stage by stage, or batch by batch, what each run gets: with each rate all seeds."""
        made = [make({**training.config, "seed": seed}) for seed in seeds]
        return zip(*made * len(rates), strict=True)

    rate = torch.tensor([rate for rate in rates for _ in seeds], dtype=dtype)
    rate = rate.to(choose_device(training.config["device"]))
    by_stage = zip(training.delays, of_runs(build_stages), strict=True)
    stages = [StackedStage(training, delay, rate, [*modules]) for delay, modules in by_stage]
    losses: list[Tensor] = []
    for batch, images in enumerate(of_runs(make_batches)):
        x, y = (torch.stack(part).to(rate.device) for part in zip(*images, strict=True))
        x = x.to(dtype)  # (runs, images, 64)
        for stage in stages:
            x = stage.forward(x)
        of_images = cross_entropy(x.flatten(0, 1), y.flatten(), reduction="none")
        loss = of_images.view(len(rate), -1).mean(1)
        losses.append(loss.detach().view(len(rates), len(seeds)))
        if not training.stashing:  # as in a pipeline with one microbatch per batch
            for stage in stages:
                for name, w in stage.read.items():
                    w.data.copy_(stage.newest[name])  # behind autograd's back, as in Worker.update
        # The runs do not meet: the gradient of the sum is that of each.
        read = [w for stage in stages for w in stage.read.values()]
        gradients = iter(torch.autograd.grad(loss.sum(), read))
        for stage in stages:
            stage.update({name: next(gradients) for name in stage.read}, batch)
        if batch % 10 == 9 and watch(torch.stack(losses, 2)):
            break
    return torch.stack(losses, 2).cpu(), [stage.newest for stage in stages]


class OptimizerWorker(Worker):
    """The trainer's Worker with another optimizer: partial(OptimizerWorker, adam)."""

    def __init__(self, optimizer: Callable, module: nn.Module, config: dict):
        super().__init__(module, config)
        self.optimizer, self.states = optimizer, defaultdict[str, dict](dict)

    def update(self, op: Op) -> None:
        for name, g in self.gradient.items():  # a stack of one run
            self.gradient[name] = self.optimizer(g[None], self.states[name], op.version)[0]
        super().update(op)


def delay_table(num_stages: int) -> dict[str, list[int]]:
    """How old are the weights: with a flush, in 2BW, in PipeDream with one microbatch per batch."""
    by_stage = [*range(num_stages)][::-1]
    return {"0": [0] * num_stages, "1": [1] * num_stages, f"{num_stages - 1} to 0": by_stage}
