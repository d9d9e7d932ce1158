"""Does my model fit on these GPUs? Which schedule is the fastest?

    python -m pipedream fit                          Llama 2 7B on 8 GPUs of 80 GB, with Adam
    python -m pipedream fit llama-3-70b --gpus 16 --memory 141e9
    python -m pipedream fit config.json              a public model's own file
    python -m pipedream fit my_model.py              a file with LAYERS and my_batch

Every layer runs once on shapes without values: nothing is downloaded, and no GPU is needed. Memory
follows from what layers keep and from the rows of the schedules; times are FLOPs, simulated.
"""

import math
import textwrap
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from pipedream.backstage.measures import peak_versions
from pipedream.backstage.text import progress
from pipedream.planning.measuring import (
    Activations,
    Measured,
    activations_in_stage,
    all_parameters,
    measure_layers,
)
from pipedream.planning.models import Model, load_model
from pipedream.planning.profiles import Layer
from pipedream.planning.search import best_partition
from pipedream.schedules.plans import PLAN_CONFIG, Plan, make_plan, run_rows
from pipedream_simple import Op, UserError, check_value, count, format_table

FLAGS = {"[MODEL]": "a config.json, a .py file, or a known model"}
KEYS = {
    "gpus": 8,  # one stage each, or two
    "memory": 80e9,  # bytes of a GPU
    "num_microbatches": 32,  # per batch
    "microbatch_size": None,  # sequences: 1; of a file: the rows of its batch, divided
    "sequence": None,  # tokens in a sequence: at most 4,096 unless given
    "layers": None,  # blocks of the model: its own, unless given
    "precision": "bf16",  # or fp32
    "gradients": "fp32",  # or bf16: then Adam needs 16 bytes per parameter, as ZeRO counts, not 18
    "optimizer": "adam",  # or sgd, momentum
    "even": False,  # True: as many layers on each stage, whatever they cost
}
STATE_BYTES = {"adam": 8, "momentum": 4, "sgd": 0}  # per parameter, in fp32
# Of a weight: type, bytes, and bytes of a copy in fp32.
PRECISION = {"bf16": (torch.bfloat16, 2, 4), "fp32": (torch.float32, 4, 0)}
FIT_RULES: dict[str, Any] = {
    **{"gpus": (int, 1, 256), "memory": (float, 1, 1e18), "num_microbatches": (int, 1, 1024)},
    **dict.fromkeys(("microbatch_size", "sequence", "layers"), (int, 1, 10_000_000)),
    **{"precision": PRECISION, "gradients": ["fp32", "bf16"], "optimizer": STATE_BYTES},
    "even": [True, False],
}
MOST = {("gpus", "num_microbatches"): 16_384, ("microbatch_size", "sequence"): 10_000_000}
MAY_BE_NONE = "microbatch_size", "sequence", "layers"
RECOMPUTE = "none", "layer", "stage"

PYTORCH = {  # schedule -> Schedule... of torch.distributed.pipelining; -: it has none
    **{"gpipe": "GPipe", "1f1b": "1F1B", "zb-h1": "InterleavedZeroBubble", "zb-h2": "-"},
    **{"zb-v": "ZBVZeroBubble", "dualpipe-v": "DualPipeV", "interleaved": "Interleaved1F1B"},
    **{"looped-bfs": "LoopedBFS", "interleaved-zb": "InterleavedZeroBubble"},
    **{"pipedream 2BW": "-", "pipedream 2019": "-"},
}
LEGEND = """\
GB on the GPU that needs most, + where it fits into {:g}: without recompute; where each layer keeps
its input only, and runs again right before its backward; where each stage does (GPipe). Between the
halves of a backward all layers are whole; PyTorch's engine then keeps more than that. time: of a
batch, 1.00 if no GPU were ever idle; again: with either recompute; of pipedream once the pipeline
is full. Links are free; dualpipe-v's pairs take as long as their two ops. From zb-v to
interleaved-zb a GPU has two stages. PyTorch: its class, without Schedule in front. A parameter
takes {} + {} + {} bytes: weight, gradient, optimizer's state. No GPU has confirmed these numbers
yet: kernels of CUDA are assumed."""


