#!/usr/bin/env python3
"""Five pictures of pipeline parallelism, drawn from the schedules that pipedream_simple.py runs.

    python pipedream_visual.py                       five PNG files in the current folder
    python pipedream_visual.py --out pictures        in another folder, created if necessary
    python pipedream_visual.py --num_stages 8        every CONFIG key is also a flag
    python pipedream_visual.py --animate             also pipeline.gif, the run as an animation

CONFIG, schedules, times and weight versions are those of pipedream_simple.py. This file draws them,
and measures on them what it says in a title. It needs no display.

Read it from top to bottom: look, primitives, the five pictures, the animation, files, main.
"""

import itertools
import math
import os
import shutil
import signal
import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during a slow import: no traceback
os.environ["MPLBACKEND"] = "agg"  # the reader's own may need a display, or not exist

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image

from pipedream_simple import (
    Event,
    Op,
    Schedule,
    UserError,
    build_schedule,
    count,
    input_of,
    makespan,
    memory_held,
    mismatches,
    parse_config,
    peak_in_flight,
    peak_versions,
    run_main,
    schedule_name,
    simulate,
    tick,
    utilization,
)

# --------------------------------------------------------------------------------------- look
#
# Hue says which microbatch, dark or light says forward or backward, and a label repeats both where
# it fits: nothing is told by color alone. Lengths are in pixels.

HUES = ("#0000cc", "#a66300", "#3c2859", "#8500a6", "#a60000", "#208080")  # microbatch m: m % 6
INK, GREY, LANE, SHADE = "#222222", "#6b6b6b", "#ececec", "#bcbcbc"
STYLE = {
    "font.size": 9,
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "text.color": INK,
    "text.hinting": "no_hinting",  # takes a tenth of the time
    "hatch.linewidth": 0.5,
}
DPI = 150
SLOT, LABEL = 44, 27  # width of the shortest op, and the least that its label needs
NARROWEST, WIDEST, UNLABELLED = 1400, 3600, 2000  # timelines
LEFT, RIGHT = 160, 90  # margins beside them
LINE = 34  # height of a line of text


@contextmanager
def house_style() -> Iterator[None]:
    """The same look whatever the reader's own matplotlib settings are."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)  # type: ignore[arg-type]
        yield


KINDS = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}
TINT = {"F": 0, "B": 0.68, "I": 0.68, "W": 0.88}  # how much white


def colors(op: Op) -> tuple[tuple, str]:
    """Fill and label color of an op: its microbatch's hue, under white or a tint under black."""
    hue, tint = to_rgb(HUES[op.microbatch % len(HUES)]), TINT[op.kind]
    return tuple(tint + (1 - tint) * part for part in hue), "black" if tint else "white"


def new_picture(width: float, height: float, title: str, lines: Iterable[str]) -> Figure:
    """An empty sheet with a title and a few lines below it."""
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)  # draws into memory
    for row, text in enumerate([title, *lines]):
        y = 1 - (LINE * (row + 0.9) + 8 * (row > 0)) / height
        weight, size = ("bold", 12) if row == 0 else ("normal", 10)
        figure.text(24 / width, y, text, va="center", weight=weight, fontsize=size)
    return figure


