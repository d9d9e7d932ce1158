"""The lab against PyTorch's own schedules and loader, closed forms, plain SGD and real bytes."""

import csv
import gc
import itertools
import json
import os
import random
import re
import runpy
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch import (
    halves_of_pytorch,
    order_that_pytorch_loads,
    rows_of_pytorch,
    save_as_pytorch_does,
)
from reference import delayed_sgd
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import pipedream_lab
from pipedream_lab import (
    COMMANDS,
    DEFAULTS,
    KEYS,
    LAB_CONFIG,
    LAB_SCHEDULES,
    Bytes,
    MemoryMeter,
    MeteredWorker,
    Plan,
    SplitWorker,
    all_plans,
    check_rows,
    compare,
    draw_plans,
    interleaved,
    main,
    make_plan,
    memory_formula,
    parse_lab_config,
    plain_training,
    read_csv,
    train_plan,
    write_csv,
    zb_h1,
    zb_h2,
)
from pipedream_simple import (
    CONFIG,
    SCHEDULES,
    Op,
    UserError,
    build_schedule,
    build_stages,
    makespan,
    memory_held,
    peak_in_flight,
    pin_versions,
    run_main,
    simulate,
    train,
)

ROOT = Path(__file__).parent.parent
SMALL = {**LAB_CONFIG, "hidden_size": 12, "device": "cpu", "num_batches": 3}


def plan_of(schedule, chunks_per_gpu=1, **settings):
    lab = {"schedule": str(schedule), "chunks_per_gpu": chunks_per_gpu}
    return make_plan({**SMALL, **lab, **settings})


def write_rows(path, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)


# ----------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize("devices", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("chunks", [1, 2, 3, 4])
def test_interleaved_rows_are_the_list_that_pytorch_generates(devices, chunks):
    for microbatches in (devices, 2 * devices, 3 * devices):
        ours = [list(interleaved(d, devices, microbatches, chunks)) for d in range(devices)]
        pytorch = rows_of_pytorch("ScheduleInterleaved1F1B", devices, microbatches, chunks)
        assert [[f"{s}{kind}{m}" for s, kind, m in row] for row in ours] == [
            [str(action) for action in row if action] for row in pytorch
        ]


@pytest.mark.parametrize("devices", [2, 3, 4, 8])
def test_zb_h1_is_pytorchs_interleaved_zero_bubble_with_one_stage_per_gpu(devices):
    for microbatches in (devices, 2 * devices, 4 * devices):
        ours = [list(LAB_SCHEDULES["zb-h1"](d, devices, microbatches)) for d in range(devices)]
        theirs = rows_of_pytorch("ScheduleInterleavedZeroBubble", devices, microbatches, 1)
        assert [[f"{s}{kind}{m}" for s, kind, m in row] for row in ours] == [
            [str(action) for action in row if action] for row in theirs
        ]


def test_interleaved_and_zb_h1_take_the_time_of_the_closed_form_at_150_random_sizes():
    numbers = random.Random(0)
    for _ in range(150):
        devices, rounds, chunks = (numbers.randint(1, most) for most in (7, 4, 4))
        microbatches, f, b = devices * rounds, numbers.randint(1, 5), numbers.randint(1, 9)
        sizes = {"num_stages": devices, "num_microbatches": microbatches, "num_batches": 1}
        times = {"forward_time": f, "backward_time": b, "layers_per_stage": chunks}
        plan = plan_of("interleaved", chunks, **sizes, **times, batch_size=microbatches)
        expected = (chunks * microbatches + devices - 1) * (f + b) / chunks
        assert makespan(plan.events) == pytest.approx(expected)
        times = {"forward_time": f, "backward_time": 2 * f}  # f = I = W
        plan = plan_of("zb-h1", **sizes, **times, batch_size=microbatches)
        assert makespan(plan.events) == pytest.approx(f * (3 * microbatches + devices - 1))


@pytest.mark.parametrize(("devices", "chunks"), [(2, 2), (4, 2), (4, 3), (8, 4)])
def test_interleaved_holds_more_than_1f1b_by_the_published_factor(devices, chunks):
    sizes = {"num_stages": devices, "num_microbatches": 2 * devices, "batch_size": 2 * devices}
    plan = plan_of("interleaved", chunks, **sizes, layers_per_stage=chunks)
    of_whole_stages = peak_in_flight(plan.schedule)[0] / chunks
    one_f_one_b = peak_in_flight(plan_of("1f1b", **sizes).schedule)[0]
    assert one_f_one_b == devices
    assert of_whole_stages / one_f_one_b == 1 + (devices - 1) / (devices * chunks)


@pytest.mark.parametrize(("make", "times"), [(zb_h1, 1), (zb_h2, 2)])
def test_zero_bubble_holds_as_many_microbatches_as_the_paper_says(make, times):
    for stages, microbatches in itertools.product(range(1, 8), range(1, 15)):
        rows = [list(make(s, stages, microbatches)) for s in range(stages)]
        schedule = pin_versions(rows, microbatches)
        most = min(times * (stages - 1) + 1, microbatches)
        assert peak_in_flight(schedule) == [most] * stages
        check_rows(rows, make.__name__)


def test_zb_h2_warms_up_twice_as_long_and_is_never_idle_between_batches():
    """With f = I = W, free links and M >= 2S - 1 a GPU works from its first op to its last."""
    for stages, more, batches in itertools.product(range(1, 7), range(3), range(1, 4)):
        count = 2 * stages - 1 + more
        sizes = {"num_stages": stages, "num_microbatches": count, "num_batches": batches}
        plan = plan_of("zb-h2", **sizes, batch_size=count, backward_time=2)
        assert makespan(plan.events) == 3 * count * batches + stages - 1
        for device, row in enumerate(plan.schedule):
            kinds = [op.kind for op in row]
            assert kinds.index("I") == 2 * (stages - 1 - device) + 1
            mine = [event for event in plan.events if event.device == device]
            assert mine[0].start == device
            assert all(a.end == b.start for a, b in itertools.pairwise(mine))


