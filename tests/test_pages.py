"""The pages say what the program prints now: change a number in them by hand, and this fails.

Commands are run, and blocks of output compared with what they print. Every figure in the prose
stands in a sentence that is built here from computed values, or is on a short list of names.
"""

import contextlib
import functools
import inspect
import io
import os
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import write_results
from launch import launch

import pipedream_distributed
import pipedream_lab
import pipedream_simple
import pipedream_visual
from pipedream_simple import (
    CONFIG,
    GradientAudit,
    build_schedule,
    check_config,
    make_parser,
    mismatches,
    parse_config,
    peak_in_flight,
    peak_versions,
    run_main,
    simulate,
    train,
    utilization,
)

ROOT = Path(__file__).parent.parent
NAMES = ["README.md", "QUICKSTART.md", "TEST_RESULTS.md"]
PAGES = {name: (ROOT / name).read_text("utf-8") for name in NAMES}
SOURCE = (ROOT / "pipedream_simple.py").read_text("utf-8")
SCRIPTS = {
    "pipedream_simple.py": pipedream_simple.main,
    "pipedream_visual.py": pipedream_visual.main,
    "pipedream_lab.py": pipedream_lab.main,
    "pipedream_distributed.py": None,
}


def blocks(page, language=""):
    """The fenced blocks of a page in that language."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", PAGES[page], re.M | re.S)
    return [text for name, text in fenced if name == language]


def commands(page):
    """The commands that a page shows in its blocks, one by one."""
    lines = "\n".join(blocks(page, "bash")).splitlines()
    return [part.strip() for line in lines for part in line.split("&&") if part.strip()]


@functools.cache
def output_of(command):
    """What a command of ours prints, run in this process and in an empty folder."""
    script, *flags = command.removeprefix("python ").split()
    if script == "pipedream_distributed.py":  # it starts processes of its own
        done = launch(*flags)
        assert done.returncode == 0
        return done.stdout
    out, argv, folder = io.StringIO(), sys.argv, os.getcwd()
    with tempfile.TemporaryDirectory() as empty, contextlib.redirect_stdout(out):
        try:
            sys.argv = [script, *flags]
            os.chdir(empty)
            os.environ["COLUMNS"] = "100"
            assert run_main(SCRIPTS[script]) == 0
        finally:
            sys.argv = argv
            os.chdir(folder)
            del os.environ["COLUMNS"]
    return out.getvalue().replace("Running on 1 GPU", "Running on CPU")  # the pages' machine


def config_of(flags=""):
    return parse_config(make_parser(""), flags.split())[0]


def run_of(**settings):
    config = {**CONFIG, **settings}
    return simulate(build_schedule(config), config)


def same(shown, printed):
    """Equal; but a loss or a gradient's error may differ a little on another machine."""
    if shown == printed:
        return True
    split = re.compile(r"-?\d+\.\d+(?:e-\d+)?")
    if split.sub("#", shown) != split.sub("#", printed):
        return False
    pairs = zip(split.finditer(shown), split.finditer(printed), strict=True)
    return all(close(shown, a, float(b[0])) for a, b in pairs)


def close(line, shown, printed):
    """How far this figure of a line may be from what is measured now."""
    difference = abs(float(shown[0]) - printed)
    before, after = line[: shown.start()], line[shown.end() :]
    if "e-" in shown[0] and max(float(shown[0]), printed) < 1e-12:  # rounding, and nothing more
        return True
    if " KiB " in line:  # a line of the lab's comparison
        share = 0.1 if "e-" in shown[0] else 0.005
        return difference < (0.6 if after.startswith("%") else share)
    if re.search(r"[Ll]oss [\w ]*:? ?$|microbatch(es)?: $", before):
        return difference < 0.005
    if after.startswith("% off") or "weight_stashing" in line:
        return difference < 0.3
    return difference == 0


# ------------------------------------------------------------------------ commands and blocks


@pytest.mark.parametrize("page", ["README.md", "QUICKSTART.md"])
def test_every_command_is_one_that_works(page):
    assert commands(page)
    for command in commands(page):
        if command.split()[:1] == ["python"] and command.split()[1] in SCRIPTS:
            assert output_of(command)
        elif command.startswith("pip install -r "):
            assert (ROOT / command.split()[-1]).exists()  # CI runs it
        else:
            assert command in ("python -m pytest", "pip install torch matplotlib numpy")
    for script in re.findall(r"python[ \n]((?:tests/)?\w+\.py)", PAGES[page]):
        assert (ROOT / script).exists()


