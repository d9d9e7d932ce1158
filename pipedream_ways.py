"""Seven ways to train on several GPUs, each as PyTorch wants it, for pipedream_neighbours.py.

    data parallel    DDP: every GPU has all weights and a part of the batch
    ZeRO stage 1     ZeroRedundancyOptimizer on top: each GPU keeps a part of the optimizer's state
    ZeRO stage 2     FSDP2 without resharding after the forward: also a part of the gradients
    ZeRO stage 3     FSDP2 with it: also a part of the weights
    tensor parallel  Megatron's pairs of a column-wise and a row-wise split matrix, on DTensor
    pipeline 1F1B    torch.distributed.pipelining: each GPU has some layers
    PipeDream        the same without a flush, with stashed weights (pipedream_distributed.py)

config is the CONFIG of pipedream_neighbours.py. Nothing here starts processes or measures. At the
end: what the papers say of each way, and how PyTorch is known to differ from that.
"""

import copy
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn, optim
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.nn.parallel import DistributedDataParallel

import pipedream_distributed as distributed
import pipedream_lab as lab
import pipedream_simple as simple
from pipedream_simple import NUM_HEADS, UserError, Weights, shown

OPTIMIZERS: dict[str, tuple] = {  # -> (class, settings, numbers of state per weight)
    "sgd": (optim.SGD, {}, 0),
    "momentum": (optim.SGD, {"momentum": 0.9}, 1),
    "adam": (optim.Adam, {}, 2),
}
Batch = tuple[Tensor, Tensor]


class Job(NamedTuple):
    """One way to train, on one GPU of many."""

    train: Callable[[list[Batch]], None]  # on whole batches, of which it may take its part
    held: Callable[[], dict[str, list]]  # kind -> the tensors on this GPU now (and other things)
    final: Callable[[], Weights]  # at the end, under the names that one process has
    stream: bool = False  # must train be called once, with all batches of the run?


def make_network(config: dict) -> nn.Sequential:
    return nn.Sequential(*simple.build_stages({**config, "num_stages": config["gpus"], "seed": 0}))


def make_batches(config: dict) -> list[Batch]:
    return [(x.double(), y) for x, y in simple.make_batches({**config, "seed": 0})]


def make_optimizer(config: dict, parameters: Iterable[Tensor]) -> optim.Optimizer:
    kind, settings, _ = OPTIMIZERS[config["optimizer"]]
    return kind(parameters, lr=config["learning_rate"], **settings)


def whole(batch: Tensor) -> Tensor:
    return batch


def my_part(batch: Tensor) -> Tensor:
    return batch.chunk(dist.get_world_size())[dist.get_rank()].clone()  # no view of the rest


def ordinary(module: nn.Module, optimizer: Any, part=my_part, prefix: str = "") -> Job:
    """The loop that everybody writes. What is parallel is inside the module and the optimizer."""

    def train(batches: list[Batch]) -> None:
        for x, y in batches:
            cross_entropy(module(part(x)), part(y)).backward()
            optimizer.step()
            optimizer.zero_grad()

    def held() -> dict[str, list]:
        state = getattr(optimizer, "optim", optimizer).state  # optim: of ZeroRedundancyOptimizer
        w = [*module.parameters()]
        return {"weights": w, "gradients": [p.grad for p in w], "optimizer": [*state.values()]}

    def final() -> Weights:
        named = ((prefix + k.removeprefix("module."), w) for k, w in module.named_parameters())
        return {k: getattr(w, "full_tensor", lambda w=w: w)().clone() for k, w in named}

    return Job(train, held, final)


def one_process(config: dict) -> Job:
    network = make_network(config)
    return ordinary(network, make_optimizer(config, network.parameters()), whole)


def data_parallel(config: dict) -> Job:
    """DDP adds up gradients with all-reduces, in buckets, while the backward is still running.

    Gradients are views of the buckets: by default they are copies, and take twice the memory.
    """
    ddp = DistributedDataParallel(make_network(config), gradient_as_bucket_view=True)
    return ordinary(ddp, make_optimizer(config, ddp.parameters()))


