#!/usr/bin/env python3
"""Do the numbers agree with the papers? Published figures beside ours, one line each.

    python pipedream_lab.py papers

Figures of a simulation or a formula must come out to the last digit; if one does not, the exit
status is 1. Measured ones cannot, and their lines say how far off they are. Published figures are
in the tables of the first and the last room, or where ours are computed. The report also prints the
docstrings of the functions in the room "sources": where figures are from, and what was assumed.
"""

import functools
import inspect
import itertools
import math
import signal
import sys
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during a slow import: no traceback

import pipedream_lab
from pipedream_lab import LAB_CONFIG, Plan, interleaved, make_plan, train_plan
from pipedream_planner import best_plan, read_graph
from pipedream_simple import (
    Op,
    count,
    format_per_gpu,
    format_table,
    input_of,
    peak_in_flight,
    run_main,
)

# ---------------------------------------------------------------------------------- published

# Zero Bubble, Table 5. Times in ms: forward, I, W, sending. GPUs p, microbatches m, layers.
TABLE_5 = """\
model  p   m  layers   T_F    T_B     T_W  T_comm   1F1B 1F1B-I ZB-H1  ZB-H2
1.5B   8  24  24     18.522 18.086  9.337  0.601   .2431 .1055  .1585  .1083
1.5B   8  32  24     18.513 18.086  9.331  0.626   .1985 .0818  .1242  .0837
1.5B   8  64  24     18.546 18.097  9.321  0.762   .1240 .0443  .0674  .0444
6.2B   8  24  32     29.718 29.444 19.927  0.527   .2347 .0808  .1323  .0698
6.2B   8  32  32     29.802 29.428 19.530  0.577   .1898 .0628  .1045  .0559
6.2B   8  64  32     29.935 29.621 19.388  0.535   .1091 .0320  .0554  .0294
14.6B 16  48  48     11.347 11.248  8.132  0.377   .2552 .1104  .1397  .0672
14.6B 16  64  48     11.307 11.254  8.101  0.379   .2082 .0852  .1088  .0516
14.6B 16 128  48     11.325 11.308  8.109  0.378   .1251 .0445  .0576  .0266
28.3B 32  96  64     10.419 10.207  7.715  0.408   .2646 .1493  .1421  .0641
28.3B 32 128  64     10.408 10.204  7.703  0.408   .2168 .1164  .1106  .0490
28.3B 32 256  64     10.402 10.248  7.698  0.460   .1352 .0624  .0594  .0257"""
TABLE_4 = {  # samples per GPU per second, measured; in the order of the lines of TABLE_5
    "1F1B": "11.8 12.5 13.6  3.50 3.70 4.03  1.40 1.49 1.64  .76 .80 .88",
    "1F1B-I": "13.1 13.4 13.9  4.01 4.08 4.19  1.54 1.59 1.66  .82 .85 .90",
    "ZB-1p": "12.9 13.4 14.2  3.88 4.00 4.20  1.61 1.67 1.76  .87 .90 .96",
}

# --------------------------------------------------------------------------------------- ours


class Figure(NamedTuple):
    """A published figure beside ours."""

    what: str
    published: str
    ours: str
    exact: bool = True  # must agree to the last digit

    @property
    def off(self) -> float:
        """How far ours is from the published one, as a share of that. nan: they are not numbers."""
        try:
            return float(self.ours) / float(self.published) - 1
        except (ValueError, ZeroDivisionError):
            return math.nan

    @property
    def difference(self) -> str:
        """= for figures that agree and must; otherwise how far ours is off."""
        if self.exact and self.ours == self.published:
            return "="
        share = "" if math.isnan(self.off) else f"{self.off:+.1%}"
        return f"{share}  NOT EXACT".strip() if self.exact else share


def digits(number: float, places: int = 4) -> str:
    """.2431, as the papers print it."""
    return f"{number:.{places}f}".removeprefix("0")


def run(schedule: str, p: int, m: int, forward=1.0, backward=2.0, w=0.0, comm=0.0, **more) -> Plan:
    """One batch of m microbatches on p GPUs; w is W's part of a backward, 0 half of it."""
    config = {"schedule": schedule, "num_stages": p, "num_microbatches": m, "num_batches": 1}
    config |= {"forward_time": forward, "backward_time": backward, "weight_gradient_time": w}
    config |= {"comm_time": comm, "batch_size": m, "layers_per_stage": 1, "chunks_per_gpu": 1}
    config |= {"recompute": False, "vertical_sync": False, "weight_stashing": True, "in_flight": 0}
    config |= {"network": "residual", "hidden_size": 12, "device": "cpu"}
    return make_plan({**LAB_CONFIG, **config, **more})


