"""Measure, and write TEST_RESULTS.md: python tests/write_results.py

Every section is a function that runs the program and returns text. The tests run those again that
take seconds, and compare with what the file says.
"""

import datetime
import functools
import importlib.metadata
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

from reference import delayed_sgd, mismatches  # noqa: E402

import pipedream_simple as pipe  # noqa: E402
from pipedream.backstage.audit import Audit, VersionCount  # noqa: E402
from pipedream.backstage.measures import peak_in_flight, staleness  # noqa: E402
from pipedream.schedules.plans import schedule_name, variants  # noqa: E402

CPU, DEVICE = {**pipe.CONFIG, "device": "cpu"}, ("--device", "cpu")
SEEDS = range(5)
SIZES = [(2, 2, 5), (4, 4, 5), (4, 8, 5), (4, 9, 3), (8, 4, 5), (8, 32, 2)]  # S, M, N
VARIANTS = variants(pipe.SCHEDULES)
TRAINED = [  # (variant, M); naive and 1F1B train on the numbers of GPipe
    *((name, 4) for name in VARIANTS if name not in ("naive", "1f1b")),
    *((name, 1) for name in list(VARIANTS)[3:]),
]


@functools.cache
def printed(command: str, *flags: str) -> str:
    """What a command, or a script, prints in an empty folder."""
    what = [str(ROOT / command)] if command.endswith(".py") else ["-m", "pipedream", command]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    with tempfile.TemporaryDirectory() as folder:
        run = [sys.executable, *what, *flags]
        return subprocess.check_output(run, cwd=folder, env=env, text=True)


