"""Seven ways to train on several GPUs, each as PyTorch wants it, and what the papers say of each.

    data parallel    DDP: every GPU has all weights and a part of the batch
    ZeRO stage 1     ZeroRedundancyOptimizer on top: each GPU keeps a part of the optimizer's state
    ZeRO stage 2     FSDP2 without resharding after the forward: also a part of the gradients
    ZeRO stage 3     FSDP2 with it: also a part of the weights
    tensor parallel  Megatron's pairs of a column-wise and a row-wise split matrix, on DTensor
    pipeline 1F1B    torch.distributed.pipelining: each GPU has some layers
    PipeDream        the same without a flush, with stashed weights (engine.py)

config is that of full_config. Nothing here starts processes or measures.
"""

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn, optim
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.nn.parallel import DistributedDataParallel

from pipedream.backstage.sent import sent_in_layers, sent_to_replicas
from pipedream.networks.transformer import NUM_HEADS
from pipedream.processes.engine import VersionedStage, make_engine
from pipedream.schedules.plans import PLAN_CONFIG, make_plan
from pipedream_simple import Weights, build_stages, make_batches

TORCH_OPTIMIZERS: dict[str, tuple] = {  # -> (class, settings, numbers of state per weight)
    "sgd": (optim.SGD, {}, 0),
    "momentum": (optim.SGD, {"momentum": 0.9}, 1),
    "adam": (optim.Adam, {}, 2),
}
Batch = tuple[Tensor, Tensor]
Backward = Callable[[Tensor, Tensor], object]  # of a batch (x, y): it leaves gradients behind


def full_config(config: dict) -> dict:
    """The keys of python -m pipedream neighbours, and those that a Plan needs."""
    return {**PLAN_CONFIG, **config, "num_stages": config["gpus"], "device": "cpu"}


def make_network(config: dict) -> nn.Sequential:
    return nn.Sequential(*build_stages(config))


def double_batches(config: dict) -> list[Batch]:
    return [(x.double(), y) for x, y in make_batches(config)]


def make_optimizer(config: dict, parameters: Iterable[Tensor]) -> optim.Optimizer:
    kind, settings, _ = TORCH_OPTIMIZERS[config["optimizer"]]
    return kind(parameters, lr=config["learning_rate"], **settings)


class Job:
    """One way to train, on one GPU of many, in the loop that everybody writes.

    What is parallel is inside backward, which may take its part of the batch, and the optimizer.
    """

    stream = False  # must train be called once, with all batches of the run?

    def __init__(self, config: dict, module: nn.Module, backward: Backward):
        self.module, self.backward = module, backward
        self.optimizer: Any = make_optimizer(config, module.parameters())

    def train(self, batches: list[Batch]) -> None:
        for x, y in batches:
            self.backward(x, y)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def held(self) -> dict[str, list]:
        """The tensors on this GPU now (and other things), by kind."""
        state = getattr(self.optimizer, "optim", self.optimizer).state  # optim: of ZeRO stage 1
        w = [*self.module.parameters()]
        return {"weights": w, "gradients": [p.grad for p in w], "optimizer": [*state.values()]}

    def final(self) -> Weights:
        """The weights on this GPU, whole, under the names that one process has."""
        named = self.module.named_parameters()
        return {k: getattr(w, "full_tensor", lambda w=w: w)().clone() for k, w in named}


def on_whole(module: nn.Module) -> Backward:
    return lambda x, y: cross_entropy(module(x), y).backward()


def on_my_part(module: nn.Module) -> Backward:
    rank, gpus = dist.get_rank(), dist.get_world_size()  # a copy, no view of the rest:
    return lambda x, y: on_whole(module)(*(part.chunk(gpus)[rank].clone() for part in (x, y)))


def one_process(config: dict) -> Job:
    network = make_network(config)
    return Job(config, network, on_whole(network))


def data_parallel(config: dict) -> Job:
    """DDP adds up gradients with all-reduces, in buckets, while the backward is still running.

    Gradients are views of the buckets: by default they are copies, and take twice the memory.
    """
    network = make_network(config)
    ddp = DistributedDataParallel(network, gradient_as_bucket_view=True)
    return Job(config, network, on_my_part(ddp))


