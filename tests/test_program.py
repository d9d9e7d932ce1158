"""The program as its reader meets it: what it prints, what it refuses, and how it ends."""

import ast
import math
import os
import re
import signal
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
    SCHEDULES,
    Audit,
    UserError,
    build_schedule,
    check_config,
    choose_device,
    format_banner,
    format_comparison,
    format_per_gpu,
    format_timeline,
    main,
    makespan,
    mismatches,
    parse_config,
    parse_value,
    peak_in_flight,
    peak_versions,
    run_main,
    shorten,
    simulate,
    staleness,
    train,
    utilization,
    variants,
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


def simulated(config):
    """Every variant's schedule and events, as main makes them."""
    schedules = {
        name: build_schedule({**config, **settings})
        for name, settings in variants(SCHEDULES).items()
    }
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
        "Time | GPU0 (Stage 0) | GPU1 (Stage 1) | GPU2 (Stage 2) | GPU3 (Stage 3)",
        "t0   | MB0 forward    | idle           | idle           | idle           ← why (1)",
        "(1) GPU1 cannot start until t1: its first op, F0, needs F0 of GPU0",
        "t3   | MB3 forward    | MB2 forward    | MB1 forward    | MB0 forward    ← All busy!",
        "✅ Batch complete! All stages now at version 1",
        "✅ Batch complete! All stages now at version 5",
    ):
        assert line in out.splitlines()
    assert len(out.splitlines()) <= 110

    run = train(CONFIG)
    for batch, loss in enumerate(run.losses):
        b, v = batch, batch + 1
        assert f"Batch {b + 1}: Loss {loss:.4f} (weights v{b} → v{v})" in out
        in_full = b in (0, 1, 4)
        for line in (
            f"BATCH {b + 1}/5",
            f"Average loss across 4 microbatches: {loss:.4f}, on weights",
            *(f"Stage {stage}: Updated weights v{b} → v{v}" for stage in range(4)),
        ):
            assert (line in out) == in_full
    busy = (f"{utilization(simulated(CONFIG)[n][1]):.1%}" for n in ("naive", "1f1b", "pipedream"))
    headline = " ".join(out.splitlines()[1:3])
    assert headline == (
        "4 GPUs: {} busy with one microbatch at a time, {} with a flush per batch (1F1B), "
        "{} without a flush (PipeDream)"
    ).format(*busy)
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
    measures, _, _ = loud[loud.index("📊 WHAT") :].partition("💡")
    assert measures in quiet


@pytest.mark.parametrize("flags", [
    "", "--num_stages 8", "--num_stages 2 --num_microbatches 2", "--weight_stashing False",
    "--schedule naive --forward_time 1,2.5,1,1", "--num_microbatches 1 --num_batches 20",
    "--num_stages 16 --num_microbatches 8 --verbose False", "--num_stages 1",
])  # fmt: skip
def test_everything_fits_an_80_column_terminal(program, flags):
    status, out, _ = program(flags, width=80)
    assert status == 0
    assert [line for line in out.splitlines() if len(line) > 80] == []


@pytest.mark.parametrize("seed", range(6))
def test_only_a_run_that_diverges_is_said_to_diverge(program, seed):
    """At a small learning rate the last batch may look worse than the first: another batch."""
    assert "diverged" not in program(f"--learning_rate 0.001 --seed {seed} --verbose False")[1]
    _, out, _ = program(f"--learning_rate 30 --seed {seed} --verbose False")
    losses = [float(x) for x in re.findall(r"Loss (\d+\.\d+|nan|inf)", out)]
    assert ("The loss diverged: try a smaller" in out) == (not losses[-1] < 10 * losses[0])
    assert "diverged" in program(f"--learning_rate 1e30 --seed {seed} --verbose False")[1]


