"""The planner: published plans digit by digit, brute force, profiles, memory, and bad input."""

import itertools
import math
import re
import subprocess
import sys
import time
import tracemalloc
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pipedream_planner
from pipedream_papers import PROFILES, PUBLISHED, VGG16, graph, row
from pipedream_planner import (
    COLUMNS,
    COMMANDS,
    Layer,
    best_plan,
    check_request,
    count_in_flight,
    main,
    read_profile,
    simulate_plan,
)
from pipedream_simple import UserError

SCRIPT = Path(pipedream_planner.__file__)


@pytest.fixture
def profile(tmp_path):
    """The path of a file with that text, or with that published profile."""

    def write(text, name="profile.txt"):
        (tmp_path / name).write_text(PROFILES.get(text, text))
        return tmp_path / name

    return write


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda p: f"{p[0]}-{p[1]}-{p[3]}")
def test_the_published_plans_come_out_digit_by_digit(profile, published):
    name, gpus, bandwidth, straight, speed_up, data_parallel, stages, seconds, cuts = published
    plan = best_plan(read_profile(profile(name)), [gpus], [bandwidth], straight)
    slowest = plan.slowest.seconds
    assert "-".join(str(stage.replicas) for stage in plan.stages) == stages
    assert f"{plan.one_gpu / slowest:.2f}" == speed_up
    assert f"{plan.one_gpu / plan.data_parallel:.2f}" == data_parallel
    assert seconds in (None, f"{slowest:.9f}")
    assert cuts in (None, [stage.first for stage in plan.stages[1:]])


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda p: f"{p[0]}-{p[1]}-{p[3]}")
def test_the_published_plans_run_as_fast_as_they_promise(profile, published):
    """The planner knows no schedule, and the simulator no plan; both leave messages out here."""
    name, gpus, bandwidth, straight, *_ = published
    layers = read_profile(profile(name))
    plan = best_plan(layers, [gpus], [bandwidth], straight)
    seconds = simulate_plan(plan, layers)
    promised = max(stage.compute + stage.all_reduce for stage in plan.stages)
    assert seconds == pytest.approx(promised, rel=1e-9)


def test_gnmt_is_straight_with_and_without_the_flag(profile):
    layers = read_profile(profile("gnmt"))
    assert best_plan(layers, [4], [1e9]) == best_plan(layers, [4], [1e9], straight=True)


# -------------------------------------------------------------------------------- brute force


def plans(first, last, gpus, straight):
    """Every plan for these layers: lists of (first, last, replicas per level, place of its unit).

    place has the number of the part on the highest level, then of the part within it, and so on.
    """
    *lower, units = gpus
    for count in range(1, min(units, last - first + 1) + 1):
        for cuts in itertools.combinations(range(first + 1, last + 1), count - 1):
            bounds = [*itertools.pairwise([first, *cuts, last + 1])]
            for sizes in itertools.product(range(1, units + 1), repeat=count):
                if sum(sizes) != units or (straight and max(sizes) > 1):
                    continue
                parts = []
                for number, ((start, end), m) in enumerate(zip(bounds, sizes, strict=True)):
                    inside = plans(start, end - 1, lower, straight)
                    if not lower:
                        inside = [[(start, end - 1, (), ())]]
                    parts.append(
                        [
                            [(a, b, (*levels, m), (number, *place)) for a, b, levels, place in way]
                            for way in inside
                        ]
                    )
                for ways in itertools.product(*parts):
                    yield [stage for way in ways for stage in way]


