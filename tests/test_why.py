"""Why is a GPU idle, and why on these weights? Asked of the run, and of runs that differ in one op.

The judge is a small evaluator that shares nothing with the simulator: longest paths through the
ops, where each op has its own duration and each link its own delay. What is named as the cause of a
wait must move it when it changes, and what is on the critical path must move the end.
"""

import itertools
import re
import sys
from fractions import Fraction
from functools import cache

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference import delayed_sgd

from pipedream_lab import (
    LAB_CONFIG,
    LAB_SCHEDULES,
    Reasons,
    critical_path,
    explain,
    main,
    make_plan,
    train_plan,
)
from pipedream_simple import (
    CAUSES,
    CONFIG,
    SCHEDULES,
    Audit,
    Idle,
    build_schedule,
    format_timeline,
    idle_times,
    makespan,
    peak_in_flight,
    peak_versions,
    rounded,
    run_main,
    short_name,
    simulate,
    staleness,
    utilization,
)

PART = Fraction(1, 1000)  # shorter than any gap between the times below
times = st.sampled_from([Fraction(1), Fraction(2), Fraction(1, 2), Fraction(13, 4)])


@st.composite
def plans(draw):
    num_stages = draw(st.integers(1, 5))
    per_stage = st.one_of(times, st.lists(times, min_size=num_stages, max_size=num_stages))
    schedule = draw(st.sampled_from([*SCHEDULES, *LAB_SCHEDULES]))
    stashing, fixed = draw(st.booleans()), schedule == "interleaved"
    return make_plan(
        {
            **LAB_CONFIG,
            "schedule": schedule,
            "num_stages": num_stages,
            "num_microbatches": num_stages * 2 if fixed else draw(st.integers(1, 6)),
            "chunks_per_gpu": 3,
            "in_flight": draw(st.integers(0, 9)),
            "batch_size": 5040,
            "num_batches": draw(st.integers(1, 3)),
            "weight_stashing": stashing,
            "vertical_sync": stashing and draw(st.booleans()),
            "forward_time": draw(per_stage),
            "backward_time": draw(per_stage),
            "comm_time": draw(st.one_of(st.just(Fraction(0)), per_stage)),
        }
    )


def feeds(plan):
    """{op: the op that makes its input}, as the papers draw the arrows."""
    ops = {op[:3]: op for row in plan.schedule for op in row}
    last = plan.config["num_stages"] - 1
    found = {}
    for (stage, kind, m), op in ops.items():
        step = None
        if kind == "F" and stage > 0:
            step = stage - 1, "F", m
        elif kind in "BI" and stage == last:
            step = stage, "F", m
        elif kind in "BI":
            step = next(s for s in ((stage + 1, k, m) for k in "BI") if s in ops)
        if step:
            found[op] = ops[step]
    return found


def evaluate(plan, change=(None, 0), instant=None):
    """{op: (start, end)} if one op lasts longer by so much, and one gets its input at once."""
    made_by, place = feeds(plan), {}
    host = {op: device for device, row in enumerate(plan.schedule) for op in row}
    for row in plan.schedule:
        place |= {op: row[i - 1] if i else None for i, op in enumerate(row)}

    def of_stage(key, stage):
        value = plan.config[key]
        return value[stage] if isinstance(value, list) else value

    duration = {"F": ("forward_time", 1), "B": ("backward_time", 1), "U": ("forward_time", 0)}
    duration |= dict.fromkeys("IW", ("backward_time", Fraction(1, 2)))

    @cache
    def end(op):
        key, part = duration[op.kind]
        return start(op) + of_stage(key, op.stage) * part + change[1] * (op == change[0])

    @cache
    def start(op):
        ready = end(place[op]) if place[op] else 0
        if op in made_by:
            sender = made_by[op]
            travels = host[sender] != host[op] and op != instant
            ready = max(ready, end(sender) + of_stage("comm_time", sender.stage) * travels)
        return ready

    for event in plan.events:  # not all at once: recursion is deep
        end(event.op)
    return {op: (start(op), end(op)) for op in host}