def main(config: dict, model: str = "llama-2-7b") -> None:
    check_fit(config)
    found = load_model(str(model), config)
    dtype = PRECISION[config["precision"]][0]
    progress(f"measuring {len(found.layers)} layers" if len(found.layers) > 100 else "")
    layers = measure_layers(found.layers, found.input, dtype)
    if config["gpus"] > len(layers):
        what = f"{count(len(layers), 'layer')} cannot be cut into gpus={config['gpus']} stages"
        raise UserError(what)
    ways, reasons = ways_to_run(config, layers, found.ends)
    print(describe_request(config, found, layers))
    print("", *format_table(table_of(ways, config["memory"])), *reasons, sep="\n")
    legend = LEGEND.format(config["memory"] / 1e9, *bytes_per_parameter(config))
    print(textwrap.fill(legend, 80, initial_indent="   ", subsequent_indent="   "), end="\n\n")
    whole = all_parameters(layers) * bytes_per_parameter(config)[0]
    print(*(textwrap.fill(text, 80) for text in advise(config, ways, whole)), sep="\n")


def check_fit(config: dict) -> None:
    """Raise a UserError (a ValueError) for the first wrong thing in config."""
    if not isinstance(config, dict):
        raise UserError(f"config must be a dict with {', '.join(FIT_RULES)}")
    for key in {**config, **FIT_RULES}:
        if key not in config or key not in FIT_RULES:
            raise UserError(f"{key!r} is missing or unknown: fit takes {', '.join(FIT_RULES)}")
        if config[key] is not None or key not in MAY_BE_NONE:
            check_value(key, config[key], FIT_RULES[key])
    for keys, most in MOST.items():
        if math.prod(config[key] or 1 for key in keys) > most:
            sizes = " * ".join(f"{key}={config[key]}" for key in keys)
            raise UserError(f"{sizes} must be at most {most:,}")
    if config["precision"] == "fp32" and config["gradients"] == "bf16":
        raise UserError("gradients='bf16' needs precision='bf16'")


def bytes_per_parameter(config: dict) -> tuple[int, int, int]:
    """Of a weight, of its gradient, and of the optimizer's state."""
    _, weight, copy = PRECISION[config["precision"]]
    gradient = PRECISION[config["gradients"]][1]
    return weight, gradient, copy + STATE_BYTES[config["optimizer"]]


def describe_request(config: dict, model: Model, layers: list[Measured]) -> str:
    number, gpus = all_parameters(layers), count(config["gpus"], "GPU")
    lines = [
        f"{model.name}: {number:,} parameters, on {gpus}; {config['precision']}, "
        f"{config['optimizer']}, {count(config['num_microbatches'], 'microbatch')}",
        *model.about,
    ]
    return "\n".join(textwrap.fill(line, 80, subsequent_indent="   ") for line in lines)


def table_of(ways: list["Way"], memory: float) -> list[list[str]]:
    table = [["", "PyTorch", "time", "GB", "per layer", "per stage", "again"]]
    for way in ways:
        sums = [need.total for need in way.needs.values()]
        cells = [f"{each / 1e9:.1f}{' +'[each <= memory]}" for each in sums]
        again = way.times["layer"]
        table.append([way.name, PYTORCH[way.name], f"{way.time:.2f}", *cells, f"{again:.2f}"])
    return table


# ------------------------------------------------------------------------------------- stages


class StageCost(NamedTuple):
    """What a stage has, and does with one microbatch."""

    layers: dict[int, Measured]  # by their numbers
    flops: dict[str, int]  # F, I and W
    activations: dict[str, Activations]  # by the kind of recompute


