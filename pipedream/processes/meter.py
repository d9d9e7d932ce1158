"""What does a way to train send and hold? Counted in one of its processes, while it trains."""

import contextlib
import os
import socket
import statistics
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.optim.optimizer import register_optimizer_step_post_hook as after_update
from torch.optim.optimizer import register_optimizer_step_pre_hook as before_update
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipedream.backstage.storages import Storages
from pipedream.processes.ways import HELD, Batch, Job, double_batches, make_network, on_whole
from pipedream_simple import Weights

IN_A_RING: dict[str, Callable[[int], float]] = {  # what a GPU of G sends of a collective's tensor
    "all-reduce": lambda gpus: 2 * (gpus - 1) / gpus,
    **dict.fromkeys(("all-gather", "reduce-scatter"), lambda gpus: (gpus - 1) / gpus),
    "broadcast": lambda gpus: (gpus - 1) / gpus,  # on average: the last one sends nothing
    "send": lambda gpus: 1,
}
IN_GLOO = {**IN_A_RING, "reduce-scatter": IN_A_RING["all-reduce"]}  # on average over the GPUs
SILENT = "recv", "wait", "wrap"  # they send nothing


class Meter(TorchDispatchMode):
    """Sees every operation of PyTorch that runs in this process, whoever asked for it.

    A collective is counted with the bytes of the tensor that it is about (the whole one, where each
    GPU has a part). Memory is counted as storages that exist: weights, gradients, optimizer state,
    and what autograd saves for a backward; but not the buffers in which FSDP2 and DDP send. It
    looks when autograd saves or uses a tensor, at every collective, and around each update.
    """

    def __init__(self, job: Job):
        super().__init__()
        self.job, self.messages, self.handed = job, Counter[str](), Counter[str]()
        self.alive, self.peak = {kind: Storages() for kind in HELD}, dict.fromkeys(HELD, 0)
        self.look()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # it will call operations on its local tensors
        result = func(*args, **(kwargs or {}))
        if "c10d" in func.namespace:
            name = func.__name__.replace("_", "")
            kinds = [kind for kind in IN_A_RING if kind.replace("-", "") in name]
            assert kinds or any(word in name for word in SILENT), name
            lists = [tree_leaves(each) for each in (*args, result)]  # the whole and maybe its parts
            sizes = [sum(t.nbytes for t in each if isinstance(t, Tensor)) for each in lists]
            self.messages.update(kinds)
            self.handed.update(dict.fromkeys(kinds, max(sizes)))
            self.look()
        return result

    def sent(self, parts: dict[str, Callable[[int], float]]) -> float:
        """Bytes: of each collective's tensor the part that a GPU sends."""
        gpus = dist.get_world_size() if dist.is_initialized() else 1
        return sum(parts[kind](gpus) * size for kind, size in self.handed.items())

    def look(self, *_) -> None:
        for kind, things in self.job.held().items():
            self.note(kind, things)

    def note(self, kind: str, things: list) -> None:
        tensors = [thing for thing in tree_leaves(things) if isinstance(thing, Tensor)]
        with torch.no_grad():
            self.alive[kind].note(t.to_local() if isinstance(t, DTensor) else t for t in tensors)
        weights = self.alive["weights"] if kind == "activations" else ()  # a Linear saves its own
        self.peak[kind] = max(self.peak[kind], (self.alive[kind] - Storages(weights)).nbytes)

    def save(self, tensor: Tensor) -> Tensor:
        self.note("weights", self.job.held()["weights"])
        self.note("activations", [tensor])
        return tensor.detach()  # with its graph it would keep itself alive

    def use(self, tensor: Tensor) -> Tensor:
        self.look()
        return tensor

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        hooks = before_update(self.look), after_update(self.look)
        with self, saved_tensors_hooks(self.save, self.use):
            yield
        for hook in hooks:
            hook.remove()


def bytes_on_the_wire() -> int:
    """What the sockets of this process have sent so far: the kernel counts it (Linux only)."""
    total = 0
    for path in Path("/proc/self/fd").iterdir() if sys.platform == "linux" else []:
        with contextlib.suppress(OSError):  # not all files are sockets, nor all sockets TCP
            if os.readlink(path).startswith("socket:"):
                with socket.socket(fileno=os.dup(int(path.name))) as tcp:
                    info = tcp.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                    sent, again = struct.unpack_from("QQ", info, 200)  # tcpi_bytes_sent, _retrans
                    total += sent - again  # on a busy machine TCP sends some of it twice
    return total


class Figures(NamedTuple):
    """What a GPU tells about one way to train. Messages and bytes sent are per step."""

    messages: dict[str, float]  # by collective
    handed: float  # bytes of the tensors that the collectives are about
    by_gloo: float  # bytes that gloo should send for that
    wire: float  # bytes that the sockets of this process sent
    bytes: dict[str, float]  # sent, in a ring; and by the kinds of HELD, at the peak of each
    seconds: float  # the median of some steps without the meter
    off: float = 0  # the largest difference of a weight from what it should be
    same: bool = True  # is that a millionth at most of how far training moved the weights?


def measure(job: Job, batches: list[Batch], repeats: int = 3) -> tuple[Weights, Figures]:
    """Train under the meter: the weights, and the figures of the last step."""
    for call in [batches] if job.stream else [[batch] for batch in batches]:
        meter, before = Meter(job), bytes_on_the_wire()
        with meter.watching():  # of copies: data that is at hand anyway is no activation
            job.train([(x.clone(), y.clone()) for x, y in call])
        wire = bytes_on_the_wire() - before
    final, seconds, steps = job.final(), [0.0] * (repeats == 0), len(call)
    for _ in range(repeats):
        start = time.perf_counter()
        job.train(call)
        seconds.append((time.perf_counter() - start) / steps)
    messages = {kind: number / steps for kind, number in meter.messages.items()}
    sent = {"sent": meter.sent(IN_A_RING) / steps, **meter.peak}
    handed, by_gloo = sum(meter.handed.values()) / steps, meter.sent(IN_GLOO) / steps
    median = statistics.median(seconds)
    return final, Figures(messages, handed, by_gloo, wire / steps, sent, median)


def activations_of_stages(config: dict) -> list[float]:
    """Bytes that autograd saves of each stage in the forward of one microbatch."""
    x, y = (part.chunk(config["num_microbatches"])[0] for part in double_batches(config)[0])
    network, peaks = make_network(config), list[float]()
    for number, stage in enumerate(network):
        meter = Meter(Job(config, stage, on_whole(stage)))
        x = x.detach().clone().requires_grad_(number > 0)
        with meter.watching():
            x = stage(x)
            if number == len(network) - 1:
                cross_entropy(x, y.clone())
        peaks.append(meter.peak["activations"])
    return peaks
