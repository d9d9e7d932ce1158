"""Does it fit? Memory and times from layers that are counted by hand, and what is refused."""

import importlib.util
import json
import re
from itertools import product

import pytest
import torch
from conftest import ROOT
from torch import nn
from torch.distributed.pipelining import schedules

from pipedream.commands import fit
from pipedream.commands.fit import KEYS, Costs, check_fit
from pipedream.planning.families import PRESETS
from pipedream.planning.layouts import (
    NO_PIPELINE,
    Layout,
    StageCost,
    cut,
    fullest_moment,
    parameters_on,
)
from pipedream.planning.measuring import Activations, all_parameters, measure_layers
from pipedream.planning.models import load_model
from pipedream.schedules.plans import PLAN_CONFIG, make_plan
from pipedream.schedules.rows import LIBRARY

WIDTH, ROWS = 64, 16
FILE = f"""
import torch
from torch import nn
LAYERS = [lambda: nn.Linear({WIDTH}, {WIDTH}, bias=False)] * 16
def my_batch(number, train=True):
    return torch.zeros({8 * ROWS}, {WIDTH}), torch.zeros({8 * ROWS}, {WIDTH}), {8 * ROWS}
"""


def table_of(out):
    """{schedule: (PyTorch's class, time, GB of each kind of recompute, time again)}."""
    found = {}
    for line in out.splitlines():
        name, *cells = re.split("  +", line.strip())
        if name in [*fit.PYTORCH, NO_PIPELINE] and len(cells) == 6:
            pytorch, time, *sizes, again = cells
            sizes = [float(size.rstrip("+")) for size in sizes]
            found[name] = pytorch, float(time), sizes, float(again)
    return found


@pytest.fixture
def mine(tmp_path):
    """mine(text) -> a file with that text."""

    def write(text=FILE, name="mine.py"):
        (tmp_path / name).write_text(text)
        return name

    return write


# ------------------------------------------------------------------------------------- time


def test_times_of_equal_layers_are_the_closed_forms(run, mine):
    """F, I and W of a Linear are equal: the formulas of the papers, for a further batch."""
    S, M, V = 4, 8, 2  # noqa: N806
    out = run("fit", mine(), "--gpus", S, "--num_microbatches", M, "--precision", "fp32").out
    found = {name: time for name, (_, time, *_) in table_of(out).items()}
    closed = {
        **dict.fromkeys(("gpipe", "1f1b"), 1 + (S - 1) / M),
        **dict.fromkeys(("interleaved", "looped-bfs"), 1 + (S - 1) / (V * M)),
        **{"zb-h1": 1 + (S - 1) / (3 * M), "interleaved-zb": 1 + (S - 1) / (3 * V * M)},
        **{"dualpipe-v": 1 + (S - 1) / (3 * M), "zb-h2": 1, "zb-v": 1},
        **{"pipedream 2BW": 1, "pipedream 2019": 1},
    }
    # The first layer of all gets no gradient for its input: it has no I.
    assert found == pytest.approx(closed, abs=0.06)
    assert found["zb-v"] < found["zb-h1"] < found["interleaved"] < found["1f1b"]


def test_parts_of_a_step_are_measured_and_not_one_to_one_to_one():
    model = load_model("llama-3-8b", KEYS)
    block = measure_layers(model.layers, model.input, torch.bfloat16)[1]
    assert 1.05 < block.input_flops / block.forward_flops < 1.8
    assert 0.5 < block.weight_flops / block.forward_flops < 1


# ------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    ("flags", "per_parameter"),
    [
        ("", 18),  # Megatron Core's documentation, fp32 main gradients
        ("--gradients bf16", 16),  # ZeRO (SC 2020), section 3.1
        ("--precision fp32", 16),
        ("--optimizer sgd", 2 + 4 + 4),
        ("--optimizer momentum --precision fp32", 4 + 4 + 4),
    ],
)
def test_one_gpu_holds_so_many_bytes_of_each_parameter(flags, per_parameter):
    config = dict(KEYS) | {
        key.removeprefix("--"): value
        for key, value in zip(flags.split()[::2], flags.split()[1::2], strict=True)
    }
    assert sum(fit.bytes_per_parameter(config)) == per_parameter


