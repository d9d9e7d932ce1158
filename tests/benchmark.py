"""How fast and how small, as ratios measured in one run: python tests/benchmark.py

Every figure is a median over several runs, and a ratio is the median of ratios of runs that took
turns, so that it holds on a machine that is busy with other things. Nothing here is asserted.
"""

import gc
import io
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from pipedream.schedules.files import read_csv, write_csv  # noqa: E402
from pipedream.schedules.plans import PLAN_CONFIG, make_plan  # noqa: E402
from pipedream_simple import (  # noqa: E402
    CONFIG,
    build_schedule,
    build_stages,
    load_digits,
    make_batches,
    one_f_one_b,
    simulate,
    train,
)
from pipedream_visual import PICTURES, house_style  # noqa: E402


def seconds(call, *arguments) -> float:
    start = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - start


def compare(ours, theirs, runs: int) -> str:
    """Median of ours / theirs over runs in turn, with the lowest and the highest."""
    ours(), theirs()  # not counted: the first run also warms up
    ratios = [seconds(ours) / seconds(theirs) for _ in range(runs)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}, {runs} runs)"


def python(*arguments):
    def run():
        subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True)

    return run


def list_and_simulate(num_stages: int, num_microbatches: int) -> float:
    """Seconds for 1F1B of this size, rows and times."""
    sizes = {"num_stages": num_stages, "num_microbatches": num_microbatches, "num_batches": 1}
    config = {**CONFIG, "schedule": "1f1b", **sizes, "batch_size": num_microbatches}
    return seconds(lambda: simulate(build_schedule(config), config))


def large_schedules() -> list[tuple[str, float, int]]:
    """(what, seconds, operations) of the library's own work at 64 GPUs."""
    config = {**PLAN_CONFIG, "num_stages": 64, "num_microbatches": 2048, "num_batches": 1}
    config |= {"schedule": "interleaved", "layers_per_stage": 2, "chunks_per_gpu": 2}
    config |= {"batch_size": 2048}
    plans = []
    took = seconds(lambda: plans.append(make_plan(config)))
    count = sum(map(len, plans[0].schedule))
    results = [("interleaved, listed and simulated", took, count)]
    rows = [list(one_f_one_b(stage, 64, 4096)) for stage in range(64)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "large.csv"
        write_csv(rows, path)
        took = statistics.median(seconds(read_csv, path) for _ in range(3))
    return [*results, ("CSV of 1F1B read and checked", took, sum(map(len, rows)))]


def draw_timeline(num_stages: int, num_microbatches: int) -> tuple[float, int]:
    """Seconds for one picture of GPipe of this size, from rows to PNG; and how many artists."""
    sizes = {"num_stages": num_stages, "num_microbatches": num_microbatches}
    config = {**CONFIG, **sizes, "batch_size": num_microbatches}

    def draw():
        with house_style():
            figures.append(PICTURES["microbatch_forward"](config))
            figures[-1].savefig(io.BytesIO())

    figures = []
    took = statistics.median(seconds(draw) for _ in range(3))
    return took, len(figures[-1].findobj())


def plain_loop(config: dict, cut: bool) -> float:
    """Gradient accumulation over the same microbatches, as one writes it without a pipeline.

    With cut the network is run stage by stage, autograd starting anew at each as it must when the
    neighbours are other GPUs; without, as one graph. Losses and test accuracy as train takes them.
    """
    stages = build_stages(config) if cut else [nn.Sequential(*build_stages(config))]
    weights = [w for stage in stages for w in stage.parameters()]
    losses = []
    for batch_x, batch_y in make_batches(config):
        parts = config["num_microbatches"]
        for x, y in zip(batch_x.chunk(parts), batch_y.chunk(parts), strict=True):
            graphs = []
            for stage in stages:
                x = x.detach().requires_grad_(bool(graphs))
                graphs.append((x, stage(x)))
                x = graphs[-1][1]
            loss = cross_entropy(x, y) / parts
            losses.append(loss.item())
            loss.backward()
            for (received, _), (_, output) in zip(graphs[:0:-1], graphs[-2::-1], strict=True):
                torch.dot(output.flatten(), received.grad.flatten()).backward()
        with torch.no_grad():
            for w in weights:
                w -= config["learning_rate"] * w.grad
                w.grad = None
    _, (x, y), _ = load_digits(config)
    with torch.no_grad():
        return (nn.Sequential(*stages)(x).argmax(1) == y).double().mean().item()


def main():
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    gc.freeze()  # as run_main does
    gc.set_threshold(100_000)

    default, imports = python("pipedream_simple.py"), python("-c", "import torch, numpy")
    print("\ndefault run / importing torch and numpy")
    print("  ", compare(default, imports, runs=7))

    with tempfile.TemporaryDirectory() as folder:
        pictures = python("pipedream_visual.py", "--out", folder)
        imports = python("-c", "import torch, matplotlib.pyplot")
        print("\nthe five pictures / importing torch and matplotlib.pyplot")
        print("  ", compare(pictures, imports, runs=7))

    print("\na picture of one batch: stages x microbatches, seconds, matplotlib artists")
    for num_stages, num_microbatches in ((4, 4), (8, 16), (16, 64), (16, 256)):
        took, artists = draw_timeline(num_stages, num_microbatches)
        print(f"   {num_stages:>2} x {num_microbatches:<3}  {took:6.2f} s  {artists:>5,}")

    print("\n1F1B listed and simulated: operations, seconds, microseconds an operation")
    for num_stages, num_microbatches in ((4, 125), (8, 1024), (32, 1024), (64, 4096)):
        times = [list_and_simulate(num_stages, num_microbatches) for _ in range(5)]
        count, took = 2 * num_stages * num_microbatches, statistics.median(times)
        print(f"   {count:>9,}  {took:8.4f} s  {1e6 * took / count:5.2f} us")

    print("\nthe library at 64 GPUs: operations, seconds, microseconds an operation")
    for name, took, count in large_schedules():
        print(f"   {name:<34} {count:>9,}  {took:8.4f} s  {1e6 * took / count:5.2f} us")

    config = {**CONFIG, "hidden_size": 512, "batch_size": 256, "num_batches": 20, "device": "cpu"}
    print("\ntraining, hidden size 512, batch size 256, 20 batches / a plain loop")
    one = {"num_stages": 1, "layers_per_stage": 12}
    for name, settings, cut in (
        ("1 stage / plain loop, one graph", one, False),
        ("4 stages, 1f1b / plain loop, cut at the stages", {"schedule": "1f1b"}, True),
        ("4 stages, 1f1b / plain loop, one graph", {"schedule": "1f1b"}, False),
        ("4 stages, pipedream / plain loop, cut at the stages", {}, True),
        ("4 stages, pipedream / plain loop, one graph", {}, False),
    ):
        ours = {**config, **settings}
        ratio = compare(lambda c=ours: train(c), lambda k=cut: plain_loop(config, k), runs=7)
        print(f"   {name:<52} {ratio}")


if __name__ == "__main__":
    main()
