"""What do old gradients cost, by optimizer, and what helps?

    python -m pipedream staleness            three minutes at most: a table and staleness.png
    python -m pipedream staleness --quick    without the remedies

PipeDream saves the flush and pays with old gradients. How many more batches do these need? Each
optimizer, delay and remedy is trained at its best learning rate.
"""

import itertools
from functools import partial
from pathlib import Path

import torch

from pipedream.backstage.output import check_output, draw_and_write
from pipedream.backstage.text import progress
from pipedream.staleness import tuning
from pipedream.staleness.delays import OPTIMIZERS, REMEDIES, Training, applies, delay_table
from pipedream_simple import check_value, format_table

FLAGS = {"--quick": "without the remedies, and with fewer seeds", "--out DIR": "for the picture"}
TAKES = "num_stages layers_per_stage hidden_size batch_size num_batches seed device network"
DEFAULTS = {
    "num_stages": 8,
    "num_microbatches": 1,
    "layers_per_stage": 2,
    "hidden_size": 32,
    "num_batches": 200,
}

LEGEND = """\
   Batches until the mean training loss of ten is below {target:g}: mean (lowest to
   highest) of {seeds} seeds, at the best of 7 or more learning rates, chosen on
   three other seeds. -: not all seeds within {batches}. Delay: by how many updates
   the gradients are old. 0: with a flush; 1: 2BW; {last} to 0, by stage: PipeDream
   with one microbatch per batch; {last}: the same with vertical sync. pipemare: its
   learning rates only; they change nothing at a delay of 1, nor spectrain at 0.
   nesterov needs momentum, so SGD has none; .9 is part of Muon."""
TARGET = 0.3

Cells = dict[tuple[str, str, str], list[float]]  # optimizer, delay, remedy -> batches, by seed


def main(config: dict, out: Path = Path(), quick: bool = False) -> None:
    """Delay by optimizer by remedy, each with its best learning rate."""
    check_value("num_stages", config["num_stages"], (int, 2, 1_000_000))  # 1: nothing is old
    check_output(out / "staleness.png")
    torch.set_num_threads(1)  # the matrices are small
    seeds = range(config["seed"], config["seed"] + (3 if quick else 5))
    cells = fill(config, seeds, ["none"] if quick else REMEDIES)
    for name in OPTIMIZERS:
        print("\n".join(format_table(table_of_remedies(name, cells, config["num_stages"]))) + "\n")
    sizes = {"seeds": len(seeds), "batches": config["num_batches"], "target": TARGET}
    print(LEGEND.format(**sizes, last=config["num_stages"] - 1))
    title = draw_and_write(partial(draw_cost, config["num_stages"], cells), out / "staleness.png")
    print(f"\n{out / 'staleness.png'}: {title}")


def fill(config: dict, seeds: range, remedies: list[str]) -> Cells:
    """Train every cell of the tables."""
    delays, cells = delay_table(config["num_stages"]), Cells()
    keys = itertools.product(OPTIMIZERS, delays, remedies)
    todo = [key for key in keys if applies(key[0], max(delays[key[1]]), key[2])]
    for number, (name, delay, remedy) in enumerate(todo, start=1):
        progress(f"{number} of {len(todo)}: {name}, delay {delay}, {remedy}")
        optimizer, rates = OPTIMIZERS[name]
        training = Training(config, delays[delay], optimizer, remedy)
        _, losses = tuning.fastest(training, rates, seeds, TARGET)
        cells[name, delay, remedy] = tuning.batches_to(losses, TARGET).tolist()
    progress("")
    return cells


def table_of_remedies(name: str, cells: Cells, num_stages: int) -> list[list[str]]:
    """One optimizer: a row per remedy, a column per delay."""
    delays = delay_table(num_stages)
    table = [[name, *delays]]
    for remedy in REMEDIES:
        found = [cells.get((name, delay, remedy)) for delay in delays]
        row = [tuning.spread(batches) if batches else "" for batches in found]
        table += [[f"  {remedy}", *row]] if any(row) else []
    return table


def price(batches: list[float], fresh: list[float]) -> list[float]:
    """How many times as many batches as fresh gradients need: mean, lowest and highest seed."""
    mean = sum(fresh) / len(fresh)
    each = [number / mean for number in batches]
    return [sum(each) / len(each), min(each), max(each)]


def draw_cost(num_stages: int, cells: Cells, visual):
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
        cost, hue = costs[name, delay, "none"], visual.HUES[[0, 1, 4, 5][i]]
        helped = min(costs[key][0] for key in costs if key[:2] == (name, delay))
        draw_price(axes, x + 0.2 * (i - 1.5), hue, cost, helped, bool(x), name)
    for microbatches in (num_stages, 4 * num_stages):
        gain = (microbatches + num_stages - 1) / microbatches
        axes.axhline(gain, color=visual.INK, lw=1, ls="--", zorder=0)
        text = f"no flush gains {gain:.1f}x over 1F1B\nwith {microbatches} microbatches"
        axes.text(len(delays) - 0.5, 0.99 * gain, text, ha="right", va="top", fontsize=8)
    axes.set_xticks(range(len(delays)), [f"delay {delay}" for delay in delays], fontsize=10)
    axes.set(xlim=(-0.5, len(delays) - 0.5))
    tuning.finish(axes, "", [1, 1.5, 2, 3, 4, 5], "x", "times as many batches", "upper left")
    return figure


def draw_price(axes, x: float, hue: str, cost: list[float], helped: float, pays: bool, name: str):
    """A point with the range of its seeds, and beside it what the best remedy makes of it.

    Without a delay there is nothing to pay, and nothing to help: these points are in the legend.
    """
    mean, low, high = cost
    axes.plot(x, mean, "o", color=hue, ms=8, label=None if pays else name)
    if high < torch.inf:  # all seeds got there
        axes.plot([x, x], [low, high], color=hue, lw=2)
    if high < torch.inf and pays:
        axes.text(x, 1.01 * high, f"{mean:.1f}", ha="center", va="bottom", color=hue)
    if helped < mean < torch.inf and pays:
        axes.plot(x + 0.07, helped, "o", mfc="white", mec=hue, ms=6)
