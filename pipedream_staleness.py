#!/usr/bin/env python3
"""What do old gradients cost? By optimizer, remedy and delay; and does missing stashing hurt?

    python pipedream_lab.py staleness            three minutes at most: a table and staleness.png
    python pipedream_lab.py staleness --quick    without the remedies
    python pipedream_lab.py staleness --search   where does missing stashing hurt? 20 minutes

PipeDream saves the flush and pays with old gradients. How many more batches do these need? A
learning rate that suits fresh gradients is too large for old ones, so everything that is compared
is tuned: the same grid, which grows where the best rate is at its edge, on other seeds than those
of which the results are shown.

Training here is the recurrence that a pipeline with stashing computes (the tests prove it): stage s
gets the gradient of batch b at its weights of d_s updates before. No schedule, no microbatches. All
learning rates and seeds of a cell are trained at once: each weight has one more dimension, in
front, that counts these runs.
"""

import itertools
import signal
import sys
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during a slow import: no traceback

import torch
from torch import Tensor, nn, vmap
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import pipedream_lab
from pipedream_lab import check_output, write
from pipedream_simple import (
    CONFIG,
    Op,
    UserError,
    Worker,
    build_stages,
    check_value,
    choose_device,
    count,
    format_table,
    make_batches,
    run_main,
    train,
)

# --------------------------------------------------------------------------------- optimizers
#
# gradient, what the optimizer remembers of this weight, batches so far -> direction of the step,
# for every run at once. A step is W = W - rate * direction. With look_ahead the direction also
# contains the share of the next step that is known already: Nesterov's momentum.


def sgd(g: Tensor, state: dict, batch: int, beta: float = 0.9, look_ahead: bool = False) -> Tensor:
    """The gradient itself. The average of the last ones is kept for remedies that want a trend."""
    state["trend"] = beta * state.get("trend", 0) + (1 - beta) * g
    return g


def momentum(
    g: Tensor, state: dict, batch: int, beta: float = 0.9, look_ahead: bool = False
) -> Tensor:
    """The average of the last gradients: torch.optim.SGD with 1 - beta of its rate."""
    u = state["trend"] = beta * state.get("trend", 0) + (1 - beta) * g
    return beta * u + (1 - beta) * g if look_ahead else u


def adam(g: Tensor, state: dict, batch: int, beta: float = 0.9, look_ahead: bool = False) -> Tensor:
    """Momentum over the size of recent gradients, weight by weight (Kingma and Ba, ICLR 2015)."""
    u = momentum(g, state.setdefault("momentum", {}), batch, beta, look_ahead)
    u = u / (1 - beta ** (batch + 1))
    v = state["squares"] = 0.999 * state.get("squares", 0) + 0.001 * g * g
    state["trend"] = u / ((v / (1 - 0.999 ** (batch + 1))).sqrt() + 1e-8)
    return state["trend"]


