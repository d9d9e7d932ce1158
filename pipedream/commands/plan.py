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

import textwrap
from collections.abc import Iterator
from pathlib import Path

from pipedream.backstage.text import shorten
from pipedream.planning.profiles import Layer, read_profile, sent_after
from pipedream.planning.replicas import simulate_partition
from pipedream.planning.search import Partition, best_partition
from pipedream_simple import UserError, format_table

FLAGS = {
    "PROFILE": "what the layers cost",
    "--gpus N ...": "GPUs; or GPUs per machine, machines",
    "--bandwidth B ...": "bytes per second of a GPU's link; then of a machine's",
    "--straight": "one GPU per stage",
    "--memory BYTES": "of each GPU",
}
TAKES = ""

TIMES = ["computing", "all-reduce", "transfer"]
LEGEND = """\
   Milliseconds per minibatch. in all: computing and all-reduce, or transfer if
   that takes longer; * is the slowest stage. versions: of the weights, one per
   minibatch in flight. GB, on each GPU of the stage: weight versions, and per
   minibatch in flight """
KEPT_LEGEND = """\
what the layers keep for its backward. Gradients and
   the optimizer's state come on top."""
OUTPUT_LEGEND = """\
the outputs of the layers, as the profile has no
   kept_bytes. A real layer keeps several times its output; gradients and the
   optimizer's state come on top."""


def main(
    config: dict, profile: Path, gpus: list, bandwidth: list, straight: bool = False, memory=None
) -> None:
    layers = read_profile(profile)
    partition = best_partition(layers, gpus, bandwidth, straight, memory)
    print(format_partition(partition, layers))
    print(textwrap.fill(describe_bottleneck(partition), 80))
    try:
        print(textwrap.fill(describe_run(partition, simulate_partition(partition, layers)), 80))
    except UserError as error:
        print(f"Not simulated: {error}.")
    if straight and len(partition.stages) > 1:
        firsts = " ".join(str(stage.first) for stage in partition.stages)
        print("\nIf these are the LAYERS of your my_model.py, train them so:")
        print(f"--processes {len(partition.stages)} --cut {firsts}")


def format_partition(partition: Partition, layers: list[Layer]) -> str:
    """The stages, the cuts, and what they gain."""
    stages, seconds = partition.stages, partition.slowest.seconds
    one_gpu, data_parallel = partition.one_gpu, partition.data_parallel
    table = [["stage", "GPUs", "layers", *TIMES, "in all", "versions", "GB"], *rows_of(partition)]
    cuts = [describe_cut(stage.last, layers[stage.last]) for stage in stages[:-1]]
    lines = [
        f"Plan: {'-'.join(str(stage.replicas) for stage in stages)}",
        f"Slowest stage: {seconds:.9f} s per minibatch",
        "",
        *shorten(format_table(table), 40, "stages"),
        LEGEND + (OUTPUT_LEGEND if layers[0].kept is None else KEPT_LEGEND),
        *["   4x2: 4 GPUs in each of 2 machines."] * (len(stages[0].levels) > 1),
        *(["Cuts:", *shorten(cuts, 12, "cuts")] if cuts else []),
        f"NOAM: {stages[0].in_flight} (minibatches in flight on each GPU of stage 0)",
        f"Speed-up over one GPU ({one_gpu:.9f} s): {one_gpu / seconds:.2f}x",
        f"Speed-up over data parallelism ({data_parallel:.9f} s): {data_parallel / seconds:.2f}x",
        f"Speed-up of data parallelism over one GPU: {one_gpu / data_parallel:.2f}x",
        "",
    ]
    return "\n".join(lines)


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
        text = f"The bottleneck is stage {stages.index(slowest)}, {most} {what}. Data "
        slower = partition.data_parallel / seconds
        alone = f"takes {slower:.2f} times as long" if slower >= 1.005 else "is as fast"
        instead = "would be faster, but is ruled out" if slower < 1 else f"alone {alone}"
        text += f"parallelism {instead}."
    return text + " One GPU alone would be faster." * (partition.one_gpu < seconds)


def describe_run(partition: Partition, seconds: float) -> str:
    """Does the simulated run, which takes so long per minibatch, keep what is promised?"""
    promised = max(stage.compute + stage.all_reduce for stage in partition.stages)
    slowest, data_parallel = partition.slowest.seconds, partition.data_parallel
    same = seconds <= 1.001 * promised
    text = f"Simulated (1F1B-RR, full pipeline, free messages): {seconds:.9f} s per minibatch, "
    text += "as" if same else f"{seconds / promised:.2f} times as long as"
    text += " the plan promises" + " without transfers" * (promised < slowest) + "."
    if not same:
        text += " This schedule does not keep the slowest stage busy all the time."
        text += " So here data parallelism is faster." * (slowest < data_parallel < seconds)
    return text
