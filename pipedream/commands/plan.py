"""Which cut is fastest, and how many GPUs for each stage?

    python -m pipedream plan my.csv --gpus 4 --bandwidth 1e9
    python -m pipedream plan my.csv --gpus 8 2 --bandwidth 3e10 3.125e9        on 2 machines

PROFILE is a CSV file, such as `profile` writes, or a file of PipeDream's profiler. The CSV file's
first line is layer,forward_ms,backward_ms,activation_bytes,weight_bytes,kept_bytes; the last
column, what a layer keeps for its backward, may be missing: then it is its output. PipeDream's
authors published their files at github.com/msr-fiddle/pipedream, for VGG-16
profiler/image_classification/profiles/vgg16/graph.txt.

A pipeline is as fast as its slowest stage. A slow stage may be cut again, or replicated: with R
replicas, each takes every R-th minibatch, and they add up their gradients (all-reduce), as in data
parallelism. `Plan: 15-1` is a stage on 15 GPUs and one on a single GPU; `Plan: 16` is data
parallelism. Paper: PipeDream (SOSP 2019).
"""

import math
import textwrap
from collections.abc import Iterator
from pathlib import Path

from pipedream.backstage.text import shorten
from pipedream.planning.decide import CLOSE
from pipedream.planning.profiles import Layer, read_profile, sent_after
from pipedream.planning.replicas import simulate_partition
from pipedream.planning.search import Partition, best_partition
from pipedream.planning.steps import Step, measured_rate, possible_steps
from pipedream_simple import UserError, check_value, count, format_table

FLAGS = {
    "PROFILE": "what the layers cost",
    "--gpus N ...": "GPUs; or GPUs per machine, machines",
    "--bandwidth B ...": "bytes per second of a GPU's link; then of a machine's",
    "--straight": "one GPU per stage, and a flush per batch",
    "--memory BYTES": "of each GPU",
    "--microbatches N": "per step, for the times of steps with --straight (8)",
}
TAKES = ""

TIMES = ["computing", "all-reduce", "transfer"]
LEGEND = """\
Milliseconds per {unit}. in all: computing and all-reduce, or transfer if that takes longer; * is
the slowest stage. held: {unit}es in flight on each GPU, at most. GB, on each GPU: {holds} """
KEPT_LEGEND = """\
what the layers keep for its backward, twice where two layers keep the same tensor. Gradients and
the optimizer's state come on top."""
OUTPUT_LEGEND = """\
the outputs of the layers, as the profile has no kept_bytes. A real layer keeps several times its
output; gradients and the optimizer's state come on top."""
BRANCHES = "The graph branches, and is cut as a row. PipeDream's program tries more cuts."


def main(
    config: dict,
    profile: Path,
    gpus: list,
    bandwidth: list | None = None,
    straight: bool = False,
    memory=None,
    microbatches: int = 8,
) -> None:
    check_value("microbatches", microbatches, (int, 1, 10_000))
    if not isinstance(profile, str | Path):
        raise UserError(f"profile={profile!r} must be the path of a file")
    layers = read_profile(Path(profile))
    if bandwidth is None and not straight:
        raise UserError("without --straight give --bandwidth: no all-reduce was measured")
    rates = [measured_rate(layers)] if bandwidth is None else bandwidth
    partition = best_partition(layers, gpus, rates, straight, memory)
    if bandwidth is None:  # messages do not say how long an all-reduce takes
        partition = partition._replace(data_parallel=math.inf)
    steps, reasons = list[Step](), list[str]()
    if straight and len(partition.stages) > 1:
        slowest = min(bandwidth) if bandwidth else None
        sizes = len(partition.stages), microbatches, slowest, memory
        steps, reasons = possible_steps(layers, *sizes)
    print(format_partition(partition, layers, straight))
    print(textwrap.fill(describe_bottleneck(partition), 80))
    try:
        took = simulate_partition(partition, layers)
        print(textwrap.fill(describe_run(partition, took, straight), 80))
    except UserError as error:
        print(f"Not simulated: {error}.")
    if steps:
        one_gpu = sum(microbatches * (c.forward + c.backward) + c.update for c in layers)
        print("", *format_steps(steps, one_gpu, microbatches), sep="\n")
        print(*(textwrap.fill(reason, 80) for reason in reasons), sep="\n")
        print(*describe_best(steps, microbatches, len(partition.stages)), sep="\n")


def format_steps(steps: list[Step], one_gpu: float, microbatches: int) -> list[str]:
    what = f"A step of {count(microbatches, 'microbatch')} (--microbatches), each as large as those"
    table = [["schedule", "ms", "speed-up", "--cut"]]
    for schedule, firsts, seconds in steps:
        cut = " ".join(map(str, shorten(firsts, 7, "stages")))
        table.append([schedule, f"{1000 * seconds:.4g}", f"{one_gpu / seconds:.2f}x", cut])
    alone = f"measured, simulated with messages; on one GPU it takes {1000 * one_gpu:.4g} ms:"
    return [what, alone, *format_table(table)]


def describe_best(steps: list[Step], microbatches: int, gpus: int) -> list[str]:
    """Flags for examples/pipeline.py. As in decide.py, of the fastest ones the simplest."""
    least = min(step.seconds for step in steps)
    best = next(step for step in steps if step.seconds <= CLOSE * least)
    flags = f"--schedule {best.schedule} --microbatches {microbatches}"
    cut = " ".join(map(str, best.firsts))
    return [
        f"\nThe simplest within {CLOSE - 1:.0%} of the fastest. If these are the LAYERS of your",
        "my_model.py, train them so:",
        f"--processes {gpus} --cut {cut} {flags}",
    ]


