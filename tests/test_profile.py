"""The clock: what profile measures, what it simulates with that, and the file for the planner."""

import os
import re

import pytest
import torch
from torch import multiprocessing

import pipedream_planner
from pipedream_fit import count_activations
from pipedream_lab import LAB_CONFIG, MemoryMeter, make_plan
from pipedream_planner import (
    COLUMNS,
    KEPT,
    best_plan,
    describe_layers,
    measure_stages,
    read_profile,
    time_message,
)
from pipedream_simple import NUM_HEADS, Worker, build_stages

SMALL = {**LAB_CONFIG, "hidden_size": 12, "layers_per_stage": 1, "device": "cpu"}
FLAGS = ["--hidden_size", 12, "--num_stages", 2, "--layers_per_stage", 2, "--device", "cpu"]


@pytest.fixture
def free_messages(monkeypatch):
    monkeypatch.setattr(pipedream_planner, "time_message", lambda num_bytes: (0.0, ""))


def test_times_are_medians_and_the_first_batch_does_not_count(monkeypatch):
    """A batch is F B F B F B F B U: 1, 2 and 3 ms times its number, but 5 s each in the first."""
    reading = 0.0
    ops = [(kind, batch) for batch in range(6) for kind in 4 * [1, 2] + [3]]
    left = iter(ops)

    def now(device):
        nonlocal reading
        kind, batch = next(left)
        reading += kind * batch / 1000 if batch else 5
        return reading

    monkeypatch.setattr(pipedream_planner, "now", now)
    times = measure_stages({**SMALL, "num_stages": 1})
    for key, kind in (("forward_time", 1), ("backward_time", 2), ("update_time", 3)):
        assert times[key] == pytest.approx([3 * kind])  # batches 1 to 5
    assert next(left, None) is None


