#!/usr/bin/env python3
"""And instead of a pipeline? Data parallelism, ZeRO and tensor parallelism, measured beside it.

    python pipedream_neighbours.py                      starts one process per GPU, four of them
    python pipedream_neighbours.py --optimizer momentum sgd, momentum or adam
    python pipedream_neighbours.py --sweep              who sends least? at which sizes? one picture

The same network, batches and optimizer, trained by one process and then by all of them in seven
ways, on PyTorch's own engines:

    data parallel    DDP: every GPU has all weights and a part of the batch
    ZeRO stage 1     ZeroRedundancyOptimizer on top: each GPU keeps a part of the optimizer's state
    ZeRO stage 2     FSDP2 without resharding after the forward: also a part of the gradients
    ZeRO stage 3     FSDP2 with it: also a part of the weights
    tensor parallel  Megatron's pairs of a column-wise and a row-wise split matrix, on DTensor
    pipeline 1F1B    torch.distributed.pipelining: each GPU has some layers
    PipeDream        the same without a flush, with stashed weights (pipedream_distributed.py)

Each must end on the weights of one process, PipeDream on those of its recurrence. All numbers are
float64, so that only rounding is left; in float32 half as many bytes would be sent and held.
The "GPUs" are processes on the CPU, and gloo carries their messages: bytes do not depend on that.

Read the first room, ways to train; the others measure, compare and print.
"""

import contextlib
import copy
import logging
import math
import os
import re
import signal
import socket
import statistics
import struct
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple
from weakref import WeakSet

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during a slow import: no traceback
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # what fails is told in one line
    if "PIPEDREAM_LAUNCHED" in os.environ:  # launch() holds stdin: end with it, at any time
        threading.Thread(target=lambda: os._exit(1 + len(os.read(0, 1))), daemon=True).start()

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pipedream_distributed as distributed
from pipedream_lab import LAB_CONFIG, check_lab_config, make_plan
from pipedream_simple import (
    NUM_HEADS,
    RULES,
    UserError,
    build_stages,
    check_value,
    format_per_gpu,
    format_table,
    make_batches,
    parse_config,
    run_main,
    shown,
)

CONFIG = {
    "gpus": 4,  # processes: 2 or 4 for the transformer, which has 4 heads
    "optimizer": "adam",  # sgd, momentum or adam: nothing, one or two numbers of state per weight
    "network": "transformer",  # or residual, which has no pairs for tensor parallelism
    "layers_per_stage": 1,  # times gpus: the layers of the network
    "hidden_size": 64,  # weights grow with its square, activations with it
    "batch_size": 16,  # activations grow with it, weights do not
    "num_microbatches": 4,  # of the pipelines: at least as many as gpus
    "num_batches": 3,  # updates until the weights are compared
    "learning_rate": 0.003,
    "timeout": 60,  # seconds until the run ends when a process has died, hangs or is stopped
}
OPTIMIZERS: dict[str, tuple] = {  # -> (class, settings, numbers of state per weight)
    "sgd": (torch.optim.SGD, {}, 0),
    "momentum": (torch.optim.SGD, {"momentum": 0.9}, 1),
    "adam": (torch.optim.Adam, {}, 2),
}
Batch = tuple[Tensor, Tensor]
Weights = dict[str, Tensor]

# ------------------------------------------------------------------------------ ways to train


class Job(NamedTuple):
    """One way to train, on one GPU of many."""

    train: Callable[[list[Batch]], None]  # on whole batches, of which it may take its part
    weights: Callable[[], Iterable[Tensor]]  # that this GPU holds now
    gradients: Callable[[], Iterable[Tensor]]
    state: Callable[[], dict]  # of the optimizer: whatever it holds
    final: Callable[[], Weights]  # at the end, under the names that one process has


def make_network(config: dict) -> nn.Sequential:
    return nn.Sequential(*build_stages({**config, "num_stages": config["gpus"], "seed": 0}))


