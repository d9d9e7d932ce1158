"""The program as its reader meets it: what it prints, what it refuses, and how it ends."""

import math
import os
import re
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import pipedream_simple
from pipedream.backstage.measures import peak_in_flight, peak_versions, staleness
from pipedream_simple import (
    CONFIG,
    RULES,
    SCHEDULES,
    UserError,
    build_schedule,
    check_config,
    choose_device,
    format_per_gpu,
    format_timeline,
    makespan,
    parse_config,
    parse_value,
    simulate,
    train,
    utilization,
)

ROOT = Path(pipedream_simple.__file__).parent
SCRIPT = ROOT / "pipedream_simple.py"


@pytest.fixture
def program(run):
    """Run the program in this process: program("--flag value") -> (status, stdout, stderr)."""
    return lambda flags="": run("pipedream_simple.py", *flags.split())


def simulated(config):
    """Every schedule and its events, as main makes them."""
    schedules = {name: build_schedule({**config, "schedule": name}) for name in SCHEDULES}
    return {name: (rows, simulate(rows, config)) for name, rows in schedules.items()}


def start(*arguments, script=SCRIPT, **settings):
    """Run the script as a process of its own, as bytes."""
    settings["env"] = {**os.environ, "PYTHONIOENCODING": "utf-8", **settings.get("env", {})}
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, capture_output=True, timeout=120, **settings)


# ---------------------------------------------------------------------------- what it prints


def test_the_default_run_prints_the_lines_of_the_guide_with_true_numbers(program):
    status, out, err = program()
    assert (status, err) == (0, "")
    device = "1 GPU" if torch.cuda.is_available() else "CPU"
    for line in (
        "🚀 PipeDream Pipeline Created!",
        f"⚠️  SIMULATION MODE: Running on {device} (simulating 4 GPUs)",
        "Pipeline stages: 4 (would be 4 GPUs in real setup)",
        "Microbatches: 4",
        "💡 In real PipeDream:",
        "   - Each stage would be on a separate GPU",
        "   - All 4 GPUs would work in parallel",
        "💡 In this simulation:",
        "📊 PIPELINE TIMELINE VISUALIZATION",
        "Time| GPU0 (Stage 0)| GPU1 (Stage 1)| GPU2 (Stage 2)| GPU3 (Stage 3)",
        "t0  | MB0 forward   | idle          | idle          | idle",
        "t3  | MB3 forward   | MB2 forward   | MB1 forward   | MB0 forward    ← All busy!",
        "BATCH 1/5",
        "✅ Batch complete! All stages now at version 1",
    ):
        assert line in out.splitlines()
    assert len(out.splitlines()) <= 80
    runs, run = simulated(CONFIG), train(CONFIG)
    assert f"Average loss across 4 microbatches: {run.losses[0]:.4f}\n" in out
    for batch, loss in enumerate(run.losses):
        line = f"- Batch {batch + 1}: Loss {loss:.4f} (weights v{batch} → v{batch + 1})"
        assert out.count(line) == 1
    for op, _, _, end in runs["pipedream"][1]:
        line = f"Stage {op.stage}: Updated weights v{op.version} → v{op.version + 1}  (at t{end})"
        assert op.kind != "U" or (line in out) == (op.version == 0)
    busy = (f"{utilization(runs[name][1]):.1%}" for name in ("naive", "1f1b", "pipedream"))
    assert " ".join(out.splitlines()[1:3]) == (
        "4 GPUs: {} busy with one microbatch at a time, {} with a flush per batch (1F1B), "
        "{} without a flush (PipeDream)"
    ).format(*busy)
    assert f"Test accuracy: {run.test_accuracy:.1%}" in out
    for figure in ("Makespan: 46 ", "utilization: 87.0%", "13.0%", "160)"):
        assert figure in out