def zero_1(config: dict) -> Job:
    """Each GPU updates its part of the weights, and broadcasts them: the state is split."""
    ddp = DistributedDataParallel(make_network(config), gradient_as_bucket_view=True)
    kind, settings, _ = OPTIMIZERS[config["optimizer"]]
    settings = {"lr": config["learning_rate"], "parameters_as_bucket_view": True, **settings}
    return ordinary(ddp, ZeroRedundancyOptimizer(ddp.parameters(), kind, **settings))


def fsdp(config: dict, reshard: bool) -> Job:
    """FSDP2 gathers a layer's weights when they are needed, and reduce-scatters its gradients.

    Without resharding, weights stay whole from the forward to the end of the backward. ZeRO's stage
    2 has them whole all the time: it gathers them after the update, FSDP2 before the next forward.
    """
    network = make_network(config)
    for module in (*layers_of(network), network):
        fully_shard(module, mesh=mesh(), reshard_after_forward=reshard)
    return ordinary(network, make_optimizer(config, network.parameters()))


def layers_of(network: nn.Module) -> list[nn.Module]:
    """What FSDP2 gathers at a time, from the inside out."""
    layers = [layer for stage in network.children() for layer in stage.children()]
    inner = [part for layer in layers for part in layer.children()]  # beside embedding or head
    return [part for part in inner if isinstance(part, nn.TransformerEncoderLayer)] + layers


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

    Embedding, norms and head are not split: every GPU does the same there. (Megatron-LM splits the
    embedding and the head, too.)
    """
    network = with_blocks(make_network(config))
    column, row = ColwiseParallel(), RowwiseParallel()
    pairs = {"qkv": column, "out": row, "linear1": column, "linear2": row}
    for module in network.modules():
        if isinstance(module, Block):
            parallelize_module(module, mesh(), pairs)
    return ordinary(network, make_optimizer(config, network.parameters()), whole)


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

    return ordinary(module, optimizer, prefix=f"{rank}.")._replace(train=train)


class OptimizedStage(distributed.VersionedStage):
    """A stage with versions, for any optimizer: its state goes from version to version."""

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
    plan = lab.make_plan(lab_config(config))
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

    def held() -> dict[str, list]:
        w = [w for module in stage.versions.values() for w in module.parameters()]
        gradients = [*stage.gradient.values(), *(p.grad for p in w)]
        return {"weights": w, "gradients": gradients, "optimizer": [stage.state]}

    def final() -> Weights:
        newest = stage.versions[max(stage.versions)]
        return {f"{rank}.{name}": w.clone() for name, w in newest.named_parameters()}

    return Job(train, held, final, stream=True)


def lab_config(config: dict) -> dict:
    known = {key: value for key, value in config.items() if key in simple.CONFIG}
    return {**lab.LAB_CONFIG, **known, "num_stages": config["gpus"], "device": "cpu"}


def recurrence(config: dict, batches: list[Batch]) -> Weights:
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
    return dict(network.named_parameters())


JOBS: dict[str, Callable[[dict], Job]] = {
    "data parallel": data_parallel,
    "ZeRO stage 1": zero_1,
    "ZeRO stage 2": lambda config: fsdp(config, reshard=False),
    "ZeRO stage 3": lambda config: fsdp(config, reshard=True),
    "tensor parallel": tensor_parallel,
    "pipeline 1F1B": pipeline_1f1b,
    "PipeDream": pipedream,
}


# ------------------------------------------------------------------------------------- papers


PerGPU = list[float]  # bytes


def papers(config: dict, alone: PerGPU | None = None) -> dict[str, dict[str, PerGPU]]:
    """name -> kind -> bytes on each GPU, as the papers count them for equal layers; sent: per step.

    alone: the activations of one process, measured: of a whole batch, then of each stage of the
    pipeline on one microbatch. Of a stage its own weights are counted.
    """
    num_gpus, num_microbatches = config["gpus"], config["num_microbatches"]
    states, ring = OPTIMIZERS[config["optimizer"]][2], 2 * (num_gpus - 1) / num_gpus
    stages = [8 * sum(w.numel() for w in stage.parameters()) for stage in make_network(config)]
    depth, size = num_gpus * config["layers_per_stage"], config["hidden_size"]
    activations, *of_stages = alone or [0.0] * (1 + num_gpus)
    in_pairs = 8 * depth * (6 * size**2 + 4 * size)  # a bias after a row-wise split is whole
    cut, w, split = bytes_of_cut(config), sum(stages), 1 - 1 / num_gpus
    # Korthikanti 2022: split are q, k, v, what attention makes of them, and the inside of the MLP
    tensor = activations - split * 5 * depth * cut
    shard, part, rest = w / num_gpus, activations / num_gpus, w - split * in_pairs
    rows: dict[str, tuple] = {
        "data parallel": (ring * w, w, w, states * w, part),
        "ZeRO stage 1": (ring * w, w, w, states * shard, part),
        "ZeRO stage 2": (ring * w, w, shard, states * shard, part),
        "ZeRO stage 3": (1.5 * ring * w, shard, shard, states * shard, part),
        "tensor parallel": (4 * depth * ring * cut, rest, rest, states * rest, tensor),
    }
    of_gpus = {name: [[number] * num_gpus for number in row] for name, row in rows.items()}
    after = [num_gpus - 1 - stage for stage in range(num_gpus)]  # stages that follow
    versions = (1 + math.ceil(number / num_microbatches) for number in after)
    neighbors = [cut * ((number > 0) + (number < num_gpus - 1)) for number in after]
    state = [states * weights for weights in stages]
    flying = [(number + 1) * one for number, one in zip(after, of_stages, strict=True)]
    stashed = [number * weights for number, weights in zip(versions, stages, strict=True)]
    of_gpus["pipeline 1F1B"] = [neighbors, stages, stages, state, flying]
    of_gpus["PipeDream"] = [neighbors, stashed, stages, state, flying]
    kinds = "sent", "weights", "gradients", "optimizer", "activations"
    return {name: dict(zip(kinds, row, strict=True)) for name, row in of_gpus.items()}


def bytes_of_cut(config: dict) -> int:
    """The activations of a whole batch between two layers."""
    tokens = 64 if config["network"] == "transformer" else 1
    return 8 * config["batch_size"] * config["hidden_size"] * tokens


class Known(NamedTuple):
    """How PyTorch differs from the papers, and what to measure on each GPU if that is all."""

    reason: str
    least: PerGPU
    most: PerGPU


def known(config: dict, of_papers: dict[str, dict[str, PerGPU]]) -> dict[str, dict[str, Known]]:
    """name -> kind -> the difference, predicted from shapes and from the papers' figures."""
    return {**known_of_shards(config), **known_of_pipelines(config, of_papers)}


