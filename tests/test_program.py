"""The program as its reader meets it: what it prints, what it refuses, and how it ends."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import pipedream_simple
from pipedream_simple import (
    CONFIG,
    RULES,
    GradientAudit,
    UserError,
    build_schedule,
    check_config,
    choose_device,
    format_banner,
    format_comparison,
    format_timeline,
    main,
    make_parser,
    makespan,
    parse_config,
    peak_in_flight,
    peak_versions,
    run_main,
    shorten,
    simulate,
    staleness,
    train,
    utilization,
)

ROOT = Path(pipedream_simple.__file__).parent
SCRIPT = ROOT / "pipedream_simple.py"


@pytest.fixture
def program(monkeypatch, capsys):
    """Run the program in this process: program("--flag value") -> (status, stdout, stderr)."""

    def run(flags="", width=100):
        monkeypatch.setattr(sys, "argv", ["pipedream_simple.py", *flags.split()])
        monkeypatch.setenv("COLUMNS", str(width))
        status = run_main(main)
        return status, *capsys.readouterr()

    return run


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
        "Time | GPU0 (Stage 0) | GPU1 (Stage 1) | GPU2 (Stage 2) | GPU3 (Stage 3)",
        "t0   | MB0 forward    | idle           | idle           | idle",
        "t3   | MB3 forward    | MB2 forward    | MB1 forward    | MB0 forward    ← All busy!",
        "✅ Batch complete! All stages now at version 1",
        "✅ Batch complete! All stages now at version 5",
    ):
        assert line in out.splitlines()
    assert len(out.splitlines()) < 250

    run = train(CONFIG)
    for batch, loss in enumerate(run.losses):
        b, v = batch, batch + 1
        assert f"BATCH {b + 1}/5" in out
        assert f"Average loss across 4 microbatches: {loss:.4f}" in out
        assert f"Batch {b + 1}: Loss {loss:.4f} (weights v{b} → v{v})" in out
        for stage in range(4):
            assert f"Stage {stage}: Updated weights v{b} → v{v}" in out
    assert f"Test accuracy: {run.test_accuracy:.1%}" in out
    for figure in ("Makespan: 46 ", "utilization: 87.0%", "13.0%", "3.48x", "160"):
        assert figure in out


def test_quiet_is_short_and_keeps_losses_measures_and_comparison(program):
    _, loud, _ = program()
    _, quiet, _ = program("--verbose False")
    assert len(quiet.splitlines()) < 60
    assert "BATCH" not in quiet
    assert "TIMELINE" not in quiet
    assert [x.strip("- ") for x in loud.splitlines() if "Loss" in x] == [
        x for x in quiet.splitlines() if "Loss" in x
    ]
    tail = loud[loud.index("📊 WHAT") :]
    assert quiet.endswith(tail)


def test_a_loss_that_grew_is_told_and_one_that_fell_is_not(program):
    _, out, _ = program("--learning_rate 0.8 --verbose False")
    losses = [float(x) for x in re.findall(r"Loss (\d+\.\d+)", out)]
    assert losses[-1] > losses[0]
    assert "The loss grew: try a smaller learning_rate" in out
    assert "The loss grew" not in program("--verbose False")[1]


def test_the_version_lines_show_what_training_read(program):
    _, out, _ = program("--num_microbatches 1 --batch_size 8")
    line = next(line for line in out.splitlines() if line.startswith("MB4 "))
    assert line.split("   ")[1:] == ["v1 v2 v3 v4", " v1 v2 v3 v4", "  v4 v4 v4 v4"]
    assert "All stages have version 1, some a newer one:\n   v1 v1 v2 v2\n" in out
    _, out, _ = program("--num_microbatches 1 --batch_size 8 --weight_stashing False")
    line = next(line for line in out.splitlines() if line.startswith("MB4 "))
    assert re.search(r"v1 v2 v3 v4 +v4 v4 v4 v4 +v4 v4 v4 v4 +\d+\.\d% off", line)
    assert "gradient error, worst" in out


@pytest.mark.parametrize(
    "flags", ["--num_microbatches 2", "--num_microbatches 8", "--num_stages 2", "--num_stages 8"]
)
def test_every_experiment_of_the_guide_changes_timeline_utilization_and_training(program, flags):
    _, before, _ = program()
    status, after, _ = program(flags)
    assert status == 0
    for part in (r"TIMELINE(?s:.*?)BATCH", r"GPU utilization: .*", r"BATCH 5/5(?s:.*?)Batch comp"):
        assert re.search(part, before)[0] != re.search(part, after)[0]
    loss = r"Batch 5: Loss .*"
    same_loss = re.search(loss, before)[0] == re.search(loss, after)[0]
    # 8 microbatches are fuller, but with 4 or more no stage of 4 is further behind than one batch
    assert same_loss == (flags == "--num_microbatches 8")


@pytest.mark.parametrize("width", [40, *range(60, 102), 160])
@pytest.mark.parametrize(
    "size", [(1, 1, 1), (2, 4, 2), (4, 4, 5), (8, 4, 3), (16, 4, 2), (64, 2, 2)]
)
def test_the_timeline_fits_keeps_its_columns_and_shows_the_events(width, size):
    names = ("num_stages", "num_microbatches", "num_batches")
    config = {**CONFIG, **dict(zip(names, size, strict=True))}
    events = simulate(build_schedule(config), config)
    lines = format_timeline(events, width).splitlines()
    assert max(map(len, lines)) <= width
    if lines[0].startswith("("):
        lines.pop(0)  # the key to the narrow cells
    if width >= 80 and size[0] <= 16:
        assert "GPUs)" not in lines[0], "a GPU was left out that would have fitted"
    separator = " | " if " | " in lines[0] else "| " if "| " in lines[0] else " "
    running = {(e.start, e.device): e.op for e in events if e.op.kind != "U"}
    for line in lines[1:]:
        if line.startswith("..."):
            continue
        cells = line.partition(" ←")[0].split(separator)
        cells = [cell.strip() for cell in cells if cell.strip()]
        time = int(cells[0][1:])
        for device, cell in enumerate(cells[1:]):
            op = running.get((time, device))
            word = {"F": "forward", "B": "backward"}[op.kind] if op else ""
            roomy = f"MB{op.microbatch} {word}" if op else "idle"
            narrow = f"{op.kind}{op.microbatch}" if op else "."
            assert cell in (roomy, narrow)
        assert ("All busy" in line) == all((time, d) in running for d in range(size[0]))


def test_unequal_times_get_a_row_wherever_something_begins_or_ends():
    config = {**CONFIG, "num_stages": 2, "num_microbatches": 1, "num_batches": 1}
    config |= {"forward_time": [1, 2.5], "backward_time": 0.1, "comm_time": 0.2}
    events = simulate(build_schedule(config), config)
    rows = [line.split("|")[0].strip() for line in format_timeline(events).splitlines()[1:]]
    assert rows == ["t0", "t1", "t1.2", "t3.7", "t3.8", "t4"]


def test_the_comparison_holds_every_schedule_and_marks_this_run():
    lines = format_comparison(CONFIG).splitlines()
    shown = {line[2:17].strip(): line.split() for line in lines[1:7]}
    assert list(shown) == ["naive", "gpipe", "1f1b", "pipedream", "vertical sync", "no stashing"]
    assert [line[:1] for line in lines[1:7]] == [" ", " ", " ", "*", " ", " "]
    for name, busy in (("naive", "25.0%"), ("gpipe", "57.1%"), ("1f1b", "57.1%")):
        assert busy in shown[name]
    assert "87.0%" in shown["pipedream"]
    for switches in ({}, {"vertical_sync": True}, {"weight_stashing": False}):  # a flush needs none
        lines = format_comparison({**CONFIG, "schedule": "gpipe", **switches}).splitlines()
        assert [line[:1] for line in lines[1:7]] == [" ", "*", " ", " ", " ", " "]


def test_shorten_keeps_the_first_and_the_last_and_counts_the_rest():
    for size in range(1, 12):
        for limit in range(2, 12):
            first, hidden, last = shorten(range(size), limit)
            assert [*first, *last] == [*range(len(first)), *range(size - len(last), size)]
            assert len(first) + hidden + len(last) == size
            assert len(first) + len(last) == min(size, limit)


def test_long_runs_and_long_batches_are_thinned_out_and_say_so(program):
    _, out, _ = program("--num_batches 60 --num_microbatches 32")
    assert len(out.splitlines()) < 350
    assert "(16 more microbatches)" in out
    assert "more rows)" in out
    assert "batches 6 to 59 go the same way" in out
    assert "Batch 60: Loss" in out


def test_a_diverging_run_says_what_to_do(program):
    status, out, _ = program("--learning_rate 1e30 --verbose False --num_stages 2")
    assert status == 0
    assert "try a smaller learning_rate" in out


def test_help_shows_every_key_with_its_comment_and_both_spellings(capsys):
    with pytest.raises(SystemExit) as stop:
        make_parser("about").parse_args(["--help"])
    assert stop.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    source = SCRIPT.read_text("utf-8")
    block = source[source.index("CONFIG = {") : source.index("\n}\n")]
    comments = re.findall(r'"(\w+)": .*?  # (.*)', block)
    assert [key for key, _ in comments] == list(CONFIG) == list(RULES)
    for key, comment in comments:
        assert f"--{key} " in out
        assert f"--{key.replace('_', '-')} " in out
        assert f"{comment} (now {CONFIG[key]})" in out


def test_flags_mean_what_config_would_and_other_flags_come_apart():
    parser = make_parser("")
    parser.add_argument("--out")
    flags = "--num-stages 2 --forward_time 1,2.5 --weight_stashing false --out here --verbose"
    config, other = parse_config(parser, flags.split())
    settings = {"num_stages": 2, "forward_time": [1, 2.5], "weight_stashing": False}
    assert config == {**CONFIG, **settings}
    assert other == {"out": "here"}
    assert parse_config(make_parser(""), []) == (CONFIG, {})


def test_small_configs_all_work(program):
    for flags in (
        "--num_stages 1",
        "--num_microbatches 1",
        "--num_stages 8 --num_microbatches 2",
        "--num_batches 1",
        "--num_stages 1 --num_microbatches 1 --num_batches 1 --layers_per_stage 1 --batch_size 1",
        "--schedule naive --weight_stashing False",
    ):
        status, out, err = program(flags)
        assert (status, err) == (0, "")
        assert "Test accuracy" in out


@pytest.mark.parametrize("flags", ["", "--num_microbatches 1 --num_batches 8", "--comm_time 0.5"])
def test_the_table_of_measures_shows_what_the_functions_say(program, flags):
    config, _ = parse_config(make_parser(""), flags.split())
    rows = build_schedule(config)
    events = simulate(rows, config)
    naive = makespan(simulate(build_schedule({**config, "schedule": "naive"}), config))
    _, out, _ = program(flags)
    shown = {}
    for line in out[out.index("WHAT THE SIM") :].splitlines():
        match = re.match(r"(busy|microbatches in flight|weight versions|staleness)[^\d]*(.*)", line)
        if match and match[1] not in shown:
            shown[match[1]] = match[2].split()
    assert shown["busy"] == [f"{utilization(events):.0%}"] * 4  # equal stages, equally busy
    assert shown["microbatches in flight"] == [str(x) for x in peak_in_flight(rows)]
    assert shown["weight versions"] == [str(x) for x in peak_versions(rows)]
    behind = staleness(rows, config["num_microbatches"])
    assert shown["staleness"] == [str(x) for x in behind]
    assert behind == sorted(behind, reverse=True) != behind[::-1]
    assert f"naive, one microbatch at a time: {naive:g})" in out
    assert f"Speed-up over naive: {naive / makespan(events):.2f}x" in out


def test_the_gradient_errors_shown_are_those_of_the_audit(program):
    config = {**CONFIG, "weight_stashing": False}
    audit = GradientAudit(config)
    train(config, watch=audit)
    _, out, _ = program("--weight_stashing False")
    for name, measure in (("mean", lambda errors: sum(errors) / len(errors)), ("worst", max)):
        line = next(line for line in out.splitlines() if line.startswith(f"gradient error, {name}"))
        per_stage = [[e for (s, _), e in audit.error.items() if s == stage] for stage in range(4)]
        assert line.split()[3:] == [f"{measure(errors):.1%}" for errors in per_stage]
    for m in range(20):
        line = next(line for line in out.splitlines() if line.startswith(f"MB{m} "))
        assert line.endswith(f"   {max(audit.error[s, m] for s in range(4)):.1%} off")


def test_updates_are_dated_and_weights_counted(program):
    _, out, _ = program()
    for event in simulate(build_schedule(CONFIG), CONFIG):
        if event.op.kind == "U":
            v = event.op.version
            line = f"Stage {event.op.stage}: Updated weights v{v} → v{v + 1}  (at t{event.end})"
            assert line in out
    layer = 64 * 64 + 64
    assert f"Network: 4 x 3 layers, {11 * layer + 64 * 10 + 10:,} weights" in out


def test_a_gradient_that_is_no_number_is_not_called_right(program):
    _, out, _ = program("--weight_stashing False --learning_rate 1e30 --num_stages 2")
    worst = next(line for line in out.splitlines() if line.startswith("gradient error, worst"))
    mean = next(line for line in out.splitlines() if line.startswith("gradient error, mean"))
    assert worst.count("nan%") == mean.count("nan%") > 0


# ---------------------------------------------------------------------------- what it refuses

BAD_FLAGS = {
    "--num_stages 0": "num_stages=0 must be a whole number",
    "--num_stages -1": "num_stages=-1 must be a whole number",
    "--num_stages x": "num_stages='x' must be a whole number",
    "--num_stages 2.5": "num_stages=2.5 must be a whole number",
    "--num_stages True": "num_stages=True must be a whole number",
    "--num_stages": "expected one argument",
    "--num_stagez 4": "unknown flag '--num_stagez': did you mean --num_stages?",
    "--num_stage 4": "unknown flag '--num_stage': did you mean --num_stages?",
    "stray": "unknown flag 'stray', --help lists them",
    "--num_microbatches 5": "batch_size=32 cannot be split evenly into num_microbatches=5: "
    "try 1, 2, 4, 8, 16 or 32",
    "--num_microbatches 64": "batch_size=32 cannot be split evenly into num_microbatches=64",
    "--batch_size 1": "batch_size=1 cannot be split evenly into num_microbatches=4: try 1",
    "--batch_size 0": "batch_size=0 must be",
    "--num_batches 0": "num_batches=0 must be",
    "--layers_per_stage 0": "layers_per_stage=0 must be",
    "--hidden_size 1e3": "hidden_size=1000.0 must be a whole number",
    "--seed -1": "seed=-1 must be a whole number, 0 to",
    "--seed 99999999999999999999": "seed=99999999999999999999 must be",
    "--learning_rate 0": "learning_rate=0 must be a number greater than 0",
    "--learning_rate -1": "learning_rate=-1 must be",
    "--learning_rate nan": "learning_rate=nan must be",
    "--learning_rate inf": "learning_rate=inf must be",
    "--schedule nope": "schedule='nope' must be one of naive, gpipe, 1f1b, pipedream",
    "--schedule 7": "schedule=7 must be",
    "--device nope": "device='nope' must be auto, cpu, cuda or cuda:N",
    "--device cuda:99": "device='cuda:99': torch finds",
    "--verbose maybe": "verbose='maybe' must be True or False",
    "--weight_stashing 1": "weight_stashing=1 must be True or False",
    "--vertical_sync --weight_stashing False": "vertical_sync=True needs weight_stashing=True",
    "--forward_time 0": "forward_time=0 must be a number greater than 0",
    "--forward_time 1,2": "forward_time=[1, 2] must have num_stages=4 entries",
    "--forward_time 1,2,x,4": "forward_time=[1, 2, 'x', 4] must be",
    "--backward_time inf": "backward_time=inf must be",
    "--forward_time [1]": "forward_time=[1] must have num_stages=4 entries",
    "--learning_rate 1e39": "learning_rate=1e+39 must be a number greater than 0, up to 1e30",
    f"--num_batches 1{400 * '0'}": "must be a whole number, 1 to 1,000,000,000",
    "--layers_per_stage 1000000000": "num_stages * layers_per_stage is 4,000,000,000: at most",
    "--comm_time -1": "comm_time=-1 must be a number, 0 to 1e12",
    "--num_batches 1000000000": "num_stages * num_microbatches * num_batches is 16,000,000,000",
    "--batch_size 100000000": "batch_size * num_batches is 500,000,000",
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags_get_one_line_and_status_2(program, flags):
    status, out, err = program(flags)
    assert (status, out) == (2, "")
    assert err.startswith("pipedream_simple.py: ")
    assert err.count("\n") == 1
    assert BAD_FLAGS[flags] in err


def test_bad_configs_are_refused_by_check_config_too():
    with pytest.raises(
        UserError, match="unknown key 'num_stagez' in CONFIG: did you mean num_stages"
    ):
        check_config({**CONFIG, "num_stagez": 4})
    with pytest.raises(UserError, match="CONFIG has no 'seed'"):
        check_config({key: value for key, value in CONFIG.items() if key != "seed"})
    for key in RULES:
        for value in (None, "x", [], {}, math.nan, -1, 10**31, 10**400, [0] * 4, (1, 1, 1, 1)):
            if key == "seed":
                continue
            if key == "comm_time" and value == [0] * 4:
                continue
            with pytest.raises(ValueError, match=key):
                check_config({**CONFIG, key: value})
    check_config(CONFIG)


@pytest.mark.parametrize("schedule", ["gpipe", "pipedream"])
def test_every_time_may_be_a_list(schedule):
    config = {**CONFIG, "schedule": schedule}
    lists = {key: [config[key]] * 4 for key in ("forward_time", "backward_time", "comm_time")}
    check_config({**config, **lists})
    rows = build_schedule(config)
    assert makespan(simulate(rows, {**config, **lists})) == makespan(simulate(rows, config))


def test_a_config_edited_by_hand_is_checked_in_the_same_way(tmp_path):
    source = SCRIPT.read_text("utf-8")
    (tmp_path / "digits.npz").write_bytes((ROOT / "digits.npz").read_bytes())
    script = tmp_path / "pipedream_simple.py"
    for old, new, error in (
        ('"num_stages": 4', '"num_stages": 2', b""),
        ('"num_stages": 4', '"num_stagez": 4', b"unknown key 'num_stagez' in CONFIG"),
        ('    "seed": 0,', "    # seed", b"CONFIG has no 'seed'"),
        ('"num_microbatches": 4', '"num_microbatches": 3', b"try 1, 2, 4, 8, 16 or 32"),
        ('"forward_time": 1', '"forward_time": "1"', b"forward_time='1' must be"),
    ):
        assert source.count(old) == 1
        script.write_text(source.replace(old, new), "utf-8")
        done = start(script=script)
        assert error in done.stderr
        assert done.returncode == (2 if error else 0)
        assert done.stderr.count(b"\n") == bool(error)


def broken_archives():
    whole = (ROOT / "digits.npz").read_bytes()
    with np.load(ROOT / "digits.npz") as file:
        images, labels = file["images"], file["labels"]
    yield "missing", None
    yield "empty", b""
    yield "cut off", whole[: len(whole) // 2]
    yield "a bit turned", whole[:5000] + bytes([whole[5000] ^ 255]) + whole[5001:]
    yield "text", b"not an archive"
    yield "no labels", {"images": images}
    yield "fewer labels", {"images": images, "labels": labels[:100]}
    yield "labels below 0", {"images": images, "labels": labels.astype(int) - 1}
    yield "labels in a table", {"images": images, "labels": labels[:, None]}
    yield "fractions", {"images": images / 16.0, "labels": labels}
    yield "complex", {"images": images * 1j, "labels": labels}
    yield "labels beyond 9", {"images": images, "labels": labels + 7}
    yield "another shape", {"images": images[:, :4], "labels": labels}
    yield "no digits", {"images": images[:0], "labels": labels[:0]}
    yield "words", {"images": images.astype(str), "labels": labels}


@pytest.mark.parametrize("what", dict(broken_archives()))
def test_a_missing_or_broken_digits_file_gets_one_line(program, monkeypatch, tmp_path, what):
    path = tmp_path / "digits.npz"
    content = dict(broken_archives())[what]
    if isinstance(content, dict):
        np.savez(path, **content)
    elif content is not None:
        path.write_bytes(content)
    monkeypatch.setattr(pipedream_simple, "__file__", str(tmp_path / "pipedream_simple.py"))
    monkeypatch.setattr(pipedream_simple, "make_parser", make_parser_of)
    status, _, err = program("--verbose False")
    assert status == 2
    assert err.count("\n") == 1
    assert str(path) in err


def make_parser_of(about):
    """The real parser, read from the real script although __file__ points elsewhere."""
    here, pipedream_simple.__file__ = pipedream_simple.__file__, str(SCRIPT)
    try:
        return make_parser(about)
    finally:
        pipedream_simple.__file__ = here


def test_out_of_memory_names_batch_size_and_the_cpu(program, monkeypatch):
    for error in (
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    ):
        monkeypatch.setattr(
            pipedream_simple, "train", lambda *_, e=error, **__: (_ for _ in ()).throw(e)
        )
        status, _, err = program()
        assert status == 2
        assert "batch_size" in err
        assert "--device cpu" in err
        assert err.count("\n") == 1
    monkeypatch.setattr(
        pipedream_simple, "train", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("a bug"))
    )
    with pytest.raises(
        RuntimeError, match="a bug"
    ):  # what the reader cannot cause keeps its traceback
        program()


# ---------------------------------------------------------------------- where and how it ends


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_any_terminal_gets_text(encoding, tmp_path):
    done = start(env={"PYTHONIOENCODING": encoding}, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, b"")
    out = done.stdout.decode(encoding)
    assert "PipeDream Pipeline Created!" in out
    assert ("Stage 0: Updated weights v0 → v1" in out) == (encoding == "utf-8")
    assert "?" not in out
    assert not list(tmp_path.iterdir()), "the run left something behind"


@pytest.mark.skipif(os.name != "posix", reason="a shell pipe")
def test_a_reader_that_has_seen_enough_ends_it_quietly():
    command = f"set -o pipefail; '{sys.executable}' '{SCRIPT}' --num_stages 16 | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, timeout=120)
    assert done.stderr == b""
    assert done.stdout.count(b"\n") == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_gets_one_line_and_a_closed_stdout_none():
    for redirection, status, lines in ((">/dev/full", 2, 1), (">&-", 0, 0)):
        command = f"'{sys.executable}' '{SCRIPT}' --verbose False {redirection}"
        done = subprocess.run(["bash", "-c", command], capture_output=True, timeout=120)
        assert (done.returncode, done.stderr.count(b"\n")) == (status, lines), done.stderr


def test_it_runs_from_anywhere_and_through_a_link(tmp_path):
    link = tmp_path / "link.py"
    link.symlink_to(SCRIPT)
    done = start("--verbose", "False", script=link, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, b"")


def test_ctrl_c_ends_with_one_line_and_status_130(program, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipedream_simple, "train", interrupted)
    status, _, err = program()
    assert (status, err) == (130, "pipedream_simple.py: stopped\n")


def test_with_gpus_auto_takes_the_first_and_the_banner_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto") == torch.device("cuda")
    assert choose_device("cpu") == torch.device("cpu")
    banner = format_banner(CONFIG)
    assert "SIMULATION MODE: Running on 1 GPU (simulating 4 GPUs)" in banner
    assert "All stages are on 1 GPU" in banner
    for name in ("cuda", "cuda:0", "cuda:1"):
        check_config({**CONFIG, "device": name})
    with pytest.raises(UserError, match="device='cuda:2': torch finds 2 CUDA GPUs"):
        check_config({**CONFIG, "device": "cuda:2"})


def test_the_banner_names_the_schedule_that_runs():
    for schedule, name in (("naive", "Naive"), ("gpipe", "GPipe"), ("1f1b", "1F1B")):
        banner = format_banner({**CONFIG, "schedule": schedule})
        assert f"{name} Pipeline Created!" in banner
        assert ("work in parallel" in banner) == (schedule != "naive")
    assert "NO weight stashing" in format_banner({**CONFIG, "weight_stashing": False})
    assert "vertical sync" in format_banner({**CONFIG, "vertical_sync": True})


def test_importing_prints_nothing_and_writes_nothing(tmp_path):
    command = [sys.executable, "-c", "import pipedream_simple"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, capture_output=True, cwd=tmp_path, env=env, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert not list(tmp_path.iterdir())
