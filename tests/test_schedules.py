"""The rows of every schedule and the simulator, against PyTorch, closed forms and plain laws."""

import itertools
import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch import what_pytorch_executes
from reference import mismatches
from torch.distributed.pipelining.schedules import Schedule1F1B, ScheduleGPipe

from pipedream.backstage.measures import peak_in_flight, peak_versions, staleness
from pipedream_simple import (
    CONFIG,
    SCHEDULES,
    Op,
    UserError,
    build_schedule,
    gpipe,
    list_run,
    makespan,
    memory_held,
    pin_versions,
    simulate,
    train,
    utilization,
)

FLUSH = ["naive", "gpipe", "1f1b"]
SIZES = st.integers(1, 9), st.integers(1, 12), st.integers(1, 6)  # S, M, N


def make(schedule, num_stages, num_microbatches, num_batches, **other):
    """A config of that size, its schedule and its events."""
    config = {
        **CONFIG,
        "schedule": schedule,
        "num_stages": num_stages,
        "num_microbatches": num_microbatches,
        "num_batches": num_batches,
        "batch_size": num_microbatches,
        **other,
    }
    rows = build_schedule(config)
    return config, rows, simulate(rows, config)


# ------------------------------------------------------------------------- against PyTorch


@pytest.mark.parametrize(("name", "theirs"), [("gpipe", ScheduleGPipe), ("1f1b", Schedule1F1B)])
def test_rows_are_in_the_order_that_pytorch_executes(name, theirs):
    for num_stages, num_microbatches in itertools.product((1, 2, 3, 4, 8), (1, 2, 3, 4, 9)):
        _, rows, _ = make(name, num_stages, num_microbatches, 1)
        for stage, row in enumerate(rows):
            ours = [(op.kind, op.microbatch) for op in row if op.kind != "U"]
            assert ours == what_pytorch_executes(theirs, stage, num_stages, num_microbatches)


# -------------------------------------------------------------------- against closed forms


@given(*SIZES, st.sampled_from([(1, 1), (1, 2), (3, 0.5)]))
@settings(max_examples=200, deadline=None)
def test_makespan_and_utilization_match_closed_forms(s, m, n, times):
    f, b = times
    turns = {
        "naive": n * m * s,
        "gpipe": n * (m + s - 1),
        "1f1b": n * (m + s - 1),
        "pipedream": m * n + s - 1,
    }
    for name, expected in turns.items():
        _, _, events = make(name, s, m, n, forward_time=f, backward_time=b)
        assert makespan(events) == pytest.approx(expected * (f + b))
        assert utilization(events) == pytest.approx(m * n / expected)


def test_25_75_90_percent_are_nine_microbatches_in_three_batches():
    percent = [100 * utilization(make(name, 4, 9, 3)[2]) for name in ("naive", "1f1b", "pipedream")]
    assert percent == pytest.approx([25, 75, 90])


@given(*SIZES)
@settings(max_examples=100, deadline=None)
def test_the_four_schedules_are_one_pattern_with_four_warmups(s, m, n):
    """Warmup forwards, then F and B in turn, then the backwards owed: written here once for all."""

    def pattern(batch, warmup):
        forwards, backwards = [("F", i) for i in batch], [("B", i) for i in batch]
        in_turn = itertools.chain(*zip(forwards[warmup:], backwards, strict=False))
        return [*forwards[:warmup], *in_turn, *backwards[len(batch) - warmup :]]

    batches = [range(b * m, (b + 1) * m) for b in range(n)]
    run = [range(m * n)]
    for stage in range(s):
        for name, parts, warmup in (
            ("naive", batches, 0),
            ("gpipe", batches, m),
            ("1f1b", batches, min(s - 1 - stage, m)),
            ("pipedream", run, min(s - 1 - stage, m * n)),
        ):
            row = [step[1:] for step in list_run(*SCHEDULES[name], s, m, n)[stage]]
            assert row == [step for batch in parts for step in pattern(batch, warmup)]


@given(*SIZES)
@settings(max_examples=200, deadline=None)
def test_peak_microbatches_in_flight_match_closed_forms(s, m, n):
    for name, expected in {
        "naive": [1] * s,
        "gpipe": [m] * s,
        "1f1b": [min(s - stage, m) for stage in range(s)],
        "pipedream": [min(s - stage, m * n) for stage in range(s)],
    }.items():
        assert peak_in_flight(make(name, s, m, n)[1]) == expected, name