def add_axes(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes without a frame at that place, counted from the upper left corner of the sheet."""
    across, down = figure.bbox.width, figure.bbox.height
    place = left / across, 1 - (top + height) / down, width / across, height / down
    axes = figure.add_axes(place)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return axes


def add_heading(figure: Figure, top: float, text: str) -> None:
    """A line above one of several timelines."""
    y = 1 - (top + 0.5 * LINE) / figure.bbox.height
    figure.text(24 / figure.bbox.width, y, text, va="center", weight="bold")


IDLE = Patch(color=LANE, label="idle: the bubble")


def labelled(*places: Axes) -> list[Artist]:
    """All that is drawn there and has a label, once for each label."""
    found = [zip(*axes.get_legend_handles_labels(), strict=True) for axes in places]
    return list({label: artist for pairs in found for artist, label in pairs}.values())


def add_legend(figure: Figure, ops: list[Op], more: Sequence[Artist]) -> None:
    """At the foot of the sheet: what is drawn, and nothing else."""
    handles: list[Any] = []
    labels = []
    for kind, label in KINDS.items():
        drawn = {op.microbatch: op for op in ops if op.kind == kind}
        if drawn:
            some = [drawn[m] for m in sorted(drawn)[:3]]
            handles.append(tuple(Patch(color=colors(op)[0]) for op in some))
            labels.append(f"{kind}{min(drawn)}: {label} of microbatch {min(drawn)}")
    handles += more
    figure.legend(
        handles,
        labels + [str(handle.get_label()) for handle in more],
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0)},
        loc="lower left",
        bbox_to_anchor=(12 / figure.bbox.width, 4 / figure.bbox.height),
        ncols=3 if len(handles) == 6 else min(len(handles), 5),
        frameon=False,
        columnspacing=1.5,
        handlelength=1.8,
    )


# --------------------------------------------------------------------------------- primitives


Simulated = tuple[Schedule, list[Event]]
Boxes = Sequence[Sequence[float]]  # each start, end, lane, top and bottom within the lane (0 to 1)


def simulated(config: dict, **settings) -> Simulated:
    """Rows and events of this CONFIG with other settings."""
    config = {**config, **settings}
    schedule = build_schedule(config)
    return schedule, rounded(simulate(schedule, config))


def rounded(events: list[Event]) -> list[Event]:
    """Times as they are printed, so that 0.1 + 0.2 and 0.3 are the same place."""
    return [Event(op, device, tick(start), tick(end)) for op, device, start, end in events]


def add_boxes(axes: Axes, boxes: Boxes, **style) -> None:
    """Any number of boxes as one collection."""
    if boxes:
        start, end, lane, top, bottom = np.array(boxes, dtype=float).T
        x, y = (start, end, end, start), (lane + top, lane + top, lane + bottom, lane + bottom)
        corners: Any = np.stack([np.stack(x, axis=1), np.stack(y, axis=1)], axis=2)
        axes.add_collection(PolyCollection(corners, **style), autolim=False)


def add_labels(axes: Axes, boxes: Boxes, texts: list[str], inks: list[str]) -> None:
    """Each text in the middle of its box, where it fits; all in one size, 12 to 19 pixels."""
    edge = axes.get_xlim()[1]
    x_scale, y_scale = axes.bbox.width / edge, axes.bbox.height / max(axes.get_ylim())
    places, fits = [], []
    for (start, end, lane, top, bottom), text, ink in zip(boxes, texts, inks, strict=True):
        lines = text.split("\n")
        across = 0.84 * (min(end, edge) - start) * x_scale / (0.64 * max(map(len, lines)))
        fit = min(across, 0.8 * (bottom - top) * y_scale / len(lines))  # font size that fills it
        places.append(((start + min(end, edge)) / 2, lane + (top + bottom) / 2, text, ink, fit))
        if end <= edge:
            fits.append(fit)
    size = min(19, max(12, min(fits, default=12)))
    style: dict[str, Any] = {"fontsize": size * 72 / DPI, "ha": "center", "va": "center_baseline"}
    for x, y, text, ink, fit in places:
        if fit >= size:
            axes.text(x, y, text, color=ink, linespacing=1.1, **style)


def add_lanes(
    figure: Figure, top: float, height: float, num_devices: int, until: float, name_at: float = 0.5
) -> Axes:
    """A lane for every GPU, GPU0 on top, idle so far: lane d reaches from y = d to y = d + 1."""
    axes = add_axes(figure, LEFT, top, figure.bbox.width - LEFT - RIGHT, height)
    axes.set(xlim=(0, until), ylim=(num_devices, 0))
    shown = range(0, num_devices, math.ceil(26 * num_devices / height))
    axes.set_yticks([d + name_at for d in shown], [f"GPU{d}" for d in shown])
    lanes = [(0, until, device, 0.06, 0.94) for device in range(num_devices)]
    add_boxes(axes, lanes, facecolors=LANE, linewidths=0, zorder=0)
    ticks = max(4, int(axes.bbox.width // 92))
    axes.xaxis.set_major_locator(MaxNLocator(ticks, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda time, _: f"t{time:.10g}"))
    return axes


def draw_ops(
    axes: Axes, events: list[Event], faded: str = "", versions: bool = False, stages: bool = False
) -> None:
    """The primitive that draws the ops of every picture: a box for each, in the lane of its GPU.

    Ops of the kind faded stay hollow. With versions, boxes take the upper half of the lane, and a
    label also names the weights that the op reads. With stages, for GPUs that hold several, it
    names the stage: 2F0 instead of F0.
    """
    events = [event for event in events if event.op.kind != "U"]
    bottom, wide = 0.46 if versions else 0.94, slot_width(axes, events) > 8
    boxes = [(start, end, device, 0.06, bottom) for _, device, start, end in events]
    looks = [("white", GREY) if op.kind == faded else colors(op) for op, *_ in events]
    fills, inks = [fill for fill, _ in looks], [ink for _, ink in looks]
    edges = [SHADE if op.kind == faded else "white" for op, *_ in events]
    widths = [0.7 if wide or op.kind == faded else 0 for op, *_ in events]
    edge = {"edgecolors": edges, "linewidths": widths}
    add_boxes(axes, boxes, facecolors=fills, zorder=2, gid="ops", **edge)
    names = [str(op) if stages else f"{op.kind}{op.microbatch}" for op, *_ in events]
    if versions:
        names = [f"{name}\nv{op.version}" for name, (op, *_) in zip(names, events, strict=True)]
    add_labels(axes, boxes, names, inks)


def draw_handovers(axes: Axes, events: list[Event], num_stages: int) -> None:
    """A triangle where a result leaves for the next GPU: activations go down, gradients up."""
    ended = {op[:3]: end for op, _, _, end in events}
    for kind, marker, label in (("F", "v", "activations sent"), ("B", "^", "gradients sent back")):
        inputs = [(op.stage, input_of(op, num_stages)) for op, *_ in events if op.kind == kind]
        leaves = [(ended[step], max(s, step[0])) for s, step in inputs if step and step[0] != s]
        if leaves and slot_width(axes, events) > 12:
            style: dict[str, Any] = {"ls": "", "marker": marker, "color": INK, "ms": 5}
            axes.plot(*zip(*leaves, strict=True), zorder=3, clip_on=False, label=label, **style)


def shortest(events: list[Event]) -> float:
    """The time of the shortest op."""
    return min(event.end - event.start for event in events if event.op.kind != "U")


def slot_width(axes: Axes, events: list[Event]) -> float:
    """Pixels of the shortest op."""
    return shortest(events) * axes.bbox.width / axes.get_xlim()[1]


def plot_width(events: list[Event], until: float) -> float:
    """Enough for a label in the shortest op; where that is more than WIDEST, all go without."""
    slots = until / shortest(events)
    return UNLABELLED if LABEL * slots > WIDEST else min(max(SLOT * slots, NARROWEST), WIDEST)


# ---------------------------------------------------------------- naive and microbatch pictures


def naive_pipeline(config: dict) -> Figure:
    """One microbatch after the other crawls through the stages and back."""
    _, events = simulated(config, schedule="naive", num_batches=1)
    microbatches, used = count(config["num_microbatches"], "microbatch"), utilization(events)
    lines = [
        "A microbatch passes down the stages and back; only then does the next one start.",
        f"A batch of {microbatches} takes {makespan(events):.10g} time units; {1 - used:.1%} of "
        "the GPU time is idle.",
    ]
    return draw_batch(config, events, "Naive pipeline", lines)


def microbatch_forward(config: dict) -> Figure:
    """The forward wave: while a stage works on a microbatch, the one before works on the next."""
    _, events = simulated(config, schedule="gpipe", num_batches=1)
    microbatches = count(config["num_microbatches"], "microbatch")
    used = utilization([event for event in events if event.op.kind == "F"])
    lines = [
        "A microbatch starts as soon as GPU0 is free, before the previous one has returned.",
        f"This wave of {microbatches} uses {used:.1%} of the GPU time that it takes"
        + ("; with more it would be longer and use more." if used < 1 else "."),
    ]
    return draw_batch(config, events, "Microbatches, forward", lines, faded="B")


def microbatch_backward(config: dict) -> Figure:
    """The backward wave, on the time axis of the forward wave."""
    _, events = simulated(config, schedule="gpipe", num_batches=1)
    lines = [
        "The last stage has the loss: the gradients start there and go back stage by stage.",
        f"Forward and backward take {makespan(events):.10g} time units at {utilization(events):.1%}"
        " utilization. The next batch waits until all of this one is back: a flush.",
    ]
    return draw_batch(config, events, "Microbatches, backward", lines, faded="F")


def draw_batch(
    config: dict, events: list[Event], title: str, lines: list[str], faded: str = ""
) -> Figure:
    """The lanes of one batch, ops of the kind faded hollow, and how many GPUs work when."""
    num_devices, until = config["num_stages"], makespan(events)
    wave = [event for event in events if event.op.kind not in (faded, "U")]
    spans = at_work(wave)
    start, end, most = max(spans, key=lambda span: (span[2], span[1] - span[0]))
    share = ("all " if most == num_devices > 2 else f"{most} of ") + count(num_devices, "GPU")
    used, title = utilization(events), f"{title}: {share} at work"
    title += f" from t{start:.10g} to t{end:.10g}" if faded else f", {used:.1%} utilization"
    plot = plot_width(events, until)
    lane = min(84, 2600 / num_devices, max(28, 6 * plot * shortest(events) / until))
    top, lanes_height = LINE * (len(lines) + 1) + 30, lane * num_devices
    strip_top = top + lanes_height + 56
    figure = new_picture(LEFT + plot + RIGHT, strip_top + 110 + 80, title, lines)
    lanes = add_lanes(figure, top, lanes_height, num_devices, until)
    draw_ops(lanes, events, faded=faded)
    draw_handovers(lanes, wave, num_devices)

    strip = add_axes(figure, LEFT, strip_top, lanes.bbox.width, 110)
    strip.set(xlim=(0, until), ylim=(0, num_devices), xticks=[], yticks=[0, num_devices])
    label, size = ("GPUs at work\nin this wave", 8) if faded else ("GPUs\nat work", 9)
    strip.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=size)
    add_boxes(strip, [(spans[0][0], spans[-1][1], 0, 0, num_devices)], facecolors=LANE, lw=0)
    boxes = [(start, end, 0, 0, number) for start, end, number in spans]
    full = [number == num_devices for *_, number in spans]
    fills = [INK if all_work else SHADE for all_work in full]
    inks = ["white" if all_work else INK for all_work in full]
    add_boxes(strip, boxes, facecolors=fills, linewidths=0, gid="at work")
    add_labels(strip, boxes, [str(number) for *_, number in spans], inks)

    legend = labelled(lanes)
    if faded:
        label = f"{KINDS[faded]}s: the other wave"
        legend.append(Patch(facecolor="white", edgecolor=GREY, label=label))
    legend += [IDLE] * (used < 1)
    legend += [Patch(color=INK, label="all GPUs at work")] * any(full)
    add_legend(figure, [event.op for event in wave], legend)
    return figure


def at_work(events: list[Event]) -> list[tuple[float, float, int]]:
    """(start, end, how many GPUs compute then), each as long as that number stays the same."""
    change: Counter[float] = Counter()
    for _, _, start, end in events:
        change[start] += 1
        change[end] -= 1
    times = sorted(time for time in change if change[time])
    numbers = itertools.accumulate(change[time] for time in times)
    return list(zip(times, times[1:], numbers, strict=False))


# ------------------------------------------------------------------- weight versioning picture


class Lifetime(NamedTuple):
    """Of a weight version on a stage, in simulated time."""

    start: float
    superseded: float  # by the next version: from then on it is stashed
    end: float  # its last reader is done


def lifetimes(schedule: Schedule, events: list[Event]) -> list[list[Lifetime]]:
    """lifetimes(...)[stage][version]. The last version has no end."""
    ended = {event.op: event.end for event in events}
    lives = []
    for row in schedule:
        last_reader = {op.version: op for op in row}
        made = [0, *(ended[op] for op in row if op.kind == "U"), math.inf]
        ends = [*(ended[op] for _, op in sorted(last_reader.items())), math.inf]
        lives.append([*map(Lifetime, made, made[1:], ends)])
    return lives


def stale_reads(schedule: Schedule) -> set[Op]:
    """The forwards and backwards that read a version when their stage has a newer one."""
    return {
        op
        for row in schedule
        for op, newest in zip(row, itertools.accumulate(op.kind == "U" for op in row), strict=True)
        if op.kind != "U" and op.version < newest
    }


def draw_memory(axes: Axes, schedule: Schedule, events: list[Event], most: int) -> None:
    """The strips in a GPU's lane: its weight versions, and its microbatches in flight."""
    num_rows, over = max(peak_versions(schedule)), makespan(events)
    high = 0.28 / num_rows  # of a version's bar; versions alive at once lie in different rows
    newest, stashed, names = [], [], []
    for device, lives in enumerate(lifetimes(schedule, events)):
        free_at = [0.0] * num_rows
        for version, (start, superseded, end) in enumerate(lives):
            row = next(row for row in range(num_rows) if free_at[row] <= start)
            free_at[row] = end
            place = device, 0.5 + (row + 0.1) * high, 0.5 + (row + 0.9) * high
            newest.append((start, min(superseded, over), *place))
            names.append(f"v{version}")
            if end > superseded:
                stashed.append((superseded, end, *place))
    thick = high * axes.bbox.height / len(schedule) > 8  # pixels
    ink = {"edgecolors": INK, "linewidths": 0.7 if thick else 0, "zorder": 2}
    add_boxes(axes, newest, facecolors=SHADE, label="newest version", **ink)
    label = "old version, kept (stashed)"
    add_boxes(axes, stashed, facecolors="white", hatch="//////", label=label, **ink)
    add_labels(axes, newest, names, [INK] * len(names))

    ended = {event.op: event.end for event in events}
    for device, ops in enumerate(schedule):
        times = [0, *(ended[op] for op in ops)]
        held = np.array([0, *(in_flight for in_flight, _ in memory_held(ops))])
        style: dict[str, Any] = {"color": GREY, "lw": 0, "zorder": 2}
        base = device + 0.97
        y_held, label = base - 0.17 * held / most, "microbatches in flight"
        axes.fill_between(times, y_held, base, step="post", label=label, **style)


def draw_marks(axes: Axes, schedule: Schedule, events: list[Event], until: float) -> None:
    """Where a stage updates, which ops read an old version, and which backwards the wrong one."""
    updates = [(device, end) for op, device, _, end in events if op.kind == "U" and end <= until]
    devices, times = np.array(updates, dtype=float).reshape(-1, 2).T
    line: dict[str, Any] = {"colors": INK, "lw": 2.5, "zorder": 4, "clip_on": False}
    axes.vlines(times, devices + 0.02, devices + 0.5, gid="updates", **line)
    axes.plot([], [], "|", color=INK, ms=11, mew=2.5, label="weight update")
    stale, wrong = stale_reads(schedule), {*mismatches(schedule)}
    cross = {"edgecolor": "#00000066", "lw": 0.5, "hatch": "xxxx"}
    inset = 2 * until / axes.bbox.width
    for ops, label, style in (
        (stale, "reads a stashed version", {"edgecolor": INK, "lw": 1.6}),
        (wrong, "reads other weights than its forward did", cross),
    ):
        boxes = [
            (start + inset, end - inset, device, 0.08, 0.44)
            for op, device, start, end in events
            if op in ops and start < until and end - start > 7 * inset
        ]
        add_boxes(axes, boxes, facecolors="none", zorder=2.5, label=label, **style)


def draw_versions(
    figure: Figure, top: float, lane: float, until: float, run: Simulated, most_in_flight: int
) -> Axes:
    """Lanes of ops, each with the version that it reads, above the memory strips."""
    schedule, events = run
    axes = add_lanes(figure, top, lane * len(schedule), len(schedule), until, name_at=0.26)
    draw_ops(axes, [event for event in events if event.start < until], versions=True)
    draw_memory(axes, schedule, events, most_in_flight)
    draw_marks(axes, schedule, events, until)
    return axes


def lane_height(schedule: Schedule) -> float:
    """Room for labels in the bars of all versions, as long as all lanes fit on a sheet."""
    return min(max(150, 68 * max(peak_versions(schedule))), 1600 / len(schedule))


def name_strips(axes: Axes, versions: list, in_flight: list, size: float = 7) -> list[Any]:
    """Beside each lane, if it is high enough: names of its strips on the left, peaks on the right.

    Returns the texts on the right, those for versions first.
    """
    texts = []
    left, right = -8 / axes.bbox.width, 1 + 10 / axes.bbox.width
    style: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "va": "center"}
    for y, name, values in ((0.64, "versions", versions), (0.89, "in flight", in_flight)):
        for device, value in enumerate(values if axes.bbox.height > 90 * len(values) else []):
            axes.text(left, device + y, name, ha="right", fontsize=7, **style)
            texts.append(axes.text(right, device + y, f"max {value}", fontsize=size, **style))
    return texts


