"""The published figures come out, and a program that computes something else is found out."""

import itertools
import random
import re

import pytest

from pipedream.backstage.measures import held_up
from pipedream.commands import papers
from pipedream.commands.papers import SOURCES, bubble_rates, cost, plan_of
from pipedream.planning import search
from pipedream.published import TABLE_5
from pipedream.schedules.plans import PLAN_CONFIG, make_plan
from pipedream.schedules.rows import LIBRARY, dualpipe_v, interleaved, zb_h1


def test_figures_agree_and_the_report_has_one_line_for_each_in_80_columns(run):
    status, out, err = run("papers")
    assert (status, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    figures = [figure for source in SOURCES for figure in source()]
    for what, published, ours, must in figures:
        assert ours == published or not must, what
        numbers = rf"  {re.escape(published)} +{re.escape(ours)}  +(=|[-+][\d.]+%)$"
        assert re.search(numbers, out, re.M)
    lines = re.findall(r"  (=|[-+][\d.]+%)$", out, re.M)
    exact = sum(figure.exact for figure in figures)
    assert (len(lines), lines.count("=")) == (len(figures), exact)
    assert f"{len(figures)} figures: {exact} of the {exact} that must agree" in out
    for name in ("1F1B", "ZB-H1", "ZB-H2", "shortcut", "all"):
        rates = re.findall(rf"^{name} \S+B p=\d+ m=\d+ +(\.\d{{4}})  +(\.\d{{4}}) ", out, re.M)
        assert len(rates) == TABLE_5.count("\n")
        assert (name == "all") == any(published != ours for published, ours in rates)
    assert all(source.__doc__.partition("\n")[0] in out for source in SOURCES)  # where it is from


def changed(key, change):
    """Plans with another value of that key."""
    return papers, "make_plan", lambda config: make_plan({**config, key: change(config[key])})


def zb_h2_too_early(device, num_devices, num_microbatches):
    return zb_h1(device, num_devices, num_microbatches, times=1)


FEW = TABLE_5.partition("\n14.6B")[0]
LAPS = (interleaved, True), papers.several_stages
MUTANTS = {  # -> what is replaced, by what; whose lines then are wrong, and one of them
    "comm_time ignored": (*changed("comm_time", lambda time: 0), papers.table_5, "1F1B 1.5B"),
    "W longer": (*changed("weight_gradient_time", lambda w: 1.02 * w), papers.table_5, "ZB-H1 1"),
    "I = W": (*changed("weight_gradient_time", lambda w: 0), papers.table_5, "ZB-H2 6.2B"),
    "no sync": (*changed("vertical_sync", lambda on: False), papers.two_versions, "M=4"),
    "a figure mistyped": (papers, "TABLE_5", FEW.replace(".0559", ".0558"), papers.table_5, "6.2B"),
    "rows too early": (LIBRARY, "zb-h2", (zb_h2_too_early, True), papers.table_5, "ZB-H2 1.5B"),
    "no gain of pairs": (*changed("overlap_time", lambda part: 1), papers.in_pairs, "D=4 F=1"),
    "pairs shorter": (*changed("overlap_time", lambda x: 0.9 * x), papers.in_pairs, "GPU3, 15"),
    "another V": (LIBRARY, "zb-v", (dualpipe_v, True), papers.equal_times, "bubble of zb-v"),
    "not by breadth": (LIBRARY, "looped-bfs", *LAPS, "looped-bfs p=8"),
    "no halves": (LIBRARY, "interleaved-zb", *LAPS, "interleaved-zb p=4"),
    "all-reduce free": (
        *(search, "replicate", lambda seconds, w, m, b: (seconds / m[0], 0 * w)),
        *(papers.planner, "speed-up"),
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_what_computes_something_else_is_told_and_exits_with_1(name, monkeypatch, capsys):
    place, key, mutant, source, line = MUTANTS[name]
    monkeypatch.setattr(papers, "bubble_rates", bubble_rates.__wrapped__)  # simulate again
    monkeypatch.setattr(papers, "TABLE_5", FEW)
    monkeypatch.setattr(papers, "SOURCES", [source])
    (monkeypatch.setitem if isinstance(place, dict) else monkeypatch.setattr)(place, key, mutant)
    with pytest.raises(SystemExit) as done:
        papers.main({})
    assert done.value.code == 1
    wrong = [text for text in capsys.readouterr().out.splitlines() if "NOT EXACT" in text]
    assert any(line in text for text in wrong)


def test_the_bubble_of_zb_h2_is_the_papers_closed_form():
    """Section 2.3, with sending: (p - 1)(F + I - 2 W + 2 comm), on the times of Table 5."""
    for line in TABLE_5.splitlines()[1:]:
        _, p, m, _, *times = line.split()
        (p, m), (f, i, w, comm) = map(int, (p, m)), map(float, times[:4])
        plan = plan_of("zb-h2", p, m, f, i + w, w, comm)
        assert not held_up(plan.events, plan.links)  # by another message
        idle = cost(plan) - m * (f + i + w)
        assert idle == pytest.approx((p - 1) * (f + i - 2 * w + 2 * comm))
        free = cost(plan_of("zb-h1", p, m, f, i + w, w)) - m * (f + i + w)
        assert free == pytest.approx((p - 1) * (f + i - w))  # and ZB-H1's, with free links


def in_blocks(row):
    """Ops that start and end together: an F& and the B after it, or one op."""
    row = iter(row)
    for step in row:
        yield [step, next(row)] if step[1] == "F&" else [step]


def idle_by_hand(d, m, f, i, w, both):
    """Of dualpipe-v's GPUs, until all are done, and their pairs: the rows, and a loop."""
    lasts = {"F": f, "I": i, "W": w, "B": i + w}
    rows = [[*in_blocks(dualpipe_v(gpu, d, m))] for gpu in range(d)]
    places, free, busy, pairs = [0] * d, [0] * d, [0] * d, [0] * d
    ends = {}  # (stage, whether of a forward, microbatch) -> when
    while [*map(len, rows)] != places:
        for gpu, row in enumerate(rows):
            if places[gpu] == len(row):
                continue
            block, needed = row[places[gpu]], []
            for s, kind, k in block:
                if kind[0] == "F":
                    needed += [(s - 1, True, k)] * (s > 0)
                elif kind in "IB":
                    needed += [(s + 1, False, k) if s < 2 * d - 1 else (s, True, k)]
            if all(result in ends for result in needed):
                takes = both if len(block) == 2 else lasts[block[0][1]]
                free[gpu] = max([free[gpu], *(ends[result] for result in needed)]) + takes
                busy[gpu], pairs[gpu] = busy[gpu] + takes, pairs[gpu] + len(block) - 1
                ends |= {(s, kind[0] == "F", k): free[gpu] for s, kind, k in block if kind != "W"}
                places[gpu] += 1
    return [max(free) - time for time in busy], pairs


@pytest.mark.parametrize("d", [2, 3, 4, 8])
def test_the_more_pairs_a_gpu_of_dualpipe_v_overlaps_the_longer_it_is_idle(d):
    for m, both in itertools.product((2 * d, 2 * d + 1, 4 * d), (3, 2.5, 2)):
        idle, pairs = idle_by_hand(d, m, 1, 1, 1, both)
        assert pairs == [2 * (m - d) - (d - 1 - gpu) - (gpu == d - 1) for gpu in range(d)]
        most = (d - 1) * (both + 2 - 3)  # the published formula
        assert idle == pytest.approx([most - (3 - both) * (max(pairs) - n) for n in pairs])


def test_what_papers_says_of_dualpipe_v_is_what_a_loop_by_hand_finds():
    gpus = []
    for what, published, ours, exact in papers.in_pairs():
        if times := re.match(r"D=(\d+) F=(\S+) B=(\S+) W=(\S+) F&B=(\S+)", what):
            d, f, b, w, both = map(float, times.groups())
            idle, pairs = idle_by_hand(int(d), 3 * int(d), f, b - w, w, both)
            assert ours == f"{max(idle):g}"
            assert published == f"{(d - 1) * (both + b - 3 * w):g}"
            assert exact == (f == b - w)
        elif "pairs" in what:  # of the last line with times
            gpus.append((what, ours))
    by_hand = enumerate(zip(idle, pairs, strict=True))
    assert gpus == [(f"   GPU{gpu}, {n} pairs", f"{time:g}") for gpu, (time, n) in by_hand]


def test_for_which_times_dualpipes_formula_is_exact_too_high_or_too_low():
    chance = random.Random(0)
    for _ in range(200):
        d, f, w = chance.choice([2, 3, 4, 6]), 1, chance.uniform(0.2, 1)
        for i in (1, chance.uniform(0.2, 0.99), chance.uniform(1.01, 2)):
            both = chance.uniform(max(f, i + w), f + i + w)
            idle, _ = idle_by_hand(d, chance.randint(2 * d, 3 * d), f, i, w, both)
            off = round(max(idle) - (d - 1) * (both + i - 2 * w), 9)
            assert (off > 0) - (off < 0) == (f > i) - (f < i)
            assert idle[-2:] == pytest.approx([max(idle)] * 2)
            assert idle[0] == pytest.approx(min(idle))


def test_measured_figures_are_as_far_off_as_the_pages_say():
    """Or one of them is mistyped."""
    figures = [(figure.what.split()[0], figure.off) for figure in papers.table_4()]
    for name, least, most in (("ZB-1p", -0.005, 0.025), ("1F1B-I", 0.04, 0.085)):
        off = [off for what, off in figures if what == name]
        assert len(off) == TABLE_5.count("\n")
        assert least < min(off) < max(off) < most
    gpipe = [*papers.gpipe_throughput()]
    assert all(0.04 < figure.off < 0.08 for figure in gpipe)
    assert [figure.ours for figure in gpipe] == [f"{32 * k / (32 + k - 1):.2f}" for k in (2, 4, 8)]


def test_what_its_reader_set_in_config_does_not_matter(monkeypatch):
    before = [*papers.megatron(), *papers.two_versions()]
    mine = {"comm_time": 3, "num_batches": 2, "in_flight": 2, "recompute": True, "momentum": 0.9}
    monkeypatch.setattr(papers, "PLAN_CONFIG", {**PLAN_CONFIG, **mine})
    assert before == [*papers.megatron(), *papers.two_versions()]
