#!/usr/bin/env python3
"""Which cut? How many GPUs for each stage? From what the layers cost, and how fast the links are.

    python pipedream_planner.py profile my.csv   measure a network here, layer by layer
    python pipedream_planner.py plan my.csv --gpus 4 --bandwidth 1e9              and cut it
    python pipedream_planner.py plan my.csv --gpus 8 2 --bandwidth 3e10 3.125e9   for 2 machines
    python pipedream_planner.py train 2-1-1      train a plan on the digits: replicas are real
    python pipedream_planner.py fit --gpus 8     does a 7B or 70B transformer fit? how fast is it?

COMMAND --help says more. `plan` also reads what PipeDream's own profiler wrote. Its authors
published such files at github.com/msr-fiddle/pipedream, for VGG-16
profiler/image_classification/profiles/vgg16/graph.txt.

A pipeline is as fast as its slowest stage. A slow stage may be cut again, or replicated: with R
replicas, each takes every R-th minibatch, and they add up their gradients (all-reduce), as in data
parallelism. `Plan: 15-1` is a stage on 15 GPUs and one on a single GPU; `Plan: 16` is data
parallelism. Paper: PipeDream (SOSP 2019).
"""

import copy
import datetime
import functools
import itertools
import math
import re
import signal
import statistics
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during a slow import: no traceback

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn
from torch.autograd.graph import saved_tensors_hooks

from pipedream_fit import FIT, check_fit, describe, fit
from pipedream_lab import (
    LAB_CONFIG,
    all_plans,
    check_lab_config,
    choose_command,
    read_cells,
    read_text,
    write,
)
from pipedream_simple import (
    CONFIG,
    RECOMPUTED,
    Event,
    Op,
    Run,
    Schedule,
    UserError,
    Weights,
    Worker,
    build_stages,
    check_config,
    check_value,
    choose_device,
    count,
    format_per_gpu,
    format_table,
    makespan,
    one_f_one_b,
    parse_config,
    parse_value,
    pin_versions,
    run_main,
    shorten,
    shown,
    simulate,
    train,
    utilization,
)

# ------------------------------------------------------------------------------------ reading


class Layer(NamedTuple):
    """What a layer costs on one GPU, for one minibatch."""

    name: str
    forward: float  # seconds
    backward: float  # seconds
    activation: float  # bytes of its output
    weights: float  # bytes
    sent: float | None = None  # bytes that a cut right after it sends; None: its output
    kept: float | None = None  # bytes kept from its forward until its backward; None: its output


COLUMNS = ["layer", "forward_ms", "backward_ms", "activation_bytes", "weight_bytes"]
KEPT = "kept_bytes"  # a column that may be missing
KEYS = ["forward_compute_time", "backward_compute_time", "activation_size", "parameter_size"]
AMOUNT = (float, 0, 1e18)  # of seconds or bytes; as in RULES: type, least, most


def read_profile(path: Path) -> list[Layer]:
    """The layers in a CSV file with these COLUMNS, or in a file of PipeDream's own profiler.

    UserError: what is wrong with the file, and where.
    """
    text, name = read_text(path).strip(), str(path)[-200:]
    is_graph = " -- " in text.partition("\n")[0]
    layers = read_graph(text, name) if is_graph else read_chain(read_cells(text, path), name)
    if not layers:
        raise UserError(f"{name} has no layers")
    return layers


def read_layer(name: str, costs: dict[str, str], place: str) -> Layer:
    """A Layer from texts: two times in ms, then sizes. A list, [8; 4], is added up."""
    amounts = []
    for what, text in costs.items():
        values = [parse_value(part) for part in text.strip("[] ").split(";")]
        for value in values:
            check_value(f"{place}: {what}", value, AMOUNT)
        amounts.append(sum(map(float, values)))  # type: ignore[arg-type]
    forward, backward, activation, weights, *kept = amounts
    layer = Layer(name, forward / 1000, backward / 1000, activation, weights)
    return layer._replace(kept=kept[0]) if kept else layer


def read_chain(lines: list[list[str]], name: str) -> list[Layer]:
    """The layers of a CSV file, in which each feeds the next one."""
    layers = []
    header, *rows = [[cell.strip() for cell in line] for line in lines] or [[]]
    if header not in (COLUMNS, [*COLUMNS, KEPT], []):
        rule = f"a CSV file's is {','.join([*COLUMNS, KEPT])}, the last one optional"
        raise UserError(f"{name}, line 1, is {shown(','.join(header))}: {rule}")
    for number, cells in enumerate(rows, start=2):
        place = f"{name}, line {number}"
        if cells and len(cells) != len(header):
            raise UserError(f"{place} has {count(len(cells), 'cell')}, not {len(header)}")
        if cells:
            costs = dict(zip(header[1:], cells[1:], strict=True))
            layers.append(read_layer(cells[0], costs, place))
    return layers


