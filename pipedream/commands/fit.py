"""Does my model fit on these GPUs? How should they divide it?

    python -m pipedream fit                          Llama 2 7B on 8 GPUs of 80 GB, with Adam
    python -m pipedream fit llama-3-70b --gpus 16 --memory 141e9
    python -m pipedream fit config.json              a public model's own file
    python -m pipedream fit my_model.py              a file with LAYERS and my_batch
    python -m pipedream fit --replicas 8 --zero 1    the same GPUs, divided as you like

Every layer runs once on shapes without values: nothing is downloaded, and no GPU is needed. Memory
follows from what layers keep and from the rows of the schedules; times are FLOPs, simulated. The
table is of a pipeline over all GPUs, or of the groups that you give; below it is the advice.
"""

import contextlib
import math
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from pipedream.backstage.text import progress
from pipedream.planning.decide import SIMPLEST, Case, Found, choose, enough_gpus, refused, walk
from pipedream.planning.layouts import (
    MOST_SIMULATED,
    NO_PIPELINE,
    Layout,
    Need,
    Sizes,
    Way,
    gigabytes,
    way_of,
)
from pipedream.planning.measuring import Measured, all_parameters, measure_layers
from pipedream.planning.models import Model, load_model
from pipedream_simple import UserError, check_value, count, format_table

FLAGS = {"[MODEL]": "a config.json, a .py file, or a known model"}
KEYS = {
    "gpus": 8,  # all of them
    "memory": 80e9,  # bytes of a GPU
    "machine": 8,  # GPUs that fast links join
    "replicas": 1,  # copies of a pipeline of gpus / (replicas * tensor) stages
    "tensor": 1,  # GPUs that share each layer, with sequence parallelism
    "zero": 0,  # 1: replicas divide the optimizer's state; 2: and gradients; 3: and weights
    "num_microbatches": 32,  # per batch, shared by replicas: more of these, and bubbles are larger
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
    **dict.fromkeys(("machine", "replicas", "tensor"), (int, 1, 256)),
    "zero": (int, 0, 3),
    **dict.fromkeys(("microbatch_size", "sequence", "layers"), (int, 1, 10_000_000)),
    **{"precision": PRECISION, "gradients": ["fp32", "bf16"], "optimizer": STATE_BYTES},
    "even": [True, False],
}
MOST = {("gpus", "num_microbatches"): MOST_SIMULATED, ("microbatch_size", "sequence"): 10_000_000}
MAY_BE_NONE = "microbatch_size", "sequence", "layers"
GROUPS = "replicas", "tensor", "zero"

PYTORCH = {  # schedule -> Schedule... of torch.distributed.pipelining; -: it has none
    **{"gpipe": "GPipe", "1f1b": "1F1B", "zb-h1": "InterleavedZeroBubble", "zb-h2": "-"},
    **{"zb-v": "ZBVZeroBubble", "dualpipe-v": "DualPipeV", "interleaved": "Interleaved1F1B"},
    **{"looped-bfs": "LoopedBFS", "interleaved-zb": "InterleavedZeroBubble"},
    **{"pipedream 2BW": "-", "pipedream 2019": "-"},
}
NOTHING = "Answer: nothing fits. Without --replicas, --tensor and --zero, fit looks for more."
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
    costs, layout = Costs(config, str(model)), layout_of(config)
    given, heads = any(config[key] != KEYS[key] for key in GROUPS), costs.model.heads
    if heads > 1 and heads % layout.tensor:
        raise UserError(f"tensor={layout.tensor} must divide the {heads} heads of attention")
    request = describe_request(config, costs.model, costs.layers(layout.microbatches))
    try:
        table = describe_ways(config, costs, layout, given)
    except UserError as error:
        if given:
            raise
        table = [textwrap.fill(f"No pipeline over all GPUs: {error}.", 80), ""]
    print(request, "", *table, sep="\n")
    for text in advise(config, costs, layout, given):
        print(textwrap.fill(text, 80, subsequent_indent="   "))


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
    replicas, tensor, zero = (config[key] for key in GROUPS)
    for key, number, why in (
        ("gpus", replicas * tensor, f"replicas={replicas} * tensor={tensor}"),
        ("num_microbatches", replicas, f"replicas={replicas}, which share them"),
    ):
        if config[key] % number:
            raise UserError(f"{key}={config[key]} must be a multiple of {why}")
    if zero and layout_of(config).shards == 1:
        what = f"zero={zero}, replicas={replicas}, machine={config['machine']}"
        rule = "replicas of 2 or more" if replicas == 1 else "equal groups inside a machine"
        raise UserError(f"{what}: it needs {rule}")


