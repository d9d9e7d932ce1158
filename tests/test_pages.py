"""The pages say what the program prints now: change a number in them by hand, and this fails.

Commands are run, and blocks of output compared with what they print. In the prose, figures are
checked and sentences are not: every figure must be a computed one, in a paragraph or table row
whose words say what it is of, or be on a short list of names (years, sections, GPU0, W1 ...).
"""

import contextlib
import doctest
import functools
import inspect
import io
import os
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from launch import launch
from test_neighbours import TEMPLATE

import pipedream_distributed
import pipedream_fit
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
    makespan,
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
            assert command in (
                "python -m pytest",
                "python -m venv .venv",
                "source .venv/bin/activate",
                "pip install torch matplotlib numpy",
            )
    for script in re.findall(r"python[ \n]((?:tests/)?\w+\.py)", PAGES[page]):
        assert (ROOT / script).exists()


@pytest.mark.parametrize("page", ["README.md", "QUICKSTART.md"])
def test_every_output_block_is_what_one_of_the_pages_commands_prints(page):
    ours = [c for c in commands(page) if c.startswith("python pipedream_")]
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
    assert blocks("QUICKSTART.md", "python") == [real]


def test_the_code_that_the_readme_shows_is_that_of_the_story():
    story = SOURCE[: SOURCE.index(BANNER)]
    assert len(blocks("README.md", "python")) > 4
    for code in blocks("README.md", "python"):
        assert code in story


class Session(doctest.OutputChecker):
    def check_output(self, want, got, optionflags):
        return same(want, got)


def test_what_the_readme_types_at_the_prompt_answers_as_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (session,) = blocks("README.md", "pycon")
    test = doctest.DocTestParser().get_doctest(session, {}, "README.md", None, 0)
    told: list[str] = []
    runner = doctest.DocTestRunner(checker=Session())
    assert runner.run(test, out=told.append).failed == 0, "".join(told)
    assert (tmp_path / "versions.png").exists()


def tradeoffs():
    """The README's table of trade-offs: name -> the formulas in its cells."""
    table = re.search(r"\| schedule \| bubble .*?\n\n", PAGES["README.md"], re.S)[0]
    rows = [row.strip("|").split("|") for row in table.splitlines()[2:] if row]
    return {
        name.strip(): [re.findall("`([^`]*)`", cell) for cell in cells] for name, *cells in rows
    }


NAMED = {
    "naive": {"schedule": "naive"},
    "GPipe": {"schedule": "gpipe"},
    "1F1B": {"schedule": "1f1b"},
    "interleaved": {"schedule": "interleaved"},
    "ZB-H1": {"schedule": "zb-h1"},
    "ZB-H2": {"schedule": "zb-h2"},
    "PipeDream, M = 1": {"schedule": "pipedream", "num_microbatches": 1},
    "PipeDream-2BW": {"schedule": "pipedream", "vertical_sync": True},
}


@pytest.mark.parametrize(("S", "M", "N", "V"), [(2, 4, 3, 2), (4, 8, 8, 3), (3, 9, 6, 4)])
def test_the_trade_offs_of_the_readme_are_those_of_the_rows(S, M, N, V):  # noqa: N803
    table = tradeoffs()
    assert list(table) == list(NAMED)
    assert "M >= 2*S" in PAGES["README.md"]
    for name, cells in table.items():
        config = {**pipedream_lab.LAB_CONFIG, "num_microbatches": M, **NAMED[name]}
        config |= {"num_stages": S, "num_batches": N, "chunks_per_gpu": V, "layers_per_stage": V}
        config |= {"backward_time": 2, "batch_size": config["num_microbatches"]}
        plan = pipedream_lab.make_plan(config)
        per_batch, in_all = config["num_microbatches"], config["num_microbatches"] * N
        ideal = 3 * in_all  # of a forward and a backward
        chunks = plan.config["num_stages"] / S
        crossing = Counter()
        hosts = {op.stage: device for device, row in enumerate(plan.schedule) for op in row}
        for row in plan.schedule:
            for op in row:
                step = pipedream_simple.input_of(op, plan.config["num_stages"])
                crossing[op.microbatch] += bool(step) and hosts[step[0]] != hosts[op.stage]
        measured = [
            (makespan(plan.events) - ideal) / ideal,
            peak_in_flight(plan.schedule)[0] / chunks,
            pipedream_lab.train_plan(plan).peak_versions[0],
            *{*crossing.values()},
            max(pipedream_simple.staleness(plan.schedule, per_batch)),
        ]
        values = {"S": S, "M": per_batch, "N": N, "V": V}
        for cell, figure in zip(cells, measured, strict=True):
            assert eval(cell[0], values) == pytest.approx(figure), (name, cell)