@pytest.mark.parametrize("schedule", ["zb-h1", "zb-h2"])
@pytest.mark.parametrize("w", [0, 0.25, 1.5, [0.5, 0.25, 0, 1.5]])
def test_weight_gradient_time_is_ws_part_of_a_backward(schedule, w):
    plan = plan_of(schedule, backward_time=2, weight_gradient_time=w)
    for op, _, start, end in plan.events:
        part = (w[op.stage] if isinstance(w, list) else w) or 1
        assert end - start == pytest.approx({"F": 1, "I": 2 - part, "W": part, "U": 0}[op.kind])
    whole = plan_of("1f1b", backward_time=2, weight_gradient_time=w)
    assert {e.end - e.start for e in whole.events if e.op.kind == "B"} == {2}


def test_a_device_updates_all_its_stages_after_its_last_backward_of_a_batch():
    for schedule in LAB_SCHEDULES:
        plan = plan_of(schedule, 3)
        for row in plan.schedule:
            stages = sorted({op.stage for op in row})
            per_batch = len(row) // 3
            for batch in range(3):
                tail = row[(batch + 1) * per_batch - len(stages) : (batch + 1) * per_batch]
                assert [(op.kind, op.stage) for op in tail] == [("U", stage) for stage in stages]


def same_as_plain_sgd(plan):
    run = train_plan(plan, torch.float64)
    losses, weights = delayed_sgd(plan.config, lambda stage: 0)
    torch.testing.assert_close(torch.tensor(run.losses), torch.tensor(losses), rtol=0, atol=1e-12)
    for ours, plain in zip(run.weights, weights, strict=True):
        for name in ours:
            torch.testing.assert_close(
                ours[name].detach(), plain[name].detach(), rtol=0, atol=1e-12
            )
    return run


@pytest.mark.parametrize(("stages", "count", "chunks"), [(1, 1, 1), (3, 6, 2), (4, 4, 3)])
def test_the_labs_schedules_train_to_the_weights_of_plain_sgd(stages, count, chunks):
    sizes = {"num_stages": stages, "num_microbatches": count, "batch_size": 12}
    for schedule in LAB_SCHEDULES:
        run = same_as_plain_sgd(plan_of(schedule, chunks, layers_per_stage=6, **sizes))
        assert set(run.peak_versions) == {1}


