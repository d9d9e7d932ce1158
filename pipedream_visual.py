#!/usr/bin/env python3
"""Five pictures of pipeline parallelism, drawn from the schedules that pipedream_simple.py runs.

    python pipedream_visual.py                       five PNG files into the current folder
    python pipedream_visual.py --out pictures        into another one, made if it is not there
    python pipedream_visual.py --num_stages 8        every CONFIG key is also a flag
    python pipedream_visual.py --animate             also pipeline.gif: the run, slot by slot

CONFIG is that of pipedream_simple.py. Here is no schedule, no time and no weight version: rows and
events come from there, and every figure in a title is measured on them. No display is needed.

Read it from top to bottom: look, primitives, the five pictures, the animation, main.
"""

import itertools
import math
import os
import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image, ImageSequence

from pipedream_simple import (
    Event,
    Op,
    Schedule,
    UserError,
    build_schedule,
    cycle_collector_paused,
    last_readers,
    make_parser,
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
# Hue says which microbatch, dark or light says forward or backward, and a label says both again
# where it fits: nothing is told by colour alone. Lengths are in pixels.

HUES = ("#0000cc", "#a66300", "#3c2859", "#8500a6", "#a60000", "#208080")  # microbatch m: m % 6
INK, GREY, LANE, SHADE = "#222222", "#6b6b6b", "#ececec", "#bcbcbc"
STYLE = {
    "font.size": 9,
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "text.color": INK,
    "text.hinting": "no_hinting",  # a tenth of the time
    "hatch.linewidth": 0.5,
}
DPI = 150
SLOT, LABEL = 44, 27  # width of the shortest op, and the least that its label needs
NARROWEST, WIDEST, UNLABELLED = 1400, 3600, 2000  # timelines
LEFT, RIGHT = 160, 90  # margins beside them
LINE = 34  # height of a line of text


@contextmanager
def house_style():
    """The same look whatever the reader's own matplotlib settings are."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


KINDS = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}
TINT = {"F": 0, "B": 0.68, "I": 0.68, "W": 0.88}  # how much white


def colors(op: Op) -> tuple[tuple, str]:
    """Fill and label colour of an op: its microbatch's hue under white, or a tint under black."""
    hue, tint = np.array(to_rgb(HUES[op.microbatch % len(HUES)])), TINT[op.kind]
    return tuple(tint + (1 - tint) * hue), "black" if tint else "white"


def new_picture(width: float, height: float, title: str, lines: Iterable[str]) -> Figure:
    """An empty sheet with a title and a few lines under it."""
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)  # draws into memory: no display, no window
    for row, text in enumerate([title, *lines]):
        y = 1 - (LINE * (row + 0.9) + 8 * (row > 0)) / height
        size = {"fontsize": 12, "weight": "bold"} if row == 0 else {"fontsize": 10}
        figure.text(24 / width, y, text, va="center", **size)
    return figure


