"""Why is a GPU idle, and why on these weights? Asked of the run, and of runs that differ in one op.

The judge is a small evaluator that shares nothing with the simulator: longest paths through the
ops, where each op has its own duration and each link its own delay. What is named as the cause of a
wait must move it when it changes, and what is on the critical path must move the end.
"""

import itertools
import re
from functools import cache

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipedream.backstage.audit import Audit
from pipedream.backstage.measures import CAUSES, idle_times, rounded, short_name
from pipedream.schedules.halves import train_plan
from pipedream.schedules.plans import PLAN_CONFIG, make_plan
from pipedream.schedules.reasons import Reasons, critical_path, explain_moment
from pipedream.schedules.rows import LIBRARY
from pipedream_simple import makespan, utilization

PART = 1 / 1024  # shorter than any gap between the times below; all sums of them are exact
times = st.sampled_from([1, 2, 0.5, 3.25])


@st.composite
def plans(draw):
    num_stages = draw(st.integers(1, 5))
    per_stage = st.one_of(times, st.lists(times, min_size=num_stages, max_size=num_stages))
    schedule = draw(st.sampled_from([*LIBRARY]))
    stashing, fixed = draw(st.booleans()), schedule == "interleaved"
    return make_plan(
        {
            **PLAN_CONFIG,
            "schedule": schedule,
            "num_stages": num_stages,
            "num_microbatches": num_stages * 2 if fixed else draw(st.integers(1, 6)),
            "layers_per_stage": 4,
            "chunks_per_gpu": 4,
            "in_flight": draw(st.integers(0, 9)),
            "batch_size": 5040,
            "num_batches": draw(st.integers(1, 3)),
            "weight_stashing": stashing,
            "vertical_sync": stashing and draw(st.booleans()),
            "forward_time": draw(per_stage),
            "backward_time": draw(per_stage),
            "comm_time": draw(st.one_of(st.just(0), per_stage)),
        }
    )


def of_stage(plan, key, stage):
    value = plan.config[key]
    return value[stage] if isinstance(value, list) else value


def hosts(plan):
    return {op: device for device, row in enumerate(plan.schedule) for op in row}


def feeds(plan):
    """{op: the op that makes its input}, as the papers draw the arrows."""
    ops = {op[:3]: op for row in plan.schedule for op in row}
    last = plan.config["num_stages"] - 1
    found = {}
    for (stage, kind, m), op in ops.items():
        steps = [(stage - 1, "F", m)] if kind == "F" else []
        if kind in "BI":
            steps = [(stage + 1, half, m) for half in "BI"] if stage < last else [(stage, "F", m)]
        found.update((op, ops[step]) for step in steps if step in ops)
    return found


def evaluate(plan, change=(None, 0), instant=None):
    """{op: (start, end)} if one op lasts longer by so much, and one gets its input at once."""
    made_by, place, host = feeds(plan), {}, hosts(plan)
    for row in plan.schedule:
        place |= {op: row[i - 1] if i else None for i, op in enumerate(row)}
    duration = {"F": ("forward_time", 1), "B": ("backward_time", 1), "U": ("forward_time", 0)}
    duration |= dict.fromkeys("IW", ("backward_time", 0.5))

    @cache
    def end(op):
        key, part = duration[op.kind]
        return start(op) + of_stage(plan, key, op.stage) * part + change[1] * (op == change[0])

    @cache
    def start(op):
        ready = end(place[op]) if place[op] else 0
        if op in made_by:
            sender = made_by[op]
            travels = host[sender] != host[op] and op != instant
            ready = max(ready, end(sender) + of_stage(plan, "comm_time", sender.stage) * travels)
        return ready

    for event in plan.events:  # not all at once: recursion is deep
        end(event.op)
    return {op: (start(op), end(op)) for op in host}


