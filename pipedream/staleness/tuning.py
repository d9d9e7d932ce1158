"""The best learning rate, chosen on other seeds than those whose results are shown; and losses.

A learning rate that suits fresh gradients is too large for old ones, so whatever is compared is
tuned first: over the same grid, which grows where the best rate is at its edge.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .delays import Training, delayed_training

WINDOW = 10  # batches over which a loss is averaged before it is compared
Scores = dict[float, list[float]]  # rate -> its score with each of the seeds that choose


def means(losses: Tensor) -> Tensor:
    """Over ten batches each."""
    return losses.unfold(-1, WINDOW, 1).mean(-1)


def batches_to(losses: Tensor, target: float) -> Tensor:
    """How many batches (the last dimension) until the mean of the last ten is below; or inf."""
    if losses.shape[-1] < WINDOW:
        return torch.full(losses.shape[:-1], torch.inf)
    below = (means(losses) < target).cpu()
    first = below.int().argmax(-1) + WINDOW
    return torch.where(below.any(-1), first.double(), torch.inf)


def decided(losses: Tensor, target: float) -> bool:
    """No other rate can still become the fastest, however training goes on."""
    batches = batches_to(losses, target)
    least = batches.clamp(max=losses.shape[-1] + 1).mean(1)
    return bool(batches[least.argmin()].isfinite().all())


def try_rates(rates: list[float], score: Callable[[list[float]], Tensor]) -> tuple[float, Scores]:
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


def tuned(
    training: Training, rates: list[float], seeds: range, score: Callable, number=3, **watch
) -> tuple[float, Scores, Tensor]:
    """The best rate for other seeds; their scores; and losses (seeds, batches) of these seeds.

    A rate would flatter those it is chosen with. score: losses (rates, seeds, batches) -> numbers.
    """
    others = range(seeds[0] + 1000, seeds[0] + 1000 + number)

    def score_rates(rates: list[float]) -> Tensor:
        return score(delayed_training(training, rates, others, **watch)[0])

    rate, scores = try_rates(rates, score_rates)
    return rate, scores, delayed_training(training, [rate], seeds, **watch)[0][0]


def fastest(training: Training, rates: list[float], seeds: range, target: float):
    """The rate that needs the fewest batches to the target, and losses until all are there."""
    watch, most = partial(decided, target=target), 2 * training.config["num_batches"]

    def score(losses: Tensor) -> Tensor:  # a seed that does not get there counts as far away
        return batches_to(losses, target).clamp(max=most)

    rate, _, losses = tuned(training, rates, seeds, score, watch=watch)
    return rate, losses


def spread(numbers: list[float], places: int = 0) -> str:
    """Mean (lowest to highest), or - if one of them is infinite."""
    if max(numbers) == torch.inf:
        return "-"
    mean, low, high = sum(numbers) / len(numbers), min(numbers), max(numbers)
    return f"{mean:.{places}f} ({low:.{places}f}-{high:.{places}f})"


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
