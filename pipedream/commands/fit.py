"""Does my transformer fit on these GPUs? How fast is it?

    python -m pipedream fit                      Llama 2 7B on 8 GPUs of 80 GB, with Adam
    python -m pipedream fit --model llama-2-70b --gpus 16 --memory 141e9

One stage per GPU, or two; activations as in Korthikanti et al. 2022.
"""

import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple

from pipedream.backstage.measures import peak_versions
from pipedream.planning import footprint
from pipedream.planning.footprint import Memory, count_parameters
from pipedream.schedules.plans import PLAN_CONFIG, Plan, make_plan, run_rows
from pipedream_simple import UserError, check_value, count, format_table, makespan

KEYS = {
    "model": "llama-2-7b",  # or llama-2-70b
    "layers": None,  # the model's, unless given; so are the next six
    "hidden_size": None,  # numbers per token between two layers
    "heads": None,  # of attention
    "kv_heads": None,  # fewer of them for keys and values
    "ffn": None,  # hidden size of the MLP
    "vocabulary": None,  # tokens that there are
    "sequence": None,  # tokens in a sequence
    "gpus": 8,  # one stage each, or two
    "num_microbatches": 32,  # per batch
    "microbatch_size": 1,  # sequences
    "precision": "bf16",  # or fp32
    "optimizer": "adam",  # or sgd, momentum
    "flash_attention": True,  # False: the matrices of attention are kept
    "memory": 80e9,  # bytes of a GPU
}
FIT_RULES: dict[str, Any] = {
    **{"model": footprint.PRESETS, "precision": footprint.PRECISION},
    **{"optimizer": footprint.STATE_BYTES, "flash_attention": [True, False]},
    **dict.fromkeys([*footprint.NETWORK, "microbatch_size"], (int, 1, 10_000_000)),
    **{"gpus": (int, 1, 256), "num_microbatches": (int, 1, 1024), "memory": (float, 1, 1e18)},
}

PYTORCH = {  # schedule -> its class in torch.distributed.pipelining; it has no other of these
    "gpipe": "ScheduleGPipe",
    "1f1b": "Schedule1F1B",
    "zb-h1": "ScheduleInterleavedZeroBubble with one stage per GPU",
    "zb-h2": "",
    "zb-v": "ScheduleZBVZeroBubble",
    "dualpipe-v": "ScheduleDualPipeV",
    "interleaved": "ScheduleInterleaved1F1B",
    "interleaved-zb": "ScheduleInterleavedZeroBubble",
    "looped-bfs": "ScheduleLoopedBFS",
}
PARTS = ["weights", "grads", "optim.", "stash", "activ."]
LEGEND = """\
   GB on the GPU that needs most. +: fits into {:g} GB. time: of a batch; 1.00
   would be equal stages, never idle, without recompute. Of pipedream, once the
   pipeline is full. The products of attention itself are not counted. 2019: as
   in the paper, with an update per microbatch; the others have one per batch.
   From zb-v to looped-bfs: two stages per GPU; of zb-v and dualpipe-v GPU0 has
   embedding and head. Links are free here, so twice the messages cost nothing,
   and dualpipe-v, which overlaps ops to hide them, gains nothing. Recompute is
   listed where it saves memory.
"""


def main(config: dict) -> None:
    check_fit(config)
    net = footprint.complete(config)
    ways, reasons = ways_to_run(net)
    print(describe_request(net), *format_table(table_of(ways, net["memory"])), *reasons, sep="\n")
    print(LEGEND.format(net["memory"] / 1e9))
    print(*(textwrap.fill(text, 80) for text in advise(net, ways)), sep="\n")


def check_fit(config: dict) -> None:
    """Raise a UserError for the first wrong value."""
    for key, value in config.items():
        if value is not None:
            check_value(key, value, FIT_RULES[key])
    net = footprint.complete(config)
    for key, divisor in (("hidden_size", "heads"), ("heads", "kv_heads")):
        if net[key] % net[divisor]:
            raise UserError(f"{key}={net[key]} must be a multiple of {divisor}={net[divisor]}")
    if net["gpus"] * net["num_microbatches"] > 16_384:
        sizes = f"gpus={net['gpus']} * num_microbatches={net['num_microbatches']}"
        raise UserError(f"{sizes} must be at most 16,384")
    if net["layers"] < net["gpus"]:
        raise UserError(f"layers={net['layers']} cannot be cut into gpus={net['gpus']} stages")


