"""Which partition is fastest: where are the cuts, and how many GPUs does each stage get?"""

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from pipedream.backstage.text import shown
from pipedream_simple import UserError, check_value, count

from .profiles import AMOUNT, Layer, sent_after


class Stage(NamedTuple):
    """Consecutive layers on one GPU, or on several. Times are seconds per minibatch."""

    first: int  # layer; the network's first is 0
    last: int  # layer, included
    levels: tuple[int, ...]  # replicas per level: (4, 2) are 4 in each of 2 machines
    compute: float  # forward and backward
    all_reduce: float  # the replicas add up their gradients
    transfer: float  # from the previous stage or to the next one, whichever takes longer
    in_flight: int  # minibatches on each of its GPUs
    bytes: float  # kept on each of its GPUs: weight versions, and activations

    @property
    def replicas(self) -> int:
        return math.prod(self.levels)

    @property
    def seconds(self) -> float:
        """A GPU computes and adds up in turn; meanwhile it sends and receives."""
        return max(self.compute + self.all_reduce, self.transfer)


class Partition(NamedTuple):
    """Stages that together use every GPU, and the times to compare them with."""

    stages: list[Stage]
    one_gpu: float  # seconds per minibatch
    data_parallel: float  # the whole network on every GPU

    @property
    def slowest(self) -> Stage:
        return max(self.stages, key=lambda stage: stage.seconds)


def best_partition(
    layers: list[Layer], gpus: list[int], bandwidths: list[float], straight=False, memory=None
) -> Partition:
    """The one whose slowest stage is fastest; of equally fast ones, the most replicas in front.

    gpus and bandwidths have an entry per level: 8 GPUs in a machine, 2 machines; bytes per second
    of a GPU's link and of a machine's, both directions together. straight: one GPU per stage, and
    a flush per batch. memory: bytes of a GPU. A stage may then keep on each GPU

        in flight * (weights + activations),  in flight = ceil(GPUs from it on / its replicas)

    where activations are what its layers keep for a backward, or their outputs where that is not
    known. With a flush the weights count once. (Gradients and the optimizer's state are left out.)
    UserError: an invalid argument, or nothing fits.

    PipeDream's planner (SOSP 2019, section 3.1). Times are per minibatch, so replicas divide them.
    A cut sends activations, and gradients of the same size back, over the links of every level that
    it crosses; this overlaps with computing. (The authors' program leaves it out by default, and
    counts what the first stage sends on its receivers' links alone.) With several levels, all
    machines that share a part of the network divide it among their GPUs in the same way. Each stage
    is then counted as if it had its machine's link to itself, as the authors' program does: several
    stages of one machine promise too much there.
    """
    check_request(layers, gpus, bandwidths, straight, memory)
    gpus, bandwidths = [*map(int, gpus)], [*map(float, bandwidths)]  # not NumPy's
    limit = math.inf if memory is None else memory
    stages = Search(layers, gpus, bandwidths, straight, limit).fastest()
    one_gpu = sum(layer.forward + layer.backward for layer in layers)
    weights = sum(layer.weights for layer in layers)
    return Partition(stages, one_gpu, sum(replicate(one_gpu, weights, tuple(gpus), bandwidths)))


# ------------------------------------------------------------------------- what a stage costs


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


def add_up(layers: list[Layer]) -> np.ndarray:
    """Of every possible stage, on one GPU: [:, i, j] has what layers i to j take.

    Seconds, infinite where j < i; bytes of weights; bytes kept per minibatch in flight.
    """
    seconds = [layer.forward + layer.backward for layer in layers]
    kept = [layer.activation if layer.kept is None else layer.kept for layer in layers]
    rows = np.array([seconds, [layer.weights for layer in layers], kept], dtype=float)
    no_layers = np.tri(len(layers), k=-1, dtype=bool)  # j < i
    costs = np.where(no_layers, 0, rows[:, None])
    np.cumsum(costs, axis=2, out=costs)  # from each i on: a difference of two sums would cancel
    costs[0][no_layers] = math.inf
    return costs


# ------------------------------------------------------------------------------------- search


