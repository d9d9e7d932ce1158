#!/usr/bin/env python3
"""Five pictures of pipeline parallelism, drawn from the schedules that pipedream_simple.py runs.

    python pipedream_visual.py                       five PNG files in the current folder
    python pipedream_visual.py --out pictures        in another folder, created if necessary
    python pipedream_visual.py --num_stages 8        every CONFIG key is also a flag
    python pipedream_visual.py --animate             also pipeline.gif, the run as an animation

CONFIG, schedules, times and weight versions are those of pipedream_simple.py. This file draws them,
and measures on them what it says in a title. It needs no display.
"""

import io
import itertools
import math
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during a slow import: no traceback
os.environ["MPLBACKEND"] = "agg"  # the reader's own may need a display, or not exist

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.patches import Patch, Rectangle
from PIL import Image

import pipedream_simple as pipe
from pipedream_simple import Event, Op, UserError, count, makespan, utilization

# --------------------------------------------------------------------------------------- look
#
# Hue says which microbatch; where weight versions are the subject, other hues say which version.
# Dark or light says forward or backward, and a label repeats both where it fits: nothing is told by
# color alone. Lengths are in pixels.

HUES = ("#2c4f8f", "#ad620c", "#262b38", "#7a68b8", "#86303a", "#35806f")  # microbatch m: m % 6
VERSION_HUES = "#5b6a10", "#512a50", "#1f7f96", "#555555"  # version v: v % 4
INK, GREY, LANE, SHADE = "#222222", "#6b6b6b", "#ececec", "#bcbcbc"
STYLE = {"font.size": 9, "text.color": INK}
STYLE |= {"text.hinting": "no_hinting"}  # takes a tenth of the time
SLOT, LABEL = 44, 27  # width of the shortest op, and the least that its label needs
NARROWEST, WIDEST, UNLABELLED = 1400, 3600, 2000  # timelines
LEFT, RIGHT = 160, 90  # margins beside them
DPI, LINE = 150, 34  # resolution, and height of a line of text
KINDS = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}
TINT = {"F": 0, "B": 0.68, "I": 0.68, "W": 0.88}  # how much white
IDLE = Patch(color=LANE, label="idle: the bubble")


def house_style() -> Any:
    """The same look whatever the reader's own matplotlib settings are."""
    return matplotlib.style.context(["default", STYLE])


def colors(op: Op, versions: int = 0) -> tuple[tuple, str]:
    """Fill and label color of an op: the hue of its microbatch, or with versions of its version."""
    hues, number = (VERSION_HUES, op.version) if versions else (HUES, op.microbatch)
    hue, tint = to_rgb(hues[number % len(hues)]), TINT[op.kind]
    return tuple(tint + (1 - tint) * part for part in hue), "black" if tint else "white"


class Picture(Figure):
    """A figure that is saved in the house style, and shown in it by a notebook."""

    savefig = house_style()(Figure.savefig)

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