def cost(plan: Plan) -> float:
    """The longest time that a GPU takes from its first op to its last.

    In a long run a batch takes as long: each GPU goes on after its own update.
    """
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    for _, device, start, end in plan.events:
        first.setdefault(device, start)
        last[device] = end
    return max(last[device] - start for device, start in first.items())


def shortcut(p: int, m: int, chunks: int, forward: float, backward: float, comm: float) -> float:
    """The time of 1F1B-I where most microbatches need not wait between GPU p - 1 and GPU 0.

    They go around the GPUs in groups of p. The first of a group starts its next round when it has
    arrived, the others as soon as the GPU is free. No GPU can do that.
    """
    todo = [[*interleaved(device, p, m, chunks)][::-1] for device in range(p)]
    free_at, done = [0.0] * p, dict[tuple, float]()
    while any(todo):
        for device, row in enumerate(todo):
            while row:
                stage, kind, microbatch = row[-1]
                needed = input_of(Op(stage, kind, microbatch, 0), p * chunks)
                sent = needed and needed[0] != stage
                if sent and device == (0 if kind == "F" else p - 1) and microbatch % p:
                    needed = None  # the shortcut
                if needed and needed not in done:
                    break
                arrival = done[needed] + comm * bool(sent) if needed else 0
                duration = forward if kind == "F" else backward
                done[row.pop()] = free_at[device] = max(free_at[device], arrival) + duration
    return max(free_at)


Rates = list[tuple[str, dict[str, str], dict[str, float]]]  # a line of TABLE_5: what, its, ours


@functools.cache  # of times that take seconds to simulate
def bubble_rates() -> Rates:
    """What the columns of TABLE_5 say, and what comes out."""
    (*_, a, b, c, d), *lines = (line.split() for line in TABLE_5.splitlines())
    rows = []
    for model, p, m, layers, *numbers in lines:
        gpus, number, chunks = int(p), int(m), int(layers) // int(p)
        f, i, w, comm = map(float, numbers[:4])
        times, ideal = (f, i + w, w, comm), number * (f + i + w)
        cut = {"chunks_per_gpu": chunks, "layers_per_stage": chunks}
        costs = {name: cost(run(name.lower(), gpus, number, *times)) for name in (a, c, d)}
        costs["all"] = cost(run("interleaved", gpus, number, *times, **cut))
        costs["shortcut"] = shortcut(gpus, number, chunks, f / chunks, (i + w) / chunks, comm)
        rates = {name: 1 - ideal / time for name, time in costs.items()}
        published = dict(zip((a, b, c, d), numbers[4:], strict=True))
        rows.append((f"{model} p={p} m={m}", published, rates))
    return rows


# ------------------------------------------------------------------------------------ sources


def table_5() -> Iterator[Figure]:
    """Zero Bubble (Qi et al., ICLR 2024, arXiv 2401.10241), Table 5: bubble rates

    From profiled times, simulated there and here. Assumed: an op starts when its
    GPU is free and its input has arrived; links are never crowded; the rate is
    1 - m (F + I + W) / cost, and the cost the time from a GPU's first op to its
    last (with ZB-H2, GPUs do not wait for each other between batches). The
    column ZB-1p is that of ZB-H1.
    """
    for name in ("1F1B", "ZB-H1", "ZB-H2"):
        for what, published, ours in bubble_rates():
            yield Figure(f"{name} {what}", published[name], digits(ours[name]))


def table_5_interleaved() -> Iterator[Figure]:
    """The same table, 1F1B-I: with all dependencies, and with a shortcut

    "all" is `interleaved` of the lab, in which every op waits for its input. The
    printed rates come out with a "shortcut": of a group of p microbatches that go
    from the last GPU back to GPU0 (backwards: the other way) only the first one
    waits for its input. No GPU can do that: the others may start too early.
    """
    for name, exact in (("all", False), ("shortcut", True)):
        for what, published, ours in bubble_rates():
            yield Figure(f"{name} {what}", published["1F1B-I"], digits(ours[name]), exact)