@pytest.mark.parametrize("schedule", LIBRARY)
def test_what_a_gpu_holds_is_what_its_microbatches_hold_one_by_one(schedule):
    """Each waits from F to B, and is whole from B on, or from I until its W is over."""
    sizes = {"num_stages": 3, "num_microbatches": 6, "batch_size": 6, "layers_per_stage": 2}
    plan = make_plan({**PLAN_CONFIG, **sizes, "schedule": schedule, "chunks_per_gpu": 2})
    stages = range(plan.config["num_stages"])
    held = [Activations(3 + s, 100 + 7 * s, 11 * (s + 1)) for s in stages]
    halved = [300 + s for s in stages]
    for row in plan.schedule:
        most, state = (0, 0), {}  # (stage, microbatch) -> bytes
        for stage, kind, m, _ in row:
            waiting, whole, working = held[stage]
            if kind == "U":
                continue
            before = state.get((stage, m), 0)
            state[stage, m] = {"W": before, "I": halved[stage]}.get(kind, whole)
            most = max(most, (sum(state.values()), working), key=sum)
            state[stage, m] = {"F": waiting, "I": halved[stage]}.get(kind, 0)
        assert fullest_moment(row, held, halved) == most


def test_the_whole_of_a_model_is_in_its_stages_whatever_the_cut():
    model = load_model("llama-3.2-1b", KEYS)
    layers = measure_layers(model.layers, model.input, torch.bfloat16)
    assert all_parameters(layers) == 1_235_814_400  # its head's matrix is the embedding's
    for number, even in product((1, 2, 4, 16), (True, False)):
        gpus = [[stage] for stage in range(number)]
        stages = cut(layers, model.ends, gpus, even)
        assert len(stages) == number
        # The tied matrix is on both ends of a pipeline, and once where one GPU has both.
        tied = 128_256 * 2048 * (number > 1)
        assert sum(parameters_on([stage])[0] for stage in stages) == 1_235_814_400 + tied
        assert parameters_on(stages) == (1_235_814_400, 1_235_814_400)
        work = [sum(stage.flops.values()) for stage in stages]
        whole = sum(each.forward_flops + each.input_flops + each.weight_flops for each in layers)
        assert sum(work) == whole


def test_an_uneven_cut_is_at_least_as_fast_as_an_even_one():
    model = load_model("llama-3-8b", KEYS)  # a head as large as several blocks
    layers = measure_layers(model.layers, model.input, torch.bfloat16)
    one_each = [[stage] for stage in range(8)]
    slowest = [
        max(sum(s.flops.values()) for s in cut(layers, model.ends, one_each, even))
        for even in (True, False)
    ]
    assert slowest[0] > 1.1 * slowest[1]


def test_frozen_weights_have_no_gradient_and_shared_ones_count_once_on_a_gpu():
    one = nn.Linear(64, 64, bias=False)

    def frozen():
        return nn.Linear(64, 64, bias=False).requires_grad_(False)

    x = torch.zeros(2, 64)
    layers = measure_layers([lambda: one] * 4 + [frozen] * 4, x)
    numbered = dict(enumerate(layers))
    own = [{n: numbered[n] for n in span} for span in (range(1, 4), range(4, 8))]
    found = [parameters_on([StageCost(each, {}, {})]) for each in own]
    assert found == [(64 * 64, 64 * 64), (4 * 64 * 64, 0)]


def test_no_cut_is_slower_than_the_even_one(run):
    """Where a GPU has two stages, the planner's slowest stage says little."""
    for flags in ("llama-3-70b --gpus 8", "--layers 41 --gpus 10"):
        found = [table_of(run("fit", *flags.split(), "--even", even).out) for even in (True, False)]
        for name, (_, time, *_) in found[1].items():
            assert time <= found[0][name][1] + 0.02, (flags, name)


