"""Real processes against plain training, the recurrences of the papers, and the simulation."""

import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from launch import ROOT, SCRIPT, launch
from reference import delayed_sgd
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.pipelining import schedules as engines

import pipedream_distributed
import pipedream_simple
from pipedream_distributed import (
    Report,
    Watch,
    as_run,
    difference,
    format_clock,
    format_proof,
    main,
    num_cores,
    one_process,
    place,
    prove,
)
from pipedream_lab import make_plan
from pipedream_simple import CONFIG, UserError, peak_versions, run_main, train

SMALL = {**CONFIG, "hidden_size": 12, "device": "cpu", "num_batches": 5}
# PyTorch's ZBV for two GPUs and two microbatches: GPU0 has stages 0 and 3, GPU1 has 1 and 2.
ZBV = """\
0F0,0F1,3F0,3I0,3F1,3W0,3I1,3W1,0I0,0W0,0I1,0W1
1F0,2F0,1F1,2F1,2I0,1I0,2W0,2I1,1I1,1W0,2W1,1W1
"""

TWO = {  # name -> (settings, chunks_per_gpu, delay of a stage in updates)
    "naive": ({"schedule": "naive"}, 1, lambda s: 0),
    "gpipe": ({"schedule": "gpipe"}, 1, lambda s: 0),
    "gpipe, one microbatch": ({"schedule": "gpipe", "num_microbatches": 1}, 1, lambda s: 0),
    "1f1b": ({"schedule": "1f1b"}, 1, lambda s: 0),
    "zb-h1": ({"schedule": "zb-h1"}, 1, lambda s: 0),
    "interleaved": ({"schedule": "interleaved"}, 3, lambda s: 0),
    "csv": ({"schedule": "zbv.csv", "layers_per_stage": 4}, 1, lambda s: 0),
    "pipedream": ({}, 1, lambda s: 1 - s),
    "pipedream, one microbatch": ({"num_microbatches": 1}, 1, lambda s: 1 - s),
    "vertical sync": ({"num_microbatches": 2, "vertical_sync": True}, 1, lambda s: 1),
}
FOUR = {
    "1f1b": ({"schedule": "1f1b", "num_microbatches": 2}, 1, lambda s: 0),
    "interleaved": ({"schedule": "interleaved"}, 2, lambda s: 0),
    "pipedream": ({}, 1, lambda s: math.ceil((3 - s) / 4)),
    "two microbatches": ({"num_microbatches": 2}, 1, lambda s: math.ceil((3 - s) / 2)),
    "one microbatch": ({"num_microbatches": 1, "num_batches": 9}, 1, lambda s: 3 - s),
    "vertical sync": (
        {"num_microbatches": 1, "num_batches": 9, "vertical_sync": True}, 1, lambda s: 3,
    ),
}  # fmt: skip