class Group(NamedTuple):
    """Units that run the same layers, as replicas of each other."""

    levels: tuple[int, ...]  # how many: (2, 3) are 2 GPUs in each of 3 machines; (): the cluster
    behind: int  # GPUs that run later layers


class Search:
    """Dynamic programming from the last stage to the first.

    A unit is a GPU on the lowest level, then a machine. best[g][i, j] is the time of the best way
    to run layers i to j on g units: layers i to k on a Group of m of them, and the rest in the best
    way on g - m. A machine runs the best pipeline on its own GPUs. Which one is best depends on how
    many machines are its replicas, and under a memory limit on how many GPUs are behind it.

    Memory is O(layers^2 * units of all levels).
    """

    def __init__(self, layers: list[Layer], gpus, bandwidths, straight: bool, memory: float):
        self.gpus, self.bandwidths, self.straight, self.memory = gpus, bandwidths, straight, memory
        self.costs, self.num_layers = add_up(layers), len(layers)
        self.cut = np.array([0.0, *map(sent_after, layers[:-1]), 0.0])  # [i]: bytes, before layer i
        self.busier_cut = np.maximum.outer(self.cut[:-1], self.cut[1:])
        self.remembered = functools.lru_cache(sum(gpus))(self.compute_times)

    def fastest(self) -> list[Stage]:
        """The stages of the fastest partition.

        Of several it takes, from the first stage on, the most replicas and then the most layers
        with which it is no slower.
        """
        everything = Group((), 0)
        best = self.best_ways(everything)
        seconds = float(best[-1][0, -1])
        if seconds == math.inf:
            most = f"{self.memory / 1e9:g} GB"
            raise UserError(f"nothing fits: every plan has a GPU that must keep more than {most}")
        # Sums differ in their last digits: times that differ by less than a billionth are equal.
        self.slowest = seconds * (1 + 1e-9)
        return [*self.stages(best, everything, (0, self.num_layers - 1), np.zeros(2))]

    def best_ways(self, group: Group) -> list[np.ndarray]:
        """best, for the units inside a unit of the group; best[0][j + 1, j]: no layer is left."""
        shape = self.num_layers + 1, self.num_layers
        ends = range(self.num_layers) if group.levels else [self.num_layers - 1]
        best = [np.where(np.eye(*shape, k=-1), 0, math.inf)]
        for g in range(1, self.gpus[-1 - len(group.levels)] + 1):
            best.append(np.full(shape, math.inf))
            for m, _, times in self.first_parts(group, g):
                for j in ends:  # the first part and the rest run at once: the slower one counts
                    joined = np.maximum(times[: j + 1, : j + 1], best[g - m][1 : j + 2, j])
                    column = best[g][: j + 1, j]
                    np.minimum(column, joined.min(axis=1), out=column)
        return best

    def first_parts(self, group: Group, g: int) -> Iterator[tuple[int, Group, np.ndarray]]:
        """Inside each unit of the group, the first m of the g units that are left; most first.

        Each as m, its Group, and [i, j]: the time of the best way to run layers i to j on it.
        """
        for m in range(1 if self.straight else g, 0, -1):
            rest = (g - m) * math.prod([*self.gpus[: -1 - len(group.levels)], *group.levels])
            part = Group((m, *group.levels), group.behind + rest)
            limited = self.memory < math.inf  # or it does not matter what is behind
            yield m, part, self.remembered(part if limited else part._replace(behind=0))

    def compute_times(self, group: Group) -> np.ndarray:
        """A unit runs the best pipeline on the units inside; a GPU runs a stage, if it fits."""
        if len(group.levels) < len(self.gpus):
            inside = self.best_ways(group)[-1][:-1]
        else:
            compute, all_reduce, _, kept = self.on_gpus(group, *self.costs)
            inside = np.where(kept <= self.memory, compute + all_reduce, math.inf)
        return np.maximum(inside, self.seconds_per_byte(group) * self.busier_cut)

    def on_gpus(self, group: Group, seconds, weights, activations) -> tuple:
        """A stage's compute, all_reduce, in_flight and bytes, on a group of GPUs."""
        times = replicate(seconds, weights, group.levels, self.bandwidths)
        in_flight = count_in_flight(math.prod(group.levels), group.behind)
        versions = 1 if self.straight else in_flight  # one is enough with a flush
        return *times, in_flight, versions * weights + in_flight * activations

    def seconds_per_byte(self, group: Group) -> float:
        """For a byte and one back, over the links of all units of the group."""
        return 2 / (self.bandwidths[-len(group.levels)] * math.prod(group.levels))

    def stages(self, best: list, group: Group, span: tuple[int, int], ends) -> Iterator[Stage]:
        """The stages of best[-1] inside a unit of the group, for the layers of the span.

        ends: seconds to receive and to send over the links of the group itself.
        """
        (i, last), g = span, len(best) - 1
        while g:
            m, part, k = next(
                (m, part, k)
                for m, part, times in self.first_parts(group, g)
                for k in range(last, i - 1, -1)
                if max(times[i, k], best[g - m][k + 1, last]) <= self.slowest
            )
            outside = ends * np.array([i == span[0], k == last])
            links = np.maximum(self.seconds_per_byte(part) * self.cut[[i, k + 1]], outside)
            if len(part.levels) < len(self.gpus):
                yield from self.stages(self.best_ways(part), part, (i, k), links)
            else:
                compute, all_reduce, *held = self.on_gpus(part, *self.costs[:, i, k].tolist())
                yield Stage(i, k, part.levels, compute, all_reduce, float(links.max()), *held)
            i, g = k + 1, g - m


