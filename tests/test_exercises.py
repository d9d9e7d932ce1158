"""EXERCISES.md: its code and commands are run, and every figure of an answer is computed anew.

They are compared in order, with what is independent of the code on the page: closed forms, plain
training, PyTorch, the planner.
"""

import itertools
import math
import re
from pathlib import Path

import pytest
import pytorch
import torch
from conftest import ROOT
from reference import delayed_sgd, plain_sgd
from small import assert_close

import pipedream_simple as pipe
from pipedream.__main__ import COMMANDS
from pipedream.backstage.audit import VersionCount
from pipedream.backstage.measures import peak_in_flight, peak_versions
from pipedream.planning.profiles import read_profile
from pipedream.planning.search import best_partition
from pipedream.schedules import plans, rows
from pipedream.schedules.halves import train_plan
from pipedream.schedules.plans import PLAN_CONFIG, make_plan
from pipedream_simple import CONFIG, makespan, utilization

TEXT = (ROOT / "EXERCISES.md").read_text("utf-8")
SECTIONS = re.split(r"^(?=## \d+\. )", TEXT, flags=re.M)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
NAMES = r"GPU\d|\bGPT-2|Llama 2 7B|\b1F1B|2BW|\b\dB\b|\d[FBIWU]\d|\b[FBIW]\d|exercise \d+|R\^2"
NAMES += r"|[bSG] - 1\b|[vb] \+ 1\b|microbatch [02]\b"


def blocks(number, language):
    return [body for name, body in FENCE.findall(SECTIONS[number]) if name == language]


def figures(number, part=1):
    """The numbers in the prose of an answer (or of the question: part 0), in order."""
    prose = FENCE.sub("", SECTIONS[number].partition("\n")[2].split("<details>")[part])
    prose = re.sub(rf"`[^`]*`|{NAMES}|\*Before:.*?\*", " ", prose.replace("\n", " "))
    return [found.rstrip(".,") for found in re.findall(r"\d[\d,.]*(?:e\d+)?%?", prose)]


def shown(*values):
    return [value if isinstance(value, str) else f"{value:g}" for value in values]


@pytest.fixture
def play(run, capsys, tmp_path, monkeypatch):
    """play(5): do what an exercise says, in an empty folder: what is printed, and the names."""
    monkeypatch.chdir(tmp_path)
    libraries = [(library, dict(library)) for library in (pipe.SCHEDULES, rows.LIBRARY)]

    def play(number):
        printed, names = "", {"one_f_one_b": pipe.one_f_one_b}
        for block in FENCE.finditer(SECTIONS[number]):
            language, body = block.groups()
            if language == "csv":
                text = SECTIONS[number][: block.start()]
                Path(re.findall(r"[Ss]ave\s+\w+\s+as\s+`(.*?)`", text)[-1]).write_text(body)
            elif language == "bash" and "--sweep" not in body:  # which takes minutes
                name, *flags = re.sub("^python (-m pipedream )?", "", body).split()
                result = run(name, *flags)
                assert result.status == (2 if number == 3 else 0)  # 3 ends in a deadlock
                printed += result.out + result.err
            elif language == "python" and body.startswith('    "'):  # lines of SCHEDULES
                for library, _ in libraries:
                    library.update(eval(f"{{{body}}}", names))
            elif language == "python" and body.startswith(" "):  # in place of a wrong line
                whole, wrong = blocks(number, "python")[0], r"^ *w\.data\.sub_.*\n"
                exec(re.sub(wrong, body, whole, flags=re.M), names)
            elif language == "python":
                exec(body, names)
            printed += capsys.readouterr().out
        assert all(block in printed for block in blocks(number, ""))
        return printed, names

    yield play
    for library, before in libraries:
        library.clear()
        library.update(before)


def plan_of(text=None, **settings):
    """A plan; text is that of a CSV file, in the folder of play."""
    if text:
        Path("rows.csv").write_text(text)
        settings["schedule"] = "rows.csv"
    return make_plan({**PLAN_CONFIG, "batch_size": 1024, "num_batches": 1, **settings})


def simulated(text=None, **settings):
    """(time, utilization, in flight)"""
    plan = plan_of(text, **settings)
    return makespan(plan.events), utilization(plan.events), peak_in_flight(plan.schedule)


