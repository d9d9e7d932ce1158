"""The command audit: what every op read, told by tensors, and how wrong gradients are."""

import re
from statistics import fmean

import pytest

from pipedream.backstage.audit import Audit
from pipedream_simple import CONFIG, Worker, train


@pytest.mark.parametrize(
    ("flags", "versions", "number"),
    [
        ((), "2 2 2 1", 160),
        (("--vertical_sync", True), "2 2 2 2", 160),
        (("--weight_stashing", False), "1 1 1 1", 160),
        (("--schedule", "zb-h1"), "1 1 1 1", 240),
        (("--schedule", "interleaved"), "1 1 1 1 1 1 1 1 1 1 1 1", 480),
        (("--schedule", "looped-bfs"), "1 1 1 1 1 1 1 1 1 1 1 1", 480),
        (("--schedule", "zb-v", "--layers_per_stage", 4), "1 1 1 1 1 1 1 1", 480),
        (("--recompute", True, "--schedule", "gpipe"), "1 1 1 1", 160),
    ],
)
def test_every_op_reads_what_the_schedule_says(run, flags, versions, number):
    status, out, err = run("audit", *flags)
    assert (status, err) == (0, "")
    assert f"Ops that read the version of the schedule: {number} of {number}\n" in out
    assert f"Weight versions in memory, at most, counted: {versions}\n" in out
    wrong = [part for part in re.findall(r"([\d.]+)% off", out) if part != "0.0"]
    assert bool(wrong) == ("--weight_stashing" in flags)


def test_the_gradient_errors_shown_are_those_of_the_audit(run):
    config = {**CONFIG, "weight_stashing": False}
    audit = Audit(config, gradients=True)
    train(config, watch=audit)
    out = run("audit", "--weight_stashing", False).out
    for name, measure in (("mean", fmean), ("worst", max)):
        line = next(line for line in out.splitlines() if f"stage by stage, {name}" in line)
        per_stage = [[e for (s, _), e in audit.error.items() if s == stage] for stage in range(4)]
        assert line.split()[6:] == [f"{measure(errors):.1%}" for errors in per_stage]
    assert re.search(r"MB4 +v0 v0 v0 v1 +v1 v1 v1 v1 +v1 v1 v1 v1 +9.4% off", out)
    out = run("audit", "--weight_stashing", False, "--learning_rate", 1e30, "--num_stages", 2).out
    assert out.count("nan%") > 2, "no number was called right"


def test_an_op_that_reads_something_else_is_seen_and_status_1(run, monkeypatch):
    forward = Worker.forward

    def careless(self, op, x, labels=None):
        return forward(self, op._replace(version=max(self.versions)), x, labels)

    monkeypatch.setattr(Worker, "forward", careless)
    with pytest.raises(SystemExit) as stop:
        run("audit", "--num_microbatches", 1, "--vertical_sync", True)
    assert stop.value.code == 1