def read_graph(text: str, name: str) -> list[Layer]:
    """The layers of a PipeDream profile: lines `id -- description -- costs`, and edges `id -- id`.

    The network may branch, so its nodes are put in a row, each after those it needs, and cut like a
    chain. A cut sends every output from before it that is needed after it. (The authors' program
    also tries cuts that no place in this row stands for.) Inputs are not part of the network.
    """
    nodes: dict[str, Layer] = {}
    edges: list[tuple[str, str]] = []
    for number, line in enumerate(text.splitlines(), start=1):
        place, (key, *rest) = f"{name}, line {number}", line.strip().split(" -- ")
        if len(rest) == 1:
            edges.append((key, rest[0]))
        elif rest:
            costs = dict(re.findall(r"(\w+)=(\[.*?\]|[^,\s]*)", rest[-1]))
            if key in nodes:
                raise UserError(f"{place}: a second {shown(key)}")
            nodes[key] = read_layer(rest[0], {what: costs.get(what, "") for what in KEYS}, place)
        elif key:
            raise UserError(f"{place}: {shown(key)} is neither a node nor an edge")
    inputs = {key for key, layer in nodes.items() if layer.name.startswith("Input")}
    edges = [edge for edge in edges if not inputs & {*edge}]
    order = in_order([key for key in nodes if key not in inputs], edges, name)
    place_of = {key: i for i, key in enumerate(order)}
    needed_until = {
        key: max([place_of[b] for a, b in edges if a == key], default=0) for key in order
    }
    layers = []
    for i, key in enumerate(order):
        sent = sum(nodes[k].activation for k in order[: i + 1] if needed_until[k] > i)
        layers.append(nodes[key]._replace(sent=sent))
    return layers


def in_order(keys: list[str], edges: list[tuple[str, str]], name: str) -> list[str]:
    """Keys in an order in which they can run: of those that can, the lowest comes next.

    PipeDream numbers the nodes as they ran, so this is that order.
    """
    sorter = TopologicalSorter(dict.fromkeys(keys, ()))
    for key, reader in edges:
        if {key, reader} - {*keys}:
            raise UserError(f"{name}: the edge {shown(f'{key} -- {reader}')} lacks a node")
        sorter.add(reader, key)
    try:
        sorter.prepare()
    except CycleError as error:
        cycle = " -- ".join(shorten(error.args[1], 6, "nodes"))
        raise UserError(f"{name}: the graph has a cycle, {cycle[:200]}") from None
    ready: list[str] = []
    order: list[str] = []
    while sorter.is_active():
        ready = sorted([*ready, *sorter.get_ready()], key=lambda key: (len(key), key))
        order.append(ready.pop(0))
        sorter.done(order[-1])
    return order


# -------------------------------------------------------------------------------------- clock

CLOCK = {"F": "forward_time", "B": "backward_time", "U": "update_time"}  # what simulate reads


def now(device: torch.device) -> float:
    """The time in seconds, once the device has finished all its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def microbatch_size(config: dict) -> int:
    return config["batch_size"] // config["num_microbatches"]


def measure_stages(config: dict, average: Callable = statistics.median) -> dict[str, list[float]]:
    """Milliseconds of a microbatch's forward and backward, and of an update, on each stage.

    Real training, one microbatch at a time: between two ops of a stage the others work, so it finds
    its caches as cold as in a run. The first batch warms up and does not count.
    """
    device, size = choose_device(config["device"]), microbatch_size(config)
    config = {key: config[key] for key in CONFIG} | {"schedule": "naive", "num_batches": 6}
    config |= {"num_microbatches": 4, "batch_size": 4 * size}
    took: dict[tuple[str, int], list[float]] = {}
    last = 0.0

    def watch(op: Op, worker: Worker) -> None:
        nonlocal last
        start, last = last, now(device)
        if op.version > 0:
            took.setdefault((op.kind, op.stage), []).append(1000 * (last - start))

    train(config, watch=watch)
    stages = range(config["num_stages"])
    return {key: [average(took[kind, s]) for s in stages] for kind, key in CLOCK.items()}


def measure_message(x: Tensor, work: Callable[[], object] = lambda: None) -> float:
    """Milliseconds that a tensor like x takes from rank 0 to rank 1. All ranks call this.

    Rank 1 waits for it; rank 0 sends it and goes on with some work, as in a run. (On a CPU a
    message may then take longer: what sends it has to share the core.)
    """
    rank, took = dist.get_rank(), []
    for _ in range(23):
        dist.all_reduce(torch.zeros(1))  # wait for all; on the CPU, so that gloo carries it
        start = now(x.device)
        if rank < 2:
            message = dist.isend(x, 1) if rank == 0 else dist.irecv(x, 0)
            if rank == 0:
                work()
            message.wait()  # type: ignore[union-attr]
        took.append(1000 * (now(x.device) - start))
    median = torch.tensor(statistics.median(took[3:]))  # 3 warm up
    dist.broadcast(median, src=1)
    return median.item()


def one_of_two(rank: int, num_bytes: int, folder: str) -> None:
    """A process that time_message starts. Rank 0 writes down what they have measured."""
    meet, patience = Path(folder, "meet").as_uri(), datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", meet, patience, world_size=2, rank=rank)
    milliseconds = measure_message(torch.zeros(num_bytes, dtype=torch.uint8))
    if rank == 0:
        Path(folder, "milliseconds").write_text(str(milliseconds))
    dist.destroy_process_group()


def time_message(num_bytes: int) -> tuple[float, str]:
    """Milliseconds of a message between two processes, started for this; or 0, and why."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            multiprocessing.spawn(one_of_two, (num_bytes, folder), nprocs=2)
            return float(Path(folder, "milliseconds").read_text()), ""
        except Exception as error:  # whatever keeps processes from starting, meeting or sending
            return 0.0, str(error).strip().rpartition("\n")[2][:200]