@pytest.mark.parametrize("schedule", LAB_SCHEDULES)
@pytest.mark.parametrize(
    "new",
    [
        {"momentum": 0.9, "learning_rate": 0.05},
        {"recompute": True},
        {"network": "transformer", "recompute": True, "momentum": 0.9, "learning_rate": 0.02},
    ],
    ids=str,
)
def test_so_they_do_with_momentum_recompute_and_a_transformer(schedule, new):
    sizes = {"num_stages": 2, "num_microbatches": 4, "batch_size": 12, "layers_per_stage": 2}
    plan = plan_of(schedule, 2, **sizes, **new)
    run = same_as_plain_sgd(plan)
    once = train_plan(plan._replace(config={**plan.config, "recompute": False}), torch.float64)
    assert once.losses == run.losses
    for ours, theirs in zip(run.weights, once.weights, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_with_recompute_a_backward_or_its_first_half_lasts_a_forward_longer():
    f, b = [1, 2, 3, 4], [4, 6, 8, 10]
    for schedule in ("gpipe", "zb-h1", "zb-h2"):
        plan = plan_of(schedule, forward_time=f, backward_time=b, recompute=True)
        for op, _, start, end in plan.events:
            s = op.stage
            lasts = {"F": f[s], "B": f[s] + b[s], "I": f[s] + b[s] / 2, "W": b[s] / 2, "U": 0}
            assert end - start == lasts[op.kind]
    for name, turns in (("naive", 16), ("gpipe", 7), ("1f1b", 7)):  # f + f + b each
        plan = plan_of(name, backward_time=2, num_batches=1, recompute=True)
        assert makespan(plan.events) == turns * 4


@pytest.mark.parametrize("momentum", [0, 0.9])
@pytest.mark.parametrize("microbatches", [1, 4])
def test_plain_training_ends_on_the_weights_of_the_reference(microbatches, momentum):
    config = {**SMALL, "num_microbatches": microbatches, "momentum": momentum}
    _, weights = delayed_sgd(config, lambda stage: 0)
    for ours, plain in zip(plain_training(config, torch.float64), weights, strict=True):
        for name, w in ours.named_parameters():
            torch.testing.assert_close(w.detach(), plain[name].detach(), rtol=0, atol=1e-14)


# --------------------------------------------------------------------------- backward in halves


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        names = "aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm"
        self.count += str(function).startswith(names)
        return function(*args, **(kwargs or {}))


class Twice(nn.Module):
    """A weight that enters the graph at two places, and one that x does not meet first."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.randn(6))
        self.shift = nn.Parameter(torch.randn(6))

    def forward(self, x):
        x = torch.tanh(self.linear(x) * (self.scale * self.shift))
        return self.linear(x) + self.shift


MODULES = {
    "stage": lambda: build_stages({**SMALL, "hidden_size": 6})[1],
    "mlp": lambda: nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.LayerNorm(9), nn.Linear(9, 6)),
    "transformer": lambda: nn.TransformerEncoderLayer(6, 2, 12, dropout=0.0, batch_first=True),
    "shared weights": Twice,
    "lstm": lambda: FirstOf(nn.LSTM(6, 6, batch_first=True)),
    "split output": lambda: Split(),
}


class FirstOf(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)[0]


class Split(nn.Module):
    """Weights enter at a node with two outputs that are both used."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))

    def forward(self, x):
        q, r = torch.linalg.qr(x.mT @ x + self.weight)
        return x @ q @ r


def gradients_of(kinds, make_module, stage, images=5):
    """(gradient of x, gradients of the weights, products per op) of a microbatch on that stage."""
    torch.manual_seed(0)
    worker = SplitWorker(make_module(), {**SMALL, "num_microbatches": 1})
    x, gradient, labels = torch.randn(images, 4, 6), torch.randn(images, 4, 6), None
    if stage == 3:
        gradient, labels = None, torch.randint(4, (images, 6))  # 4 classes, 6 labels per image
    counts, back = [], None
    for kind in kinds:
        op = Op(stage, kind, 0, 0)
        with Products() as products:
            if kind == "F":
                worker.forward(op, x, labels)
            else:
                result = worker.backward(op, gradient)
                back = result if kind in "BI" else back
        counts.append(products.count)
    assert not worker.in_flight
    assert not worker.kept
    return back, worker.gradient, counts


@pytest.mark.parametrize("stage", [0, 1, 3], ids=["first", "middle", "last"])
@pytest.mark.parametrize("name", MODULES)
def test_the_halves_of_a_backward_give_the_bits_of_a_whole_one(name, stage):
    x_whole, whole, _ = gradients_of("FB", MODULES[name], stage)
    x_halves, halves, _ = gradients_of("FIW", MODULES[name], stage)
    assert (x_whole is None) == (x_halves is None) == (stage == 0)
    assert stage == 0 or x_halves.equal(x_whole)
    assert whole.keys() == halves.keys()
    assert all(halves[key].equal(gradient) for key, gradient in whole.items())


@pytest.mark.parametrize("name", ["stage", "mlp", "transformer"])
def test_the_halves_of_a_backward_do_the_matrix_products_of_a_whole_one_and_none_twice(name):
    for stage in (0, 1, 3):
        _, _, (_, whole) = gradients_of("FB", MODULES[name], stage)
        _, _, (_, i, w) = gradients_of("FIW", MODULES[name], stage)
        assert i + w == whole
    if name == "stage":  # three layers in the middle of the network: one product for x, one for W
        _, _, (forward, i, w) = gradients_of("FIW", MODULES[name], 1)
        assert (forward, i, w) == (3, 3, 3)


@pytest.mark.parametrize("name", ["stage", "mlp", "transformer"])
def test_the_halves_of_a_backward_give_the_bits_of_pytorchs_own_split(name):
    x_ours, ours, _ = gradients_of("FIW", MODULES[name], 1)
    torch.manual_seed(0)
    module, x, gradient = MODULES[name](), torch.randn(5, 4, 6), torch.randn(5, 4, 6)
    x_theirs, theirs = halves_of_pytorch(module, x.requires_grad_(), gradient)
    assert x_ours.equal(x_theirs)
    for (key, _), gradient in zip(module.named_parameters(), theirs, strict=True):
        assert ours[key].equal(gradient)


@pytest.mark.parametrize("schedule", ["zb-h1", "zb-h2"])
def test_zero_bubble_trains_to_the_bits_of_1f1b(schedule):
    sizes = {"num_stages": 3, "num_microbatches": 8}
    runs = [train_plan(plan_of(name, **sizes)) for name in ("1f1b", schedule)]
    assert runs[0].losses == runs[1].losses
    for whole, halves in zip(runs[0].weights, runs[1].weights, strict=True):
        assert all(whole[name].equal(halves[name]) for name in whole)


# --------------------------------------------------------------------------------------- files

PYTORCHS = [
    ("ScheduleLoopedBFS", 3, 4, 2),
    ("ScheduleInterleaved1F1B", 2, 4, 3),
    ("ScheduleInterleavedZeroBubble", 4, 8, 1),
    ("ScheduleZBVZeroBubble", 3, 6, 2),
    ("ScheduleDualPipeV", 2, 4, 2),
    ("ScheduleDualPipeV", 3, 8, 2),
]


@pytest.mark.parametrize(("name", "devices", "count", "chunks"), PYTORCHS)
def test_what_pytorch_generates_can_be_read_and_trains_to_plain_sgd(
    tmp_path, name, devices, count, chunks
):
    rows = rows_of_pytorch(name, devices, count, chunks)
    save_as_pytorch_does(rows, tmp_path / "theirs.csv")
    plan = plan_of(tmp_path / "theirs.csv", batch_size=count * 2, layers_per_stage=2 * chunks)
    assert len(plan.schedule) == devices
    assert plan.config["num_stages"] == devices * chunks
    flat = [
        [str(part) for action in row if action for part in action.sub_actions or [action]]
        for row in rows
    ]
    first = [[op for op in row if op.microbatch < count] for row in plan.schedule]
    assert [[str(op) for op in row if op.kind != "U"] for row in first] == flat
    same_as_plain_sgd(plan)


@pytest.mark.parametrize("schedule", ["naive", "gpipe", "1f1b", *LAB_SCHEDULES])
def test_what_we_export_is_read_again_and_loads_into_pytorchs_runtime(tmp_path, schedule):
    plan = plan_of(schedule, 3, num_batches=1)
    path = tmp_path / "ours.csv"
    computing = [[op for op in row if op.kind != "U"] for row in plan.schedule]
    write_csv(computing, path)
    assert read_csv(path) == [[op[:3] for op in row] for row in computing]
    again = plan_of(path, num_batches=1)
    assert again.schedule == plan.schedule
    num_stages = plan.config["num_stages"]
    for key in ("forward_time", "backward_time", "comm_time"):  # a list now, one time per stage
        given = plan.config[key]
        assert again.config[key] == (given if isinstance(given, list) else [given] * num_stages)
    for key in ("num_stages", "num_microbatches", "layers_per_stage"):
        assert again.config[key] == plan.config[key]
    loaded = order_that_pytorch_loads(path, 4, num_stages, 4)
    assert loaded == [[str(op) for op in row] for row in computing]


GOOD = [["0F0", "0F1", "0B0", "0B1"], ["1F0", "1B0", "1F1", "1B1"]]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([["0F0", "0F1", "0B0", "0B1"], ["1F0", "1B0", "1B1"]], "microbatch 1.* it runs B"),
        ([["0F0", "0F1", "0B0", "0B1"], ["1F0", "1F1", "1B1"]], "stage 1 .* it runs F"),
        ([["0F0", "0B0", "0B0"], ["1F0", "1B0"]], "stage 0 .* it runs F B B"),
        ([["0F0", *["0B0"] * 9999], ["1F0", "1B0"]], "stage 0 .* it runs F B B"),
        ([["0F0", "0I0"], ["1F0", "1B0"]], "it runs F I"),
        ([["0F0", "0B0", "0W0"], ["1F0", "1B0"]], "it runs F B W"),
        ([["0B0", "0F0"], ["1F0", "1B0"]], "it runs B F"),
        ([["0F0", "0W0", "0I0"], ["1F0", "1B0"]], "it runs F W I"),
        ([["0F0", "0B0", "1F0"], ["1B0"]], "stage 1 is on GPU0 and on GPU1"),
        ([["0F0", "0B0"], [], ["1F0", "1B0"]], "GPU1 has nothing to do"),
        ([["0F0", "0X0"], ["1F0", "1B0"]], "line 1, column 2: '0X0' is not an op"),
        ([["F0", "0B0"]], "line 1, column 1: 'F0' is not an op"),
        ([["0F0", "0F" + "1" * 100_000]], "is not an op"),
        ([["0F0", "0B0"], ["2F0", "2B0"]], "stage 1 .* it runs nothing"),
        ([["0F0", "0B0", "0F1", "0B1"], ["1F1", "1F0", "1B1", "1B0"]], "deadlock: GPU"),
        ([["0F999999", "0B999999"]], "stage 0 .* microbatch 0.* it runs nothing"),
        ([], "has no ops"),
        ([["", ""]], "has no ops"),
    ],
)
def test_a_bad_csv_gets_one_short_line(tmp_path, rows, words):
    write_rows(tmp_path / "bad.csv", rows)
    with pytest.raises(UserError, match=words) as caught:
        plan_of(tmp_path / "bad.csv", batch_size=12)
    assert "\n" not in str(caught.value)
    assert "bad.csv" in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_deadlock_names_who_waits_for_what_but_not_all_of_many(tmp_path):
    rows = [["0F0", "0B0", "0F1", "0B1"], ["1F1", "1F0", "1B1", "1B0"]]
    write_rows(tmp_path / "stuck.csv", rows)
    with pytest.raises(UserError, match="deadlock: GPU0 waits for 1B0, GPU1 waits for 0F1"):
        plan_of(tmp_path / "stuck.csv")
    many = [[f"{s}F0", f"{s}B0", f"{s}F1", f"{s}B1"] for s in range(200)]
    write_rows(tmp_path / "stuck.csv", [*many[:-1], ["199F1", "199F0", "199B1", "199B0"]])
    with pytest.raises(UserError, match="deadlock: GPU0 waits for 1B0") as caught:
        plan_of(tmp_path / "stuck.csv")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.csv", None, "cannot read"),
        ("dir.csv", "directory", "cannot read .* not a regular file"),
        ("fifo.csv", "fifo", "cannot read .* not a regular file"),
        ("loop.csv", "loop", "cannot read"),
        ("x" * 300 + ".csv", None, "cannot read"),
        ("bytes.csv", b"\xff\xfe\x00\x01", "position 0"),
        ("end.csv", b"0F0,0B0\n" * 5000 + b"\xff", "position 40000"),
        ("nul.csv", b"0F0,\0,0B0\n", "nul.csv"),
    ],
)
def test_what_is_no_csv_is_refused_at_once(tmp_path, name, content, words):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "directory":
        path.mkdir()
    elif content == "fifo":
        os.mkfifo(path)
    elif content == "loop":
        path.symlink_to(path)
    with pytest.raises(UserError, match=words):
        read_csv(path)