def weight_versioning(config: dict) -> Figure:
    """Which weights every op reads, what is stashed for it; and that a flush needs no stash."""
    other = "1f1b" if config["schedule"] == "pipedream" else "pipedream"
    both = config, {**config, "schedule": other, "weight_stashing": True}
    runs = [simulated(settings) for settings in both]
    schedule, events = runs[0]
    shown = min(
        2 + math.ceil(config["num_stages"] / config["num_microbatches"]), config["num_batches"]
    )
    until = max(end for op, _, _, end in events if op.kind == "U" and op.version == shown - 1)
    most_in_flight = max(max(peak_in_flight(schedule)) for schedule, _ in runs)

    example = find_example(schedule)
    title, lines = tell_versions(config, schedule, events, example)
    above, below = (batches_done(events, until) for _, events in runs)
    batches = count(config["num_batches"], "batch")
    lines.append(f"Shown up to t{until:.10g}: {above} of {batches} done above, {below} below.")
    lane = max(lane_height(schedule) for schedule, _ in runs)
    top, bracket = LINE * (len(lines) + 1) + 24, 34 if example else 0
    panel = LINE + 10 + lane * len(schedule) + 60
    width = LEFT + plot_width(events, until) + RIGHT
    figure = new_picture(width, top + bracket + 2 * panel + 80, title, lines)
    for row, (settings, run) in enumerate(zip(both, runs, strict=True)):
        schedule, events = run
        place = top + row * (bracket + panel)
        heading = f"{', '.join(schedule_name(settings))}: {batches} in {makespan(events):.10g} "
        add_heading(figure, place, f"{heading}time units, {utilization(events):.1%} utilization")
        place += LINE + 10 + bracket * (row == 0)
        axes = draw_versions(figure, place, lane, until, run, most_in_flight)
        name_strips(axes, peak_versions(schedule), peak_in_flight(schedule))
        if row == 0 and example:
            draw_example(axes, events, *example)
    idle: list[Artist] = [IDLE] * any(utilization(events) < 1 for _, events in runs)
    ops = [event.op for event in events if event.start < until]
    add_legend(figure, ops, labelled(*figure.axes) + idle)
    return figure