def zero_1(config: dict) -> Job:
    """Each GPU updates its part of the weights, and broadcasts them: the state is split."""
    job, (kind, settings, _) = data_parallel(config), TORCH_OPTIMIZERS[config["optimizer"]]
    settings = {"lr": config["learning_rate"], "parameters_as_bucket_view": True, **settings}
    job.optimizer = ZeroRedundancyOptimizer(job.module.parameters(), kind, **settings)
    return job


def fsdp(config: dict, reshard: bool) -> Job:
    """FSDP2 gathers a layer's weights when they are needed, and reduce-scatters its gradients.

    Without resharding, weights stay whole from the forward to the end of the backward. ZeRO's stage
    2 has them whole all the time: it gathers them after the update, FSDP2 before the next forward.
    """
    network, mesh = make_network(config), init_device_mesh("cpu", (config["gpus"],))
    for module in (*layers_of(network), network):
        fully_shard(module, mesh=mesh, reshard_after_forward=reshard)
    return Job(config, network, on_my_part(network))


def layers_of(network: nn.Module) -> list[nn.Module]:
    """What FSDP2 gathers at a time, from the inside out."""
    layers = [layer for stage in network.children() for layer in stage.children()]
    inner = [part for layer in layers for part in layer.children()]  # beside embedding or head
    return [part for part in inner if isinstance(part, nn.TransformerEncoderLayer)] + layers


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

    Embedding, norms and head are not split: every GPU does the same there. (Megatron-LM splits the
    embedding and the head, too.)
    """
    network, mesh = with_blocks(make_network(config)), init_device_mesh("cpu", (config["gpus"],))
    column, row = ColwiseParallel(), RowwiseParallel()
    pairs = {"qkv": column, "out": row, "linear1": column, "linear2": row}
    for module in network.modules():
        if isinstance(module, Block):
            parallelize_module(module, mesh, pairs)
    return Job(config, network, on_whole(network))


def pipeline_1f1b(config: dict) -> Job:
    """PyTorch's engine, as examples/pipeline.py uses it."""
    rank, module = dist.get_rank(), make_network(config)[dist.get_rank()]
    stage = PipelineStage(module, rank, config["gpus"], torch.device("cpu"))
    engine = Schedule1F1B(stage, config["num_microbatches"], loss_fn=cross_entropy)

    def backward(x: Tensor, y: Tensor) -> None:
        engine.step(*[x] * (rank == 0), target=y, return_outputs=False)

    return Job(config, nn.ModuleDict({str(rank): module}), backward)


class OptimizedStage(VersionedStage):
    """A stage with versions, for any optimizer."""

    def next_version(self) -> nn.Module:
        module = copy.deepcopy(self.versions[max(self.versions)])
        optimizer = make_optimizer(self.plan.config, module.parameters())
        optimizer.load_state_dict(self.state or optimizer.state_dict())
        for name, w in module.named_parameters():
            w.grad = self.gradient[name]
        optimizer.step()
        optimizer.zero_grad()
        self.gradient.clear()
        self.state = optimizer.state_dict()
        return module


class PipeDream(Job):
    """Not batch by batch: one stream through the whole run."""

    stream = True

    def __init__(self, config: dict):
        plan, self.rank, stages = make_plan(config), dist.get_rank(), list[Any]()
        plan.config["optimizer"] = config["optimizer"]
        self.stage = OptimizedStage(self.rank, plan, torch.device("cpu"), stages, [])
        stages.append(self.stage)
        self.stage.restart()
        self.engine = make_engine(plan, stages)

    def train(self, batches: list[Batch]) -> None:
        self.stage.restart()
        x, y = (torch.cat(part) for part in zip(*batches, strict=True))
        self.engine.step(*[x] * (self.rank == 0), target=y, return_outputs=False, losses=[])
        self.module = nn.ModuleDict({str(self.rank): self.stage.submod})  # the newest version

    def held(self) -> dict[str, list]:
        w = [w for module in self.stage.versions.values() for w in module.parameters()]
        gradients = [*self.stage.gradient.values(), *(p.grad for p in w)]
        return {"weights": w, "gradients": gradients, "optimizer": [self.stage.state]}


