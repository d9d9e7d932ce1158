"""Real time against simulated time: torchrun --nproc-per-node 2 tests/fidelity.py

Two processes of one thread on two cores, on a network whose operations are long enough to measure.
In every round rank 0 trains on the batches by itself, while the other one waits. Then both measure
forward, backward and update of the stages, at the same time, since in a run both cores are busy
(means, not medians: a run is the sum of all its ops, slow ones too). Then they time a message,
whose sender goes on computing. Only then both train, with every schedule. Each ratio is taken
within one round, so it holds on a machine that is busy with other things. Nothing is asserted.

Then three models of a reader's kind, each cut in two ways: their layers are measured as `profile`
does, before and after; a step is simulated as `plan` does; and examples/pipeline.py takes such
steps. All of that in each of the rounds.
"""

import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import pipeline

from pipedream.commands.distributed import message_beside_work, simulated_time, time_plain_training
from pipedream.planning import clock
from pipedream.planning.clock import Network, measure_stages, microbatch_size, time_layers
from pipedream.planning.profiles import Layer
from pipedream.planning.steps import time_step
from pipedream.processes.engine import gather, run_rank
from pipedream.schedules.plans import PLAN_CONFIG, make_plan
from pipedream_simple import SCHEDULES, format_table

ROUNDS = 5
SIZES = {"num_stages": 2, "hidden_size": 1024, "batch_size": 1024, "device": "cpu"}


def spread(numbers: list[float], digits: int) -> str:
    """Median (lowest to highest)."""
    low, middle, high = min(numbers), statistics.median(numbers), max(numbers)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def ratios(numbers: list[float], others: list[float]) -> list[float]:
    return [a / b for a, b in zip(numbers, others, strict=True)]


def time_alone(config: dict) -> dict[int, float]:
    """Threads -> milliseconds per batch of one process."""
    taken = {}
    for threads in (2, 1):
        torch.set_num_threads(threads)
        time_plain_training(config)  # warms up
        taken[threads] = 1000 * time_plain_training(config) / config["num_batches"]
    return taken


# ------------------------------------------------------------------------- models of a reader


def network(layers: list[Callable], sizes: tuple, words: int = 0, **names) -> SimpleNamespace:
    """What examples/my_model.py has. x: numbers of these sizes, rows first; or words, if any."""

    def my_batch(number: int, train: bool = True) -> tuple[Tensor, Tensor, int]:
        generator = torch.Generator().manual_seed(number)
        if words:
            x = torch.randint(words, sizes, generator=generator)
            return x, x.roll(-1, 1), x.numel()
        y = torch.randint(10, sizes[:1], generator=generator)
        return torch.randn(sizes, generator=generator), y, len(y)

    def my_loss(output: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(output.flatten(0, -2), target.flatten(), reduction="sum")

    functions = {"my_batch": my_batch, "my_loss": my_loss, "my_rate": lambda step, steps: 1.0}
    functions["my_optimizer"] = lambda weights: torch.optim.AdamW(weights, lr=1e-4)
    return SimpleNamespace(LAYERS=layers, **{"TIED": [], "SEED": 0, "CLIP": 1.0}, **functions)


def linear(size: int, output: int) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(size, output), nn.Tanh())


def convolution(size: int, output: int, stride: int) -> Callable[[], nn.Module]:
    layer, norm = nn.Conv2d, nn.BatchNorm2d
    return lambda: nn.Sequential(layer(size, output, 3, stride, padding=1), norm(output), nn.ReLU())


def block() -> nn.Module:
    return nn.TransformerEncoderLayer(128, 4, 512, 0.0, batch_first=True, norm_first=True)


def head() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(128), nn.Linear(128, 4096, bias=False))


def classes() -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


WIDTHS = (256, 1024), (1024, 2048), (2048, 512), (512, 1536), (1536, 1024), (1024, 10)
CHANNELS = (3, 32, 1), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1)
MODELS = {
    "MLP, uneven layers": network([linear(*widths) for widths in WIDTHS], (512, 256)),
    "transformer, heavy head": network(
        [lambda: nn.Embedding(4096, 128), *[block] * 5, head], (64, 64), 4096
    ),
    "convolutions": network([*(convolution(*c) for c in CHANNELS), classes], (64, 3, 32, 32)),
}
CUTS = {"MLP, uneven layers": [(0, 2), (0, 4)], "transformer, heavy head": [(0, 3), (0, 5)]}
CUTS["convolutions"] = [(0, 2), (0, 3)]
FLAGS = {"microbatches": 8, "replicas": 1, "recompute": False, "bf16": False, "steps": 100}