def test_recompute_per_layer_fits_where_nothing_did(run):
    """Two GPUs, microbatches of four: 60.6 GB at 16 bytes per parameter, 67.3 at 18, elsewhere."""
    flags = ["--gpus", "2", "--microbatch_size", "4", "--memory", "80e9"]
    for gradients, published in (("bf16", 60.6), ("fp32", 67.3)):
        out = run("fit", *flags, "--gradients", gradients).out
        none, layer, _ = table_of(out)["1f1b"][2]
        assert none > 80 > layer
        assert layer == pytest.approx(published, rel=0.05)


# ------------------------------------------------------------------------------------- groups


def test_replicas_share_the_batch_and_the_rest_of_the_gpus_are_stages(run, mine):
    """Time and activations of a pipeline with so many stages, and that part of the microbatches."""
    alone = run("fit", mine(), "--gpus", 4, "--num_microbatches", 8, "--machine", 4).out
    flags = "--gpus 16 --num_microbatches 16 --replicas 2 --tensor 2"
    groups = run("fit", mine(), *flags.split(), "--microbatch_size", ROWS).out
    assert [row[1] for row in table_of(alone).values()] == [
        row[1] for row in table_of(groups).values()
    ]
    assert "2 replicas, 8 microbatches each:" in groups


@pytest.fixture
def costs(mine, tmp_path, monkeypatch):
    """costs(model, key=value): Costs of the reader's file, or of that model."""
    monkeypatch.chdir(tmp_path)
    return lambda model=None, **keys: Costs({**KEYS, **keys}, model or mine())


def test_zero_divides_what_figure_1_of_its_paper_says(costs, mine):
    """7.5 billion parameters, Adam in mixed precision, 64 GPUs: Rajbhandari et al. (SC 2020)."""
    pair = "[lambda: nn.Linear(2500, 4000, bias=False), lambda: nn.Linear(4000, 2500, bias=False)]"
    head, _, tail = FILE.partition(f"[lambda: nn.Linear({WIDTH}, {WIDTH}, bias=False)] * 16")
    text = f"{head}{pair} * 375{tail}".replace(f", {WIDTH})", ", 2500)")
    large = costs(mine(text), gradients="bf16", microbatch_size=1)
    assert all_parameters(large.layers(32)) == 7.5e9
    needs = [large.way("1f1b", Layout(64, 1, 1, z, 64, 32)).needs["none"] for z in range(4)]
    state = [need.weights + need.gradients + need.optimizer for need in needs]
    assert [f"{each / 1e9:.1f}" for each in state] == ["120.0", "31.4", "16.6", "1.9"]


def test_tensor_parallelism_divides_all_that_a_gpu_holds(costs):
    llama = costs("llama-2-7b")
    whole = llama.way("1f1b", Layout(1, 1, 2, 0, 8, 32))
    split = llama.way("1f1b", Layout(1, 8, 2, 0, 8, 32))
    for kind, need in whole.needs.items():
        assert split.needs[kind][1:] == pytest.approx([each / 8 for each in need[1:]])
    assert split.times == whole.times


def test_stages_of_zero_divide_in_order_and_versions_of_weights_only_in_the_third(costs):
    own, D = costs(), 4  # noqa: N806
    found = [own.way("pipedream 2019", Layout(D, 1, 2, zero, 8, 32)) for zero in range(4)]
    none, *zeros = [way.needs["none"] for way in found]
    divided = ["optimizer", "gradients", "weights"]
    for stage, need in enumerate(zeros, 1):
        for name in divided:
            part = D if name in divided[:stage] else 1
            assert getattr(need, name) == pytest.approx(getattr(none, name) / part)
        assert need.stash == none.stash / (D if stage == 3 else 1) > 0
        assert need[5:] == none[5:]


