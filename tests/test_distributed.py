"""Real processes against plain training, the recurrences of the papers, and the simulation."""

import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from launch import ROOT, SCRIPT, launch
from reference import delayed_sgd
from torch.distributed.pipelining import schedules as engines

import pipedream_distributed
import pipedream_lab
import pipedream_planner
import pipedream_simple
from pipedream_distributed import (
    LOST,
    Recomputed,
    Report,
    difference,
    explain,
    format_clock,
    is_stopped,
    main,
    num_cores,
    one_process,
    place,
    prove,
    wait_for,
)
from pipedream_lab import LAB_CONFIG, make_plan, train_plan
from pipedream_simple import Audit, UserError, peak_versions, run_main

SMALL = {**LAB_CONFIG, "hidden_size": 12, "device": "cpu", "num_batches": 5}
CPU = torch.device("cpu")
# PyTorch's ZBV for two GPUs and two microbatches: GPU0 has stages 0 and 3, GPU1 has 1 and 2.
ZBV = """\
0F0,0F1,3F0,3I0,3F1,3W0,3I1,3W1,0I0,0W0,0I1,0W1
1F0,2F0,1F1,2F1,2I0,1I0,2W0,2I1,1I1,1W0,2W1,1W1
"""

TRANSFORMER = {"network": "transformer", "layers_per_stage": 2, "num_batches": 3}
TWO = {  # name -> (settings, delay of a stage in updates)
    "naive": ({"schedule": "naive"}, lambda s: 0),
    "gpipe": ({"schedule": "gpipe"}, lambda s: 0),
    "gpipe, one microbatch": ({"schedule": "gpipe", "num_microbatches": 1}, lambda s: 0),
    "1f1b": ({"schedule": "1f1b"}, lambda s: 0),
    "zb-h1": ({"schedule": "zb-h1"}, lambda s: 0),
    "zb-h2": ({"schedule": "zb-h2"}, lambda s: 0),
    "interleaved": ({"schedule": "interleaved"}, lambda s: 0),
    "csv": ({"schedule": "zbv.csv", "layers_per_stage": 4}, lambda s: 0),
    "pipedream": ({}, lambda s: 1 - s),
    "pipedream, one microbatch": ({"num_microbatches": 1}, lambda s: 1 - s),
    "vertical sync": ({"num_microbatches": 2, "vertical_sync": True}, lambda s: 1),
    "momentum": ({"momentum": 0.9, "learning_rate": 0.05}, lambda s: 1 - s),
    "recompute": ({"recompute": True, "num_microbatches": 1}, lambda s: 1 - s),
    "transformer": (
        {**TRANSFORMER, "recompute": True, "momentum": 0.5}, lambda s: 1 - s,
    ),
    "transformer, zb-h1": ({**TRANSFORMER, "schedule": "zb-h1"}, lambda s: 0),
}  # fmt: skip
FOUR = {
    "1f1b": ({"schedule": "1f1b", "num_microbatches": 2}, lambda s: 0),
    "interleaved": ({"schedule": "interleaved", "chunks_per_gpu": 2}, lambda s: 0),
    "pipedream": ({}, lambda s: math.ceil((3 - s) / 4)),
    "two microbatches": ({"num_microbatches": 2}, lambda s: math.ceil((3 - s) / 2)),
    "one microbatch": ({"num_microbatches": 1, "num_batches": 9}, lambda s: 3 - s),
    "vertical sync": (
        {"num_microbatches": 1, "num_batches": 9, "vertical_sync": True}, lambda s: 3,
    ),
}  # fmt: skip
FAULTS = {"unstashed": {"num_microbatches": 2}, "hoarder": {}}