def describe_layers(config: dict) -> list[list]:
    """Name of every layer, and bytes of its output, of its weights and of what a backward needs.

    The first and the last are for a microbatch. What a forward keeps for its backward is counted
    as storages that autograd saves, each once, and weights not at all.
    """
    device, found = choose_device(config["device"]), list[list]()
    x = torch.zeros(microbatch_size(config), 64, device=device)
    for layer in itertools.chain.from_iterable(stage.children() for stage in build_stages(config)):
        saved: set = set()

        def note(tensor: Tensor, saved: set = saved) -> Tensor:
            saved.add(tensor.untyped_storage())
            return tensor

        with saved_tensors_hooks(note, lambda tensor: tensor):
            x = layer.to(device)(x.detach().requires_grad_(bool(found)))
        parts = layer if isinstance(layer, nn.Sequential) else [layer]
        name = "+".join(type(part).__name__ for part in parts)
        saved -= {w.untyped_storage() for w in layer.parameters()}
        weights, kept = sum(w.nbytes for w in layer.parameters()), sum(s.nbytes() for s in saved)
        found.append([name, x.nbytes, weights, kept])
    return found


def profile(config: dict, file: Path | None = None) -> None:
    """Measure layers, stages and a message here. What would each schedule reach with these times?

    With a file name, my.csv, it also writes what `plan my.csv` reads, which calls a microbatch a
    minibatch.
    """
    config = {**LAB_CONFIG, **config}
    layers, num_stages = describe_layers(config), config["num_stages"]
    of_layers = measure_stages({**config, "num_stages": len(layers), "layers_per_stage": 1})
    of_stages = measure_stages(config)
    sent = layers[config["layers_per_stage"] - 1][1]
    message, reason = time_message(sent) if num_stages > 1 else (0.0, "there is one stage")
    if file:
        forward, backward, _ = of_layers.values()
        lines = [",".join([*COLUMNS, KEPT])]
        for (name, *sizes), f, b in zip(layers, forward, backward, strict=True):
            lines.append(",".join([name, f"{f:.6g}", f"{b:.6g}", *map(str, sizes)]))
        text = "\n".join([*lines, ""])
        write(file, lambda part: part.write_text(text, "utf-8"), config, ".csv")

    device = choose_device(config["device"])
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    images = count(microbatch_size(config), "image")
    print(f"Measured on {where}: milliseconds per microbatch of {images}, and per update")
    print("(medians, without the first batch)\n")
    for what, times in (("layer", of_layers), ("stage", of_stages)):
        table = [[what, "forward", "backward", "update", ""]]
        for i, costs in enumerate(zip(*times.values(), strict=True)):
            name = layers[i][0] if what == "layer" else ""
            name = name if len(name) <= 40 else name[:37] + "..."
            table.append([str(i), *(f"{cost:.3f}" for cost in costs), name])
        print("\n".join([*shorten(format_table(table), 20, f"{what}s"), ""]))
    forward, backward, update = of_stages.values()
    both = [f + b for f, b in zip(forward, backward, strict=True)]
    excess = max(both) / statistics.fmean(both) - 1
    if num_stages > 1:
        slowest = both.index(max(both))
        print(f"Bottleneck: stage {slowest}, which takes {excess:.0%} longer than the mean")
    print(f"A message of {sent:,} bytes between two processes: {message:.3f} ms")
    if reason:
        print(f"   Not measured, so taken as free: {reason}")

    measured = {"forward_time": forward, "backward_time": backward, "comm_time": message}
    plans, reasons = all_plans({**config, **measured})
    one_gpu = config["num_microbatches"] * sum(both) + sum(update)
    print(f"\nSimulated with these times on {count(num_stages, 'such device')}:")
    table = [["schedule", "ms per batch", "busy", f"speed-up over one device ({one_gpu:.3g} ms)"]]
    for label, settings, schedule, _ in plans:
        update_time = [0.0] * settings["num_stages"]
        for milliseconds, row in zip(update, schedule, strict=True):
            stages = {op.stage for op in row}  # where a GPU has several, they share its time
            for stage in stages:
                update_time[stage] = milliseconds / len(stages)
        events = simulate(schedule, {**settings, "update_time": update_time})
        batch = makespan(events) / config["num_batches"]
        cells = f"{batch:.3g}", f"{utilization(events):.1%}", f"{one_gpu / batch:.2f}x"
        table.append([label, *cells])
    print("\n".join([*format_table(table), *[RECOMPUTED] * config["recompute"], *reasons]))


# ------------------------------------------------------------------------------------- search