def known_of_shards(config: dict) -> dict[str, dict[str, Known]]:
    num_gpus, states = config["gpus"], OPTIMIZERS[config["optimizer"]][2]
    network, part = make_network(config), 1 - 1 / config["gpus"]
    dealt, rows = [0.0] * num_gpus, [0.0] * num_gpus
    for size in sorted((8 * w.numel() for w in network.parameters()), reverse=True):
        dealt[dealt.index(min(dealt))] += size
    for w in network.parameters():
        for rank, share in enumerate(w.chunk(num_gpus)):
            rows[rank] += 8 * share.numel()
    layers, seen = list[int](), set[Tensor]()  # as FSDP2 gathers them: equal shares, some padded
    for layer in layers_of(network):
        own = {*layer.parameters()} - seen
        layers.append(8 * num_gpus * sum(w.chunk(num_gpus)[0].numel() for w in own))
        seen |= own
    whole, largest, two = sum(layers), max(layers), sum(sorted(layers)[-2:])
    shard = whole / num_gpus

    def exactly(reason: str, values: Iterable[float]) -> Known:
        return Known(reason, [*values], [*values])

    def on_all(reason: str, least: float, most: float) -> Known:
        return Known(reason, [least] * num_gpus, [most] * num_gpus)

    reduced = "gradients are all-reduced, as in DDP, where the paper reduce-scatters them"
    pads = "FSDP2 pads what does not split into equal rows (the head has 10)"
    also = "FSDP2 has its shard, and beside it the layers that are whole at that moment"
    fsdp2 = {
        "gradients": on_all(also, shard, shard + two),
        "optimizer": exactly(
            "FSDP2 deals out whole rows (the head has 10)", [states * row for row in rows]
        ),
    }
    return {
        "ZeRO stage 1": {
            "sent": on_all(reduced, *[3 * part * sum(rows)] * 2),
            "optimizer": exactly(
                "whole parameters are dealt out, not equal shares", [states * w for w in dealt]
            ),
        },
        "ZeRO stage 2": {
            **fsdp2,
            "sent": on_all(pads, *[2 * part * whole] * 2),
            "weights": on_all(also, *[shard + whole] * 2),
        },
        "ZeRO stage 3": {
            **fsdp2,
            "sent": on_all(pads, *[3 * part * whole] * 2),
            "weights": on_all(also, shard + largest, shard + two),
        },
    }