def muon(g: Tensor, state: dict, batch: int, beta: float = 0.95, look_ahead: bool = True) -> Tensor:
    """Momentum with all singular values made about 1; Adam for what is no matrix (Jordan, 2024).

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


OPTIMIZERS: dict[str, tuple[Callable, list[float]]] = {  # -> (function, the rates that are tried)
    "SGD": (sgd, [0.8 / 2**k for k in range(7)]),
    "momentum": (momentum, [3.2 / 2**k for k in range(9)]),
    "Adam": (adam, [0.064 / 2**k for k in range(9)]),
    "Muon": (muon, [0.064 / 2**k for k in range(7)]),
}

# ----------------------------------------------------------------------------------- remedies


def pipemare(delay: int, done: float) -> float:
    """Divide the rate by the delay, less and less over the first quarter of the run.

    PipeMare (Yang et al., MLSys 2021), its technique T1: learning rate rescheduling. (Its T2
    corrects the weights of the backward, and belongs to training without stashing.)
    """
    return 1 / max(1, delay) ** (1 - min(1, 4 * done))


def spectrain(weights: Tensor, step: Tensor, delay: int) -> Tensor:
    """Read the weights where they will be when the gradient arrives, if all goes on as now.

    SpecTrain (Chen, Yang and Cheng, 2018), which predicts with momentum. Adam's and Muon's step
    takes its place as in XPipe (2019), and for SGD the average of ten gradients.
    """
    return weights - delay * step


NESTEROV = {"nesterov .9": 0.9, "nesterov .99": 0.99}
"""Momentum that looks ahead, long with .99: Ajanthan et al., 2025 (arXiv 2505.01099)."""

REMEDIES = ["none", "pipemare", "spectrain", *NESTEROV]


# ----------------------------------------------------------------------------------- training


def delayed_training(
    config: dict,
    delays: list[int],
    optimizer: Callable,
    rates: list[float],
    seeds: list[int],
    remedy: str = "none",
    stashing: bool = True,
    dtype: torch.dtype = torch.float32,
    watch: Callable[[Tensor], bool] = lambda losses: False,
) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Losses (rates, seeds, batches) of training with these delays, and each stage's last weights.

    Stage s reads version max(0, b - delays[s]) for batch b. Without stashing its backward reads
    version b, as in a pipeline with one microbatch per batch. Ends early when watch(losses) is
    true.
    """
    runs, device = [*itertools.product(rates, seeds)], choose_device(config["device"])
    networks = {seed: build_stages({**config, "seed": seed}) for seed in seeds}
    data = {seed: make_batches({**config, "seed": seed}) for seed in seeds}
    modules = networks[seeds[0]]
    newest: list[dict[str, Tensor]] = [{} for _ in modules]
    for stage, module in enumerate(modules):
        for name, _ in module.named_parameters():
            each = {seed: networks[seed][stage].get_parameter(name) for seed in seeds}
            stacked = torch.stack([each[seed].detach() for _, seed in runs])
            newest[stage][name] = stacked.to(device, dtype)
    rate = torch.tensor([rate for rate, _ in runs], device=device, dtype=dtype)
    versions = [[weights] for weights in newest]  # as forwards read them; the oldest first
    states: list[dict] = [defaultdict(dict) for _ in modules]
    beta = {"beta": NESTEROV[remedy], "look_ahead": True} if remedy in NESTEROV else {}
    losses: list[Tensor] = []
    for batch in range(config["num_batches"]):
        x = torch.stack([data[seed][batch][0] for _, seed in runs]).to(device, dtype)
        y = torch.stack([data[seed][batch][1] for _, seed in runs]).to(device)
        read = [{n: w.clone().requires_grad_() for n, w in old[0].items()} for old in versions]
        for module, weights in zip(modules, read, strict=True):
            x = vmap(partial(call, module))(weights, x)
        of_images = cross_entropy(x.flatten(0, 1), y.flatten(), reduction="none")
        loss = of_images.view(len(runs), -1).mean(1)
        losses.append(loss.detach().view(len(rates), len(seeds)))
        if not stashing:
            for weights, new in zip(read, newest, strict=True):
                for name, w in weights.items():
                    w.data.copy_(new[name])  # behind autograd's back: see pipedream_simple.py
        # The runs do not meet: the gradient of the sum is that of each.
        gradients = iter(torch.autograd.grad(loss.sum(), [w for ws in read for w in ws.values()]))
        for stage, (delay, old) in enumerate(zip(delays, newest, strict=True)):
            new, seen = {}, {}
            slower = pipemare(delay, batch / config["num_batches"]) if remedy == "pipemare" else 1
            for name, w in old.items():
                gradient, state = next(gradients), states[stage][name]
                step_size = slower * rate.view(-1, *[1] * (w.ndim - 1))
                new[name] = seen[name] = w - step_size * optimizer(gradient, state, batch, **beta)
                if remedy == "spectrain":
                    seen[name] = spectrain(new[name], step_size * state["trend"], delay)
            newest[stage] = new
            versions[stage] = [*versions[stage], seen][-1 - delay :]
        if watch(torch.stack(losses, 2)):
            break
    return torch.stack(losses, 2), newest