def run_all(cases, processes, folder):
    """name -> (plan, reports, memory, seconds) of every case, in as many processes."""
    (folder / "zbv.csv").write_text(ZBV)
    runs, plans = [], []
    for name, settings in cases.items():
        config = {**SMALL, "num_stages": processes, "layers_per_stage": 6, **settings}
        if config["schedule"].endswith(".csv"):
            config |= {"schedule": str(folder / config["schedule"])}
        runs.append((config, name if name in FAULTS else ""))
        plans.append(make_plan(config))
    (folder / "runs.json").write_text(json.dumps(runs))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += [f"--nproc-per-node={processes}", f"--log-dir={folder}", "--local-addr=127.0.0.1"]
    torchrun += [str(ROOT / "tests" / "ranks.py")]
    arguments = [str(folder / "runs.json"), str(folder / "results.pt")]
    done = subprocess.run([*torchrun, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    saved = torch.load(folder / "results.pt", weights_only=False)
    return {name: (plan, *result) for name, plan, result in zip(cases, plans, saved, strict=True)}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    two = {name: settings for name, (settings, _) in TWO.items()} | FAULTS
    four = {name: settings for name, (settings, _) in FOUR.items()}
    return {
        2: run_all(two, 2, tmp_path_factory.mktemp("two")),
        4: run_all(four, 4, tmp_path_factory.mktemp("four")),
    }


CASES = [(2, name) for name in TWO] + [(4, name) for name in FOUR]


def per_stage(reports):
    """The weights at the end, and the most versions in memory, of each stage."""
    stages = {stage: end for report in reports for stage, end in report.stages.items()}
    return zip(*(stages[stage] for stage in sorted(stages)), strict=True)


def losses_of(reports):
    return [loss for report in reports for loss in report.losses]


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
    _, delay_of_stage = (TWO if processes == 2 else FOUR)[name]
    losses, weights = delayed_sgd(plan.config, delay_of_stage)
    assert losses_of(reports) == pytest.approx(losses, abs=1e-5)
    real, _ = per_stage(reports)
    for ours, theirs in zip(real, weights, strict=True):
        for key in ours:
            torch.testing.assert_close(ours[key].double(), theirs[key].detach(), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("processes", "name"), CASES)
def test_real_processes_and_one_device_agree_to_the_bit(processes, name, results):
    plan, reports, *_ = results[processes][name]
    audit = Audit(plan.config)
    alone = train_plan(plan, watch=audit)
    assert losses_of(reports) == alone.losses
    read = {op[:3]: op.version for report in reports for op in report.done}
    assert read | audit.read == read
    real, peaks = per_stage(reports)
    assert [*peaks] == alone.peak_versions
    for ours, theirs in zip(real, alone.weights, strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    holds, text = prove(reports, plan, CPU)
    assert holds
    assert "THE SAME AS pipedream_simple.py, TO THE BIT" in text


@pytest.mark.parametrize(("processes", "name"), CASES)
def test_a_weight_version_leaves_memory_when_its_last_reader_is_done(processes, name, results):
    plan, reports, memory, _ = results[processes][name]
    for rank in memory:
        assert rank
        for stage, known, alive in rank:
            assert alive == known, f"stage {stage} knows {known}, in memory are {alive}"
    if len(plan.schedule) == plan.config["num_stages"]:
        most = [max(len(alive) for _, _, alive in rank) for rank in memory]
        _, peaks = per_stage(reports)
        assert most == [*peaks] == peak_versions(plan.schedule)


def test_the_proof_fails_where_forwards_read_other_versions_than_the_schedule_says(results):
    """In real processes: the versions are told by the tensors, not by what should be read."""
    plan, reports, *_ = results[2]["unstashed"]
    holds, text = prove(reports, plan, CPU)
    assert not holds
    text = re.sub(" +", " ", text)
    assert "schedule 50 of 50" in text
    same, num_read = map(int, re.search(r"on its versions (\d+) of (\d+)", text).groups())
    assert 0 < same < num_read == 40
    done, planned = (
        [op for r in reports for op in r.done],
        [op for row in plan.schedule for op in row],
    )
    pairs = zip(done, planned, strict=True)
    assert {did.kind for did, op in pairs if did != op} == {"F", "B"}


def test_the_proof_fails_where_a_version_stays_in_memory(results):
    """Not only those count that the stage knows."""
    plan, reports, *_ = results[2]["hoarder"]
    holds, text = prove(reports, plan, CPU)
    assert not holds
    # Two runs of five updates each; the versions 0, and on stage 0 one that is still in use, go.
    assert re.search(r"alive, each stage +\d+ \d+ NOT 2 1\n", text)


def test_the_stages_of_a_rank_update_together_after_its_last_backward_of_a_batch(results):
    for processes, name in ((2, "interleaved"), (2, "csv"), (4, "interleaved")):
        plan, reports, *_ = results[processes][name]
        num_microbatches = plan.config["num_microbatches"]
        for report in reports:
            kinds = "".join(op.kind for op in report.done)
            stages = {op.stage for op in report.done}
            batches = re.findall("[FBIW]+U+", kinds)
            assert "".join(batches) == kinds
            assert len(batches) == plan.config["num_batches"]
            for batch in batches:
                assert batch.count("U") == len(stages)
                assert batch.count("F") == len(stages) * num_microbatches


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
    done, losses = reports[0].done, reports[1].losses
    weights, peak = reports[0].stages[0]
    changed = {name: w + 1e-2 for name, w in weights.items()}
    not_a_number = {name: w * math.nan for name, w in weights.items()}
    other_version = [done[0]._replace(version=1), *done[1:]]
    for wrong, line in (
        (altered(reports, done=[done[1], done[0], *done[2:]]), "schedule 88 of 90"),
        (altered(reports, done=done[:-1]), "schedule 89 of 90"),
        (altered(reports, done=[*done, done[0]]), "schedule 90 of 91"),
        (altered(reports, done=other_version), "schedule 90 of 90"),
        (altered(reports, done=other_version), "versions 79 of 80"),
        (altered(reports, stages={0: (changed, peak)}), "weight, each stage 0.01 0"),
        (altered(reports, stages={0: (not_a_number, peak)}), "weight, each stage nan 0"),
        (altered(reports, stages={0: (weights, 3)}), "alive, each stage 3 1 NOT 2 1"),
        ([reports[0], reports[1]._replace(losses=[2.0] * len(losses))], "a loss "),
    ):
        holds, text = prove(wrong, plan, CPU)
        text = re.sub(" +", " ", text)
        assert line in text
        assert text.startswith("❌ NOT THE SAME")
        assert not holds, line


def test_the_proof_fails_where_nothing_was_trained_however_small_the_steps():
    plan = make_plan({**SMALL, "num_stages": 1, "learning_rate": 1e-6})
    run = train_plan(plan)
    at_start = [dict(stage.state_dict()) for stage in pipedream_simple.build_stages(plan.config)]
    trained = {name: w.detach() for name, w in run.weights[0].items()}
    report = Report(plan.schedule[0], run.losses, {0: (trained, 1)}, [])
    assert prove([report], plan, CPU)[0]
    untrained = report._replace(stages={0: (at_start[0], 1)})
    assert not prove([untrained], plan, CPU)[0]


def test_recomputed_keeps_its_input_alone_until_the_backward():
    torch.manual_seed(0)
    kept, runs = [], []
    layers = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh())
    layers.register_forward_pre_hook(lambda module, x: runs.append(module))
    layers.register_forward_hook(lambda module, x, y: kept.append(weakref.ref(y.untyped_storage())))
    x = torch.randn(3, 4, requires_grad=True)
    output = Recomputed(layers)(x).sum()  # a tanh would save its output
    assert [storage() for storage in kept] == [None]
    (gradient,) = torch.autograd.grad(output, x)
    assert len(runs) == 2
    assert torch.equal(gradient, torch.autograd.grad(layers(x).sum(), x)[0])


def test_rounding_is_no_fault_and_is_told(results):
    plan, reports, *_ = results[2]["pipedream"]
    weights, peak = reports[0].stages[0]
    rounded = {0: ({name: w + 1e-6 for name, w in weights.items()}, peak)}
    holds, text = prove(altered(reports, stages=rounded), plan, CPU)
    assert holds
    assert text.startswith("✅ THE SAME AS pipedream_simple.py, BUT FOR ROUNDING")


def test_a_difference_is_zero_only_for_the_same_bits_or_where_both_are_no_number():
    def off(ours, theirs):
        return difference({"w": torch.tensor(ours)}, {"w": torch.tensor(theirs)})

    assert off([1.0, 0.0], [1.0, 0.0]) == 0
    assert off([1.0, 0.0], [1.0, -0.0]) > 0
    assert off([1.0, 0.0], [1.25, 0.0]) == 0.25
    assert math.isnan(off([1.0, 0.0], [math.nan, 0.0]))
    other_nan = torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32).item()
    assert off([math.nan, 1.0], [-other_nan, 1.0]) == 0
    assert off([math.nan, 1.0], [math.nan, 2.0]) == 1


@pytest.mark.parametrize(
    ("schedule", "cores", "simulated", "small", "hints"),
    [
        ("naive", 2, "24 1.00x", 1, ["this small"]),
        ("gpipe", 2, "15 1.60x", 1, ["this small"]),
        ("gpipe", 2, "15 1.60x", 3, []),
        ("gpipe", 1, "15 1.60x", 1, ["share 1 core:", "1x at most", "this small"]),
        ("gpipe", 1, "15 1.60x", 2, ["share 1 core:", "1x at most"]),
    ],
)
def test_the_clock_takes_the_slowest_rank_and_leaves_the_first_run_out(
    schedule, cores, simulated, small, hints, monkeypatch
):
    """Milliseconds: a forward takes 1, a backward 2; a batch of four microbatches, five batches."""
    plan = make_plan({**SMALL, "num_stages": 2, "schedule": schedule, "comm_time": 5})
    of_ranks = ([9.0, 0.3, 0.1, 0.4], [9.0, 0.2, 0.5, 0.1])  # seconds of each run
    reports = [Report([], [], {}, [took / small for took in seconds]) for seconds in of_ranks]
    times = {"forward_time": [1.0, 1.0], "backward_time": [2.0, 2.0], "update_time": [0.0, 0.0]}
    alone = iter([9.0, 0.125, 0.15, 0.1])
    monkeypatch.setattr(pipedream_planner, "measure_stages", lambda config: times)
    monkeypatch.setattr(pipedream_distributed, "one_process", lambda config: next(alone))
    monkeypatch.setattr(pipedream_distributed, "num_cores", lambda: cores)
    text = format_clock(reports, plan, CPU)
    lines = [re.sub(" +", " ", line) for line in text.splitlines()]
    assert lines[1] == "plain training, 1 process 25 1.00x"
    if small == 1:  # 0.3, 0.5 and 0.4 s for five batches
        assert lines[2] == "the pipeline, 2 processes 80 (60 to 100) 0.31x"
    assert lines[3] == "simulated, 1 process 24 1.00x"
    assert lines[4] == f"simulated, 2 processes {simulated}"
    assert "median of 3 (lowest to highest)" in text
    for hint in ("share 1 core:", "1x at most", "this small"):
        assert (hint in text) == (hint in hints)
    assert max(map(len, text.splitlines())) <= 80


def test_plain_training_is_timed_without_what_is_made_before_it(monkeypatch):
    steps, step = [], torch.optim.SGD.step
    split = pipedream_lab.split_batches

    def slow_split(*arguments):
        time.sleep(1)
        return split(*arguments)

    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: steps.append(step(self)))
    monkeypatch.setattr(pipedream_lab, "split_batches", slow_split)
    start = time.perf_counter()
    seconds = one_process({**SMALL, "num_stages": 2})
    assert 0 < seconds < time.perf_counter() - start - 1
    assert len(steps) == SMALL["num_batches"]


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
    assert max(map(len, out.splitlines())) <= 80


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
    assert ("the speed-up is" in default_run.stdout) == (num_cores() < 4)


