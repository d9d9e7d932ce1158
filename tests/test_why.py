"""Why is a GPU idle, and why on these weights? Asked of the run, and of runs that differ in one op.

The judge is a small evaluator that shares nothing with the simulator: longest paths through ops and
messages, where each has its own duration. What is named as the cause of a wait must move it when it
changes, and what is on the critical path must move the end.
"""

import itertools
import re
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from small import fits

from pipedream.backstage.audit import Audit
from pipedream.backstage.measures import CAUSES, idle_times, short_name
from pipedream.schedules.files import write_csv
from pipedream.schedules.halves import train_plan
from pipedream.schedules.plans import PLAN_CONFIG, make_plan
from pipedream.schedules.reasons import Reasons, critical_path, explain_moment
from pipedream.schedules.rows import LIBRARY
from pipedream_simple import makespan, utilization

PART = 1 / 4096  # shorter than any gap between the times below; all sums of them are exact
FOLDER = tempfile.TemporaryDirectory()  # for random rows
times = st.sampled_from([1, 2, 0.5, 3.25])
links = st.sampled_from([0.5, 2, 7.25, 20])  # from half an op to many


def list_randomly(random, path):
    """Save rows in which each op stands behind those that it needs: GPUs, microbatches, stages."""
    stages_on = [random.choice([1, 2]) for _ in range(random.randint(1, 3))]
    places = [device for device, number in enumerate(stages_on) for _ in range(number)]
    host = random.sample(places, len(places))
    last, count, rows = len(host) - 1, random.randint(1, 4), [[] for _ in stages_on]
    came, returned = set(), set()  # (stage, microbatch): its forward is done, its B or I
    todo = [(s, kind, m) for s in range(len(host)) for m in range(count) for kind in "FB"]

    def ready(step):
        stage, kind, m = step
        if kind == "F":
            return stage == 0 or (stage - 1, m) in came
        needed = (stage + 1, m) in returned if stage < last else (stage, m) in came
        return (stage, m) in returned if kind == "W" else needed

    while todo:
        steps = [random.choice([*filter(ready, todo)])]
        stage, kind, _ = steps[0]
        others = [s for s in todo if host[s[0]] == host[stage] and s[1] == "B" and ready(s)]
        if kind == "F" and others and random.random() < 0.7:
            steps.append(random.choice(others))  # a pair
        for stage, kind, m in steps:
            todo.remove((stage, kind, m))
            (came if kind == "F" else returned).add((stage, m))
            kind += "&" * (kind == "F" and len(steps) == 2)
            if kind == "B" and random.random() < 0.5:
                kind = "I"
                todo.append((stage, "W", m))
            rows[host[stage]].append((stage, kind, m))
    write_csv(rows, path)
    return len(rows), count, len(host)


@st.composite
def plans(draw):
    schedule, chunks = draw(st.sampled_from([*LIBRARY, "random", "random"])), 4
    num_stages, num_microbatches = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    if schedule == "random":
        schedule = Path(FOLDER.name) / "random.csv"
        random = draw(st.randoms(use_true_random=False))
        num_stages, num_microbatches, chunks = list_randomly(random, schedule)
    elif not fits(schedule, num_stages, num_microbatches):
        num_stages = min(num_stages, 3)
        num_microbatches = 2 * num_stages + draw(st.integers(0, 2)) * (schedule == "dualpipe-v")
    per_stage, of_link, part = (
        st.one_of(some, st.lists(some, min_size=num_stages, max_size=num_stages))
        for some in (times, links, st.sampled_from([0, 0.125, 0.375]))
    )
    stashing = draw(st.booleans())
    return make_plan(
        {
            **PLAN_CONFIG,
            "schedule": str(schedule),
            "num_stages": num_stages,
            "num_microbatches": num_microbatches,
            "layers_per_stage": chunks,
            "chunks_per_gpu": draw(st.sampled_from([1, 2, 4])),
            "in_flight": draw(st.integers(0, 9)),
            "batch_size": 5040,
            "num_batches": draw(st.integers(1, 3)),
            "weight_stashing": stashing,
            "vertical_sync": stashing and draw(st.booleans()),
            "recompute": draw(st.booleans()),
            "forward_time": draw(per_stage),
            "backward_time": draw(per_stage),
            "weight_gradient_time": draw(part),
            "overlap_time": draw(st.sampled_from([1, 0.75, 0.25])),
            "comm_time": draw(st.one_of(st.just(0), times, of_link)),
        }
    )