def test_a_csv_as_other_programs_write_it_is_read(tmp_path):
    for text in ("0F0,0B0\r\n", "\ufeff0F0,0B0\n", '"0F0", 0B0 ,\n\n', ",0F0,,0B0"):
        (tmp_path / "one.csv").write_bytes(text.encode())
        assert read_csv(tmp_path / "one.csv") == [[(0, "F", 0), (0, "B", 0)]]


def test_a_small_csv_with_huge_numbers_is_refused_at_once(tmp_path):
    (tmp_path / "huge.csv").write_text("0F0,0B0,999999F999999\n")
    with pytest.raises(UserError, match="it runs nothing"):
        read_csv(tmp_path / "huge.csv")


def test_good_rows_pass_and_any_one_missing_or_doubled_op_does_not():
    ops = [[(int(c[0]), c[1], int(c[2])) for c in row] for row in GOOD]
    check_rows(ops, "good")
    for device, row in enumerate(ops):
        for place in range(len(row)):
            for change in ([], [row[place]] * 2):
                broken = [list(r) for r in ops]
                broken[device][place : place + 1] = change
                with pytest.raises(UserError):
                    check_rows(broken, "broken")


# -------------------------------------------------------------------------------------- plans


def test_a_plan_keeps_the_network_and_the_work_of_each_gpu():
    times = {"forward_time": [1, 2, 3, 4], "backward_time": 6, "comm_time": [5, 6, 7, 8]}
    plan = plan_of("interleaved", 3, **times)
    assert plan.config.keys() == {*CONFIG, "weight_gradient_time"}
    assert plan.config["num_stages"] * plan.config["layers_per_stage"] == 12
    per_gpu = [sum(plan.config["forward_time"][d::4]) for d in range(4)]
    assert per_gpu == pytest.approx([1, 2, 3, 4])
    assert plan.config["backward_time"] == [2] * 12
    assert plan.config["comm_time"] == [5, 6, 7, 8] * 3
    for name in SCHEDULES:
        settings = {**SMALL, "schedule": name}
        simple = {key: settings[key] for key in CONFIG}
        schedule = build_schedule(simple)
        events, config = simulate(schedule, simple), {**simple, "weight_gradient_time": 0}
        assert make_plan(settings) == Plan(name, config, schedule, events)