def costs_of(layers, stages, bandwidths):
    """Of each stage in exact arithmetic: compute, all-reduce, transfer, in flight, bytes kept."""
    top, costs = len(bandwidths) - 1, []
    for number, (first, last, levels, place) in enumerate(stages):
        part = layers[first : last + 1]
        replicas = Fraction(math.prod(levels))
        weights = sum(Fraction(layer.weights) for layer in part)
        compute = sum(Fraction(layer.forward) + Fraction(layer.backward) for layer in part)
        # Once per round in which each replica has had a minibatch: m - 1 shares of 1 / m, sent and
        # received, when gradients are added up and when the sums are handed out.
        rounds = sum(
            4 * weights / m * (m - 1) / Fraction(bandwidth)
            for m, bandwidth in zip(levels, bandwidths, strict=True)
        )
        transfer = Fraction(0)
        for neighbor, layer in ((number - 1, first - 1), (number + 1, last)):
            if 0 <= neighbor < len(stages):
                other = stages[neighbor][3]
                differs = next(d for d in range(len(place)) if place[d] != other[d])
                for level in range(top - differs + 1):  # up to the level at which they part
                    links = math.prod(levels[level:])
                    size = layers[layer].activation * 2
                    transfer = max(transfer, Fraction(size) / Fraction(bandwidths[level]) / links)
        from_here = sum(math.prod(stage[2]) for stage in stages[number:])
        in_flight = -(-from_here // int(replicas))
        kept = in_flight * sum(
            Fraction(layer.weights) + Fraction(layer.activation) for layer in part
        )
        costs.append((compute / replicas, rounds / replicas, transfer, in_flight, kept))
    return costs


def seconds_of(costs):
    return max(max(compute + reduce, transfer) for compute, reduce, transfer, _, _ in costs)


def check_against_brute_force(layers, gpus, bandwidths, straight, memory):
    allowed = {}
    for stages in plans(0, len(layers) - 1, gpus, straight):
        costs = costs_of(layers, stages, bandwidths)
        if memory is None or all(kept <= memory for *_, kept in costs):
            key = tuple(stage[:3] for stage in stages)
            allowed[key] = costs
    if not allowed:
        with pytest.raises(UserError, match=r"nothing fits|cannot be cut"):
            best_plan(layers, gpus, bandwidths, straight, memory)
        return
    plan = best_plan(layers, gpus, bandwidths, straight, memory)
    fastest = min(map(seconds_of, allowed.values()))
    equal = [key for key, costs in allowed.items() if seconds_of(costs) == fastest]
    found = tuple(stage[:3] for stage in plan.stages)
    assert found in equal
    if len(gpus) == 1:  # of equally fast plans: the most replicas in front, then the most layers
        assert found == max(equal, key=lambda key: [(stage[2], stage[1]) for stage in key])
    assert plan.slowest.seconds == pytest.approx(float(fastest), rel=1e-12)
    for stage, costs in zip(plan.stages, allowed[found], strict=True):
        assert stage[3:] == pytest.approx([float(cost) for cost in costs], rel=1e-12, abs=1e-15)


numbers = st.integers(0, 9)
chains = st.lists(st.tuples(st.integers(1, 9), numbers, numbers, numbers), min_size=1, max_size=6)
machines = st.lists(st.integers(1, 3), min_size=1, max_size=3).filter(lambda g: math.prod(g) <= 8)


@settings(max_examples=250, deadline=None)
@given(
    chains,
    machines | st.tuples(st.integers(1, 7)).map(list),
    st.lists(st.integers(1, 9), min_size=3, max_size=3),
    st.booleans(),
    st.none() | st.integers(1, 120),
)
def test_no_plan_is_faster_and_the_most_replicas_are_in_front(
    chain, gpus, bandwidths, straight, memory
):
    layers = [Layer(f"layer {i}", *map(float, costs)) for i, costs in enumerate(chain)]
    check_against_brute_force(layers, gpus, bandwidths[: len(gpus)], straight, memory)


def test_memory_is_searched_exactly_where_it_rules_out_the_fastest_plans():
    """Random limits between the least that any plan needs and what the fastest plan needs."""
    generator, ruled_out = np.random.default_rng(0), 0
    for gpus in ([5], [2, 3], [3, 2], [2, 2, 2]):
        for _ in range(6):
            numbers = generator.integers(1, 20, size=(5, 4)).tolist()
            layers = [Layer("", *map(float, costs)) for costs in numbers]
            bandwidths = [20, 10, 5][: len(gpus)]
            free = best_plan(layers, gpus, bandwidths)
            needed = max(stage.bytes for stage in free.stages)
            for memory in (needed, needed - 1, 0.8 * needed, 0.6 * needed):
                check_against_brute_force(layers, gpus, bandwidths, False, memory)
                ruled_out += memory < needed
    assert ruled_out == 3 * 24


# ------------------------------------------------------------------- what the model says


def test_noam_is_that_of_the_paper():
    """Section 3.2: four stages admit 4 minibatches; 2-1 (figure 8) ceil(3 / 2) per replica."""
    layers = [Layer("", 1.0, 1.0, 0.0, 0.0)] * 4
    straight = best_plan(layers, [4], [1e9], straight=True)
    assert [stage.in_flight for stage in straight.stages] == [4, 3, 2, 1]
    assert count_in_flight(replicas=2, behind=1) == 2


def test_data_parallelism_is_a_plan_where_it_wins(profile, planner):
    file = profile("\n".join([",".join(COLUMNS), "a,1,2,4e6,1000", "b,3,1,4e6,2000"]), "my.csv")
    status, out, _ = planner("plan", file, "--gpus", 16, "--bandwidth", 1e9)
    assert status == 0
    assert "\nPlan: 16\n" in f"\n{out}"
    assert "Data parallelism is the best plan" in out


def test_levels_of_equal_replicas_are_data_parallelism_on_all_gpus():
    """8 GPUs, then 2 machines: 4 * 7/8 * W / B0 and 4 * 1/2 * W / B1, every 16 minibatches."""
    plan = best_plan([Layer("", 1.0, 2.0, 0.0, 5.0)], [8, 2], [7, 10])
    assert plan.stages[0].levels == (8, 2)
    assert plan.data_parallel == plan.slowest.seconds == pytest.approx((3 + 2.5 + 1) / 16)


def test_with_kept_bytes_memory_is_counted_in_them(profile, planner):
    """Two layers with outputs of 1 MB, of which the first keeps 3 GB and the second 1 GB."""
    lines = [f"{CSV},kept_bytes", "a,1,2,1e6,1e9,3e9", "b,1,2,1e6,1e9,1e9"]
    flags = ["--gpus", 2, "--bandwidth", 1e9, "--straight"]
    status, out, _ = planner("plan", profile("\n".join(lines), "my.csv"), *flags)
    assert status == 0
    assert re.search(r"^0 .* 2 +8$\n^1 .* 1 +2$", out, re.M)
    assert "what the layers keep for its backward" in out
    short = "\n".join(line.rpartition(",")[0] for line in lines)
    status, out, _ = planner("plan", profile(short, "my.csv"), *flags)
    assert re.search(r"^0 .* 2 +2\.002$\n^1 .* 1 +1\.001$", out, re.M)
    assert "the outputs of the layers, as the profile has no" in out
    with_limit = planner("plan", profile("\n".join(lines), "my.csv"), *flags, "--memory", 7e9)
    assert with_limit[0] == 2


@pytest.mark.parametrize(
    ("gpus", "bandwidth", "weights", "text"),
    [
        (1, 1e9, 0, "One GPU needs no plan."),
        (2, 1e9, 0, "Data parallelism is the best plan: every GPU holds the whole network. It"),
        (3, 1e2, 1e9, "The bottleneck is stage 0, limited by transfer. Data parallelism alone"),
        (3, 1e9, 1e9, "The bottleneck is stage 0, limited by computing. Data parallelism alone"),
        (3, 1e9, 1e6, "It spends 75% of its time on computing."),
        (2, 1e9, 1e3, "limited by computing. Data parallelism alone is as fast."),
        (4, 1e9, 1e6, "the slowest stage busy all the time. So here data parallelism is faster."),
        (5, 1e9, 3e6, "which spends 60% of its time on computing. Data"),
    ],
)
def test_the_text_names_the_bottleneck(profile, planner, gpus, bandwidth, weights, text):
    chain = [CSV, f"a,4,8,100,{weights}", f"b,2,4,100,{weights}", f"c,2,4,100,{weights}"]
    file = profile("\n".join(chain), "my.csv")
    status, out, _ = planner("plan", file, "--gpus", gpus, "--bandwidth", bandwidth)
    assert status == 0
    assert text in " ".join(out.split())


def test_a_later_stage_keeps_fewer_versions_and_memory_moves_the_cut():
    """Ten equal layers on two GPUs: the first keeps two versions, so it must get fewer layers."""
    layers = [Layer("", 1.0, 1.0, 1.0, 9.0)] * 10
    assert [stage.bytes for stage in best_plan(layers, [2], [1e9], True).stages] == [100, 50]
    tight = best_plan(layers, [2], [1e9], straight=True, memory=70)
    assert [(stage.first, stage.last) for stage in tight.stages] == [(0, 2), (3, 9)]
    with pytest.raises(UserError, match="nothing fits"):
        best_plan(layers, [2], [1e9], straight=True, memory=59)


# ------------------------------------------------------------------------------------ profiles


def test_inputs_cost_nothing_and_a_list_of_sizes_is_added_up(profile):
    layers = read_profile(profile("gnmt"))
    assert len(layers) == 48 - 3
    assert layers[3].activation == 6291456 + 131072 + 131072
    assert [layer.name for layer in layers[:2]] == ["Embedding(inplace)", "EmuBidirLSTM(inplace)"]


graphs = st.integers(2, 9).flatmap(
    lambda n: st.tuples(
        st.permutations(range(n)),
        st.sets(
            st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)).filter(lambda e: e[0] < e[1])
        ),
    )
)


