"""Old gradients: the recurrence is that of tests/reference.py, the optimizers are PyTorch's."""

import math
import re
from functools import partial

import pytest
import torch
from PIL import Image
from reference import delayed_sgd
from torch import nn
from torch.nn.functional import cross_entropy

from pipedream.backstage.measures import staleness as stale
from pipedream.commands import search, staleness, worth
from pipedream.schedules.plans import PLAN_CONFIG, all_plans, make_plan
from pipedream.schedules.rows import LIBRARY
from pipedream.staleness import delays, tuning
from pipedream.staleness.delays import OPTIMIZERS, Training, delayed_training, momentum, sgd
from pipedream.staleness.tuning import batches_to, fastest
from pipedream_simple import CONFIG, Run, build_schedule, build_stages, make_batches, train

TINY = {**CONFIG, "device": "cpu", "num_batches": 9, "layers_per_stage": 2, "hidden_size": 12}
BY_STAGE, ON_ALL = [3, 2, 1, 0], [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("name", "schedule", "in_batch", "sync"),
    [("0", "1f1b", 4, False), ("1", "pipedream", 4, True),
     ("3 to 0", "pipedream", 1, False), ("3", "pipedream", 1, True)],
)  # fmt: skip
def test_the_delays_are_those_of_the_schedules(name, schedule, in_batch, sync):
    config = {**TINY, "schedule": schedule, "num_microbatches": in_batch, "vertical_sync": sync}
    assert delays.delay_table(4)[name] == stale(build_schedule(config), in_batch)


def train_delayed(training, rates, seeds=(0,)):
    return delayed_training(training, rates, [*seeds], dtype=torch.float64)


def assert_same_weights(stacked, run, expected, within=1e-12):
    """The run's slice of every weight, against a list of one dict per stage."""
    for ours, theirs in zip(stacked, expected, strict=True):
        for name, w in theirs.items():
            assert (ours[name][run] - w).abs().max() < within


@pytest.mark.parametrize("by_stage", [[0] * 4, ON_ALL, BY_STAGE, [3] * 4])
@pytest.mark.parametrize("beta", [0, 0.9])
def test_every_run_of_the_stack_is_the_recurrence_of_the_papers(by_stage, beta):
    rates, seeds = [0.05, 0.2], [0, 1]
    optimizer = partial(momentum, beta=beta) if beta else sgd
    scaled = [rate / (1 - beta) for rate in rates]
    losses, weights = train_delayed(Training(TINY, by_stage, optimizer), scaled, seeds)
    for run, (rate, seed) in enumerate((r, s) for r in rates for s in seeds):
        config = {**TINY, "learning_rate": rate, "momentum": beta, "seed": seed}
        expected, last = delayed_sgd(config, by_stage.__getitem__)
        assert losses.flatten(0, 1)[run].tolist() == pytest.approx(expected, abs=1e-12)
        assert_same_weights(weights, run, last)


class NesterovAdam:
    """Adam whose mean takes the known share of the next one. (NAdam has another schedule.)"""

    def __init__(self, weights, rate):
        self.weights, self.rate, self.t = weights, rate, 0
        self.moments = [(torch.zeros_like(w), torch.zeros_like(w)) for w in weights]

    @torch.no_grad()
    def step(self):
        self.t += 1
        for w, (m, v) in zip(self.weights, self.moments, strict=True):
            m.mul_(0.9).add_(0.1 * w.grad)
            v.mul_(0.999).add_(0.001 * w.grad**2)
            mean = (0.9 * m + 0.1 * w.grad) / (1 - 0.9**self.t)
            w -= self.rate * mean / ((v / (1 - 0.999**self.t)).sqrt() + 1e-8)


def references(name, look_ahead, weights, rate):
    """The optimizers that do the same."""
    if name == "SGD":
        return [torch.optim.SGD(weights, lr=rate)]
    if name == "momentum":
        return [torch.optim.SGD(weights, lr=0.1 * rate, momentum=0.9, nesterov=look_ahead)]
    if name == "Adam":
        return [NesterovAdam(weights, rate) if look_ahead else torch.optim.Adam(weights, lr=rate)]
    matrices, biases = ([w for w in weights if w.ndim == ndim] for ndim in (2, 1))
    settings = {"momentum": 0.95, "weight_decay": 0, "adjust_lr_fn": "match_rms_adamw"}
    muon = torch.optim.Muon(matrices, lr=rate, nesterov=look_ahead, **settings)
    return [muon, torch.optim.Adam(biases, lr=rate)]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("look_ahead", [False, True])
