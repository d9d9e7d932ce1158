"""Schedules in files: PyTorch's are read, ours are loaded by PyTorch, and bad ones are refused."""

import csv
import itertools
import math
import os
import re

import numpy as np
import pytest
from pytorch import (
    cells,
    order_that_pytorch_loads,
    rows_of_pytorch,
    save_as_its_runtime_does,
    save_as_pytorch_does,
)
from small import FLUSHING, V_SHAPED, cells_of, plan_of, same_as_recurrence

from pipedream.commands import compare, in_flight, page, plan
from pipedream.planning.profiles import Layer
from pipedream.planning.search import best_partition
from pipedream.schedules.files import check_rows, read_csv, write_csv
from pipedream.schedules.plans import PLAN_CONFIG, describe_file
from pipedream.schedules.rows import LIBRARY
from pipedream_simple import CONFIG, SIZES, UserError, check_config


def write_rows(path, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)


PYTORCHS = [  # class, GPUs, microbatches, stages per GPU, names of ours
    ("ScheduleLoopedBFS", 3, 4, 2, "looped-bfs"),
    ("ScheduleInterleaved1F1B", 2, 4, 3, "interleaved"),
    ("ScheduleInterleavedZeroBubble", 4, 8, 1, "interleaved-zb, zb-h1"),
    ("ScheduleInterleavedZeroBubble", 2, 4, 2, "interleaved-zb"),
    ("ScheduleZBVZeroBubble", 3, 6, 2, "zb-v"),
    ("ScheduleDualPipeV", 2, 4, 2, "dualpipe-v"),
    ("ScheduleDualPipeV", 3, 8, 2, "dualpipe-v"),
]


@pytest.mark.parametrize(("name", "devices", "count", "chunks", "ours"), PYTORCHS)
def test_what_pytorch_generates_can_be_read_and_trains_to_plain_sgd(
    tmp_path, name, devices, count, chunks, ours
):
    rows, path = rows_of_pytorch(name, devices, count, chunks), tmp_path / "theirs.csv"
    save_as_pytorch_does(rows, path)
    plan = plan_of(path, batch_size=count * 2, layers_per_stage=2 * chunks)
    assert len(plan.schedule) == devices
    assert plan.config["num_stages"] == devices * chunks
    assert cells_of(plan) == cells(rows)
    assert bool(plan.pairs) == (ours == "dualpipe-v")
    assert describe_file(plan.config) == [f"theirs: these are the rows of {ours}."]
    same_as_recurrence(plan)


@pytest.mark.parametrize(
    ("name", "devices", "count", "chunks", "ours"),
    [
        *PYTORCHS,
        ("ScheduleZBVZeroBubble", 8, 16, 2, "zb-v"),
        ("ScheduleDualPipeV", 4, 10, 2, "dualpipe-v"),
        ("ScheduleInterleaved1F1B", 4, 8, 2, "interleaved"),
    ],
)
def test_what_pytorchs_runtime_writes_is_read_without_its_messages(
    tmp_path, run, name, devices, count, chunks, ours
):
    rows, path = rows_of_pytorch(name, devices, count, chunks), tmp_path / "compute_comms.csv"
    number = save_as_its_runtime_does(rows, path, devices * chunks, count)
    save_as_pytorch_does(rows, tmp_path / "compute_only.csv")
    assert read_csv(path) == read_csv(tmp_path / "compute_only.csv")
    flags = ["--schedule", path.name, "--batch_size", count, "--layers_per_stage", chunks]
    assert run("export", "again.csv", *flags).out.splitlines()[1:] == [
        f"compute_comms: these are the rows of {ours}.",
        f"{number} cells about messages or sharding left out: the simulator finds messages itself.",
    ]
    flags[1] = "again.csv"
    assert run("export", "more.csv", *flags).out.splitlines()[1:] == [
        f"again: these are the rows of {ours}."
    ]


def test_rows_that_are_no_schedules_of_ours_get_no_name(run, tmp_path):
    rows = [["0F0", "0F1", "0F2", "0B0", "0B2", "0B1"], ["1F0", "1F1", "1F2", "1B2", "1B0", "1B1"]]
    write_rows(tmp_path / "mine.csv", rows)
    out = run("export", "again.csv", "--schedule", "mine.csv", "--batch_size", 3).out
    assert out == "again.csv: mine, 2 GPUs, 2 stages, 12 ops\n"