def test_there_are_twelve_from_five_minutes_to_an_hour_and_they_name_what_exists():
    found = re.findall(r"^## (\d+)\. .* \((\d+) (min|h)\)$", TEXT, re.M)
    minutes = [int(time) * (60 if unit == "h" else 1) for _, time, unit in found]
    assert [int(number) for number, *_ in found] == [*range(1, 13)]
    assert (minutes[0], minutes[-1], minutes) == (5, 60, sorted(minutes))
    known = {*pipe.SCHEDULES, *COMMANDS, *PLAN_CONFIG, *vars(pipe), *vars(plans), *vars(rows)}
    assert {*re.findall(r"`([a-zA-Z]\w+)`", TEXT)} <= known | {
        "LAYERS",
        "Mine",
        "ScheduleZBVZeroBubble",
    }


def test_1_utilization_is_the_closed_form(play):
    play(1)

    def busy(m, s):
        return m / (m + s - 1)

    least = next(m for m in itertools.count(1) if busy(m, 8) >= busy(8, 4))
    expected = shown(least, 3, 7, 8, 7, 3, f"{8 * 7 / 3:.1f}", least, f"{busy(least, 8):.1%}")
    assert figures(1) == [*expected, "80%", "4"]
    assert [busy(4 * (s - 1), s) for s in (2, 4, 8, 64)] == [0.8] * 4
    assert figures(1, 0) == [f"{busy(8, 4):.1%}"]
    many, images = re.search(r"`--num_microbatches (\d+) --batch_size (\d+)`", TEXT).groups()
    assert (int(many), int(images) % int(many)) == (least, 0)
    run = {"schedule": "1f1b", "num_stages": 8, "num_microbatches": least, "batch_size": least}
    assert simulated(**run)[1] == simulated(**run, backward_time=2)[1] == busy(least, 8)


def test_2_links_are_hidden_when_each_gpu_has_enough_more_in_flight_than_the_next(play):
    play(2)

    def pace(held, comm_time):  # per microbatch, once the pipeline is full
        rows = [pipe.one_f_one_b(0, n, 120) for n in held]
        rows = [[(s, *op[1:]) for op in row] for s, row in enumerate(rows)]
        events = pipe.simulate(pipe.pin_versions(rows, 4), {**CONFIG, "comm_time": comm_time})
        ends = {e.op.microbatch: e.end for e in events if e.op[:2] == (0, "B")}
        return (ends[99] - ends[39]) / 60

    for comm_time, more in ((0, 1), (0.5, 2), (1, 2)):
        assert more == math.ceil((2 + 2 * comm_time) / 2)
        for held in itertools.combinations_with_replacement(range(7, 0, -1), 3):
            hidden = all(a - b >= more for a, b in itertools.pairwise([*held, 1]))
            assert (pace([*held, 1], comm_time) == 2) == hidden
    short = [[*map(int, found)] for found in re.findall(r"(6) (\d) (\d) (1)", SECTIONS[2])]
    assert [pace(held, 0.5) for held in short] == [2.5, 2.5, 2.5]
    run = {"schedule": "pipedream", "comm_time": 0.5, "num_batches": 5}
    times, _, held = zip(*(simulated(**run, in_flight=n) for n in (4, 6, 7)), strict=True)
    schedules = [plan_of(**run, in_flight=n).schedule for n in (7, 4)]
    words = [7, 6, times[0], times[1], 7, times[2], 3, 1.5, 2, *held[2], *itertools.chain(*short)]
    words += [2.5, 2, 4, 2, 7, 2, 1, *held[0], 7, held[2][0], held[0][0]]
    assert figures(2) == shown(*words, *(peak_versions(rows)[0] for rows in schedules))


def test_3_the_two_repairs_and_1f1b(play):
    play(3)
    wrong = blocks(3, "csv")[0].splitlines()
    on_0, on_1 = re.findall(r"`((?:\d[FB]\d,?)+)`", SECTIONS[3])
    repairs = [on_0, *wrong[1:]], [wrong[0], on_1, wrong[2]], [on_0, on_1, wrong[2]]
    more, fewer, both = (simulated("\n".join(rows)) for rows in repairs)
    assert figures(3) == shown(more[0], fewer[0], both[0])
    assert both == simulated(schedule="1f1b", num_stages=3)
    assert more[2][1] > both[2][1]


def test_4_where_the_slow_stage_is_matters_to_1f1b(play):
    play(4)
    times = {"gpipe": [4 * 7 + 10] * 4, "1f1b": [4 * 8 + 2 * before for before in range(4)]}
    for schedule, place in itertools.product(times, range(4)):
        slow = [2 if stage == place else 1 for stage in range(4)]
        run = {"schedule": schedule, "forward_time": slow, "backward_time": slow}
        assert simulated(**run, num_microbatches=8)[0] == times[schedule][place]
    most = sum(slow) / 4 / max(slow)
    assert most - 0.01 < simulated(**run, num_microbatches=256)[1] < most
    cells = itertools.chain(*times.values())
    words = 5, 8, f"{most:.1%}", f"{sum(slow) / 4 - 1:.0%}", *cells, times["1f1b"][0], 2
    assert figures(4) == shown(*words)


