#!/usr/bin/env python3
"""And instead of a pipeline? Data parallelism, ZeRO and tensor parallelism, measured beside it.

    python pipedream_neighbours.py                       starts one process per GPU, four of them
    python pipedream_neighbours.py --optimizer momentum  sgd, momentum or adam
    python pipedream_neighbours.py --sweep               who sends least, at which sizes: a picture

The same network, batches and optimizer, trained by one process and then by several, in the seven
ways of pipedream_ways.py (read that first), on PyTorch's own engines. Each must end on the weights
of one process, PipeDream on those of its recurrence. All numbers are float64, so that only rounding
is left; in float32 half as many bytes would be sent and held. The "GPUs" are processes on the CPU,
and gloo carries their messages.
"""

import contextlib
import logging
import os
import re
import signal
import socket
import statistics
import struct
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from weakref import WeakSet

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during a slow import: no traceback
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # errors are one line
    if "PIPEDREAM_LAUNCHED" in os.environ:  # launch() holds stdin: end with it, at any time
        threading.Thread(target=lambda: os._exit(1 + len(os.read(0, 1))), daemon=True).start()

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.optim.optimizer import register_optimizer_step_post_hook as after_update
from torch.optim.optimizer import register_optimizer_step_pre_hook as before_update
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pipedream_distributed as distributed
import pipedream_simple as simple
import pipedream_ways as ways
from pipedream_simple import UserError, Weights, format_per_gpu, format_table
from pipedream_ways import JOBS, Batch, Job, Known, make_batches, make_network, papers

CONFIG = {
    "gpus": 4,  # processes: 2 or 4 for the transformer, which has 4 heads
    "optimizer": "adam",  # sgd, momentum or adam: nothing, one or two numbers of state per weight
    "network": "transformer",  # or residual, which has no pairs for tensor parallelism
    "layers_per_stage": 1,  # times gpus: the layers of the network
    "hidden_size": 64,  # weights grow with its square, activations with it
    "batch_size": 16,  # activations grow with it, weights do not
    "num_microbatches": 4,  # of the pipelines: at least as many as gpus
    "num_batches": 3,  # updates until the weights are compared, at least 3
    "learning_rate": 0.003,
    "timeout": 60,  # seconds until the run ends when a process has died, hangs or is stopped
}

# ------------------------------------------------------------------------------------- meters

KINDS = ["weights", "gradients", "optimizer", "activations"]
IN_A_RING: dict[str, Callable[[int], float]] = {  # what a GPU of G sends of a collective's tensor
    "all-reduce": lambda gpus: 2 * (gpus - 1) / gpus,
    "all-gather": lambda gpus: (gpus - 1) / gpus,
    "reduce-scatter": lambda gpus: (gpus - 1) / gpus,
    "broadcast": lambda gpus: (gpus - 1) / gpus,  # on average: the last one sends nothing
    "send": lambda gpus: 1,
}
IN_GLOO = {**IN_A_RING, "reduce-scatter": IN_A_RING["all-reduce"]}  # on average over the GPUs
SILENT = "recv", "wait", "wrap"  # they send nothing


