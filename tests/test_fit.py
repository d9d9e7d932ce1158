"""Does it fit? Published parameter counts, bytes that PyTorch keeps, and the advice."""

import re
import sys

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

import pipedream_planner
from pipedream_fit import (
    FIT,
    OPTIMIZER,
    advise,
    check_fit,
    complete,
    count_activations,
    count_parameters,
    describe,
    fit,
    memory_of,
    microbatches_held,
    ways_to_run,
)
from pipedream_lab import LAB_CONFIG, make_plan, train_plan
from pipedream_simple import CONFIG, NUM_HEADS, UserError, build_stages, peak_versions, run_main


@pytest.mark.parametrize(
    ("model", "published"),
    # arXiv 2307.09288; the numbers of parameters of the models as they were published
    [("llama-2-7b", 6_738_415_616), ("llama-2-70b", 68_976_648_192)],
)
def test_parameters_are_those_of_the_published_models(model, published):
    net = complete({**FIT, "model": model})
    of_layer, embedding = count_parameters(net)
    assert net["layers"] * of_layer + 2 * embedding + net["hidden_size"] == published
    for gpus in (1, 2, 8, 32):  # the stages are the network, whatever the cut
        net["gpus"] = gpus
        weights = [memory_of(net, stage, 1, 0, 0)[0] for stage in range(gpus)]
        assert sum(weights) == 2 * published