class Times(NamedTuple):
    ops: dict  # op -> (start, end)
    messages: dict  # op that made what it brings -> (leaves, arrives)
    inputs: dict  # op -> when its input is there, if it has one

    @property
    def over(self):
        return max(end for _, end in self.ops.values())


class Judge:
    """Of a plan: who waits for what, and when all that happens.

    blocks      [[block, ...] of each GPU]; a block is an op, or the two of a pair
    made_by     op -> the op that makes its input, as the papers draw the arrows
    queues      (from, to) -> ops whose results the link carries, in the order of the sender's row
    """

    def __init__(self, plan):
        self.plan, self.blocks = plan, []
        for row in plan.schedule:
            self.blocks.append([])
            while row:
                size = 2 if row[0][:3] in plan.pairs else 1
                self.blocks[-1].append(tuple(row[:size]))
                row = row[size:]
        self.block_of = {op: block for row in self.blocks for block in row for op in block}
        host = {op: device for device, row in enumerate(plan.schedule) for op in row}
        ops, last = {op[:3]: op for op in host}, plan.config["num_stages"] - 1
        self.made_by, self.queues = {}, {}
        for (stage, kind, m), op in ops.items():
            steps = [(stage - 1, "F", m)] if kind == "F" else []
            if kind in "BI":
                behind = [(stage + 1, half, m) for half in "BI"]
                steps = behind if stage < last else [(stage, "F", m)]
            self.made_by.update((op, ops[step]) for step in steps if step in ops)
        goes_to = {maker: host[op] for op, maker in self.made_by.items() if host[op] != host[maker]}
        for op in (op for row in plan.schedule for op in row if op in goes_to):
            self.queues.setdefault((host[op], goes_to[op]), []).append(op)
        self.queue_of = {op: queue for queue in self.queues.values() for op in queue}

    def of_stage(self, key, stage):
        value = self.plan.config[key]
        return value[stage] if isinstance(value, list) else value

    def alone(self, op):
        """How long an op takes if it is in no pair."""
        f, b, w = (
            self.of_stage(key, op.stage)
            for key in ("forward_time", "backward_time", "weight_gradient_time")
        )
        whole, half = b + f * self.plan.config["recompute"], w or b / 2
        return {"F": f, "B": whole, "I": whole - half, "W": half, "U": 0}[op.kind]

    def part(self, op):
        """How much longer its block takes if this op takes a PART longer."""
        return PART * (self.plan.config["overlap_time"] if len(self.block_of[op]) == 2 else 1)

    def travel(self, op):
        return self.of_stage("comm_time", op.stage)

    def times(self, longer=(), slower=(), at_liberty=None):
        """When? If an op takes longer, (op, time), or a message, (op that made it, time).

        A block starts when the one before it is over and its inputs are there. A message leaves
        when it is made and its link is free; but one that is at liberty waits for no link.
        """
        longer, slower = dict([longer] * bool(longer)), dict([slower] * bool(slower))
        after = {b: a for row in self.blocks for a, b in itertools.pairwise(row)}
        behind = {b: a for queue in self.queues.values() for a, b in itertools.pairwise(queue)}

        @cache
        def start(block):
            free = end(after[block]) if block in after else 0
            return max(free, *(there(op) for op in block if op in self.made_by), 0)

        @cache
        def end(block):
            time = sum(self.alone(op) + longer.get(op, 0) for op in block)
            return start(block) + time * (self.plan.config["overlap_time"] if block[1:] else 1)

        def there(op):
            maker = self.made_by[op]
            return arrives(maker) if maker in self.queue_of else end(self.block_of[maker])

        @cache
        def leaves(maker):
            made, before = end(self.block_of[maker]), behind.get(maker)
            return max(made, arrives(before)) if before and maker != at_liberty else made

        @cache
        def arrives(maker):
            return leaves(maker) + self.travel(maker) + slower.get(maker, 0)

        for event in self.plan.events:  # not all at once: recursion is deep
            end(self.block_of[event.op])
        ops = {op: (start(block), end(block)) for op, block in self.block_of.items()}
        messages = {maker: (leaves(maker), arrives(maker)) for maker in self.queue_of}
        return Times(ops, messages, {op: there(op) for op in self.made_by})


