"""The planner: published plans digit by digit, brute force, profiles, memory, and bad input."""

import itertools
import math
import re
import time
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipedream.planning.profiles import COLUMNS, Layer, read_profile, sent_after
from pipedream.planning.replicas import simulate_partition
from pipedream.planning.search import best_partition, check_request, count_in_flight
from pipedream.published import PROFILES, PUBLISHED, VGG16, graph, row
from pipedream_simple import UserError


@pytest.fixture
def profile(tmp_path):
    """The path of a file with that text, or with that published profile."""

    def write(text, name="profile.txt"):
        (tmp_path / name).write_text(PROFILES.get(text, text))
        return tmp_path / name

    return write


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda p: f"{p[0]}-{p[1]}-{p[3]}")
def test_the_published_plans_come_out_digit_by_digit_and_run_as_fast(profile, published):
    """The planner knows no schedule, and the simulator no plan; it leaves messages out here."""
    name, gpus, bandwidth, straight, speed_up, data_parallel, stages, seconds, cuts = published
    layers = read_profile(profile(name))
    partition = best_partition(layers, [gpus], [bandwidth], straight)
    slowest = partition.slowest.seconds
    assert "-".join(str(stage.replicas) for stage in partition.stages) == stages
    assert f"{partition.one_gpu / slowest:.2f}" == speed_up
    assert f"{partition.one_gpu / partition.data_parallel:.2f}" == data_parallel
    assert seconds in (None, f"{slowest:.9f}")
    assert cuts in (None, [stage.first for stage in partition.stages[1:]])
    promised = max(stage.compute + stage.all_reduce for stage in partition.stages)
    assert simulate_partition(partition, layers) == pytest.approx(promised, rel=1e-9)


# -------------------------------------------------------------------------------- brute force


def partitions(first, last, gpus, straight):
    """All of these layers: lists of (first, last, replicas per level, place of its unit).

    place has the number of the part on the highest level, then of the part within it, and so on.
    """
    if not gpus:
        yield [(first, last, (), ())]
        return
    *lower, units = gpus
    for count in range(1, min(units, last - first + 1) + 1):
        for cuts in itertools.combinations(range(first + 1, last + 1), count - 1):
            bounds = [*itertools.pairwise([first, *cuts, last + 1])]
            for sizes in itertools.product(range(1, units + 1), repeat=count):
                if sum(sizes) != units or (straight and max(sizes) > 1):
                    continue
                insides = (partitions(a, b - 1, lower, straight) for a, b in bounds)
                for ways in itertools.product(*insides):
                    yield [
                        (a, b, (*levels, m), (number, *place))
                        for number, (way, m) in enumerate(zip(ways, sizes, strict=True))
                        for a, b, levels, place in way
                    ]


