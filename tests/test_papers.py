"""The published figures come out, and a program that computes something else is found out."""

import re
import sys

import pytest

import pipedream_lab
import pipedream_papers
import pipedream_planner
from pipedream_papers import SOURCES, TABLE_5, bubble_rates, cost, main, run
from pipedream_simple import run_main


@pytest.fixture
def forget():
    """Simulate again, before the test and after it."""
    bubble_rates.cache_clear()
    yield
    bubble_rates.cache_clear()


@pytest.fixture
def lab(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["pipedream_lab.py", "papers", *arguments])
        return run_main(pipedream_lab.main), *capsys.readouterr()

    return run


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.__name__)
def test_every_figure_that_must_agree_does(source):
    figures = [*source()]
    assert figures
    for what, published, ours, exact in figures:
        assert not exact or ours == published, what


def test_the_report_has_one_line_per_figure_with_both_numbers_and_fits_80_columns(lab):
    status, out, err = lab()
    assert (status, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    figures = [figure for source in SOURCES for figure in source()]
    for _, published, ours, _ in figures:
        assert re.search(
            rf"  {re.escape(published)} +{re.escape(ours)}  +(=|[-+][\d.]+%)$", out, re.M
        )
    lines = [line for line in out.splitlines() if re.search(r"  (=|[-+][\d.]+%)$", line)]
    assert len(lines) == len(figures)
    exact = sum(figure.exact for figure in figures)
    assert sum(line.endswith("  =") for line in lines) == exact
    assert f"{len(figures)} figures: {exact} of the {exact} that must agree" in out
    for name in ("1F1B", "ZB-H1", "ZB-H2", "shortcut", "all"):
        rates = re.findall(rf"^{name} \S+B p=\d+ m=\d+ +(\.\d{{4}})  +(\.\d{{4}}) ", out, re.M)
        assert len(rates) == TABLE_5.count("\n")
        assert (name == "all") == any(published != ours for published, ours in rates)
    for source in SOURCES:  # where it is from, and what was assumed
        assert source.__doc__.split("\n")[0] in out


def changed(key, change):
    """The simulator, with another value of that key."""
    simulate = pipedream_lab.simulate

    def mutant(schedule, config):
        return simulate(schedule, {**config, key: change(config[key])})

    return pipedream_lab, "simulate", mutant


def changed_plan(key, value):
    """The lab, with that value of a key."""
    make_plan = pipedream_papers.make_plan
    return pipedream_papers, "make_plan", lambda config: make_plan({**config, key: value})


def longer(times):
    return [1.02 * time for time in times] if isinstance(times, list) else 1.02 * times


def zb_h2_too_early(stage, num_stages, num_microbatches):
    return pipedream_lab.zb_h1(stage, num_stages, num_microbatches, times=1)


MUTANTS = {
    "comm_time ignored": (lambda: changed("comm_time", lambda time: 0), "1F1B 1.5B"),
    "W longer": (lambda: changed("weight_gradient_time", longer), "ZB-H1 1.5B"),
    "I = W": (lambda: changed("weight_gradient_time", lambda w: 0), "ZB-H2 28.3B"),
    "no sync": (lambda: changed_plan("vertical_sync", False), "M=4"),
    "no Table": (lambda: (pipedream_papers, "TABLE_5", TABLE_5.replace(".0516", ".0515")), "14.6B"),
    "all-reduce halved": (
        lambda: (pipedream_planner, "replicate", lambda seconds, w, m, b: (seconds / m[0], 0 * w)),
        "speed-up",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_what_computes_something_else_is_told_and_exits_with_1(name, forget, monkeypatch, capsys):
    mutant, line = MUTANTS[name]
    monkeypatch.setattr(*mutant())
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 1
    wrong = [line for line in capsys.readouterr().out.splitlines() if "NOT EXACT" in line]
    assert any(line in text for text in wrong)


def test_so_do_rows_that_are_not_those_of_the_paper(forget, monkeypatch):
    monkeypatch.setitem(pipedream_lab.LAB_SCHEDULES, "zb-h2", zb_h2_too_early)
    with pytest.raises(SystemExit):
        main()


def test_the_bubble_of_zb_h2_is_the_papers_closed_form():
    """Section 2.3, with sending: (p - 1)(F + I - 2 W + 2 comm), on the times of Table 5."""
    for line in TABLE_5.splitlines()[1:]:
        _, p, m, _, *times = line.split()
        (p, m), (f, i, w, comm) = map(int, (p, m)), map(float, times[:4])
        idle = cost(run("zb-h2", p, m, f, i + w, w, comm)) - m * (f + i + w)
        assert idle == pytest.approx((p - 1) * (f + i - 2 * w + 2 * comm))
        free = cost(run("zb-h1", p, m, f, i + w, w)) - m * (f + i + w)
        assert free == pytest.approx((p - 1) * (f + i - w))  # and ZB-H1's, with free links


def test_measured_figures_are_as_far_off_as_the_pages_say():
    """Or one of them is mistyped."""
    off = {what: [] for what in ("ZB-1p", "1F1B-I")}
    for figure in pipedream_papers.table_4():
        off[figure.what.split()[0]].append(figure.off)
    assert -0.005 < min(off["ZB-1p"]) < max(off["ZB-1p"]) < 0.025
    assert 0.04 < min(off["1F1B-I"]) < max(off["1F1B-I"]) < 0.085
    assert all(0.04 < figure.off < 0.08 for figure in pipedream_papers.gpipe())


def test_gpipes_figures_are_its_formula():
    published = [figure.ours for figure in pipedream_papers.gpipe()]
    assert published == [f"{32 * k / (32 + k - 1):.2f}" for k in (2, 4, 8)]


def test_papers_takes_no_flags_and_its_readers_config_does_not_matter(lab, monkeypatch):
    status, out, err = lab("--num_stages", "8")
    assert (status, out, err.count("\n")) == (2, "", 1)
    mine = {**pipedream_lab.LAB_CONFIG, "comm_time": 3, "num_batches": 2, "in_flight": 2}
    before = [*pipedream_papers.megatron(), *pipedream_papers.two_versions()]
    monkeypatch.setattr(
        pipedream_papers, "LAB_CONFIG", {**mine, "recompute": True, "momentum": 0.9}
    )
    assert before == [*pipedream_papers.megatron(), *pipedream_papers.two_versions()]
