"""Schedules in files: PyTorch's are read, ours are loaded by PyTorch, and bad ones are refused."""

import csv
import os

import pytest
from pytorch import order_that_pytorch_loads, rows_of_pytorch, save_as_pytorch_does
from small import FLUSHING, plan_of, same_as_recurrence

from pipedream.schedules.files import check_rows, read_csv, write_csv
from pipedream_simple import UserError


def write_rows(path, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)


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
    same_as_recurrence(plan)


MANY = [[f"{s}F0", f"{s}B0", f"{s}F1", f"{s}B1"] for s in range(199)]


@pytest.mark.parametrize("schedule", FLUSHING)
def test_what_we_export_is_read_again_and_loads_into_pytorchs_runtime(tmp_path, run, schedule):
    flags = ["--schedule", schedule, "--hidden_size", 12]
    assert run("export", "ours.csv", *flags).status == 0
    path, plan = tmp_path / "ours.csv", plan_of(schedule, 3, num_batches=1)
    computing = [[op for op in row if op.kind != "U"] for row in plan.schedule]
    assert read_csv(path) == [[op[:3] for op in row] for row in computing]
    again = plan_of(path, 3, num_batches=1)
    assert again == plan._replace(name="ours.csv", config={**plan.config, "schedule": str(path)})
    loaded = order_that_pytorch_loads(path, 4, plan.config["num_stages"], 4)
    assert loaded == [[str(op) for op in row] for row in computing]


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
        ([*MANY, ["199F1", "199F0", "199B1", "199B0"]], "deadlock: GPU0 waits for 1B0"),
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
