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

from pipedream_distributed import gather, one_process, run_rank, simulated_time, time_message
from pipedream_lab import LAB_CONFIG, make_plan
from pipedream_planner import measure_stages, microbatch_size
from pipedream_simple import SCHEDULES, format_table

ROUNDS = 5
SIZES = {"num_stages": 2, "hidden_size": 1024, "batch_size": 1024, "device": "cpu"}


def spread(numbers: list[float], digits: int) -> str:
    """Median (lowest to highest)."""
    low, middle, high = min(numbers), statistics.median(numbers), max(numbers)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    first, cpu = dist.get_rank() == 0, torch.device("cpu")
    config = {**LAB_CONFIG, **SIZES}
    num_batches = config["num_batches"]
    plans = [make_plan({**config, "schedule": name}) for name in SCHEDULES]
    real, simulated = {name: [] for name in SCHEDULES}, {name: [] for name in SCHEDULES}
    messages = []  # milliseconds
    alone = {2: [], 1: []}  # threads -> milliseconds a batch
    for _ in range(ROUNDS):
        if first:
            for threads, taken in alone.items():
                torch.set_num_threads(threads)
                one_process(config)  # warms up
                taken.append(1000 * one_process(config) / num_batches)
            torch.set_num_threads(1)
        dist.barrier()
        times = measure_stages(config, statistics.fmean)
        messages.append(time_message(plans[0], cpu))
        for plan in plans:
            reports = gather(run_rank(plan, cpu, num_runs=2))
            if first:
                simulated[plan.name].append(simulated_time(plan, times, messages[-1]))
                real[plan.name].append(1000 * max(r.seconds[1] for r in reports) / num_batches)
    if first:
        table = [["", "ms per batch", "simulated", "real / simulated", "speed-up", "simulated"]]
        for threads, name in ((1, "1 process, 1 thread"), (2, "1 process, 2 threads")):
            speed_ups = [a / b for a, b in zip(alone[1], alone[threads], strict=True)]
            table.append([name, spread(alone[threads], 0), "", "", spread(speed_ups, 2), ""])
        for name in SCHEDULES:
            ratios = [a / b for a, b in zip(real[name], simulated[name], strict=True)]
            speed_ups = [a / b for a, b in zip(alone[1], real[name], strict=True)]
            predicted = [a / b for a, b in zip(simulated["naive"], simulated[name], strict=True)]
            table.append(
                [
                    name,
                    spread(real[name], 0),
                    f"{statistics.median(simulated[name]):.0f}",
                    spread(ratios, 2),
                    spread(speed_ups, 2),
                    f"{statistics.median(predicted):.2f}",
                ]
            )
        print(
            f"{ROUNDS} rounds of {num_batches} batches: hidden size {config['hidden_size']}, "
            f"{config['num_microbatches']} microbatches of "
            f"{microbatch_size(config)} images, 1 thread per process;\n"
            f"a message of {4 * config['hidden_size'] * microbatch_size(config):,} bytes took "
            f"{spread(messages, 2)} ms\n"
        )
        print("\n".join(format_table(table)))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