MANY = [[f"{s}F0", f"{s}B0", f"{s}F1", f"{s}B1"] for s in range(199)]


@pytest.mark.parametrize("schedule", FLUSHING)
def test_what_we_export_is_read_again_and_loads_into_pytorchs_runtime(tmp_path, run, schedule):
    sizes = {"num_microbatches": 8, "layers_per_stage": 6, "hidden_size": 12}
    flags = [text for key, value in sizes.items() for text in (f"--{key}", value)]
    assert run("export", "ours.csv", "--schedule", schedule, *flags).status == 0
    path, plan = tmp_path / "ours.csv", plan_of(schedule, 3, num_batches=1, **sizes)
    steps = [[op[:3] for op in row if op.kind != "U"] for row in plan.schedule]
    assert [[(s, kind[0], m) for s, kind, m in row] for row in read_csv(path)] == steps
    again = plan_of(path, 3, num_batches=1, **sizes)
    assert again == plan._replace(name="ours", config={**plan.config, "schedule": str(path)})
    assert bool(again.pairs) == (schedule == "dualpipe-v")
    loaded = order_that_pytorch_loads(path, 4, plan.config["num_stages"], 8)
    assert loaded == cells_of(plan)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([["0F0", "0F1", "0B0", "0B1"], ["1F0", "1B0", "1B1"]], "microbatch 1.* it runs B"),
        ([["0F0", *["0B0"] * 9999], ["1F0", "1B0"]], "stage 0 .* it runs F B B"),
        ([["0F0", "0I0"], ["1F0", "1B0"]], "it runs F I"),
        ([["0F0", "0B0", "0W0"], ["1F0", "1B0"]], "it runs F B W"),
        ([["0F0", "0W0", "0I0"], ["1F0", "1B0"]], "it runs F W I"),
        ([["0F0", "0B0", "1F0"], ["1B0"]], "stage 1 is on GPU0 and on GPU1"),
        ([["0F0", "0B0"], [], ["1F0", "1B0"]], "GPU1 has nothing to do"),
        ([["0F0", "0X0"], ["1F0", "1B0"]], "line 1, column 2: '0X0' is not an op"),
        ([["0F0", "0B0"], ["F0", "1B0"]], "line 2, column 1: 'F0' is not an op"),
        ([["0F0", "0F" + "1" * 100_000]], "is not an op"),
        ([["0F0", "0B0"], ["2F0", "2B0"]], "stage 1 .* it runs nothing"),
        ([["0F0", "0B0", "999999F999999"]], "it runs nothing"),
        ([["0F0", "0B0", "0F1", "0B1"], ["1F1", "1F0", "1B1", "1B0"]], "0 waits for 1B0, GPU1"),
        (
            [
                ["0F0", "0F1", "0B0", "0B1"],
                ["1F0", "(1F1;1B0)OVERLAP_F_B", "1B1"],
                ["2F0", "2F1", "2B0", "2B1"],
            ],
            "GPU1 waits for 2B0",
        ),
        ([*MANY, ["199F1", "199F0", "199B1", "199B0"]], "deadlock: GPU0 waits for 1B0"),
        ([["", ""]], "has no ops"),
        ([["0UNSHARD", "0RECV_B0"]], "has no ops"),
        ([["0F0", "0B0", "0SEND_X0"]], "line 1, column 3: '0SEND_X0' is not an op"),
        ([["0F0", "0B0", "SEND_F0"]], "'SEND_F0' is not an op"),
        ([["0F&0", "0B0"]], "'0F&0' is not an op"),
        ([["(0F0;0F1)OVERLAP_F_B", "0B0", "0B1"]], r"'\(0F0;0F1\)OVERLAP_F_B' is not an op"),
        ([["0F0", "(0F1;0W0)OVERLAP_F_B"]], r"'\(0F1;0W0\)OVERLAP_F_B' is not an op"),
        ([["(0F0;0B0;0W0)OVERLAP_F_B"]], "is not an op"),
        ([["(0F0;0B0)OVERLAP"]], r"is not an op such as 0F0 or 2W1, or \(0F4;7B0\)OVERLAP_F_B"),
        ([["0F0", "(0F1;1B0)OVERLAP_F_B"], ["1F0", "1F1", "1B1"]], "1 is on GPU0 and on GPU1"),
        ([["(0F0;0B0)OVERLAP_F_B"]], "deadlock: GPU0 waits for 0F0"),
    ],
)
def test_a_bad_csv_gets_one_short_line(tmp_path, rows, words):
    write_rows(tmp_path / "bad.csv", rows)
    with pytest.raises(UserError, match=words) as caught:
        plan_of(tmp_path / "bad.csv", batch_size=12)
    assert "\n" not in str(caught.value)
    assert "bad.csv" in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("name", "make", "words"),
    [
        ("none.csv", lambda path: None, "cannot read .*none.csv"),
        ("x" * 300 + ".csv", lambda path: None, "cannot read"),
        ("dir.csv", lambda path: path.mkdir(), "cannot read .* not a regular file"),
        ("fifo.csv", os.mkfifo, "cannot read .* not a regular file"),
        ("loop.csv", lambda path: path.symlink_to(path), "cannot read"),
        ("end.csv", lambda path: path.write_bytes(b"0F0,0B0\n" * 5000 + b"\xff"), "position 40000"),
        ("nul.csv", lambda path: path.write_bytes(b"0F0,\0,0B0\n"), "nul.csv"),
    ],
)
def test_what_is_no_csv_is_refused_at_once(tmp_path, name, make, words):
    make(tmp_path / name)
    with pytest.raises(UserError, match=words):
        read_csv(tmp_path / name)


