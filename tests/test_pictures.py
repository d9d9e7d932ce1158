"""The pictures show the simulated run: bars, labels, titles, strips; and how they are saved."""

import functools
import itertools
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from PIL import Image

import pipedream_visual
from pipedream.backstage.audit import Audit
from pipedream_simple import CONFIG, Op, UserError, build_schedule, simulate, train
from pipedream_visual import (
    HUES,
    IDLE,
    PICTURES,
    VERSION_HUES,
    colors,
    house_style,
    lifetimes,
    make_movie,
    save,
)

ROOT = Path(__file__).parent.parent
SIZES = {
    "default": {},
    "2 x 2": {"num_stages": 2, "num_microbatches": 2},
    "8 x 16": {"num_stages": 8, "num_microbatches": 16, "num_batches": 3},
    "16 x 64": {"num_stages": 16, "num_microbatches": 64, "batch_size": 64, "num_batches": 2},
    "nine": {"num_microbatches": 9, "num_batches": 3, "batch_size": 36},
    "1 of all": {"num_stages": 1, "num_microbatches": 1, "num_batches": 1},
    "1 microbatch": {"num_microbatches": 1, "num_batches": 8},
    "1 batch": {"num_batches": 1, "forward_time": 1e-6, "backward_time": 3e-6},
    "M < S": {"num_stages": 6, "num_microbatches": 2},
    "uneven": {"num_stages": 3, "forward_time": [1, 2, 0.5], "backward_time": 2, "comm_time": 0.25},
    "no stashing": {"num_microbatches": 1, "num_batches": 8, "weight_stashing": False},
    "vertical sync": {"num_microbatches": 2, "vertical_sync": True},
    "flush": {"schedule": "gpipe", "forward_time": 5e8, "backward_time": 1e9},
}


@functools.cache
def figures(size):
    """{name: picture} of a size."""
    with house_style():
        drawn = {name: draw({**CONFIG, **SIZES[size]}) for name, draw in PICTURES.items()}
        for figure in drawn.values():
            figure.draw_without_rendering()  # places texts, legends and ticks
    return drawn


def words(texts):
    return [text.get_text() for text in texts]


def collections(axes, name):
    return [c for c in axes.collections if name in (c.get_gid(), c.get_label())]


def boxes(collection):
    """(start, end, y of its upper edge, y of its lower edge) of every bar."""
    corners = np.array([path.vertices for path in collection.get_paths()])
    (start, top), (end, bottom) = corners.min(axis=1).T, corners.max(axis=1).T
    return [*zip(start.tolist(), end.tolist(), top, bottom, strict=True)]


def bars(axes):
    """{(device, start, end): fill} of the ops on the lanes."""
    (ops,) = collections(axes, "ops")
    places = [(int(top), start, end) for start, end, top, _ in boxes(ops)]
    assert len(set(places)) == len(places)
    return dict(zip(places, map(tuple, ops.get_facecolor()[:, :3]), strict=True))


def expected_bars(events):
    return {(e.device, e.start, e.end): e.op for e in events if e.op.kind != "U"}


def run_of(size, **settings):
    """Config, rows and events of a size, with times rounded as the program prints them."""
    config = {**CONFIG, **SIZES[size], **settings}
    schedule = build_schedule(config)
    events = [
        e._replace(start=round(e.start, 9), end=round(e.end, 9)) for e in simulate(schedule, config)
    ]
    return config, schedule, events


def waves(size):
    """Of the first three pictures: axes, config, events, and the kind that stays hollow."""
    for name, schedule, faded in (
        ("naive_pipeline", "naive", ""),
        ("microbatch_forward", "gpipe", "B"),
        ("microbatch_backward", "gpipe", "F"),
    ):
        config, _, events = run_of(size, schedule=schedule, num_batches=1)
        yield figures(size)[name].axes, config, events, faded


# ----------------------------------------------------------------------------- what is drawn


@pytest.mark.parametrize("size", SIZES)
def test_the_bars_of_a_batch_are_the_simulated_events_each_in_its_colour(size):
    for (axes, _), config, events, faded in waves(size):
        drawn, expected = bars(axes), expected_bars(events)
        assert set(drawn) == set(expected)
        for place, op in expected.items():
            fill = to_rgb("white") if op.kind == faded else colors(op)[0]
            assert drawn[place] == pytest.approx(fill)
        ops = [e for e in events if faded != "B" or e.op.kind == "F"]  # that wave is told alone
        used = sum(e.end - e.start for e in ops) / max(e.end for e in ops) / config["num_stages"]
        assert f"{used:.1%}" in said(axes.figure)


@pytest.mark.parametrize("size", ["default", "2 x 2", "uneven", "1 microbatch", "M < S"])
def test_triangles_stand_where_results_leave_for_the_next_gpu(size):
    for (axes, _), config, events, faded in waves(size):
        expected = {}
        for event in (e for e in events if e.op.kind not in (faded, "U")):
            marker, y = ("v", event.device + 1) if event.op.kind == "F" else ("^", event.device)
            if 0 < y < config["num_stages"]:
                expected.setdefault(marker, set()).add((event.end, y))
        drawn = {line.get_marker(): {*zip(*line.get_data(), strict=True)} for line in axes.lines}
        assert drawn == expected


