"""And instead of a pipeline? Other ways, measured beside it.

    python -m pipedream neighbours                       starts one process per GPU, four of them
    python -m pipedream neighbours --optimizer momentum  sgd, momentum or adam
    python -m pipedream neighbours --sweep               who sends least, at which sizes: a picture

The same network, batches and optimizer, trained by one process and then by several, in the seven
ways of pipedream/processes/ways.py (read that first), on PyTorch's own engines. Each must end on
the weights of one process, PipeDream on those of its recurrence. All numbers are float64, so that
only rounding is left; in float32 half as many bytes would be sent and held. The "GPUs" are
processes on the CPU, and gloo carries their messages.
"""

import contextlib
import os
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from pipedream.backstage.output import check_output, draw_and_write
from pipedream.networks.transformer import NUM_HEADS
from pipedream.processes import ways
from pipedream.processes.engine import check_engine, difference, gather
from pipedream.processes.launch import become_rank, in_group, launch, say
from pipedream.processes.meter import Figures, activations_of_stages, measure
from pipedream.processes.ways import HELD, JOBS, double_batches, formulas
from pipedream.schedules.plans import PLAN_CONFIG, check_plan_config
from pipedream_simple import UserError, Weights, check_value, format_per_gpu, format_table

KEYS = {
    "gpus": 4,  # processes: 2 or 4 for the transformer, which has 4 heads
    "optimizer": "adam",  # sgd, momentum or adam: nothing, one or two numbers of state per weight
    "network": "transformer",  # or residual, which has no pairs for tensor parallelism
    "layers_per_stage": 1,  # times gpus: the layers of the network
    "hidden_size": 64,  # weights grow with its square, activations with it
    "batch_size": 16,  # activations grow with it, weights do not
    "num_microbatches": 4,  # of the pipelines: at least as many as gpus
    "num_batches": 3,  # updates until the weights are compared, at least 3
    "learning_rate": 0.003,  # of the optimizer
    "timeout": 60,  # seconds until the run ends when a process has died, hangs or is stopped
}
SWEEP_TAKES = "gpus", "layers_per_stage", "learning_rate", "timeout"
FLAGS = {"--sweep": "draw neighbours.png", "--out DIR": "folder for it (default: .)"}


def main(config: dict, sweep: bool = False, out: Path | None = None) -> None:
    config, path = ways.full_config(config), Path(out or ".") / "neighbours.png"
    check(config)
    if sweep:
        for key, default in KEYS.items():
            if key not in SWEEP_TAKES and config[key] != default:
                raise UserError(f"--sweep has its own {key}: leave out --{key}")
        check_output(path)  # now, and not after minutes
    elif out:
        raise UserError("--out is the folder of the picture that --sweep draws")
    if "RANK" in os.environ and "PIPEDREAM_LAUNCHED" not in os.environ:
        raise UserError("RANK is set, but this starts its own processes: try it without torchrun")
    check_engine()
    if "RANK" not in os.environ:
        sys.exit(launch(config["gpus"], config["timeout"]))
    become_rank()
    warnings.simplefilter("ignore")  # about names that PyTorch will rename
    torch.set_default_dtype(torch.float64)
    run: Callable = run_sweep if sweep else run_all
    ranks, same = in_group(lambda: run(config), "gloo", config["timeout"]), True
    with contextlib.suppress(BrokenPipeError):  # | head
        if ranks and sweep:
            draw_and_write(partial(draw_sweep, config, ranks), path)
            print(f"\n{path}", flush=True)
        elif ranks:
            same = print_report(config, ranks)
    os._exit(not same)  # while Python takes itself down, a thread of gloo's may abort the process


