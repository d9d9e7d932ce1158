"""Measure, and write TEST_RESULTS.md: python tests/write_results.py

Every section is a function that runs the program and returns text. The tests run those again that
take seconds, and compare with what the file says.
"""

import contextlib
import datetime
import functools
import importlib.metadata
import io
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import benchmark  # noqa: E402
from reference import delayed_sgd  # noqa: E402

from pipedream_lab import LAB_CONFIG, compare  # noqa: E402
from pipedream_simple import (  # noqa: E402
    CONFIG,
    SCHEDULES,
    Audit,
    accuracy,
    build_schedule,
    build_stages,
    format_batch,
    format_comparison,
    format_loss,
    format_timeline,
    makespan,
    mismatches,
    peak_in_flight,
    schedule_name,
    simulate,
    staleness,
    train,
    utilization,
    variants,
)
from pipedream_visual import in_a_row  # noqa: E402

CPU = {**CONFIG, "device": "cpu"}
SEEDS = range(5)
SIZES = [(2, 2, 5), (4, 4, 5), (4, 8, 5), (4, 9, 3), (8, 4, 5), (8, 32, 2)]  # S, M, N
VARIANTS = variants(SCHEDULES)
TRAINED = [  # (variant, M); naive and 1F1B train on the numbers of GPipe
    *((name, 4) for name in VARIANTS if name not in ("naive", "1f1b")),
    *((name, 1) for name in list(VARIANTS)[3:]),
]


def table(*rows: list) -> str:
    """A Markdown table; the first row is the heading."""
    rows = [[str(cell) for cell in row] for row in rows]
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def fenced(text: str) -> str:
    return f"```\n{text}\n```"


def name_of(config: dict) -> str:
    name, keeps = schedule_name(config)
    return f"{name}, {keeps}" if config["schedule"] == "pipedream" else name


# ------------------------------------------------------------------------------- the sections


def default_run() -> str:
    """## The default run

    `python pipedream_simple.py`: 4 stages, 4 microbatches, 5 batches, PipeDream with weight
    stashing. The timeline, then the versions that the second batch read, then the losses.
    """
    events, audit = simulate(build_schedule(CPU), CPU), Audit(CPU)
    run = train(CPU, watch=audit)
    losses = "\n".join(format_loss(batch, run.losses) for batch in range(CPU["num_batches"]))
    second = format_batch(1, audit, CPU, events)
    return "\n\n".join(map(fenced, [format_timeline(events), second, losses]))


def utilization_against_formula() -> str:
    """## Utilization, simulated and from the closed form

    The closed form is n / (n + S - 1) for n microbatches in a row: n is 1 for naive, M for GPipe
    and 1F1B, M * N for PipeDream. S stages, M microbatches a batch, N batches.
    """
    rows, largest = [], 0
    for stages, count, batches in SIZES:
        sizes = {"num_stages": stages, "num_microbatches": count, "num_batches": batches}
        sizes["batch_size"] = count  # time does not depend on it
        row = [stages, count, batches]
        in_a_rows = {"naive": 1, "gpipe": count, "1f1b": count, "pipedream": count * batches}
        for name, n in in_a_rows.items():
            config = {**CPU, **sizes, "schedule": name}
            simulated = utilization(simulate(build_schedule(config), config))
            formula = in_a_row(n, stages)
            largest = max(largest, abs(simulated - formula))
            row.append(f"{simulated:.1%} = {formula:.1%}")
        rows.append(row)
    heads = [schedule_name({**CPU, "schedule": name})[0] for name in in_a_rows]
    found = f"The largest difference is {largest:.1g}."
    return table(["S", "M", "N", *heads], *rows) + "\n\n" + found


def schedules() -> str:
    """## The schedules at the default size

    As `python pipedream_simple.py` compares them, and GPU by GPU. Bubble: the idle part of all GPU
    time. In flight and staleness: for GPU0, GPU1, GPU2, GPU3; versions are counted while training.
    """
    rows, runs = [], {}
    for name, settings in VARIANTS.items():
        config = {**CPU, **settings}
        schedule = build_schedule(config)
        events = simulate(schedule, config)
        runs[name] = schedule, events
        lists = (
            peak_in_flight(schedule),
            train(config).peak_versions,
            staleness(schedule, config["num_microbatches"]),
        )
        rows.append(
            [
                name_of(config),
                f"{makespan(events):.10g}",
                f"{1 - utilization(events):.1%}",
                *(" ".join(map(str, numbers)) for numbers in lists),
            ]
        )
    heads = ["schedule", "makespan", "bubble", "in flight", "versions", "staleness"]
    return fenced(format_comparison(CPU, runs)) + "\n\n" + table(heads, *rows)