def real_step(model: SimpleNamespace, cut: tuple[int, ...], schedule: str) -> float:
    """Seconds of a step of the template, the mean of six after two to warm up."""
    flags = Namespace(**FLAGS, cut=[*cut], schedule=schedule)
    made = pipeline.Pipeline(model, flags, torch.device("cpu"))
    for step in range(8):
        if step == 2:
            dist.barrier()
            start = time.perf_counter()
        made.train(step)
    return (time.perf_counter() - start) / 6


def measured(model: SimpleNamespace) -> list[Layer]:
    """What `profile` measures."""
    x, y, _ = model.my_batch(0)
    few = len(x) // FLAGS["microbatches"]
    return time_layers(Network(model, x[:few], y[:few], torch.device("cpu")), model.my_batch)[0]


def compare_models(schedule: str = "1f1b") -> list[list[str]]:
    """Rows of a table: of each model and cut, a step in milliseconds, real and simulated."""
    clock.MOST = 3  # seconds, before and after a run
    clock.APART, clock.ALONE = 9, 0  # it may be busy here
    took: dict[tuple, list[tuple[float, float]]] = {}
    for _ in range(ROUNDS):
        for name, model in MODELS.items():
            before = measured(model)
            for cut in CUTS[name]:
                real, after = real_step(model, cut, schedule), measured(model)
                steps = [[*cut], schedule, 2, FLAGS["microbatches"]]
                simulated = (time_step(before, *steps) + time_step(after, *steps)) / 2
                took.setdefault((name, cut), []).append((1000 * real, 1000 * simulated))
                before = after
    rows = []
    for (name, cut), pairs in took.items():
        real, simulated = map(list, zip(*pairs, strict=True))
        middle = f"{statistics.median(simulated):.0f}"
        cells = spread(real, 0), middle, spread(ratios(real, simulated), 2)
        rows.append([name, " ".join(map(str, cut)), *cells])
    return rows


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    first, cpu, config = dist.get_rank() == 0, torch.device("cpu"), {**PLAN_CONFIG, **SIZES}
    plans = [make_plan({**config, "schedule": name}) for name in SCHEDULES]
    real, simulated = {name: [] for name in SCHEDULES}, {name: [] for name in SCHEDULES}
    messages, alone = [], []  # milliseconds
    for _ in range(ROUNDS):
        if first:
            alone.append(time_alone(config))
        dist.barrier()
        times = measure_stages(config, statistics.fmean)
        messages.append(message_beside_work(plans[0], cpu))
        for plan in plans:
            reports = gather(run_rank(plan, cpu, num_runs=2))
            if first:
                seconds = max(report.seconds[1] for report in reports)
                simulated[plan.name].append(simulated_time(plan, times, messages[-1]))
                real[plan.name].append(1000 * seconds / config["num_batches"])
    if first:
        size = microbatch_size(config)
        print(
            f"{ROUNDS} rounds of {config['num_batches']} batches: hidden size "
            f"{config['hidden_size']}, {config['num_microbatches']} microbatches of {size} images, "
            f"1 thread per process;\na message of {4 * config['hidden_size'] * size:,} bytes took "
            f"{spread(messages, 2)} ms\n"
        )
        table = [["", "ms per batch", "simulated", "real / simulated", "speed-up", "simulated"]]
        one = [taken[1] for taken in alone]
        for threads, name in ((1, "1 process, 1 thread"), (2, "1 process, 2 threads")):
            many = [taken[threads] for taken in alone]
            table.append([name, spread(many, 0), "", "", spread(ratios(one, many), 2), ""])
        for name in SCHEDULES:
            of_rounds, model = real[name], f"{statistics.median(simulated[name]):.0f}"
            predicted = statistics.median(ratios(simulated["naive"], simulated[name]))
            cells = spread(of_rounds, 0), model, spread(ratios(of_rounds, simulated[name]), 2)
            table.append([name, *cells, spread(ratios(one, of_rounds), 2), f"{predicted:.2f}"])
        print("\n".join(format_table(table)), flush=True)
    rows = compare_models()
    if first:
        heads = ["examples/pipeline.py, 1f1b", "--cut", "ms per step", "simulated"]
        print("", *format_table([[*heads, "real / simulated"], *rows]), sep="\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