def test_a_csv_as_other_programs_write_it_is_read(tmp_path):
    for text in ("0F0,0B0\r\n", "\ufeff0F0,0B0\n", '"0F0", 0B0 ,\n\n', ",0F0,,0B0"):
        (tmp_path / "one.csv").write_bytes(text.encode())
        assert read_csv(tmp_path / "one.csv") == [[(0, "F", 0), (0, "B", 0)]]
    write_csv([[(0, "F", 0), (0, "B", 0)]], tmp_path / "one.csv")
    assert (tmp_path / "one.csv").read_bytes() == b"0F0,0B0\n"


def test_good_rows_pass_and_any_one_missing_or_doubled_op_does_not():
    good = [
        [(0, "F", 0), (0, "F", 1), (0, "B", 0), (0, "B", 1)],
        [(1, "F", 0), (1, "B", 0), (1, "F", 1), (1, "B", 1)],
    ]
    check_rows(good, "good")
    for device, row in enumerate(good):
        for place in range(len(row)):
            for change in ([], [row[place]] * 2):
                broken = [list(r) for r in good]
                broken[device][place : place + 1] = change
                with pytest.raises(UserError):
                    check_rows(broken, "broken")


@pytest.mark.parametrize("after", [(0, "F", 1), (0, "W", 0), (0, "F&", 1), None])
def test_a_pair_is_a_forward_and_the_backward_after_it(after, monkeypatch):
    """In a file it is one cell; only a schedule function can write something else."""
    row = [(0, "F&", 0), (0, "F", 1), (0, "I", 0), (0, "W", 0), (0, "B", 1)]
    row[1:2] = [after] * (after is not None)
    row = row[2:] + row[:1] if after is None else row
    monkeypatch.setitem(LIBRARY, "mine", (lambda *_: row, True))
    with pytest.raises(UserError, match="0F&0 must come right before a backward"):
        plan_of("mine", num_stages=1, num_microbatches=2)