def check(config: dict) -> None:
    """Raise a UserError for the first setting with which one of the ways cannot work."""
    rules: dict = {"gpus": (int, 2, 16), "optimizer": ways.TORCH_OPTIMIZERS}
    rules |= {"network": ["residual", "transformer"], "timeout": (float, 1, 86_400)}
    rules["num_batches"] = int, 3, 1_000  # in the first two, PyTorch's engines find out and settle
    for key, rule in rules.items():
        check_value(key, config[key], rule)
    check_plan_config({key: config[key] for key in PLAN_CONFIG})
    with torch.device("meta"):  # without values
        ways.make_network(config)
    gpus, microbatches = config["gpus"], config["num_microbatches"]
    if config["network"] == "transformer" and NUM_HEADS % gpus:
        raise UserError(f"gpus={gpus} must be 2 or 4: the transformer has {NUM_HEADS} heads")
    if config["batch_size"] % gpus:
        raise UserError(f"batch_size={config['batch_size']} must be a multiple of gpus={gpus}")
    if microbatches < gpus:
        why = "or PyTorch's Schedule1F1B cannot run"
        raise UserError(f"num_microbatches={microbatches} must be at least gpus={gpus}, {why}")


def run_all(config: dict) -> list[dict[str, Figures]]:
    """Train in all ways, one after the other. On rank 0: of each rank, what it measured."""
    batches, figures, alone = double_batches(config), {}, [Weights(), Weights()]
    if dist.get_rank() == 0:
        final, figures["one process"] = measure(ways.one_process(config), batches)
        alone = [final, ways.recurrence(config, batches)]
    dist.broadcast_object_list(alone)  # the others wait: one process has the machine to itself
    network, (true, delayed) = ways.make_network(config), alone
    moved = difference(dict(network.named_parameters()), true)
    network.load_state_dict(true)
    pairs: Weights = dict(ways.with_blocks(network).named_parameters())
    for name, start in JOBS.items():
        if name == "tensor parallel" and config["network"] == "residual":
            continue
        say(f"{name} ... ")
        final, measured = measure(start(config), batches)
        expected = {"tensor parallel": pairs, "PipeDream": delayed}.get(name, true)
        off = difference(expected, final)  # of what this GPU has
        figures[name] = measured._replace(off=off, same=off <= 1e-6 * moved)
    return gather(figures)


# ------------------------------------------------------------------------------------- report

TOLERANCE, UNKNOWN = 0.05, "for a reason that is not known here"
KEPT = "the engine keeps what came in to the end of the step (PipeDream: of the run)"
BESIDE = "FSDP2 has its shard, and beside it the layers that are whole at that moment"
FSDP2 = {
    "sent": "FSDP2 pads what does not split into equal rows (the head has 10)",
    **{"weights": BESIDE, "gradients": BESIDE},
    "optimizer": "FSDP2 deals out whole rows (the head has 10)",
}
REASONS: dict[str, dict[str, str]] = {  # way -> kind -> how PyTorch differs from the papers
    "ZeRO stage 1": {
        "sent": "gradients are all-reduced, as in DDP, where the paper reduce-scatters them",
        "optimizer": "whole parameters are dealt out, not equal shares",
    },
    **{"ZeRO stage 2": FSDP2, "ZeRO stage 3": FSDP2},
    "pipeline 1F1B": {"activations": KEPT},
    "PipeDream": {"activations": KEPT, "gradients": "one microbatch's, and the sum so far"},
}


