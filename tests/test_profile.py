"""The clock: what profile measures of the reader's layers, and the file for the planner."""

import itertools
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from ranks import in_processes
from torch import nn

from pipedream.commands import profile
from pipedream.commands.profile import load
from pipedream.planning import clock
from pipedream.planning.clock import CLOCK, Network, measure_stages, time_layers
from pipedream.planning.profiles import COLUMNS, Layer, read_profile, write_chain
from pipedream.planning.search import best_partition
from pipedream.schedules.memory import MemoryMeter
from pipedream.schedules.plans import PLAN_CONFIG, make_plan
from pipedream_simple import UserError, train

SMALL = {**PLAN_CONFIG, "hidden_size": 12, "layers_per_stage": 1, "device": "cpu"}
CPU = torch.device("cpu")


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
    times = measure_stages({**SMALL, "num_stages": 3, "schedule": "pipedream"})
    batch = 4 * ["0F", "1F", "2F", "2B", "1B", "0B"]
    assert [op for op in seen if op[1] != "U"] == 6 * batch
    assert sorted(op for op in seen if op[1] == "U") == sorted(6 * ["0U", "1U", "2U"])
    assert {*times} == {*CLOCK.values()}


# ---------------------------------------------------------------------- layers that take a time


class Takes(torch.autograd.Function):
    """Turns the hands of the clock, instead of taking time."""

    @staticmethod
    def forward(ctx, x, forward, backward):
        ctx.backward_time = backward
        Hands.time += forward
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        Hands.time += ctx.backward_time
        return gradient, None, None


class Hands(nn.Module):
    time = 0.0

    def __init__(self, *times):
        super().__init__()
        self.weight, self.times = nn.Parameter(torch.ones(())), times

    def forward(self, x):
        f, i, w = self.times
        return Takes.apply(x, f, i) * Takes.apply(self.weight, 0, w)


class Slow(torch.optim.SGD):
    def step(self):
        Hands.time += 0.5


def model_of(*layers, loss=0.25):
    def my_loss(output, target):
        Hands.time += loss
        return output.sum()

    functions = {"my_loss": my_loss, "my_optimizer": lambda w: Slow(w, 0.1), "CLIP": 1.0}
    return SimpleNamespace(LAYERS=[*layers], **functions)


@pytest.fixture
def hands(monkeypatch):
    monkeypatch.setattr(clock, "now", lambda device: Hands.time)
    monkeypatch.setattr(clock, "ALONE", 0)  # this one never works


def draw(number):
    Hands.time += 0.125


def test_every_layer_is_given_the_time_that_it_takes(hands):
    """Of F, I, W: 1 2 4, 8 16 32 and 64 128 256 s; the loss is the last layer's."""
    times = [(1, 2, 4), (8, 16, 32), (64, 128, 256)]
    model = model_of(*(lambda t=t: Hands(*t) for t in times), nn.Flatten)
    x = torch.ones(2, 3)
    layers, spread = time_layers(Network(model, x, x, CPU), draw)
    found = [(c.forward, c.backward, c.input_gradient, c.weight_gradient) for c in layers]
    assert found[0] == (1, 4, 0, 4)  # nobody waits for the gradient of the first layer's input
    assert found[1:3] == [(8, 48, 16, 32), (64, 384, 128, 256)]
    assert found[3] == (0.25, 0, 0, 0)
    assert [layer.update for layer in layers] == [0.625, 0.5, 0.5, 0]  # 0.125: to draw a batch
    assert [layer.activation for layer in layers] == [24, 24, 24, 4]
    assert spread == [0] * 4


def test_layers_may_be_frozen_work_in_place_or_return_their_input(hands):
    """A frozen front has no backward; the first layer that is trained has one for its weights."""

    def frozen():
        return Hands(1, 2, 4).requires_grad_(False)

    layers = [frozen, nn.Identity, lambda: Hands(1, 2, 4), lambda: nn.ReLU(inplace=True), frozen]
    x = torch.ones(2)
    found, _ = time_layers(Network(model_of(*layers), x, x, CPU), draw)
    assert [layer.forward for layer in found] == [1, 0, 1, 0, 1.25]
    assert [layer.backward for layer in found] == [0, 0, 4, 0, 2]  # W alone
    assert [layer.update for layer in found] == [0.125, 0, 0.5, 0, 0]