def test_only_the_first_stage_of_zero_divides_between_machines():
    assert [Layout(16, 1, 1, zero, 8, 32).shards for zero in range(4)] == [1, 16, 8, 8]
    assert Layout(16, 2, 1, 3, 8, 32).shards == 4  # two GPUs of a machine share a layer
    assert Layout(6, 1, 1, 3, 8, 32).shards == 6
    assert Layout(12, 1, 1, 3, 8, 32).shards == 4  # in the second machine there are four
    assert Layout(12, 8, 1, 3, 8, 32).shards == 1


# ------------------------------------------------------------------------------ what a GPU sends


@pytest.mark.parametrize(
    ("zero", "machine", "of_gradients", "of_weights"),
    [
        (0, 8, 2 * 3 / 4, 0),  # an all-reduce, in a ring of four
        (1, 8, 3 / 4, 3 / 4),
        (2, 8, 8 * 3 / 4, 3 / 4),  # eight microbatches
        (3, 8, 8 * 3 / 4, 2 * 8 * 3 / 4),
        (3, 2, 8 / 2 + 1 / 2, 2 * 8 / 2),  # two machines: an all-reduce of half of the gradients
    ],
)
def test_replicas_send_what_rings_send(costs, zero, machine, of_gradients, of_weights):
    way = costs(precision="fp32").way("1f1b", Layout(4, 1, 1, zero, machine, 32))
    size = 4 * 16 * WIDTH**2
    assert way.sent["none"] == pytest.approx([(of_gradients + of_weights) * size, 0, 0])


def test_tensor_parallelism_sends_four_all_reduces_of_each_block(costs):
    """Megatron-LM: two forward, two backward; with recompute, two more forward."""
    way = costs("llama-2-7b").way("1f1b", Layout(2, 8, 1, 0, 8, 32))
    ring, activation, blocks, microbatches = 2 * 7 / 8, 2 * 4096 * 4096, 32, 16
    assert way.sent["none"][1:] == [4 * ring * activation * blocks * microbatches, 0]
    assert way.sent["layer"][1] == 1.5 * way.sent["none"][1]