def test_quiet_is_short_and_keeps_losses_measures_and_comparison(program):
    loud, quiet = program().out, program("--verbose False").out
    assert len(quiet.splitlines()) < 45
    assert "BATCH" not in quiet
    assert "TIMELINE" not in quiet
    assert loud[loud.index("Training results") :] in quiet


@pytest.mark.parametrize("flags", [
    "--num_stages 8", "--num_stages 2 --num_microbatches 2", "--weight_stashing False",
    "--schedule naive --forward_time 1,2.5,1,1", "--num_microbatches 1 --num_batches 20",
    "--num_stages 16 --num_microbatches 8 --verbose False", "--recompute True",
    "--num_stages 8 --num_microbatches 2", "--schedule naive --weight_stashing False",
    "--num_stages 1 --num_microbatches 1 --num_batches 1 --layers_per_stage 1 --batch_size 1",
])  # fmt: skip
def test_small_and_large_configs_work_and_fit_an_80_column_terminal(program, flags):
    status, out, err = program(flags)
    assert (status, err) == (0, "")
    assert "Test accuracy" in out
    assert [line for line in out.splitlines() if len(line) > 80] == []


@pytest.mark.parametrize("seed", range(3))
def test_only_a_run_that_diverges_is_said_to_diverge(program, seed):
    """At a small learning rate the last batch may look worse than the first: another batch."""
    assert "diverged" not in program(f"--learning_rate 0.001 --seed {seed} --verbose False").out
    out = program(f"--learning_rate 30 --seed {seed} --verbose False").out
    losses = [float(x) for x in re.findall(r"Loss (\d+\.\d+|nan|inf)", out)]
    assert ("The loss diverged: try a smaller" in out) == (not losses[-1] < 10 * losses[0])
    out = program(f"--learning_rate 1e30 --seed {seed} --verbose False").out
    assert "The loss diverged: try a smaller learning_rate" in out
    assert "Test accuracy: nan%" in out


def test_the_batch_lines_show_the_versions_that_forwards_and_backwards_read(program):
    batch = r"Batch 5: Loss \d\.\d+ \(weights v4 → v5\) +(.*)"
    one = "--num_microbatches 1 --batch_size 8 "
    out = program(one).out
    assert re.search(batch, out)[1] == "v1 v2 v3 v4"
    assert "All stages now at version 1 or newer\n" in out  # the last one is at version 2 by then
    out = program(one + "--weight_stashing False").out
    assert re.search(batch, out)[1] == "v1 v2 v3 v4   v4 v4 v4 v4"
    for flags in ("", "--schedule gpipe", "--num_stages 1"):
        out = program(f"--weight_stashing False {flags}").out
        assert ("Gradients are wrong where F and B differ" in out) == (flags == "")


@pytest.mark.parametrize(
    "flags", ["--num_microbatches 2", "--num_microbatches 8", "--num_stages 2", "--num_stages 8"]
)
def test_every_experiment_of_the_guide_changes_timeline_utilization_and_training(program, flags):
    before, after = program().out, program(flags).out
    for part in (r"TIMELINE(?s:.*?)BATCH", r"GPU utilization: .*"):
        assert re.search(part, before)[0] != re.search(part, after)[0]
    loss = r"Batch 5: Loss [\d.]+"
    same_loss = re.search(loss, before)[0] == re.search(loss, after)[0]
    # 8 microbatches are fuller, but with 4 or more no stage of 4 is further behind than one batch
    assert same_loss == (flags == "--num_microbatches 8")