def test_the_version_lines_show_what_training_read(program):
    _, out, _ = program("--num_microbatches 1 --batch_size 8")
    line = next(line for line in out.splitlines() if line.startswith("MB4 "))
    assert line.split("   ")[1:] == ["v1 v2 v3 v4", " v1 v2 v3 v4", "  v4 v4 v4 v4"]
    assert "on weights v1 v2 v3 v4\n" in out
    assert "Batch complete! All stages now at version 1 or newer\n" in out
    _, out, _ = program("--num_microbatches 1 --batch_size 8 --weight_stashing False")
    line = next(line for line in out.splitlines() if line.startswith("MB4 "))
    assert re.search(r"v1 v2 v3 v4 +v4 v4 v4 v4 +v4 v4 v4 v4 +\d+\.\d% off", line)
    assert "Gradient error, GPU by GPU, worst" in out


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


@pytest.mark.parametrize("width", [40, 80, 83, 84, 100, 160])
@pytest.mark.parametrize(
    "size", [(1, 1, 1), (2, 4, 2), (4, 4, 5), (8, 4, 3), (16, 4, 2), (64, 2, 2)]
)
def test_the_timeline_fits_keeps_its_columns_and_shows_the_events(width, size):
    names = ("num_stages", "num_microbatches", "num_batches")
    config = {**CONFIG, **dict(zip(names, size, strict=True))}
    events = simulate(build_schedule(config), config)
    lines = format_timeline(events, width).splitlines()
    told = ("(", "...")  # in a sentence, which a terminal of 40 columns wraps
    assert all(len(line) <= max(width, 80 * line.startswith(told)) for line in lines)
    lines = [line for line in lines if not line.startswith("(")]  # the key to the cells, the notes
    if width >= 80 and size[0] <= 16:
        assert "GPU)" not in lines[0], "a GPU was left out that would have fitted"
        assert "GPUs)" not in lines[0], "a GPU was left out that would have fitted"
    separator = " | " if " | " in lines[0] else "| " if "| " in lines[0] else " "
    running = {(e.start, e.device): e.op for e in events if e.op.kind != "U"}
    times = []
    for line in lines[1:]:
        if line.startswith("..."):
            hidden = int(re.fullmatch(r"\.\.\.  \((\d+) more rows?\)", line)[1])
            times += range(len(times), len(times) + hidden)
            continue
        cells = line.partition(" ←")[0].split(separator)
        cells = [cell.strip() for cell in cells if cell.strip()]
        time = int(cells[0][1:])
        times.append(time)
        for device, cell in enumerate(cells[1:]):
            op = running.get((time, device))
            word = {"F": "forward", "B": "backward"}[op.kind] if op else ""
            roomy = f"MB{op.microbatch} {word}" if op else "idle"
            narrow = f"{op.kind}{op.microbatch}" if op else "."
            assert cell in (roomy, narrow)
        assert ("All busy" in line) == all((time, d) in running for d in range(size[0]))
    assert times == list(range(makespan(events)))


@pytest.mark.parametrize("num_stages", [1, 2, 4, 8])
def test_the_timeline_shows_the_pipeline_fill_and_drain_and_folds_what_lies_between(num_stages):
    config = {**CONFIG, "num_stages": num_stages, "num_batches": 8}
    lines = format_timeline(simulate(build_schedule(config), config), 200).splitlines()
    (fold,) = (place for place, line in enumerate(lines) if line.startswith("..."))
    shown = lines[1:fold], [line for line in lines[fold + 1 :] if line.startswith("t")]
    assert all(sum("All busy" in line for line in part) >= 1 for part in shown)
    assert sum(map(len, shown)) < 5 * num_stages + 5


def test_unequal_times_get_a_row_wherever_something_begins_or_ends():
    config = {**CONFIG, "num_stages": 2, "num_microbatches": 1, "num_batches": 1}
    config |= {"forward_time": [1, 2.5], "backward_time": 0.1, "comm_time": 0.2}
    events = simulate(build_schedule(config), config)
    lines = format_timeline(events).splitlines()
    rows = [line.split("|")[0].strip() for line in lines[1:] if line.startswith("t")]
    assert rows == ["t0", "t1", "t1.2", "t3.7", "t3.8", "t4"]


