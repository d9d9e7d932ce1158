"""The library's schedules against PyTorch's own, closed forms and plain SGD; and bad configs."""

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch import cells, rows_of_pytorch
from small import FLUSHING, SMALL, V_SHAPED, assert_close, fits, plan_of, same_as_recurrence

from pipedream.backstage.audit import VersionCount
from pipedream.backstage.measures import peak_in_flight, peak_versions, staleness
from pipedream.schedules.files import check_rows
from pipedream.schedules.halves import train_plan
from pipedream.schedules.plans import PLAN_CONFIG, all_plans, make_plan, story_config
from pipedream.schedules.rows import LIBRARY, zb_h1, zb_h2
from pipedream_simple import (
    SCHEDULES,
    UserError,
    build_schedule,
    makespan,
    pin_versions,
    simulate,
    utilization,
)

LIBRARYS = [name for name in LIBRARY if name not in SCHEDULES]
ZERO_BUBBLE = "zb-h1", "interleaved-zb"


def sizes(stages, microbatches, batches=1):
    names = "num_stages", "num_microbatches", "num_batches", "batch_size"
    return dict(zip(names, (stages, microbatches, batches, microbatches), strict=True))


# ---------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize(
    ("schedule", "theirs", "chunks"),
    [
        ("interleaved", "ScheduleInterleaved1F1B", (1, 2, 3, 4)),
        ("looped-bfs", "ScheduleLoopedBFS", (1, 2, 3)),
        ("interleaved-zb", "ScheduleInterleavedZeroBubble", (1, 2, 3)),
        ("zb-h1", "ScheduleInterleavedZeroBubble", (1,)),
        ("zb-v", "ScheduleZBVZeroBubble", (2,)),
        ("dualpipe-v", "ScheduleDualPipeV", (2,)),
    ],
)
def test_rows_are_the_list_that_pytorch_generates(schedule, theirs, chunks):
    """In the pairs of DualPipe, too: F&4 B0 is its (0F4;3B0)OVERLAP_F_B."""
    list_batch, compared = LIBRARY[schedule][0], set()
    for devices, microbatches, v in itertools.product(range(1, 9), range(1, 25), chunks):
        extra = [v] * (schedule not in ("zb-h1", *V_SHAPED))
        if not fits(schedule, devices, microbatches):
            with pytest.raises(UserError, match=f"num_microbatches={microbatches} must be a"):
                [*list_batch(0, devices, microbatches, *extra)]
        elif schedule != "zb-h1" or microbatches % devices == 0:  # theirs needs that
            ours = [[*list_batch(d, devices, microbatches, *extra)] for d in range(devices)]
            assert [[f"{s}{kind}{m}" for s, kind, m in row] for row in ours] == cells(
                rows_of_pytorch(theirs, devices, microbatches, v)
            )
            compared.add(devices)
    assert compared == {*range(1, 9)}


def random_sizes(number):
    """Devices, microbatches, stages per GPU, forward_time, backward_time."""
    numbers = random.Random(0)
    return [[numbers.randint(1, most) for most in (6, 8, 4, 5, 9)] for _ in range(number)]


def plan_in_chunks(schedule, devices, microbatches, v, **more):
    """A plan in which each GPU has one layer per stage."""
    size = {**sizes(devices, microbatches, more.pop("num_batches", 1)), "layers_per_stage": v}
    return plan_of(schedule, v, **size, **more)


def test_interleaved_and_looped_bfs_take_the_time_of_the_closed_form_at_100_random_sizes():
    """What GPU0 runs, and D - 1 turns of 1 / V. Fewer microbatches than GPUs: V round trips."""
    for devices, microbatches, v, f, b in random_sizes(100):
        times = {"forward_time": f, "backward_time": b}
        turns = v * max(microbatches, devices) + min(microbatches, devices) - 1
        plan = plan_in_chunks("looped-bfs", devices, microbatches, v, **times)
        assert makespan(plan.events) == pytest.approx(turns * (f + b) / v)
        assert peak_in_flight(plan.schedule) == [microbatches] * devices
        many = microbatches * devices
        plan = plan_in_chunks("interleaved", devices, many, v, **times)
        assert makespan(plan.events) == pytest.approx((v * many + devices - 1) * (f + b) / v)
        if microbatches > 1:  # "in a long batch"
            assert peak_in_flight(plan.schedule)[0] == pytest.approx(devices + (devices - 1) / v)


