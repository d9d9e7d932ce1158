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


VERSIONS = "newest version", "old version, kept (stashed)"
KEPT, LOST = {"schedule": "pipedream"}, {"schedule": "pipedream", "vertical_sync": False}
KEPT, LOST = {**KEPT, "weight_stashing": True}, {**LOST, "weight_stashing": False}


def an_example(schedule):
    """The first backward with an update of its stage between its forward and it, if any."""
    for op in schedule[0]:
        row = [other[1:3] for other in schedule[0]]
        if op.kind == "B":
            between = schedule[0][row.index(("F", op.microbatch)) : row.index(("B", op.microbatch))]
            if any(other.kind == "U" for other in between):
                return op
    return None


def panels(figures, size):
    """Of the fourth picture: axes, settings of the run in them, its GPUs; the whole run last."""
    axes = list(figures(size)["weight_versioning"].axes)
    _, schedule, _ = run_of(size, **KEPT)
    gpus = range(SIZES[size].get("num_stages", 4))
    if an_example(schedule) is None:
        (only,) = axes
        return [(only, {}, gpus)]
    if SIZES[size].get("schedule") == "gpipe":
        axes = [*axes[1:], axes[0]]
    kept, lost, whole = axes
    return [(kept, KEPT, range(1)), (lost, LOST, range(1)), (whole, {}, gpus)]