def call(module: nn.Module, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    return functional_call(module, weights, (x,))


class OptimizerWorker(Worker):
    """The trainer's Worker with another optimizer: partial(OptimizerWorker, adam)."""

    def __init__(self, optimizer: Callable, module: nn.Module, config: dict):
        super().__init__(module, config)
        self.optimizer, self.states = optimizer, defaultdict[str, dict](dict)

    def update(self, op: Op) -> None:
        for name, g in self.gradient.items():  # a stack of one run
            self.gradient[name] = self.optimizer(g[None], self.states[name], op.version)[0]
        super().update(op)


IN_BATCH = "num_microbatches"
WINDOW = 10  # batches over which a loss is averaged before it is compared


def batches_to(losses: Tensor, target: float) -> Tensor:
    """How many batches (the last dimension) until the mean of the last ten is below; or inf."""
    if losses.shape[-1] < WINDOW:
        return torch.full(losses.shape[:-1], torch.inf)
    below = means(losses) < target
    first = below.int().argmax(-1) + WINDOW
    return torch.where(below.any(-1), first.double(), torch.inf).cpu()


def decided(losses: Tensor, target: float) -> bool:
    """No other rate can still become the fastest, however it goes on."""
    least = batches_to(losses, target).clamp(max=losses.shape[-1] + 1).mean(1)
    return bool(batches_to(losses, target)[least.argmin()].isfinite().all())


def try_rates(
    rates: list[float], score: Callable[[list[float]], Tensor]
) -> tuple[float, dict[float, list[float]]]:
    """The rate with the least mean score, and what each rate scores with each seed.

    More rates are tried while the best is the least or the greatest of them.
    """
    scores = dict(zip(rates, score(rates).tolist(), strict=True))
    while True:
        sums = {rate: sum(each) for rate, each in scores.items()}
        best = min(sums, key=sums.__getitem__)
        if min(sums) < best < max(sums) or len({*sums.values()}) == 1 or len(sums) > 20:
            return best, scores
        more = [best / 4, best / 2] if best == min(sums) else [2 * best, 4 * best]
        scores |= zip(more, score(more).tolist(), strict=True)


def other_seeds(seeds: range, number: int = 3) -> list[int]:
    """Seeds to choose a rate with. A rate would flatter those it is chosen with."""
    return [seeds[0] + 1000 + i for i in range(number)]


class Tuned(NamedTuple):
    """Training at its best learning rate."""

    rate: float
    losses: Tensor  # (seeds, batches)
    batches: list[float]  # to the target, one entry per seed; inf: not in this run


def tuned(config, delays, optimizer, rates, target, seeds, whole=False, **settings) -> Tuned:
    """Train at the rate that needs the fewest batches: until all are there, or the whole run."""
    watch = partial(decided, target=target)
    arguments = config, delays, optimizer

    def score(rates):  # a seed that does not get there counts as far away
        losses, _ = delayed_training(*arguments, rates, other_seeds(seeds), watch=watch, **settings)
        return batches_to(losses, target).clamp(max=2 * config["num_batches"])

    rate, _ = try_rates(rates, score)
    settings |= {} if whole else {"watch": watch}
    losses, _ = delayed_training(*arguments, [rate], [*seeds], **settings)
    return Tuned(rate, losses[0].cpu(), batches_to(losses, target)[0].tolist())


def spread(numbers: list[float], places: int = 0) -> str:
    """Mean (lowest to highest), or - if one of them is infinite."""
    if max(numbers) == torch.inf:
        return "-"
    mean, low, high = sum(numbers) / len(numbers), min(numbers), max(numbers)
    return f"{mean:.{places}f} ({low:.{places}f}-{high:.{places}f})"


# --------------------------------------------------------------------------------- staleness


def delay_table(num_stages: int) -> dict[str, list[int]]:
    """Who reads how old weights: a flush, 2BW, and PipeDream with one microbatch per batch."""
    last = num_stages - 1
    return {
        "0": [0] * num_stages,
        "1": [1] * num_stages,
        f"{last} to 0": [last - stage for stage in range(num_stages)],
        f"{last}": [last] * num_stages,
    }


STALENESS_LEGEND = """\
   Batches until the mean training loss of ten is below {target:g}: mean (lowest to
   highest) of {seeds} seeds, at the best of 7 or more learning rates, chosen on
   three other seeds. -: not all seeds within {batches}. Delay: by how many updates
   the gradients are old. 0: with a flush; 1: 2BW; {last} to 0, by stage: PipeDream
   with one microbatch per batch; {last}: the same with vertical sync. pipemare: its
   learning rates only; they change nothing at a delay of 1, nor spectrain at 0.
   nesterov needs momentum, so SGD has none; .9 is part of Muon."""


def staleness_cost(
    config: dict, out: Path = Path(), quick: bool = False, search: bool = False
) -> None:
    """What do old gradients cost? Delay by optimizer by remedy, each with its best learning rate.

    Writes staleness.png, or with --search stashing.png.
    """
    if quick and search:
        raise UserError("--quick and --search do not go together")
    check_value("num_stages", config["num_stages"], (int, 2, 1_000_000))  # 1: nothing is old
    check_output(out / ("stashing.png" if search else "staleness.png"))
    torch.set_num_threads(1)  # the matrices are small
    if search:
        search_for_harm(config, out)
        return
    delays = delay_table(config["num_stages"])
    seeds, target = range(config["seed"], config["seed"] + (3 if quick else 5)), 0.3
    cells: dict[tuple[str, str, str], list[float]] = {}
    todo = [
        (name, delay, remedy)
        for name, delay, remedy in itertools.product(OPTIMIZERS, delays, REMEDIES)
        if remedy == "none" or (not quick and applies(name, max(delays[delay]), remedy))
    ]
    for number, (name, delay, remedy) in enumerate(todo, start=1):
        progress(f"{number} of {len(todo)}: {name}, delay {delay}, {remedy}")
        arguments = config, delays[delay], *OPTIMIZERS[name], target, seeds
        cells[name, delay, remedy] = tuned(*arguments, remedy=remedy).batches
    progress("")
    for name in OPTIMIZERS:
        table = [[name, *delays]]
        for remedy in REMEDIES:
            found = [cells.get((name, delay, remedy)) for delay in delays]
            row = [spread(batches) if batches else "" for batches in found]
            table += [[f"  {remedy}", *row]] if any(row) else []
        print("\n".join(format_table(table)) + "\n")
    sizes = {"seeds": len(seeds), "batches": config["num_batches"], "target": target}
    print(STALENESS_LEGEND.format(**sizes, last=config["num_stages"] - 1))
    picture = partial(draw_cost, config["num_stages"], cells)
    title = draw_and_write(picture, out / "staleness.png", config)
    print(f"\n{out / 'staleness.png'}: {title}")


def applies(name: str, delay: int, remedy: str) -> bool:
    """Whether the remedy changes anything there."""
    least = {"pipemare": 2, "spectrain": 1}.get(remedy, 0)
    without = {"SGD": [*NESTEROV], "Muon": ["nesterov .9"]}.get(name, [])
    return delay >= least and remedy not in without


def progress(text: str) -> None:
    """One line on stderr; on a terminal always the same one, and nothing clears it."""
    if text or sys.stderr.isatty():
        end = "\x1b[K\r" if sys.stderr.isatty() else "\n"
        print(text, end=end, file=sys.stderr, flush=True)


def price(batches: list[float], fresh: list[float]) -> list[float]:
    """How many times as many batches as fresh gradients need: mean, lowest and highest seed."""
    mean = sum(fresh) / len(fresh)
    each = [number / mean for number in batches]
    return [sum(each) / len(each), min(each), max(each)]


def draw_and_write(draw: Callable, path: Path, config: dict) -> str:
    """Draw a picture in the house style, save it, and return its title."""
    import pipedream_visual as visual  # here: it imports matplotlib

    with visual.house_style():
        figure = draw(visual)
        write(path, figure.savefig, config)
    return figure.texts[0].get_text()


def draw_cost(num_stages: int, cells: dict, visual):
    """Prices by delay and optimizer; and what no flush gains at most, to compare."""
    delays = [*delay_table(num_stages)]
    costs = {key: price(cell, cells[key[0], delays[0], "none"]) for key, cell in cells.items()}
    once = {name: costs[name, delays[1], "none"][0] for name in OPTIMIZERS}
    found = [f"{name} {cost:.1f}x" for name, cost in once.items() if cost < torch.inf]
    title = f"One batch of delay costs {', '.join(found)} the batches"
    title = title if found else "Not all seeds get to the target in this run"
    lines = [
        "How many times as many batches old gradients need to the same loss, at the best rate.",
        "Filled: no remedy, and the range of the seeds. Hollow: with the best remedy, if it helps.",
    ]
    figure = visual.new_picture(1400, 840, title, lines)
    axes = visual.add_axes(figure, 130, 140, 1230, 620)
    for (i, name), (x, delay) in itertools.product(enumerate(OPTIMIZERS), enumerate(delays)):
        mean, low, high = costs[name, delay, "none"]
        place, hue = x + 0.2 * (i - 1.5), visual.HUES[[0, 1, 4, 5][i]]
        axes.plot(place, mean, "o", color=hue, ms=8, label=None if x else name)
        if not high < torch.inf:
            continue  # not all seeds got there
        axes.plot([place, place], [low, high], color=hue, lw=2)
        if x:
            axes.text(place, 1.01 * high, f"{mean:.1f}", ha="center", va="bottom", color=hue)
        helped = min(costs[key][0] for key in costs if key[:2] == (name, delay))
        if delay != delays[0] and helped < mean:
            axes.plot(place + 0.07, helped, "o", mfc="white", mec=hue, ms=6)
    for microbatches in (num_stages, 4 * num_stages):
        gain = (microbatches + num_stages - 1) / microbatches
        axes.axhline(gain, color=visual.INK, lw=1, ls="--", zorder=0)
        text = f"no flush gains {gain:.1f}x over 1F1B\nwith {microbatches} microbatches"
        axes.text(len(delays) - 0.5, 0.99 * gain, text, ha="right", va="top", fontsize=8)
    axes.set_xticks(range(len(delays)), [f"delay {delay}" for delay in delays], fontsize=10)
    axes.set(xlim=(-0.5, len(delays) - 0.5), yscale="log", ylabel="times as many batches")
    axes.set_yticks([1, 1.5, 2, 3, 4, 5], ["1x", "1.5x", "2x", "3x", "4x", "5x"])
    axes.minorticks_off()
    axes.spines[["left", "bottom"]].set_visible(True)
    axes.legend(loc="upper left", frameon=False, fontsize=10)
    return figure


# ------------------------------------------------------------------------------------- search

SEARCHED = [(8, 2, 32), (16, 2, 32), (32, 1, 16), (32, 1, 32), (32, 1, 64)]
"""Stages, layers per stage, hidden size."""
CHOOSING = 6  # seeds that choose a rate: with three, one near divergence is sometimes chosen


class Ended(NamedTuple):
    """Training at the rate with which it ends best."""

    rate: float
    scores: dict[float, list[float]]  # rate -> where it ends, with the seeds that choose
    losses: Tensor  # (seeds, batches)

    def __str__(self) -> str:
        return f"{spread(ends(self.losses).tolist(), 3)} at {self.rate:.2g}"


def ends(losses: Tensor) -> Tensor:
    """The mean of the last 20 batches; infinite if it diverged."""
    return losses[..., -20:].mean(-1).nan_to_num(torch.inf, torch.inf)


def best_end(size: dict, name: str, seeds: range, stashing: bool) -> Ended:
    optimizer, rates = OPTIMIZERS[name]
    delays = delay_table(size["num_stages"])[f"{size['num_stages'] - 1} to 0"]

    def losses(rates, seeds):
        return delayed_training(size, delays, optimizer, rates, seeds, stashing=stashing)[0].cpu()

    rate, scores = try_rates(rates, lambda rates: ends(losses(rates, other_seeds(seeds, CHOOSING))))
    return Ended(rate, scores, losses([rate], [*seeds])[0])


def search_for_harm(config: dict, out: Path) -> None:
    """Where does training without stashing end worse, each at its best rate? One microbatch."""
    seeds = range(config["seed"], config["seed"] + 5)
    small = {key: config[key] for key in CONFIG} | {"num_batches": 2 * config["num_batches"]}
    found: dict[str, tuple[dict, list[Ended]]] = {}
    for num_stages, layers, hidden in SEARCHED:
        size = {**small, "num_stages": num_stages, "layers_per_stage": layers}
        size |= {"hidden_size": hidden}
        heading = f"{num_stages} stages of {count(layers, 'layer')}, hidden size {hidden}"
        table = [["", "with stashing", "without", ""]]
        for name in OPTIMIZERS:
            progress(f"{heading}: {name}")
            pair = [best_end(size, name, seeds, stashing) for stashing in (True, False)]
            with_it, without = (ends(one.losses) for one in pair)
            worse = "worse" * bool(without.min() > with_it.max())  # the seeds do not overlap
            better = "better" * bool(without.max() < with_it.min())
            table.append([name, *map(str, pair), worse + better])
            found[f"{name}, {heading}"] = size, pair
        progress("")
        print("\n".join([heading, *format_table(table)]) + "\n", flush=True)
    print(SEARCH_LEGEND.format(seeds=len(seeds), batches=small["num_batches"], choosing=CHOOSING))
    what, (size, pair) = max(found.items(), key=lambda one: gap(one[1][1]))
    print(f"\n{what},\nin the pipeline of pipedream_simple.py, op by op:")
    for stashing, rate in zip((True, False), (one.rate for one in pair), strict=True):
        name = what.partition(",")[0]
        of_run = {**size, "learning_rate": rate, "weight_stashing": stashing}
        worker = partial(OptimizerWorker, OPTIMIZERS[name][0])
        runs = [train({**of_run, "seed": seed}, worker_class=worker).losses for seed in seeds]
        last = spread(ends(torch.tensor(runs)).tolist(), 3)
        print(f"   {'with stashing' if stashing else 'without':14}{last} at {rate:.2g}")
    title = draw_and_write(partial(draw_search, what, pair), out / "stashing.png", config)
    print(f"\n{out / 'stashing.png'}: {title}")


def gap(pair: list[Ended]) -> float:
    """From the worst seed with stashing to the best one without."""
    with_it, without = (ends(one.losses) for one in pair)
    return float(without.min() - with_it.max())


SEARCH_LEGEND = """\
   Loss of the last 20 of {batches} batches, with weight stashing and without: mean
   (lowest to highest) of {seeds} seeds, at the best of 7 or more learning rates,
   chosen on {choosing} other seeds. worse, better: than with stashing, and the seeds
   do not overlap. One microbatch per batch: the delay falls by one from stage
   to stage."""


def draw_search(what: str, pair: list[Ended], visual):
    """The run in which missing stashing hurts most: its losses, and the rates that were tried."""
    with_it, without = (f"{ends(one.losses).mean():.2f}" for one in pair)
    title = f"{what.split(', hidden')[0]}: the loss ends at {with_it} with stashing, "
    title += f"at {without} without"
    lines = [
        "Left: each at its best learning rate. Right: where all rates end, with other seeds.",
        f"Mean and range of the seeds; {what.partition(', ')[2]}, one microbatch per batch.",
    ]
    figure = visual.new_picture(1400, 720, title, lines)
    left = visual.add_axes(figure, 110, 160, 590, 440)
    right = visual.add_axes(figure, 770, 160, 590, 440)
    for one, hue, label in zip(pair, (0, 4), ("weight stashing", "no stashing"), strict=True):
        color, curve = visual.HUES[hue], means(one.losses)
        x = [*range(WINDOW, WINDOW + curve.shape[1])]
        draw_losses(left, x, curve, color, "-", f"{label}, at {one.rate:.2g}")
        rates = sorted(one.scores)
        by_rate = torch.tensor([one.scores[rate] for rate in rates]).T
        draw_losses(right, rates, by_rate, color, "-", label)
        right.plot(rates, by_rate.mean(0), "o", color=color, ms=5)
    right.set_xscale("log")
    finish_losses(left, "batches")
    finish_losses(right, "learning rate")
    right.set(ylabel="training loss, last 20 batches", ylim=left.get_ylim())
    return figure


def means(losses: Tensor) -> Tensor:
    """Over ten batches each."""
    return losses.unfold(-1, WINDOW, 1).mean(-1)


def draw_losses(axes, x, losses: Tensor, color: str, style: str, label: str, band=True) -> None:
    """The mean over the seeds, with a band from the lowest to the highest."""
    if band:
        axes.fill_between(x, losses.amin(0), losses.amax(0), color=color, alpha=0.15, lw=0)
    axes.plot(x, losses.mean(0), style, color=color, lw=2, label=label)


def finish_losses(axes, label: str) -> None:
    axes.set(yscale="log", xlabel=label, ylabel="training loss, mean of 10 batches")
    axes.set_yticks([0.03, 0.1, 0.3, 1, 3], ["0.03", "0.1", "0.3", "1", "3"])
    axes.minorticks_off()
    axes.spines[["left", "bottom"]].set_visible(True)
    axes.legend(loc="upper right", frameon=False, fontsize=10)


if __name__ == "__main__":  # python pipedream_staleness.py is a command of the lab
    sys.argv[:1] = ["pipedream_lab.py", "staleness"]
    sys.exit(run_main(pipedream_lab.main))
