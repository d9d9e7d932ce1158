"""Does it hold in real processes, on PyTorch's engine?

    python -m pipedream distributed                            starts one process per GPU
    torchrun --nproc-per-node 4 -m pipedream distributed       the same, started by torchrun
    python -m pipedream distributed --schedule zb-h1           any schedule, or a CSV file
    python -m pipedream distributed --num_stages 2 --hidden_size 1024 --batch_size 1024
                                                               enough work for a speed-up

Every process takes a GPU, or where there are too few of them a share of the CPU. It runs its row of
the schedule on torch.distributed.pipelining, PyTorch's engine, which computes, sends and receives.
Then rank 0 does it all again on one device, as pipedream_simple.py does, and compares: the order of
the ops, the weight versions that they read, losses and weights bit by bit, real and simulated time.

Without effect: forward_time, backward_time, weight_gradient_time, comm_time (time is real) and
verbose. Not possible: weight_stashing False, recompute where a backward is split (zb-h1, zb-h2),
and a device that is a single GPU (cuda:N, mps).

A rank is the number of a process. gloo (CPU) and nccl (GPU) carry tensors between ranks. The stage
and the engine are in pipedream/processes/engine.py (read that first), what starts and watches the
processes in launch.py beside it.
"""

import itertools
import math
import os
import statistics
import sys

import torch
from torch.nn.modules.module import register_module_forward_pre_hook

import pipedream_simple as simple
from pipedream.backstage.audit import Audit, VersionCount, plain_training
from pipedream.backstage.text import format_loss
from pipedream.planning.clock import measure_message, measure_stages, microbatch_size, now
from pipedream.processes.engine import Report, check_engine, difference, gather, run_rank
from pipedream.processes.launch import become_rank, in_group, launch, place, say
from pipedream.schedules.halves import train_plan
from pipedream.schedules.plans import Plan, make_plan, run_rows, schedule_name
from pipedream_simple import UserError, build_stages, count, format_per_gpu, format_table

FLAGS = {
    "--timeout S": "seconds until the run ends when a process has died, hangs or is stopped (60)",
    "--repeats N": "timed runs, after one to warm up; the results are those of the last (3)",
}


def main(config: dict, timeout: float = 60, repeats: int = 3) -> None:
    simple.check_value("timeout", timeout, (float, 1, 86_400))
    simple.check_value("repeats", repeats, (int, 1, 1_000))
    plan, is_rank = checked_plan(config), "RANK" in os.environ
    local_rank, here = told_by_torchrun(plan) if is_rank else (0, len(plan.schedule))
    device = place(config["device"], local_rank, here)
    if not is_rank:
        sys.exit(launch(len(plan.schedule), timeout))
    become_rank()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    sys.exit(not run_process(plan, device, timeout, repeats))


def checked_plan(config: dict) -> Plan:
    """The plan, or a UserError for what can be known to fail before any process starts."""
    if not config["weight_stashing"]:
        why = "PyTorch does not let weights change under a graph"
        raise UserError(f"weight_stashing=False is only for the simulation: {why}")
    check_engine()
    plan = make_plan(config)
    with torch.device("meta"):  # without values
        build_stages(plan.config)
    if config["recompute"] and any(op.kind == "I" for row in plan.schedule for op in row):
        why = "PyTorch's checkpoint would run the forward again for I, and once more for W"
        raise UserError(f"recompute=True is not possible with {plan.name}: {why}")
    last = plan.config["num_stages"] - 1
    forwards = (op for row in plan.schedule for op in row if op.kind == "F" and op.stage == last)
    for before, op in itertools.pairwise(forwards):
        if before.microbatch > op.microbatch:  # PyTorch numbers the losses in the order they come
            why = "PyTorch's engine needs the forwards of the last stage in order"
            raise UserError(f"{plan.name}: {before} is before {op}, but {why}")
    return plan


def told_by_torchrun(plan: Plan) -> tuple[int, int]:
    """(local rank, number of processes on this machine). UserError: not what the plan needs."""
    names = "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"
    try:
        rank, world_size, local_rank, here, _ = (int(os.environ[name]) for name in names)
        os.environ["MASTER_ADDR"]
    except (KeyError, ValueError):
        why = f"MASTER_ADDR is not, or {', '.join(names)} are not all numbers"
        raise UserError(f"RANK is set, but {why}: use torchrun, or unset RANK") from None
    needed = len(plan.schedule)
    if world_size != needed or not 0 <= rank < world_size:
        given = f"RANK={rank}, WORLD_SIZE={world_size}, but {plan.name} is for {needed} processes"
        raise UserError(f"{given}: try torchrun --nproc-per-node {needed}")
    return local_rank, here