@pytest.mark.parametrize("flags", ["", "--num_microbatches 1 --num_batches 8", "--num_stages 6"])
def test_the_comparison_shows_what_the_functions_say_and_marks_this_run(flags):
    config, _ = parse_config("", flags.split())
    lines = format_comparison(config, simulated(config)).splitlines()[1:7]
    for line, (name, settings) in zip(lines, variants(SCHEDULES).items(), strict=True):
        rows = build_schedule({**config, **settings})
        events = simulate(rows, config)
        cells = [line[0], name.strip(), f"{makespan(events)}", f"{utilization(events):.1%}"]
        behind = staleness(rows, config["num_microbatches"])
        for values in (peak_in_flight(rows), peak_versions(rows), behind):
            cells.append(format_per_gpu(values))
        cells.append(str(len(mismatches(rows))))
        shown = [line[0], *re.split(r" {2,}", line[1:].strip())]
        assert shown[:3] + shown[4:] == cells
        assert (line[0] == "*") == (name == "pipedream")
    for switches in ({}, {"vertical_sync": True}, {"weight_stashing": False}):  # a flush needs none
        lines = format_comparison({**config, "schedule": "gpipe", **switches}, simulated(config))
        assert [line[:1] for line in lines.splitlines()[1:7]] == [" ", "*", " ", " ", " ", " "]


def test_shorten_keeps_the_first_and_the_last_and_counts_the_rest():
    for size in range(1, 12):
        for limit in range(4, 12):
            shown = shorten([*range(size)], limit, "rows")
            if size <= limit + 1:  # a line about one is no shorter
                assert shown == [*range(size)]
                continue
            at = next(i for i, item in enumerate(shown) if isinstance(item, str))
            first, last = shown[:at], shown[at + 1 :]
            assert [*first, *last] == [*range(len(first)), *range(size - len(last), size)]
            assert len(first) + len(last) == limit
            assert shown[at] == f"... ({size - limit} more rows)"


def test_long_runs_and_long_batches_are_thinned_out_and_say_so(program):
    _, out, _ = program("--num_batches 40 --num_microbatches 16 --num_stages 10")
    assert len(out.splitlines()) < 175
    assert "(2 more stages)" in out
    assert "and so on until batch 39" in out
    assert "Batch 40: Loss" in out
    flags = "--num_microbatches 32 --num_stages 20 --num_batches 2 --weight_stashing False"
    _, out, _ = program(flags)
    assert "more rows)" in out


def test_a_diverging_run_says_what_to_do(program):
    status, out, _ = program("--learning_rate 1e30 --verbose False --num_stages 2")
    assert status == 0
    assert "try a smaller learning_rate" in out
    assert "Test accuracy: nan%" in out