@settings(max_examples=100, deadline=None)
@given(graphs)
def test_a_cut_sends_each_output_that_is_needed_behind_it_once(tmp_path_factory, graph_of):
    """On random graphs, whose ids say nothing about the order. Node i has 2**i bytes."""
    ids, edges = graph_of
    nodes = "|".join(f"n 1 1 {2 ** ids.index(i)} 0" for i in range(len(ids)))
    text = graph(nodes, [(ids[a] + 1, ids[b] + 1) for a, b in edges])
    file = tmp_path_factory.getbasetemp() / "graph.txt"
    file.write_text(text)
    layers = read_profile(file)
    order = [int(math.log2(layer.activation)) for layer in layers]
    assert sorted(order) == list(range(len(ids)))
    assert all(order.index(a) < order.index(b) for a, b in edges)
    for i, layer in enumerate(layers):
        crossing = {a for a, b in edges if a in order[: i + 1] and b in order[i + 1 :]}
        assert layer.sent == sum(2**a for a in crossing)


def test_a_csv_file_says_the_same_as_the_profile_of_a_chain(profile):
    lines = [",".join(COLUMNS)]
    for node in VGG16.split("|")[1:31]:
        kind, *costs = node.split()
        lines.append(",".join([f'"{kind}(inplace)"', *costs]))
    chain = read_profile(profile("\n".join(lines), "my.csv"))
    of_graph = read_profile(profile(row("|".join(VGG16.split("|")[:31]))))
    both = [best_plan(layers, [8], [1e9]) for layers in (chain, of_graph)]
    assert both[0] == both[1]
    assert [layer[:5] for layer in chain] == [layer[:5] for layer in of_graph]


