#!/usr/bin/env python3
"""Does my transformer fit on these GPUs? With which schedule, and how fast is it?

    python pipedream_fit.py                      Llama 2 7B on 8 GPUs of 80 GB, with Adam
    python pipedream_fit.py --model llama-2-70b --gpus 16 --memory 141e9

`python pipedream_planner.py fit` is the same. Each key of FIT below is also a flag.
"""

import inspect
import signal
import sys
import textwrap
from collections.abc import Iterator

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during a slow import: no traceback

from pipedream_lab import LAB_CONFIG, make_plan
from pipedream_simple import (
    Op,
    Schedule,
    UserError,
    check_value,
    count,
    format_table,
    makespan,
    parse_config,
    peak_versions,
    run_main,
    shown,
)

NETWORK = ["layers", "hidden_size", "heads", "kv_heads", "ffn", "vocabulary", "sequence"]
PRESETS = {  # Touvron et al. 2023 (arXiv 2307.09288), and the models' own configuration files
    "llama-2-7b": (32, 4096, 32, 32, 11_008, 32_000, 4096),
    "llama-2-70b": (80, 8192, 64, 8, 28_672, 32_000, 4096),
}
PRECISION = {"bf16": (2, 4), "fp32": (4, 0)}  # bytes of a number, and of the optimizer's copy
OPTIMIZER = {"sgd": 0, "momentum": 4, "adam": 8}  # bytes per parameter, next to that copy
FIT = {
    "model": "llama-2-7b",
    **dict.fromkeys(NETWORK),  # as in the model, unless given
    "gpus": 8,  # one stage each
    "num_microbatches": 32,
    "microbatch_size": 1,  # sequences
    "precision": "bf16",
    "optimizer": "adam",
    "flash_attention": True,  # False: the matrices of attention are kept
    "memory": 80e9,  # bytes of a GPU
}
FIT_RULES = {
    **dict.fromkeys([*NETWORK, "microbatch_size"], (int, 1, 10_000_000)),
    **{"gpus": (int, 1, 256), "num_microbatches": (int, 1, 1024)},
    **{"flash_attention": (bool,), "memory": (float, 1, 1e18)},
}
CHOICES: dict[str, dict] = {"model": PRESETS, "precision": PRECISION, "optimizer": OPTIMIZER}


def check_fit(config: dict) -> None:
    """Raise a UserError for the first wrong value."""
    for key, value in config.items():
        if key in CHOICES and value not in [*CHOICES[key]]:  # a list cannot be looked up
            raise UserError(f"{key}={shown(value)} must be one of {', '.join(CHOICES[key])}")
        if key in FIT_RULES and value is not None:
            check_value(key, value, FIT_RULES[key])
    net = complete(config)
    for key, divisor in (("hidden_size", "heads"), ("heads", "kv_heads")):
        if net[key] % net[divisor]:
            raise UserError(f"{key}={net[key]} must be a multiple of {divisor}={net[divisor]}")
    if net["gpus"] * net["num_microbatches"] > 16_384:
        sizes = f"gpus={net['gpus']} * num_microbatches={net['num_microbatches']}"
        raise UserError(f"{sizes} must be at most 16,384")
    if net["layers"] < net["gpus"]:
        raise UserError(f"layers={net['layers']} cannot be cut into gpus={net['gpus']} stages")


def complete(config: dict) -> dict:
    """The config with its model's numbers where none are given."""
    preset = dict(zip(NETWORK, PRESETS[config["model"]], strict=True))
    return {k: preset[k] if value is None else value for k, value in config.items()}


def count_parameters(net: dict) -> tuple[int, int]:
    """Of a layer of Llama 2, and of the embedding; the head has as many, and a norm.

    Queries, keys, values and the projection after them; an MLP of three matrices; two norms.
    """
    h, keys = net["hidden_size"], net["hidden_size"] // net["heads"] * net["kv_heads"]
    return 2 * h * h + 2 * h * keys + 3 * h * net["ffn"] + 2 * h, net["vocabulary"] * h