def test_help_shows_config_with_its_comments(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_config("about", ["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    source = SCRIPT.read_text("utf-8")
    block = source[source.index("CONFIG = {") : source.index("\n}\n")]
    assert block in out
    assert re.findall(r'"(\w+)": .*?  # .', block) == list(CONFIG)
    assert set(RULES) == set(CONFIG)


def test_flags_mean_what_config_would_and_other_flags_come_apart():
    flags = "--num_stages 2 --forward_time 1,2.5 --weight_stashing false --out here"
    config, other = parse_config("", flags.split(), other={"--out": {}})
    settings = {"num_stages": 2, "forward_time": [1, 2.5], "weight_stashing": False}
    assert config == {**CONFIG, **settings}
    assert other == {"out": "here"}
    assert parse_config("", []) == (CONFIG, {})


def test_values_are_read_as_python_reads_them():
    for text, value in (
        ("4", 4), ("0.5", 0.5), ("1e3", 1000.0), ("True", True), ("false", False),
        ("1,2,1", [1, 2, 1]), ("[1, 2]", [1, 2]), ("-1,1", [-1, 1]),
    ):  # fmt: skip
        assert parse_value(text) == value
    for text in ("cuda:1", "nan", "", "1f1b", "my,file.csv", "(" * 300, "1" * 5000, "\0"):
        assert parse_value(text) == text


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
def test_the_measures_are_what_the_functions_say(program, flags):
    config, _ = parse_config("", flags.split())
    rows = build_schedule(config)
    events = simulate(rows, config)
    naive = makespan(simulated(config)["naive"][1])
    _, out, _ = program(flags)
    busy = f"{utilization(events):.0%}"
    assert f"Busy, GPU by GPU: {busy} {busy} {busy} {busy}\n" in out  # equal stages, equally busy
    assert f"at most, counted: {' '.join(map(str, peak_versions(rows)))}\n" in out
    assert f"naive, one microbatch at a time: {naive:g})" in out
    assert f" {naive / makespan(events):.2f}x " in out


def test_the_forwards_that_recompute_repeats_are_said_to_count(program):
    again = "Busy time includes the forwards that recompute runs a second time."
    assert again in program("--recompute True --verbose False")[1]
    assert again not in program("--verbose False")[1]


def test_unequal_stages_are_unequally_busy(program):
    _, out, _ = program("--schedule gpipe --num_stages 2 --forward_time 1,3 --num_batches 1")
    # GPU1: 4 x (3 + 1) of 1 + 12 + 4 + 1 (the last backward returns); GPU0: 4 x (1 + 1)
    assert "Makespan: 18 time units" in out
    assert "Busy, GPU by GPU: 44% 89%\n" in out


def test_the_gradient_errors_shown_are_those_of_the_audit(program):
    config = {**CONFIG, "weight_stashing": False}
    audit = Audit(config, gradients=True)
    train(config, watch=audit)
    _, out, _ = program("--weight_stashing False")
    for name, measure in (("mean", lambda errors: sum(errors) / len(errors)), ("worst", max)):
        line = next(line for line in out.splitlines() if f"GPU by GPU, {name}" in line)
        per_stage = [[e for (s, _), e in audit.error.items() if s == stage] for stage in range(4)]
        assert line.split()[6:] == [f"{measure(errors):.1%}" for errors in per_stage]
    for m in range(4, 8):
        line = next(line for line in out.splitlines() if line.startswith(f"MB{m} "))
        assert line.endswith(f"   {max(audit.error[s, m] for s in range(4)):.1%} off")


def test_with_recompute_a_backward_shows_the_time_of_its_forward_too(program):
    _, out, _ = program("--recompute True --schedule gpipe")
    assert "Makespan: 105 time units (naive, one microbatch at a time: 240)" in out  # 5 x 7 x 3
    rows = [line.partition(" ←")[0].split("|") for line in out.splitlines() if line[:1] == "t"]
    last = [(cells[0].strip(), cells[-1].strip()) for cells in rows]
    assert last[6:9] == [("t6", "MB3 forward"), ("t7", "MB0 backward"), ("t9", "MB1 backward")]
    _, plain, _ = program("--schedule gpipe")
    losses = [line for line in plain.splitlines() if "Loss" in line]
    assert losses
    assert losses == [line for line in out.splitlines() if "Loss" in line]


def test_the_banner_names_the_transformer_and_counts_its_weights(program):
    flags = "--network transformer --num_stages 2 --layers_per_stage 1 --hidden_size 8"
    _, out, _ = program(f"{flags} --verbose False")
    block = 4 * (8 * 8 + 8) + 2 * (8 * 8 + 8) + 4 * 8  # attention, MLP, two norms
    ends = 17 * 8 + 64 * 8 + 2 * 8 + 64 * 8 * 10 + 10
    assert f"Network: transformer, 2 x 1 layer, {2 * block + ends:,} weights\n" in out


def test_updates_are_dated_and_weights_counted(program):
    _, out, _ = program()
    for event in simulate(build_schedule(CONFIG), CONFIG):
        if event.op.kind == "U" and event.op.version in (0, 1, 4):
            v = event.op.version
            line = f"Stage {event.op.stage}: Updated weights v{v} → v{v + 1}  (at t{event.end})"
            assert line in out
    layer = 64 * 64 + 64
    assert f"Network: 4 x 3 layers, {11 * layer + 64 * 10 + 10:,} weights" in out


def test_a_gradient_that_is_no_number_is_not_called_right(program):
    _, out, _ = program("--weight_stashing False --learning_rate 1e30 --num_stages 2")
    worst = next(line for line in out.splitlines() if "GPU by GPU, worst" in line)
    mean = next(line for line in out.splitlines() if "GPU by GPU, mean" in line)
    assert worst.count("nan%") == mean.count("nan%") > 0


@pytest.mark.parametrize("flags", ["", "--num_stages 8", "--schedule gpipe --forward_time 1,2,1,1"])
def test_every_next_step_can_be_added_to_the_command_and_changes_it(program, flags):
    _, out, _ = program(flags + " --verbose False")
    *steps, more = out[out.index("WHAT TO TRY NEXT") :].splitlines()[1:]
    assert "python pipedream_lab.py why, with the same flags" in more
    assert len(steps) >= 4
    config, _ = parse_config("", [*flags.split(), "--verbose", "False"])
    for step in steps:
        new = re.split(r" {2,}", step.strip())[0]
        assert parse_config("", [*flags.split(), "--verbose", "False", *new.split()])[0] != config


# ---------------------------------------------------------------------------- what it refuses

BAD_FLAGS = {
    "--num_stages 0": "num_stages=0 must be a whole number",
    "--num_stages -1": "num_stages=-1 must be a whole number",
    "--num_stages x": "num_stages='x' must be a whole number",
    "--num_stages 2.5": "num_stages=2.5 must be a whole number",
    "--num_stages True": "num_stages=True must be a whole number",
    "--num_stages": "expected one argument",
    "--forward_time -1,1,1,1": "expected one argument: write --key=value if it begins with -",
    "--forward_time=-1,1,1,1": "forward_time=[-1, 1, 1, 1] must be a number",
    "--num_stagez 4": "unknown flag '--num_stagez': did you mean --num_stages?",
    "--num_stage 4": "unknown flag '--num_stage': did you mean --num_stages?",
    "--num-stages 4": "unknown flag '--num-stages': did you mean --num_stages?",
    "--outfile x": "unknown flag '--outfile', --help lists them",
    "stray": "unknown flag 'stray', --help lists them",
    "--num_microbatches 5": "batch_size=32 cannot be split evenly into num_microbatches=5: "
    "try 1, 2, 4, 8, 16 or 32",
    "--num_microbatches 64": "batch_size=32 cannot be split evenly into num_microbatches=64",
    "--batch_size 1": "batch_size=1 cannot be split evenly into num_microbatches=4: try 1",
    "--batch_size 0": "batch_size=0 must be",
    "--num_batches 0": "num_batches=0 must be",
    "--layers_per_stage 0": "layers_per_stage=0 must be",
    "--hidden_size 1e3": "hidden_size=1000.0 must be a whole number",
    "--seed -1": "seed=-1 must be a whole number from 0 to",
    "--seed 99999999999999999999": "seed=99999999999999999999 must be",
    "--learning_rate 0": "learning_rate=0 must be a number from 1e-30 to 1e+30",
    "--learning_rate -1": "learning_rate=-1 must be",
    "--learning_rate nan": "learning_rate='nan' must be",
    "--learning_rate inf": "learning_rate='inf' must be",
    "--schedule nope": "schedule='nope' must be one of naive, gpipe, 1f1b, pipedream",
    "--schedule 7": "schedule=7 must be text",
    "--network nope": "network='nope' must be one of residual, transformer",
    "--network transformer --hidden_size 30": "hidden_size=30 must be a multiple of 4",
    "--network transformer --hidden_size 6000": "* hidden_size * hidden_size is 432,000,000",
    "--momentum 1.1": "momentum=1.1 must be a number from 0 to 1",
    "--recompute 1": "recompute=1 must be True or False",
    "--device nope": "device='nope' must be auto, cpu, cuda, cuda:N or mps",
    "--device cuda:99": "device='cuda:99': torch finds",
    "--verbose maybe": "verbose='maybe' must be True or False",
    "--weight_stashing 1": "weight_stashing=1 must be True or False",
    "--vertical_sync True --weight_stashing False": "vertical_sync=True needs weight_stashing=True",
    "--forward_time 0": "forward_time=0 must be a number from 1e-09 to 1e+12, or a list",
    "--forward_time 1,2": "forward_time=[1, 2] must have num_stages=4 entries",
    "--forward_time 1,2,x,4": "forward_time='1,2,x,4' must be",
    "--backward_time inf": "backward_time='inf' must be",
    "--forward_time [1]": "forward_time=[1] must have num_stages=4 entries",
    "--learning_rate 1e39": "learning_rate=1e+39 must be a number from 1e-30 to 1e+30",
    f"--num_batches 1{400 * '0'}": "must be a whole number from 1 to 10,000,000",
    f"--num_batches 1{5000 * '0'}": "must be a whole number from 1 to 10,000,000",
    "--layers_per_stage 1000000": "num_stages * layers_per_stage is 4,000,000: at most",
    "--hidden_size 30000": "* hidden_size * hidden_size is 10,800,000,000: at most 500,000,000 fit",
    "--forward_time 1e-13": "forward_time=1e-13 must be",
    "--forward_time 1e-6": "differ too much: the longest may be 100,000 times the shortest",
    "--weight_stashing": "expected one argument",
    "--comm_time -1": "comm_time=-1 must be a number from 0 to 1e+12",
    "--num_batches 10000000": "num_stages * num_microbatches * num_batches is 160,000,000",
    "--batch_size 10000000": "batch_size * num_batches is 50,000,000",
    "--schedule " + "x" * 300_000: "must be one of naive",
}


@pytest.mark.parametrize("flags", BAD_FLAGS, ids=lambda flags: flags[:40])
def test_bad_flags_get_one_line_and_status_2(program, flags):
    status, out, err = program(flags)
    assert (status, out) == (2, "")
    assert err.startswith("pipedream_simple.py: ")
    assert err.count("\n") == 1
    assert len(err) < 250
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
    for config in (None, [], "CONFIG", {}, {1: 2}):
        with pytest.raises(UserError):
            check_config(config)
    check_config({**CONFIG, "num_stages": np.int64(4), "learning_rate": np.float32(0.1)})


@pytest.mark.parametrize("settings", [
    {"num_microbatches": 3}, {"num_microbatches": 12}, {"num_microbatches": 5, "schedule": "gpipe"},
    {"forward_time": -5}, {"forward_time": [1, 1, 1]}, {"num_stages": 2.0}, {"schedule": "zb-h1"},
])  # fmt: skip
def test_python_refuses_what_the_command_line_refuses(settings):
    for call in (train, build_schedule):
        with pytest.raises(UserError) as caught:
            call({**CONFIG, **settings})
        assert "\n" not in str(caught.value)
    if "forward_time" in settings:
        with pytest.raises(UserError, match="forward_time"):
            simulate(build_schedule(CONFIG), {**CONFIG, **settings})


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
        ('"num_stages": 4', '"num_stagez": 4', b"unknown key 'num_stagez' in CONFIG"),
        ('"num_microbatches": 4', '"num_microbatches": 3', b"try 1, 2, 4, 8, 16 or 32"),
        ('"num_stages": 4', '"num_stages": 2', b""),
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
    yield "too dark", {"images": images + 1, "labels": labels}
    yield "below white", {"images": images.astype(int) - 1, "labels": labels}
    yield "a pipe", None


@pytest.mark.parametrize("what", dict(broken_archives()))
def test_a_missing_or_broken_digits_file_gets_one_line(program, monkeypatch, tmp_path, what):
    path = tmp_path / "digits.npz"
    content = dict(broken_archives())[what]
    if what == "a pipe":
        os.mkfifo(path)
    if isinstance(content, dict):
        np.savez(path, **content)
    elif content is not None:
        path.write_bytes(content)
    monkeypatch.setattr(pipedream_simple, "__file__", str(tmp_path / "pipedream_simple.py"))
    (tmp_path / "pipedream_simple.py").write_bytes(SCRIPT.read_bytes())  # for --help
    status, _, err = program("--verbose False")
    assert status == 2
    assert err.count("\n") == 1
    assert str(path) in err


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


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-16"])
def test_any_terminal_gets_text(encoding, tmp_path):
    done = start(env={"PYTHONIOENCODING": encoding}, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, b"")
    out = done.stdout.decode(encoding)
    assert "PipeDream Pipeline Created!" in out
    assert ("Stage 0: Updated weights v0 → v1" in out) == (encoding == "utf-16")
    assert "?" not in out
    done = start("--schedule", "→", env={"PYTHONIOENCODING": encoding})
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.decode(encoding).count("\n") == 1
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


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("seconds", [0.3, 0.8])
def test_ctrl_c_during_the_imports_shows_no_traceback(seconds):
    run = subprocess.Popen([sys.executable, SCRIPT], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with pytest.raises(subprocess.TimeoutExpired):
        run.wait(seconds)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert run.returncode in (130, -signal.SIGINT)
    assert err.count(b"\n") <= 1


RUN_BY_HAND = sorted({*ROOT.glob("pipedream_*.py")} - {ROOT / "pipedream_ways.py"})


@pytest.mark.parametrize("path", RUN_BY_HAND, ids=lambda path: path.stem)
def test_every_script_lets_ctrl_c_end_it_before_its_slow_imports(path):
    slow = []
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.If) and "signal.SIG_DFL" in ast.unparse(node):
            break
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        slow += [name for name in names if name.partition(".")[0] not in sys.stdlib_module_names]
    else:
        slow += ["no guard"]
    assert slow == []


def test_with_gpus_auto_takes_the_first_and_the_banner_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto") == torch.device("cuda")
    assert choose_device("cpu") == torch.device("cpu")
    banner = format_banner(CONFIG, simulated(CONFIG))
    assert "SIMULATION MODE: Running on 1 GPU (simulating 4 GPUs)" in banner
    assert "All stages are on 1 GPU" in banner
    for name in ("cuda", "cuda:0", "cuda:1"):
        check_config({**CONFIG, "device": name})
    with pytest.raises(UserError, match="device='cuda:2': torch finds 2 CUDA GPUs"):
        check_config({**CONFIG, "device": "cuda:2"})
    with pytest.raises(UserError, match="torch finds no Apple GPU"):
        check_config({**CONFIG, "device": "mps"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("auto") == choose_device("mps") == torch.device("mps")
    check_config({**CONFIG, "device": "mps"})
    assert "Running on 1 GPU" in format_banner(CONFIG, simulated(CONFIG))


def test_the_banner_names_the_schedule_that_runs():
    runs = simulated(CONFIG)
    for schedule, name in (("naive", "Naive"), ("gpipe", "GPipe"), ("1f1b", "1F1B")):
        banner = format_banner({**CONFIG, "schedule": schedule}, runs)
        assert f"{name} Pipeline Created!" in banner
        assert ("work in parallel" in banner) == (schedule != "naive")
    assert "NO weight stashing" in format_banner({**CONFIG, "weight_stashing": False}, runs)
    assert "vertical sync" in format_banner({**CONFIG, "vertical_sync": True}, runs)


def test_importing_prints_nothing_and_writes_nothing(tmp_path):
    command = [sys.executable, "-c", "import pipedream_simple"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, capture_output=True, cwd=tmp_path, env=env, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert not list(tmp_path.iterdir())
