"""The pictures show the simulated run: bars, labels, titles, strips; and how they are saved."""

import fcntl
import itertools
import os
import re
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path
from time import sleep

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

import pipedream_visual
from pipedream_simple import (
    CONFIG,
    Audit,
    Op,
    UserError,
    build_schedule,
    peak_in_flight,
    run_main,
    simulate,
    tick,
    train,
)
from pipedream_visual import (
    HUES,
    PICTURES,
    colors,
    house_style,
    lifetimes,
    main,
    make_movie,
    save,
    stale_reads,
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
    "1 batch": {"num_batches": 1, "forward_time": 1e-9, "backward_time": 3e-9},
    "M < S": {"num_stages": 6, "num_microbatches": 2},
    "uneven": {"num_stages": 3, "forward_time": [1, 2, 0.5], "backward_time": 2, "comm_time": 0.25},
    "no stashing": {"num_microbatches": 1, "num_batches": 8, "weight_stashing": False},
    "vertical sync": {"num_microbatches": 2, "vertical_sync": True},
    "flush": {"schedule": "gpipe", "forward_time": 5e11, "backward_time": 1e12},
}


@pytest.fixture(scope="module")
def figures():
    """figures(size) -> {name: figure}, drawn once."""
    drawn = {}

    def get(size):
        if size not in drawn:
            config = {**CONFIG, **SIZES[size]}
            with house_style():
                drawn[size] = {name: draw(config) for name, draw in PICTURES.items()}
                for figure in drawn[size].values():
                    figure.draw_without_rendering()  # places texts, legends and ticks
        return drawn[size]

    return get


def collections(axes, name):
    return [c for c in axes.collections if name in (c.get_gid(), c.get_label())]


def boxes(collection):
    """(start, end, y of its upper edge, y of its lower edge) of every bar."""
    corners = [path.vertices for path in collection.get_paths()]
    return [
        (*(float(x) for x in (v[:, 0].min(), v[:, 0].max())), v[:, 1].min(), v[:, 1].max())
        for v in corners
    ]


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
    events = simulate(schedule, config)
    return config, schedule, [e._replace(start=tick(e.start), end=tick(e.end)) for e in events]


# ----------------------------------------------------------------------------- what is drawn


@pytest.mark.parametrize("size", SIZES)
def test_the_bars_of_a_batch_are_the_simulated_events_each_in_its_colour(figures, size):
    for name, schedule, faded in (
        ("naive_pipeline", "naive", ""),
        ("microbatch_forward", "gpipe", "B"),
        ("microbatch_backward", "gpipe", "F"),
    ):
        _, _, events = run_of(size, schedule=schedule, num_batches=1)
        drawn, expected = bars(figures(size)[name].axes[0]), expected_bars(events)
        assert set(drawn) == set(expected)
        for place, op in expected.items():
            fill = to_rgb("white") if op.kind == faded else colors(op)[0]
            assert drawn[place] == pytest.approx(fill)