def test_a_pair_may_be_written_in_any_order_and_with_half_a_backward(tmp_path):
    for pair, after in (("0F1;0B0", ""), (" 0B0 ; 0F1 ", ""), ("0I0;0F1", ",0W0")):
        text = f"0F0,({pair})OVERLAP_F_B{after},0B1\n"
        (tmp_path / "pair.csv").write_text(text)
        (row,) = read_csv(tmp_path / "pair.csv")
        assert row[1:3] == [(0, "F&", 1), (0, "I" if after else "B", 0)]
        write_csv([row], tmp_path / "again.csv")
        assert read_csv(tmp_path / "again.csv") == [row]
        plan = plan_of(tmp_path / "pair.csv", num_batches=1, batch_size=2, overlap_time=0.5)
        pair = [(e.start, e.end) for e in plan.events if e.op[1:3] in (("F", 1), (row[2][1], 0))]
        assert pair == [(1, 1.75 if after else 2)] * 2


@pytest.mark.parametrize(
    ("file", "label"),
    [
        (" x.csv", "x"),
        ("compute_only.csv", "compute_only"),
        ("v1.2.csv", "v1.2"),
        ("zb-v.csv", "zb-v.csv"),
        ("pipedream.csv", "pipedream.csv"),
        ("interleaved-zb-of-mine.csv", "interleaved-zb-o"),
        ("interleaved-zb  of mine.csv", "interleaved-zb.csv"),
        ("a" * 40 + ".csv", "a" * 16),
        (" .csv", "file.csv"),
        ("a$b日本.csv", "a?b??"),
    ],
)
def test_a_plan_is_called_as_its_file_in_short_but_never_as_a_schedule(tmp_path, file, label):
    (tmp_path / file).write_text("0F0,0B0\n")
    plan = plan_of(tmp_path / file)
    assert plan.name == label
    assert plan.name not in LIBRARY
    assert str(plan).startswith(f"{label}: ")
    assert describe_file(plan.config)[0].startswith(f"{label}: these are the rows of naive, gpipe")


def follow(run, *flags):
    """Run why, and again with what its error says to try, until it says no more: the advice."""
    given = []
    while (result := run("why", *flags, *given)).status:
        assert result.err.count("\n") == 1
        given += re.search(r": try (--\w+) (\d+)\n", result.err).groups()
    return [f"{key} {value}" for key, value in zip(given[::2], given[1::2], strict=True)]


def test_what_the_errors_advise_works(run, tmp_path):
    rows = [[f"{s}{kind}{m}" for kind in "FB" for m in range(10)] for s in range(2)]
    write_rows(tmp_path / "ten.csv", rows)
    for batch_size, advice in ((32, "40"), (1, "10"), (41, "50")):
        flags = "--schedule", "ten.csv", "--batch_size", batch_size
        assert follow(run, *flags) == [f"--batch_size {advice}"]
    assert follow(run, *flags[:2], "--batch_size", 40) == []
    out = run("why", "--schedule", "ten.csv").err
    assert "batch_size=32 must be a multiple of the 10 microbatches in ten.csv" in out
    for schedule, devices, layers in itertools.product(V_SHAPED, (2, 3, 4), (1, 2, 3, 4)):
        sizes = "--num_stages", devices, "--num_microbatches", 8, "--layers_per_stage", layers
        advice = [f"--layers_per_stage {layers + 1}"] * (layers % 2)
        assert follow(run, "--schedule", schedule, *sizes) == advice
    for on_0, on_1, layers in itertools.product((1, 2, 3, 4), (1, 2), (1, 2, 3)):
        hosts = [range(on_0), range(on_0, on_0 + on_1)]
        rows = [[*(f"{s}F0" for s in h), *(f"{s}B0" for s in reversed(h))] for h in hosts]
        write_rows(tmp_path / "cut.csv", rows)
        advice = follow(run, "--schedule", "cut.csv", "--layers_per_stage", layers)
        least = next(n for n in itertools.count(layers) if 2 * n % (on_0 + on_1) == 0)
        assert advice == [f"--layers_per_stage {least}"] * (least > layers)


@pytest.mark.parametrize("name", ["x$\\frac{$.csv", "日本.csv", "a,b.csv", "[x].csv", "x y.csv"])
def test_a_file_may_have_any_name(run, tmp_path, name):
    (tmp_path / name).write_text("0F0,0B0\n")
    flags = ["--schedule", name, "--num_batches", 1, "--layers_per_stage", 1]
    assert "1 GPU, 1 stage, 2 ops" in run("export", "again.csv", *flags).out
    if name.startswith("x$"):  # looks like a formula in a picture
        assert run("compare", *flags).status == 0


