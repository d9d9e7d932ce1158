"""Replicated stages: rows, the time that the planner promises, and what they compute."""

import sys

import pytest
import torch
from reference import delayed_sgd

from pipedream_planner import (
    COLUMNS,
    Layer,
    best_plan,
    differences,
    main,
    replicated,
    simulate_plan,
    train_replicated,
)
from pipedream_simple import CONFIG, UserError, idle_times, pin_versions, run_main, simulate, train

SMALL = {
    **CONFIG,
    "layers_per_stage": 2,
    "hidden_size": 8,
    "batch_size": 24,
    "num_batches": 8,
    "device": "cpu",
}


def delays(replicas, num_microbatches):
    """Updates that a stage misses, from the figure of 1F1B-RR in the paper: no rows, no versions.

    A GPU of stage s has ahead forwards in flight; a batch is num_microbatches / R_s of them.
    """
    found = []
    for stage, copies in enumerate(replicas):
        ahead = -(-sum(replicas[stage:]) // copies)  # forwards before the first backward
        found.append(-(-(ahead - 1) * copies // num_microbatches))
    return found


@pytest.mark.parametrize(
    ("replicas", "num_microbatches"),
    [([1], 2), ([3], 3), ([2, 1], 2), ([2, 1], 4), ([1, 2], 2), ([3, 1, 2], 6), ([2, 2, 1], 2)],
)
@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9, "recompute": True}])
def test_replicas_train_to_the_recurrence_and_stay_the_same(replicas, num_microbatches, settings):
    config = {**SMALL, "num_microbatches": num_microbatches, **settings}
    run, _, _ = train_replicated(config, replicas, torch.float64)
    config["num_stages"] = len(replicas)
    late = delays(replicas, num_microbatches)
    losses, expected = delayed_sgd(config, lambda stage: late[stage])
    assert run.losses == pytest.approx(losses, abs=1e-12)
    for weights, stage, copies in zip(run.weights, expected, replicas, strict=True):
        assert len(weights) == copies * len(stage)
        storages = {w.untyped_storage().data_ptr() for w in weights.values()}
        assert len(storages) == len(weights)  # each replica has weights of its own
        for name, w in stage.items():
            for replica in range(copies):
                assert torch.allclose(weights[f"copies.{replica}.{name}"], w, rtol=0, atol=1e-12)
                assert torch.equal(weights[f"copies.{replica}.{name}"], weights[f"copies.0.{name}"])


def test_one_replica_each_is_plain_pipedream_to_the_bit():
    config = {**SMALL, "num_stages": 3, "num_microbatches": 2}
    run, _, _ = train_replicated(config, [1, 1, 1])
    plain = train(config)
    assert run.losses == plain.losses
    for mine, theirs in zip(run.weights, plain.weights, strict=True):
        for name, w in theirs.items():
            assert torch.equal(mine[f"copies.0.{name}"], w)


def test_replicas_share_the_microbatches_in_turn_and_update_together():
    events = simulate(
        pin_versions(replicated([3, 1], 6, 4), 6),
        {**CONFIG, "num_stages": 2, "update_time": [2, 0]},
    )
    for op, device, start, _ in events:
        if op.stage == 0 and op.kind in "FB":
            assert device == op.microbatch % 3
        if op.kind == "U" and op.stage == 0:
            together = [e for e in events if e.op[:2] == (0, "U") and e.op.version == op.version]
            assert len(together) == 3
            assert {(e.start, e.end) for e in together} == {(start, start + 2)}
            last = [e.end for e in events if e.op.kind == "B" and e.op.stage == 0]
            of_batch = [
                e.end
                for e in events
                if e.op[:2] == (0, "B") and e.op.microbatch // 6 == op.microbatch // 6
            ]
            assert start >= max(of_batch)
            assert len(last) == 24


@pytest.mark.parametrize("update_time", [0, 2.5])
def test_a_replica_that_waits_to_update_waits_for_the_last_one(update_time):
    config = {**CONFIG, "num_stages": 2, "update_time": [update_time, 0]}
    events = simulate(pin_versions(replicated([3, 1], 6, 4), 6), config)
    gaps, over = idle_times(events), max(e.end for e in events)
    for device in range(4):
        mine = [found for found in (*events, *gaps) if found.device == device]
        now = 0
        for start, end in sorted((found.start, found.end) for found in mine):
            assert start == now, "a hole or an overlap"
            now = end
        assert now == over
    waits = [gap for gap in gaps if gap.next and gap.next.op.kind == "U"]
    assert waits
    for gap in waits:
        assert gap.cause == "wait"
        assert gap.needed.op[:2] == (0, "B")
        assert gap.needed.device != gap.device
        assert gap.needed.end == gap.end == gap.next.start