def add_axes(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes without a frame at that place, counted from the upper left corner of the sheet."""
    sheet = figure.bbox
    bottom = sheet.height - top - height
    place = left / sheet.width, bottom / sheet.height, width / sheet.width, height / sheet.height
    axes = figure.add_axes(place)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return axes


def add_heading(figure: Figure, top: float, text: str) -> None:
    """A line over one of several timelines, that far from the top of the sheet."""
    y = 1 - (top + 0.5 * LINE) / figure.bbox.height
    figure.text(24 / figure.bbox.width, y, text, va="center", weight="bold")


IDLE = Patch(color=LANE, label="idle: the bubble")


def add_legend(figure: Figure, ops: Iterable[Op], more: list[Patch | Line2D]) -> None:
    """At the foot of the sheet: what is drawn, and nothing else."""
    handles, labels = [], []
    for kind, label in KINDS.items():
        drawn = {op.microbatch: op for op in sorted(ops) if op.kind == kind}
        if drawn:
            some = list(drawn.values())[:3]
            handles.append(tuple(Patch(color=colors(op)[0]) for op in some))
            labels.append(f"{kind}{min(drawn)}: {label} of microbatch {min(drawn)}")
    figure.legend(
        handles + more,
        labels + [handle.get_label() for handle in more],
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0)},
        loc="lower left",
        bbox_to_anchor=(12 / figure.bbox.width, 4 / figure.bbox.height),
        ncols=min(len(handles + more), 5) if len(handles + more) != 6 else 3,
        frameon=False,
        columnspacing=1.5,
        handlelength=1.8,
    )


# --------------------------------------------------------------------------------- primitives


def simulated(config: dict) -> tuple[Schedule, list[Event]]:
    """Rows and events of this CONFIG, times rounded."""
    schedule = build_schedule(config)
    return schedule, rounded(simulate(schedule, config))


def rounded(events: list[Event]) -> list[Event]:
    """Events with times as they are printed: 0.1 + 0.2 ends at 0.3. UserError if ops vanish."""
    events = [Event(op, device, tick(start), tick(end)) for op, device, start, end in events]
    if not shortest(events) > 1e-8 * makespan(events):
        raise UserError("forward_time, backward_time and comm_time differ too much for a picture")
    return events


Box = tuple[float, float, float, float, float]  # start, end, lane, top, bottom: the last two 0 to 1


def add_boxes(axes: Axes, boxes: list[Box], **style) -> PolyCollection:
    """Any number of boxes as one collection."""
    start, end, lane, top, bottom = np.array(boxes, dtype=float).reshape(-1, 5).T
    x, y = (start, end, end, start), (lane + top, lane + top, lane + bottom, lane + bottom)
    corners = np.stack([np.stack(x, axis=1), np.stack(y, axis=1)], axis=2)  # (boxes, 4, 2)
    return axes.add_collection(PolyCollection(corners, **style), autolim=False)


def add_labels(axes: Axes, boxes: list[Box], texts: list[str], inks: list[str]) -> None:
    """Each text in the middle of its box, where it fits; all of one size, 12 to 19 pixels."""
    edge = axes.get_xlim()[1]
    x_scale = axes.bbox.width / edge
    y_scale = axes.bbox.height / abs(np.subtract(*axes.get_ylim()))
    places, fits = [], []
    for (start, end, lane, top, bottom), text, ink in zip(boxes, texts, inks, strict=True):
        lines = text.split("\n")
        across = 0.84 * (min(end, edge) - start) * x_scale / (0.64 * max(map(len, lines)))
        fit = min(across, 0.8 * (bottom - top) * y_scale / len(lines))  # font size that fills it
        places.append(((start + min(end, edge)) / 2, lane + (top + bottom) / 2, text, ink, fit))
        if end <= edge:
            fits.append(fit)
    size = min(19, max(12, min(fits, default=12)))
    style = {"fontsize": size * 72 / DPI, "ha": "center", "va": "center_baseline"}
    for x, y, text, ink, fit in places:
        if fit >= size:
            axes.text(x, y, text, color=ink, linespacing=1.1, **style)


def add_lanes(
    figure: Figure, top: float, height: float, num_devices: int, until: float, name_at: float = 0.5
) -> Axes:
    """A lane for every GPU, GPU0 on top, idle so far: lane d reaches from y = d to y = d + 1."""
    axes = add_axes(figure, LEFT, top, figure.bbox.width - LEFT - RIGHT, height)
    axes.set_xlim(0, until)
    axes.set_ylim(num_devices, 0)
    every = math.ceil(26 * num_devices / height)
    shown = range(0, num_devices, every)
    axes.set_yticks([d + name_at for d in shown], [f"GPU{d}" for d in shown])
    lanes = [(0, until, device, 0.06, 0.94) for device in range(num_devices)]
    add_boxes(axes, lanes, facecolors=LANE, linewidths=0, zorder=0)
    axes.xaxis.set_major_locator(MaxNLocator(max(4, axes.bbox.width // 92), steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda time, _: f"t{time:.10g}"))
    return axes


def draw_ops(
    axes: Axes,
    events: list[Event],
    top: float = 0.06,
    bottom: float = 0.94,
    faded: str = "",
    versions: bool = False,
    stages: bool = False,
) -> PolyCollection:
    """The primitive that draws the ops of every picture: boxes on the GPUs' lanes, one an op.

    Ops of the kind faded are left hollow; with versions, a label also names the weights read, and
    with stages, for GPUs that hold several, the stage: 2F0 instead of F0.
    """
    events = [event for event in events if event.op.kind != "U"]
    boxes = [(start, end, device, top, bottom) for _, device, start, end in events]
    looks = [("white", GREY) if op.kind == faded else colors(op) for op, *_ in events]
    fills, inks = zip(*looks, strict=True)
    wide = slot_width(axes, events) > 8
    collection = add_boxes(
        axes,
        boxes,
        facecolors=fills,
        edgecolors=[SHADE if op.kind == faded else "white" for op, *_ in events],
        gid="ops",
        linewidths=[0.7 if wide or op.kind == faded else 0 for op, *_ in events],
        zorder=2,
    )
    names = [str(op) if stages else f"{op.kind}{op.microbatch}" for op, *_ in events]
    texts = [
        name + f"\nv{op.version}" * versions for name, (op, *_) in zip(names, events, strict=True)
    ]
    add_labels(axes, boxes, texts, inks)
    return collection


def draw_handovers(axes: Axes, events: list[Event], num_devices: int) -> list[Line2D]:
    """A triangle where a result leaves for the next GPU: activations go down, gradients up."""
    leaves = {"F": [], "B": []}
    for op, device, _, end in events:
        to = device + {"F": 1, "B": -1}.get(op.kind, 0)
        if to != device and 0 <= to < num_devices:
            leaves[op.kind].append((end, max(device, to)))
    drawn = []
    for kind, marker, label in (("F", "v", "activations go on"), ("B", "^", "gradients go back")):
        if leaves[kind] and slot_width(axes, events) > 12:
            x, y = zip(*leaves[kind], strict=True)
            style = {"ls": "", "marker": marker, "color": INK, "ms": 5, "label": label}
            drawn += axes.plot(x, y, zorder=3, clip_on=False, **style)
    return drawn


def slot_width(axes: Axes, events: list[Event]) -> float:
    """Of the shortest op."""
    return shortest(events) * axes.bbox.width / axes.get_xlim()[1]


def shortest(events: list[Event]) -> float:
    return min(event.end - event.start for event in events if event.op.kind != "U")


def plot_width(events: list[Event], until: float) -> float:
    """Room for a label in the shortest op; where even WIDEST has none, width is no use."""
    slots = until / shortest(events)
    return UNLABELLED if LABEL * slots > WIDEST else min(max(SLOT * slots, NARROWEST), WIDEST)


# ---------------------------------------------------------------- naive and microbatch pictures


def naive_pipeline(config: dict) -> Figure:
    """One batch crawls through the stages, microbatch after microbatch."""
    config, events = one_batch("naive", config)
    most, _, _ = busiest(events)
    return draw_batch(
        config,
        events,
        f"Naive pipeline: {most} of {config['num_stages']} GPUs at work, "
        f"{utilization(events):.1%} utilization",
        "The forward of a microbatch passes stage after stage, its backward comes back, "
        "and only then the next one sets out.",
        f"A batch of {config['num_microbatches']} takes {makespan(events):.10g} time units; "
        f"{1 - utilization(events):.1%} of the GPU time is idle.",
    )


def microbatch_forward(config: dict) -> Figure:
    """The forward wave: a stage works on a microbatch, and the stage before it on the next."""
    config, events = one_batch("gpipe", config)
    wave = [event for event in events if event.op.kind == "F"]
    used = utilization(from_zero(wave))
    return draw_batch(
        config,
        events,
        f"Microbatches, forward: {gpus_at_work(wave, config)}",
        f"Microbatches in the batch: {config['num_microbatches']}. Each sets out as soon as GPU0 "
        "is free, and does not wait for the one before to come back.",
        f"This wave uses {used:.1%} of the GPU time that it takes"
        + ("; more microbatches make a longer wave, and use more." if used < 1 else "."),
        faded="B",
    )


def microbatch_backward(config: dict) -> Figure:
    """The backward wave, on the time axis of the forward wave."""
    config, events = one_batch("gpipe", config)
    wave = [event for event in events if event.op.kind == "B"]
    return draw_batch(
        config,
        events,
        f"Microbatches, backward: {gpus_at_work(wave, config)}",
        "The last stage has the loss: there the gradients set out, and go back stage by stage.",
        f"Forward and backward take {makespan(events):.10g} time units at {utilization(events):.1%}"
        " utilization. The wait for the whole batch is a flush: only then the next one starts.",
        faded="F",
    )


def one_batch(schedule: str, config: dict) -> tuple[dict, list[Event]]:
    """This CONFIG with one batch of that schedule, and its events."""
    config = {**config, "schedule": schedule, "num_batches": 1}
    return config, simulated(config)[1]


def draw_batch(
    config: dict, events: list[Event], title: str, *lines: str, faded: str = ""
) -> Figure:
    """The lanes of a batch, the ops of one kind perhaps faded, over how many GPUs work."""
    num_devices, until = config["num_stages"], makespan(events)
    wave = [event for event in events if event.op.kind not in (faded, "U")]
    plot = plot_width(events, until)
    lane = min(84, 2600 / num_devices, max(28, 6 * plot * shortest(events) / until))
    top, lanes_height = LINE * (len(lines) + 1) + 30, lane * num_devices
    strip_top = top + lanes_height + 56
    width = LEFT + plot + RIGHT
    figure = new_picture(width, strip_top + 110 + 80, title, lines)
    lanes = add_lanes(figure, top, lanes_height, num_devices, until)
    draw_ops(lanes, events, faded=faded)
    more = draw_handovers(lanes, wave, num_devices)

    strip = add_axes(figure, LEFT, strip_top, lanes.bbox.width, 110)
    strip.set(xlim=(0, until), ylim=(0, num_devices), xticks=[], yticks=[0, num_devices])
    label = "GPUs at work\nin this wave" if faded else "GPUs\nat work"
    strip.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8 if faded else 9)
    spans = at_work(wave)
    whole = (spans[0][0], spans[-1][1], 0, 0, num_devices)
    add_boxes(strip, [whole], facecolors=LANE, linewidths=0)
    boxes = [(start, end, 0, 0, count) for start, end, count in spans]
    looks = [(INK, "white") if count == num_devices else (SHADE, INK) for *_, count in spans]
    fills, inks = zip(*looks, strict=True)
    add_boxes(strip, boxes, facecolors=fills, linewidths=0, gid="at work")
    add_labels(strip, boxes, [str(count) for *_, count in spans], inks)

    if faded:
        label = {"F": "the forwards before", "B": "the backwards to come"}[faded]
        more.append(Patch(facecolor="white", edgecolor=GREY, label=label))
    if utilization(events) < 1:
        more.append(IDLE)
    if any(count == num_devices for *_, count in spans):
        more.append(Patch(color=INK, label="all GPUs at work"))
    add_legend(figure, [event.op for event in wave], more)
    return figure


def at_work(events: list[Event]) -> list[tuple[float, float, int]]:
    """(start, end, how many GPUs compute then), each as long as that number stays the same."""
    change = Counter()
    for _, _, start, end in events:
        change[start] += 1
        change[end] -= 1
    times = sorted(time for time in change if change[time])
    spans, count = [], 0
    for start, end in itertools.pairwise(times):
        count += change[start]
        spans.append((start, end, count))
    return spans


def busiest(events: list[Event]) -> tuple[int, float, float]:
    """The most GPUs that compute at once, and from when to when they do, at the longest."""
    start, end, count = max(at_work(events), key=lambda span: (span[2], span[1] - span[0]))
    return count, start, end


def gpus_at_work(wave: list[Event], config: dict) -> str:
    count, start, end = busiest(wave)
    of = (
        f"all {count}"
        if count == config["num_stages"] > 1
        else f"{count} of {config['num_stages']}"
    )
    return f"{of} GPUs at work from t{start:.10g} to t{end:.10g}"


def from_zero(events: list[Event]) -> list[Event]:
    """The same events on a clock that starts with the first of them."""
    zero = min(event.start for event in events)
    return [event._replace(start=event.start - zero, end=event.end - zero) for event in events]


# ------------------------------------------------------------------- weight versioning picture


class Lifetime(NamedTuple):
    """Of one weight version on one stage, in simulated time."""

    device: int
    version: int
    start: float
    superseded: float  # by the next version: from here on it is stashed
    end: float  # its last reader is done


def lifetimes(schedule: Schedule, events: list[Event]) -> list[Lifetime]:
    """Of every weight version that somebody reads, and of the last, which is left at the end."""
    ended = {event.op: event.end for event in events}
    device_of = {op.stage: device for device, row in enumerate(schedule) for op in row}
    updates = {(op.stage, op.version): ended[op] for op in ended if op.kind == "U"}
    lives = []
    for (stage, version), last in last_readers(schedule).items():
        start = updates.get((stage, version - 1), 0)
        superseded = updates[stage, version]
        lives.append(Lifetime(device_of[stage], version, start, superseded, ended[last]))
    last_version = max(version for _, version in updates) + 1
    for (stage, version), start in updates.items():
        if version + 1 == last_version:
            over = makespan(events)
            lives.append(Lifetime(device_of[stage], last_version, start, over, over))
    return sorted(lives, key=lambda life: (life.device, life.start))


def stale_reads(schedule: Schedule) -> list[Op]:
    """The forwards and backwards that read a version while their stage has a newer one."""
    newest = Counter()  # stage -> version
    stale = []
    for op in (op for row in schedule for op in row):
        if op.kind == "U":
            newest[op.stage] += 1
        elif op.version < newest[op.stage]:
            stale.append(op)
    return stale


def draw_memory(
    axes: Axes, schedule: Schedule, events: list[Event], most_in_flight: int
) -> list[Patch]:
    """The strips in a GPU's lane: its weight versions, and its microbatches in flight."""
    num_rows = max(peak_versions(schedule))
    high = 0.28 / num_rows  # of a version's bar; versions alive at once lie in different rows
    newest, stashed, names = [], [], []
    free_at = [[0] * num_rows for _ in schedule]  # of each row of each lane
    for device, version, start, superseded, end in lifetimes(schedule, events):
        row = next(row for row in range(num_rows) if free_at[device][row] <= start)
        free_at[device][row] = end
        y = 0.5 + row * high
        place = device, y + 0.1 * high, y + 0.9 * high
        newest.append((start, superseded, *place))
        names.append(f"v{version}")
        if end > superseded:
            stashed.append((superseded, end, *place))
    thick = high * axes.bbox.height / len(schedule) > 8  # pixels
    ink = {"edgecolors": INK, "linewidths": 0.7 if thick else 0, "zorder": 2}
    add_boxes(axes, newest, facecolors=SHADE, gid="newest", **ink)
    add_boxes(axes, stashed, facecolors="white", hatch="//////", gid="stashed", **ink)
    add_labels(axes, newest, names, [INK] * len(names))

    ended = {event.op: event.end for event in events}
    for device, row in enumerate(schedule):
        times = [0, *(ended[op] for op in row)]
        held = np.array([0, *(in_flight for in_flight, _ in memory_held(row))])
        base = device + 0.97
        y = base - 0.17 * held / most_in_flight
        axes.fill_between(
            times, y, base, step="post", color=GREY, lw=0, zorder=2, gid=f"in flight {device}"
        )

    legend = [Patch(facecolor=SHADE, edgecolor=INK, label="newest version")]
    if stashed:
        style = {"facecolor": "white", "edgecolor": INK, "hatch": "//////"}
        legend.append(Patch(**style, label="old version, kept (stashed)"))
    return [*legend, Patch(color=GREY, label="microbatches in flight")]


def draw_marks(
    axes: Axes, schedule: Schedule, events: list[Event], until: float
) -> list[Patch | Line2D]:
    """Where a stage updates, which ops read an old version, and which backwards the wrong one."""
    updates = [(device, end) for op, device, _, end in events if op.kind == "U" and end <= until]
    lines = [[(end, device + 0.02), (end, device + 0.5)] for device, end in updates]
    marks = LineCollection(lines, colors=INK, lw=2.5, zorder=4, gid="updates", clip_on=False)
    axes.add_collection(marks, autolim=False)
    legend = [Line2D([], [], ls="", marker="|", color=INK, ms=11, mew=2.5, label="weight update")]
    inset = 2 * until / axes.bbox.width
    wrong = "reads other weights than its forward did"
    for ops, label, style in (
        (stale_reads(schedule), "reads a stashed version", {"edgecolor": INK, "lw": 1.6}),
        (mismatches(schedule), wrong, {"edgecolor": "#00000066", "lw": 0.5, "hatch": "xxxx"}),
    ):
        chosen = set(ops)
        boxes = [
            (start + inset, end - inset, device, 0.08, 0.44)
            for op, device, start, end in events
            if op in chosen and start < until and end - start > 7 * inset
        ]
        if boxes:
            add_boxes(axes, boxes, facecolors="none", zorder=2.5, gid=label, **style)
            legend.append(Patch(facecolor="white", label=label, **style))
    return legend


def draw_versions(
    figure: Figure,
    top: float,
    lane: float,
    until: float,
    schedule: Schedule,
    events: list[Event],
    most_in_flight: int,
) -> tuple[Axes, list[Patch | Line2D]]:
    """Lanes of ops, each with the version that it reads, over the memory strips; and a legend."""
    num_devices = len(schedule)
    axes = add_lanes(figure, top, lane * num_devices, num_devices, until, name_at=0.26)
    draw_ops(axes, [event for event in events if event.start < until], 0.06, 0.46, versions=True)
    legend = draw_memory(axes, schedule, events, most_in_flight)
    legend += draw_marks(axes, schedule, events, until)
    return axes, legend + [IDLE] * (utilization(events) < 1)


def lane_height(schedule: Schedule) -> float:
    """Room for labels in the bars of all versions, as long as all lanes fit on a sheet."""
    return min(max(150, 68 * max(peak_versions(schedule))), 1600 / len(schedule))


def name_strips(axes: Axes, values: list[tuple[str, str]]) -> list[tuple[Text, Text]]:
    """Beside each lane, if it is high enough, the names of its strips and what they come to."""
    style = {"transform": axes.get_yaxis_transform(), "fontsize": 7, "va": "center"}
    texts = []
    for device, (versions, in_flight) in enumerate(values):
        if axes.bbox.height / len(values) > 90:
            for y, name in ((0.64, "versions"), (0.89, "in flight")):
                axes.text(-8 / axes.bbox.width, device + y, name, ha="right", **style)
            right = (0.64, versions), (0.89, in_flight)
            x = 1 + 10 / axes.bbox.width
            texts.append(tuple(axes.text(x, device + y, text, **style) for y, text in right))
    return texts


def weight_versioning(config: dict) -> Figure:
    """Which weights every op reads, what is stashed for it; and that a flush needs no stash."""
    other = "1f1b" if config["schedule"] == "pipedream" else "pipedream"
    runs = []
    for settings in (config, {**config, "schedule": other, "weight_stashing": True}):
        runs.append((settings, *simulated(settings)))
    _, schedule, events = runs[0]
    enough = 2 + math.ceil(config["num_stages"] / config["num_microbatches"])
    last_shown = min(enough, config["num_batches"]) - 1
    until = max(end for op, _, _, end in events if op.kind == "U" and op.version == last_shown)
    most_in_flight = max(max(peak_in_flight(schedule)) for _, schedule, _ in runs)

    example = find_example(schedule)
    title, lines = tell_versions(config, schedule, events, example)
    lane = lane_height(schedule)
    done = [count_done(events, until) for *_, events in runs]
    lines.append(
        f"Shown up to t{until:.10g}: {done[0]} of {config['num_batches']} batches are done above, "
        f"{done[1]} below."
    )
    top, head = LINE * (len(lines) + 1) + 24, LINE + 10
    bracket = 34 if example else 0
    panel = head + lane * len(schedule) + 60
    width = LEFT + plot_width(events, until) + RIGHT
    figure = new_picture(width, top + bracket + 2 * panel + 80, title, lines)
    handles = {}
    for row, (settings, schedule, events) in enumerate(runs):
        place = top + row * (bracket + panel)
        name, keeps = schedule_name(settings)
        add_heading(
            figure,
            place,
            f"{name}, {keeps}: its {config['num_batches']} batches take "
            f"{makespan(events):.10g} time units at {utilization(events):.1%} utilization",
        )
        axes, legend = draw_versions(
            figure,
            place + head + bracket * (row == 0),
            lane,
            until,
            schedule,
            events,
            most_in_flight,
        )
        peaks = zip(peak_versions(schedule), peak_in_flight(schedule), strict=True)
        name_strips(axes, [(f"max {versions}", f"max {count}") for versions, count in peaks])
        if row == 0 and example:
            draw_example(axes, events, *example)
        handles.update({handle.get_label(): handle for handle in legend})
    add_legend(figure, [event.op for event in events if event.start < until], [*handles.values()])
    return figure


def count_done(events: list[Event], until: float) -> int:
    """How many batches have all their updates by then."""
    late = [op.version for op, _, _, end in events if op.kind == "U" and end > until]
    return min(late, default=1 + max(op.version for op, *_ in events if op.kind == "U"))


def find_example(schedule: Schedule) -> tuple[Op, Op] | None:
    """A forward on the newest version, and its backward when there is a newer one, if there is."""
    special = {*stale_reads(schedule), *mismatches(schedule)}
    backwards = (op for row in schedule for op in row if op.kind == "B" and op in special)
    backward = next(backwards, None)
    if backward is None:
        return None
    same = (op for row in schedule for op in row if op[:2] == (backward.stage, "F"))
    return next(op for op in same if op.microbatch == backward.microbatch), backward


def draw_example(axes: Axes, events: list[Event], forward: Op, backward: Op) -> None:
    """A bracket over the GPU's lane, from the forward to its backward."""
    at = {op: ((start + end) / 2, device) for op, device, start, end in events}
    (x_forward, device), (x_backward, _) = at[forward], at[backward]
    x = [x_forward, x_forward, x_backward, x_backward]
    pixel = abs(np.subtract(*axes.get_ylim())) / axes.bbox.height
    y = [device + 0.05, device - 15 * pixel, device - 15 * pixel, device + 0.05]
    axes.plot(x, y, color=INK, lw=1.5, clip_on=False, zorder=4, gid="example")
    axes.plot(x[-1:], y[-1:], color=INK, marker="v", ms=6, clip_on=False, zorder=4, gid="arrow")
    f, b = (f"{op.kind}{op.microbatch}" for op in (forward, backward))
    text = f"{b} reads v{backward.version}, as {f} did"
    if forward.version != backward.version:
        text = f"{f} read v{forward.version}, {b} reads v{backward.version}"
    axes.text(
        (x_forward + x_backward) / 2,
        device - 20 * pixel,
        text,
        ha="center",
        va="bottom",
        fontsize=8,
    )


def tell_versions(
    config: dict, schedule: Schedule, events: list[Event], example: tuple[Op, Op] | None
) -> tuple[str, list[str]]:
    """Title and lines: what is stashed and why, with the figures of this run."""
    wait = "PipeDream updates without waiting for all microbatches to come back: "
    if config["schedule"] != "pipedream":
        idle = 1 - utilization(events)
        price = f", and {idle:.1%} of the GPU time is idle" if idle > 0 else ""
        return f"With a flush one weight version is enough{price}", [
            "An update waits until no microbatch is in flight. So every backward reads the weights "
            "that its forward read.",
            "Below, PipeDream does not wait; where new weights come while microbatches are in "
            "flight, it keeps the old ones too.",
        ]
    if example is None:
        return "Nothing to stash: no update comes while a microbatch is in flight here", [
            wait + "with more stages and more batches, GPUs get new weights in between.",
            "Below, with a flush, updates wait.",
        ]
    forward, backward = example
    gpu, f, b = f"On GPU{backward.stage}", *(f"{op.kind}{op.microbatch}" for op in example)
    ended = {(op.stage, op.kind, op.version): end for op, _, _, end in events}
    if not config["weight_stashing"]:
        wrong, count = mismatches(schedule), sum(op.kind == "B" for row in schedule for op in row)
        newer = backward.version
        made = ended[backward.stage, "U", newer - 1]
        return f"No stashing: {len(wrong)} of {count} backwards read the wrong weights", [
            wait + "new weights come while some are in flight.",
            f"{gpu}, {f} read v{forward.version}; v{newer} comes at t{made:.10g}, and {b} "
            "reads that. Old activations, new weights: no gradient of the loss.",
        ]
    made = ended[backward.stage, "U", forward.version]
    read = backward.stage, backward.version
    kept = next(life.end for life in lifetimes(schedule, events) if life[:2] == read)
    return "Weight stashing: every backward reads the weights that its forward read", [
        wait + "new weights come while some are in flight.",
        f"{gpu}, {f} read v{forward.version}; v{forward.version + 1} comes at t{made:.10g}; {b} "
        f"reads v{backward.version} again, for a true gradient. v{backward.version} is kept until "
        f"t{kept:.10g}, when its last reader is done.",
    ]


def utilization_comparison(config: dict) -> Figure:
    """Naive, flush, no flush; and the one formula that all their figures come from."""
    num_stages, num_microbatches = config["num_stages"], config["num_microbatches"]
    num_in_run = num_microbatches * config["num_batches"]
    bars = {
        "naive\none at a time": measured(config, schedule="naive"),
        f"1F1B\n{num_microbatches}, then a flush": measured(config, schedule="1f1b"),
        f"PipeDream\n{num_in_run}, no flush": measured(config, schedule="pipedream"),
    }
    naive, flush, no_flush = bars.values()
    points = {}  # microbatches in a row -> (utilization, what it is)
    for count, part, what in (
        (1, naive, "naive"),
        (num_microbatches, flush, "1F1B: a batch, then a flush"),
        (num_in_run, no_flush, f"PipeDream: {config['num_batches']} batches without a flush"),
        (3 * (num_stages - 1), None, "75% by the formula, a figure often quoted"),
        (9 * (num_stages - 1), None, "90% by the formula, a figure often quoted"),
    ):
        if part is None and 0 < count * num_stages < 50_000:
            part = measured(config, schedule="1f1b", num_microbatches=count, num_batches=1)
        if part is not None:
            points[count] = (part, [*points.get(count, (0, []))[1], what])

    exact = all(
        abs(part - in_a_row(count, num_stages)) < 1e-9 for count, (part, _) in points.items()
    )
    lines = [
        f"{num_stages} GPUs, simulated: one microbatch at a time; batches of {num_microbatches} "
        f"with a flush after each; {config['num_batches']} such batches without one.",
        "All of them are one formula: n microbatches in a row, on S stages, keep the GPUs busy "
        "for n / (n + S - 1) of the time."
        if exact
        else "The formula n / (n + S - 1) is for stages that take the same time and for free "
        "links, which is not so here: that costs the distance to the line.",
    ]
    title = f"GPU utilization: {naive:.1%} → {flush:.1%} → {no_flush:.1%}"
    figure = new_picture(1760, 900, title, lines)
    draw_bars(add_axes(figure, 90, 170, 640, 590), bars)
    draw_curve(add_axes(figure, 900, 170, 800, 440), points, num_stages)
    return figure


def measured(config: dict, **settings) -> float:
    """The utilization of this CONFIG with other settings, from its simulated run."""
    config = {**config, **settings}
    return utilization(simulate(build_schedule(config), config))


def in_a_row(count: int, num_stages: int) -> float:
    """The closed form for equal stages: S - 1 turns pass until the pipeline is full, or empty."""
    return count / (count + num_stages - 1)


def draw_bars(axes: Axes, bars: dict[str, float]) -> None:
    """Busy and idle, one bar each."""
    parts = list(bars.values())
    axes.bar(range(len(parts)), parts, 0.66, color=HUES[0])
    axes.bar(range(len(parts)), [1 - part for part in parts], 0.66, bottom=parts, color=LANE)
    axes.set_xticks(range(len(parts)), list(bars), fontsize=10)
    axes.set(ylim=(0, 1), yticks=[])
    for x, part in enumerate(parts):
        style = {"ha": "center", "va": "center", "fontsize": 13, "weight": "bold"}
        if part < 0.06:  # no room in the bar
            axes.text(x, part + 0.04, f"{part:.1%}", color=HUES[0], **style)
        else:
            axes.text(x, part / 2, f"{part:.1%}", color="white", **style)
        if part < 0.97:
            axes.text(x, (1 + part) / 2, f"idle {1 - part:.1%}", ha="center", va="center")


def draw_curve(axes: Axes, points: dict[int, tuple[float, list[str]]], num_stages: int) -> None:
    """The formula as a line, the simulated runs as marks on it."""
    axes.set(xscale="log", xlim=(0.9, 1.3 * max(points)), ylim=(0, 1.03))
    x = np.geomspace(0.9, 1.3 * max(points), 200)
    label = f"formula n / (n + {num_stages - 1})"
    axes.plot(x, in_a_row(x, num_stages), color=GREY, label=label, zorder=1)
    for (count, (part, texts)), marker in zip(sorted(points.items()), "os^Dv", strict=False):
        label = f"n = {count}: {part:.1%}  {'; '.join(texts)}"
        style = {"ls": "", "marker": marker, "ms": 8, "color": HUES[0], "clip_on": False}
        axes.plot([count], [part], label=label, zorder=2, **style)
        axes.plot([0.9, count, count], [part, part, 0], color=HUES[0], lw=0.7, ls=":", zorder=1)
    ticks = [digit * 10**power for power in range(9) for digit in (1, 2, 5)]
    ticks = [tick for tick in ticks if tick <= 1.3 * max(points)]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set_yticks([0, 0.25, 0.5, 0.75, 0.9, 1])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda part, _: f"{part:.0%}"))
    axes.set_xlabel("n: microbatches in a row without a flush")
    axes.spines[["left", "bottom"]].set_visible(True)
    axes.legend(loc="upper left", bbox_to_anchor=(-0.07, -0.17), frameon=False)