def verdict(measured: list, formula: list, reason: str, reasons: list[str]) -> str:
    """Does the formula hold? If not: what it says, by how much it is off, and a reason's number."""
    ratios = [m / f if f else 1 + m for m, f in zip(measured, formula, strict=True)]
    worst = max(ratios, key=lambda ratio: abs(ratio - 1))
    if abs(worst - 1) <= TOLERANCE:
        return "holds"
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
    papers = formulas(config, [one.bytes["activations"], *activations_of_stages(config)])
    sent = [["", "messages", "handed over", "sent", "papers"]]
    held = [["", *HELD], ["one process", *(kib([one.bytes[kind]]) for kind in HELD)]]
    took = [["", "ms", "on the wire", "by gloo", "difference"]]
    took.append(["one process", f"{1000 * one.seconds:.1f}", "", "", ""])
    for name in ranks[-1]:
        figures, known, says = [rank[name] for rank in ranks], REASONS.get(name, {}), {}
        measured = {kind: [f.bytes[kind] for f in figures] for kind in papers[name]}
        for kind, formula in papers[name].items():
            says[kind] = verdict(measured[kind], formula, known.get(kind, UNKNOWN), reasons)
        # int: the engine of PipeDream also says hello, once in the run, with a byte
        parts = [f"{each([int(f.messages[k]) for f in figures])} {k}" for k in figures[0].messages]
        handed, wire = kib([f.handed for f in figures]), kib([f.wire for f in figures])
        sent.append([name, ", ".join(parts), handed, kib(measured["sent"]), says["sent"]])
        held.append([name, *(kib(measured[kind]) for kind in HELD)])
        held.append(["  papers", *(says[kind] for kind in HELD)])
        gloo = kib([statistics.mean(f.by_gloo for f in figures)])
        slowest, off = max(f.seconds for f in figures), max(f.off for f in figures)
        took.append([name, f"{1000 * slowest:.1f}", wire, gloo, f"{off:.1e}"])
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
   activations of a cut and their gradients. (1) and so on: explained below.

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
SWEEPS: dict[str, tuple] = {  # -> (its values, what stays, and at what)
    "hidden_size": ([16, 32, 64, 128, 256, 512], "batch_size", 8),
    "batch_size": ([4, 8, 16, 32, 64, 128], "hidden_size", 256),
}


def points(config: dict) -> Iterator[tuple[str, int, dict]]:
    few = {"num_batches": 1, "num_microbatches": config["gpus"], "optimizer": "sgd"}
    for key, (values, other, number) in SWEEPS.items():
        yield from ((key, v, {**config, **few, other: number, key: v}) for v in values)


def run_sweep(config: dict) -> list[dict[tuple, float]]:
    """Of each rank: (key, value, way to train) -> bytes sent in a step."""
    sent = {}
    for key, value, point in points(config):
        say(f"{key} {value} ... ")
        for name in SWEPT:
            _, figures = measure(JOBS[name](point), double_batches(point), repeats=0)
            sent[key, value, name] = figures.bytes["sent"]
    return gather(sent)


def who_sends_least(key: str, most: dict[tuple, float]) -> str:
    """Way by way, while the value of the key grows."""
    values = SWEEPS[key][0]
    best = [min(SWEPT, key=lambda name: most[key, value, name]) for value in values]
    ends = [i for i, name in enumerate(best[:-1]) if name != best[i + 1]]
    return ", then ".join([*(f"{best[i]} up to {values[i]}" for i in ends), best[-1]])


def draw_sweep(config: dict, ranks: list[dict[tuple, float]], visual):
    """Marks are measured, lines are the papers' formulas."""
    most = {point: max(rank[point] for rank in ranks) / 2**20 for point in ranks[0]}
    papers = {(key, value): formulas(point) for key, value, point in points(config)}
    cheap = [f"{k} {v}" for k, v in papers if most[k, v, SWEPT[2]] < most[k, v, SWEPT[0]]]
    title = f"Who sends least? As the batch grows: {who_sends_least('batch_size', most)}"
    lines = [
        f"As the hidden size grows: {who_sends_least('hidden_size', most)}. Tensor parallel sends "
        f"less than data parallel at {' and at '.join(cheap) or 'none of these sizes'}.",
        f"Of {config['gpus']} GPUs the one that sends most. Marks: measured. Lines: formulas.",
    ]
    figure, ends = visual.new_picture(1760, 720, title, lines), list[tuple[float, str, str]]()
    for column, (key, (values, other, number)) in enumerate(SWEEPS.items()):
        axes = visual.add_axes(figure, 120 + 940 * column, 140, 660, 500)
        if column:
            axes.sharey(figure.axes[0])
        for name, color, marker in zip(SWEPT, visual.HUES, "os^D", strict=False):
            line = [max(papers[key, value][name]["sent"]) / 2**20 for value in values]
            marks = [most[key, value, name] for value in values]
            axes.plot(values, line, "-", values, marks, marker, color=color, lw=1)
            ends += [(marks[-1], name, color)] * (column == 0)
        axes.set(xscale="log", yscale="log", xlabel=f"{key} (with {other} {number})")
        axes.set_ylabel("MiB sent per step, in float64")
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