def table_4() -> Iterator[Figure]:
    """Zero Bubble, Table 4: throughput, measured on A100s, as a ratio to 1F1B

    Ours: the ratio of 1 - bubble rate, with all dependencies; ZB-H1 stands for
    ZB-1p. The profiled times leave out the optimizer and were taken in runs of
    ZB-2p. Not explained: why 1F1B-I gains so much less than simulated, more than
    the optimizer or the rounding of the published figures can account for.
    """
    measured = {name: line.split() for name, line in TABLE_4.items()}
    for name, ours in (("ZB-1p", "ZB-H1"), ("1F1B-I", "all")):
        for row, one, other in zip(bubble_rates(), measured["1F1B"], measured[name], strict=True):
            what, _, rates = row
            gain = (1 - rates[ours]) / (1 - rates["1F1B"])
            published = digits(float(other) / float(one), 3)
            yield Figure(f"{name} {what}", published, digits(gain, 3), exact=False)


def equal_times() -> Iterator[Figure]:
    """The repository of Zero Bubble, for F = I = W: multiples of 1F1B

    Assumed: p = 8, m = 32. ZB-1P is ZB-H1 here, ZB-2P ZB-H2; the first GPU's
    activations, where 2 stands for 2 - 1 / p.
    """
    plans = {name: run(name, 8, 32) for name in ("1f1b", "zb-h1", "zb-h2")}
    idle = {name: cost(plan) - 32 * 3 for name, plan in plans.items()}
    held = {name: peak_in_flight(plan.schedule)[0] for name, plan in plans.items()}
    for name, bubble, activations in (("zb-h1", "1/3", "1"), ("zb-h2", "0", "2")):
        part = Fraction(idle[name] / idle["1f1b"]).limit_denominator(1000)
        yield Figure(f"bubble of {name}", bubble, str(part))
        times = held[name] / held["1f1b"]
        yield Figure(f"activations of {name}", activations, f"{times:g}", name == "zb-h1")


def dualpipe() -> Iterator[Figure]:
    """DeepSeek-V3 (arXiv 2412.19437), its table of bubbles: 1F1B and ZB1P

    (p - 1)(F + B) and (p - 1)(F + B - 2W), where B is a whole backward. Assumed:
    m = 3 p, F = 1. ZB1P is zb-h1.
    """
    for p, b, w in ((4, 2, 1), (8, 2, 1), (8, 2.5, 1), (16, 2, 0.75)):
        for name, formula in (("1f1b", (p - 1) * (1 + b)), ("zb-h1", (p - 1) * (1 + b - 2 * w))):
            idle = cost(run(name, p, 3 * p, 1, b, w)) - 3 * p * (1 + b)
            yield Figure(f"{name} p={p} B={b:g} W={w:g}", f"{formula:g}", f"{idle:g}")


def megatron() -> Iterator[Figure]:
    """Megatron-LM (Narayanan et al., SC 2021), section 2.2: bubble over ideal time

    (p - 1) / m, and (p - 1) / (v m) with v chunks per GPU. Assumed: backward = 2
    forward, free links. Measured there: recomputing costs up to 33 % of the
    throughput at small batches; ours is a batch that takes a third longer.
    """
    for p, m, v in ((4, 8, 1), (4, 8, 2), (8, 32, 1), (8, 32, 2), (8, 32, 4), (16, 16, 2)):
        plan = run("1f1b", p, m)
        if v > 1:
            plan = run("interleaved", p, m, chunks_per_gpu=v, layers_per_stage=v)
        ours = cost(plan) / (3 * m) - 1
        yield Figure(f"p={p} m={m} v={v}", digits((p - 1) / (v * m)), digits(ours))
    once, again = (cost(run("1f1b", 8, 32, recompute=on)) for on in (False, True))
    yield Figure(
        "throughput lost by recomputing", ".33", f"{1 - once / again:.2f}"[1:], exact=False
    )


def gpipe() -> Iterator[Figure]:
    """GPipe (Huang et al., NeurIPS 2019), Table 2: Transformer, M = 32, throughput

    Measured on TPUs, over K = 2 with M = 1, which is one GPU at a time. Assumed:
    equal stages and free links. Not explained: the difference; stages and links of
    theirs may not be like that. (Rows M = 1 and 4: their batches were fitted to the
    memory, so they are left out.)
    """
    for p, published in ((2, "1.8"), (4, "3.4"), (8, "6.3")):
        ours = cost(run("naive", p, 32)) / cost(run("gpipe", p, 32))
        yield Figure(f"K={p} M=32", published, f"{ours:.2f}", exact=False)