@pytest.mark.parametrize("page", ["README.md", "QUICKSTART.md"])
def test_every_output_block_is_what_one_of_the_pages_commands_prints(page):
    ours = [c for c in commands(page) if c.split()[-1] != "pytest" and c.startswith("python")]
    printed = [output_of(command).splitlines() for command in ours]
    assert blocks(page)
    for block in blocks(page):
        lines = block.splitlines()
        found = any(
            all(map(same, lines, text[start : start + len(lines)]))
            for text in printed
            for start in range(len(text) - len(lines) + 1)
        )
        assert found, f"{page} shows a block that none of its commands prints:\n{block}"


def test_the_config_that_the_pages_show_is_the_real_one():
    real = re.search(r"^CONFIG = \{\n.*?^\}\n", SOURCE, re.M | re.S)[0]
    assert blocks("README.md", "python")[0] == real
    before, after = blocks("QUICKSTART.md", "python")[0].split("    ...\n")
    assert real.startswith(before)
    assert real.endswith(after)


def test_the_schedule_that_the_readme_writes_runs(capsys):
    code = blocks("README.md", "python")[1]
    try:
        exec(code, {})
        assert pipedream_simple.SCHEDULES.pop("lifo")
    finally:
        pipedream_simple.SCHEDULES.pop("lifo", None)
    out = capsys.readouterr().out
    assert out.splitlines()[4].startswith("t3   | MB3 forward ")
    flush = train({**CONFIG, "schedule": "gpipe"})
    busy, *losses = map(float, re.findall(r"\d+\.\d+", out.splitlines()[-1]))
    assert busy == utilization(run_of(schedule="gpipe"))
    assert losses == pytest.approx(flush.losses, abs=1e-4)
    words = "GPipe with its backwards last in, first out"
    assert words in PAGES["README.md"]


@pytest.mark.parametrize("page", ["README.md", "QUICKSTART.md"])
def test_every_flag_that_a_page_shows_exists_and_is_accepted(page):
    text = PAGES[page].replace("\n", " ")
    shown = re.findall(r"`(--[^`]+)`", text)
    shown += re.findall(r"python pipedream_simple.py (--[^`]+?)(?:`|$)", PAGES[page], re.M)
    assert shown
    for flags in shown:
        if flags == "--timeout":
            assert '"--timeout"' in (ROOT / "pipedream_distributed.py").read_text("utf-8")
        elif flags.split()[0] not in ("--out", "--animate"):  # pipedream_visual.py's own
            check_config(config_of(flags))


@pytest.mark.parametrize("page", NAMES)
def test_every_file_picture_and_section_that_a_page_names_exists(page):
    targets = re.findall(r"\]\((?!https?://)([^)#]+)\)", PAGES[page])
    for target in targets:
        assert (ROOT / target).exists(), target
    for name in re.findall(r"`(\w+\.(?:png|gif))`", PAGES[page]):
        assert (ROOT / "images" / name).exists(), name
    for name in re.findall(r"`(\w+\.py)`", PAGES[page]):
        assert (ROOT / name).exists(), name
    for key in re.findall(r'`"(\w+)"', PAGES[page]):
        assert key in CONFIG
    sections = re.findall(r"^## (\d)\. ", PAGES["README.md"], re.M)
    assert sections == ["1", "2", "3", "4", "5", "6"]
    for found in re.findall(r"(?<!, )sections? (\d)(?: (?:to|and) (\d))?(?!\.\d)", PAGES[page]):
        assert {*found} - {""} <= {*sections}
    for text, target in re.findall(r"\[([^]]*)\]\(https?://([^)]*)\)", PAGES[page]):
        assert text == target or text == "CC BY 4.0"
    for name in re.findall(r"`(\w?f\w?b)`", PAGES[page]):
        assert name in pipedream_simple.SCHEDULES


def test_the_rooms_that_the_readme_lists_are_the_banners_of_the_file():
    banners = re.findall(r"^# -{20,} (.+)$", SOURCE, re.M)
    table = re.search(r"\| room of .*?\n\n", PAGES["README.md"], re.S)[0]
    rows = [row for row in table.splitlines() if row.startswith("|")][2:]
    listed = [name for row in rows for name in row.split("|")[1].split(",")]
    assert [name.strip() for name in listed if name.strip()] == banners
    for name in re.findall(r"`([A-Za-z_]+)`", table):
        assert re.search(rf"^(def|class) {name}\b", SOURCE, re.M) or name == "pipedream_simple"


