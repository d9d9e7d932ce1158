"""The neighbours of pipelines on PyTorch's engines."""

import logging
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from ranks import in_processes, run_neighbours, start_here
from reference import delayed_sgd
from torch import nn

import pipedream_visual as visual
from pipedream.commands import neighbours
from pipedream.commands.neighbours import KEYS, REASONS, SWEPT, TOLERANCE, UNKNOWN, verdict
from pipedream.networks.transformer import NUM_HEADS
from pipedream.processes import ways
from pipedream.processes.meter import Meter, activations_of_stages, measure
from pipedream.processes.ways import HELD, JOBS, Job, formulas, full_config, with_blocks

# ------------------------------------------------------------------------------ the neighbours

GPUS, SIZE, DEPTH = 4, 16, 4
CONFIG = full_config({**KEYS, "hidden_size": SIZE, "batch_size": 8})
BLOCK = 6 * SIZE**2 + 10 * SIZE  # attention and MLP with their biases, two norms
ENDS = (17 + 64) * SIZE + 2 * SIZE + 64 * SIZE * 10 + 10  # embeddings, norm, head
WEIGHTS, CUT = 8 * (DEPTH * BLOCK + ENDS), 8 * 8 * 64 * SIZE
RING = 2 * (GPUS - 1) / GPUS