def test_gradients_are_clipped_before_an_update(hands):
    norms = []

    class Noting(torch.optim.SGD):
        def step(self):
            weights = [w for group in self.param_groups for w in group["params"]]
            norms.append(max(w.grad.norm().item() for w in weights if w.grad is not None))

    model, x = model_of(lambda: Hands(1, 1, 1)), torch.full((4,), 10.0)
    model.my_optimizer, model.CLIP = lambda weights: Noting(weights, 0.1), 0.5
    time_layers(Network(model, x, x, CPU), draw)
    assert norms
    assert max(norms) <= 0.5


def test_layers_train_and_compute_in_bfloat16_where_that_is_asked(hands):
    seen = set()

    class Noting(nn.Linear):
        def forward(self, x):
            x = super().forward(x)
            seen.add((self.training, x.dtype))
            return x

    x = torch.ones(2, 3)
    for bf16, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        seen.clear()
        Network(model_of(lambda: Noting(3, 3)), x, x, CPU, bf16).round(halves=False, update=True)
        assert seen == {(True, dtype)}


def test_the_spread_is_half_of_the_distance_between_the_quartiles(hands):
    """F takes 1 or 3 s, in turn; the loss 0.25: so 2.25 in the mean, and 1 to each side."""
    times = itertools.cycle([1, 1, 3, 3])

    class Varies(Hands):
        def forward(self, x):
            self.times = next(times), 0, 0
            return super().forward(x)

    x = torch.ones(2)
    _, spread = time_layers(Network(model_of(lambda: Varies(1, 1, 1)), x, x, CPU), draw)
    assert spread == pytest.approx([1 / 2.25], rel=0.05)


def time_on_a_rank():
    """Rank 1 is three times as slow; a message takes as many ms as it has bytes."""
    clock.now = lambda device: Hands.time
    clock.ALONE, clock.measure_message = 0, lambda x, work: float(x.nbytes)
    slow = 1 + 2 * dist.get_rank()
    layers = [lambda: Hands(slow, 0, 2 * slow), lambda: nn.Linear(2, 4), nn.Flatten]
    model, x = model_of(*layers, loss=0), torch.ones(1, 2)
    return [layer[:] for layer in time_layers(Network(model, x, x, CPU), draw)[0]]


def test_ranks_agree_on_the_mean_and_each_size_has_its_message():
    first, second = in_processes(2, time_on_a_rank)
    assert first == second
    layers = [Layer(*cells) for cells in first]
    assert (layers[0].forward, layers[0].weight_gradient) == (2, 4)
    assert [layer.message for layer in layers] == [0.008, 0.016, 0]


def test_the_weights_stay_what_they_are(hands):
    model = model_of(lambda: Hands(1, 1, 1), lambda: Hands(1, 1, 1))
    model.my_optimizer = lambda weights: torch.optim.AdamW(weights, lr=0.1)
    network = Network(model, torch.ones(2), torch.ones(2), CPU)
    time_layers(network, draw)
    assert all(abs(layer.weight.item() - 1) < 1e-6 for layer in network.layers)


def test_what_does_not_settle_is_refused(hands, monkeypatch):
    """Each forward takes longer than the one before; or only the first ones are faster."""

    class Slower(Hands):
        def forward(self, x):
            self.times = 0.1 + Hands.time, 0.1, 0.1
            return super().forward(x)

    Hands.time = 0.0
    x, told = torch.ones(2), []
    with pytest.raises(ValueError, match=r"too noisy to trust.* differ by \d+%"):
        time_layers(Network(model_of(lambda: Slower(1, 1, 1)), x, x, CPU), draw, told.append)
    waits = iter([1.0] * 7)  # two rounds warm up, five are fast

    class Settles(Hands):
        def forward(self, x):
            self.times = next(waits, 1.5), 0, 0
            return super().forward(x)

    monkeypatch.setattr(clock, "MOST", 1e9)
    layers, _ = time_layers(Network(model_of(lambda: Settles(1, 1, 1)), x, x, CPU), draw)
    assert 1.65 < layers[0].forward < 1.75  # the loss included