class Stage(NamedTuple):
    """Consecutive layers on one GPU, or on several. Times are seconds per minibatch."""

    first: int  # layer; the network's first is 0
    last: int  # layer, included
    levels: tuple[int, ...]  # replicas per level: (4, 2) are 4 in each of 2 machines
    compute: float  # forward and backward
    all_reduce: float  # the replicas add up their gradients
    transfer: float  # from the previous stage or to the next one, whichever takes longer
    in_flight: int  # minibatches on each of its GPUs, and so weight versions
    bytes: float  # kept on each of its GPUs: weight versions, and activations

    @property
    def replicas(self) -> int:
        return math.prod(self.levels)

    @property
    def seconds(self) -> float:
        """A GPU computes and adds up in turn; meanwhile it sends and receives."""
        return max(self.compute + self.all_reduce, self.transfer)


class Plan(NamedTuple):
    """Stages that together use every GPU, and the times to compare them with."""

    stages: list[Stage]
    one_gpu: float  # seconds per minibatch
    data_parallel: float  # the whole network on every GPU

    @property
    def slowest(self) -> Stage:
        return max(self.stages, key=lambda stage: stage.seconds)


def add_up(layers: list[Layer]) -> tuple[np.ndarray, ...]:
    """Of every possible stage of layers i to j: seconds, bytes of weights and of what it keeps.

    Three arrays [i, j], with infinite seconds where j < i. And two more: the bytes that a cut
    before layer i sends, [i], and those that a cut after layer j sends, [j].
    """
    columns = np.array(
        [[f + b, w, a if kept is None else kept] for _, f, b, a, w, _, kept in layers], float
    ).T
    starts = np.insert(columns.cumsum(axis=1), 0, 0, axis=1)
    seconds, weights, activations = starts[:, None, 1:] - starts[:, :-1, None]
    seconds[np.tri(len(layers), k=-1, dtype=bool)] = math.inf
    sent = [*map(sent_after, layers[:-1])]
    return seconds, weights, activations, np.array([0.0, *sent]), np.array([*sent, 0.0])


def sent_after(layer: Layer) -> float:
    return layer.activation if layer.sent is None else layer.sent


def replicate(seconds, weights, levels: tuple[int, ...], bandwidths) -> tuple:
    """Seconds per minibatch that a replicated stage computes, and that it spends on all-reduce.

    m replicas work on m minibatches at a time. Then each of them sends, and receives, (m - 1) / m
    of the weights' size twice, which takes 4 (m - 1) / m * weights / bandwidth. With several levels
    the GPUs of a machine do so first, and then the machines. (Section 3.1 of the paper has a 2, and
    takes the longer of the two times; the authors' program has the 4 and the sum.)
    """
    per_byte = sum(4 * (m - 1) / (m * b) for m, b in zip(levels, bandwidths, strict=True))
    return seconds / math.prod(levels), per_byte * weights / math.prod(levels)


def count_in_flight(replicas: int, behind: int) -> int:
    """Minibatches in flight on each replica of a stage, if the later stages have `behind` GPUs.

    That is one for each GPU from this stage on. On the first stage it is NOAM, the number of
    optimal active minibatches (section 3.2). Weight stashing keeps a version for each (3.3).
    """
    return math.ceil((replicas + behind) / replicas)


def search(
    layers: list[Layer], gpus, bandwidths, straight: bool, memory: float
) -> tuple[float, list[Stage]]:
    """The fastest plan: seconds per minibatch, inf if nothing fits, and its stages.

    Dynamic programming from the last stage to the first. A unit is a GPU on the lowest level, then
    a machine. best[g][i, j] is the time of the best way to run layers i to j on g units: layers i
    to k on m of them, as replicas of each other, and the rest in the best way on g - m. A machine
    runs the best pipeline on its own GPUs. Which one is best depends on how many machines are its
    replicas, and under a memory limit on how many GPUs are behind it, so those are its arguments.

    Then it takes, from the first stage on, the most replicas and then the most layers with which
    the plan is no slower. Memory is O(layers^2 * units of all levels).
    """
    num_layers, num_levels, limited = len(layers), len(gpus), memory < math.inf
    seconds, weights, activations, before, after = add_up(layers)
    busier_link = np.maximum.outer(before, after)

    def divide(levels: tuple, behind: int, g: int, m: int) -> tuple[tuple, int]:
        """For m of g units: the replicas per level, and the GPUs behind."""
        level = num_levels - len(levels) - 1
        behind += (g - m) * math.prod([*gpus[:level], *levels])
        return (m, *levels), behind

    def to_send(levels: tuple) -> float:
        """Seconds for a byte and one back, over the links of units that are replicas."""
        return 2 / (bandwidths[num_levels - len(levels)] * math.prod(levels))

    @functools.lru_cache(sum(gpus))
    def on_replicas(levels: tuple, behind: int) -> np.ndarray:
        """[i, j]: the best way to run layers i to j on units that are replicas of each other."""
        if len(levels) < num_levels:
            inside = best_ways(levels, behind)[-1][:-1]
        else:
            kept = count_in_flight(math.prod(levels), behind) * (weights + activations)
            inside = sum(replicate(seconds, weights, levels, bandwidths))
            inside = np.where(kept <= memory, inside, math.inf)
        return np.maximum(inside, to_send(levels) * busier_link)

    def best_ways(levels: tuple, behind: int) -> list[np.ndarray]:
        """best for the units of a unit of the level above. best[0][j + 1, j]: nothing is left."""
        shape = num_layers + 1, num_layers
        best = [np.where(np.eye(*shape, k=-1), 0, math.inf)]
        for g in range(1, gpus[num_levels - len(levels) - 1] + 1):
            best.append(np.full(shape, math.inf))
            for m in range(1, 2 if straight else g + 1):
                inner, later = divide(levels, behind, g, m)
                ways = on_replicas(inner, later * limited)
                for j in range(num_layers) if levels else [num_layers - 1]:
                    column = best[g][: j + 1, j]
                    joined = np.maximum(ways[: j + 1, : j + 1], best[g - m][1 : j + 2, j])
                    np.minimum(column, joined.min(axis=1), out=column)
        return best

    def stages(best, levels, behind, i, j, received, sent) -> Iterator[Stage]:
        """The stages of best[-1][i, j], whose ends receive and send in so many seconds."""
        start, g = i, len(best) - 1
        while g:
            for m, k in itertools.product(range(1 if straight else g, 0, -1), range(j, i - 1, -1)):
                inner, later = divide(levels, behind, g, m)
                if max(on_replicas(inner, later * limited)[i, k], best[g - m][k + 1, j]) <= slowest:
                    break
            ends = to_send(inner) * before[i], to_send(inner) * after[k]
            ends = max(ends[0], received * (i == start)), max(ends[1], sent * (k == j))
            if len(inner) < num_levels:
                yield from stages(best_ways(inner, later), inner, later, i, k, *ends)
            else:
                cost = float(seconds[i, k]), float(weights[i, k])
                compute, all_reduce = replicate(*cost, inner, bandwidths)
                in_flight = count_in_flight(math.prod(inner), later)
                kept = float(in_flight * (weights[i, k] + activations[i, k]))
                yield Stage(i, k, inner, compute, all_reduce, float(max(ends)), in_flight, kept)
            i, g = k + 1, g - m

    best = best_ways((), 0)
    fastest = float(best[-1][0, -1])
    # Sums differ in their last digits: times that differ by less than a billionth are equal.
    slowest = fastest * (1 + 1e-9)
    found = stages(best, (), 0, 0, num_layers - 1, 0, 0) if fastest < math.inf else []
    return fastest, [*found]


