"""Does it fit? Published parameter counts, bytes that PyTorch keeps, and the advice."""

import re

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.pipelining import schedules

from pipedream.commands.fit import (
    KEYS,
    PYTORCH,
    Way,
    advise,
    check_fit,
    main,
    plans_of,
    ways_to_run,
)
from pipedream.networks.transformer import NUM_HEADS
from pipedream.planning import footprint
from pipedream.planning.footprint import STATE_BYTES, Memory, complete, count_activations, memory_of
from pipedream.schedules.halves import train_plan
from pipedream.schedules.plans import PLAN_CONFIG, make_plan
from pipedream_simple import CONFIG, build_stages

# arXiv 2307.09288; the numbers of parameters of the models as they were published
PARAMETERS = {"llama-2-7b": 6_738_415_616, "llama-2-70b": 68_976_648_192}


@pytest.mark.parametrize("model", PARAMETERS)
def test_parameters_are_those_of_the_published_models(model):
    published = PARAMETERS[model]
    net = complete({**KEYS, "model": model})
    of_layer, embedding = footprint.count_parameters(net)
    assert net["layers"] * of_layer + 2 * embedding + net["hidden_size"] == published
    for gpus in (1, 2, 8, 32):  # the stages are the network, whatever the cut
        net["stages"] = gpus
        weights = [memory_of(net, stage, 1, 0, 0).weights for stage in range(gpus)]
        assert sum(weights) == 2 * published


def kept_by(compute, *own):
    """Bytes that autograd saves in compute(), each storage once: of numbers, and not of own."""
    kept = {}

    def pack(tensor):
        if tensor.is_floating_point() and tensor.dim():
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        assert compute().requires_grad
    weights = {w.untyped_storage().data_ptr() for w in own}
    return sum(size for place, size in kept.items() if place not in weights)


@pytest.mark.parametrize("hidden_size", [16, 64])
def test_activations_are_the_bytes_that_pytorch_keeps_for_a_backward(hidden_size):
    """The transformer of the digits: ReLU, an MLP as wide as the rest, no dropout."""
    sizes = {"network": "transformer", "hidden_size": hidden_size, "layers_per_stage": 3}
    (stage,) = build_stages({**CONFIG, **sizes, "num_stages": 1})
    layer, x = stage[1], torch.randn(8, 64, hidden_size, requires_grad=True)
    width = layer.linear1.out_features
    per_token = count_activations(hidden_size, NUM_HEADS, NUM_HEADS, width, mlp=1)
    assert kept_by(lambda: layer(x), *layer.parameters()) == 4 * 8 * 64 * per_token


def test_the_last_stage_also_keeps_what_the_loss_needs():
    tokens, vocabulary = 24, 50
    logits, labels = torch.randn(tokens, vocabulary, requires_grad=True), torch.zeros(tokens).long()
    kept = kept_by(lambda: torch.nn.functional.cross_entropy(logits, labels))
    net = complete({**KEYS, "sequence": tokens, "vocabulary": vocabulary, "gpus": 4})
    last, before = (memory_of(net, stage, 1, 0, 1).activations for stage in (3, 2))
    assert last - before == kept == 4 * tokens * vocabulary


def test_activations_of_a_megatron_layer_are_the_published_34_s_b_h():
    """Korthikanti et al. 2022, equation 1: s b h (34 + 5 a s / h) bytes, of which dropout has
    2 s b h and 3 a s^2 b / ... : its masks take 2 s b h + a s^2 b, its output 2 a s^2 b."""
    s, b, h, a = 2048, 4, 6144, 64
    ours = 2 * s * b * (count_activations(h, a, a, 4 * h, mlp=2) - 4 - a)  # without the scales
    assert ours == 32 * s * b * h
    published = s * b * h * 34 + 5 * a * s * s * b
    dropout = 2 * s * b * h + 3 * a * s * s * b
    assert ours + 2 * a * s * s * b == published - dropout
    sizes = {"layers": 1, "hidden_size": h, "heads": a, "kv_heads": a, "ffn": 4 * h, "gpus": 1}
    net = complete({**KEYS, **sizes, "sequence": s, "microbatch_size": b})
    nets = {**net, "flash_attention": False}, net
    with_matrix, without = (memory_of(each, 0, 1, 0, 1).activations for each in nets)
    assert with_matrix - without == 2 * a * s * s * b
    assert memory_of(net, 0, 1, inputs=3, whole=0).activations == 3 * 2 * s * b * h