class Meter(TorchDispatchMode):
    """Sees every operation of PyTorch that runs in this process, whoever asked for it.

    A collective is counted with the bytes of the tensor that it is about (the whole one, where each
    GPU has a part). Memory is counted as storages that exist: weights, gradients, optimizer state,
    and what autograd saves for a backward; but not the buffers in which FSDP2 and DDP send. It
    looks when autograd saves or uses a tensor, at every collective, and around each update.
    """

    def __init__(self, job: Job):
        super().__init__()
        self.job, self.messages, self.handed = job, Counter[str](), Counter[str]()
        self.alive: dict[str, WeakSet] = {kind: WeakSet() for kind in KINDS}
        self.peak = dict.fromkeys(KINDS, 0)
        self.look()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # it will call operations on its local tensors
        result = func(*args, **(kwargs or {}))
        if "c10d" in func.namespace:
            name = func.__name__.replace("_", "")
            kinds = [kind for kind in IN_A_RING if kind.replace("-", "") in name]
            assert kinds or any(word in name for word in SILENT), name
            lists = [tree_leaves(each) for each in (*args, result)]  # the whole and maybe its parts
            sizes = [sum(t.nbytes for t in each if isinstance(t, Tensor)) for each in lists]
            self.messages.update(kinds)
            self.handed.update(dict.fromkeys(kinds, max(sizes)))
            self.look()
        return result

    def look(self, *_) -> None:
        for kind, things in self.job.held().items():
            self.note(kind, things)

    def note(self, kind: str, things: list) -> None:
        alive = self.alive[kind]
        tensors = [thing for thing in tree_leaves(things) if isinstance(thing, Tensor)]
        with torch.no_grad():
            local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
        alive.update(map(Tensor.untyped_storage, local))
        held = alive - self.alive["weights"] if kind == "activations" else alive
        self.peak[kind] = max(self.peak[kind], sum(storage.nbytes() for storage in held))

    def save(self, tensor: Tensor) -> Tensor:
        self.note("weights", self.job.held()["weights"])  # a Linear saves its weights, too
        self.note("activations", [tensor])
        return tensor.detach()  # with its graph it would keep itself alive

    def use(self, tensor: Tensor) -> Tensor:
        self.look()
        return tensor

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        hooks = before_update(self.look), after_update(self.look)
        with self, saved_tensors_hooks(self.save, self.use):
            yield
        for hook in hooks:
            hook.remove()


def bytes_on_the_wire() -> int:
    """What the sockets of this process have sent so far: the kernel counts it (Linux only)."""
    total = 0
    for path in Path("/proc/self/fd").iterdir() if sys.platform == "linux" else []:
        with contextlib.suppress(OSError):  # not all files are sockets, nor all sockets TCP
            if os.readlink(path).startswith("socket:"):
                with socket.socket(fileno=os.dup(int(path.name))) as tcp:
                    info = tcp.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                    sent, again = struct.unpack_from("QQ", info, 200)  # tcpi_bytes_sent, _retrans
                    total += sent - again  # on a busy machine TCP sends some of it twice
    return total


# ------------------------------------------------------------------------ one process of many


class Figures(NamedTuple):
    """What a GPU tells about one way to train."""

    messages: dict[str, float]  # per step, by collective
    handed: dict[str, float]  # bytes of the tensors that they are about, per step
    wire: float  # bytes that the sockets of its process sent, per step
    peak: dict[str, int]  # bytes, by kind
    seconds: float  # of a step: the median of some without the meter
    off: float = 0  # the largest difference of a weight from what it should be
    same: bool = True  # is that a millionth at most of how far training moved the weights?

    def sent(self, gpus: int, parts: dict[str, Callable[[int], float]]) -> float:
        """Bytes per step: of each collective's tensor the part that a GPU sends."""
        return sum(parts[kind](gpus) * handed for kind, handed in self.handed.items())


def measure(job: Job, batches: list[Batch], repeats: int = 3) -> tuple[Weights, Figures]:
    """Train under the meter: the weights, and the figures of the last step."""
    meter = Meter(job)
    for call in [batches] if job.stream else [[batch] for batch in batches]:
        meter.messages.clear()
        meter.handed.clear()
        before = bytes_on_the_wire()
        with meter.watching():  # of copies: data that is at hand anyway is no activation
            job.train([(x.clone(), y.clone()) for x, y in call])
        wire = (bytes_on_the_wire() - before) / len(call)
    messages = {kind: number / len(call) for kind, number in meter.messages.items()}
    handed = {kind: number / len(call) for kind, number in meter.handed.items()}
    final, seconds = job.final(), [0.0] * (repeats == 0)
    for _ in range(repeats):
        start = time.perf_counter()
        job.train(call)
        seconds.append((time.perf_counter() - start) / len(call))
    return final, Figures(messages, handed, wire, meter.peak, statistics.median(seconds))


def activations_of_stages(config: dict) -> list[float]:
    """Bytes that autograd saves of each stage in the forward of one microbatch."""
    x, y = (part.chunk(config["num_microbatches"])[0] for part in make_batches(config)[0])
    peaks = list[float]()
    for number, stage in enumerate(make_network(config)):
        meter = Meter(ways.ordinary(stage, ways.make_optimizer(config, stage.parameters())))
        x = x.detach().clone().requires_grad_(number > 0)
        with meter.watching():
            x = stage(x)
            if number == config["gpus"] - 1:
                cross_entropy(x, y.clone())
        peaks.append(meter.peak["activations"])
    return peaks


