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

import io
import itertools
import math
import os
import shutil
import signal
import sys
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
    idle_times,
    input_of,
    makespan,
    mismatches,
    parse_config,
    peak_versions,
    rounded,
    run_main,
    schedule_name,
    simulate,
    utilization,
)

# --------------------------------------------------------------------------------------- look
#
# Hue says which microbatch, or which weight version where versions are the subject. Dark or light
# says forward or backward, and a label repeats both where it fits: nothing is told by color alone.
# Lengths are in pixels.

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


def colors(op: Op, versions: bool = False) -> tuple[tuple, str]:
    """Fill and label color of an op: its microbatch's hue, under white or a tint under black.

    With versions, the hue is that of the weight version that it reads.
    """
    hue, tint = to_rgb(HUES[(op.version if versions else op.microbatch) % len(HUES)]), TINT[op.kind]
    return tuple(tint + (1 - tint) * part for part in hue), "black" if tint else "white"


class Picture(Figure):
    """A figure that is saved in the house style, and shown in it by a notebook."""

    @house_style()
    def savefig(self, *args: Any, **settings: Any) -> None:
        super().savefig(*args, **settings)

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


def new_picture(width: float, height: float, title: str, lines: Iterable[str]) -> Figure:
    """An empty sheet with a title and a few lines below it."""
    figure = Picture(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
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


def add_legend(
    figure: Figure, ops: list[Op], more: Sequence[Artist], versions: bool = False
) -> None:
    """At the foot of the sheet: what is drawn, and nothing else."""
    handles: list[Any] = []
    labels = []
    for kind, label in KINDS.items():
        drawn = {op.version if versions else op.microbatch: op for op in ops if op.kind == kind}
        if drawn:
            some = [drawn[key] for key in sorted(drawn)[:3]]
            handles.append(tuple(Patch(color=colors(op, versions)[0]) for op in some))
            if versions:
                names = ", ".join(f"v{op.version}" for op in some)
                labels.append(f"{kind}: {label} on {names}" + ", ..." * (len(drawn) > 3))
            else:
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


def add_boxes(axes: Axes, boxes: Boxes, **style) -> None:
    """Any number of boxes as one collection."""
    if boxes:
        start, end, lane, top, bottom = np.array(boxes, dtype=float).T
        x, y = (start, end, end, start), (lane + top, lane + top, lane + bottom, lane + bottom)
        corners: Any = np.stack([np.stack(x, axis=1), np.stack(y, axis=1)], axis=2)
        axes.add_collection(PolyCollection(corners, **style), autolim=False)


def add_labels(axes: Axes, boxes: Boxes, texts: list[str], inks: list[str]) -> None:
    """Each text in the middle of what is seen of its box, where it fits; in one size, 12 to 19."""
    (first, edge), (below, above) = axes.get_xlim(), axes.get_ylim()
    x_scale, y_scale = axes.bbox.width / (edge - first), axes.bbox.height / abs(above - below)
    places, fits = [], []
    for (start, end, lane, top, bottom), text, ink in zip(boxes, texts, inks, strict=True):
        lines = text.split("\n")
        left, right = max(start, first), min(end, edge)
        across = 0.84 * (right - left) * x_scale / (0.64 * max(map(len, lines)))
        fit = min(across, 0.8 * (bottom - top) * y_scale / len(lines))  # font size that fills it
        places.append(((left + right) / 2, lane + (top + bottom) / 2, text, ink, fit))
        if (left, right) == (start, end):
            fits.append(fit)
    size = min(19, max(12, min(fits, default=12)))
    style: dict[str, Any] = {"fontsize": size * 72 / DPI, "ha": "center", "va": "center_baseline"}
    for x, y, text, ink, fit in places:
        if fit >= size:
            axes.text(x, y, text, color=ink, linespacing=1.1, **style)


def add_lanes(
    figure: Figure,
    top: float,
    height: float,
    lanes: int | range,
    until: float,
    since: float = 0,
    name_at: float = 0.5,
) -> Axes:
    """A lane for each of these GPUs, idle so far: lane d reaches from y = d to y = d + 1."""
    gpus = range(lanes) if isinstance(lanes, int) else lanes
    axes = add_axes(figure, LEFT, top, figure.bbox.width - LEFT - RIGHT, height)
    axes.set(xlim=(since, until), ylim=(gpus[-1] + 1, gpus[0]))
    shown = gpus[:: math.ceil(26 * len(gpus) / height)]
    axes.set_yticks([d + name_at for d in shown], [f"GPU{d}" for d in shown])
    boxes = [(since, until, device, 0.06, 0.94) for device in gpus]
    add_boxes(axes, boxes, facecolors=LANE, linewidths=0, zorder=0)
    ticks = max(4, int(axes.bbox.width // 92))
    axes.xaxis.set_major_locator(MaxNLocator(ticks, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda time, _: f"t{time:.10g}"))
    return axes


def draw_ops(
    axes: Axes, events: list[Event], faded: str = "", versions: int = 0, stages: bool = False
) -> None:
    """The primitive that draws the ops of every picture: a box for each, in the lane of its GPU.

    Ops of the kind faded stay hollow. With versions, hue and label say which weights the op reads,
    and below the boxes there is room for the bars of that many versions. With stages, for GPUs that
    hold several, a label names the stage: 2F0 instead of F0.
    """
    events = [event for event in events if event.op.kind != "U"]
    bottom, wide = ops_end(versions), slot_width(axes, events) > 8
    boxes = [(start, end, device, 0.06, bottom) for _, device, start, end in events]
    by = bool(versions)
    looks = [("white", GREY) if op.kind == faded else colors(op, by) for op, *_ in events]
    fills, inks = [fill for fill, _ in looks], [ink for _, ink in looks]
    edges = [SHADE if op.kind == faded else "white" for op, *_ in events]
    widths = [0.7 if wide or op.kind == faded else 0 for op, *_ in events]
    edge = {"edgecolors": edges, "linewidths": widths}
    add_boxes(axes, boxes, facecolors=fills, zorder=2, gid="ops", **edge)
    names = [str(op) if stages else f"{op.kind}{op.microbatch}" for op, *_ in events]
    if versions:
        names = [f"{name}\nv{op.version}" for name, (op, *_) in zip(names, events, strict=True)]
    add_labels(axes, boxes, names, inks)


def ops_end(versions: int) -> float:
    """Where in a lane the boxes of ops end, with the bars of so many versions below them."""
    return 0.06 + 0.88 / (1 + min(0.4 * versions, 3))


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
    first, last = axes.get_xlim()
    return shortest(events) * axes.bbox.width / (last - first)


def plot_width(events: list[Event], until: float) -> float:
    """Enough for a label in the shortest op; where that is more than WIDEST, all go without."""
    slots = until / shortest(events)
    return UNLABELLED if LABEL * slots > WIDEST else min(max(SLOT * slots, NARROWEST), WIDEST)


# ---------------------------------------------------------------- naive and microbatch pictures


@house_style()
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


@house_style()
def microbatch_forward(config: dict) -> Figure:
    """GPipe's forward wave: while a stage works on a microbatch, the one before has the next."""
    _, events = simulated(config, schedule="gpipe", num_batches=1)
    microbatches = count(config["num_microbatches"], "microbatch")
    used = utilization([event for event in events if event.op.kind == "F"])
    lines = [
        "A microbatch starts as soon as GPU0 is free, before the previous one has returned.",
        f"This wave of {microbatches} uses {used:.1%} of the GPU time that it takes"
        + ("; with more it would be longer and use more." if used < 1 else "."),
    ]
    return draw_batch(config, events, "GPipe, forward wave", lines, faded="B")


@house_style()
def microbatch_backward(config: dict) -> Figure:
    """GPipe's backward wave, on the time axis of the forward wave."""
    _, events = simulated(config, schedule="gpipe", num_batches=1)
    lines = [
        "The last stage has the loss: the gradients start there and go back stage by stage.",
        f"Forward and backward take {makespan(events):.10g} time units at {utilization(events):.1%}"
        " utilization. The next batch waits until all of this one is back: a flush.",
    ]
    return draw_batch(config, events, "GPipe, backward wave", lines, faded="F")


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
    if faded:
        name_triangles(lanes, wave)

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


def name_triangles(axes: Axes, wave: list[Event]) -> None:
    """The two triangles of a wave's bubble, each named in its longest lane."""
    begin, boxes, texts = min(event.start for event in wave), [], []
    what = "forwards" if wave[0].op.kind == "F" else "backwards"
    for cause, text in (("fill", f"no {what} yet"), ("drain", f"no {what} left")):
        gaps = [
            (max(idle.start, begin), idle.end, idle.device, 0.06, 0.94)
            for idle in idle_times(wave)
            if idle.cause == cause
        ]
        if gaps:
            boxes.append(max(gaps, key=lambda gap: gap[1] - gap[0]))
            texts.append(f"the wave {cause}s:\n{text}")
    add_labels(axes, boxes, texts, [GREY] * len(boxes))


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


def lanes_of(axes: Axes) -> range:
    """The GPUs whose lanes these axes show."""
    below, above = axes.get_ylim()
    return range(round(above), round(below))


def draw_memory(axes: Axes, schedule: Schedule, events: list[Event], rows: int) -> None:
    """Below the ops of each lane, in so many rows, the weight versions that its GPU holds.

    Filled while a version is the newest, hollow while it is kept for ops that still read it.
    """
    over, top, lanes = makespan(events), ops_end(rows) + 0.03, lanes_of(axes)
    high = (0.97 - top) / rows  # of a version's bar; versions alive at once lie in different rows
    lives = lifetimes(schedule, events)
    newest: list[tuple] = []
    kept: list[tuple] = []
    for device in lanes:
        free_at, last_reader = [0.0] * rows, {op.version: op for op in schedule[device]}
        for version, (start, superseded, end) in enumerate(lives[device]):
            row = next(row for row in range(rows) if free_at[row] <= start)
            free_at[row] = end
            place = device, top + (row + 0.1) * high, top + (row + 0.9) * high
            dark, light = (colors(Op(device, kind, 0, version), True)[0] for kind in "FB")
            name = f"v{version}"
            newest.append(((start, min(superseded, over), *place), light, INK, name))
            if end > superseded:
                if len(lanes) == 1:
                    name += f", kept until B{last_reader[version].microbatch} has read it"
                kept.append(((superseded, end, *place), "white", dark, name))
    thick = high * axes.bbox.height / len(lanes) > 8  # pixels
    for label, bars, width in (
        ("newest version", newest, 0.7 * thick),
        ("old version, kept (stashed)", kept, 1.8 if thick else 0.9),
    ):
        boxes = [box for box, *_ in bars]
        fills, edges = [fill for _, fill, _, _ in bars], [edge for *_, edge, _ in bars]
        style = {"facecolors": fills, "edgecolors": edges, "linewidths": width, "zorder": 2}
        add_boxes(axes, boxes, label=label, **style)
        add_labels(axes, boxes, [name for *_, name in bars], [INK] * len(bars))


def draw_marks(axes: Axes, schedule: Schedule, events: list[Event], bottom: float) -> None:
    """Where a stage updates, and which backwards read the wrong weights."""
    (first, last), lanes = axes.get_xlim(), lanes_of(axes)
    updates = [
        (device, end)
        for op, device, _, end in events
        if op.kind == "U" and device in lanes and first <= end <= last
    ]
    devices, times = np.array(updates, dtype=float).reshape(-1, 2).T
    line: dict[str, Any] = {"colors": INK, "lw": 2.5, "zorder": 4, "clip_on": False}
    axes.vlines(times, devices + 0.02, devices + bottom + 0.04, gid="updates", **line)
    axes.plot([], [], "|", color=INK, ms=11, mew=2.5, label="weight update")
    wrong, inset = {*mismatches(schedule)}, 2 * (last - first) / axes.bbox.width
    boxes = [
        (start + inset, end - inset, device, 0.08, bottom - 0.02)
        for op, device, start, end in events
        if op in wrong and device in lanes and first < end and start < last
        if end - start > 7 * inset
    ]
    cross = {"edgecolor": "#00000099", "lw": 0.5, "hatch": "xxxx"}
    label = "reads other weights than its forward did"
    add_boxes(axes, boxes, facecolors="none", zorder=2.5, label=label, **cross)


class Panel(NamedTuple):
    """A part of the fourth picture: some GPUs of a run, in a window of time."""

    heading: str
    run: Simulated
    gpus: range
    since: float
    until: float
    lane: float  # height
    example: tuple[Op, Op] | None = None


@house_style()
def weight_versioning(config: dict) -> Figure:
    """A GPU's stash at work, the same moment without it, and the versions on all GPUs.

    A run that flushes needs no stash: PipeDream's is drawn below it, for contrast.
    """
    run, stream = simulated(config), {**config, "schedule": "pipedream"}
    kept = simulated(stream, weight_stashing=True)
    lost = simulated(stream, weight_stashing=False, vertical_sync=False)
    panels = [all_gpus(config, run)]
    if find_example(kept[0]):
        close = (
            close_up("PipeDream's GPU{} with weight stashing", kept),
            close_up("The same GPU without weight stashing", lost),
        )
        panels = [*close, *panels] if config["schedule"] == "pipedream" else [*panels, *close]
    title, lines = tell_versions(config, run)
    lines.append("Color is the weight version: dark for a forward, light for a backward.")
    top, bracket = LINE * (len(lines) + 1) + 24, 34
    heights = [
        2 * LINE + 36 + bracket * bool(panel.example) + panel.lane * len(panel.gpus)
        for panel in panels
    ]
    width = max(plot_width(panel.run[1], panel.until - panel.since) for panel in panels)
    figure = new_picture(LEFT + width + RIGHT, top + sum(heights) + 70, title, lines)
    for panel, place in zip(panels, itertools.accumulate(heights, initial=top), strict=False):
        heading, (schedule, events), gpus, since, until, lane, example = panel
        add_heading(figure, place, heading)
        place += LINE + 6 + bracket * bool(example)
        rows = max(peak_versions(schedule)[gpu] for gpu in gpus)
        axes = add_lanes(figure, place, lane * len(gpus), gpus, until, since, ops_end(rows) / 2)
        draw_versions(axes, schedule, events, rows)
        if example:
            draw_example(axes, events, *example)
    shown = [e.op for p in panels for e in p.run[1] if e.device in p.gpus and e.start < p.until]
    idle: list[Artist] = [IDLE] * any(utilization(panel.run[1]) < 1 for panel in panels)
    add_legend(figure, shown, labelled(*figure.axes) + idle, versions=True)
    return figure


def all_gpus(config: dict, run: Simulated) -> Panel:
    """All lanes, for the first batches: so many that stashed versions come and go."""
    (schedule, events), num_devices = run, config["num_stages"]
    batches = 2 + math.ceil(num_devices / config["num_microbatches"])
    last = min(batches, config["num_batches"]) - 1
    until = max(end for op, _, _, end in events if op.kind == "U" and op.version == last)
    most, done = max(peak_versions(schedule)), batches_done(events, until)
    heading = f"{count(num_devices, 'GPU')} until t{until:.10g}: {done} of "
    heading += f"{count(config['num_batches'], 'batch')} done, at most "
    heading += f"{count(most, 'weight version')} on a GPU"
    lane = min(lane_height(62, most), 1600 / num_devices)
    return Panel(heading, run, range(num_devices), 0, until, lane)


def close_up(heading: str, run: Simulated) -> Panel:
    """The GPU of the example, from its forward to as long after its backward."""
    schedule, events = run
    example = find_example(schedule)
    assert example
    gpu, (forward, backward) = example[0].stage, (event for event in events if event.op in example)
    since = max(0, forward.start - shortest(events))
    until = min(makespan(events), 2 * backward.end - since)
    lane = lane_height(100, peak_versions(schedule)[gpu])
    return Panel(
        heading.format(gpu),
        run,
        range(gpu, gpu + 1),
        since,
        until,
        lane,
        example,
    )


def lane_height(ops: float, rows: int) -> float:
    """Of a lane whose ops are so high, with the bars of so many versions below them."""
    return 0.88 * ops / (ops_end(rows) - 0.06)


def draw_versions(axes: Axes, schedule: Schedule, events: list[Event], rows: int) -> None:
    """Ops in the color of the version that they read, above the versions that each GPU holds."""
    (first, last), lanes = axes.get_xlim(), lanes_of(axes)
    shown = [e for e in events if e.device in lanes and e.end > first and e.start < last]
    draw_ops(axes, shown, versions=rows)
    draw_memory(axes, schedule, events, rows)
    draw_marks(axes, schedule, events, ops_end(rows))
    for device in lanes if axes.bbox.height > 70 * len(lanes) else ():
        y, most = device + (ops_end(rows) + 0.97) / 2, peak_versions(schedule)[device]
        beside(axes, -8, y, "versions", ha="right", fontsize=7)
        beside(axes, axes.bbox.width + 10, y, f"max {most}", fontsize=7)


def beside(axes: Axes, x: float, y: float, text: str, **style) -> Any:
    """A text beside a lane: x in pixels from the left end of all lanes."""
    across = axes.get_yaxis_transform()
    return axes.text(x / axes.bbox.width, y, text, transform=across, va="center", **style)


def batches_done(events: list[Event], until: float) -> int:
    """How many batches have all their updates by then."""
    updates = [(op.version, end) for op, _, _, end in events if op.kind == "U"]
    return min((v for v, end in updates if end > until), default=1 + max(updates)[0])


def find_example(schedule: Schedule) -> tuple[Op, Op] | None:
    """A forward, and its backward at a time when the stage has newer weights; if any."""
    for row in schedule:
        newest, forwards = 0, {}
        for op in row:
            newest += op.kind == "U"
            if op.kind == "F":
                forwards[op.microbatch] = op
            elif op.kind == "B" and forwards[op.microbatch].version < newest:
                return forwards[op.microbatch], op
    return None


def draw_example(axes: Axes, events: list[Event], forward: Op, backward: Op) -> None:
    """A bracket above the GPU's lane, from the forward to its backward."""
    at = {op: (start + end) / 2 for op, _, start, end in events}
    left, right = at[forward], at[backward]
    pixel = len(lanes_of(axes)) / axes.bbox.height
    low, high = backward.stage + 0.05, backward.stage - 15 * pixel
    style: dict[str, Any] = {"color": INK, "clip_on": False, "zorder": 4}
    axes.plot([left, left, right, right], [low, high, high, low], lw=1.5, gid="example", **style)
    axes.plot([right], [low], marker="v", ms=6, gid="arrow", **style)
    (*_, m, old), new = forward, backward.version
    same = f"B{m} reads v{new}, as F{m} did"
    text = same if old == new else f"F{m} read v{old}, B{m} reads v{new}: a wrong gradient"
    axes.text((left + right) / 2, high - 5 * pixel, text, ha="center", va="bottom")


def tell_versions(config: dict, run: Simulated) -> tuple[str, list[str]]:
    """Title and lines: what is stashed and why, with the figures of this run."""
    schedule, events = run
    if config["schedule"] != "pipedream":
        idle = 1 - utilization(events)
        price = f", and {idle:.1%} of the GPU time is idle" if idle > 0 else ""
        return f"With a flush one weight version is enough{price}", [
            "Updates wait until nothing is in flight: a backward reads what its forward read.",
            "PipeDream does not wait, and keeps old weights for what is in flight.",
        ]
    example = find_example(schedule)
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
    last = [op for op in schedule[stage] if op.version == version][-1]
    story += f"until t{kept:.10g}, when B{last.microbatch} has read it."
    title = "Weight stashing: every backward reads the weights that its forward read"
    return title, [*lines, story]


@house_style()
def utilization_comparison(config: dict) -> Figure:
    """Naive, flush, no flush; and the one formula that all their figures come from."""
    num_stages, in_batch = config["num_stages"], config["num_microbatches"]
    in_run, batches = in_batch * config["num_batches"], count(config["num_batches"], "batch")
    runs: list[tuple[int, str, dict]] = [  # microbatches in a row, name, settings
        (1, "naive: one at a time", {"schedule": "naive"}),
        (in_batch, "1F1B: a flush per batch", {"schedule": "1f1b"}),
        (in_run, "PipeDream: no flush", {"schedule": "pipedream"}),
    ]
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
    title = "GPU utilization: " + " → ".join(f"{part:.1%}" for part in parts)
    figure = new_picture(1760, 900, title, lines)
    names = [name.replace(": ", "\n") for _, name, _ in runs]
    draw_bars(add_axes(figure, 120, 170, 640, 590), names, parts)
    draw_curve(add_axes(figure, 930, 170, 780, 480), points, num_stages)
    return figure


def in_a_row(number: int | np.ndarray, num_stages: int) -> Any:
    """The closed form for equal stages: S - 1 turns pass until the pipeline is full, or empty."""
    return number / (number + num_stages - 1)


def draw_bars(axes: Axes, names: Sequence[str], parts: list[float]) -> None:
    """Busy and idle, one bar per schedule."""
    axes.bar(range(len(parts)), parts, 0.66, color=HUES[0])
    axes.bar(range(len(parts)), [1 - part for part in parts], 0.66, bottom=parts, color=LANE)
    axes.set_xticks(range(len(parts)), names, fontsize=10)
    axes.set(ylim=(0, 1), yticks=[], ylabel="GPU time")
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
    for (n, (part, texts)), marker in zip(sorted(points.items()), "os^", strict=False):
        label = f"n = {n:,}: {part:.1%}  " + "\n".join(texts)
        axes.plot([n], [part], marker, ms=8, color=HUES[0], label=label, zorder=2, clip_on=False)
        axes.plot([0.9, n, n], [part, part, 0], color=HUES[0], lw=0.7, ls=":", zorder=1)
    ticks = [n * 10**power for power in range(9) for n in (1, 2, 5) if n * 10**power <= right]
    axes.set_xticks(ticks, [f"{n:,}" for n in ticks])
    axes.minorticks_off()
    axes.set_yticks([0, 0.25, 0.5, 0.75, 0.9, 1])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda part, _: f"{part:.0%}"))
    axes.set_xlabel("n: microbatches in a row without a flush")
    axes.set_ylabel("GPU utilization")
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

FRAME, STOP, MOST_FRAMES = 800, 4000, 30  # milliseconds; of a longer run only some times are shown


def make_movie(config: dict) -> tuple[Figure, dict[float, int], Callable[[float], None]]:
    """GPipe above PipeDream on one time axis: one flushes, the other does not.

    Returns the picture, {time of a frame: its milliseconds}, and a function that shows one.
    """
    configs = [{**config, "schedule": name} for name in ("gpipe", "pipedream")]
    runs = [simulated(settings) for settings in configs]
    num_devices, flushed = config["num_stages"], runs[0][1]
    first = max(end for op, _, _, end in flushed if op.kind == "U" and op.version == 0)
    until = max(all_gpus(configs[1], runs[1]).until, first)
    lane, top = min(72, 1100 / num_devices) * num_devices, 2 * LINE + 36
    width = LEFT + plot_width(runs[1][1], until) + RIGHT
    title = f"To flush or not to flush: GPipe and PipeDream on {count(num_devices, 'GPU')}"
    title += " (color: the microbatch)"
    figure = new_picture(width, top + 2 * (lane + 2 * LINE + 24) + 50, title, [" "])
    players = []
    for row, (settings, run) in enumerate(zip(configs, runs, strict=True)):
        place = top + row * (lane + 2 * LINE + 24)
        players.append(add_player(figure, place, lane, until, settings, run))
    ops = [event.op for _, events in runs for event in events if event.start < until]
    add_legend(figure, ops, [*labelled(*figure.axes), IDLE])

    stops = moments(runs, until)
    times = sorted({end for _, events in runs for *_, end in events if end <= until})
    every = math.ceil(len(times) / MOST_FRAMES)
    frames = dict.fromkeys(times[every - 1 :: every], FRAME) | dict.fromkeys(stops, STOP)

    def show(time: float) -> None:
        figure.texts[1].set_text(f"t{time:.10g}" + (f": {stops[time]}" if time in stops else ""))
        for play in players:
            play(time)

    return figure, dict(sorted(frames.items())), show


def add_player(
    figure: Figure, top: float, height: float, until: float, config: dict, run: Simulated
) -> Callable[[float], None]:
    """Lanes of a run up to a time, under a heading; returns a function that hides what is later.

    Beside each lane are the weight versions that its GPU holds then.
    """
    (schedule, events), num_devices = run, len(run[0])
    lives, batches = lifetimes(schedule, events), count(config["num_batches"], "batch")
    add_heading(figure, top, " ")
    heading = figure.texts[-1]
    axes = add_lanes(figure, top + LINE, height, num_devices, until)
    draw_ops(axes, [event for event in events if event.start < until])
    draw_marks(axes, schedule, events, 0.9)
    future = Rectangle((0, 0), until, num_devices, color="white", zorder=5, clip_on=False)
    axes.add_patch(future)
    margin = 8 * until / axes.bbox.width  # the mark of an update at the very end needs it
    cursor = axes.axvline(0, color=INK, lw=1, zorder=6, clip_on=False)
    right = axes.bbox.width + 12
    held = [beside(axes, right, d + 0.5, "") for d in range(num_devices)]
    beside(axes, right, -12 * num_devices / height, "weights", fontsize=8)

    def play(time: float) -> None:
        future.set_bounds(time, 0, until + margin - time if time < until else 0, num_devices)
        cursor.set_xdata([time, time])
        heading.set_text(
            f"{schedule_name(config)[0]}: {batches_done(events, time)} of {batches} done; "
            f"GPUs {used_until(events, time, num_devices):.1%} busy so far"
        )
        for text, mine in zip(held, lives, strict=True):
            alive = [f"v{v}" for v, life in enumerate(mine) if life.start <= time < life.end]
            text.set_text(" ".join(alive) if len(alive) < 3 else f"{alive[0]}-{alive[-1]}")

    return play


def used_until(events: list[Event], time: float, num_devices: int) -> float:
    """The utilization up to that time, or in the whole run if that is over."""
    time = min(time, makespan(events))
    return sum(min(e.end, time) - e.start for e in events if e.start < time) / (time * num_devices)


def moments(runs: list[Simulated], until: float) -> dict[float, str]:
    """The times at which the movie stops, and what has just happened."""
    (_, flushed), (schedule, events) = runs
    num_devices, stops = len(schedule), {}
    then = " Only now can GPU1 start." if num_devices > 1 else ""
    stops[events[0].end] = f"GPU0 has finished F0.{then}"
    time = max(end for op, _, _, end in flushed if op.kind == "U" and op.version == 0)
    idle, other = (f"{1 - used_until(each, time, num_devices):.1%}" for each in (flushed, events))
    stops[time] = f"GPipe has drained, and updates. Idle so far: GPipe {idle}, PipeDream {other}."
    if example := find_example(schedule):
        (gpu, _, m, old), (*_, read) = example
        time = next(end for op, _, _, end in events if op == example[1])
        stops[time] = f"PipeDream's GPU{gpu} has v{old + 1} by now, and "
        stops[time] += f"keeps v{old}: B{m} reads v{read}, as F{m} did."
        if read != old:
            stops[time] = f"GPU{gpu}: F{m} read v{old}, B{m} reads v{read}, a wrong gradient."
    done = count(batches_done(flushed, until), "batch")
    stops[until] = f"GPipe has done {done}, PipeDream {batches_done(events, until)}."
    return stops


def write_movie(config: dict, path: Path) -> str:
    """Save the movie as a GIF; return its title.

    All frames share the palette of the last one, so that a frame only stores what changes: half as
    much as with a palette for each.
    """
    figure, durations, show = make_movie(config)
    figure.dpi, canvas = min(0.6, 1400 / figure.bbox.width) * DPI, FigureCanvasAgg(figure)

    def frame(time: float) -> Image.Image:
        show(time)
        canvas.draw()
        return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")

    palette = frame(max(durations)).quantize(128)
    frames = [frame(time).quantize(palette=palette, dither=Image.Dither.NONE) for time in durations]
    milliseconds = [*durations.values()]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)
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
