"""Is PipeDream worth it? Every loss over simulated time.

    python -m pipedream worth                a minute: a table and worth.png
    python -m pipedream worth --num_microbatches 16
    python -m pipedream worth --num_microbatches 8 --layers_per_stage 6

A schedule without a flush has more batches in the same time, and each of them helps less. Each is
trained at its best learning rate, with the recurrence that a pipeline computes, not op by op
(except without stashing). The third line is for zb-v and dualpipe-v: they need layers that divide
among twice as many stages, and dualpipe-v at least two microbatches per GPU.
"""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pipedream.backstage.measures import in_short, peak_in_flight, staleness
from pipedream.backstage.output import check_output, draw_and_write
from pipedream.backstage.text import progress
from pipedream.schedules.halves import train_plan
from pipedream.schedules.plans import Plan, all_plans
from pipedream.staleness import tuning
from pipedream.staleness.delays import Training, delayed_training, momentum
from pipedream_simple import UserError, check_value, format_table, utilization

FLAGS = {"--loss X": "the target, 0.3 unless given", "--out DIR": "for the picture"}
DEFAULTS = {"num_batches": 200, "backward_time": 2}

SEEDS = 10
LEGEND = """\
   Batches, and simulated time, until the mean training loss of ten batches is
   below {target:g}: mean (lowest to highest) of {seeds} seeds, at the best of 6 or more
   learning rates, chosen on three other seeds; no stashing has pipedream's.
   first: on how many seeds it gets there before pipedream. -: not all seeds got
   there. held: the most microbatches in flight on a GPU."""


class Curve(NamedTuple):
    """A schedule's losses over simulated time."""

    plan: Plan
    stale: int  # the most updates that a forward misses
    times: list[float]  # one per batch
    rate: float
    losses: Tensor  # (seeds, batches)
    batches: list[float]  # to the target, one entry per seed; inf: not in this run

    @property
    def reached(self) -> list[float]:
        """When the loss is below the target, per seed: inf if not in this run."""
        return [self.times[int(n) - 1] if n < torch.inf else n for n in self.batches]

    @property
    def mean(self) -> float:
        return sum(self.reached) / len(self.reached)

    @property
    def when(self) -> str:
        return f"t{self.mean:.0f}" if self.mean < torch.inf else "not all seeds"

    def ahead_of(self, other: "Curve") -> int:
        """On how many seeds it gets to the target before the other."""
        return sum(a < b for a, b in zip(self.reached, other.reached, strict=True))


def main(config: dict, out: Path = Path(), loss: float = 0.3) -> None:
    """Every schedule's loss over simulated time, and the time to a loss."""
    if config["momentum"] == 1:
        raise UserError("momentum=1 must be less than 1 here: it never forgets")
    check_value("loss", loss, (float, 0.001, 10))
    check_output(out / "worth.png")
    torch.set_num_threads(1)  # the matrices are small
    curves, reasons = curves_of(config, loss)
    hero = next(curve for curve in curves if curve.plan.name == "pipedream")
    print("\n".join([*format_table(table_of_curves(curves, hero, loss)), *reasons]))
    print(LEGEND.format(target=loss, seeds=SEEDS))
    title = draw_and_write(partial(draw_worth, curves, hero, loss), out / "worth.png")
    print(f"\n{out / 'worth.png'}: {title}")


def curves_of(config: dict, target: float) -> tuple[list[Curve], list[str]]:
    """Train for every schedule; and the reasons why some are impossible.

    Schedules with the same delays share their losses. Without stashing there is no recurrence of
    whole batches: that is trained op by op, at pipedream's rate.
    """
    plans, reasons = all_plans(config)
    seeds = range(config["seed"], config["seed"] + SEEDS)
    trained: dict[tuple, tuple[float, Tensor]] = {}  # delays -> rate, losses
    curves = []
    for plan in plans:
        progress(f"training as {plan.name.strip()}")
        old = staleness(plan.schedule, config["num_microbatches"])
        delays = (*old,) if any(old) else (0,) * config["num_stages"]
        if delays not in trained:
            trained[delays] = train_delayed(config, [*delays], seeds, target)
        rate, losses = trained[delays]
        if "no stashing" in plan.name:
            runs = ({**plan.config, "seed": seed, "learning_rate": rate} for seed in seeds)
            losses = torch.tensor([train_plan(plan._replace(config=run)).losses for run in runs])
        batches = tuning.batches_to(losses, target).tolist()
        curves.append(Curve(plan, max(old), loss_times(plan), rate, losses, batches))
    progress("")
    return curves, reasons