@functools.cache
def trained(variant: str, num_microbatches: int) -> list[tuple[float, dict[int, float]]]:
    """(mean loss of the last 20 of 200 batches, {batches so far: accuracy}) of every seed."""
    settings = {**VARIANTS[variant], "num_microbatches": num_microbatches, "num_batches": 200}
    results = []
    for seed in SEEDS:
        config = {**CPU, **settings, "seed": seed}
        weights: dict[int, dict] = {5: {}, 20: {}, 50: {}}  # batches -> stage -> copies

        def watch(op, worker, weights=weights):
            if op.kind == "U" and op.version + 1 in weights:
                newest = worker.versions[op.version + 1]
                weights[op.version + 1][op.stage] = {
                    k: w.detach().clone() for k, w in newest.items()
                }

        run, stages = train(config, watch=watch), build_stages(config)
        on_the_way = {
            count: accuracy(stages, [of_stage[s] for s in range(len(stages))], config)
            for count, of_stage in weights.items()
        }
        last = statistics.fmean(run.losses[-20:])
        results.append((last, {**on_the_way, 200: run.test_accuracy}))
    return results


def learning() -> str:
    """## After 200 batches

    `--num_batches 200 --seed 0` to `4`: mean (lowest to highest). Loss: of the last 20 batches;
    accuracy: on the fifth of the digits that was held out, another fifth for each seed. GPipe
    stands for all schedules with a flush: they train on the same numbers. With M = 1 the staleness
    is 3, 2, 1 and 0 on the four stages, with vertical sync 3 on all.
    """
    rows = []
    for variant, count in TRAINED:
        losses, right = zip(*trained(variant, count), strict=True)
        right = [accuracies[200] for accuracies in right]
        rows.append(
            [
                name_of({**CPU, **VARIANTS[variant]}),
                count,
                f"{statistics.fmean(losses):.3f} ({min(losses):.3f} to {max(losses):.3f})",
                f"{statistics.fmean(right):.1%} ({min(right):.1%} to {max(right):.1%})",
            ]
        )
    return table(["schedule", "M", "loss", "accuracy"], *rows)


def on_the_way() -> str:
    """## On the way there

    Accuracy after 5, 20 and 50 batches: mean (lowest to highest) of the same seeds, all at the same
    learning rate. Stale: updates missed on stages 0 to 3. The largest delay does not decide: after
    20 batches 3 2 1 0 is ahead of 1 1 1 1 with each seed. After 50, only 3 3 3 3 is outside the
    range of the others.
    """
    rows = []
    for variant, count in TRAINED:
        if variant != "  no stashing":
            config = {**CPU, **VARIANTS[variant], "num_microbatches": count, "num_batches": 20}
            stale = " ".join(map(str, staleness(build_schedule(config), count)))
            right = [accuracies for _, accuracies in trained(variant, count)]
            cells = []
            for batches in (5, 20, 50):
                then = [one[batches] for one in right]
                cells.append(f"{statistics.fmean(then):.1%} ({min(then):.1%} to {max(then):.1%})")
            rows.append([name_of({**CPU, **VARIANTS[variant]}), count, stale, *cells])
    return table(["schedule", "M", "stale", "5 batches", "20 batches", "50 batches"], *rows)


def lab() -> str:
    """## All schedules of the lab

    `python pipedream_lab.py compare --backward_time 2 --num_microbatches 8`: five batches, with
    memory measured in bytes.
    """
    out, longer = io.StringIO(), {"backward_time": 2, "num_microbatches": 8}
    with contextlib.redirect_stdout(out), tempfile.TemporaryDirectory() as folder:
        compare({**LAB_CONFIG, **CPU, **longer}, Path(folder))
    return fenced(out.getvalue().rpartition("\n\n")[0])