VERSIONS = "newest version", "old version, kept (stashed)"
KEPT = {"schedule": "pipedream", "weight_stashing": True}
LOST = {"schedule": "pipedream", "weight_stashing": False, "vertical_sync": False}


def an_example(schedule):
    """The first backward with an update of its stage between its forward and it, if any."""
    row = [op[1:3] for op in schedule[0]]
    for op in schedule[0]:
        since = row.index(("F", op.microbatch))
        if op.kind == "B" and any(kind == "U" for kind, _ in row[since : row.index(op[1:3])]):
            return op
    return None


def panels(size):
    """Of the fourth picture: with stashing and without; before it all GPUs, if that needs none.

    Each is (axes, GPUs, settings, config, schedule, events of these GPUs): what it should show.
    """
    axes = list(figures(size)["weight_versioning"].axes)
    views = [(range(1), KEPT), (range(1), LOST)] * (an_example(run_of(size, **KEPT)[1]) is not None)
    if SIZES[size].get("schedule") == "gpipe" or not views:
        views = [(range(SIZES[size].get("num_stages", 4)), {}), *views]
    for one, (gpus, settings) in zip(axes, views, strict=True):
        config, schedule, events = run_of(size, **settings)
        yield one, gpus, settings, config, schedule, [e for e in events if e.device in gpus]


@pytest.mark.parametrize("size", SIZES)
def test_the_bars_of_the_versions_picture_are_its_runs_in_the_colours_of_the_versions(size):
    for axes, _, _, _, _, events in panels(size):
        since, until = axes.get_xlim()
        expected = expected_bars(e for e in events if e.end > since and e.start < until)
        drawn = bars(axes)
        assert set(drawn) == set(expected)
        for where, op in expected.items():
            fill, _ = colors(op, versions=1)
            assert drawn[where] == pytest.approx(fill)
            assert to_hex(fill) not in {
                to_hex(colors(op._replace(microbatch=m))[0]) for m in range(6)
            }


@pytest.mark.parametrize("size", SIZES)
def test_the_close_ups_show_one_moment_with_and_without_stashing(size):
    close = [panel for panel in panels(size) if panel[2] in (KEPT, LOST)]
    assert len(close) == 2 * (size not in ("1 of all", "1 batch"))
    assert len({axes.get_xlim() for axes, *_ in close}) <= 1
    for axes, _, settings, _, schedule, events in close:
        _, _, m, new = an_example(schedule)
        (old,) = [op.version for op in schedule[0] if op[1:3] == ("F", m)]
        middle = {e.op[1:3]: (e.start + e.end) / 2 for e in events}
        lines = {line.get_gid(): line.get_xydata().tolist() for line in axes.lines}
        ends = [lines["example"][0][0], lines["example"][-1][0]]
        assert ends == [middle["F", m], middle["B", m]]
        assert lines["arrow"] == [lines["example"][-1]]
        assert all(-0.4 < y < 0.1 for _, y in lines["example"])  # over the lane of GPU0
        since, until = axes.get_xlim()
        assert since < ends[0] < ends[1] < until
        (said,) = [text for text in words(axes.texts) if "reads" in text]
        assert (old == new) == (settings is KEPT)
        wrong = f"F{m} read v{old}, B{m} reads v{new}: a wrong gradient"
        assert said == (f"B{m} reads v{old}, as F{m} did" if old == new else wrong)


def labels_in(axes):
    """{place of an op: the text in the middle of its bar}."""
    ours = [(*t.get_position(), t.get_text()) for t in axes.texts if t.get_text()[0] in "FB"]
    texts = {(round(x, 6), int(y)): text for x, y, text in ours}
    (ops,) = collections(axes, "ops")
    first, edge = axes.get_xlim()
    middles = {
        (int(top), start, end): (round((max(start, first) + min(end, edge)) / 2, 6), int(top))
        for start, end, top, _ in boxes(ops)
    }
    return {place: texts.get(middle) for place, middle in middles.items()}


@pytest.mark.parametrize("size", ["default", "8 x 16", "M < S", "no stashing", "flush", "uneven"])
def test_every_bar_is_labelled_with_its_op_and_in_the_fourth_picture_with_its_version(size):
    _, _, events = run_of(size, schedule="naive", num_batches=1)
    found = labels_in(figures(size)["naive_pipeline"].axes[0])
    if size == "8 x 16":  # 256 slots: labels give way
        assert set(found.values()) == {None}
    else:
        assert found == {p: f"{op.kind}{op.microbatch}" for p, op in expected_bars(events).items()}
    for axes, _, _, _, _, events in panels(size):
        since, until = axes.get_xlim()
        expected = expected_bars(events)
        for place, label in labels_in(axes).items():
            op = expected[place]
            inside = since <= place[1] < place[2] <= until
            assert label == f"{op.kind}{op.microbatch}\nv{op.version}" or not (inside or label)


