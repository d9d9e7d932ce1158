"""The library's schedules against PyTorch's own, closed forms and plain SGD; and bad configs."""

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch import rows_of_pytorch
from small import FLUSHING, SMALL, assert_close, plan_of, same_as_recurrence

from pipedream.backstage.audit import VersionCount
from pipedream.backstage.measures import peak_in_flight, peak_versions, staleness
from pipedream.schedules.files import check_rows
from pipedream.schedules.halves import train_plan
from pipedream.schedules.plans import PLAN_CONFIG, all_plans, make_plan, story_config
from pipedream.schedules.rows import LIBRARY, zb_h1, zb_h2
from pipedream_simple import SCHEDULES, UserError, build_schedule, makespan, pin_versions, simulate

LIBRARYS = [name for name in LIBRARY if name not in SCHEDULES]


def sizes(stages, microbatches, batches=1):
    names = "num_stages", "num_microbatches", "num_batches", "batch_size"
    return dict(zip(names, (stages, microbatches, batches, microbatches), strict=True))


# ---------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize(
    ("schedule", "theirs", "chunks"),
    [
        *(("interleaved", "ScheduleInterleaved1F1B", v) for v in (1, 2, 3, 4)),
        ("zb-h1", "ScheduleInterleavedZeroBubble", 1),
    ],
)
def test_rows_are_the_list_that_pytorch_generates(schedule, theirs, chunks):
    for devices, times in itertools.product((2, 3, 4, 6, 8), (1, 2, 4)):
        microbatches, extra = devices * times, [chunks] * (schedule == "interleaved")
        list_batch, _ = LIBRARY[schedule]
        ours = [[*list_batch(d, devices, microbatches, *extra)] for d in range(devices)]
        pytorch = rows_of_pytorch(theirs, devices, microbatches, chunks)
        assert [[f"{s}{kind}{m}" for s, kind, m in row] for row in ours] == [
            [str(action) for action in row if action] for row in pytorch
        ]


def test_interleaved_and_zb_h1_take_the_time_of_the_closed_form_at_150_random_sizes():
    numbers = random.Random(0)
    for _ in range(150):
        devices, rounds, chunks = (numbers.randint(1, most) for most in (7, 4, 4))
        microbatches, f, b = devices * rounds, numbers.randint(1, 5), numbers.randint(1, 9)
        size = {**sizes(devices, microbatches), "forward_time": f}
        plan = plan_of("interleaved", chunks, **size, backward_time=b, layers_per_stage=chunks)
        expected = (chunks * microbatches + devices - 1) * (f + b) / chunks
        assert makespan(plan.events) == pytest.approx(expected)
        plan = plan_of("zb-h1", **size, backward_time=2 * f)  # f = I = W
        assert makespan(plan.events) == pytest.approx(f * (3 * microbatches + devices - 1))


@pytest.mark.parametrize(("make", "times"), [(zb_h1, 1), (zb_h2, 2)])
def test_zero_bubble_holds_as_many_microbatches_as_the_paper_says(make, times):
    for stages, microbatches in itertools.product(range(1, 8), range(1, 15)):
        rows = [list(make(s, stages, microbatches)) for s in range(stages)]
        most = min(times * (stages - 1) + 1, microbatches)
        assert peak_in_flight(pin_versions(rows, microbatches)) == [most] * stages
        check_rows(rows, make.__name__)


def test_zb_h2_warms_up_twice_as_long_and_is_never_idle_between_batches():
    """With f = I = W, free links and M >= 2S - 1 a GPU works from its first op to its last."""
    for stages, more, batches in itertools.product(range(1, 7), range(3), range(1, 4)):
        count = 2 * stages - 1 + more
        plan = plan_of("zb-h2", **sizes(stages, count, batches), backward_time=2)
        assert makespan(plan.events) == 3 * count * batches + stages - 1
        for device, row in enumerate(plan.schedule):
            kinds = [op.kind for op in row]
            assert kinds.index("I") == 2 * (stages - 1 - device) + 1
            mine = [event for event in plan.events if event.device == device]
            assert mine[0].start == device
            assert all(a.end == b.start for a, b in itertools.pairwise(mine))


