"""Old gradients: the recurrence is that of tests/reference.py, the optimizers are PyTorch's."""

import math
import re
from functools import partial

import pytest
import torch
from PIL import Image
from reference import delayed_sgd
from test_lab import program  # noqa: F401
from torch import nn
from torch.nn.functional import cross_entropy

import pipedream_staleness
import pipedream_worth
from pipedream_lab import LAB_CONFIG, all_plans, make_plan
from pipedream_simple import CONFIG, Run, build_stages, make_batches, train
from pipedream_staleness import (
    NESTEROV,
    OPTIMIZERS,
    Ended,
    OptimizerWorker,
    Tuned,
    applies,
    batches_to,
    best_end,
    decided,
    delayed_training,
    momentum,
    price,
    sgd,
    try_rates,
    tuned,
)
from pipedream_worth import Curve, curves_of, loss_times

TINY = {**CONFIG, "device": "cpu", "num_batches": 9, "layers_per_stage": 2, "hidden_size": 12}
BY_STAGE, ON_ALL = [3, 2, 1, 0], [1, 1, 1, 1]


def assert_same_weights(stacked, run, expected):
    """The run's slice of every weight, against a list of one dict per stage."""
    for ours, theirs in zip(stacked, expected, strict=True):
        for name, w in theirs.items():
            assert (ours[name][run] - w).abs().max() < 1e-12


@pytest.mark.parametrize("delays", [[0] * 4, ON_ALL, BY_STAGE, [3] * 4])
@pytest.mark.parametrize("beta", [0, 0.9])
def test_every_run_of_the_stack_is_the_recurrence_of_the_papers(delays, beta):
    rates, seeds = [0.05, 0.2], [0, 1]
    optimizer = (lambda *args: momentum(*args, beta=beta)) if beta else sgd
    scaled = [rate / (1 - beta) for rate in rates]
    losses, weights = delayed_training(TINY, delays, optimizer, scaled, seeds, dtype=torch.float64)
    for run, (rate, seed) in enumerate((r, s) for r in rates for s in seeds):
        config = {**TINY, "learning_rate": rate, "momentum": beta, "seed": seed}
        expected, last = delayed_sgd(config, delays.__getitem__)
        assert losses.flatten(0, 1)[run].tolist() == pytest.approx(expected, abs=1e-12)
        assert_same_weights(weights, run, last)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("look_ahead", [False, True])
def test_without_delay_the_optimizers_are_those_of_pytorch(name, look_ahead):
    function, rates = OPTIMIZERS[name]
    rate, beta = rates[2], 0.95 if name == "Muon" else 0.9
    if name == "SGD" and look_ahead:
        pytest.skip("no momentum")

    def optimizer(g, state, batch):
        return function(g, state, batch, beta, look_ahead)

    _, weights = delayed_training(TINY, [0] * 4, optimizer, [rate], [0], dtype=torch.float64)
    network = nn.Sequential(*build_stages(TINY)).double()
    matrices = [w for w in network.parameters() if w.ndim == 2]
    biases = [w for w in network.parameters() if w.ndim == 1]
    if name == "Adam" and look_ahead:  # PyTorch's NAdam has another schedule: write it down
        references = [NesterovAdam(network.parameters(), rate)]
    elif name == "Adam":
        references = [torch.optim.Adam(network.parameters(), lr=rate)]
    elif name == "Muon":
        muon = torch.optim.Muon(
            matrices, lr=rate, momentum=beta, nesterov=look_ahead, weight_decay=0,
            adjust_lr_fn="match_rms_adamw",
        )  # fmt: skip
        references = [muon, torch.optim.Adam(biases, lr=rate)]
    else:
        settings = {"momentum": beta, "nesterov": look_ahead} if name == "momentum" else {}
        share = 1 - beta if settings else 1
        references = [torch.optim.SGD(network.parameters(), lr=rate * share, **settings)]
    for x, y in make_batches(TINY):
        network.zero_grad()
        cross_entropy(network(x.double()), y).backward()
        for reference in references:
            reference.step()
    worst = max(
        (ours[name][0] - w).abs().max()
        for ours, stage in zip(weights, network, strict=True)
        for name, w in stage.named_parameters()
    )
    # PyTorch's Muon rounds to bfloat16 inside, and an error of one step changes the next gradient.
    assert worst < (0.3 * rate if name == "Muon" else 1e-12)