@pytest.mark.parametrize("size", SIZES)
def test_no_label_is_wider_or_higher_than_its_bar(size):
    for axes in (axes for figure in figures(size).values() for axes in figure.axes):
        spaces = [
            axes.transData.transform([[x, top], [end, bottom]])
            for name in ("ops", *VERSIONS)
            for ops in collections(axes, name)
            for x, end, top, bottom in boxes(ops)
        ]
        for text in axes.texts if spaces else []:
            if re.match(r"[FB]\d+(\nv\d+)?$|v\d+$|v\d+, kept", text.get_text()):
                box = text.get_window_extent()
                x, y = (box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2
                (left, upper), (right, lower) = next(
                    s for s in spaces if s[0][0] <= x <= s[1][0] and s[1][1] <= y <= s[0][1]
                )
                assert left <= box.x0 <= box.x1 <= right
                assert lower - 0.5 <= box.y0 <= box.y1 <= upper + 0.5  # a comma's tail


@pytest.mark.parametrize("size", SIZES)
def test_the_strip_counts_the_gpus_that_work(size):
    for (_, axes), config, events, faded in waves(size):
        wave = [event for event in events if event.op.kind not in (faded, "U")]
        (strip,) = collections(axes, "at work")
        steps = boxes(strip)
        times = sorted({t for event in wave for t in (event.start, event.end)})
        for start, end in itertools.pairwise(times):
            middle = (start + end) / 2
            if end - start < 1e-9 * times[-1]:
                continue  # rounding
            counted = sum(event.start < middle < event.end for event in wave)
            drawn = [height for left, right, _, height in steps if left < middle < right]
            assert drawn == [counted]
        dark = [bool(fill[0] < 0.5) for fill in strip.get_facecolor()]
        assert dark == [height == config["num_stages"] for *_, height in steps]
        if size == "default":
            texts = {t.get_position()[0]: t.get_text() for t in axes.texts}
            numbers = {(x + end) / 2: f"{height:.0f}" for x, end, _, height in steps}
            assert texts == numbers


def storages(weights):
    return {w.untyped_storage().data_ptr() for w in weights.values()}


@pytest.mark.parametrize("size", SIZES)
def test_lifetimes_are_those_of_the_tensors_that_the_trainer_holds(size):
    """Counted: the storages that its versions and its stash refer to."""
    config, schedule, events = run_of(size)
    held = {}  # op -> versions in memory on its stage, after it

    def watch(op, worker):
        stash = [weights for _, _, weights in worker.in_flight.values()]
        kept = set().union(*map(storages, [*worker.versions.values(), *stash]))
        held[op] = len(kept) / len(worker.versions[max(worker.versions)])

    small = {"hidden_size": 4, "layers_per_stage": 1, "device": "cpu"}
    train({**config, **small}, watch=watch)
    ended, lives = {event.op: event.end for event in events}, lifetimes(events)
    checked = 0
    for stage, row in enumerate(schedule):
        mine = [life for (number, _), life in lives.items() if number == stage]
        for op, following in itertools.pairwise(row):
            if ended[following] > ended[op]:
                middle = (ended[op] + ended[following]) / 2
                assert sum(start < middle < end for start, _, end in mine) == held[op]
                stashed = sum(newer < middle < end for _, newer, end in mine)
                assert stashed == held[op] - 1  # exactly one is the newest
                checked += 1
    assert checked


@pytest.mark.parametrize("size", SIZES)
def test_the_drawn_versions_are_their_lifetimes(size):
    for axes, _, settings, _, schedule, events in panels(size):
        over = max(event.end for event in events)
        lives = [(d, v, *life) for (d, v), life in lifetimes(events).items()]
        bars = [[b for c in collections(axes, name) for b in boxes(c)] for name in VERSIONS]
        newest, stashed = ([(x, end, int(top)) for x, end, top, _ in each] for each in bars)
        assert newest == [(start, min(newer, over), d) for d, _, start, newer, _ in lives]
        old = [(d, v, newer, end) for d, v, _, newer, end in lives if end > newer]
        assert stashed == [(newer, end, d) for d, _, newer, end in old]
        (filled,) = collections(axes, VERSIONS[0])
        for fill, (_, version, *_) in zip(filled.get_facecolor(), lives, strict=True):
            assert tuple(fill[:3]) == pytest.approx(colors(Op(0, "B", 0, version), versions=1)[0])
        assert all((hollow.get_facecolor() == 1).all() for hollow in collections(axes, VERSIONS[1]))
        for a, b in itertools.combinations(bars[0] + bars[1], 2):  # none lies on another
            assert a[1] <= b[0] or b[1] <= a[0] or a[3] <= b[2] or b[3] <= a[2]
        assert all(bottom <= int(top) + 1 for _, _, top, bottom in bars[0] + bars[1])
        texts = {text for text in words(axes.texts) if "kept until" in text}
        backwards = [[op for op in schedule[d] if op[1::2] == ("B", v)] for d, v, *_ in old]
        readers = {f"v{ops[-1].version}, kept until B{ops[-1].microbatch}" for ops in backwards}
        assert {text.removesuffix(" has read it") for text in texts} <= readers
        assert texts or size != "default" or settings is not KEPT


@pytest.mark.parametrize("size", SIZES)
def test_updates_and_backwards_that_read_other_weights_are_marked(size):
    for axes, _, settings, config, _, events in panels(size):
        since, until = axes.get_xlim()
        read = {e.op[:3]: e.op.version for e in events}
        wrong = [
            (e.device, e.start, e.end)
            for e in events
            if e.op.kind == "B" and since < e.end and e.start < until
            if read[e.op.stage, "F", e.op.microbatch] != e.op.version
        ]
        inset = 2 * (until - since) / axes.bbox.width
        crosses = collections(axes, "reads other weights than its forward did")
        drawn = [(int(top), x - inset, end + inset) for c in crosses for x, end, top, _ in boxes(c)]
        wide = sorted(place for place in wrong if place[2] - place[1] > 7 * inset)
        assert np.array(sorted(drawn)) == pytest.approx(np.array(wide))
        assert bool(wrong) == (settings is LOST or not config["weight_stashing"])
        (marks,) = collections(axes, "updates")
        drawn = [(line[0][0], int(line[0][1])) for line in marks.get_segments()]
        updates = [(e.end, e.device) for e in events if e.op.kind == "U"]
        assert sorted(drawn) == sorted((end, d) for end, d in updates if since <= end <= until)


@pytest.mark.parametrize("size", ["default", "2 x 2", "1 microbatch", "vertical sync", "flush"])
def test_beside_a_lane_stands_the_peak_of_its_versions(size):
    for axes, gpus, settings, _, schedule, _ in panels(size):
        peaks = []
        for row in schedule[: len(gpus)]:
            alive, made = [], 0
            for number, op in enumerate(row, start=1):
                made += op.kind == "U"
                later = {other.version for other in row[number:] if other.version <= made}
                alive.append(len(later | {made}))
            peaks.append(f"max {max(alive)}")
        beside = [text for text in axes.texts if "max" in text.get_text()]
        assert [int(text.get_position()[1]) for text in beside] == [*gpus]
        assert words(beside) == peaks or settings is LOST


@pytest.mark.parametrize("size", ["default", "2 x 2", "uneven", "1 microbatch", "1 of all"])
def test_the_names_in_and_beside_the_lanes_are_theirs(size):
    for figure in list(figures(size).values())[:4]:
        for axes in figure.axes:
            if collections(axes, "ops"):
                names, places = words(axes.get_yticklabels()), axes.get_yticks()
                assert names == [f"GPU{int(place)}" for place in places]
                assert [int(place) for place in places] == list(range(len(names)))
                idle, *_ = axes.collections  # below the ops, in the colour of the legend
                assert [box[:2] for box in boxes(idle)] == [axes.get_xlim()] * len(names)
                assert tuple(idle.get_facecolor()[0]) == IDLE.get_facecolor() != (1, 1, 1, 1)
    axes, *_, events = next(panels(size))
    texts = {(t.get_position()[0], int(t.get_position()[1]), t.get_text()) for t in axes.texts}
    first, edge = axes.get_xlim()
    for (device, version), (start, newer, _) in lifetimes(events).items():
        if first < newer <= edge and (newer - start) * 20 > edge:
            assert ((max(start, first) + newer) / 2, device, f"v{version}") in texts


@pytest.mark.parametrize("size", SIZES)
def test_the_triangles_of_the_bubble_are_named_where_they_are_widest(size):
    _, *both = waves(size)
    for (axes, _), config, events, faded in both:
        what = "forwards" if faded == "B" else "backwards"
        wave = [e for e in events if e.op.kind not in (faded, "U")]
        begin, over = min(e.start for e in wave), max(e.end for e in wave)
        rows = [[e for e in wave if e.device == gpu] for gpu in range(config["num_stages"])]
        before = [(begin, min(e.start for e in row)) for row in rows]
        after = [(max(e.end for e in row), over) for row in rows]
        for gaps, text in ((before, f"fills:\nno {what} yet"), (after, f"drains:\nno {what} left")):
            drawn = [t.get_position() for t in axes.texts if t.get_text() == f"the wave {text}"]
            longest = max(end - start for start, end in gaps)
            pixels_wide = longest * axes.bbox.width / axes.get_xlim()[1]
            assert len(drawn) == 1 or pixels_wide <= 175  # then there may be too little room
            for x, y in drawn:
                start, end = gaps[int(y)]
                assert end - start == pytest.approx(longest)
                assert x == pytest.approx((start + end) / 2)


def test_the_legend_looks_like_what_it_names():
    figure = figures("default")["weight_versioning"]
    names = words(figure.legends[0].get_texts())
    patches = dict(zip(names, figure.legends[0].legend_handles, strict=True))
    for number, name in ((0, VERSIONS[0]), (0, VERSIONS[1]), (1, "reads other weights")):
        name = next(entry for entry in names if entry.startswith(name))
        (drawn,) = collections(figure.axes[number], name)
        assert patches[name].get_hatch() == drawn.get_hatch()
        assert patches[name].get_facecolor() == pytest.approx(tuple(drawn.get_facecolor()[0]))


# ------------------------------------------------------------------------- what the titles say


def title(figure):
    return figure.texts[0].get_text()


def said(figure):
    return " ".join(words(figure.texts))


@pytest.mark.parametrize("size", ["default", "2 x 2", "8 x 16", "nine", "1 microbatch", "M < S"])
def test_the_figures_in_the_titles_are_those_of_the_closed_forms(size):
    config = {**CONFIG, **SIZES[size]}
    stages, count, batches = (config[f"num_{key}"] for key in ("stages", "microbatches", "batches"))
    flush = count / (count + stages - 1)
    stream = count * batches / (count * batches + stages - 1)
    naive, forward, backward, versions, compared = map(said, figures(size).values())
    assert f"1 of {stages} GPUs at work, {1 / stages:.1%} utilization" in naive
    assert f"takes {2 * count * stages} time units; {1 - 1 / stages:.1%}" in naive
    assert f"{flush:.1%} of the GPU time" in forward
    assert f"{2 * (count + stages - 1)} time units at {flush:.1%}" in backward
    if count >= stages:
        first, last, turn = stages - 1, count, count + stages - 1
        assert f"{stages} GPUs at work from t{first} to t{last}" in forward
        assert f"from t{turn + first} to t{turn + last}" in backward
    else:
        assert f"{count} of {stages} GPUs" in forward
    assert "PipeDream's GPU0 with weight stashing" in versions
    assert f"GPU utilization: {1 / stages:.1%} → {flush:.1%} → {stream:.1%}" in compared


@pytest.mark.parametrize(
    ("size", "runs", "parts"),
    [
        ("default", (1, 4, 20), (1 / 4, 4 / 7, 20 / 23)),
        ("nine", (1, 9, 27), (0.25, 0.75, 0.9)),  # the round figures of the guide
    ],
)
def test_the_marks_lie_on_the_formula_and_the_bars_are_the_marks(size, runs, parts):
    figure = figures(size)["utilization_comparison"]
    bars_axes, curve = figure.axes
    heights = [patch.get_height() for patch in bars_axes.patches]
    idle = [1 - part for part in parts]
    assert heights == pytest.approx([*itertools.chain(*zip(parts, idle, strict=True))])
    line = curve.lines[0]
    assert line.get_ydata() == pytest.approx(line.get_xdata() / (line.get_xdata() + 3))
    marks = [line.get_xydata()[0] for line in curve.lines if line.get_marker() != "None"]
    assert np.ravel(marks) == pytest.approx([*itertools.chain(*zip(runs, parts, strict=True))])
    said = [text for part in parts for text in (f"{part:.1%}", f"idle {1 - part:.1%}")]
    assert words(bars_axes.texts) == said
    assert title(figure) == "GPU utilization: " + " → ".join(said[::2])
    captions = [caption.split("\n")[0] for caption in words(bars_axes.get_xticklabels())]
    assert captions == ["naive", "1F1B", "PipeDream"]
    names = [re.split(r"  |: ", entry)[:3] for entry in words(curve.get_legend().get_texts())[1:]]
    assert names == [*map(list, zip((f"K = {n}" for n in runs), said[::2], captions, strict=True))]
    assert len(figure.texts) == 3  # equal stages: nothing differs from the formula


def test_runs_of_the_same_length_share_a_mark():
    for size, number in (("1 of all", 1), ("1 microbatch", 2), ("1 batch", 2)):
        _, curve = figures(size)["utilization_comparison"].axes
        assert sum(line.get_marker() != "None" for line in curve.lines) == number
        (named,) = [text for text in words(curve.get_legend().get_texts()) if "\n" in text]
        assert "1F1B" in named


@pytest.mark.parametrize("microbatches", [2, 4])
def test_unequal_stages_may_lie_above_the_formula_or_below(microbatches):
    times = {"forward_time": [5, 2], "backward_time": [5, 3]}
    config = {**CONFIG, "num_stages": 2, "num_microbatches": microbatches, **times}
    figure = PICTURES["utilization_comparison"](config)
    marks = [line.get_xydata()[0] for line in figure.axes[1].lines if line.get_marker() != "None"]
    gaps = [100 * (part - n / (n + 1)) for n, part in marks]
    assert (max(gaps) > 8) == (microbatches == 2)  # 15 + 5 * (M - 1) units of 10 * M + 5 * M
    found = re.search(r"by ([-+][\d.]+) to ([-+][\d.]+) points", figure.texts[3].get_text())
    assert found.groups() == (f"{min(gaps):+.1f}", f"{round(max(gaps), 1) + 0:+.1f}")


def test_the_example_of_the_fourth_picture_is_true():
    figure = figures("default")["weight_versioning"]
    found = re.search(
        r"On GPU(\d+), F(\d+) read v(\d+), v(\d+) came at t(\d+), and B(\d+) still reads v(\d+).*"
        r"v(\d+) is kept until t(\d+)",
        said(figure),
    )
    gpu, forward, read, newer, made, backward, again, kept, until = map(int, found.groups())
    audit = Audit(CONFIG)
    train({**CONFIG, "device": "cpu"}, watch=audit)  # what the tensors say
    assert forward == backward
    assert audit.read[gpu, "F", forward] == read == again == kept
    assert audit.read[gpu, "B", forward] == read
    _, _, events = run_of("default")
    at = {str(e.op): e for e in events if e.device == gpu}
    assert newer == read + 1
    assert at[f"{gpu}F{forward}"].start < made <= at[f"{gpu}B{forward}"].start
    assert made in [e.end for e in events if e.op[:2] == (gpu, "U") and e.op.version == read]
    assert until == max(e.end for e in events if e.op.stage == gpu and e.op.version == kept)


# ------------------------------------------------------------------------------------ the look

PLURAL_OF_ONE = r"(?<![\d.,])1 (GPUs|batches|microbatches|backwards)"


@pytest.mark.parametrize("size", SIZES)
def test_every_text_lies_on_the_sheet_the_legend_beside_the_data_and_one_is_singular(size):
    for name, figure in figures(size).items():
        assert figure.bbox.width < 4000
        assert figure.bbox.height < 4000
        lanes = [axes.get_window_extent() for axes in figure.axes]
        texts = [*figure.texts, *(t for axes in figure.axes for t in axes.texts)]
        for axes in figure.axes:
            for axis, ends in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
                ticks = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
                texts += [label for place, label in ticks if min(ends) <= place <= max(ends)]
        for text in texts:
            box = text.get_window_extent()
            if text.get_text() and text.get_visible():
                assert 0 <= box.x0 <= box.x1 <= figure.bbox.width, (name, text)
                assert 0 <= box.y0 <= box.y1 <= figure.bbox.height, (name, text)
        legends = figure.legends + [axes.get_legend() for axes in figure.axes if axes.get_legend()]
        assert len(legends) == 1
        entries = words(legends[0].get_texts())
        assert not re.search(PLURAL_OF_ONE, " | ".join([said(figure), *entries]))
        box = legends[0].get_window_extent()
        assert box.x1 <= figure.bbox.width
        assert not any(box.overlaps(lane) for lane in lanes), name
        heads = [text.get_window_extent() for text in figure.texts]
        for a, b in itertools.combinations(heads, 2):
            assert not a.overlaps(b), (name, a, b)
        assert not any(head.overlaps(lane) for head in heads for lane in lanes), name


def test_the_legends_list_what_is_drawn_and_nothing_else():
    def entries(size, name):
        return " | ".join(words(figures(size)[name].legends[0].get_texts()))

    assert "backward of" not in entries("default", "microbatch_forward")
    assert "forward of" not in entries("default", "microbatch_backward")
    assert "all GPUs" in entries("default", "microbatch_forward")
    assert "all GPUs" not in entries("M < S", "microbatch_forward")
    for size in ("default", "no stashing", "flush"):
        assert "(stashed)" in entries(size, "weight_versioning")
        assert "other weights" in entries(size, "weight_versioning")
    assert "forward on v0, v1, v2" in entries("default", "weight_versioning")
    assert "forward on v0 |" in entries("1 batch", "weight_versioning")
    assert "(stashed)" not in entries("1 batch", "weight_versioning")
    assert "other weights" not in entries("1 batch", "weight_versioning")
    assert "activations" not in entries("1 of all", "naive_pipeline")
    assert "idle" not in entries("1 of all", "naive_pipeline")
    assert "idle" in entries("default", "naive_pipeline")


def linear(color):
    c = np.array(to_rgb(color))
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def contrast(*pair):
    """As in WCAG 2."""
    dark, light = sorted(linear(color) @ [0.2126, 0.7152, 0.0722] for color in pair)
    return (light + 0.05) / (dark + 0.05)


def test_labels_can_be_read_and_neighbours_told_apart_by_colour_blind_eyes():
    """Colour vision deficiency after Machado et al. 2009, table 1."""
    for m, of in itertools.product(range(len(HUES)), (0, 1)):
        forward, backward = (colors(Op(0, kind, m, m), of) for kind in "FB")
        assert min(contrast(*forward), contrast(*backward)) >= 4.5  # for text
        assert contrast(forward[0], backward[0]) >= 3  # dark and light, without any hue

    def lab(rgb):
        xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
        x, y, z = np.cbrt(xyz @ rgb / [0.9505, 1, 1.089])
        return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])

    eyes = {
        "protan": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
        "deutan": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    }
    for matrix in eyes.values():
        for hues in (HUES, VERSION_HUES):
            seen = [lab(np.clip(np.array(matrix) @ linear(hue), 0, 1)) for hue in hues]
            for a, b in itertools.combinations(seen, 2):
                assert np.linalg.norm(a - b) > 10  # 1 is a difference that one just sees


