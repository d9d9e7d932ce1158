"""Layers measured on shapes, against the CPU's allocator, PyTorch's graph, and counts by hand."""

import gc
import importlib
import warnings
from collections import Counter

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch._subclasses import fake_tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from pipedream.planning import measuring
from pipedream.planning.measuring import activations_in_stage, all_parameters, measure_layers
from pipedream_simple import UserError

VOCABULARY, WIDTH = 1000, 64
BF16, HALF = torch.bfloat16, 2  # bytes of a number


def block(dropout=0.1, norm_first=False):
    return nn.TransformerEncoderLayer(WIDTH, 4, 256, dropout, "gelu", 1e-5, True, norm_first)


class Loss(nn.Module):
    def forward(self, x):
        return F.cross_entropy(x.flatten(0, -2).float(), torch.arange(x[..., 0].numel()) % 10)


def perceptron():
    return nn.Sequential(nn.Linear(WIDTH, 256), nn.GELU(), nn.Linear(256, WIDTH))


def convolution():
    conv, norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
    return nn.Sequential(conv, norm, nn.ReLU(inplace=True), nn.MaxPool2d(2))


def normalized():
    return nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Tanh())


def embedding():
    return nn.Embedding(VOCABULARY, WIDTH)


def head():
    return nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY))


def head_with_loss():
    return nn.Sequential(*head(), Loss())


def hidden():
    return torch.randn(3, 16, WIDTH, requires_grad=True)


def tokens():
    return torch.randint(VOCABULARY, (3, 16))


def images():
    return torch.randn(4, 3, 16, 16, requires_grad=True)


# ------------------------------------------------------------- bytes, against real runs on the CPU