PICTURES = {
    draw.__name__: draw
    for draw in (
        naive_pipeline,
        microbatch_forward,
        microbatch_backward,
        weight_versioning,
        utilization_comparison,
    )
}


# -------------------------------------------------------------------------------- the animation


FRAMES_PER_SECOND = 4


def make_movie(config: dict) -> tuple[Figure, list[float], Callable[[float], None]]:
    """The whole run as a picture, the times at which to look at it, and a function that sets one.

    Set to a time, the picture ends there, and says beside each lane what that GPU holds.
    """
    schedule, events = simulated(config)
    num_devices, until = len(schedule), makespan(events)
    name, keeps = schedule_name(config)
    title = f"{name}, {keeps}: {utilization(events):.1%} utilization on {num_devices} GPUs"
    lane, top = lane_height(schedule), 2 * LINE + 40
    width = LEFT + plot_width(events, until) + RIGHT + 100
    figure = new_picture(width, top + lane * num_devices + 140, title, [" "])
    axes, legend = draw_versions(
        figure, top, lane, until, schedule, events, max(peak_in_flight(schedule))
    )
    add_legend(figure, [event.op for event in events], legend)
    beside = name_strips(axes, [("", "")] * num_devices)
    future = axes.add_patch(Rectangle((0, 0), until, num_devices, color="white", zorder=5))
    cursor = axes.axvline(0, color=INK, lw=2, zorder=6, clip_on=False)
    held = held_at(schedule, events)

    def show(time: float) -> None:
        future.set_bounds(time, 0, until - time, num_devices)
        cursor.set_xdata([time, time])
        done = f"{count_done(events, time)} of {config['num_batches']} batches are done"
        figure.texts[1].set_text(f"t{time:.10g}: {done}")
        for texts, values in zip(beside, held(time), strict=False):
            for text, value in zip(texts, values, strict=True):
                text.set(text=value, fontsize=10)

    return figure, frame_times(events), show


