"""How are processes started, watched and ended? As torchrun does it, for one machine, with a clock.

Start the ranks, watch them, end all of them when one fails or hangs, and say in one line which rank
it was and why. A rank that waits in vain for another one gives up after two thirds of --timeout;
one that has not given up when it is over is to blame. A rank that is stopped (SIGSTOP) while no
other waits for it has --timeout, too.
"""

import contextlib
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import IO, TypeVar

import torch
import torch.distributed as dist

import pipedream
from pipedream_simple import UserError, count

T = TypeVar("T")

LOST = 3  # exit status of a rank that waited in vain for another one
LOST_WORDS = re.compile("gloo|NCCL|timed? ?out|connection|socket|port must", re.IGNORECASE)
MAX_PROCESSES = 16  # that are started here
POLL = 0.05  # seconds


def launch(num_ranks: int, timeout: float, command: list[str] | None = None) -> int:
    """Start this command once more (or another one) in so many processes; their exit status."""
    command = command or [sys.executable, "-m", *sys.argv[0].split(), *sys.argv[1:]]
    if num_ranks > MAX_PROCESSES:
        what = f"{num_ranks} processes are more than the {MAX_PROCESSES} that this starts by itself"
        raise UserError(f"{what}: try torchrun --nproc-per-node {num_ranks}")
    print(f"Starting {count(num_ranks, 'process')}, which takes some seconds ...", flush=True)
    ranks, files = list[subprocess.Popen](), list[IO[str]]()
    try:
        # The store is where the ranks meet. It finds a free port, and needs no host name.
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for rank in range(num_ranks):
            files.append(tempfile.TemporaryFile("w+", errors="replace"))  # noqa: SIM115
            environment = environment_of(rank, num_ranks, store.port)
            pipe = subprocess.PIPE  # it closes when this process ends, however it ends
            ranks.append(subprocess.Popen(command, env=environment, stdin=pipe, stderr=files[-1]))
        silent = wait_for(ranks, timeout)
        statuses = [process.returncode for process in ranks]
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot start {count(num_ranks, 'process')}: {error}") from None
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    for file in files:
        file.seek(0)
    said = [file.read() for file in files]
    lines = failure_lines(statuses, said)
    if silent:
        names = " and ".join(f"rank {rank}" for rank in silent)
        why = f"did not answer within --timeout {timeout:g} s: stopped, stuck or slow"
        lines = [f"{sys.argv[0]}: {names} {why}\n"]  # pipedream, and the command
    print(*lines, sep="", end="", file=sys.stderr)
    return int(any(status != 0 for status in statuses))


def environment_of(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    """What torchrun would tell a rank, and where the package is."""
    package = str(Path(pipedream.__file__).parents[1])  # python -m finds it from any folder
    inherited = dict(os.environ)
    inherited.pop("TORCH_DISTRIBUTED_DEBUG", None)  # DETAIL ends tensor parallel ranks by SIGSEGV
    return {
        **{"OMP_NUM_THREADS": "1", **inherited, "PIPEDREAM_LAUNCHED": "1"},
        "PYTHONPATH": os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is not rank 0's
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(num_ranks)),
        **dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)),
    }


def wait_for(ranks: list[subprocess.Popen], timeout: float) -> list[int]:
    """Wait until all ranks have ended, or one has failed; return those that do not answer."""
    waited = 0.0  # polls, not the clock: Ctrl-Z stops this process, too
    while running := [rank for rank, process in enumerate(ranks) if process.poll() is None]:
        failed = {process.returncode for process in ranks} - {None, 0}
        stopped = [rank for rank in running if is_stopped(ranks[rank])]
        if failed - {LOST}:  # it failed by itself, and says why
            return []
        waited = waited + POLL if failed or stopped else 0
        if waited > (timeout / 3 if failed else timeout):
            return stopped or running
        time.sleep(POLL)
    return []


def is_stopped(process: subprocess.Popen) -> bool:
    """As by SIGSTOP. Where Python has no waitid (Windows), nothing counts as stopped."""
    if not hasattr(os, "waitid"):
        return False
    look = os.WSTOPPED | os.WEXITED | os.WNOHANG | os.WNOWAIT
    state = os.waitid(os.P_PID, process.pid, look)
    return state is not None and state.si_code == os.CLD_STOPPED


def failure_lines(statuses: list[int], said: list[str]) -> list[str]:
    """Why the run ended: what to write to stderr, given what the ranks wrote there."""
    own = [rank for rank, status in enumerate(statuses) if status not in (None, 0, LOST)]
    lost = [rank for rank, status in enumerate(statuses) if status == LOST][:1]
    # Ranks that failed by themselves come first: the others only lost those.
    lines = [said[rank] for rank in own or lost or range(len(said))]
    for rank in own:
        if statuses[rank] < 0:
            name = signal.Signals(-statuses[rank]).name
            lines.append(f"{sys.argv[0]}: rank {rank} was ended by {name}\n")
    return [*dict.fromkeys(lines)]  # each only once


# ---------------------------------------------------------------------------------- in a rank


def become_rank() -> None:
    """End at once and without a word on Ctrl-C: the launcher says it."""
    logging.disable()  # when a rank fails, PyTorch would print the whole schedule
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def place(name: str, local_rank: int, processes_here: int) -> torch.device:
    """The device of a rank: a GPU of its own, if every process on this machine can have one."""
    num_gpus = torch.cuda.device_count()
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"device={name!r} is one GPU, and every process needs its own: try cuda")
    if name != "cpu" and num_gpus >= processes_here:
        return torch.device("cuda", local_rank)
    if name == "cuda":
        needed = f"{processes_here} processes need a GPU each, torch finds {num_gpus}"
        raise UserError(f"device='cuda': {needed}: try cpu")
    return torch.device("cpu")


def say(text: str) -> None:
    """Rank 0 prints it."""
    if dist.get_rank() == 0:
        with contextlib.suppress(BrokenPipeError):  # | head: go on, the other ranks wait
            print(end=text, flush=True)


def in_group(work: Callable[[], T], backend: str, timeout: float) -> T:
    """What work() returns, done by a rank among the others: from the first handshake to the end."""
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout * 2 / 3))
        result = work()
        dist.destroy_process_group()  # the other ranks have nothing more to do, and leave
    except (RuntimeError, ValueError) as error:
        if LOST_WORDS.search(str(error)):
            print(f"{sys.argv[0]}: lost the other ranks:", *str(error).split(), file=sys.stderr)
            sys.stderr.flush()
            os._exit(LOST)  # whatever its threads wait for
        raise
    return result