def test_a_file_says_for_how_many_gpus_and_microbatches_it_is(run, tmp_path):
    rows = [["0F0", "0F1", "0F2", "0B0", "0B1", "0B2"], ["1F0", "1B0", "1F1", "1B1", "1F2", "1B2"]]
    write_rows(tmp_path / "three.csv", rows)
    flags = ["--schedule", "three.csv", "--batch_size", 9, "--hidden_size", 12]
    assert run("export", "again.csv", *flags, "--comm_time", "1,2").status == 0
    assert (tmp_path / "again.csv").read_text() == (tmp_path / "three.csv").read_text()
    assert run("why", *flags, "--num_stages", 2, "--num_microbatches", 3).status == 0
    for key, value in (("num_stages", 7), ("num_stages", 4), ("num_microbatches", 9)):
        status, out, err = run("why", *flags, f"--{key}", value)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert f"{key}={value}, but in three.csv it is" in err


LAYERS = [Layer("a", 1.0, 2.0, 3.0, 4.0), Layer("b", 1.0, 2.0, 3.0, 4.0)]
CALLS = {  # what the message must name -> a call from Python with that value
    "gpus=": lambda value: best_partition(LAYERS, [value], [1e9]),
    "bandwidth=": lambda value: best_partition(LAYERS, [2], [value]),
    "straight=": lambda value: best_partition(LAYERS, [2], [1e9], straight=value),
    "memory=": lambda value: best_partition(LAYERS, [2], [1e9], memory=value),
    "layers=": lambda value: best_partition([value], [2], [1e9]),
    "layer 0: forward=": lambda value: best_partition(
        [LAYERS[0]._replace(forward=value)], [1], [1]
    ),
    "profile=|cannot read": lambda value: plan.main(CONFIG, value, [2], [1e9]),
    "config=": in_flight.main,
    "num_stages=": lambda value: in_flight.main({**PLAN_CONFIG, "num_stages": value}),
    "comm_time=": lambda value: page.page_data({**PLAN_CONFIG, "comm_time": value}),
}


@pytest.mark.parametrize("named", CALLS)
@pytest.mark.parametrize("value", [None, math.inf, math.nan, -1, "x", [], np.bool_(True)], ids=repr)
def test_from_python_a_bad_value_gets_one_line(named, value):
    if named == "memory=" and value is None:
        return  # without a limit
    with pytest.raises(UserError, match=rf"^({named})[^\n]*$"):
        CALLS[named](value)


@pytest.mark.parametrize("main", [page.page_data, in_flight.main, compare.main])
def test_from_python_a_missing_or_unknown_key_gets_one_line(main):
    for key in PLAN_CONFIG:
        with pytest.raises(UserError, match=f"^CONFIG has no '{key}': every key needs a value$"):
            main({k: value for k, value in PLAN_CONFIG.items() if k != key})
    with pytest.raises(UserError, match=r"^unknown key 'stages'"):
        main({**PLAN_CONFIG, "stages": 4})
    with pytest.raises(UserError, match=r"^config=None must be a dict"):
        main(None)


def test_numpys_numbers_are_numbers():
    config = {**PLAN_CONFIG, "num_stages": np.uint8(3), "forward_time": np.float32(1.5)}
    assert page.page_data(config) == page.page_data(
        {**PLAN_CONFIG, "num_stages": 3, "forward_time": 1.5}
    )
    plain = best_partition(LAYERS, [2], [1e9], memory=20)
    assert plain == best_partition(LAYERS, [np.uint8(2)], [np.float32(1e9)], memory=np.int64(20))
    check_config({**CONFIG, **dict.fromkeys(SIZES, np.int64(4))})
    # 2**64 weights, which are 0 in NumPy's integers
    powers = {"num_stages": 14, "layers_per_stage": 4, "hidden_size": 23}
    large = {key: np.int64(2**power) for key, power in powers.items()}
    with pytest.raises(UserError, match="at most 500,000,000 fit"):
        check_config({**CONFIG, **large, "num_microbatches": 1, "num_batches": 1})