def test_microbatches_that_replicas_cannot_share_are_refused():
    with pytest.raises(UserError, match="num_microbatches=4 must be a multiple of 3"):
        train_replicated(SMALL, [3, 1])
    for wrong in (0, -1, 1.5, True, "2"):
        with pytest.raises(UserError, match="replicas"):
            train_replicated(SMALL, [wrong, 1])


@pytest.fixture
def program(monkeypatch, capsys):
    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["pipedream_planner.py", *map(str, flags)])
        status = run_main(main)
        return status, *capsys.readouterr()

    return run


def test_train_prints_what_was_trained(program):
    status, out, err = program("train", "3-1", "--num_microbatches", 3, "--batch_size", 30)
    assert (status, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    config = {**CONFIG, "num_microbatches": 3, "batch_size": 30}
    run, schedule, events = train_replicated(config, [3, 1])
    assert f"Loss: {run.losses[0]:.4f} in the first batch, {run.losses[-1]:.4f} in the last" in out
    assert f"4 GPUs, {max(e.end for e in events):g} time units" in out
    for gpu, row in enumerate(schedule):
        start = " ".join(f"{op.kind}{op.microbatch}" for op in row[:6])
        assert f"GPU{gpu} (stage {row[0].stage}): {start}" in out
    assert "between the weights of two replicas: 0\n" in out


def test_weights_that_differ_are_told_apart():
    weights = {f"copies.{r}.w": torch.full((2,), 1.0 + 0.5 * (r == 2)) for r in range(3)}
    assert differences(weights) == 0.5


@pytest.mark.parametrize("plan", ["0", "2-", "x", "65", "1.5-1", "True", "3-1", "--num_stages"])
def test_a_bad_plan_gets_one_line(program, plan):
    status, out, err = program("train", plan)
    assert (status, out, err.count("\n")) == (2, "", 1)


@pytest.mark.parametrize("plan", ["-1", "2--1", "2-", "x", "", "1.5", "2-one"])
def test_what_is_no_plan_is_told_what_one_looks_like(program, plan):
    _, _, err = program("train", plan)
    assert f"PLAN='{plan}' must be the GPUs of each stage, such as 2-1-1" in err


def test_the_forwards_that_recompute_repeats_are_said_to_count(program):
    flags = "--num_batches", 1, "--hidden_size", 8
    again = "Busy time includes the forwards that recompute runs a second time."
    assert again in program("train", "1-1", *flags, "--recompute", True)[1]
    assert again not in program("train", "1-1", *flags)[1]


def test_a_plan_that_is_too_long_to_simulate_is_printed_all_the_same(program, tmp_path):
    path = tmp_path / "chain.csv"
    path.write_text(",".join(COLUMNS) + "\n" + "a,1,2,3,0\n" * 4)
    status, out, err = program("plan", path, "--gpus", 300, "--bandwidth", 1e9)
    assert (status, err) == (0, "")
    assert out.startswith("Plan: ")
    assert "Not simulated: with so many GPUs" in out


def chain(*costs):
    return [Layer(str(i), f, b, a, w) for i, (f, b, a, w) in enumerate(costs)]


def test_straight_plans_run_as_fast_as_the_planner_says():
    """The planner knows no schedule, and the simulator no plan."""
    generator = torch.Generator().manual_seed(1)
    for number in range(25):
        costs = torch.rand(3 + number % 6, 2, generator=generator) + 0.05
        layers = chain(*((f, b, 0, 0) for f, b in costs.tolist()))
        plan = best_plan(layers, [1 + number % len(layers)], [1e9], straight=True)
        seconds = simulate_plan(plan, layers)
        assert seconds == pytest.approx(plan.slowest.seconds, rel=1e-9)


def test_no_plan_runs_faster_than_the_planner_says_and_data_parallelism_as_fast():
    generator = torch.Generator().manual_seed(2)
    for number in range(25):
        costs = torch.rand(3 + number % 4, 3, generator=generator) + 0.05
        layers = chain(*((f, b, 0, 1e8 * w) for f, b, w in costs.tolist()))
        plan = best_plan(layers, [2 + number % 6], [1e9])
        seconds = simulate_plan(plan, layers)
        promised = max(stage.compute + stage.all_reduce for stage in plan.stages)
        assert seconds >= promised * (1 - 1e-9)
        if len(plan.stages) == 1:
            assert seconds == pytest.approx(promised, rel=1e-9)


def test_a_plan_that_the_schedule_of_the_paper_does_not_keep_busy():
    """Replicas that wait for each other at every update, and a first stage with 4 in flight."""
    layers = chain((2 / 3, 4 / 3, 0, 1e9), (4 / 3, 8 / 3, 0, 0), (1 / 3, 2 / 3, 0, 0))
    plan = best_plan(layers, [4], [1e9])
    assert [stage.replicas for stage in plan.stages] == [1, 3]
    assert plan.slowest.seconds == pytest.approx(2)
    assert simulate_plan(plan, layers) > 2.3
