"""Does it fit? Published parameter counts, bytes that PyTorch keeps, and the advice."""

import re

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from pipedream.commands.fit import KEYS, Way, advise, check_fit, main, ways_to_run
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
        net["gpus"] = gpus
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
    net = complete({**KEYS, **settings})
    check_fit(net)
    return net, {way.name: way for way in ways_to_run(net)}


@pytest.mark.parametrize(("gpus", "number"), [(1, 1), (2, 8), (4, 4), (8, 32), (5, 2)])
def test_times_are_the_closed_forms(gpus, number):
    """With equal stages: as many layers on each, and a head that costs next to nothing."""
    _, found = ways(gpus=gpus, num_microbatches=number, layers=40, vocabulary=1)
    times = {name: round(3 * number * way.time, 3) for name, way in found.items()}
    for name in ("gpipe", "1f1b"):
        assert times[name] == 3 * (number + gpus - 1)
        assert times[f"{name} with recompute"] == 4 * (number + gpus - 1)
    if number >= gpus:
        assert times["zb-h1"] == 3 * number + gpus - 1
    if number >= 2 * gpus - 1:  # no bubble between its batches
        assert times["zb-h2"] == 3 * number
    assert ("pipedream 2BW" in times) == (number >= gpus)
    for name in ["pipedream 2019", *(["pipedream 2BW"] if number >= gpus else [])]:
        assert times[name] == 3 * number
        assert times[f"{name} with recompute"] == 4 * number


def test_unequal_stages_take_the_time_of_the_slowest():
    """31 GPUs for 32 layers: GPU0 has two."""
    _, found = ways(gpus=31, vocabulary=1)
    assert found["pipedream 2BW"].time == pytest.approx(2 * 31 / 32, rel=1e-3)
    assert found["1f1b"].time > 2 * 31 / 32
    _, found = ways()  # and the last of 8 stages of 4 layers the head
    of_layer, head = footprint.count_parameters(complete(KEYS))
    slower = 8 * (4 * of_layer + head) / (32 * of_layer + head)
    assert found["pipedream 2BW"].time == pytest.approx(slower)


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
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb-h1", "zb-h2", "pipedream"])
def test_what_is_held_is_what_the_trainer_holds(schedule, recompute):
    """Counted: graphs that exist, and inputs without one, while a small network trains."""
    sizes = {"num_stages": 4, "num_microbatches": 6, "batch_size": 6, "num_batches": 1}
    small = {"hidden_size": 4, "layers_per_stage": 1, "device": "cpu", "backward_time": 2}
    settings = {"schedule": schedule, "recompute": recompute}
    plan = make_plan({**PLAN_CONFIG, **sizes, **small, **settings})
    seen = [[] for _ in range(4)]

    def watch(op, worker):
        flights = worker.in_flight.values()
        graphs = sum(output is not None for _, output, _ in flights)
        seen[op.stage].append((len(flights) - graphs, graphs + len(getattr(worker, "kept", ()))))

    train_plan(plan, watch=watch)
    for row, found in zip(plan.schedule, seen, strict=True):
        held = {*footprint.microbatches_held([op for op in row if op.kind != "U"], recompute)}
        inputs_and_whole = max(held, key=lambda pair: (pair[1], pair[0]))
        assert inputs_and_whole == max(found, key=lambda pair: (pair[1], pair[0]))


LARGE = {"model": "llama-2-70b", "gpus": 40, "num_microbatches": 64}
PLAIN = {"optimizer": "sgd", "precision": "fp32", "gpus": 3, "num_microbatches": 1}


@pytest.mark.parametrize("flags", [{}, {"memory": 30e9}, {"memory": 1e9}, LARGE, PLAIN])
def test_the_advice_follows_from_the_table(flags, capsys):
    config = {**KEYS, **flags}
    main(config)
    out = capsys.readouterr().out
    assert all(len(line) <= 80 for line in out.splitlines())
    rows = re.findall(r"^([+ ]) (\S.*?)  +([\d. ]+)$", out, re.M)
    assert len(rows) == 12 - 2 * (config["num_microbatches"] < config["gpus"] - 1)
    table, fast = {}, []
    for mark, name, cells in rows:
        *parts, in_all, time = map(float, cells.split())
        assert sum(parts) == pytest.approx(in_all, abs=0.3)  # each is rounded
        fits, memory = mark == "+", config["memory"] / 1e9
        assert fits == (in_all <= memory) or abs(in_all - memory) < 0.1
        table[name.replace(", ", " with ")] = in_all, time
        fast += [time] * fits
    text = " ".join(out.split())
    if fast:
        best = text.partition(" is the fastest of these that fits")[0].rpartition(". ")[2]
        assert table[best][1] == min(fast)
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
    in_more_memory = needing(found, {"zb-h2": 10})
    assert advise(net, in_more_memory)[0] == "zb-h2 is the fastest of these that fits."
    without = needing(found, {}, "zb-h2", "zb-h2 with recompute")
    stale = "gradients are one batch old. With fresh gradients: zb-h1, 5% longer"
    assert stale in advise(net, without)[0]
    without = [way for way in without if "2BW" not in way.name]
    assert "gradients are up to 7 updates old. With fresh" in advise(net, without)[0]
    assert ways(num_microbatches=7)[1].keys() == found.keys()  # two versions are enough


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