HUGE = 10**5000
BAD_CONFIGS = [
    5,
    None,
    [],
    "1f1b",
    {},
    {key: value for key, value in LAB_CONFIG.items() if key != "schedule"},
    {key: value for key, value in LAB_CONFIG.items() if key != "chunks_per_gpu"},
    *({**LAB_CONFIG, "schedule": value} for value in (None, 3, HUGE, [], "zb-h3", "x" * 10**6)),
    *(
        {**LAB_CONFIG, "weight_gradient_time": value}
        for value in (None, 1, -1, HUGE, [0.5], [2] * 4)
    ),
    *({**LAB_CONFIG, "chunks_per_gpu": value} for value in (None, 0, -1, 1.5, HUGE, [3], True)),
    *({**LAB_CONFIG, "num_stages": value} for value in (HUGE, -HUGE, None, [4], {})),
    *({**LAB_CONFIG, "forward_time": value} for value in ([], [1, 2], [1] * 5, [1, 2, 3, HUGE])),
    {**LAB_CONFIG, "comm_time": [1] * 100_000},
    {**LAB_CONFIG, "schedule": "interleaved", "num_microbatches": 2},
    {**LAB_CONFIG, "schedule": "interleaved", "chunks_per_gpu": 2},
    {**LAB_CONFIG, "schedule": "interleaved", "layers_per_stage": 2500, "chunks_per_gpu": 2500}
    | {"num_microbatches": 2500, "batch_size": 2500},
]


@pytest.mark.parametrize("config", BAD_CONFIGS, ids=range(len(BAD_CONFIGS)))
def test_a_bad_config_from_python_is_a_value_error_of_one_short_line(config):
    with pytest.raises(ValueError, match=r"\w") as caught:
        make_plan(config)
    assert isinstance(caught.value, UserError)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("config", [5, [], {}, {"chunks_per_gpu": 3}, {**LAB_CONFIG, "more": 1}])
def test_a_lab_config_of_a_wrong_shape_is_refused_by_the_command_line_too(config):
    with pytest.raises(UserError):
        parse_lab_config("doc", [], config=config)


def test_numbers_of_numpy_are_numbers(tmp_path):
    integers = ("num_stages", "num_microbatches", "num_batches", "batch_size", "chunks_per_gpu")
    config = {**SMALL, **{key: np.int64(SMALL[key]) for key in integers}}
    config |= {"schedule": "interleaved", "forward_time": np.float64(1), "comm_time": np.int64(1)}
    plain = {**SMALL, "schedule": "interleaved", "comm_time": 1}
    assert make_plan(config).events == make_plan(plain).events
    pipedream_lab.trace({**config, "schedule": "1f1b"}, tmp_path / "run.json")
    assert json.loads((tmp_path / "run.json").read_text())["traceEvents"]


# -------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    "settings",
    [
        {"num_microbatches": 1},
        {"num_microbatches": 8, "num_batches": 5},
        {"num_stages": 1, "layers_per_stage": 1, "chunks_per_gpu": 1},
        {"num_stages": 3, "layers_per_stage": 2, "chunks_per_gpu": 2, "num_microbatches": 6},
        {"num_stages": 4, "layers_per_stage": 1, "chunks_per_gpu": 1},
        {"num_stages": 1, "layers_per_stage": 1, "chunks_per_gpu": 1, "recompute": True},
        {"recompute": True, "momentum": 0.9},
        {"num_microbatches": 8, "num_batches": 5, "recompute": True},
    ],
    ids=str,
)
def test_measured_memory_is_what_the_formula_says(settings):
    plans, reasons = all_plans({**SMALL, "batch_size": 24, **settings})
    assert len(plans) + len(reasons) == len(SCHEDULES) + len(LAB_SCHEDULES) + 2
    for plan in plans:
        meter = MemoryMeter(plan.schedule)
        meter.train(plan)
        assert meter.peak == memory_formula(plan), plan.name


def test_all_plans_list_every_schedule_once_flushes_first():
    names = [plan.name for plan in all_plans(SMALL)[0]]
    flushing = "naive", "gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2"
    assert names == [*flushing, "pipedream", *names[-2:]]
    assert names[-2:] == ["  vertical sync", "  no stashing"]


def test_the_meter_counts_the_storages_of_a_plain_forward():
    """One Linear on one stage: its input, its output, and what the loss keeps."""
    plan = plan_of("gpipe", num_stages=1, layers_per_stage=1, num_microbatches=2, batch_size=6)
    meter = MemoryMeter(plan.schedule)
    meter.train(plan)
    logits = torch.zeros(3, 10)
    numbers = 3 * 64 + logits.numel() + 1 + 1  # x, log-probabilities, loss, sum of weights
    of_one = 4 * numbers + 8 * 3  # and the labels
    one_version = 4 * (64 * 10 + 10)
    assert meter.peak == [Bytes(one_version, 2 * of_one, one_version)]


def test_the_transformers_memory_is_measured_and_shrinks_with_recompute():
    """From shapes: F keeps the tokens, or what the stage before has sent; no formula of the lab."""
    sizes = {"network": "transformer", "batch_size": 12, "layers_per_stage": 2, "num_batches": 2}
    peak = {}
    for name, recompute in (("naive", False), ("gpipe", False), ("gpipe", True), ("1f1b", True)):
        plan = plan_of(name, **sizes, recompute=recompute, momentum=0.5)
        meter = MemoryMeter(plan.schedule)
        meter.train(plan)
        peak[name, recompute] = meter.peak
    for stage, one in enumerate(peak["naive", False]):
        x = 4 * 3 * 64 * (12 if stage else 1)
        assert peak["gpipe", False][stage].activations == 4 * one.activations
        assert peak["gpipe", True][stage].activations == 3 * x + one.activations
        assert peak["1f1b", True][stage].activations == (3 - stage) * x + one.activations
        for held in peak.values():
            assert held[stage].velocities == held[stage].gradients == one.weights


