"""Where does training without weight stashing end worse?

    python -m pipedream search              20 minutes: tables and stashing.png

On networks of its own: 8, 16 and 32 stages, one microbatch per batch, each optimizer at its best
learning rate.
"""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pipedream.backstage.output import check_output, draw_and_write
from pipedream.backstage.text import progress
from pipedream.schedules.plans import story_config
from pipedream.staleness import delays, tuning
from pipedream.staleness.tuning import CHOOSING, WINDOW, spread
from pipedream_simple import check_value, count, format_table, train

FLAGS = {"--out DIR": "for the picture"}
TAKES = "batch_size num_batches seed device network"
DEFAULTS = {"num_batches": 400, "num_microbatches": 1}

SIZES = "num_stages", "layers_per_stage", "hidden_size"
SEARCHED = [(8, 2, 32), (16, 2, 32), (32, 1, 16), (32, 1, 32), (32, 1, 64)]
LEGEND = """\
   Loss of the last 20 of {batches} batches, with weight stashing and without: mean
   (lowest to highest) of {seeds} seeds, at the best of 5 or more learning rates,
   chosen on {choosing} other seeds. worse, better: than with stashing, and the seeds
   do not overlap. One microbatch per batch: the delay falls by one from stage
   to stage."""


def ends(losses: Tensor) -> Tensor:
    """The mean of the last 20 batches; infinite if it diverged."""
    return losses[..., -20:].mean(-1).nan_to_num(torch.inf, torch.inf)


class Ended(NamedTuple):
    """Training at the rate with which it ends best."""

    name: str  # of the optimizer
    config: dict  # with that rate
    scores: dict[float, list[float]]  # rate -> where it ends, with each of the seeds that choose
    losses: Tensor  # (seeds, batches)

    def __str__(self) -> str:
        return f"{spread(ends(self.losses).tolist(), 3)} at {self.config['learning_rate']:.2g}"


Pair = tuple[Ended, Ended]  # with stashing, and without


def gap(one: Ended, other: Ended) -> float:
    """From the worst seed of one to the best of the other. Above 0: they do not overlap."""
    return float(ends(other.losses).min() - ends(one.losses).max())


def main(config: dict, out: Path = Path()) -> None:
    """Each network with each optimizer; and once more, op by op, where the gap is widest."""
    check_value("num_batches", config["num_batches"], (int, 20, 1_000_000))
    check_output(out / "stashing.png")
    torch.set_num_threads(1)  # the matrices are small
    seeds, pairs = range(config["seed"], config["seed"] + 5), list[Pair]()
    for sizes in SEARCHED:
        sized = {**story_config(config), **dict(zip(SIZES, sizes, strict=True))}
        network, table = name_of(sized), [["", "with stashing", "without", ""]]
        for name in delays.OPTIMIZERS:
            progress(f"{network}: {name}")
            pair = best_end(sized, name, seeds, True), best_end(sized, name, seeds, False)
            verdict = "worse" * (gap(*pair) > 0) + "better" * (gap(*pair[::-1]) > 0)
            table.append([name, *map(str, pair), verdict])
            pairs.append(pair)
        progress("")
        print("\n".join([network, *format_table(table)]) + "\n", flush=True)
    print(LEGEND.format(seeds=len(seeds), batches=config["num_batches"], choosing=CHOOSING))
    widest = max(pairs, key=lambda pair: gap(*pair))
    print_again(widest, seeds)
    title = draw_and_write(partial(draw_search, widest), out / "stashing.png")
    print(f"\n{out / 'stashing.png'}: {title}")


def name_of(config: dict) -> str:
    layers = count(config["layers_per_stage"], "layer")
    return f"{config['num_stages']} stages of {layers}, hidden size {config['hidden_size']}"


def best_end(config: dict, name: str, seeds: range, stashing: bool) -> Ended:
    """With that optimizer, and the delays of PipeDream with one microbatch per batch."""
    optimizer, rates = delays.OPTIMIZERS[name]
    by_stage = [*range(config["num_stages"])][::-1]
    training = delays.Training(config, by_stage, optimizer, stashing=stashing)
    tuned = tuning.tune(training, rates, seeds, lambda losses: ends(losses)[..., None], fine=False)
    config = {**config, "weight_stashing": stashing, "learning_rate": tuned.rates[0]}
    scores = {rate: each[:, 0].tolist() for rate, each in tuned.scores.items()}
    return Ended(name, config, scores, tuned.losses[0])


def print_again(pair: Pair, seeds: range) -> None:
    """The trainer of the pipeline says it, too."""
    name, config = pair[0][:2]
    print(f"\n{name}, {name_of(config)},\nin the pipeline of pipedream_simple.py, op by op:")
    worker = partial(delays.OptimizerWorker, delays.OPTIMIZERS[name][0])
    for what, one in zip(("with stashing", "without"), pair, strict=True):
        runs = [train({**one.config, "seed": seed}, worker_class=worker).losses for seed in seeds]
        print(f"   {what:14}{one._replace(losses=torch.tensor(runs))}")


def draw_search(pair: Pair, visual):
    """The run in which missing stashing hurts most: its losses, and the rates that were tried."""
    network, ranges = name_of(pair[0].config), [ends(one.losses).aminmax() for one in pair]
    ending = [f"{low:.2f} to {high:.2f}" for low, high in ranges]
    title = f"{pair[0].name}, {network.partition(', hidden')[0]}: "
    title += f"the seeds end at {ending[0]} with stashing, at {ending[1]} without"
    lines = [
        "Left: each at its best learning rate. Right: where all rates end, with other seeds.",
        f"Mean and range of the seeds; {network}, one microbatch per batch.",
    ]
    figure = visual.new_picture(1400, 720, title, lines)
    left, right = (visual.add_axes(figure, x, 160, 590, 440) for x in (110, 770))
    for label, hue, one in zip(("weight stashing", "no stashing"), (0, 4), pair, strict=True):
        color, curve = visual.HUES[hue], tuning.means(one.losses)
        x = [*range(WINDOW, WINDOW + curve.shape[1])]
        best = f"{label}, at {one.config['learning_rate']:.2g}"
        tuning.draw_losses(left, x, curve, color, "-", best)
        rates, scores = zip(*sorted(one.scores.items()), strict=True)
        by_rate = torch.tensor(scores).T
        tuning.draw_losses(right, rates, by_rate, color, "-", label)
        right.plot(rates, by_rate.mean(0), "o", color=color, ms=5)
    right.set_xscale("log")
    tuning.finish(left, "batches")
    tuning.finish(right, "learning rate", ylabel="training loss, last 20 batches")
    right.set(ylim=left.get_ylim())
    return figure