def train_delayed(config: dict, delays: list[int], seeds: range, target: float):
    """The recurrence at its best rate: that, in the units of --learning_rate, and the losses."""
    beta, rates = config["momentum"], [config["learning_rate"] * 2.0**k for k in range(2, -4, -1)]
    training = Training(config, delays, partial(momentum, beta=beta))
    rate, _ = tuning.fastest(training, rates, seeds, target)
    losses, _ = delayed_training(training, [rate], seeds)  # the whole run
    return rate * (1 - beta), losses[0]


def loss_times(plan: Plan) -> list[float]:
    """When the loss of each batch is known: at the end of its last forward on the last stage."""
    last, in_batch = plan.config["num_stages"] - 1, plan.config["num_microbatches"]
    forwards = (e for e in plan.events if e.op[:2] == (last, "F"))  # in the order of their ends
    return [*{event.op.microbatch // in_batch: event.end for event in forwards}.values()]


def table_of_curves(curves: list[Curve], hero: Curve, target: float) -> list[list[str]]:
    heads = "schedule", "busy", "held", "stale", "rate", "batches", f"time to {target:g}", "first"
    table = [[*heads]]
    for curve in curves:
        cells = [curve.plan.name, f"{utilization(curve.plan.events):.1%}"]
        cells += [*in_short([max(peak_in_flight(curve.plan.schedule))]), str(curve.stale)]
        cells += [f"{curve.rate:.2g}", tuning.spread(curve.batches), tuning.spread(curve.reached)]
        table.append([*cells, "" if curve is hero else str(curve.ahead_of(hero))])
    return table


COLORED = "pipedream", "  vertical sync", "zb-v", "zb-h2", "  no stashing", "interleaved-zb"
DASHES = {"  no stashing": "--", "1f1b": "--", "naive": ":", "zb-h1": "-.", "looped-bfs": ":"}


def draw_worth(curves: list[Curve], hero: Curve, target: float, visual):
    """Losses over simulated time, until the slowest but naive has reached the target."""
    best = min((curve for curve in curves if not curve.stale), key=lambda curve: curve.mean)
    flush = best.plan.name
    title = f"A loss of {target:g}: pipedream {hero.when}, the best flush ({flush}) {best.when}"
    lines = [
        f"pipedream gets there before {flush} on {hero.ahead_of(best)} of {SEEDS} seeds.",
        "Simulated time, means at the best learning rates; bands: the seeds of these two.",
    ]
    figure = visual.new_picture(1400, 720, title, lines)
    axes = visual.add_axes(figure, 110, 140, 900, 490)
    for curve in curves:
        name = curve.plan.name
        color = visual.HUES[COLORED.index(name)] if name in COLORED else visual.GREY
        times, losses = curve.times[tuning.WINDOW - 1 :], tuning.means(curve.losses)
        label, style = f"{name.strip()}: {curve.when}", DASHES.get(name, "-")
        tuning.draw_losses(axes, times, losses, color, style, label, curve in (hero, best))
    axes.axhline(target, color=visual.INK, lw=1, ls=":")
    there = [c.mean for c in curves if c.mean < torch.inf and c.plan.name != "naive"]
    until = 1.3 * max(there, default=max(curve.times[-1] for curve in curves))
    tuning.finish(axes, "simulated time")
    axes.set(xlim=(0, until), ylim=(target / 3, 3))
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1), frameon=False, fontsize=10)
    return figure