def test_without_delay_the_optimizers_are_those_of_pytorch(name, look_ahead):
    function, rates = OPTIMIZERS[name]
    optimizer = partial(function, look_ahead=look_ahead)  # with the beta that it has
    _, ours = train_delayed(Training(TINY, [0] * 4, optimizer), [rates[2]])
    network = nn.Sequential(*build_stages(TINY)).double()
    theirs = references(name, look_ahead, [*network.parameters()], rates[2])
    for x, y in make_batches(TINY):
        network.zero_grad()
        cross_entropy(network(x.double()), y).backward()
        for optimizer in theirs:
            optimizer.step()
    # PyTorch's Muon rounds to bfloat16 inside, and an error of one step changes the next gradient.
    within = 0.3 * rates[2] if name == "Muon" else 1e-12
    assert_same_weights(ours, 0, [dict(stage.named_parameters()) for stage in network], within)


@pytest.mark.parametrize("name", ["SGD", "Adam"])
@pytest.mark.parametrize("stashing", [True, False])
def test_a_real_pipeline_with_one_microbatch_computes_the_same(name, stashing):
    """Without stashing, too: the trainer's backward meets new weights where this one's does."""
    optimizer, rate = OPTIMIZERS[name][0], OPTIMIZERS[name][1][2]
    config = {**TINY, "num_microbatches": 1, "weight_stashing": stashing, "learning_rate": rate}
    run = train(config, torch.float64, worker_class=partial(delays.OptimizerWorker, optimizer))
    losses, weights = train_delayed(Training(TINY, BY_STAGE, optimizer, "none", stashing), [rate])
    assert losses.flatten().tolist() == pytest.approx(run.losses, abs=1e-12)
    assert_same_weights(weights, 0, run.weights)


@pytest.mark.parametrize("remedy", ["pipemare", "spectrain", "nesterov .9", "nesterov .99"])
def test_the_remedies_are_those_of_the_papers_written_down_again(remedy):
    """One network of one stage, a plain loop over a history of weights and steps."""
    config, delay, rate = {**TINY, "num_stages": 1}, 2, 0.1
    beta = float(remedy.split()[1]) if remedy in delays.NESTEROV else 0.9
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
        u = {k: beta * u[k] + (1 - beta) * w.grad for k, w in names.items()}
        ahead = {k: beta * u[k] + (1 - beta) * w.grad for k, w in names.items()}
        steps.append(ahead if remedy in delays.NESTEROV else u)
        history.append({k: w - r * steps[-1][k] for k, w in history[-1].items()})
    ours, none = (
        train_delayed(Training(config, [delay], momentum, each), [rate])[0].flatten().tolist()
        for each in (remedy, "none")
    )
    assert ours == pytest.approx(losses, abs=1e-12)
    assert ours != pytest.approx(none)


def test_remedies_are_tried_where_they_change_something():
    for remedy, delay in (("pipemare", 1), ("spectrain", 0)):
        cells = (Training(TINY, [delay] * 4, momentum, each) for each in ("none", remedy))
        none, ours = (train_delayed(cell, [0.1])[0].tolist() for cell in cells)
        assert none == ours
        assert not delays.applies("Adam", delay, remedy)
        assert delays.applies("Adam", delay + 1, remedy)


def test_batches_are_counted_until_the_mean_of_ten_is_below():
    losses = torch.tensor([[[9.0] * 10 + [0.0] * 10]])
    for target, number in ((5, 15), (9.1, 10), (-1, torch.inf)):  # 15: five of each
        assert batches_to(losses, target).tolist() == [[number]]
    assert batches_to(losses[..., :9], 99).tolist() == [[torch.inf]]


def test_a_cell_ends_early_only_when_no_other_rate_can_win():
    never, late = torch.full((1, 30), 9.0), torch.tensor([[9.0] * 20 + [0.0] * 10])
    both = torch.stack([never, late])
    assert not tuning.decided(both[..., :24], 5)
    assert tuning.decided(both, 5)
    training, rates = Training({**TINY, "num_batches": 60}, ON_ALL, sgd), OPTIMIZERS["SGD"][1]
    rate, short = fastest(training, rates, range(3), 1.0)
    others, _ = delayed_training(training, rates, [1000, 1001, 1002])  # these choose
    assert rate == rates[batches_to(others, 1.0).sum(1).argmin()]
    losses, _ = delayed_training(training, [rate], [0, 1, 2])
    batches = batches_to(losses, 1.0)[0].tolist()
    assert short.shape[1] == max(batches)
    assert short.tolist() == losses[0, :, : short.shape[1]].tolist()
    assert batches_to(short, 1.0).tolist() == batches
    assert staleness.price(batches, batches)[0] == pytest.approx(1)