def test_pytorch_has_what_the_readme_says():
    from torch.distributed import pipelining

    for name in ("ScheduleGPipe", "Schedule1F1B", "ScheduleInterleaved1F1B"):
        assert hasattr(pipelining, name)
    assert hasattr(pipelining, "ScheduleInterleavedZeroBubble")


# ----------------------------------------------------------------------- figures in the prose


class Prose:
    """A page without its blocks, from which every sentence that was checked is struck out."""

    def __init__(self, page):
        text = re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.M | re.S)
        self.text = re.sub(r"[ \n]+", " ", re.sub(r"^#+ \d\. ", "", text, flags=re.M))

    def says(self, sentence):
        assert sentence in self.text, f"the page does not say: {sentence}"
        self.text = self.text.replace(sentence, " ")

    def figures_left(self, allowed):
        text = re.sub(r"\]\([^)]*\)|`[^`]*`", " ", self.text)  # links; code is checked elsewhere
        text = re.sub("|".join(allowed), " ", text)
        return re.findall(r"\S*\d\S*", text)


FORMULAS = [  # and names
    r"\b1F1B\b",
    r"-2BW\b",
    r"\bZeRO-3\b",
    r"\b1/G\b",
    r"\bW\(0\)",
    r"\bMB[014]\b",
    r"GPU\d\b",
    r"[SMNnt] ?[-+] 1\b",
    r"\bd \+ 1\b",
    r"W\(t[-+]1\)",
    r"W[012]\b",
    r"1 / S\b",
    r"max\(0,",
    r"M = 1\b",
    r"[Vv]ersion [01]\b",
    r"[Ss]tages? [0123]\b",
    r"\brank 0\b",
    r"[Mm]icrobatch [47]\b",
]
SOURCES = [
    r"Python 3\.10",
    r"(SOSP|NeurIPS) 2019",
    r"ICML 2021",
    r"SC 202[01]",
    r"ICLR 2024",
    r"Repository, 1998",
    r"Sections 3\.2 \(1F1B\) and 3\.3",
    r"Sections 2\.2 \(pipelines, interleaved\) and 2\.3",
    r"[Ss]ections? \d(\.\d)?( (and|to) \d(\.\d)?)?",
    r"CC BY 4\.0",
    r"(doi|arxiv)\.org/[\w./]+",
]


def percent(**settings):
    return f"{utilization(run_of(**settings)):.1%}"


def per_gpu(numbers):
    return " | ".join(map(str, numbers))