@given(plans())
@settings(max_examples=150, deadline=None)
def test_ops_and_idle_times_fill_every_lane_and_their_sums_are_the_bubble(plan):
    over, devices, judge = makespan(plan.events), len(plan.schedule), Judge(plan)
    times = judge.times()
    assert {e.op: (e.start, e.end) for e in plan.events} == times.ops
    carried = {ends: [message.op for message in link] for ends, link in plan.links.items()}
    assert carried == judge.queues
    found = [(to, message) for (_, to), link in plan.links.items() for message in link]
    assert {message.op: (message.start, message.end) for _, message in found} == times.messages
    assert all(message.device == to for to, message in found)
    gaps, bubble = idle_times(plan.events, plan.links), over * devices
    for device, blocks in enumerate(judge.blocks):
        now, mine = 0, [times.ops[block[0]] for block in blocks]
        bubble -= sum(end - start for start, end in mine)
        mine += [(gap.start, gap.end) for gap in gaps if gap.device == device]
        for start, end in sorted(mine):
            assert start == now, "a hole or an overlap"
            now = end
        assert now == over
    assert bubble == sum(gap.end - gap.start for gap in gaps)
    assert bubble / (over * devices) == pytest.approx(1 - utilization(plan.events))
    assert {gap.cause for gap in gaps} <= CAUSES.keys()
    assert all(gap.start < gap.end for gap in gaps)


@given(plans(), st.randoms())
@settings(max_examples=200, deadline=None)
def test_what_an_idle_gpu_is_said_to_wait_for_is_what_keeps_it_waiting(plan, random):
    """Were it done a little earlier, the next op would start just as much earlier.

    There are two exceptions. The other op of a pair may have to wait as long for its own input. And
    if a link is busy until a message leaves, it is of no use to make that earlier, unless the same
    pair made the first of those that the link carries without a break. At liberty it always is.
    """
    gaps, judge = idle_times(plan.events, plan.links), Judge(plan)
    assume(gaps)
    before = judge.times()
    for gap in random.sample(gaps, min(6, len(gaps))):
        mine = [event for event in plan.events if event.device == gap.device]
        earlier = [event for event in mine if event.end <= gap.start]
        if gap.cause == "drain":
            assert earlier == mine
            continue
        op, needed, begins = gap.next.op, gap.needed.op, gap.next.start
        maker, block = judge.made_by[op], judge.block_of[op]
        assert next(event.op for event in mine if event.start >= gap.end) in block
        assert before.inputs[op] == begins, "another input came later"
        assert (gap.cause == "fill") <= (not earlier) <= (gap.cause != "wait")
        made, leaves = before.ops[maker][1], before.messages[maker][0]

        def starts(at, other=tuple({*block} - {op}), op=op, **changes):
            """Would it start at that time, or when the other op of its pair can?"""
            times = judge.times(**changes)
            return times.ops[op][0] == max(at, *(times.inputs.get(o, 0) for o in other), 0)

        if gap.cause == "link":
            queue = judge.queue_of[maker]
            assert made <= gap.start < gap.end <= leaves, "it is on the way already"
            assert needed in queue[: queue.index(maker)]
            arrives = before.messages[needed][1]
            assert before.messages[needed][0] <= gap.start < gap.end == arrives
            free = earlier[-1].end if earlier else 0
            assert starts(max(free, made + judge.travel(maker)), at_liberty=maker)
            assert starts(begins - PART, slower=(needed, -PART))
            continue
        assert needed == maker
        if gap.cause == "send":
            assert leaves <= gap.start < gap.end == begins, "it is not on the way yet"
            assert starts(begins - PART, slower=(maker, -PART))
            continue
        assert gap.end == made, "it is on the way already"
        sooner = (maker, -PART)
        free = made + judge.travel(maker) - judge.part(maker)
        assert starts(free, at_liberty=maker, longer=sooner)
        *busy, front = judge.queue_of[maker][: judge.queue_of[maker].index(maker) + 1]
        while busy and before.messages[busy[-1]][1] >= before.ops[front][1]:
            front = busy.pop()  # the first of those without a break between them
        moves = judge.part(maker) if front in judge.block_of[maker] else 0
        assert starts(begins - moves, longer=sooner)