@pytest.mark.parametrize("hidden_size", [16, 64])
def test_activations_are_the_bytes_that_pytorch_keeps_for_a_backward(hidden_size):
    """The transformer of pipedream_simple.py: ReLU, an MLP as wide as the rest, no dropout."""
    sizes = {"network": "transformer", "hidden_size": hidden_size, "layers_per_stage": 3}
    (stage,) = build_stages({**CONFIG, **sizes, "num_stages": 1})
    layer, tokens = stage[1], 8 * 64
    own = {w.untyped_storage().data_ptr() for w in layer.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(torch.randn(8, 64, hidden_size, requires_grad=True))
    width = layer.linear1.out_features
    per_token = count_activations(hidden_size, NUM_HEADS, NUM_HEADS, width, mlp=1)
    assert sum(kept.values()) == 4 * tokens * per_token


def test_the_last_stage_also_keeps_what_the_loss_needs():
    tokens, vocabulary = 24, 50
    logits, labels = torch.randn(tokens, vocabulary, requires_grad=True), torch.zeros(tokens).long()
    kept = {}

    def pack(tensor):
        if tensor.is_floating_point() and tensor.dim():
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        torch.nn.functional.cross_entropy(logits, labels)
    net = complete({**FIT, "sequence": tokens, "vocabulary": vocabulary, "gpus": 4})
    last, before = (memory_of(net, stage, 1, 0, 1)[4] for stage in (3, 2))
    assert last - before == sum(kept.values()) == 4 * tokens * vocabulary


def test_activations_of_a_megatron_layer_are_the_published_34_s_b_h():
    """Korthikanti et al. 2022, equation 1: s b h (34 + 5 a s / h) bytes, of which dropout has
    2 s b h and 3 a s^2 b / ... : its masks take 2 s b h + a s^2 b, its output 2 a s^2 b."""
    s, b, h, a = 2048, 4, 6144, 64
    ours = 2 * s * b * (count_activations(h, a, a, 4 * h, mlp=2) - 4 - a)  # without the scales
    assert ours == 32 * s * b * h
    published = s * b * h * 34 + 5 * a * s * s * b
    dropout = 2 * s * b * h + 3 * a * s * s * b
    assert ours + 2 * a * s * s * b == published - dropout
    net = complete(
        {**FIT, "layers": 1, "hidden_size": h, "heads": a, "kv_heads": a, "ffn": 4 * h, "gpus": 1}
    )
    net |= {"sequence": s, "microbatch_size": b}
    with_matrix, without = (
        memory_of({**net, "flash_attention": flash}, 0, 1, 0, 1)[4] for flash in (False, True)
    )
    assert with_matrix - without == 2 * a * s * s * b


@pytest.mark.parametrize("name", OPTIMIZER)
def test_optimizer_state_is_what_pytorch_allocates(name):
    layer = torch.nn.Linear(30, 20)
    optimizer = {
        "sgd": lambda w: torch.optim.SGD(w, 0.1),
        "momentum": lambda w: torch.optim.SGD(w, 0.1, momentum=0.9),
        "adam": lambda w: torch.optim.Adam(w, 0.1),
    }[name](layer.parameters())
    layer(torch.randn(3, 30)).sum().backward()
    optimizer.step()
    state = [t for of in optimizer.state.values() for t in of.values() if torch.is_tensor(t)]
    size = sum(t.nbytes for t in state if t.dim())
    number = sum(w.numel() for w in layer.parameters())
    assert size == OPTIMIZER[name] * number
    net = complete({**FIT, "optimizer": name, "precision": "fp32"})
    weights, gradients, optimizer_state, *_ = memory_of(net, 1, 1, 0, 1)
    assert optimizer_state / weights == size / (4 * number)
    assert gradients == weights


def ways(**settings):
    net = complete({**FIT, **settings})
    check_fit(net)
    return net, {name: rest for name, *rest in ways_to_run(net)}


@pytest.mark.parametrize(("gpus", "number"), [(1, 1), (2, 8), (4, 4), (8, 32), (5, 2)])
def test_times_are_the_closed_forms(gpus, number):
    """With equal stages: as many layers on each, and a head that costs next to nothing."""
    _, found = ways(gpus=gpus, num_microbatches=number, layers=40, vocabulary=1)
    times = {name: 3 * number * time for name, (_, _, time) in found.items()}
    times = {name: round(time, 3) for name, time in times.items()}
    for name in ("gpipe", "1f1b"):
        assert times[name] == 3 * (number + gpus - 1)
        assert times[f"{name}, recompute"] == 4 * (number + gpus - 1)
    if number >= gpus:
        assert times["zb-h1"] == 3 * number + gpus - 1
    assert ("pipedream 2BW" in times) == (number >= gpus)
    for name in ["pipedream 2019", *(["pipedream 2BW"] if number >= gpus else [])]:
        assert times[name] == 3 * number
        assert times[f"{name}, recompute"] == 4 * number


def test_unequal_stages_take_the_time_of_the_slowest():
    """31 GPUs for 32 layers: GPU0 has two."""
    _, found = ways(gpus=31, vocabulary=1)
    assert found["pipedream 2BW"][2] == pytest.approx(2 * 31 / 32, rel=1e-3)
    assert found["1f1b"][2] > 2 * 31 / 32


def test_stashing_s_versions_of_an_s_th_costs_a_whole_network_and_2bw_one_more():
    """Of layers only: S versions of L / S layers are L layers."""
    net = complete({**FIT, "vocabulary": 1, "gpus": 8})
    of_layer, _ = count_parameters(net)
    _, found = ways(gpus=8)
    weights, _, _, stash, _ = memory_of(net, 0, 8, 0, 8)
    assert weights + stash == pytest.approx(2 * net["layers"] * of_layer, rel=1e-4)
    assert peak_versions(found["pipedream 2019"][0]) == [8, 7, 6, 5, 4, 3, 2, 1]
    assert peak_versions(found["pipedream 2BW"][0]) == [2] * 8
    assert peak_versions(found["1f1b"][0]) == [1] * 8


def test_recompute_keeps_inputs_and_one_microbatch():
    net = complete({**FIT, "gpus": 4, "vocabulary": 1})
    tokens, layers = 4096, 8
    whole = 2 * layers * tokens * count_activations(4096, 32, 32, 11_008)
    for in_flight in (1, 4, 32):
        assert memory_of(net, 1, 1, 0, in_flight)[4] == in_flight * whole
        kept = memory_of(net, 1, 1, in_flight - 1, 1)[4]
        assert kept == whole + (in_flight - 1) * 2 * tokens * 4096


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb-h1", "zb-h2", "pipedream"])
def test_what_is_held_is_what_the_trainer_holds(schedule, recompute):
    """Counted: graphs that exist, and inputs without one, while a small network trains."""
    sizes = {"num_stages": 4, "num_microbatches": 6, "batch_size": 6, "num_batches": 1}
    small = {"hidden_size": 4, "layers_per_stage": 1, "device": "cpu", "backward_time": 2}
    settings = {"schedule": schedule, "recompute": recompute}
    plan = make_plan({**LAB_CONFIG, **sizes, **small, **settings})
    seen = [[] for _ in range(4)]

    def watch(op, worker):
        flights = worker.in_flight.values()
        graphs = sum(output is not None for _, output, _ in flights)
        seen[op.stage].append((len(flights) - graphs, graphs + len(getattr(worker, "kept", ()))))

    train_plan(plan, watch=watch)
    for row, found in zip(plan.schedule, seen, strict=True):
        held = {*microbatches_held([op for op in row if op.kind != "U"], recompute)}
        inputs_and_whole = max(held, key=lambda pair: (pair[1], pair[0]))
        assert inputs_and_whole == max(found, key=lambda pair: (pair[1], pair[0]))


def table(text):
    """{name: (+ or not, the numbers)} of a printed table."""
    rows = re.findall(
        r"^([+ ]) ((?:gpipe|1f1b|zb-h[12]|pipedream)\S*(?: \S+)*?)  +([\d. ]+)$", text, re.M
    )
    return {name: (mark == "+", [float(x) for x in cells.split()]) for mark, name, cells in rows}


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"memory": 30e9},
        {"memory": 1e9},
        {"model": "llama-2-70b", "gpus": 16},
        {"model": "llama-2-70b", "gpus": 40, "num_microbatches": 64},
        {"optimizer": "sgd", "precision": "fp32", "gpus": 3, "num_microbatches": 1},
    ],
)
def test_the_advice_follows_from_the_table(flags, capsys):
    fit({**FIT, **flags})
    out = capsys.readouterr().out
    found = table(out)
    small = flags.get("num_microbatches", 32) < flags.get("gpus", 8) - 1
    assert len(found) == 12 - 2 * small
    assert all(len(line) <= 80 for line in out.splitlines())
    memory = {**FIT, **flags}["memory"] / 1e9
    for fits, numbers in found.values():
        *parts, in_all, _ = numbers
        assert sum(parts) == pytest.approx(in_all, abs=0.3)  # each is rounded
        assert fits == (in_all <= memory) or abs(in_all - memory) < 0.1
    fitting = {name: numbers for name, (fits, numbers) in found.items() if fits}
    text = " ".join(out.split())
    if not fitting:
        least = min(found, key=lambda name: found[name][1][-2])
        least_in_words = least.replace(", recompute", " with recompute")
        assert (
            f"Nothing fits. {least_in_words} needs the least, {found[least][1][-2]:.1f} GB" in text
        )
    else:
        best = text.partition(" is the fastest of these that fits")[0]
        best = best.rpartition(". ")[2].replace(" with recompute", ", recompute")
        assert fitting[best][-1] == min(numbers[-1] for numbers in fitting.values())