def batches_done(events: list[Event], until: float) -> int:
    """How many batches have all their updates by then."""
    updates = [(op.version, end) for op, _, _, end in events if op.kind == "U"]
    return min((v for v, end in updates if end > until), default=1 + max(updates)[0])


def find_example(schedule: Schedule) -> tuple[Op, Op] | None:
    """A forward on the newest version, and its backward when there is a newer one; if any."""
    special = stale_reads(schedule) | {*mismatches(schedule)}
    ops = {op[:3]: op for row in schedule for op in row}
    backwards = (op for op in ops.values() if op.kind == "B" and op in special)
    return next(((ops[op.stage, "F", op.microbatch], op) for op in backwards), None)


def draw_example(axes: Axes, events: list[Event], forward: Op, backward: Op) -> None:
    """A bracket above the GPU's lane, from the forward to its backward."""
    at = {op: (start + end) / 2 for op, _, start, end in events}
    left, right = at[forward], at[backward]
    pixel = axes.get_ylim()[0] / axes.bbox.height
    low, high = backward.stage + 0.05, backward.stage - 15 * pixel
    style: dict[str, Any] = {"color": INK, "clip_on": False, "zorder": 4}
    axes.plot([left, left, right, right], [low, high, high, low], lw=1.5, gid="example", **style)
    axes.plot([right], [low], marker="v", ms=6, gid="arrow", **style)
    (*_, m, old), new = forward, backward.version
    same = f"B{m} reads v{new}, as F{m} did"
    text = same if old == new else f"F{m} read v{old}, B{m} reads v{new}"
    axes.text((left + right) / 2, high - 5 * pixel, text, ha="center", va="bottom", fontsize=8)