def two_versions() -> Iterator[Figure]:
    """PipeDream-2BW (Narayanan et al., ICML 2021), section 3.1: weight versions

    Two on every GPU, in the lab's pipedream with vertical sync, if M >= p: counted
    while training, as weights that exist in memory.
    """
    for p, m in ((4, 4), (4, 8), (8, 8)):
        plan = run("pipedream", p, m, num_batches=5, vertical_sync=True)
        ours = train_plan(plan).peak_versions
        yield Figure(f"p={p} M={m}", format_per_gpu([2] * p, 8), format_per_gpu(ours, 8))


def planner() -> Iterator[Figure]:
    """PipeDream (Narayanan et al., SOSP 2019): what the authors' planner prints

    optimizer/optimizer_graph_hierarchical.py in msr-fiddle/pipedream, with its
    profiles and --activation_compression_ratio 1. The plans are also those of
    Table 1 or of the authors' configurations. The speed-ups that the paper measured
    are of other machines and batch sizes than the profiles, and not comparable.
    """
    for name, gpus, bandwidth, straight, speed, parallel, stages, seconds, cuts in PUBLISHED:
        plan = best_plan(read_graph(PROFILES[name], name), [gpus], [bandwidth], straight)
        slowest = plan.slowest.seconds
        what = f"{name}, {gpus} GPUs, {bandwidth / 1e9:g} GB/s{', straight' * straight}"
        ours = "-".join(str(stage.replicas) for stage in plan.stages)
        yield Figure(f"{what}: plan", stages, ours)
        if cuts:
            ours = " ".join(str(stage.first) for stage in plan.stages[1:])
            yield Figure("   cut before layer", " ".join(map(str, cuts)), ours)
        if seconds:
            yield Figure("   seconds", seconds, f"{slowest:.9f}")
        yield Figure("   speed-up", speed, f"{plan.one_gpu / slowest:.2f}")
        ours = f"{plan.one_gpu / plan.data_parallel:.2f}"
        yield Figure("   data parallelism's", parallel, ours)


NOT_COMPARED = """Not compared:
   ZB-2p (Tables 4, 5): its schedules come from a search that is not here.
   DualPipe, (p/2 - 1)(F&B + B - 3W): F&B is a pair of overlapped ops, and ours
   never overlap.
   2BW's throughput, 1.6 and 1.15 times PipeDream-Flush's: at an M unknown here.
   ResNet-50's plan, data parallelism in the paper and 8-4-4 in the authors'
   configurations: needs its profile, which `pipedream_planner.py plan` reads."""

# ------------------------------------------------------------------------- published profiles
#
# Figures of profiler/*/profiles/*/graph.txt in the authors' repository, msr-fiddle/pipedream (MIT
# licence): node 1, node 2, ... Each node: kind, forward ms, backward ms, bytes of its output (or a
# list), bytes of its weights. vgg16 and alexnet feed each node into the next, and one shortcut.