# ----------------------------------------------------------------------------- how it is saved


PNGS = sorted(f"{name}.png" for name in PICTURES)
SMALL = ["--num_stages", "2", "--num_batches", "2"]


def files_in(folder):
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


def test_without_a_display_five_pictures_come_into_the_folder(tmp_path, run):
    env = {"PYTHONIOENCODING": "ascii", "MPLBACKEND": "nonsense", "PYTHONWARNINGS": "error"}
    flags = "--num_stages", 2, "--out", "a/b"
    status, out, err = run("pipedream_visual.py", *flags, process=True, env=env)
    assert (status, err) == (0, "")
    assert sorted(os.listdir(tmp_path / "a" / "b")) == PNGS
    assert out.splitlines()[::2] == [f"a/b/{name}.png" for name in PICTURES]
    assert "GPU utilization: 50.0% -> 80.0% -> 95.2%" in out
    for name in PICTURES:
        with Image.open(tmp_path / "a" / "b" / f"{name}.png") as image:
            assert image.text["Title"].replace("→", "->") in out


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_stopped_by_a_signal_nothing_is_left_and_nothing_changed(tmp_path, run, monkeypatch, name):
    number = getattr(signal, name)

    def stopped(config):
        signal.raise_signal(number)

    (tmp_path / PNGS[0]).write_text("old")
    monkeypatch.setitem(PICTURES, "utilization_comparison", stopped)  # the last one
    status, out, err = run("pipedream_visual.py", *SMALL)
    assert (status, out, err) == (128 + number, "", "pipedream_visual.py: stopped\n")
    assert files_in(tmp_path) == {PNGS[0]: "old"}


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_nohup_is_respected(tmp_path, run, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    draw = PICTURES["naive_pipeline"]

    def hung_up(config):
        signal.raise_signal(signal.SIGHUP)
        return draw(config)

    monkeypatch.setitem(PICTURES, "naive_pipeline", hung_up)
    try:
        assert run("pipedream_visual.py", *SMALL).status == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    "bad", [["--num_stages", 0], ["--animate=1"], ["--out", "file"], ["--out", "file/x"]]
)
def test_a_bad_flag_or_folder_gets_one_line_and_nothing_is_written(tmp_path, run, bad):
    (tmp_path / "file").write_text("mine")
    status, out, err = run("pipedream_visual.py", "--out", "new", *SMALL, *bad)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert ("--out" in bad) == err.endswith(f"{bad[1]} is not a folder\n") if len(bad) > 1 else True
    assert (os.listdir(tmp_path), files_in(tmp_path)) == (["file"], {"file": "mine"})


