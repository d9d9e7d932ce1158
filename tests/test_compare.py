"""compare, trace and export, as commands: what they print, draw and write."""

import itertools
import json
import os
import re

import pytest
from PIL import Image
from pytorch import rows_of_pytorch, save_as_pytorch_does
from small import FLUSHING, SMALL

import pipedream.commands.compare
import pipedream.commands.export
import pipedream_visual
from pipedream.commands.compare import DEFAULTS, answers, draw_plans
from pipedream.schedules.memory import memory_formula
from pipedream.schedules.plans import PLAN_CONFIG, all_plans, make_plan
from pipedream.schedules.rows import LIBRARY
from pipedream_simple import CONFIG, makespan, memory_held, train


def table_of(out, heading):
    """{name: its cells} of the table below that line."""
    lines = out[out.index(heading) :].splitlines()[2:]
    lines = itertools.takewhile(lambda line: not re.match(" {3}|$", line), lines)
    rows = [re.split("  +", line.strip()) for line in lines]
    return {row[0]: row[1:] for row in rows}


def test_compare_prints_every_schedule_and_draws_them(run, tmp_path):
    status, out, err = run("compare", "--out", "new/folder", "--num_batches", 2)
    assert status == 0
    assert err.splitlines()[0] == "training as naive, 1 of 13"
    assert out.index("Simulated") < out.index("The fastest") < out.index("schedules.png")
    simulated, measured = table_of(out, "Simulated"), table_of(out, "Trained")
    names = *FLUSHING, "pipedream", "vertical sync", "no stashing"
    assert (*simulated,) == names
    for name in FLUSHING:
        assert float(measured[name][2]) < 1e-12  # to plain SGD
    assert float(measured["pipedream"][2]) > 1e-6
    time, speed_up = f"{3 * (16 + 3)}", f"{2 * 8 * 4 * 3 / (3 * (16 + 3)):.2f}x"
    in_flight, versions, stale = "4 3 2 1", "2 2 2 1", "1 1 1 0"
    expected = [time, speed_up, f"{16 / 19:.1%}", in_flight, versions, stale]
    assert simulated["pipedream"] == expected
    assert simulated["interleaved"][3] == "5.5 4.5 3.5 2.5"  # each on one of two stages is a half
    config = {"num_batches": 2, "num_microbatches": 8, "layers_per_stage": 2}
    trained = train({**CONFIG, **config})
    assert measured["pipedream"][:2] == [
        f"{trained.losses[-1]:.4f}",
        f"{trained.test_accuracy:.1%}",
    ]
    bytes_of = memory_formula(make_plan({**PLAN_CONFIG, **config}))
    assert measured["pipedream"][4] == " ".join(f"{sum(b) / 1024:.0f}" for b in bytes_of)
    assert f"{13 * 4} of {13 * 4} GPUs" in out
    with Image.open(tmp_path / "new" / "folder" / "schedules.png") as image:
        assert image.width < 4000
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("settings", [{}, {"num_batches": 60}, {"comm_time": 1}, {"num_stages": 2}])
def test_nothing_in_the_table_is_faster_than_what_is_said_to_be_the_fastest(settings):
    config = {**PLAN_CONFIG, **DEFAULTS, **settings}
    plans, _ = all_plans(config)
    time_of = {plan.name: makespan(plan.events) for plan in plans}
    lines = (re.fullmatch(r"(.*): (.*) \(([\d.]+)\)", line) for line in answers(config, plans))
    *said, last = (line.groups() for line in lines)
    small = {"naive", "1f1b", "zb-h1", "zb-v", "interleaved-zb"}  # hold S at most, say the papers
    eligible = {
        "The fastest": {*FLUSHING, "pipedream"},
        "... with fresh gradients": {*FLUSHING},
        "The fastest at 1F1B's memory, in microbatches": small,
    }
    for question, names, time in said:
        mine = {name: time_of[name] for name in eligible[question]}
        assert float(time) == pytest.approx(min(mine.values()), abs=1e-3)
        assert {*names.split(", ")} == {n for n in mine if mine[n] < min(mine.values()) + 1e-6}
    slow = "free links, --comm_time 0" if "comm_time" in settings else "slow links, --comm_time 0.5"
    assert last[0] == f"The fastest with {slow}"
    config["comm_time"] = float(slow.split()[-1])
    others = (make_plan({**config, "schedule": name}) for name in LIBRARY)
    assert float(last[2]) == pytest.approx(min(makespan(plan.events) for plan in others))