def best_plan(
    layers: list[Layer],
    gpus: list[int],
    bandwidths: list[float],
    straight: bool = False,
    memory: float | None = None,
) -> Plan:
    """The plan whose slowest stage is fastest; of equally fast ones, the most replicas in front.

    gpus and bandwidths have an entry per level: 8 GPUs in a machine, 2 machines; bytes per second
    of a GPU's link and of a machine's, both directions together. straight: one GPU per stage.
    memory: bytes of a GPU. A stage may then keep on each GPU

        in flight * (weights + activations),  in flight = ceil(GPUs from it on / its replicas)

    where activations are what its layers keep for a backward, or their outputs where that is not
    known. (Gradients and the optimizer's state are left out.) UserError: an invalid argument, or
    nothing fits.

    PipeDream's planner (SOSP 2019, section 3.1). Times are per minibatch, so replicas divide them.
    A cut sends activations, and gradients of the same size back, over the links of every level that
    it crosses; this overlaps with computing. With several levels, all machines that share a part of
    the network divide it among their GPUs in the same way.
    """
    check_request(layers, gpus, bandwidths, straight, memory)
    limit = math.inf if memory is None else memory
    seconds, stages = search(layers, gpus, bandwidths, straight, limit)
    if seconds == math.inf:
        most = f"{limit / 1e9:g} GB"
        raise UserError(f"nothing fits: every plan has a GPU that must keep more than {most}")
    one_gpu = sum(layer.forward + layer.backward for layer in layers)
    weights = sum(layer.weights for layer in layers)
    return Plan(stages, one_gpu, sum(replicate(one_gpu, weights, tuple(gpus), bandwidths)))


LEVEL = {"gpus": (int, 1, 10_000), "bandwidth": (float, 1, 1e18)}  # as in RULES
MOST_SIMULATED = 300_000  # minibatches * stages
MOST_KEPT = 100_000_000  # layers * layers * GPUs: the numbers that a search keeps
MOST_STEPS = 20_000_000_000  # of count_steps: half a minute


def count_steps(num_layers: int, gpus, straight: bool, limited: bool) -> int:
    """The numbers that a search goes through; each of its calls of NumPy counts as 5,000."""
    steps, times = 0, 1
    for level in reversed(range(len(gpus))):
        divided = gpus[level] if straight else gpus[level] * (gpus[level] + 1) // 2
        columns = 1 if level == len(gpus) - 1 else num_layers
        steps += times * divided * columns * (num_layers**2 + 5_000)
        times *= divided if limited else gpus[level]
    return steps