def test_they_must_agree_three_times_in_a_row(hands, monkeypatch):
    said = iter([0.0, 0.0, 0.2, 0.0, 0.0, 0.0])
    monkeypatch.setattr(clock, "apart", lambda rounds: next(said))
    x = torch.ones(2)
    Network(model_of(lambda: Hands(0.1, 0, 0)), x, x, CPU).rounds(lambda line: None)
    assert next(said, None) is None


def test_processes_that_did_not_have_a_core_each_are_refused(hands, monkeypatch):
    """Rounds that all take as long may still be twice too long."""
    x = torch.ones(2)
    for part, good in ((0.9, True), (0.8, False)):
        monkeypatch.setattr(clock, "ALONE", 0.85)
        monkeypatch.setattr(clock.time, "process_time", lambda part=part: part * Hands.time)
        network = Network(model_of(lambda: Hands(1, 1, 1)), x, x, CPU)
        if good:
            time_layers(network, draw)
        else:
            with pytest.raises(ValueError, match="had a core for 80% of the time"):
                time_layers(network, draw)


@pytest.mark.parametrize("change", ["layer", "my_loss", "LAYERS", "my_optimizer"])
def test_what_the_readers_functions_raise_is_a_line(hands, change):
    def fails(*_):
        raise KeyError("sum\nthing")

    model, x = model_of(lambda: Hands(1, 1, 1), lambda: Hands(1, 1, 1)), torch.ones(2)
    if change == "layer":
        model.LAYERS[1] = lambda: type("Fails", (nn.Module,), {"forward": fails})()
    else:
        vars(model)[change] = [fails] if change == "LAYERS" else fails
    with pytest.raises(UserError, match=change) as error:
        time_layers(Network(model, x, x, CPU), draw)
    assert "KeyError" in str(error.value)
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------- the command

MODEL = """
import torch
from torch import nn
LAYERS = [lambda: nn.Linear(64, 128), nn.Tanh, lambda: nn.Linear(128, 8), lambda: nn.Linear(8, 4)]
TIED, SEED, CLIP, EVAL_EVERY, SAVE_EVERY = [], 0, 1.0, 1e9, 1e9
def my_batch(number, train=True):
    return torch.ones(32, 64), torch.zeros(32, 4), 32
def my_loss(output, target):
    return ((output - target) ** 2).sum()
def my_optimizer(weights):
    return torch.optim.SGD(weights, lr=0.1)
def my_rate(step, steps):
    return 1.0
if __name__ == "__main__":
    import sys
    sys.path.insert(0, EXAMPLES)
    from pipeline import main
    main(sys.modules[__name__])
""".replace("EXAMPLES", repr(str(ROOT / "examples")))