@given(st.integers(1, 9), st.integers(1, 12))
@settings(max_examples=100, deadline=None)
def test_versions_and_staleness_match_closed_forms(s, m):
    n = 2 * s + 1  # long enough for the pipeline to reach its steady state
    delays = [math.ceil((s - 1 - stage) / m) for stage in range(s)]
    _, stashed, _ = make("pipedream", s, m, n)
    assert peak_versions(stashed) == [delay + 1 for delay in delays]
    assert staleness(stashed, m) == delays
    _, synced, _ = make("pipedream", s, m, n, vertical_sync=True)
    assert peak_versions(synced) == [delays[0] + 1] * s
    assert staleness(synced, m) == [delays[0]] * s
    for rows, delay_of in ((stashed, lambda stage: delays[stage]), (synced, lambda _: delays[0])):
        for op in (op for row in rows for op in row if op.kind != "U"):
            assert op.version == max(0, op.microbatch // m - delay_of(op.stage))


@pytest.mark.parametrize("name", FLUSH)
def test_a_flush_needs_one_version_whatever_the_switches_say(name):
    for switches in ({}, {"vertical_sync": True}, {"weight_stashing": False}):
        _, rows, _ = make(name, 4, 3, 3, **switches)
        assert rows == make(name, 4, 3, 3)[1]
        assert peak_versions(rows) == [1] * 4
        assert staleness(rows, 3) == [0] * 4


def test_without_stashing_backwards_meet_other_weights_and_with_it_never():
    assert mismatches(make("pipedream", 4, 4, 5, weight_stashing=False)[1])
    assert mismatches(make("pipedream", 4, 1, 5, weight_stashing=False)[1])
    assert mismatches(make("pipedream", 1, 4, 5, weight_stashing=False)[1]) == []


# ---------------------------------------------------------------- laws, over random configs

times = st.sampled_from([1, 2, 0.5, 3.25])
slow_links = st.sampled_from([0, 0.5, 7, 20])


@st.composite
def configs(draw):
    num_stages = draw(st.integers(1, 7))
    stashing = draw(st.booleans())
    per_stage, of_links = (
        st.one_of(some, st.lists(some, min_size=num_stages, max_size=num_stages))
        for some in (times, slow_links)
    )
    return {
        **CONFIG,
        "schedule": draw(st.sampled_from(list(SCHEDULES))),
        "num_stages": num_stages,
        "num_microbatches": draw(st.sampled_from([1, 2, 3, 4, 5, 6, 7])),
        "batch_size": 420,
        "num_batches": draw(st.integers(1, 5)),
        "weight_stashing": stashing,
        "vertical_sync": stashing and draw(st.booleans()),
        "forward_time": draw(per_stage),
        "backward_time": draw(per_stage),
        "comm_time": draw(of_links),
    }


@given(configs())
@settings(max_examples=300, deadline=None)
def test_every_op_once_and_every_version_read_exists(config):
    s, m, n = config["num_stages"], config["num_microbatches"], config["num_batches"]
    rows = build_schedule(config)
    done = Counter((op.stage, op.kind, op.microbatch) for row in rows for op in row)
    expected = {(stage, kind, i) for stage in range(s) for kind in "FB" for i in range(m * n)}
    expected |= {(stage, "U", b * m + m - 1) for stage in range(s) for b in range(n)}
    assert done == Counter(expected)

    for stage, row in enumerate(rows):
        newest = 0
        owed = dict.fromkeys(range(n), m)  # backwards that a batch still waits for
        forward_read = {}
        for op in row:
            assert op.stage == stage
            assert 0 <= op.version <= newest
            if op.kind == "F":
                forward_read[op.microbatch] = op.version
            elif op.kind == "B":
                owed[op.microbatch // m] -= 1
                if config["weight_stashing"]:
                    assert op.version == forward_read[op.microbatch]
                else:
                    assert op.version == newest
            else:
                assert op.version == newest == op.microbatch // m
                assert owed[newest] == 0, "an update before its batch was done"
                newest += 1
        assert memory_held(row)[-1] == (0, 1), "something is left in the stash"


@given(configs())
@settings(max_examples=300, deadline=None)
def test_simulated_times_are_those_of_a_plain_relaxation(config):
    """Longest paths by relaxing every constraint until nothing moves; no queue, no order."""
    rows, last = build_schedule(config), config["num_stages"] - 1

    def of_stage(key, stage):
        return config[key][stage] if isinstance(config[key], list) else config[key]

    ends, arrives, moved = {}, {}, True
    while moved:
        moved = False
        for stage, row in enumerate(rows):
            free, link_free = 0, {}  # (from, to) -> when the last message has arrived
            for op in row:
                _, kind, microbatch, _ = op
                before = {"F": (stage - 1, "F"), "B": (stage + 1, "B")}.get(kind, (stage, "U"))
                ready = [free, arrives.get((*before, microbatch), 0)]
                if kind == "B":
                    ready.append(ends.get((stage, "F", microbatch), 0))
                cost = {"F": "forward_time", "B": "backward_time"}.get(kind)
                end = max(ready) + (of_stage(cost, stage) if cost else 0)
                moved |= ends.get(op[:3]) != end
                ends[op[:3]] = free = end
                to = stage + {"F": 1, "B": -1, "U": 0}[kind]
                if to != stage and 0 <= to <= last:
                    leaves = max(end, link_free.get(to, 0))
                    arrives[op[:3]] = link_free[to] = leaves + of_stage("comm_time", stage)

    links = {}
    events = simulate(rows, config, links=links)
    assert {event.op[:3]: event.end for event in events} == ends
    messages = [message for link in links.values() for message in link]
    assert {message.op[:3]: message.end for message in messages} == arrives
    assert [event.start for event in events] == sorted(event.start for event in events)
    position = {event.op[:3]: i for i, event in enumerate(events)}
    for stage, kind, microbatch in position:  # an op is listed after what it needs
        if kind == "F" and stage > 0:
            assert position[stage - 1, "F", microbatch] < position[stage, kind, microbatch]
        if kind == "B":
            assert position[stage, "F", microbatch] < position[stage, kind, microbatch]
    for device, row in enumerate(rows):  # one op at a time, in the order of the row
        mine = [event for event in events if event.device == device]
        assert [event.op for event in mine] == row
        assert all(a.end <= b.start for a, b in itertools.pairwise(mine))


def test_a_comm_time_a_stage_counts_only_between_devices():
    _, _, events = make("gpipe", 3, 1, 1, comm_time=[5, 7, 11])
    ends = {str(event.op): event.end for event in events}
    compute = {name: end for name, end in ends.items() if "U" not in name}
    assert compute == {"0F0": 1, "1F0": 7, "2F0": 15, "2B0": 16, "1B0": 28, "0B0": 36}


def test_a_link_carries_one_message_at_a_time_in_each_direction():
    """Worked out by hand: F1 and F2 wait for the link down, and B0 goes up while it carries F1."""
    _, _, events = make("1f1b", 2, 3, 1, comm_time=3)
    found = {str(op): (start, end) for op, _, start, end in events if op.kind != "U"}
    assert found == {
        **{"0F0": (0, 1), "0F1": (1, 2), "0B0": (9, 10), "0F2": (10, 11)},
        **{"0B1": (12, 13), "0B2": (19, 20)},
        **{"1F0": (4, 5), "1B0": (5, 6), "1F1": (7, 8), "1B1": (8, 9)},
        **{"1F2": (14, 15), "1B2": (15, 16)},
    }


@pytest.mark.parametrize(("s", "m", "comm"), [(4, 32, 4), (2, 2, 3), (3, 5, 1), (6, 9, 2.5)])
def test_links_slower_than_the_ops_set_the_time_of_gpipe(s, m, comm):
    """Each way, the first microbatch takes S ops and S - 1 hops, the others follow a hop apart."""
    _, _, events = make("gpipe", s, m, 1, comm_time=comm)
    assert makespan(events) == 2 * (s + (m + s - 2) * comm)
    assert (s, m, comm) != (4, 32, 4) or makespan(events) == 280


def test_rows_that_wait_in_a_circle_are_named():
    rows = [[Op(0, "B", 0, 0), Op(0, "F", 0, 0)], [Op(1, "F", 0, 0), Op(1, "B", 0, 0)]]
    with pytest.raises(ValueError, match="deadlock: GPU0 waits for 1B0, GPU1 waits for 0F0"):
        simulate(rows, {**CONFIG, "num_stages": 2})


def test_a_device_with_several_stages_updates_them_together_after_all_its_backwards():
    row = [(0, "F", 0), (1, "F", 0), (1, "B", 0), (0, "B", 0), (0, "F", 1), (1, "F", 1)]
    row += [(1, "I", 1), (1, "W", 1), (0, "B", 1)]
    ops = pin_versions([row], num_microbatches=1)[0]
    names = [f"{op}v{op.version}" for op in ops]
    assert names[:6] == ["0F0v0", "1F0v0", "1B0v0", "0B0v0", "0U0v0", "1U0v0"]
    assert names[6:] == ["0F1v1", "1F1v1", "1I1v1", "1W1v1", "0B1v1", "0U1v1", "1U1v1"]


@pytest.mark.parametrize(
    "broken",
    [
        lambda steps: [step for step in steps if step[1] == "F"],
        lambda steps: [*steps, steps[-1]],
        lambda steps: [*steps[:-1], (0, "B", 99)],
    ],
)
def test_a_schedule_that_does_not_run_every_step_once_is_refused(broken, monkeypatch):
    mine = lambda *sizes: broken([*gpipe(*sizes)])  # noqa: E731
    monkeypatch.setitem(SCHEDULES, "mine", (mine, True))
    for call in (build_schedule, train):
        with pytest.raises(UserError, match="stage 0 must run the F and the B of each microbatch"):
            call({**CONFIG, "schedule": "mine"})