def check_request(layers: list[Layer], gpus, bandwidths, straight: bool, memory) -> None:
    """Raise a UserError unless best_plan can answer this."""
    for key, values in (("gpus", gpus), ("bandwidth", bandwidths)):
        if not isinstance(values, (list, tuple)) or not values:
            raise UserError(f"{key}={shown(values)} must be a list, one number per level")
        for value in values:
            check_value(key, value, LEVEL[key])
    if len(gpus) != len(bandwidths):
        sizes = f"gpus has {count(len(gpus), 'level')}, bandwidth {len(bandwidths)}"
        raise UserError(f"{sizes}: each level needs both")
    if memory is not None:
        check_value("memory", memory, LEVEL["bandwidth"])
    for layer in layers:
        for key, value in zip(Layer._fields[1:], layer[1:], strict=True):
            if value is not None:
                check_value(f"{shown(layer.name)}: {key}", value, AMOUNT)
    if not any(layer.forward + layer.backward for layer in layers):
        raise UserError("no layer takes any time")
    num_layers, num_gpus = len(layers), math.prod(gpus)
    if straight and num_gpus > num_layers:
        stages = f"{count(num_layers, 'layer')} cannot be cut into {num_gpus} stages"
        raise UserError(f"{stages}: use fewer GPUs, or replicas (without straight)")
    steps = count_steps(num_layers, gpus, straight, memory is not None)
    if steps > MOST_STEPS or num_layers**2 * num_gpus > MOST_KEPT:
        what = f"{count(num_layers, 'layer')} on {count(num_gpus, 'GPU')}"
        raise UserError(f"{what} would take minutes to plan: use fewer GPUs, or join layers")


# --------------------------------------------------------------------------------------- plan