# ------------------------------------------------------------------------------------- faults


def start(folder, *flags, before=(), **environment):
    """The program with these flags, in a process group of its own; it writes to out and err."""
    folder.mkdir()
    command = [*before, sys.executable, SCRIPT, *flags]
    with open(folder / "out", "w") as out, open(folder / "err", "w") as err:
        return subprocess.Popen(
            command,
            stdout=out,
            stderr=err,
            cwd=folder,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
            start_new_session=True,
        )


def ranks_below(pid):
    """rank -> the process of that rank, below the one that started them."""
    found = {}
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        environment = Path(f"/proc/{child}/environ").read_text().split("\0")
        rank = [line.partition("=")[2] for line in environment if line.startswith("RANK=")]
        if rank:
            found[int(rank[0])] = int(child)
    return found


def is_gone(pid):
    try:
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True


def wait_until(true, seconds=60):
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert true()


needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
LONG = ["--num_batches", "4000", "--batch_size", "4", "--repeats", "1", "--timeout", "6"]


@pytest.fixture
def started(tmp_path):
    """Starts the program like start(); nothing of it outlives the test."""
    runs = []

    def starter(name, *flags, **details):
        runs.append(start(tmp_path / name, *flags, **details))
        return runs[-1], tmp_path / name

    yield starter
    for run in runs:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
        run.wait()