@given(plans())
@settings(max_examples=150, deadline=None)
def test_ops_and_idle_times_fill_every_lane_and_their_sums_are_the_bubble(plan):
    """Exact, in fractions."""
    over, devices = makespan(plan.events), len(plan.schedule)
    assert {e.op: (e.start, e.end) for e in plan.events} == evaluate(plan)
    gaps = idle_times(plan.events)
    for device in range(devices):
        mine = [found for found in (*plan.events, *gaps) if found.device == device]
        now = 0
        for start, end in sorted((found.start, found.end) for found in mine):
            assert start == now, "a hole or an overlap"
            now = end
        assert now == over
    bubble = sum(gap.end - gap.start for gap in gaps)
    busy = sum(end - start for _, _, start, end in plan.events)
    assert bubble == over * devices - busy
    assert float(bubble / (over * devices)) == pytest.approx(1 - float(utilization(plan.events)))
    assert {gap.cause for gap in gaps} <= CAUSES.keys()
    assert all(gap.start < gap.end for gap in gaps)


@given(plans(), st.randoms())
@settings(max_examples=120, deadline=None)
def test_what_an_idle_gpu_is_said_to_wait_for_is_what_keeps_it_waiting(plan, random):
    """Were it done a little earlier, the next op would start just as much earlier."""
    gaps, before = idle_times(plan.events), evaluate(plan)
    assume(gaps)
    for gap in random.sample(gaps, min(4, len(gaps))):
        mine = [event for event in plan.events if event.device == gap.device]
        earlier = [event for event in mine if event.end <= gap.start]
        if gap.cause == "drain":
            assert earlier == mine
            continue
        assert gap.next == next(event for event in mine if event.start >= gap.end)
        assert (gap.cause == "fill") <= (not earlier) <= (gap.cause != "wait")
        needed, op = gap.needed.op, gap.next.op
        if gap.cause == "send":
            assert gap.needed.end <= gap.start, "it is not on the way yet"
            sooner = evaluate(plan, instant=op)
            assert before[op][0] - sooner[op][0] == gap.end - gap.start
        else:
            assert gap.start < gap.needed.end == gap.end or gap.end < gap.next.start
        sooner = evaluate(plan, change=(needed, -PART))
        assert before[op][0] - sooner[op][0] == PART


