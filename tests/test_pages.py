"""The pages say what the program prints now: change a number in them by hand, and this fails.

Commands are run, and blocks of output compared with what they print. In the prose, figures are
checked and sentences are not: every figure must be a computed one, in a paragraph or table row
whose words say what it is of, or be on a short list of names (years, sections, GPU0, W1 ...).
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
import test_planner
from launch import launch
from test_neighbours import TEMPLATE

import pipedream_distributed
import pipedream_lab
import pipedream_page
import pipedream_planner
import pipedream_simple
import pipedream_visual
from pipedream_simple import (
    CONFIG,
    Audit,
    build_schedule,
    check_config,
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
    "pipedream_page.py": pipedream_page.main,
    "pipedream_planner.py": pipedream_planner.main,
    "pipedream_distributed.py": None,
    "pipedream_neighbours.py": None,
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
    if SCRIPTS[script] is None:  # it starts processes of its own
        done = launch(*flags, script=script)
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
    return parse_config("", flags.split())[0]


def run_of(**settings):
    config = {**CONFIG, **settings}
    config["batch_size"] = config["num_microbatches"]  # time does not depend on it
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
    if re.search(r"e-\d+ *$", line):  # a line of the lab's comparison
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
        elif command.startswith("torchrun "):
            assert command == TEMPLATE  # test_neighbours.py runs it
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
            assert '"timeout"' in (ROOT / "pipedream_distributed.py").read_text("utf-8")
        elif flags.split()[0] not in ("--out", "--animate", "--sweep"):  # not CONFIG's
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
    banners = re.findall(r"^# [-=]{20,} ([^=\n]+?)(?: =+)?$", SOURCE, re.M)
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

NAMES_AND_FORMULAS = [
    r"\b1F1B\b", r"-2BW\b", r"\bZeRO-3\b", r"\b1/G\b", r"\bW\(0\)", r"\bMB\d\b", r"GPU\d\b",
    r"[SMNnt] ?[-+] 1\b", r"\bd \+ 1\b", r"W\(t[-+]1\)", r"W[012]\b", r"1 / S\b", r"max\(0,",
    r"M = 1\b", r"[Vv]ersion [01]\b", r"\bv[0-9]\b", r"[Ss]tages? [0123]\b", r"\brank 0\b",
    r"Batch \d", r"Microbatches 4 to 7\b", r"[Mm]icrobatch [3478]\b", r"[Ss]tep \d", r"^#+ \d\. ",
    r"\b\d\. (?=\*\*)", r"\bfloat64\b", r"\bVGG-16\b",
    r"\bLlama 2 7B\b",
]  # fmt: skip
SOURCES = [
    r"Python 3\.10", r"(SOSP|NeurIPS) 2019", r"ICML 2021", r"SC 202[01]", r"ICLR 2024",
    r"Repository, 1998", r"Korthikanti et al\., 2022",
    r"[Ss]ections? \d(\.\d)?( \([^)]*\))?(( and| to|,) \d(\.\d)?)?",
    r"CC BY 4\.0", r"(doi|arxiv)\.org/[\w./]+", r"\(stage 1\), gradients \(2\), weights \(3\)",
    r"stages? 1 and 2", r"stages? \(?[123]\b",  # ZeRO's
    r"MLSys 2021", r"SpecTrain, 2018", r"arXiv \d{4}\.\d{5}",
]  # fmt: skip


def percent(**settings):
    return f"{utilization(run_of(**settings)):.1%}"


def figures_of_prose(page):
    """(paragraph or table row, figures) outside blocks, links, code and names."""
    text = re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.M | re.S)
    for part in re.split(r"\n\n|\n(?=[|*-] ?)", text):
        rest = " ".join(re.sub(r"\]\([^)]*\)|`[^`]*`", " ", part).split())
        rest = re.sub("|".join([*SOURCES, *NAMES_AND_FORMULAS]), " ", rest, flags=re.I)
        found = re.findall(r"[-\d.,/%]*\d[\d,./%]*", rest)
        yield " ".join(part.split()), [figure.strip(".,/-") for figure in found]


def wrong_figures(page, known):
    """What is not computed, or not of what its words say, or in a table row not in order."""
    for part, found in figures_of_prose(page):
        for figure in found:
            of = [words for words, figures in known if figure in figures]
            if not any(re.search(words, part, re.I) for words in of):
                yield f"{figure} in: {part}"
        for words, figures in known:
            if words.startswith("^") and re.search(words, part) and found != figures:
                yield f"{found}, not {figures}, in: {part}"


def facts():
    """(words that say what it is, the figures): what this program computes for the pages."""
    busy = {n: percent(schedule=n) for n in ("naive", "gpipe", "1f1b", "pipedream")}
    yield "naive", [busy["naive"]]
    yield "one microbatch|one piece of work|one GPU works|one GPU at a time", [busy["naive"]]
    yield "flush|GPipe", [busy["gpipe"]]
    yield "PipeDream|default run|experiments", [busy["pipedream"]]
    counts = [1, 2, 4, 8, 16, 32]
    row = [percent(schedule="1f1b", num_microbatches=n, num_batches=1) for n in counts]
    assert row == [f"{n / (n + 3):.1%}" for n in counts]
    yield r"^\| microbatches in a batch", counts
    yield r"^\| utilization", row
    for schedule in ("gpipe", "1f1b"):
        config = {**CONFIG, "schedule": schedule, "num_microbatches": 8}
        yield rf"^\| `{schedule}`", peak_in_flight(build_schedule(config))
    for words, recompute in (("all kept", False), ("`--recompute True`", True)):
        lab = {**pipedream_lab.LAB_CONFIG, "schedule": "gpipe", "recompute": recompute}
        plan = pipedream_lab.make_plan(lab)
        meter = pipedream_lab.MemoryMeter(plan.schedule)
        meter.train(plan)
        yield rf"^\| {words} \| \d", [f"{held.activations / 1024:.0f}" for held in meter.peak]
    for flags in ("--num_microbatches 2", "--num_microbatches 8", "--num_stages 8"):
        config = config_of(flags)
        yield rf"^\| `{flags}`", [f"{utilization(simulate(build_schedule(config), config)):.1%}"]
    wrong = build_schedule({**CONFIG, "weight_stashing": False})
    yield "backwards", [sum(op.kind == "B" for row in wrong for op in row), len(mismatches(wrong))]
    paper = "--num_microbatches 1 --num_batches 20"
    for flags in (
        paper,
        f"{paper} --vertical_sync True",
        "--num_microbatches 4",
        "--num_microbatches 4 --vertical_sync True",
    ):
        run = train(config_of(flags))
        assert run.peak_versions == peak_versions(build_schedule(config_of(flags)))
        for row in (r" \| \d", ".* weight versions"):
            yield rf"^\| `{flags}`{row}", run.peak_versions
        yield rf"`{flags}`", run.peak_versions
    three = (("naive", 1, 1), ("gpipe", 9, 1), ("pipedream", 9, 3))
    round_figures = [percent(schedule=n, num_microbatches=m, num_batches=b) for n, m, b in three]
    assert round_figures == ["25.0%", "75.0%", "90.0%"]
    yield (
        "25 → 75 → 90 %|25, 75 and 90 percent|25% → 75% → 90%",
        ["25", "75", "90", "25%", "75%", "90%"],
    )
    yield "25, 75 and 90 percent", [f"{m * b}/{m * b + 3}" for _, m, b in three]
    with np.load(ROOT / "digits.npz") as digits:
        count, height, width = digits["images"].shape
        yield "images of handwritten digits", [f"{count:,}", height, width]
        yield "pixels of", [digits["images"].min(), digits["images"].max()]
    yield "`backward_time`", [CONFIG["backward_time"]]
    assert '"atol": 1e-12' in (ROOT / "tests" / "test_training.py").read_text()
    yield "float64", ["1e-12", "1", "12"]
    check = inspect.getsource(pipedream_distributed.check_engine)
    assert "2.13" in check
    yield "PyTorch", ["2.13"]
    yield "the story ends here", [str(round(SOURCE[: SOURCE.index(BANNER)].count("\n"), -1))]
    at = {str(event.op): event.start for event in run_of()}
    lanes = [
        sorted(e.start for e in run_of() if e.device == d and e.op.kind != "U") for d in range(4)
    ]
    all_busy = [f"t{t}" for t in range(46) if all(t in lane for lane in lanes)]
    idle = [t for t in range(at["0B0"]) if t not in lanes[0]]
    assert {*range(at["0B0"], at["0F19"] + 1)} <= {*lanes[0]}
    yield "timeline|column", [at["3F0"], at["3B0"], at["0B0"], all_busy[0][1:], idle[0], idle[-1]]
    for name, gpus, bandwidth, _, _, _, stages, seconds, _ in test_planner.PUBLISHED:
        if seconds and name == "vgg16":
            lines = test_planner.PROFILES[name]
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "profile.txt"
                path.write_text(lines)
                layers = pipedream_planner.read_profile(path)
            plan = pipedream_planner.best_plan(layers, [gpus], [bandwidth])
            _, simulated = pipedream_planner.simulate_plan(plan, layers)
            row = gpus, f"{bandwidth / 1e9:g}", stages, seconds, f"{simulated:.9f}"
            yield rf"^\| {gpus} \| .*-1", [str(cell) for cell in row]
    yield from measured_once()
    for size in (16, 8):
        check_config({**CONFIG, "batch_size": size})
    yield "batch_size", ["16", "8"]


def measured_once():
    """What the README repeats of experiments that take minutes: the figures of TEST_RESULTS.md."""
    sections = dict(
        re.findall(r"^## ([^\n]*)\n(.*?)(?=^## )", PAGES["TEST_RESULTS.md"], re.M | re.S)
    )
    worth = re.findall(r"^```\n(.*?)^```$", sections["Loss against simulated time"], re.M | re.S)
    yield "loss of", ["0.3"]
    for block, heads in zip(worth[:3], ("four", "one", "sixteen"), strict=True):
        for line in block.splitlines()[1:10]:
            name, *cells = re.split("  +", line.strip())
            if len(cells) > 5:
                name = name.replace("zb-h1", "zero bubble").replace("zb-h2", "zero bubble, early")
                yield rf"^\| {heads}, {name} \|", re.findall(r"\d+", " ".join(cells[4:6]))
    blocks = re.search(r"^```\n(.*?)^```$", sections["The price of staleness"], re.M | re.S)[1]
    labels = "fresh gradients", "one batch late", "seven to none", "seven on every"
    columns = [
        [cell.split()[0] for cell in re.split("  +", line.strip())[1:]]
        for line in blocks.splitlines()
        if line.startswith("  none")
    ]
    for label, row in zip(labels, zip(*columns, strict=True), strict=True):
        yield rf"^\| {label}", [figure.rstrip("*") for figure in row]


BANNER = "the story ends here; the rest serves it"


@pytest.mark.parametrize("page", ["README.md", "QUICKSTART.md"])
def test_every_figure_in_the_prose_is_a_computed_one_of_what_its_words_say(page):
    known = [(words, [str(figure) for figure in figures]) for words, figures in facts()]
    assert list(wrong_figures(page, known)) == []


def test_what_the_readme_says_of_slow_links_and_longer_backwards_holds():
    slow = {"num_microbatches": 8, "comm_time": 1}
    busy = {
        name: utilization(run_of(schedule=name, **slow)) for name in ("gpipe", "1f1b", "pipedream")
    }
    assert busy["gpipe"] > max(busy["1f1b"], busy["pipedream"])
    assert "`--comm_time 1 --num_microbatches 8`" in PAGES["README.md"]
    assert percent(backward_time=2) == percent()
    assert CONFIG["num_stages"] * CONFIG["layers_per_stage"] == 12  # "twelve layers"


def test_the_gradient_error_grows_as_the_readme_says():
    def worst(**settings):
        config = {**CONFIG, "weight_stashing": False, **settings}
        audit = Audit(config, gradients=True)
        train(config, watch=audit)
        return max(audit.error.values())

    default = worst()
    for settings in ({"num_stages": 8}, {"num_microbatches": 1}, {"learning_rate": 0.3}):
        assert worst(**settings) > 1.1 * default, settings