def between(text: str, first: str, last: str) -> str:
    """The lines from the one that begins with first to the one before last."""
    return text[text.index(first) : text.index(last)].strip("\n")


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
    stashing. The timeline, the first batch, then of each batch the loss, and the weight versions
    that its first forward and its first backward read, stage 0 first.
    """
    return fenced(between(printed("pipedream_simple.py", *DEVICE), "Time|", "📊 WHAT"))


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
            simulated = pipe.utilization(pipe.simulate(pipe.build_schedule(config), config))
            formula = n / (n + stages - 1)
            largest = max(largest, abs(simulated - formula))
            row.append(f"{simulated:.1%} = {formula:.1%}")
        rows.append(row)
    heads = [pipe.NAMES[name] for name in in_a_rows]
    found = f"The largest difference is {largest:.1g}."
    return table(["S", "M", "N", *heads], *rows) + "\n\n" + found


def schedules() -> str:
    """## The schedules at the default size

    As `python pipedream_simple.py` compares them, and GPU by GPU. Bubble: the idle part of all GPU
    time. In flight and staleness: for GPU0, GPU1, GPU2, GPU3; versions are counted while training.
    """
    rows = []
    for settings in VARIANTS.values():
        config = {**CPU, **settings}
        schedule, versions = pipe.build_schedule(config), VersionCount()
        events = pipe.simulate(schedule, config)
        pipe.train(config, watch=versions)
        stale = staleness(schedule, config["num_microbatches"])
        lists = peak_in_flight(schedule), versions.peak, stale
        cells = f"{pipe.makespan(events):.10g}", f"{1 - pipe.utilization(events):.1%}"
        rows.append([name_of(config), *cells, *(" ".join(map(str, each)) for each in lists)])
    heads = ["schedule", "makespan", "bubble", "in flight", "versions", "staleness"]
    compared = between(printed("pipedream_simple.py", *DEVICE), "  schedule", "\n💡 WHAT TO")
    return fenced(compared) + "\n\n" + table(heads, *rows)


@functools.cache
def trained(variant: str, num_microbatches: int, num_batches: int, seed: int) -> pipe.Run:
    settings = {"num_microbatches": num_microbatches, "num_batches": num_batches, "seed": seed}
    return pipe.train({**CPU, **VARIANTS[variant], **settings})


def spread(values: list[float], form: str) -> str:
    """Mean (lowest to highest)."""
    return f"{statistics.fmean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def learning() -> str:
    """## After 200 batches

    `--num_batches 200 --seed 0` to `4`: mean (lowest to highest). Loss: of the last 20 batches;
    accuracy: on the fifth of the digits that was held out, another fifth for each seed. GPipe
    stands for all schedules with a flush: they train on the same numbers. With M = 1 the staleness
    is 3, 2, 1 and 0 on the four stages, with vertical sync 3 on all.
    """
    rows = []
    for variant, count in TRAINED:
        runs = [trained(variant, count, 200, seed) for seed in SEEDS]
        losses = [statistics.fmean(run.losses[-20:]) for run in runs]
        cells = spread(losses, ".3f"), spread([run.test_accuracy for run in runs], ".1%")
        rows.append([name_of({**CPU, **VARIANTS[variant]}), count, *cells])
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
        if variant == "  no stashing":
            continue
        config = {**CPU, **VARIANTS[variant], "num_microbatches": count, "num_batches": 20}
        stale = " ".join(map(str, staleness(pipe.build_schedule(config), count)))
        cells = [
            spread([trained(variant, count, n, seed).test_accuracy for seed in SEEDS], ".1%")
            for n in (5, 20, 50)
        ]
        rows.append([name_of(config), count, stale, *cells])
    return table(["schedule", "M", "stale", "5 batches", "20 batches", "50 batches"], *rows)


def all_schedules() -> str:
    """## All schedules

    `python -m pipedream compare`: five batches, with memory measured in bytes.
    """
    return fenced(printed("compare", *DEVICE).strip())


def gradients() -> str:
    """## Gradients without weight stashing

    `--weight_stashing False`, with the audit of `python -m pipedream audit`: backwards that read
    other weights than their forward, and how far the gradient is from true backpropagation at the
    weights that the forward read, |difference| / |true|, over all microbatches and stages. 20
    batches.
    """
    rows = []
    for count, stashing in ((4, False), (4, True), (1, False), (1, True)):
        settings = {"num_microbatches": count, "weight_stashing": stashing, "num_batches": 20}
        audit = Audit({**CPU, **settings}, gradients=True)
        pipe.train({**CPU, **settings}, watch=audit)
        errors = audit.error.values()
        wrong = f"{len(mismatches(pipe.build_schedule({**CPU, **settings})))} of {len(errors)}"
        rows.append(
            [count, stashing, wrong, f"{statistics.fmean(errors):.1%}", f"{max(errors):.1%}"]
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
        two_bw = f"W(t+1) = W(t) - lr * grad f(W(t-{behind}))"
        for settings, reference, delay in (
            *(
                ({"schedule": name}, "plain SGD", lambda s: 0)
                for name in ("naive", "gpipe", "1f1b")
            ),
            ({}, "recurrence of weight stashing", lambda s, m=count: math.ceil((3 - s) / m)),
            ({"vertical_sync": True}, two_bw, lambda s, behind=behind: behind),
        ):
            config = {**CPU, "num_batches": 9, "num_microbatches": count, **settings}
            ours, (_, theirs) = pipe.train(config, torch.float64), delayed_sgd(config, delay)
            stages = zip(ours.weights, theirs, strict=True)
            largest = max((a[name] - b[name]).abs().max() for a, b in stages for name in a)
            rows.append([name_of(config), count, reference, f"{largest.item():.1e}"])
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
    return fenced(subprocess.check_output(command, env=threads, text=True).strip())


def neighbours() -> str:
    """## Instead of a pipeline

    `python -m pipedream neighbours`: one transformer, trained by one process, and by four in seven
    ways, on PyTorch's own engines. All end on the weights that they should. Times are of processes
    that share cores.
    """
    text = printed("neighbours")
    return fenced(text[text.index("📊") :].strip())


def speed() -> str:
    """## Speed

    `python tests/benchmark.py` on the machine named above; ratios are of runs that took turns.
    """
    return fenced(printed("tests/benchmark.py").strip())


def time_to_a_loss() -> str:
    """## Time to a loss

    `python -m pipedream worth`: batches and simulated time to three losses, each schedule at the
    learning rate that is best for this loss. A backward takes twice as long as a forward; links
    are free. Schedules with the same delays share their training. First with the default of four
    stages and eight microbatches; then with other settings.
    """
    parts = []
    cut = "--num_microbatches 16"
    many = f"{cut} --momentum 0.9", f"{cut} --seed 100", f"{cut} --batch_size 64"
    many += f"{cut} --layers_per_stage 6", "--num_stages 8 --num_microbatches 32"
    for flags in ("", "--num_microbatches 1", cut, *many):
        text = printed("worth", *flags.split()).rpartition("\n\n")[0]  # without the picture's name
        parts.append(f"`worth {flags}`".replace(" `", "`") + f"\n\n{fenced(text)}")
    return "\n\n".join(parts)


def price_of_staleness() -> str:
    """## The price of staleness

    `python -m pipedream staleness`: 8 stages of 2 layers, hidden size 32. Learning rates are tried
    by halves at first, and around the best in steps of 2^(1/4); the grid grows where the best is
    at its edge.
    """
    return fenced(printed("staleness").rpartition("\n\n")[0])


def missing_stashing() -> str:
    """## Where missing stashing hurts

    `python -m pipedream search`: the same network with more stages and layers, in three widths, and
    for twice as many batches. One microbatch per batch, momentum 0.9. Without stashing a backward
    meets weights that are up to 7, 15 and 31 updates newer than those of its forward. At the end,
    the run in which no stashing hurts most, by the trainer of the pipeline itself.
    """
    return fenced(printed("search").rpartition("\n\n")[0])


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
    all_schedules: "What do interleaved and zero bubble change?",
    gradients: "How wrong are gradients without weight stashing?",
    differences: "Are the weights those of plain training, or of the papers' recurrences?",
}
ONCE = {  # minutes
    time_to_a_loss: "Does it pay not to flush?",
    price_of_staleness: "What do old gradients cost, with which optimizer?",
    missing_stashing: "Does missing stashing hurt?",
    neighbours: "What do data parallelism, ZeRO and tensor parallelism send and hold?",
    real_time: "Do real processes take the simulated time?",
    speed: "How fast is the program?",
}


def heading(function) -> str:
    return function.__doc__.strip().splitlines()[0].removeprefix("## ")


def text_of(function) -> str:
    """What the function's docstring says, without the heading."""
    return "\n".join(map(str.strip, function.__doc__.strip().splitlines()[2:]))


def section(function) -> str:
    return f"## {heading(function)}\n\n{text_of(function)}\n\n{function()}"


def machine() -> str:
    packages = "torch", "numpy", "matplotlib"
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    system = f"{platform.system()} on {platform.machine()}, {os.cpu_count()} cores, no GPU used"
    return f"Python {platform.python_version()}, {versions}; {system}; {datetime.date.today()}."


HEAD = """\
# Test results

Written by `python tests/write_results.py`, which runs everything below; no figure is typed by hand.
`python -m pytest` runs the first eight sections again, most of the long trainings with one seed,
and compares; losses and accuracies may differ a little."""


def contents() -> str:
    """A table of the questions and the sections that answer them."""
    rows = []
    for function, question in {**REPEATABLE, **ONCE}.items():
        anchor = heading(function).lower().replace(",", "").replace(" ", "-")
        rows.append([question, f"[{heading(function)}](#{anchor})"])
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