@pytest.mark.parametrize("best", [2.0**-9, 2.0**-3, 1.0, 2.0**9])
def test_the_grid_grows_until_the_best_rate_is_inside(best):
    def score(rates):
        asked.extend(rates)
        return torch.tensor([[1 + abs(math.log2(rate / best)), 1.0] for rate in rates])

    asked = []
    rate, scores = tuning.try_rates([2.0**-k for k in range(5)], score)
    assert rate == best
    assert min(scores) < best < max(scores)
    assert sorted(asked) == sorted({*asked}) == sorted(scores)
    asked.clear()
    _, scores = tuning.try_rates([1.0, 0.5], lambda rates: score(rates) / 0)
    assert scores == {1.0: [torch.inf] * 2, 0.5: [torch.inf] * 2}
    assert asked == [1.0, 0.5]  # no rate is better than another


def test_seeds_that_choose_a_rate_are_not_those_that_are_shown(monkeypatch):
    def note(training, rates, seeds, *rest, **settings):
        used.append({*seeds})
        return delayed_training(training, rates, seeds, *rest, **settings)

    used, shown = [], {2, 3, 4, 5, 6}
    monkeypatch.setattr(tuning, "delayed_training", note)
    fastest(Training(TINY, ON_ALL, sgd), [0.2, 0.1, 0.05], range(2, 7), 2.0)
    search.best_end(TINY, "SGD", range(2, 7), stashing=True)
    assert used.count(shown) == 2
    assert len(used) >= 4
    assert all(seeds.isdisjoint(shown) for seeds in used if seeds != shown)


@pytest.mark.parametrize("schedule", ["gpipe", "pipedream", "interleaved", "zb-v", "dualpipe-v"])
def test_a_loss_is_known_when_its_last_forward_ends_on_the_last_stage(schedule):
    sizes = {"num_batches": 3, "num_microbatches": 8, "layers_per_stage": 6}
    plan = make_plan({**PLAN_CONFIG, "schedule": schedule, **sizes})
    last = plan.config["num_stages"] - 1
    ends = [max(e.end for e in plan.events if e.op[:3] == (last, "F", 8 * b + 7)) for b in range(3)]
    assert worth.loss_times(plan) == ends


SMALL = {"layers_per_stage": 1, "hidden_size": 12}


def flags_of(**config):
    return ["--out", "pictures", *(f"--{key}={value}" for key, value in config.items())]


def check_output(result, folder, picture):
    """A text that fits, and the picture that its last line names."""
    assert result.status == 0, result.err
    *lines, last = result.out.splitlines()
    assert max(map(len, lines)) <= 80
    assert last.startswith(f"pictures/{picture}: ")
    with Image.open(folder / "pictures" / picture) as image:
        assert image.width == 1400