@pytest.fixture(autouse=True)
def double():
    """As in the ranks."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def ranks():
    """Of each process: way to train -> Figures."""
    return in_processes(GPUS, run_neighbours, CONFIG)[0]


def per_gpu(ranks, way, kind):
    return [rank[way].bytes[kind] for rank in ranks]


def test_every_way_ends_on_the_weights_of_one_process(ranks):
    assert [*ranks[0]] == ["one process", *JOBS]
    assert [*ranks[-1]] == [*JOBS]
    for rank in ranks:
        assert all(figures.same and figures.off < 1e-12 for figures in rank.values())


def test_what_is_sent_is_what_the_papers_say_and_what_the_kernel_counts(ranks):
    sent = {
        "data parallel": [RING * WEIGHTS] * 4,
        "ZeRO stage 1": [1.5 * RING * WEIGHTS] * 4,
        "tensor parallel": [4 * DEPTH * RING * CUT] * 4,
        "pipeline 1F1B": [CUT, 2 * CUT, 2 * CUT, CUT],
        "PipeDream": [CUT, 2 * CUT, 2 * CUT, CUT],
    }
    for way, numbers in sent.items():
        assert per_gpu(ranks, way, "sent") == pytest.approx(numbers, rel=1e-3)
    assert ranks[0]["tensor parallel"].messages == {"all-reduce": 4 * DEPTH}
    assert ranks[0]["pipeline 1F1B"].messages == {"send": 4}  # four microbatches, one way
    for way in JOBS:  # no collective has been missed
        total, by_gloo = sum(per_gpu(ranks, way, "sent")), sum(rank[way].by_gloo for rank in ranks)
        if way in ("ZeRO stage 2", "ZeRO stage 3"):  # gloo's reduce-scatter is an all-reduce
            total += GPUS * RING * WEIGHTS / 2
        assert by_gloo == pytest.approx(total, rel=0.06)
        if sys.platform == "linux":  # where the kernel counts, headers and all
            assert sum(rank[way].wire for rank in ranks) == pytest.approx(by_gloo, rel=0.06)


def predicted(papers):
    """(way, kind) -> least and most on each GPU, if its reason alone makes it differ."""
    network, states = ways.make_network(CONFIG), 2  # of Adam
    dealt, rows = [0] * GPUS, [0] * GPUS
    for size in sorted((8 * w.numel() for w in network.parameters()), reverse=True):
        dealt[dealt.index(min(dealt))] += size
    for w in network.parameters():
        rows = [row + 8 * part.numel() for row, part in zip(rows, w.chunk(GPUS), strict=True)]
    layers, seen = [], set()  # as FSDP2 gathers them: equal shares, some padded
    for layer in ways.layers_of(network):
        own = {*layer.parameters()} - seen
        layers.append(8 * GPUS * sum(w.chunk(GPUS)[0].numel() for w in own))
        seen |= own
    whole, shard, two = sum(layers), sum(layers) / GPUS, sum(sorted(layers)[-2:])
    images = 8 // 4  # of a microbatch; the first stage gets tokens, which nothing saves
    came_in = [0, CUT / 4, CUT / 4, CUT / 4 + 8 * images]  # the last one gets labels, too

    def kept(way, microbatches):
        flying = [(4 - stage) for stage in range(4)]
        both = zip(papers[way]["activations"], flying, came_in, strict=True)
        return [saved + (microbatches - number) * one for saved, number, one in both]

    gradients = papers["PipeDream"]["gradients"]
    exact = {
        ("ZeRO stage 1", "sent"): [1.5 * RING * WEIGHTS] * 4,
        ("ZeRO stage 1", "optimizer"): [states * size for size in dealt],
        ("ZeRO stage 2", "sent"): [RING * whole] * 4,
        ("ZeRO stage 3", "sent"): [1.5 * RING * whole] * 4,
        ("ZeRO stage 2", "weights"): [shard + whole] * 4,
        ("ZeRO stage 2", "optimizer"): [states * row for row in rows],
        ("ZeRO stage 3", "optimizer"): [states * row for row in rows],
        ("pipeline 1F1B", "activations"): kept("pipeline 1F1B", 4),
        ("PipeDream", "activations"): kept("PipeDream", 4 * CONFIG["num_batches"]),
    }
    return {key: (numbers, numbers) for key, numbers in exact.items()} | {
        ("ZeRO stage 2", "gradients"): ([shard] * 4, [shard + two] * 4),
        ("ZeRO stage 3", "gradients"): ([shard] * 4, [shard + two] * 4),
        ("ZeRO stage 3", "weights"): ([shard + max(layers)] * 4, [shard + two] * 4),
        ("PipeDream", "gradients"): (gradients, [2 * size for size in gradients]),
    }


def test_the_papers_formulas_hold_or_pytorch_differs_for_the_reason_that_is_told(ranks):
    """Where a reason is told, what it predicts is measured, to 2 %."""
    one = ranks[0]["one process"].bytes
    assert one["weights"] == one["gradients"] == WEIGHTS
    assert one["optimizer"] == pytest.approx(2 * WEIGHTS, rel=2e-3)  # and a few counters
    papers = formulas(CONFIG, [one["activations"], *activations_of_stages(CONFIG)])
    expected = predicted(papers)
    assert {*expected} == {(way, kind) for way, kinds in REASONS.items() for kind in kinds}
    for way, kinds in papers.items():
        for kind, formula in kinds.items():
            off = 0.02 if (way, kind) in expected else TOLERANCE
            least, most = expected.get((way, kind), (formula, formula))
            for low, number, high in zip(least, per_gpu(ranks, way, kind), most, strict=True):
                assert (1 - off) * low <= number <= (1 + off) * high, (way, kind)


def test_the_tables_say_what_is_measured_and_how_far_it_is_from_the_papers(ranks, capsys):
    assert neighbours.print_report(CONFIG, ranks)
    out = capsys.readouterr().out
    assert UNKNOWN not in out
    kib = f"{WEIGHTS / 1024:,.0f}"
    assert re.search(rf"^data parallel +\d all-reduce +{kib} +[\d,]+ +holds$", out, re.M)
    assert re.search(
        r"^ZeRO stage 1 +\d all-reduce, 4 broadcast .* [\d,]+: 1.50x \(1\)$", out, re.M
    )
    assert re.search(r"^   \(1\) gradients are all-reduced", out, re.M)
    assert re.search(rf"^one process +({kib} +){{2}}", out, re.M)
    assert "✅ ALL END ON THE WEIGHTS OF ONE PROCESS" in out
    ranks = [{way: figures._replace(same=False) for way, figures in rank.items()} for rank in ranks]
    assert not neighbours.print_report(CONFIG, ranks)
    assert "❌ NOT ALL END" in capsys.readouterr().out


def test_a_formula_that_does_not_hold_is_told():
    reasons = ["another"]
    assert verdict([1024, 1070], [1024, 1024], "why", reasons) == "holds"
    assert verdict([0], [0], "why", reasons) == "holds"
    assert reasons == ["another"]
    assert verdict([2048, 3072], [1024, 1024], "why", reasons) == "1: 3.00x (2)"
    assert verdict([1024, 960], [1024, 1024], UNKNOWN, reasons) == "1: 0.94x (3)"
    assert verdict([1024], [0], "why", reasons) == "0: 1025.00x (2)"
    assert reasons == ["another", "why", UNKNOWN]


def test_the_meter_counts_storages_that_exist_each_once():
    network = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    job = Job({**CONFIG, "optimizer": "momentum"}, network, ways.on_whole(network))
    batch = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)
    _, figures = measure(job, [batch, batch], 0)
    weights = 8 * (3 * 5 + 5 + 5 * 2 + 2)
    # saved: the input, what ReLU returns (once, if two layers save it), log-softmax, labels; 1 / 4
    saved = 8 * (4 * 3 + 4 * 5 + 4 * 2 + 4 + 1)
    assert figures.bytes == dict(
        zip(("sent", *HELD), [0, weights, weights, weights, saved], strict=True)
    )
    assert figures.messages == {}


@pytest.mark.filterwarnings("ignore")  # PyTorch will rename it
def test_the_meter_counts_all_tensors_of_a_collective_and_knows_all_collectives():
    job = Job(CONFIG, nn.Linear(1, 1), None)
    meter, a, b = Meter(job), torch.zeros(3), torch.zeros(5)
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        with meter:
            torch.distributed.all_gather_into_tensor(a.clone(), a)
            torch.distributed.all_reduce(a)
            torch.distributed.all_reduce_coalesced([a, b])
            with pytest.raises(AssertionError, match="alltoall"):
                torch.distributed.all_to_all_single(a.clone(), a)
    finally:
        torch.distributed.destroy_process_group()
    assert meter.messages == {"all-reduce": 2, "all-gather": 1}
    assert meter.handed == {"all-reduce": 24 + 24 + 40, "all-gather": 24}


# ---------------------------------------------------------------------------------- the picture


def test_the_sweep_measures_what_the_formulas_say():
    wide, many = ([8, 16], "batch_size", 8), ([2, 8], "hidden_size", 16)
    config, sweeps = full_config({**KEYS, "gpus": 2}), {"hidden_size": wide, "batch_size": many}
    first, second = in_processes(2, run_neighbours, config, sweeps)[0]
    assert [*first] == [*second]
    assert len(first) == 16
    for (key, value, name), sent in first.items():
        size, batch = (16, value) if key == "batch_size" else (value, 8)
        weights = 8 * (2 * (6 * size**2 + 10 * size) + (17 + 64 + 2 + 640) * size + 10)
        cut = 8 * batch * 64 * size
        formula = {
            "data parallel": weights,
            "ZeRO stage 3": 1.5 * weights,
            "tensor parallel": 8 * cut,
            "pipeline 1F1B": cut,
        }
        assert sent == pytest.approx(formula[name], rel=0.06)  # with the shapes of the messages


def test_the_picture_says_who_sends_least():
    config = full_config(KEYS)
    sent = {
        (key, value, name): max(formulas(point)[name]["sent"])
        for key, value, point in neighbours.points(config)
        for name in SWEPT
    }
    ranks = [sent, {**sent, ("batch_size", 32, "pipeline 1F1B"): 1e9}]  # only on one GPU
    texts = [text.get_text() for text in neighbours.draw_sweep(config, ranks, visual).texts]
    title, line = texts[:2]
    runs = "pipeline 1F1B up to 16, then data parallel up to 32, then pipeline 1F1B up to 64"
    assert title == f"Who sends least? As the batch grows: {runs}, then data parallel"
    assert line.startswith("As the hidden size grows: pipeline 1F1B. Tensor parallel sends less")
    assert line.endswith("less than data parallel at hidden_size 512 and at batch_size 4.")
    assert {*texts[3:]} == {*SWEPT}


# --------------------------------------------------------------------------------- what they are


def test_the_recurrence_is_that_of_the_paper():
    settings = {"num_microbatches": 2, "optimizer": "momentum", "network": "residual"}
    config = full_config({**KEYS, **settings, "num_batches": 6, "batch_size": 8})
    _, stages = delayed_sgd({**config, "momentum": 0.9}, lambda stage: -(-(3 - stage) // 2))
    ours = ways.recurrence(config, ways.double_batches(config))
    for stage, weights in enumerate(stages):
        for name, w in weights.items():
            torch.testing.assert_close(ours[f"{stage}.{name}"], w, atol=1e-12, rtol=0)


def test_a_block_computes_what_the_layer_computes():
    layer = nn.TransformerEncoderLayer(8, NUM_HEADS, 8, 0.0, batch_first=True, norm_first=True)
    x = torch.randn(3, 5, 8)
    true = layer(x)
    torch.testing.assert_close(with_blocks(nn.Sequential(layer))(x), true)


# ---------------------------------------------------------------------------------- the command

SMALL = ("--gpus", 2, "--network", "residual", "--batch_size", 8, "--num_microbatches", 2)


def test_started_plainly_it_starts_its_processes(monkeypatch, capfd):
    status, out, err = start_here(monkeypatch, capfd, "neighbours", *SMALL)
    assert (status, err) == (0, "")
    assert out.startswith("Starting 2 processes, which takes some seconds ...\ndata parallel ... ")
    assert "tensor parallel" not in out  # it has no layers for that
    assert "✅ ALL END ON THE WEIGHTS OF ONE PROCESS" in out


@pytest.mark.parametrize(("sweep", "same"), [(False, True), (False, False), (True, True)])
def test_a_rank_prints_or_draws_and_ends_with_the_status(sweep, same, monkeypatch, tmp_path):
    for name in ("RANK", "PIPEDREAM_LAUNCHED"):
        monkeypatch.setenv(name, "0")
    drawn = []
    monkeypatch.setattr(neighbours, "in_group", lambda work, backend, timeout: ["figures"])
    monkeypatch.setattr(neighbours, "print_report", lambda config, ranks: same)
    monkeypatch.setattr(neighbours, "draw_and_write", lambda draw, path: drawn.append(path))
    monkeypatch.setattr(os, "_exit", sys.exit)
    folder = tmp_path / "a" / "new folder"
    with pytest.raises(SystemExit) as ended:
        neighbours.main(KEYS, sweep, folder if sweep else None)
    assert ended.value.code == (not same)
    assert drawn == [folder / "neighbours.png"] * sweep
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--gpus 3", "gpus=3 must be 2 or 4: the transformer has 4 heads"),
        ("--optimizer lion", "optimizer='lion' must be one of sgd, momentum, adam"),
        ("--batch_size 6 --num_microbatches 6", "batch_size=6 must be a multiple of gpus=4"),
        ("--num_microbatches 2", "num_microbatches=2 must be at least gpus=4"),
        ("--network resnet", "network='resnet' must be one of residual, transformer"),
        ("--num_batches 2", "num_batches=2 must be a whole number from 3 to"),
        ("--sweep --network residual", "--sweep has its own network: leave out --network"),
        ("--sweep --optimizer sgd", "--sweep has its own optimizer: leave out --optimizer"),
        ("--sweep --out digits.npz", "cannot write "),
        ("--out .", "--out is the folder of the picture that --sweep draws"),
    ],
)
def test_bad_input_ends_in_one_line(flags, message, run, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)  # it must not come so far
    status, out, error = run("neighbours", *flags.split(), cwd=ROOT)
    assert (status, out, error.count("\n")) == (2, "", 1)
    assert error.startswith(f"pipedream neighbours: {message}")