def test_looped_bfs_hides_the_links_that_its_docstring_says():
    """A lap has M - D turns for D hops: then only filling and draining takes longer."""
    for devices, more, v in itertools.product((2, 3, 4), (4, 8), (2, 3)):
        for comm in (0.25, 0.5, 1, 2):
            turn, times = 6 / v, {"forward_time": 6, "backward_time": 6, "comm_time": comm}
            plan = plan_in_chunks("looped-bfs", devices, devices + more, v, **times)
            late = makespan(plan.events) - (2 * turn * (v * (devices + more) + devices - 1))
            fits_in = devices * comm <= more * turn
            assert (late == pytest.approx(2 * (devices - 1) * comm)) == (comm <= turn and fits_in)


def test_zb_h1_and_interleaved_zb_have_a_third_of_the_bubble():
    for devices, microbatches, v, f, _ in random_sizes(100):
        times = {"forward_time": f, "backward_time": 2 * f}  # f = I = W
        many = max(devices, microbatches)
        plan = plan_of("zb-h1", **sizes(devices, many), **times)
        assert makespan(plan.events) == f * (3 * many + devices - 1)
        many = devices * microbatches
        plan = plan_in_chunks("interleaved-zb", devices, many, v, **times)
        assert makespan(plan.events) == pytest.approx(f * (3 * many + (devices - 1) / v))
        whole = plan_in_chunks("interleaved", devices, many, v, **times)
        bubbles = [makespan(each.events) - 3 * f * many for each in (plan, whole)]
        assert bubbles[0] == pytest.approx(bubbles[1] / 3, abs=1e-9)
        assert peak_in_flight(plan.schedule) == [devices] * devices
        most = max(peak_in_flight(whole.schedule))
        assert most > devices or devices == 1 or microbatches == 1


def test_interleaved_zb_in_one_stage_per_gpu_is_zb_h1():
    for devices, times in itertools.product(range(1, 7), range(1, 4)):
        plans = (plan_of(name, **sizes(devices, devices * times)) for name in ZERO_BUBBLE)
        ours, theirs = ([[op[:3] for op in row] for row in plan.schedule] for plan in plans)
        assert ours == theirs


def test_zb_v_is_never_idle_once_it_has_started_and_holds_what_1f1b_holds():
    """With f = I = W, free links and M >= 2D - 1. With fewer, several batches take longer."""
    for devices, microbatches, batches in itertools.product(range(1, 7), range(1, 15), (1, 2, 3)):
        size = {"num_batches": batches, "backward_time": 2}
        plan = plan_in_chunks("zb-v", devices, microbatches, 2, **size)
        late = makespan(plan.events) - 3 * microbatches * batches - (devices - 1) / 2
        if microbatches >= 2 * devices - 1:
            assert late == 0
            for row in rows_of_events(plan):
                assert all(a.end == b.start for a, b in itertools.pairwise(row))
        elif batches > 1:
            assert late > 0
        usual = plan_of("1f1b", **sizes(devices, microbatches)).schedule
        most = max(peak_in_flight(plan.schedule))
        assert most == min(devices, microbatches) == max(peak_in_flight(usual))


def rows_of_events(plan):
    return [[e for e in plan.events if e.device == device] for device in range(len(plan.schedule))]