def cut(
    config: dict, layers: list[Measured], ends: tuple[int, int], gpus: list[list[int]]
) -> list[StageCost]:
    """A stage for each number in gpus, which has the stages of each GPU.

    As even as can be; or the planner's, if its slowest GPU is faster and an even cut is not asked.
    """
    (first, last), number = ends, sum(map(len, gpus))
    blocks, cuts = len(layers) - first - last, list[list[int]]()
    if number <= blocks:
        cuts.append([first + blocks * stage // number for stage in range(1, number)])
    if not config["even"] and number <= len(layers):
        costs = [(each.forward_flops, each.input_flops + each.weight_flops) for each in layers]
        chain = [
            Layer(each.name, *cost, each.output, 0)
            for each, cost in zip(layers, costs, strict=True)
        ]
        stages = best_partition(chain, [number], [1e18], straight=True).stages
        cuts.append([stage.first for stage in stages[1:]])
    if not cuts:
        what = f"{blocks} blocks" if config["even"] else count(len(layers), "layer")
        raise UserError(f"{what} cannot be cut into {number} stages")
    numbered = dict(enumerate(layers))
    found = []
    for bounds in cuts:
        spans = (range(*pair) for pair in pairwise([0, *bounds, len(layers)]))
        found.append([cost_of({n: numbered[n] for n in span}) for span in spans])

    def slowest(stages: list[StageCost]) -> int:
        return max(sum(sum(stages[s].flops.values()) for s in mine) for mine in gpus)

    return min(found, key=slowest)  # of two that are as fast, the even one


def cost_of(layers: dict[int, Measured]) -> StageCost:
    row = [*layers.values()]
    parts = ((each.forward_flops, each.input_flops, each.weight_flops) for each in row)
    flops = dict(zip("FIW", map(sum, zip(*parts, strict=True)), strict=True))
    kept = {kind: activations_in_stage(row, kind) for kind in RECOMPUTE}
    return StageCost(layers, flops, kept)


def parameters_on(stages: list[StageCost]) -> tuple[int, int]:
    """Of a GPU with these stages: all, and those that are trained. Tied ones count once on it."""
    here = {number: layer for stage in stages for number, layer in stage.layers.items()}
    seen, own, trained = {*here}, 0, 0
    for each in here.values():
        new = each.parameters - each.tied * (each.tied_to in seen)
        seen.add(each.tied_to)
        own, trained = own + new, trained + max(0, new - each.frozen)
    return own, trained


# ----------------------------------------------------------------------------- ways to run it


class Need(NamedTuple):
    """Bytes on a GPU at its fullest moment."""

    gpu: int
    weights: float
    gradients: float
    optimizer: float
    stash: float  # older versions of the weights
    activations: float  # of microbatches in flight
    working: float  # more, while a layer runs

    @property
    def total(self) -> float:
        return sum(self[1:])


class Way(NamedTuple):
    """A schedule: the memory that its fullest GPU takes, and the time of a batch."""

    name: str
    needs: dict[str, Need]  # by the kind of recompute
    times: dict[str, float]

    @property
    def time(self) -> float:
        return self.times["none"]


def ways_to_run(
    config: dict, layers: list[Measured], ends: tuple[int, int]
) -> tuple[list[Way], list[str]]:
    """Every schedule; and the reasons why some are impossible."""
    gpus, number = config["gpus"], config["num_microbatches"]
    batches = {"num_microbatches": number, "batch_size": number, "num_batches": 2}
    one_each = {"num_microbatches": 1, "batch_size": 1, "num_batches": 2 * gpus}
    ways, reasons = list[Way](), list[str]()
    for name in PYTORCH if gpus > 1 else ["1f1b"]:
        settings: dict = {"schedule": name, **batches}
        if name == "pipedream 2BW":
            settings |= {"schedule": "pipedream", "vertical_sync": True, "num_batches": 3}
        elif name == "pipedream 2019":
            settings = {"schedule": "pipedream", **one_each}
        progress(f"simulating {name}" if gpus * number > 256 else "")
        try:
            ways.append(way_of(name, settings, config, layers, ends))
        except UserError as error:
            text = f"{name} is left out: {error}".replace("num_stages", "gpus")
            reasons.append(textwrap.fill(text, 80))
    progress("")
    if not ways:
        raise UserError(" ".join(reasons[0].split()))
    return ways, reasons


def way_of(name: str, settings: dict, config: dict, layers: list, ends: tuple) -> Way:
    sizes = {"num_stages": config["gpus"], "layers_per_stage": 2, "chunks_per_gpu": 2}
    plan = make_plan({**PLAN_CONFIG, **sizes, **settings})
    gpus = [sorted({op.stage for op in row}) for row in plan.schedule]
    stages = cut(config, layers, ends, gpus)
    needs = dict[str, Need]()
    for kind in RECOMPUTE:
        per_gpu = needs_of(plan, stages, kind, bytes_per_parameter(config))
        needs[kind] = max(per_gpu, key=lambda need: need.total)
    times = {kind: time_of_batch(plan, stages, kind != "none", config) for kind in RECOMPUTE[:2]}
    return Way(name, needs, {**times, "stage": times["layer"]})  # that runs the same again


def time_of_batch(plan: Plan, stages: list[StageCost], again: bool, config: dict) -> float:
    """The time that the second batch adds, or of pipedream, that one takes in a full pipeline.

    In units of what the FLOPs take if every GPU has as many and is never idle.
    """
    times: dict = {kind: [stage.flops[kind] for stage in stages] for kind in "FIW"}
    if again:
        times["I"] = [f + i for f, i in zip(times["F"], times["I"], strict=True)]
    times["B"] = [i + w for i, w in zip(times["I"], times["W"], strict=True)]
    whole = sum(sum(stage.flops.values()) for stage in stages) / len(plan.schedule)
    if plan.config["schedule"] == "pipedream":  # then its slowest GPU is never idle
        return max(f + b for f, b in zip(times["F"], times["B"], strict=True)) / whole
    events, _ = run_rows(plan.schedule, plan.config, plan.pairs, {**times, "U": [0] * len(stages)})
    number = config["num_microbatches"]
    ends = [max(e.end for e in events if e.op.microbatch // number == batch) for batch in (0, 1)]
    return (ends[1] - ends[0]) / (whole * number)


def needs_of(
    plan: Plan, stages: list[StageCost], kind: str, per_parameter: tuple[int, int, int]
) -> Iterator[Need]:
    """Of each GPU."""
    versions_of = peak_versions(plan.schedule)
    for gpu, (row, versions) in enumerate(zip(plan.schedule, versions_of, strict=True)):
        own, trained = parameters_on([stages[stage] for stage in {op.stage for op in row}])
        weights, gradients, optimizer = (
            number * each
            for number, each in zip((own, trained, trained), per_parameter, strict=True)
        )
        held = [stage.activations[kind] for stage in stages]
        halved = [stage.activations["none"].whole for stage in stages]
        activations, working = fullest_moment(row, held, halved)
        yield Need(
            gpu, weights, gradients, optimizer, weights * (versions - 1), activations, working
        )


def fullest_moment(row: list[Op], held: list[Activations], halved: list[int]) -> tuple[int, int]:
    """Bytes of microbatches, and of the layer that runs, when there are most of both.

    A microbatch waits from its F on, and is whole in its B. From its I until its W it is halved:
    all layers have run again, and W needs what all of them kept.
    """
    now, most = 0, (0, 0)
    for stage, kind, *_ in row:
        waiting, whole, working = held[stage]
        if kind == "U":
            continue
        now += {"B": -waiting, "I": halved[stage] - waiting}.get(kind, 0)
        there = now + (whole if kind in "FB" else 0)
        most = max(most, (there, working), key=sum)
        now += {"F": waiting, "W": -halved[stage]}.get(kind, 0)
    return most


# ------------------------------------------------------------------------------------- advice


def advise(config: dict, ways: list[Way], whole: float) -> list[str]:
    """Which way to take, what it needs, and what weight versions cost."""
    found = [(way, kind) for way in ways for kind in RECOMPUTE]
    fitting = [(w, kind) for w, kind in found if w.needs[kind].total <= config["memory"]]
    if config["gpus"] == 1 and fitting:
        return ["It fits on one GPU: no pipeline."]
    text = describe_fastest(config, fitting) if fitting else what_is_missing(config, found)
    stashing = describe_stashing(ways, whole) if ways[-1].name == "pipedream 2019" else ""
    return [text, stashing] if config["gpus"] > 1 and stashing else [text]


def what_is_missing(config: dict, found: list[tuple[Way, str]]) -> str:
    way, kind = min(found, key=lambda each: each[0].needs[each[1]].total)
    need = way.needs[kind]
    alone = "Without recompute, it" if kind == "none" else f"With recompute per {kind}, it"
    what = named(way, kind) if config["gpus"] > 1 else alone
    text = f"Nothing fits. {what} needs the least, {need.total / 1e9:.1f} GB. Use"
    if (config["microbatch_size"] or 1) > 1 and need.activations + need.working > need.optimizer:
        return text + " smaller microbatches (--microbatch_size 1), or more GPUs."
    return text + " more GPUs, as stages, or as replicas that divide the optimizer's state (ZeRO)."


def named(way: Way, kind: str) -> str:
    return way.name + ("" if kind == "none" else f" with recompute per {kind}")


def describe_fastest(config: dict, fitting: list[tuple[Way, str]]) -> str:
    """Of two that are as fast, the one with fresh gradients; then the one that needs less."""

    def rank(each: tuple[Way, str]) -> tuple[float, bool, float]:
        way, kind = each
        return round(way.times[kind], 2), "pipedream" in way.name, way.needs[kind].total

    fitting = sorted(fitting, key=rank)
    best, kind = fitting[0]
    fresh = next((each for each in fitting if "pipedream" not in each[0].name), None)
    text = f"{named(best, kind)} is the fastest of these that fits{in_pytorch(best)}"
    if "pipedream" in best.name:
        age = f"up to {config['gpus'] - 1} updates" if "2019" in best.name else "one batch"
        text += f", but its gradients are {age} old"
        if fresh:
            longer = f"{fresh[0].times[fresh[1]] / best.times[kind] - 1:.0%} longer"
            text += f". With fresh gradients: {named(*fresh)}{in_pytorch(fresh[0])}, {longer}"
    gpu, *sizes = best.needs[kind]
    parts = (f"{name} {each / 1e9:.1f}" for name, each in zip(Need._fields[1:], sizes, strict=True))
    return f"{text}. On GPU{gpu}, the fullest, in GB: {', '.join(parts)}."


def in_pytorch(way: Way) -> str:
    name = PYTORCH[way.name]
    return " (PyTorch has no schedule for it)" if name == "-" else f" (PyTorch: Schedule{name})"


def describe_stashing(ways: list[Way], whole: float) -> str:
    """whole: bytes of the weights of all layers."""
    needs = {way.name: way.needs["none"] for way in ways}
    paper, two_versions = needs["pipedream 2019"], needs.get("pipedream 2BW")
    versions = (paper.weights + paper.stash) / 1e9
    text = f"On GPU{paper.gpu} the weight versions of PipeDream (2019) take {versions:.1f} GB; "
    text += f"the weights of the whole network take {whole / 1e9:.1f} GB."
    if two_versions:
        text += f" 2BW adds {two_versions.stash / 1e9:.1f} GB of weights"
        text += f" to {two_versions.optimizer / 1e9:.1f} GB of the optimizer's state."
    return text
