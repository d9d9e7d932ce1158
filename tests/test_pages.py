"""The pages say what the program prints now: change a number in them by hand, and this fails.

Commands are run, each once, and blocks of output compared with what they print. In the prose,
figures are checked and sentences are not: every figure must be a computed one, in a paragraph or
table row whose words say what it is of, or be on a short list of names (years, sections, GPU0 ...).
"""

import functools
import importlib
import inspect
import re
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import ROOT
from ranks import in_processes
from reference import mismatches
from test_decide import ROWS
from test_template import BY_HAND, TORCHRUN
from torch.distributed import pipelining

import pipedream_simple as pipe
from pipedream.__main__ import COMMANDS
from pipedream.backstage.audit import VersionCount
from pipedream.backstage.measures import peak_in_flight, peak_versions, staleness
from pipedream.commands import compare, fit
from pipedream.commands.distributed import prove
from pipedream.planning import decide
from pipedream.processes import engine
from pipedream.schedules.halves import train_plan
from pipedream.schedules.plans import PLAN_CONFIG, all_plans, make_plan
from pipedream.schedules.rows import LIBRARY

OWN = "examples/README.md"
BOTH = ["README.md", "QUICKSTART.md", OWN]
NAMES = [*BOTH, "EXERCISES.md", "TEST_RESULTS.md"]
PAGES = {name: (ROOT / name).read_text("utf-8") for name in NAMES}
RESULTS = dict(re.findall(r"^## ([^\n]*)\n(.*?)(?=^## )", PAGES["TEST_RESULTS.md"], re.M | re.S))
SOURCE = (ROOT / "pipedream_simple.py").read_text("utf-8")
STORY = SOURCE[: SOURCE.index("the story ends here; the rest serves it")]

# Run by test_results.py, or for half a minute: the section of TEST_RESULTS.md has what it prints.
RECORDED = {
    "python -m pipedream compare": "All schedules",
    "python -m pipedream neighbours": "Instead of a pipeline",
}
OTHERS = {  # not of ours, or run elsewhere
    "python -m pytest",
    "python -m venv .venv",
    "source .venv/bin/activate",
    "pip install torch matplotlib numpy",
    BY_HAND,  # test_template.py runs them
    TORCHRUN,
}
OTHER_FILES = "pipedream/networks/NAME.py", "plans.py", "my_model.py", "pipeline.py"
TRAINER = (ROOT / "examples" / "pipeline.py").read_text("utf-8")
PRINTED: dict[str, str] = {}  # command -> what it prints