def gradients() -> str:
    """## Gradients without weight stashing

    `--weight_stashing False`: backwards that read other weights than their forward, and how far the
    gradient is from true backpropagation at the weights that the forward read, |difference| /
    |true|, over all microbatches and stages. 20 batches.
    """
    rows = []
    for microbatches in (4, 1):
        for stashing in (False, True):
            settings = {"num_microbatches": microbatches, "weight_stashing": stashing}
            config = {**CPU, "num_batches": 20, **settings}
            audit = Audit(config, gradients=True)
            train(config, watch=audit)
            errors = audit.error.values()
            rows.append(
                [
                    microbatches,
                    stashing,
                    f"{len(mismatches(build_schedule(config)))} of {len(errors)}",
                    f"{statistics.fmean(errors):.1%}",
                    f"{max(errors):.1%}",
                ]
            )
    heads = ["M", "weight_stashing", "other weights", "mean error", "largest error"]
    return table(heads, *rows)


def differences() -> str:
    """## Final weights, against training written down without a schedule

    In float64, the largest difference of any weight after 9 batches. Plain SGD takes whole batches;
    the recurrences are those of the papers. Weight stashing (SOSP 2019, section 3.3): stage s reads
    version max(0, b - ceil((S - 1 - s) / M)) for batch b. Vertical sync with M = 4 is PipeDream-2BW
    (ICML 2021, section 3.1).
    """
    rows = []
    for count in (1, 4):
        behind = math.ceil(3 / count)
        for settings, reference, delay in (
            *(({"schedule": name}, "plain SGD", 0) for name in ("naive", "gpipe", "1f1b")),
            ({}, "recurrence of weight stashing", None),
            ({"vertical_sync": True}, f"W(t+1) = W(t) - lr * grad f(W(t-{behind}))", behind),
        ):
            config = {**CPU, "num_batches": 9, "num_microbatches": count, **settings}
            _, weights = delayed_sgd(
                config,
                lambda s, count=count, delay=delay: (
                    math.ceil((3 - s) / count) if delay is None else delay
                ),
            )
            largest = max(
                (ours[name] - theirs[name]).abs().max().item()
                for ours, theirs in zip(train(config, torch.float64).weights, weights, strict=True)
                for name in ours
            )
            rows.append([name_of(config), count, reference, f"{largest:.1e}"])
    return table(["schedule", "M", "against", "largest difference"], *rows)


def real_time() -> str:
    """## Real time against simulated time

    `torchrun --nproc-per-node 2 tests/fidelity.py`: two processes on two cores. Median (lowest to
    highest) of its rounds. Simulated: from forward, backward and update of each stage, and from a
    message, measured in the same round before the run; without the engine's own work for each op.
    Speed-up: over one process with one thread; simulated, over the naive schedule.
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node=2", str(ROOT / "tests" / "fidelity.py")]
    threads = {**os.environ, "OMP_NUM_THREADS": "1"}
    return fenced(
        subprocess.run(
            command, env=threads, check=True, capture_output=True, text=True
        ).stdout.strip()
    )


def neighbours() -> str:
    """## Instead of a pipeline

    `python pipedream_neighbours.py`: one transformer, trained by one process, and by four in seven
    ways, on PyTorch's own engines. All end on the weights that they should. Times are of processes
    that share cores.
    """
    command = [sys.executable, str(ROOT / "pipedream_neighbours.py")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return fenced(done.stdout[done.stdout.index("📊") :].strip())


def speed() -> str:
    """## Speed

    `python tests/benchmark.py` on the machine named above; ratios are of runs that took turns.
    """
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        benchmark.main()
    return fenced(out.getvalue().strip())


def printed(command: str, *flags: str) -> str:
    """What a command of the lab prints, but for the line that names the picture."""
    with tempfile.TemporaryDirectory() as folder:
        lab = [sys.executable, str(ROOT / "pipedream_lab.py"), command, "--out", folder, *flags]
        done = subprocess.run(lab, check=True, capture_output=True, text=True)
    return done.stdout.rpartition("\n\n")[0]


def loss_against_time() -> str:
    """## Loss against simulated time

    `python pipedream_lab.py worth`: batches and simulated time to a loss of 0.3, each schedule at
    its best learning rate. A backward takes twice as long as a forward; links are free. Schedules
    with the same delays share their training, which is that of the recurrence; no stashing is
    trained op by op. Compare times within a table: with more microbatches, each is smaller.
    """
    parts = []
    for flags in ("", "--num_microbatches 1", "--num_microbatches 16", "--momentum 0.9"):
        title = f"`worth {flags}`" if flags else "`worth`: 4 stages, 4 microbatches, plain SGD"
        parts.append(f"{title}\n\n{fenced(printed('worth', *flags.split()))}")
    return "\n\n".join(parts)


def price_of_staleness() -> str:
    """## The price of staleness

    `python pipedream_lab.py staleness`: 8 stages of 2 layers, hidden size 32. The grid of learning
    rates, halved from step to step: SGD 0.8 to 0.0125, momentum 3.2 to 0.0125 (times 1 - momentum),
    Adam 0.064 to 0.00025, Muon 0.064 to 0.001; it grows where the best rate is at its edge.
    """
    return fenced(printed("staleness"))


def missing_stashing() -> str:
    """## Where missing stashing hurts

    `python pipedream_lab.py staleness --search`: the same network with more stages and layers, in
    three widths, and for twice as many batches. One microbatch per batch, momentum 0.9. Without
    stashing a backward meets weights that are up to 7, 15 and 31 updates newer than those of its
    forward. At the end, the run in which no stashing hurts most, by the trainer of the pipeline
    itself.
    """
    return fenced(printed("staleness", "--search"))


LIMITS = """\
## What this does not show