@pytest.mark.parametrize("size", SIZES)
def test_the_bars_of_the_versions_picture_are_both_runs_up_to_one_time(figures, size):
    axes = figures(size)["weight_versioning"].axes
    assert axes[0].get_xlim() == axes[1].get_xlim()
    until = axes[0].get_xlim()[1]
    other = "pipedream" if SIZES[size].get("schedule") == "gpipe" else "1f1b"
    for place, settings in zip(
        axes, ({}, {"schedule": other, "weight_stashing": True}), strict=True
    ):
        config, _, events = run_of(size, **settings)
        expected = expected_bars(event for event in events if event.start < until)
        drawn = bars(place)
        assert set(drawn) == set(expected)
        for where, op in expected.items():
            assert drawn[where] == pytest.approx(colors(op)[0])
        if settings == {}:  # up to there batches are done, enough that stashed weights come and go
            enough = 2 + -(-config["num_stages"] // config["num_microbatches"])
            updates = [e for e in events if e.op.kind == "U" and e.op.version < enough]
            assert until == max(e.end for e in updates)


def test_the_default_waves_stand_where_the_closed_form_puts_them(figures):
    stages, count = 4, 4
    forward = {(s, s + m, s + m + 1) for s in range(stages) for m in range(count)}
    turn = stages + count - 1
    backward = {
        (s, turn + stages - 1 - s + m, turn + stages - s + m)
        for s in range(stages)
        for m in range(count)
    }
    for name, dark in (("microbatch_forward", forward), ("microbatch_backward", backward)):
        drawn = bars(figures("default")[name].axes[0])
        assert set(drawn) == forward | backward
        assert {place for place, fill in drawn.items() if fill != (1, 1, 1)} == dark


def labels_in(axes, gid):
    """{text in the middle of a bar: the bar}, for the bars of a collection."""
    texts = {
        (round(t.get_position()[0], 6), int(t.get_position()[1])): t.get_text()
        for t in axes.texts
        if t.get_text()[0] in "FB"
    }
    (ops,) = collections(axes, gid)
    found = {}
    edge = axes.get_xlim()[1]
    for start, end, top, _ in boxes(ops):
        found[int(top), start, end] = texts.get((round((start + min(end, edge)) / 2, 6), int(top)))
    return found


@pytest.mark.parametrize(
    "size", ["default", "2 x 2", "8 x 16", "M < S", "no stashing", "flush", "uneven"]
)
def test_every_bar_is_labelled_with_its_op_and_in_the_fourth_picture_with_its_version(
    figures, size
):
    _, _, events = run_of(size, schedule="naive", num_batches=1)
    found = labels_in(figures(size)["naive_pipeline"].axes[0], "ops")
    if size == "8 x 16":  # 256 slots: labels give way
        assert set(found.values()) == {None}
    else:
        assert found == {p: f"{op.kind}{op.microbatch}" for p, op in expected_bars(events).items()}
    axes = figures(size)["weight_versioning"].axes[0]
    _, _, events = run_of(size)
    expected = expected_bars(event for event in events if event.start < axes.get_xlim()[1])
    found = labels_in(axes, "ops")
    for place, op in expected.items():
        label = f"{op.kind}{op.microbatch}\nv{op.version}"
        assert found[place] == label or (place[2] > axes.get_xlim()[1] and found[place] is None)


@pytest.mark.parametrize("size", SIZES)
def test_no_label_is_wider_or_higher_than_its_bar(figures, size):
    for figure in figures(size).values():
        for axes in figure.axes:
            for ops in collections(axes, "ops"):
                spaces = [
                    axes.transData.transform([[x, top], [end, bottom]])
                    for x, end, top, bottom in boxes(ops)
                ]
                for text in axes.texts:
                    if re.match(r"[FB]\d+(\nv\d+)?$", text.get_text()):
                        box = text.get_window_extent()
                        x, y = (box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2
                        (left, upper), (right, lower) = next(
                            s for s in spaces if s[0][0] <= x <= s[1][0] and s[1][1] <= y <= s[0][1]
                        )
                        assert left <= box.x0 <= box.x1 <= right
                        assert lower <= box.y0 <= box.y1 <= upper


@pytest.mark.parametrize("size", SIZES)
def test_the_strip_counts_the_gpus_that_work(figures, size):
    for name, schedule, kinds in (
        ("naive_pipeline", "naive", "FB"),
        ("microbatch_forward", "gpipe", "F"),
        ("microbatch_backward", "gpipe", "B"),
    ):
        config, _, events = run_of(size, schedule=schedule, num_batches=1)
        wave = [event for event in events if event.op.kind in kinds]
        (strip,) = collections(figures(size)[name].axes[1], "at work")
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
    ended = {event.op: event.end for event in events}
    checked = 0
    for row, lives in zip(schedule, lifetimes(schedule, events), strict=True):
        for op, following in itertools.pairwise(row):
            if ended[following] > ended[op]:
                middle = (ended[op] + ended[following]) / 2
                versions = sum(life.start < middle < life.end for life in lives)
                assert versions == held[op]
                stashed = sum(life.superseded < middle < life.end for life in lives)
                assert stashed == versions - 1  # exactly one is the newest
                checked += 1
    assert checked


@pytest.mark.parametrize("size", SIZES)
def test_the_drawn_versions_are_their_lifetimes(figures, size):
    for axes, settings in zip(
        figures(size)["weight_versioning"].axes,
        ({}, {"schedule": "pipedream" if size == "flush" else "1f1b", "weight_stashing": True}),
        strict=True,
    ):
        _, schedule, events = run_of(size, **settings)
        over = max(event.end for event in events)
        lives = [(d, life) for d, of in enumerate(lifetimes(schedule, events)) for life in of]
        newest, stashed = (
            [
                (x, end, int(top))
                for bars in collections(axes, name)
                for x, end, top, _ in boxes(bars)
            ]
            for name in ("newest version", "old version, kept (stashed)")
        )
        assert newest == [(life.start, min(life.superseded, over), d) for d, life in lives]
        old = [(d, life) for d, life in lives if life.end > life.superseded]
        assert stashed == [(life.superseded, life.end, d) for d, life in old]
        names = "newest version", "old version, kept (stashed)"
        drawn = [b for name in names for bars in collections(axes, name) for b in boxes(bars)]
        for a, b in itertools.combinations(drawn, 2):  # versions never lie on one another
            apart = a[1] <= b[0] or b[1] <= a[0] or a[3] <= b[2] or b[3] <= a[2]
            assert apart


def test_the_outlined_ops_read_an_old_version_and_the_crossed_ones_the_wrong_one(figures):
    stashed = figures("default")["weight_versioning"].axes[0]
    _, schedule, events = run_of("default")
    (outlined,) = collections(stashed, "reads a stashed version")
    update = {(e.op.stage, e.op.version): e.end for e in events if e.op.kind == "U"}
    until = stashed.get_xlim()[1]
    old = {
        (e.device, e.start)
        for e in events
        if e.op.kind in "FB" and e.start < until and update[e.op.stage, e.op.version] <= e.start
    }
    assert {(int(top), round(x)) for x, _, top, _ in boxes(outlined)} == old
    assert not collections(stashed, "reads other weights than its forward did")
    assert {op.version for op in stale_reads(schedule)} == {0, 1, 2, 3}

    unstashed = figures("no stashing")["weight_versioning"].axes[0]
    _, _, events = run_of("no stashing")
    (crossed,) = collections(unstashed, "reads other weights than its forward did")
    read = {(e.op.stage, e.op.kind, e.op.microbatch): e.op.version for e in events}
    wrong = {
        (e.device, e.start)
        for e in events
        if e.op.kind == "B"
        and e.start < unstashed.get_xlim()[1]
        and read[e.op.stage, "F", e.op.microbatch] != e.op.version
    }
    assert {(int(top), round(x)) for x, _, top, _ in boxes(crossed)} == wrong
    assert not collections(unstashed, "reads a stashed version")


@pytest.mark.parametrize("size", ["default", "2 x 2", "uneven", "1 microbatch", "1 of all"])
def test_the_names_in_and_beside_the_lanes_are_theirs(figures, size):
    for figure in list(figures(size).values())[:4]:
        for axes in figure.axes:
            if collections(axes, "ops"):
                names = [label.get_text() for label in axes.get_yticklabels()]
                assert names == [f"GPU{d}" for d in range(len(names))]
                assert [int(place) for place in axes.get_yticks()] == list(range(len(names)))
    axes = figures(size)["weight_versioning"].axes[0]
    _, schedule, events = run_of(size)
    texts = {(t.get_position()[0], int(t.get_position()[1])): t.get_text() for t in axes.texts}
    edge = axes.get_xlim()[1]
    for device, lives in enumerate(lifetimes(schedule, events)):
        for version, life in enumerate(lives):
            if life.superseded <= edge and (life.superseded - life.start) * 20 > edge:
                assert texts[(life.start + life.superseded) / 2, device] == f"v{version}"


@pytest.mark.parametrize("size", ["default", "2 x 2", "uneven", "1 microbatch", "M < S"])
def test_triangles_stand_where_results_leave_for_the_next_gpu(figures, size):
    for name, schedule, kinds in (
        ("naive_pipeline", "naive", "FB"),
        ("microbatch_forward", "gpipe", "F"),
        ("microbatch_backward", "gpipe", "B"),
    ):
        config, _, events = run_of(size, schedule=schedule, num_batches=1)
        last = config["num_stages"] - 1
        expected = {
            "v": {(e.end, e.device + 1) for e in events if e.op.kind == "F" and e.device < last},
            "^": {(e.end, e.device) for e in events if e.op.kind == "B" and e.device > 0},
        }
        lines = figures(size)[name].axes[0].lines
        drawn = {line.get_marker(): {*zip(*line.get_data(), strict=True)} for line in lines}
        assert drawn == {
            marker: places
            for marker, places in expected.items()
            if {"v": "F", "^": "B"}[marker] in kinds
        }


def test_the_numbers_on_the_strip_are_its_heights(figures):
    for name in ("microbatch_forward", "microbatch_backward"):
        strip = figures("default")[name].axes[1]
        steps = boxes(collections(strip, "at work")[0])
        texts = {t.get_position()[0]: t.get_text() for t in strip.texts}
        assert texts == {(x + end) / 2: f"{height:.0f}" for x, end, _, height in steps}


@pytest.mark.parametrize("size", ["default", "uneven", "1 microbatch", "flush"])
def test_marks_and_strips_of_the_versions_picture_are_the_rows(figures, size):
    figure = figures(size)["weight_versioning"]
    _, schedule, events = run_of(size)
    axes = figure.axes[0]
    until = axes.get_xlim()[1]
    (marks,) = collections(axes, "updates")
    drawn = sorted((line[0][0], int(line[0][1])) for line in marks.get_segments())
    expected = [(e.end, e.device) for e in events if e.op.kind == "U" and e.end <= until]
    assert drawn == sorted(expected)
    other = run_of(size, schedule="pipedream" if size == "flush" else "1f1b")[1]
    most = max(max(peak_in_flight(rows)) for rows in (schedule, other))
    strips = collections(axes, "microbatches in flight")
    for device, strip in enumerate(strips):
        path = strip.get_paths()[0]
        mine = [e for e in events if e.device == device and e.op.kind in "FB"]
        times = sorted({0, *(e.end for e in mine)})
        for start, end in itertools.pairwise(times):
            middle = (start + end) / 2
            held = sum({"F": 1, "B": -1}[e.op.kind] for e in mine if e.end < middle)
            inside = path.contains_point((middle, device + 0.97 - 0.17 * (held - 0.5) / most))
            assert inside == (held > 0)
            assert not path.contains_point((middle, device + 0.97 - 0.17 * (held + 0.5) / most))
    assert len(strips) == len(schedule)
    assert {t.get_text() for t in axes.texts} >= {f"max {n}" for n in peak_in_flight(schedule)}


def test_the_example_is_bracketed_from_its_forward_to_its_backward(figures):
    axes = figures("default")["weight_versioning"].axes[0]
    _, _, events = run_of("default")
    middle = {str(e.op): (e.start + e.end) / 2 for e in events if e.device == 0}
    lines = {line.get_gid(): line.get_xydata().tolist() for line in axes.lines}
    text = next(t for t in axes.texts if "did" in t.get_text())
    forward, backward = re.findall(r"[FB]\d+", text.get_text())[::-1]
    ends = [lines["example"][0][0], lines["example"][-1][0]]
    assert ends == [middle[f"0{forward}"], middle[f"0{backward}"]]
    assert lines["arrow"] == [lines["example"][-1]]
    assert all(-0.2 < y < 0.1 for _, y in lines["example"])  # over the lane of GPU0


def test_the_legend_looks_like_what_it_names(figures):
    legend = figures("default")["weight_versioning"].legends[0]
    axes = figures("default")["weight_versioning"].axes[0]
    names = [text.get_text() for text in legend.get_texts()]
    patches = dict(zip(names, legend.legend_handles, strict=True))
    for name in ("newest version", "old version, kept (stashed)", "reads a stashed version"):
        (drawn,) = collections(axes, name)
        assert patches[name].get_hatch() == drawn.get_hatch()
        assert patches[name].get_facecolor() == pytest.approx(
            tuple(drawn.get_facecolor()[0]) if len(drawn.get_facecolor()) else (0, 0, 0, 0)
        )


def test_uneven_stages_have_the_sentences_of_their_own_run(figures):
    _, _, events = run_of("uneven", schedule="gpipe", num_batches=1)
    wave = [e for e in events if e.op.kind == "F"]
    work = sum(e.end - e.start for e in wave)
    span = max(e.end for e in wave) - min(e.start for e in wave)
    text = said(figures("uneven")["microbatch_forward"])
    assert f"uses {work / (3 * span):.1%} of the GPU time" in text
    whole = sum(e.end - e.start for e in events) / (3 * max(e.end for e in events))
    assert f"at {whole:.1%} utilization" in said(figures("uneven")["microbatch_backward"])


def test_a_flush_draws_one_version_and_nothing_stashed(figures):
    axes = figures("default")["weight_versioning"].axes[1]
    assert not collections(axes, "old version, kept (stashed)")
    beside = [t for t in axes.texts if "max" in t.get_text()]
    beside.sort(key=lambda text: text.get_position()[1])  # from the top: versions, in flight
    assert [text.get_text() for text in beside][::2] == ["max 1"] * 4
    assert [text.get_text() for text in beside][1::2] == ["max 4", "max 3", "max 2", "max 1"]


# ------------------------------------------------------------------------- what the titles say


def title(figure):
    return figure.texts[0].get_text()


def said(figure):
    return " ".join(text.get_text() for text in figure.texts)


@pytest.mark.parametrize(
    "size", ["default", "2 x 2", "8 x 16", "nine", "1 microbatch", "M < S", "vertical sync"]
)
def test_the_figures_in_the_titles_are_those_of_the_closed_forms(figures, size):
    config, drawn = {**CONFIG, **SIZES[size]}, figures(size)
    stages, count = config["num_stages"], config["num_microbatches"]
    batches = config["num_batches"]
    flush = count / (count + stages - 1)
    stream = count * batches / (count * batches + stages - 1)
    assert f"1 of {stages} GPUs at work, {1 / stages:.1%} utilization" in title(
        drawn["naive_pipeline"]
    )
    assert f"takes {2 * count * stages} time units; {1 - 1 / stages:.1%}" in said(
        drawn["naive_pipeline"]
    )
    assert f"{flush:.1%} of the GPU time" in said(drawn["microbatch_forward"])
    assert f"{2 * (count + stages - 1)} time units at {flush:.1%}" in said(
        drawn["microbatch_backward"]
    )
    if count >= stages:
        first, last = stages - 1, count
        assert f"{stages} GPUs at work from t{first} to t{last}" in title(
            drawn["microbatch_forward"]
        )
        turn = count + stages - 1
        assert f"from t{turn + first} to t{turn + last}" in title(drawn["microbatch_backward"])
    else:
        assert f"{count} of {stages} GPUs" in title(drawn["microbatch_forward"])
    versions = said(drawn["weight_versioning"])
    assert f"in {2 * (count * batches + stages - 1)} time units, {stream:.1%}" in versions
    assert f"in {2 * batches * (count + stages - 1)} time units, {flush:.1%}" in versions
    expected = f"GPU utilization: {1 / stages:.1%} → {flush:.1%} → {stream:.1%}"
    assert title(drawn["utilization_comparison"]) == expected


def legend_of(figure):
    return [text.get_text() for text in figure.axes[1].get_legend().get_texts()]


def test_nine_microbatches_and_three_batches_show_the_round_figures(figures):
    figure = figures("nine")["utilization_comparison"]
    assert title(figure) == "GPU utilization: 25.0% → 75.0% → 90.0%"
    places = [entry.split("  ")[0] for entry in legend_of(figure)[1:]]
    assert places == ["n = 1: 25.0%", "n = 9: 75.0%", "n = 27: 90.0%"]
    assert [entry.count("\n") for entry in legend_of(figure)[1:]] == [0, 1, 1]  # two names each


def test_the_marks_lie_on_the_formula_and_the_bars_are_the_marks(figures):
    bars_axes, curve = figures("default")["utilization_comparison"].axes
    heights = [patch.get_height() for patch in bars_axes.patches[:3]]
    assert heights == pytest.approx([1 / 4, 4 / 7, 20 / 23])
    assert [p.get_height() for p in bars_axes.patches[3:]] == pytest.approx([3 / 4, 3 / 7, 3 / 23])
    line = curve.lines[0]
    assert line.get_ydata() == pytest.approx(line.get_xdata() / (line.get_xdata() + 3))
    marks = {
        line.get_xdata()[0]: line.get_ydata()[0]
        for line in curve.lines
        if line.get_marker() != "None"
    }
    assert marks == pytest.approx({1: 1 / 4, 4: 4 / 7, 9: 3 / 4, 20: 20 / 23, 27: 9 / 10})
    assert [t.get_text() for t in bars_axes.texts] == [
        text for part in (1 / 4, 4 / 7, 20 / 23) for text in (f"{part:.1%}", f"idle {1 - part:.1%}")
    ]
    captions = [label.get_text().split("\n")[0] for label in bars_axes.get_xticklabels()]
    assert captions == ["naive", "1F1B", "PipeDream"]
    names = [re.split(r"  |: ", entry)[:3] for entry in legend_of(curve.figure)[1:]]
    assert [n for n, *_ in names] == ["n = 1", "n = 4", "n = 9", "n = 20", "n = 27"]
    assert [part for _, part, _ in names] == ["25.0%", "57.1%", "75.0%", "87.0%", "90.0%"]
    assert [names[i][2] for i in (0, 1, 3)] == captions
    assert len(curve.figure.texts) == 3  # equal stages: nothing differs from the formula


@pytest.mark.parametrize("microbatches", [2, 4])
def test_unequal_stages_may_lie_above_the_formula_or_below(microbatches):
    times = {"forward_time": [5, 2], "backward_time": [5, 3]}
    config = {**CONFIG, "num_stages": 2, "num_microbatches": microbatches, **times}
    figure = PICTURES["utilization_comparison"](config)
    gaps = []
    for line in figure.axes[1].lines:
        if line.get_marker() != "None":
            (n,), (part,) = line.get_data()
            gaps.append(100 * (part - n / (n + 1)))
    assert (max(gaps) > 8) == (microbatches == 2)  # 15 + 5 * (M - 1) units of 10 * M + 5 * M
    found = re.search(r"by ([-+][\d.]+) to ([-+][\d.]+) points", figure.texts[3].get_text())
    assert found.groups() == (f"{min(gaps):+.1f}", f"{round(max(gaps), 1) + 0:+.1f}")


def test_one_gpu_one_batch_one_microbatch_are_singular(figures):
    plural = re.compile(r"(?<![\d.,])1 (GPUs|batches|microbatches|backwards)")
    for size in ("1 of all", "1 batch", "1 microbatch"):
        for figure in figures(size).values():
            legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes)]
            texts = [text for legend in legends if legend for text in legend.get_texts()]
            for text in [*figure.texts, *texts]:
                assert not plural.search(text.get_text())
    with house_style():
        movie, _, show = make_movie({**CONFIG, **SIZES["1 of all"]})
    show(2)
    assert not plural.search(said(movie))