class Wrapped(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.what = what

    def forward(self, x):
        return self.what(x)


ROW = torch.ones(WIDTH)
KINDS = [
    (lambda: Wrapped(lambda x: x + ROW), hidden),
    *[(make, hidden) for make in (lambda: nn.Linear(WIDTH, 128), perceptron, normalized, block)],
    *[(make, hidden) for make in (lambda: block(0, True), head, head_with_loss, nn.ReLU)],
    *[(convolution, images), (embedding, tokens)],
]


def allocated(function):
    """What the CPU's allocator notes while a function runs: bytes more at its end, and at most."""
    gc.collect()  # now: what older tests leave would be noted as given back
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        function()
    events = trace.profiler.kineto_results.events()
    notes = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
    now, most = 0, 0
    for note in notes:
        now += note.nbytes()
        most = max(most, now)
    return now, most


def real_run(x, forward, weights):
    """Bytes after a forward, at its peak and at its backward's, as allocated. Without x.

    In the backward the output is gone, unless the graph has it, and a gradient for it is made.
    """
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    outputs = []
    after, forward_peak = allocated(lambda: outputs.append(forward(x.view_as(x))))
    ones = torch.ones_like(outputs[0])
    end = (outputs[0] * ones).sum()

    def backward():
        outputs.clear()
        end.backward()

    scalar = 4  # its own gradient
    return after, forward_peak, after + allocated(backward)[1] - scalar


@pytest.mark.parametrize(("make", "batch"), KINDS)
def test_bytes_are_those_that_the_allocator_notes_in_a_real_run(make, batch):
    (layer,) = measure_layers([make], batch, like_cuda=False)
    module, x = make(), batch()
    after, forward_peak, backward_peak = real_run(x, module, [*module.parameters()])
    assert layer.kept + layer.output == after
    beyond = forward_peak - layer.forward_peak, backward_peak - layer.backward_peak
    if make is convolution:  # kernels on the CPU have memory of their own for a moment
        assert min(beyond) >= 0
    else:
        assert beyond == (0, 0)
    assert (layer.input, layer.output) == (x.nbytes, module(x).nbytes)


@pytest.mark.parametrize(("make", "batch"), KINDS)
def test_what_is_kept_is_what_autograd_saves_in_a_real_run(make, batch):
    (layer,) = measure_layers([make], batch, like_cuda=False)
    module, x, saved = make(), batch(), {}

    def save(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(save, lambda tensor: tensor):
        y = module(x)
    for own in (*module.parameters(), *module.buffers()):
        saved.pop(own.data_ptr(), None)
    ends = [saved.pop(tensor.data_ptr(), 0) for tensor in (x, y)]
    assert [layer.input_kept, layer.output_kept, layer.kept] == [*ends, sum(saved.values())]


def flattened():
    return nn.Flatten(0, 1)


def in_place():
    return nn.ReLU(inplace=True)


NETWORKS = {
    "blocks": ([lambda: block(0, True)] * 3, hidden),
    "embedding": ([embedding, lambda: block(0, True), block], tokens),
    "head": ([block, lambda: block(0), head, Loss], hidden),
    "views": (
        [perceptron, nn.Tanh, flattened, nn.Identity, perceptron, nn.ReLU, flattened, head],
        lambda: torch.randn(2, 3, 16, WIDTH, requires_grad=True),
    ),
    "output": ([perceptron, nn.Tanh, block], hidden),
    "forward": (
        [perceptron, lambda: Wrapped(lambda x: x.tanh() + torch.stack([x.detach()] * 40).sum(0))],
        hidden,
    ),
    "in place": (
        [lambda: nn.BatchNorm2d(3), in_place, nn.Flatten, lambda: nn.Linear(768, 8), nn.Tanh],
        images,
    ),
}


@pytest.mark.parametrize("recompute", ["none", "layer", "stage"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_stage_holds_what_a_real_one_does_with_each_recompute(name, recompute):
    layers, batch = NETWORKS[name]
    if (name, recompute) == ("in place", "layer"):
        pytest.skip("a layer that runs again must not have overwritten its input")
    measured = measure_layers(layers, batch, like_cuda=False)
    stage = activations_in_stage(measured, recompute)
    network = nn.Sequential(*(make() for make in layers))
    runs = {"none": [], "layer": network, "stage": [network]}[recompute]
    again = {"use_reentrant": False, "preserve_rng_state": False}

    inputs = []

    def forward(x):
        inputs.append(x := x.clone())  # which a stage has been sent
        for run in runs:
            x = checkpoint(run, x, **again)
        return x if runs else network(x)

    with set_checkpoint_early_stop(False):
        after, *peaks = real_run(batch(), forward, [*network.parameters()])
    sent = 0 if measured[-1].output_kept and recompute == "none" else measured[-1].output
    assert stage.waiting == after - sent
    one_bias = 4 * WIDTH  # that checkpoint has freed earlier
    assert 0 <= stage.whole + stage.working - max(peaks) <= one_bias * bool(runs)


# -------------------------------------------------------------------- a GPU's bytes, against counts


class Decoder(nn.Module):
    """A layer of GPT (gated=False) or of Llama; flash=False: attention written out."""

    def __init__(self, width, heads, kv_heads=None, ffn=None, dropout=0.0, flash=True, gated=True):
        super().__init__()
        kv_heads, ffn, norm = kv_heads or heads, ffn or 4 * width, nn.LayerNorm
        self.head, self.dropout, self.flash = width // heads, dropout, flash
        self.norms = nn.ModuleList((nn.RMSNorm if gated else norm)(width) for _ in range(2))
        sizes = [width, *[self.head * kv_heads] * 2]
        self.qkv = nn.ModuleList(nn.Linear(width, size, not gated) for size in sizes)
        self.out = nn.Linear(width, width, not gated)
        self.gate = nn.Linear(width, ffn, False) if gated else None
        self.up, self.down = nn.Linear(width, ffn, not gated), nn.Linear(ffn, width, not gated)

    def attend(self, x):
        q, k, v = (f(x).unflatten(-1, (-1, self.head)).transpose(1, 2) for f in self.qkv)
        if self.flash:
            options = {"is_causal": True, "enable_gqa": q.shape[1] != k.shape[1]}
            parts = {"query": q, "key": k, "value": v, "dropout_p": self.dropout}
            return F.scaled_dot_product_attention(**parts, **options)
        return F.dropout((q @ k.mT).softmax(-1), self.dropout) @ v

    def forward(self, x):
        y = self.attend(self.norms[0](x)).transpose(1, 2).flatten(2)
        x = x + F.dropout(self.out(y), self.dropout)
        y = self.norms[1](x)
        y = F.silu(self.gate(y)) * self.up(y) if self.gate else F.gelu(self.up(y))
        return x + F.dropout(self.down(y), self.dropout)


LLAMA_3_8B = {"width": 4096, "heads": 32, "kv_heads": 8, "ffn": 14_336}


def sequence(length, width):
    return torch.empty(1, length, width, device="meta", requires_grad=True)


def measured(make, x, dtype=BF16, **options):
    (layer,) = measure_layers([make], x, dtype, **options)
    return layer


def per_token_and_width(layer, length, width):
    return (layer.kept + layer.input_kept + layer.output_kept) / (length * width)


@pytest.mark.parametrize("flash", [True, False])
def test_a_gpt_layer_keeps_what_korthikanti_counts(flash):
    """arXiv 2205.05198, section 4.1: s b h (34 + 5 a s / h) bytes, without attention 34 s b h."""
    length, width, heads = 1024, 2048, 16
    sizes = {"width": width, "heads": heads, "dropout": 0.1, "flash": flash, "gated": False}
    layer = measured(lambda: Decoder(**sizes), sequence(length, width))
    found, attention = per_token_and_width(layer, length, width), 5 * heads * length / width
    statistics = (4 * heads * flash + 4 * 4) / width  # of each row, left out there
    assert 0 < found - (34 if flash else 34 + attention) <= statistics + 1e-4


NORMS = {  # options -> bytes that each of two norms keeps per number
    (): 2,  # its input
    (("fused_norms", False),): 4 + 2,  # that in fp32, and what is multiplied with its weight
    (("like_cuda", False),): 4 + 4,  # both in fp32
}


@pytest.mark.parametrize("options", NORMS)
def test_a_layer_of_llama_keeps_41_bytes_or_49_or_53(options):
    length, width, heads, kv_heads, ffn = 4096, *LLAMA_3_8B.values()
    layer = measured(lambda: Decoder(**LLAMA_3_8B), sequence(length, width), **dict(options))
    # Outputs of norms, queries, attention; keys and values; gate, its SiLU, up, their product.
    numbers = 4 * width + 2 * width * kv_heads // heads + 4 * ffn
    counted = HALF * numbers + 2 * NORMS[options] * width + 4 * heads  # and a sum per row and head
    found = per_token_and_width(layer, length, width)
    assert 0 <= found * width - counted <= 2 * 4 + 0.1  # a number per row and norm
    assert f"{found:.2f}" == {2: "41.03", 6: "49.03", 8: "53.03"}[NORMS[options]]
    assert layer.parameters == 218_112_000  # of 8,030,261,248, with 32 layers and 2 * 525,336,576


def test_the_head_of_llama_keeps_its_logits_in_fp32_and_peaks_at_three_of_them():
    rows = measure_layers([lambda: nn.Linear(4096, 128_256), Loss], sequence(4096, 4096), BF16)
    logits = 4 * 4096 * 128_256
    stage = activations_in_stage(rows[1:])
    assert rows[1].kept - logits == pytest.approx(0, abs=8 * 4096 + 4)
    assert stage.whole + stage.working - rows[1].input == pytest.approx(3 * logits, rel=1e-4)
    assert round(rows[1].backward_peak / 1e9, 1) == 6.3


class Attention(nn.Module):
    """Nothing but attention, of queries, keys and values that are parts of its input."""

    def __init__(self, kv_heads=4, width=16, value=None, **options):
        super().__init__()
        self.sizes, self.options = [(4, width)] + [(kv_heads, width)] * 2, options
        self.sizes[2] = kv_heads, value or width
        self.options["enable_gqa"] = kv_heads < 4

    def forward(self, x):  # (sequences, tokens, any width)
        parts = (x[..., :1].expand(*x.shape[:-1], heads * d) for heads, d in self.sizes)
        shapes = zip(parts, self.sizes, strict=True)
        q, k, v = ((part * 1).unflatten(-1, size).transpose(1, 2) for part, size in shapes)
        return F.scaled_dot_product_attention(q, k, v, **self.options)


MASK, TOKENS = torch.ones(256, 256, dtype=torch.bool), 2 * 256  # in two sequences


@pytest.mark.parametrize(
    ("options", "dtype", "numbers", "more"),
    [
        ({"is_causal": True}, BF16, 4 * 64, 0),
        ({"is_causal": True, "dropout_p": 0.1}, BF16, 4 * 64, 0),
        ({"kv_heads": 2, "is_causal": True}, BF16, 3 * 64, 0),
        ({"value": 32}, BF16, 3 * 128, 0),
        ({"width": 12}, BF16, 4 * 64, 0),  # filled up to a multiple of 8
        ({"attn_mask": MASK}, BF16, 4 * 64, HALF * MASK.numel()),
        ({"is_causal": True}, torch.float32, 4 * 64, 0),
        ({"dropout_p": 0.1}, torch.float32, 4 * 64, 0),
    ],
    ids=str,
)
def test_attention_on_a_gpu_keeps_no_matrix_of_scores(options, dtype, numbers, more):
    """Queries, keys, values, result; a sum per row and head; the mask as numbers; a seed."""
    x = sequence(TOKENS // 2, 8).expand(2, -1, -1)
    layer = measured(lambda: Attention(**options), x, dtype)
    counted = dtype.itemsize * TOKENS * numbers + 4 * TOKENS * 4 + more
    assert 0 <= layer.kept + layer.output_kept - counted <= 64
    width = options.get("value", options.get("width", 16))
    assert layer.output == dtype.itemsize * TOKENS * 4 * width


@pytest.mark.parametrize(
    ("make", "dtype", "heads"),
    [  # fewer heads of keys in fp32, or wide ones; an odd width; three dimensions
        (lambda: Attention(2, is_causal=True), torch.float32, 4),
        (lambda: Attention(2, width=512, is_causal=True), BF16, 4),
        (lambda: Attention(value=18), torch.float32, 4),
        (lambda: Wrapped(lambda x: F.scaled_dot_product_attention(x * 1, x * 2, x)), BF16, 1),
    ],
)
def test_attention_on_a_gpu_keeps_the_scores_where_no_kernel_fits(make, dtype, heads):
    length = 4096
    assert measured(make, sequence(length, 8), dtype).kept > dtype.itemsize * heads * length**2


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_layer_of_pytorch_keeps_masks_of_bools_on_a_gpu_and_no_scores(dropout):
    """nn.TransformerEncoderLayer, whose attention is hidden in nn.MultiheadAttention."""
    length, width = 512, 64
    layer = measured(
        lambda: block(dropout, norm_first=True), sequence(length, width), torch.float32
    )
    # Outputs of norms, queries, keys, values, attention, a sum; the MLP's two, four widths each.
    numbers, per_row, masks = 2 + 3 + 1 + 1 + 8, 4 * 4 + 2 * 2 * 4, 1 + 4 + 1
    counted = length * (width * (4 * numbers + masks * bool(dropout)) + per_row)
    assert 0 <= layer.kept - counted <= 64
    on_cpu = measured(lambda: block(dropout), sequence(length, width), like_cuda=False)
    assert (on_cpu.kept > 2 * HALF * 4 * length**2) == bool(dropout)  # scores, and their dropout


# ----------------------------------------------------------------------------- FLOPs, by hand


def test_flops_are_two_per_token_and_weight_in_each_of_three_products():
    rows = measure_layers([perceptron, nn.GELU, perceptron], hidden().detach())
    once = 2 * 48 * 2 * WIDTH * 256
    first_gets_no_gradient = once // 2  # to its input; its second matrix does
    assert [row[-3:] for row in rows] == [
        (once, 0, once + first_gets_no_gradient),
        (0, 0, 0),
        (once, once, once),
    ]


@pytest.mark.parametrize("like_cuda", [True, False])
@pytest.mark.parametrize("flash", [True, False])
def test_flops_of_attention_are_two_products_of_tokens_by_tokens_and_five_or_four_back(
    flash, like_cuda
):
    """Its backward belongs to I. A fused one computes the scores a second time."""
    length, width = 256, 128
    sizes = {"width": width, "heads": 4, "kv_heads": 2, "ffn": 384, "flash": flash}
    sizes |= {} if flash else {"kv_heads": 4}
    layer = measured(lambda: Decoder(**sizes), sequence(length, width), like_cuda=like_cuda)
    matrices = width * width * (2 + 2 * sizes["kv_heads"] // 4) + 3 * width * 384
    product, weights = 2 * length * length * width, 2 * length * matrices
    assert layer.forward_flops == weights + 2 * product
    assert layer.input_flops == weights + (5 if flash else 4) * product
    assert layer.weight_flops == weights


def test_flops_of_a_convolution_an_embedding_and_a_frozen_layer():
    conv, looked_up = measured(convolution, images), measured(embedding, tokens)
    assert conv[-3:] == (2 * 4 * 16 * 16 * 8 * 3 * 9,) * 3
    assert looked_up[-3:] == (0, 0, 0)
    frozen = measured(lambda: perceptron().requires_grad_(False), hidden)
    assert frozen.weight_flops == 0 < frozen.input_flops == frozen.forward_flops


# ---------------------------------------------------------------------- parameters, made and tied


def test_tied_weights_count_once_in_all():
    made = []

    def first():
        made.append(embedding())
        return made[0]

    def last():
        layer = nn.Linear(WIDTH, VOCABULARY)
        layer.weight = made[0].weight
        return layer

    rows = measure_layers([first, perceptron, last], tokens)
    assert [row.tied for row in rows] == [0, 0, VOCABULARY * WIDTH]
    assert rows[2].parameters == VOCABULARY * WIDTH + VOCABULARY
    parts = nn.ModuleList([embedding(), perceptron(), nn.Linear(WIDTH, VOCABULARY)])
    parts[2].weight = parts[0].weight
    assert all_parameters(rows) == sum(p.numel() for p in parts.parameters())


@pytest.mark.parametrize("shared", [True, False])
def test_a_layer_that_comes_again_runs_once_and_has_new_weights_unless_it_is_the_same(shared):
    calls, module = Counter(), perceptron()
    module.register_forward_hook(lambda *_: calls.update(["forward"]))

    def make():
        calls.update(["made"])
        layer = module if shared else perceptron()
        if not shared:
            layer.register_forward_hook(lambda *_: calls.update(["forward"]))
        return layer

    rows = measure_layers([make] * 5, hidden)
    assert calls == {"made": 5 if shared else 1, "forward": 1}
    assert {row._replace(tied=0, tied_to=-1) for row in rows} == {rows[0]}
    size = sum(p.numel() for p in module.parameters())
    assert all_parameters(rows) == size * (1 if shared else 5)
    # On an input of another shape, or on one that needs no gradient, it runs again.
    calls.clear()
    first = Wrapped(lambda x: x[:1])
    rows = measure_layers([make, lambda: first, make], hidden)
    assert rows[2].input * 3 == rows[0].input
    measure_layers([make, make], hidden().detach())
    assert calls["forward"] == 4


def test_weights_that_are_parts_of_one_tensor_are_not_the_same():
    tensor = torch.randn(3, WIDTH)

    class Parts(nn.Module):
        def __init__(self, *parts):
            super().__init__()
            self.a, self.b = (nn.Parameter(tensor[part]) for part in parts)

        def forward(self, x):
            return x * self.a + self.b

    rows = measure_layers([lambda: Parts(0, 1), lambda: Parts(1, 2)], hidden)
    assert [(row.parameters, row.tied) for row in rows] == [(2 * WIDTH, 0), (2 * WIDTH, WIDTH)]


def test_a_layer_of_terabytes_takes_no_memory_even_if_it_fails():
    size, x = 10**6, torch.empty(1, 10**6)
    layer = measured(lambda: nn.Linear(size, size, bias=False), x)
    assert (layer.parameters, layer.weight_flops) == (size**2, 2 * size**2)
    with pytest.raises(UserError, match="must have same reduction dim"):
        measured(lambda: nn.Linear(size + 1, size), x)


class NeedsValues(nn.Linear):
    """Can be made on a real device only."""

    def __init__(self, drop=0.5):
        super().__init__(WIDTH, WIDTH)
        self.rates = torch.linspace(0, drop, 3).tolist()


@pytest.mark.parametrize(
    "make",
    [
        lambda: perceptron().to(BF16),
        lambda: perceptron().bfloat16(),
        lambda: nn.Sequential(NeedsValues(), NeedsValues()),
        lambda: nn.init.trunc_normal_(nn.Linear(WIDTH, WIDTH).weight) is None or perceptron(),
        lambda: nn.Linear(WIDTH, WIDTH, device="cpu"),
    ],
)
def test_layers_that_convert_or_look_at_their_weights_while_they_are_made_can_be_measured(make):
    layer = measured(make, hidden)
    assert layer.parameters == sum(p.numel() for p in make().parameters())
    assert layer.output == HALF * 48 * WIDTH


def test_measuring_changes_nothing_and_shows_no_warning(capfd):
    module, x = perceptron(), hidden()
    before, seed = [p.clone() for p in module.parameters()], torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn = Wrapped(lambda x: warnings.warn("x", stacklevel=1) or x)
        measure_layers([lambda: module, NeedsValues, lambda: warn], x)
    with pytest.raises(UserError):
        measure_layers([lambda: nn.Linear(3, 3)], x, BF16)
    assert torch.equal(seed, torch.get_rng_state())
    assert torch.get_default_dtype() == torch.float32
    assert x.grad is None
    for now, then in zip(module.parameters(), before, strict=True):
        assert type(now) is nn.Parameter
        assert torch.equal(now, then)
        assert now.grad is None
    assert capfd.readouterr() == ("", "")


# ------------------------------------------------------------------------------------- mistakes


def on(device):
    with fake_tensor.FakeTensorMode():
        weight = torch.empty(3, device=device)
    layer = nn.Identity()
    layer.register_buffer("weight", weight)
    return layer


MISTAKES = {
    "(Wrapped) looks at values": lambda: Wrapped(lambda x: x * x.sum().item()),
    "(Wrapped) looks at values ": lambda: Wrapped(lambda x: x[x > 0]),
    "(Wrapped) looks at values  ": lambda: Wrapped(lambda x: x if x.any() else -x),
    "(Wrapped) returns a tuple": lambda: Wrapped(lambda x: (x, x)),
    "(Wrapped) returns a NoneType": lambda: Wrapped(lambda x: None),
    "(Linear) does not run on (3, 16, 64) of float32": lambda: nn.Linear(7, 8),
    "(Linear) does not run on (3, 16, 64) of float32: TypeError": lambda: nn.Linear(64, 8).to(BF16),
    "cannot be made: ZeroDivisionError: ": lambda: nn.Linear(1 // 0, 1),
    "(str) is no nn.Module": lambda: "Linear",
    "(Wrapped) does not run on (3, 16, 64) of float32: AssertionError: 1": lambda: Wrapped(
        lambda x: (_ for _ in ()).throw(AssertionError("1" * 900 + "\n2"))
    ),
    "is a module": nn.Identity(),
    "cannot be made: TypeError: 'int' object is not callable": 3,
    "(Identity) is on cuda:0: make it on the CPU": lambda: on("cuda"),
    "(Wrapped) ": lambda: Wrapped(lambda x: x.to("cuda")),
    "(Wrapped) puts a tensor on cuda": lambda: Wrapped(lambda x: x + torch.ones(64, device="cuda")),
    "(LSTM) has a LSTM, whose products": lambda: nn.LSTM(64, 64),
    "(Sequential) has a GRU, whose products": lambda: nn.Sequential(nn.GRU(64, 64)),
    "(Bilinear) has a Bilinear, whose products": lambda: nn.Bilinear(64, 64, 64),
    "(Wrapped) calls test.own.default, whose products": lambda: Wrapped(lambda x: own(x)),
}


@torch.library.custom_op("test::own", mutates_args=())
def own(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


own.register_fake(torch.empty_like)


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_is_told_in_one_line(message, capfd, caplog):
    with pytest.raises(UserError) as error:
        measure_layers([nn.Identity, MISTAKES[message]], hidden)
    text = str(error.value)
    assert text.startswith(f"layer 1 {message.strip()}")
    assert "\n" not in text
    assert len(text) <= 300
    assert not caplog.records
    if message.endswith("(3, 16, 64) of float32"):
        assert "[7, 8]" in text  # what it takes
    if "products" in message or "values" in message:
        assert text.endswith("measure it with python -m pipedream profile")
    assert capfd.readouterr() == ("", "")


def test_the_first_input_is_one_tensor():
    with pytest.raises(UserError, match=r"^the first layer gets a tuple; it takes one tensor$"):
        measure_layers([nn.Identity], lambda: (hidden(), 3))


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (fake_tensor, "FakeTensorMode"),
        (fake_tensor, "DynamicOutputShapeException"),
        (torch.utils.flop_counter, "flop_registry"),
    ],
)
def test_a_torch_that_has_renamed_what_is_private_is_told_in_one_line(module, name, monkeypatch):
    monkeypatch.delattr(module, name)
    try:
        importlib.reload(measuring)
        with pytest.raises(
            UserError, match=rf"torch 2\..* cannot measure \(.*{name}.*\): take 2.13"
        ):
            measuring.measure_layers([nn.Identity], hidden())
    finally:
        monkeypatch.undo()
        importlib.reload(measuring)