def layout_of(config: dict) -> Layout:
    replicas, tensor, zero = (config[key] for key in GROUPS)
    stages = config["gpus"] // (replicas * tensor)
    return Layout(replicas, tensor, stages, zero, config["machine"], config["num_microbatches"])


def bytes_per_parameter(config: dict) -> Sizes:
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


def describe_ways(config: dict, costs: "Costs", layout: Layout, given: bool) -> list[str]:
    """The table of all schedules, and how to read it."""
    ways, reasons = costs.ways(layout)
    heading = f"{layout}, {count(layout.each, 'microbatch')} each:"
    if not given:
        heading = f"{layout}: do you need one? See below." if layout.stages > 1 else f"{layout}:"
    legend = LEGEND.format(config["memory"] / 1e9, *bytes_per_parameter(config))
    text = [heading[0].upper() + heading[1:], ""]
    text += [*format_table(table_of(ways, config["memory"])), *reasons]
    text += [textwrap.fill(legend, 80, initial_indent="   ", subsequent_indent="   "), ""]
    if ways[-1].name == "pipedream 2019":
        whole = all_parameters(costs.layers(layout.microbatches)) * bytes_per_parameter(config)[0]
        text += [textwrap.fill(describe_stashing(ways, whole), 80), ""]
    return text


def table_of(ways: list[Way], memory: float) -> list[list[str]]:
    table = [["", "PyTorch", "time", "GB", "per layer", "per stage", "again"]]
    for name, needs, times, _ in ways:
        sums = [need.total for need in needs.values()]
        sizes = [gigabytes(each) + " +"[each <= memory] for each in sums]
        time, again = (f"{times[kind]:.2f}" for kind in ("none", "layer"))
        table.append([name, PYTORCH.get(name, "-"), time, *sizes, again])
    return table


# ------------------------------------------------------------------------------------- costs