@pytest.mark.parametrize("schedule", [*LIBRARY][1:])
def test_a_pipeline_sends_the_messages_that_are_simulated(costs, schedule):
    """Counted on the links. All layers send as much; a GPU in the middle sends most."""
    sizes = {"num_stages": 4, "num_microbatches": 8, "batch_size": 8, "num_batches": 1}
    sizes |= {"layers_per_stage": 2, "chunks_per_gpu": 2}
    plan = make_plan({**PLAN_CONFIG, **sizes, "schedule": schedule})
    messages = [0] * 4
    for (sender, _), link in plan.links.items():
        messages[sender] += len(link)
    name = "pipedream 2019" if schedule == "pipedream" else schedule
    way = costs(precision="fp32").way(name, Layout(2, 1, 4, 0, 8, 16))
    assert way.sent["none"][2] == max(messages) * 4 * (8 * ROWS // 16) * WIDTH


# ------------------------------------------------------------------------------- what it says


def test_the_headline_names_the_model_its_parameters_and_what_was_changed(run):
    out = run("fit", "llama-3-8b", "--layers", 4, "--sequence", 1024, "--gpus", 2).out
    parameters = 8_030_261_248 - 28 * (8_030_261_248 - 2 * 128_256 * 4096 - 4096) // 32
    assert out.startswith(f"llama-3-8b: {parameters:,} parameters, on 2 GPUs; bf16, adam,")
    assert "layers=4 instead of 32" in out
    assert "microbatches of 1 x 1,024 tokens" in out
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("model", PRESETS)
def test_every_preset_has_an_answer_in_80_columns(run, model):
    out = run("fit", model, "--gpus", 16, "--num_microbatches", 8).out
    assert max(map(len, out.splitlines())) <= 80
    assert len(re.findall("^Answer: ", out, re.M)) == 1
    assert len(table_of(out)) >= 6  # some need more microbatches, or layers


def test_pytorch_has_the_classes_that_are_named():
    for name, pytorch in fit.PYTORCH.items():
        assert pytorch == "-" or hasattr(schedules, f"Schedule{pytorch}"), name
    assert {name.split()[0] for name in fit.PYTORCH} == {*LIBRARY} - {"naive"}


def test_where_nothing_fits_it_says_what_would_do(run):
    out = run("fit", "--gpus", 1).out
    least, gpus = re.search(
        r"nothing fits. It takes (\S+) GB .* (\d+) GPUs would\s+do", out, re.S
    ).groups()
    assert float(least) == min(table_of(out)[NO_PIPELINE][2])
    assert "Answer: nothing fits" not in run("fit", "--gpus", gpus).out
    more = float(least) * 1e9 + 1e8
    assert "recompute per layer. GPU0" in run("fit", "--gpus", 1, "--memory", more).out
    assert "Not even 256\n   GPUs would do" in run("fit", "--gpus", 1, "--memory", 1e8).out
    out = run("fit", "--gpus", 2, "--replicas", 2).out  # these groups do not fit, others do
    assert "1 to 4 are skipped, as you gave the division: 2 replicas.\nAnswer: nothing fits." in out


def test_a_batch_that_replicas_cannot_share_is_told(run, mine):
    out = run("fit", mine(), "--gpus", 5).out
    assert "5. Which schedule?" in out  # five stages are possible
    out = " ".join(run("fit", mine(), "--gpus", 19).out.split())
    assert "No pipeline over all GPUs: 16 layers cannot be cut into 19 stages." in out
    assert "would do, but 32 microbatches are no multiple of 19 replicas" in out
    assert out.endswith("It would, with a multiple of 19 as num_microbatches.")


# ---------------------------------------------------------------------------- the reader's file


def test_a_file_with_a_loss_counts_it(run, mine):
    own = FILE + "\ndef my_loss(output, target):\n    return ((output - target) ** 2).sum()\n"
    plain, lossy = run("fit", mine(), "--gpus", 2), run("fit", mine(own, "lossy.py"), "--gpus", 2)
    assert "no loss is counted" in plain.out
    assert "no loss is counted" not in lossy.out
    assert f"{16 * WIDTH * WIDTH:,} parameters" in lossy.out


def test_what_is_tied_counts_once(run, mine):
    file = ROOT / "examples" / "my_model.py"
    spec = importlib.util.spec_from_file_location("example", file)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    network = nn.ModuleList(make() for make in example.LAYERS)
    network[-1][1].weight = network[0].token.weight
    each = sum(weight.numel() for weight in network.parameters())  # PyTorch counts it once
    assert f"{each:,} parameters" in run("fit", str(file), "--gpus", 2).out
    three = FILE + "TIED = [((9, 'weight'), (2, 'weight'), (4, 'weight'))]\n"
    assert f"{14 * WIDTH * WIDTH:,} parameters" in run("fit", mine(three), "--gpus", 2).out


def test_a_weight_that_two_stages_share_is_added_up_between_them(mine, tmp_path, monkeypatch):
    """An all-reduce among two sends its gradient once from each, in fp32."""
    monkeypatch.chdir(tmp_path)
    config = {**KEYS, "gpus": 2}
    layout, sent = fit.layout_of(config), []
    for text in (FILE, FILE + "TIED = [((0, 'weight'), (15, 'weight'))]\n"):
        costs = fit.Costs(config, mine(text))
        sent.append(costs.way("1f1b", layout).sent["none"])
    assert sent[1][2] - sent[0][2] == 4 * WIDTH * WIDTH
    inside = FILE + "TIED = [((0, 'weight'), (1, 'weight'))]\n"  # of one stage
    assert fit.Costs(config, mine(inside)).way("1f1b", layout).sent["none"][2] == sent[0][2]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (FILE + "TIED = [((0, 'weight'), (16, 'weight'))]\n", "TIED of .* names layer 16"),
        (FILE + "TIED = [((0, 'weight'), (3, 'bias'))]\n", "layer 3 cannot be made.*bias"),
        (FILE + "TIED = [((0, 'w'), (3, 'weight'))]\n", "layer 3 cannot be made.*w"),
        ("", "must have LAYERS"),
        ("LAYERS = 3\n", "must have LAYERS"),
        (FILE.replace("def my_batch", "def batch"), "must have LAYERS.*my_batch"),
        (FILE.replace("torch.zeros(", "[0] * len(range)  # "), "must have LAYERS"),
        (FILE + "my_batch = lambda number: ([1, 2], [3, 4], 2)\n", "must have LAYERS.*tensors"),
        (FILE + "LAYERS = LAYERS[0]\n", "must have LAYERS"),
        ("import nothing_like_it\n", "cannot be imported: ModuleNotFoundError"),
        ("import sys\nsys.exit(3)\n", "cannot be imported: SystemExit"),
        ("x = (\n", "cannot be imported: SyntaxError"),
        (FILE.replace("lambda: nn.Linear", "lambda: nn.Linea"), "layer 0 cannot be made"),
        (FILE.replace(f"nn.Linear({WIDTH},", "nn.Linear(3,"), "layer 0 .* does not run on"),
        (FILE.replace("bias=False)", "bias=False).forward"), "is no nn.Module"),
    ],
)
def test_a_file_that_cannot_be_measured_gets_one_line(run, mine, text, words):
    status, out, err = run("fit", mine(text), "--gpus", 2)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert re.search(words, err)
    assert "mine.py" in err or "layer" in err


