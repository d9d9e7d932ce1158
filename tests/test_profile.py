"""The clock: what profile measures, what it simulates with that, and the file for the planner."""

import re

import pytest
from torch import multiprocessing

from pipedream.commands import profile
from pipedream.planning import clock
from pipedream.planning.clock import CLOCK, describe_layers, measure_stages, time_message
from pipedream.planning.profiles import COLUMNS, read_profile
from pipedream.planning.search import best_partition
from pipedream.schedules.memory import MemoryMeter
from pipedream.schedules.plans import PLAN_CONFIG, make_plan
from pipedream_simple import RECOMPUTED, build_stages, train

SMALL = {**PLAN_CONFIG, "hidden_size": 12, "layers_per_stage": 1, "device": "cpu"}
FLAGS = ["--hidden_size", 12, "--num_stages", 2, "--layers_per_stage", 2, "--device", "cpu"]


@pytest.fixture
def measured(monkeypatch):
    """measured(message, {number of stages: [forward, backward, update]}) is then what it takes."""

    def fix(message=0.0, costs_of=()):
        monkeypatch.setattr(profile, "time_message", lambda num_bytes: (message, ""))
        times = {n: dict(zip(CLOCK.values(), costs_of[n], strict=True)) for n in costs_of}
        if times:
            monkeypatch.setattr(profile, "measure_stages", lambda c: times[c["num_stages"]])

    return fix


def test_times_are_medians_and_the_first_batch_does_not_count(monkeypatch):
    """A batch is F B F B F B F B U: 1, 2, 3 ms times its number squared; 5 s in the first."""
    reading = 0.0
    ops = [(kind, batch) for batch in range(6) for kind in 4 * [1, 2] + [3]]
    left = iter(ops)

    def now(device):
        nonlocal reading
        kind, batch = next(left)
        reading += kind * batch**2 / 1000 if batch else 5
        return reading

    monkeypatch.setattr(clock, "now", now)
    times = measure_stages({**SMALL, "num_stages": 1})
    for key, kind in (("forward_time", 1), ("backward_time", 2), ("update_time", 3)):
        assert times[key] == pytest.approx([9 * kind])  # batches 1 to 5
    assert next(left, None) is None


def test_between_two_ops_of_a_stage_the_others_work(monkeypatch):
    """A microbatch, of the config's size, goes through all stages and back; then the next does."""
    seen = []

    def noting(config, watch):
        size = config["batch_size"] // config["num_microbatches"]
        assert size == SMALL["batch_size"] // SMALL["num_microbatches"]
        train(config, watch=lambda op, worker: [seen.append(f"{op.stage}{op.kind}"), watch(op, 0)])

    monkeypatch.setattr(clock, "train", noting)
    measure_stages({**SMALL, "num_stages": 3, "schedule": "pipedream"})
    batch = 4 * ["0F", "1F", "2F", "2B", "1B", "0B"]
    assert [op for op in seen if op[1] != "U"] == 6 * batch
    assert sorted(op for op in seen if op[1] == "U") == sorted(6 * ["0U", "1U", "2U"])


@pytest.mark.parametrize(("update", "message"), [(0, 0), (3, 0), (0, 0.5), (3, 0.5)])
def test_profile_simulates_with_what_it_measured(measured, capsys, update, message):
    of_stages = [1.0, 2.0, 1.0, 1.0], [2.0, 4.0, 2.0, 2.0], [update] * 4
    measured(message, {4: of_stages, 12: [[1.0] * 12] * 3})
    profile.main({**SMALL, "layers_per_stage": 3, "num_batches": 1})
    out = capsys.readouterr().out
    assert "stage 1, which takes 60% longer than the mean" in out
    one_gpu = 4 * 15 + 4 * update  # 4 microbatches of 3 + 6 + 3 + 3
    assert f"({one_gpu:.3g} ms)" in out
    # In a batch that is all of the run, only stage 0 updates when the other stages are done.
    naive = 4 * (15 + 6 * message) + update
    assert re.search(rf"naive +{naive:.3g} .* {one_gpu / naive:.2f}x\n", out)
    if not message:  # the bottleneck works without a break, the others fill and empty
        assert re.search(rf"gpipe +{4 * 6 + 9 + update:.3g} ", out)


