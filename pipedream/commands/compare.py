"""Which schedule? All of them on the same batches, side by side.

    python -m pipedream compare                        and schedules.png
    python -m pipedream compare --schedule my.csv      with the rows of a file beside ours

Times are simulated; losses, accuracy and bytes are measured.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch.nn.utils import parameters_to_vector

import pipedream_simple as simple
from pipedream.backstage.audit import plain_training
from pipedream.backstage.measures import rounded
from pipedream.backstage.output import draw_and_write
from pipedream.schedules.files import file_of
from pipedream.schedules.halves import train_plan
from pipedream.schedules.memory import Bytes, MemoryMeter, memory_formula
from pipedream.schedules.plans import Plan, all_plans, format_plans

FLAGS = {"--out DIR": "for the picture"}

LEGEND = """\
   From GPU0 to the last, each at its peak: microbatches in flight (interleaved:
   each on one chunk of the GPU), weight versions kept, and updates missed
   (stale). KiB: bytes that exist, counted; in all: activations, weights, their
   gradients and velocities. loss: of the last batch. to SGD: the largest
   difference of a weight from plain training without a pipeline, in float64."""


def main(config: dict, out: Path = Path()) -> None:
    plans, reasons = all_plans(config)
    path, named = out / "schedules.png", {plan.name: plan for plan in plans}
    title = draw_and_write(partial(draw_plans, plans), path, file_of(config))
    print("Simulated:", *format_plans("schedule", named, named["naive"]), sep="\n")
    print("\nTrained and measured:", *measured_lines(plans), *reasons, sep="\n")
    print(f"\n{path}: {title}")


def measured_lines(plans: list[Plan]) -> list[str]:
    """Train on every plan: a table, its legend, and whether memory_formula predicted the memory."""
    table = [["schedule", "loss", "accuracy", "to SGD", "KiB of activations", "KiB in all"]]
    agree: list[bool] = []
    for plan, error in zip(plans, distances(plans), strict=True):
        meter = MemoryMeter(plan.schedule)
        run = meter.train(plan)
        cells = f"{run.losses[-1]:.4f}", f"{run.test_accuracy:.1%}", f"{error:.1e}"
        activations = in_kib(held.activations for held in meter.peak)
        table.append([plan.name, *cells, activations, in_kib(map(sum, meter.peak))])
        if plan.config["network"] == "residual":
            agree += map(Bytes.__eq__, meter.peak, memory_formula(plan))
    again = [simple.RECOMPUTED] * plans[0].config["recompute"]
    formula = f"   Memory is as memory_formula predicts on {sum(agree)} of {len(agree)} GPUs."
    return [*simple.format_table(table), LEGEND, *again, *([formula] if agree else [])]


def in_kib(per_gpu: Iterable[int]) -> str:
    return simple.format_per_gpu([f"{num_bytes / 1024:,.0f}" for num_bytes in per_gpu])


def distances(plans: list[Plan]) -> Iterator[float]:
    """The largest difference of a weight from plain training on whole batches, in float64."""
    alone = {**plans[0].config, "device": "cpu", "num_microbatches": 1}
    plain = parameters_to_vector(plain_training(alone, torch.float64).parameters())
    for plan in plans:
        on_cpu = plan._replace(config={**plan.config, "device": "cpu"})
        weights = [w for stage in train_plan(on_cpu, torch.float64).weights for w in stage.values()]
        yield (parameters_to_vector(weights) - plain).abs().max().item()


def draw_plans(plans: list[Plan], visual):
    """The simulated runs one below the other on one time axis, until the slowest but naive ends."""
    plans = [plan for plan in plans if plan.name == plan.name.strip()]  # variants look the same
    runs = [(plan, rounded(plan.events)) for plan in plans]
    ends = {plan.name: simple.makespan(events) for plan, events in runs}
    until = max([end for name, end in ends.items() if name != "naive"], default=ends["naive"])
    devices = max(len(plan.schedule) for plan in plans)
    lane, top = min(42, 3000 / (devices * len(plans))), 3 * visual.LINE
    panel = visual.LINE + lane * devices + 50
    width = visual.LEFT + visual.plot_width(runs[0][1], until) + visual.RIGHT
    fastest = ", ".join(name for name, end in ends.items() if end == min(ends.values()))
    title = f"{simple.count(len(plans), 'schedule')}, one time axis. The fastest: {fastest}"
    about = "Simulated; a long naive run is cut off. F3: forward of microbatch 3; 8F3: on stage 8."
    figure = visual.new_picture(width, top + panel * len(plans) + 60, title, [about])
    for row, (plan, events) in enumerate(runs):
        place, lanes = top + row * panel, len(plan.schedule)
        length = f"{ends[plan.name]:.7g} time units, {simple.utilization(events):.1%} utilization"
        visual.add_heading(figure, place, f"{plan.name}: {length}")
        axes = visual.add_lanes(figure, place + visual.LINE, lane * lanes, lanes, until)
        shown = [event for event in events if event.start < until]
        visual.draw_ops(axes, shown, stages=plan.config["num_stages"] > lanes)
    visual.add_legend(figure, [event.op for _, events in runs for event in events], [visual.IDLE])
    return figure