# -------------------------------------------------------------------------- time and progress


def uneven(num_layers):
    generator = np.random.default_rng(1)
    numbers = generator.uniform(0, [0.01, 0.01, 1e8, 1e6], size=(num_layers, 4)).tolist()
    return [Layer("", *costs) for costs in numbers]


def test_planning_takes_seconds_and_little_memory(profile):
    """VGG-16 on 16 GPUs below 1 s; a network as long as ResNet-50 on two machines below 10 s."""
    start = time.process_time()
    best_plan(read_profile(profile("vgg16")), [16], [3.125e9])
    assert time.process_time() - start < 1
    tracemalloc.start()
    start = time.process_time()
    best_plan(uneven(176), [8, 2], [3e10, 3.125e9])
    assert time.process_time() - start < 20  # 10 s; tracemalloc doubles the time at worst
    assert tracemalloc.get_traced_memory()[1] < 8 * 176**2 * 6 * (8 + 2)
    tracemalloc.stop()


def test_more_gpus_than_can_be_planned_in_a_minute_are_refused(profile, planner):
    for gpus in ([10_000], [900, 900]):
        start = time.process_time()
        flags = ["--gpus", *gpus, "--bandwidth", *[1e9] * len(gpus)]
        status, out, err = planner("plan", profile("vgg16"), *flags)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert time.process_time() - start < 1
        assert f"40 layers on {math.prod(gpus):,} GPUs would take minutes" in err
    check_request(uneven(40), [50, 50], [1, 1], False, None)
    with pytest.raises(UserError, match="minutes"):  # a machine's best pipeline: for each place
        check_request(uneven(40), [50, 50], [1, 1], False, 1e12)
    with pytest.raises(UserError, match="minutes"):
        check_request(uneven(20_000), [1], [1], False, None)