class NesterovAdam:
    """Adam whose average also takes the share of the next one that is known."""

    def __init__(self, parameters, rate):
        self.parameters, self.rate, self.t = [*parameters], rate, 0
        self.m = [torch.zeros_like(w) for w in self.parameters]
        self.v = [torch.zeros_like(w) for w in self.parameters]

    @torch.no_grad()
    def step(self):
        self.t += 1
        for w, m, v in zip(self.parameters, self.m, self.v, strict=True):
            m.mul_(0.9).add_(0.1 * w.grad)
            v.mul_(0.999).add_(0.001 * w.grad**2)
            mean = (0.9 * m + 0.1 * w.grad) / (1 - 0.9**self.t)
            w -= self.rate * mean / ((v / (1 - 0.999**self.t)).sqrt() + 1e-8)


@pytest.mark.parametrize("name", ["SGD", "Adam"])
@pytest.mark.parametrize("stashing", [True, False])
def test_a_real_pipeline_with_one_microbatch_computes_the_same(name, stashing):
    """Without stashing, too: the trainer's backward meets new weights where this one's does."""
    optimizer, rate = OPTIMIZERS[name][0], OPTIMIZERS[name][1][2]
    config = {**TINY, "num_microbatches": 1, "weight_stashing": stashing, "learning_rate": rate}
    worker = partial(OptimizerWorker, optimizer)
    run = train(config, torch.float64, worker_class=worker)
    losses, weights = delayed_training(
        TINY, BY_STAGE, optimizer, [rate], [0], stashing=stashing, dtype=torch.float64
    )
    assert losses.flatten().tolist() == pytest.approx(run.losses, abs=1e-12)
    assert_same_weights(weights, 0, run.weights)


def trace_of(remedy, delay=2, **settings):
    """W(b + 1) of one weight, by delayed_training with the remedy."""
    return delayed_training(
        {**TINY, "num_stages": 1}, [delay], OPTIMIZERS["momentum"][0], [0.1], [0], remedy,
        dtype=torch.float64, **settings,
    )  # fmt: skip


@pytest.mark.parametrize("remedy", ["pipemare", "spectrain", "nesterov .9"])
def test_the_remedies_are_those_of_the_papers_written_down_again(remedy):
    """One network of one stage, a plain loop over a history of weights and steps."""
    config, delay, rate = {**TINY, "num_stages": 1}, 2, 0.1
    network = nn.Sequential(*build_stages(config)).double()
    names = dict(network.named_parameters())
    history, steps = [{k: w.detach().clone() for k, w in names.items()}], []
    u = {k: torch.zeros_like(w) for k, w in history[0].items()}
    losses = []
    for b, (x, y) in enumerate(make_batches(config)):
        version = max(0, b - delay)
        with torch.no_grad():
            for k, w in names.items():
                w.copy_(history[version][k])
                if remedy == "spectrain" and version > 0:
                    w -= delay * rate * steps[version - 1][k]
        network.zero_grad()
        loss = cross_entropy(network(x.double()), y)
        loss.backward()
        losses.append(loss.item())
        r = rate / delay ** (1 - min(1, b / (9 / 4))) if remedy == "pipemare" else rate
        u = {k: 0.9 * u[k] + 0.1 * w.grad for k, w in names.items()}
        ahead = {k: 0.9 * u[k] + 0.1 * w.grad for k, w in names.items()}
        steps.append(ahead if remedy == "nesterov .9" else u)
        history.append({k: w - r * steps[-1][k] for k, w in history[-1].items()})
    ours, _ = trace_of(remedy)
    assert ours.flatten().tolist() == pytest.approx(losses, abs=1e-12)
    if remedy != "nesterov .9":
        assert ours.flatten().tolist() != pytest.approx(trace_of("none")[0].flatten().tolist())


def test_batches_are_counted_until_the_mean_of_ten_is_below():
    losses = torch.tensor([[[9.0] * 10 + [0.0] * 10]])
    assert batches_to(losses, 5).tolist() == [[15]]  # five of each
    assert batches_to(losses, 9.1).tolist() == [[10]]
    assert batches_to(losses, -1).tolist() == [[torch.inf]]
    assert batches_to(losses[..., :9], 99).tolist() == [[torch.inf]]


def test_a_cell_ends_early_only_when_no_other_rate_can_win():
    never, late = torch.full((1, 30), 9.0), torch.tensor([[9.0] * 20 + [0.0] * 10])
    both = torch.stack([never, late])
    assert not decided(both[..., :24], 5)
    assert decided(both, 5)
    config, rates = {**TINY, "num_batches": 60}, OPTIMIZERS["SGD"][1]
    short, whole = (
        tuned(config, ON_ALL, sgd, rates, 1.0, range(3), whole=whole) for whole in (False, True)
    )
    others, _ = delayed_training(config, ON_ALL, sgd, rates, [1000, 1001, 1002])  # these choose
    assert short.rate == whole.rate == rates[batches_to(others, 1.0).sum(1).argmin()]
    losses, _ = delayed_training(config, ON_ALL, sgd, [short.rate], [0, 1, 2])
    assert short.batches == whole.batches == batches_to(losses, 1.0)[0].tolist()
    assert short.losses.shape[1] == max(short.batches)
    assert whole.losses.tolist() == losses[0].tolist()
    assert price(short.batches, short.batches)[0] == pytest.approx(1)