def test_the_example_of_the_fourth_picture_is_true(figures):
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
    (bracket,) = [t.get_text() for t in figure.axes[0].texts if "did" in t.get_text()]
    assert bracket == f"B{backward} reads v{read}, as F{forward} did"


# ------------------------------------------------------------------------------------ the look


@pytest.mark.parametrize("size", SIZES)
def test_every_text_lies_on_the_sheet_and_the_legend_beside_the_data(figures, size):
    for name, figure in figures(size).items():
        assert figure.bbox.width < 4000
        assert figure.bbox.height < 4000
        lanes = [axes.get_window_extent() for axes in figure.axes]
        texts = [*figure.texts, *(t for axes in figure.axes for t in axes.texts)]
        for axes in figure.axes:
            for axis, (low, high) in (
                (axes.xaxis, sorted(axes.get_xlim())),
                (axes.yaxis, sorted(axes.get_ylim())),
            ):
                ticks = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
                texts += [label for place, label in ticks if low <= place <= high]
        for text in texts:
            box = text.get_window_extent()
            if text.get_text() and text.get_visible():
                assert box.x0 >= 0, (name, text)
                assert box.x1 <= figure.bbox.width, (name, text)
                assert box.y0 >= 0, (name, text)
                assert box.y1 <= figure.bbox.height, (name, text)
        legends = figure.legends + [axes.get_legend() for axes in figure.axes if axes.get_legend()]
        assert len(legends) == 1
        box = legends[0].get_window_extent()
        assert box.x1 <= figure.bbox.width
        assert not any(box.overlaps(lane) for lane in lanes), name
        heads = [text.get_window_extent() for text in figure.texts]
        for a, b in itertools.combinations(heads, 2):
            assert not a.overlaps(b), (name, a, b)
        assert not any(head.overlaps(lane) for head in heads for lane in lanes), name