@pytest.mark.parametrize("settings", [{"num_stages": 2}, {"num_stages": 8}, {"num_batches": 1}])
def test_compare_fits_80_columns_and_says_what_is_left_out(capsys, monkeypatch, settings):
    monkeypatch.setattr(pipedream.commands.compare, "draw_and_write", lambda *args: "")
    config = {**SMALL, "num_batches": 2, "num_microbatches": 8, "chunks_per_gpu": 2, **settings}
    pipedream.commands.compare.main(config)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    text = " ".join(lines)
    assert "layers_per_stage=3 must be a multiple of chunks_per_gpu=2" in text


def test_compare_puts_a_file_of_pytorch_beside_the_others(run, tmp_path):
    file = tmp_path / "a_rather_long_name_of_a_file.csv"
    save_as_pytorch_does(rows_of_pytorch("ScheduleZBVZeroBubble", 2, 4, 2), file)
    flags = ["--num_batches", 1, "--layers_per_stage", 6, "--hidden_size", 12]
    status, out, _ = run("compare", "--schedule", file, *flags)
    assert status == 0
    assert float(table_of(out, "Trained")["a_rather_long_na"][2]) < 1e-12
    assert out.endswith("\na_rather_long_na: these are the rows of zb-v.\n")
    assert max(len(line) for line in out.splitlines() if ".png" not in line) <= 80


@pytest.mark.parametrize("command", ["why", "in_flight", "compare"])
def test_the_forwards_that_recompute_repeats_are_said_to_count(run, command):
    sizes = ["--num_batches", 1, "--num_stages", 2, "--hidden_size", 8, "--num_microbatches", 2]
    again = "Busy time includes the forwards that recompute runs a second time."
    assert again in run(command, *sizes, "--recompute", True).out
    assert again not in run(command, *sizes).out


def test_the_picture_of_all_is_as_long_as_labels_have_room_and_names_stages():
    plans, _ = all_plans({**SMALL, "num_batches": 1})
    figure = draw_plans(plans, pipedream_visual)
    assert figure.texts[0].get_text() == "9 schedules, one time axis. The fastest: interleaved-zb"
    headings = [text.get_text().split(":")[0] for text in figure.texts[2:]]
    able = [name for name in FLUSHING if name not in ("zb-v", "dualpipe-v")]  # three layers per GPU
    assert headings == [*able, "pipedream"]
    shortest = min(e.end - e.start for plan in plans for e in plan.events if e.op.kind != "U")
    slots = pipedream_visual.WIDEST // pipedream_visual.SLOT
    for axes in figure.axes:  # all as long as the slowest but naive, or shorter
        assert axes.get_xlim() == pytest.approx((0, min(2 * (4 + 4 - 1), slots * shortest)))
        assert axes.bbox.width >= pipedream_visual.SLOT * axes.get_xlim()[1] / shortest - 1
    labels = [{text.get_text() for text in axes.texts} for axes in figure.axes]
    assert {"F0", "B3"} <= labels[1]
    assert {"0F0", "8B0"} <= labels[headings.index("interleaved")]
    assert {"I0", "W3"} <= labels[headings.index("zb-h1")]


# --------------------------------------------------------------------------------------- trace


def traced(run, tmp_path, config):
    """{phase: its events} that the command writes."""
    flags = itertools.chain(*((f"--{key}", value) for key, value in config.items()))
    assert run("trace", "run.json", *flags).status == 0
    events = json.loads((tmp_path / "run.json").read_text())["traceEvents"]
    return {phase: [e for e in events if e["ph"] == phase] for phase in "XsfCiM"}