class Costs:
    """What the layers cost, and what follows for a layout: each is counted once."""

    def __init__(self, config: dict, name: str):
        self.config, self.name, self.model = config, name, load_model(name, config)
        self.rows = len(self.model.input()) * config["num_microbatches"]  # of a batch
        self.measured, self.known = dict[int, list[Measured]](), dict[tuple[str, Layout], Way]()

    def layers(self, microbatches: int) -> list[Measured]:
        """Of a batch in so many microbatches."""
        if microbatches not in self.measured:
            model, dtype = self.model, PRECISION[self.config["precision"]][0]
            if microbatches != self.config["num_microbatches"]:
                sizes = {"microbatch_size": self.rows // microbatches}
                model = load_model(self.name, {**self.config, **sizes})
            progress(f"measuring {len(model.layers)} layers" if len(model.layers) > 100 else "")
            self.measured[microbatches] = measure_layers(model.layers, model.input, dtype)
        return self.measured[microbatches]

    def way(self, name: str, layout: Layout) -> Way:
        """UserError: why it is impossible."""
        if (name, layout) not in self.known:
            layers, sizes = self.layers(layout.microbatches), bytes_per_parameter(self.config)
            if layout.stages > len(layers):
                what = count(len(layers), "layer")
                raise UserError(f"{what} cannot be cut into {layout.stages} stages")
            progress(f"simulating {name}" if layout.stages * layout.each > 256 else "")
            more = self.model.ends, sizes, self.config["even"]
            self.known[name, layout] = way_of(name, layout, layers, *more)
        return self.known[name, layout]

    def ways(self, layout: Layout) -> tuple[list[Way], list[str]]:
        """Every schedule; and the reasons why some are impossible."""
        ways, reasons = list[Way](), list[str]()
        for name in PYTORCH if layout.stages > 1 else [NO_PIPELINE]:
            try:
                ways.append(self.way(name, layout))
            except UserError as error:
                text = f"{name} is left out: {error}".replace("num_stages", "stages")
                reasons.append(textwrap.fill(text, 80))
        progress("")
        if not ways:
            raise UserError(" ".join(reasons[0].split()).partition(": ")[2])
        return ways, reasons

    def need(self, layout: Layout, kind: str) -> float:
        """Bytes on the fullest GPU in 1F1B, or where PyTorch refuses that, in what needs least.

        Infinite where the layers cannot be cut so.
        """
        names = [name for name in SIMPLEST[1:] if not refused(name, layout.stages, layout.each)]
        least = math.inf
        for name in names[: 1 if "1f1b" in names else None]:
            with contextlib.suppress(UserError):
                least = min(least, self.way(name, layout).needs[kind].total)
        return least


# ------------------------------------------------------------------------------------- advice


def advise(config: dict, costs: Costs, layout: Layout, given: bool) -> Iterator[str]:
    """The steps of decide.py, up to the one that answers, and the answer."""
    gpus, number, memory = config["gpus"], config["num_microbatches"], config["memory"]
    most = max(number, min(1024, MOST_SIMULATED // gpus))
    batches = [
        number << n for n in range(11) if number << n <= most and costs.rows % (number << n) == 0
    ]
    case = Case(gpus, config["machine"], costs.model.heads, memory, batches, costs.need)
    if given:
        yield f"1 to 4 are skipped, as you gave the division: {layout}."
    else:
        said, found = walk(case)
        yield from said
        if not found.fits:
            yield what_is_missing(case, found)
            return
        layout = found.layout
    ways, _ = costs.ways(layout)
    said, best, kind = choose(ways, layout, memory)
    yield from said
    yield describe_answer(layout, best, kind) if best else NOTHING
    if best and (flags := flags_of(config, costs, layout)):
        yield f"To see it, add {flags}"


def what_is_missing(case: Case, found: Found) -> str:
    if found.need <= case.memory:
        number = found.layout.replicas
        return f"Answer: nothing fits. It would, with a multiple of {number} as num_microbatches."
    enough = enough_gpus(case)
    text = f"Answer: nothing fits. It takes {gigabytes(found.need)} GB at least, with recompute."
    return f"{text} {f'{enough} GPUs' if enough else 'Not even 256 GPUs'} would do."


def describe_answer(layout: Layout, best: Way, kind: str) -> str:
    (gpu, *sizes), sent = best.needs[kind], best.sent[kind]
    text = f"Answer: {layout}"
    text += f", {best.name} (PyTorch: Schedule{PYTORCH[best.name]})" if layout.stages > 1 else ""
    text += f", recompute per {kind}" * (kind != "none")
    text += f". GPU{gpu} holds {gigabytes(sum(sizes))} GB{in_gb(sizes, Need._fields[1:])}."
    if links := in_gb(sent, ("to replicas", "inside layers", "between stages")):
        text += f" A GPU sends {gigabytes(sum(sent))} GB per batch{links} (not in the time)."
    return text + " The layers that stage 3 gathers are not counted." * (layout.zero == 3)


def flags_of(config: dict, costs: Costs, layout: Layout) -> str:
    """What fit takes to show this layout."""
    flags = {"replicas": layout.replicas, "tensor": layout.tensor, "zero": layout.zero}
    if layout.microbatches != config["num_microbatches"]:
        flags["num_microbatches"] = layout.microbatches
        flags["microbatch_size"] = costs.rows // layout.microbatches
    return " ".join(f"--{key} {value}" for key, value in flags.items() if value != config[key])


def in_gb(sizes: Iterable[float], names: Iterable[str]) -> str:
    """A list of those that one can see."""
    named = zip(names, sizes, strict=True)
    text = ", ".join(f"{name} {gigabytes(size)}" for name, size in named if size)
    return f": {text}" if text else ""


def describe_stashing(ways: list[Way], whole: float) -> str:
    """whole: bytes of the weights of all layers."""
    needs = {way.name: way.needs["none"] for way in ways}
    paper, two_versions = needs["pipedream 2019"], needs.get("pipedream 2BW")
    versions = gigabytes(paper.weights + paper.stash)
    text = f"On GPU{paper.gpu} the weight versions of PipeDream (2019) take {versions} GB; "
    text += f"the weights of the whole network take {gigabytes(whole)} GB."
    if two_versions:
        text += f" 2BW adds {gigabytes(two_versions.stash)} GB of weights"
        text += f" to {gigabytes(two_versions.optimizer)} GB of the optimizer's state."
    return text