def describe_request(net: dict) -> str:
    of_layer, embedding = count_parameters(net)
    parameters = net["layers"] * of_layer + 2 * embedding + net["hidden_size"]
    batch = f"{count(net['num_microbatches'], 'microbatch')} of {net['microbatch_size']}"
    return (
        f"{net['model']}, {parameters / 1e9:.2f} billion parameters, on {count(net['gpus'], 'GPU')}"
        f":\n{count(net['layers'], 'layer')}, {net['precision']}, {net['optimizer']}, "
        f"{batch} x {net['sequence']:,} tokens.\n"
    )


def table_of(ways: list["Way"], memory: float) -> list[list[str]]:
    table = [["", *PARTS, "in all", "time"]]
    for way in ways:
        cells = [f"{part / 1e9:.1f}" for part in (*way.fullest, way.needs)]
        fits = "+" if way.needs <= memory else " "
        table.append([f"{fits} {way.name}".replace(" with ", ", "), *cells, f"{way.time:.2f}"])
    return table


# ----------------------------------------------------------------------------- ways to run it


class Way(NamedTuple):
    """A schedule, with or without recompute: the memory that it takes, and the time."""

    name: str
    gpus: list[Memory]  # each at its fullest
    time: float  # of a batch: 1 with no idle GPU and no recompute

    @property
    def fullest(self) -> Memory:
        return max(self.gpus, key=sum)

    @property
    def needs(self) -> float:
        """Bytes on the fullest GPU."""
        return sum(self.fullest)


def ways_to_run(net: dict) -> tuple[list[Way], list[str]]:
    """Every schedule, without and with recompute; and the reasons why some are impossible."""
    gpus, number = net["gpus"], net["num_microbatches"]
    batches = {"num_microbatches": number, "batch_size": number, "num_batches": 2}
    one_each = {"num_microbatches": 1, "batch_size": 1, "num_batches": 2 * gpus}
    ways = {name: {"schedule": name, **batches} for name in PYTORCH}
    if number >= gpus - 1:  # or it has more than two. (ICML 2021, section 3.1, asks for one more)
        two_versions = {"schedule": "pipedream", "vertical_sync": True}
        ways["pipedream 2BW"] = {**batches, "num_batches": 3, **two_versions}
    ways["pipedream 2019"] = {"schedule": "pipedream", **one_each}
    found, reasons = list[Way](), list[str]()
    for name, settings in ways.items():
        try:
            plans = [*plans_of(net, settings)]
        except UserError as error:
            text = f"{name} is left out: {error}".replace("num_stages", "gpus")
            reasons.append(textwrap.fill(text, 80))
            continue
        for plan in plans:
            way = Way(name, [*memory_at_most(net, plan)], time_of_batch(plan, number))
            if not plan.config["recompute"]:
                found.append(way)
            elif way.needs < found[-1].needs:
                found.append(way._replace(name=f"{name} with recompute"))
    return found, reasons


def plans_of(net: dict, settings: dict) -> Iterator[Plan]:
    """Without and with recompute; with a time for each stage: only the last one has the head."""
    cut = {"num_stages": net["gpus"], "layers_per_stage": 2, "chunks_per_gpu": 2}
    plan = make_plan({**PLAN_CONFIG, **cut, **settings})
    stages = plan.config["num_stages"]
    if stages > net["layers"]:
        raise UserError(f"layers={net['layers']} cannot be cut into {stages} stages")
    for recompute in (False, True):
        times = times_of_stages({**net, "stages": stages})
        config = {**plan.config, **times, "recompute": recompute}
        events, _ = run_rows(plan.schedule, config, plan.pairs)
        yield plan._replace(config=config, events=events)