@needs_proc
def test_the_run_ends_in_time_whichever_process_stops_or_dies(started):
    """Three runs at once. A rank of three stands still; the launcher is killed while ranks import;
    Ctrl-C while they import."""
    stands, folder = started("stands", "--num_stages", "3", *LONG)
    killed, _ = started("killed", "--num_stages", "1", *LONG)
    stopped, of_stopped = started("stopped", "--num_stages", "1", *LONG)

    for run in (killed, stopped):
        wait_until(lambda run=run: len(ranks_below(run.pid)) == 1)
        ranks = ranks_below(run.pid).values()
        if run is killed:
            run.kill()
        else:
            os.killpg(run.pid, signal.SIGINT)
        run.wait(timeout=20)
        wait_until(lambda ranks=ranks: all(map(is_gone, ranks)), seconds=5)
    assert stopped.returncode == 130
    assert (of_stopped / "err").read_text() == "pipedream_distributed.py: stopped\n"

    wait_until(lambda: "Schedule" in (folder / "out").read_text())
    time.sleep(1)
    ranks = ranks_below(stands.pid)
    assert sorted(ranks) == [0, 1, 2]
    since = time.monotonic()
    os.kill(ranks[1], signal.SIGSTOP)
    stands.wait(timeout=60)
    assert time.monotonic() - since < 6 + 4
    assert stands.returncode == 1
    why = "rank 1 did not answer within --timeout 6 s: stopped, stuck or slow"
    assert (folder / "err").read_text() == f"pipedream_distributed.py: {why}\n"
    assert all(map(is_gone, ranks.values()))