@given(plans())
@settings(max_examples=80, deadline=None)
def test_every_op_of_the_critical_path_sets_the_makespan(plan):
    path = [event for event in critical_path(plan.events) if event.op.kind != "U"]
    over = makespan(plan.events)
    assert path[0].start == 0
    assert path[-1].end == over
    comm = plan.config["comm_time"]
    travel = 0
    made_by = feeds(plan)
    for a, b in itertools.pairwise(path):
        if a.device != b.device:
            assert made_by[b.op] == a.op
            travel += comm[a.op.stage] if isinstance(comm, list) else comm
    assert sum(e.end - e.start for e in path) + travel == over
    for event in path[:: max(1, len(path) // 8)]:
        longer = evaluate(plan, change=(event.op, PART))
        assert max(end for _, end in longer.values()) == over + PART


# ------------------------------------------------------------------------- words and the order


def run_of(**settings):
    return make_plan({**LAB_CONFIG, "device": "cpu", **settings})


def ready_without(plan, idle):
    """The ops of the GPU's row after the next one whose input is there before the gap ends."""
    ends = {event.op: event.end for event in plan.events}
    row = plan.schedule[idle.device]
    later = row[row.index(idle.next.op) + 1 :]
    made_by = feeds(plan)
    halves = {op[::2]: ends[op] for op in row if op.kind == "I"}
    host = {op: device for device, row in enumerate(plan.schedule) for op in row}
    comm = plan.config["comm_time"]
    for op in later:
        if op.kind == "W":
            ready = halves[op[::2]]
        elif op in made_by:
            sender = made_by[op]
            travel = comm[sender.stage] if isinstance(comm, list) else comm
            ready = ends[sender] + travel * (host[sender] != host[op])
        else:
            ready = 0 if op.kind == "F" else float("inf")
        if ready < idle.end:
            yield op


@given(plans())
@settings(max_examples=80, deadline=None)
def test_what_could_have_run_instead_is_the_first_op_whose_input_was_there(plan):
    reasons = Reasons(plan)
    for idle in idle_times(plan.events):
        _, other = reasons.order(idle)
        expected = next(ready_without(plan, idle), None) if idle.next else None
        assert (other and other.op) == expected


def test_1f1b_waits_because_it_holds_as_many_as_it_may_and_gpipe_because_of_the_flush():
    plan = run_of(schedule="1f1b")
    (gap,) = (gap for gap in idle_times(plan.events) if gap.device == 1 and gap.start == 4)
    assert Reasons(plan).explain_idle(gap) == (
        "GPU1 waits until t6: its next op, B0, needs B0 of GPU2. F3 could run, but GPU1 "
        "already holds 3 microbatches in flight, its limit in this schedule."
    )
    plan = run_of(schedule="gpipe")
    lines = explain(plan, 0, 4)
    assert "F4 could run, but it belongs to the next batch" in lines[0]
    assert lines[1:] == ["GPU1 runs F3 until t5, and B0 after that."]
    assert explain(plan, 3, 11)[1] == "GPU2 runs B3 until t12, and F4 after the flush."
    lines = explain(run_of(schedule="naive"), 0, 1)
    assert "holds 1 microbatch in flight" in lines[0]
    assert explain(run_of(), 3, 45) == ["GPU3 is done: nothing is left for it to run."]


def all_reasons(**settings):
    plan = run_of(**settings)
    return plan, [Reasons(plan).explain_idle(gap) for gap in idle_times(plan.events)]


def test_pipedream_never_flushes_even_where_it_is_naive():
    for limit in (0, 1, 2):
        _, told = all_reasons(in_flight=limit)
        assert not any("flush" in text for text in told)
    plan = run_of(in_flight=1)
    lines = explain(plan, 0, 27)
    assert "F4 could run, but GPU0 already holds 1 microbatch in flight" in lines[0]
    assert not any("flush" in line for line in lines)


def test_only_a_forward_is_kept_back_by_the_limit():
    """A backward frees memory."""
    for name in ("zb-h1", "interleaved"):
        settings = {"schedule": name, "comm_time": 0.7, "backward_time": 2}
        plan, reasons = run_of(**settings), None
        reasons = Reasons(plan)
        for gap in idle_times(plan.events):
            text, other = reasons.order(gap)
            assert ("its limit" in text) <= (other is not None and other.op.kind == "F")


def test_an_op_that_could_run_only_later_is_named_with_that_time():
    settings = {"num_stages": 3, "schedule": "zb-h1", "forward_time": 0.3, "comm_time": 1}
    (line, *_) = explain(run_of(**settings), 1, 7.5)
    assert "I2 could run from t8 on, but" in line
    tie = {**settings, "forward_time": 0.1, "backward_time": 0.2, "comm_time": 2}
    for gap in idle_times(rounded(run_of(**tie).events)):
        _, other = Reasons(run_of(**tie)).order(gap)
        if other:  # ready before the wait is over, not at its end
            ready = Reasons(run_of(**tie)).ready[other.op]
            assert ready < gap.end - 1e-6


@pytest.mark.parametrize("schedule", ["pipedream", "1f1b", "zb-h1"])
def test_the_unit_of_time_changes_no_reason(schedule, program):
    """0.7 and 1, or 7 and 10: in floating point the first do not add up."""
    found = []
    for scale in (1, 10):
        times = {"forward_time": 0.7 * scale, "backward_time": scale}
        events = rounded(run_of(schedule=schedule, **times).events)
        path = [str(event.op) for event in critical_path(events)]
        gaps = [(gap.device, gap.cause) for gap in idle_times(events)]
        found.append((path, gaps))
        flags = itertools.chain(*((f"--{key}", value) for key, value in times.items()))
        _, out, _ = program("why", *flags, "--schedule", schedule)
        assert "e-" not in out
        found[-1] += tuple(re.findall(r"GPU\d  [A-Z].*", out))
    assert found[0] == found[1]


def test_at_a_boundary_the_next_op_is_named_and_the_end_of_the_run_can_be_asked_for(program):
    times = ["--forward_time", 0.1, "--backward_time", 0.1]
    _, out, _ = program("why", *times, "--gpu", 0, "--time", 0.3)
    assert out.startswith("GPU0 runs F3 from t0.3 to t0.4.")
    _, out, _ = program("why", "--backward_time", 0.2, "--gpu", 0, "--time", 27.6)
    assert out == "The run is over.\n"
    status, _, err = program("why", "--gpu", 0, "--time", -0.5)
    assert (status, err.count("\n")) == (2, 1)
    assert "time=-0.5" in err


def test_while_a_result_is_on_its_way_nothing_is_said_of_what_its_sender_does_then():
    plan = run_of(comm_time=0.5)
    (gap, *_) = (gap for gap in idle_times(plan.events) if gap.cause == "send")
    assert len(explain(plan, gap.device, gap.start)) == 1


@pytest.mark.parametrize(
    "switches",
    [{}, {"vertical_sync": True}, {"weight_stashing": False}, {"schedule": "1f1b"}],
    ids=["stashing", "vertical sync", "no stashing", "flush"],
)
@pytest.mark.parametrize("microbatches", [1, 4])
def test_the_reason_for_a_version_names_the_version_that_training_read(switches, microbatches):
    config = {"num_microbatches": microbatches, "num_batches": 6, "hidden_size": 8, **switches}
    plan = run_of(**config)
    audit, reasons = Audit(plan.config), Reasons(plan)
    train_plan(plan, watch=audit)
    seen = set()
    for step, version in audit.read.items():
        (op,) = (op for op in plan.schedule[step[0]] if op[:3] == step)
        text = reasons.reads(op)
        assert text.startswith(f"It reads v{version}, ")
        if "the newest here" in text or "up to date" in text:
            assert version == reasons.newest[op]
            assert version == sum(
                other.kind == "U" for other in plan.schedule[op.stage][: reasons.place[op]]
            )
        if "pinned" in text:
            assert version < reasons.newest[op]
        forward = audit.read[op.stage, "F", op.microbatch]
        newer = audit.newest_then.get((op.stage, op.microbatch), 0) > version
        if op.kind == "B":
            assert ("wrong" in text) == (forward != version)
            assert ("stashed" in text) == (newer and forward == version)
        else:
            stale = version < op.microbatch // microbatches
            assert ("as in plain SGD" in text or "initial" in text) == (not stale)
        seen.add(re.sub(r"v\d+", "v", text))
    assert len(seen) >= (2 if switches.get("schedule") else 3)


# ----------------------------------------------------------------------------------- in flight


@given(st.integers(1, 7), st.integers(1, 9), st.integers(1, 4), st.integers(1, 14))
@settings(max_examples=150, deadline=None)
def test_a_limit_is_kept_and_as_many_as_stages_is_1f1b(stages, microbatches, batches, limit):
    sizes = {"num_stages": stages, "num_microbatches": microbatches, "num_batches": batches}
    sizes["batch_size"] = microbatches
    for name in ("1f1b", "pipedream"):
        plan = run_of(schedule=name, in_flight=limit, **sizes)
        most = microbatches * (batches if name == "pipedream" else 1)
        held = peak_in_flight(plan.schedule)
        allowed = [
            1 if stages == 1 else 1 + (limit - 1) * (stages - 1 - s) // (stages - 1)
            for s in range(stages)
        ]
        assert held == [min(most, one) for one in allowed]
        assert held[-1] == 1
        ours = build_schedule({**CONFIG, "schedule": name, **sizes})
        assert run_of(schedule=name, in_flight=stages, **sizes).schedule == ours
        naive = build_schedule({**CONFIG, "schedule": "naive", **sizes})
        if name == "1f1b":
            assert run_of(schedule=name, in_flight=1, **sizes).schedule == naive


def test_more_in_flight_costs_memory_and_staleness_and_pays_only_with_slow_links():
    for name in ("1f1b", "pipedream"):
        sizes = {"schedule": name, "num_microbatches": 16, "batch_size": 16}
        usual, eager = run_of(**sizes), run_of(in_flight=7, **sizes)
        assert makespan(usual.events) == makespan(eager.events)
        assert peak_in_flight(usual.schedule) == [4, 3, 2, 1]
        assert peak_in_flight(eager.schedule) == [7, 5, 3, 1]
        # The round trip of one turn and its messages fits into the turns that eager 1F1B leaves:
        # only the way through the pipeline and back is longer than with free links.
        slow, fast = (
            makespan(run_of(in_flight=limit, comm_time=0.5, **sizes).events) for limit in (4, 7)
        )
        batches = 5 if name == "1f1b" else 1
        assert fast == makespan(usual.events) + batches * 6 * 0.5
        assert slow > fast
    sizes = {"num_microbatches": 1, "num_batches": 20}
    assert staleness(run_of(**sizes).schedule, 1) == [3, 2, 1, 0]
    assert staleness(run_of(in_flight=7, **sizes).schedule, 1) == [6, 4, 2, 0]
    assert peak_versions(run_of(in_flight=7, **sizes).schedule) == [7, 5, 3, 1]


@pytest.mark.parametrize("limit", [2, 5, 7])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_pipedream_with_another_limit_trains_to_its_recurrence(limit, microbatches):
    """A forward misses the updates of the batches that are in flight before it: float64, 1e-12."""
    plan = run_of(
        in_flight=limit, num_microbatches=microbatches, num_batches=9, hidden_size=12, batch_size=8
    )
    run = train_plan(plan, torch.float64)

    def delay(stage):
        ahead = (limit - 1) * (3 - stage) // 3
        return -(-ahead // microbatches)

    losses, weights = delayed_sgd(plan.config, delay)
    assert run.losses == pytest.approx(losses, abs=1e-12)
    for ours, theirs in zip(run.weights, weights, strict=True):
        for name in theirs:
            assert (ours[name] - theirs[name]).abs().max() < 1e-12


# ------------------------------------------------------------------------------------ the output


@pytest.fixture
def program(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["pipedream_lab.py", *map(str, arguments)])
        status = run_main(main)
        return status, *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--schedule", "1f1b", "--comm_time", "0.5"],
        ["--num_stages", "30", "--num_batches", "1"],
    ],
)
def test_why_prints_a_table_that_adds_up_and_the_critical_path(program, flags):
    status, out, err = program("why", *flags)
    assert (status, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    found = re.findall(r"^(GPU\d+|all) +(.*)", out, re.MULTILINE)
    rows = {name: [float(time) for time in times.split()] for name, times in found}
    (over,) = re.findall(r": (\S+) time units", out)
    gpus = [row for name, row in rows.items() if name != "all"]
    for busy, *idle, total, critical in gpus:
        assert sum(idle) == pytest.approx(total, abs=1e-5)
        assert busy + total == pytest.approx(float(over), abs=1e-5)
        assert 0 <= critical <= busy
    if len(gpus) < 20:
        assert rows["all"] == pytest.approx([sum(column) for column in zip(*gpus, strict=True)])
    assert "A critical path" in out


def test_in_flight_marks_1f1b_and_finds_that_slow_links_need_more(program):
    status, out, err = program("in_flight")
    assert (status, err) == (0, "")
    assert out.count("Fastest with a limit of 4.") == 2
    assert out.count("* 4 ") == 2
    _, out, _ = program("in_flight", "--comm_time", "0.5")
    assert out.count("Fastest with a limit of 7.") == 2
    assert program("in_flight", "--num_stages", 1)[0] == 0


@pytest.mark.parametrize(
    "flags",
    [
        "--gpu 4 --time 0",
        "--gpu -1 --time 0",
        "--gpu 0",
        "--time 0",
        "--gpu a --time 0",
        "--gpu 0 --time 46.5",
        "--gpu 0 --time nan",
        "--in_flight -1",
        "--in_flight x",
        "--gpu True --time 0",
        "--schedule nope",
    ],
)
def test_a_bad_question_gets_one_line(program, flags):
    status, out, err = program("why", *flags.split())
    assert (status, out, err.count("\n")) == (2, "", 1)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_stages": 2},
        {"num_stages": 8},
        {"comm_time": 0.5},
        {"schedule": "gpipe"},
        {"num_stages": 1},
    ],
)
@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_timeline_notes_the_first_idle_time_of_each_cause_in_its_row(settings, width):
    config = {**CONFIG, **settings}
    events = simulate(build_schedule(config), config)
    lines = format_timeline(events, width).splitlines()
    notes = [line for line in lines if re.match(r"\(\d\) ", line)]
    gaps = idle_times(events)
    assert len(notes) == len({gap.cause for gap in gaps})
    for number, note in enumerate(notes, start=1):
        assert note.startswith(f"({number}) ")
        (row,) = (line for line in lines if line.endswith(f"← why ({number})"))
        time = float(row.split()[0].strip("|t"))
        assert any(f"({number}) {gap}" == note and gap.start == time for gap in gaps)
        assert len(row) <= width
        assert len(note) <= 80


def test_an_op_is_named_with_its_stage_where_the_gpu_holds_another_one():
    plan = run_of(schedule="interleaved")
    names = {short_name(event) for event in plan.events if event.device == 1}
    assert {"F0", "5F0", "9B3"} <= names
    assert "1F0" not in names
    assert isinstance(idle_times(plan.events)[0], Idle)