def test_every_command_in_the_prose_is_one_that_its_script_knows(monkeypatch):
    """Those of the lab and the planner are parsed; of the others, flags are looked up."""
    text = PAGES["README.md"].replace("\n", " ")
    shown = re.findall(r"`python (pipedream_\w+\.py)([^`]*)`", text)
    assert len(shown) > 15
    with_commands = {"pipedream_lab.py": pipedream_lab, "pipedream_planner.py": pipedream_planner}
    for module in with_commands.values():
        for name, (_, *rest) in module.COMMANDS.items():
            monkeypatch.setitem(module.COMMANDS, name, (lambda *args, **flags: None, *rest))
    sources = [path.read_text("utf-8") for path in ROOT.glob("pipedream_*.py")]
    for script, rest in shown:
        words = rest.split()
        if script in with_commands:
            module = with_commands[script]
            assert f"{script} {words[0]}" in module.__doc__
            monkeypatch.setattr(sys, "argv", [script, *words])
            assert run_main(module.main) == 0, words
        for flag in (word.removeprefix("--") for word in words if word.startswith("--")):
            assert any(f"--{flag}" in text or f'"{flag}"' in text for text in sources), flag


@pytest.mark.parametrize("page", ["README.md", "QUICKSTART.md"])
def test_every_flag_that_a_page_shows_exists_and_is_accepted(page):
    text = PAGES[page].replace("\n", " ")
    shown = re.findall(r"`(--[^`]+)`", text)
    shown += re.findall(r"python pipedream_simple.py (--[^`]+?)(?:`|$)", PAGES[page], re.M)
    assert shown
    for flags in shown:
        if flags.split()[0] not in ("--help", "--out", "--animate", "--sweep"):  # not CONFIG's
            check_config(config_of(flags))


@pytest.mark.parametrize("page", NAMES)
def test_every_file_picture_and_section_that_a_page_names_exists(page):
    targets = re.findall(r"\]\((?!https?://)([^)#]+)\)", PAGES[page])
    for target in targets:
        assert (ROOT / target).exists(), target
    for target, anchor in re.findall(r"\]\(([\w.]*)#([^)]*)\)", PAGES[page]):
        headings = re.findall(r"^#+ (.*)$", PAGES[target or page], re.M)
        assert anchor in [re.sub(r"[^\w -]", "", h).replace(" ", "-").lower() for h in headings]
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


@pytest.mark.parametrize("page", ["README.md", "QUICKSTART.md", "EXERCISES.md"])
def test_no_operator_begins_a_line_where_markdown_would_read_a_list_or_a_quote(page):
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text("utf-8"), flags=re.M | re.S)
    assert re.findall(r"\n([-+*>] (?=[\d(]|[a-zA-Z] ).*)$", text, re.M) == []


def test_pytorch_has_what_the_readme_says():
    from torch.distributed import pipelining

    names = re.findall(r"`(Schedule\w+)`", PAGES["README.md"])
    assert len(names) == 6
    assert all(hasattr(pipelining.schedules, name) for name in names)


# ----------------------------------------------------------------------- figures in the prose

