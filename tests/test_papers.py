"""The published figures come out, and a program that computes something else is found out."""

import re

import pytest

from pipedream.commands import papers
from pipedream.commands.papers import SOURCES, bubble_rates, cost, plan_of
from pipedream.planning import search
from pipedream.published import TABLE_5
from pipedream.schedules.plans import PLAN_CONFIG, make_plan
from pipedream.schedules.rows import LIBRARY, zb_h1


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
MUTANTS = {  # -> what is replaced, by what; whose lines then are wrong, and one of them
    "comm_time ignored": (*changed("comm_time", lambda time: 0), papers.table_5, "1F1B 1.5B"),
    "W longer": (*changed("weight_gradient_time", lambda w: 1.02 * w), papers.table_5, "ZB-H1 1"),
    "I = W": (*changed("weight_gradient_time", lambda w: 0), papers.table_5, "ZB-H2 6.2B"),
    "no sync": (*changed("vertical_sync", lambda on: False), papers.two_versions, "M=4"),
    "a figure mistyped": (papers, "TABLE_5", FEW.replace(".0559", ".0558"), papers.table_5, "6.2B"),
    "rows too early": (LIBRARY, "zb-h2", (zb_h2_too_early, True), papers.table_5, "ZB-H2 1.5B"),
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
        idle = cost(plan_of("zb-h2", p, m, f, i + w, w, comm)) - m * (f + i + w)
        assert idle == pytest.approx((p - 1) * (f + i - 2 * w + 2 * comm))
        free = cost(plan_of("zb-h1", p, m, f, i + w, w)) - m * (f + i + w)
        assert free == pytest.approx((p - 1) * (f + i - w))  # and ZB-H1's, with free links


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
