"""The neighbours of pipelines on PyTorch's engines, and the file that a reader copies."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from launch import ROOT, launch
from reference import delayed_sgd
from torch import nn
from torch.nn.functional import cross_entropy

import pipedream_simple as simple
import pipedream_ways
from pipedream_neighbours import CONFIG, main, verdict
from pipedream_simple import NUM_HEADS, run_main
from pipedream_ways import JOBS, make_batches, make_network, recurrence, with_blocks

TEMPLATE = "torchrun --nproc-per-node 2 examples/my_model.py"


def test_the_template_trains_as_one_process_does():
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--local-addr=127.0.0.1"]
    command = [*torchrun, *TEMPLATE.split()[1:]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    printed = [float(loss) for loss in re.findall(r"^batch \d+: loss (.*)$", done.stdout, re.M)]

    spec = importlib.util.spec_from_file_location("my_model", ROOT / "examples" / "my_model.py")
    template = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(template)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(*template.my_layers())
    optimizer, losses = torch.optim.Adam(network.parameters(), lr=0.01), []
    for x, y in template.my_batches():
        loss = cross_entropy(network(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert printed == pytest.approx(losses, abs=1e-4)
    assert losses[-1] < 0.8 * losses[0]  # it learns
    text = (ROOT / "examples" / "my_model.py").read_text()
    assert TEMPLATE in text
    assert TEMPLATE in (ROOT / "README.md").read_text()
    assert text.count("\n") <= 60
    assert not re.search(r"\b_[a-z]", text.replace("__", ""))  # public names only


# ------------------------------------------------------------------------------ the neighbours

SMALL = ("--gpus", "2", "--hidden_size", "16", "--batch_size", "8", "--num_microbatches", "2")


@pytest.fixture
def tables():
    """The three tables of a small run: name -> cells."""
    done = launch(*SMALL, "--optimizer", "momentum", script="pipedream_neighbours.py")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    parts = re.split("^📊", done.stdout, flags=re.M)[1:]
    rows = ([re.split(r" {2,}", line) for line in part.splitlines()[2:]] for part in parts)
    return [{name: cells for name, *cells in part if name in NAMES} for part in rows]


NAMES = ["one process", *JOBS]


def number(cell):
    return float(cell.split()[0].replace(",", ""))


def test_every_way_ends_on_the_weights_of_one_process(tables):
    _, _, took = tables
    assert [*took] == NAMES
    assert all(float(cells[-1]) < 1e-12 for name, cells in took.items() if name in JOBS)


def test_what_is_sent_is_what_the_papers_say(tables):
    sent, _, took = tables
    size, depth = 16, 2
    block = (4 * size**2 + 4 * size) + (2 * size**2 + 2 * size) + 4 * size  # attention, MLP, norms
    ends = (17 + 64) * size + 2 * size + 64 * size * 10 + 10  # embeddings, norm, head
    weights, cut = 8 * (depth * block + ends) / 1024, 8 * 8 * 64 * size / 1024
    in_kib = {name: number(cells[2]) for name, cells in sent.items()}
    assert in_kib == pytest.approx(
        {
            "data parallel": weights,  # an all-reduce of two sends all of it once
            "ZeRO stage 1": 1.5 * weights,
            "ZeRO stage 2": weights,
            "ZeRO stage 3": 1.5 * weights,
            "tensor parallel": 4 * depth * cut,
            "pipeline 1F1B": cut,
            "PipeDream": cut,
        },
        rel=0.01,
    )
    assert sent["tensor parallel"][0] == f"{4 * depth} all-reduce"
    assert sent["pipeline 1F1B"][0] == "2 send"  # of two microbatches, this way or that
    for name in ("data parallel", "tensor parallel", "pipeline 1F1B", "PipeDream"):
        on_the_wire = [float(kib.replace(",", "")) for kib in took[name][1].split()]
        if sys.platform == "linux":  # where the kernel counts, headers and all
            assert on_the_wire == pytest.approx([in_kib[name]] * len(on_the_wire), rel=0.05)


def test_what_is_held_is_what_the_papers_say_but_for_what_is_explained(tables):
    _, held, _ = tables
    one = [number(cell) for cell in held["one process"]]
    data = [number(cell) for cell in held["data parallel"]]
    assert data == pytest.approx([*one[:3], one[3] / 2], rel=0.01)
    assert number(held["ZeRO stage 2"][0]) == pytest.approx(1.5 * one[0], rel=0.02)  # and a shard
    assert number(held["ZeRO stage 3"][0]) < 1.3 * one[0]
    assert number(held["ZeRO stage 3"][2]) == pytest.approx(one[2] / 2, rel=0.02)
    first, last = map(int, held["PipeDream"][0].split())
    once, same = map(int, held["pipeline 1F1B"][0].split())
    assert (first, last) == (pytest.approx(2 * once, abs=1), same)  # one stashed version on GPU0


def test_a_formula_that_does_not_hold_is_told():
    reasons = ["another"]
    assert verdict("why", [1024, 1030], [1024, 1024], reasons) == "holds"
    assert verdict("why", [1024, 3072], [1024, 1024], reasons) == "1: 3.00x (2)"
    assert verdict("why", [0], [0], reasons) == "holds"
    assert verdict("why", [1024], [0], reasons) != "holds"
    assert reasons == ["another", "why"]


def test_the_recurrence_is_that_of_the_paper(monkeypatch):
    settings = {"gpus": 4, "num_microbatches": 2, "optimizer": "momentum", "network": "residual"}
    config = {**CONFIG, **settings, "learning_rate": 0.05, "num_batches": 6, "batch_size": 8}
    with_double = {**simple.CONFIG, **config, "num_stages": 4, "momentum": 0.9}
    _, stages = delayed_sgd(with_double, lambda stage: -(-(3 - stage) // 2))
    monkeypatch.setattr(
        pipedream_ways, "make_network", lambda config: make_network(config).double()
    )
    ours = recurrence(config, make_batches(config))
    for stage, weights in enumerate(stages):
        for name, w in weights.items():
            torch.testing.assert_close(ours[f"{stage}.{name}"], w, atol=1e-12, rtol=0)


def test_a_block_computes_what_the_layer_computes():
    layer = nn.TransformerEncoderLayer(
        8, NUM_HEADS, 8, 0.0, batch_first=True, norm_first=True, dtype=torch.float64
    )
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    true = layer(x)
    torch.testing.assert_close(with_blocks(nn.Sequential(layer)).double()(x), true)


def test_a_rank_that_is_killed_ends_the_run_with_its_name():
    command = [sys.executable, str(ROOT / "pipedream_neighbours.py"), *SMALL]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as run:
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
        while len(children.read_text().split()) < 2:
            time.sleep(0.05)
        ranks = children.read_text().split()
        os.kill(int(ranks[1]), signal.SIGKILL)
        _, error = run.communicate(timeout=60)
    assert run.returncode == 1
    assert error == "pipedream_neighbours.py: rank 1 was ended by SIGKILL\n"
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--gpus 3", "gpus=3 must be 2 or 4: the transformer has 4 heads"),
        ("--gpus 1", "gpus=1 must be a whole number from 2 to 16"),
        ("--gpus two", "gpus='two' must be a whole number from 2 to 16"),
        ("--optimizer lion", "optimizer='lion' must be one of sgd, momentum, adam"),
        ("--batch_size 6 --num_microbatches 6", "batch_size=6 must be a multiple of gpus=4"),
        ("--num_microbatches 2", "num_microbatches=2 must be at least gpus=4"),
        ("--hidden_size 30", "hidden_size=30 must be a multiple of 4"),
        ("--network resnet", "network='resnet' must be one of residual, transformer"),
        ("--timeout 0", "timeout=0 must be a number from 1 to 86400"),
        ("--gpu 4", "unknown flag '--gpu': did you mean --gpus?"),
        ("--sweep --network residual", "--sweep needs --network transformer"),
    ],
)
def test_bad_input_ends_in_one_line(flags, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pipedream_neighbours.py", *flags.split()])
    monkeypatch.setattr(subprocess, "Popen", None)  # it must not come so far
    assert run_main(main) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"pipedream_neighbours.py: {message}")
    assert captured.err.count("\n") == 1
