"""How long is a step, simulated with measured times? Closed forms, and what plan makes of it."""

from unittest.mock import MagicMock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.pipelining import schedules

from pipedream.commands.fit import PYTORCH
from pipedream.planning.decide import SIMPLEST, refused
from pipedream.planning.profiles import Layer, write_chain
from pipedream.planning.steps import ONE_EACH, measured_rate, most_kept, possible_steps, time_step
from pipedream_simple import Op

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
    with pytest.raises(ValueError, match="no times of messages: give --bandwidth"):
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


@pytest.mark.parametrize("schedule", SIMPLEST[1:])
@pytest.mark.parametrize("gpus", [2, 3, 4])
def test_pytorch_refuses_what_is_said(schedule, gpus):
    """Its engine is made for each number of microbatches, on stages that do nothing."""
    one = schedule in (*ONE_EACH, "zb-h1")
    places = [0] if one else [0, 2 * gpus - 1] if schedule.endswith("-v") else [0, gpus]
    facts = {"num_stages": gpus if one else 2 * gpus, "group_size": gpus, "group_rank": 0}
    stages = [MagicMock(stage_index=place, has_backward=True, **facts) for place in places]
    make = schedules.get_schedule_class(PYTORCH[schedule])
    for microbatches in range(1, 3 * gpus + 2):
        try:
            make(stages[0] if schedule in ONE_EACH else stages, microbatches)
        except ValueError:
            assert refused(schedule, gpus, microbatches)
        else:
            assert not refused(schedule, gpus, microbatches)


def test_no_schedule_keeps_more_than_the_memory_on_a_gpu():
    """Two stages of a GPU share its memory, and GPipe holds all microbatches."""
    layers = [layer(1, 2, 1, 1, message=1e-3)] * 4  # 8 bytes of weights, and 8 kept, each
    kept = {"1f1b": 16 + 2 * 16, "gpipe": 16 + 8 * 16, "zb-v": 16 + 4 * 8}
    for name, most in kept.items():
        firsts = [0, 2] if name in ONE_EACH else [0, 1, 2, 3]
        time_step(layers, firsts, name, 2, 8, None, most)
        with pytest.raises(ValueError, match=f"keeps {most / 1e9:.4g} GB"):
            time_step(layers, firsts, name, 2, 8, None, most - 1)
    row = [Op(0, kind, m, 0) for kind, m in ("F0", "F1", "I0", "F2", "W0", "B1", "I2", "W2")]
    assert most_kept(row, [layers[:1]]) == 8 + 3 * 8  # a W still needs what its F has kept
    steps, reasons = possible_steps(layers, 2, 8, None, 48)
    assert {"1f1b", "zb-v"} <= {step.schedule for step in steps}
    assert "gpipe" not in {step.schedule for step in steps}
    assert any("gpipe" in reason and "keeps" in reason for reason in reasons)


def test_the_flags_at_the_end_keep_within_the_memory(run, tmp_path):
    """Layers of 8 MB: the fastest cut puts three on a GPU, which has room for two."""
    times = [1e-3, 1e-3, 1e-3, 3e-3]
    layers = [layer(t, 2 * t, t, t, message=1e-6)._replace(weights=8e6) for t in times]
    (tmp_path / "heavy.csv").write_text(write_chain(layers))
    out = run("plan", "heavy.csv", "--gpus", 2, "--straight", "--memory", 17e6).out
    assert "--cut 0 3 " not in out.splitlines()[-1]
    for memory, firsts in ((17e6, [0, 2]), (None, [0, 3])):
        assert possible_steps(layers, 2, 8, None, memory)[0][0].firsts == firsts


def test_nothing_is_said_about_an_all_reduce_that_was_not_measured(run, tmp_path):
    layers = [*[layer(0.001, 0.002, message=1e-5)] * 3, layer(0.001, 0.002)]
    (tmp_path / "my.csv").write_text(write_chain(layers))
    (tmp_path / "one.csv").write_text(write_chain(layers[3:]))
    assert "parallelism" not in run("plan", "my.csv", "--gpus", 2, "--straight").out
    known = run("plan", "my.csv", "--gpus", 2, "--straight", "--bandwidth", 1e9).out
    assert "data parallelism" in known
    for flags in ("my.csv --gpus 2", "one.csv --gpus 1 --straight"):
        status, out, err = run("plan", *flags.split())
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert "give --bandwidth" in err


@pytest.mark.parametrize("field", ["update", "message", "weight_gradient", "sent"])
def test_numbers_of_a_profile_are_numbers(field):
    layers = [layer(1, 2, message=1e-3)] * 4
    layers[1] = layers[1]._replace(**{field: float("nan")})
    steps, reasons = possible_steps(layers, 2, 8)
    assert not steps
    assert all(f"layer 1: {field}=nan" in reason for reason in reasons[-1:])