VGG16 = """\
Input 17.972 0 77070336 0 | Conv2d 22.307 24.613 1644167168 7168 | ReLU 4.446 5.553 1644167168 0 |
Conv2d 46.201 113.330 1644167168 147712 | ReLU 4.455 5.311 1644167168 0 |
MaxPool2d 3.795 5.579 411041792 0 | Conv2d 15.155 39.648 822083584 295424 |
ReLU 2.359 2.738 822083584 0 | Conv2d 22.062 53.379 822083584 590336 |
ReLU 2.513 2.620 822083584 0 | MaxPool2d 2.211 2.788 205520896 0 |
Conv2d 10.814 18.335 411041792 1180672 | ReLU 1.377 1.380 411041792 0 |
Conv2d 17.458 27.023 411041792 2360320 | ReLU 1.640 1.463 411041792 0 |
Conv2d 14.245 33.888 411041792 2360320 | ReLU 1.549 1.321 411041792 0 |
MaxPool2d 1.169 1.513 102760448 0 | Conv2d 9.249 14.574 205520896 4720640 |
ReLU 1.026 0.696 205520896 0 | Conv2d 15.359 21.900 205520896 9439232 |
ReLU 0.848 0.679 205520896 0 | Conv2d 11.775 28.670 205520896 9439232 |
ReLU 0.881 0.642 205520896 0 | MaxPool2d 0.802 0.781 51380224 0 |
Conv2d 5.608 7.381 51380224 9439232 | ReLU 0.784 0.266 51380224 0 |
Conv2d 4.070 7.396 51380224 9439232 | ReLU 0.463 0.190 51380224 0 |
Conv2d 4.042 8.648 51380224 9439232 | ReLU 0.455 0.175 51380224 0 |
MaxPool2d 0.553 0.234 12845056 0 | Size 0 0 4 0 | View 0 0 12845056 0 |
Linear 2.475 4.575 2097152 411058176 | ReLU 0.377 0.030 2097152 0 | Dropout 0 0 2097152 0 |
Linear 0.709 0.734 2097152 67125248 | ReLU 0.277 0.032 2097152 0 | Dropout 0 0 2097152 0 |
Linear 0.393 0.548 512000 16388000
"""
ALEXNET = """\
Input 635.902 0 154140672 0 | Conv2d 22.316 6.405 198246400 93184 | ReLU 0.813 0.733 198246400 0 |
MaxPool2d 0.756 1.148 47775744 0 | Conv2d 3.128 5.612 143327232 1229568 |
ReLU 0.811 0.524 143327232 0 | MaxPool2d 0.579 0.861 33226752 0 |
Conv2d 3.260 6.610 66453504 2655744 | ReLU 0.427 0.269 66453504 0 |
Conv2d 4.423 7.197 44302336 3539968 | ReLU 0.539 0.188 44302336 0 |
Conv2d 2.815 5.497 44302336 2360320 | ReLU 0.524 0.176 44302336 0 |
MaxPool2d 0.391 0.306 9437184 0 | Size 0 0 4 0 | View 0 0 9437184 0 | Dropout 0 0 9437184 0 |
Linear 1.737 3.072 4194304 151011328 | ReLU 0.471 0.039 4194304 0 | Dropout 0 0 4194304 0 |
Linear 1.075 1.366 4194304 67125248 | ReLU 0.283 0.043 4194304 0 |
Linear 0.453 0.474 1024000 16388000
"""
GNMT = """\
Input0 0 0 0 0 | Input1 0 0 0 0 | Input2 0 0 0 0 | Embedding 0.073 6.949 6291456 132382720 |
EmuBidirLSTM 5.247 0.016 12582912 67174400 | Dropout 0.077 0.196 12582912 0 |
LSTM 3.190 5.348 [6291456;131072;131072] 50364416 | getitem 0 0 6291456 0 |
getitem 0 0 131072 0 | Dropout 0.064 0.128 6291456 0 |
LSTM 2.491 4.203 [6291456;131072;131072] 33587200 | getitem 0 0 6291456 0 |
getitem 0 0 131072 0 | Add 0 0 6291456 0 | Dropout 0.059 0.121 6291456 0 |
LSTM 2.492 4.201 [6291456;131072;131072] 33587200 | getitem 0 0 6291456 0 |
getitem 0 0 131072 0 | Add 0 0 6291456 0 | hidden 0 0 0 0 |
Embedding 0.066 0.328 6291456 132382720 | getitem 0 0 0 0 |
RecurrentAttention 4.546 6.141 [6160384;131072;131072;6160384;288768] 41979904 |
getitem 0 0 6160384 0 | getitem 0 0 131072 0 | getitem 0 0 131072 0 |
getitem 0 0 6160384 0 | Dropout 0.058 0.176 6160384 0 | Concat 0 0 6160384 0 |
getitem 0 0 0 0 | LSTM 3.151 5.288 [6160384;131072;131072] 50364416 |
getitem 0 0 6160384 0 | getitem 0 0 131072 0 | Dropout 0.061 0.174 6160384 0 |
Concat 0 0 6160384 0 | getitem 0 0 0 0 | LSTM 3.145 5.306 [6160384;131072;131072] 50364416 |
getitem 0 0 6160384 0 | getitem 0 0 131072 0 | Add 0 0 6160384 0 |
Dropout 0.055 0.198 6160384 0 | Concat 0 0 6160384 0 | getitem 0 0 0 0 |
LSTM 3.149 15.883 [6160384;131072;131072] 50364416 | getitem 0 0 6160384 0 |
getitem 0 0 131072 0 | Add 0 0 6160384 0 | Classifier 5.609 1.227 194437120 132512000
"""
GNMT_EDGES = """\
1-4 4-5 2-5 5-6 6-7 7-8 7-9 8-10 10-11 11-12 11-13 12-14 8-14 14-15 15-16 16-17 16-18 17-19 14-19
3-21 20-22 21-23 22-23 19-23 2-23 23-24 23-25 23-26 23-27 24-28 28-29 26-29 20-30 29-31 30-31 31-32
31-33 32-34 34-35 26-35 20-36 35-37 36-37 37-38 37-39 38-40 32-40 40-41 41-42 26-42 20-43 42-44
43-44 44-45 44-46 45-47 40-47 47-48"""