@pytest.mark.parametrize("size", SIZES)
def test_the_bars_of_the_versions_picture_are_its_runs_in_the_colours_of_the_versions(
    figures, size
):
    for axes, settings, gpus in panels(figures, size):
        since, until = axes.get_xlim()
        config, _, events = run_of(size, **settings)
        near = [e for e in events if e.device in gpus and e.end > since and e.start < until]
        expected, drawn = expected_bars(near), bars(axes)
        assert set(drawn) == set(expected)
        for where, op in expected.items():
            fill, _ = colors(op._replace(microbatch=op.version))
            assert drawn[where] == pytest.approx(fill)
    assert since == 0  # the whole run; stashed weights come and go until then
    enough = 2 + -(-config["num_stages"] // config["num_microbatches"])
    assert until == max(e.end for e in events if e.op.kind == "U" and e.op.version < enough)


@pytest.mark.parametrize("size", SIZES)
def test_the_close_ups_show_one_moment_with_and_without_stashing(figures, size):
    if len(panels(figures, size)) == 1:
        assert "1 of all" in size or "1 batch" in size
        return
    (kept, *_), (lost, *_), _ = panels(figures, size)
    assert kept.get_xlim() == lost.get_xlim()
    for axes, settings in ((kept, KEPT), (lost, LOST)):
        _, schedule, events = run_of(size, **settings)
        backward = an_example(schedule)
        forward = next(op for op in schedule[0] if op[1:3] == ("F", backward.microbatch))
        middle = {e.op: (e.start + e.end) / 2 for e in events}
        lines = {line.get_gid(): line.get_xydata().tolist() for line in axes.lines}
        assert [lines["example"][0][0], lines["example"][-1][0]] == [
            middle[forward],
            middle[backward],
        ]
        assert lines["arrow"] == [lines["example"][-1]]
        assert all(-0.4 < y < 0.1 for _, y in lines["example"])  # over the lane of GPU0
        since, until = axes.get_xlim()
        assert since < middle[forward] < middle[backward] < until
        (said,) = [t.get_text() for t in axes.texts if "reads" in t.get_text()]
        m, old, new = backward.microbatch, forward.version, backward.version
        if settings is KEPT:
            assert old == new
            assert said == f"B{m} reads v{old}, as F{m} did"
        else:
            assert old < new
            assert said == f"F{m} read v{old}, B{m} reads v{new}: a wrong gradient"


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
    first, edge = axes.get_xlim()
    for start, end, top, _ in boxes(ops):
        middle = (max(start, first) + min(end, edge)) / 2
        found[int(top), start, end] = texts.get((round(middle, 6), int(top)))
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
    for axes, settings, gpus in panels(figures, size):
        since, until = axes.get_xlim()
        _, _, events = run_of(size, **settings)
        expected = expected_bars(e for e in events if e.device in gpus and since < e.end)
        found = labels_in(axes, "ops")
        for place, label in found.items():
            op = expected[place]
            inside = since <= place[1] < place[2] <= until
            assert label == f"{op.kind}{op.microbatch}\nv{op.version}" or not (inside or label)


@pytest.mark.parametrize("size", SIZES)
def test_no_label_is_wider_or_higher_than_its_bar(figures, size):
    for figure in figures(size).values():
        for axes in figure.axes:
            spaces = [
                axes.transData.transform([[x, top], [end, bottom]])
                for name in ("ops", *VERSIONS)
                for ops in collections(axes, name)
                for x, end, top, bottom in boxes(ops)
            ]
            if spaces:
                for text in axes.texts:
                    if re.match(r"[FB]\d+(\nv\d+)?$|v\d+$|v\d+, kept", text.get_text()):
                        box = text.get_window_extent()
                        x, y = (box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2
                        (left, upper), (right, lower) = next(
                            s for s in spaces if s[0][0] <= x <= s[1][0] and s[1][1] <= y <= s[0][1]
                        )
                        assert left <= box.x0 <= box.x1 <= right
                        assert lower - 0.5 <= box.y0 <= box.y1 <= upper + 0.5  # a comma's tail


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
    for axes, settings, gpus in panels(figures, size):
        _, schedule, events = run_of(size, **settings)
        over = max(event.end for event in events)
        lives = [
            (d, v, life) for d in gpus for v, life in enumerate(lifetimes(schedule, events)[d])
        ]
        newest, stashed = (
            [
                (x, end, int(top))
                for bars in collections(axes, name)
                for x, end, top, _ in boxes(bars)
            ]
            for name in VERSIONS
        )
        assert newest == [(life.start, min(life.superseded, over), d) for d, _, life in lives]
        old = [(d, v, life) for d, v, life in lives if life.end > life.superseded]
        assert stashed == [(life.superseded, life.end, d) for d, _, life in old]
        (filled,) = collections(axes, VERSIONS[0])
        for fill, (_, version, _) in zip(filled.get_facecolor(), lives, strict=True):
            assert tuple(fill[:3]) == pytest.approx(colors(Op(0, "B", version, 0))[0])
        drawn = [b for name in VERSIONS for bars in collections(axes, name) for b in boxes(bars)]
        for a, b in itertools.combinations(drawn, 2):  # versions never lie on one another
            apart = a[1] <= b[0] or b[1] <= a[0] or a[3] <= b[2] or b[3] <= a[2]
            assert apart
        assert all(bottom <= int(top) + 1 for _, _, top, bottom in drawn)
        texts = {t.get_text() for t in axes.texts if "kept" in t.get_text()}
        backwards = [[op for op in schedule[d] if op[1::2] == ("B", v)] for d, v, _ in old]
        readers = {f"v{ops[-1].version}, kept until B{ops[-1].microbatch}" for ops in backwards}
        if len(gpus) > 1:
            assert texts == set()
        else:
            assert {text.removesuffix(" has read it") for text in texts} <= readers
            assert texts or settings is not KEPT


@pytest.mark.parametrize("size", SIZES)
def test_the_crossed_backwards_are_those_that_read_other_weights_than_their_forward(figures, size):
    for axes, settings, gpus in panels(figures, size):
        since, until = axes.get_xlim()
        config, _, events = run_of(size, **settings)
        read = {(e.op.stage, e.op.kind, e.op.microbatch): e.op.version for e in events}
        wrong = {
            (e.device, e.start, e.end)
            for e in events
            if e.op.kind == "B" and e.device in gpus and since < e.end and e.start < until
            if read[e.op.stage, "F", e.op.microbatch] != e.op.version
        }
        crossed = collections(axes, "reads other weights than its forward did")
        inset = 2 * (until - since) / axes.bbox.width
        places = sorted(
            (int(top), x - inset, end + inset)
            for found in crossed
            for x, end, top, _ in boxes(found)
        )
        wide = sorted(place for place in wrong if place[2] - place[1] > 7 * inset)
        assert np.array(places) == pytest.approx(np.array(wide))
        assert bool(wrong) == (settings is LOST or not config["weight_stashing"])


@pytest.mark.parametrize("size", ["default", "2 x 2", "uneven", "1 microbatch", "1 of all"])
def test_the_names_in_and_beside_the_lanes_are_theirs(figures, size):
    for figure in list(figures(size).values())[:4]:
        for axes in figure.axes:
            if collections(axes, "ops"):
                names = [label.get_text() for label in axes.get_yticklabels()]
                assert names == [f"GPU{d}" for d in range(len(names))]
                assert [int(place) for place in axes.get_yticks()] == list(range(len(names)))
    axes, _, _ = panels(figures, size)[-1]
    _, schedule, events = run_of(size)
    texts = {(t.get_position()[0], int(t.get_position()[1]), t.get_text()) for t in axes.texts}
    edge = axes.get_xlim()[1]
    for device, lives in enumerate(lifetimes(schedule, events)):
        for version, life in enumerate(lives):
            if life.superseded <= edge and (life.superseded - life.start) * 20 > edge:
                assert ((life.start + life.superseded) / 2, device, f"v{version}") in texts


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


def waits(wave, device):
    """(before, after): how long this GPU waits for its first op of a wave, and after its last."""
    mine = [e for e in wave if e.device == device]
    begin, end = min(e.start for e in wave), max(e.end for e in wave)
    return min(e.start for e in mine) - begin, end - max(e.end for e in mine)


@pytest.mark.parametrize("size", SIZES)
def test_the_triangles_of_the_bubble_are_named_where_they_are_widest(figures, size):
    for name, kind in (("microbatch_forward", "F"), ("microbatch_backward", "B")):
        config, _, events = run_of(size, schedule="gpipe", num_batches=1)
        axes = figures(size)[name].axes[0]
        wave = [e for e in events if e.op.kind == kind]
        begin, end = min(e.start for e in wave), max(e.end for e in wave)
        idle = [waits(wave, device) for device in range(config["num_stages"])]
        what = {"F": "forwards", "B": "backwards"}[kind]
        words = f"the wave fills:\nno {what} yet", f"the wave drains:\nno {what} left"
        for side, text in enumerate(words):
            drawn = [t.get_position() for t in axes.texts if t.get_text() == text]
            longest = max(pair[side] for pair in idle)
            pixels_wide = longest * axes.bbox.width / axes.get_xlim()[1]
            assert len(drawn) == 1 or pixels_wide <= 175  # then there may be too little room
            for x, y in drawn:
                assert idle[int(y)][side] == pytest.approx(longest)
                middle = begin + longest / 2 if side == 0 else end - longest / 2
                assert x == pytest.approx(middle, rel=0.1)


@pytest.mark.parametrize("size", SIZES)
def test_updates_and_peaks_of_the_versions_picture_are_the_rows(figures, size):
    for axes, settings, gpus in panels(figures, size):
        since, until = axes.get_xlim()
        _, schedule, events = run_of(size, **settings)
        (marks,) = collections(axes, "updates")
        drawn = sorted((line[0][0], int(line[0][1])) for line in marks.get_segments())
        expected = [(e.end, e.device) for e in events if e.op.kind == "U" and e.device in gpus]
        assert drawn == sorted((end, d) for end, d in expected if since <= end <= until)
        peaks = {}
        for device in gpus:
            row, most, made = schedule[device], 0, 0
            for number, op in enumerate(row):
                made += op.kind == "U"
                later = {other.version for other in row[number + 1 :] if other.version <= made}
                most = max(most, len(later | {made}))
            peaks[device] = most
        beside = {
            int(t.get_position()[1]): t.get_text() for t in axes.texts if "max" in t.get_text()
        }
        if settings is not LOST and size in ("default", "2 x 2", "1 microbatch", "vertical sync"):
            assert beside == {device: f"max {peak}" for device, peak in peaks.items()}


def test_the_legend_looks_like_what_it_names(figures):
    figure = figures("default")["weight_versioning"]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    patches = dict(zip(names, figure.legends[0].legend_handles, strict=True))
    for number, name in ((0, VERSIONS[0]), (0, VERSIONS[1]), (1, "reads other weights")):
        name = next(entry for entry in names if entry.startswith(name))
        (drawn,) = collections(figure.axes[number], name)
        assert patches[name].get_hatch() == drawn.get_hatch()
        fills = drawn.get_facecolor()
        assert patches[name].get_facecolor() == pytest.approx(
            tuple(fills[0]) if len(fills) else (0, 0, 0, 0)
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
    axes = figures("flush")["weight_versioning"].axes[0]
    assert not collections(axes, VERSIONS[1])
    assert [t.get_text() for t in axes.texts if "max" in t.get_text()] == ["max 1"] * 4


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
    shown = min(batches, 2 + -(-stages // count))  # of PipeDream's stream
    until = 2 * (shown * count + stages - 1) if shown == batches else None
    alive = 1 + -(-(stages - 1) // count)  # the deepest stage, with its updates outstanding
    versions = said(drawn["weight_versioning"])
    if size != "M < S":  # there the run is too short for as many
        assert f": {shown} of {batches} batches done, at most {alive} weight versions" in versions
    assert until is None or f"{stages} GPUs until t{until}:" in versions
    expected = f"GPU utilization: {1 / stages:.1%} → {flush:.1%} → {stream:.1%}"
    assert title(drawn["utilization_comparison"]) == expected


def legend_of(figure):
    return [text.get_text() for text in figure.axes[1].get_legend().get_texts()]


def test_nine_microbatches_and_three_batches_show_the_round_figures(figures):
    figure = figures("nine")["utilization_comparison"]
    assert title(figure) == "GPU utilization: 25.0% → 75.0% → 90.0%"
    places = [entry.split("  ")[0] for entry in legend_of(figure)[1:]]
    assert places == ["n = 1: 25.0%", "n = 9: 75.0%", "n = 27: 90.0%"]


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
    assert marks == pytest.approx({1: 1 / 4, 4: 4 / 7, 20: 20 / 23})
    assert bars_axes.get_ylabel() == "GPU time"
    assert curve.get_ylabel() == "GPU utilization"
    assert "without a flush" in curve.get_xlabel()
    assert [t.get_text() for t in bars_axes.texts] == [
        text for part in (1 / 4, 4 / 7, 20 / 23) for text in (f"{part:.1%}", f"idle {1 - part:.1%}")
    ]
    captions = [label.get_text().split("\n")[0] for label in bars_axes.get_xticklabels()]
    assert captions == ["naive", "1F1B", "PipeDream"]
    names = [re.split(r"  |: ", entry)[:3] for entry in legend_of(curve.figure)[1:]]
    assert [n for n, *_ in names] == ["n = 1", "n = 4", "n = 20"]
    assert [part for _, part, _ in names] == ["25.0%", "57.1%", "87.0%"]
    assert [caption for *_, caption in names] == captions
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
    for size in ("default", "no stashing", "flush"):
        assert "(stashed)" in entries(size, "weight_versioning")
        assert "other weights" in entries(size, "weight_versioning")
    assert "forward on v0, v1, v2, ..." in entries("default", "weight_versioning")
    assert "forward on v0 |" in entries("1 batch", "weight_versioning")
    assert "(stashed)" not in entries("1 batch", "weight_versioning")
    assert "other weights" not in entries("1 batch", "weight_versioning")
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


@pytest.mark.parametrize("name", PICTURES)
def test_at_the_prompt_own_settings_do_not_reach_a_picture_either(name, tmp_path):
    import matplotlib

    own = {"font.size": 20, "lines.linewidth": 9, "savefig.facecolor": "black"}
    shown = []
    for settings in ({}, own):
        with matplotlib.rc_context(settings):
            picture = PICTURES[name](CONFIG)
            picture.savefig(tmp_path / "picture.png")
            shown += [picture._repr_png_(), (tmp_path / "picture.png").read_bytes()]
    assert len({*shown}) == 1


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
    return [
        ((start + 0.13 * (end - start), top + 0.8 * (bottom - top)), fill[:3])
        for name in ("ops", VERSIONS[0])
        for bars in collections(axes, name)
        for (start, end, top, bottom), fill in zip(
            boxes(bars), itertools.cycle(bars.get_facecolor()), strict=False
        )
        if first <= start and end <= last and (int(top), round(start)) not in crossed
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
    expected = f"updates. Idle so far: GPipe {idle[0]}, PipeDream {idle[1]}."
    assert told[14].endswith(expected)
    audit = Audit(CONFIG)
    train({**CONFIG, "device": "cpu"}, watch=audit)  # what the tensors say
    assert audit.read[0, "F", 4] == audit.read[0, "B", 4] == 0
    (_, _, events) = runs[1]
    assert next(e.end for e in events if str(e.op) == "0B4") == 16
    assert told[16].endswith(
        "PipeDream's GPU0 has v1 by now, and keeps v0: B4 reads v0, as F4 did."
    )
    done = [
        min(
            sum(e.op.kind == "U" and e.device == d and e.end <= 30 for e in events)
            for d in range(4)
        )
        for _, _, events in runs
    ]
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
        for heading, axes, (config, schedule, events) in zip(
            figure.texts[2:], figure.axes, runs, strict=True
        ):
            mine = [[e.op for e in events if e.device == d and e.end <= time] for d in range(4)]
            updates = [sum(op.kind == "U" for op in ops) for ops in mine]
            assert f": {min(updates)} of {config['num_batches']} batches" in heading.get_text()
            over = min(time, max(e.end for e in events))
            fine = np.linspace(0, over, 4001)[:-1] + over / 8000
            busy = [(e.start < fine) & (fine < e.end) for e in events if e.op.kind != "U"]
            used = np.sum(busy) / (4 * 4000)
            said_used = float(re.search(r"GPUs ([\d.]+)% busy so far", heading.get_text())[1])
            assert said_used == pytest.approx(100 * used, abs=0.2)
            held = [t.get_text() for t in axes.texts if t.get_text().startswith("v")]
            for device, ops in enumerate(mine):
                later = [op.version for op in schedule[device] if op not in ops]
                alive = {v for v in later if v <= updates[device]} | {updates[device]}
                names = " ".join(f"v{v}" for v in sorted(alive))
                many = f"v{min(alive)}-v{max(alive)}"
                assert held[device] == (many if len(alive) > 2 else names)


@pytest.mark.parametrize("sizes", [{"num_stages": 2, "num_batches": 1}, {"num_microbatches": 2}])
def test_no_frame_shows_what_comes_later(sizes):
    """Right of the cursor the lanes are white up to the values beside them."""
    _, (figure, frames, show) = movie_of(**sizes)
    for time in list(frames)[:-1][::5]:
        show(time)
        figure.canvas.draw()
        array = np.array(figure.canvas.buffer_rgba())[..., :3]
        for axes in figure.axes:
            lanes = axes.get_window_extent()
            rows = slice(round(array.shape[0] - lanes.y1), round(array.shape[0] - lanes.y0))
            left = axes.transData.transform((time, 0))[0] + 6
            assert (array[rows, round(left) : round(lanes.x1 + 9)] == 255).all()
            cursor = axes.transData.transform((time, 0))[0]
            assert (array[rows, round(cursor) - 2 : round(cursor) + 2] < 100).any()


def test_the_time_axis_reaches_to_gpipes_first_update():
    for times in ({"forward_time": [3, 1, 3, 1]}, {"forward_time": [1, 3, 1, 1]}):
        runs, (figure, frames, _) = movie_of(num_batches=1, **times)
        first = max(e.end for e in runs[0][2] if e.op.kind == "U")
        assert max(frames) == figure.axes[0].get_xlim()[1] == first


def test_a_long_run_has_few_frames():
    with house_style():
        _, frames, _ = make_movie({**CONFIG, "num_stages": 8, "num_microbatches": 32})
    assert 20 <= len(frames) <= 35


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
        shown = []
        for frame in range(movie.n_frames):
            movie.seek(frame)
            shown.append(movie.info["duration"])
        # GPU0 starts; GPipe updates; B1 reads what F1 did, and all is done
        assert shown == [4000, 800, 800, 4000, 800, 4000]
    assert not [name for name in os.listdir(tmp_path) if "part" in name]
