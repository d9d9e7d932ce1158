"""Real processes against plain training, the recurrences of the papers, and the simulation."""

import logging
import math
import os
import re
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from ranks import FORKS, in_processes, start_here, stop_and_wait, torchrun, train_all
from reference import delayed_sgd
from torch.distributed.pipelining import schedules as engines

import pipedream.backstage.audit
import pipedream_simple
from pipedream.backstage.audit import Audit, VersionCount
from pipedream.backstage.measures import peak_versions
from pipedream.backstage.text import format_loss
from pipedream.commands import distributed
from pipedream.commands.distributed import (
    format_clock,
    num_cores,
    place,
    prove,
    time_plain_training,
)
from pipedream.processes import engine, launch
from pipedream.processes.engine import Recomputed, Report, difference
from pipedream.processes.launch import LOST
from pipedream.schedules.halves import train_plan
from pipedream.schedules.plans import PLAN_CONFIG, make_plan
from pipedream_simple import UserError, build_stages

SMALL = {**PLAN_CONFIG, "hidden_size": 12, "device": "cpu", "num_batches": 5}
CPU = torch.device("cpu")
# PyTorch's ZBV for two GPUs and two microbatches: GPU0 has stages 0 and 3, GPU1 has 1 and 2.
ZBV = """\
0F0,0F1,3F0,3I0,3F1,3W0,3I1,3W1,0I0,0W0,0I1,0W1
1F0,2F0,1F1,2F1,2I0,1I0,2W0,2I1,1I1,1W0,2W1,1W1
"""
ONE = {"num_microbatches": 1, "num_batches": 9}
TRANSFORMER = {"network": "transformer", "layers_per_stage": 2, "num_batches": 3}
TWO_CHUNKS = {"chunks_per_gpu": 2, "num_batches": 3}
CASES = {  # processes -> name -> (settings, delay of a stage in updates)
    2: {
        "naive": ({"schedule": "naive"}, lambda s: 0),
        "gpipe": ({"schedule": "gpipe"}, lambda s: 0),
        "zb-h1": ({"schedule": "zb-h1"}, lambda s: 0),
        "zb-h2": ({"schedule": "zb-h2"}, lambda s: 0),
        "zb-v": ({"schedule": "zb-v"}, lambda s: 0),
        "dualpipe-v": ({"schedule": "dualpipe-v", "momentum": 0.5}, lambda s: 0),
        "interleaved-zb": ({"schedule": "interleaved-zb", **TWO_CHUNKS}, lambda s: 0),
        "looped-bfs": ({"schedule": "looped-bfs", **TWO_CHUNKS, "recompute": True}, lambda s: 0),
        "csv": ({"schedule": "zbv.csv", "layers_per_stage": 4}, lambda s: 0),
        "pipedream": ({}, lambda s: 1 - s),
        "vertical sync": ({"num_microbatches": 2, "vertical_sync": True}, lambda s: 1),
        "momentum": ({"momentum": 0.9, "learning_rate": 0.05}, lambda s: 1 - s),
        "recompute": ({"recompute": True, "num_microbatches": 1}, lambda s: 1 - s),
        "transformer": ({**TRANSFORMER, "recompute": True, "momentum": 0.5}, lambda s: 1 - s),
        "transformer, zb-h1": ({**TRANSFORMER, "schedule": "zb-h1"}, lambda s: 0),
        "unstashed": ({"num_microbatches": 2}, None),  # faults: see ranks.py
        "hoarder": ({}, None),
    },
    4: {
        "1f1b": ({"schedule": "1f1b", "num_microbatches": 2}, lambda s: 0),
        "interleaved": ({"schedule": "interleaved", "chunks_per_gpu": 2}, lambda s: 0),
        "pipedream": ({}, lambda s: math.ceil((3 - s) / 4)),
        "two microbatches": ({"num_microbatches": 2}, lambda s: math.ceil((3 - s) / 2)),
        "one microbatch": (ONE, lambda s: 3 - s),
        "vertical sync": ({**ONE, "vertical_sync": True}, lambda s: 3),
    },
}
SOUND = [(n, name) for n in CASES for name, (_, delay) in CASES[n].items() if delay]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """processes, name -> plan, and of each process its report, what it saw in memory, seconds."""
    file, found = tmp_path_factory.mktemp("rows") / "zbv.csv", {}
    file.write_text(ZBV)
    for processes, cases in CASES.items():
        configs = {}
        for name, (settings, _) in cases.items():
            configs[name] = {**SMALL, "num_stages": processes, "layers_per_stage": 6, **settings}
            if name == "csv":
                configs[name] |= {"schedule": str(file), "num_microbatches": 2}
        of_ranks = in_processes(processes, train_all, configs)
        for name, *results in zip(configs, *of_ranks, strict=True):
            found[processes, name] = make_plan(configs[name]), *zip(*results, strict=True)
    return found