def blocks(page, language=""):
    """The fenced blocks of a page in that language."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", PAGES[page], re.M | re.S)
    return [text for name, text in fenced if name == language]


def commands(page):
    """The commands that a page shows in its blocks, one by one."""
    lines = "\n".join(blocks(page, "bash")).splitlines()
    return [part.strip() for line in lines for part in line.split("&&") if part.strip()]


def is_ours(command):
    return command.startswith(("python pipedream_", "python -m pipedream "))


def output_of(run, command):
    """What a command of ours prints, run once, in an empty folder."""
    if command in RECORDED:
        section = RESULTS[RECORDED[command]]
        assert f"`{command}`" in section
        return section
    if command == "python -m pipedream distributed":
        PRINTED[command] = what_real_processes_prove()
    if command not in PRINTED:
        name, *flags = command.removeprefix("python ").removeprefix("-m pipedream ").split()
        result = run(name, *(flag.replace("examples/", f"{ROOT}/examples/") for flag in flags))
        progress = re.sub(r"^\w+: \d+ of \d+ \w+\n", "", result.err, flags=re.M)
        assert (result.status, progress) == (0, ""), command
        PRINTED[command] = result.out.replace("Running on 1 GPU", "Running on CPU")
    return PRINTED[command]


def what_real_processes_prove():
    """What `distributed` prints about them. These are forked, and so need not import torch."""
    plan, cpu = make_plan({**PLAN_CONFIG, "device": "cpu"}), torch.device("cpu")
    return prove(in_processes(4, engine.run_rank, plan, cpu, 1), plan, cpu)[1]


def run_of(**settings):
    config = {**pipe.CONFIG, **settings}
    config["batch_size"] = config["num_microbatches"]  # time does not depend on it
    return pipe.simulate(pipe.build_schedule(config), config)


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
    figure, difference = float(shown[0]), abs(float(shown[0]) - printed)
    before, after = line[: shown.start()], line[shown.end() :]
    if "e-" in shown[0]:  # rounding and nothing more, or a distance between weights
        return max(figure, printed) < 1e-12 or difference < 0.2 * figure
    if after.startswith("% off") or "weight stashing, backwards" in before:
        return difference < 0.3
    if re.search(r"\de-\d\d ", line):  # a line of compare
        return difference < (0.6 if after.startswith("%") else 0.005)
    is_loss = re.search(r"[Ll]oss [\w ]*:? ?$|microbatch(es)?: $", before)
    return difference < (0.005 if is_loss else 1e-9)


# ------------------------------------------------------------------------ commands and blocks


@pytest.mark.parametrize("page", BOTH)
def test_every_command_works_and_every_output_block_is_what_one_of_them_prints(run, page):
    printed = []
    for command in commands(page):
        if is_ours(command):
            printed.append(output_of(run, command).splitlines())
        elif command.startswith("pip install -r "):
            assert (ROOT / command.split()[-1]).exists()  # CI runs it
        else:
            assert command in OTHERS
    assert printed
    assert blocks(page)
    for block in blocks(page):
        lines = block.splitlines()
        found = any(
            all(map(same, lines, text[start : start + len(lines)]))
            for text in printed
            for start in range(len(text) - len(lines) + 1)
        )
        assert found, f"{page} shows a block that none of its commands prints:\n{block}"


def test_the_code_that_the_pages_show_is_that_of_the_program():
    assert len(blocks("README.md", "python")) > 3
    for code in blocks("README.md", "python"):
        assert code in STORY
    (config,) = blocks("QUICKSTART.md", "python")
    assert config in SOURCE
    assert "with twelve more keys" in PAGES["QUICKSTART.md"]
    assert len(pipe.CONFIG) == config.count("\n") - 1 + 12


@pytest.mark.parametrize("page", PAGES)
def test_every_command_and_flag_that_a_page_names_exists(page, run, monkeypatch):
    """Their flags are parsed, and they are not run."""
    text = PAGES[page].replace("\n", " ")
    shown = re.findall(r"`python -m pipedream (\w+)([^`]*)`", text)
    shown += re.findall(r"^python -m pipedream (\w+)([^#\n]*)", PAGES[page], re.M)
    assert shown
    for name, flags in shown:
        command = importlib.import_module(f"pipedream.commands.{name}")
        parsed = functools.wraps(command.main)(lambda config, **flags: None)
        monkeypatch.setattr(command, "main", parsed)
        flags = re.sub(r"--schedule \w+\.csv", "", flags)  # a file of an exercise
        assert run(name, *flags.split()).status == 0, (name, flags)
    for flags in re.findall(r"`(--\w+ [^`]+)`", text) if page in BOTH else []:
        name, *values = flags.split()
        if f'add("{name}"' in TRAINER and (name != "--schedule" or values == ["zb-v"]):
            continue
        if flags != "--network NAME":
            pipe.check_config(pipe.parse_config("", argv=flags.split())[0])


def test_the_table_of_commands_is_complete():
    table = (
        PAGES["README.md"].partition("## The commands, one question each")[2].partition("All ")[0]
    )
    shown = re.findall(r"`(?:python -m pipedream )?(\w+)( [^`]*)?`", table)
    assert sorted(name for name, _ in shown if name != "python") == sorted(COMMANDS)


def tradeoffs():
    """The table of trade-offs: name -> the formulas in its cells."""
    table = PAGES[OWN].partition("| schedule | bubble ")[2].partition("\n\n")[0]
    rows = [row.strip("|").split("|") for row in table.splitlines()[2:]]
    return {name.strip(): [cell.split("`")[1] for cell in cells[:5]] for name, *cells in rows}


NAMED = {
    name: {"schedule": name.lower().replace("interleaved zb", "interleaved-zb").replace(" ", "-")}
    for name in (
        *("naive", "GPipe", "1F1B", "interleaved", "looped BFS", "ZB-H1", "interleaved ZB"),
        *("ZB-H2", "ZB-V", "DualPipeV"),
    )
}
NAMED["DualPipeV"] = {"schedule": "dualpipe-v"}
NAMED["PipeDream, M = 1"] = {"num_microbatches": 1}
NAMED["PipeDream-2BW"] = {"vertical_sync": True}


def crossings(plan):
    """How many messages between GPUs each microbatch needs: one number, if all need the same."""
    crossing, num_stages = Counter(), plan.config["num_stages"]
    hosts = {op.stage: device for device, row in enumerate(plan.schedule) for op in row}
    for op in (op for row in plan.schedule for op in row):
        senders = [hosts[stage] for stage, _, _ in pipe.inputs_of(op, num_stages)]
        crossing[op.microbatch] += sum(sender != hosts[op.stage] for sender in senders)
    return {*crossing.values()}


@pytest.mark.parametrize(("S", "M", "N", "V"), [(2, 4, 3, 2), (4, 8, 8, 3), (3, 9, 6, 4)])
def test_the_trade_offs_of_the_readme_are_those_of_the_rows(S, M, N, V):  # noqa: N803
    assert list(tradeoffs()) == list(NAMED)
    assert "M >= 2*S" in PAGES[OWN]
    for name, cells in tradeoffs().items():
        config = {**PLAN_CONFIG, "num_microbatches": M, **NAMED[name], "backward_time": 2}
        config |= {"num_stages": S, "num_batches": N}
        config |= {"chunks_per_gpu": V, "layers_per_stage": 2 * V}  # a V has two stages per GPU
        per_batch = config["batch_size"] = config["num_microbatches"]
        plan, versions = make_plan(config), VersionCount()
        train_plan(plan, watch=versions)
        ideal = 3 * per_batch * N  # of a forward and a backward
        measured = [
            (pipe.makespan(plan.events) - ideal) / ideal,
            peak_in_flight(plan.schedule)[0],
            versions.peak[0],
            *crossings(plan),
            max(staleness(plan.schedule, per_batch)),
        ]
        values = {"S": S, "M": per_batch, "N": N, "V": V}
        for cell, figure in zip(cells, measured, strict=True):
            assert eval(cell, values) == pytest.approx(figure), (name, cell)


@pytest.mark.parametrize("page", PAGES)
def test_every_file_picture_section_and_schedule_of_pytorch_that_a_page_names_exists(page):
    for name in re.findall(r"`(Schedule\w+)`", PAGES[page]):
        assert hasattr(pipelining.schedules, name), name
    folder = (ROOT / page).parent
    for target in re.findall(r"\]\((?!https?://|\.\./\.\./)([^)#]+)[^)]*\)", PAGES[page]):
        assert (folder / target).exists(), target
    for target, anchor in re.findall(r"\]\(([\w./]*)#([^)]*)\)", PAGES[page]):
        there = (folder / target).resolve().relative_to(ROOT) if target else page
        headings = re.findall(r"^#+ (.*)$", PAGES[str(there)], re.M)
        assert anchor in [re.sub(r"[^\w -]", "", h).replace(" ", "-").lower() for h in headings]
    for name in re.findall(r"`(\w+\.(?:png|gif))`", PAGES[page]):
        assert (ROOT / "images" / name).exists() or name == "schedules.png", name
    for name in re.findall(r"(?:`|python )((?:\w+/)*\w+\.py)\b", PAGES[page]):
        assert name in OTHER_FILES or (folder / name).exists() or (ROOT / name).exists(), name
    sections = re.findall(r"^## (\d)\. ", PAGES["README.md"], re.M)
    assert sections == ["1", "2", "3", "4", "5", "6"]
    for found in re.findall(r"(?<!, )sections? (\d)(?: (?:to|and) (\d))?(?!\.\d)", PAGES[page]):
        assert {*found} - {""} <= {*sections}


# ----------------------------------------------------------------------- figures in the prose

NAMES_AND_FORMULAS = [
    r"\b1F1B\b", r"-2BW\b", r"\bZeRO-3\b", r"\bMB\d\b", r"GPU\d\b",
    r"[SMNnt] ?[-+] 1\b", r"\bd \+ 1\b", r"W\(t[-+]1\)", r"W[012]\b", r"1 / [SV]\b", r"max\(0,",
    r"M = [14]\b", r"N is 1\b",
    r"x / \(1 \+ x\)", r"[Vv]ersion [01]\b", r"\bv[0-9]\b", r"[Ss]tages? [0123]( to 2)?\b",
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
    r"(ICML|MLSys) 20\d\d", r"\((2018|2024)\)", r"of 2019",
]  # fmt: skip


def percent(**settings):
    return f"{pipe.utilization(run_of(**settings)):.1%}"


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


@functools.cache
def facts():
    return [*of_program(), *of_worth(), *of_staleness()]


def of_program():
    """(words that say what it is, the figures): what this program computes for the pages."""
    busy = {n: percent(schedule=n) for n in ("naive", "gpipe", "1f1b", "pipedream")}
    yield "naive|one microbatch|one GPU works|Four GPUs", [busy["naive"]]
    yield "four microbatches on four stages|flush|GPipe", [busy["gpipe"]]
    yield r"PipeDream|default run|Predict\*\* what each", [busy["pipedream"]]
    naive = [run_of(schedule="naive", num_stages=stages) for stages in (8, 4)]
    yield "Twice the network", [*map(pipe.makespan, naive)]
    used = pipe.utilization(run_of(schedule="gpipe"))
    yield "bubble in two ways", [f"{1 - used:.1%}", f"{1 / used - 1:g}"]
    assert pipe.utilization(run_of(num_batches=10**4)) > 0.9999
    yield "The longer the run", ["100%"]
    yield "more than one GPU of", [f"{fit.KEYS['memory'] / 1e9:g}"]
    counts = [1, 2, 4, 8, 16, 32]
    row = [percent(schedule="1f1b", num_microbatches=n, num_batches=1) for n in counts]
    assert row == [f"{n / (n + 3):.1%}" for n in counts]
    yield r"^\| microbatches in a batch", counts
    yield r"^\| utilization", row
    for schedule in ("gpipe", "1f1b"):
        config = {**pipe.CONFIG, "schedule": schedule, "num_microbatches": 8}
        yield "`--num_microbatches 8`, GPipe", peak_in_flight(pipe.build_schedule(config))
    (first,) = [event for event in run_of() if str(event.op) == "0U3"]
    mine = [event.op for event in run_of() if event.device == 0 and event.end <= first.end]
    sent, back = ({op.microbatch for op in mine if op.kind == kind} for kind in "FB")
    yield "When GPU0 makes its first", [min(sent - back), max(sent - back)]
    for flags in ("--num_microbatches 2", "--num_microbatches 8", "--num_stages 8"):
        config, _ = pipe.parse_config("", argv=flags.split())
        yield rf"^\| `{flags}`", [percent(**config)]
    wrong = pipe.build_schedule({**pipe.CONFIG, "weight_stashing": False})
    yield "backwards", [sum(op.kind == "B" for row in wrong for op in row), len(mismatches(wrong))]
    for sizes in ("--num_microbatches 1 --num_batches 20", "--num_microbatches 4"):
        for flags in (sizes, f"{sizes} --vertical_sync True"):
            versions, (config, _) = VersionCount(), pipe.parse_config("", argv=flags.split())
            pipe.train(config, watch=versions)
            assert versions.peak == peak_versions(pipe.build_schedule(config))
            yield rf"^\| `{flags}` \| \d", versions.peak
    nine = {"num_microbatches": 9, "num_batches": 3}
    assert [percent(schedule=name, **nine) for name in busy] == ["25.0%", *["75.0%"] * 2, "90.0%"]
    yield "25% → 75% → 90%", ["25%", "75%", "90%"]
    with np.load(ROOT / "digits.npz") as digits:
        number, height, width = digits["images"].shape
        yield "images of handwritten digits", [f"{number:,}", height, width]
        yield "pixels of", [digits["images"].min(), digits["images"].max()]
    assert '"atol": 1e-12' in (ROOT / "tests" / "test_training.py").read_text()
    yield "float64", ["1e-12", "1", "12"]
    assert "2.12" in inspect.getsource(engine.check_engine)
    yield "PyTorch|torch 2", ["2.12", "2.13"]
    lines = [50 * round(text.count("\n") / 50) for text in (STORY, SOURCE)]
    yield "the story ends here", lines
    at = {str(event.op): event.start for event in run_of()}
    starts = [(e.device, e.start) for e in run_of() if e.op.kind != "U"]
    all_busy = min(t for _, t in starts if all((gpu, t) in starts for gpu in range(4)))
    idle = [t for t in range(at["0B0"]) if (0, t) not in starts]
    assert all((0, t) in starts for t in range(at["0B0"], at["0F19"] + 1))
    yield "Follow `MB0`", [at["3F0"], at["3B0"], at["0B0"], all_busy, idle[0], idle[-1]]
    for size in (16, 8):
        pipe.check_config({**pipe.CONFIG, "batch_size": size})
    yield "batch_size", ["16", "8"]
    for number in (1, 4):
        schedule = pipe.build_schedule({**pipe.CONFIG, "num_microbatches": number})
        yield "Batch b, counted", staleness(schedule, number)
    yield "GPU0 is idle until", [at["0B0"]]
    everything = {**PLAN_CONFIG, **compare.DEFAULTS, "layers_per_stage": 2, "chunks_per_gpu": 2}
    yield "schedules, guess what", [len(all_plans(everything)[0])]
    taken = [m for m in (6, 10) if not decide.refused("interleaved", 4, m)]
    yield "a multiple of S", taken
    large = {**PLAN_CONFIG, **compare.DEFAULTS, "num_stages": 8, "num_microbatches": 32}
    busy_at = {}
    for comm_time in (0, 0.5):
        plans, _ = all_plans({**large, "num_batches": 1, "comm_time": comm_time})
        busy_at[comm_time] = {plan.name: pipe.utilization(plan.events) for plan in plans}
    names = [settings["schedule"] for settings in list(NAMED.values())[1:-2]]
    yield r"^\| free links", [f"{busy_at[0][name]:.1%}" for name in names]
    yield r"^\| `--comm_time 0.5`", [f"{busy_at[0.5][name]:.1%}" for name in names]
    lost = {name: 100 * (busy_at[0][name] - busy_at[0.5][name]) for name in names}
    yield (
        "What hides a message",
        [f"{lost[name]:.0f}" for name in ("gpipe", "zb-h2", "1f1b", "interleaved-zb")],
    )
    assert min(lost[name] for name in names if name[:2] in ("zb", "in")) == lost["zb-h2"]
    yield "How busy are eight", [8, 32]


def of_worth():
    """What the README repeats of experiments that take minutes: the figures of TEST_RESULTS.md."""
    blocks = re.findall(r"^```\n(.*?)^```$", RESULTS["Time to a loss"], re.M | re.S)
    (table,) = re.findall(r"^\| a batch is cut .*?(?=\n\n)", PAGES["README.md"], re.M | re.S)
    names = "1f1b", "interleaved-zb", "zb-v", "pipedream", "vertical sync"
    expected = {}
    for block, head in zip(blocks, ("eight", "one", "sixteen"), strict=False):
        times = {r[0]: r[2:] for r in (re.split("  +", x.strip()) for x in block.splitlines())}
        cells = [
            [re.sub(r" \(.*?\)|~", "", cell).strip() for cell in times.get(n, [])] for n in names
        ]
        expected[head] = [" / ".join(cell) or "-" for cell in cells]
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in table.splitlines()]
    assert {head: cells for head, *cells in rows[2:]} == expected
    for head, cells in expected.items():
        yield rf"^\| {head} \|", re.findall(r"\d+", " ".join(cells))
    yield "training losses|fresh gradients|depend on", ["0.3", "0.1", "0.05"]
    assert "<" not in " ".join(expected["one"])
    means = {  # of every table: schedule -> the means, to the three losses
        number: {
            name: [float(mean) for mean in re.findall(r"(\d+) \(", line)]
            for name, line in re.findall(r"^ *(\S+(?: sync)?)  (.*\(.*)$", block, re.M)
        }
        for number, block in enumerate(blocks)
    }
    flushes = {*names} - {"pipedream", "vertical sync"} | {"zb-h1", "zb-h2", "looped-bfs"}
    best = [min(means[1][name][n] for name in flushes & {*means[1]}) for n in range(3)]
    times = [a / b for a, b in zip(best, means[1]["pipedream"], strict=True)]
    yield "the best takes", [f"{min(times):.1f}", f"{max(times):.1f}"]
    cut = [means[number] for number in range(2, len(blocks))]  # into 4 * S
    times = [a / b for of in cut for a, b in zip(of["1f1b"], of["pipedream"], strict=True)]
    yield "1F1B takes", [f"{min(times):.1f}", f"{max(times):.1f}"]
    signs = "".join("".join(re.findall(r"^zb-v .*", block, re.M)) for block in blocks[2:])
    assert ">" not in signs
    yield "was later in none of", [len(re.findall(r"\) [<~]", signs)), signs.count("<")]
    assert all(" of 10 seeds" in block for block in blocks)


def of_staleness():
    (block,) = re.findall(r"^```\n(.*?)^```$", RESULTS["The price of staleness"], re.M | re.S)
    lines = [re.split("  +", line.strip()) for line in block.splitlines()]
    prices = [
        [cell.split()[0] + "~" * cell.endswith("~") for cell in row[2:]]
        for row in lines
        if row[0][:2] == "0."
    ]
    (table,) = re.findall(r"^\| \| SGD .*?(?=\n\n)", PAGES["README.md"], re.M | re.S)
    rows = [line.strip("| ").split(" | ")[1:] for line in table.splitlines()[2:]]
    expected = [
        [" / ".join(prices[3 * optimizer + n][late] for n in range(3)) for optimizer in range(4)]
        for late in range(2)
    ]
    assert rows == expected
    for label, cells in zip(("one batch late", "seven late on the first"), expected, strict=True):
        yield rf"^\| {label}", re.findall(r"\d\.\d+", " ".join(cells))
    search = RESULTS["Where missing stashing hurts"]
    adam = r"^Adam +\S+ \((\S+)-(\S+)\) .*?  +\S+ \((\S+)-(\S+)\) .*worse$"
    widest = search.partition("32 stages of 1 layer, hidden size 64")[2]
    ends = [*map(float, re.search(adam, widest, re.M).groups())]
    yield "in the picture below", [f"{x:.2f}" for x in ends[:2]] + [f"{x:.1f}" for x in ends[2:]]
    yield "Seven to none", [sum(range(8)) / 8]
    assert len(re.findall(r"^Adam .* worse$", search, re.M)) == 3  # "at all three widths"
    assert "worse" not in search.partition("```")[2].split("32 stages")[0]  # eight, sixteen
    others = [
        len(re.findall(rf"^{x} .* worse$", search, re.M)) for x in ("SGD", "momentum", "Muon")
    ]
    assert others == [1, 1, 0]
    assert re.findall(r"^(\w+) .* better$", search, re.M) == ["Muon"]


def of_fit(printed):
    rows = {
        name: re.search(rf"^{name}  +\S+ +(\S+) +(\S+?)\+", printed, re.M).groups()
        for name in ("1f1b", "zb-h1", "zb-h2", "zb-v", "pipedream 2BW")
    }
    yield "The 7B model", [time for time, _ in rows.values()]
    memory = {name: float(memory) for name, (_, memory) in rows.items()}
    more = [f"{memory[name] / memory['1f1b'] - 1:.0%}" for name in ("zb-h1", "zb-h2", "zb-v")]
    yield "The 7B model", [*more, fit.KEYS["num_microbatches"]]
    yield r"^5\. \*\*", [f"{decide.CLOSE - 1:.0%}"]
    yield r"^6\. \*\*", [decide.MUCH, decide.MORE]
    of_a_weight = re.search(r"takes (\d) \+ (\d) \+ (\d+)\s+bytes", printed).groups()
    yield "bytes for each weight", of_a_weight
    yield "GPUs of one machine", [fit.KEYS["machine"]]


def of_answers():
    """The table of answers, which test_decide.py compares with those of the program."""
    for flags, answer, gigabytes in ROWS:
        figures = re.findall(r"(?<!stage )(?<![\w-])\d+", answer)
        yield rf"^\| {re.escape(flags)} ", [*figures, gigabytes]


@pytest.mark.parametrize("page", BOTH)
def test_every_figure_in_the_prose_is_a_computed_one_of_what_its_words_say(page, run):
    printed = output_of(run, "python -m pipedream fit")
    known = [*facts(), *of_fit(printed), *of_answers()]
    known = [(words, [str(figure) for figure in figures]) for words, figures in known]
    wrong = [*wrong_figures(page, known)]
    assert not wrong, "\n".join(wrong)


def test_five_batches_do_not_show_the_harm_of_wrong_gradients():
    assert "by chance their loss even ends lower" in " ".join(PAGES["README.md"].split())
    lost, kept = (
        pipe.train({**pipe.CONFIG, "weight_stashing": on}).losses[-1] for on in (False, True)
    )
    assert lost < kept


def test_what_the_pages_say_of_zb_v_and_of_zb_h2_holds():
    """Also where a GPU waits for the others at the end of a batch, as in a run of one batch."""
    kib = {}
    for name in ("1f1b", "zb-v"):
        (line,) = re.findall(rf"^{name}  .*e-\d\d  (.*)$", RESULTS["All schedules"], re.M)
        kib[name] = [*map(int, re.split("  +", line)[0].split())]
    assert max(kib["zb-v"]) == 1.5 * max(kib["1f1b"])  # "up to half as much again"
    for gpus, microbatches in ((4, 8), (4, 16), (8, 32)):
        sizes = {"num_stages": gpus, "num_microbatches": microbatches, "batch_size": microbatches}
        sizes |= {"layers_per_stage": 2, "chunks_per_gpu": 2, "backward_time": 2, "num_batches": 1}
        of = {
            name: {**PLAN_CONFIG, **sizes, "schedule": name} for name in ("zb-h1", "zb-h2", "zb-v")
        }
        h1, h2, v = (pipe.makespan(make_plan(config).events) for config in of.values())
        assert h2 == h1 > v


@pytest.mark.parametrize("comm_time", [0, 0.25])
def test_interleaved_needs_its_second_forward_ahead_for_messages_only(comm_time, monkeypatch):
    """(V - 1)*S + 2*(S - 1 - s) forwards first; with free links once S - 1 - s is enough."""
    sizes = {"num_stages": 4, "num_microbatches": 16, "batch_size": 16, "num_batches": 1}
    sizes |= {"layers_per_stage": 2, "chunks_per_gpu": 2, "comm_time": comm_time}
    config, ends = {**PLAN_CONFIG, **sizes, "schedule": "interleaved"}, {}
    whole, flushes = LIBRARY["interleaved"]
    for hops in (2, 1):
        monkeypatch.setitem(LIBRARY, "interleaved", (functools.partial(whole, hops=hops), flushes))
        ends[hops] = pipe.makespan(make_plan(config).events)
    assert ends[2] == ends[1] if comm_time == 0 else ends[2] < ends[1]


def test_what_the_readme_says_of_slow_links_and_longer_backwards_holds():
    slow = {"num_microbatches": 8, "comm_time": 1}
    busy = {name: pipe.utilization(run_of(schedule=name, **slow)) for name in pipe.SCHEDULES}
    assert busy.pop("gpipe") > max(busy.values())
    assert "`--comm_time 1 --num_microbatches 8`" in PAGES["README.md"]
    assert percent(backward_time=2) == percent()
    assert pipe.CONFIG["num_stages"] * pipe.CONFIG["layers_per_stage"] == 12  # "twelve layers"
