"""The neighbours of pipelines on PyTorch's engines, and the file that a reader copies."""

import ast
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
from launch import ROOT
from reference import delayed_sgd
from torch import nn
from torch.distributed.run import main as torchrun  # what the command runs
from torch.nn.functional import cross_entropy

import pipedream_simple as simple
import pipedream_ways
from pipedream_neighbours import (
    CONFIG,
    SWEPT,
    UNKNOWN,
    Meter,
    draw_sweep,
    main,
    measure,
    points,
    verdict,
)
from pipedream_simple import NUM_HEADS, run_main
from pipedream_ways import (
    JOBS,
    Job,
    Known,
    make_batches,
    make_network,
    ordinary,
    papers,
    recurrence,
    with_blocks,
)

TEMPLATE = "torchrun --nproc-per-node 2 examples/my_model.py"


def test_the_template_trains_as_one_process_does(monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    torchrun(["--local-addr=127.0.0.1", *TEMPLATE.split()[1:]])  # raises if a process fails
    for number, handler in handlers.items():
        if signal.getsignal(number) != handler:
            signal.signal(number, handler)
    output = capfd.readouterr().out
    printed = [float(loss) for loss in re.findall(r"^batch \d+: loss (.*)$", output, re.M)]

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
PRINTED = {}


@pytest.fixture
def start(monkeypatch, capfd):
    """Run main here, where PyTorch is loaded, to save seconds: it starts the processes."""

    def start(script, *flags):
        monkeypatch.setattr(sys, "argv", [str(script), *flags])
        with pytest.raises(SystemExit) as ended:
            main()
        output = capfd.readouterr()
        assert (ended.value.code, output.err) == (0, "")
        return output.out

    return start


@pytest.fixture
def tables(start):
    """The three tables of a small run, which is run once: name -> cells."""
    if not PRINTED:
        PRINTED["small"] = start(ROOT / "pipedream_neighbours.py", *SMALL, "--optimizer=momentum")
    assert UNKNOWN not in PRINTED["small"]
    parts = re.split("^📊", PRINTED["small"], flags=re.M)[1:]
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
    assert [name for name, cells in sent.items() if cells[3] != "holds"] == ["ZeRO stage 1"]
    for name, (_, wire, by_gloo, _) in [*took.items()][1:]:  # no collective has been missed
        each = [float(kib.replace(",", "")) for kib in wire.split()]
        more = weights / 2 if name in ("ZeRO stage 2", "ZeRO stage 3") else 0  # its reduce-scatter
        assert number(by_gloo) == pytest.approx(in_kib[name] + more, rel=0.01)
        if sys.platform == "linux":  # where the kernel counts, headers and all
            assert sum(each) / len(each) == pytest.approx(number(by_gloo), rel=0.06)


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
    known, reasons = Known("why", [2048, 2900], [2048, 3100]), ["another"]
    assert verdict([1024, 1030], [1024, 1024], known, reasons) == "holds"
    assert verdict([0], [0], None, reasons) == "holds"
    assert reasons == ["another"]
    assert verdict([2048, 3072], [1024, 1024], known, reasons) == "1: 3.00x (2)"
    assert reasons == ["another", "why"]
    for measured in ([2048, 3200], [2100, 3072], [1024, 3072], [2048, 2800]):  # no excuse
        assert verdict(measured, [1024, 1024], known, reasons).endswith("x (3)")
    assert verdict([1024], [0], None, reasons).endswith("x (3)")
    assert reasons == ["another", "why", UNKNOWN]


def test_the_meter_counts_storages_that_exist_each_once():
    network = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    batch = torch.zeros(4, 3, dtype=torch.float64), torch.zeros(4, dtype=torch.int64)
    _, figures = measure(ordinary(network, optimizer, lambda part: part), [batch, batch], 0)
    weights = 8 * (3 * 5 + 5 + 5 * 2 + 2)
    # saved: the input, what ReLU returns (once, if two layers save it), log-softmax, labels; 1 / 4
    saved = 8 * (4 * 3 + 4 * 5 + 4 * 2 + 4 + 1)
    assert [*figures.peak.values()] == [weights, weights, weights, saved]
    assert figures.messages == figures.handed == {}


@pytest.mark.filterwarnings("ignore")  # PyTorch will rename it
def test_the_meter_counts_all_tensors_of_a_collective_and_knows_all_collectives():
    meter, a, b = Meter(Job(None, dict, dict)), torch.zeros(3), torch.zeros(5)
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
    assert meter.handed == {"all-reduce": 12 + 12 + 20, "all-gather": 12}


SWEEP = """
import sys
sys.path.insert(0, {root!r})
import pipedream_neighbours as neighbours
wide, many = ([8, 16], {{"batch_size": 8}}), ([2, 8], {{"hidden_size": 16}})
neighbours.SWEEPS, draw = {{"hidden_size": wide, "batch_size": many}}, neighbours.draw_sweep
def draw_and_tell(config, ranks):
    print(end="\\n" + repr(ranks))
    return draw(config, ranks)
neighbours.draw_sweep = draw_and_tell
neighbours.simple.run_main(neighbours.main)
"""


def test_the_sweep_measures_and_draws(start, tmp_path):
    script, folder = tmp_path / "sweep.py", tmp_path / "a" / "new folder"
    script.write_text(SWEEP.format(root=str(ROOT)))
    *_, told, path = start(script, "--gpus", "2", "--sweep", "--out", str(folder)).splitlines()
    assert path == f"{folder / 'neighbours.png'}"
    assert Path(path).read_bytes().startswith(b"\x89PNG")
    assert [*folder.iterdir()] == [Path(path)]
    first, second = ast.literal_eval(told)
    assert [*first] == [*second]
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


WRONG = """
import sys
sys.path.insert(0, {root!r})
import pipedream_neighbours as neighbours
neighbours.run_all = lambda config: neighbours.distributed.gather({{}})
neighbours.print_report = lambda config, ranks: False
neighbours.simple.run_main(neighbours.main)
"""


def test_wrong_weights_end_in_exit_status_1(monkeypatch, tmp_path, capfd):
    script = tmp_path / "wrong.py"
    script.write_text(WRONG.format(root=str(ROOT)))
    monkeypatch.setattr(sys, "argv", [str(script), "--gpus", "2"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert capfd.readouterr().err == ""


def test_the_picture_says_who_sends_least():
    ranks = [
        {
            (key, value, name): max(papers(point)[name]["sent"])
            for key, value, point in points(CONFIG)
            for name in SWEPT
        }
    ] * 4
    ranks[2] = {**ranks[2], ("batch_size", 32, "pipeline 1F1B"): 1e9}  # only on one GPU
    texts = [text.get_text() for text in draw_sweep(CONFIG, ranks).texts]
    title, line = texts[:2]
    runs = "pipeline 1F1B up to 16, then data parallel up to 32, then pipeline 1F1B up to 64"
    assert title == f"Who sends least? As the batch grows: {runs}, then data parallel"
    assert line.startswith("As the hidden size grows: pipeline 1F1B. Tensor parallel sends less")
    assert line.endswith("less than data parallel at hidden_size 512 and at batch_size 4.")
    assert {*texts[3:]} == {*SWEPT}


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
        ("--num_batches 2", "num_batches=2 must be a whole number from 3 to 1,000"),
        ("--sweep --network residual", "--sweep needs --network transformer"),
        ("--sweep --optimizer sgd", "--sweep has its own optimizer: leave out --optimizer"),
        ("--sweep --out README.md", "cannot write README.md/neighbours.png: Not a directory"),
        ("--sweep --out /proc/none", "cannot write /proc/none/neighbours.png: "),
        (
            f"--sweep --out {300 * 'a'}",
            f"cannot write {300 * 'a'}/neighbours.png: File name too long",
        ),
        ("--out .", "--out is the folder of the picture that --sweep draws"),
    ],
)
def test_bad_input_ends_in_one_line(flags, message, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["pipedream_neighbours.py", *flags.split()])
    monkeypatch.setattr(subprocess, "Popen", None)  # it must not come so far
    assert run_main(main) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"pipedream_neighbours.py: {message}")
    assert captured.err.count("\n") == 1