@pytest.mark.parametrize("name", STATE_BYTES)
def test_optimizer_state_is_what_pytorch_allocates(name):
    layer = torch.nn.Linear(30, 20)
    momentum = 0.9 * (name == "momentum")
    sgd = torch.optim.SGD(layer.parameters(), 0.1, momentum)
    optimizer = torch.optim.Adam(layer.parameters(), 0.1) if name == "adam" else sgd
    layer(torch.randn(3, 30)).sum().backward()
    optimizer.step()
    state = [t for of in optimizer.state.values() for t in of.values() if torch.is_tensor(t)]
    size = sum(t.nbytes for t in state if t.dim())
    number = sum(w.numel() for w in layer.parameters())
    assert size == STATE_BYTES[name] * number
    held = memory_of(complete({**KEYS, "optimizer": name, "precision": "fp32"}), 1, 1, 0, 1)
    assert held.optimizer / held.weights == size / (4 * number)
    assert held.gradients == held.weights


def ways(**settings):
    check_fit({**KEYS, **settings})
    net = complete({**KEYS, **settings})
    return net, {way.name: way for way in ways_to_run(net)[0]}


@pytest.mark.parametrize(("gpus", "number"), [(1, 1), (2, 8), (4, 4), (8, 32), (5, 2)])
def test_times_are_the_closed_forms(gpus, number):
    """With equal stages: as many layers on each, and a head that costs next to nothing."""
    _, found = ways(gpus=gpus, num_microbatches=number, layers=80, vocabulary=1)
    times = {name: round(3 * number * way.time, 3) for name, way in found.items()}
    for name in ("gpipe", "1f1b"):
        assert times[name] == 3 * (number + gpus - 1)
    longer, shorter = max(number, gpus), min(number, gpus)  # a lap takes as long as either
    assert times["looped-bfs"] == 3 * (longer + (shorter - 1) / 2)
    if number >= gpus:
        assert times["zb-h1"] == 3 * number + gpus - 1
    if number >= 2 * gpus - 1:  # no bubble between their batches
        assert times["zb-h2"] == times["zb-v"] == 3 * number
    if number >= 2 * gpus:
        assert times["dualpipe-v"] == 3 * number + gpus - 1
    if number % gpus == 0:
        assert times["interleaved"] == 3 * (number + (gpus - 1) / 2)
        assert times["interleaved-zb"] == 3 * number + (gpus - 1) / 2
    assert ("pipedream 2BW" in times) == (number >= gpus)
    for name in ["pipedream 2019", *(["pipedream 2BW"] if number >= gpus else [])]:
        assert times[name] == 3 * number
    for name in ("gpipe", "1f1b", "looped-bfs", "pipedream 2019"):
        if gpus > 1:
            assert times[f"{name} with recompute"] == round(times[name] * 4 / 3, 3)


def test_unequal_stages_take_the_time_of_the_slowest():
    """31 GPUs for 32 layers: GPU0 has two."""
    _, found = ways(gpus=31, vocabulary=1)
    assert found["pipedream 2BW"].time == pytest.approx(2 * 31 / 32, rel=1e-3)
    assert found["1f1b"].time > 2 * 31 / 32
    net, found = ways()  # and the last of 8 stages of 4 layers the head
    of_layer, head = footprint.count_parameters(net)
    slower = 8 * (4 * of_layer + head) / (32 * of_layer + head)
    assert found["pipedream 2BW"].time == pytest.approx(slower)
    for name, head_on in (("zb-v", 0), ("interleaved", 7)):  # the last of 16 stages
        weights = [gpu.weights for gpu in found[name].gpus]
        assert weights.index(max(weights)) == head_on
    assert found["zb-v"].time == pytest.approx(slower)  # GPU0 is never idle, GPU7 has less to do
    assert found["interleaved"].time > slower + 1e-3
    plan, _ = plans_of(net, {"schedule": "looped-bfs"})
    work = [2 * of_layer] * 15 + [2 * of_layer + head]
    assert plan.config["forward_time"] == pytest.approx([8 * w / sum(work) for w in work])


