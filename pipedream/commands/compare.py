"""Which schedule? All of them on the same batches, side by side.

    python -m pipedream compare                        and schedules.png
    python -m pipedream compare --schedule my.csv      with the rows of a file beside ours

Times are simulated; losses, accuracy and bytes are measured. The defaults are not the story's: they
are sizes that all schedules can run, and times as the papers assume them.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch.nn.utils import parameters_to_vector

import pipedream_simple as simple
from pipedream.backstage.audit import plain_training
from pipedream.backstage.measures import peak_in_flight, peak_versions, rounded, tick
from pipedream.backstage.output import check_output, draw_and_write
from pipedream.backstage.text import diverged, progress
from pipedream.schedules.files import file_of
from pipedream.schedules.halves import train_plan
from pipedream.schedules.memory import Bytes, MemoryMeter, memory_formula
from pipedream.schedules.plans import Plan, all_plans, format_plans

FLAGS = {"--out DIR": "for the picture"}
REFUSES = "schedule weight_stashing vertical_sync"
DEFAULTS = {"num_microbatches": 8, "backward_time": 2, "layers_per_stage": 2, "chunks_per_gpu": 2}

SLOW = 0.5  # of a GPU's forward, for a message
SIMULATED = """\
   From GPU0 to the last, each at its peak: microbatches in flight (on one of a
   GPU's V stages it counts 1/V), weight versions kept, and updates missed
   (stale). At 1F1B's memory: no GPU holds more microbatches than GPU0 does with
   1f1b, nor a second weight version."""
MEASURED = """\
   KiB: bytes that exist, counted, at each GPU's peak; in all: activations,
   weights, their gradients and velocities. loss: of the last batch. to SGD: the
   largest difference of a weight from plain training without a pipeline, in
   float64."""


def main(config: dict, out: Path = Path()) -> None:
    check_output(out / "schedules.png")
    plans, reasons = all_plans(config)
    path, named = out / "schedules.png", {plan.name: plan for plan in plans}
    print("Simulated:", *format_plans("schedule", named, named["naive"]), SIMULATED, sep="\n")
    print("", *answers(config, plans), *reasons, sep="\n", flush=True)
    title = draw_and_write(partial(draw_plans, plans), path, file_of(config))
    print(f"\n{path}: {title}", flush=True)
    print("\nTrained and measured:", *measured_lines(plans), sep="\n")


def answers(config: dict, plans: list[Plan]) -> Iterator[str]:
    """The fastest; with fresh gradients, if that is another; at 1F1B's memory; with slow links."""
    plans = without_variants(plans)
    (most,) = (max(peak_in_flight(plan.schedule)) for plan in plans if plan.name == "1f1b")
    yield f"The fastest: {name_fastest(plans)}"
    fresh = [plan for plan in plans if max(peak_versions(plan.schedule)) == 1]
    if name_fastest(fresh) != name_fastest(plans):
        yield f"... with fresh gradients: {name_fastest(fresh)}"
    small = [plan for plan in fresh if max(peak_in_flight(plan.schedule)) <= most]
    yield f"The fastest at 1F1B's memory, in microbatches: {name_fastest(small)}"
    links, comm_time = "free", 0.0
    if not any(simple.per_stage(config, "comm_time")):
        links, comm_time = "slow", SLOW * min(simple.per_stage(config, "forward_time"))
    others = without_variants(all_plans({**config, "comm_time": comm_time})[0])
    yield f"The fastest with {links} links, --comm_time {comm_time:g}: {name_fastest(others)}"


def name_fastest(plans: list[Plan]) -> str:
    """The names of the fastest, and their time."""
    times = {plan.name: tick(simple.makespan(plan.events)) for plan in plans}
    least = min(times.values())
    names = [name for name in times if times[name] == least]
    if len(names) > 2:
        names[1:] = [f"{len(names) - 1} others"]
    return f"{', '.join(names)} ({least:.7g})"


def without_variants(plans: list[Plan]) -> list[Plan]:
    """PipeDream's other ways with its weights take the same time."""
    return [plan for plan in plans if plan.name == plan.name.strip()]


def measured_lines(plans: list[Plan]) -> list[str]:
    """Train on every plan: a table, its legend, and whether memory_formula predicted the memory."""
    table = [["schedule", "loss", "accuracy", "to SGD", "KiB of activations", "KiB in all"]]
    agree, bad = list[bool](), False
    for number, (plan, error) in enumerate(zip(plans, distances(plans), strict=True), start=1):
        progress(f"training as {plan.name.strip()}, {number} of {len(plans)}")
        meter = MemoryMeter(plan.schedule)
        run = meter.train(plan)
        bad |= diverged(run.losses)
        cells = f"{run.losses[-1]:.4f}", f"{run.test_accuracy:.1%}", f"{error:.1e}"
        activations = in_kib(held.activations for held in meter.peak)
        table.append([plan.name, *cells, activations, in_kib(map(sum, meter.peak))])
        if plan.config["network"] == "residual":
            agree += map(Bytes.__eq__, meter.peak, memory_formula(plan))
    progress("")
    again = [simple.RECOMPUTED] * plans[0].config["recompute"] + [simple.DIVERGED] * bad
    formula = f"   Memory is as memory_formula predicts on {sum(agree)} of {len(agree)} GPUs."
    return [*simple.format_table(table), MEASURED, *again, *([formula] if agree else [])]


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
    """The simulated runs one below the other on one time axis, as long as labels have room."""
    plans = without_variants(plans)
    runs = [(plan, rounded(plan.events)) for plan in plans]
    ends = {plan.name: simple.makespan(events) for plan, events in runs}
    until = max([end for name, end in ends.items() if name != "naive"], default=ends["naive"])
    narrowest = min((events for _, events in runs), key=visual.shortest)
    until = min(until, visual.shortest(narrowest) * (visual.WIDEST // visual.SLOT))
    devices = max(len(plan.schedule) for plan in plans)
    lane, top = min(42, 3000 / (devices * len(plans))), 3 * visual.LINE
    panel = visual.LINE + lane * devices + 50
    width = visual.LEFT + visual.plot_width(narrowest, until) + visual.RIGHT
    fastest = ", ".join(name for name, end in ends.items() if end == min(ends.values()))
    title = f"{simple.count(len(plans), 'schedule')}, one time axis. The fastest: {fastest}"
    about = "The beginning of each run, simulated. F3: forward of microbatch 3; 8F3: on stage 8."
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
