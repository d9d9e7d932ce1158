"""Three things that everything rests on, each against a second program, written from the rule.

When an op runs, what training with old gradients computes, and which plan is fastest.
"""

import itertools
import math
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import clock, counted, delayed, two_level_plans
from small import SMALL, fits

from pipedream.planning.profiles import Layer
from pipedream.planning.replicas import simulate_replicas
from pipedream.planning.search import best_partition
from pipedream.schedules.plans import make_plan
from pipedream.schedules.rows import LIBRARY
from pipedream.staleness.delays import OPTIMIZERS, Training, delayed_training
from pipedream_simple import CONFIG, SCHEDULES, build_schedule, simulate

FAST = settings(max_examples=120, deadline=None, derandomize=True)
ops_take = st.integers(1, 5).map(lambda n: 12 * n)  # halves, and a part for each of 4 stages, exact
messages_take = st.sampled_from([0, 1, 5, 12, 40, 150])  # free, hidden, or slower than any op


def value_of(config, key, stage):
    value = config[key]
    return Fraction(value[stage] if isinstance(value, list) else value)


@st.composite
def configs(draw, names):
    """Of any schedule, with a time for all GPUs or one for each."""
    schedule = draw(st.sampled_from([*names]))
    num_gpus, num_microbatches = draw(st.integers(1, 5)), draw(st.integers(1, 8))
    if not fits(schedule, num_gpus, num_microbatches):
        num_gpus = min(num_gpus, 3)
        num_microbatches = num_gpus * draw(st.integers(2, 3))

    def times(some):
        return draw(some | st.lists(some, min_size=num_gpus, max_size=num_gpus))

    return {
        **SMALL,
        "schedule": schedule,
        "num_stages": num_gpus,
        "num_microbatches": num_microbatches,
        "batch_size": num_microbatches,
        "num_batches": draw(st.integers(1, 3)),
        "layers_per_stage": 12,
        "chunks_per_gpu": draw(st.integers(1, 4)),
        "in_flight": draw(st.integers(0, 9)),
        "recompute": draw(st.booleans()),
        "forward_time": times(ops_take),
        "backward_time": times(ops_take),
        "comm_time": times(messages_take),
        "weight_gradient_time": times(st.sampled_from([0, 3])),  # 0: half of a backward
        "overlap_time": draw(st.sampled_from([1, 0.75, 0.25])),
    }


def run_clock(config, rows, pairs=()):
    """With the times as the reader gives them: those of a GPU, which its stages share."""
    gpu_of = {op.stage: gpu for gpu, row in enumerate(rows) for op in row}

    def takes(op):
        gpu, keys = gpu_of[op.stage], ("forward_time", "backward_time", "weight_gradient_time")
        f, b, w = (value_of(config, key, gpu) for key in keys)
        w, again = w or b / 2, f * config["recompute"]
        time = {"F": f, "B": b + again, "I": b - w + again, "W": w, "U": 0}[op.kind]
        return time / [*gpu_of.values()].count(gpu)

    def travels(op):
        return value_of(config, "comm_time", gpu_of[op.stage])

    part = Fraction(config["overlap_time"])
    return clock(rows, config["num_microbatches"], takes, travels, pairs, part)


def times_of(events):
    return {(event.device, event.op): (event.start, event.end) for event in events}


@FAST
@given(configs(LIBRARY))
def test_gpus_and_links_that_run_from_moment_to_moment_keep_the_simulated_times(config):
    plan = make_plan(config)
    ops, messages = run_clock(config, plan.schedule, plan.pairs)
    assert times_of(plan.events) == ops
    sent = {link: [(m.op, m.start, m.end) for m in sent] for link, sent in plan.links.items()}
    assert {(link[0], op): (a, b) for link in sent for op, a, b in sent[link]} == messages


@FAST
@given(configs(SCHEDULES))
def test_so_they_do_in_the_script_alone(config):
    config = {key: config[key] for key in CONFIG}
    rows = build_schedule(config)
    ops, _ = run_clock({**SMALL, **config}, rows)
    assert times_of(simulate(rows, config)) == ops