def test_5_the_alias_is_training_without_stashing_and_the_repair_is_the_recurrence(play):
    printed, repaired = play(5)
    config, code, wrong = repaired["config"], blocks(5, "python")[0], {}
    exec(code.partition("\n\n\nconfig")[0], wrong)
    run = pipe.train(config, torch.float64, worker_class=wrong["Mine"])
    without = pipe.train({**config, "weight_stashing": False}, torch.float64)
    assert run.losses == pytest.approx(without.losses, rel=1e-12)
    versions = VersionCount()
    right = pipe.train(config, torch.float64, versions, worker_class=repaired["Mine"])
    losses, weights = delayed_sgd(config, lambda stage: math.ceil((3 - stage) / 4))
    assert_close(right.weights, weights)
    assert run.losses[-1] < right.losses[-1]  # "The loss is lower"
    assert figures(5) == shown(*versions.peak, f"{losses[-1]:.2f}")
    assert f"Mine: {versions.peak}, loss {losses[-1]:.2f}, 0.0% off" in printed
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        exec(code.replace("w.data.sub_", "w.sub_"), {})


def test_6_two_halves_are_as_slow_as_half_a_batch_and_both_schedules_train_right(play):
    printed, _ = play(6)
    assert {"mine", "halves", "level"} <= {*re.findall(r"^[ *]*(\w+) .*%", printed, re.M)}
    busy, (_, weights) = {}, plain_sgd({**CONFIG, "num_batches": 2})
    for name in ("halves", "level"):
        busy[name] = simulated(schedule=name, num_microbatches=8)[1]
        settings = {"num_batches": 2, "batch_size": CONFIG["batch_size"]}
        plan = plan_of(schedule=name, num_microbatches=8, **settings)
        assert_close(train_plan(plan, torch.float64).weights, weights)
    assert busy["halves"] == 4 / (4 + 3)
    assert 1 / 4 < busy["level"] < 0.4  # "not far from naive"
    assert figures(6, 0) == [f"{8 / 11:.1%}", f"{4 / 7:.1%}"]
    assert figures(6) == [f"{1 / 4:.1%}", f"{8 / 11:.1%}"]


def test_7_the_best_cuts_are_those_of_the_planner(play):
    play(7)
    layers = read_profile(Path("gpt2.csv"))
    seconds = [layer.forward + layer.backward for layer in layers]
    best = {n: best_partition(layers, [n], [1e10], True) for n in (4, 7, 8, 9, 10, 26)}
    slowest = {number: partition.slowest.seconds for number, partition in best.items()}
    block, head, even = seconds[1], seconds[-1], 6 * seconds[1] + seconds[-1]
    assert slowest[7] == slowest[8] == pytest.approx(4 * block)
    assert [slowest[number] for number in (9, 10, 26)] == pytest.approx([head] * 3)
    assert 3 * block < head < 4 * block < 7 * block == pytest.approx(slowest[4])
    words = f"{head / block:.1f}", f"{even / block:.1f}", f"{even / slowest[4] - 1:.0%}"
    speed_up = f"{sum(seconds) / slowest[9]:.1f}"
    assert figures(7) == shown(*words, 7, 7, 7, 24 - 3 * 7, 9, 3, speed_up, 7, 8, 4)