def run_all(cases, processes, folder):
    """name -> (plan, reports, memory, seconds) of every case, in as many processes."""
    (folder / "zbv.csv").write_text(ZBV)
    runs, plans = [], []
    for settings, chunks, _ in cases.values():
        config = {**SMALL, "num_stages": processes, "layers_per_stage": 6, **settings}
        if config["schedule"].endswith(".csv"):
            config |= {"schedule": str(folder / config["schedule"])}
        runs.append((config, chunks))
        plans.append(make_plan(config, chunks))
    (folder / "runs.json").write_text(json.dumps(runs))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += [f"--nproc-per-node={processes}", f"--log-dir={folder}"]
    torchrun += [str(ROOT / "tests" / "ranks.py")]
    arguments = [str(folder / "runs.json"), str(folder / "results.pt")]
    done = subprocess.run([*torchrun, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    saved = torch.load(folder / "results.pt", weights_only=False)
    return {name: (plan, *result) for name, plan, result in zip(cases, plans, saved, strict=True)}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    two = run_all(TWO, 2, tmp_path_factory.mktemp("two"))
    four = run_all(FOUR, 4, tmp_path_factory.mktemp("four"))
    return {2: two, 4: four}


CASES = [(2, name) for name in TWO] + [(4, name) for name in FOUR]


@pytest.mark.parametrize(("processes", "name"), CASES)
def test_real_processes_do_what_the_rows_say_on_the_versions_that_they_say(
    processes, name, results
):
    plan, reports, *_ = results[processes][name]
    assert [report.done for report in reports] == plan.schedule


@pytest.mark.parametrize(("processes", "name"), CASES)
def test_real_processes_train_as_the_papers_write_it(processes, name, results):
    """Plain SGD, or SGD with the delay of the paper: no schedule, no pipeline, in float64."""
    plan, reports, *_ = results[processes][name]
    *_, delay_of_stage = (TWO if processes == 2 else FOUR)[name]
    losses, weights = delayed_sgd(plan.config, delay_of_stage)
    run = as_run(reports, plan)
    assert run.losses == pytest.approx(losses, abs=1e-5)
    for ours, theirs in zip(run.weights, weights, strict=True):
        for key in ours:
            torch.testing.assert_close(ours[key].double(), theirs[key].detach(), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("processes", "name"), CASES)
def test_real_processes_and_one_device_agree_to_the_bit(processes, name, results):
    plan, reports, *_ = results[processes][name]
    real, alone = as_run(reports, plan), train(plan.config, schedule=plan.schedule)
    assert real.losses == alone.losses
    assert real.versions_read == alone.versions_read
    assert real.newest == alone.newest
    assert real.peak_versions == alone.peak_versions
    for ours, theirs in zip(real.weights, alone.weights, strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    proof = prove(reports, plan, torch.device("cpu"))
    assert proof.holds()
    assert "THE SAME AS pipedream_simple.py, TO THE BIT" in format_proof(proof)


@pytest.mark.parametrize(("processes", "name"), CASES)
def test_a_weight_version_leaves_memory_when_its_last_reader_is_done(processes, name, results):
    plan, _, memory, _ = results[processes][name]
    in_memory = [of_rank for of_rank, _ in memory]
    for rank in in_memory:
        assert rank
        for stage, known, alive in rank:
            assert alive == known, f"stage {stage} knows {known}, in memory are {alive}"
    if len(plan.schedule) == plan.config["num_stages"]:
        most = [max(len(alive) for _, _, alive in rank) for rank in in_memory]
        assert all(map(int.__le__, most, peak_versions(plan.schedule)))


@pytest.mark.parametrize(("processes", "name"), CASES)
def test_a_gradient_lands_on_the_version_that_the_rows_say(processes, name, results):
    plan, _, memory, _ = results[processes][name]
    num_backwards = sum(op.kind in ("B", "W") for row in plan.schedule for op in row)
    landed = [one for _, of_rank in memory for one in of_rank]
    assert len(landed) == 2 * num_backwards  # two runs
    assert all(versions == [version] for version, versions in landed)


def test_the_seconds_of_the_runs_are_no_more_than_passed(results):
    for _, reports, _, elapsed in (*results[2].values(), *results[4].values()):
        for report in reports:
            assert len(report.seconds) == 2
            assert min(report.seconds) > 0
        assert sum(reports[0].seconds) < elapsed


def altered(reports, **changes):
    return [reports[0]._replace(**changes), *reports[1:]]


def test_the_proof_fails_where_anything_differs(results):
    plan, reports, *_ = results[2]["pipedream"]
    done, weights, losses = reports[0].done, reports[0].weights[0], reports[1].losses
    changed = {name: w + 1e-2 for name, w in weights.items()}
    not_a_number = {name: w * math.nan for name, w in weights.items()}
    for wrong, line in (
        (altered(reports, done=[done[1], done[0], *done[2:]]), "schedule 88 of 90"),
        (altered(reports, done=done[:-1]), "schedule 89 of 90"),
        (altered(reports, done=[*done, done[0]]), "schedule 90 of 91"),
        (altered(reports, done=[done[0]._replace(version=1), *done[1:]]), "versions 79 of 80"),
        (altered(reports, weights={0: changed}), "weight, each stage 0.01 0"),
        (altered(reports, weights={0: not_a_number}), "weight, each stage nan 0"),
        (altered(reports, peak_versions={0: 3}), "alive, each stage 3 1 NOT [2, 1]"),
        ([reports[0], reports[1]._replace(losses=[2.0] * len(losses))], "a loss "),
    ):
        proof = prove(wrong, plan, torch.device("cpu"))
        text = re.sub(" +", " ", format_proof(proof))
        assert line in text
        assert text.startswith("❌ NOT THE SAME") is not proof.holds()
        assert not proof.holds(), line


def test_the_proof_fails_where_nothing_was_trained_however_small_the_steps():
    plan = make_plan({**SMALL, "num_stages": 1, "learning_rate": 1e-6}, 1)
    run = train(plan.config)
    at_start = [dict(stage.state_dict()) for stage in pipedream_simple.build_stages(plan.config)]
    trained = {name: w.detach() for name, w in run.weights[0].items()}
    losses = split_losses(plan)
    report = Report(plan.schedule[0], losses, {0: trained}, {0: 1}, [])
    assert prove([report], plan, torch.device("cpu")).holds()
    untrained = report._replace(weights={0: at_start[0]})
    assert not prove([untrained], plan, torch.device("cpu")).holds()


def split_losses(plan):
    """Numbers that add up to the losses of the batches, one a microbatch."""
    count = plan.config["num_microbatches"]
    return [loss if k == 0 else 0.0 for loss in train(plan.config).losses for k in range(count)]


def test_rounding_is_no_fault_and_is_told(results):
    plan, reports, *_ = results[2]["pipedream"]
    rounded = {0: {name: w + 1e-6 for name, w in reports[0].weights[0].items()}}
    proof = prove(altered(reports, weights=rounded), plan, torch.device("cpu"))
    assert proof.holds()
    assert format_proof(proof).startswith("✅ THE SAME AS pipedream_simple.py, BUT FOR ROUNDING")


def test_a_difference_is_zero_only_for_the_same_bits():
    a = torch.tensor([1.0, 0.0])
    assert difference(a, a.clone()) == 0
    assert difference(a, torch.tensor([1.0, -0.0])) > 0
    assert difference(a, torch.tensor([1.25, 0.0])) == 0.25
    assert math.isnan(difference(a, torch.tensor([math.nan, 0.0])))


@pytest.mark.parametrize(
    ("schedule", "cores", "simulated", "small", "hints"),
    [
        ("naive", 2, "24 1.00x", 1, ["so small"]),
        ("gpipe", 2, "15 1.60x", 1, ["so small"]),
        ("gpipe", 2, "15 1.60x", 3, []),
        ("gpipe", 1, "15 1.60x", 1, ["share 1 core and", "only up to 1x", "so small"]),
        ("gpipe", 1, "15 1.60x", 2, ["share 1 core and", "only up to 1x"]),
    ],
)
def test_the_clock_takes_the_slowest_rank_and_leaves_the_first_run_out(
    schedule, cores, simulated, small, hints, monkeypatch
):
    """Milliseconds: a forward takes 1, a backward 2; a batch of four microbatches, five batches."""
    plan = make_plan({**SMALL, "num_stages": 2, "schedule": schedule, "comm_time": 5}, 1)
    of_ranks = ([9.0, 0.3, 0.1, 0.4], [9.0, 0.2, 0.5, 0.1])  # seconds of each run
    reports = [Report([], [], {}, {}, [took / small for took in seconds]) for seconds in of_ranks]
    times = [1.0, 1.0], [2.0, 2.0]
    monkeypatch.setattr(pipedream_distributed, "measure_stages", lambda config: times)
    alone = [9.0, 0.125, 0.15, 0.1]
    monkeypatch.setattr(pipedream_distributed, "one_process", lambda config, num_runs: alone)
    monkeypatch.setattr(pipedream_distributed, "num_cores", lambda: cores)
    text = format_clock(reports, plan, torch.device("cpu"))
    lines = [re.sub(" +", " ", line) for line in text.splitlines()]
    assert lines[1] == "plain training, 1 process 25 1.00x"
    if small == 1:  # 0.3, 0.5 and 0.4 s for five batches
        assert lines[2] == "the pipeline, 2 processes 80 (60 to 100) 0.31x"
    assert lines[3] == "simulated, 1 process 24 1.00x"
    assert lines[4] == f"simulated, 2 processes {simulated}"
    assert "median of 3 (lowest to highest)" in text
    for hint in ("share 1 core and", "only up to 1x", "so small"):
        assert (hint in text) == (hint in hints)
    assert max(map(len, text.splitlines())) <= 80


def test_one_process_trains_in_every_run_that_is_timed(monkeypatch):
    steps, step = [], torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: steps.append(step(self)))
    seconds = one_process({**SMALL, "num_stages": 2}, num_runs=3)
    assert len(steps) == 3 * SMALL["num_batches"]
    assert len(seconds) == 3
    assert min(seconds) > 0


# ------------------------------------------------------------------------- the whole program


@pytest.fixture
def default_run():
    return launch()


def test_started_plainly_it_starts_all_processes_and_proves_what_they_did(default_run):
    assert default_run.returncode == 0
    assert default_run.stderr == ""
    out = default_run.stdout
    assert "PipeDream on 4 processes, real ones" in out
    assert "THE SAME AS pipedream_simple.py, TO THE BIT" in out


def test_it_prints_the_lines_of_the_simulation(default_run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pipedream_simple.py", "--device", "cpu"])
    assert run_main(pipedream_simple.main) == 0
    simulated = [line for line in capsys.readouterr().out.splitlines() if line.startswith("- ")]
    assert len(simulated) == 5
    printed = [line for line in default_run.stdout.splitlines() if line.startswith("- ")]
    assert printed == simulated


def test_the_times_that_it_prints_fit_together(default_run):
    lines = default_run.stdout.partition("REAL AND SIMULATED TIME")[2].splitlines()
    cells = [re.split(r" {2,}", line.strip()) for line in lines[2:6]]
    one, real, one_by_one, simulated = (float(time.split()[0]) for _, time, _ in cells)
    speed_ups = [float(cell.rstrip("x")) for *_, cell in cells]
    expected = [1, one / real, 1, one_by_one / simulated]
    assert speed_ups == pytest.approx(expected, abs=0.006)
    assert simulated < real  # it leaves out what the engine does
    assert 1 < speed_ups[3] <= 4
    assert ("the simulated speed-up cannot show" in default_run.stdout) == (num_cores() < 4)


# ------------------------------------------------------------------------------------- faults

LONG = ["--num_batches", "4000", "--batch_size", "4", "--repeats", "1", "--timeout", "9"]


def start_long_run(folder, processes):
    """A run that takes longer than a test."""
    folder.mkdir()
    with open(folder / "out", "w") as out, open(folder / "err", "w") as err:
        command = [sys.executable, SCRIPT, "--num_stages", str(processes), *LONG]
        return subprocess.Popen(command, stdout=out, stderr=err, cwd=folder)


def processes_below(pid):
    """rank -> the process of that rank, below the one that started them."""
    found = {}
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        told = dict(
            line.partition("=")[::2]
            for line in Path(f"/proc/{child}/environ").read_text().split("\0")
        )
        found[int(told["RANK"])] = int(child)
    return found


def is_gone(pid):
    try:
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True


def wait_until(true, seconds):
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert true()


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
def test_a_rank_that_dies_or_stalls_ends_the_job_in_time_and_by_its_name(tmp_path):
    """Two runs at once: one of two processes loses rank 0, in one of three rank 1 stands still."""
    faults = {"dies": (2, signal.SIGKILL, 0), "stands": (3, signal.SIGSTOP, 1)}
    runs = {name: start_long_run(tmp_path / name, fault[0]) for name, fault in faults.items()}
    try:
        for name in faults:
            wait_until(lambda name=name: "Schedule" in (tmp_path / name / "out").read_text(), 60)
        time.sleep(1)
        ranks = {name: processes_below(run.pid) for name, run in runs.items()}
        assert [sorted(ranks[name]) for name in faults] == [[0, 1], [0, 1, 2]]
        start = time.monotonic()
        for name, (_, fault, rank) in faults.items():
            os.kill(ranks[name][rank], fault)
        for name, (_, _, rank) in faults.items():
            runs[name].wait(timeout=60)
            assert time.monotonic() - start < 9 + 6  # the timeout, and to end all processes
            assert runs[name].returncode == 1
            lines = (tmp_path / name / "err").read_text().splitlines()
            assert lines, name
            assert all(f"rank {rank} " in line for line in lines), lines
            assert all(is_gone(pid) for pid in ranks[name].values())
    finally:
        for run in runs.values():
            run.kill()


class Store:
    """What the ranks said, and after so many looks what some say late."""

    def __init__(self, late):
        self.said, self.late, self.looks = set(), late, 0

    def set(self, key, value):
        self.said.add(key)

    def check(self, keys):
        self.looks += 1
        return keys[0] in self.said or self.looks > self.late.get(keys[0], math.inf)


@pytest.mark.parametrize(
    ("rank", "late", "error", "named"),
    [
        (0, {1: 0, 3: 40}, "gloo: Timed out", "rank 2 did not answer within --timeout 1.5 s"),
        (0, {1: 0}, "gloo: Timed out", "rank 2 and rank 3 did not answer"),
        (1, {2: 20, 3: 40}, "gloo: Timed out", "rank 0 did not answer"),
        (1, {2: 20, 3: 40}, "Connection closed\nby peer", "lost rank 0"),
        (0, {1: 0, 2: 0, 3: 0}, "Connection closed\nby peer", "rank 0: Connection closed by peer"),
        (1, {0: 0, 3: 0}, "gloo: Timed out", None),  # rank 0 says it
        (0, {1: 0, "failed": 9}, "Connection closed", None),  # rank 2 says itself why
    ],
)
def test_it_names_the_ranks_that_do_not_say_that_they_wait(
    rank, late, error, named, monkeypatch, capsys
):
    """A rank of four waits in vain; others say the same, after so many looks, or never."""
    watch = object.__new__(Watch)
    watch.rank, watch.world_size, watch.timeout = rank, 4, 1.5
    keys = {who if who == "failed" else f"gave up {who}": looks for who, looks in late.items()}
    watch.store = Store(keys)
    killed = []
    monkeypatch.setattr(pipedream_distributed, "processes_of", lambda rank: [1000 + rank])
    monkeypatch.setattr(os, "kill", lambda pid, _: killed.append(pid))
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as stop, watch.blaming():
        raise RuntimeError(error)
    assert stop.value.code == 1
    told = capsys.readouterr().err
    if named:
        assert told.startswith(f"pipedream_distributed.py: {named}")
        assert told.count("\n") == 1
        silent = re.findall(r"rank (\d)(?= and| did|;)", told)
        assert killed == [1000 + int(other) for other in silent]
    else:
        assert (told, killed) == ("", [])


def test_an_error_of_its_own_is_no_reason_to_blame_another_rank():
    watch = object.__new__(Watch)
    watch.store = Store({})
    for error in (RuntimeError("shapes cannot be multiplied"), KeyError("connection")):
        with pytest.raises(type(error)), watch.blaming():
            raise error
        assert watch.store.said == {"failed"}


def test_a_rank_is_missed_while_the_others_wait_for_rank_0(monkeypatch):
    def all_reduce(tensor):
        raise RuntimeError("Connection closed by peer")

    watch, gave_up = object.__new__(Watch), []
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(Watch, "give_up", lambda self, error: gave_up.append(error) or sys.exit(1))
    with pytest.raises(SystemExit):
        watch.keep_meeting(None)
    assert gave_up == ["Connection closed by peer"]


def test_rank_0_lets_the_others_go_when_it_fails_while_they_wait(monkeypatch):
    sums = []
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: sums.append(tensor.item()))
    watch = object.__new__(Watch)
    watch.timeout = 1000
    with pytest.raises(KeyError), watch.others_waiting():
        raise KeyError
    assert sums == [1]


def test_a_rank_ends_when_torchrun_has_gone(monkeypatch):
    parents = iter([7, 7, 1])
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as stop:
        pipedream_distributed.end_with(7)
    assert stop.value.code == 1
    assert list(parents) == []


def test_how_torchrun_ends_is_told_in_a_line(monkeypatch, capsys):
    errors = pipedream_distributed.ChildFailedError, pipedream_distributed.SignalException
    failure = ProcessFailure(local_rank=2, pid=9, exitcode=-9, error_file="")
    for error, message, status in (
        (errors[0]("a", {2: failure}), "rank 2 was ended by SIGKILL", 1),
        (errors[1]("", signal.SIGTERM), "stopped", 130),
        (errors[1]("", signal.SIGINT), "stopped", 130),
    ):

        def torchrun(arguments, error=error):
            raise error

        monkeypatch.setattr(pipedream_distributed, "torchrun", torchrun)
        monkeypatch.setattr(sys, "argv", [SCRIPT])
        try:
            ended = run_main(lambda: pipedream_distributed.launch(4))
        except SystemExit as stop:
            ended = stop.code
        assert ended == status
        told = capsys.readouterr().err
        assert message in told
        assert told.count("\n") == 1


def test_it_goes_on_in_silence_when_nobody_reads_any_more(monkeypatch):
    """As in | head: the pipe is closed, and rank 0 must not leave the others waiting."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as nobody:
        monkeypatch.setattr(sys, "stdout", nobody)
        pipedream_distributed.say("a")
        pipedream_distributed.say("b")
        print("c", flush=True)


# ---------------------------------------------------------------------------------- bad input


@pytest.fixture
def told(monkeypatch, capsys):
    """Run main with these flags in this environment; what it wrote to stderr, and its status."""

    def tell(*flags, **environment):
        for name in (
            "RANK",
            "WORLD_SIZE",
            "LOCAL_RANK",
            "LOCAL_WORLD_SIZE",
            "MASTER_ADDR",
            "TORCHELASTIC_RUN_ID",
        ):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", [SCRIPT, *flags])
        monkeypatch.setattr(dist, "init_process_group", None)  # it must not come so far
        monkeypatch.setattr(pipedream_distributed, "torchrun", None)
        try:
            status = run_main(main)
        except SystemExit as stop:
            status = stop.code
        captured = capsys.readouterr()
        assert captured.out == ""
        return captured.err, status

    yield tell
    logging.disable(logging.NOTSET)


def rank(number, world_size):
    return {
        "TORCHELASTIC_RUN_ID": "job",
        "RANK": str(number), "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_microbatches", "5"], "batch_size=32 cannot be split evenly"),
        (["--weight_stashing", "False"], "only for the simulation"),
        (["--schedule", "dualpipe"], "unknown schedule 'dualpipe'"),
        (["--schedule", "no.csv"], "cannot read no.csv"),
        (["--schedule", "interleaved", "--num_microbatches", "2"], "must be a multiple"),
        (["--timeout", "0"], "timeout=0.0 must be a number of seconds"),
        (["--timeout", "inf"], "timeout=inf must be"),
        (["--timeout", "soon"], "invalid float value: 'soon'"),
        (["--repeats", "0"], "repeats=0 must be a whole number"),
        (["--device", "cuda"], "torch finds 0 CUDA GPUs"),
        (["--timout", "9"], "unknown flag '--timout'"),
        (["--num_stages", "17"], "torchrun --nproc-per-node 17"),
    ],
)
def test_bad_input_is_one_line_before_anything_starts(flags, message, told):
    error, status = told(*flags)
    assert status == 2
    assert message in error
    assert error.count("\n") == 1
    assert error.startswith("pipedream_distributed.py: ")
    if "17" not in flags:  # which torchrun itself would start
        error, status = told(*flags, **rank(0, 4))
        assert status == 2
        assert message in error
        assert error.count("\n") == 1
        assert told(*flags, **rank(1, 4)) == ("", 2)  # rank 0 says it for all


@pytest.mark.parametrize("world_size", [1, 3, 5])
def test_another_number_of_processes_than_rows_is_one_line_from_rank_0(world_size, told):
    error, status = told(**rank(0, world_size))
    assert status == 2
    assert error.count("\n") == 1
    assert f"WORLD_SIZE={world_size}" in error
    assert "torchrun --nproc-per-node 4" in error
    if world_size > 1:
        assert told(**rank(world_size - 1, world_size)) == ("", 2)


def test_an_environment_that_torchrun_would_not_make_is_one_line(told):
    assert told(RANK="0")[0].count("\n") == 1
    for number in ("-1", "4"):
        error, status = told(**rank(0, 4) | {"RANK": number, "TORCHELASTIC_RUN_ID": ""})
        assert f"RANK={number} is not one of WORLD_SIZE=4 ranks" in error or number == "4"
        assert status == 2
    error, status = told("--nonsense", RANK="1", WORLD_SIZE="4")  # left over in the environment
    assert (status, error.count("\n")) == (2, 1)
    error, status = told(RANK="first", WORLD_SIZE="4")
    assert status == 2
    assert "RANK is not a number" in error
    error, status = told(**rank(0, 4))
    assert status == 2
    assert "MASTER_ADDR" in error
    assert error.count("\n") == 1


def test_a_file_in_which_the_last_stage_goes_forward_out_of_order_is_refused(told, tmp_path):
    path = tmp_path / "swapped.csv"
    path.write_text("0F0,0F1,0B1,0B0\n1F1,1F0,1B1,1B0\n")
    error, status = told("--schedule", str(path))
    assert status == 2
    assert "1F1 stands before 1F0, but PyTorch's engine" in error
    path.write_text("0F0,0F1,0B1,0B0\n1F0,1F1,1B1,1B0\n")
    config = {**SMALL, "schedule": str(path), "num_stages": 2, "num_microbatches": 2}
    assert pipedream_distributed.checked_plan(config, 1, 60, 3)


def test_without_gloo_it_says_so(told, monkeypatch):
    monkeypatch.setattr(dist, "is_gloo_available", lambda: False)
    for error, status in (told(), told(**rank(0, 4))):
        assert status == 2
        assert "no gloo" in error
        assert error.count("\n") == 1


@pytest.mark.parametrize(("owner", "name"), [
    (engines, "_Action"),
    (engines, "_add_send_recv"),
    (engines, "_PipelineScheduleRuntime"),
    (engines._PipelineScheduleRuntime, "_prepare_schedule_with_comms"),
])  # fmt: skip
def test_a_torch_without_the_private_names_is_told(owner, name, told, monkeypatch):
    monkeypatch.delattr(owner, name)
    error, status = told()
    assert status == 2
    assert f"torch {torch.__version__} does not run a schedule given as data" in error


def test_an_older_torch_is_told(told, monkeypatch):
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.9.1+cu128"))
    assert "torch 2.9.1+cu128 does not run a schedule given as data" in told()[0]
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.13.0"))
    pipedream_distributed.check_engine()


def test_every_process_gets_a_gpu_of_its_own_or_none_does(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert place({"device": "auto"}, 2, 4) == torch.device("cuda:2")
    assert place({"device": "cuda"}, 3, 4) == torch.device("cuda:3")
    assert place({"device": "cpu"}, 2, 4) == torch.device("cpu")
    assert place({"device": "auto"}, 2, 5) == torch.device("cpu")
    with pytest.raises(UserError, match="5 processes need a GPU each, torch finds 4"):
        place({"device": "cuda"}, 2, 5)
    with pytest.raises(UserError, match="every process needs its own"):
        place({"device": "cuda:1"}, 0, 1)
