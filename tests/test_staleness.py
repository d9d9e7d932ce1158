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

import pipedream_visual as visual
from pipedream.backstage.measures import staleness as stale
from pipedream.commands import search, staleness, worth
from pipedream.schedules.plans import PLAN_CONFIG, all_plans, make_plan
from pipedream.schedules.rows import LIBRARY
from pipedream.staleness import delays, tuning
from pipedream.staleness.delays import OPTIMIZERS, Training, delayed_training, momentum, sgd
from pipedream.staleness.tuning import batches_to
from pipedream_simple import (
    CONFIG,
    Run,
    build_schedule,
    build_stages,
    make_batches,
    train,
)

TINY = {**CONFIG, "device": "cpu", "num_batches": 9, "layers_per_stage": 2, "hidden_size": 12}
BY_STAGE, ON_ALL = [3, 2, 1, 0], [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("name", "schedule", "in_batch", "sync"),
    [("0", "1f1b", 4, False), ("1", "pipedream", 4, True), ("3 to 0", "pipedream", 1, False)],
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


def references(name, weights, rate):
    """The optimizers that do the same."""
    if name == "SGD":
        return [torch.optim.SGD(weights, lr=rate)]
    if name == "momentum":
        return [torch.optim.SGD(weights, lr=0.1 * rate, momentum=0.9)]
    if name == "Adam":
        return [torch.optim.Adam(weights, lr=rate)]
    matrices, biases = ([w for w in weights if w.ndim == ndim] for ndim in (2, 1))
    settings = {"momentum": 0.95, "weight_decay": 0, "adjust_lr_fn": "match_rms_adamw"}
    return [torch.optim.Muon(matrices, lr=rate, **settings), torch.optim.Adam(biases, lr=rate)]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_delay_the_optimizers_are_those_of_pytorch(name):
    function, rates = OPTIMIZERS[name]
    _, ours = train_delayed(Training(TINY, [0] * 4, function), [rates[2]])
    network = nn.Sequential(*build_stages(TINY)).double()
    theirs = references(name, [*network.parameters()], rates[2])
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
    losses, weights = train_delayed(Training(TINY, BY_STAGE, optimizer, stashing), [rate])
    assert losses.flatten().tolist() == pytest.approx(run.losses, abs=1e-12)
    assert_same_weights(weights, 0, run.weights)


def test_batches_are_counted_until_the_mean_of_ten_is_below():
    losses = torch.tensor([[[9.0] * 10 + [0.0] * 10]])
    for target, number in ((5, 15), (9.1, 10), (-1, torch.inf)):  # 15: five of each
        assert batches_to(losses, target).tolist() == [[number]]


def scores_of(losses, targets=(5, 1)):
    return tuning.score_targets(targets)(torch.tensor(losses)[:, None])[:, 0].tolist()


def test_a_rate_is_scored_by_target_and_out_once_it_diverges():
    """Ten losses of more than 1.5 times the first one, or not a number, at any time."""
    there = [9.0] * 10 + [0.0] * 20
    assert scores_of([there, [*there[:20], *[13.4] * 10]]) == [[15, 19]] * 2
    for late in (13.6, math.inf, math.nan):
        assert scores_of([there, [*there[:20], *[late] * 10]])[1] == [math.inf] * 2
    (never, worse), (once, far) = scores_of([[9.0] * 30, [9.0] * 10 + [4.0] * 20])
    assert once == 19
    assert (never, worse, far) == pytest.approx((114, 114, 108))  # not there: 60 * 1.9, 60 * 1.8
    one_of_two = torch.tensor([[there, [math.nan] * 30]])  # with one of the seeds
    assert tuning.score_targets([5])(one_of_two).tolist() == [[[math.inf]] * 2]


def test_a_cell_ends_early_only_when_no_other_rate_can_win():
    never, late = torch.full((1, 30), 9.0), torch.tensor([[9.0] * 20 + [0.0] * 10])
    both = torch.stack([never, late])
    assert not tuning.decided(both[..., :24], [5])
    assert tuning.decided(both, [5])
    assert not tuning.decided(both, [5, -1])
    broken = torch.tensor([[9.0] * 5 + [0.0] * 15 + [math.nan] * 10])  # first, but diverged
    assert not tuning.decided(torch.stack([broken, never]), [5])
    training = Training({**TINY, "num_batches": 60}, ON_ALL, sgd)
    targets, rates = (2.0, 1.0), OPTIMIZERS["SGD"][1]
    tuned = tuning.tune_for(targets, training, rates, quick=False)
    whole = tuning.tune(training, rates, range(10), tuning.score_targets(targets))
    assert tuned.rates == whole.rates
    assert all((a == b).all() for a, b in zip(tuned.losses, whole.losses, strict=True))


@pytest.mark.parametrize("wanted", [(2.0**-9, 2.0**-3), (1.0, 1.5), (2.0**9, 0.9), (0.3, 0.3)])
@pytest.mark.parametrize("fine", [True, False])
def test_the_grid_grows_and_is_refined_until_the_best_rates_are_inside(wanted, fine):
    """For two goals at once; with fine, their neighbors are a factor of 2^(1/4) away."""

    def score(rates):
        asked.extend(rates)
        goals = [[abs(math.log2(rate / best)) for best in wanted] for rate in rates]
        return torch.tensor(goals)[:, None].expand(-1, 3, -1)

    asked = []
    scores = tuning.try_rates([2.0**-k for k in range(5)], score, fine)
    best = tuning.best_of(scores)
    assert sorted(asked) == sorted({*asked}) == sorted(scores)
    for rate, goal in zip(best, wanted, strict=True):
        assert abs(math.log2(rate / goal)) <= (0.126 if fine else 0.501)
        assert min(scores) < rate < max(scores)
        around = [abs(math.log2(other / rate)) for other in scores if other != rate]
        assert sorted(around)[:2] == pytest.approx([0.25] * 2 if fine else [1] * 2, abs=1e-6)


def test_where_all_diverge_smaller_rates_are_tried_and_where_none_is_better_no_more():
    def score(level, rates):
        asked.extend(rates)
        return torch.tensor([[[float(level(rate))] * 2] * 3 for rate in rates])

    for level, least in ((lambda rate: 1.0, 0.5), (lambda r: 5 if r < 0.01 else math.inf, 0.001)):
        asked = []
        scores = tuning.try_rates([1.0, 0.5], partial(score, level), fine=False)
        assert sorted(asked) == sorted(scores)
        assert min(scores) >= least
    assert len(asked) > 7


def test_a_rate_that_diverges_after_the_trial_has_ended_is_out(monkeypatch):
    """The first rate is there at once, and goes up in batch 30; the second takes 14 batches."""

    def losses(training, rates, seeds, watch=lambda losses: False):
        runs = {1.0: [9.0] * 4 + [0.0] * 26 + [99.0] * 30, 0.5: [9.0] * 9 + [0.0] * 51}
        table = torch.tensor([[runs.get(rate, [9.0] * 60)] * len(seeds) for rate in rates])
        end = next((n for n in range(10, 60, 10) if watch(table[..., :n])), 60)
        return table[..., :end], []

    monkeypatch.setattr(tuning, "delayed_training", losses)
    training = Training({**TINY, "num_batches": 60}, ON_ALL, sgd)
    for targets in ((4.0,), (4.0, 1.0)):
        tuned = tuning.tune_for(targets, training, [2.0, 1.0, 0.5, 0.25], quick=True)
        assert tuned.rates == [0.5] * len(targets)


def test_what_is_shown_is_at_the_best_rate_for_each_target_and_on_other_seeds(monkeypatch):
    def note(training, rates, seeds, *rest, **settings):
        used.append({*seeds})
        return delayed_training(training, rates, seeds, *rest, **settings)

    used, shown = [], {2, 3, 4, 5, 6}
    monkeypatch.setattr(tuning, "delayed_training", note)
    training, targets = Training({**TINY, "num_batches": 60}, ON_ALL, sgd), (2.2, 1.0)
    tuned = tuning.tune(training, [0.05, 0.1], range(2, 7), tuning.score_targets(targets))
    tried, others = sorted(tuned.scores), [1002, 1003, 1004, 1005, 1006, 1007]  # these choose
    losses, _ = delayed_training(training, tried, others)
    for number, target in enumerate(targets):
        means = batches_to(losses, target).clamp(max=120).mean(1)
        out = tuning.grown(losses).any(1)
        assert tuned.rates[number] == tried[means.masked_fill(out, math.inf).argmin()]
        again, _ = delayed_training(training, [tuned.rates[number]], range(2, 7))
        assert (tuned.losses[number] - again[0]).abs().max() < 1e-4
    search.best_end(TINY, "SGD", range(2, 7), stashing=True)
    assert used.count(shown) == 2
    assert len(used) >= 4
    assert all(seeds.isdisjoint(shown) for seeds in used if seeds != shown)


def test_a_difference_is_clear_where_nine_of_ten_seeds_agree():
    ten = [*range(10)]
    for other, said in (
        ([n + 1 for n in ten[:9]] + [0], "<"),
        ([n + 1 for n in ten[:8]] + [0, 0], "~"),
        ([n - 1 for n in ten[:9]] + [99], ">"),
        (ten, "~"),
        ([-1] * 9 + [math.inf], "<"),  # not all seeds get there
    ):
        assert tuning.mark(ten, other) == said
    assert tuning.mark([1, math.inf], [9, 9]) == ">"
    assert tuning.mark([1, math.inf], [9, math.inf]) == "-"
    assert math.comb(10, 9) + 1 == 11  # of 1024, each way: once in 50


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
    result = run("worth", "--quick", "--loss", 2.2, 0.5, *flags_of(hidden_size=12, **sizes))
    check_output(result, tmp_path, "worth.png")
    assert "left out" not in result.out
    batches, races, *_, last = (part.splitlines() for part in result.out.split("\n\n"))
    rows = [re.split("  +", line.strip()) for line in races[1:13]]
    assert {row[0] for row in rows} == {*LIBRARY, "vertical sync"}
    assert trained == [[0, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]  # one for all that flush
    assert [line.split("  ")[0] for line in batches] == ["old", "0 0 0 0", "1 1 1 0", "1 1 1 1"]
    assert all(row[3] == "-" for row in rows)  # in 20 batches
    assert "at 2.2" in last[0]
    held = {row[0]: row[1] for row in rows}
    in_closed_form = {"zb-v": "4", "dualpipe-v": "4.5", "interleaved": "5.5", "looped-bfs": "8"}
    assert held.items() >= in_closed_form.items()


def test_staleness_and_search_run_and_write(run, tmp_path, monkeypatch):
    for name, (function, rates) in OPTIMIZERS.items():
        monkeypatch.setitem(OPTIMIZERS, name, (function, rates[1:4]))
    monkeypatch.setattr(search, "SEARCHED", [(4, 1, 12)])
    result = run("staleness", *flags_of(**SMALL, num_batches=20, num_stages=3))
    check_output(result, tmp_path, "staleness.png")
    assert [line.split("  ")[0] for line in result.out.splitlines()[::5]][:4] == [*OPTIMIZERS]
    result = run("staleness", "--quick", *flags_of(**SMALL, num_batches=20, num_stages=4))
    check_output(result, tmp_path, "staleness.png")
    assert "Muon" not in result.out
    result = run("search", *flags_of(num_batches=20))
    check_output(result, tmp_path, "stashing.png")
    # What the recurrence says of the run that is drawn, the trainer says, too.
    drawn = r"^(\w+), .*,\nin the pipeline .*\n +with stashing +(\S+) "
    what, loss = re.search(drawn, result.out, re.M).groups()
    assert re.search(rf"^{what} +{loss} ", result.out, re.M)


def test_the_price_of_delay_is_a_ratio_on_the_same_seed():
    cells = {("SGD", "0"): [[10, 20], [40, 50], [90, math.inf]]}
    cells["SGD", "1"] = [[15, 20], [40, 100], [80, 90]]
    assert [row[1:] for row in staleness.table_of_prices("SGD", cells)] == [
        ["delay 0", "1"],
        ["15 (10-20)", "1.25 (1.00-1.50) ~"],
        ["45 (40-50)", "1.50 (1.00-2.00) ~"],
        ["-", "-"],
    ]


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


def test_worth_tells_who_is_ahead_of_pipedream_at_which_target(run, monkeypatch):
    def three(config, targets, quick):
        plans = {plan.name: plan for plan in all_plans(config)[0]}
        hero, sooner = [float(n) for n in range(10, 20)], [float(n) for n in range(9, 19)]
        times = {"naive": [sooner, hero], "gpipe": [sooner] * 2, "zb-v": [sooner, hero[::-1]]}
        times |= {"pipedream": [hero, sooner], "1f1b": [[n + 1 for n in hero], hero]}
        races = [worth.Race(plans[name], (0,) * 4, each) for name, each in times.items()]
        return races, ["zb-h1 is left out: so it is"], {}

    monkeypatch.setattr(worth, "race", three)
    monkeypatch.setattr(
        worth, "draw_and_write", lambda draw, path: draw(visual).texts[0].get_text()
    )
    out = run("worth", "--loss", 0.1, 0.3).out
    rows = {line.split()[0]: re.split("  +", line) for line in out.splitlines()[3:8]}
    assert rows["gpipe"][2:] == ["14 (9-18) <", "14 (9-18) ~"]
    assert rows["pipedream"][2:] == ["14 (10-19)", "14 (9-18)"]
    assert "zb-h1 is left out: so it is" in out
    assert "\n0.3 < 0.1 >: naive.\n0.3 < 0.1 ~: gpipe, zb-v.\n" in out
    assert "\nLater than pipedream at every target: 1f1b.\n" in out
    assert "Clearly sooner than PipeDream: gpipe and zb-v at 0.3, none at 0.1" in out


def test_times_are_those_of_batches_in_forwards_of_a_whole_batch():
    config = {**PLAN_CONFIG, **TINY, "num_batches": 12, "schedule": "gpipe", "num_microbatches": 8}
    races, _, tuned = worth.race({**config, "layers_per_stage": 2}, [9.0, 0.01], True)
    gpipe = next(one for one in races if one.name == "gpipe")
    assert (
        gpipe.times[0] == [(9 * 2 * (8 + 3) + 8 + 3) / 8] * 5
    )  # F + B = 2; ten batches are enough
    assert gpipe.times[1] == [math.inf] * 5
    assert [*tuned] == [(0,) * 4, (1, 1, 1, 0), (1,) * 4]


def test_what_worth_trains_is_what_the_pipeline_trains_with_that_learning_rate():
    short = {**PLAN_CONFIG, **TINY, "momentum": 0.8, "num_batches": 30}
    tuned = worth.train_delayed(short, [1, 1, 1, 0], [2.0, 1.0], quick=True)
    for rate, losses in zip(tuned.rates, tuned.losses, strict=True):
        run = train({**TINY, "num_batches": 30, "momentum": 0.8, "learning_rate": rate})
        assert losses[0].tolist() == pytest.approx(run.losses, abs=1e-3)


@pytest.mark.parametrize(
    "flags",
    ["worth --loss 0", "worth --loss x", "worth --momentum 1", "worth --out /proc/x",
     "staleness --num_batches 0", "staleness --num_stages 1", "staleness --learning_rate 0.1",
     "staleness --num_microbatches 2", "staleness --quick --out /dev/null/x",
     "worth --num_batches 9", "staleness --num_batches 9", "search --num_batches 19",
     "worth --loss 0.3 0", "worth --loss 1 0.3 0.1 0.05",
     "search --num_stages 4", "search --out /proc/x", "papers --num_stages 4"],
)  # fmt: skip
def test_bad_input_gets_one_line(run, monkeypatch, flags):
    def too_late(*args, **settings):
        pytest.fail("too late")

    monkeypatch.setattr(tuning, "tune", too_late)
    result = run(*flags.split())
    assert (result.status, result.out, result.err.count("\n")) == (2, "", 1)