def test_ctrl_c_during_imports_leaves_no_traceback(started):
    run, folder = started("run")
    time.sleep(0.3)
    os.killpg(run.pid, signal.SIGINT)
    assert run.wait(timeout=20) in (-signal.SIGINT, 130)
    assert (folder / "err").read_text().count("\n") <= 1


NAMELESS = "hostname nowhere.invalid && ip link set lo up && exec "


def can_be_nameless():
    command = ["unshare", "-r", "-u", "-n", "sh", "-c", NAMELESS + "true"]
    with open(os.devnull, "w") as nobody:
        try:
            return subprocess.run(command, stdout=nobody, stderr=nobody).returncode == 0
        except OSError:
            return False


def test_strange_surroundings_change_nothing_or_are_told_in_a_line(started):
    """At once: no host name, all debug checks of PyTorch, a backend of matplotlib that does not
    exist, and NaN everywhere; an interface for gloo that does not exist."""
    flags = ["--num_stages", "2", "--repeats", "1", "--num_batches", "3", "--learning_rate", "1e10"]
    strange = {"TORCH_DISTRIBUTED_DEBUG": "DETAIL", "MPLBACKEND": "bad"}
    nameless = ["unshare", "-r", "-u", "-n", "sh", "-c", NAMELESS + '"$0" "$@"']
    before = nameless if can_be_nameless() else []
    strange_run, folder = started("strange", *flags, before=before, **strange)
    lost, of_lost = started("lost", "--num_stages", "1", GLOO_SOCKET_IFNAME="junk0")
    assert lost.wait(timeout=60) == 1
    told = (of_lost / "err").read_text()
    assert told.startswith("pipedream_distributed.py: lost the other ranks: ")
    assert "junk0" in told
    assert told.count("\n") == 1
    assert strange_run.wait(timeout=60) == 0
    assert (folder / "err").read_text() == ""
    assert "THE SAME AS pipedream_simple.py, TO THE BIT" in (folder / "out").read_text()


FAKE_RANK = """\
import os, signal, sys, time
rank = int(os.environ["RANK"])
exec(sys.argv[1 + rank])
"""


@pytest.fixture
def fake(tmp_path, monkeypatch, capfd):
    """What launch() returns and writes to stderr when the ranks run these pieces of code."""
    path = tmp_path / "pipedream_distributed.py"
    path.write_text(FAKE_RANK)

    def too_late(*_):
        raise TimeoutError

    def run(*codes, timeout=1.5):
        monkeypatch.setattr(sys, "argv", [str(path), *codes])
        signal.alarm(20)
        status = pipedream_distributed.launch(len(codes), timeout)
        return status, capfd.readouterr().err.replace("pipedream_distributed.py: ", "")

    before = signal.signal(signal.SIGALRM, too_late)
    yield run
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