# ----------------------------------------------------------------------------------- command


def test_the_script_prints_the_plan(profile):
    command = [sys.executable, SCRIPT, "plan", profile("vgg16"), "--gpus", "16"]
    done = subprocess.run([*command, "--bandwidth", "3.125e9"], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, "")
    assert lines[:2] == ["Plan: 15-1", "Slowest stage: 0.045524808 s per minibatch"]
    assert "Speed-up over one GPU (0.672535000 s): 14.77x" in lines
    assert "Speed-up of data parallelism over one GPU: 8.05x" in lines
    assert max(map(len, lines)) <= 80
    failed = subprocess.run([*command, "--bandwidth", "0"], capture_output=True, text=True)
    assert (failed.returncode, failed.stdout, failed.stderr.count("\n")) == (2, "", 1)


@pytest.mark.parametrize(
    "flags",
    [
        ["vgg16", "--gpus", 16, "--bandwidth", 3.125e9],
        ["vgg16", "--gpus", 8, 2, "--bandwidth", 3e10, 3.125e9],
        ["gnmt", "--gpus", 8, 2, "--bandwidth", 3e10, 3.125e9, "--memory", 4e9],
        ["alexnet", "--gpus", 20, "--bandwidth", 1e9, "--straight"],
    ],
)
def test_the_table_adds_up_and_fits_on_80_columns(profile, planner, flags):
    """Each stage: GPUs and layers, all of them once, and the plan's first line."""
    status, out, err = planner("plan", profile(flags[0]), *flags[1:])
    assert (status, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    rows = [re.split("  +", line) for line in out.splitlines() if re.match(r"\d+ [ *]+\d", line)]
    end = flags.index("--bandwidth")
    gpus = [math.prod(map(int, row[1].split("x"))) for row in rows]
    assert out.startswith(f"Plan: {'-'.join(map(str, gpus))}\n")
    assert sum(gpus) == math.prod(flags[2:end])
    bounds = [tuple(map(int, row[2].split("-"))) for row in rows]
    assert all(a[1] + 1 == b[0] for a, b in itertools.pairwise(bounds))
    slowest = float(re.search(r"Slowest stage: (\d+\.\d{9}) s per minibatch", out)[1])
    for cells in rows:
        computing, all_reduce, transfer, in_all = map(float, cells[3:7])
        assert in_all == pytest.approx(max(computing + all_reduce, transfer), rel=0.001)
    assert max(float(row[6]) for row in rows) == pytest.approx(1000 * slowest, rel=0.001)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(monkeypatch, capsys, command):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["pipedream_planner.py", command, "--help"])
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: pipedream_planner.py {command} [-h]")
    assert COMMANDS[command][0].__doc__.split("\n")[0] in out
    assert ('"network": "transformer",  # residual' in out) == (command == "profile")
    assert ('"network": "residual",  # residual' in out) == (command == "train")
    assert ("CONFIG" in out) == ("seed" in COMMANDS[command][1])