@pytest.mark.parametrize("width", [79, 80, 160])
@pytest.mark.parametrize("size", [(1, 1, 1), (2, 4, 2), (4, 4, 5), (8, 4, 3), (16, 4, 2)])
def test_the_timeline_fits_keeps_its_columns_and_shows_the_events(width, size):
    names = ("num_stages", "num_microbatches", "num_batches")
    config = {**CONFIG, **dict(zip(names, size, strict=True))}
    events = simulate(build_schedule(config), config)
    lines = format_timeline(events, width).splitlines()
    assert all(len(line) <= width for line in lines)
    roomy = "Stage" in lines[0]
    assert roomy or lines.pop(0).startswith("(a column is a GPU")
    assert roomy == (16 * (size[0] + 1) <= width)
    running = {(e.start, e.device): e.op for e in events if e.op.kind != "U"}
    times = []
    for line in lines[1:]:
        if line.startswith("..."):
            hidden = int(re.fullmatch(r"\.\.\.  \((\d+) more rows\)", line)[1])
            times += range(len(times), len(times) + hidden)
            continue
        first, *cells = re.split(
            r"\| ?|(?<!MB) +(?![fb])" if roomy else " +", line.partition(" ←")[0]
        )
        cells = [cell.strip() for cell in cells if cell.strip()]
        time = int(first.strip()[1:])
        times.append(time)
        assert len(cells) == size[0]
        for device, cell in enumerate(cells):
            op = running.get((time, device))
            if roomy:
                word = {"F": "forward", "B": "backward"}[op.kind] if op else ""
                assert cell == (f"MB{op.microbatch} {word}" if op else "idle")
            else:
                assert cell == (f"{op.kind}{op.microbatch}" if op else ".")
        assert ("All busy" in line) == all((time, d) in running for d in range(size[0]))
    assert times == list(range(makespan(events)))


@pytest.mark.parametrize("num_stages", [1, 2, 4, 8])
def test_the_timeline_shows_the_pipeline_fill_and_drain_and_folds_what_lies_between(num_stages):
    config = {**CONFIG, "num_stages": num_stages, "num_batches": 8}
    lines = format_timeline(simulate(build_schedule(config), config), 200).splitlines()
    (fold,) = (place for place, line in enumerate(lines) if line.startswith("..."))
    assert any("All busy" in line for line in lines[1:fold])
    assert len(lines) < 4 * num_stages + 8


def test_unequal_times_get_a_row_wherever_something_begins_or_ends():
    config = {**CONFIG, "num_stages": 2, "num_microbatches": 1, "num_batches": 1}
    config |= {"forward_time": [1, 2.5], "backward_time": 0.1, "comm_time": 0.2}
    lines = format_timeline(simulate(build_schedule(config), config)).splitlines()
    rows = [line.split("|")[0].strip() for line in lines[1:]]
    assert rows == ["t0", "t1", "t1.2", "t3.7", "t3.8", "t4"]  # 0.1 + 0.2 and 0.3 are one row


@pytest.mark.parametrize("flags", [
    "", "--num_microbatches 1 --num_batches 8", "--num_stages 6", "--comm_time 0.5",
    "--weight_stashing False --schedule gpipe",
])  # fmt: skip
def test_the_comparison_shows_what_the_functions_say_and_marks_this_run(program, flags):
    config, _ = parse_config("", argv=flags.split())
    out = program(flags).out
    lines = out[out.index("📊 ALL SCHEDULES") :].splitlines()[2:6]
    for line, (name, (rows, events)) in zip(lines, simulated(config).items(), strict=True):
        cells = [name, f"{makespan(events):g}", f"{utilization(events):.1%}"]
        behind = staleness(rows, config["num_microbatches"])
        cells += map(format_per_gpu, (peak_in_flight(rows), peak_versions(rows), behind))
        assert re.split(r" {2,}", line[1:].strip()) == cells
        assert (line[0] == "*") == (name == config["schedule"])
    naive = makespan(simulated(config)["naive"][1])
    assert f"naive, one microbatch at a time: {naive:g})" in out


def test_long_runs_are_thinned_out(program):
    out = program("--num_batches 41 --num_microbatches 16 --num_stages 10").out
    assert len(out.splitlines()) < 120
    batches = [int(number) for number in re.findall(r"- Batch (\d+): Loss", out)]
    assert batches == [*range(1, 41, 3), 41]