# ------------------------------------------------------------------------------------- checks

LEVEL = {"gpus": (int, 1, 10_000), "bandwidth": (float, 1, 1e18)}  # as in RULES
MOST_KEPT = 100_000_000  # layers * layers * GPUs: the numbers that a search keeps
MOST_STEPS = 20_000_000_000  # of count_steps: half a minute


def check_request(layers: list[Layer], gpus, bandwidths, straight: bool, memory) -> None:
    """Raise a UserError unless best_partition can answer this."""
    for key, values in (("gpus", gpus), ("bandwidth", bandwidths)):
        if not isinstance(values, list | tuple) or not values:
            raise UserError(f"{key}={values!r} must be a list, one number per level")
        for value in values:
            check_value(key, value, LEVEL[key])
    if len(gpus) != len(bandwidths):
        sizes = f"gpus has {count(len(gpus), 'level')}, bandwidth {len(bandwidths)}"
        raise UserError(f"{sizes}: each level needs both")
    if memory is not None:
        check_value("memory", memory, LEVEL["bandwidth"])
    check_value("straight", straight, [True, False])
    if not isinstance(layers, list) or not all(isinstance(layer, Layer) for layer in layers):
        raise UserError(f"layers={shown(layers)} must be a list of Layer, as of read_profile")
    for number, layer in enumerate(layers):
        for key, value in zip(Layer._fields[1:-1], layer[1:-1], strict=True):
            if value is not None or Layer._field_defaults.get(key, 0) is not None:
                check_value(f"layer {number}: {key}", value, AMOUNT)
    if not any(layer.forward + layer.backward for layer in layers):
        raise UserError("no layer takes any time")
    gpus = [*map(int, gpus)]  # NumPy's would overflow
    num_layers, num_gpus = len(layers), math.prod(gpus)
    if straight and num_gpus > num_layers:
        stages = f"{count(num_layers, 'layer')} cannot be cut into {num_gpus} stages"
        raise UserError(f"{stages}: use fewer GPUs, or replicas (without --straight)")
    steps = count_steps(num_layers, gpus, straight, memory is not None)
    if steps > MOST_STEPS or num_layers**2 * num_gpus > MOST_KEPT:
        what = f"{count(num_layers, 'layer')} on {count(num_gpus, 'GPU')}"
        what = what.replace("GPU", "stage") if straight else what
        raise UserError(f"{what} would take minutes to plan: use fewer GPUs, or join layers")


def count_steps(num_layers: int, gpus, straight: bool, limited: bool) -> int:
    """The numbers that a search goes through; each of its calls of NumPy counts as 5,000."""
    steps, times, columns = 0, 1, 1
    for units in reversed(gpus):
        divided = units if straight else units * (units + 1) // 2
        steps += times * divided * columns * (num_layers**2 + 5_000)
        times, columns = times * (divided if limited else units), num_layers
    return steps