@given(st.integers(1, 7), st.integers(1, 9), st.integers(1, 4), st.integers(1, 14))
@settings(max_examples=150, deadline=None)
def test_a_limit_is_kept_and_as_many_as_stages_is_1f1b(stages, microbatches, batches, limit):
    size = sizes(stages, microbatches, batches)
    for name in ("1f1b", "pipedream"):
        plan = plan_of(name, in_flight=limit, **size)
        most = microbatches * (batches if name == "pipedream" else 1)
        behind = max(1, stages - 1)
        allowed = [1 + (limit - 1) * (stages - 1 - s) // behind for s in range(stages)]
        assert peak_in_flight(plan.schedule) == [min(most, one) for one in allowed]
        ours = build_schedule({**story_config(SMALL), "schedule": name, **size})
        assert plan_of(name, in_flight=stages, **size).schedule == ours
    naive = build_schedule({**story_config(SMALL), "schedule": "naive", **size})
    assert plan_of("1f1b", in_flight=1, **size).schedule == naive


def test_more_in_flight_costs_memory_and_staleness_and_pays_only_with_slow_links():
    """The round trip of one turn and its messages fits into the turns that eager 1F1B leaves."""
    for name, flushes in (("1f1b", 5), ("pipedream", 1)):
        usual, eager, slow, fast = (
            plan_of(name, in_flight=limit, comm_time=comm, **sizes(4, 16, 5))
            for comm, limit in itertools.product((0, 0.5), (4, 7))
        )
        assert makespan(usual.events) == makespan(eager.events)
        assert peak_in_flight(usual.schedule) == [4, 3, 2, 1]
        assert peak_in_flight(eager.schedule) == [7, 5, 3, 1]
        assert makespan(fast.events) == makespan(usual.events) + flushes * 6 * 0.5
        assert makespan(slow.events) > makespan(fast.events)
    usual, eager = (plan_of("pipedream", **sizes(4, 1, 20), in_flight=n) for n in (0, 7))
    assert staleness(usual.schedule, 1) == [3, 2, 1, 0]
    assert staleness(eager.schedule, 1) == [6, 4, 2, 0]
    assert peak_versions(eager.schedule) == [7, 5, 3, 1]


# --------------------------------------------------------------------------------------- times


@pytest.mark.parametrize("schedule", ["gpipe", "zb-h1", "zb-h2"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("w", [0, 0.25, [0.5, 0.25, 0, 1.5]])
def test_an_op_lasts_as_long_as_the_times_say(schedule, recompute, w):
    """W its part of a backward. With recompute B or I a forward longer, W no longer."""
    f, b = [1, 2, 3, 4], [4, 6, 8, 10]
    times = {"forward_time": f, "backward_time": b, "weight_gradient_time": w}
    for op, _, start, end in plan_of(schedule, **times, recompute=recompute).events:
        s, again = op.stage, f[op.stage] * recompute
        part = (w[s] if isinstance(w, list) else w) or b[s] / 2
        lasts = {"F": f[s], "B": again + b[s], "I": again + b[s] - part, "W": part, "U": 0}
        assert end - start == pytest.approx(lasts[op.kind])


# -------------------------------------------------------------------------------------- training


AGAIN = {"recompute": True, "momentum": 0.9, "learning_rate": 0.02, "layers_per_stage": 2}


@pytest.mark.parametrize("schedule", LIBRARYS)
@pytest.mark.parametrize(
    ("size", "chunks", "new"),
    [
        *(((1, 1), 1, {}), ((3, 6), 2, {}), ((4, 4), 3, {})),
        *(((2, 4), 2, AGAIN), ((2, 4), 2, {"network": "transformer", **AGAIN})),
    ],
)
def test_the_librarys_schedules_train_to_the_weights_of_plain_sgd(schedule, size, chunks, new):
    new = {**sizes(*size, 3), "batch_size": 12, "layers_per_stage": 6, **new}
    plan, versions = plan_of(schedule, chunks, **new), VersionCount()
    run, again = same_as_recurrence(plan), {**plan.config, "recompute": False}
    once = train_plan(plan._replace(config=again), torch.float64, watch=versions)
    assert {*versions.peak} == {1}
    assert once.losses == run.losses
    assert_close(once.weights, run.weights, tolerance=0)


@pytest.mark.parametrize("limit", [2, 5, 7])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_pipedream_with_another_limit_trains_to_its_recurrence(limit, microbatches):
    """A forward misses the updates of the batches that are in flight before it: float64, 1e-12."""
    size = {**sizes(4, microbatches, 9), "batch_size": 8}

    def delay(stage):
        ahead = (limit - 1) * (3 - stage) // 3
        return -(-ahead // microbatches)

    same_as_recurrence(plan_of("pipedream", in_flight=limit, **size), delay)


# --------------------------------------------------------------------------------------- plans


def test_a_plan_keeps_the_network_and_the_work_of_each_gpu():
    times = {"forward_time": [1, 2, 3, 4], "backward_time": 6, "comm_time": [5, 6, 7, 8]}
    plan = plan_of("interleaved", 3, **times)
    assert plan.config.keys() == PLAN_CONFIG.keys()
    assert plan.config["num_stages"] * plan.config["layers_per_stage"] == 12
    per_gpu = [sum(plan.config["forward_time"][d::4]) for d in range(4)]
    assert per_gpu == pytest.approx([1, 2, 3, 4])
    assert plan.config["backward_time"] == [2] * 12
    assert plan.config["comm_time"] == [5, 6, 7, 8] * 3


def test_a_plan_of_the_storys_schedules_is_what_the_story_does():
    switches = [(True, False), (True, True), (False, False)]
    for name, (stashing, sync) in itertools.product(SCHEDULES, switches):
        config = {**SMALL, "schedule": name, "weight_stashing": stashing, "vertical_sync": sync}
        plan, story = make_plan({**config, "more": 1}), story_config(config)  # of a command
        assert plan.schedule == build_schedule(story)
        assert plan.events == simulate(plan.schedule, story)
        assert plan.config == config
        assert repr(plan).startswith(f"Plan({name}: {makespan(plan.events):g} time units, ")


def test_all_plans_list_every_schedule_once_flushes_first():
    plans, reasons = all_plans(SMALL)
    assert [plan.name for plan in plans] == [
        *(*FLUSHING, "pipedream", "  vertical sync", "  no stashing")
    ]
    assert not reasons
    plans, (reason,) = all_plans({**SMALL, "num_microbatches": 2})
    assert "interleaved" not in [plan.name for plan in plans]
    assert "num_microbatches=2 must be a multiple of num_stages=4 for interleaved" in (
        reason.replace("\n", " ")
    )
    with pytest.raises(UserError, match="num_stages"):
        all_plans({**SMALL, "num_stages": 0})


def test_a_schedule_is_one_function_and_one_line(monkeypatch):
    """GPipe's rows in a V: the stages go down the GPUs and back up again, two on each."""

    def v(device, num_devices, num_microbatches):
        stages = device, 2 * num_devices - 1 - device
        yield from ((s, "F", m) for s in stages for m in range(num_microbatches))
        yield from ((s, "B", m) for s in stages[::-1] for m in range(num_microbatches))

    monkeypatch.setitem(LIBRARY, "v", (v, True))
    plan = plan_of("v", layers_per_stage=2, forward_time=[2, 4, 6, 8], comm_time=[1, 2, 3, 4])
    assert plan.config["forward_time"] == [1, 2, 3, 4, 4, 3, 2, 1]
    assert plan.config["comm_time"] == [1, 2, 3, 4, 4, 3, 2, 1]
    assert [{op.stage for op in row} for row in plan.schedule] == [{0, 7}, {1, 6}, {2, 5}, {3, 4}]
    same_as_recurrence(plan)


def test_rows_that_miss_an_op_are_refused(monkeypatch):
    monkeypatch.setitem(LIBRARY, "naive", (lambda device, *_: [(device, "F", 0)], True))
    with pytest.raises(UserError, match="naive: stage 0 must run F B or F I W on microbatch 0"):
        plan_of("naive")


BAD = {
    "schedule": [None, 3, "zb-h3", "FILE.csv"],
    "weight_gradient_time": [None, 1, -1, 0.9999, [0.5], [2] * 4],
    "chunks_per_gpu": [None, 0, 1.5, [3], True],
    "in_flight": [-1, "x"],
    "num_stages": [0, None, [4], 10**30],
    "forward_time": [[], [1] * 5, float("nan")],
}


@pytest.mark.parametrize(
    "config",
    [
        {key: value for key, value in PLAN_CONFIG.items() if key != "schedule"},
        {key: value for key, value in PLAN_CONFIG.items() if key != "chunks_per_gpu"},
        *({**PLAN_CONFIG, key: value} for key, values in BAD.items() for value in values),
        {**PLAN_CONFIG, "schedule": "interleaved", "num_microbatches": 2},
        {**PLAN_CONFIG, "schedule": "interleaved", "chunks_per_gpu": 2},
        {**PLAN_CONFIG, "schedule": "interleaved", "layers_per_stage": 2500, "chunks_per_gpu": 2500}
        | {"num_microbatches": 2500, "batch_size": 2500},
    ],
    ids=lambda config: " ".join(f"{k}={v}" for k, v in config.items() if PLAN_CONFIG.get(k) != v),
)
def test_a_bad_config_from_python_is_a_user_error_of_one_line(config):
    with pytest.raises(UserError) as caught:
        make_plan(config)
    assert "\n" not in str(caught.value)