def test_of_two_that_are_as_fast_the_advice_names_the_one_with_fresh_gradients():
    net, found = ways()
    times = {name: ([[1.0] * 5], time) for name, (_, _, time) in found.items()}
    times["zb-h2"] = [[2.0] * 5], times["zb-h2"][1]  # in more memory
    assert times["zb-h2"][1] == pytest.approx(times["pipedream 2BW"][1], abs=5e-4)
    assert advise(net, times)[0] == "zb-h2 is the fastest of these that fits."


def test_the_advice_does_not_hide_that_2bw_is_stale():
    net, found = ways(memory=50e9)
    times = {name: ([[1.0] * 5], time) for name, (_, _, time) in found.items()}
    del times["zb-h2"], times["zb-h2, recompute"]
    assert "gradients are one batch old. With fresh gradients: zb-h1, 5% " in advise(net, times)[0]
    times = {name: way for name, way in times.items() if "2BW" not in name}
    assert "gradients are up to 7 updates old. With fresh" in advise(net, times)[0]
    assert ways(num_microbatches=7)[1].keys() == found.keys()  # two versions are enough


def test_the_advice_when_it_fits_on_one_gpu_and_when_microbatches_are_the_problem(capsys):
    fit({**FIT, "gpus": 1, "memory": 130e9})
    assert capsys.readouterr().out.endswith("It fits on one GPU: no pipeline.\n")
    for size, what in ((1, "more GPUs, as stages, or as replicas"), (8, "smaller microbatches")):
        fit({**FIT, "microbatch_size": size, "memory": 10e9})
        assert f"Use {what}" in " ".join(capsys.readouterr().out.split())


def test_the_times_are_those_of_the_closed_forms_where_stages_are_equal():
    """Bubble over computing: (S - 1) / M, and none between the batches of zb-h2."""
    _, found = ways(gpus=8, vocabulary=1)
    times = {name: time for name, (_, _, time) in found.items()}
    for name in ("1f1b", "gpipe"):
        assert times[name] == pytest.approx(1 + 7 / 32, rel=1e-4)
    for name in ("zb-h2", "pipedream 2BW", "pipedream 2019"):
        assert times[name] == pytest.approx(1, rel=1e-4)
    assert times["1f1b, recompute"] == pytest.approx((1 + 7 / 32) * 4 / 3, rel=1e-4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--model llama-3", "model='llama-3' must be one of llama-2-7b, llama-2-70b"),
        ("--gpus 33", "layers=32 cannot be cut into gpus=33 stages"),
        ("--gpus 0", "gpus=0 must be a whole number from 1 to 256"),
        ("--heads 33", "hidden_size=4096 must be a multiple of heads=33"),
        ("--kv_heads 5", "heads=32 must be a multiple of kv_heads=5"),
        ("--optimizer adamw", "optimizer='adamw' must be one of sgd, momentum, adam"),
        ("--precision fp8", "precision='fp8' must be one of bf16, fp32"),
        ("--memory nan", "memory='nan' must be a number"),
        ("--memory 0", "memory=0 must be a number"),
        ("--gpus 32 --num_microbatches 1024", "gpus=32 * num_microbatches=1024 must be at most"),
        ("--layers 1.5", "layers=1.5 must be a whole number"),
        ("--model [1]", "model=[1] must be one of"),
        ("--flash_attention 1", "flash_attention=1 must be True or False"),
        ("--layer 3", "unknown flag '--layer'"),
    ],
)
def test_bad_input_gets_one_line(flags, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pipedream_planner.py", "fit", *flags.split()])
    assert run_main(pipedream_planner.main) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err
    assert isinstance(UserError("x"), ValueError)


def test_help_names_the_default_and_the_other_choices():
    text = describe("")
    assert "--precision bf16  (or fp32)\n" in text
    assert "--optimizer adam  (or sgd, momentum)\n" in text
    assert "--layers the model's\n" in text