@pytest.mark.parametrize("name", ["folder", "input", "link to the input", "file on a full disk"])
def test_if_one_file_cannot_be_written_all_stay_as_they_were(tmp_path, name):
    def write(path):
        path.write_text("half")
        if "full disk" in path.name:
            raise OSError(28, "No space left on device")

    for old in ("first", "input", "file on a full disk"):
        (tmp_path / old).write_text(f"old {old}")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link to the input").symlink_to("input")
    before = files_in(tmp_path)
    with pytest.raises(UserError, match=name):
        save({tmp_path / "first": write, tmp_path / name: write}, read=[tmp_path / "input"])
    assert files_in(tmp_path) == before


# ------------------------------------------------------------------------ the committed pictures


def pixels(axes, image, points):
    """The colours of an image at points of axes, the image having any resolution."""
    figure = axes.figure
    xy = axes.transData.transform(points) / (figure.bbox.width, figure.bbox.height)
    array = np.asarray(image.convert("RGB"), dtype=float) / 255
    height, width, _ = array.shape
    return [array[round((1 - y) * height - 0.5), round(x * width - 0.5)] for x, y in xy]


def near_corner(axes):
    """For every op and version, a point in its bar where no label reaches, and its fill.

    Not for the ops that are crossed: there the point may lie on a line.
    """
    first, last = axes.get_xlim()
    crosses = collections(axes, "reads other weights than its forward did")
    crossed = {(int(top), round(x)) for found in crosses for x, _, top, _ in boxes(found)}
    for bars in collections(axes, "ops") + collections(axes, VERSIONS[0]):
        fills = itertools.cycle(bars.get_facecolor()[:, :3])
        for (start, end, top, bottom), fill in zip(boxes(bars), fills, strict=False):
            if first <= start and end <= last and (int(top), round(start)) not in crossed:
                yield (start + 0.13 * (end - start), top + 0.8 * (bottom - top)), fill