def tell_versions(
    config: dict, schedule: Schedule, events: list[Event], example: tuple[Op, Op] | None
) -> tuple[str, list[str]]:
    """Title and lines: what is stashed and why, with the figures of this run."""
    if config["schedule"] != "pipedream":
        idle = 1 - utilization(events)
        price = f", and {idle:.1%} of the GPU time is idle" if idle > 0 else ""
        return f"With a flush one weight version is enough{price}", [
            "Updates wait until nothing is in flight: a backward reads what its forward read.",
            "Below, PipeDream does not wait, and keeps old weights for what is in flight.",
        ]
    if example is None:
        return "Nothing to stash: here no update happens while a microbatch is in flight", [
            "With more stages and batches, PipeDream updates while microbatches are in flight.",
        ]
    lines = ["PipeDream updates without a flush: weights change while microbatches are in flight."]
    (stage, _, microbatch, old), (*_, version) = example
    lives, newer = lifetimes(schedule, events)[stage], max(version, old + 1)
    made, kept = lives[newer].start, lives[version].end
    story = f"On GPU{stage}, F{microbatch} read v{old}, v{newer} came at t{made:.10g}, and "
    if not config["weight_stashing"]:
        wrong = len(mismatches(schedule))
        backwards = count(sum(op.kind == "B" for row in schedule for op in row), "backward")
        story += f"B{microbatch} reads v{version}: old activations, new weights, a wrong gradient."
        return f"No stashing: {wrong} of {backwards} read the wrong weights", [*lines, story]
    story += f"B{microbatch} still reads v{version}, for an exact gradient. v{version} is kept "
    story += f"until t{kept:.10g}, for its last reader."
    title = "Weight stashing: every backward reads the weights that its forward read"
    return title, [*lines, story]