@FAST
@given(st.lists(st.integers(1, 3), min_size=1, max_size=3), configs(["pipedream"]))
def test_and_where_replicas_take_turns(replicas, config):
    """Stage by stage the first of the drawn times; the replicas of a stage update together."""
    config = {key: config[key] for key in CONFIG} | {"num_stages": len(replicas)}
    config["num_microbatches"] = config["batch_size"] = math.lcm(*replicas)
    for key in ("forward_time", "backward_time", "comm_time"):
        value = config[key]
        first = value if isinstance(value, list) else [value]
        config[key] = [first[stage % len(first)] for stage in range(len(replicas))]
    rows, events = simulate_replicas(replicas, config)

    def takes(op):
        f, b = (value_of(config, f"{name}_time", op.stage) for name in ("forward", "backward"))
        return {"F": f, "B": b + f * config["recompute"], "U": 0}[op.kind]

    def travels(op):
        return value_of(config, "comm_time", op.stage)

    assert times_of(events) == clock(rows, config["num_microbatches"], takes, travels)[0]


PYTORCHS = {
    "SGD": torch.optim.SGD,
    "momentum": lambda weights, lr: torch.optim.SGD(weights, lr=lr * (1 - 0.9), momentum=0.9),
    "Adam": torch.optim.Adam,
}


@pytest.mark.parametrize("delays", [[0] * 4, [1] * 4, [3, 2, 1, 0], [3] * 4], ids=str)
@pytest.mark.parametrize("name", PYTORCHS)
def test_training_with_old_gradients_is_a_plain_loop_with_pytorchs_optimizer(name, delays):
    config = {**CONFIG, "device": "cpu", "num_batches": 9, "layers_per_stage": 2, "hidden_size": 12}
    function, rates = OPTIMIZERS[name]
    rates, seeds = rates[1:4], [0, 1]
    losses, weights = delayed_training(
        Training(config, delays, function), rates, seeds, torch.float64
    )
    assert losses.shape == (len(rates), len(seeds), 9)
    for run, (rate, seed) in enumerate(itertools.product(rates, seeds)):
        optimizer = partial(PYTORCHS[name], lr=rate)
        expected, stages = delayed({**config, "seed": seed}, delays.__getitem__, optimizer)
        assert losses.flatten(0, 1)[run].tolist() == pytest.approx(expected, abs=1e-10)
        for ours, theirs in zip(weights, stages, strict=True):
            assert ours.keys() == theirs.keys()
            for key, w in theirs.items():
                torch.testing.assert_close(ours[key][run], w.detach(), rtol=0, atol=1e-10)


SIZES = [(2, 2), (2, 3), (3, 2), (4, 2), (2, 4), (3, 3)]


@pytest.mark.parametrize(("gpus", "machines"), SIZES)
def test_no_plan_for_several_machines_is_faster_when_what_the_links_carry_is_counted(
    gpus, machines
):
    generator = np.random.default_rng(0)
    for number in range(4):
        costs = generator.integers(0, 20, size=(generator.integers(1, 6), 4)).tolist()
        layers = [Layer("", 1.0 + f, *map(float, others)) for f, *others in costs]
        bandwidths = [[20, 5], [3, 8], [100, 40], [1, 1]][number]
        plans = {
            tuple((*stage[:2], stage[2:4]) for stage in plan): counted(layers, plan, bandwidths)
            for plan in two_level_plans(len(layers), gpus, machines)
        }
        found = best_partition(layers, [gpus, machines], bandwidths)
        ours = plans[tuple(stage[:3] for stage in found.stages)]
        for stage, times in zip(found.stages, ours, strict=True):
            assert stage[3:6] == pytest.approx([*map(float, times)], rel=1e-12)
        slowest = [max(max(c + add, send) for c, add, send in plan) for plan in plans.values()]
        assert found.slowest.seconds == pytest.approx(float(min(slowest)), rel=1e-12)