@pytest.mark.parametrize("name", PICTURES)
def test_the_committed_picture_shows_the_default_run(name):
    figure = figures("default")[name]
    with Image.open(ROOT / "images" / f"{name}.png") as image:
        assert image.size == tuple(round(x) for x in figure.bbox.size)
        assert f"{image.text['Title']} {image.text['Description']}" == said(figure)
        for axes in figure.axes:
            if collections(axes, "ops"):
                points, fills = zip(*near_corner(axes), strict=True)
                found = pixels(axes, image, points)
                assert np.abs(np.array(found) - np.array(fills)).max() < 0.02
        if name == "utilization_comparison":
            tops = [p.get_height() for p in figure.axes[0].patches[::2]]
            places = [(x - 0.3, y) for x, top in enumerate(tops) for y in (0.02, top - 0.01)]
            busy = np.array(pixels(figure.axes[0], image, places))
            assert np.abs(busy - to_rgb(HUES[0])).max() < 0.02
            above = [(x - 0.3, top + 0.01) for x, top in enumerate(tops)]
            assert np.min(pixels(figure.axes[0], image, above)) > 0.9


def movie_of(**settings):
    """The players of a movie: config, rows and events of GPipe and PipeDream; and the movie."""
    config = {**CONFIG, **settings}
    with house_style():
        movie = make_movie(config)
    runs = [run_of("default", **settings, schedule=name) for name in ("gpipe", "pipedream")]
    return runs, movie