def utilization_comparison(config: dict) -> Figure:
    """Naive, flush, no flush; and the one formula that all their figures come from."""
    num_stages, in_batch = config["num_stages"], config["num_microbatches"]
    in_run, batches = in_batch * config["num_batches"], count(config["num_batches"], "batch")
    runs: list[tuple[int, str, dict]] = [  # microbatches in a row, name, settings
        (1, "naive: one at a time", {"schedule": "naive"}),
        (in_batch, "1F1B: a flush per batch", {"schedule": "1f1b"}),
        (in_run, "PipeDream: no flush", {"schedule": "pipedream"}),
    ]
    for n, quoted in ((3 * (num_stages - 1), "75%"), (9 * (num_stages - 1), "90%")):
        if 0 < n * num_stages < 50_000:
            sizes = {"num_microbatches": n, "batch_size": n, "num_batches": 1}
            runs.append((n, f"a round {quoted} by the formula", {"schedule": "1f1b", **sizes}))
    parts = [utilization(simulated(config, **settings)[1]) for *_, settings in runs]
    points: dict[int, tuple[float, list[str]]] = {}
    for (n, name, _), part in zip(runs, parts, strict=True):
        points.setdefault(n, (part, []))[1].append(name)

    lines = [
        f"{count(num_stages, 'GPU')}, simulated: one microbatch at a time; batches of {in_batch:,} "
        f"with a flush after each; {batches} in a row without one.",
        "With equal stages and free links, one formula holds for all: n microbatches in a row keep "
        "S GPUs busy for n / (n + S - 1) of the time.",
    ]
    gaps = [100 * (part - in_a_row(n, num_stages)) for n, (part, _) in points.items()]
    if max(map(abs, gaps)) > 1e-6:
        low, high = (f"{round(gap, 1) + 0:+.1f}" for gap in (min(gaps), max(gaps)))
        lines.append(f"Here they are not: these runs differ from it by {low} to {high} points.")
    title = "GPU utilization: " + " → ".join(f"{part:.1%}" for part in parts[:3])
    figure = new_picture(1760, 900, title, lines)
    names = [name.replace(": ", "\n") for _, name, _ in runs[:3]]
    draw_bars(add_axes(figure, 90, 170, 640, 590), names, parts[:3])
    draw_curve(add_axes(figure, 900, 170, 800, 440), points, num_stages)
    return figure