- No GPU was used. Times of the schedules are simulated; only the last three sections have a clock
  in them, and only there is anything sent between processes, on one machine.
- The network is small and the data easy. That PipeDream's stale gradients get as far as fresh
  ones in 200 batches here says nothing about large models, other optimizers or learning rates.
- Without weight stashing, losses get worse in long pipelines only, and most with Adam. The
  gradients are wrong in all of them; how much that costs in large models is not measured. The
  search covers three widths of one kind of network; no transformer was searched.
- Five or ten seeds give a spread, not a proof: differences between schedules that are smaller than
  the spread mean nothing."""

REPEATABLE = {  # section -> the question that it answers
    default_run: "What does the program print?",
    utilization_against_formula: "Is utilization what the formula says?",
    schedules: "How long, how much in flight, how many versions, how stale?",
    learning: "Do stale gradients learn as well in the end?",
    on_the_way: "And on the way there?",
    lab: "What do interleaved and zero bubble change?",
    gradients: "How wrong are gradients without weight stashing?",
    differences: "Are the weights those of plain training, or of the papers' recurrences?",
}
ONCE = {  # minutes
    loss_against_time: "Does it pay not to flush?",
    price_of_staleness: "What do old gradients cost, with which optimizer? What helps?",
    missing_stashing: "Does missing stashing hurt?",
    neighbours: "What do data parallelism, ZeRO and tensor parallelism send and hold?",
    real_time: "Do real processes take the simulated time?",
    speed: "How fast is the program?",
}


def section(function) -> str:
    """What the function's docstring says, then what it measured."""
    lines = [line.strip() for line in function.__doc__.strip().splitlines()]
    return "\n".join(lines) + "\n\n" + function()


def machine() -> str:
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("torch", "numpy", "matplotlib")
    )
    return (
        f"Python {platform.python_version()}, {versions}; {platform.system()} on "
        f"{platform.machine()}, {os.cpu_count()} cores, no GPU used; {datetime.date.today()}."
    )


HEAD = """\
# Test results

Written by `python tests/write_results.py`, which runs everything below; no figure is typed by hand.
`python -m pytest` runs the first eight sections again and compares; losses and accuracies may
differ a little."""


def contents() -> str:
    """A table of the questions and the sections that answer them."""
    rows = []
    for function, question in {**REPEATABLE, **ONCE}.items():
        heading = function.__doc__.strip().splitlines()[0].removeprefix("## ")
        anchor = heading.lower().replace(",", "").replace(" ", "-")
        rows.append([question, f"[{heading}](#{anchor})"])
    return table(["question", "section"], *rows)


def main() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the tests do: the matrices are small
    parts = [HEAD, contents(), machine(), *map(section, REPEATABLE)]
    torch.set_num_threads(threads)
    parts += [*map(section, ONCE), LIMITS]
    part = ROOT / "TEST_RESULTS.md.part"
    part.write_text("\n\n".join(parts) + "\n", "utf-8")
    part.replace(ROOT / "TEST_RESULTS.md")


if __name__ == "__main__":
    main()