def test_8_the_best_plan_is_that_of_the_planner_and_takes_what_the_rules_say(play):
    printed, _ = play(8)
    lines = [line.split(",")[1:] for line in blocks(8, "csv")[0].splitlines()[1:]]
    columns = ([*map(float, column)] for column in zip(*lines, strict=True))
    forward, backward, sent, weights = columns
    times = [*map(sum, zip(forward, backward, strict=True))]
    layers = read_profile(Path("small.csv"))

    def replicated(end, r, bandwidth):
        """ms of the first layers on r GPUs: computing, and adding up gradients."""
        return sum(times[:end]) / r, 4 * (r - 1) / r**2 * sum(weights[:end]) / bandwidth * 1e3

    ours, fast, data = replicated(3, 3, 1e9), replicated(2, 3, 1e11), replicated(4, 4, 1e11)
    cases = (1e9, (3, 1), ours), (1e11, (2, 2), fast), (1e12, (4,), replicated(4, 4, 1e12))
    for bandwidth, cut, time in cases:
        best = best_partition(layers, [4], [bandwidth])
        assert best.slowest.seconds == pytest.approx(sum(time) / 1e3)
        assert tuple(stage.last - stage.first + 1 for stage in best.stages) == cut
    assert f"Plan: 3-1\nSlowest stage: {sum(ours) / 1e3:.9f}" in printed
    idle, slow = f"{1 - times[3] / sum(ours):.0%}", sum(replicated(4, 4, 1e9))
    words = [f"{2 * sent[0] / 1e6:.1f}", 3, f"{sum(ours):.1f}", sum(times[:3]), 3, f"{ours[0]:.1f}"]
    words += [f"{ours[1]:.1f}", idle, f"{slow:.1f}", f"{sum(times):.1f}", 3, 1]
    assert figures(8) == shown(*words, f"{sum(fast):.2f}", data[0], f"{data[1]:.2f}")


def test_9_the_delay_is_what_the_derivation_says(play):
    printed, names = play(9)
    delays = {m: math.ceil(7 / m) for m in (8, 7, 4, 1)}
    expected = [f"M = {m}: delay [{d}], {d + 1} versions\n" for m, d in delays.items()]
    assert printed == "".join(expected) == blocks(9, "")[0]
    config = {**names["config"], "num_batches": 4}
    _, weights = delayed_sgd(config, lambda stage: 2)
    flat = torch.cat([w.flatten() for stage in weights for w in stage.values()])
    torch.testing.assert_close(names["late"](config, 2), flat, rtol=0, atol=1e-12)
    assert figures(9) == shown(0, 0, 1, min(m for m, d in delays.items() if d == 1), 0)


def test_10_bubbles_are_the_closed_forms(play):
    play(10)
    bubbles = {w: [9, 3 * (1 + 2 - w), 3 * (1 + 2 - 2 * w)] for w in (1, 0.5)}
    lines = [f"W of {w}: " + " ".join(f"{24 + b:g}" for b in row) for w, row in bubbles.items()]
    assert blocks(10, "")[0].splitlines() == lines
    h1, f1b1 = (simulated(schedule=name, num_microbatches=8)[2] for name in ("zb-h1", "1f1b"))
    assert {*h1} == {4}
    whole, cut, moved = bubbles[1]
    assert figures(10) == shown(cut, whole, moved, 4, *f1b1, *bubbles[0.5][1:])
    assert figures(10, 0) == shown(1, 2, 1, 24 + whole, 24)


def test_11_the_rows_are_those_of_pytorch(play):
    play(11)
    rows = pytorch.rows_of_pytorch("ScheduleZBVZeroBubble", 2, 4, 2)
    rows = [["" if op is None else str(op) for op in row] for row in rows]
    text = "".join(f"{','.join(row)}\n" for row in rows)
    assert blocks(11, "csv") == [text]
    stages = [sorted({int(op[0]) for op in row if op}) for row in rows]

    def messages(gpu_of):
        return 2 * sum(gpu_of[stage] != gpu_of[stage + 1] for stage in range(3))

    sent = messages([stage in stages[1] for stage in range(4)]), messages([0, 1, 0, 1])
    slots = max(map(len, rows))
    (idle,) = {slots - sum(map(bool, row)) for row in rows}
    time, busy, held = simulated(text, layers_per_stage=4, backward_time=2)
    assert (time, busy) == (slots / 2, 1 - idle / slots)
    (most,) = {*held}
    assert most == simulated(schedule="1f1b", num_stages=2)[2][0]
    words = *stages[0], *stages[1], 1, 2, sent[0], 0, 2, sent[1], idle, slots, f"{busy:.1%}"
    assert figures(11) == shown(*words, most * len(stages[0]))
    for row, waiting in zip(rows, (0, 3), strict=True):
        pairs = itertools.pairwise(filter(None, row))
        assert sum("W" in b and a != b.replace("W", "I") for a, b in pairs) == waiting


def test_12_its_commands_exist(run):
    """What they print, and that a run of the flags of plan is as it says: test_profile.py."""
    (commands,) = blocks(12, "sh")
    flags = [line.split()[3:] for line in commands.splitlines() if " -m pipedream " in line]
    assert [name for name, *_ in flags] == ["fit", "profile", "plan"]
    model = str(ROOT / "examples" / "my_model.py")
    assert run(*[model if word == "my_model.py" else word for word in flags[0]]).status == 0