def test_the_legends_list_what_is_drawn_and_nothing_else(figures):
    def entries(size, name):
        return " | ".join(t.get_text() for t in figures(size)[name].legends[0].get_texts())

    assert "backward of" not in entries("default", "microbatch_forward")
    assert "forward of" not in entries("default", "microbatch_backward")
    assert "all GPUs" in entries("default", "microbatch_forward")
    assert "all GPUs" not in entries("M < S", "microbatch_forward")
    assert "stashed version" in entries("default", "weight_versioning")
    assert "other weights" not in entries("default", "weight_versioning")
    assert "stashed version" not in entries("no stashing", "weight_versioning")
    assert "other weights" in entries("no stashing", "weight_versioning")
    assert "activations" not in entries("1 of all", "naive_pipeline")
    assert "idle" not in entries("1 of all", "naive_pipeline")
    assert "idle" in entries("default", "naive_pipeline")


def linear(color):
    c = np.array(to_rgb(color))
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def test_labels_can_be_read_and_neighbours_told_apart_by_colour_blind_eyes():
    """Contrast as in WCAG 2; colour vision deficiency after Machado et al. 2009, table 1."""

    def luminance(color):
        return float(linear(color) @ [0.2126, 0.7152, 0.0722])

    for m in range(len(HUES)):
        for kind in "FB":
            fill, ink = colors(Op(0, kind, m, 0))
            light, dark = sorted([luminance(fill), luminance(ink)], reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5  # for text
        forward, backward = (luminance(colors(Op(0, kind, m, 0))[0]) for kind in "FB")
        assert (backward + 0.05) / (forward + 0.05) >= 3  # dark and light, without any hue

    def lab(rgb):
        xyz = np.array(
            [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
        )
        x, y, z = np.cbrt(xyz @ rgb / [0.9505, 1, 1.089])
        return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])

    eyes = {
        "normal": np.eye(3),
        "protan": [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ],
        "deutan": [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ],
        "tritan": [
            [1.255528, -0.076749, -0.178779],
            [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.303900],
        ],
    }
    for matrix in eyes.values():
        seen = [lab(np.clip(np.array(matrix) @ linear(hue), 0, 1)) for hue in HUES]
        for a, b in zip(seen, [*seen[1:], seen[0]], strict=True):
            assert np.linalg.norm(a - b) > 20  # 1 is a difference that one just sees