def test_the_command_measures_the_planner_cuts_and_the_template_trains(run, tmp_path, monkeypatch):
    """On a machine that is busy, so numbers that vary are taken here."""
    noisy = "from pipedream.planning import clock\n"
    noisy += "clock.EACH, clock.MOST, clock.APART, clock.ALONE = 0.1, 1, 9, 0\n"
    (tmp_path / "mine.py").write_text(MODEL.replace("import torch\n", f"import torch\n{noisy}", 1))
    status, out, err = run("profile", "mine.py", "mine.csv", process=True)
    assert (status, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    layers = read_profile(tmp_path / "mine.csv")
    assert [layer.name for layer in layers] == ["Linear", "Tanh", "Linear", "Linear"]
    assert [layer.activation for layer in layers] == [4 * 4 * n for n in (128, 128, 8)] + [4]
    assert [layer.weights for layer in layers] == [4 * n for n in (128 * 65, 0, 8 * 129, 4 * 9)]
    assert all(0 < layer.message < 10 for layer in layers[:-1])
    assert layers[0].message == layers[1].message  # as many bytes
    assert layers[-1].message == layers[0].input_gradient == 0
    assert all(layer.forward > 0 and layer.backward > 0 for layer in layers)
    assert "now python -m pipedream plan mine.csv --gpus 2 --straight" in out
    status, out, err = run("plan", "mine.csv", "--gpus", 2, "--straight")
    assert (status, err) == (0, "")
    flags = out.splitlines()[-1].split()
    assert flags[:2] == ["--processes", "2"]
    done = subprocess.run(
        [sys.executable, "mine.py", *flags, "--steps", "2"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "step 1: loss" in done.stdout


def test_a_file_says_all_that_was_measured(tmp_path):
    halves = {"input_gradient": 0.003, "weight_gradient": 0.004, "update": 0.005, "message": 6e-6}
    layers = [Layer("Linear", 0.001, 0.002, 8, 16, 24, **halves)]
    (tmp_path / "my.csv").write_text(write_chain(layers))
    assert (tmp_path / "my.csv").read_text().splitlines()[0] == ",".join(COLUMNS)
    assert read_profile(tmp_path / "my.csv")[0] == pytest.approx(layers[0], nan_ok=True)


@pytest.mark.parametrize("network", ["residual", "transformer"])
def test_a_partition_counts_the_bytes_that_exist_while_its_stages_train(network):
    """The meter counts what is alive on a GPU, also its output and the labels of the loss.

    (And pixels, which the transformer turns into tokens, and keeps as those.)
    """
    config, images = {**SMALL, "network": network, "schedule": "1f1b"}, 8
    model = load(config, None)
    x, y = (part[:images] for part in model.my_batch(0)[:2])
    layers = [layer._replace(forward=1.0) for layer in Network(model, x, y, CPU).describe()]
    partition = best_partition(layers, [4], [1e9], straight=True)
    plan = make_plan(config)
    meter = MemoryMeter(plan.schedule)
    meter.train(plan)
    for stage, held in zip(partition.stages, meter.peak, strict=True):
        last = stage.last == 3
        output = stage.in_flight * layers[stage.last].activation * (not last)
        loss = last * 4
        pixels = (stage.first == 0 and network == "transformer") * stage.in_flight * images * 64 * 4
        assert stage.bytes == held.weights + held.activations - output - loss - pixels


@pytest.mark.parametrize("moment", ["Starting", "Measuring", "rounds"])
def test_ctrl_c_ends_all_processes_with_a_word(tmp_path, moment):
    noisy = "from pipedream.planning import clock\nclock.AGREED = 0\n"
    (tmp_path / "mine.py").write_text(MODEL.replace("import torch\n", f"import torch\n{noisy}", 1))
    process = subprocess.Popen(
        [sys.executable, "-m", "pipedream", "profile", "mine.py", "mine.csv"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for line in process.stdout:
        if moment in line:
            break
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "pipedream profile: stopped\n")
    assert not (tmp_path / "mine.csv").exists()
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


BAD = {
    "mine.py x.txt": r"x\.txt.*must end in \.csv",
    "mine.py dir.csv": r"dir\.csv.*not a regular file",
    "mine.py /dev/null/my.csv": "not a folder",
    "mine.py --hidden_size 32": "hidden_size=32 is not for mine.py",
    "mine.py --num_microbatches 5": "num_microbatches=5 must divide its 32 rows",
    "mine.py --processes 0": "processes=0 must be",
    "mine.py --processes two": "processes='two' must be",
    "mine.py --device cuda:99": "device='cuda:99'",
    "none.py a.csv": "none.py",
    "lossless.py a.csv": "must have my_loss, as",
    "--network convolution": "network",
    "--batch_size 5": "batch_size=5",
    "--schedule gpipe": "--schedule",
    "a.csv b.csv": "a.csv",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_gets_one_line_and_writes_nothing(run, tmp_path, monkeypatch, flags):
    monkeypatch.setattr(profile, "launch", lambda *_: pytest.fail("it has started processes"))
    (tmp_path / "dir.csv").mkdir()
    (tmp_path / "mine.py").write_text(MODEL)
    (tmp_path / "lossless.py").write_text(MODEL.replace("def my_loss", "def loss"))
    before = {*tmp_path.rglob("*.*")}
    status, out, err = run("profile", *flags.split())
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert re.search(BAD[flags], err)
    assert {path for path in tmp_path.rglob("*.*") if "__pycache__" not in str(path)} == before