def make_optimizer(config: dict, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    kind, settings, _ = OPTIMIZERS[config["optimizer"]]
    return kind(parameters, lr=config["learning_rate"], **settings)


def my_part(tensor: Tensor) -> Tensor:
    """Of a batch, in data parallelism."""
    return tensor.chunk(dist.get_world_size())[dist.get_rank()]


def ordinary(module: nn.Module, optimizer, part=my_part, names: str = "") -> Job:
    """The loop that everybody writes. What is parallel is inside the module and the optimizer."""

    def train(batches: list[Batch]) -> None:
        for x, y in batches:
            cross_entropy(module(part(x)), part(y)).backward()
            optimizer.step()
            optimizer.zero_grad()

    def final() -> Weights:
        named = (
            (name.removeprefix("module."), w.detach()) for name, w in module.named_parameters()
        )
        return {name: w.full_tensor() if isinstance(w, DTensor) else w for name, w in named}

    return Job(
        train,
        module.parameters,
        lambda: [w.grad for w in module.parameters() if w.grad is not None],
        lambda: getattr(optimizer, "optim", optimizer).state,  # optim: of ZeroRedundancyOptimizer
        final,
    )


def one_process(config: dict) -> Job:
    network = make_network(config)
    return ordinary(network, make_optimizer(config, network.parameters()), part=lambda whole: whole)


def data_parallel(config: dict) -> Job:
    """DDP adds up gradients with all-reduces, in buckets, while the backward is still running."""
    ddp = DistributedDataParallel(make_network(config), gradient_as_bucket_view=True)
    return ordinary(ddp, make_optimizer(config, ddp.parameters()))


def zero_1(config: dict) -> Job:
    """Each GPU updates its part of the weights, and broadcasts them: the state is split."""
    ddp = DistributedDataParallel(make_network(config), gradient_as_bucket_view=True)
    kind, settings, _ = OPTIMIZERS[config["optimizer"]]
    settings = {"lr": config["learning_rate"], "parameters_as_bucket_view": True, **settings}
    return ordinary(ddp, ZeroRedundancyOptimizer(ddp.parameters(), kind, **settings))


def fsdp(config: dict, reshard_after_forward: bool) -> Job:
    """FSDP2 gathers a layer's weights when they are needed, and reduce-scatters its gradients."""
    network, settings = make_network(config), {"reshard_after_forward": reshard_after_forward}
    for layer in (layer for stage in network for layer in stage.children()):
        for module in layer.children():  # a transformer layer next to the embedding or the head
            if isinstance(module, nn.TransformerEncoderLayer):
                fully_shard(module, mesh=mesh(), **settings)
        fully_shard(layer, mesh=mesh(), **settings)
    fully_shard(network, mesh=mesh(), **settings)
    return ordinary(network, make_optimizer(config, network.parameters()))


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


class Block(nn.Module):
    """The same arithmetic as the nn.TransformerEncoderLayer that it is made of.

    There q, k and v come from one matrix, rows of all heads of q first. To cut it between heads, as
    Megatron-LM does, the rows of a head have to be neighbors: the same rows in another order.
    """

    def __init__(self, layer: nn.TransformerEncoderLayer):
        super().__init__()
        self.norm1, self.norm2 = layer.norm1, layer.norm2
        self.linear1, self.linear2 = layer.linear1, layer.linear2
        self.out, size = layer.self_attn.out_proj, layer.linear1.in_features
        self.qkv, self.head_size = nn.Linear(size, 3 * size), size // NUM_HEADS
        rows = torch.arange(3 * size).view(3, NUM_HEADS, -1).transpose(0, 1).flatten()
        self.qkv.weight.data = layer.self_attn.in_proj_weight.data[rows]
        self.qkv.bias.data = layer.self_attn.in_proj_bias.data[rows]

    def forward(self, x: Tensor) -> Tensor:  # (images, tokens, size) in and out
        heads = self.qkv(self.norm1(x)).unflatten(-1, (-1, 3, self.head_size))  # of this GPU
        q, k, v = heads.permute(3, 0, 2, 1, 4)  # each (images, heads, tokens, head_size)
        x = x + self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.linear2(self.linear1(self.norm2(x)).relu())


def with_blocks(network: nn.Module) -> nn.Module:
    """The network, with a Block in the place of every transformer layer."""
    for module in [*network.modules()]:
        for name, child in module.named_children():
            if isinstance(child, nn.TransformerEncoderLayer):
                setattr(module, name, Block(child))
    return network


def tensor_parallel(config: dict) -> Job:
    """Column-wise split, then row-wise: the two products need one all-reduce each way.

    Embedding, norms and head are not split; every GPU does the same there. (Megatron-LM splits the
    embedding and the head, too.)
    """
    network = with_blocks(make_network(config))
    column, row = ColwiseParallel(), RowwiseParallel()
    pairs = {"qkv": column, "out": row, "linear1": column, "linear2": row}
    for module in network.modules():
        if isinstance(module, Block):
            parallelize_module(module, mesh(), pairs)
    return ordinary(network, make_optimizer(config, network.parameters()), part=lambda whole: whole)


def pipeline_1f1b(config: dict) -> Job:
    """What examples/my_model.py does."""
    rank, module = dist.get_rank(), make_network(config)[dist.get_rank()]
    stage = PipelineStage(module, rank, config["gpus"], torch.device("cpu"))
    engine = Schedule1F1B(stage, config["num_microbatches"], loss_fn=cross_entropy)
    optimizer = make_optimizer(config, module.parameters())

    def train(batches: list[Batch]) -> None:
        for x, y in batches:
            engine.step(*[x] * (rank == 0), target=y, return_outputs=False)
            optimizer.step()
            optimizer.zero_grad()

    def final() -> Weights:
        return {f"{rank}.{name}": w.detach() for name, w in module.named_parameters()}

    return ordinary(module, optimizer)._replace(train=train, final=final)


class OptimizedStage(distributed.VersionedStage):
    """A stage with versions, and any optimizer: its state goes from version to version."""

    def restart(self) -> None:
        super().restart()
        self.state: dict = {}

    def next_version(self) -> nn.Module:
        module = copy.deepcopy(self.versions[max(self.versions)])
        optimizer = make_optimizer(self.plan.config, module.parameters())
        if self.state:
            optimizer.load_state_dict(self.state)
        for name, w in module.named_parameters():
            w.grad = self.gradient[name]
        optimizer.step()
        optimizer.zero_grad()
        self.gradient.clear()
        self.state = optimizer.state_dict()
        return module


def pipedream(config: dict) -> Job:
    """Not batch by batch: one stream through the whole run."""
    settings = {key: config[key] for key in config if key in LAB_CONFIG}
    plan = make_plan({**LAB_CONFIG, **settings, "num_stages": config["gpus"], "device": "cpu"})
    plan = plan._replace(config={**plan.config, "optimizer": config["optimizer"]})
    rank, stages = dist.get_rank(), list[distributed.VersionedStage]()
    stage = OptimizedStage(rank, plan, torch.device("cpu"), stages, [])
    stages.append(stage)
    stage.restart()
    engine = distributed.make_engine(plan, stages)

    def train(batches: list[Batch]) -> None:
        stage.restart()
        x, y = (torch.cat(part) for part in zip(*batches, strict=True))
        engine.step(*[x] * (rank == 0), target=y, return_outputs=False, losses=[])

    def weights() -> list[Tensor]:
        return [w for module in stage.versions.values() for w in module.parameters()]

    def gradients() -> list[Tensor]:
        return [*stage.gradient.values(), *(w.grad for w in weights() if w.grad is not None)]

    def final() -> Weights:
        newest = stage.versions[max(stage.versions)]
        return {f"{rank}.{name}": w.detach() for name, w in newest.named_parameters()}

    return Job(train, weights, gradients, lambda: stage.state, final)


JOBS: dict[str, Callable[[dict], Job]] = {
    "one process": one_process,
    "data parallel": data_parallel,
    "ZeRO stage 1": zero_1,
    "ZeRO stage 2": lambda config: fsdp(config, reshard_after_forward=False),
    "ZeRO stage 3": lambda config: fsdp(config, reshard_after_forward=True),
    "tensor parallel": tensor_parallel,
    "pipeline 1F1B": pipeline_1f1b,
    "PipeDream": pipedream,
}


def recurrence(config: dict, batches: list[Batch]) -> nn.Module:
    """PipeDream as the paper writes it, without a schedule, in one process.

    The gradient of batch b is that at the weights that stage s had ceil((S-1-s)/M) updates ago.
    """
    last, num_microbatches = config["gpus"] - 1, config["num_microbatches"]
    network = make_network(config)
    optimizer, past = make_optimizer(config, network.parameters()), [copy.deepcopy(network)]
    for b, (x, y) in enumerate(batches):
        read = [max(0, b + (s - last) // num_microbatches) for s in range(config["gpus"])]
        old = nn.Sequential(*(copy.deepcopy(past[v][s]) for s, v in enumerate(read)))
        cross_entropy(old(x), y).backward()
        for w, stale in zip(network.parameters(), old.parameters(), strict=True):
            w.grad = stale.grad
        optimizer.step()
        past.append(copy.deepcopy(network))
    return network


# ------------------------------------------------------------------------------------- meters

KINDS = ["weights", "gradients", "optimizer", "activations"]
COLLECTIVES = {  # what PyTorch calls it -> the share of its tensor that a ring of G GPUs sends
    "all-reduce": lambda num_gpus: 2 * (num_gpus - 1) / num_gpus,
    "all-gather": lambda num_gpus: (num_gpus - 1) / num_gpus,
    "reduce-scatter": lambda num_gpus: (num_gpus - 1) / num_gpus,
    "broadcast": lambda num_gpus: (num_gpus - 1) / num_gpus,  # on average: the last one is silent
    "send": lambda num_gpus: 1,
}
SILENT = ("recv", "wait", "barrier", "wrap")  # they send nothing that belongs to a step


class Meter(TorchDispatchMode):
    """Sees every operation of PyTorch that runs in this process, whoever asked for it.

    A collective is counted with the bytes of the tensor that it is about (the whole one, where each
    GPU has a part). Memory is counted as storages that exist: those of weights, gradients and
    optimizer state, and of what autograd saves for a backward; what FSDP2 gathers is weights, and
    what it reduces is gradients. It looks when autograd saves or uses a tensor, at every
    collective, and around each update.
    """

    def __init__(self, job: Job):
        super().__init__()
        self.job = job
        self.alive: dict[str, WeakSet] = {kind: WeakSet() for kind in KINDS}
        self.peak: Counter = Counter()
        self.messages: Counter = Counter()
        self.handed: Counter = Counter()
        self.look_at_all()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # it will call operations on its local tensors
        result = func(*args, **(kwargs or {}))
        if "c10d" in func.namespace:
            name = func.__name__.replace("_", "")
            kind = next((kind for kind in COLLECTIVES if kind.replace("-", "") in name), "")
            assert kind or any(word in name for word in SILENT), name
            tensors = [t for t in tree_leaves((args, result)) if isinstance(t, Tensor)]
            if kind:
                largest = max(tensors, key=lambda t: t.nbytes)
                self.messages[kind] += 1
                self.handed[kind] += largest.nbytes
                owner = {"all-gather": "weights", "reduce-scatter": "gradients"}.get(kind)
                if owner:
                    self.alive[owner].add(largest.untyped_storage())
                self.look()
        return result

    def look(self) -> None:
        self.note("weights", self.job.weights())
        self.note("gradients", self.job.gradients())

    def look_at_all(self, *_) -> None:
        self.look()
        self.note("optimizer", tree_leaves([*self.job.state().values()]))

    def note(self, kind: str, tensors: Iterable) -> None:
        alive = self.alive[kind]
        alive.update(storage_of(tensor) for tensor in tensors if isinstance(tensor, Tensor))
        held = alive - self.alive["weights"] if kind == "activations" else alive
        self.peak[kind] = max(self.peak[kind], sum(storage.nbytes() for storage in held))

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        def save(tensor: Tensor) -> Tensor:
            self.note("weights", self.job.weights())  # a Linear saves its weights, too
            self.note("activations", [tensor])
            return tensor.detach()  # with its graph it would keep itself alive

        def use(tensor: Tensor) -> Tensor:
            self.look()
            return tensor

        hooks = [register_optimizer_step_pre_hook(self.look_at_all)]
        hooks += [register_optimizer_step_post_hook(self.look_at_all)]
        with self, saved_tensors_hooks(save, use):
            yield
        for hook in hooks:
            hook.remove()


def storage_of(tensor: Tensor) -> torch.UntypedStorage:
    if isinstance(tensor, DTensor):
        with torch.no_grad():
            tensor = tensor.to_local()
    return tensor.untyped_storage()


def bytes_on_the_wire() -> int:
    """What the sockets of this process have sent so far: the kernel counts it (Linux only)."""
    total = 0
    for path in Path("/proc/self/fd").iterdir() if sys.platform == "linux" else []:
        with contextlib.suppress(OSError):  # not all files are sockets, nor all sockets TCP
            if os.readlink(path).startswith("socket:"):
                with socket.socket(fileno=os.dup(int(path.name))) as tcp:
                    info = tcp.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                    total += struct.unpack_from("Q", info, 200)[0]  # tcpi_bytes_sent
    return total


# ------------------------------------------------------------------------ one process of many


class Figures(NamedTuple):
    """What a GPU tells about one way to train."""

    messages: dict[str, float]  # per step, by collective
    handed: dict[str, float]  # bytes of the tensors that they are about, per step
    wire: float  # bytes that the sockets of its process sent, per step
    peak: dict[str, int]  # bytes, by kind
    seconds: float  # of a step; the median
    off: float = 0  # the largest difference of a weight from what it should be
    same: bool = True  # is that a millionth at most of how far training moved the weights?


def measure(job: Job, batches: list[Batch], stream: bool = False, repeats: int = 3) -> Figures:
    """Train under the meter. What is counted per step is that of the last one."""
    meter = Meter(job)
    calls = [batches] if stream else [[batch] for batch in batches]
    for call in calls:
        meter.messages.clear()
        meter.handed.clear()
        before = bytes_on_the_wire()
        with meter.watching():
            job.train(call)
        sent = bytes_on_the_wire() - before
    messages, handed = (
        {kind: number / len(call) for kind, number in counted.items()}
        for counted in (meter.messages, meter.handed)
    )
    return Figures(messages, handed, sent / len(call), dict(meter.peak), 0)


def seconds_of_step(job: Job, call: list[Batch], repeats: int = 3) -> float:
    """The median of some steps without the meter, whose results are thrown away."""
    took = []
    for _ in range(repeats):
        start = time.perf_counter()
        job.train(call)
        took.append((time.perf_counter() - start) / len(call))
    return statistics.median(took)


def run_all(config: dict) -> list[dict[str, Figures]]:
    """Train in all ways, one after the other. On rank 0: of each rank, what it measured."""
    batches = make_batches64(config)
    network, figures, results = make_network(config), dict[str, Figures](), [None, None]
    start = {name: w.detach().clone() for name, w in network.named_parameters()}
    first = dist.get_rank() == 0
    for name in names_of(config):
        if first:
            print(end=f"{name} ... ", flush=True)
        if name == "one process":  # it has the machine to itself: the other ranks wait
            if first:
                job = one_process(config)
                figures[name] = measure(job, batches)
                delayed = dict(recurrence(config, batches).named_parameters())
                results = [{key: w.clone() for key, w in job.final().items()}, delayed]
                figures[name] = figures[name]._replace(seconds=seconds_of_step(job, batches[-1:]))
            dist.broadcast_object_list(results)
            plain, delayed = results
            moved = max((plain[key] - start[key]).abs().max().item() for key in plain)
            network.load_state_dict(plain)
            in_pairs = dict(with_blocks(network).named_parameters())
            continue
        job, stream = JOBS[name](config), name == "PipeDream"
        measured = measure(job, batches, stream)
        true = {"tensor parallel": in_pairs, "PipeDream": delayed}.get(name, plain)
        off = max((w - true[key]).abs().max().item() for key, w in job.final().items())
        seconds = seconds_of_step(job, batches if stream else batches[-1:])
        figures[name] = measured._replace(seconds=seconds, off=off, same=off <= 1e-6 * moved)
    if first:
        print("done\n", flush=True)
    return distributed.gather(figures)


def make_batches64(config: dict) -> list[Batch]:
    return [(x.double(), y) for x, y in make_batches({**config, "seed": 0})]


def names_of(config: dict) -> list[str]:
    """The ways to train this network."""
    return [name for name in JOBS if name != "tensor parallel" or config["network"] != "residual"]


# ------------------------------------------------------------------------------------- papers


def papers(config: dict, activations: float = 0) -> dict[str, dict[str, list[float]]]:
    """name -> kind -> bytes on each GPU, as the papers count them for equal layers; sent: per step.

    activations: those of one process on a whole batch, measured. Of each stage of a pipeline its
    own weights are counted.
    """
    num_gpus, num_microbatches = config["gpus"], config["num_microbatches"]
    states, ring = OPTIMIZERS[config["optimizer"]][2], 2 * (num_gpus - 1) / num_gpus
    stages = [8 * sum(w.numel() for w in stage.parameters()) for stage in make_network(config)]
    depth, size = num_gpus * config["layers_per_stage"], config["hidden_size"]
    in_pairs = 8 * depth * (6 * size**2 + 4 * size)  # a bias after a row-wise split is whole
    cut = 8 * config["batch_size"] * size * (64 if config["network"] == "transformer" else 1)
    w = sum(stages)
    shard, part, rest = w / num_gpus, activations / num_gpus, w - in_pairs * (1 - 1 / num_gpus)
    rows: dict[str, tuple] = {
        "one process": (0, w, w, states * w, activations),
        "data parallel": (ring * w, w, w, states * w, part),
        "ZeRO stage 1": (ring * w, w, w, states * shard, part),
        "ZeRO stage 2": (ring * w, w, shard, states * shard, part),
        "ZeRO stage 3": (1.5 * ring * w, shard, shard, states * shard, part),
        "tensor parallel": (4 * depth * ring * cut, rest, rest, states * rest, part),
    }
    of_gpus = {name: [[number] * num_gpus for number in row] for name, row in rows.items()}
    after = [num_gpus - 1 - stage for stage in range(num_gpus)]  # stages that follow
    versions = [1 + math.ceil(number / num_microbatches) for number in after]
    neighbors = [cut * ((number > 0) + (number < num_gpus - 1)) for number in after]
    state = [states * weights for weights in stages]
    flying = [min(number + 1, num_microbatches) / num_microbatches * part for number in after]
    stashed = [number * weights for number, weights in zip(versions, stages, strict=True)]
    of_gpus["pipeline 1F1B"] = [neighbors, stages, stages, state, flying]
    of_gpus["PipeDream"] = [neighbors, stashed, stages, state, flying]
    return {name: dict(zip(["sent", *KINDS], row, strict=True)) for name, row in of_gpus.items()}


def sent_in_rings(figures: Figures, num_gpus: int) -> float:
    return sum(COLLECTIVES[kind](num_gpus) * n for kind, n in figures.handed.items())


# ------------------------------------------------------------------------------------- report

TOLERANCE = 0.05
REASONS = {  # why PyTorch differs from the papers, where it is known to
    ("ZeRO stage 1", "sent"): "gradients are all-reduced, as in DDP, where the paper "
    "reduce-scatters them",
    ("ZeRO stage 1", "optimizer"): "whole parameters are dealt out, not equal shares",
    **dict.fromkeys(
        [(f"ZeRO stage {n}", kind) for n in (2, 3) for kind in ("sent", "optimizer")],
        "FSDP2 pads what it cannot split evenly: the head has 10 rows",
    ),
    **dict.fromkeys(
        [(f"ZeRO stage {n}", kind) for n in (2, 3) for kind in ("weights", "gradients")],
        "and the layers that are whole at that moment, with the buffers that they travel in",
    ),
    ("tensor parallel", "activations"): "1/G of what is inside attention and MLP; what goes in "
    "and comes out is whole",
    **dict.fromkeys(
        [(name, "activations") for name in ("pipeline 1F1B", "PipeDream")],
        "the stages differ: one embeds, one has the head and the loss",
    ),
    ("PipeDream", "gradients"): "a microbatch's gradient, and the sum over the batch",
    ("PipeDream", "activations"): "PyTorch's engine keeps what it receives until its step, here "
    "the whole run, is over",
}


def verdict(name: str, kind: str, measured: list, formula: list, reasons: list[str]) -> str:
    """Does the formula hold? If not, what it says, by how much it is off, and why."""
    ratios = [m / f for m, f in zip(measured, formula, strict=True) if f]
    worst = max(ratios, key=lambda ratio: abs(math.log(ratio or 1e-9)), default=1.0)
    if abs(worst - 1) <= TOLERANCE:
        return "holds"
    reason = REASONS.get((name, kind), "for a reason that is not known here")
    if reason not in reasons:
        reasons.append(reason)
    return f"{kib(formula)}: {worst:.2f}x ({1 + reasons.index(reason)})"


def kib(values: list) -> str:
    return each([f"{value / 1024:,.0f}" for value in values])


def each(values: list) -> str:
    """One value for all GPUs, or one per GPU."""
    return str(values[0]) if len({*values}) == 1 else format_per_gpu(values)


def format_report(config: dict, ranks: list[dict[str, Figures]]) -> str:
    num_gpus, reasons = config["gpus"], list[str]()
    formulas = papers(config, ranks[0]["one process"].peak["activations"])
    sent = [["", "messages", "handed over", "sent", "papers"]]
    held, took = [["", *KINDS]], [["", "ms", "on the wire", "difference"]]
    for name in names_of(config):
        figures = [rank[name] for rank in ranks if name in rank]  # one process: of rank 0
        formula = {kind: row[: len(figures)] for kind, row in formulas[name].items()}
        in_rings = [sent_in_rings(f, num_gpus) for f in figures]
        if len(figures) > 1:
            kinds = [kind for kind in COLLECTIVES if kind in figures[0].messages]
            # int: PipeDream's engine also says hello, once in the run, with a byte
            parts = [f"{each([int(f.messages[k]) for f in figures])} {k}" for k in kinds]
            handed = kib([sum(f.handed.values()) for f in figures])
            says = verdict(name, "sent", in_rings, formula["sent"], reasons)
            sent.append([name, ", ".join(parts), handed, kib(in_rings), says])
        peaks = {kind: [f.peak.get(kind, 0) for f in figures] for kind in KINDS}
        held.append([name, *(kib(peaks[kind]) for kind in KINDS)])
        held.append(["  papers"])
        held[-1] += [verdict(name, k, peaks[k], formula[k], reasons) for k in KINDS]
        seconds, wire = max(f.seconds for f in figures), [f.wire for f in figures]
        off = max(f.off for f in figures)
        took.append([name, f"{1000 * seconds:.0f}", kib(wire), f"{off:.1e}"])
    del held[2]  # one process is what the papers' activations are a part of
    took[1][2:] = ["", ""]
    same = all(f.same for rank in ranks for f in rank.values())
    good = "✅ ALL END ON THE WEIGHTS OF ONE PROCESS, PipeDream ON THOSE OF ITS RECURRENCE"
    return "\n".join(
        [
            "📊 WHAT A GPU SENDS, KiB per step",
            *format_table(sent),
            SENT_LEGEND,
            "\n📊 WHAT A GPU HOLDS, KiB at the peak of each",
            *format_table(held),
            *(f"   ({number}) {reason}" for number, reason in enumerate(reasons, start=1)),
            "\n📊 TIME OF A STEP, BYTES ON THE WIRE, AND THE LARGEST DIFFERENCE OF A WEIGHT",
            *format_table(took),
            WIRE_LEGEND,
            "\n" + (good if same else "❌ SOME DO NOT END ON THE WEIGHTS THAT THEY SHOULD"),
        ]
    )


SENT_LEGEND = """\
   Several numbers: GPU by GPU. handed over: the tensors of the collectives that
   ran. sent: what a GPU sends of them in a ring of G GPUs, 2(G-1)/G of an
   all-reduce, (G-1)/G of the others, all of a send. papers: all-reduce of the
   weights (ZeRO-3: 1.5 times that); four all-reduces of activations per layer;
   the activations of a cut, and their gradients."""
WIRE_LEGEND = """\
   on the wire: KiB that the kernel counted at the sockets. gloo's all-reduce is a
   ring, its reduce-scatter a whole all-reduce, its broadcast a tree. Processes
   that share cores are slower than GPUs would be: times say what PyTorch's own
   work costs, not which way is fastest."""

# -------------------------------------------------------------------------------------- sweep

SWEPT = ["data parallel", "ZeRO stage 3", "tensor parallel", "pipeline 1F1B"]
SWEEPS: dict[str, tuple] = {  # -> (its values, what stays)
    "hidden_size": ([16, 32, 64, 128, 256, 512], {"batch_size": 8}),
    "batch_size": ([4, 8, 16, 32, 64, 128], {"hidden_size": 256}),
}


def run_sweep(config: dict) -> list[dict[tuple, float]]:
    """Of each rank: (swept key, value, way to train) -> bytes sent in a step."""
    sent = {}
    for key, (values, fixed) in SWEEPS.items():
        for value in values:
            point = sweep_point(config, **fixed, **{key: value})
            if dist.get_rank() == 0:
                print(f"{key} {value}", flush=True)
            for name in SWEPT:
                figures = measure(JOBS[name](point), make_batches64(point))
                sent[key, value, name] = sent_in_rings(figures, config["gpus"])
    return distributed.gather(sent)


def sweep_point(config: dict, **settings) -> dict:
    few = {"num_batches": 1, "num_microbatches": config["gpus"], "optimizer": "sgd"}
    return {**config, **few, **settings}


def draw_sweep(config: dict, ranks: list[dict[tuple, float]]):
    """Marks are measured, lines are the papers' formulas."""
    import pipedream_visual as visual

    fullest = {key: max(rank[key] for rank in ranks) for key in ranks[0]}
    lines = [
        f"The GPU that sends most, of {config['gpus']}. Marks: from the collectives that ran. "
        "Lines: the papers' formulas.",
        "Weights grow with the square of the hidden size, activations with it and with the batch.",
    ]
    title = "Who sends least? Below the crossings it is another way of training than above them"
    figure = visual.new_picture(1760, 860, title, lines)
    for column, (key, (values, fixed)) in enumerate(SWEEPS.items()):
        axes = visual.add_axes(figure, 120 + 850 * column, 150, 720, 500)
        formulas = [papers(sweep_point(config, **fixed, **{key: value})) for value in values]
        for name, color, marker in zip(SWEPT, visual.HUES, "os^D", strict=False):
            line = [max(formula[name]["sent"]) / 2**20 for formula in formulas]
            marks = [fullest[key, value, name] / 2**20 for value in values]
            axes.plot(values, line, color=color, lw=1)
            axes.plot(values, marks, marker, color=color, label=name)
        axes.set(xscale="log", yscale="log", ylabel="MiB sent per step")
        axes.set_xticks(values, map(str, values))
        axes.minorticks_off()
        ((other, number),) = fixed.items()
        axes.set_xlabel(f"{key} (with {other} {number})")
        axes.spines[["left", "bottom"]].set_visible(True)
    figure.legend(handles=visual.labelled(axes), loc="lower center", ncols=4, frameon=False)
    return figure


# --------------------------------------------------------------------------------------- main


def check(config: dict) -> None:
    """Raise a UserError for the first setting with which some way to train cannot be."""
    rules = {**RULES, "gpus": (int, 2, 16), "optimizer": (str,), "timeout": (float, 1, 86_400)}
    for key, value in config.items():
        check_value(key, value, rules[key])
    gpus, optimizer, batch_size = config["gpus"], config["optimizer"], config["batch_size"]
    if optimizer not in OPTIMIZERS:
        raise UserError(f"optimizer={shown(optimizer)} must be one of {', '.join(OPTIMIZERS)}")
    known = {key: value for key, value in config.items() if key in LAB_CONFIG}
    check_lab_config({**LAB_CONFIG, **known, "num_stages": gpus})
    if config["network"] == "transformer" and NUM_HEADS % gpus:
        raise UserError(f"gpus={gpus} must be 2 or 4: the transformer has {NUM_HEADS} heads")
    if batch_size % gpus:
        raise UserError(f"batch_size={batch_size} must be a multiple of gpus={gpus}")
    if config["num_microbatches"] < gpus:
        few = f"num_microbatches={config['num_microbatches']}"
        raise UserError(f"{few} must be at least gpus={gpus}, for PyTorch's Schedule1F1B")
    if "RANK" in os.environ and "PIPEDREAM_LAUNCHED" not in os.environ:
        raise UserError(
            "RANK is set, but this starts its processes itself: use python, not torchrun"
        )


def main() -> None:
    block = re.search(r"\nCONFIG = \{.*?\n\}", Path(__file__).read_text("utf-8"), re.S)
    doc = f"{__doc__}\nEvery key of CONFIG is also a flag: --gpus 2.\n{block[0] if block else ''}"
    other: dict = {"--sweep": {"action": "store_true", "help": "draw neighbours.png"}}
    other["--out"] = {"type": Path, "metavar": "DIR", "help": "folder for the picture (default: .)"}
    config, flags = parse_config(doc, config=CONFIG, check=check, other=other)
    if "sweep" in flags and config["network"] != "transformer":
        raise UserError(
            "--sweep needs network='transformer': tensor parallelism is about its layers"
        )
    distributed.check_engine()
    if "RANK" not in os.environ:
        sys.exit(distributed.launch(config["gpus"], config["timeout"]))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # at once and without a word: the launcher says it
    logging.disable()
    warnings.simplefilter("ignore")  # about names that PyTorch will rename
    torch.set_default_dtype(torch.float64)
    run: Callable = run_sweep if "sweep" in flags else run_all
    ranks = distributed.in_group(lambda: run(config), "gloo", config["timeout"])
    if ranks and "sweep" in flags:
        from pipedream_visual import house_style, save

        path = flags.get("out", Path()) / "neighbours.png"
        with house_style():
            save({path: draw_sweep(config, ranks).savefig})
        print(path)
    elif ranks:
        print(format_report(config, ranks), flush=True)
        sys.exit(not all(f.same for rank in ranks for f in rank.values()))


if __name__ == "__main__":
    sys.exit(run_main(main))