def test_the_number_of_artists_does_not_grow_with_the_number_of_ops():
    def count(num_microbatches):
        sizes = {"num_microbatches": num_microbatches, "batch_size": num_microbatches}
        with house_style():
            figure = PICTURES["microbatch_forward"]({**CONFIG, **sizes})
        return len(figure.findobj()) - len(figure.axes[0].xaxis.get_ticklabels()) * 20

    assert count(256) <= count(128) + 100


# ----------------------------------------------------------------------------- how it is saved


@pytest.fixture
def program(monkeypatch, capsys):
    """Run the program in this process: program("--flag value") -> (status, stdout, stderr)."""

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["pipedream_visual.py", *map(str, flags)])
        status = run_main(main)
        return status, *capsys.readouterr()

    return run


PNGS = sorted(f"{name}.png" for name in PICTURES)
SMALL = ["--num_stages", "2", "--num_batches", "2"]


@pytest.fixture
def old_set(tmp_path):
    """Five old pictures, and a function that tells whether they are as they were."""
    for name in PNGS:
        (tmp_path / name).write_text(f"old {name}")

    def untouched():
        return {p.name: p.read_text() for p in tmp_path.iterdir()} == {n: f"old {n}" for n in PNGS}

    return untouched


def start(*flags, **options):
    command = [sys.executable, str(ROOT / "pipedream_visual.py"), *map(str, flags)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)