@pytest.mark.parametrize("best", [2.0**-9, 2.0**-3, 1.0, 2.0**9])
def test_the_grid_grows_until_the_best_rate_is_inside(best):
    def score(rates):
        asked.extend(rates)
        return torch.tensor([[1 + abs(math.log2(rate / best)), 1.0] for rate in rates])

    asked = []
    rate, scores = try_rates([2.0**-k for k in range(5)], score)
    assert rate == best
    assert min(scores) < best < max(scores)
    assert sorted(asked) == sorted({*asked}) == sorted(scores)
    asked.clear()
    assert try_rates([1.0, 0.5], lambda rates: score(rates) / 0)[1] == {
        r: [torch.inf] * 2 for r in asked
    }
    assert asked == [1.0, 0.5]  # no rate is better than another


def test_seeds_that_choose_a_rate_are_not_those_that_are_shown(monkeypatch):
    def note(config, delays, optimizer, rates, seeds, *rest, **settings):
        used.append({*seeds})
        return train_stack(config, delays, optimizer, rates, seeds, *rest, **settings)

    used, train_stack = [], pipedream_staleness.delayed_training
    monkeypatch.setattr(pipedream_staleness, "delayed_training", note)
    tuned(TINY, ON_ALL, sgd, [0.2, 0.1, 0.05], 2.0, range(2, 7))
    best_end(TINY, "SGD", range(2, 7), stashing=True)
    assert used.count({2, 3, 4, 5, 6}) == 2
    assert all(seeds.isdisjoint(range(2, 7)) for seeds in used if seeds != {2, 3, 4, 5, 6})


@pytest.mark.parametrize("schedule", ["gpipe", "pipedream", "interleaved"])
def test_a_loss_is_known_when_its_last_forward_ends_on_the_last_stage(schedule):
    plan = make_plan({**LAB_CONFIG, "schedule": schedule, "num_batches": 3})
    last = plan.config["num_stages"] - 1
    ends = [max(e.end for e in plan.events if e.op[:3] == (last, "F", 4 * b + 3)) for b in range(3)]
    assert loss_times(plan) == ends