TIMES = ["computing", "all-reduce", "transfer"]
PLAN_LEGEND = """\
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


def format_plan(plan: Plan, layers: list[Layer]) -> str:
    """The stages, the cuts, what they gain, and a sentence that says what limits them."""
    seconds, one_gpu, data_parallel = plan.slowest.seconds, plan.one_gpu, plan.data_parallel
    table = [["stage", "GPUs", "layers", *TIMES, "in all", "versions", "GB"]]
    cuts = []
    for number, stage in enumerate(plan.stages):
        times = stage.compute, stage.all_reduce, stage.transfer, stage.seconds
        row = [f"{number}{' *' * (stage is plan.slowest)}", "x".join(map(str, stage.levels))]
        row += [f"{stage.first}-{stage.last}", *(f"{1000 * time:.4g}" for time in times)]
        table.append([*row, str(stage.in_flight), f"{stage.bytes / 1e9:.4g}"])
        name = layers[stage.last].name.partition("(")[0][:40]
        sent = f"{sent_after(layers[stage.last]) / 1e6:.5g} MB each way"
        cuts.append(f"   after layer {stage.last}, {name}: {sent}")
    lines = [
        f"Plan: {'-'.join(str(stage.replicas) for stage in plan.stages)}",
        f"Slowest stage: {seconds:.9f} s per minibatch",
        "",
        *shorten(format_table(table), 40, "stages"),
        PLAN_LEGEND + (OUTPUT_LEGEND if layers[0].kept is None else KEPT_LEGEND),
        *["   4x2: 4 GPUs in each of 2 machines."] * (len(plan.stages[0].levels) > 1),
        *(["Cuts:", *shorten(cuts[:-1], 12, "cuts")] if len(cuts) > 1 else []),
        f"NOAM: {plan.stages[0].in_flight} (minibatches in flight on each GPU of stage 0)",
        f"Speed-up over one GPU ({one_gpu:.9f} s): {one_gpu / seconds:.2f}x",
        f"Speed-up over data parallelism ({data_parallel:.9f} s): {data_parallel / seconds:.2f}x",
        f"Speed-up of data parallelism over one GPU: {one_gpu / data_parallel:.2f}x",
        "",
    ]
    return "\n".join([*lines, textwrap.fill(explain(plan), 80)])


def explain(plan: Plan) -> str:
    """What the plan means: its bottleneck, and whether a pipeline is worth it."""
    slowest, seconds = plan.slowest, plan.slowest.seconds
    times = slowest.compute, slowest.all_reduce, slowest.transfer * (slowest.transfer == seconds)
    share, what = max(times) / seconds, TIMES[times.index(max(times))]
    if slowest.replicas == len(plan.stages) == 1:
        text = "One GPU needs no plan."
    elif len(plan.stages) == 1:
        text = "Data parallelism is the best plan: every GPU holds the whole network. It spends "
        text += f"{share:.0%} of its time on {what}."
    else:
        most = f"which spends {share:.0%} of its time on" if share < 0.995 else "limited by"
        text = f"The bottleneck is stage {plan.stages.index(slowest)}, {most} {what}. Data "
        slower = plan.data_parallel / seconds
        if slower < 1:
            text += "parallelism would be faster, but is ruled out."
        elif slower < 1.005:
            text += "parallelism alone is as fast."
        else:
            text += f"parallelism alone takes {slower:.2f} times as long."
    return text + " One GPU alone would be faster." * (plan.one_gpu < seconds)


def plan(
    config: dict,
    profile: Path,
    gpus: list,
    bandwidth: list,
    straight: bool = False,
    memory: float | None = None,
) -> None:
    """Where to cut a network, and how many GPUs each stage gets, for the fastest pipeline.

    PROFILE is a CSV file, such as `profile` writes, or a file of PipeDream's profiler. The CSV
    file's first line is layer,forward_ms,backward_ms,activation_bytes,weight_bytes,kept_bytes;
    the last column, what a layer keeps for its backward, may be missing: then it is its output.
    """
    layers = read_profile(profile)
    found = best_plan(layers, gpus, bandwidth, straight, memory)
    print(format_plan(found, layers))
    try:
        seconds = simulate_plan(found, layers)
    except UserError as error:
        print(f"Not simulated: {error}.")
        return
    promised = max(stage.compute + stage.all_reduce for stage in found.stages)
    text = f"Simulated (1F1B-RR, full pipeline, free messages): {seconds:.9f} s per minibatch, "
    same = seconds <= 1.001 * promised
    text += "as" if same else f"{seconds / promised:.2f} times as long as"
    text += " the plan promises" + " without transfers" * (promised < found.slowest.seconds) + "."
    if not same:
        text += " This schedule does not keep the slowest stage busy all the time."
        if found.slowest.seconds < found.data_parallel < seconds:
            text += " So here data parallelism is faster."
    print(textwrap.fill(text, 80))


# ----------------------------------------------------------------------------------- replicas


def replicated(replicas: list[int], num_microbatches: int, num_batches: int) -> Iterator[list]:
    """1F1B-RR: stage s is on replicas[s] GPUs, which take turns: microbatch m goes to m mod R_s.

    One row per GPU, the replicas of a stage next to each other. Each runs 1F1B on its microbatches.
    Before the first backward it runs one forward for each GPU from its stage on, shared among its
    replicas: on stage 0 that is NOAM. PipeDream (SOSP 2019), section 3.2.

    >>> from pipedream_simple import format_rows
    >>> print(format_rows(replicated([2, 1], 2, 2)))
    GPU0: F0 F2 B0 B2
    GPU1: F1 F3 B1 B3
    GPU2: F0 B0 F1 B1 F2 B2 F3 B3
    """
    for stage, copies in enumerate(replicas):
        warmup = count_in_flight(copies, sum(replicas[stage + 1 :])) - 1
        for replica in range(copies):
            number = num_microbatches * num_batches // copies
            row = one_f_one_b(0, warmup + 1, number, num_batches=1)
            yield [(stage, kind, m * copies + replica) for _, kind, m in row]


def simulate_plan(plan: Plan, layers: list[Layer]) -> float:
    """Seconds per minibatch of 1F1B-RR with the plan's times, messages free.

    A batch is as many minibatches as the replicas share evenly, and its update takes all-reduce's
    time for as many. Counted in the middle third of a run, where the pipeline is full.
    """
    replicas = [stage.replicas for stage in plan.stages]
    batch, num_stages = math.lcm(*replicas), len(replicas)
    num_batches = 3 * math.ceil(4 * sum(replicas) / batch) + 6
    if sum(replicas) > 256 or batch * num_batches * num_stages > MOST_SIMULATED:
        raise UserError("with so many GPUs, or such replicas, the run is too long")
    of = [layers[stage.first : stage.last + 1] for stage in plan.stages]
    config = {
        "num_stages": num_stages,
        "forward_time": [max(1e-9, 1000 * sum(x.forward for x in some)) for some in of],
        "backward_time": [max(1e-9, 1000 * sum(x.backward for x in some)) for some in of],
        "comm_time": 0,
        "update_time": [1000 * batch * stage.all_reduce for stage in plan.stages],
        "recompute": False,
    }
    events = simulate(pin_versions(replicated(replicas, batch, num_batches), batch), config)
    done: dict[int, float] = {}  # batch -> when all GPUs have updated
    for op, _, _, end in events:
        if op.kind == "U":
            done[op.version] = max(done.get(op.version, 0), end)
    first, last = num_batches // 3, 2 * num_batches // 3
    return (done[last] - done[first]) / (1000 * batch * (last - first))


class Replicas(nn.Module):
    """Copies of a stage, each with weights of its own, that take turns."""

    def __init__(self, stage: nn.Module, number: int):
        super().__init__()
        self.copies = nn.ModuleList(copy.deepcopy(stage) for _ in range(number))
        self.turn = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.copies[self.turn](x)


class ReplicatedWorker(Worker):
    """The GPUs of a replicated stage. Before an update they add up their gradients."""

    module: Replicas

    def __init__(self, stage: nn.Module, config: dict, number: int):
        super().__init__(Replicas(stage, number), config)
        self.number = self.missing = number

    def forward(self, op: Op, x: Tensor, labels: Tensor | None = None) -> Tensor:
        self.module.turn = op.microbatch % self.number
        result = super().forward(op, x, labels)
        x, output, weights = self.in_flight[op.microbatch]
        own = {k: w for k, w in weights.items() if k.startswith(f"copies.{self.module.turn}.")}
        self.in_flight[op.microbatch] = x, output, own  # a backward is about these alone
        return result

    def update(self, op: Op) -> None:
        """When the last replica has come: all-reduce, and then the update on each of them."""
        self.missing -= 1
        if self.missing == 0:
            for name, _ in self.module.copies[0].named_parameters():
                keys = [f"copies.{replica}.{name}" for replica in range(self.number)]
                total = torch.stack([self.gradient[key] for key in keys]).sum(dim=0)
                self.gradient |= dict.fromkeys(keys, total)
            super().update(op)
            self.missing = self.number


def train_plan(config: dict, replicas: str) -> None:
    """Train a plan such as 2-1-1 on the digits: the first stage on two GPUs that take turns.

    Real arithmetic on one device, simulated time; each replica has weights of its own.
    """
    if not re.fullmatch(r"\d{1,9}(-\d{1,9})*", replicas):
        raise UserError(f"PLAN={shown(replicas)} must be the GPUs of each stage, such as 2-1-1")
    run, schedule, events = train_replicated(config, [*map(int, replicas.split("-"))])
    for gpu, row in enumerate(shorten(schedule, 16, "GPUs") if config["verbose"] else []):
        ops = row if isinstance(row, str) else " ".join(f"{op.kind}{op.microbatch}" for op in row)
        name = f"GPU{gpu} (stage {row[0].stage}): " if ops is not row else ""
        print(textwrap.shorten(name + ops, 80, placeholder=" ..."))
    if config["verbose"]:
        print("   F0: forward of microbatch 0; B0: its backward; U: weight update")
    time, used = makespan(events), utilization(events)
    apart = [differences(weights) for weights in run.weights]
    print(
        f"Plan {replicas}: {count(len(schedule), 'GPU')}, {time:.10g} time units, {used:.1%} "
        f"utilization\nLoss: {run.losses[0]:.4f} in the first batch, {run.losses[-1]:.4f} in the "
        f"last; test accuracy {run.test_accuracy:.1%}\n"
        f"Weight versions per stage: {format_per_gpu(run.peak_versions)}\n"
        f"Largest difference between the weights of two replicas: {max(apart):g}"
    )
    if config["recompute"]:
        print(RECOMPUTED)


def differences(weights: Weights) -> float:
    """The largest difference between a replica's weights and those of the first replica."""
    first = {k.split(".", 2)[2]: w.detach() for k, w in reversed(weights.items())}
    pairs = ((w.detach(), first[k.split(".", 2)[2]]) for k, w in weights.items())
    return max(float((w - other).abs().max()) for w, other in pairs)


