"""What do old gradients cost, by optimizer?

    python -m pipedream staleness            four minutes: a table and staleness.png
    python -m pipedream staleness --quick    half a minute: SGD and Adam, for a first look

PipeDream saves the flush and pays with old gradients. How many more batches do these need, to three
losses? Each optimizer and delay is trained at the learning rate that is best for this loss.
"""

import itertools
from functools import partial
from pathlib import Path

import torch

from pipedream.backstage.output import check_output, draw_and_write
from pipedream.backstage.text import progress
from pipedream.staleness import tuning
from pipedream.staleness.delays import OPTIMIZERS, Training, delay_table
from pipedream.staleness.tuning import TARGETS, mark, spread, tune_for
from pipedream_simple import check_value, format_table

FLAGS = {"--quick": "two optimizers, fewer rates and seeds", "--out DIR": "for the picture"}
TAKES = "num_stages layers_per_stage hidden_size batch_size num_batches seed device network"
DEFAULTS = {
    "num_stages": 8,
    "num_microbatches": 1,
    "layers_per_stage": 2,
    "hidden_size": 32,
    "num_batches": 300,
}

LEGEND = """\
   Delay 0, after a flush: batches until the mean training loss of ten is below
   the target, mean (lowest to highest) of {seeds} seeds. Others: times as many, on
   the same seed. Each at the learning rate that is best for this target on {choosing}
   other seeds; a rate is out if ten losses average more than {grown} times the
   first one. >, <: more, fewer on {clear:.0%} of the seeds or more; ~: neither. -: not
   all seeds get there in {batches} batches. Delay: by how many updates the gradients
   are old. 1: 2BW; {last} to 0, by stage: PipeDream with one microbatch per batch.
   Remedies are not judged: PipeMare's rates and a long Nesterov momentum need
   longer runs, predicted weights (SpecTrain) may help at once."""

Cells = dict[tuple[str, str], list[list[float]]]  # optimizer, delay -> by target: batches, by seed


def main(config: dict, out: Path = Path(), quick: bool = False) -> None:
    """Delay by optimizer by target, each with its best learning rate."""
    check_value("num_stages", config["num_stages"], (int, 2, 1_000_000))  # 1: nothing is old
    check_value("num_batches", config["num_batches"], (int, tuning.WINDOW, 1_000_000))
    check_output(out / "staleness.png")
    torch.set_num_threads(1)  # the matrices are small
    cells = fill(config, quick)
    for name in {name: None for name, _ in cells}:
        print("\n".join(format_table(table_of_prices(name, cells))) + "\n")
    print(tuning.fill_in(LEGEND, config, quick))
    title = draw_and_write(partial(draw_cost, cells), out / "staleness.png")
    print(f"\n{out / 'staleness.png'}: {title}")


def fill(config: dict, quick: bool) -> Cells:
    """Train every cell of the tables."""
    delays, cells = delay_table(config["num_stages"]), Cells()
    keys = [*itertools.product(["SGD", "Adam"] if quick else OPTIMIZERS, delays)]
    for number, (name, delay) in enumerate(keys, start=1):
        progress(f"{number} of {len(keys)}: {name}, delay {delay}")
        optimizer, rates = OPTIMIZERS[name]
        training = Training(config, delays[delay], optimizer)
        cells[name, delay] = tune_for(TARGETS, training, rates, quick).batches_to(TARGETS)
    progress("")
    return cells


def table_of_prices(name: str, cells: Cells) -> list[list[str]]:
    """One optimizer: a row per target, a column per delay."""
    first, *others = (delay for optimizer, delay in cells if optimizer == name)
    table = [[name, f"delay {first}", *others]]
    for number, target in enumerate(TARGETS):
        fresh = cells[name, first][number]
        row = [f"  {target:g}", spread(fresh)]
        for delay in others:
            batches = cells[name, delay][number]
            row.append(spread(price(batches, fresh), 2, mark(batches, fresh)))
        table.append(row)
    return table


def price(batches: list[float], fresh: list[float]) -> list[float]:
    """How many times as many batches as fresh gradients need, seed by seed; inf: not there."""
    there = max(fresh) < torch.inf
    return [a / b if there else torch.inf for a, b in zip(batches, fresh, strict=True)]


def draw_cost(cells: Cells, visual):
    """A panel per delay: prices by target, a line per optimizer, with the range of its seeds."""
    names = [*{name: None for name, _ in cells}]
    fresh, *delays = {delay: None for _, delay in cells}
    prices = {
        (name, delay): [price(*pair) for pair in zip(batches, cells[name, fresh], strict=True)]
        for (name, delay), batches in cells.items()
    }
    cost = {key: [sum(each) / len(each) for each in found] for key, found in prices.items()}
    once = sorted((cost[name, delays[0]][-1], name) for name in names)
    there = [f"{number:.2f}x ({name})" for number, name in once if number < torch.inf]
    title = "Not all seeds get there in these runs"
    if there:
        ends = " to ".join(dict.fromkeys([there[0], there[-1]]))
        title = f"One batch late, to a loss of {TARGETS[-1]:g}: {ends} the batches"
    most = max([max(p) for of in prices.values() for p in of if max(p) < torch.inf], default=1)
    lines = [
        "How many times as many batches old gradients need as fresh ones, to three losses.",
        "Mean and range of the seeds, each at the learning rate that is best for this loss.",
    ]
    figure = visual.new_picture(1400, 640, title, lines)
    ticks = [t for t in (0.5, 0.7, 1, 1.5, 2, 3, 4, 6, 8, 12) if t <= max(4, most)]
    for number, delay in enumerate(delays):
        axes = visual.add_axes(figure, 90 + 660 * number, 160, 610, 400)
        axes.axhline(1, color=visual.INK, lw=1, zorder=0)
        for place, (name, hue) in enumerate(zip(names, (0, 1, 4, 5), strict=False)):
            color, x = visual.HUES[hue], [n + 0.1 * place for n in range(len(TARGETS))]
            axes.plot(x, cost[name, delay], "o-", color=color, ms=7, lw=1.5, label=name)
            for at, each in zip(x, prices[name, delay], strict=True):
                if max(each) < torch.inf:
                    axes.plot([at, at], [min(each), max(each)], color=color, lw=2, alpha=0.5)
        axes.set_xticks(range(len(TARGETS)), [f"loss {target:g}" for target in TARGETS])
        axes.set(xlim=(-0.3, len(TARGETS) - 0.4), ylim=(0.5, max(4, 1.1 * most)))
        old = f"{delay} update{'' if delay == '1' else 's'} late"
        axes.set_title(old + ", by stage" * ("to" in delay), fontsize=11)
        tuning.finish(axes, "", ticks, "x", "times as many batches" * (number == 0), "lower left")
    return figure