def test_without_a_display_and_without_a_warning_five_pictures_come_into_the_current_folder(
    tmp_path,
):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "MPLBACKEND": "nonsense"}
    environment["PYTHONWARNINGS"] = "error"
    environment.pop("DISPLAY", None)
    run = start("--num_stages", 2, cwd=tmp_path, env=environment, stdout=subprocess.PIPE)
    out, err = run.communicate(timeout=120)
    assert (run.returncode, err) == (0, "")
    assert sorted(os.listdir(tmp_path)) == PNGS
    assert out.splitlines()[::2] == [f"{name}.png" for name in PICTURES]
    assert "GPU utilization: 50.0% -> 80.0% -> 95.2%" in out
    for name in PICTURES:
        with Image.open(tmp_path / f"{name}.png") as image:
            image.load()
            assert image.text["Title"].replace("→", "->") in out


def test_a_reader_that_has_seen_enough_still_gets_all_files(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)  # as head does
    with start("--out", tmp_path / "new", *SMALL, stdout=writer) as run:
        os.close(writer)
        assert run.communicate(timeout=120)[1] == ""
    assert run.returncode == 0
    assert sorted(os.listdir(tmp_path / "new")) == PNGS


def test_stopped_by_sigterm_nothing_is_left_and_nothing_changed(tmp_path, old_set):
    with start("--animate", "--out", tmp_path) as run:
        while run.poll() is None and not [n for n in os.listdir(tmp_path) if "part" in n]:
            sleep(0.01)
        run.send_signal(signal.SIGTERM)
        err = run.communicate(timeout=60)[1]
    assert (run.returncode, err.count("\n")) == (130, 1)
    assert old_set()


def test_out_makes_the_folder_and_quiet_only_names_the_files(tmp_path, program):
    folder = tmp_path / "a" / "b"
    status, out, err = program("--out", folder, *SMALL, "--verbose", "False")
    assert (status, err) == (0, "")
    assert out.split() == [str(folder / f"{name}.png") for name in PICTURES]
    assert sorted(os.listdir(folder)) == PNGS


@pytest.mark.parametrize(
    "bad",
    [
        ["--num_stages", 0],
        ["--out"],
        ["--outt", "x"],
        ["--animate=1"],
        ["--comm_time", "1e12"],
        ["--backward_time", "1e-8"],
    ],
)
def test_bad_flags_get_one_line_and_make_no_folder(tmp_path, program, monkeypatch, bad):
    monkeypatch.chdir(tmp_path)
    status, out, err = program("--out", "new", *bad)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_made_or_written_gets_one_line(tmp_path, program):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("file", "file/x", "loop", "x" * 300):
        status, out, err = program("--out", tmp_path / name, *SMALL)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert str(tmp_path / name) in err
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["file", "loop"]


def make_folder(path):
    path.mkdir()


def make_loop(path):
    path.symlink_to(path.name)


@pytest.mark.parametrize("make", [make_folder, make_loop, os.mkfifo])
def test_a_last_target_that_is_no_regular_file_leaves_the_others_as_they_were(
    tmp_path, old_set, program, make
):
    last = tmp_path / list(PICTURES)[-1]
    last = last.with_suffix(".png")
    last.unlink()
    make(last)
    before = sorted(os.listdir(tmp_path))
    status, out, err = program("--out", tmp_path, *SMALL)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert str(last) in err
    assert sorted(os.listdir(tmp_path)) == before
    assert all((tmp_path / n).read_text() == f"old {n}" for n in PNGS if n != last.name)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(28, "No space left on device"), 2),
        (KeyboardInterrupt(), 130),
        (UserError("no such picture"), 2),
    ],
)
@pytest.mark.parametrize("folder", [".", "new/folder"])
def test_a_run_that_fails_late_leaves_all_old_pictures_and_no_folder(
    tmp_path, old_set, program, monkeypatch, error, expected, folder
):
    written = []

    def savefig(figure, path, **settings):
        Path(path).write_bytes(b"half")
        written.append(path)
        if len(written) == len(PICTURES):
            raise error

    monkeypatch.setattr(pipedream_visual.Figure, "savefig", savefig)
    status, out, err = program("--out", tmp_path / folder, *SMALL)
    assert (status, out, err.count("\n")) == (expected, "", 1)
    assert len(written) == len(PICTURES)
    assert old_set()


def writes(text):
    return lambda path: path.write_text(text)