def test_between_two_ops_of_a_stage_the_others_work(monkeypatch):
    """A microbatch, of the config's size, goes through all stages and back; then the next does."""
    seen, sizes = [], set()

    def noted(original):
        def method(self, op, *rest):
            seen.append(f"{op.stage}{op.kind}")
            sizes.update(len(x) for x in rest[:1] if op.kind == "F")
            return original(self, op, *rest)

        return method

    for method in (Worker.forward, Worker.backward, Worker.update):
        monkeypatch.setattr(Worker, method.__name__, noted(method))
    measure_stages({**SMALL, "num_stages": 3, "schedule": "pipedream"})
    assert sizes == {SMALL["batch_size"] // SMALL["num_microbatches"]}
    batch = 4 * ["0F", "1F", "2F", "2B", "1B", "0B"]
    in_row = [op for op in seen if op[1] != "U"]
    assert in_row == 6 * batch
    assert sorted(op for op in seen if op[1] == "U") == sorted(6 * ["0U", "1U", "2U"])


@pytest.mark.parametrize("network", ["residual", "transformer"])
def test_recompute_and_no_stashing_can_be_measured(network):
    for settings in ({"recompute": True}, {"weight_stashing": False}, {"momentum": 0.9}):
        times = measure_stages({**SMALL, "num_stages": 2, "network": network, **settings})
        assert min(map(min, times.values())) > 0


@pytest.mark.parametrize(("update", "message"), [(0, 0), (3, 0), (0, 0.5), (3, 0.5)])
def test_profile_simulates_with_what_it_measured(monkeypatch, capsys, update, message):
    def measured(config):
        forward = [1.0, 2.0, 1.0, 1.0] if config["num_stages"] == 4 else [1.0] * 12
        backward = [2 * time for time in forward]
        times = forward, backward, [update] * len(forward)
        return dict(zip(pipedream_planner.CLOCK.values(), times, strict=True))

    monkeypatch.setattr(pipedream_planner, "measure_stages", measured)
    monkeypatch.setattr(pipedream_planner, "time_message", lambda num_bytes: (message, ""))
    pipedream_planner.profile({**SMALL, "layers_per_stage": 3, "num_batches": 1})
    out = capsys.readouterr().out
    assert "stage 1, which takes 60% longer than the mean" in out
    one_gpu = 4 * 15 + 4 * update  # 4 microbatches of 3 + 6 + 3 + 3
    assert f"({one_gpu:.3g} ms)" in out
    # In a batch that is all of the run, only stage 0 updates when the other stages are done.
    naive = 4 * (15 + 6 * message) + update
    assert re.search(rf"naive +{naive:.3g} .* {one_gpu / naive:.2f}x\n", out)
    if not message:  # the bottleneck works without a break, the others fill and empty
        assert re.search(rf"gpipe +{4 * 6 + 9 + update:.3g} ", out)


def test_on_one_gpu_every_schedule_takes_all_computing_and_all_updates(monkeypatch, capsys):
    """Also with several stages on it: they share the time of its update."""
    times = {"forward_time": [1.0], "backward_time": [2.0], "update_time": [3.0]}
    monkeypatch.setattr(
        pipedream_planner,
        "measure_stages",
        lambda config: {key: time * config["num_stages"] for key, time in times.items()},
    )
    pipedream_planner.profile({**SMALL, "num_stages": 1, "layers_per_stage": 3})
    rows = capsys.readouterr().out.partition("speed-up over one device (15 ms)\n")[2].splitlines()
    assert len(rows) == 9
    assert all(re.search(r" 15 +100.0% +1.00x$", row) for row in rows)


def test_the_file_has_the_layers_and_the_planner_cuts_them(planner, free_messages, tmp_path):
    file = tmp_path / "my.csv"
    status, out, err = planner("profile", file, *FLAGS)
    assert (status, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    assert file.read_text().splitlines()[0] == ",".join([*COLUMNS, KEPT])
    layers = read_profile(file)
    assert [layer.name.count("TransformerEncoderLayer") for layer in layers] == [1, 1, 1, 1]
    assert layers[0].name.startswith("Embedding+")
    assert [layer.activation for layer in layers] == [8 * 64 * 12 * 4] * 3 + [8 * 10 * 4]
    stages = build_stages({**SMALL, "num_stages": 4, "network": "transformer"})
    numbers = [sum(w.numel() for w in stage.parameters()) for stage in stages]
    assert [layer.weights for layer in layers] == [4 * number for number in numbers]
    assert all(0 < layer.forward < 1 and 0 < layer.backward < 1 for layer in layers)
    shown = re.findall(r"^\d +(\S+) +(\S+) +\S+ +\w", out, re.M)
    assert [*map(float, shown[2])] == pytest.approx(
        [1000 * layers[2].forward, 1000 * layers[2].backward], abs=0.001
    )
    flags = ["--gpus", 3, "--bandwidth", 1e9, "--straight"]
    status, out, err = planner("plan", file, *flags)
    assert (status, err, out.splitlines()[0]) == (0, "", "Plan: 1-1-1")


@pytest.mark.parametrize("network", ["residual", "transformer"])
def test_a_plan_counts_the_bytes_that_exist_while_its_stages_train(
    planner, free_messages, tmp_path, network
):
    """The meter counts what is alive on a GPU, also its output and what the loss needs.

    (And pixels, which the transformer turns into tokens, and keeps as those.)
    """
    file, images = tmp_path / "my.csv", 8
    flags = [*FLAGS, "--network", network]
    assert planner("profile", file, *flags)[0] == 0
    layers = read_profile(file)
    plan = best_plan(layers, [4], [1e9], straight=True)
    sizes = {"num_stages": 4, "layers_per_stage": 1, "hidden_size": 12, "device": "cpu"}
    one_each = {"num_microbatches": 1, "batch_size": images, "num_batches": 6, "network": network}
    run = make_plan({**LAB_CONFIG, **sizes, **one_each})
    meter = MemoryMeter(run.schedule)
    meter.train(run)
    for stage, held in zip(plan.stages, meter.peak, strict=True):
        last = stage.last == 3
        output = stage.in_flight * layers[stage.last].activation * (not last)
        loss = last * (4 * images * 10 + 8 * images + 4 + 4)  # log-probabilities, labels, 2 scalars
        pixels = (stage.first == 0 and network == "transformer") * stage.in_flight * images * 64 * 4
        assert stage.bytes == held.weights + held.activations - output - loss - pixels


def test_the_forwards_that_recompute_repeats_are_said_to_count(planner, free_messages, tmp_path):
    again = "Busy time includes the forwards that recompute runs a second time."
    for flag in (True, False):
        _, out, _ = planner("profile", tmp_path / "my.csv", *FLAGS, "--recompute", flag)
        assert (again in out) == flag


def test_a_transformer_layer_keeps_what_the_formula_of_fit_says():
    layers = describe_layers({**SMALL, "network": "transformer", "num_stages": 3})
    images = SMALL["batch_size"] // SMALL["num_microbatches"]
    formula = 4 * images * 64 * count_activations(12, NUM_HEADS, NUM_HEADS, 12, mlp=1)
    assert layers[1][-1] == formula


def test_the_network_may_be_the_residual_one(planner, free_messages, tmp_path):
    file = tmp_path / "my.csv"
    assert planner("profile", file, *FLAGS, "--network", "residual")[::2] == (0, "")
    names = [layer.name for layer in read_profile(file)]
    assert names == ["Linear", "Residual", "Residual", "Linear"]
    assert [layer.activation for layer in read_profile(file)] == [8 * 12 * 4] * 3 + [8 * 10 * 4]


def test_of_many_layers_and_stages_some_are_shown(planner, free_messages):
    flags = ["--num_stages", 30, "--layers_per_stage", 1, "--hidden_size", 4, "--num_batches", 1]
    status, out, err = planner("profile", *flags, "--network", "residual")
    assert (status, err) == (0, "")
    assert "... (11 more layers)" in out
    assert "... (11 more stages)" in out


def test_a_message_between_two_processes_takes_time(planner):
    milliseconds, reason = time_message(1_000_000)
    assert 0 < milliseconds < 10_000
    assert reason == ""


def test_where_no_process_can_be_started_messages_are_free(planner, monkeypatch):
    def fails(*arguments, **settings):
        raise RuntimeError("a long story\n\nRuntimeError: no network here")

    monkeypatch.setattr(multiprocessing, "spawn", fails)
    status, out, err = planner("profile", *FLAGS)
    assert (status, err) == (0, "")
    assert "0.000 ms\n   Not measured, so taken as free: RuntimeError: no network here\n" in out


@pytest.mark.parametrize(
    "flags",
    [
        ["--network", "convolution"],
        ["--device", "cuda:99"],
        ["--device", "tpu"],
        ["--batch_size", 5],
        ["--num_stages", 0],
        ["--hidden_size", 10],
        ["--schedule", "gpipe"],
        ["--forward_time", 2],
        ["my.txt"],
        ["dir.csv"],
        ["/dev/null/my.csv"],
        [""],
        ["my.csv", "more.csv"],
    ],
    ids=lambda flags: " ".join(map(str, flags)),
)
def test_bad_input_gets_one_line_and_writes_nothing(
    planner, free_messages, tmp_path, monkeypatch, flags
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dir.csv").mkdir()
    status, out, err = planner("profile", *FLAGS, *flags)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert os.listdir(tmp_path) == ["dir.csv"]
    assert not os.listdir("dir.csv")


def test_training_and_random_numbers_of_the_caller_are_left_alone():
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    measure_stages({**SMALL, "num_stages": 2})
    assert torch.rand(1) == expected