def test_worth_runs_and_writes(run, tmp_path, monkeypatch):
    def note(config, delays, *rest):
        trained.append(delays)
        return train_delayed(config, delays, *rest)

    trained, train_delayed = [], worth.train_delayed
    monkeypatch.setattr(worth, "train_delayed", note)
    sizes = {"num_batches": 20, "num_microbatches": 8, "layers_per_stage": 2, "chunks_per_gpu": 2}
    result = run("worth", "--loss", 2.2, *flags_of(hidden_size=12, **sizes))
    check_output(result, tmp_path, "worth.png")
    assert "left out" not in result.out
    rows = [re.split("  +", line.strip()) for line in result.out.splitlines()[1:14]]
    assert {row[0] for row in rows} == {*LIBRARY, "vertical sync", "no stashing"}
    assert trained == [[0, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]  # one for all that flush
    held = {row[0]: row[2] for row in rows}
    in_closed_form = {"zb-v": "4", "dualpipe-v": "4.5", "interleaved": "5.5", "looped-bfs": "8"}
    assert held.items() >= in_closed_form.items()


def test_staleness_and_search_run_and_write(run, tmp_path, monkeypatch):
    for name, (function, rates) in OPTIMIZERS.items():
        monkeypatch.setitem(OPTIMIZERS, name, (function, rates[1:4]))
    monkeypatch.setattr(search, "SEARCHED", [(4, 1, 12)])
    monkeypatch.setattr(search, "CHOOSING", 1)
    result = run("staleness", "--quick", *flags_of(**SMALL, num_batches=20, num_stages=4))
    check_output(result, tmp_path, "staleness.png")
    result = run("search", *flags_of(num_batches=20))
    check_output(result, tmp_path, "stashing.png")
    # What the recurrence says of the run that is drawn, the trainer says, too.
    drawn = r"^(\w+), .*,\nin the pipeline .*\n +with stashing +(\S+) "
    what, loss = re.search(drawn, result.out, re.M).groups()
    assert re.search(rf"^{what} +{loss} ", result.out, re.M)


def test_the_search_tells_a_difference_only_where_the_seeds_do_not_overlap(run, monkeypatch):
    where = {  # it ends, with two seeds: with stashing, and without
        "SGD": ([1, 2], [3, 4]),
        "momentum": ([2, 4], [1, 3]),
        "Adam": ([1, 3], [2, 9]),
        "Muon": ([2, 3], [1, 1.5]),
    }

    def ended(config, name, seeds, with_it):
        last = torch.tensor(where[name][not with_it]).view(2, 1)
        parts = [last + 50, last - 0.5, last + 0.5]
        return search.Ended(
            name,
            {**config, "learning_rate": 0.1},
            {},
            torch.cat([part.expand(2, 10) for part in parts], 1),
        )

    monkeypatch.setattr(search, "SEARCHED", [(4, 1, 12)])
    monkeypatch.setattr(search, "best_end", ended)
    monkeypatch.setattr(search, "train", lambda *a, **b: Run([1.0] * 20, [], 0))
    monkeypatch.setattr(search, "draw_and_write", lambda *a: "")
    out = run("search").out
    rows = [re.split("  +", line) for line in out.splitlines()[2:6]]
    assert [row[0] for row in rows] == [*where]
    assert [row[3:] for row in rows] == [["worse"], [], [], ["better"]]
    assert rows[0][1:3] == ["1.500 (1.000-2.000) at 0.1", "3.500 (3.000-4.000) at 0.1"]
    assert "\nSGD, 4 stages of 1 layer" in out


def test_worth_counts_the_seeds_on_which_a_schedule_is_ahead(run, monkeypatch):
    def two_curves(config, target):
        plans = {plan.name: plan for plan in all_plans(config)[0]}
        of = {"gpipe": (10.0, [11, 12, 13, 16]), "pipedream": (8.0, [13, 16, 20, 20])}
        times = {name: [turn * b for b in range(1, 21)] for name, (turn, _) in of.items()}
        more = {name: (0.1, torch.ones(4, 20), batches) for name, (_, batches) in of.items()}
        return [worth.Curve(plans[name], 0, times[name], *more[name]) for name in of], []

    monkeypatch.setattr(worth, "curves_of", two_curves)
    monkeypatch.setattr(worth, "draw_and_write", lambda *a: "")
    cells = [re.split("  +", line) for line in run("worth").out.splitlines()[1:3]]
    assert [row[6:] for row in cells] == [["130 (110-160)", "2"], ["138 (104-160)"]]  # 160 = 160


def test_what_worth_trains_is_what_the_pipeline_trains_with_that_learning_rate():
    short = {**TINY, "momentum": 0.8, "num_batches": 30}
    curves, _ = worth.curves_of({**PLAN_CONFIG, **short, "chunks_per_gpu": 1}, 2.0)
    ours = {curve.plan.name: curve for curve in curves}
    config = {**short, "learning_rate": ours["pipedream"].rate}
    stashed, lost = (train({**config, "weight_stashing": on}).losses for on in (True, False))
    assert ours["pipedream"].losses[0].tolist() == pytest.approx(stashed, abs=1e-3)
    assert ours["  no stashing"].losses[0].tolist() == pytest.approx(lost, abs=1e-3)
    assert lost != pytest.approx(stashed, abs=1e-3)


@pytest.mark.parametrize(
    "flags",
    ["worth --loss 0", "worth --loss x", "worth --momentum 1", "worth --out /proc/x",
     "staleness --num_batches 0", "staleness --num_stages 1", "staleness --learning_rate 0.1",
     "staleness --num_microbatches 2", "staleness --quick --out /dev/null/x",
     "search --num_stages 4", "search --out /proc/x", "papers --num_stages 4"],
)  # fmt: skip
def test_bad_input_gets_one_line(run, monkeypatch, flags):
    def too_late(*args, **settings):
        pytest.fail("too late")

    monkeypatch.setattr(tuning, "tuned", too_late)
    result = run(*flags.split())
    assert (result.status, result.out, result.err.count("\n")) == (2, "", 1)