@pytest.mark.parametrize(
    "flags",
    [
        *("nope", "none.json", "none.py", "--gpus 0", "--gpus 257", "--layers 0", "--machine 0"),
        *("--replicas 3", "--tensor 3", "--zero 1", "--zero 4 --replicas 2", "--gpus 64 --zero 3"),
        *("--replicas 8 --num_microbatches 12", "--gpus 96 --tensor 3", "--gpus 80 --replicas 2"),
        *(
            "--sequence -1",
            "--memory nan",
            "--precision fp8",
            "--optimizer lion",
            "--gradients fp8",
        ),
        *("--microbatch_size 0", "--num_microbatches 2000", "--even maybe", "--model llama-2-7b"),
        *("mine.py --layers 3", "mine.py --sequence 3", "mine.py --num_microbatches 7"),
        *("gpt2.json --sequence 4096", "list.json", "broken.json", "other.json", "deep.json"),
        *("--layers 2 --gpus 10 --even True --replicas 2", "--precision fp32 --gradients bf16"),
        "--sequence 10000000 --microbatch_size 10000000",
        *(f"--{key} None" for key in KEYS if key not in ("microbatch_size", "sequence", "layers")),
        "--gpus 9 --replicas 9 --zero 3 --num_microbatches 36",  # no equal groups inside a machine
    ],
)
def test_bad_input_gets_one_line(run, mine, tmp_path, flags):
    mine()
    gpt2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 100}
    (tmp_path / "gpt2.json").write_text(json.dumps(gpt2))
    (tmp_path / "other.json").write_text(json.dumps({**gpt2, "model_type": "rwkv"}))
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "deep.json").write_text('{"a":' * 100_000)
    status, out, err = run("fit", *flags.split())
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert len(err) < 400


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("gpus", None), ("gpus", True), ("gpus", 2.5), ("gpus", "8"), ("memory", float("nan"))),
        *(("sequence", -1), ("layers", 0), ("precision", None), ("nonsense", 1), ("even", 1)),
    ],
)
def test_python_is_refused_what_the_command_line_is(key, value):
    for check in (check_fit, fit.main):
        with pytest.raises(ValueError, match=key):
            check({**KEYS, key: value})
    for config in (None, [], "x"):
        with pytest.raises(ValueError, match="config must be"):
            check_fit(config)
    with pytest.raises(ValueError, match="gpus"):
        check_fit({k: v for k, v in KEYS.items() if k != "gpus"})