def graph(nodes, edges):
    """A profile as PipeDream's profiler writes it."""
    lines = []
    for number, node in enumerate(nodes.split("|"), start=1):
        kind, forward, backward, activation, weights = node.split()
        lines.append(
            f"node{number} -- {kind}(inplace) -- forward_compute_time={forward}, "
            f"backward_compute_time={backward}, activation_size={activation.replace(';', '; ')}, "
            f"parameter_size={weights}"
        )
    return "\n".join([*lines[::-1], *(f"\tnode{a} -- node{b}" for a, b in edges)])  # in any order


def row(nodes, *shortcuts):
    return graph(nodes, [*itertools.pairwise(range(1, nodes.count("|") + 2)), *shortcuts])


PROFILES = {
    "vgg16": row(VGG16, (32, 34)),
    "alexnet": row(ALEXNET, (14, 16)),
    "gnmt": graph(GNMT, [edge.split("-") for edge in GNMT_EDGES.split()]),
}

# What optimizer/optimizer_graph_hierarchical.py in that repository prints with
# --activation_compression_ratio 1, and -s for straight: GPUs, bytes/s, speed-up over one GPU, data
# parallelism's, plan, seconds of the slowest stage, and the layers at which it cuts.
PUBLISHED = [
    ("vgg16", 4, 1e9, False, "3.27", "1.15", "3-1", "0.205520896", [17]),
    ("vgg16", 8, 1e9, False, "6.48", "2.06", "7-1", "0.103833170", [24]),
    ("vgg16", 16, 3.125e9, False, "14.77", "8.05", "15-1", "0.045524808", [25]),
    ("vgg16", 4, 1e9, True, "1.64", "1.15", "1-1-1-1", None, None),
    ("alexnet", 4, 1e9, False, "2.49", "0.42", "3-1", "0.034217141", [16]),
    ("alexnet", 16, 1.25e9, False, "5.65", "1.67", "15-1", "0.015099494", [16]),
    ("gnmt", 4, 1e9, False, "3.46", "0.15", "1-1-1-1", "0.025868000", None),
]


# --------------------------------------------------------------------------------------- main


SOURCES = [table_5, table_5_interleaved, table_4, equal_times, dualpipe, megatron, gpipe]
SOURCES += [two_versions, planner]


def report() -> bool:
    """Print all figures. Do those agree that must?"""
    print("=: must agree to the last digit, and does. Other figures may differ.\n")
    agree, shares = list[bool](), list[float]()
    for source in SOURCES:
        table = [["", "published", "ours", "difference"]]
        for figure in source():
            what, published, ours, exact = figure
            table.append([what, published, ours, figure.difference])
            if exact:
                agree.append(ours == published)
            else:
                shares.append(abs(figure.off))
        print("\n".join([inspect.getdoc(source) or "", "", *format_table(table), ""]))
    within = (f"{sum(x <= most / 100 for x in shares)} within {most}%" for most in (2, 5, 10))
    number = count(len(agree) + len(shares), "figure")
    print(
        f"{NOT_COMPARED}\n\n{number}: {sum(agree)} of the {len(agree)} that must agree to the last"
    )
    print(f"digit do, and of the {len(shares)} others {', '.join(within)}.", flush=True)
    return all(agree)


def main() -> None:
    if not report():
        sys.exit(1)


if __name__ == "__main__":  # python pipedream_papers.py [--help] is a command of the lab
    sys.argv[:1] = ["pipedream_lab.py", "papers"]
    sys.exit(run_main(pipedream_lab.main))