def test_on_one_gpu_every_schedule_takes_all_computing_and_all_updates(measured, capsys):
    """Also with several stages on it: they share the time of its update."""
    measured(0.0, {1: [[1.0], [2.0], [3.0]], 3: [[1.0] * 3] * 3})
    profile.main({**SMALL, "num_stages": 1, "layers_per_stage": 3})
    rows = capsys.readouterr().out.partition("speed-up over one device (15 ms)\n")[2].splitlines()
    assert sum(row.endswith("x") for row in rows) == 11  # all but those with two stages per GPU
    assert all(re.search(r" 15 +100.0% +1.00x$", row) for row in rows[:11])


def test_the_file_has_the_layers_and_the_planner_cuts_them(run, measured, tmp_path):
    measured()
    status, out, err = run("profile", "my.csv", *FLAGS)
    assert (status, err, RECOMPUTED in out) == (0, "", False)
    assert max(map(len, out.splitlines())) <= 80
    file = tmp_path / "my.csv"
    assert file.read_text().splitlines()[0] == ",".join(COLUMNS)
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
    status, out, err = run("plan", file, "--gpus", 3, "--bandwidth", 1e9, "--straight")
    assert (status, err, out.splitlines()[0]) == (0, "", "Plan: 1-1-1")
    stages = best_partition(layers, [3], [1e9], straight=True).stages
    firsts = " ".join(str(stage.first) for stage in stages)
    assert out.splitlines()[-1] == f"--processes 3 --cut {firsts}"


@pytest.mark.parametrize("network", ["residual", "transformer"])
def test_a_partition_counts_the_bytes_that_exist_while_its_stages_train(network):
    """The meter counts what is alive on a GPU, also its output and what the loss needs.

    (And pixels, which the transformer turns into tokens, and keeps as those.)
    """
    config, images = {**SMALL, "network": network, "num_microbatches": 1, "batch_size": 8}, 8
    layers = [layer._replace(forward=1.0) for layer in describe_layers(config)]
    partition = best_partition(layers, [4], [1e9], straight=True)
    plan = make_plan({**config, "num_batches": 6})
    meter = MemoryMeter(plan.schedule)
    meter.train(plan)
    for stage, held in zip(partition.stages, meter.peak, strict=True):
        last = stage.last == 3
        output = stage.in_flight * layers[stage.last].activation * (not last)
        loss = last * (4 * images * 10 + 8 * images + 4 + 4)  # log-probabilities, labels, 2 scalars
        pixels = (stage.first == 0 and network == "transformer") * stage.in_flight * images * 64 * 4
        assert stage.bytes == held.weights + held.activations - output - loss - pixels


def test_a_message_between_two_processes_takes_time():
    milliseconds, reason = time_message(1_000_000)
    assert (0 < milliseconds < 10_000, reason) == (True, "")


def test_where_no_process_can_be_started_messages_are_free(run, monkeypatch):
    def fails(*arguments, **settings):
        raise RuntimeError("a long story\n\nRuntimeError: no network here")

    monkeypatch.setattr(multiprocessing, "spawn", fails)
    flags = "--recompute", True, "--weight_stashing", False  # which can be measured
    status, out, err = run("profile", *FLAGS, *flags)
    assert (status, err) == (0, "")
    assert "0.000 ms\n   Not measured, so taken as free: RuntimeError: no network here\n" in out
    assert RECOMPUTED in out


BAD = "--network convolution", "--device cuda:99", "--batch_size 5", "--hidden_size 10"


@pytest.mark.parametrize(
    "flags", [*BAD, "--schedule gpipe", "my.txt", "dir.csv", "/dev/null/my.csv", "a.csv b.csv"]
)
def test_bad_input_gets_one_line_and_writes_nothing(run, measured, tmp_path, flags):
    measured()
    (tmp_path / "dir.csv").mkdir()
    status, out, err = run("profile", *FLAGS, *flags.split())
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert [*tmp_path.rglob("*")] == [tmp_path / "dir.csv"]
