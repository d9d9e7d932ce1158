"""Training with old gradients: optimizers, remedies, and the recurrence of a delay per stage.

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
from torch.nn.functional import cross_entropy

from pipedream_simple import Op, Weights, Worker, build_stages, choose_device, make_batches

# --------------------------------------------------------------------------------- optimizers
#
# gradient, what the optimizer remembers of this weight, batches so far -> direction of the step,
# for every run at once. A step is W = W - rate * direction. With look_ahead the direction also
# contains the share of the next step that is known already: Nesterov's momentum.


def sgd(g: Tensor, state: dict, batch: int, beta=0.9, look_ahead=False) -> Tensor:
    """The gradient itself. The average of recent ones is kept for remedies that need a trend."""
    state["trend"] = beta * state.get("trend", 0) + (1 - beta) * g
    return g


def momentum(g: Tensor, state: dict, batch: int, beta=0.9, look_ahead=False) -> Tensor:
    """The average of recent gradients: torch.optim.SGD with 1 - beta of its rate."""
    u = state["trend"] = beta * state.get("trend", 0) + (1 - beta) * g
    return beta * u + (1 - beta) * g if look_ahead else u


def adam(g: Tensor, state: dict, batch: int, beta=0.9, look_ahead=False) -> Tensor:
    """Momentum over the size of recent gradients, weight by weight (Kingma and Ba, ICLR 2015)."""
    u = momentum(g, state.setdefault("momentum", {}), batch, beta, look_ahead)
    u = u / (1 - beta ** (batch + 1))
    v = state["squares"] = 0.999 * state.get("squares", 0) + 0.001 * g * g
    state["trend"] = u / ((v / (1 - 0.999 ** (batch + 1))).sqrt() + 1e-8)
    return state["trend"]


def muon(g: Tensor, state: dict, batch: int, beta=0.95, look_ahead=True) -> Tensor:
    """Momentum with all singular values close to 1; Adam for vectors (Jordan, 2024).

    Five Newton-Schulz steps do it, without a decomposition. The last factor gives the step the size
    of Adam's (Liu et al., 2025), so that one rate fits both. (Jordan leaves the first and the last
    layer to Adam, too.)
    """
    if g.ndim < 3:  # (runs, size): a bias
        return adam(g, state, batch)
    u = momentum(g, state.setdefault("momentum", {}), batch, beta, look_ahead)
    x = u if g.shape[1] <= g.shape[2] else u.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (2.0315 * a @ a - 4.7750 * a) @ x
    x = x if g.shape[1] <= g.shape[2] else x.mT
    state["trend"] = 0.2 * max(g.shape[1:]) ** 0.5 * x
    return state["trend"]


OPTIMIZERS: dict[str, tuple[Callable, list[float]]] = {  # -> (function, learning rates to try)
    "SGD": (sgd, [0.8 / 2**k for k in range(7)]),
    "momentum": (momentum, [3.2 / 2**k for k in range(9)]),
    "Adam": (adam, [0.064 / 2**k for k in range(9)]),
    "Muon": (muon, [0.064 / 2**k for k in range(7)]),
}

# ----------------------------------------------------------------------------------- remedies
#
# pipemare   Divide the rate by the delay, less and less over the first quarter of the run. PipeMare
#            (Yang et al., MLSys 2021), its technique T1: learning rate rescheduling. (Its T2
#            corrects the weights of the backward, and belongs to training without stashing.)
# spectrain  Read the weights where they will be when the gradient arrives, if all goes on as now.
#            SpecTrain (Chen, Yang and Cheng, 2018), which predicts with momentum. Adam's and Muon's
#            step takes its place as in XPipe (2019), and for SGD the average of ten gradients.
# nesterov   Momentum that looks ahead, long with .99: Ajanthan et al., 2025 (arXiv 2505.01099).

NESTEROV: dict[str, dict] = {
    "nesterov .9": {"beta": 0.9, "look_ahead": True},
    "nesterov .99": {"beta": 0.99, "look_ahead": True},
}
REMEDIES = ["none", "pipemare", "spectrain", *NESTEROV]


def applies(name: str, delay: int, remedy: str) -> bool:
    """Whether the remedy changes anything, with the optimizer of that name."""
    least = {"pipemare": 2, "spectrain": 1}.get(remedy, 0)
    without = {"SGD": [*NESTEROV], "Muon": ["nesterov .9"]}.get(name, [])
    return delay >= least and remedy not in without


# ----------------------------------------------------------------------------------- training


class Training(NamedTuple):
    """What is trained, and how. Rates and seeds, of which there are several at once, come later."""

    config: dict
    delays: list[int]  # by stage: how many updates the weights are old that a forward reads
    optimizer: Callable
    remedy: str = "none"
    stashing: bool = True  # False: backwards read the newest weights, whatever the forwards read


class StackedStage:
    """One stage of every run at once. modules: the stage of each run; rate: (runs,).

    newest    its weights after the last update, (runs, ...) each
    versions  what forwards still read, oldest first: newest, or with spectrain what is predicted
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
        return vmap(partial(functional_call, self.module))(self.read, (x,))

    def update(self, gradients: Weights, batch: int) -> None:
        """A step of the newest weights, along the gradients of old ones."""
        config, _, optimizer, remedy, _ = self.training
        new, seen, slower = Weights(), Weights(), 1.0
        if remedy == "pipemare":
            slower = 1 / max(1, self.delay) ** (1 - min(1, 4 * (batch / config["num_batches"])))
        for name, w in self.newest.items():
            state, step_size = self.states[name], slower * self.rate.view(-1, *[1] * (w.ndim - 1))
            direction = optimizer(gradients[name], state, batch, **NESTEROV.get(remedy, {}))
            new[name] = seen[name] = w - step_size * direction
            if remedy == "spectrain":
                seen[name] = new[name] - self.delay * (step_size * state["trend"])
        self.newest = new
        self.versions = [*self.versions, seen][-1 - self.delay :]


def delayed_training(
    training: Training,
    rates: list[float],
    seeds: Sequence[int],
    dtype: torch.dtype = torch.float32,
    watch: Callable[[Tensor], bool] = lambda losses: False,
) -> tuple[Tensor, list[Weights]]:
    """Losses (rates, seeds, batches) of training with these delays, and each stage's last weights.

    Stage s reads version max(0, b - delays[s]) for batch b. Ends early when watch(losses) is true.
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
        if watch(torch.stack(losses, 2)):
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
    last = num_stages - 1
    return {
        "0": [0] * num_stages,
        "1": [1] * num_stages,
        f"{last} to 0": [*range(last, -1, -1)],
        f"{last}": [last] * num_stages,
    }
