"""The lab against PyTorch's own schedules and loader, closed forms, plain SGD and real bytes."""

import csv
import itertools
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from PIL import Image
from reference import delayed_sgd
from torch.distributed.pipelining import schedules as theirs

import pipedream_lab
from pipedream_lab import (
    COMMANDS,
    LAB_SCHEDULES,
    MemoryMeter,
    Plan,
    all_plans,
    check_rows,
    draw_plans,
    interleaved,
    main,
    make_plan,
    measure_stages,
    memory_formula,
    partition,
    plain_sgd,
    read_csv,
    weights_of,
    write_csv,
    zb_h1,
)
from pipedream_simple import (
    CONFIG,
    SCHEDULES,
    UserError,
    build_schedule,
    makespan,
    memory_held,
    peak_in_flight,
    pin_versions,
    run_main,
    simulate,
    train,
)

ROOT = Path(__file__).parent.parent
SMALL = {**CONFIG, "hidden_size": 12, "device": "cpu", "num_batches": 3}


def plan_of(schedule, chunks_per_gpu=1, **settings):
    return make_plan({**SMALL, "schedule": str(schedule), **settings}, chunks_per_gpu)


def rows_of_pytorch(name, devices, microbatches, chunks):
    """[[action, ...] of each rank] as that class of PyTorch's makes them, idles included."""
    engine = getattr(theirs, name).__new__(getattr(theirs, name))
    engine.pp_group_size, engine.n_local_stages = devices, chunks
    engine._n_microbatches, engine.num_stages = microbatches, devices * chunks
    engine._num_stages = devices * chunks
    engine._stages = [types.SimpleNamespace() for _ in range(chunks)]
    engine.number_of_rounds = max(1, microbatches // devices)
    engine.microbatches_per_round = microbatches // engine.number_of_rounds
    actions = {r: engine._calculate_single_rank_operations(r) for r in range(devices)}
    if name == "ScheduleInterleavedZeroBubble":
        engine.pipeline_order = actions
        actions = engine._add_bubbles_to_actions(devices * chunks)
    return [actions[rank] for rank in range(devices)]


def save_as_pytorch_does(rows, path):
    engine = types.SimpleNamespace(pipeline_order=dict(enumerate(rows)))
    theirs.PipelineScheduleMulti._dump_csv(engine, str(path))


# ----------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize("devices", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("chunks", [1, 2, 3, 4])
def test_interleaved_rows_are_pytorchs_and_take_the_time_of_the_closed_form(devices, chunks):
    for rounds in (1, 2, 3):
        count = devices * rounds
        ours = [list(interleaved(d, devices, count, 1, chunks)) for d in range(devices)]
        pytorch = rows_of_pytorch("ScheduleInterleaved1F1B", devices, count, chunks)
        assert [[f"{s}{kind}{m}" for s, kind, m in row] for row in ours] == [
            [str(action) for action in row if action] for row in pytorch
        ]
        plan = plan_of(
            "interleaved",
            chunks,
            num_stages=devices,
            num_microbatches=count,
            batch_size=count,
            layers_per_stage=chunks,
            backward_time=2,
            num_batches=1,
        )
        expected = (chunks * count + devices - 1) * 3 / chunks
        assert makespan(simulate(plan.schedule, plan.config)) == pytest.approx(expected)


def test_zb_h1_takes_the_time_and_the_memory_of_the_paper():
    for stages, count in itertools.product(range(1, 8), range(1, 15)):
        schedule = pin_versions([zb_h1(s, stages, count, 2) for s in range(stages)], count)
        config = {**SMALL, "num_stages": stages, "num_microbatches": count, "backward_time": 2}
        events = simulate(schedule, config)
        assert peak_in_flight(schedule) == [min(stages, count)] * stages
        if count >= stages:
            assert max(e.end for e in events if e.op.microbatch < count) == 3 * count + stages - 1
        for row in schedule:  # every W after its I, and nothing forgotten
            at = {str(op): place for place, op in enumerate(row)}
            assert len(at) == len(row) == 2 * (3 * count + 1)
            for op in row:
                if op.kind == "W":
                    assert at[f"{op.stage}I{op.microbatch}"] < at[str(op)]


def same_as_plain_sgd(plan):
    run = train(plan.config, torch.float64, schedule=plan.schedule)
    losses, weights = delayed_sgd(plan.config, lambda stage: 0)
    torch.testing.assert_close(torch.tensor(run.losses), torch.tensor(losses), rtol=0, atol=1e-12)
    for ours, plain in zip(run.weights, weights, strict=True):
        for name in ours:
            torch.testing.assert_close(
                ours[name].detach(), plain[name].detach(), rtol=0, atol=1e-12
            )
    return run


@pytest.mark.parametrize(
    ("stages", "count", "chunks"), [(1, 1, 1), (2, 2, 3), (3, 6, 2), (4, 4, 3)]
)
def test_interleaved_and_zb_h1_train_to_the_weights_of_plain_sgd(stages, count, chunks):
    sizes = {"num_stages": stages, "num_microbatches": count, "batch_size": 12}
    for schedule in LAB_SCHEDULES:
        run = same_as_plain_sgd(plan_of(schedule, chunks, layers_per_stage=6, **sizes))
        assert set(run.peak_versions) == {1}


def test_a_backward_in_halves_gives_the_bits_of_a_whole_one():
    sizes = {"num_stages": 3, "num_microbatches": 4}
    whole, halves = plan_of("1f1b", **sizes), plan_of("zb-h1", **sizes)
    a, b = (train(plan.config, torch.float64, schedule=plan.schedule) for plan in (whole, halves))
    assert weights_of(a).allclose(weights_of(b), rtol=0, atol=1e-14)


def test_plain_sgd_of_the_lab_is_the_reference_of_the_tests():
    _, weights = delayed_sgd(SMALL, lambda stage: 0)
    flat = torch.cat([w.detach().flatten() for stage in weights for w in stage.values()])
    assert plain_sgd(SMALL).allclose(flat, rtol=0, atol=1e-14)


# --------------------------------------------------------------------------------------- files

PYTORCHS = [
    ("ScheduleLoopedBFS", 3, 4, 2),
    ("ScheduleInterleaved1F1B", 2, 4, 3),
    ("ScheduleInterleavedZeroBubble", 2, 4, 2),
    ("ScheduleInterleavedZeroBubble", 4, 8, 1),
    ("ScheduleZBVZeroBubble", 2, 4, 2),
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


@pytest.mark.parametrize("schedule", ["naive", "gpipe", "1f1b", "interleaved", "zb-h1"])
def test_what_we_export_is_read_again_and_loads_into_pytorchs_runtime(tmp_path, schedule):
    plan = plan_of(schedule, 3, num_batches=1)
    path = tmp_path / "ours.csv"
    write_csv([[op for op in row if op.kind != "U"] for row in plan.schedule], path)
    assert read_csv(path) == [[op[:3] for op in row if op.kind != "U"] for row in plan.schedule]
    again = plan_of(path, num_batches=1)
    assert again.schedule == plan.schedule
    stages = range(plan.config["num_stages"])
    for key in ("forward_time", "backward_time", "comm_time"):  # a list now, one time a stage
        given = plan.config[key]
        assert again.config[key] == (given if isinstance(given, list) else [given for _ in stages])
    for key in ("num_stages", "num_microbatches", "layers_per_stage"):
        assert again.config[key] == plan.config[key]

    runtime = theirs._PipelineScheduleRuntime.__new__(theirs._PipelineScheduleRuntime)
    stages = plan.config["num_stages"]
    runtime.pp_group_size, runtime._num_stages, runtime._n_microbatches = 4, stages, 4
    runtime._stages, runtime.pipeline_order, runtime.rank = [], {}, 0
    runtime._defer_pp_recv = False
    runtime._load_csv(str(path))  # validates the order, and adds the sends and receives
    for rank, row in enumerate(plan.schedule):
        computing = [str(a) for a in runtime.pipeline_order_with_comms[rank] if a.is_compute_op]
        assert computing == [str(op) for op in row if op.kind != "U"]


GOOD = [["0F0", "0F1", "0B0", "0B1"], ["1F0", "1B0", "1F1", "1B1"]]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([["0F0", "0F1", "0B0", "0B1"], ["1F0", "1B0", "1B1"]], "1F1 is missing"),
        ([["0F0", "0F1", "0B0", "0B1"], ["1F0", "1F1", "1B1"]], "1B0 is missing, or 1I0 with 1W0"),
        ([["0F0", "0B0", "0B0"], ["1F0", "1B0"]], "0B0 stands there twice"),
        ([["0F0", "0I0"], ["1F0", "1B0"]], "0B0 is missing, or 0I0 with 0W0"),
        ([["0F0", "0B0", "0W0"], ["1F0", "1B0"]], "0B0 stands there and one of its halves too"),
        ([["0B0", "0F0"], ["1F0", "1B0"]], "0F0 must stand before its backward"),
        ([["0F0", "0W0", "0I0"], ["1F0", "1B0"]], "I before W"),
        ([["0F0", "0B0", "1F0"], ["1B0"]], "stage 1 is on GPU0 and GPU1"),
        ([["0F0", "0B0"], [], ["1F0", "1B0"]], "GPU1 has nothing to do"),
        ([["0F0", "0X0"], ["1F0", "1B0"]], "line 1, column 2: '0X0' is no op"),
        ([["F0", "0B0"]], "line 1, column 1: 'F0' is no op"),
        ([["0F0", "0B0"], ["2F0", "2B0"]], "1F0 is missing"),
        ([["0F0", "0B0", "0F1", "0B1"], ["1F1", "1F0", "1B1", "1B0"]], "deadlock: GPU"),
        ([["0F999999", "0B999999"]], "0F0 is missing"),
        ([], "there is no op in it"),
        ([["", ""]], "there is no op in it"),
    ],
)
def test_a_bad_csv_is_told_in_one_line(tmp_path, rows, words):
    path = tmp_path / "bad.csv"
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        plan_of(path, batch_size=12)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_deadlock_names_who_waits_for_what(tmp_path):
    rows = [["0F0", "0B0", "0F1", "0B1"], ["1F1", "1F0", "1B1", "1B0"]]
    with open(tmp_path / "stuck.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    with pytest.raises(UserError, match="deadlock: GPU0 waits for 1B0, GPU1 waits for 0F1"):
        plan_of(tmp_path / "stuck.csv")


def test_what_is_no_csv_is_told_in_one_line(tmp_path):
    (tmp_path / "dir.csv").mkdir()
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00\x01")
    (tmp_path / "nul.csv").write_bytes(b"0F0,\0,0B0\n")
    for name, words in (
        ("none.csv", "cannot read"),
        ("dir.csv", "cannot read"),
        ("bytes.csv", "no CSV"),
        ("nul.csv", "no "),
    ):
        with pytest.raises(UserError, match=words):
            read_csv(tmp_path / name)


def test_a_csv_as_other_programs_write_it_is_read(tmp_path):
    for text in ("0F0,0B0\r\n", "\ufeff0F0,0B0\n", '"0F0", 0B0 ,\n\n', ",0F0,,0B0"):
        (tmp_path / "one.csv").write_bytes(text.encode())
        assert read_csv(tmp_path / "one.csv") == [[(0, "F", 0), (0, "B", 0)]]


def test_a_small_csv_with_huge_numbers_is_refused_at_once(tmp_path):
    (tmp_path / "huge.csv").write_text("0F0,0B0,999999F999999\n")
    with pytest.raises(UserError, match="is missing"):
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


# ------------------------------------------------------------------------ plans, memory, trace


def test_a_plan_keeps_the_network_and_the_work_of_each_gpu():
    times = {"forward_time": [1, 2, 3, 4], "backward_time": 6, "comm_time": [5, 6, 7, 8]}
    plan = plan_of("interleaved", 3, **times)
    assert plan.config["num_stages"] * plan.config["layers_per_stage"] == 12
    per_gpu = [sum(plan.config["forward_time"][d::4]) for d in range(4)]
    assert per_gpu == pytest.approx([1, 2, 3, 4])
    assert plan.config["backward_time"] == [2] * 12
    assert plan.config["comm_time"] == [5, 6, 7, 8] * 3
    for name in SCHEDULES:
        settings = {**SMALL, "schedule": name}
        assert make_plan(settings, 3) == Plan(name, settings, build_schedule(settings))


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_measured_memory_is_what_the_formula_says(count):
    config = {**SMALL, "num_microbatches": count, "num_batches": 5}
    plans, reasons = all_plans(config, 3)
    assert len(plans) + len(reasons) == len(SCHEDULES) + len(LAB_SCHEDULES) + 2
    for plan in plans:
        meter = MemoryMeter(plan.schedule)
        with meter.hooks():
            train(plan.config, watch=meter, schedule=plan.schedule)
        assert meter.peak == memory_formula(plan), plan.name
    names = [plan.name for plan in plans]
    assert names[:3] == ["naive", "gpipe", "1f1b"]
    assert names[-3:] == ["pipedream", "  vertical sync", "  no stashing"]


def test_the_trace_is_the_simulated_run(tmp_path):
    plan = plan_of("pipedream", num_batches=2, backward_time=2, comm_time=1)
    events = simulate(plan.schedule, plan.config)
    pipedream_lab.trace({**plan.config}, 1, tmp_path / "run.json")
    traced = json.loads((tmp_path / "run.json").read_text())["traceEvents"]
    by = {phase: [e for e in traced if e["ph"] == phase] for phase in "XsfCiM"}
    ops = {(e["name"], e["pid"], e["ts"], e["ts"] + e["dur"]) for e in by["X"]}
    expected = {(str(e.op), e.device, 1000 * e.start, 1000 * e.end) for e in events}
    assert ops == {e for e in expected if "U" not in e[0]}
    updates = {(e["pid"], e["ts"]) for e in by["i"]}
    assert updates == {(e.device, 1000 * e.end) for e in events if e.op.kind == "U"}
    # 3 links, 8 microbatches, there and back; every arrow starts and ends inside an op
    assert len(by["s"]) == len(by["f"]) == 3 * 8 * 2
    ends = {e["id"]: e for e in by["f"]}
    for start in by["s"]:
        end = ends[start["id"]]
        assert abs(end["pid"] - start["pid"]) == 1
        assert end["ts"] > start["ts"]
        for point in (start, end):
            assert any(
                e["pid"] == point["pid"] and e["ts"] < point["ts"] < e["ts"] + e["dur"]
                for e in by["X"]
            )
    for device, row in enumerate(plan.schedule):
        counters = [e for e in by["C"] if e["pid"] == device]
        ended = {e.op: e.end for e in events}
        assert [e["ts"] for e in counters[::2]] == [1000 * ended[op] for op in row]
        values = [e["args"]["count"] for e in counters]
        assert [*zip(values[::2], values[1::2], strict=True)] == memory_held(row)


def test_nothing_is_sent_inside_a_gpu(tmp_path):
    config = {**SMALL, "schedule": "interleaved", "num_stages": 1, "num_microbatches": 2}
    pipedream_lab.trace(config, 3, tmp_path / "one.json")
    traced = json.loads((tmp_path / "one.json").read_text())["traceEvents"]
    assert not [e for e in traced if e["ph"] in "sf"]
    assert len([e for e in traced if e["ph"] == "X"]) == 3 * 2 * 2 * 3  # stages, F B, M, N


def test_the_picture_of_all_ends_with_the_slowest_but_naive_and_names_stages():
    plans, _ = all_plans({**SMALL, "num_batches": 1}, 3)
    figure = draw_plans(plans)
    assert figure.texts[0].get_text() == "6 schedules, one time axis. The fastest: interleaved"
    assert [text.get_text().split(":")[0] for text in figure.texts[2:]] == [
        "naive",
        "gpipe",
        "1f1b",
        "interleaved",
        "zb-h1",
        "pipedream",
    ]
    for axes in figure.axes:
        assert axes.get_xlim() == (0, 2 * (4 + 4 - 1))
    labels = [{text.get_text() for text in axes.texts} for axes in figure.axes]
    assert {"F0", "B3"} <= labels[1]
    assert {"0F0", "8B0"} <= labels[3]
    assert {"I0", "W3"} <= labels[4]


# ---------------------------------------------------------------------------- clock and balance


def test_partition_is_as_good_as_the_best_of_all_cuts():
    generator = torch.Generator().manual_seed(0)
    for layers, stages, zeros in itertools.product(range(1, 9), range(1, 5), (False, True)):
        if stages <= layers:
            costs = torch.rand(layers, generator=generator).tolist()
            costs = [cost * (cost > 0.5) for cost in costs] if zeros else costs
            counts = partition(costs, stages)
            assert len(counts) == stages
            assert min(counts) >= 1
            assert sum(counts) == layers

            def slowest(cuts, costs=costs):
                return max(sum(costs[a:b]) for a, b in itertools.pairwise([0, *cuts, len(costs)]))

            every = itertools.combinations(range(1, layers), stages - 1)
            ours = slowest([*itertools.accumulate(counts)][:-1])
            assert ours == pytest.approx(min(map(slowest, every)))


def test_profile_times_the_stages_and_leaves_the_first_runs_out(monkeypatch):
    clock = itertools.count()
    ticks = [5.0] * 9 + [0.001] * 1000  # seconds between two looks at the clock: slow at first
    times = [0.0, *itertools.accumulate(ticks)]
    monkeypatch.setattr(pipedream_lab, "now", lambda device: times[next(clock)])
    forward, backward = measure_stages({**SMALL, "num_stages": 1}, repeats=2)
    assert forward == pytest.approx([1])  # milliseconds
    assert backward == pytest.approx([1])


def test_profile_simulates_with_what_it_measured(monkeypatch, capsys):
    monkeypatch.setattr(
        pipedream_lab, "measure_stages", lambda config: ([1, 2, 1, 1], [2, 4, 2, 2])
    )
    pipedream_lab.profile({**SMALL, "num_batches": 2}, 3)
    out = capsys.readouterr().out
    assert "Bottleneck: stage 1, 60% slower than the mean" in out
    assert re.search(r"one GPU: 60 ms", out)  # 4 microbatches of 3 + 6 + 3 + 3
    assert re.search(r"naive +60 +25.0% +1.00x", out)
    gpipe = 4 * 6 + 9  # the bottleneck works without a break, the others fill and empty
    assert re.search(rf"gpipe +{gpipe} ", out)


def test_partition_of_many_layers_is_quick():
    assert sum(partition([1.0] * 5000, 100)) == 5000
    assert set(partition([1.0] * 5000, 100)) == {50}


def test_a_file_says_itself_for_how_many_gpus_and_microbatches_it_is(program, tmp_path):
    rows = [["0F0", "0F1", "0F2", "0B0", "0B1", "0B2"], ["1F0", "1B0", "1F1", "1B1", "1F2", "1B2"]]
    with open(tmp_path / "three.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    flags = ["--schedule", tmp_path / "three.csv", "--batch_size", 9]
    for command in (["profile"], ["balance"], ["export", tmp_path / "again.csv"]):
        status, out, err = program(*command, *flags, "--comm_time", "1,2", "--num_batches", 1)
        assert (status, err) == (0, "")
        assert out


def test_balance_measures_and_gains(capsys, monkeypatch):
    costs = [(4, 8), (3, 6), (2, 4), (1, 2), (1, 2), (1, 2), (1, 2), (1, 2)]
    monkeypatch.setattr(pipedream_lab, "measure_layers", lambda layers, config: costs)
    config = {
        **SMALL,
        "num_stages": 4,
        "layers_per_stage": 2,
        "num_batches": 2,
        "schedule": "gpipe",
    }
    pipedream_lab.balance(config, 1)
    even, balanced = capsys.readouterr().out.splitlines()[-2:]
    assert even.split()[:5] == ["even", "2", "2", "2", "2"]
    name, *cells = balanced.split()
    assert name == "balanced"
    assert sum(map(int, cells[:4])) == 8
    assert max(map(float, cells[4:8])) == 12  # the most expensive layer alone: it cannot be less
    assert even.split()[-1] == "1.00x"
    slowest, rest = 21, 9 + 6 + 6  # F and B of each stage: 21, 9, 6, 6
    assert even.split()[-3] == f"{4 * slowest + rest:.3g}"  # a batch of four: the slowest, and once
    assert float(balanced.split()[-1][:-1]) > 1.3


# ------------------------------------------------------------------------------ the command line


@pytest.fixture
def program(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["pipedream_lab.py", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "100")
        status = run_main(main)
        return status, *capsys.readouterr()

    return run


def test_compare_prints_every_schedule_and_draws_them(program, tmp_path):
    folder = tmp_path / "new" / "folder"
    status, out, err = program("compare", "--out", folder, "--num_batches", 2)
    assert (status, err) == (0, "")
    table = out[: out.index("Memory of GPU0")].splitlines()
    lines = {re.split("  +", line.strip())[0]: line for line in table}
    for name in (*SCHEDULES, *LAB_SCHEDULES, "vertical sync", "no stashing"):
        assert name in lines
    for name in ("naive", "gpipe", "1f1b", "interleaved", "zb-h1"):
        assert float(lines[name].split()[-1]) < 1e-12  # to plain SGD
    run = train({**CONFIG, "num_batches": 2})
    time, speed_up, busy, bubble, _, _, versions, stale, loss, right, _ = lines[
        "pipedream"
    ].split()[1:]
    assert [time, speed_up] == [f"{2 * (8 + 3)}", f"{2 * 4 * 4 * 2 / (2 * (8 + 3)):.2f}x"]
    assert [busy, bubble] == [f"{8 / 11:.1%}", f"{3 / 11:.1%}"]
    assert [versions, stale] == ["2", "1"]
    assert [loss, right] == [f"{run.losses[-1]:.4f}", f"{run.test_accuracy:.1%}"]
    assert out.count("GPU3 ") == out.count("GPU0 ") - 1 == 8  # once in the heading of the table
    assert float(lines["pipedream"].split()[-1]) > 1e-6
    with Image.open(folder / "schedules.png") as image:
        assert image.width < 4000
    assert max(map(len, table)) <= 100


def test_compare_says_which_schedule_cannot_be_had_and_why(program, tmp_path):
    flags = ["--num_batches", 1, "--num_microbatches", 2, "--out", tmp_path]
    status, out, _ = program("compare", *flags)
    assert status == 0
    reason = "interleaved is not here: num_microbatches=2 must be a multiple of num_stages=4"
    assert reason in out


def test_compare_puts_a_file_beside_the_others(program, tmp_path):
    rows = rows_of_pytorch("ScheduleZBVZeroBubble", 2, 4, 2)
    save_as_pytorch_does(rows, tmp_path / "zbv.csv")
    file = tmp_path / "zbv.csv"
    flags = ["--num_batches", 1, "--layers_per_stage", 6, "--out", tmp_path]
    status, out, err = program("compare", "--schedule", file, *flags)
    assert (status, err) == (0, "")
    line = next(line for line in out.splitlines() if line.startswith(str(file)))
    assert float(line.split()[-1]) < 1e-12


@pytest.mark.parametrize("name", ["x$\\frac{$.csv", "日本.csv"])
def test_a_file_may_have_any_name(program, tmp_path, name):
    (tmp_path / name).write_text("0F0,0B0\n")
    flags = ["--num_batches", 1, "--layers_per_stage", 1, "--out", tmp_path]
    status, _, err = program("compare", "--schedule", tmp_path / name, *flags)
    assert (status, err) == (0, "")


def test_an_export_through_a_link_leaves_the_link(program, tmp_path):
    (tmp_path / "link.csv").symlink_to(tmp_path / "real.csv")
    status, _, err = program("export", tmp_path / "link.csv")
    assert (status, err) == (0, "")
    assert (tmp_path / "link.csv").is_symlink()
    assert (tmp_path / "real.csv").is_file()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(program, monkeypatch, capsys, command):
    monkeypatch.setattr(sys, "argv", ["pipedream_lab.py", command, "--help"])
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 0
    out = capsys.readouterr().out
    assert "--chunks_per_gpu" in out
    assert "--num_stages" in out
    assert COMMANDS[command].__doc__.split(".")[0].split("\n")[0] in out


def test_export_trace_profile_and_balance_run_and_write(program, tmp_path):
    for command in (
        ["export", tmp_path / "a.csv"],
        ["trace", tmp_path / "a.json"],
        ["profile"],
        ["balance"],
    ):
        status, out, err = program(*command, "--schedule", "zb-h1", "--num_batches", 1)
        assert (status, err) == (0, "")
        assert out
    assert sorted(os.listdir(tmp_path)) == ["a.csv", "a.json"]


@pytest.mark.parametrize(
    "flags",
    [
        ["nope"],
        ["compar"],
        ["compare", "--schedule", "zb-h2"],
        ["compare", "--schedule", "none.csv"],
        ["compare", "--num_stages", 0],
        ["export"],
        ["export", "my.csv", "more"],
        ["export", "dir"],
        ["export", ""],
        ["export", "."],
        ["trace", "/"],
        ["trace", "/dev/null"],
        ["balance", "--schedule", "interleaved"],
        ["compare", "--chunks_per_gpu", 0],
        [
            *["export", "a.csv", "--schedule", "interleaved", "--layers_per_stage", 2500],
            *["--chunks_per_gpu", 2500, "--num_microbatches", 2500, "--batch_size", 2500],
        ],
        ["trace", "none/run.json"],
        ["export", "a.csv", "--schedule", "interleaved", "--num_microbatches", 2],
        ["export", "a.csv", "--schedule", "interleaved", "--chunks_per_gpu", 2],
        ["export", "a.csv", "--schedule", "interleaved", "--chunks_per_gpu", 0],
        ["export", "a.csv", "--chunks_per_gpu", "x"],
        ["profile", "--batch_size", 5],
        ["balance", "--device", "cuda:99"],
    ],
)
def test_bad_input_gets_one_line_and_writes_nothing(program, tmp_path, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dir").mkdir()
    status, out, err = program(*flags)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "Traceback" not in err
    assert os.listdir(tmp_path) == ["dir"]


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
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "MPLBACKEND": "TkAgg"}
    environment.pop("DISPLAY", None)
    command = [sys.executable, "-W", "error", str(ROOT / "pipedream_lab.py"), "compare"]
    done = subprocess.run(
        [*command, "--num_batches", "1", "--num_stages", "2"],
        cwd=tmp_path, env=environment, capture_output=True, timeout=120, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert os.listdir(tmp_path) == ["schedules.png"]