NAMES_AND_FORMULAS = [
    r"\b1F1B\b", r"-2BW\b", r"\bZeRO-3\b", r"\bMB\d\b", r"GPU\d\b",
    r"[SMNnt] ?[-+] 1\b", r"\bd \+ 1\b", r"W\(t[-+]1\)", r"W[012]\b", r"1 / S\b", r"max\(0,",
    r"M = 1\b", r"[Vv]ersion [01]\b", r"\bv[0-9]\b", r"[Ss]tages? [0123]( to 2)?\b",
    r"Batch \d", r"[Mm]icrobatch [3478]\b", r"[Ss]tep \d", r"^#+ \d\. ",
    r"^\d\. ", r"\bfloat64\b",
    r"\b(Llama 2 )?7B\b", r"ZB-H[12]\b", r"ZeRO-1 and 2\b", r"ZeRO-[12]\b", r"\bF7\b", r"\b2BW\b",
]  # fmt: skip
SOURCES = [
    r"Python 3\.10", r"(SOSP|NeurIPS) 2019", r"ICML 2021", r"SC 202[01]", r"ICLR 2024",
    r"Repository, 1998",
    r"[Ss]ections? \d(\.\d)?( \([^)]*\))?(( and| to|,) \d(\.\d)?)?",
    r"CC BY 4\.0", r"(doi|arxiv)\.org/[\w./]+",
    r"stages? \(?[123]\b",  # ZeRO's
    r"MLSys 2021", r"(SpecTrain|Chen et al\.), 2018",
]  # fmt: skip


def percent(**settings):
    return f"{utilization(run_of(**settings)):.1%}"


def figures_of_prose(page):
    """(paragraph or table row, figures) outside blocks, links, code and names."""
    text = re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.M | re.S)
    for part in re.split(r"\n\n|\n(?=[|*-] ?|\d\. )", text):
        rest = " ".join(re.sub(r"\]\([^)]*\)|`[^`]*`|<code>.*?</code>", " ", part).split())
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
    yield "one microbatch|one GPU works|Four GPUs", [busy["naive"]]
    yield "four microbatches on four stages", [busy["gpipe"]]
    naive = [makespan(run_of(schedule="naive", num_stages=stages)) for stages in (8, 4)]
    yield "Twice the network", naive
    used = utilization(run_of(schedule="gpipe"))
    yield "bubble in two ways", [f"{1 - used:.1%}", f"{1 / used - 1:g}"]
    assert utilization(run_of(num_batches=10**4)) > 0.9999
    yield "The longer the run", ["100%"]
    memory = pipedream_fit.FIT["memory"]
    yield "more than one GPU of", [f"{memory / 1e9:g}"]
    yield "flush|GPipe", [busy["gpipe"]]
    yield r"PipeDream|default run|Predict\*\* what each", [busy["pipedream"]]
    counts = [1, 2, 4, 8, 16, 32]
    row = [percent(schedule="1f1b", num_microbatches=n, num_batches=1) for n in counts]
    assert row == [f"{n / (n + 3):.1%}" for n in counts]
    yield r"^\| microbatches in a batch", counts
    yield r"^\| utilization", row
    for schedule in ("gpipe", "1f1b"):
        config = {**CONFIG, "schedule": schedule, "num_microbatches": 8}
        yield "`--num_microbatches 8`, GPipe", peak_in_flight(build_schedule(config))
    (first,) = [event for event in run_of() if str(event.op) == "0U3"]
    mine = [event.op for event in run_of() if event.device == 0 and event.end <= first.end]
    sent, back = ({op.microbatch for op in mine if op.kind == kind} for kind in "FB")
    yield "When GPU0 makes its first", [min(sent - back), max(sent - back)]
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
        yield rf"^\| `{flags}` \| \d", run.peak_versions
        yield rf"`{flags}`", run.peak_versions
    three = (("naive", 1, 1), ("gpipe", 9, 1), ("pipedream", 9, 3))
    round_figures = [percent(schedule=n, num_microbatches=m, num_batches=b) for n, m, b in three]
    assert round_figures == ["25.0%", "75.0%", "90.0%"]
    yield "25% → 75% → 90%", ["25%", "75%", "90%"]
    with np.load(ROOT / "digits.npz") as digits:
        count, height, width = digits["images"].shape
        yield "images of handwritten digits", [f"{count:,}", height, width]
        yield "pixels of", [digits["images"].min(), digits["images"].max()]
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
    yield (
        "Follow `MB0`|timeline",
        [at["3F0"], at["3B0"], at["0B0"], all_busy[0][1:], idle[0], idle[-1]],
    )
    yield from measured_once()
    for size in (16, 8):
        check_config({**CONFIG, "batch_size": size})
    yield "batch_size", ["16", "8"]