@given(plans())
@settings(max_examples=120, deadline=None)
def test_every_op_of_the_critical_path_sets_the_makespan(plan):
    """And every message between them, with those that a busy link carries before it."""
    path = [event for event in critical_path(plan) if event.op.kind != "U"]
    over, judge, sent = makespan(plan.events), Judge(plan), []
    times = judge.times()
    assert path[0].start == 0
    assert path[-1].end == over
    for a, b in itertools.pairwise(path):
        now = a.end
        if a.device != b.device:
            queue = judge.queues[a.device, b.device]
            makers = [judge.made_by[op] for op in judge.block_of[b.op] if op in judge.made_by]
            last = next(m for m in queue if m in makers and times.messages[m][1] == b.start)
            for message in queue[queue.index(a.op) : queue.index(last) + 1]:
                leaves, arrives = times.messages[message]
                assert leaves == now, "the link was free before"
                sent, now = [*sent, message], arrives
        assert now == b.start
    assert sum(e.end - e.start for e in path) + sum(map(judge.travel, sent)) == over
    for event in path[:: max(1, len(path) // 8)]:
        assert judge.times(longer=(event.op, PART)).over == over + judge.part(event.op)
    for message in sent[:: max(1, len(sent) // 4)]:
        assert judge.times(slower=(message, PART)).over == over + PART


# ------------------------------------------------------------------------- words and the order


def plan_of(**settings):
    return make_plan({**PLAN_CONFIG, "device": "cpu", **settings})


def ready_without(judge, idle):
    """The ops from the next block on whose input is there before the gap ends, in order."""
    row, times = judge.plan.schedule[idle.device], judge.times()
    halves = {op[::2]: times.ops[op][1] for op in row if op.kind == "I"}
    for op in row[row.index(judge.block_of[idle.next.op][0]) :]:
        ready = {"F": 0, "W": halves.get(op[::2])}.get(op.kind, float("inf"))
        if op != idle.next.op and times.inputs.get(op, ready) < idle.end:
            yield op


@given(plans())
@settings(max_examples=80, deadline=None)
def test_what_could_have_run_instead_is_the_first_op_whose_input_was_there(plan):
    reasons, judge = Reasons(plan), Judge(plan)
    for idle in idle_times(plan.events, plan.links)[:40]:
        text, other = reasons.order(idle)
        expected = next(ready_without(judge, idle), None) if idle.next else None
        assert (other and other.op) == expected
        assert "its limit" not in text or expected.kind == "F", "a backward frees memory"
        assert "flush" not in text or plan.name != "pipedream", "even where it is naive"
        assert ("together" in text) == bool(expected and expected in judge.block_of[idle.next.op])


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
    tie = tie.rounded()
    for gap in idle_times(tie.events, tie.links):
        _, other = Reasons(tie).order(gap)
        if other:  # ready before the wait is over, not at its end
            assert Reasons(tie).ready[other.op] < gap.end - 1e-6


def test_while_a_result_is_on_its_way_nothing_is_said_of_what_its_sender_does_then():
    plan = plan_of(comm_time=0.5)
    (gap, *_) = (gap for gap in idle_times(plan.events, plan.links) if gap.cause == "send")
    assert len(explain_moment(plan, gap.device, gap.start)) == 1


def test_of_messages_that_queue_it_is_told_which_goes_first(tmp_path):
    """Worked out by hand, as in test_schedules: the second message of two waits for the first."""
    sizes = {"num_stages": 2, "num_microbatches": 2, "num_batches": 1}
    plan = plan_of(schedule="gpipe", comm_time=3, **sizes)
    gaps = idle_times(plan.events, plan.links)
    assert [(gap.device, gap.start, gap.end, gap.cause) for gap in gaps] == [
        *((1, 0, 1, "fill"), (1, 1, 4, "send"), (0, 2, 9, "wait"), (1, 5, 7, "send")),
        *((0, 9, 12, "send"), (1, 10, 16, "drain"), (0, 13, 15, "send")),
    ]
    (line,) = explain_moment(plan, 1, 5)
    assert line.startswith(
        "GPU1 waits until t7: what F1 needs is on its way from GPU0. It could not leave before t4, "
        "after F0."
    )
    assert [str(event.op) for event in critical_path(plan)][:3] == ["0F0", "1F1", "1B0"]
    # GPU1 wants the second one first.
    (tmp_path / "turned.csv").write_text("0F0,0F1,0B1,0B0\n1F1,1F0,1B1,1B0\n")
    file = {"schedule": str(tmp_path / "turned.csv"), "num_batches": 1, "batch_size": 2}
    plan = plan_of(**file, comm_time=3)
    mine = [gap for gap in idle_times(plan.events, plan.links) if gap.device == 1]
    spans = [(gap.start, gap.end, gap.cause) for gap in mine]
    assert spans[:3] == [(0, 2, "fill"), (2, 4, "link"), (4, 7, "send")]
    assert explain_moment(plan, 1, 3)[0].startswith(
        "GPU1 waits until t4: what F1 needs is done, but the link from GPU0 carries F0."
    )


def test_of_a_pair_each_op_is_told_with_the_other(tmp_path):
    """Worked out by hand in test_plans: from t2 to t6 F2 could run, but B0 still has no input."""
    rows = "0F0,0F1,(0F2;0B0)OVERLAP_F_B,0B1,0B2\n1F0,1B0,1F1,1B1,1F2,1B2\n"
    (tmp_path / "pair.csv").write_text(rows)
    sizes = {"schedule": str(tmp_path / "pair.csv"), "num_batches": 1, "batch_size": 3}
    plan = plan_of(**sizes, backward_time=2, comm_time=1, overlap_time=0.75)
    assert explain_moment(plan, 0, 3) == [
        "GPU0 waits until t5: its next op, B0, needs B0 of GPU1. F2 could run, but it runs "
        "together with B0.",
        "GPU1 runs B0 until t5.",
    ]
    lines = explain_moment(plan, 0, 7)
    assert lines[0].startswith("GPU0 runs F2 from t6 to t8.25.")
    assert "together with B0" in lines[1]
    sizes_v = {"num_microbatches": 8, "layers_per_stage": 2, "num_batches": 2}
    longer = plan_of(schedule="dualpipe-v", **sizes_v, comm_time=0.5, backward_time=2)
    lines = explain_moment(longer, 3, 16)  # it waits for 5B2, the partner of F6
    assert lines[0].startswith("GPU3 waits until t16.5: its next op, 4B2, needs 5B2 of GPU2.")
    assert lines[1] == "GPU2 runs F6 until t16.5."
    plan = plan_of(**sizes, backward_time=[2, 0.25], comm_time=1, forward_time=[4, 1])
    (first, *_) = explain_moment(plan, 0, 8)  # B0 has come, and nothing is waited for
    assert first.startswith("GPU0 runs F2 from t8 to t14.")


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


@pytest.mark.parametrize(
    ("schedule", "numbers"),
    [
        *((name, (7, 10, 0)) for name in ("pipedream", "1f1b", "zb-h1")),
        *(("gpipe", (16, 15, 28)), ("1f1b", (16, 13, 30)), ("looped-bfs", (4, 24, 3))),
    ],
)
def test_the_unit_of_time_changes_no_reason(schedule, numbers, run):
    """0.7 and 1, or 7 and 10: in floating point the first do not add up."""
    found, keys = [], ("forward_time", "backward_time", "comm_time")
    for scale in (10, 1):
        times = {key: time / scale for key, time in zip(keys, numbers, strict=True)}
        plan = plan_of(schedule=schedule, **times).rounded()
        path = [str(event.op) for event in critical_path(plan)]
        gaps = [(gap.device, gap.cause) for gap in idle_times(plan.events, plan.links)]
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