@pytest.mark.parametrize("what", ["weights", "activations", "gradients", "velocities"])
def test_the_meter_sees_memory_that_a_worker_forgets_to_free(monkeypatch, what):
    kept = []

    class Leaky(MeteredWorker):
        def update(self, op):
            if what == "weights":
                kept.append(self.versions[op.version])
            if what == "gradients":
                kept.append(dict(self.gradient))
            super().update(op)
            if what == "velocities":
                kept.append(self.velocity)

        def forward(self, op, x, labels=None):
            output = super().forward(op, x, labels)
            if what == "activations":
                kept.append(self.in_flight[op.microbatch][0])
            return output

    plan = plan_of("1f1b", momentum=0.9)
    monkeypatch.setattr(pipedream_lab, "MeteredWorker", Leaky)
    meter = MemoryMeter(plan.schedule)
    meter.train(plan)
    for found, expected in zip(meter.peak, memory_formula(plan), strict=True):
        for field in Bytes._fields:
            more = getattr(found, field) > getattr(expected, field)
            assert more == (field == what)


@pytest.mark.parametrize("schedule", ["1f1b", "pipedream", "zb-h1"])
def test_version_0_is_freed_when_its_last_reader_is_done(schedule):
    plan = plan_of(schedule, num_batches=4)
    last_reader = {op.stage: op for op, *_ in plan.events if op.version == 0}
    storages, done = {}, set()

    def watch(op, worker):
        if op.stage not in storages:
            weights = worker.versions[0].values()
            storages[op.stage] = [weakref.ref(w.untyped_storage()) for w in weights]
        if last_reader[op.stage] is op:
            done.add(op.stage)
        for storage in storages[op.stage]:
            assert (storage() is None) == (op.stage in done), op

    gc.disable()  # freed at once, not when cycles are collected
    try:
        train_plan(plan, watch=watch)
    finally:
        gc.enable()
    assert done == set(range(4))


def test_interleaved_needs_more_memory_than_1f1b_on_every_gpu():
    """Per microbatch and layer as much; more microbatches; and the gradients of all its chunks."""
    plans = [plan_of(name, 3, hidden_size=64) for name in ("1f1b", "interleaved")]
    peaks = []
    for plan in plans:
        meter = MemoryMeter(plan.schedule)
        meter.train(plan)
        peaks.append(meter.peak)
    for one, other in zip(*peaks, strict=True):
        assert other.activations > one.activations
        assert other.gradients == one.gradients == one.weights == other.weights


# --------------------------------------------------------------------------------------- trace


@pytest.mark.parametrize("schedule", ["pipedream", "zb-h1", "interleaved"])
def test_the_trace_is_the_simulated_run(tmp_path, schedule):
    config = {**SMALL, "num_batches": 2, "backward_time": 2, "comm_time": 1, "schedule": schedule}
    plan = make_plan(config)
    pipedream_lab.trace(config, tmp_path / "run.json")
    traced = json.loads((tmp_path / "run.json").read_text())["traceEvents"]
    by = {phase: [e for e in traced if e["ph"] == phase] for phase in "XsfCiM"}
    ops = {(e["name"], e["pid"], e["ts"], e["ts"] + e["dur"]) for e in by["X"]}
    expected = {(str(e.op), e.device, 1000 * e.start, 1000 * e.end) for e in plan.events}
    assert {o[:3] for o in ops} == {e[:3] for e in expected if "U" not in e[0]}
    updates = sorted((e["pid"], e["ts"]) for e in by["i"])
    assert updates == sorted((e.device, 1000 * e.end) for e in plan.events if e.op.kind == "U")

    # an arrow for every microbatch, link and direction; it starts in an op and ends in the next
    num_stages = plan.config["num_stages"]
    middle = {(e["pid"], e["ts"] + e["dur"] / 2): e["name"] for e in by["X"]}
    ends = {e["id"]: e for e in by["f"]}
    arrows = set()
    for start in by["s"]:
        end = ends[start["id"]]
        assert end["ts"] > start["ts"]
        a, b = (
            next(n for (pid, ts), n in middle.items() if pid == e["pid"] and abs(ts - e["ts"]) < 1)
            for e in (start, end)
        )
        arrows.add((start["name"], a, b))
    back = "I" if schedule == "zb-h1" else "B"
    links = [
        link
        for s, m in itertools.product(range(num_stages - 1), range(8))
        for link in (
            ("activations", f"{s}F{m}", f"{s + 1}F{m}"),
            ("gradients", f"{s + 1}{back}{m}", f"{s}{back}{m}"),
        )
    ]
    assert len(by["s"]) == len(by["f"]) == len(links)
    assert arrows == set(links)

    for device, row in enumerate(plan.schedule):
        counters = [e for e in by["C"] if e["pid"] == device]
        ended = {e.op: e.end for e in plan.events}
        assert [e["ts"] for e in counters[::2]] == [1000 * ended[op] for op in row]
        values = [e["args"]["held"] for e in counters]
        assert [*zip(values[::2], values[1::2], strict=True)] == memory_held(row)


def test_nothing_is_sent_inside_a_gpu(tmp_path):
    config = {**SMALL, "schedule": "interleaved", "num_stages": 1, "num_microbatches": 2}
    pipedream_lab.trace(config, tmp_path / "one.json")
    traced = json.loads((tmp_path / "one.json").read_text())["traceEvents"]
    assert not [e for e in traced if e["ph"] in "sf"]
    assert len([e for e in traced if e["ph"] == "X"]) == 3 * 2 * 2 * 3  # stages, F B, M, N