@given(plans())
@settings(max_examples=150, deadline=None)
def test_ops_and_idle_times_fill_every_lane_and_their_sums_are_the_bubble(plan):
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
    assert bubble / (over * devices) == pytest.approx(1 - utilization(plan.events))
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
    over, made_by, travel = makespan(plan.events), feeds(plan), 0
    assert path[0].start == 0
    assert path[-1].end == over
    for a, b in itertools.pairwise(path):
        if a.device != b.device:
            assert made_by[b.op] == a.op
            travel += of_stage(plan, "comm_time", a.op.stage)
    assert sum(e.end - e.start for e in path) + travel == over
    for event in path[:: max(1, len(path) // 8)]:
        longer = evaluate(plan, change=(event.op, PART))
        assert max(end for _, end in longer.values()) == over + PART


# ------------------------------------------------------------------------- words and the order


def plan_of(**settings):
    return make_plan({**PLAN_CONFIG, "device": "cpu", **settings})


def ready_without(plan, idle):
    """The ops of the GPU's row after the next one whose input is there before the gap ends."""
    ends = {event.op: event.end for event in plan.events}
    row = plan.schedule[idle.device]
    later = row[row.index(idle.next.op) + 1 :]
    made_by, host = feeds(plan), hosts(plan)
    halves = {op[::2]: ends[op] for op in row if op.kind == "I"}
    for op in later:
        ready = {"F": 0, "W": halves.get(op[::2])}.get(op.kind, float("inf"))
        if sender := made_by.get(op):
            travels = host[sender] != host[op]
            ready = ends[sender] + of_stage(plan, "comm_time", sender.stage) * travels
        if ready < idle.end:
            yield op


@given(plans())
@settings(max_examples=80, deadline=None)
def test_what_could_have_run_instead_is_the_first_op_whose_input_was_there(plan):
    reasons = Reasons(plan)
    for idle in idle_times(plan.events):
        text, other = reasons.order(idle)
        expected = next(ready_without(plan, idle), None) if idle.next else None
        assert (other and other.op) == expected
        assert "its limit" not in text or expected.kind == "F", "a backward frees memory"
        assert "flush" not in text or plan.name != "pipedream", "even where it is naive"


def test_1f1b_waits_because_it_holds_as_many_as_it_may_and_gpipe_because_of_the_flush():
    plan = plan_of(schedule="1f1b")
    assert explain_moment(plan, 1, 4)[0] == (
        "GPU1 waits until t6: its next op, B0, needs B0 of GPU2. F3 could run, but GPU1 "
        "already holds 3 microbatches in flight, its limit in this schedule."
    )
    plan = plan_of(schedule="gpipe")
    lines = explain_moment(plan, 0, 4)
    assert "F4 could run, but it belongs to the next batch" in lines[0]
    assert lines[1:] == ["GPU1 runs F3 until t5, and B0 after that."]
    assert explain_moment(plan, 3, 11)[1] == "GPU2 runs B3 until t12, and F4 after the flush."
    assert "holds 1 microbatch in flight" in explain_moment(plan_of(schedule="naive"), 0, 1)[0]
    assert explain_moment(plan_of(), 3, 45) == ["GPU3 is done: nothing is left for it to run."]
    lines = explain_moment(plan_of(in_flight=1), 0, 27)
    assert "F4 could run, but GPU0 already holds 1 microbatch in flight" in lines[0]
    assert not any("flush" in line for line in lines)


def test_an_op_that_could_run_only_later_is_named_with_that_time():
    config = {"num_stages": 3, "schedule": "zb-h1", "forward_time": 0.3, "comm_time": 1}
    (line, *_) = explain_moment(plan_of(**config), 1, 7.5)
    assert "I2 could run from t8 on, but" in line
    tie = plan_of(**{**config, "forward_time": 0.1, "backward_time": 0.2, "comm_time": 2})
    for gap in idle_times(rounded(tie.events)):
        _, other = Reasons(tie).order(gap)
        if other:  # ready before the wait is over, not at its end
            assert Reasons(tie).ready[other.op] < gap.end - 1e-6


def test_while_a_result_is_on_its_way_nothing_is_said_of_what_its_sender_does_then():
    plan = plan_of(comm_time=0.5)
    (gap, *_) = (gap for gap in idle_times(plan.events) if gap.cause == "send")
    assert len(explain_moment(plan, gap.device, gap.start)) == 1


@pytest.mark.parametrize(
    "switches",
    [{}, {"vertical_sync": True}, {"weight_stashing": False}, {"schedule": "1f1b"}],
    ids=["stashing", "vertical sync", "no stashing", "flush"],
)
@pytest.mark.parametrize("microbatches", [1, 4])
def test_the_reason_for_a_version_names_the_version_that_training_read(switches, microbatches):
    config = {"num_microbatches": microbatches, "num_batches": 6, "hidden_size": 8, **switches}
    plan = plan_of(**config)
    audit, reasons = Audit(plan.config), Reasons(plan)
    train_plan(plan, watch=audit)
    seen = set()
    for op in itertools.chain.from_iterable(plan.schedule):
        text, new = reasons.reads(op), reasons.newest[op]
        seen.add(re.sub(r"v\d+", "v", text))
        if op.kind == "U":
            continue
        version, forward = audit.read[op[:3]], audit.read[op.stage, "F", op.microbatch]
        assert text.startswith(f"It reads v{version}, ")
        if op.kind == "B":
            newer = audit.newest_then[op.stage, op.microbatch] > version
            assert ("wrong" in text) == (forward != version)
            assert ("stashed" in text) == (newer and forward == version)
        else:
            before = plan.schedule[op.stage][: reasons.place[op]]
            assert new == sum(other.kind == "U" for other in before)
            assert ("the newest here. Plain" in text) <= (version == new)
            assert ("pinned, though" in text) <= (version < new)
            stale = version < op.microbatch // microbatches
            assert ("as in plain SGD" in text or "initial" in text) == (not stale)
    assert len(seen) >= (3 if switches.get("schedule") else 4)


def test_an_op_is_named_with_its_stage_where_the_gpu_holds_another_one():
    plan = plan_of(schedule="interleaved")
    names = {short_name(event) for event in plan.events if event.device == 1}
    assert {"F0", "5F0", "9B3"} <= names
    assert "1F0" not in names


# ------------------------------------------------------------------------------------ the output


@pytest.mark.parametrize("schedule", ["pipedream", "1f1b", "zb-h1"])
def test_the_unit_of_time_changes_no_reason(schedule, run):
    """0.7 and 1, or 7 and 10: in floating point the first do not add up."""
    found = []
    for scale in (1, 10):
        times = {"forward_time": 0.7 * scale, "backward_time": scale}
        events = rounded(plan_of(schedule=schedule, **times).events)
        path = [str(event.op) for event in critical_path(events)]
        gaps = [(gap.device, gap.cause) for gap in idle_times(events)]
        flags = itertools.chain(*((f"--{key}", value) for key, value in times.items()))
        out = run("why", *flags, "--schedule", schedule).out
        assert "e-" not in out
        found.append((path, gaps, *re.findall(r"GPU\d  [A-Z].*", out)))
    assert found[0] == found[1]


def test_at_a_boundary_the_next_op_is_named_and_the_end_of_the_run_can_be_asked_for(run):
    times = ["--forward_time", 0.1, "--backward_time", 0.1]
    out = run("why", *times, "--gpu", 0, "--time", 0.3).out
    assert out.startswith("GPU0 runs F3 from t0.3 to t0.4.")
    out = run("why", "--backward_time", 0.2, "--gpu", 0, "--time", 27.6).out
    assert out == "The run is over.\n"


@pytest.mark.parametrize(
    "flags", ["", "--schedule 1f1b --comm_time 0.5", "--num_stages 30 --num_batches 1"]
)
def test_why_prints_a_table_that_adds_up_and_the_critical_path(run, flags):
    status, out, err = run("why", *flags.split())
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


def test_in_flight_marks_1f1b_and_finds_that_slow_links_need_more(run):
    status, out, err = run("in_flight")
    assert (status, err) == (0, "")
    assert out.count("Fastest with a limit of 4.") == 2
    assert out.count("* 4 ") == 2
    out = run("in_flight", "--comm_time", 0.5).out
    assert out.count("Fastest with a limit of 7.") == 2
    assert run("in_flight", "--num_stages", 1).status == 0
    assert run("in_flight", "--num_stages", 60, "--num_batches", 1).out.count("\n") < 50
