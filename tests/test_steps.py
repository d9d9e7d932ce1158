"""How long is a step, simulated with measured times? Closed forms, and what plan makes of it."""

from unittest.mock import MagicMock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from template import pipeline
from torch.distributed.pipelining import schedules

from pipedream.planning.profiles import Layer, write_chain
from pipedream.planning.steps import ONE_EACH, TWO_EACH, measured_rate, possible_steps, time_step

TIMES = st.tuples(*[st.integers(0, 50)] * 6)


def layer(f, b, i=None, w=None, update=0.0, message=0.0, activation=8):
    halves = {"input_gradient": i, "weight_gradient": w, "update": update, "message": message}
    return Layer("layer", f, b, activation, 8, 8, **halves)


@settings(max_examples=50, deadline=None)
@given(st.lists(TIMES, min_size=3, max_size=6), st.sampled_from(ONE_EACH))
def test_one_microbatch_goes_there_and_back_and_waits_for_every_message(rows, schedule):
    """Nothing else is left to do meanwhile; the slowest GPU's update comes last."""
    layers = [layer(*row) for row in rows]
    firsts = [0, 1, len(layers) - 1]
    there_and_back = sum(c.forward + c.backward for c in layers)
    messages = 2 * (layers[0].message + layers[-2].message)
    updates = [layers[0].update, sum(c.update for c in layers[1:-1]), layers[-1].update]
    expected = there_and_back + messages + max(updates)
    assert time_step(layers, firsts, schedule, 3, 1) == pytest.approx(expected)


@pytest.mark.parametrize("microbatches", [4, 8, 32])
@pytest.mark.parametrize("gpus", [2, 4])
def test_equal_stages_take_what_the_papers_say(gpus, microbatches):
    """1F1B and GPipe: (M + S - 1)(f + b); interleaved: (M + (S - 1) / V)(f + b).

    ZB-V with f = i = w: 3 M f + (S - 1) f / 2, as long as M >= 2 S (Zero Bubble, section 6).
    """
    layers, one = [layer(0.5, 1, 0.5, 0.5, update=0.25)] * 2 * gpus, 3.0
    times = {}
    for name, number in {"1f1b": gpus, "gpipe": gpus, "interleaved": 2 * gpus}.items():
        firsts = [*range(0, 2 * gpus, 2 * gpus // number)]
        times[name] = time_step(layers, firsts, name, gpus, microbatches) - 2 * 0.25
    whole = (microbatches + gpus - 1) * one
    assert times == pytest.approx(
        {"1f1b": whole, "gpipe": whole, "interleaved": (microbatches + (gpus - 1) / 2) * one}
    )
    if microbatches >= 2 * gpus:
        zb_v = time_step(layers, [*range(2 * gpus)], "zb-v", gpus, microbatches) - 2 * 0.25
        assert zb_v == pytest.approx(microbatches * one + (gpus - 1) / 2)


def test_a_message_is_sent_only_when_it_is_asked_for():
    """Two stages, 1F1B: each of the M rounds of the slower stage waits for one message.

    The last stage runs F B F B; between two rounds it asks for an activation. The gradient of the
    last round goes back, too.
    """
    layers = [layer(1, 1, message=0.25), layer(3, 5)]
    expected = 1 + 4 * (0.25 + 3 + 5) + 0.25 + 1
    assert time_step(layers, [0, 1], "1f1b", 2, 4) == pytest.approx(expected)


def test_between_two_stages_of_a_gpu_nothing_is_sent():
    """In a V, GPU1 has the stages 1 and 2, so the message between them is free."""

    def time(*messages):
        layers = [layer(1, 2, 1, 1, message=m) for m in (*messages, 0)]
        return time_step(layers, [0, 1, 2, 3], "zb-v", 2, 1)

    assert time(0, 100, 0) == time(0, 0, 0)
    assert time(0.5, 100, 0.25) == time(0, 0, 0) + 2 * (0.5 + 0.25)


def test_a_given_bandwidth_replaces_what_was_measured():
    layers = [layer(1, 2, message=0.5, activation=100), layer(1, 2)]
    assert time_step(layers, [0, 1], "1f1b", 2, 1) == pytest.approx(7)
    assert time_step(layers, [0, 1], "1f1b", 2, 1, 200.0) == pytest.approx(6 + 2 * 1)
    assert measured_rate(layers) == 2 * 100 / 0.5
    with pytest.raises(ValueError, match="no message_ms: give --bandwidth"):
        possible_steps([Layer("x", 1, 1, 1, 1)] * 2, 2, 8)


def test_the_planner_says_which_schedule_and_how_to_train_with_it(run, tmp_path):
    layers = [layer(0.001, 0.002, 0.001, 0.001, message=1e-5) for _ in range(8)]
    (tmp_path / "my.csv").write_text(write_chain(layers))
    status, out, err = run("plan", "my.csv", "--gpus", 2, "--straight")
    assert (status, err) == (0, "")
    steps, reasons = possible_steps(layers, 2, 8)
    assert len(steps) == 7
    assert not reasons
    for step in steps:
        assert f"{1000 * step.seconds:.4g}" in out
    fastest = min(step.seconds for step in steps)
    flags = out.splitlines()[-1].split()
    assert flags[:4] == ["--processes", "2", "--cut", "0"]
    chosen = {step.schedule: step for step in steps}[flags[flags.index("--schedule") + 1]]
    assert chosen.seconds <= 1.05 * fastest
    assert [*map(int, flags[3 : flags.index("--schedule")])] == chosen.firsts
    few = run("plan", "my.csv", "--gpus", 8, "--straight", "--microbatches", 16)
    assert "8 layers cannot be cut into 16 stages" in " ".join(few.out.split())
    assert few.out.splitlines()[-1].endswith("--schedule 1f1b --microbatches 16")
    few = run("plan", "my.csv", "--gpus", 8, "--straight", "--microbatches", 6)
    assert "Left out: 1f1b: PyTorch's engine asks for 8 microbatches." in few.out
    assert few.out.splitlines()[-1].endswith("--schedule gpipe --microbatches 6")
    for flag in ("--microbatches 0", "--microbatches x", "--bandwidth 0"):
        result = run("plan", "my.csv", "--gpus", 2, "--straight", *flag.split())
        assert (result.status, result.out, result.err.count("\n")) == (2, "", 1)


@pytest.mark.parametrize("schedule", [*ONE_EACH, *TWO_EACH])
@pytest.mark.parametrize("microbatches", [1, 2, 3, 4, 5, 6, 8])
def test_pytorch_takes_what_is_advised(schedule, microbatches):
    """Of what plan simulates on two GPUs, PyTorch's engine refuses nothing."""
    one, count = schedule in ONE_EACH, 2 if schedule in ONE_EACH else 4
    layers = [layer(1, 2, 1, 1, message=0)] * 4
    simulated = {step.schedule for step in possible_steps(layers, 2, microbatches)[0]}
    facts = {"num_stages": count, "group_size": 2, "group_rank": 0, "has_backward": True}
    stages = [MagicMock(stage_index=index, **facts) for index in (0, count - 1)]
    make = schedules.get_schedule_class(pipeline.SCHEDULES[schedule])
    try:
        make(stages[0] if one else stages, microbatches)
    except ValueError:
        assert schedule not in simulated
    else:
        assert schedule in simulated or "interleaved" in schedule