STOP = "os.kill(os.getpid(), signal.SIGSTOP)"
GIVE_UP = f"print('lost', file=sys.stderr); sys.exit({LOST})"
FAIL = "time.sleep(0.2); print('bad', file=sys.stderr); sys.exit(2)"
HANG, GO_ON = "time.sleep(99)", "time.sleep(0.5)"
SILENT = "did not answer within --timeout 1.5 s: stopped, stuck or slow\n"


@pytest.mark.parametrize(
    ("codes", "status", "told"),
    [
        (["pass", GO_ON, "pass"], 0, ""),
        (["print('warning', file=sys.stderr)"] * 3, 0, "warning\n"),
        ([STOP] * 2, 1, f"rank 0 and rank 1 {SILENT}"),  # all: nobody is left to notice
        (["pass", STOP], 1, f"rank 1 {SILENT}"),  # after the last line
        ([GIVE_UP, HANG, GIVE_UP], 1, f"rank 1 {SILENT}"),
        ([GIVE_UP, GO_ON, STOP], 1, f"rank 2 {SILENT}"),
        ([GIVE_UP] * 3, 1, "lost\n"),  # all alike: nobody is to blame
        ([GIVE_UP, FAIL, FAIL], 1, "bad\n"),  # out of memory, told once
        ([HANG, "os.kill(os.getpid(), signal.SIGKILL)"], 1, "rank 1 was ended by SIGKILL\n"),
        (["sys.exit(1)", "pass"], 1, ""),  # the proof does not hold
    ],
)
def test_the_launcher_ends_all_ranks_and_tells_in_a_line_why(codes, status, told, fake):
    since = time.monotonic()
    assert fake(*codes) == (status, told)
    assert time.monotonic() - since < 1.5 + 1.5


def test_a_rank_that_goes_on_again_in_time_is_not_stopped():
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(9)"])
    try:
        for number, stopped in ((signal.SIGSTOP, True), (signal.SIGCONT, False)):
            sleeper.send_signal(number)
            wait_until(lambda stopped=stopped: is_stopped(sleeper) == stopped, 5)
        sleeper.send_signal(signal.SIGSTOP)
        assert wait_for([sleeper], 0.3) == [0]
    finally:
        sleeper.kill()
    wait_until(lambda: not is_stopped(sleeper), 5)  # it is over, and nobody has asked yet
    assert sleeper.wait() == -signal.SIGKILL


def test_a_launcher_without_room_for_files_says_so(monkeypatch, capsys):
    def refuse(*_, **__):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    with pytest.raises(UserError, match=r"cannot start 4 processes: .*Too many"):
        pipedream_distributed.launch(4, 60)


