"""Real time against simulated time: torchrun --nproc-per-node 2 tests/fidelity.py

Two processes of one thread on two cores, on a network whose operations are long enough to measure.
In every round rank 0 trains on the batches by itself, while the other one waits. Then both measure
forward, backward and update of the stages, at the same time, since in a run both cores are busy
(means, not medians: a run is the sum of all its ops, slow ones too). Then they time a message,
whose sender goes on computing. Only then both train, with every schedule. Each ratio is taken
within one round, so it holds on a machine that is busy with other things. Nothing is asserted.
"""

import statistics
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent.parent))

from pipedream.commands.distributed import message_beside_work, simulated_time, time_plain_training
from pipedream.planning.clock import measure_stages, microbatch_size
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
        print("\n".join(format_table(table)))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
