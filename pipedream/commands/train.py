"""Do replicated stages learn, and stay equal?

    python -m pipedream train 2-1-1        the first stage on two GPUs that take turns
    python -m pipedream train 2-2 --num_batches 200 --verbose False

Trains such a plan on the digits: real arithmetic on one device, simulated time; each replica has
weights of its own.
"""

import re
import textwrap

import pipedream_simple as simple
from pipedream.backstage.audit import VersionCount
from pipedream.backstage.text import diverged, shorten, shown
from pipedream.planning.replicas import differences, train_replicated

FLAGS = {"PLAN": "GPUs of each stage: 2-1-1"}
REFUSES = "num_stages schedule chunks_per_gpu overlap_time in_flight weight_gradient_time"
KEYS = {key: value for key, value in simple.CONFIG.items() if key not in REFUSES.split()}


def main(config: dict, plan: str) -> None:
    versions = VersionCount()
    run, schedule, events = train_replicated(config, read_replicas(str(plan)), watch=versions)
    if config["verbose"]:
        print_rows(schedule)
    time, used = simple.makespan(events), simple.utilization(events)
    apart = max(differences(weights) for weights in run.weights)
    print(
        f"Plan {plan}: {simple.count(len(schedule), 'GPU')}, {time:.10g} time units, {used:.1%} "
        f"utilization\nLoss: {run.losses[0]:.4f} in the first batch, {run.losses[-1]:.4f} in the "
        f"last; test accuracy {run.test_accuracy:.1%}\n"
        f"Weight versions per stage: {simple.format_per_gpu(versions.peak)}\n"
        f"Largest difference between the weights of two replicas: {apart:g}"
    )
    print(end=f"{simple.DIVERGED}\n" * diverged(run.losses))
    print(end=f"{simple.RECOMPUTED}\n" * config["recompute"])


def read_replicas(plan: str) -> list[int]:
    """2-1-1: the number of GPUs of each stage."""
    if not re.fullmatch(r"\d{1,9}(-\d{1,9})*", plan):
        raise simple.UserError(f"PLAN={shown(plan)} must be the GPUs of each stage, such as 2-1-1")
    return [*map(int, plan.split("-"))]


def print_rows(schedule: simple.Schedule) -> None:
    """What each GPU does first."""
    lines = []
    for gpu, row in enumerate(schedule):
        ops = " ".join(f"{op.kind}{op.microbatch}" for op in row)
        text = f"GPU{gpu} (stage {row[0].stage}): {ops}"
        lines.append(textwrap.shorten(text, 80, placeholder=" ..."))
    print("\n".join(shorten(lines, 16, "GPUs")))
    print("   F0: forward of microbatch 0; B0: its backward; U: weight update")
