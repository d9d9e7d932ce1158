"""Does the simulated clock hold on a slow link? Takes two minutes: python tests/slow_link.py

Two real processes send each other real messages over a link of a known rate: a virtual cable
between two network namespaces, with a token bucket (tbf) at each end. An op runs on a small network
and then sleeps until its set time is over, as a CPU waits for its GPU. So nothing in the prediction
is measured, comm_time is bytes / rate, and other programs matter little. A message takes a quarter,
once and twice the mean of a forward and a backward: the link is faster than both, then slower than
the forwards only, then slower than both.

gloo sends no message before its receiver has asked for it, and PyTorch's engine asks only when it
is about to wait. (A CPU that feeds a GPU runs ahead, so it asks early.) Here the receives of a step
come first in its row; the column "asked late" is without that. "No queue" is simulated with links
that delay messages, but carry any number at a time. Nothing is asserted. Where this cannot run, it
says why and ends. Namespaces and cable vanish with the processes that use them.
"""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent.parent))

from pipedream.commands.distributed import num_cores
from pipedream.planning.clock import measure_message, microbatch_size
from pipedream.processes import engine, launch
from pipedream.schedules.plans import PLAN_CONFIG, Plan, make_plan
from pipedream_simple import format_table, makespan, run_main, simulate

RUNS = 5  # timed, after one to warm up
FORWARD, BACKWARD = 20, 40  # milliseconds; an update is a part of the backward before it
PARTS = 0.25, 1, 2  # time of a message / mean of forward and backward
CONFIG = {**PLAN_CONFIG, "num_stages": 2, "num_batches": 3, "device": "cpu"}
CONFIG |= {"layers_per_stage": 1, "hidden_size": 1024, "batch_size": 512}
CONFIG |= {"forward_time": FORWARD, "backward_time": BACKWARD}
FRAME, PAYLOAD = 1514, 1448  # bytes: what the link carries, and how many of them are message
HEADS = "message", "", "ms per batch", "simulated", "real / simulated", "no queue", "asked late"

ALONE = "unshare", "--net", "--mount"  # with a network and a folder /run of its own
# Packets are small, and so is what may pass at once: a message cannot run ahead of the rate.
BUCKET = "tc qdisc replace dev cable root tbf burst 20kb limit 4mb rate {}mbit"
LINK = f"""
mount -t tmpfs tmpfs /run
ip netns add other
ip link add cable type veth peer name cable netns other
ip address add 10.0.0.1/24 dev cable
ip -n other address add 10.0.0.2/24 dev cable
for there in "" "-n other"; do
    ip $there link set cable gso_max_size 16384 up
    ip $there link set lo up
done
{BUCKET.format(100)}
"""
ENTER = '[ $RANK = 0 ] || set -- ip netns exec other "$@"; exec "$@"'


def main() -> None:
    command = [sys.executable, *sys.argv]
    if rank := os.environ.get("RANK"):
        run_rank(int(rank))
    elif "SLOW_LINK" in os.environ:
        subprocess.run(["sh", "-ec", LINK], check=True)
        sys.exit(launch.launch(2, 60, ["sh", "-c", ENTER, "sh", *command]))
    elif why := obstacle():
        print("This needs root, iproute2, network namespaces and two cores:", *why.split())
    else:
        inside = {"SLOW_LINK": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        os.execvpe(ALONE[0], [*ALONE, *command], {**os.environ, **inside})


def obstacle() -> str:
    """Why this cannot run here, if it cannot."""
    try:
        trial = subprocess.run([*ALONE, "sh", "-ec", LINK], capture_output=True, text=True)
    except OSError as error:  # no unshare
        return str(error)
    return trial.stderr if trial.returncode else "" if num_cores() > 1 else "one core"


# ------------------------------------------------------------------------------ one rank of two


def run_rank(rank: int) -> None:
    launch.become_rank()
    os.environ.update(MASTER_ADDR="10.0.0.1", GLOO_SOCKET_IFNAME="cable")
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    torch.set_num_threads(1)
    stage = engine.VersionedStage
    stage.forward_one_chunk = lasting(FORWARD, stage.forward_one_chunk)
    stage.backward_one_chunk = lasting(BACKWARD, stage.backward_one_chunk)
    rows = launch.in_group(lambda: [row for part in PARTS for row in compare(part)], "gloo", 60)
    if rank == 0:
        ratios = sorted(float(row[4]) for row in rows)
        spread = f"{ratios[0]:.3f} to {ratios[-1]:.3f}"
        print("", *format_table([HEADS, *rows]), sep="\n")
        print(f"Real / simulated: {statistics.median(ratios):.3f} in the median, {spread}")


def lasting(milliseconds: float, op: Callable) -> Callable:
    """The same op of a stage, but it takes so long."""

    def run(*args, **kwargs):
        end = time.perf_counter() + milliseconds / 1000
        result = op(*args, **kwargs)
        time.sleep(max(0, end - time.perf_counter()))
        return result

    return run


def compare(part: float, ask_late: Callable = engine.make_engine) -> list[list[str]]:
    """Rows of the table, for messages that take this part of an op."""
    x = torch.zeros(microbatch_size(CONFIG), CONFIG["hidden_size"])
    kilobits = 8 * x.nbytes * FRAME / PAYLOAD / 1000
    rate = round(kilobits / (part * (FORWARD + BACKWARD) / 2))  # Mbit/s
    subprocess.run(BUCKET.format(rate).split(), check=True)
    message, rows = kilobits / rate, list[list[str]]()
    launch.say(f"A message of {x.nbytes:,} bytes at {rate} Mbit/s takes {message:.1f} ms; ")
    launch.say(f"one that has the link to itself took {measure_message(x):.1f} ms\n")
    for name in ("1f1b", "gpipe", "pipedream"):
        plan = make_plan({**CONFIG, "schedule": name, "comm_time": message})
        no_queue = simulate(plan.schedule, plan.config, links=NoQueue())
        model, other = (makespan(run) / CONFIG["num_batches"] for run in (plan.events, no_queue))
        [late], real = real_times(plan, ask_late, 1), real_times(plan, ask_early, RUNS)
        middle = statistics.median(real)
        spread = f"{middle:.0f} ({min(real):.0f} to {max(real):.0f})"
        numbers = f"{model:.0f}", f"{middle / model:.3f}", f"{other:.0f}", f"{late:.0f}"
        rows.append([f"{message:.1f} ms", name, spread, *numbers])
    return rows


class NoQueue(dict):
    """Links for simulate() that forget each message: the next one finds them free."""

    def setdefault(self, _, link):
        return link


def real_times(plan: Plan, make_engine: Callable, num_runs: int) -> list[float]:
    """Milliseconds per batch, in each run after the first one, which warms up."""
    engine.make_engine, both = make_engine, [None, None]
    report = engine.run_rank(plan, torch.device("cpu"), 1 + num_runs)
    dist.all_gather_object(both, report.seconds)
    return [1000 * max(run) / CONFIG["num_batches"] for run in zip(*both, strict=True)][1:]


def ask_early(plan: Plan, stages: list, make_engine: Callable = engine.make_engine):
    """The engine, with the receives of a step first in its row."""
    made = make_engine(plan, stages)
    made.pipeline_order_with_comms[dist.get_rank()].sort(key=lambda op: "RECV" not in str(op))
    return made


if __name__ == "__main__":
    sys.exit(run_main(main))