def in_a_row(number: int | np.ndarray, num_stages: int) -> Any:
    """The closed form for equal stages: S - 1 turns pass until the pipeline is full, or empty."""
    return number / (number + num_stages - 1)


def draw_bars(axes: Axes, names: Sequence[str], parts: list[float]) -> None:
    """Busy and idle, one bar per schedule."""
    axes.bar(range(len(parts)), parts, 0.66, color=HUES[0])
    axes.bar(range(len(parts)), [1 - part for part in parts], 0.66, bottom=parts, color=LANE)
    axes.set_xticks(range(len(parts)), names, fontsize=10)
    axes.set(ylim=(0, 1), yticks=[])
    for x, part in enumerate(parts):
        y, ink = (part / 2, "white") if part >= 0.06 else (part + 0.04, HUES[0])  # above a low bar
        style: dict[str, Any] = {"ha": "center", "va": "center"}
        axes.text(x, y, f"{part:.1%}", color=ink, fontsize=13, weight="bold", **style)
        if part < 0.97:
            axes.text(x, (1 + part) / 2, f"idle {1 - part:.1%}", **style)


def draw_curve(axes: Axes, points: dict[int, tuple[float, list[str]]], num_stages: int) -> None:
    """The formula as a line, and the simulated runs as marks."""
    right = 1.3 * max(points)
    axes.set(xscale="log", xlim=(0.9, right), ylim=(0, 1.03))
    x, label = np.geomspace(0.9, right, 200), f"formula n / (n + {num_stages - 1})"
    axes.plot(x, in_a_row(x, num_stages), color=GREY, label=label, zorder=1)
    for (n, (part, texts)), marker in zip(sorted(points.items()), "os^Dv", strict=False):
        label = f"n = {n:,}: {part:.1%}  " + "\n".join(texts)
        axes.plot([n], [part], marker, ms=8, color=HUES[0], label=label, zorder=2, clip_on=False)
        axes.plot([0.9, n, n], [part, part, 0], color=HUES[0], lw=0.7, ls=":", zorder=1)
    ticks = [n * 10**power for power in range(9) for n in (1, 2, 5) if n * 10**power <= right]
    axes.set_xticks(ticks, [f"{n:,}" for n in ticks])
    axes.minorticks_off()
    axes.set_yticks([0, 0.25, 0.5, 0.75, 0.9, 1])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda part, _: f"{part:.0%}"))
    axes.set_xlabel("n: microbatches in a row without a flush")
    axes.spines[["left", "bottom"]].set_visible(True)
    axes.legend(loc="upper left", bbox_to_anchor=(-0.07, -0.17), frameon=False)


BATCH_PICTURES = naive_pipeline, microbatch_forward, microbatch_backward
PICTURES: dict[str, Callable[[dict], Figure]] = {
    draw.__name__: draw for draw in (*BATCH_PICTURES, weight_versioning, utilization_comparison)
}


def write_picture(draw: Callable[[dict], Figure], config: dict, path: Path) -> str:
    """Draw and save a picture, with its text as metadata; return its title."""
    figure = draw(config)
    title, *lines = (text.get_text() for text in figure.texts)
    about = {"Title": title, "Description": " ".join(lines)}
    figure.savefig(path, metadata=about, pil_kwargs={"compress_level": 2})  # fast
    return title


# -------------------------------------------------------------------------------- the animation

FRAMES_PER_SECOND, MOST_FRAMES = 4, 60  # of a longer run only every so many times are shown