def run_all(config: dict) -> list[dict[str, Figures]]:
    """Train in all ways, one after the other. On rank 0: of each rank, what it measured."""
    batches, figures, alone = make_batches(config), {}, [Weights(), Weights()]
    if dist.get_rank() == 0:
        final, figures["one process"] = measure(ways.one_process(config), batches)
        alone = [final, ways.recurrence(config, batches)]
    dist.broadcast_object_list(alone)  # the others wait: one process has the machine to itself
    true, delayed = alone[0], alone[1]
    network = make_network(config)
    moved = distributed.difference(dict(network.named_parameters()), true)
    network.load_state_dict(true)
    pairs: Weights = dict(ways.with_blocks(network).named_parameters())
    for name, start in JOBS.items():
        if name == "tensor parallel" and config["network"] == "residual":
            continue
        say(name)
        final, measured = measure(start(config), batches)
        expected = {"tensor parallel": pairs, "PipeDream": delayed}.get(name, true)
        off = distributed.difference(expected, final)  # of what this GPU has
        figures[name] = measured._replace(off=off, same=off <= 1e-6 * moved)
    return distributed.gather(figures)


def say(what: str) -> None:
    if dist.get_rank() == 0:
        with contextlib.suppress(BrokenPipeError):  # | head: go on, the other ranks wait
            print(end=f"{what} ... ", flush=True)


# ------------------------------------------------------------------------------------- report

TOLERANCE, EXACT = 0.05, 0.02
UNKNOWN = "for a reason that is not known here"


def verdict(measured: list, formula: list, known: Known | None, reasons: list[str]) -> str:
    """Does the formula hold? If not, what it says, by how much it is off, and why.

    A known reason counts if it predicts what is measured.
    """
    pairs = zip(measured, formula, strict=True)
    worst = max((m / f if f else 1 + m for m, f in pairs), key=lambda ratio: abs(ratio - 1))
    if abs(worst - 1) <= TOLERANCE:
        return "holds"
    reason = UNKNOWN
    if known:
        ranges = zip(known.least, measured, known.most, strict=True)
        if all((1 - EXACT) * low <= value <= (1 + EXACT) * high for low, value, high in ranges):
            reason = known.reason
    if reason not in reasons:
        reasons.append(reason)
    return f"{kib(formula)}: {worst:.2f}x ({1 + reasons.index(reason)})"


def each(values: list) -> str:
    """One value for all GPUs, or one per GPU."""
    return str(values[0]) if len({*values}) == 1 else format_per_gpu(values)


def kib(values: list) -> str:
    return each([f"{value / 1024:,.0f}" for value in values])


def print_report(config: dict, ranks: list[dict[str, Figures]]) -> bool:
    """The three tables; do all end on the weights that they should?"""
    one, reasons = ranks[0]["one process"], list[str]()
    formulas = papers(config, [one.peak["activations"], *activations_of_stages(config)])
    known = ways.known(config, formulas)
    sent = [["", "messages", "handed over", "sent", "papers"]]
    held = [["", *KINDS], ["one process", *(kib([one.peak[kind]]) for kind in KINDS)]]
    took = [["", "ms", "on the wire", "by gloo", "difference"]]
    took.append(["one process", f"{1000 * one.seconds:.1f}", "", "", ""])
    for name in ranks[-1]:
        figures = [rank[name] for rank in ranks]
        measured: dict[str, list] = {kind: [f.peak[kind] for f in figures] for kind in KINDS}
        measured["sent"] = [f.sent(len(ranks), IN_A_RING) for f in figures]
        says = {
            kind: verdict(measured[kind], formula, known.get(name, {}).get(kind), reasons)
            for kind, formula in formulas[name].items()
        }
        # int: the engine of PipeDream also says hello, once in the run, with a byte
        parts = [f"{each([int(f.messages[k]) for f in figures])} {k}" for k in figures[0].messages]
        handed = kib([sum(f.handed.values()) for f in figures])
        sent.append([name, ", ".join(parts), handed, kib(measured["sent"]), says["sent"]])
        held.append([name, *(kib(measured[kind]) for kind in KINDS)])
        held.append(["  papers", *(says[kind] for kind in KINDS)])
        seconds, off = max(f.seconds for f in figures), max(f.off for f in figures)
        gloo = statistics.mean(f.sent(len(ranks), IN_GLOO) for f in figures)
        wire = kib([f.wire for f in figures])
        took.append([name, f"{1000 * seconds:.1f}", wire, kib([gloo]), f"{off:.1e}"])
    notes = [f"   ({number}) {reason}" for number, reason in enumerate(reasons, start=1)]
    tables = ("\n".join(lines) for lines in (*map(format_table, (sent, held, took)), notes))
    same = all(figures.same for rank in ranks for figures in rank.values())
    print(REPORT.format(*tables, "✅ ALL" if same else "❌ NOT ALL"), flush=True)
    return same