def test_worth_and_staleness_run_and_write(program, tmp_path, monkeypatch):  # noqa: F811
    small = ["--num_batches", 20, "--layers_per_stage", 1, "--hidden_size", 12, "--out", tmp_path]
    status, out, _ = program("worth", *small, "--loss", 2.2, "--chunks_per_gpu", 1)
    assert status == 0
    assert max(map(len, out.splitlines()[:-1])) <= 80
    rows = [re.split("  +", line.strip()) for line in out.splitlines()[1:7]]
    assert [row[0] for row in rows] == ["naive", "gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2"]
    assert len({row[5] for row in rows}) == 1  # one training for all that flush
    monkeypatch.setattr(pipedream_staleness, "SEARCHED", [(4, 1, 12)])
    monkeypatch.setattr(
        pipedream_staleness, "OPTIMIZERS", {k: (f, r[:2]) for k, (f, r) in OPTIMIZERS.items()}
    )
    for flags in (["--quick"], ["--search"]):
        status, out, _ = program("staleness", *small, *flags, "--num_stages", 4)
        assert status == 0
        assert max(map(len, out.splitlines()[:-1])) <= 80
    # What the recurrence says of the run that is drawn, the trainer says, too.
    what, loss = re.search(
        r"^(\w+), .*,\nin the pipeline .*\n +with stashing +(\S+) ", out, re.M
    ).groups()
    assert re.search(rf"^{what} +{loss} ", out, re.M)
    for name in ("worth", "staleness", "stashing"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.width == 1400


def test_the_search_tells_a_difference_only_where_the_seeds_do_not_overlap(
    program,  # noqa: F811
    monkeypatch,
):
    where = {  # it ends, with two seeds: with stashing, and without
        "SGD": ([1, 2], [3, 4]),
        "momentum": ([2, 4], [1, 3]),
        "Adam": ([1, 3], [2, 9]),
        "Muon": ([2, 3], [1, 1.5]),
    }

    def ended(size, name, seeds, stashing):
        last = torch.tensor(where[name][not stashing]).view(2, 1)
        parts = [last + 50, last - 0.5, last + 0.5]
        return Ended(0.1, {}, torch.cat([part.expand(2, 10) for part in parts], 1))

    monkeypatch.setattr(pipedream_staleness, "SEARCHED", [(4, 1, 12)])
    monkeypatch.setattr(pipedream_staleness, "best_end", ended)
    monkeypatch.setattr(pipedream_staleness, "train", lambda *a, **b: Run([1.0] * 20, 0, [], []))
    monkeypatch.setattr(pipedream_staleness, "draw_and_write", lambda *a: "")
    _, out, _ = program("staleness", "--search")
    rows = [re.split("  +", line) for line in out.splitlines()[2:6]]
    assert [row[0] for row in rows] == [*where]
    assert [row[3:] for row in rows] == [["worse"], [], [], ["better"]]
    assert rows[0][1:3] == ["1.500 (1.000-2.000) at 0.1", "3.500 (3.000-4.000) at 0.1"]
    assert "\nSGD, 4 stages of 1 layer" in out


def test_worth_counts_the_seeds_on_which_a_schedule_is_ahead(program, monkeypatch):  # noqa: F811
    def two_curves(config, target):
        plans, _ = all_plans(config)
        gpipe, hero = (next(p for p in plans if p.name == name) for name in ("gpipe", "pipedream"))
        losses = torch.ones(4, 20)
        fresh = Curve(gpipe, [10.0 * b for b in range(1, 21)], Tuned(0.1, losses, [11, 12, 13, 16]))
        stale = Curve(hero, [8.0 * b for b in range(1, 21)], Tuned(0.1, losses, [13, 16, 20, 20]))
        return [fresh, stale], []

    monkeypatch.setattr(pipedream_worth, "curves_of", two_curves)
    monkeypatch.setattr(pipedream_worth, "draw_and_write", lambda *a: "")
    _, out, _ = program("worth")
    cells = [re.split("  +", line) for line in out.splitlines()[1:3]]
    assert [row[6:] for row in cells] == [["130 (110-160)", "2"], ["138 (104-160)"]]  # 160 = 160


def test_what_worth_trains_is_what_the_pipeline_trains_with_that_learning_rate():
    config = {**LAB_CONFIG, **TINY, "momentum": 0.9, "num_batches": 30, "chunks_per_gpu": 1}
    curves, _ = curves_of(config, 2.0)
    curve = next(c for c in curves if c.plan.name == "pipedream")
    flags = {**TINY, "momentum": 0.9, "num_batches": 30, "learning_rate": curve.tuned.rate}
    assert curve.tuned.losses[0].tolist() == pytest.approx(train(flags).losses, abs=1e-3)
    broken = next(c for c in curves if "no stashing" in c.plan.name)
    run = train({**flags, "weight_stashing": False})
    assert broken.tuned.losses[0].tolist() == pytest.approx(run.losses, abs=1e-3)
    assert broken.tuned.losses[0].tolist() != pytest.approx(train(flags).losses, abs=1e-3)


def test_names_of_remedies_and_where_they_apply():
    assert {name: float(name.split()[1]) for name in NESTEROV} == NESTEROV
    for remedy, delays in (("pipemare", ON_ALL), ("spectrain", [0] * 4)):
        losses = [
            delayed_training(TINY, delays, momentum, [0.1], [0], each)[0].tolist()
            for each in ("none", remedy)
        ]
        assert losses[0] == losses[1]
        assert not applies("Adam", max(delays), remedy)
        assert applies("Adam", max(delays) + 1, remedy)


@pytest.mark.parametrize(
    "flags",
    [["worth", "--loss", 0], ["worth", "--loss", "x"], ["worth", "--momentum", 1],
     ["worth", "--loss", "True"], ["worth", "--out", "/proc/x"], ["papers", "--num_stages", 4],
     ["worth", "--out", 300 * "a"],
     ["staleness", "--num_batches", 0], ["staleness", "--quick", "--out", "/dev/null/x"],
     ["staleness", "--num_stages", 1], ["staleness", "--quick", "--search"],
     ["staleness", "--learning_rate", 0.1], ["staleness", "--num_microbatches", 2]],
)  # fmt: skip
def test_bad_input_gets_one_line(program, monkeypatch, flags):  # noqa: F811
    for module in (pipedream_staleness, pipedream_worth):
        monkeypatch.setattr(module, "tuned", lambda *a, **b: pytest.fail("too late"))
    status, out, err = program(*flags)
    assert (status, out, err.count("\n")) == (2, "", 1)