def test_the_committed_animation_plays_gpipe_above_pipedream_slot_by_slot():
    path = ROOT / "images" / "pipeline.gif"
    assert path.stat().st_size < 1_000_000
    _, (figure, frames, _) = movie_of()
    assert list(frames) == list(range(1, 31))
    assert [time for time, length in frames.items() if length == 4000] == [1, 14, 16, 30]
    assert {length for time, length in frames.items() if time not in (1, 14, 16, 30)} == {800}
    with Image.open(path) as movie:
        assert movie.n_frames == len(frames)
        for time in (1, 7, 15, 22, 30):
            movie.seek(time - 1)
            assert movie.info["duration"] == frames[time]
            for axes in figure.axes:
                shown, fills = [], []
                for point, fill in near_corner(axes):
                    if abs(point[0] - time) < 0.2:
                        continue  # under the cursor
                    shown.append(point)
                    fills.append(fill if point[0] < time else to_rgb("white"))
                found = np.array(pixels(axes, movie, shown))
                assert np.abs(found - np.array(fills)).max() < 0.08  # one palette of 128 colours


def test_the_stops_of_the_animation_say_what_has_happened():
    runs, (figure, frames, show) = movie_of()
    told = {}
    for time in frames:
        show(time)
        told[time] = figure.texts[1].get_text()
    assert {time for time, text in told.items() if ":" in text} == {1, 14, 16, 30}
    assert all(text.startswith(f"t{time:g}") for time, text in told.items())
    assert told[1].endswith("GPU0 has finished F0. Only now can GPU1 start.")
    idle = []
    for _, _, events in runs:  # counted slot by slot: all ops last one unit here
        busy = {(e.device, t) for e in events for t in range(14) if e.start <= t < e.end}
        idle.append(f"{1 - len(busy) / (4 * 14):.1%}")
    assert told[14].endswith(f"updates. Idle so far: GPipe {idle[0]}, PipeDream {idle[1]}.")
    expected = "PipeDream's GPU0 has v1 by now, and keeps v0: B4 reads v0, as F4 did."
    assert told[16].endswith(expected)
    ends = [[e.end for e in events if e.op.kind == "U" and e.device == 0] for *_, events in runs]
    done = [sum(end <= 30 for end in each) for each in ends]  # GPU0 is the last to update
    assert told[30].endswith(f"GPipe has done {done[0]} batches, PipeDream {done[1]}.")
    _, (figure, frames, show) = movie_of(weight_stashing=False)
    show(16)
    assert figure.texts[1].get_text() == "t16: GPU0: F4 read v0, B4 reads v1, a wrong gradient."


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_batches": 2, "comm_time": 0.1},
        {"num_batches": 2, "forward_time": 0.1, "backward_time": 0.3},
        {"num_microbatches": 1, "num_batches": 5},  # four versions at once
    ],
)
def test_every_frame_says_what_is_done_used_and_held_at_its_time(settings):
    runs, (figure, frames, show) = movie_of(**settings)
    assert 5 < len(frames) <= 35
    for time in frames:
        show(time)
        both = zip(words(figure.texts[2:]), figure.axes, runs, strict=True)
        for heading, axes, (config, schedule, events) in both:
            mine = [[e.op for e in events if e.device == d and e.end <= time] for d in range(4)]
            updates = [sum(op.kind == "U" for op in ops) for ops in mine]
            assert f": {min(updates)} of {config['num_batches']} batches" in heading
            over = min(time, max(e.end for e in events))
            fine = np.linspace(0, over, 4001)[:-1] + over / 8000
            busy = [(e.start < fine) & (fine < e.end) for e in events if e.op.kind != "U"]
            told = float(re.search(r"GPUs ([\d.]+)% busy so far", heading)[1])
            assert told == pytest.approx(100 * np.sum(busy) / (4 * 4000), abs=0.2)
            held = [text for text in words(axes.texts) if text.startswith("v")]
            for device, ops in enumerate(mine):
                later = [op.version for op in schedule[device] if op not in ops]
                alive = sorted({v for v in later if v <= updates[device]} | {updates[device]})
                names = [f"v{version}" for version in alive]
                many = f"{names[0]}-{names[-1]}"
                assert held[device] == (many if len(names) > 2 else " ".join(names))