REPORT = """
📊 WHAT A GPU SENDS, KiB per step
{0}
   Several numbers: GPU by GPU. handed over: the tensors of the collectives that
   ran. sent: what a GPU of G sends of them in a ring: 2(G-1)/G of an all-reduce,
   (G-1)/G of the others, all of a send. papers: an all-reduce of the weights, 1.5
   times that (ZeRO 3), four all-reduces of activations per layer, or the
   activations of a cut and their gradients. (1) and so on: explained below; an
   explanation counts only if it predicts what is measured, within 2 %.

📊 WHAT A GPU HOLDS, KiB at the peak of each
{1}
{3}

📊 A STEP: ms, KiB ON THE WIRE, AND THE LARGEST DIFFERENCE OF A WEIGHT
{2}
   on the wire: counted by the kernel, at the sockets. by gloo: what it should be
   for the collectives above, on average: gloo's all-reduce and all-gather are
   rings, its reduce-scatter a whole all-reduce, its broadcast a tree.
   ms: of processes that share cores, not of GPUs. Nothing ran on a GPU.

{4} END ON THE WEIGHTS OF ONE PROCESS, PipeDream ON THOSE OF ITS RECURRENCE"""

# -------------------------------------------------------------------------------------- sweep

SWEPT = ["data parallel", "ZeRO stage 3", "tensor parallel", "pipeline 1F1B"]
SWEEPS: dict[str, tuple] = {  # -> (its values, what stays)
    "hidden_size": ([16, 32, 64, 128, 256, 512], {"batch_size": 8}),
    "batch_size": ([4, 8, 16, 32, 64, 128], {"hidden_size": 256}),
}


def run_sweep(config: dict) -> list[dict[tuple, float]]:
    """Of each rank: (key, value, way to train) -> bytes sent in a step."""
    sent = {}
    for key, value, point in points(config):
        say(f"{key} {value}")
        for name in SWEPT:
            _, figures = measure(JOBS[name](point), make_batches(point), repeats=0)
            sent[key, value, name] = figures.sent(config["gpus"], IN_A_RING)
    return distributed.gather(sent)


def points(config: dict) -> Iterator[tuple[str, int, dict]]:
    few = {"num_batches": 1, "num_microbatches": config["gpus"], "optimizer": "sgd"}
    for key, (values, fixed) in SWEEPS.items():
        yield from ((key, value, {**config, **few, **fixed, key: value}) for value in values)


def who_sends_least(key: str, most: dict[tuple, float]) -> str:
    """Way by way, while the value of the key grows."""
    values = SWEEPS[key][0]
    best = [min(SWEPT, key=lambda name: most[key, value, name]) for value in values]
    ends = [i for i, name in enumerate(best[:-1]) if name != best[i + 1]]
    return ", then ".join([*(f"{best[i]} up to {values[i]}" for i in ends), best[-1]])