def test_dualpipe_v_idles_as_its_docstring_says_and_holds_half_a_microbatch_more_than_1f1b():
    """DeepSeek's formula, where f = I >= W and a pair takes no less time than its B alone.

    With f < I it is a limit. With f > I, as by default, the bubble is larger.
    """
    numbers = random.Random(0)
    for _ in range(120):
        devices, overlap = numbers.randint(1, 5), numbers.choice([1, 0.75, 0.5])
        f, i, w = (numbers.choice([0.5, 1, 1.5, 2]) for _ in range(3))
        size = devices, 2 * devices + numbers.randint(0, 5)
        times = {"forward_time": 2 * f, "backward_time": 2 * (i + w), "overlap_time": overlap}
        plan = plan_in_chunks("dualpipe-v", *size, 2, **times, weight_gradient_time=2 * w)
        over, pair, whole = makespan(plan.events), overlap * (f + i + w), i + w
        busy = [sum(b - a for a, b in {e[2:] for e in row}) for row in rows_of_events(plan)]
        idle, formula = [over - time for time in busy], (devices - 1) * (pair + whole - 3 * w)
        if w <= i == f and pair >= whole:
            assert idle == sorted(idle)  # least where the fewest pairs save time
            assert {*idle[-2:]} == {formula}
        elif w <= i and f < i and pair >= whole:
            assert max(idle) <= formula
        elif devices > 1 and f > i:
            assert max(idle) > formula
        assert peak_in_flight(plan.schedule) == [devices + 1 / 2] * devices


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


def test_a_pair_is_one_op_that_waits_for_both_inputs(tmp_path):
    """Worked out by hand: F2 of GPU0 could start at 2, but its partner B0 needs a gradient."""
    rows = "0F0,0F1,(0F2;0B0)OVERLAP_F_B,0B1,0B2\n1F0,1B0,1F1,1B1,1F2,1B2\n"
    (tmp_path / "pair.csv").write_text(rows)
    times = {"backward_time": 2, "comm_time": 1, "overlap_time": 0.75}
    plan = plan_of(tmp_path / "pair.csv", num_batches=1, batch_size=3, **times)
    assert plan.pairs == {(0, "F", 2)}
    found = {str(op): (start, end) for op, _, start, end in plan.events if op.kind != "U"}
    assert found == {
        **{"0F0": (0, 1), "0F1": (1, 2), "0F2": (6, 8.25), "0B0": (6, 8.25)},
        **{"0B1": (9, 11), "0B2": (13.25, 15.25)},
        **{"1F0": (2, 3), "1B0": (3, 5), "1F1": (5, 6), "1B1": (6, 8)},
        **{"1F2": (9.25, 10.25), "1B2": (10.25, 12.25)},
    }
    busy = 2 + 2.25 + 4 + 9
    assert utilization(plan.events) == busy / (2 * 15.25)


# -------------------------------------------------------------------------------------- training


AGAIN = {"recompute": True, "momentum": 0.9, "learning_rate": 0.02, "layers_per_stage": 2}


@pytest.mark.parametrize("schedule", LIBRARYS)
@pytest.mark.parametrize(
    ("size", "chunks", "new"),
    [
        *(((1, 1), 1, {}), ((3, 6), 2, {"comm_time": [3, 0.5, 9]}), ((4, 4), 3, {})),
        *(((3, 2), 2, {}), ((2, 4), 2, AGAIN)),
        ((2, 4), 2, {"network": "transformer", **AGAIN}),
    ],
)
def test_the_librarys_schedules_train_to_the_weights_of_plain_sgd(schedule, size, chunks, new):
    stages, microbatches = size if fits(schedule, *size) else (size[0], 2 * size[0])
    new = {**sizes(stages, microbatches, 3), "batch_size": 24, "layers_per_stage": 6, **new}
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
    plans, reasons = all_plans({**SMALL, "num_microbatches": 8, "layers_per_stage": 6})
    assert [plan.name for plan in plans] == [
        *(*FLUSHING, "pipedream", "  vertical sync", "  no stashing")
    ]
    assert not reasons
    plans, reasons = all_plans({**SMALL, "num_microbatches": 2})
    left_out = [*V_SHAPED, "interleaved", "interleaved-zb"]
    assert [plan.name for plan in plans][:-3] == [n for n in FLUSHING if n not in left_out]
    told = " ".join(" ".join(reasons).split())
    many = "num_microbatches=2 must be a multiple of num_stages=4 for this schedule"
    for name, why in {
        "interleaved": many,
        "interleaved-zb": many,
        "dualpipe-v": "num_microbatches=2 must be at least 8 (2 * num_stages)",
        "zb-v": "num_stages * layers_per_stage is 12 layers, which cannot be split evenly",
    }.items():
        assert f"{name} is left out: {why}" in told
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
    "overlap_time": [None, 0, 1.01, True, [1]],
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