def new_picture(width: float, height: float, title: str, lines: Iterable[str]) -> Figure:
    """An empty sheet with a title and a few lines below it."""
    figure = Picture(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
    add_heading(figure, 0.4 * LINE, title, fontsize=12)
    for row, text in enumerate(lines, start=1):
        add_heading(figure, (row + 0.4) * LINE + 8, text, weight="normal", fontsize=10)
    return figure


def add_heading(figure: Figure, top: float, text: str, **style) -> Any:
    """A line of text that begins at the left margin."""
    x, y = 24 / figure.bbox.width, 1 - (top + 0.5 * LINE) / figure.bbox.height
    return figure.text(x, y, text, va="center", **{"weight": "bold", **style})


def add_axes(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes without a frame at that place, counted from the upper left corner of the sheet."""
    across, down = figure.bbox.width, figure.bbox.height
    place = left / across, 1 - (top + height) / down, width / across, height / down
    axes = figure.add_axes(place)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return axes


def add_legend(figure: Figure, ops: list[Op], more: list[Patch], versions: bool = False) -> None:
    """At the foot of the sheet: the ops, what has a label on the axes, and more; each once."""
    entries: dict[str, Any] = {}  # label -> what it looks like
    for kind, name in KINDS.items():
        drawn = {op.version if versions else op.microbatch: op for op in ops if op.kind == kind}
        if some := sorted(drawn)[:3]:
            label = f"{kind}{some[0]}: {name} of microbatch {some[0]}"
            if versions:
                label = f"{kind}: {name} on {', '.join(f'v{version}' for version in some)}"
                label += ", ..." * (len(drawn) > 3)
            entries[label] = tuple(
                Patch(color=colors(Op(0, kind, n, n), versions)[0]) for n in some
            )
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        entries |= zip(labels, handles, strict=True)
    entries |= {str(patch.get_label()): patch for patch in more}
    style: dict[str, Any] = {"frameon": False, "columnspacing": 1.5, "handlelength": 1.8}
    style["bbox_to_anchor"] = 12 / figure.bbox.width, 4 / figure.bbox.height
    style["ncols"] = 3 if len(entries) == 6 else min(len(entries), 5)
    pairs = {tuple: HandlerTuple(ndivide=None, pad=0)}
    figure.legend([*entries.values()], [*entries], loc="lower left", handler_map=pairs, **style)


# --------------------------------------------------------------------------------- primitives


def simulated(config: dict, **settings) -> list[Event]:
    """The events of this CONFIG with other settings; ops that follow each other meet."""
    config = {**config, **settings}
    events = pipe.simulate(pipe.build_schedule(config), config)
    return [e._replace(start=round(e.start, 9), end=round(e.end, 9)) for e in events]


def gpus_of(events: list[Event]) -> list[int]:
    """The GPUs on which these events are."""
    return sorted({event.device for event in events})


class Box(NamedTuple):
    """A rectangle in a lane, from start to end, with a text in it."""

    start: float
    end: float
    lane: float
    top: float = 0.06  # within the lane: 0 to 1
    bottom: float = 0.94
    fill: Any = "none"
    text: str = ""
    ink: str = INK


def add_boxes(axes: Axes, boxes: list[Box], **style) -> None:
    """Any number of boxes as one collection; and their texts where they fit, all in one size."""
    if not boxes:
        return
    start, end, lane, top, bottom = np.array([box[:5] for box in boxes], dtype=float).T
    y = lane + top, lane + top, lane + bottom, lane + bottom
    corners: Any = np.array([(start, end, end, start), y]).T
    style = {"facecolors": [box.fill for box in boxes], "linewidths": 0, **style}
    axes.add_collection(PolyCollection(corners, **style), autolim=False)

    (first, edge), (below, above) = axes.get_xlim(), axes.get_ylim()
    left, right = np.maximum(start, first), np.minimum(end, edge)  # what is seen of a box
    wide = 0.84 * (right - left) * axes.bbox.width / (edge - first)
    high = 0.8 * (bottom - top) * axes.bbox.height / abs(above - below)
    lines = [box.text.split("\n") for box in boxes]
    wide /= [0.64 * max(1, *map(len, text)) for text in lines]
    fits = np.minimum(wide, high / [len(text) for text in lines])  # font sizes that fill the boxes
    size = min(19, max(12, min(fits[(left == start) & (right == end)], default=12)))
    middles = zip((left + right) / 2, lane + (top + bottom) / 2, strict=True)
    for box, fit, middle in zip(boxes, fits, middles, strict=True):
        if box.text and fit >= size:
            place: dict[str, Any] = {"ha": "center", "va": "center_baseline", "linespacing": 1.1}
            axes.text(*middle, box.text, color=box.ink, fontsize=size * 72 / DPI, **place)


def add_lanes(
    figure: Figure, top: float, height: float, lanes: int | list, until: float, since=0, name_at=0.5
) -> Axes:
    """A lane for each of these GPUs, idle so far: lane d reaches from y = d to y = d + 1."""
    gpus = [*range(lanes)] if isinstance(lanes, int) else lanes
    axes = add_axes(figure, LEFT, top, figure.bbox.width - LEFT - RIGHT, height)
    axes.set(xlim=(since, until), ylim=(gpus[-1] + 1, gpus[0]))
    named = gpus[:: math.ceil(26 * len(gpus) / height)]
    axes.set_yticks([gpu + name_at for gpu in named], [f"GPU{gpu}" for gpu in named])
    add_boxes(axes, [Box(since, until, gpu, fill=LANE) for gpu in gpus], zorder=0)
    axes.locator_params("x", nbins=max(4, int(axes.bbox.width // 92)), steps=[1, 2, 5, 10])
    axes.xaxis.set_major_formatter(lambda time, _: f"t{time:.10g}")
    return axes


def beside(axes: Axes, x: float, y: float, text: str, **style) -> Any:
    """A text beside a lane: x in pixels from the left end of all lanes."""
    across = axes.get_yaxis_transform()
    return axes.text(x / axes.bbox.width, y, text, transform=across, va="center", **style)


def draw_ops(axes: Axes, events: list[Event], faded="", versions=0, stages=False) -> None:
    """The primitive that draws the ops of every picture: a box for each, in the lane of its GPU.

    faded: this kind stays hollow. versions: hue and label say which weights an op reads, and there
    is room for the bars of so many versions below. stages: a label names the stage, as in 2F0. Of
    two ops at once the backward is below the forward.
    """
    first, last = axes.get_xlim()
    at_once = Counter(event[1:] for event in events)
    wide = shortest(events) * axes.bbox.width / (last - first) > 8  # pixels
    boxes, edges, widths = [], [], []
    for op, gpu, start, end in events:
        if op.kind != "U":
            hollow = op.kind == faded
            fill, ink = ("white", GREY) if hollow else colors(op, versions)
            name = str(op) if stages else f"{op.kind}{op.microbatch}"
            name += f"\nv{op.version}" * (versions > 0)
            place = 0.06, ops_end(versions)
            if at_once[gpu, start, end] > 1:
                place = (0.06, 0.5) if op.kind == "F" else (0.5, 0.94)
            boxes.append(Box(start, end, gpu, *place, fill, name, ink))
            edges.append(SHADE if hollow else "white")
            widths.append(0.7 * (hollow or wide))
    add_boxes(axes, boxes, edgecolors=edges, linewidths=widths, zorder=2, gid="ops")


def ops_end(versions: int) -> float:
    """Where in a lane the boxes of ops end, with the bars of so many versions below them."""
    return 0.06 + 0.88 / (1 + min(0.4 * versions, 3))


def shortest(events: list[Event]) -> float:
    """The time of the shortest op."""
    return min(event.end - event.start for event in events if event.op.kind != "U")


def plot_width(events: list[Event], until: float) -> float:
    """Enough for a label in the shortest op; where that is more than WIDEST, all go without."""
    slots = until / shortest(events)
    return UNLABELLED if LABEL * slots > WIDEST else min(max(SLOT * slots, NARROWEST), WIDEST)


def batch_ends(events: list[Event]) -> list[float]:
    """When the last stage has made its update, batch after batch."""
    return [*{op.version: end for op, _, _, end in events if op.kind == "U"}.values()]


# ---------------------------------------------------------------- naive and microbatch pictures


def naive_pipeline(config: dict) -> Figure:
    """One microbatch after the other crawls through the stages and back."""
    events = simulated(config, schedule="naive", num_batches=1)
    microbatches = count(config["num_microbatches"], "microbatch")
    lines = [
        "A microbatch passes down the stages and back; only then does the next one start.",
        f"A batch of {microbatches} takes {makespan(events):.10g} time units; "
        f"{1 - utilization(events):.1%} of the GPU time is idle.",
    ]
    return draw_batch(events, "Naive pipeline", lines)


def microbatch_forward(config: dict) -> Figure:
    """GPipe's forward wave: while a stage works on a microbatch, the one before has the next."""
    events = simulated(config, schedule="gpipe", num_batches=1)
    microbatches = count(config["num_microbatches"], "microbatch")
    used = utilization([event for event in events if event.op.kind == "F"])
    lines = [
        "A microbatch starts as soon as GPU0 is free, before the previous one has returned.",
        f"This wave of {microbatches} uses {used:.1%} of the GPU time that it takes"
        + ("; with more it would be longer and use more." if used < 1 else "."),
    ]
    return draw_batch(events, "GPipe, forward wave", lines, faded="B")


def microbatch_backward(config: dict) -> Figure:
    """GPipe's backward wave, on the time axis of the forward wave."""
    events = simulated(config, schedule="gpipe", num_batches=1)
    lines = [
        "The last stage has the loss: the gradients start there and go back stage by stage.",
        f"Forward and backward take {makespan(events):.10g} time units at {utilization(events):.1%}"
        " utilization. The next batch waits until all of this one is back: a flush.",
    ]
    return draw_batch(events, "GPipe, backward wave", lines, faded="F")


@house_style()
def draw_batch(events: list[Event], title: str, lines: list[str], faded: str = "") -> Figure:
    """The lanes of one batch, ops of the kind faded hollow, and how many GPUs work when."""
    wave = [event for event in events if event.op.kind not in (faded, "U")]
    num_devices, until, used = len(gpus_of(wave)), makespan(events), utilization(events)
    working = at_work(wave, num_devices)
    most = max(working, key=lambda box: (box.bottom, box.end - box.start))
    everyone = most.bottom == num_devices
    who = "all" if everyone and num_devices > 2 else f"{most.text} of"
    when = f" from t{most.start:.10g} to t{most.end:.10g}" if faded else f", {used:.1%} utilization"
    title += f": {who} {count(num_devices, 'GPU')} at work{when}"
    width, top = plot_width(events, until), LINE * (len(lines) + 1) + 30
    lane = min(84, 2600 / num_devices, max(28, 6 * width * shortest(events) / until))
    strip_top = top + lane * num_devices + 56
    figure = new_picture(LEFT + width + RIGHT, strip_top + 190, title, lines)

    lanes = add_lanes(figure, top, lane * num_devices, num_devices, until)
    draw_ops(lanes, events, faded)
    if width * shortest(wave) / until > 12:
        draw_handovers(lanes, wave)
    strip = add_axes(figure, LEFT, strip_top, lanes.bbox.width, 110)
    strip.set(xlim=(0, until), ylim=(0, num_devices), xticks=[], yticks=[0, num_devices])
    add_boxes(strip, [Box(working[0].start, working[-1].end, 0, 0, num_devices, LANE)])
    add_boxes(strip, working, gid="at work")
    label, size = ("GPUs at work\nin this wave", 8) if faded else ("GPUs\nat work", 9)
    strip.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=size)

    legend = [IDLE] * (used < 1) + [Patch(color=INK, label="all GPUs at work")] * everyone
    if faded:
        name_triangles(lanes, wave)
        other = f"{KINDS[faded]}s: the other wave"
        legend.insert(0, Patch(facecolor="white", edgecolor=GREY, label=other))
    add_legend(figure, [event.op for event in wave], legend)
    return figure


def draw_handovers(axes: Axes, wave: list[Event]) -> None:
    """A triangle where a result leaves for the next GPU: activations go down, gradients up."""
    last = gpus_of(wave)[-1]
    down = [(end, gpu + 1) for op, gpu, _, end in wave if op.kind == "F" and gpu < last]
    up = [(end, gpu) for op, gpu, _, end in wave if op.kind == "B" and gpu > 0]
    style: dict[str, Any] = {"ls": "", "color": INK, "ms": 5, "zorder": 3, "clip_on": False}
    for leaves, marker, name in (down, "v", "activations sent"), (up, "^", "gradients sent back"):
        if leaves:
            axes.plot(*zip(*leaves, strict=True), marker=marker, label=name, **style)


def name_triangles(axes: Axes, wave: list[Event]) -> None:
    """The two triangles of a wave's bubble, each named where a GPU waits longest in it."""
    what, begin, over = f"{KINDS[wave[0].op.kind]}s", wave[0].start, makespan(wave)
    fills, drains = f"the wave fills:\nno {what} yet", f"the wave drains:\nno {what} left"
    rows = [[event for event in wave if event.device == gpu] for gpu in gpus_of(wave)]
    before = [Box(begin, row[0].start, gpu, text=fills, ink=GREY) for gpu, row in enumerate(rows)]
    after = [Box(row[-1].end, over, gpu, text=drains, ink=GREY) for gpu, row in enumerate(rows)]
    add_boxes(axes, [max(gaps, key=lambda gap: gap.end - gap.start) for gaps in (before, after)])


def at_work(wave: list[Event], num_devices: int) -> list[Box]:
    """How many GPUs compute when: boxes as high as that number, dark where all GPUs do."""
    change = Counter(event.start for event in wave)
    change.subtract(event.end for event in wave)
    times = sorted(time for time in change if change[time])
    numbers, boxes = itertools.accumulate(change[time] for time in times), list[Box]()
    for start, end, number in zip(times, times[1:], numbers, strict=False):
        fill, ink = (INK, "white") if number == num_devices else (SHADE, INK)
        boxes.append(Box(start, end, 0, 0, number, fill, str(number), ink))
    return boxes


# ------------------------------------------------------------------- weight versioning picture


def lifetimes(events: list[Event]) -> dict[tuple[int, int], tuple[float, float, float]]:
    """(stage, version) -> when it comes, when the next one comes, and when its last reader ends."""
    ended = {event.op: event.end for event in events}
    read = {key: ended[op] for key, op in pipe.last_readers(ended).items()}
    made = {(stage, 0): 0.0 for stage, _ in read}
    made |= {(op.stage, op.version + 1): end for op, end in ended.items() if op.kind == "U"}
    return {
        (stage, v): (start, made.get((stage, v + 1), math.inf), read.get((stage, v), math.inf))
        for (stage, v), start in sorted(made.items())
    }


def peaks(events: list[Event]) -> list[int]:
    """The most weight versions that each GPU holds at once."""
    rows = [[event.op for event in events if event.device == gpu] for gpu in gpus_of(events)]
    return [max(alive for _, alive in pipe.memory_held(row)) for row in rows]


def find_example(events: list[Event]) -> tuple[Event, ...]:
    """A forward, and its backward at a time when the stage has newer weights; if any."""
    lives, rows = lifetimes(events), sorted(events, key=lambda event: event.device)
    forwards = {(e.device, e.op.microbatch): e for e in rows if e.op.kind == "F"}
    for event in rows:
        forward = forwards[event.device, event.op.microbatch]
        _, superseded, _ = lives[event.device, forward.op.version]
        if event.op.kind == "B" and superseded <= event.start:
            return forward, event
    return ()


def misreads(events: list[Event]) -> set[Op]:
    """The backwards that read other weights than their forward did. Stashing: none."""
    ops = {event.op for event in events}
    return {op for op in ops if op.kind == "B" and op._replace(kind="F") not in ops}


class Panel(NamedTuple):
    """A part of the fourth picture: what some GPUs do, seen in a window of time."""

    heading: str
    events: list[Event]
    since: float
    until: float
    example: tuple[Event, ...] = ()


@house_style()
def weight_versioning(config: dict) -> Figure:
    """A GPU's stash at work and the same moment without it; or all GPUs, where none is needed."""
    events, stream = simulated(config), {**config, "schedule": "pipedream"}
    kept = simulated(stream, weight_stashing=True)
    lost = simulated(stream, weight_stashing=False, vertical_sync=False)
    without = config["schedule"] != "pipedream" or not find_example(kept)
    panels = [all_gpus(config, events)] * without
    if find_example(kept):  # below a schedule with a flush, for contrast
        panels += [close_up("PipeDream's GPU{} with weight stashing", kept)]
        panels += [close_up("The same GPU without weight stashing", lost)]
    title, lines = tell_versions(config, events)
    lines.append("Color is the weight version: dark for a forward, light for a backward.")
    heights = [2 * LINE + 36 + LINE * bool(p.example) + rows_and_height(p)[1] for p in panels]
    *tops, foot = itertools.accumulate(heights, initial=LINE * (len(lines) + 1) + 24)
    width = max(plot_width(panel.events, panel.until - panel.since) for panel in panels)
    figure = new_picture(LEFT + width + RIGHT, foot + 70, title, lines)
    for panel, top in zip(panels, tops, strict=True):
        draw_panel(figure, top, panel)
    shown = [event.op for p in panels for event in p.events if event.start < p.until]
    idle = any(utilization(panel.events) < 1 for panel in panels)
    add_legend(figure, shown, [IDLE] * idle, versions=True)
    return figure


def all_gpus(config: dict, events: list[Event]) -> Panel:
    """All lanes, for the first batches: so many that stashed versions come and go."""
    num_devices, num_batches = config["num_stages"], config["num_batches"]
    shown = min(2 + math.ceil(num_devices / config["num_microbatches"]), num_batches)
    until, done = batch_ends(events)[shown - 1], f"{shown} of {count(num_batches, 'batch')} done"
    gpus, versions = count(num_devices, "GPU"), count(max(peaks(events)), "weight version")
    heading = f"{gpus} until t{until:.10g}: {done}, at most {versions} on a GPU"
    return Panel(heading, events, 0, until)


def close_up(heading: str, events: list[Event]) -> Panel:
    """The GPU of the example, from its forward to as long after its backward."""
    example = forward, backward = find_example(events)
    mine = [event for event in events if event.device == forward.device]
    since = max(0, forward.start - shortest(events))
    until = min(makespan(events), 2 * backward.end - since)
    return Panel(heading.format(forward.device), mine, since, until, example)


def rows_and_height(panel: Panel) -> tuple[int, float]:
    """Of its lanes: rows of bars for the most versions at once; and the height of all lanes."""
    most, ops = peaks(panel.events), 100 if panel.example else 62
    return max(most), min(0.88 * ops / (ops_end(max(most)) - 0.06) * len(most), 1600)


def draw_panel(figure: Figure, top: float, panel: Panel) -> None:
    """Ops in the color of the version that they read, above the versions that each GPU holds."""
    (heading, events, since, until, example), (rows, height) = panel, rows_and_height(panel)
    add_heading(figure, top, heading)
    gpus, top = gpus_of(events), top + LINE + 6 + LINE * bool(example)
    axes = add_lanes(figure, top, height, gpus, until, since, ops_end(rows) / 2)
    draw_ops(axes, [e for e in events if e.end > since and e.start < until], versions=rows)
    draw_memory(axes, panel, rows)
    draw_marks(axes, events, ops_end(rows))
    if height > 70 * len(gpus):
        for gpu, most in zip(gpus, peaks(events), strict=True):
            y = gpu + (ops_end(rows) + 0.97) / 2
            beside(axes, -8, y, "versions" if rows == 1 else "newest\nkept", ha="right", fontsize=7)
            beside(axes, axes.bbox.width + 10, y, f"max {most}", fontsize=7)
    if example:
        draw_example(axes, *example)


def draw_memory(axes: Axes, panel: Panel, rows: int) -> None:
    """Below the ops the weight versions: the newest filled, and below it those kept for readers."""
    over, top, gpus = makespan(panel.events), ops_end(rows) + 0.03, gpus_of(panel.events)
    high = (0.97 - top) / rows  # of a bar; versions that are kept at once lie in different rows
    y = [(top + (row + 0.1) * high, top + (row + 0.9) * high) for row in range(rows)]
    readers = pipe.last_readers(op for op, *_ in panel.events)
    newest, kept, edges = [], [], []
    for (gpu, v), (start, superseded, end) in lifetimes(panel.events).items():
        dark, light = (colors(Op(gpu, kind, 0, v), versions=rows)[0] for kind in "FB")
        newest.append(Box(start, min(superseded, over), gpu, *y[0], light, f"v{v}"))
        if end > superseded:
            text = f", kept until B{readers[gpu, v].microbatch} has read it"
            text = f"v{v}" + text * (bool(panel.example) and end <= panel.until)  # if there is room
            kept.append(Box(superseded, end, gpu, *y[1 + v % (rows - 1)], "white", text))
            edges.append(dark)
    thick = high * axes.bbox.height / len(gpus) > 8  # pixels
    style = {"edgecolors": INK, "linewidths": 0.7 * thick, "zorder": 2}
    add_boxes(axes, newest, label="newest version", **style)
    style |= {"edgecolors": edges, "linewidths": 1.8 if thick else 0.9}
    add_boxes(axes, kept, label="old version, kept (stashed)", **style)


def draw_marks(axes: Axes, events: list[Event], bottom: float) -> None:
    """Where a stage updates, and which backwards read the wrong weights."""
    first, last = axes.get_xlim()
    updates = [(e.end, e.device) for e in events if e.op.kind == "U" and first <= e.end <= last]
    x, lane = zip(*updates, strict=True)
    line: dict[str, Any] = {"colors": INK, "lw": 2.5, "zorder": 4, "clip_on": False}
    axes.vlines(x, np.add(lane, 0.02), np.add(lane, bottom + 0.04), gid="updates", **line)
    axes.plot([], [], "|", color=INK, ms=11, mew=2.5, label="weight update")
    wrong, inset = misreads(events), 2 * (last - first) / axes.bbox.width
    frames = [
        Box(start + inset, end - inset, gpu, 0.08, bottom - 0.02)
        for op, gpu, start, end in events
        if op in wrong and first < end and start < last and end - start > 7 * inset
    ]
    style = {"edgecolors": HUES[4], "linewidths": 2, "zorder": 2.5}
    add_boxes(axes, frames, label="reads other weights than its forward did", **style)


def draw_example(axes: Axes, forward: Event, backward: Event) -> None:
    """A bracket above the GPU's lane, from the forward to its backward."""
    left, right = ((event.start + event.end) / 2 for event in (forward, backward))
    pixel = 1 / axes.bbox.height
    low, high = forward.device + 0.05, forward.device - 15 * pixel
    style: dict[str, Any] = {"color": INK, "clip_on": False, "zorder": 4}
    axes.plot([left, left, right, right], [low, high, high, low], lw=1.5, gid="example", **style)
    axes.plot([right], [low], marker="v", ms=6, gid="arrow", **style)
    m, old, new = forward.op.microbatch, forward.op.version, backward.op.version
    text = f"F{m} read v{old}, B{m} reads v{new}: a wrong gradient"
    if old == new:
        text = f"B{m} reads v{new}, as F{m} did"
    axes.text((left + right) / 2, high - 5 * pixel, text, ha="center", va="bottom")


def tell_versions(config: dict, events: list[Event]) -> tuple[str, list[str]]:
    """Title and lines: what is stashed and why, with the figures of this run."""
    if config["schedule"] != "pipedream":
        used = utilization(events)
        price = f", and {1 - used:.1%} of the GPU time is idle" * (used < 1)
        return f"With a flush one weight version is enough{price}", [
            "Updates wait until nothing is in flight: a backward reads what its forward read.",
            "PipeDream does not wait, and keeps old weights for what is in flight.",
        ]
    example = [event.op for event in find_example(events)]
    if not example:
        return "Nothing to stash: here no update happens while a microbatch is in flight", [
            "With more stages and batches, PipeDream updates while microbatches are in flight.",
        ]
    (gpu, _, m, old), (*_, read) = example
    lives, new = lifetimes(events), max(read, old + 1)
    story = f"On GPU{gpu}, F{m} read v{old}, v{new} came at t{lives[gpu, new][0]:.10g}, and "
    if config["weight_stashing"]:
        title = "Weight stashing: every backward reads the weights that its forward read"
        last = pipe.last_readers(op for op, *_ in events)[gpu, read].microbatch
        story += f"B{m} still reads v{read}, for an exact gradient. v{read} is kept until "
        story += f"t{lives[gpu, read][2]:.10g}, when B{last} has read it."
    else:
        backwards = count(sum(op.kind == "B" for op, *_ in events), "backward")
        title = f"No stashing: {len(misreads(events))} of {backwards} read the wrong weights"
        story += f"B{m} reads v{read}: old activations, new weights, a wrong gradient."
    flow = "PipeDream updates without a flush: weights change while microbatches are in flight."
    return title, [flow, story]


# ----------------------------------------------------------------- utilization comparison picture


@house_style()
def utilization_comparison(config: dict) -> Figure:
    """Naive, flush, no flush; and the one formula that all their figures come from."""
    num_stages, in_batch = config["num_stages"], config["num_microbatches"]
    runs = [simulated(config, schedule=name) for name in ("naive", "1f1b", "pipedream")]
    names = "naive: one at a time", "1F1B: a flush per batch", "PipeDream: no flush"
    in_row = 1, in_batch, in_batch * config["num_batches"]  # microbatches without a flush
    bars = [*zip(in_row, map(utilization, runs), names, strict=True)]
    lines = [
        f"{count(num_stages, 'GPU')}, simulated: one microbatch at a time; batches of {in_batch:,} "
        f"with a flush after each; {count(config['num_batches'], 'batch')} in a row without one.",
        "With equal stages and free links, one formula holds for all: K microbatches in a row keep "
        "S GPUs busy for K / (K + S - 1) of the time.",
    ]
    gaps = [100 * (part - in_a_row(n, num_stages)) for n, part, _ in bars]
    if max(map(abs, gaps)) > 1e-6:
        low, high = (f"{round(gap, 1) + 0:+.1f}" for gap in (min(gaps), max(gaps)))
        lines.append(f"Here they are not: these runs differ from it by {low} to {high} points.")
    title = "GPU utilization: " + " → ".join(f"{part:.1%}" for _, part, _ in bars)
    figure = new_picture(1760, 900, title, lines)
    draw_bars(add_axes(figure, 120, 170, 640, 590), bars)
    draw_curve(add_axes(figure, 930, 170, 780, 480), bars, num_stages)
    return figure


def in_a_row(number: int | np.ndarray, num_stages: int) -> Any:
    """The closed form for equal stages: S - 1 turns pass until the pipeline is full, or empty."""
    return number / (number + num_stages - 1)


def draw_bars(axes: Axes, bars: list[tuple[int, float, str]]) -> None:
    """Busy and idle, one bar per schedule."""
    axes.set_xticks(range(len(bars)), [name.replace(": ", "\n") for *_, name in bars], fontsize=10)
    axes.set(ylim=(0, 1), yticks=[], ylabel="GPU time")
    for x, (_, part, _) in enumerate(bars):
        axes.bar(x, part, 0.66, color=HUES[0])
        axes.bar(x, 1 - part, 0.66, bottom=part, color=LANE)
        y, ink = (part / 2, "white") if part >= 0.06 else (part + 0.04, HUES[0])  # above a low bar
        style: dict[str, Any] = {"ha": "center", "va": "center"}
        axes.text(x, y, f"{part:.1%}", color=ink, fontsize=13, weight="bold", **style)
        if part < 0.97:
            axes.text(x, (1 + part) / 2, f"idle {1 - part:.1%}", **style)


def draw_curve(axes: Axes, bars: list[tuple[int, float, str]], num_stages: int) -> None:
    """The formula as a line, and the simulated runs as marks."""
    right = 1.3 * max(n for n, *_ in bars)
    axes.set(xscale="log", xlim=(0.9, right), ylim=(0, 1.03), ylabel="GPU utilization")
    axes.set(xlabel="K: microbatches in a row without a flush", yticks=[0, 0.25, 0.5, 0.75, 0.9, 1])
    x, label = np.geomspace(0.9, right, 200), f"formula K / (K + {num_stages - 1})"
    axes.plot(x, in_a_row(x, num_stages), color=GREY, label=label, zorder=1)
    points = itertools.groupby(bars, lambda bar: bar[:2])  # one batch: two runs in one point
    for ((n, part), same), marker in zip(points, "os^", strict=False):
        label = f"K = {n:,}: {part:.1%}  " + "\n".join(name for *_, name in same)
        axes.plot([n], [part], marker, ms=8, color=HUES[0], label=label, zorder=2, clip_on=False)
        axes.plot([0.9, n, n], [part, part, 0], color=HUES[0], lw=0.7, ls=":", zorder=1)
    ticks = [n * 10**power for power in range(9) for n in (1, 2, 5) if n * 10**power <= right]
    axes.set_xticks(ticks, [f"{n:,}" for n in ticks])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.spines[["left", "bottom"]].set_visible(True)
    axes.legend(loc="upper left", bbox_to_anchor=(-0.07, -0.17), frameon=False)


# -------------------------------------------------------------------------------- the animation

FRAME, STOP, MOST_FRAMES = 800, 4000, 30  # milliseconds; of a longer run only some times are shown


def make_movie(config: dict) -> tuple[Figure, dict[float, int], Callable[[float], None]]:
    """GPipe above PipeDream on one time axis: one flushes, the other does not.

    Returns the picture, {time of a frame: its milliseconds}, and a function that shows one.
    """
    flush, stream = (simulated(config, schedule=name) for name in ("gpipe", "pipedream"))
    until = max(all_gpus(config, stream).until, batch_ends(flush)[0])
    num_devices, width = config["num_stages"], LEFT + plot_width(stream, until) + RIGHT
    height, top = min(72 * num_devices, 1100), 2 * LINE + 36
    below = height + 2 * LINE + 24
    title = f"To flush or not to flush: GPipe and PipeDream on {count(num_devices, 'GPU')}"
    figure = new_picture(width, top + 2 * below + 50, f"{title} (color: the microbatch)", [" "])
    players = []
    for row, (name, events) in enumerate({"GPipe": flush, "PipeDream": stream}.items()):
        heading = add_heading(figure, top + row * below, " ")
        axes = add_lanes(figure, top + row * below + LINE, height, num_devices, until)
        players.append(add_player(axes, heading, name, events))
    add_legend(figure, [event.op for event in flush + stream if event.start < until], [IDLE])
    stops = moments(flush, stream, until)
    times = sorted({event.end for event in flush + stream if event.end <= until})
    every = math.ceil(len(times) / MOST_FRAMES)
    frames = dict.fromkeys(times[every - 1 :: every], FRAME) | dict.fromkeys(stops, STOP)

    def show(time: float) -> None:
        figure.texts[1].set_text(f"t{time:.10g}" + (f": {stops[time]}" if time in stops else ""))
        for play in players:
            play(time)

    return figure, dict(sorted(frames.items())), show


def add_player(axes: Axes, heading: Any, name: str, events: list[Event]) -> Callable[[float], None]:
    """Lanes of a run and the versions that each GPU holds; returns what shows it up to a time."""
    lives, num_devices, (_, until) = lifetimes(events), len(gpus_of(events)), axes.get_xlim()
    ends = batch_ends(events)
    draw_ops(axes, [event for event in events if event.start < until])
    draw_marks(axes, events, 0.9)
    future = Rectangle((0, 0), until, num_devices, color="white", zorder=5, clip_on=False)
    axes.add_patch(future)
    margin = 8 * until / axes.bbox.width  # the mark of an update at the very end needs it
    cursor = axes.axvline(0, color=INK, lw=1, zorder=6, clip_on=False)
    right = axes.bbox.width + 12
    held = [beside(axes, right, gpu + 0.5, "") for gpu in range(num_devices)]
    beside(axes, right, -12 * num_devices / axes.bbox.height, "weights", fontsize=8)

    def play(time: float) -> None:
        future.set_bounds(time, 0, until + margin - time if time < until else 0, num_devices)
        cursor.set_xdata([time, time])
        done = f"{sum(end <= time for end in ends)} of {count(len(ends), 'batch')} done"
        heading.set_text(f"{name}: {done}; GPUs {used_until(events, time):.1%} busy so far")
        alive = [key for key, (start, _, end) in lives.items() if start <= time < end]
        for gpu, text in enumerate(held):
            names = [f"v{version}" for stage, version in alive if stage == gpu]
            text.set_text(" ".join(names) if len(names) < 3 else f"{names[0]}-{names[-1]}")

    return play


def used_until(events: list[Event], time: float) -> float:
    """The utilization up to that time, or in the whole run if that is over."""
    return utilization([e._replace(start=min(e.start, time), end=min(e.end, time)) for e in events])


def moments(flush: list[Event], stream: list[Event], until: float) -> dict[float, str]:
    """The times at which the movie stops, and what has just happened."""
    first = batch_ends(flush)[0]
    then = " Only now can GPU1 start." * (len(gpus_of(stream)) > 1)
    idle, other = (f"{1 - used_until(events, first):.1%}" for events in (flush, stream))
    stops = {
        stream[0].end: f"GPU0 has finished F0.{then}",
        first: f"GPipe has drained, and updates. Idle so far: GPipe {idle}, PipeDream {other}.",
    }
    if example := find_example(stream):
        (gpu, _, m, old), (*_, read), time = example[0].op, example[1].op, example[1].end
        stops[time] = f"GPU{gpu}: F{m} read v{old}, B{m} reads v{read}, a wrong gradient."
        if read == old:
            stops[time] = f"PipeDream's GPU{gpu} has v{old + 1} by now, and "
            stops[time] += f"keeps v{old}: B{m} reads v{read}, as F{m} did."
    done, more = (sum(end <= until for end in batch_ends(events)) for events in (flush, stream))
    stops[until] = f"GPipe has done {count(done, 'batch')}, PipeDream {more}."
    return stops


# ---------------------------------------------------------------------------------------- files


def save(files: dict[Path, Callable[[Path], Any]], read: Iterable[Path] = ()) -> list:
    """Write all files or none: first under temporary names, and when all is done rename them.

    files: path -> a function that writes to the path it is given; returns what these return.
    read: the inputs, which are never replaced. UserError: a file cannot be written.
    """
    parts, results = dict[Path, Path](), []  # temporary name -> target
    try:
        for path, write in files.items():
            target = Path(os.path.realpath(path))  # a link stays a link
            if target.exists() and (not target.is_file() or any(map(target.samefile, read))):
                raise UserError(f"cannot write {path}: it is an input, or not a regular file")
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(f"part-{os.getpid()}-{target.name}")
            parts[part] = target
            results.append(write(part))
            if target.exists():
                part.chmod(target.stat().st_mode)
        for part, path in parts.items():
            part.replace(path)
        return results
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"cannot write {path}: {path.parent} is not a folder") from None
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        for part in parts:
            with suppress(OSError):  # all went well: it has been renamed
                part.unlink()


