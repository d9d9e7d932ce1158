"""Real processes for the tests: forked from one that has imported torch, which takes seconds."""

import os
import pickle
import signal
import sys
import time
import warnings
import weakref
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from functools import partial
from multiprocessing import get_context

import torch
import torch.distributed as dist
import torch.distributed.run

import pipedream.__main__
import pipedream.processes.engine as engine
from pipedream.commands import neighbours
from pipedream.processes.engine import VersionedStage
from pipedream.processes.launch import become_rank, in_group
from pipedream.processes.meter import measure
from pipedream.schedules.plans import make_plan

FORKS = get_context("forkserver")
FORKS.set_forkserver_preload(
    ["torch.distributed.tensor.parallel", "torch.distributed.fsdp", "torch.distributed.pipelining"]
)


def in_processes(number, work, *arguments):
    """What work(*arguments) returns in each of so many processes of a gloo group."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with ProcessPoolExecutor(number, mp_context=FORKS) as pool:
        job = number, store.port, work, arguments
        futures = [pool.submit(as_rank, rank, *job) for rank in range(number)]
        return [pickle.loads(future.result()) for future in futures]


def as_rank(rank, number, port, work, arguments):
    torch.set_num_threads(1)
    store, patience = dist.TCPStore("127.0.0.1", port), timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=number, timeout=patience)
    try:
        return pickle.dumps(work(*arguments))
    finally:
        dist.destroy_process_group()


def start_here(monkeypatch, capfd, command, *flags):
    """Start a command in this process, where torch is imported; the ranks are other processes."""
    monkeypatch.setattr(sys, "argv", ["pipedream", command, *map(str, flags)])
    monkeypatch.chdir("/")
    try:
        status = pipedream.__main__.main()
    except SystemExit as ended:
        status = ended.code
    return status, *capfd.readouterr()


def torchrun(command, monkeypatch):
    """What the command torchrun runs, in this process; an exception if a rank fails."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    torch.distributed.run.main(["--local-addr=127.0.0.1", *command.split()])
    for number, handler in handlers.items():
        if signal.getsignal(number) != handler:
            signal.signal(number, handler)


# -------------------------------------------------------------------------------- distributed

in_memory = []  # (stage, known versions, versions that exist) after every op


class WatchedStage(VersionedStage):
    """Looks after every op which versions exist, whether or not the stage knows of them."""

    def note(self, kind, chunk, version):
        if not self.done or not hasattr(self, "seen"):
            self.seen = {}
        for number, module in self.versions.items():
            self.seen[number] = weakref.ref(next(module.parameters()))
        alive = [number for number, reference in self.seen.items() if reference() is not None]
        in_memory.append((self.stage_index, sorted(self.versions), sorted(alive)))
        super().note(kind, chunk, version)


class Unstashed(VersionedStage):
    """Forwards read the newest version instead of the one that their batch is pinned to."""

    def select_version(self, chunk):
        super().select_version(chunk)
        self.submod = self.versions[max(self.versions)]


class Hoarder(VersionedStage):
    """Somebody holds on to every version that has ever been."""

    def update(self, chunk):
        super().update(chunk)
        self.hoard = [*getattr(self, "hoard", []), self.submod]


def train_all(configs):
    """Of each config: this rank's report, what it saw in memory, and the seconds that passed."""
    results = []
    for name, config in configs.items():
        in_memory.clear()
        faulty = {"unstashed": Unstashed, "hoarder": Hoarder}
        engine.VersionedStage = faulty.get(name, WatchedStage)
        plan, start = make_plan(config), time.perf_counter()
        report = engine.run_rank(plan, torch.device("cpu"), 2)
        results.append((report, [*in_memory], time.perf_counter() - start))
    return results


class Stopped(VersionedStage):
    """Stands still in the middle of training."""

    def update(self, chunk):
        os.kill(os.getpid(), signal.SIGSTOP)


def stop_and_wait(rank, port, plan, path):
    """Rank 1 is stopped, and rank 0 waits for it. What they write to stderr goes to path."""
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), 2)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(rank), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    engine.VersionedStage = [VersionedStage, Stopped][rank]
    become_rank()
    in_group(lambda: engine.run_rank(plan, torch.device("cpu")), "gloo", timeout=4.5)


# --------------------------------------------------------------------------------- neighbours


def run_neighbours(config, sweeps=None):
    """What a rank of python -m pipedream neighbours does; with sweeps, that of --sweep."""
    warnings.simplefilter("ignore")
    torch.set_default_dtype(torch.float64)
    neighbours.measure = partial(measure, repeats=0)
    if sweeps:
        neighbours.SWEEPS = sweeps
        return neighbours.run_sweep(config)
    return neighbours.run_all(config)