def test_help_shows_config_with_its_comments(program, capsys):
    with pytest.raises(SystemExit) as stop:
        program("--help")
    assert stop.value.code == 0
    out, source = capsys.readouterr().out, SCRIPT.read_text("utf-8")
    block = source[source.index("CONFIG = {") + 9 : source.index("\n}\n")]
    assert block in out
    assert re.findall(r'"(\w+)": .*?  # .', block) == list(CONFIG)
    assert set(RULES) == set(CONFIG)


def test_flags_mean_what_config_would_and_other_flags_come_apart():
    flags = "--num_stages 2 --forward_time 1,2.5 --weight_stashing False --out here"
    config, other = parse_config("", flags={"--out": {}}, argv=flags.split())
    settings = {"num_stages": 2, "forward_time": [1, 2.5], "weight_stashing": False}
    assert config == {**CONFIG, **settings}
    assert other == {"out": "here"}
    assert parse_config("", argv=[]) == (CONFIG, {})


def test_values_are_read_as_python_reads_them():
    for text, value in (
        ("4", 4), ("0.5", 0.5), ("1e3", 1000.0), ("True", True), ("1,2,1", [1, 2, 1]),
        ("[1, 2]", [1, 2]), ("-1,1", [-1, 1]),
    ):  # fmt: skip
        assert parse_value(text) == value
    for text in ("cuda:1", "nan", "", "1f1b", "my,file.csv"):
        assert parse_value(text) == text


def test_with_recompute_a_backward_shows_the_time_of_its_forward_too(program):
    out, plain = program("--recompute True --schedule gpipe").out, program("--schedule gpipe").out
    assert "Makespan: 105 time units (naive, one microbatch at a time: 240)" in out  # 5 x 7 x 3
    rows = [line.partition(" ←")[0].split("|") for line in out.splitlines() if line[:1] == "t"]
    last = [(cells[0].strip(), cells[-1].strip()) for cells in rows]
    assert last[6:9] == [("t6", "MB3 forward"), ("t7", "MB0 backward"), ("t9", "MB1 backward")]
    losses = [line for line in plain.splitlines() if "Loss" in line]
    assert losses == [line for line in out.splitlines() if "Loss" in line] != []
    again = "Busy time includes the forwards that recompute runs a second time."
    assert again in out
    assert again not in plain


# ---------------------------------------------------------------------------- what it refuses

