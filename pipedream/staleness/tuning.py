"""The best learning rate, chosen on other seeds than those whose results are shown; and losses.

A learning rate that suits fresh gradients is too large for old ones, and one that is soon at a loss
of 0.3 is too large to get to 0.05. So whatever is compared is tuned first, for each goal by itself.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .delays import Training, delayed_training

WINDOW = 10  # batches over which a loss is averaged before it is compared
TARGETS = (0.3, 0.1, 0.05)  # losses to get to
CHOOSING = 6  # seeds that choose a rate: with three, one near divergence is sometimes chosen
SHOWN = 10
QUICK = 3, 5  # the same for a first look
GROWN = 1.5  # times the first loss: no mean of ten may be more
CLEAR = 0.9  # of the seeds must agree: of ten nine, as they do once in 50 times by chance
Score = Callable[[Tensor], Tensor]  # losses (rates, seeds, batches) -> (rates, seeds, goals)


class Tuned(NamedTuple):
    """What was tried on the seeds that choose, and what came out on those that are shown."""

    scores: dict[float, Tensor]  # rate -> (seeds, goals)
    rates: list[float]  # the best, by goal
    losses: list[Tensor]  # at that, by goal: (seeds, batches)

    def batches_to(self, targets: Sequence[float]) -> list[list[float]]:
        """Where the goals are these targets: by target, one per seed."""
        pairs = zip(self.losses, targets, strict=True)
        return [batches_to(losses, target).tolist() for losses, target in pairs]


def means(losses: Tensor) -> Tensor:
    """Over ten batches each."""
    return losses.unfold(-1, WINDOW, 1).mean(-1)


def batches_to(losses: Tensor, target: float) -> Tensor:
    """How many batches (the last dimension, ten or more) until a mean of ten is below; or inf."""
    below = (means(losses) < target).cpu()
    first = below.int().argmax(-1) + WINDOW
    return torch.where(below.any(-1), first.double(), torch.inf)


def grown(losses: Tensor) -> Tensor:
    """Has a mean of ten (of the last dimension) ever grown above GROWN times the first loss?"""
    return ~(means(losses) <= GROWN * losses[..., :1]).all(-1)  # nan is not <= anything


def score_targets(targets: Sequence[float]) -> Score:
    """Batches to each target; a rate that diverges with one of the seeds is out: infinite.

    A seed that does not get there scores twice the batches or more, the more the higher its loss.
    """

    def score(losses: Tensor) -> Tensor:
        ended = means(losses)[..., -1].cpu()
        far = 2 * losses.shape[-1] * (1 + ended / (1 + ended)).double()
        batches = [torch.minimum(batches_to(losses, target), far) for target in targets]
        out = grown(losses).any(-1).cpu()
        return torch.stack(batches, -1).masked_fill(out[:, None, None], torch.inf)

    return score


def decided(losses: Tensor, targets: Sequence[float]) -> bool:
    """No rate can still get to one of the targets before the best (unless that diverges later)."""
    batches = torch.stack([batches_to(losses, each) for each in targets])  # (goals, rates, seeds)
    least = batches.clamp(max=losses.shape[-1] + 1).mean(-1)
    best = least.masked_fill(grown(losses).any(-1).cpu(), torch.inf).argmin(-1)
    return bool(batches[range(len(targets)), best].isfinite().all())


def best_of(scores: dict[float, Tensor]) -> list[float]:
    """By goal, the rate with the least mean score."""
    tried = sorted(scores)
    return [tried[n] for n in torch.stack([scores[rate].mean(0) for rate in tried]).argmin(0)]


def try_rates(
    rates: list[float], score: Callable[[list[float]], Tensor], fine=True
) -> dict[float, Tensor]:
    """The scores of these rates, and of more of them.

    The grid grows where the best rate is at its edge, and down while all diverge. Where the best is
    inside, the rates around it are tried, too, in steps of 2^(1/4), until it has such neighbors.
    """
    scores: dict[float, Tensor] = {}
    new = {*rates}
    while new and len(scores) < 60:
        scores |= zip(sorted(new), score(sorted(new)).cpu(), strict=True)
        tried, new = sorted(scores), set()
        for goal, rate in enumerate(best_of(scores)):
            column = [float(each[:, goal].mean()) for each in scores.values()]
            if column.count(min(column)) > 1 and min(column) < torch.inf:
                factors: list[float] = []  # no rate is better than another
            elif rate in (tried[0], tried[-1]):
                factors = [0.25, 0.5] if rate == tried[0] else [2, 4]
            else:
                factors = [2 ** (k / 4) for k in (-2, -1, 1, 2) if fine]
            new |= {factor * rate for factor in factors}
        new = {rate for rate in new if all(abs(math.log2(rate / each)) > 0.1 for each in tried)}
    return scores


def tune(
    training: Training,
    rates: list[float],
    seeds: range,
    score: Score,
    number: int = CHOOSING,
    fine: bool = True,
    **watch,
) -> Tuned:
    """The best rates for that number of other seeds, and losses of these seeds.

    A rate would flatter those it is chosen with. watch: as in delayed_training, while choosing.
    """
    others = range(seeds[0] + 1000, seeds[0] + 1000 + number)

    def score_rates(rates: list[float]) -> Tensor:
        return score(delayed_training(training, rates, others, **watch)[0])

    scores = try_rates(rates, score_rates, fine)
    while watch:  # it may have ended before the best diverge
        shown = sorted({*best_of(scores)})
        bad = grown(delayed_training(training, shown, others)[0]).any(-1).tolist()
        scores |= {r: scores[r] + torch.inf for r, out in zip(shown, bad, strict=True) if out}
        if not any(bad) or all(torch.isinf(each).all() for each in scores.values()):
            break
    best = best_of(scores)
    shown = sorted({*best})
    losses = dict(zip(shown, delayed_training(training, shown, seeds)[0], strict=True))
    return Tuned(scores, best, [losses[rate] for rate in best])


def tune_for(targets: Sequence[float], training: Training, rates: list[float], quick: bool):
    """The rates with which training is soonest at each target; quick: fewer rates and seeds."""
    choosing, shown = QUICK if quick else (CHOOSING, SHOWN)
    seeds = range(training.config["seed"], training.config["seed"] + shown)
    score, watch = score_targets(targets), partial(decided, targets=targets)
    return tune(training, rates, seeds, score, choosing, fine=not quick, watch=watch)


def fill_in(legend: str, config: dict, quick: bool) -> str:
    """The legend of a command that has tuned for targets, with the numbers of this file."""
    choosing, seeds = QUICK if quick else (CHOOSING, SHOWN)
    numbers = {"choosing": choosing, "seeds": seeds, "batches": config["num_batches"]}
    return legend.format(**numbers, grown=GROWN, clear=CLEAR, last=config["num_stages"] - 1)


def mark(one: Sequence[float], other: Sequence[float]) -> str:
    """< or >: one is less, or more, on so many of the same seeds that chance is rare. ~: neither.

    Where only one of them gets there with all seeds, that is less; where none does: -.
    """
    there = max(one) < torch.inf, max(other) < torch.inf
    if not all(there):
        return "<" if there[0] else ">" if there[1] else "-"
    signs = [(a > b) - (a < b) for a, b in zip(one, other, strict=True)]
    often = {sign for sign in (-1, 1) if signs.count(sign) >= CLEAR * len(signs)}
    return "<" if -1 in often else ">" if 1 in often else "~"


def spread(numbers: list[float], places: int = 0, sign: str = "") -> str:
    """Mean (lowest to highest), or - if one of them is infinite; and that sign."""
    if max(numbers) == torch.inf:
        return "-"
    mean, low, high = sum(numbers) / len(numbers), min(numbers), max(numbers)
    return f"{mean:.{places}f} ({low:.{places}f}-{high:.{places}f}) {sign}".rstrip()


# ----------------------------------------------------------------------------------- pictures

LOSS_TICKS = [0.03, 0.1, 0.3, 1, 3]
LOSS = "training loss, mean of 10 batches"


def draw_losses(axes, x, losses: Tensor, color: str, style: str, label: str, band=True) -> None:
    """The mean over the seeds, with a band from the lowest to the highest."""
    if band:
        axes.fill_between(x, losses.amin(0), losses.amax(0), color=color, alpha=0.15, lw=0)
    axes.plot(x, losses.mean(0), style, color=color, lw=2, label=label)


def finish(axes, xlabel: str, ticks=LOSS_TICKS, unit="", ylabel=LOSS, place="upper right") -> None:
    """A logarithmic scale with these ticks, lines at the left and at the bottom, and a legend."""
    axes.set(yscale="log", xlabel=xlabel, ylabel=ylabel)
    axes.set_yticks(ticks, [f"{tick:g}{unit}" for tick in ticks])
    axes.minorticks_off()
    axes.spines[["left", "bottom"]].set_visible(True)
    axes.legend(loc=place, frameon=False, fontsize=10)