def test_every_figure_in_the_readme_is_the_computed_one():
    readme = Prose("README.md")
    readme.says(f"about {round(len(SOURCE.splitlines()), -2):,} lines")
    counts = [1, 2, 4, 8, 16, 32]
    row = [percent(schedule="1f1b", num_microbatches=n, num_batches=1) for n in counts]
    assert row == [f"{n / (n + 3):.1%}" for n in counts]
    readme.says(f"| microbatches in a batch | {per_gpu(counts)} |")
    readme.says(f"| utilization | {per_gpu(row)} |")
    readme.says("all stages take the same time. With `--num_microbatches 8`:")
    for schedule in ("gpipe", "1f1b"):
        held = peak_in_flight(
            build_schedule({**CONFIG, "schedule": schedule, "num_microbatches": 8})
        )
        readme.says(f"| `{schedule}` | {per_gpu(held)} |")
    readme.says(
        f"{percent()} for the default run, which flushes nowhere, "
        f"against {percent(schedule='gpipe')}"
    )

    wrong = build_schedule({**CONFIG, "weight_stashing": False})
    backwards = sum(op.kind == "B" for row in wrong for op in row)
    readme.says(
        f"Of the {backwards} backwards in the run, {len(mismatches(wrong))} read other weights"
    )
    paper = "--num_microbatches 1 --num_batches 20"
    for flags in (
        paper,
        f"{paper} --vertical_sync True",
        "--num_microbatches 4",
        "--num_microbatches 4 --vertical_sync True",
    ):
        run = train(config_of(flags))
        assert run.peak_versions == peak_versions(build_schedule(config_of(flags)))
        readme.says(f"| `{flags}` | {per_gpu(run.peak_versions)} |")

    three = (("naive", 1, 1), ("gpipe", 9, 1), ("pipedream", 9, 3))
    quoted = [percent(schedule=name, num_microbatches=m, num_batches=n) for name, m, n in three]
    assert quoted == ["25.0%", "75.0%", "90.0%"]
    readme.says("Where 25 → 75 → 90 % can be seen")
    readme.says("The figures 25, 75 and 90 percent")
    for (name, m, n), words in zip(
        three,
        ("One at a time is {}/{}.", "after each are {}/{}.", "without one are {}/{}."),
        strict=True,
    ):
        part = utilization(run_of(schedule=name, num_microbatches=m, num_batches=n))
        assert part == pytest.approx(m * n / (m * n + 3))
        readme.says(words.format(m * n, m * n + 3))
    readme.says(f"{percent(schedule='naive')} → {percent(schedule='gpipe')} → {percent()}")

    with np.load(ROOT / "digits.npz") as digits:
        count, height, width = digits["images"].shape
        assert (digits["images"].min(), digits["images"].max()) == (0, 16)
    readme.says(
        f"{count:,} grey-scale images of handwritten digits, {height} x {width} pixels of 0 to 16"
    )

    readme.says(f"CONFIG has `backward_time` {CONFIG['backward_time']},")
    readme.says("in float64 to 1e-12;")  # the tolerance in test_training.py
    assert '"atol": 1e-12' in (ROOT / "tests" / "test_training.py").read_text()
    readme.says("It needs PyTorch 2.13,")
    check = inspect.getsource(pipedream_distributed.check_engine)
    assert 'torch.__version__ < "2.13"' in check
    readme.says("optimizer state (stage 1), gradients (2), weights (3)")  # ZeRO's own names
    readme.says("stages 1 and 2: as much as data parallelism")
    readme.says("Stages 1 and 2 of ZeRO save memory in data parallelism.")
    assert readme.figures_left(FORMULAS + SOURCES) == []


def test_the_words_of_the_readme_hold():
    story = " ".join(PAGES["README.md"].split())
    assert CONFIG["num_stages"] * CONFIG["layers_per_stage"] == 12
    assert "a network of twelve layers is four stages of three" in story
    slow = {"num_microbatches": 8, "comm_time": 1}
    busy = {
        name: utilization(run_of(schedule=name, **slow)) for name in ("gpipe", "1f1b", "pipedream")
    }
    assert busy["gpipe"] > max(busy["1f1b"], busy["pipedream"])
    words = (
        "vertical sync with one microbatch, where every stage misses three updates, is still far"
    )
    assert words in story
    table = PAGES["TEST_RESULTS.md"].partition("## On the way there")[2]  # checked below
    fifty = [float(row.split()[-2][:-1]) for row in table.splitlines() if row.endswith("% |")][:5]
    assert min(fifty[:4]) > 90
    assert fifty[4] < 70
    words = "GPipe overtakes it, and PipeDream as well: try `--comm_time 1 --num_microbatches 8`"
    assert words in story
    assert percent(backward_time=2) == percent()
    assert "Utilization is the same, as f and b cancel out" in story


def test_the_gradient_error_grows_as_the_readme_says():
    def worst(**settings):
        config = {**CONFIG, "weight_stashing": False, **settings}
        audit = GradientAudit(config)
        train(config, watch=audit)
        return max(audit.error.values())

    default = worst()
    for settings in ({"num_stages": 8}, {"num_microbatches": 1}, {"learning_rate": 0.3}):
        assert worst(**settings) > 1.1 * default, settings
    words = "it gets worse with more stages, with a larger learning rate and with more staleness"
    assert words in " ".join(PAGES["README.md"].split())