def write_picture(draw: Callable[[dict], Figure], config: dict, path: Path) -> str:
    """Draw and save a picture, with its text as metadata; return its title."""
    figure = draw(config)
    title, *lines = (text.get_text() for text in figure.texts)
    about = {"Title": title, "Description": " ".join(lines)}
    figure.savefig(path, metadata=about, pil_kwargs={"compress_level": 2})  # fast
    return title


@house_style()
def write_movie(config: dict, path: Path) -> str:
    """Save the movie as a GIF; return its title. One palette for all frames halves its size."""
    figure, durations, show = make_movie(config)
    figure.dpi, canvas = min(0.6, 1400 / figure.bbox.width) * DPI, FigureCanvasAgg(figure)
    frames = []
    for time in durations:
        show(time)
        canvas.draw()
        frames.append(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"))
    palette, milliseconds = frames[-1].quantize(128), [*durations.values()]
    first, *others = (frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames)
    first.save(path, save_all=True, append_images=others, duration=milliseconds, loop=0)
    return figure.texts[0].get_text()


# ----------------------------------------------------------------------------------------- main

BATCH_PICTURES = naive_pipeline, microbatch_forward, microbatch_backward
PICTURES: dict[str, Callable[[dict], Figure]] = {
    draw.__name__: draw for draw in (*BATCH_PICTURES, weight_versioning, utilization_comparison)
}


def main() -> None:
    out = {"type": Path, "default": Path(), "metavar": "DIR", "help": "for pictures (default: .)"}
    animate = {"action": "store_true", "help": "also pipeline.gif, the run as an animation"}
    config, given = pipe.parse_config(__doc__, flags={"--out": out, "--animate": animate})
    pipe.check_config(config)
    files: dict[Path, Callable[[Path], str]] = {
        given["out"] / f"{name}.png": partial(write_picture, draw, config)
        for name, draw in PICTURES.items()
    }
    if given["animate"]:
        files[given["out"] / "pipeline.gif"] = partial(write_movie, config)
    for path, title in zip(files, save(files), strict=True):
        print(f"{path}\n   {title}" if config["verbose"] else path)


if __name__ == "__main__":
    sys.exit(pipe.run_main(main))