def test_the_picture_of_all_ends_with_the_slowest_but_naive_and_names_stages():
    plans, _ = all_plans({**SMALL, "num_batches": 1})
    figure = draw_plans(plans)
    assert figure.texts[0].get_text() == "7 schedules, one time axis. The fastest: interleaved"
    assert [text.get_text().split(":")[0] for text in figure.texts[2:]] == [
        "naive",
        "gpipe",
        "1f1b",
        "interleaved",
        "zb-h1",
        "zb-h2",
        "pipedream",
    ]
    for axes in figure.axes:
        assert axes.get_xlim() == (0, 2 * (4 + 4 - 1))
    labels = [{text.get_text() for text in axes.texts} for axes in figure.axes]
    assert {"F0", "B3"} <= labels[1]
    assert {"0F0", "8B0"} <= labels[3]
    assert {"I0", "W3"} <= labels[4]


# ------------------------------------------------------------------------------ the command line


@pytest.fixture
def program(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["pipedream_lab.py", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "80")
        status = run_main(main)
        return status, *capsys.readouterr()

    return run


def table_of(out, heading):
    """{name: its cells} of the table below that line."""
    lines = out[out.index(heading) :].splitlines()[2:]
    rows = [re.split("  +", line.strip()) for line in itertools.takewhile(len, lines)]
    return {row[0]: row[1:] for row in rows}


def test_compare_prints_every_schedule_and_draws_them(program, tmp_path):
    folder = tmp_path / "new" / "folder"
    status, out, err = program("compare", "--out", folder, "--num_batches", 2)
    assert (status, err) == (0, "")
    simulated, measured = table_of(out, "Simulated"), table_of(out, "Trained")
    for name in (*SCHEDULES, *LAB_SCHEDULES, "vertical sync", "no stashing"):
        assert name in simulated
    for name in ("naive", "gpipe", "1f1b", *LAB_SCHEDULES):
        assert float(measured[name][2]) < 1e-12  # to plain SGD
    assert float(measured["pipedream"][2]) > 1e-6
    time, speed_up = f"{2 * (8 + 3)}", f"{2 * 4 * 4 * 2 / (2 * (8 + 3)):.2f}x"
    in_flight, versions, stale = "4 3 2 1", "2 2 2 1", "1 1 1 0"
    expected = [time, speed_up, f"{8 / 11:.1%}", in_flight, versions, stale]
    assert simulated["pipedream"] == expected
    run = train({**CONFIG, "num_batches": 2})
    assert measured["pipedream"][:2] == [f"{run.losses[-1]:.4f}", f"{run.test_accuracy:.1%}"]
    bytes_of = memory_formula(make_plan({**LAB_CONFIG, "num_batches": 2}))
    assert measured["pipedream"][4] == " ".join(f"{sum(b) / 1024:.0f}" for b in bytes_of)
    assert f"{9 * 4} of {9 * 4} GPUs" in out
    with Image.open(folder / "schedules.png") as image:
        assert image.width < 4000
    assert max(map(len, out.splitlines()[:-1])) <= 80


@pytest.mark.parametrize("settings", [{"num_stages": 2}, {"num_stages": 8}, {"num_batches": 1}])
def test_compare_fits_80_columns_and_says_what_is_left_out(capsys, monkeypatch, settings):
    monkeypatch.setattr(pipedream_lab, "write", lambda *args: None)
    compare({**SMALL, "num_batches": 2, "num_microbatches": 8, "chunks_per_gpu": 2, **settings})
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    text = " ".join(lines)
    assert "layers_per_stage=3 must be a multiple of chunks_per_gpu=2" in text


def test_compare_puts_a_file_beside_the_others(program, tmp_path):
    rows = rows_of_pytorch("ScheduleZBVZeroBubble", 2, 4, 2)
    file = tmp_path / "a_rather_long_name_of_a_file.csv"
    save_as_pytorch_does(rows, file)
    flags = ["--num_batches", 1, "--layers_per_stage", 6, "--out", tmp_path]
    status, out, err = program("compare", "--schedule", file, *flags, "--hidden_size", 12)
    assert (status, err) == (0, "")
    name = next(name for name in table_of(out, "Trained") if name.endswith(".csv"))
    assert float(table_of(out, "Trained")[name][2]) < 1e-12
    assert max(map(len, out.splitlines()[:-1])) <= 80


@pytest.mark.parametrize(
    "name", ["x$\\frac{$.csv", "日本.csv", "a,b.csv", "[x].csv", "1,2.csv", "x y.csv"]
)
def test_a_file_may_have_any_name(program, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text("0F0,0B0\n")
    flags = ["--schedule", name, "--num_batches", 1, "--layers_per_stage", 1]
    status, out, err = program("export", "again.csv", *flags)
    assert (status, err) == (0, "")
    assert "1 GPU, 1 stage, 2 ops" in out
    if name.startswith("x$"):  # looks like a formula in a picture
        assert program("compare", *flags)[::2] == (0, "")


def test_a_file_says_for_how_many_gpus_and_microbatches_it_is(program, tmp_path):
    rows = [["0F0", "0F1", "0F2", "0B0", "0B1", "0B2"], ["1F0", "1B0", "1F1", "1B1", "1F2", "1B2"]]
    file = tmp_path / "three.csv"
    write_rows(file, rows)
    flags = ["--schedule", file, "--batch_size", 9, "--hidden_size", 12]
    again = tmp_path / "again.csv"
    status, out, err = program("export", again, *flags, "--comm_time", "1,2", "--num_batches", 1)
    assert (status, err) == (0, "")
    assert out
    assert again.read_text() == file.read_text()
    sizes = ["--num_stages", 2, "--num_microbatches", 3]
    assert program("export", again, *flags, *sizes)[0] == 0
    for key, value in (("num_stages", 7), ("num_stages", 4), ("num_microbatches", 9)):
        status, out, err = program("export", again, *flags, f"--{key}", value)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert f"{key}={value}" in err


@pytest.mark.parametrize("command", ["why", "in_flight", "compare"])
def test_the_forwards_that_recompute_repeats_are_said_to_count(program, tmp_path, command):
    sizes = ["--num_batches", 1, "--num_stages", 2, "--hidden_size", 8]
    sizes += ["--out", tmp_path] * (command == "compare")
    again = "Busy time includes the forwards that recompute runs a second time."
    assert again in program(command, *sizes, "--recompute", True)[1]
    assert again not in program(command, *sizes)[1]


def test_a_wrong_weight_gradient_time_is_told_what_it_is_a_part_of(program):
    _, _, err = program("why", "--weight_gradient_time", 3)
    assert "weight_gradient_time=3 must be a part of backward_time=1, from 0.001 to" in err
    assert "0 stands for half" in err


@pytest.mark.parametrize("command", ["worth", "staleness", "papers"])
def test_a_file_of_a_command_is_that_command(monkeypatch, capsys, command):
    path = str(Path(pipedream_lab.__file__).with_name(f"pipedream_{command}.py"))
    monkeypatch.setattr(sys, "argv", [path, "--help"])
    with pytest.raises(SystemExit) as done:
        runpy.run_path(path, run_name="__main__")
    assert done.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: pipedream_lab.py {command} [-h]")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(monkeypatch, capsys, command):
    monkeypatch.setattr(sys, "argv", ["pipedream_lab.py", command, "--help"])
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: pipedream_lab.py {command} [-h]")
    keys = KEYS.get(command, LAB_CONFIG)
    assert ("chunks_per_gpu" in out) == ("chunks_per_gpu" in keys)
    for key in ("num_stages", "num_batches"):  # with the command's own default
        default = f'"{key}": {DEFAULTS.get(command, {}).get(key, CONFIG[key])},  #'
        assert (default in out) == (key in keys)
    assert COMMANDS[command][0].__doc__.split(".")[0].split("\n")[0] in out


def test_export_and_trace_run_and_write(program, tmp_path):
    for command in (["export", tmp_path / "a.csv"], ["trace", tmp_path / "a.json"]):
        status, _, err = program(*command, "--schedule", "zb-h1", "--num_batches", 1)
        assert (status, err) == (0, "")
    assert sorted(os.listdir(tmp_path)) == ["a.csv", "a.json"]


@pytest.mark.parametrize(
    "flags",
    [
        ["nope"],
        ["compar"],
        ["x" * 10_000],
        ["compare", "--schedule", "zb-h3"],
        ["compare", "--weight_gradient_time", 1],
        ["compare", "--weight_gradient_time", "0.5,0.5"],
        ["compare", "--weight_gradient_time", "-1"],
        ["why", "--weight_gradient_time", "x", "--schedule", "zb-h2"],
        ["compare", "--schedule", "none.csv"],
        ["compare", "--num_stages", 0],
        ["compare", "--out", "/dev/null"],
        ["export"],
        ["export", "my.csv", "more"],
        ["export", "dir"],
        ["export", ""],
        ["export", "."],
        ["export", "-"],
        ["export", "notes.txt"],
        ["export", "run.json"],
        ["export", "dir.csv"],
        ["trace", "/"],
        ["trace", "/dev/null"],
        ["trace", "my.csv"],
        ["trace", "my.csv", "--schedule", "my.csv"],
        ["export", "my.csv", "--schedule", "my.csv"],
        ["export", "./link.csv", "--schedule", "my.csv"],
        ["export", "a.csv", "--weight_stashing"],
        ["compare", "--chunks_per_gpu", 0],
        ["export", "a.csv", "--schedule", "interleaved", "--num_microbatches", 2],
        ["export", "a.csv", "--schedule", "interleaved", "--chunks_per_gpu", 2],
        ["export", "a.csv", "--schedule", "interleaved", "--num_stages", "None"],
        ["export", "a.csv", "--chunks_per_gpu", "x"],
        ["export", "a.csv", "--chunks_per_gpu", "9" * 4000],
        ["trace", "a.json", "--batch_size", 5],
        ["trace", "a.json", "--device", "cuda:99"],
    ],
    ids=lambda flags: " ".join(map(str, flags))[:60],
)
def test_bad_input_gets_one_line_and_changes_nothing(program, tmp_path, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir.csv").mkdir()
    (tmp_path / "my.csv").write_text("0F0,0B0\n")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "link.csv").symlink_to("my.csv")
    before = sorted(os.listdir())
    status, out, err = program(*flags)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert len(err) < 600
    assert sorted(os.listdir()) == before
    assert (tmp_path / "my.csv").read_text() == "0F0,0B0\n"
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not os.listdir("dir.csv")


def test_a_file_that_is_replaced_keeps_its_mode_and_a_link_stays_a_link(program, tmp_path):
    (tmp_path / "real.csv").write_text("old")
    (tmp_path / "real.csv").chmod(0o600)
    (tmp_path / "link.csv").symlink_to(tmp_path / "real.csv")
    status, _, err = program("export", tmp_path / "link.csv")
    assert (status, err) == (0, "")
    assert (tmp_path / "link.csv").is_symlink()
    assert (tmp_path / "real.csv").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "real.csv").read_text() != "old"


def test_a_write_that_fails_leaves_the_old_file_whole(program, tmp_path, monkeypatch):
    def fails(rows, path):
        Path(path).write_text("half")
        raise OSError(28, "No space left on device")

    (tmp_path / "a.csv").write_text("old")
    monkeypatch.setattr(pipedream_lab, "write_csv", fails)
    status, _, err = program("export", tmp_path / "a.csv")
    assert (status, err.count("\n")) == (2, 1)
    assert os.listdir(tmp_path) == ["a.csv"]
    assert (tmp_path / "a.csv").read_text() == "old"


def test_the_script_runs_without_a_display_and_without_a_warning(tmp_path):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "MPLBACKEND": "nonsense"}
    environment.pop("DISPLAY", None)
    command = [sys.executable, "-W", "error", str(ROOT / "pipedream_lab.py"), "compare"]
    done = subprocess.run(
        [*command, "--num_batches", "1", "--num_stages", "2", "--hidden_size", "12"],
        cwd=tmp_path, env=environment, capture_output=True, timeout=120, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert os.listdir(tmp_path) == ["schedules.png"]


def test_what_imports_the_lab_does_not_import_matplotlib():
    code = "import pipedream_lab, sys; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