WHOLE = "must be a whole number from 1 to 10,000,000"
TIME = "must be a number, or one per stage, from"
BAD_FLAGS = {
    "--num_stages 0": f"num_stages=0 {WHOLE}",
    "--num_stages 2.5": f"num_stages=2.5 {WHOLE}",
    "--num_stages": "--num_stages: expected one argument",
    "--num_stagez 4": "--num_stagez",
    "stray": "unrecognized arguments: stray",
    "--num_microbatches 5": "batch_size=32 cannot be split evenly into num_microbatches=5: try 1,",
    "--seed -1": "seed=-1 must be a whole number from 0 to",
    "--learning_rate 0": "learning_rate=0 must be a number from 1e-30 to 1e+30",
    "--learning_rate nan": "learning_rate='nan' must be",
    "--schedule nope": "schedule='nope' must be one of naive, gpipe, 1f1b, pipedream",
    "--schedule my.csv": "pipedream (others, and CSV files: python -m pipedream why)",
    "--network nope": "network='nope' must be one of residual, transformer",
    "--network transformer --hidden_size 30": "hidden_size=30 must be a multiple of",
    "--momentum 1.1": "momentum=1.1 must be a number from 0 to 1",
    "--recompute 1": "recompute=1 must be one of True, False",
    "--device nope": "device='nope' must be one of auto,",
    "--device cuda:99": "device='cuda:99' must be one of auto,",
    "--vertical_sync True --weight_stashing False": "vertical_sync=True needs weight_stashing=True",
    "--forward_time 0": f"forward_time=0 {TIME} 1e-09",
    "--forward_time 1,2": "forward_time=[1, 2] must have num_stages=4 entries",
    "--comm_time 1,2": "comm_time=[1, 2] must have num_stages=4 entries",
    "--forward_time 1,2,x,4": f"forward_time='1,2,x,4' {TIME}",
    "--comm_time -1": f"comm_time=-1 {TIME} 0",
    "--hidden_size 30000": "hidden_size * hidden_size is 10,800,000,000: at most 500,000,000 fit",
    "--batch_size 4000000": "batch_size * num_batches is 20,000,000: at most 10,000,000 fit",
    "--num_batches 100000": "num_stages * num_microbatches * num_batches is 1,600,000: at most",
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags_get_one_line_and_status_2(program, flags):
    status, out, err = program(flags)
    assert (status, out if "transformer" not in flags else "") == (2, "")
    assert err.startswith("pipedream_simple.py: ")
    assert err.count("\n") == 1
    assert BAD_FLAGS[flags] in err


def test_bad_configs_are_refused_from_python_too():
    with pytest.raises(UserError, match="unknown key 'num_stagez' in CONFIG: its keys are num_"):
        check_config({**CONFIG, "num_stagez": 4})
    with pytest.raises(UserError, match="CONFIG has no 'seed'"):
        check_config({key: value for key, value in CONFIG.items() if key != "seed"})
    for key in RULES:
        for value in (None, "x", [], math.nan, -1, 10**31):
            with pytest.raises(ValueError, match=key):
                check_config({**CONFIG, key: value})
    for settings in ({"num_microbatches": 3}, {"forward_time": [1, 1, 1]}, {"schedule": "zb-h1"}):
        for call in (train, build_schedule):
            with pytest.raises(UserError, match=next(iter(settings))):
                call({**CONFIG, **settings})
    with pytest.raises(UserError, match="forward_time"):
        simulate(build_schedule(CONFIG), {**CONFIG, "forward_time": -5})


@pytest.mark.parametrize("settings", [
    {"num_batches": np.uint8(100)}, {"num_microbatches": np.int8(4), "num_batches": 40},
    {"batch_size": np.int64(64), "seed": np.uint16(3)}, {"learning_rate": np.float32(0.125)},
])  # fmt: skip
def test_numpys_numbers_train_as_pythons_do(settings):
    config = {**CONFIG, "num_stages": 2, "hidden_size": 8}
    plain = {key: np.asarray(value).item() for key, value in settings.items()}
    assert train({**config, **settings}).losses == train({**config, **plain}).losses


def test_a_control_character_in_a_flag_never_reaches_the_terminal(run):
    for command in (["why", "--schedule"], ["trace"], ["page", "--out"], ["plan", "--gpus", 2]):
        status, out, err = run(*command, "a\x1b[31m\nb.csv")
        assert (status, out) == (2, "")
        assert err.endswith("'a\\x1b[31m\\nb.csv' contains a character that cannot be printed\n")
    assert "\x1b" not in run("pipedream_simple.py", "\x1b[31m").err
    assert "\x1b" not in run("pipedream_visual.py", "--out", "\x1b[31m").err


def test_alone_in_a_folder_it_runs_and_its_config_is_checked(tmp_path):
    """Copied with digits.npz: nothing else of ours is there."""
    source, script = SCRIPT.read_text("utf-8"), tmp_path / "pipedream_simple.py"
    for digits, old, new, error in (
        (False, "", "", b"digits.npz: No such file or directory"),
        (True, '"num_stages": 4', '"num_stagez": 4', b"unknown key 'num_stagez' in CONFIG"),
        (True, '"num_microbatches": 4', '"num_microbatches": 3', b"try 1, 2, 4, 8, 16, 32"),
        (True, '"network": "residual"', '"network": "transformer"', b"must be one of residual"),
        (True, '"num_stages": 4', '"num_stages": 2', b""),
    ):
        if digits:
            (tmp_path / "digits.npz").write_bytes((ROOT / "digits.npz").read_bytes())
        script.write_text(source.replace(old, new, 1), "utf-8")
        done = start(script=script, cwd=tmp_path)
        assert error in done.stderr
        assert done.returncode == (2 if error else 0)
        assert done.stderr.count(b"\n") == bool(error)


def test_out_of_memory_names_batch_size_and_the_cpu(program, monkeypatch):
    def fails_with(error):
        def train(*_, **__):
            raise error

        monkeypatch.setattr(pipedream_simple, "train", train)
        return program()

    for error in (
        MemoryError(),
        MemoryError("Unable to allocate output buffer."),  # so do NumPy and zlib, which read digits
        zlib.error("Error -4 while decompressing data"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    ):
        status, _, err = fails_with(error)
        assert (status, err.count("\n")) == (2, 1)
        assert "batch_size" in err
        assert "--device cpu" in err
    assert fails_with(KeyboardInterrupt())[::2] == (130, "pipedream_simple.py: stopped\n")
    for error in (RuntimeError("a bug"), ValueError("another")):  # with a traceback
        with pytest.raises(type(error), match=str(error)):
            fails_with(error)


# ---------------------------------------------------------------------- where and how it ends


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_any_terminal_gets_text(encoding, tmp_path):
    done = start(env={"PYTHONIOENCODING": encoding}, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, b"")
    out = done.stdout.decode(encoding)
    assert "PipeDream Pipeline Created!" in out
    assert "Stage 0: Updated weights v0 -> v1" in out
    assert "?" not in out.replace("WAIT?", "")
    assert not list(tmp_path.iterdir()), "the run left something behind"


@pytest.mark.skipif(os.name != "posix", reason="a shell pipe")
@pytest.mark.parametrize(("redirection", "status", "lines"), [
    ("| head -n 1", 0, 0), (">/dev/full", 2, 1), (">&-", 0, 0),
])  # fmt: skip
def test_a_reader_that_has_seen_enough_and_a_full_disk(redirection, status, lines):
    command = f"set -o pipefail; '{sys.executable}' '{SCRIPT}' --num_stages 16 {redirection}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, timeout=120)
    assert (done.returncode, done.stderr.count(b"\n")) == (status, lines), done.stderr


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("command", [[SCRIPT], ["-m", "pipedream", "why"]], ids=str)
def test_ctrl_c_during_the_imports_shows_no_traceback(command):
    run = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    )
    with pytest.raises(subprocess.TimeoutExpired):
        run.wait(0.4)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert run.returncode in (130, -signal.SIGINT)
    assert err.count(b"\n") <= 1


def test_with_gpus_auto_takes_the_first_and_the_banner_says_so(program, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto") == torch.device("cuda")
    assert choose_device("cpu") == torch.device("cpu")
    assert pipedream_simple.find_devices() == ["cuda", "cuda:0", "cuda:1", "cpu"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("auto") == torch.device("mps")
    monkeypatch.setattr(pipedream_simple, "train", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # there is none to train on
        program()
    out = capsys.readouterr().out
    assert "SIMULATION MODE: Running on 1 GPU (simulating 4 GPUs)" in out
    assert "All stages are on 1 GPU" in out


@pytest.mark.parametrize(("schedule", "name"), pipedream_simple.NAMES.items())
def test_the_banner_names_the_schedule_that_runs(program, schedule, name):
    out = program(f"--schedule {schedule} --num_batches 1 --verbose False").out
    assert f"{name} Pipeline Created!" in out
    assert ("All 4 GPUs would work in parallel" in out) == (schedule != "naive")


def test_importing_prints_nothing_and_writes_nothing(tmp_path):
    command = [sys.executable, "-c", "import pipedream_simple"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, capture_output=True, cwd=tmp_path, env=env, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert not list(tmp_path.iterdir())