@pytest.mark.parametrize("sizes", [{"num_stages": 2, "num_batches": 1}, {"num_microbatches": 2}])
def test_no_frame_shows_what_comes_later(sizes):
    """Right of the cursor the lanes are white up to the values beside them."""
    _, (figure, frames, show) = movie_of(**sizes)
    canvas = FigureCanvasAgg(figure)
    for time in list(frames)[:-1][::5]:
        show(time)
        canvas.draw()
        array = np.array(canvas.buffer_rgba())[..., :3]
        for axes in figure.axes:
            lanes = axes.get_window_extent()
            rows = slice(round(array.shape[0] - lanes.y1), round(array.shape[0] - lanes.y0))
            cursor = axes.transData.transform((time, 0))[0]
            assert (array[rows, round(cursor + 6) : round(lanes.x1 + 9)] == 255).all()
            assert (array[rows, round(cursor) - 2 : round(cursor) + 2] < 100).any()


def test_a_movie_can_be_written_and_quiet_only_names_the_file(tmp_path, run, monkeypatch):
    monkeypatch.setattr(pipedream_visual, "PICTURES", {})
    flags = "--animate", "--num_microbatches", 1, "--verbose", "False"
    assert run("pipedream_visual.py", *SMALL, *flags) == (0, "pipeline.gif\n", "")
    with Image.open(tmp_path / "pipeline.gif") as movie:
        shown = []
        for frame in range(movie.n_frames):
            movie.seek(frame)
            shown.append(movie.info["duration"])
        # GPU0 starts; GPipe updates; B1 reads what F1 did, and all is done
        assert shown == [4000, 800, 800, 4000, 800, 4000]
    assert os.listdir(tmp_path) == ["pipeline.gif"]