def per_stage(reports):
    """The weights at the end, and the most versions in memory, of each stage."""
    stages = {stage: end for report in reports for stage, end in report.stages.items()}
    return [*zip(*(stages[stage] for stage in sorted(stages)), strict=True)]


def losses_of(reports):
    return [loss for report in reports for loss in report.losses]


def ops_of(rows):
    return [op for row in rows for op in row]


@pytest.mark.parametrize("case", SOUND)
def test_real_processes_do_what_the_rows_say_and_train_as_the_papers_write_it(case, results):
    """Plain SGD, or SGD with the delay of the paper: no schedule, no pipeline, in float64."""
    plan, reports, *_ = results[case]
    assert [report.done for report in reports] == plan.schedule
    losses, weights = delayed_sgd(plan.config, CASES[case[0]][case[1]][1])
    assert losses_of(reports) == pytest.approx(losses, abs=1e-5)
    for ours, theirs in zip(per_stage(reports)[0], weights, strict=True):
        for key in ours:
            torch.testing.assert_close(ours[key].double(), theirs[key].detach(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", SOUND)
def test_real_processes_and_one_device_agree_to_the_bit(case, results):
    plan, reports, *_ = results[case]
    audit, versions = Audit(plan.config), VersionCount()
    alone = train_plan(plan, watch=lambda *used: (audit(*used), versions(*used)))
    weights, peaks = per_stage(reports)
    assert losses_of(reports) == alone.losses
    read = {op[:3]: op.version for report in reports for op in report.done}
    assert read | audit.read == read
    assert [*peaks] == versions.peak
    assert [*map(difference, weights, alone.weights)] == [0] * len(weights)
    holds, text = prove(reports, plan, CPU)
    assert holds
    assert "THE SAME AS pipedream_simple.py, TO THE BIT" in text


@pytest.mark.parametrize("case", SOUND)
def test_a_weight_version_leaves_memory_when_its_last_reader_is_done(case, results):
    plan, reports, memory, _ = results[case]
    for rank in memory:
        assert rank
        for stage, known, alive in rank:
            assert alive == known, f"stage {stage} knows {known}, in memory are {alive}"
    if len(plan.schedule) == plan.config["num_stages"]:
        most = [max(len(alive) for _, _, alive in rank) for rank in memory]
        assert most == [*per_stage(reports)[1]] == peak_versions(plan.schedule)


def test_the_proof_fails_where_a_rank_reads_other_versions_or_holds_on_to_old_ones(results):
    """In real processes: the tensors tell, not what should be read or is still known."""
    plan, reports, *_ = results[2, "unstashed"]
    holds, text = prove(reports, plan, CPU)
    assert not holds
    text = re.sub(" +", " ", text)
    assert "schedule 50 of 50" in text
    same, num_read = map(int, re.search(r"on its versions (\d+) of (\d+)", text).groups())
    assert 0 < same < num_read == 40
    pairs = zip(ops_of(report.done for report in reports), ops_of(plan.schedule), strict=True)
    assert {did.kind for did, op in pairs if did != op} == {"F", "B"}

    plan, reports, *_ = results[2, "hoarder"]
    holds, text = prove(reports, plan, CPU)
    assert not holds
    # Two runs of five updates each; the versions 0, and on stage 0 one that is still in use, go.
    assert re.search(r"alive, each stage +\d+ \d+ NOT 2 1\n", text)


def test_the_seconds_of_the_runs_are_no_more_than_passed(results):
    for _, reports, _, elapsed in results.values():
        for report, seconds in zip(reports, elapsed, strict=True):
            assert len(report.seconds) == 2
            assert 0 < min(report.seconds) <= sum(report.seconds) < seconds


def altered(reports, **changes):
    return [reports[0]._replace(**changes), *reports[1:]]


def test_the_proof_fails_where_anything_differs_but_by_rounding(results):
    plan, reports, *_ = results[2, "pipedream"]
    done, losses = reports[0].done, reports[1].losses
    weights, peak = reports[0].stages[0]

    def off_by(distance):
        return altered(reports, stages={0: ({k: w + distance for k, w in weights.items()}, peak)})

    other_version = [done[0]._replace(version=1), *done[1:]]
    for wrong, line in (
        (altered(reports, done=[done[1], done[0], *done[2:]]), "schedule 88 of 90"),
        (altered(reports, done=done[:-1]), "schedule 89 of 90"),
        (altered(reports, done=[*done, done[0]]), "schedule 90 of 91"),
        (altered(reports, done=other_version), "schedule 90 of 90"),
        (altered(reports, done=other_version), "versions 79 of 80"),
        (off_by(1e-2), "weight, each stage 0.01 0"),
        (off_by(math.nan), "weight, each stage nan 0"),
        (altered(reports, stages={0: (weights, 3)}), "alive, each stage 3 1 NOT 2 1"),
        ([reports[0], reports[1]._replace(losses=[2.0] * len(losses))], "a loss "),
    ):
        holds, text = prove(wrong, plan, CPU)
        text = re.sub(" +", " ", text)
        assert line in text
        assert text.startswith("❌ NOT THE SAME")
        assert not holds, line
    holds, text = prove(off_by(1e-6), plan, CPU)
    assert holds
    assert text.startswith("✅ THE SAME AS pipedream_simple.py, BUT FOR ROUNDING")


def test_the_proof_fails_where_nothing_was_trained_however_small_the_steps():
    plan = make_plan({**SMALL, "num_stages": 1, "learning_rate": 1e-6})
    run = train_plan(plan)
    at_start = [dict(stage.state_dict()) for stage in build_stages(plan.config)]
    trained = {name: w.detach() for name, w in run.weights[0].items()}
    report = Report(plan.schedule[0], run.losses, {0: (trained, 1)}, [])
    assert prove([report], plan, CPU)[0]
    untrained = report._replace(stages={0: (at_start[0], 1)})
    assert not prove([untrained], plan, CPU)[0]


def test_where_training_diverges_nothing_is_compared(results):
    plan, reports, *_ = results[2, "pipedream"]
    plan = make_plan({**plan.config, "learning_rate": 1e30})
    holds, text = prove(reports, plan, CPU)
    assert not holds
    assert text == "❌ DIVERGED on one device, too (learning_rate=1e+30): nothing is compared"


def test_a_difference_is_zero_only_for_the_same_numbers_or_where_both_are_none():
    def off(ours, theirs):
        return difference({"w": torch.tensor(ours)}, {"w": torch.tensor(theirs)})

    assert off([1.0, math.inf], [1.0, math.inf]) == 0
    assert off([1.0, 0.0], [1.25, 0.0]) == 0.25
    assert math.isnan(off([1.0, 0.0], [math.nan, 0.0]))
    assert off([math.nan, 1.0], [math.nan, 1.0]) == 0
    assert off([math.nan, 1.0], [math.nan, 2.0]) == 1


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


# -------------------------------------------------------------------------------------- clock


@pytest.mark.parametrize(
    ("schedule", "cores", "simulated", "small", "hints"),
    [
        ("naive", 2, "24 1.00x", 1, ["this small"]),
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
    monkeypatch.setattr(distributed, "measure_stages", lambda config: times)
    monkeypatch.setattr(distributed, "time_plain_training", lambda config: next(alone))
    monkeypatch.setattr(distributed, "num_cores", lambda: cores)
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
    split = pipedream_simple.split_batches

    def slow_split(*arguments):
        time.sleep(0.5)
        return split(*arguments)

    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: steps.append(step(self)))
    monkeypatch.setattr(pipedream.backstage.audit, "split_batches", slow_split)
    start = time.perf_counter()
    seconds = time_plain_training({**SMALL, "num_stages": 2})
    assert 0 < seconds < time.perf_counter() - start - 0.5
    assert len(steps) == SMALL["num_batches"]


# ------------------------------------------------------------------------- the whole program


def test_started_plainly_it_starts_all_processes_and_proves_what_they_did(monkeypatch, capfd):
    flags = "--num_stages", 2, "--num_microbatches", 2
    status, out, err = start_here(monkeypatch, capfd, "distributed", *flags)
    assert (status, err) == (0, "")
    assert "PipeDream on 2 processes, real ones" in out
    assert "THE SAME AS pipedream_simple.py, TO THE BIT" in out
    assert max(map(len, out.splitlines())) <= 80
    config = {**pipedream_simple.CONFIG, "num_stages": 2, "num_microbatches": 2}
    run = pipedream_simple.train(config)
    lines = [f"- {format_loss(batch, run.losses)}" for batch in range(5)]
    assert [line for line in out.splitlines() if line.startswith("- ")] == lines

    lines = out.partition("REAL AND SIMULATED TIME")[2].splitlines()
    cells = [re.split(r" {2,}", line.strip()) for line in lines[2:6]]
    one, real, one_by_one, simulated = (float(time.split()[0]) for _, time, _ in cells)
    speed_ups = [float(cell.rstrip("x")) for *_, cell in cells]
    expected = [1, one / real, 1, one_by_one / simulated]
    assert speed_ups == pytest.approx(expected, abs=0.006)
    assert simulated < real  # it leaves out what the engine does
    assert 1 < speed_ups[3] <= 2
    assert ("the speed-up is" in out) == (num_cores() < 2)


def test_torchrun_starts_it_too(monkeypatch, capfd, tmp_path):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    command = "-m pipedream distributed --num_stages 2 --repeats 1"
    torchrun(f"--nproc-per-node 2 {command}", monkeypatch)
    assert "THE SAME AS pipedream_simple.py, TO THE BIT" in capfd.readouterr().out


# ------------------------------------------------------------------------------------- faults


def wait_until(true, seconds=60):
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert true()


def test_a_rank_that_waits_in_vain_for_one_that_is_stopped_gives_up_in_time(tmp_path):
    """On real gloo, in the middle of training."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    path = tmp_path / "err"
    details = store.port, make_plan({**SMALL, "num_stages": 2}), path
    processes = [FORKS.Process(target=stop_and_wait, args=(rank, *details)) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        processes[0].join(60)
        assert processes[0].exitcode == LOST
        assert "lost the other ranks: " in path.read_text()
        assert path.read_text().count("\n") == 1
    finally:
        for process in processes:
            process.kill()


def rank(number, world_size):
    return {
        "TORCHELASTIC_RUN_ID": "job",
        **dict.fromkeys(("RANK", "LOCAL_RANK"), str(number)),
        **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(world_size)),
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
    }


@pytest.mark.parametrize("end", ["launcher", "Ctrl-C"])
def test_a_rank_ends_with_its_launcher_and_on_ctrl_c_even_while_it_imports(end):
    env = {**os.environ, **rank(0, 4), "PYTHONPATH": str(ROOT), "PIPEDREAM_LAUNCHED": "1"}
    command, pipe = [sys.executable, "-m", "pipedream", "distributed"], subprocess.PIPE
    with subprocess.Popen(command, env=env, stdin=pipe, stderr=pipe) as process:
        if end == "Ctrl-C":
            maps = Path(f"/proc/{process.pid}/maps")
            wait_until(lambda: "libtorch" in maps.read_text())
            process.send_signal(signal.SIGINT)
        else:
            process.stdin.close()
        assert process.wait(timeout=30) == (-signal.SIGINT if end == "Ctrl-C" else 1)
        assert process.stderr.read() == b""


@pytest.fixture
def fake(tmp_path, monkeypatch, capfd):
    """What launch() returns and writes to stderr when the ranks run these pieces of code."""
    path = tmp_path / "fake.py"
    path.write_text("import os, signal, sys, time; exec(sys.argv[1 + int(os.environ['RANK'])])")

    def too_late(*_):
        raise TimeoutError

    def run(*codes, timeout=1.5):
        monkeypatch.setattr(sys, "argv", ["pipedream fake"])
        signal.alarm(20)
        status = launch.launch(len(codes), timeout, [sys.executable, str(path), *codes])
        return status, capfd.readouterr().err.replace("pipedream fake: ", "")

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
    assert time.monotonic() - since < 1.5 + 2.5


def test_a_rank_blames_itself_for_its_own_error_and_others_for_a_lost_connection(
    monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["pipedream fake"])
    monkeypatch.setattr(os, "_exit", sys.exit)

    def fail(error):
        def init_process_group(backend, timeout):
            assert timeout.total_seconds() == 6
            raise error

        monkeypatch.setattr(dist, "init_process_group", init_process_group)
        return launch.in_group(lambda: None, "gloo", 9)

    with pytest.raises(RuntimeError, match="shapes"):
        fail(RuntimeError("shapes cannot be multiplied"))
    for error in ("gloo: Timed\nout", "address already in use, socket"):
        with pytest.raises(SystemExit, match=str(LOST)):
            fail(RuntimeError(error))
        told = capsys.readouterr().err
        assert told == f"pipedream fake: lost the other ranks: {' '.join(error.split())}\n"


# ---------------------------------------------------------------------------------- bad input


@pytest.fixture
def told(run, monkeypatch, capsys):
    """Run the command with these flags in this environment: the line that it writes, or none."""

    def tell(*flags, **environment):
        for name in rank(0, 1):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(dist, "init_process_group", None)  # it must not come so far
        monkeypatch.setattr(subprocess, "Popen", None)
        try:
            status, out, error = run("distributed", *flags, env=environment)
        except SystemExit as stop:
            status, (out, error) = stop.code, capsys.readouterr()
        assert (status, out) == (2, "")
        assert error.count("\n") == bool(error)
        return error.removeprefix("pipedream distributed: ")

    yield tell
    logging.disable(logging.NOTSET)


MANY = "--num_microbatches 8 --layers_per_stage 6"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--num_microbatches 5", "batch_size=32 cannot be split evenly"),
        ("--weight_stashing False", "weight_stashing=False is only for the simulation"),
        *(
            (
                f"--recompute True --schedule {name} {MANY}",
                "recompute=True is not possible with " + name,
            )
            for name in ("zb-h1", "zb-v", "dualpipe-v", "interleaved-zb")
        ),
        ("--schedule dualpipe", "schedule='dualpipe' must be one of"),
        ("--network transformer --hidden_size 30", "hidden_size=30 must be a multiple of"),
        ("--timeout 0", "timeout=0 must be a number from 1 to"),
        ("--timeout soon", "timeout='soon' must be a number"),
        ("--repeats 0", "repeats=0 must be a whole number from 1 to"),
        ("--device cuda", "device='cuda'"),
        ("--num_stages 17", "17 processes are more than the 16 that this starts by itself"),
    ],
)
def test_bad_input_is_one_line_before_anything_starts(flags, message, told):
    assert told(*flags.split()).startswith(message)
    if "17" not in flags:  # which torchrun itself would start
        assert told(*flags.split(), **rank(0, 4)).startswith(message)
        assert told(*flags.split(), **rank(1, 4)) == ""  # rank 0 says it for all


def test_ranks_that_do_not_fit_are_one_line_from_rank_0(told):
    for world_size in (1, 3, 5):
        error = told(**rank(0, world_size))
        assert f"WORLD_SIZE={world_size}" in error
        assert "torchrun --nproc-per-node 4" in error
    assert told(**rank(2, 3)) == ""
    by_hand = {name: value for name, value in rank(0, 4).items() if "ELASTIC" not in name}
    assert "not all numbers" in told(**by_hand | {"RANK": "first"})
    del by_hand["MASTER_ADDR"]
    assert "MASTER_ADDR is not" in told(**by_hand)


def test_a_file_in_which_the_last_stage_goes_forward_out_of_order_is_refused(told, tmp_path):
    path = tmp_path / "swapped.csv"
    path.write_text("0F0,0F1,0B1,0B0\n1F1,1F0,1B1,1B0\n")
    assert "1F1 is before 1F0, but PyTorch's engine" in told("--schedule", path)
    path.write_text("0F0,0F1,0B1,0B0\n1F0,1F1,1B1,1B0\n")
    config = {**SMALL, "schedule": str(path), "num_stages": 2, "num_microbatches": 2}
    assert distributed.checked_plan(config)


def test_a_torch_without_the_engine_is_told(told, monkeypatch):
    what = f"torch {torch.__version__} does not run a schedule given as data"
    with monkeypatch.context() as patch:
        patch.delattr(engines._PipelineScheduleRuntime, "_prepare_schedule_with_comms")
        assert what in told()
    monkeypatch.setattr(engine, "PipelineStage", lambda submodule: None)  # an older one
    assert what in told()


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