# ------------------------------------------------------------------------ one process of many


def run_process(plan: Plan, device: torch.device, timeout: float, repeats: int) -> bool:
    """One process of many, from the first handshake to the end; does the proof hold?"""
    messages: list[float] = []

    def work() -> list[Report]:
        say(format_start(plan, device) + "\n")
        messages.append(message_beside_work(plan, device))
        return gather(run_rank(plan, device, num_runs=1 + repeats))

    reports = in_group(work, "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl", timeout)
    return not reports or print_results(reports, plan, device, *messages)  # rank 0 has them


def format_start(plan: Plan, device: torch.device) -> str:
    """What is about to run, and on what."""
    name, keeps = schedule_name(plan.config)
    cores, threads = count(num_cores(), "core"), count(torch.get_num_threads(), "thread")
    where = f"{cores}, {threads} per process; gloo"
    microbatches = count(plan.config["num_microbatches"], "microbatch")
    if device.type == "cuda":
        where = f"a GPU each, {torch.cuda.get_device_name(device)}; nccl"
    return f"""\
🚀 {name} on {count(len(plan.schedule), "process")}, real ones ({where})
Engine: torch.distributed.pipelining of torch {torch.__version__}
Pipeline: {count(plan.config["num_stages"], "stage")}, {microbatches} per batch
Schedule: {plan.name} ({keeps})
"""


def print_results(reports: list[Report], plan: Plan, device: torch.device, message: float) -> bool:
    """Print what came out; does the proof hold?"""
    losses = [loss for report in reports for loss in report.losses]
    print(f"Training results ({count(len(losses), 'batch')}):")
    for batch in sorted({*range(0, len(losses), math.ceil(len(losses) / 20)), len(losses) - 1}):
        print(f"- {format_loss(batch, losses)}")
    holds, proof = prove(reports, plan, device)
    print(f"\n{proof}\n", flush=True)
    print(f"📊 REAL AND SIMULATED TIME\n{format_clock(reports, plan, device, message)}", flush=True)
    return holds


# -------------------------------------------------------------------------------------- proof


def prove(reports: list[Report], plan: Plan, device: torch.device) -> tuple[bool, str]:
    """Do it again on one device, and compare: do they agree? And all that this rests on."""
    config = {**plan.config, "device": str(device)}
    audit, versions = Audit(config), VersionCount()  # the tensors tell, as in VersionedStage

    def watch(op: simple.Op, worker: simple.Worker) -> None:
        audit(op, worker)
        versions(op, worker)

    alone = train_plan(plan._replace(config=config), watch=watch)
    rows = zip((report.done for report in reports), plan.schedule, strict=True)
    pairs = [pair for did, row in rows for pair in itertools.zip_longest(did, row, fillvalue=())]
    in_order = [did[:3] == op[:3] for did, op in pairs]
    read = {op[:3]: op.version for report in reports for op in report.done}
    same_version = [read.get(step) == version for step, version in audit.read.items()]
    of_stage = dict(item for report in reports for item in report.stages.items())
    weights, peaks = zip(*(of_stage[stage] for stage in sorted(of_stage)), strict=True)
    same_peaks = [*peaks] == versions.peak
    at_start = [stage.state_dict() for stage in build_stages(config)]
    off, moved = ([*map(difference, ws, alone.weights)] for ws in (weights, at_start))
    # Rounding may be up to a thousandth of the way that training moved the weights of a stage.
    close = all(d == 0 or d <= 1e-3 * far for d, far in zip(off, moved, strict=True))
    losses = [loss for report in reports for loss in report.losses]
    off_loss = difference(*({"": torch.tensor(each)} for each in (losses, alone.losses)))
    holds = all(in_order) and all(same_version) and same_peaks and close and off_loss < 1e-4
    exact = ", BUT FOR ROUNDING" if any([off_loss, *off]) else ", TO THE BIT"
    verdict = f"{'✅' if holds else '❌ NOT'} THE SAME AS pipedream_simple.py{exact * holds}"
    end = itertools.chain(*(stage.values() for stage in alone.weights))
    if not (all(map(math.isfinite, alone.losses)) and all(w.isfinite().all() for w in end)):
        rate = f"learning_rate={config['learning_rate']:g}"
        return False, f"❌ DIVERGED on one device, too ({rate}): nothing is compared"
    compared = "(the same)" if same_peaks else f"NOT {format_per_gpu(versions.peak)}"
    table = [
        ["operations in the order of the schedule", f"{sum(in_order)} of {len(in_order)}"],
        ["forwards and backwards on its versions", f"{sum(same_version)} of {len(same_version)}"],
        ["most weight versions alive, each stage", f"{format_per_gpu([*peaks])} {compared}"],
        ["largest difference of a loss", f"{off_loss:.1g}"],
        ["largest difference of a weight, each stage", format_per_gpu([f"{d:.1g}" for d in off])],
    ]
    return holds, "\n".join([verdict, *format_table(table, "   ")])


