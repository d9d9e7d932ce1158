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
import itertools
import os
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
from pipedream_lab import LAB_CONFIG, make_plan
from pipedream_simple import (
    NUM_HEADS,
    RULES,
    UserError,
    build_stages,
    check_config,
    check_value,
    count,
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
    "seed": 0,
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
    return nn.Sequential(*build_stages({**config, "num_stages": config["gpus"]}))


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
    "allreduce": lambda num_gpus: 2 * (num_gpus - 1) / num_gpus,
    "allgather": lambda num_gpus: (num_gpus - 1) / num_gpus,
    "reducescatter": lambda num_gpus: (num_gpus - 1) / num_gpus,
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
            kind = next((kind for kind in COLLECTIVES if kind in name), "")
            assert kind or any(word in name for word in SILENT), name
            tensors = [t for t in tree_leaves((args, result)) if isinstance(t, Tensor)]
            if kind:
                largest = max(tensors, key=lambda t: t.nbytes)
                self.messages[kind] += 1
                self.handed[kind] += largest.nbytes
                owner = {"allgather": "weights", "reducescatter": "gradients"}.get(kind)
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
            self.note("activations", [tensor])  # but not weights, which a Linear saves, too
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
    handed: dict[str, float]  # bytes of their tensors, per step
    wire: float  # bytes that its sockets sent, per step
    peak: dict[str, int]  # bytes, by kind
    seconds: float  # of a step; the median
    off: float  # the largest difference of a weight from what it should be


def run_all(config: dict) -> list[dict[str, Figures]]:
    """Train in all ways, one after the other. On rank 0: for each rank what it measured."""
    torch.set_default_dtype(torch.float64)
    batches = [(x.to(torch.float64), y) for x, y in make_batches({**config, "device": "cpu"})]
    expected: list = [None, None]
    figures = {}
    if dist.get_rank() == 0:
        job = one_process(config)
        expected = [None, dict(recurrence(config, batches).named_parameters())]
        expected[0], figures["one process"] = measure(job, batches, alone=True)
    dist.broadcast_object_list(expected)  # the others wait: one process has the machine to itself
    plain, delayed = expected
    network = make_network(config)
    network.load_state_dict(plain)
    with_pairs = dict(with_blocks(network).named_parameters())
    for name in names_of(config)[1:]:
        final, measured = measure(JOBS[name](config), batches, stream=name == "PipeDream")
        true = {"tensor parallel": with_pairs, "PipeDream": delayed}.get(name, plain)
        off = max((w - true[key]).abs().max().item() for key, w in final.items())
        figures[name] = measured._replace(off=off)
    return distributed.gather(figures)


def names_of(config: dict) -> list[str]:
    """The ways to train this network."""
    return [name for name in JOBS if name != "tensor parallel" or config["network"] != "residual"]


def measure(
    job: Job, batches: list[Batch], stream: bool = False, alone: bool = False, repeats: int = 3
) -> tuple[Weights, Figures]:
    """Train under the meter; then some steps without it, for the time, which are thrown away."""
    meter = Meter(job)
    calls = [batches] if stream else [[batch] for batch in batches]
    for call in calls:
        meter.messages.clear()
        meter.handed.clear()
        sent = bytes_on_the_wire()
        with meter.watching():
            job.train(call)
        sent = bytes_on_the_wire() - sent
    per_step = [{k: v / len(call) for k, v in c.items()} for c in (meter.messages, meter.handed)]
    final, seconds = {name: w.clone() for name, w in job.final().items()}, [0.0]
    for number in range(repeats):
        if not alone:
            dist.barrier()
        start = time.perf_counter()
        job.train(call)
        seconds[number:] = [(time.perf_counter() - start) / len(call)]
    time_of_step = statistics.median(seconds)
    return final, Figures(*per_step, sent / len(call), dict(meter.peak), time_of_step, 0.0)


# ------------------------------------------------------------------------------------ papers


def papers(config: dict, activations: float) -> dict[str, dict[str, list[float]]]:
    """name -> kind -> bytes on each GPU, as the papers count them. sent: per step.

    activations: of one process on a whole batch, measured. The papers count these, too, but of
    their own layers. The formulas are for a network whose layers are alike; of each stage of a
    pipeline its own weights are counted here.
    """
    num_gpus, num_microbatches = config["gpus"], config["num_microbatches"]
    ring, gpus = 2 * (num_gpus - 1) / num_gpus, range(num_gpus)
    stages = [8 * sum(w.numel() for w in s.parameters()) for s in make_network(config)]
    whole, states = sum(stages), OPTIMIZERS[config["optimizer"]][2]
    depth, size = num_gpus * config["layers_per_stage"], config["hidden_size"]
    split = 8 * depth * (6 * size**2 + 4 * size)  # weights in the pairs
    cut = 8 * config["batch_size"] * size * (64 if config["network"] == "transformer" else 1)

    def row(sent: float, weights: float, gradients: float, state: float, saved: float) -> dict:
        numbers = sent, weights, gradients, states * state, saved
        return {k: [n] * num_gpus for k, n in zip(("sent", *KINDS), numbers, strict=True)}

    w, shard, part = whole, whole / num_gpus, activations / num_gpus
    held = w - split + split / num_gpus
    neighbors = [cut * ((s > 0) + (s < num_gpus - 1)) for s in gpus]
    flying = [min(num_gpus - s, num_microbatches) / num_microbatches * part for s in gpus]
    versions = [1 + -(-(num_gpus - 1 - s) // num_microbatches) for s in gpus]
    kept = [n * v for n, v in zip(stages, versions, strict=True)]
    state = [states * n for n in stages]
    return {
        "one process": row(0, w, w, w, activations),
        "data parallel": row(ring * w, w, w, w, part),
        "ZeRO stage 1": row(ring * w, w, w, shard, part),
        "ZeRO stage 2": row(ring * w, w, shard, shard, part),
        "ZeRO stage 3": row(1.5 * ring * w, shard, shard, shard, part),
        "tensor parallel": row(4 * depth * ring * cut, held, held, held, part),
        "pipeline 1F1B": dict(
            zip(("sent", *KINDS), (neighbors, stages, stages, state, flying), strict=True)
        ),
        "PipeDream": dict(
            zip(("sent", *KINDS), (neighbors, kept, stages, state, flying), strict=True)
        ),
    }