def costs_of(layers, stages, bandwidths, straight):
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
                    bandwidth = Fraction(bandwidths[level]) * math.prod(levels[level:])
                    transfer = max(transfer, Fraction(layers[layer].activation * 2) / bandwidth)
        from_here = sum(math.prod(stage[2]) for stage in stages[number:])
        in_flight = -(-from_here // int(replicas))
        versions = 1 if straight else in_flight  # one is enough with a flush
        kept = versions * weights + in_flight * sum(Fraction(layer.activation) for layer in part)
        costs.append((compute / replicas, rounds / replicas, transfer, in_flight, kept))
    return costs


def seconds_of(costs):
    return max(max(compute + reduce, transfer) for compute, reduce, transfer, _, _ in costs)


def check_against_brute_force(layers, gpus, bandwidths, straight, memory):
    allowed = {}
    for stages in partitions(0, len(layers) - 1, gpus, straight):
        costs = costs_of(layers, stages, bandwidths, straight)
        if memory is None or all(kept <= memory for *_, kept in costs):
            allowed[tuple(stage[:3] for stage in stages)] = costs
    if not allowed:
        with pytest.raises(UserError, match=r"nothing fits|cannot be cut"):
            best_partition(layers, gpus, bandwidths, straight, memory)
        return
    partition = best_partition(layers, gpus, bandwidths, straight, memory)
    fastest = min(map(seconds_of, allowed.values()))
    equal = [key for key, costs in allowed.items() if seconds_of(costs) == fastest]
    found = tuple(stage[:3] for stage in partition.stages)
    assert found in equal
    if len(gpus) == 1:  # of equally fast plans: the most replicas in front, then the most layers
        assert found == max(equal, key=lambda key: [(stage[2], stage[1]) for stage in key])
    assert partition.slowest.seconds == pytest.approx(float(fastest), rel=1e-12)
    for stage, costs in zip(partition.stages, allowed[found], strict=True):
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
            free = best_partition(layers, gpus, bandwidths)
            needed = max(stage.bytes for stage in free.stages)
            for memory in (needed, needed - 1, 0.8 * needed, 0.6 * needed):
                check_against_brute_force(layers, gpus, bandwidths, False, memory)
                ruled_out += memory < needed
    assert ruled_out == 3 * 24


def test_sums_are_exact_where_layers_differ_by_more_than_a_billion():
    """Compared with fractions. Times that differ by less than a billionth count as equal."""
    generator = np.random.default_rng(0)
    for number in range(20):
        numbers = (10.0 ** generator.uniform(-8, 8, size=(6, 4))).tolist()
        layers = [Layer("", *costs) for costs in sorted(numbers, reverse=number % 2 == 0)]
        partition = best_partition(layers, [4], [1e3], straight=number % 4 < 2)
        stages = [(s.first, s.last, s.levels, (i,)) for i, s in enumerate(partition.stages)]
        costs = costs_of(layers, stages, [1e3], number % 4 < 2)
        for stage, exact in zip(partition.stages, costs, strict=True):
            assert stage[3:] == pytest.approx([*map(float, exact)], rel=1e-14, abs=0)
        ways = partitions(0, 5, [4], number % 4 < 2)
        least = min(seconds_of(costs_of(layers, way, [1e3], False)) for way in ways)
        assert seconds_of(costs) <= least * (1 + Fraction(2, 10**9))


# ----------------------------------------------------------------------- what the model says


def test_noam_is_that_of_the_paper():
    """Section 3.2: four stages admit 4 minibatches; 2-1 (figure 8) ceil(3 / 2) per replica."""
    assert [count_in_flight(replicas=1, behind=behind) for behind in (3, 2, 1, 0)] == [4, 3, 2, 1]
    assert count_in_flight(replicas=2, behind=1) == 2


def test_levels_of_equal_replicas_are_data_parallelism_on_all_gpus():
    """8 GPUs, then 2 machines: 4 * 7/8 * W / B0 and 4 * 1/2 * W / B1, every 16 minibatches."""
    partition = best_partition([Layer("", 1.0, 2.0, 0.0, 5.0)], [8, 2], [7, 10])
    assert partition.stages[0].levels == (8, 2)
    seconds = pytest.approx((3 + 2.5 + 1) / 16)
    assert partition.data_parallel == partition.slowest.seconds == seconds


def test_a_later_stage_keeps_fewer_versions_and_memory_moves_the_cut():
    """Ten equal layers on two GPUs: the first keeps two versions, so it must get fewer layers.

    With a flush it keeps one, but the activations of two microbatches.
    """
    layers = [Layer("", 1.0, 1.0, 1.0, 9.0)] * 10
    for straight, kept, limit, cut, too_little in (
        (False, [100, 50], 70, (2, 3), 59),
        (True, [55, 50], 55, (4, 5), 54),
    ):
        stages = best_partition(layers, [2], [1], straight).stages
        assert [stage.bytes for stage in stages] == kept
        first, second = best_partition(layers, [2], [1], straight, limit).stages
        assert (first.last, second.first) == cut
        with pytest.raises(UserError, match="nothing fits"):
            best_partition(layers, [2], [1], straight, too_little)


def test_with_kept_bytes_memory_is_counted_in_them(profile, run):
    """Two layers with outputs of 1 MB, of which the first keeps 3 GB and the second 1 GB."""
    lines = [f"{CSV},kept_bytes", "a,1,2,1e6,1e9,3e9", "b,1,2,1e6,1e9,1e9"]
    flags = ["--gpus", 2, "--bandwidth", 1e9, "--straight"]
    out = run("plan", profile("\n".join(lines), "my.csv"), *flags).out
    assert re.search(r"^0 .* 2 +7$\n^1 .* 1 +2$", out, re.M)
    assert "microbatch in flight, what the layers keep for its backward" in " ".join(out.split())
    assert run("plan", "my.csv", *flags, "--memory", 6.9e9).status == 2
    short = "\n".join(line.rpartition(",")[0] for line in lines)
    out = run("plan", profile(short, "my.csv"), *flags).out
    assert re.search(r"^0 .* 2 +1\.002$\n^1 .* 1 +1\.001$", out, re.M)
    assert "the outputs of the layers, as the profile has no" in " ".join(out.split())


def test_a_pipeline_with_a_flush_is_told_of_in_its_own_words(profile, run):
    own, pipedream = {"microbatch"}, {"minibatch", "NOAM", "version", "RR"}
    for flags, words, others in (([], pipedream, own), (["--straight"], own, pipedream)):
        out = run("plan", profile("alexnet"), "--gpus", 4, "--bandwidth", 1e9, *flags).out
        assert all(word in out for word in words)
        assert not any(word in out for word in others)


SAYS = {  # what the text must say -> GPUs, bandwidth, bytes of weights in each layer
    "One GPU needs no plan.": (1, 1e9, 0),
    "Data parallelism is the best plan: every GPU holds the whole network. It": (2, 1e9, 0),
    "The bottleneck is stage 0, limited by transfer. Data parallelism alone": (3, 1e2, 1e9),
    "The bottleneck is stage 0, limited by computing. Data parallelism alone": (3, 1e9, 1e9),
    "It spends 75% of its time on computing.": (3, 1e9, 1e6),
    "limited by computing. Data parallelism alone is as fast.": (2, 1e9, 1e3),
    "slowest stage busy all the time. So here data parallelism is faster.": (4, 1e9, 1e6),
    "which spends 60% of its time on computing. Data": (5, 1e9, 3e6),
}


@pytest.mark.parametrize("text", SAYS)
def test_the_text_names_the_bottleneck(profile, run, text):
    gpus, bandwidth, weights = SAYS[text]
    chain = [CSV, f"a,4,8,100,{weights}", f"b,2,4,100,{weights}", f"c,2,4,100,{weights}"]
    file = profile("\n".join(chain), "my.csv")
    result = run("plan", file, "--gpus", gpus, "--bandwidth", bandwidth)
    assert result.status == 0
    assert text in " ".join(result.out.split())


# ------------------------------------------------------------------------------------ profiles


def test_inputs_cost_nothing_and_a_list_of_sizes_is_added_up(profile):
    layers = read_profile(profile("gnmt"))
    assert len(layers) == 48 - 3
    assert layers[3].activation == 6291456 + 131072 + 131072
    assert [layer.name for layer in layers[:2]] == ["Embedding(inplace)", "EmuBidirLSTM(inplace)"]


def graphs_of(n):
    pairs = st.sampled_from([*itertools.combinations(range(n), 2)])
    return st.tuples(st.permutations(range(n)), st.sets(pairs))


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 9).flatmap(graphs_of))
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
        assert layer.feeds_next == ((*order[i : i + 2],) in edges)
        crossing = {a for a, b in edges if a in order[: i + 1] and b in order[i + 1 :]}
        assert layer.sent == sum(2**a for a in crossing)


