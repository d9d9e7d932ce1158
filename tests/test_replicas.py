"""Replicated stages: rows, the time that the planner promises, and what they compute."""

import pytest
import torch
from reference import delayed_sgd

from pipedream.backstage.measures import idle_times
from pipedream.planning.profiles import Layer
from pipedream.planning.replicas import (
    differences,
    simulate_partition,
    simulate_replicas,
    train_replicated,
)
from pipedream.planning.search import best_partition
from pipedream_simple import CONFIG, RECOMPUTED, UserError, train

SIZES = {"layers_per_stage": 2, "hidden_size": 8, "batch_size": 24, "num_batches": 8}
SMALL = {**CONFIG, **SIZES, "device": "cpu"}


def delays(replicas, num_microbatches):
    """Updates that a stage misses, from the figure of 1F1B-RR in the paper: no rows, no versions.

    A GPU of stage s has ahead forwards in flight; a batch is num_microbatches / R_s of them.
    """
    # Forwards before the first backward.
    ahead = [-(-sum(replicas[stage:]) // copies) for stage, copies in enumerate(replicas)]
    pairs = zip(ahead, replicas, strict=True)
    return [-(-(number - 1) * copies // num_microbatches) for number, copies in pairs]


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
            assert torch.allclose(weights[f"copies.0.{name}"], w, rtol=0, atol=1e-12)
            for replica in range(copies):
                assert torch.equal(weights[f"copies.{replica}.{name}"], weights[f"copies.0.{name}"])


def test_one_replica_each_is_plain_pipedream_to_the_bit():
    config = {**SMALL, "num_stages": 3, "num_microbatches": 2}
    run, _, _ = train_replicated(config, [1, 1, 1])
    plain = train(config)
    assert run.losses == plain.losses
    for mine, theirs in zip(run.weights, plain.weights, strict=True):
        for name, w in theirs.items():
            assert torch.equal(mine[f"copies.0.{name}"], w)


def simulated(update_time):
    """Four batches on 3-1, where the three replicas need update_time for an update."""
    sizes = {"num_stages": 2, "num_microbatches": 6, "num_batches": 4}
    times = {"F": [1, 1], "B": [1, 1], "U": [update_time, 0]}
    return simulate_replicas([3, 1], {**CONFIG, **sizes}, times)[1]


def test_replicas_share_the_microbatches_in_turn_and_update_together():
    events = [event for event in simulated(2) if event.op.stage == 0]
    for op, device, start, _ in events:
        if op.kind != "U":
            assert device == op.microbatch % 3
            continue
        together = [e for e in events if e.op.kind == "U" and e.op.version == op.version]
        assert len(together) == 3
        assert {(e.start, e.end) for e in together} == {(start, start + 2)}
        batch = [e for e in events if e.op.microbatch // 6 == op.microbatch // 6]
        assert start == max(e.end for e in batch if e.op.kind == "B")


@pytest.mark.parametrize("update_time", [0, 2.5])
def test_a_replica_that_waits_to_update_waits_for_the_last_one(update_time):
    events = simulated(update_time)
    gaps, over = idle_times(events, {}), max(e.end for e in events)
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


def test_train_prints_what_was_trained(run):
    status, out, err = run("train", "3-1", "--num_microbatches", 3, "--batch_size", 30)
    assert (status, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    config = {**CONFIG, "num_microbatches": 3, "batch_size": 30}
    trained, schedule, events = train_replicated(config, [3, 1])
    losses = f"Loss: {trained.losses[0]:.4f} in the first batch, {trained.losses[-1]:.4f} in the"
    assert losses in out
    assert f"4 GPUs, {max(e.end for e in events):g} time units" in out
    for gpu, row in enumerate(schedule):
        start = " ".join(f"{op.kind}{op.microbatch}" for op in row[:6])
        assert f"GPU{gpu} (stage {row[0].stage}): {start}" in out
    assert "Weight versions per stage: 2 1\n" in out
    assert "between the weights of two replicas: 0\n" in out
    assert RECOMPUTED not in out


def test_a_run_that_diverges_is_said_to(run):
    for command in (["train", "2-1"], ["audit"], ["compare", "--num_batches", 3]):
        assert "The loss diverged: try a smaller" in run(*command, "--learning_rate", 1e12).out
    assert "diverged" not in run("train", "2-1").out


@pytest.mark.parametrize("value", ["four", "4,4", "nan", "None", "", "0"])
def test_a_bad_number_of_microbatches_gets_one_line(run, value):
    status, out, err = run("train", "2-1-1", "--num_microbatches", value)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "num_microbatches=" in err


def test_times_may_be_one_per_stage_of_the_plan_and_recompute_is_said_to_count(run):
    flags = "--num_batches", 1, "--hidden_size", 8, "--forward_time", "1,2", "--recompute", True
    status, out, _ = run("train", "1-1", *flags)
    assert status == 0
    assert "2 GPUs, 23 time units" in out  # 1 + 4 * (2 + 2 + 1) + 2: stage 1 is always busy
    assert RECOMPUTED in out


def test_weights_that_differ_are_told_apart():
    weights = {f"copies.{r}.w": torch.full((2,), 1.0 + 0.5 * (r == 2)) for r in range(3)}
    assert differences(weights) == 0.5


@pytest.mark.parametrize("plan", ["-1", "2--1", "2-", "x", "1.5", "", "65", "3-1"])
def test_a_bad_plan_gets_one_line(run, plan):
    status, out, err = run("train", plan)
    assert (status, out, err.count("\n")) == (2, "", 1)
    messages = {"65": "replicas=65 must be a whole", "3-1": "num_microbatches=4 must be a multiple"}
    assert messages.get(plan, f"PLAN='{plan}' must be the GPUs of each stage, such as 2-1") in err


def chain(costs, bytes_of_weights=1e8):
    return [Layer("", f, b, 0.0, bytes_of_weights * w) for f, b, w in costs]


@pytest.mark.parametrize("straight", [True, False])
def test_no_plan_runs_faster_than_the_planner_says_and_two_kinds_as_fast(straight):
    """Straight ones and data parallelism. The planner knows no schedule, the simulator no plan."""
    generator = torch.Generator().manual_seed(1)
    for number in range(25):
        size = 3 + number % 5
        costs = (torch.rand(size, 3, generator=generator) + 0.05).tolist()
        layers = chain(costs, bytes_of_weights=0 if straight else 1e8)
        gpus = 1 + number % size if straight else 2 + number % 6
        partition = best_partition(layers, [gpus], [1e9], straight)
        seconds = simulate_partition(partition, layers)
        promised = max(stage.compute + stage.all_reduce for stage in partition.stages)
        assert seconds >= promised * (1 - 1e-9)
        if straight or len(partition.stages) == 1:
            assert seconds == pytest.approx(promised, rel=1e-9)


def test_time_is_counted_on_the_slowest_stage_and_over_whole_periods():
    """On 1-3-3 the first stage runs ahead at 9 s for 50 minibatches, until nothing is left of it.

    On 1-4 a batch of 4 minibatches takes 18 and 12 seconds in turn.
    """
    layers = chain([(7, 2, 4), (4, 6, 6), (7, 7, 5)])
    partition = best_partition(layers, [7], [1e8])
    assert [stage.replicas for stage in partition.stages] == [1, 3, 3]
    slowest = (14 + 4 * 2 / 3 * 5) / 3
    assert partition.slowest.seconds == pytest.approx(slowest)
    assert simulate_partition(partition, layers) == pytest.approx(slowest, rel=1e-9)
    layers = chain([(2, 1, 2), (4, 5, 1)])
    partition = best_partition(layers, [5], [1e8])
    assert [stage.replicas for stage in partition.stages] == [1, 4]
    assert simulate_partition(partition, layers) == pytest.approx((18 + 12) / 8, rel=1e-9)


def test_a_plan_that_the_schedule_of_the_paper_does_not_keep_busy():
    """Replicas that wait for each other at every update, and a first stage with 4 in flight."""
    layers = chain([(2 / 3, 4 / 3, 10), (4 / 3, 8 / 3, 0), (1 / 3, 2 / 3, 0)])
    partition = best_partition(layers, [4], [1e9])
    assert [stage.replicas for stage in partition.stages] == [1, 3]
    assert partition.slowest.seconds == pytest.approx(2)
    assert simulate_partition(partition, layers) > 2.3
    with pytest.raises(UserError, match="too long"):
        simulate_partition(best_partition(layers, [300], [1e9]), layers)