@pytest.mark.parametrize("schedule", ["pipedream", "zb-h1", "interleaved", "dualpipe-v"])
def test_the_trace_is_the_simulated_run(run, tmp_path, schedule):
    config = {"num_batches": 2, "backward_time": 2, "comm_time": 1, "schedule": schedule}
    if schedule == "dualpipe-v":  # its middle has ops of one GPU at the same time
        config |= {"num_microbatches": 8, "num_batches": 1, "layers_per_stage": 2}
    plan, by = make_plan({**PLAN_CONFIG, **config}), traced(run, tmp_path, config)
    ops = {(e["name"], e["pid"], e["ts"], e["ts"] + e["dur"]) for e in by["X"]}
    expected = {(str(e.op), e.device, 1000 * e.start, 1000 * e.end) for e in plan.events}
    assert {o[:3] for o in ops} == {e[:3] for e in expected if "U" not in e[0]}
    updates = sorted((e["pid"], e["ts"]) for e in by["i"])
    assert updates == sorted((e.device, 1000 * e.end) for e in plan.events if e.op.kind == "U")

    # an arrow for every microbatch, link and direction, from the middle of an op to the next one's
    middle = {e.op[:3]: (e.device, 500 * (e.start + e.end)) for e in plan.events}
    ends = {e["id"]: (e["pid"], e["ts"]) for e in by["f"]}
    arrows = [(e["name"], (e["pid"], e["ts"]), ends[e["id"]]) for e in by["s"]]
    links = []
    for s, m in itertools.product(range(plan.config["num_stages"] - 1), range(8)):
        here, there = middle[s, "F", m], middle[s + 1, "F", m]
        links += [("activations", here, there)] if here[0] != there[0] else []
        backs = [
            next(middle[t, kind, m] for kind in "BI" if (t, kind, m) in middle) for t in (s + 1, s)
        ]
        links += [("gradients", *backs)] if backs[0][0] != backs[1][0] else []
    assert sorted(arrows) == sorted(links)

    ended = {e.op: e.end for e in plan.events}
    for device, row in enumerate(plan.schedule):
        counters = [e for e in by["C"] if e["pid"] == device]
        assert [e["ts"] for e in counters[::2]] == [1000 * ended[op] for op in row]
        values = [e["args"]["held"] for e in counters]
        on_gpu = len({op.stage for op in row})  # microbatches are whole ones
        expected = [(held / on_gpu, versions) for held, versions in memory_held(row)]
        assert [*zip(values[::2], values[1::2], strict=True)] == expected


def test_nothing_is_sent_inside_a_gpu(run, tmp_path):
    config = {"schedule": "interleaved", "num_stages": 1, "num_microbatches": 2}
    by = traced(run, tmp_path, config)
    assert not by["s"] + by["f"]
    assert len(by["X"]) == 3 * 2 * 2 * 5  # stages, F B, M, N


# ------------------------------------------------------------------------------ the command line


@pytest.mark.parametrize(
    "flags",
    [
        *("compare --schedule zb-h3", "compare --schedule none.csv", "compare --out /dev/null"),
        *("compare --num_stages 0", "compare --chunks_per_gpu 0", "in_flight --in_flight -1"),
        *("why --weight_gradient_time x", "why --weight_gradient_time 0.5,0.5"),
        *("export", "export my.csv more", "export a.csv --weight_stashing"),
        *("export dir", "export .", "export -", "export notes.txt", "export dir.csv"),
        *("trace /", "trace /dev/null", "trace my.csv", "trace a.json --batch_size 5"),
        *("trace my.csv --schedule my.csv", "export my.csv --schedule my.csv"),
        "export ./link.csv --schedule my.csv",
        *("why --gpu 4 --time 0", "why --gpu -1 --time 0", "why --gpu 0", "why --time 0"),
        *("why --gpu a --time 0", "why --gpu True --time 0", "why --gpu 0 --time 46.5"),
        *("why --gpu 0 --time nan", "why --gpu 0 --time -0.5"),
        *("page --out my.csv", "compare --out my.csv/new", "page --out my.csv/new"),
        *("page --out /dev/null", "page --schedule none.csv", "page --num_batches 500"),
        "export a.csv --schedule interleaved --num_microbatches 2",
        "export a.csv --schedule interleaved --chunks_per_gpu 2",
    ],
)
def test_bad_input_gets_one_line_and_changes_nothing(run, tmp_path, flags):
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir.csv").mkdir()
    (tmp_path / "my.csv").write_text("0F0,0B0\n")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "link.csv").symlink_to("my.csv")
    before = sorted(os.listdir(tmp_path))
    status, out, err = run(*flags.split())
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert ("--out" in flags) == ("is not a folder" in err)
    assert len(err) < 600
    assert sorted(os.listdir(tmp_path)) == before
    assert (tmp_path / "my.csv").read_text() == "0F0,0B0\n"
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not os.listdir(tmp_path / "dir.csv")