def train_replicated(
    config: dict, replicas: list[int], dtype: torch.dtype = torch.float32
) -> tuple[Run, Schedule, list[Event]]:
    """Train the config's network with 1F1B-RR for real; weights have names as in Replicas.

    UserError: replicas that are not numbers, or do not share num_microbatches evenly.
    """
    for number in replicas:
        check_value("replicas", number, (int, 1, 64))
        if config["num_microbatches"] % number:
            microbatches = f"num_microbatches={config['num_microbatches']}"
            raise UserError(f"{microbatches} must be a multiple of {number}, a stage's replicas")
    config = {**config, "num_stages": len(replicas), "schedule": "pipedream"}
    check_config(config)
    sizes = config["num_microbatches"], config["num_batches"]
    rows = replicated(replicas, *sizes)
    schedule = pin_versions(rows, sizes[0], config["weight_stashing"], config["vertical_sync"])
    events = simulate(schedule, config)
    numbers = iter(replicas)

    def worker(stage: nn.Module, config: dict) -> Worker:
        return ReplicatedWorker(stage, config, next(numbers))

    return train(config, dtype, events=events, worker_class=worker), schedule, events


# --------------------------------------------------------------------------------------- main

LEVELS = {"nargs": "+", "type": parse_value, "required": True}
TRAIN = {key: CONFIG[key] for key in CONFIG if key not in ("num_stages", "schedule")}
MEASURED = {"schedule", "forward_time", "backward_time", "comm_time", "verbose"}
PROFILE = {k: LAB_CONFIG[k] for k in LAB_CONFIG if k not in MEASURED} | {"network": "transformer"}
COMMANDS: dict[str, tuple[Callable, dict, Callable, dict]] = {  # function, keys, check, flags
    "profile": (
        profile,
        PROFILE,
        lambda config: check_lab_config({**LAB_CONFIG, **config}),
        {"file": {"type": Path, "nargs": "?", "default": None, "metavar": "my.csv"}},
    ),
    "plan": (
        plan,
        {},
        lambda config: None,
        {
            "profile": {"type": Path, "metavar": "PROFILE"},
            "--gpus": {**LEVELS, "metavar": "N", "help": "GPUs; or GPUs per machine, machines"},
            "--bandwidth": {
                **LEVELS,
                "metavar": "B",
                "help": "bytes per second of a GPU's link; then of a machine's",
            },
            "--straight": {"action": "store_true", "help": "one GPU per stage"},
            "--memory": {"type": parse_value, "metavar": "BYTES", "help": "of each GPU"},
        },
    ),
    "train": (
        train_plan,
        TRAIN,
        lambda config: None,
        {"replicas": {"metavar": "PLAN", "help": "GPUs of each stage: 2-1-1"}},
    ),
    "fit": (fit, FIT, check_fit, {}),
}


def main() -> None:
    name = choose_command(__doc__, COMMANDS)
    if name:
        command, keys, check, other = COMMANDS[name]
        text = describe(command.__doc__) if command is fit else command.__doc__
        config, flags = parse_config(text, sys.argv[2:], keys, check, other, name)
        command(config, **flags)


if __name__ == "__main__":
    sys.exit(run_main(main))