def test_saving_keeps_modes_follows_links_and_makes_folders(tmp_path):
    plain, link, new = tmp_path / "plain", tmp_path / "link", tmp_path / "a" / "b" / "new"
    plain.write_text("old")
    plain.chmod(0o600)
    (tmp_path / "elsewhere").mkdir()
    link.symlink_to("elsewhere/target")  # which is not there yet
    save({plain: writes("1"), link: writes("2"), new: writes("3")})
    assert [path.read_text() for path in (plain, link, new)] == ["1", "2", "3"]
    assert stat.S_IMODE(plain.stat().st_mode) == 0o600
    assert link.is_symlink()
    assert (tmp_path / "elsewhere" / "target").read_text() == "2"
    assert sorted(os.listdir(tmp_path)) == ["a", "elsewhere", "link", "plain"]


@pytest.mark.parametrize("alias", ["same", "link", "hard link"])
def test_what_the_program_reads_is_never_replaced(tmp_path, alias):
    mine, target = tmp_path / "mine", tmp_path / alias
    mine.write_text("mine")
    if alias == "link":
        target.symlink_to(mine)
    elif alias == "hard link":
        target.hardlink_to(mine)
    else:
        target = mine
    with pytest.raises(UserError, match=target.name):
        save({tmp_path / "other": writes("1"), target: writes("2")}, read=[mine])
    assert mine.read_text() == target.read_text() == "mine"
    assert not (tmp_path / "other").exists()


def test_two_names_of_one_file_are_refused(tmp_path):
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(UserError):
        save({tmp_path / "a": writes("1"), tmp_path / "b": writes("2")})
    assert os.listdir(tmp_path) == ["b"]


def test_a_failing_unlink_does_not_hide_why_nothing_was_written(tmp_path, monkeypatch):
    def fails(path, **settings):
        raise OSError(30, "Read-only file system")

    def full(path):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "unlink", fails)
    with pytest.raises(UserError, match="No space left"):
        save({tmp_path / "a": full})


def test_two_runs_into_one_folder_do_not_mix_their_sets(tmp_path):
    """While another run renames its files (it has locked the folder), this one waits."""
    names = [tmp_path / name for name in "abc"]
    for path in names:
        path.write_text("old")
    other = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    drawn = threading.Event()

    def last(path):
        path.write_text("new")
        drawn.set()

    files = {names[0]: writes("new"), names[1]: writes("new"), names[2]: last}
    run = threading.Thread(target=save, args=(files,))
    run.start()
    assert drawn.wait(10)
    run.join(0.3)
    assert run.is_alive()
    assert [path.read_text() for path in names] == ["old"] * 3
    os.close(other)
    run.join(10)
    assert [path.read_text() for path in names] == ["new"] * 3
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "c"]


def test_importing_has_no_effect_and_own_settings_do_not_reach_the_pictures():
    import matplotlib

    with matplotlib.rc_context({"axes.facecolor": "black", "text.usetex": True}):
        with house_style():
            assert matplotlib.rcParams["axes.facecolor"] == "white"
            assert not matplotlib.rcParams["text.usetex"]
        assert matplotlib.rcParams["axes.facecolor"] == "black"


# ------------------------------------------------------------------------ the committed pictures


def pixels(axes, image, points):
    """The colours of an image at points of axes, the image having any resolution."""
    figure = axes.figure
    xy = axes.transData.transform(points) / (figure.bbox.width, figure.bbox.height)
    array = np.asarray(image.convert("RGB"), dtype=float) / 255
    height, width, _ = array.shape
    return [array[round((1 - y) * height - 0.5), round(x * width - 0.5)] for x, y in xy]


def near_corner(axes):
    """For every op and version, a point in its bar where no label reaches, and its fill."""
    drawn = [*collections(axes, "ops"), *collections(axes, "newest")]
    return [
        ((start + 0.13 * (end - start), top + 0.8 * (bottom - top)), fill[:3])
        for bars in drawn
        for (start, end, top, bottom), fill in zip(
            boxes(bars), itertools.cycle(bars.get_facecolor()), strict=False
        )
        if end <= axes.get_xlim()[1]
    ]


@pytest.mark.parametrize("name", PICTURES)
def test_the_committed_picture_shows_the_default_run(figures, name):
    figure = figures("default")[name]
    with Image.open(ROOT / "images" / f"{name}.png") as image:
        assert image.size == tuple(round(x) for x in figure.bbox.size)
        texts = [text.get_text() for text in figure.texts]
        assert [image.text["Title"], image.text["Description"]] == [texts[0], " ".join(texts[1:])]
        for axes in figure.axes:
            if collections(axes, "ops"):
                points, fills = zip(*near_corner(axes), strict=True)
                found = pixels(axes, image, points)
                assert np.abs(np.array(found) - np.array(fills)).max() < 0.02
        if name == "utilization_comparison":
            columns = [(x, part) for x in range(3) for part in (0.02, 0.98)]
            assert (np.array(pixels(figure.axes[0], image, columns))[::2] == to_rgb(HUES[0])).all()
            tops = [p.get_height() for p in figure.axes[0].patches[:3]]
            edges = [(x - 0.3, y + d) for x, y in enumerate(tops) for d in (-0.01, 0.01)]
            below_above = np.array(pixels(figure.axes[0], image, edges))
            assert np.abs(below_above[::2] - to_rgb(HUES[0])).max() < 0.02
            assert (below_above[1::2] > 0.9).all()