def test_gpus_with_two_stages_hold_the_whole_network_and_the_published_activations():
    net, found = ways()
    of_layer, embedding = footprint.count_parameters(net)
    for way in found.values():
        assert sum(gpu.weights for gpu in way.gpus) == 2 * PARAMETERS["llama-2-7b"]
    for name in ("zb-v", "dualpipe-v"):  # both ends are on GPU0
        weights = [gpu.weights / 2 - 4 * of_layer for gpu in found[name].gpus]
        assert weights == [2 * embedding + net["hidden_size"], *[0] * 7]
    _, found = ways(vocabulary=1)  # in flight, in microbatches: reference/published.md
    layers = footprint.activations_of({**net, "vocabulary": 1}, 1, 0, 1)
    published = {"1f1b": 8, "zb-v": 8, "dualpipe-v": 8.5, "looped-bfs": 32, "interleaved-zb": 8}
    for name, shares in {**published, "interleaved": 8 + 7 / 2}.items():
        held = max(gpu.activations for gpu in found[name].gpus)
        assert held == pytest.approx(shares * layers, rel=1e-3)
    assert not [name for name in found if "zb-h" in name and "recompute" in name]  # saves nothing


def test_stashing_s_versions_of_an_s_th_costs_a_whole_network_and_2bw_one_more():
    """Of layers only: S versions of L / S layers are L layers."""
    net, found = ways(gpus=8, vocabulary=1)
    of_layer, _ = footprint.count_parameters(net)
    stage = 2 * net["layers"] / 8 * of_layer
    counts = {"pipedream 2019": range(8, 0, -1), "pipedream 2BW": [2] * 8, "1f1b": [1] * 8}
    for name, versions in counts.items():
        held = [gpu.weights + gpu.stash for gpu in found[name].gpus]
        assert held == pytest.approx([stage * number for number in versions], rel=1e-4)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("schedule", [*PYTORCH, "pipedream"])
def test_what_is_held_is_what_the_trainer_holds(schedule, recompute):
    """Counted: graphs that exist, and inputs without one, while a small network trains."""
    sizes = {"num_stages": 3, "num_microbatches": 6, "batch_size": 6, "num_batches": 1}
    small = {"hidden_size": 4, "layers_per_stage": 2, "device": "cpu", "backward_time": 2}
    settings = {"schedule": schedule, "recompute": recompute, "chunks_per_gpu": 2}
    plan = make_plan({**PLAN_CONFIG, **sizes, **small, **settings})
    now, seen = {}, {}  # stage -> (inputs, whole); -> the most on its GPU

    def watch(op, worker):
        flights = worker.in_flight.values()
        graphs = sum(output is not None for _, output, _ in flights)
        now[op.stage] = len(flights) - graphs, graphs + len(getattr(worker, "kept", ()))
        gpu = op.stage if op.stage < 3 else mirrored[op.stage]
        inputs, whole = map(sum, zip(*(now.get(s, (0, 0)) for s in of_gpu[gpu]), strict=True))
        seen[gpu] = max(seen.get(gpu, (0, 0)), (whole, inputs))

    of_gpu = [sorted({op.stage for op in row}) for row in plan.schedule]
    mirrored = {stage: gpu for gpu, stages in enumerate(of_gpu) for stage in stages}
    train_plan(plan, watch=watch)
    for gpu, row in enumerate(plan.schedule):
        states = footprint.microbatches_held([op for op in row if op.kind != "U"], recompute)
        sums = ([sum(number) for number in zip(*state, strict=True)] for state in states)
        assert seen[gpu] == max((whole, inputs) for _, inputs, whole in sums)


LARGE = {"model": "llama-2-70b", "gpus": 40, "num_microbatches": 64}
PLAIN = {"optimizer": "sgd", "precision": "fp32", "gpus": 3, "num_microbatches": 1}


@pytest.mark.parametrize("flags", [{}, {"memory": 30e9}, {"memory": 1e9}, LARGE, PLAIN])
def test_the_advice_follows_from_the_table(flags, capsys):
    config = {**KEYS, **flags}
    main(config)
    out = capsys.readouterr().out
    assert all(len(line) <= 80 for line in out.splitlines())
    rows = re.findall(r"^([+ ]) (\S.*?)  +([\d. ]+)$", out, re.M)
    table, fast = {}, []
    for mark, name, cells in rows:
        *parts, in_all, time = map(float, cells.split())
        assert sum(parts) == pytest.approx(in_all, abs=0.3)  # each is rounded
        fits, memory = mark == "+", config["memory"] / 1e9
        assert fits == (in_all <= memory) or abs(in_all - memory) < 0.1
        table[name.replace(", ", " with ")] = in_all, time
        fast += [time] * fits
    text = " ".join(out.split())
    two_versions = config["num_microbatches"] >= config["gpus"] - 1
    assert ("pipedream 2BW" in table) == two_versions
    for name in [*PYTORCH, "pipedream 2019"]:
        assert (name in table) != (f"{name} is left out: " in text)
    if fast:
        best = text.partition(" is the fastest of these that fits")[0].rpartition(". ")[2]
        assert table[best][1] == min(fast)
        name = PYTORCH.get(best.split()[0])
        assert f"that fits (PyTorch{': ' + name if name else ' has no schedule for it'})" in text
    else:
        least = min(table, key=table.get)
        assert f"Nothing fits. {least} needs the least, {table[least][0]:.1f} GB" in text