# -------------------------------------------------------------------------------------- clock


def time_plain_training(config: dict) -> float:
    """Seconds of plain training on the same batches, from the first forward on: no pipeline."""
    device, started = torch.device(config["device"]), list[float]()

    def begin(*_) -> None:
        hook.remove()
        started.append(now(device))

    hook = register_module_forward_pre_hook(begin)
    plain_training(config)
    return now(device) - started[0]


def simulated_time(plan: Plan, times: dict[str, list[float]], message: float) -> float:
    """The time of a batch, when the ops of each stage and a message between ranks take so long."""
    config = {**plan.config, **times, "comm_time": message, "weight_gradient_time": 0}  # 0: half
    events, _ = run_rows(plan.schedule, config, plan.pairs)
    return simple.makespan(events) / config["num_batches"]


def message_beside_work(plan: Plan, device: torch.device) -> float:
    """Milliseconds of a message from rank 0 to rank 1, while rank 0 goes on with a forward."""
    if len(plan.schedule) == 1:
        return 0.0
    x = torch.zeros(microbatch_size(plan.config), 64, device=device)
    stage = build_stages(plan.config)[0].to(device)
    return measure_message(stage(x).detach(), lambda: stage(x))


def format_clock(
    reports: list[Report], plan: Plan, device: torch.device, message: float = 0
) -> str:
    """The time of a batch: real and simulated, in a pipeline and without one."""
    num_batches, num_ranks = plan.config["num_batches"], len(reports)
    runs = [max(took) for took in zip(*(report.seconds for report in reports), strict=True)][1:]
    config = {**plan.config, "device": str(device)}
    plain = [time_plain_training(config) for _ in range(len(runs) + 1)][1:]  # the first warms up
    times = measure_stages(config)
    simulated = simulated_time(plan, times, message)
    forward, backward, update = map(sum, times.values())
    one_by_one = config["num_microbatches"] * (forward + backward) + update
    one, real = (1000 * statistics.median(took) / num_batches for took in (plain, runs))
    lowest, highest = (1000 * took / num_batches for took in (min(runs), max(runs)))
    ranks, spread = count(num_ranks, "process"), f"({lowest:.4g} to {highest:.4g})"
    table = [
        ["", "ms per batch", "speed-up"],
        ["plain training, 1 process", f"{one:.4g}", "1.00x"],
        [f"the pipeline, {ranks}", f"{real:.4g} {spread}", f"{one / real:.2f}x"],
        ["simulated, 1 process", f"{one_by_one:.4g}", "1.00x"],
        [f"simulated, {ranks}", f"{simulated:.4g}", f"{one_by_one / simulated:.2f}x"],
    ]
    lines = [
        *format_table(table),
        f"   Real: time of a run / batches, median of {len(runs)} (lowest to highest).",
        "   Simulated: from forward, backward and update of each stage, measured while",
        f"   nothing else ran, and from a message from rank 0 to 1 ({message:.2g} ms), which",
        "   rank 0 sends and works on; without the engine's own work for each op.",
    ]
    cores = num_cores() if device.type == "cpu" else num_ranks
    if cores < num_ranks:
        lines.append(f"   {ranks} share {count(cores, 'core')}: the speed-up is {cores}x at most.")
    small = config["hidden_size"] < 1024 and config["network"] == "residual"
    if real > 2 * max(simulated, one_by_one / cores) and small:
        lines.append("   Ops this small hide a speed-up: try --hidden_size 1024 --batch_size 1024")
    return "\n".join(lines)


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