def known_of_pipelines(config: dict, of_papers: dict) -> dict[str, dict[str, Known]]:
    num_gpus, num_microbatches = config["gpus"], config["num_microbatches"]
    cut, images = bytes_of_cut(config) / num_microbatches, config["batch_size"] // num_microbatches
    # of a microbatch: the input of the first stage (tokens are not saved), labels on the last one
    came_in = [8 * 64 * images * (config["network"] != "transformer"), *[cut] * (num_gpus - 1)]
    came_in[-1] += 8 * images

    def keeps(name: str, microbatches: int) -> Known:
        done = [microbatches - num_gpus + stage for stage in range(num_gpus)]  # not in flight now
        flying = of_papers[name]["activations"]
        kept = [f + n * one for f, n, one in zip(flying, done, came_in, strict=True)]
        reason = "the engine keeps what came in to the end of the step (PipeDream: of the run)"
        return Known(reason, kept, kept)

    least = of_papers["PipeDream"]["gradients"]
    sums = Known("one microbatch's, and the sum so far", least, [2 * w for w in least])
    in_run = num_microbatches * config["num_batches"]
    return {
        "pipeline 1F1B": {"activations": keeps("pipeline 1F1B", num_microbatches)},
        "PipeDream": {"activations": keeps("PipeDream", in_run), "gradients": sums},
    }


def check(config: dict) -> None:
    """Raise a UserError for the first setting with which one of the ways cannot work."""
    rules = {"gpus": (int, 2, 16), "optimizer": (str,), "timeout": (float, 1, 86_400)}
    rules["num_batches"] = int, 3, 1_000  # in the first two, PyTorch's engines find out and settle
    for key, value in config.items():
        simple.check_value(key, value, {**simple.RULES, **rules}[key])
    gpus, microbatches, names = config["gpus"], config["num_microbatches"], ", ".join(OPTIMIZERS)
    if config["optimizer"] not in OPTIMIZERS:
        raise UserError(f"optimizer={shown(config['optimizer'])} must be one of {names}")
    lab.check_lab_config(lab_config(config))
    if config["network"] == "transformer" and NUM_HEADS % gpus:
        raise UserError(f"gpus={gpus} must be 2 or 4: the transformer has {NUM_HEADS} heads")
    if config["batch_size"] % gpus:
        raise UserError(f"batch_size={config['batch_size']} must be a multiple of gpus={gpus}")
    if microbatches < gpus:
        why = "or PyTorch's Schedule1F1B cannot run"
        raise UserError(f"num_microbatches={microbatches} must be at least gpus={gpus}, {why}")


def check_sweep(config: dict, defaults: dict, path: Path) -> None:
    """Raise a UserError now, and not after minutes."""
    if config["network"] != "transformer":
        raise UserError("--sweep needs --network transformer: tensor parallelism splits its layers")
    for key in ("hidden_size", "batch_size", "optimizer", "num_microbatches", "num_batches"):
        if config[key] != defaults[key]:
            raise UserError(f"--sweep has its own {key}: leave out --{key}")
    lab.check_output(path)