def test_every_figure_in_the_quick_start_is_the_computed_one():
    page = Prose("QUICKSTART.md")
    naive, flush, stream = percent(schedule="naive"), percent(schedule="1f1b"), percent()
    page.says(f"one GPU works while three wait: {naive} utilization")
    page.says(f"{naive} → {flush} → {stream}: naive, with a flush, PipeDream")
    quoted = {"num_microbatches": 9, "num_batches": 3}
    figures = [utilization(run_of(schedule=s, **quoted)) for s in ("naive", "1f1b", "pipedream")]
    page.says("25% → 75% → 90%" if figures == [0.25, 0.75, 0.9] else "other figures")
    quoted = next(command for command in commands("QUICKSTART.md") if "--out nine" in command)
    assert "25.0% → 75.0% → 90.0%" in output_of(quoted)
    page.says(f"does to utilization ({stream} before)")
    for flags in ("--num_microbatches 2", "--num_microbatches 8", "--num_stages 8"):
        config = config_of(flags)
        page.says(f"| `{flags}` | {utilization(simulate(build_schedule(config), config)):.1%} |")
    page.says(f"a flush after every batch: utilization {flush}, one weight version |")
    assert peak_versions(build_schedule(config_of("--schedule gpipe"))) == [1] * 4
    paper = "--num_microbatches 1 --num_batches 20"
    a, b, c, d = train(config_of(paper)).peak_versions
    page.says(f"| `{paper}` | the pipeline of the PipeDream paper: {a}, {b}, {c} and {d} weight")
    synced = f"{paper} --vertical_sync True"
    (alike,) = set(train(config_of(synced)).peak_versions)
    page.says(
        f"| `{synced}` | all stages read the same version for a batch, and each keeps {alike}:"
    )
    page.says(f"only one GPU of four works: {naive} utilization")

    at = {str(event.op): event.start for event in run_of()}
    page.says(f"forward passes stage after stage until t{at['3F0']}, and its backward")
    page.says(f"comes back from t{at['3B0']} to t{at['0B0']}.")
    starts = [
        sorted(e.start for e in run_of() if e.device == d and e.op.kind != "U") for d in range(4)
    ]
    all_busy = [t for t in range(46) if all(t in row for row in starts)]
    page.says(f"At t{all_busy[0]} all four GPUs work")
    idle = [t for t in range(at["0B0"]) if t not in starts[0]]
    page.says(f"From t{idle[0]} to t{idle[-1]} GPU0 is idle")
    page.says(f"From t{at['0B0']} on, until the last one has set out, there is always one to take")
    assert {*range(at["0B0"], at["0F19"] + 1)} <= {*starts[0]}
    assert peak_in_flight(build_schedule(CONFIG))[0] == 4
    page.says("`F3` (forward of microbatch 3)")
    for size in (16, 8):
        check_config({**CONFIG, "batch_size": size})
    page.says("such as 16 or 8 (a multiple of")
    page.says("PyTorch's own engine (2.13)")  # as in the README
    page.says("1. **Beginner.**")
    page.says("2. **Intermediate.**")
    page.says("3. **Advanced.**")
    assert page.figures_left([*FORMULAS, *SOURCES, r"[Ss]tep \d"]) == []


# ------------------------------------------------------------------------------- test results


@pytest.mark.parametrize(
    "function", write_results.REPEATABLE, ids=lambda function: function.__name__
)
def test_the_results_are_those_of_a_new_run(function):
    measured = write_results.section(function)
    head = measured.splitlines()[0]
    found = re.search(rf"^{head}\n.*?(?=\n\n## )", PAGES["TEST_RESULTS.md"], re.M | re.S)
    shown, new = found[0].splitlines(), measured.splitlines()
    assert len(shown) == len(new)
    for a, b in zip(shown, new, strict=True):
        if function in (write_results.learning, write_results.on_the_way):
            assert close_after_training(a, b), (a, b)
        elif function is write_results.gradients:
            assert same("weight_stashing " + a, "weight_stashing " + b), (a, b)
        else:
            assert same(a, b), (a, b)


def close_after_training(shown, new):
    """Loss within 0.005, accuracy within 0.6 %, which is two of the held-out digits."""
    figure = re.compile(r"\d+\.\d+%?")
    pairs = zip(figure.findall(shown), figure.findall(new), strict=True)
    return figure.sub("#", shown) == figure.sub("#", new) and all(
        abs(float(a.strip("%")) - float(b.strip("%"))) < (0.6 if a.endswith("%") else 0.005)
        for a, b in pairs
    )


def test_the_results_have_every_section_and_nothing_else():
    page = PAGES["TEST_RESULTS.md"]
    functions = [*write_results.REPEATABLE, write_results.real_time, write_results.speed]
    expected = [function.__doc__.strip().splitlines()[0] for function in functions]
    assert re.findall(r"^## .*$", page, re.M) == [*expected, "## What this does not show"]
    assert page.startswith(write_results.HEAD)
    assert page.endswith(write_results.LIMITS + "\n")
