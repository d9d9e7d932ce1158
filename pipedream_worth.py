#!/usr/bin/env python3
"""Is PipeDream worth it? Loss against simulated time, for every schedule.

    python pipedream_lab.py worth                a minute: a table and worth.png
    python pipedream_lab.py worth --num_microbatches 16

A schedule without a flush has more batches in the same time, and each of them helps less. Training
is that of pipedream_staleness.py: its recurrence and its choice of learning rates.
"""

import signal
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during a slow import: no traceback

import torch

import pipedream_lab
from pipedream_lab import Plan, all_plans, check_output, train_plan
from pipedream_simple import (
    UserError,
    check_value,
    format_table,
    peak_in_flight,
    run_main,
    staleness,
    utilization,
)
from pipedream_staleness import (
    IN_BATCH,
    WINDOW,
    Tuned,
    batches_to,
    draw_and_write,
    draw_losses,
    finish_losses,
    means,
    momentum,
    progress,
    spread,
    tuned,
)


def loss_times(plan: Plan) -> list[float]:
    """When the loss of each batch is known: at the end of its last forward on the last stage."""
    last, in_batch = plan.config["num_stages"] - 1, plan.config["num_microbatches"]
    times = [0.0] * plan.config["num_batches"]
    for op, _, _, end in plan.events:
        if op.kind == "F" and op.stage == last:
            times[op.microbatch // in_batch] = max(times[op.microbatch // in_batch], end)
    return times


class Curve(NamedTuple):
    """A schedule's losses over simulated time."""

    plan: Plan
    times: list[float]  # one per batch
    tuned: Tuned

    def reached(self) -> list[float]:
        """When the loss is below the target, per seed: inf if not in this run."""
        at = dict(enumerate(self.times, start=1))
        return [at.get(n, torch.inf) for n in self.tuned.batches]  # type: ignore[call-overload]


def curves_of(config: dict, target: float) -> tuple[list[Curve], list[str]]:
    """Train for every schedule of the lab. Those with the same delays share their losses."""
    plans, reasons = all_plans(config)
    beta, seeds = config["momentum"], range(config["seed"], config["seed"] + 10)
    rates = [config["learning_rate"] * 2.0**k for k in (2, 1, 0, -1, -2, -3)]
    trained: dict[tuple, Tuned] = {}
    curves = []
    for plan in plans:
        progress(f"training as {plan.name.strip()}")
        old = staleness(plan.schedule, plan.config[IN_BATCH])
        delays = old if any(old) else [0] * plan.config["num_stages"]
        stashing = "no stashing" not in plan.name
        key, with_stash = (*delays, stashing), (*delays, True)
        if key not in trained and stashing:
            optimizer, network = partial(momentum, beta=beta), {**plan.config, "learning_rate": 1}
            best = tuned(network, delays, optimizer, rates, target, seeds, whole=True)
            trained[key] = best._replace(rate=best.rate * (1 - beta))  # as --learning_rate
        elif key not in trained:  # no recurrence of whole batches: op by op, at pipedream's rate
            rate = trained[with_stash].rate
            configs = [{**plan.config, "seed": s, "learning_rate": rate} for s in seeds]
            runs = [train_plan(plan._replace(config=config)) for config in configs]
            losses = torch.tensor([run.losses for run in runs])
            trained[key] = Tuned(rate, losses, batches_to(losses, target).tolist())
        curves.append(Curve(plan, loss_times(plan), trained[key]))
    progress("")
    return curves, reasons


WORTH_LEGEND = """\
   Batches, and simulated time, until the mean training loss of ten batches is
   below {target:g}: mean (lowest to highest) of {seeds} seeds, at the best of 6 or more
   learning rates, chosen on three other seeds; no stashing has pipedream's.
   first: on how many seeds it gets there before pipedream. -: not all seeds got
   there. held: the most microbatches in flight on a GPU (interleaved: on one of
   its chunks each)."""


def worth(config: dict, out: Path = Path(), loss: float = 0.3) -> None:
    """Is PipeDream worth it? Every schedule's loss over simulated time, and the time to a loss.

    A schedule without a flush has more batches in the same time, and each of them helps less.
    Trained with the recurrence that a pipeline computes, not op by op (but for no stashing).
    Writes worth.png.
    """
    if config["momentum"] == 1:
        raise UserError("momentum=1 must be less than 1 here: it never forgets")
    check_value("loss", loss, (float, 0.001, 10))
    check_output(out / "worth.png")
    torch.set_num_threads(1)
    curves, reasons = curves_of(config, loss)
    hero = hero_of(curves)
    heads = ["schedule", "busy", "held", "stale", "rate", "batches", f"time to {loss:g}", "first"]
    table = [heads]
    for curve in curves:
        plan, times = curve.plan, curve.reached()
        old = max(staleness(plan.schedule, plan.config["num_microbatches"]))
        first = sum(a < b for a, b in zip(times, hero.reached(), strict=True))
        cells = [
            f"{utilization(plan.events):.1%}",
            str(max(peak_in_flight(plan.schedule))),
            str(old),
        ]
        cells += [f"{curve.tuned.rate:.2g}", spread(curve.tuned.batches), spread(times)]
        table.append([plan.name, *cells, "" if curve is hero else str(first)])
    print("\n".join([*format_table(table), *reasons]))
    print(WORTH_LEGEND.format(target=loss, seeds=len(hero.tuned.batches)))
    title = draw_and_write(partial(draw_worth, curves, loss), out / "worth.png", config)
    print(f"\n{out / 'worth.png'}: {title}")


def hero_of(curves: list[Curve]) -> Curve:
    return next(curve for curve in curves if curve.plan.name == "pipedream")


def draw_worth(curves: list[Curve], target: float, visual):
    """Losses over simulated time, until the slowest but naive has reached the target."""
    mean = {c.plan.name: sum(c.reached()) / len(c.reached()) for c in curves}
    flushing = [c for c in curves if not max(staleness(c.plan.schedule, c.plan.config[IN_BATCH]))]
    best = min(flushing, key=lambda c: mean[c.plan.name])
    hero = hero_of(curves)
    first = sum(a < b for a, b in zip(hero.reached(), best.reached(), strict=True))
    when = {name: f"t{t:.0f}" if t < torch.inf else "not all seeds" for name, t in mean.items()}
    title = f"A loss of {target:g}: pipedream {when['pipedream']}, "
    title += f"the best flush ({best.plan.name}) {when[best.plan.name]}"
    lines = [
        f"pipedream gets there before {best.plan.name} on {first} of {len(hero.reached())} seeds.",
        "Simulated time, means at the best learning rates; bands: the seeds of these two.",
    ]
    figure = visual.new_picture(1400, 720, title, lines)
    axes = visual.add_axes(figure, 110, 140, 1000, 490)
    shown = [t for name, t in mean.items() if t < torch.inf and name != "naive"]
    hues = {"pipedream": 0, "  vertical sync": 1, "  no stashing": 4, "interleaved": 5}
    hues |= {"zb-h1": 2, "zb-h2": 3}
    for curve in curves:
        name = curve.plan.name
        color = visual.HUES[hues[name]] if name in hues else visual.GREY
        style = {"  no stashing": "--", "1f1b": "--", "naive": ":"}.get(name, "-")
        times, losses = curve.times[WINDOW - 1 :], means(curve.tuned.losses)
        band, label = curve in (hero, best), f"{name.strip()}: {when[name]}"
        draw_losses(axes, times, losses, color, style, label, band)
    axes.axhline(target, color=visual.INK, lw=1, ls=":")
    until = 1.3 * max(shown, default=max(c.times[-1] for c in curves))
    finish_losses(axes, "simulated time")
    axes.set(xlim=(0, until), ylim=(target / 3, 3))
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1), frameon=False, fontsize=10)
    return figure


if __name__ == "__main__":  # python pipedream_worth.py is a command of the lab
    sys.argv[:1] = ["pipedream_lab.py", "worth"]
    sys.exit(run_main(pipedream_lab.main))