def times_of_stages(net: dict) -> dict[str, list[float]]:
    """A forward of all stages takes as many units as there are GPUs; a backward twice as long.

    A stage takes time for its layers' weights, the last one also for the head's.
    """
    of_layer, head = count_parameters(net)
    work = [footprint.layers_in_stage(net, stage) * of_layer for stage in range(net["stages"])]
    work[-1] += head
    forward = [each * net["gpus"] / sum(work) for each in work]
    return {"forward_time": forward, "backward_time": [2 * time for time in forward]}


def time_of_batch(plan: Plan, num_microbatches: int) -> float:
    """The time that the second batch adds, or of pipedream, that one takes in a full pipeline."""
    if plan.config["schedule"] == "pipedream":  # then its slowest GPU is never idle
        return max(plan.config["forward_time"]) * (4 if plan.config["recompute"] else 3) / 3
    first = max(event.end for event in plan.events if event.op.microbatch < num_microbatches)
    return (makespan(plan.events) - first) / (3 * num_microbatches)


def memory_at_most(net: dict, plan: Plan) -> Iterator[Memory]:
    """Of each GPU, at the op at which it holds the most."""
    cut = {**net, "stages": plan.config["num_stages"]}
    for row, versions in zip(plan.schedule, peak_versions(plan.schedule), strict=True):
        held = {*footprint.microbatches_held(row, plan.config["recompute"])}
        yield max((footprint.memory_of_gpu(cut, versions, each) for each in held), key=sum)


# ------------------------------------------------------------------------------------- advice


def advise(net: dict, ways: list[Way]) -> list[str]:
    """Which way to take, and what the weight versions cost next to the optimizer's state."""
    fitting = [way for way in ways if way.needs <= net["memory"]]
    if net["gpus"] == 1 and fitting:
        return ["It fits on one GPU: no pipeline."]
    text = describe_fastest(net, fitting) if fitting else what_is_missing(net, ways)
    return [text] if net["gpus"] == 1 else [text, describe_stashing(ways)]


def what_is_missing(net: dict, ways: list[Way]) -> str:
    least = min(ways, key=lambda way: way.needs)
    text = f"Nothing fits. {least.name} needs the least, {least.needs / 1e9:.1f} GB. Use"
    if net["microbatch_size"] > 1 and least.fullest.activations > least.fullest.optimizer:
        return text + " smaller microbatches (--microbatch_size 1), or more GPUs."
    return text + " more GPUs, as stages, or as replicas that divide the optimizer's state (ZeRO)."


def describe_fastest(net: dict, fitting: list[Way]) -> str:
    """Of two that are as fast, the one with fresh gradients; then the one that needs less."""
    fitting = sorted(fitting, key=lambda w: (round(w.time, 3), "pipedream" in w.name, w.needs))
    best, fresh = fitting[0], next((w for w in fitting if "pipedream" not in w.name), None)
    text = f"{best.name} is the fastest of these that fits{in_pytorch(best)}"
    if best is not fresh:
        age = f"up to {net['gpus'] - 1} updates" if "2019" in best.name else "one batch"
        text += f", but its gradients are {age} old"
        if fresh:
            slower = f", {fresh.time / best.time - 1:.0%} longer per batch"
            text += f". With fresh gradients: {fresh.name}{in_pytorch(fresh)}{slower}"
    return text + "."


def in_pytorch(way: Way) -> str:
    name = PYTORCH.get(way.name.removesuffix(" with recompute"))
    return f" (PyTorch: {name})" if name else " (PyTorch has no schedule for it)"


def describe_stashing(ways: list[Way]) -> str:
    gpus_of = {way.name: way.gpus for way in ways}
    paper, two_versions = gpus_of["pipedream 2019"], gpus_of.get("pipedream 2BW")
    versions, whole = paper[0].weights + paper[0].stash, sum(gpu.weights for gpu in paper)
    text = f"On GPU0 the weight versions of PipeDream (2019) take {versions / 1e9:.1f} GB; "
    text += f"the weights of the whole network take {whole / 1e9:.1f} GB."
    if two_versions:
        text += f" 2BW adds {two_versions[0].stash / 1e9:.1f} GB of weights"
        text += f" to {paper[0].optimizer / 1e9:.1f} GB of the optimizer's state."
    return text