def make_movie(config: dict) -> tuple[Figure, list[float], Callable[[float], None]]:
    """The whole run as a picture, the times of its frames, and a function that shows one of them.

    Up to that time the run is drawn, and beside each lane is what that GPU holds then.
    """
    schedule, events = simulated(config)
    num_devices, until = len(schedule), makespan(events)
    gpus, used = count(num_devices, "GPU"), utilization(events)
    title = f"{', '.join(schedule_name(config))}: {used:.1%} utilization on {gpus}"
    lane, top, most = lane_height(schedule), 2 * LINE + 40, max(peak_in_flight(schedule))
    width = LEFT + plot_width(events, until) + RIGHT + 100
    figure = new_picture(width, top + lane * num_devices + 140, title, [" "])
    axes = draw_versions(figure, top, lane, until, (schedule, events), most)
    add_legend(figure, [op for op, *_ in events], labelled(axes) + [IDLE] * (used < 1))
    beside = name_strips(axes, [0] * num_devices, [0] * num_devices, size=10)
    future = Rectangle((0, 0), until, num_devices, color="white", zorder=5, clip_on=False)
    axes.add_patch(future)
    margin = 8 * until / axes.bbox.width  # the mark of an update at the very end needs it
    cursor = axes.axvline(0, color=INK, lw=1, zorder=6, clip_on=False)

    batches, lives = count(config["num_batches"], "batch"), lifetimes(schedule, events)
    ended = {event.op: event.end for event in events}
    ends = [[ended[op] for op in row] for row in schedule]
    in_flight = [[0, *(number for number, _ in memory_held(row))] for row in schedule]

    def show(time: float) -> None:
        future.set_bounds(time, 0, until + margin - time if time < until else 0, num_devices)
        cursor.set_xdata([time, time])
        figure.texts[1].set_text(f"t{time:.10g}: {batches_done(events, time)} of {batches} done")
        for device, (versions, number) in enumerate(
            zip(beside, beside[num_devices:], strict=False)
        ):
            alive = [v for v, life in enumerate(lives[device]) if life.start <= time < life.end]
            many = f"v{alive[0]}...v{alive[-1]} ({len(alive)})"
            versions.set_text(many if len(alive) > 2 else " ".join(f"v{v}" for v in alive))
            number.set_text(str(in_flight[device][bisect_right(ends[device], time)]))

    times = sorted({time for event in events for time in (event.start, event.end)})
    return figure, [*times[: -1 : math.ceil(len(times) / MOST_FRAMES)], times[-1]], show


def write_movie(config: dict, path: Path) -> str:
    """Save the movie as a GIF, the last frame for three seconds; return its title.

    All frames share the palette of the last one, so that a frame only stores what changes: half as
    much as with a palette for each.
    """
    figure, times, show = make_movie(config)
    figure.dpi, canvas = min(0.6, 1400 / figure.bbox.width) * DPI, FigureCanvasAgg(figure)

    def frame(time: float) -> Image.Image:
        show(time)
        canvas.draw()
        return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")

    palette = frame(times[-1]).quantize(128)
    frames = [frame(time).quantize(palette=palette, dither=Image.Dither.NONE) for time in times]
    durations = [1000 // FRAMES_PER_SECOND] * (len(times) - 1) + [3000]  # milliseconds
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)
    return figure.texts[0].get_text()


# ---------------------------------------------------------------------------------------- files


def save(files: dict[Path, Callable[[Path], Any]], read: Iterable[Path] = ()) -> list:
    """Write all files or none: first under temporary names, and when all is done rename them.

    files: path -> a function that writes to the path it is given; returns what these return.
    read: the inputs, which are never replaced. UserError: a file cannot be written.
    """
    parts: dict[Path, Path] = {}  # temporary name -> target
    created: list[Path] = []
    try:
        for path in files:
            target = Path(os.path.realpath(path))  # a link stays a link
            if not target.name or target.is_symlink() or target.exists() > target.is_file():
                raise UserError(f"cannot write {path}: it is not a regular file")
            if target in parts.values() or (target.exists() and any(map(target.samefile, read))):
                raise UserError(f"cannot write {path}: the same file has another use in this run")
            parts[target.with_name(f"part-{os.getpid()}-{target.name}")] = target
        folders = sorted({target.parent for target in parts.values()})
        for path in folders:
            created += [folder for folder in (path, *path.parents) if not folder.exists()]
            path.mkdir(parents=True, exist_ok=True)
        results = []
        for (part, path), write in zip(parts.items(), files.values(), strict=True):
            results.append(write(part))
            if path.exists():
                shutil.copymode(path, part)
        with ExitStack() as locks:  # two runs do not mix their files: the second one waits
            for folder in folders:
                with suppress(ImportError, OSError):  # Windows, and some network drives
                    import fcntl

                    handle = os.open(folder, os.O_RDONLY)
                    locks.callback(os.close, handle)
                    fcntl.flock(handle, fcntl.LOCK_EX)
            for part, path in parts.items():
                part.replace(path)
        return results
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        for remove in [part.unlink for part in parts] + [folder.rmdir for folder in created]:
            with suppress(OSError):  # all went well: it has been renamed, or is not empty
                remove()


# ----------------------------------------------------------------------------------------- main


def main() -> None:
    out = {"type": Path, "metavar": "DIR", "help": "folder for the pictures (default: .)"}
    animate = {"action": "store_true", "help": "also pipeline.gif, the run as an animation"}
    config, flags = parse_config(__doc__, other={"--out": out, "--animate": animate})
    folder = flags.get("out", Path())
    files: dict[Path, Callable[[Path], str]] = {
        folder / f"{name}.png": partial(write_picture, draw, config)
        for name, draw in PICTURES.items()
    }
    if "animate" in flags:
        files[folder / "pipeline.gif"] = partial(write_movie, config)
    with house_style():
        titles = save(files)
    for path, title in zip(files, titles, strict=True):
        print(f"{path}\n   {title}" if config["verbose"] else path)


if __name__ == "__main__":
    sys.exit(run_main(main))