def test_plan_says_where_other_cuts_are_possible(profile, run):
    """GNMT branches. A shortcut over one node, as in VGG-16, leaves only the cuts of a row."""
    found = [
        name
        for name in PROFILES
        if "The graph branches" in run("plan", profile(name), *ALL[:3], 1e10).out
    ]
    assert found == ["gnmt"]


def test_a_csv_file_says_the_same_as_the_profile_of_a_chain(profile):
    lines = [CSV]
    for node in VGG16.split("|")[1:31]:
        kind, *costs = node.split()
        lines.append(",".join([f'"{kind}(inplace)"', *costs]))
    chain = read_profile(profile("\n".join(lines), "my.csv"))
    of_graph = read_profile(profile(row("|".join(VGG16.split("|")[:31]))))
    assert [layer[:5] for layer in chain] == [layer[:5] for layer in of_graph]
    assert [*map(sent_after, chain[:-1])] == [*map(sent_after, of_graph[:-1])]


# ------------------------------------------------------------------------------------- time


def uneven(num_layers):
    generator = np.random.default_rng(1)
    numbers = generator.uniform(0, [0.01, 0.01, 1e8, 1e6], size=(num_layers, 4)).tolist()
    return [Layer("", *costs) for costs in numbers]


def test_planning_takes_seconds_and_little_memory(profile):
    """VGG-16 on 16 GPUs below 1 s; a network as long as ResNet-50 on two machines below 10 s."""
    start = time.process_time()
    best_partition(read_profile(profile("vgg16")), [16], [3.125e9])
    assert time.process_time() - start < 1
    tracemalloc.start()
    start = time.process_time()
    best_partition(uneven(176), [8, 2], [3e10, 3.125e9])
    assert time.process_time() - start < 20  # 10 s; tracemalloc doubles the time at worst
    assert tracemalloc.get_traced_memory()[1] < 8 * 176**2 * 6 * (8 + 2)
    tracemalloc.stop()