def frame_times(events: list[Event], most: int = 60) -> list[float]:
    """The times at which something begins or ends; of many, only every so many, and the last."""
    times = sorted({time for event in events for time in (event.start, event.end)})
    return [*times[: -1 : math.ceil(len(times) / most)], times[-1]]


def held_at(schedule: Schedule, events: list[Event]) -> Callable[[float], list[tuple[str, str]]]:
    """A function of time that says what each GPU holds: versions, microbatches in flight."""
    ended = {event.op: event.end for event in events}
    times = [[ended[op] for op in row] for row in schedule]
    in_flight = [[0, *(count for count, _ in memory_held(row))] for row in schedule]
    lives = lifetimes(schedule, events)

    def at(time: float) -> list[tuple[str, str]]:
        alive = [[] for _ in schedule]
        for device, version, start, _, end in lives:
            if start <= time < end:
                alive[device].append(f"v{version}")
        counts = [row[bisect_right(ends, time)] for row, ends in zip(in_flight, times, strict=True)]
        for row in alive:
            if len(row) > 2:
                row[:] = [f"{row[0]}...{row[-1]} ({len(row)})"]
        return [(" ".join(row), str(count)) for row, count in zip(alive, counts, strict=True)]

    return at


def write_movie(
    figure: Figure, times: list[float], show: Callable[[float], None], path: Path
) -> None:
    """Play a movie of make_movie into a GIF."""
    from matplotlib.animation import PillowWriter  # not needed, and not imported, without a GIF

    writer = PillowWriter(fps=FRAMES_PER_SECOND)
    writer.setup(figure, path, dpi=min(0.6, 1400 / figure.bbox.width) * DPI)
    for time in times:
        show(time)
        writer.grab_frame()
    writer.finish()  # not in a finally: a movie that was interrupted is not written
    share_palette(path)