OTHERS = "SGD", "momentum", "Muon"


def measured_once():
    """What the README repeats of experiments that take minutes: the figures of TEST_RESULTS.md."""
    sections = dict(
        re.findall(r"^## ([^\n]*)\n(.*?)(?=^## )", PAGES["TEST_RESULTS.md"], re.M | re.S)
    )
    worth = re.findall(r"^```\n(.*?)^```$", sections["Loss against simulated time"], re.M | re.S)
    yield "loss of", ["0.3"]
    for block, head, microbatches in zip(
        worth, ("four", "one", "sixteen"), (4, 1, 16), strict=False
    ):
        times = {}
        for line in block.splitlines()[1:10]:
            name, *cells = re.split("  +", line.strip())
            found = re.findall(r"\d+", cells[5]) if len(cells) > 5 else []
            times[name] = [f"{int(time) / microbatches:.0f}" for time in found]
        if head == "sixteen":
            assert re.search(r"^zb-h2 .* 9$", block, re.M)  # "on nine of ten seeds"
            assert "of 10 seeds" in block
        columns = "1f1b", "interleaved", "zb-h2", "pipedream", "vertical sync"
        yield rf"^\| {head} \|", [figure for name in columns for figure in times.get(name, [])]
    blocks = re.search(r"^```\n(.*?)^```$", sections["The price of staleness"], re.M | re.S)[1]
    labels = "fresh gradients", "one batch late", "seven late on the first", "seven late on every"
    columns = [
        [cell.split()[0] for cell in re.split("  +", line.strip())[1:]]
        for line in blocks.splitlines()
        if line.startswith("  none")
    ]
    for label, row in zip(labels, zip(*columns, strict=True), strict=True):
        yield rf"^\| {label}", [figure.rstrip("*") for figure in row]
    search = sections["Where missing stashing hurts"]
    for block in re.split(r"\n\n", search):
        if block.startswith("32 stages of 1 layer, hidden size 64"):
            (adam,) = re.findall(r"^Adam +(\S+) .*?  +(\S+) .*worse$", block, re.M)
            yield "in the picture below", adam
    assert len(re.findall(r"^Adam .* worse$", search, re.M)) == 3  # "at all three widths"
    assert "worse" not in search.partition("```")[2].split("32 stages")[0]  # eight, sixteen
    assert [len(re.findall(rf"^{name} .* worse$", search, re.M)) for name in OTHERS] == [1, 1, 0]
    assert re.findall(r"^(\w+) .* better$", search, re.M) == ["Muon"]
    fit, words = output_of("python pipedream_planner.py fit"), "The 7B model"
    memory = {}
    for name in ("1f1b", "zb-h1", "zb-h2", "pipedream 2BW"):
        memory[name], time = re.search(rf"^\+ {name}  .*?(\S+) +(\S+)$", fit, re.M).groups()
        yield words, [time]
    for name in ("zb-h1", "zb-h2"):
        yield words, [f"{float(memory[name]) / float(memory['1f1b']) - 1:.0%}"]
    yield words, [pipedream_fit.FIT["num_microbatches"]]
    lab = {**pipedream_lab.LAB_CONFIG, "schedule": "interleaved", "num_microbatches": 8}
    chunks = peak_in_flight(pipedream_lab.make_plan(lab).schedule)[0]
    thirds = lab["chunks_per_gpu"]
    yield "Interleaved has V", [thirds, chunks, chunks // thirds]


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
