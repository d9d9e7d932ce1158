"""Is PipeDream worth it? The simulated time to three losses.

    python -m pipedream worth                a minute or two: tables and worth.png
    python -m pipedream worth --num_microbatches 16
    python -m pipedream worth --quick        half a minute, for a first look

A schedule without a flush has more batches in the same time, and each of them helps less. Each is
trained at the learning rate that is best for that loss, with the recurrence that a pipeline with
weight stashing computes, not op by op.
"""

import textwrap
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from pipedream.backstage.measures import in_short, peak_in_flight, staleness
from pipedream.backstage.output import check_output, draw_and_write
from pipedream.backstage.text import progress
from pipedream.schedules.plans import Plan, all_plans
from pipedream.staleness import tuning
from pipedream.staleness.delays import Training, momentum
from pipedream.staleness.tuning import TARGETS, Tuned, mark, spread, tune_for
from pipedream_simple import UserError, check_value, count, format_per_gpu, format_table

FLAGS = {
    "--loss X ...": "the targets; 0.3 0.1 0.05 unless given",
    "--quick": "fewer learning rates and seeds",
    "--out DIR": "for the picture",
}
DEFAULTS = {
    "num_microbatches": 8,
    "layers_per_stage": 2,
    "num_batches": 200,
    "backward_time": 2,
    "chunks_per_gpu": 2,
}
REFUSES = "schedule weight_stashing vertical_sync"

LEGEND = """\
   Batches: until the mean training loss of ten is below the target: mean
   (lowest to highest) of {seeds} seeds, at the learning rate that is best for this
   target on {choosing} other seeds. A rate is out if ten losses average more than {grown}
   times the first one. Time: when that batch's loss is known, by the number of
   microbatches in a batch: a forward of a batch on a stage takes forward_time.
   <, >: sooner, later than pipedream on {clear:.0%} of the seeds or more (by chance
   once in 50; with --quick in 16); ~: neither. -: not all seeds get there in
   {batches} batches. old: how many updates old the gradients are, GPU by GPU. held:
   the most microbatches in flight on a GPU."""


class Race(NamedTuple):
    """A schedule on its way to the targets."""

    plan: Plan
    delays: tuple[int, ...]  # by stage: updates that a forward misses
    times: list[list[float]]  # by target: one per seed; inf: not in this run

    @property
    def name(self) -> str:
        return self.plan.name.strip()


def main(
    config: dict, out: Path = Path(), loss: Sequence[float] = TARGETS, quick: bool = False
) -> None:
    """The simulated time of every schedule to each loss."""
    if config["momentum"] == 1:
        raise UserError("momentum=1 must be less than 1 here: it never forgets")
    if not isinstance(loss, list | tuple) or not 1 <= len({*loss}) <= 3:
        raise UserError(f"loss={loss!r} must be one to three targets")
    for target in loss:
        check_value("loss", target, (float, 0.001, 10))
    targets = sorted({*loss}, reverse=True)
    check_value("num_batches", config["num_batches"], (int, tuning.WINDOW, 1_000_000))
    check_output(out / "worth.png")
    torch.set_num_threads(1)  # the matrices are small
    races, reasons, tuned = race(config, targets, quick)
    print("\n".join(format_table(table_of_batches(tuned, targets))) + "\n")
    print("\n".join([*format_table(table_of_races(races, targets)), *reasons]))
    print(tuning.fill_in(LEGEND, config, quick))
    print("", *conclude(races, targets), sep="\n")
    title = draw_and_write(partial(draw_worth, races, targets), out / "worth.png")
    print(f"\n{out / 'worth.png'}: {title}")


def race(config: dict, targets: list[float], quick: bool) -> tuple[list[Race], list[str], dict]:
    """Every schedule; the reasons why some are impossible; and delays -> what was trained."""
    plans, reasons = all_plans(config)
    tuned: dict[tuple[int, ...], Tuned] = {}
    races = []
    for plan in (plan for plan in plans if plan.config["weight_stashing"]):  # no recurrence without
        old = staleness(plan.schedule, config["num_microbatches"])
        delays = (*old,) if any(old) else (0,) * config["num_stages"]
        if delays not in tuned:
            progress(f"training as {plan.name.strip()}")
            tuned[delays] = train_delayed(config, [*delays], targets, quick)
        known = [time / config["num_microbatches"] for time in loss_times(plan)]
        batches = tuned[delays].batches_to(targets)
        times = [[known[int(n) - 1] if n < torch.inf else n for n in each] for each in batches]
        races.append(Race(plan, delays, times))
    progress("")
    return races, reasons, tuned


def train_delayed(config: dict, delays: list[int], targets: list[float], quick: bool) -> Tuned:
    """The recurrence at the best rate for each target."""
    beta, rates = config["momentum"], [config["learning_rate"] * 2.0**k for k in range(2, -4, -1)]
    training = Training(config, delays, partial(momentum, beta=beta))
    tuned = tune_for(targets, training, rates, quick)
    return tuned._replace(rates=[rate * (1 - beta) for rate in tuned.rates])  # --learning_rate