def share_palette(path: Path) -> None:
    """Save a GIF again with one palette for all frames, so that it only stores what changes.

    With a palette of its own, every pixel of a frame is a little different from the one before, and
    the file twice as large. And the last frame stays for a while.
    """
    with Image.open(path) as movie:
        frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(movie)]
    palette = frames[-1].quantize(128)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    times = [1000 // FRAMES_PER_SECOND] * (len(frames) - 1) + [3000]  # milliseconds
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=times, loop=0)


# ----------------------------------------------------------------------------------------- main


def save(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under a temporary name and rename it: the old one is whole until then."""
    path = path.resolve()  # a link stays a link
    if not path.name or (path.exists() and not path.is_file()):
        raise UserError(f"cannot write {path}: it is not a regular file")
    part = path.with_name(f"part-{os.getpid()}-{path.name}")
    try:
        write(part)
        part.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        part.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """A folder and those above it, if they are not there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder}: cannot make this folder: {error.strerror}") from None


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the pictures (now .)")
    parser.add_argument("--animate", action="store_true", help="also pipeline.gif, the run played")
    config, other = parse_config(parser)
    folder = other.get("out", Path())
    make_folder(folder)

    def report(path: Path, title: str) -> None:
        print(f"{path}\n   {title}" if config["verbose"] else path, flush=True)

    with house_style():
        for name, draw in PICTURES.items():
            with cycle_collector_paused():
                figure = draw(config)
                title, *lines = (text.get_text() for text in figure.texts)
                about = {"Title": title, "Description": " ".join(lines)}
                options = {"metadata": about, "pil_kwargs": {"compress_level": 2}}  # fast
                save(folder / f"{name}.png", partial(figure.savefig, **options))
            report(folder / f"{name}.png", title)
        if "animate" in other:
            movie = make_movie(config)
            save(folder / "pipeline.gif", partial(write_movie, *movie))
            report(folder / "pipeline.gif", movie[0].texts[0].get_text())


if __name__ == "__main__":
    sys.exit(run_main(main))