def format_partition(partition: Partition, layers: list[Layer], straight: bool) -> str:
    """The stages, the cuts, and what they gain; in PipeDream's words, unless straight."""
    unit = name_unit(straight)
    each = f"for each {unit} in flight"
    holds = f"the weights and, {each}," if straight else f"{each}, a weight version and"
    legend = LEGEND.format(unit=unit, holds=holds)
    legend += OUTPUT_LEGEND if layers[0].kept is None else KEPT_LEGEND
    noam = f"NOAM: {partition.stages[0].in_flight} (minibatches in flight on each GPU of stage 0)"
    stages, seconds = partition.stages, partition.slowest.seconds
    one_gpu, data_parallel = partition.one_gpu, partition.data_parallel
    against = [
        f"Speed-up over data parallelism ({data_parallel:.9f} s): {data_parallel / seconds:.2f}x",
        f"Speed-up of data parallelism over one GPU: {one_gpu / data_parallel:.2f}x",
    ]
    table = [["stage", "GPUs", "layers", *TIMES, "in all", "held", "GB"], *rows_of(partition)]
    cuts = [describe_cut(stage.last, layers[stage.last]) for stage in stages[:-1]]
    lines = [
        f"Plan: {'-'.join(str(stage.replicas) for stage in stages)}",
        f"Slowest stage: {seconds:.9f} s per {unit}",
        "",
        *shorten(format_table(table), 40, "stages"),
        textwrap.indent(textwrap.fill(legend, 77), "   "),
        *["   4x2: 4 GPUs in each of 2 machines."] * (len(stages[0].levels) > 1),
        *(["Cuts:", *shorten(cuts, 12, "cuts")] if cuts else []),
        *[BRANCHES] * (not all(layer.feeds_next for layer in layers[:-1])),
        *[noam] * (not straight),
        f"Speed-up over one GPU ({one_gpu:.9f} s): {one_gpu / seconds:.2f}x",
        *(against if data_parallel < math.inf else []),
        "",
    ]
    return "\n".join(lines)


def name_unit(straight: bool) -> str:
    """What the GPUs take turns with: PipeDream's paper, which has no flush, says minibatch."""
    return "microbatch" if straight else "minibatch"


def rows_of(partition: Partition) -> Iterator[list[str]]:
    for number, stage in enumerate(partition.stages):
        times = stage.compute, stage.all_reduce, stage.transfer, stage.seconds
        name = f"{number}{' *' * (stage is partition.slowest)}"
        where = "x".join(map(str, stage.levels)), f"{stage.first}-{stage.last}"
        kept = str(stage.in_flight), f"{stage.bytes / 1e9:.4g}"
        yield [name, *where, *(f"{1000 * time:.4g}" for time in times), *kept]


def describe_cut(number: int, layer: Layer) -> str:
    name = layer.name.partition("(")[0][:40]
    return f"   after layer {number}, {name}: {sent_after(layer) / 1e6:.5g} MB each way"


def describe_bottleneck(partition: Partition) -> str:
    """What limits this partition, and is a pipeline worth it?"""
    stages, slowest, seconds = partition.stages, partition.slowest, partition.slowest.seconds
    sends = slowest.transfer * (slowest.transfer == seconds)  # else it is hidden by computing
    times = slowest.compute, slowest.all_reduce, sends
    share, what = max(times) / seconds, TIMES[times.index(max(times))]
    if slowest.replicas == len(stages) == 1:
        text = "One GPU needs no plan."
    elif len(stages) == 1:
        text = "Data parallelism is the best plan: every GPU holds the whole network. It spends "
        text += f"{share:.0%} of its time on {what}."
    else:
        most = f"which spends {share:.0%} of its time on" if share < 0.995 else "limited by"
        text = f"The bottleneck is stage {stages.index(slowest)}, {most} {what}."
        slower = partition.data_parallel / seconds
        alone = f"takes {slower:.2f} times as long" if slower >= 1.005 else "is as fast"
        instead = "would be faster, but a flag rules it out" if slower < 1 else f"alone {alone}"
        text += f" Data parallelism {instead}." * (partition.data_parallel < math.inf)
    return text + " One GPU alone would be faster." * (partition.one_gpu < seconds)


def describe_run(partition: Partition, seconds: float, straight: bool) -> str:
    """Does the simulated run, which takes so long per minibatch, keep what is promised?"""
    schedule = "1F1B" if straight else "1F1B-RR"
    promised = max(stage.compute + stage.all_reduce for stage in partition.stages)
    slowest, data_parallel = partition.slowest.seconds, partition.data_parallel
    same = seconds <= 1.001 * promised
    text = f"Simulated ({schedule}, full pipeline, free messages): {seconds:.9f} s per "
    text += f"{name_unit(straight)}, "
    text += "as" if same else f"{seconds / promised:.2f} times as long as"
    text += " the plan promises" + " without transfers" * (promised < slowest) + "."
    if not same:
        text += " This schedule does not keep the slowest stage busy all the time."
        text += " So here data parallelism is faster." * (slowest < data_parallel < seconds)
    return text
