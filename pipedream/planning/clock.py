"""What do ops, messages and layers take here? Measured."""

import datetime
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn
from torch.autograd.graph import saved_tensors_hooks

from pipedream.backstage.storages import Storages
from pipedream.schedules.plans import story_config
from pipedream_simple import Op, Worker, build_stages, choose_device, train

from .profiles import Layer

CLOCK = {"F": "forward_time", "B": "backward_time", "U": "update_time"}  # what a run takes


def now(device: torch.device) -> float:
    """The time in seconds, once the device has finished all its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def microbatch_size(config: dict) -> int:
    return config["batch_size"] // config["num_microbatches"]


def measure_stages(config: dict, average: Callable = statistics.median) -> dict[str, list[float]]:
    """Milliseconds of a microbatch's forward and backward, and of an update, on each stage.

    Real training, one microbatch at a time: between two ops of a stage the others work, so it finds
    its caches as cold as in a run. The first batch warms up and does not count.
    """
    device, size = choose_device(config["device"]), microbatch_size(config)
    config = story_config(config) | {"schedule": "naive", "num_batches": 6}
    config |= {"num_microbatches": 4, "batch_size": 4 * size}
    took: dict[tuple[str, int], list[float]] = {}
    last = 0.0

    def watch(op: Op, worker: Worker) -> None:
        nonlocal last
        start, last = last, now(device)
        if op.version > 0:
            took.setdefault((op.kind, op.stage), []).append(1000 * (last - start))

    train(config, watch=watch)
    stages = range(config["num_stages"])
    return {key: [average(took[kind, s]) for s in stages] for kind, key in CLOCK.items()}


# ----------------------------------------------------------------------------------- messages


def measure_message(x: Tensor, work: Callable[[], object] = lambda: None) -> float:
    """Milliseconds that a tensor like x takes from rank 0 to rank 1. All ranks call this.

    Rank 1 waits for it; rank 0 sends it and goes on with some work, as in a run. (On a CPU a
    message may then take longer: what sends it has to share the core.)
    """
    rank, took = dist.get_rank(), []
    for _ in range(23):
        dist.all_reduce(torch.zeros(1))  # wait for all; on the CPU, so that gloo carries it
        start = now(x.device)
        if rank < 2:
            message = dist.isend(x, 1) if rank == 0 else dist.irecv(x, 0)
            if rank == 0:
                work()
            message.wait()  # type: ignore[union-attr]
        took.append(1000 * (now(x.device) - start))
    median = torch.tensor(statistics.median(took[3:]))  # 3 warm up
    dist.broadcast(median, src=1)
    return median.item()


def one_of_two(rank: int, num_bytes: int, folder: str) -> None:
    """A process that time_message starts. Rank 0 writes down what they have measured."""
    meet, patience = Path(folder, "meet").as_uri(), datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", meet, patience, world_size=2, rank=rank)
    milliseconds = measure_message(torch.zeros(num_bytes, dtype=torch.uint8))
    if rank == 0:
        Path(folder, "milliseconds").write_text(str(milliseconds))
    os._exit(0)  # torch 2.6 and 2.7 hang where a gloo group is destroyed


def time_message(num_bytes: int) -> tuple[float, str]:
    """Milliseconds of a message between two processes, started for this; or 0, and why."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            multiprocessing.spawn(one_of_two, (num_bytes, folder), nprocs=2)
            return float(Path(folder, "milliseconds").read_text()), ""
        except Exception as error:  # whatever keeps processes from starting, meeting or sending
            return 0.0, str(error).strip().rpartition("\n")[2][:200]


# ------------------------------------------------------------------------------------- layers


def describe_layers(config: dict) -> list[Layer]:
    """The layers of the network, for a microbatch: names and bytes, without times."""
    device, layers = choose_device(config["device"]), list[Layer]()
    x = torch.zeros(microbatch_size(config), 64, device=device)
    for layer in itertools.chain.from_iterable(stage.children() for stage in build_stages(config)):
        x, kept = run_layer(layer.to(device), x.detach().requires_grad_(bool(layers)))
        parts = layer if isinstance(layer, nn.Sequential) else [layer]
        name = "+".join(type(part).__name__ for part in parts)
        weights = sum(w.nbytes for w in layer.parameters())
        layers.append(Layer(name, 0, 0, x.nbytes, weights, kept=kept))
    return layers


def run_layer(layer: nn.Module, x: Tensor) -> tuple[Tensor, int]:
    """Its output, and the bytes that it keeps for a backward.

    These are the storages that autograd saves, each counted once; the weights are there anyway.
    """
    saved = Storages()

    def note(tensor: Tensor) -> Tensor:
        saved.note([tensor])
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        output = layer(x)
    saved -= {w.untyped_storage() for w in layer.parameters()}
    return output, saved.nbytes