def test_the_committed_animation_plays_the_default_run_slot_by_slot():
    path = ROOT / "images" / "pipeline.gif"
    assert path.stat().st_size < 1_000_000
    with house_style():
        figure, times, _ = make_movie(CONFIG)
    axes = figure.axes[0]
    assert times == list(range(47))
    with Image.open(path) as movie:
        assert movie.n_frames == len(times)
        for time in (0, 7, 15, 22, 46):
            movie.seek(time)
            shown, fills = [], []
            for point, fill in near_corner(axes):
                if abs(point[0] - time) < 0.2:
                    continue  # under the cursor
                shown.append(point)
                fills.append(fill if point[0] < time else to_rgb("white"))
            found = np.array(pixels(axes, movie, shown))
            assert np.abs(found - np.array(fills)).max() < 0.08  # one palette of 128 colours


def test_the_animation_counts_the_versions_up():
    with house_style():
        figure, times, show = make_movie(CONFIG)
    versions = []
    for time in times:
        show(time)
        beside = [t for t in figure.axes[0].texts if t.get_position()[0] > 1]
        beside = [t for t in beside if t.get_transform() != figure.axes[0].transData]
        versions.append([t.get_text() for t in beside if "v" in t.get_text()])
    assert versions[0] == ["v0"] * 4
    assert versions[15] == ["v0 v1", "v0 v1", "v0 v1", "v1"]
    assert versions[-1] == ["v5"] * 4  # after the last update, on GPU0 in this moment
    assert "5 of 5 batches" in figure.texts[1].get_text()
    for time in (7, 22):
        show(time)
        assert figure.axes[0].lines[-1].get_xdata() == [time, time]  # the cursor
    assert figure.texts[1].get_text().startswith("t22: 2 of 5 batches")


@pytest.mark.parametrize(
    "settings",
    [
        {"num_batches": 2, "comm_time": 0.1},
        {"num_batches": 2, "forward_time": 0.1, "backward_time": 0.3},
        {"num_microbatches": 1, "num_batches": 5},  # four versions at once
    ],
)
def test_every_frame_says_what_is_done_and_held_at_its_time(settings):
    config = {**CONFIG, **settings}
    with house_style():
        figure, frames, show = make_movie(config)
    schedule = build_schedule(config)
    events = [e._replace(end=tick(e.end)) for e in simulate(schedule, config)]
    beside = figure.axes[0].texts[-16:]  # a name and a value for each strip of each GPU
    versions, in_flight = beside[1:8:2], beside[9:16:2]
    for time in frames:
        show(time)
        mine = [[e.op for e in events if e.device == d and e.end <= time] for d in range(4)]
        updates = [sum(op.kind == "U" for op in ops) for ops in mine]
        assert f": {min(updates)} of {config['num_batches']} batches" in figure.texts[1].get_text()
        for device, ops in enumerate(mine):
            kinds = [op.kind for op in ops]
            assert int(in_flight[device].get_text()) == kinds.count("F") - kinds.count("B")
            later = [op.version for op in schedule[device] if op not in ops]
            alive = {v for v in later if v <= updates[device]} | {updates[device]}
            text = versions[device].get_text()
            many = f"v{min(alive)}...v{max(alive)} ({len(alive)})"
            names = " ".join(f"v{v}" for v in sorted(alive))
            assert text == (many if len(alive) > 2 else names)


def test_no_frame_shows_what_comes_later():
    """Right of the cursor the lanes are white up to the values beside them; the last has a mark."""
    config = {**CONFIG, "num_stages": 2, "num_batches": 1}
    with house_style():
        figure, times, show = make_movie(config)
        axes = figure.axes[0]
        seen = {}
        for time in (times[0], times[-2], times[-1]):
            show(time)
            figure.canvas.draw()
            array = np.array(figure.canvas.buffer_rgba())[..., :3]
            lanes = axes.get_window_extent()
            rows = slice(round(array.shape[0] - lanes.y1), round(array.shape[0] - lanes.y0))
            left = axes.transData.transform((time, 0))[0] + 6
            right = lanes.x1 + 9  # marks are 5 pixels wide
            seen[time] = array[rows, round(left) : round(right)]
            edge = array[rows, round(lanes.x1) + 1]
            assert (edge < 100).any() == (time == times[-1])
    assert all((seen[time] == 255).all() for time in times[:1] + times[-2:-1])


def test_a_movie_that_is_interrupted_leaves_the_old_one(tmp_path, program, monkeypatch):
    def interrupted(config):
        figure, times, _ = make_movie(config)

        def show(time):
            raise KeyboardInterrupt

        return figure, times, show

    (tmp_path / "pipeline.gif").write_bytes(b"old")
    monkeypatch.setattr(pipedream_visual, "PICTURES", {})
    monkeypatch.setattr(pipedream_visual, "make_movie", interrupted)
    status, _, err = program("--animate", "--num_batches", 1, "--out", tmp_path)
    assert (status, err.count("\n")) == (130, 1)
    assert (tmp_path / "pipeline.gif").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["pipeline.gif"]


def test_a_movie_can_be_written(tmp_path, program, monkeypatch):
    monkeypatch.setattr(pipedream_visual, "PICTURES", {})
    flags = ["--num_stages", 2, "--num_microbatches", 1, "--num_batches", 2]
    status, out, err = program("--animate", "--out", tmp_path, *flags)
    assert (status, err) == (0, "")
    assert out.splitlines()[-2] == str(tmp_path / "pipeline.gif")
    with Image.open(tmp_path / "pipeline.gif") as movie:
        assert movie.format == "GIF"
        assert movie.n_frames == 7
        shown = []
        for frame in range(7):
            movie.seek(frame)
            shown.append(movie.info["duration"])
        assert shown == [250] * 6 + [3000]
    assert not [name for name in os.listdir(tmp_path) if "part" in name]