def recurrence(config: dict, batches: list[Batch]) -> Weights:
    """PipeDream as the paper writes it, without a schedule, in one process.

    The gradient of batch b is that at the weights that stage s had ceil((S-1-s)/M) updates ago.
    """
    last, network = config["gpus"] - 1, make_network(config)
    optimizer, past = make_optimizer(config, network.parameters()), [copy.deepcopy(network)]
    for b, (x, y) in enumerate(batches):
        read = [max(0, b + (s - last) // config["num_microbatches"]) for s in range(last + 1)]
        old = nn.Sequential(*(copy.deepcopy(past[v][s]) for s, v in enumerate(read)))
        cross_entropy(old(x), y).backward()
        for w, stale in zip(network.parameters(), old.parameters(), strict=True):
            w.grad = stale.grad
        optimizer.step()
        past.append(copy.deepcopy(network))
    return dict(network.named_parameters())


JOBS: dict[str, Callable[[dict], Job]] = {
    "data parallel": data_parallel,
    "ZeRO stage 1": zero_1,
    "ZeRO stage 2": lambda config: fsdp(config, reshard=False),
    "ZeRO stage 3": lambda config: fsdp(config, reshard=True),
    "tensor parallel": tensor_parallel,
    "pipeline 1F1B": pipeline_1f1b,
    "PipeDream": PipeDream,
}

# ------------------------------------------------------------------------------------- papers

HELD = "weights", "gradients", "optimizer", "activations"
PerGPU = list[float]  # bytes


def formulas(config: dict, activations: PerGPU | None = None) -> dict[str, dict[str, PerGPU]]:
    """way -> kind -> bytes on each GPU, as the papers count them for equal layers; sent: per step.

    activations: of one process, measured: of a whole batch, then of each stage of the pipeline on
    one microbatch. Of a stage its own weights are counted.
    """
    gpus, states = config["gpus"], TORCH_OPTIMIZERS[config["optimizer"]][2]
    saved, *of_stages = activations or [0.0] * (1 + gpus)
    stages = [8.0 * sum(w.numel() for w in stage.parameters()) for stage in make_network(config)]
    depth, size, w = gpus * config["layers_per_stage"], config["hidden_size"], sum(stages)
    tokens = 64 if config["network"] == "transformer" else 1
    cut = 8 * config["batch_size"] * size * tokens  # activations of a batch between two layers
    split = 1 - 1 / gpus
    shard, part = w / gpus, saved / gpus
    data, *zero = (sent_to_replicas(gpus, stage, w, w) for stage in range(4))
    # A bias after a row-wise split is whole. Of the activations, q, k, v, what attention makes of
    # them, and the inside of the MLP are split (Korthikanti et al., 2022).
    rest = w - split * 8 * depth * (6 * size**2 + 4 * size)
    tensor = saved - split * 5 * depth * cut
    alike: dict[str, list[float]] = {
        "data parallel": [data, w, w, states * w, part],
        "ZeRO stage 1": [zero[0], w, w, states * shard, part],
        "ZeRO stage 2": [zero[1], w, shard, states * shard, part],
        "ZeRO stage 3": [zero[2], shard, shard, states * shard, part],
        "tensor parallel": [sent_in_layers(gpus, depth * cut), rest, rest, states * rest, tensor],
    }
    rows = {way: [[number] * gpus for number in row] for way, row in alike.items()}
    after = [gpus - 1 - stage for stage in range(gpus)]  # stages that follow
    neighbors = [cut * ((number > 0) + (number < gpus - 1)) for number in after]
    versions = [1 + math.ceil(number / config["num_microbatches"]) for number in after]
    stashed = [number * weights for number, weights in zip(versions, stages, strict=True)]
    flying = [(1 + number) * one for number, one in zip(after, of_stages, strict=True)]
    state = [states * weights for weights in stages]
    rows["pipeline 1F1B"] = [neighbors, stages, stages, state, flying]
    rows["PipeDream"] = [neighbors, stashed, stages, state, flying]
    return {way: dict(zip(("sent", *HELD), row, strict=True)) for way, row in rows.items()}