def test_more_gpus_than_can_be_planned_in_a_minute_are_refused(profile, run):
    start, flags = time.process_time(), ["--gpus", 900, 900, "--bandwidth", 1e9, 1e9]
    assert "40 layers on 810,000 GPUs would take" in run("plan", profile("vgg16"), *flags).err
    assert time.process_time() - start < 1
    check_request(uneven(40), [50, 50], [1, 1], False, None)
    # With a limit, a machine's best pipeline depends on its place.
    for size, *request in ((40, [50, 50], [1, 1], False, 1e12), (20_000, [1], [1], False, None)):
        with pytest.raises(UserError, match="minutes"):
            check_request(uneven(size), *request)


# ---------------------------------------------------------------------------------- command


@pytest.mark.parametrize(
    "flags",
    [
        "vgg16 --gpus 16 --bandwidth 3.125e9",
        "vgg16 --gpus 8 2 --bandwidth 3e10 3.125e9",
        "gnmt --gpus 8 2 --bandwidth 3e10 3.125e9 --memory 4e9",
        "alexnet --gpus 16 --bandwidth 1e9 --straight",
    ],
)
def test_the_table_adds_up_and_fits_on_80_columns(profile, run, flags):
    """Each stage: GPUs and layers, all of them once, and the plan's first line."""
    name, *flags = flags.split()
    status, out, err = run("plan", profile(name), *flags)
    assert (status, err) == (0, "")
    assert all(len(line) <= 80 or line.startswith("--processes") for line in out.splitlines())
    rows = [re.split("  +", line) for line in out.splitlines() if re.match(r"\d+ [ *]+\d", line)]
    gpus = [math.prod(map(int, row[1].split("x"))) for row in rows]
    assert out.startswith(f"Plan: {'-'.join(map(str, gpus))}\n")
    assert sum(gpus) == 16
    bounds = [tuple(map(int, row[2].split("-"))) for row in rows]
    assert all(a[1] + 1 == b[0] for a, b in itertools.pairwise(bounds))
    slowest = float(re.search(r"Slowest stage: (\d+\.\d{9}) s per m\w+batch", out)[1])
    for cells in rows:
        computing, all_reduce, transfer, in_all = map(float, cells[3:7])
        assert in_all == pytest.approx(max(computing + all_reduce, transfer), rel=0.001)
    assert max(float(row[6]) for row in rows) == pytest.approx(1000 * slowest, rel=0.001)


ALL = ("--gpus", 4, "--bandwidth", 1e9)
CSV = ",".join(COLUMNS[:5])
BAD = {  # what the one line must name -> text of the profile
    "cycle": row("n 1 1 4 4 | n 1 1 4 4 | n 1 1 4 4", (3, 2)),
    "node2": row("n 1 1 4 4", (1, 2)),
    "no layers": row("Input 1 1 4 4"),
    "no layer takes any time": row("n 0 0 4 4"),
    "forward_compute_time=-1": row("n -1 1 4 4"),
    "line 2 has 4 cells": f"{CSV}\na,1,2,3",
    "line 1, is 'layer,forward_ms': a CSV file's is layer": "layer,forward_ms\na,1",
}
REFUSED = {  # and flags
    "gpus has 2 levels, bandwidth 1": ("--gpus", 4, 2, "--bandwidth", 1e9),
    "bandwidth=inf": ("--gpus", 4, "--bandwidth", "1e999"),
    "--bandwidth": ("--gpus", 4),
    "40 layers cannot be cut into 41": ("--gpus", 41, "--bandwidth", 1e9, "--straight"),
    "must keep more than 0.1 GB": (*ALL, "--memory", 1e8),
}


@pytest.mark.parametrize("named", [*BAD, *REFUSED])
def test_bad_input_gets_one_line(profile, run, named):
    file = profile(BAD.get(named, "vgg16"))
    status, out, err = run("plan", file, *REFUSED.get(named, ALL))
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert named in err
    assert len(err) < 600