def loss_times(plan: Plan) -> list[float]:
    """When the loss of each batch is known: at the end of its last forward on the last stage."""
    last, in_batch = plan.config["num_stages"] - 1, plan.config["num_microbatches"]
    forwards = (e for e in plan.events if e.op[:2] == (last, "F"))  # in the order of their ends
    return [*{event.op.microbatch // in_batch: event.end for event in forwards}.values()]


def table_of_batches(tuned: dict[tuple[int, ...], Tuned], targets: list[float]) -> list[list[str]]:
    table = [["old", *(part for target in targets for part in (f"batches to {target:g}", "rate"))]]
    for delays, each in tuned.items():
        row = zip(each.batches_to(targets), each.rates, strict=True)
        cells = [cell for batches, rate in row for cell in (spread(batches), f"{rate:.2g}")]
        table.append([format_per_gpu([*delays]), *cells])
    return table


def hero_of(races: list[Race]) -> Race:
    return next(one for one in races if one.name == "pipedream")


def marks_of(one: Race, hero: Race) -> tuple[str, ...]:
    """By target: is it sooner?"""
    return tuple(mark(*pair) for pair in zip(one.times, hero.times, strict=True))


def table_of_races(races: list[Race], targets: list[float]) -> list[list[str]]:
    table = [["schedule", "held", *(f"time to {target:g}" for target in targets)]]
    hero = hero_of(races)
    for one in races:
        signs = marks_of(one, hero) if one is not hero else [""] * len(targets)
        cells = [spread(each, sign=sign) for each, sign in zip(one.times, signs, strict=True)]
        held = in_short([max(peak_in_flight(one.plan.schedule))])
        table.append([one.plan.name, *held, *cells])
    return table


def conclude(races: list[Race], targets: list[float]) -> list[str]:
    """Which schedules are ahead of pipedream, at which targets."""
    hero, alike = hero_of(races), defaultdict[tuple[str, ...], list[str]](list)
    for one in races:
        if one is not hero:
            alike[marks_of(one, hero)].append(one.name)
    words = {"<": "Sooner than pipedream", ">": "Later than pipedream", "~": "About as soon"}
    words["-"] = "Not all seeds get there"
    lines = []
    for marks, names in sorted(alike.items()):
        parts = [f"{target:g} {each}" for target, each in zip(targets, marks, strict=True)]
        at = f"{words[marks[0]]} at every target" if len({*marks}) == 1 else " ".join(parts)
        lines.append(textwrap.fill(f"{at}: {', '.join(names)}.", 80, subsequent_indent="   "))
    return lines


def draw_worth(races: list[Race], targets: list[float], visual):
    """A panel per target, a row per schedule but naive: times by pipedream's on the same seed."""
    hero = hero_of(races)
    rows = sorted((one for one in races if one.name != "naive"), key=lambda one: sum(one.times[-1]))
    marks = [*zip(*(marks_of(one, hero) for one in rows), strict=True)]  # by target
    ahead = [[one.name for one, m in zip(rows, each, strict=True) if m == "<"] for each in marks]
    names = [" and ".join(each) if len(each) < 3 else f"{len(each)} schedules" for each in ahead]
    parts = [f"{each or 'none'} at {target:g}" for each, target in zip(names, targets, strict=True)]
    title = f"Clearly sooner than PipeDream: {', '.join(parts) if any(names) else 'none'}"
    microbatches = count(hero.plan.config["num_microbatches"], "microbatch")
    lines = [
        f"{microbatches}: simulated time to a training loss, divided by "
        "PipeDream's on the same seed: mean and range.",
        "Each at the best rate for this loss. Filled: clearly different. Red: old gradients.",
    ]
    high, width = 36 * len(rows), (1200 - 30 * len(targets)) / len(targets)
    figure = visual.new_picture(1400, 240 + high, title, lines)
    most = max(max(ratios_of(one, hero, n), default=1) for one in rows for n in range(len(targets)))
    ticks = [tick for tick in (0.5, 0.7, 1, 1.4, 2, 3, 4, 6, 8, 12, 16, 32) if tick <= 1.3 * most]
    for number, target in enumerate(targets):
        axes = visual.add_axes(figure, 170 + number * (width + 40), 160, width, high)
        axes.axvline(1, color=visual.INK, lw=1)
        if max(hero.times[number]) == torch.inf:
            axes.text(1, len(rows) / 2, "PipeDream does not get there", ha="center", fontsize=10)
        for y, one in enumerate(rows):
            draw_row(axes, y, one, hero, number, visual)
        axes.set_yticks(range(len(rows)), [one.name * (number == 0) for one in rows], fontsize=10)
        axes.set(xscale="log", ylim=(len(rows) - 0.4, -0.6), xlim=(0.45, 1.4 * most))
        axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
        axes.minorticks_off()
        axes.set_title(f"to a loss of {target:g}", fontsize=11)
        axes.spines["bottom"].set_visible(True)
    return figure


def ratios_of(one: Race, hero: Race, number: int) -> list[float]:
    """Times to that target by those of the hero, by seed; none where not all seeds get there."""
    pairs = [*zip(one.times[number], hero.times[number], strict=True)]
    return [a / b for a, b in pairs] if max(map(max, pairs)) < torch.inf else []


def draw_row(axes, y: float, one: Race, hero: Race, number: int, visual) -> None:
    """A point, and a line from the lowest to the highest seed."""
    if not (ratios := ratios_of(one, hero, number)):
        return
    color = visual.HUES[4] if any(one.delays) else visual.HUES[0]
    mean = sum(ratios) / len(ratios)
    filled = one is hero or marks_of(one, hero)[number] != "~"
    axes.plot([min(ratios), max(ratios)], [y, y], color=color, lw=2, zorder=1)
    axes.plot(mean, y, "o", color=color, mfc=color if filled else "white", ms=8, zorder=2)
    axes.text(1.07 * max(ratios), y, f"{mean:.2f}", va="center", color=color, fontsize=9)