def test_a_rank_blames_itself_for_its_own_error_and_others_for_a_lost_connection(
    monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", [SCRIPT])
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setattr(os, "_exit", sys.exit)

    def fail(error):
        def init_process_group(backend, timeout):
            assert timeout.total_seconds() == 6
            raise error

        monkeypatch.setattr(dist, "init_process_group", init_process_group)
        return pipedream_distributed.run_process(None, CPU, {"timeout": 9, "repeats": 1})

    with pytest.raises(RuntimeError, match="shapes"):
        fail(RuntimeError("shapes cannot be multiplied"))
    for error in (RuntimeError("gloo: Timed\nout"), RuntimeError("address already in use, socket")):
        with pytest.raises(SystemExit) as stop:
            fail(error)
        assert stop.value.code == LOST
        told = capsys.readouterr().err
        assert (
            told == f"{Path(SCRIPT).name}: lost the other ranks: {' '.join(str(error).split())}\n"
        )


def test_a_server_that_never_answers_is_given_up(monkeypatch, capsys):
    ended = threading.Event()

    def never(backend, timeout):
        assert ended.wait(timeout=9)
        raise KeyError  # the process would have ended

    monkeypatch.setattr(dist, "init_process_group", never)
    monkeypatch.setattr(os, "_exit", lambda status: ended.set() if status == LOST else None)
    with pytest.raises(KeyError):
        pipedream_distributed.run_process(None, CPU, {"timeout": 0.2, "repeats": 1})
    assert "no answer at MASTER_ADDR:MASTER_PORT" in capsys.readouterr().err


def test_the_reason_of_the_first_that_failed_by_itself_is_told():
    assert explain([2, LOST, 2], ["a\n", "b\n", "a\n"], [], 1) == ["a\n"]
    assert explain([0, LOST, LOST], ["", "b\n", "c\n"], [], 1) == ["b\n"]
    assert explain([0, 0], ["x\n", "x\n"], [], 1) == ["x\n"]


# ---------------------------------------------------------------------------------- bad input


@pytest.fixture
def told(monkeypatch, capsys):
    """Run main with these flags in this environment; what it wrote to stderr, and its status."""

    def tell(*flags, **environment):
        for name in (*rank(0, 1), "TORCHELASTIC_RUN_ID"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", [SCRIPT, *flags])
        monkeypatch.setattr(dist, "init_process_group", None)  # it must not come so far
        monkeypatch.setattr(subprocess, "Popen", None)
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
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_microbatches", "5"], "batch_size=32 cannot be split evenly"),
        (["--weight_stashing", "False"], "only for the simulation"),
        (
            ["--recompute", "True", "--schedule", "zb-h1"],
            "recompute=True is not possible",
        ),
        (["--schedule", "dualpipe"], "schedule='dualpipe' must be one of"),
        (["--schedule", "no.csv"], "cannot read no.csv"),
        (["--schedule", "interleaved", "--num_microbatches", "2"], "must be a multiple"),
        (["--timeout", "0"], "timeout=0 must be a number from 1 to 86400"),
        (["--timeout", "inf"], "timeout='inf' must be"),
        (["--timeout", "soon"], "timeout='soon' must be a number"),
        (["--repeats", "0"], "repeats=0 must be a whole number from 1 to 1,000"),
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
    by_hand = {name: value for name, value in rank(0, 4).items() if "ELASTIC" not in name}
    for wrong in ({"RANK": "-1"}, {"RANK": "4"}, {"WORLD_SIZE": "3"}):
        error, status = told(**by_hand | wrong)
        assert (status, error.count("\n")) == (2, 1)
        assert re.search("RANK=(-1|4|0), WORLD_SIZE=[34], but", error)
    for wrong in ({"RANK": "first"}, {"MASTER_PORT": "x"}, {"LOCAL_RANK": ""}):
        error, status = told(**by_hand | wrong)
        assert (status, error.count("\n")) == (2, 1)
        assert "not all numbers" in error
    for missing in by_hand.keys() - {"RANK"}:
        error, status = told(**{k: v for k, v in by_hand.items() if k != missing})
        assert (status, error.count("\n")) == (2, 1)
        assert "MASTER_ADDR is not" in error
    error, status = told("--nonsense", RANK="1", WORLD_SIZE="4")  # left over in the environment
    assert (status, error.count("\n")) == (2, 1)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (5, "CONFIG=5 must be a dict"),
        ({}, "CONFIG has no"),
        ({k: v for k, v in LAB_CONFIG.items() if k != "schedule"}, "CONFIG has no 'schedule'"),
        ({**LAB_CONFIG, "num_stages": 10**5000}, "num_stages=a number of thousands of digits"),
    ],
)
def test_a_config_of_a_wrong_shape_is_one_line(config, message, told, monkeypatch):
    monkeypatch.setattr(pipedream_lab, "LAB_CONFIG", config)
    error, status = told()
    assert status == 2
    assert message in error
    assert error.count("\n") == 1


def test_a_file_in_which_the_last_stage_goes_forward_out_of_order_is_refused(told, tmp_path):
    path = tmp_path / "swapped.csv"
    path.write_text("0F0,0F1,0B1,0B0\n1F1,1F0,1B1,1B0\n")
    error, status = told("--schedule", str(path))
    assert status == 2
    assert "1F1 is before 1F0, but PyTorch's engine" in error
    path.write_text("0F0,0F1,0B1,0B0\n1F0,1F1,1B1,1B0\n")
    config = {**SMALL, "schedule": str(path), "num_stages": 2, "num_microbatches": 2}
    assert pipedream_distributed.checked_plan(config)


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
    assert place("auto", 2, 4) == torch.device("cuda:2")
    assert place("cuda", 3, 4) == torch.device("cuda:3")
    assert place("cpu", 2, 4) == torch.device("cpu")
    assert place("auto", 2, 5) == torch.device("cpu")
    with pytest.raises(UserError, match="5 processes need a GPU each, torch finds 4"):
        place("cuda", 2, 5)
    with pytest.raises(UserError, match="every process needs its own"):
        place("cuda:1", 0, 1)