def draw_sweep(config: dict, ranks: list[dict[tuple, float]]):
    """Marks are measured, lines are the papers' formulas."""
    import pipedream_visual as visual

    most = {point: max(rank[point] for rank in ranks) / 2**20 for point in ranks[0]}
    cheap = [
        f"{key} {value}"
        for key, value in dict.fromkeys(point[:2] for point in most)
        if most[key, value, "tensor parallel"] < most[key, value, "data parallel"]
    ]
    title = f"Who sends least? As the batch grows: {who_sends_least('batch_size', most)}"
    lines = [
        f"As the hidden size grows: {who_sends_least('hidden_size', most)}. Tensor parallel sends "
        f"less than data parallel at {' and at '.join(cheap) or 'none of these sizes'}.",
        f"Of {config['gpus']} GPUs the one that sends most. Marks: measured. Lines: formulas.",
    ]
    figure = visual.new_picture(1760, 720, title, lines)
    ends = list[tuple[float, str, str]]()
    formulas = {(key, value): papers(point) for key, value, point in points(config)}
    for column, (key, (values, fixed)) in enumerate(SWEEPS.items()):
        axes = visual.add_axes(figure, 120 + 940 * column, 140, 660, 500)
        if column:
            axes.sharey(figure.axes[0])
        for name, color, marker in zip(SWEPT, visual.HUES, "os^D", strict=False):
            line = [max(formulas[key, value][name]["sent"]) / 2**20 for value in values]
            marks = [most[key, value, name] for value in values]
            axes.plot(values, line, "-", values, marks, marker, color=color, lw=1)
            ends += [(marks[-1], name, color)] * (column == 0)
        ((other, number),) = fixed.items()
        axes.set(xscale="log", yscale="log", ylabel="MiB sent per step, in float64")
        axes.set_xlabel(f"{key} (with {other} {number})")
        axes.set_xticks(values, map(str, values))
        axes.minorticks_off()
        axes.yaxis.set_major_formatter("{x:g}")
        axes.spines[["left", "bottom"]].set_visible(True)
    figure.draw_without_rendering()  # now it is known where the lines on the left end
    height = 0.0
    for end, name, color in sorted(ends):
        x, y = figure.axes[0].transData.transform((SWEEPS["hidden_size"][0][-1], end))
        height = max(y, height + 24)
        figure.text((x + 18) / 1760, height / 720, name, color=color, va="center", fontsize=10)
    return figure


# --------------------------------------------------------------------------------------- main


def main() -> None:
    block = re.search(r"\nCONFIG = \{.*?\n\}", Path(__file__).read_text("utf-8"), re.S)
    doc = f"{__doc__}\nEvery key of CONFIG is also a flag: --gpus 2.\n{block[0] if block else ''}"
    other: dict[str, dict] = {"--sweep": {"action": "store_true", "help": "draw neighbours.png"}}
    other["--out"] = {"type": Path, "metavar": "DIR", "help": "folder for it (default: .)"}
    config, flags = simple.parse_config(doc, config=CONFIG, check=ways.check, other=other)
    path = flags.get("out", Path()) / "neighbours.png"
    if "sweep" in flags:
        ways.check_sweep(config, CONFIG, path)
    elif "out" in flags:
        raise UserError("--out is the folder of the picture that --sweep draws")
    if "RANK" in os.environ and "PIPEDREAM_LAUNCHED" not in os.environ:
        raise UserError("RANK is set, but this starts its own processes: try it without torchrun")
    distributed.check_engine()
    if "RANK" not in os.environ:
        sys.exit(distributed.launch(config["gpus"], config["timeout"]))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # at once and without a word: the launcher says it
    logging.disable()
    warnings.simplefilter("ignore")  # about names that PyTorch will rename
    torch.set_default_dtype(torch.float64)
    run: Callable = run_sweep if "sweep" in flags else run_all
    ranks = distributed.in_group(lambda: run(config), "gloo", config["timeout"])
    same = True
    with contextlib.suppress(BrokenPipeError):  # | head
        if ranks and "sweep" in flags:
            from pipedream_visual import house_style, save

            with house_style():
                save({path: draw_sweep(config, ranks).savefig})
            print(f"\n{path}")
        elif ranks:
            same = print_report(config, ranks)
        print(end="", flush=True)
    os._exit(not same)  # while Python takes itself down, a thread of gloo's may abort the process


if __name__ == "__main__":
    sys.exit(simple.run_main(main))