def needing(found, needs, *left_out):
    """The ways found, but for some, which all fit: each needs so many bytes, or 5."""
    times = {name: way.time for name, way in found.items() if name not in left_out}
    return [Way(name, [Memory(*[needs.get(name, 5) / 5] * 5)], t) for name, t in times.items()]


def test_of_two_that_are_as_fast_the_advice_names_the_one_with_fresh_gradients():
    net, found = ways()
    assert found["zb-h2"].time == pytest.approx(found["pipedream 2BW"].time, abs=5e-4)
    in_v = advise(net, needing(found, {"zb-h2": 6}))[0]
    assert in_v == "zb-v is the fastest of these that fits (PyTorch: ScheduleZBVZeroBubble)."
    in_more_memory = advise(net, needing(found, {"zb-v": 11, "zb-h2": 10}))[0]
    assert "zb-h2 is the fastest of these that fits (PyTorch has no" in in_more_memory
    two_stages = ("zb-v", "dualpipe-v", "interleaved", "interleaved-zb", "looped-bfs")
    without = needing(found, {}, "zb-h2", *two_stages)
    stale = "gradients are one batch old. With fresh gradients: zb-h1 (PyTorch: ScheduleInterleaved"
    assert stale in advise(net, without)[0]
    assert "ZeroBubble with one stage per GPU), 5% longer per batch." in advise(net, without)[0]
    without = [way for way in without if "2BW" not in way.name]
    assert "gradients are up to 7 updates old. With fresh" in advise(net, without)[0]
    assert "pipedream 2BW" in ways(num_microbatches=7)[1]  # two versions are enough


def test_pytorch_has_the_schedules_that_fit_says_it_has():
    names = [name.split()[0] for name in PYTORCH.values() if name]
    theirs = [schedules.get_schedule_class(name.removeprefix("Schedule")) for name in names]
    assert [each.__name__ for each in theirs] == names


def test_what_cannot_run_is_left_out_and_says_why_in_words_of_fit(capsys):
    main({**KEYS, "gpus": 20, "num_microbatches": 21})
    text = " ".join(capsys.readouterr().out.split())
    assert "zb-v is left out: layers=32 cannot be cut into 40 stages" in text
    assert "dualpipe-v is left out: num_microbatches=21 must be at least 2 * gpus=40" in text
    assert "interleaved is left out: num_microbatches=21 must be a multiple of gpus=20" in text
    assert "num_stages" not in text


def test_the_advice_when_it_fits_on_one_gpu_and_when_microbatches_are_the_problem(capsys):
    main({**KEYS, "gpus": 1, "memory": 130e9})
    assert capsys.readouterr().out.endswith("It fits on one GPU: no pipeline.\n")
    for size, what in ((1, "more GPUs, as stages, or as replicas"), (8, "smaller microbatches")):
        main({**KEYS, "microbatch_size": size, "memory": 10e9})
        assert f"Use {what}" in " ".join(capsys.readouterr().out.split())


BAD = {
    "--model llama-3": "model='llama-3' must be one of llama-2-7b, llama-2-70b",
    "--gpus 33": "layers=32 cannot be cut into gpus=33 stages",
    "--gpus 0": "gpus=0 must be a whole number from 1 to 256",
    "--kv_heads 5": "heads=32 must be a multiple of kv_heads=5",
    "--gpus 32 --num_microbatches 1024": "gpus=32 * num_microbatches=1024 must be at most",
    "--flash_attention 1": "flash_attention=1 must be one of True, False",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_gets_one_line(run, flags):
    status, out, err = run("fit", *flags.split())
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert BAD[flags] in err