def count_activations(h: int, heads: int, kv_heads: int, ffn: int, mlp: int = 4) -> int:
    """Numbers that a layer keeps per token, from its forward to its backward.

    Input and output of two norms, queries, output of attention; keys and values; a scale per norm
    and its mean, and one per head. The MLP keeps its hidden size mlp times: 1 with ReLU, 2 with
    GELU, 4 with SwiGLU. Korthikanti et al. 2022 (arXiv 2205.05198), section 4.1, counts 34 h bytes
    with GELU and ffn = 4 h: these 2 (8 h + 2 * 4 h), and 2 h of dropout, which is left out here.
    """
    return 6 * h + 2 * (h // heads) * kv_heads + mlp * ffn + 4 + heads


def layers_of(net: dict, stage: int) -> int:
    """As even as possible; where it is not, the first stages have one more."""
    return net["layers"] // net["gpus"] + (stage < net["layers"] % net["gpus"])


def microbatches_held(row: list[Op], recompute: bool) -> Iterator[tuple[int, int]]:
    """During each op of a row: microbatches of which the input is kept, and all activations.

    Without recompute a microbatch has all of them from its F to its B, or its W. With recompute
    only its input, until its B or I runs the forward again.
    """
    inputs = whole = 0
    for op in row:
        if op.kind == "F":
            inputs, whole = inputs + recompute, whole + (not recompute)
        elif recompute and op.kind in ("B", "I"):
            inputs, whole = inputs - 1, whole + 1
        yield inputs, whole
        whole -= op.kind in ("B", "W")


def memory_of(net: dict, stage: int, versions: int, inputs: int, whole: int) -> list[float]:
    """Bytes on a stage's GPU: weights, gradients, optimizer, stashed weights, activations.

    inputs and whole: microbatches of which it keeps the input, and all activations.
    """
    last, tokens = net["gpus"] - 1, net["microbatch_size"] * net["sequence"]
    of_layer, embedding = count_parameters(net)
    parameters = layers_of(net, stage) * of_layer
    parameters += embedding * ((stage == 0) + (stage == last))
    parameters += net["hidden_size"] * (stage == last)
    size, fp32_copy = PRECISION[net["precision"]]
    sizes = [net[key] for key in ("hidden_size", "heads", "kv_heads", "ffn")]
    of_token = count_activations(*sizes)
    if not net["flash_attention"]:  # the softmax; same section
        of_token += net["sequence"] * net["heads"]
    kept = size * layers_of(net, stage) * tokens * of_token
    kept += 4 * tokens * net["vocabulary"] * (stage == last)  # for the loss, in fp32
    activations = inputs * size * tokens * net["hidden_size"] + whole * kept
    per_parameter = size, size, fp32_copy + OPTIMIZER[net["optimizer"]], size * (versions - 1)
    return [*(parameters * each for each in per_parameter), activations]


def ways_to_run(net: dict) -> Iterator[tuple[str, Schedule, bool, float]]:
    """Name, rows, recompute, and the time of a batch: 1 with no idle GPU and no recompute.

    A stage takes time for its layers' weights, the last one also for the head's; a backward takes
    twice as long as a forward. Where batches overlap, it is the time that the second one adds.
    """
    gpus, number = net["gpus"], net["num_microbatches"]
    of_layer, head = count_parameters(net)
    work = [layers_of(net, stage) * of_layer + head * (stage == gpus - 1) for stage in range(gpus)]
    forward = [each * gpus / sum(work) for each in work]
    flush = {"num_stages": gpus, "num_microbatches": number, "batch_size": number, "num_batches": 2}
    two_versions = {**flush, "num_batches": 3, "vertical_sync": True}
    paper = {**flush, "num_microbatches": 1, "batch_size": 1, "num_batches": 2 * gpus}
    for name, schedule, settings in (
        ("gpipe", "gpipe", flush),
        ("1f1b", "1f1b", flush),
        ("zb-h1", "zb-h1", flush),
        ("zb-h2", "zb-h2", flush),
        ("pipedream 2BW", "pipedream", two_versions),
        ("pipedream 2019", "pipedream", paper),
    ):
        if settings is two_versions and number < gpus - 1:
            continue  # more than two versions. (ICML 2021, section 3.1, asks for one more)
        for recompute in (False, True):
            times = {"forward_time": forward, "backward_time": [2 * time for time in forward]}
            settings = {**settings, "schedule": schedule, "recompute": recompute}
            plan = make_plan({**LAB_CONFIG, **settings, **times})
            if schedule == "pipedream":  # once the pipeline is full, its slowest GPU is never idle
                time = max(forward) * (4 if recompute else 3) / 3
            else:
                first = max(event.end for event in plan.events if event.op.microbatch < number)
                time = (makespan(plan.events) - first) / (3 * number)
            yield name + ", recompute" * recompute, plan.schedule, recompute, time


PARTS = ["weights", "grads", "optim.", "stash", "activ."]


def fit(config: dict) -> None:
    """Does a transformer fit on these GPUs? With which schedule, and how fast is it?

    One stage per GPU; activations as in Korthikanti et al. 2022. Each key below is a flag; sizes
    default to the model's.
    """
    net = complete(config)
    of_layer, embedding = count_parameters(net)
    parameters = net["layers"] * of_layer + 2 * embedding + net["hidden_size"]
    ways: dict[str, tuple[list[list[float]], float]] = {}
    rows = [["", *PARTS, "in all", "time"]]
    for name, schedule, recompute, time in ways_to_run(net):
        gpus = []
        for gpu, (row, versions) in enumerate(zip(schedule, peak_versions(schedule), strict=True)):
            held = {*microbatches_held(row, recompute)}
            gpus.append(max((memory_of(net, gpu, versions, *pair) for pair in held), key=sum))
        ways[name], fullest = (gpus, time), max(gpus, key=sum)
        fits = "+" if sum(fullest) <= net["memory"] else " "
        cells = [f"{part / 1e9:.1f}" for part in (*fullest, sum(fullest))]
        rows.append([f"{fits} {name}", *cells, f"{time:.2f}"])
    print(
        f"{net['model']}, {parameters / 1e9:.2f} billion parameters, on {count(net['gpus'], 'GPU')}"
        f":\n{count(net['layers'], 'layer')}, {net['precision']}, {net['optimizer']}, "
        f"{count(net['num_microbatches'], 'microbatch')} of {net['microbatch_size']} x "
        f"{net['sequence']:,} tokens.\n",
        *format_table(rows),
        FIT_LEGEND.format(net["memory"] / 1e9),
        *(textwrap.fill(text, 80) for text in advise(net, ways)),
        sep="\n",
    )


FIT_LEGEND = """\
   GB on the GPU that needs most. +: fits into {:g} GB. time: of a batch; 1.00
   would be equal stages, never idle, without recompute. Of pipedream, once the
   pipeline is full. The products of attention itself are not counted. 2019: as
   in the paper, with an update per microbatch; the others have one per batch.
   Interleaved schedules are not listed.
"""


def in_words(name: str) -> str:
    return name.replace(", ", " with ")


def advise(net: dict, ways: dict[str, tuple[list[list[float]], float]]) -> list[str]:
    """Which way to take, and what the weight versions cost next to the optimizer's state."""
    most = {name: max(map(sum, gpus)) for name, (gpus, _) in ways.items()}
    fitting = [name for name in ways if most[name] <= net["memory"]]
    least = min(most, key=lambda name: most[name])

    def order(name: str) -> tuple:  # of two that are as fast, the one with fresh gradients
        return round(ways[name][1], 3), "pipedream" in name, most[name]

    if not fitting:
        *_, optimizer, _, activations = max(ways[least][0], key=sum)
        text = f"Nothing fits. {in_words(least)} needs the least, {most[least] / 1e9:.1f} GB. Use"
        if net["microbatch_size"] > 1 and activations > optimizer:
            text += " smaller microbatches (--microbatch_size 1), or more GPUs."
        else:
            text += " more GPUs, as stages, or as replicas that divide the optimizer's state"
            text += " (ZeRO)."
    elif net["gpus"] == 1:
        text = "It fits on one GPU: no pipeline."
    else:
        best = min(fitting, key=order)
        text = f"{in_words(best)} is the fastest of these that fits"
        fresh = [name for name in fitting if "pipedream" not in name]
        if "pipedream" in best:
            age = f"up to {net['gpus'] - 1} updates" if "2019" in best else "one batch"
            text += f", but its gradients are {age} old"
            if fresh:
                sgd = min(fresh, key=order)
                slower = ways[sgd][1] / ways[best][1] - 1
                text += f". With fresh gradients: {in_words(sgd)}, {slower:.0%} longer per batch"
        text += "."
    if net["gpus"] == 1:
        return [text]
    weights, _, optimizer, stash, _ = ways["pipedream 2019"][0][0]
    whole = sum(gpu[0] for gpu in ways["pipedream 2019"][0])
    stashing = f"On GPU0 the weight versions of PipeDream (2019) take {(weights + stash) / 1e9:.1f}"
    stashing += f" GB; the weights of the whole network take {whole / 1e9:.1f} GB."
    if "pipedream 2BW" in ways:
        second = ways["pipedream 2BW"][0][0][3]
        stashing += f" 2BW adds {second / 1e9:.1f} GB of weights"
        stashing += f" to {optimizer / 1e9:.1f} GB of the optimizer's state."
    return [text, stashing]


# --------------------------------------------------------------------------------------- main


def describe(doc: str | None) -> str:
    """A text for --help, with all keys."""
    lines = [inspect.cleandoc(doc or ""), ""]
    for key, value in FIT.items():
        rest = ", ".join(choice for choice in CHOICES.get(key, ()) if choice != value)
        default = "the model's" if value is None else "80e9" if value == 80e9 else value
        lines.append(f"    --{key} {default}" + f"  (or {rest})" * bool(rest))
    return "\n".join(lines)


def main() -> None:
    config, _ = parse_config(describe(__doc__), config=FIT, check=check_fit)
    fit(config)


if __name__ == "__main__":
    sys.exit(run_main(main))