CYCLE = row("n 1 1 4 4 | n 1 1 4 4 | n 1 1 4 4", (3, 2))
ALL = ("--gpus", 4, "--bandwidth", 1e9)
CSV = ",".join(COLUMNS)
BAD = {  # text of the profile, flags, what the one line must name
    "cycle": (CYCLE, ALL, "cycle"),
    "self": (row("n 1 1 4 4", (1, 1)), ALL, "cycle"),
    "unknown node": (row("n 1 1 4 4", (1, 2)), ALL, "node2"),
    "twice": (row("n 1 1 4 4") + "\n" + row("n 1 1 4 4"), ALL, "node1"),
    "empty": ("", ALL, "no layers"),
    "only inputs": (row("Input 1 1 4 4"), ALL, "no layers"),
    "prose": ("What is this?", ALL, "line 1"),
    "no time": (row("n 0 0 4 4"), ALL, "no layer takes any time"),
    "negative": (row("n -1 1 4 4"), ALL, "forward_compute_time=-1"),
    "nan": (row("n 1 nan 4 4"), ALL, "backward_compute_time='nan'"),
    "broken list": (row("n 1 1 [4;x] 4"), ALL, "activation_size=' x'"),
    "missing cost": ("node1 -- n -- forward_compute_time=1", ALL, "backward_compute_time"),
    "csv cells": (f"{CSV}\na,1,2,3", ALL, "line 2 has 4 cells"),
    "csv text": (f"{CSV}\na,1,2,3,many", ALL, "weight_bytes='many'"),
    "csv empty": (CSV, ALL, "no layers"),
    "csv header": (
        "layer,forward_ms\na,1",
        ALL,
        "line 1, is 'layer,forward_ms': a CSV file's is layer",
    ),
    "csv kept": (f"{CSV},kept_bytes\na,1,2,3,4", ALL, "line 2 has 5 cells, not 6"),
    "csv kept text": (f"{CSV},kept_bytes\na,1,2,3,4,-5", ALL, "kept_bytes=-5"),
    "no gpus": ("vgg16", ("--gpus", 0, "--bandwidth", 1e9), "gpus=0"),
    "half a gpu": ("vgg16", ("--gpus", 1.5, "--bandwidth", 1e9), "gpus=1.5"),
    "a list": ("vgg16", ("--gpus", "8,2", "--bandwidth", 1e9), "gpus=[8, 2]"),
    "no bandwidth": ("vgg16", ("--gpus", 4, "--bandwidth", 0), "bandwidth=0"),
    "text": ("vgg16", ("--gpus", 4, "--bandwidth", "fast"), "bandwidth='fast'"),
    "levels": ("vgg16", ("--gpus", 4, 2, "--bandwidth", 1e9), "gpus has 2 levels, bandwidth 1"),
    "left out": ("vgg16", ("--gpus", 4), "--bandwidth"),
    "unknown flag": ("vgg16", (*ALL, "--fast"), "--fast"),
    "too straight": ("vgg16", ("--gpus", 41, "--bandwidth", 1e9, "--straight"), "40 layers"),
    "too many": ("vgg16", ("--gpus", 9999, 9999, "--bandwidth", 1, 1), "GPUs"),
    "nothing fits": ("vgg16", (*ALL, "--memory", 1e8), "must keep more than 0.1 GB"),
    "no memory": ("vgg16", (*ALL, "--memory", 0), "memory=0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line(profile, planner, case):
    text, flags, named = BAD[case]
    status, out, err = planner("plan", profile(text), *flags)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert named in err
    assert len(err) < 600


@pytest.mark.parametrize("arguments", [["nope"], ["pla"], ["plan"], ["plan", "none.txt", *ALL]])
def test_a_bad_command_or_file_gets_one_line(planner, arguments):
    status, out, err = planner(*arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)


def test_a_file_that_is_no_text_or_a_folder_gets_one_line(planner, tmp_path):
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path, tmp_path / "bytes"):
        status, out, err = planner("plan", path, *ALL)
        assert (status, out, err.count("\n")) == (2, "", 1)


@pytest.mark.parametrize(
    "arguments",
    [
        ([Layer("a", math.nan, 1.0, 1.0, 1.0)], [2], [1e9]),
        ([Layer("a", 1.0, 1.0, -1.0, 1.0)], [2], [1e9]),
        ([Layer("a", 1.0, 1.0, 1.0, 1.0, sent="much")], [2], [1e9]),
        ([], [2], [1e9]),
        ([Layer("a", 1.0, 1.0, 1.0, 1.0)], 2, 1e9),
        ([Layer("a", 1.0, 1.0, 1.0, 1.0)], [], []),
        ([Layer("a", 1.0, 1.0, 1.0, 1.0)], [True], [1e9]),
        ([Layer("a", 1.0, 1.0, 1.0, 1.0)], [2], [math.inf]),
        ([Layer("a", 1.0, 1.0, 1.0, 1.0)], [2], [1e9], True),
        ([Layer("a", 1.0, 1.0, 1.0, 1.0)], [2], [1e9], False, "16GB"),
    ],
)
def test_bad_arguments_are_user_errors_from_python_too(arguments):
    with pytest.raises(UserError):
        best_plan(*arguments)
