"""What layers do public models have? Published counts, closed forms, and layers that run."""

import math
import random
from functools import partial

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import cross_entropy, gelu, relu, silu
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.utils.flop_counter import FlopCounterMode

from pipedream.planning.families import FAMILIES, PRESETS, Experts, attend, read_model
from pipedream_simple import UserError

COLUMNS = {  # blocks, hidden size, heads, heads of keys, MLP, vocabulary: as the family spells them
    "gpt2": "n_layer n_embd n_head - n_inner vocab_size",
    "opt": "num_hidden_layers hidden_size num_attention_heads - ffn_dim vocab_size",
    "bloom": "n_layer n_embed n_head - - vocab_size",
    "falcon": "num_hidden_layers hidden_size num_attention_heads num_kv_heads ffn_hidden_size "
    "vocab_size",
}
LLAMA = "num_hidden_layers hidden_size num_attention_heads num_key_value_heads intermediate_size "


def config_of(kind, *sizes, **more):
    names = COLUMNS.get(kind, LLAMA + "vocab_size").split()
    found = {name: size for name, size in zip(names, sizes, strict=True) if name != "-"}
    return {"model_type": kind, **found, **more}


TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
OLD = {"alibi": True, "bias": True, "multi_query": False, "parallel_attn": False}
DEEPSEEK = {
    **{"q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64},
    **{"v_head_dim": 128, "n_routed_experts": 256, "num_experts_per_tok": 8},
    **{"moe_intermediate_size": 2048, "n_shared_experts": 1, "first_k_dense_replace": 3},
}
QWEN3 = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
PUBLISHED = {  # each model's own config.json, and its parameters, tied ones once
    # ../shared/data/models.json
    "gpt2": (124_439_808, "gpt2", 12, 768, 12, 0, None, 50_257, {}),
    "bloom-7b1": (7_069_016_064, "bloom", 30, 4096, 32, 0, 0, 250_880, {}),
    "llama-2-7b": (6_738_415_616, "llama", 32, 4096, 32, 32, 11_008, 32_000, {}),
    "llama-2-13b": (13_015_864_320, "llama", 40, 5120, 40, 40, 13_824, 32_000, {}),
    "llama-2-70b": (68_976_648_192, "llama", 80, 8192, 64, 8, 28_672, 32_000, {}),
    "llama-3-8b": (8_030_261_248, "llama", 32, 4096, 32, 8, 14_336, 128_256, {}),
    "llama-3-70b": (70_553_706_496, "llama", 80, 8192, 64, 8, 28_672, 128_256, {}),
    "llama-3.2-1b": (1_235_814_400, "llama", 16, 2048, 32, 8, 8192, 128_256, TIED),
    "mistral-7b": (7_241_732_096, "mistral", 32, 4096, 32, 8, 14_336, 32_000, {}),
    "mixtral-8x7b": (46_702_792_704, "mixtral", 32, 4096, 32, 8, 14_336, 32_000, {}),
    "qwen2-7b": (7_615_616_512, "qwen2", 28, 3584, 28, 4, 18_944, 152_064, {}),
    "qwen3-8b": (8_190_735_360, "qwen3", 36, 4096, 32, 8, 12_288, 151_936, {}),
    "qwen3-0.6b": (596_049_920, "qwen3", 28, 1024, 16, 8, 3072, 151_936, TIED),
    "gemma-7b": (8_537_680_896, "gemma", 28, 3072, 16, 16, 24_576, 256_000, {}),
    "phi-3-mini": (3_821_079_552, "phi3", 32, 3072, 32, 32, 8192, 32_064, {}),
    # KerasHub's presets, keras_hub/src/models/*/*_presets.py
    "gpt2-xl": (1_557_611_200, "gpt2", 48, 1600, 25, 0, None, 50_257, {}),
    "bloom-560m": (559_214_592, "bloom", 24, 1024, 16, 0, 0, 250_880, {}),
    "falcon-rw-1b": (1_311_625_216, "falcon", 24, 2048, 32, None, None, 50_304, OLD),
    "gemma-2b": (2_506_172_416, "gemma", 18, 2048, 8, 1, 16_384, 256_000, {}),
    "gemma-2-2b": (2_614_341_888, "gemma2", 26, 2304, 8, 4, 9216, 256_000, {}),
    "gemma-2-9b": (9_241_705_984, "gemma2", 42, 3584, 16, 8, 14_336, 256_000, {}),
    "gemma-2-27b": (27_227_128_320, "gemma2", 46, 4608, 32, 16, 36_864, 256_000, {"head_dim": 128}),
    "qwen2.5-0.5b": (494_032_768, "qwen2", 24, 896, 14, 2, 4864, 151_936, TIED),
    "qwen3-4b": (4_022_468_096, "qwen3", 36, 2560, 32, 8, 9728, 151_936, TIED),
    # the safetensors metadata of the models' pages on Hugging Face
    "mistral-nemo": (
        *(12_247_782_400, "mistral", 40, 5120, 32, 8, 14_336, 131_072),
        {"head_dim": 128},
    ),
    "phi-4": (14_659_507_200, "phi3", 40, 5120, 40, 10, 17_920, 100_352, {}),
    "phi-4-mini": (3_836_021_760, "phi3", 32, 3072, 24, 8, 8192, 200_064, TIED),
    "qwen2.5-72b": (72_706_203_648, "qwen2", 80, 8192, 64, 8, 29_568, 152_064, {}),
    "qwen3-30b-a3b": (
        *(30_532_122_624, "qwen3_moe", 48, 2048, 32, 4, 6144, 151_936),
        QWEN3 | {"head_dim": 128},
    ),
    "qwen3-235b-a22b": (
        *(235_093_634_560, "qwen3_moe", 94, 4096, 64, 4, 12_288, 151_936),
        QWEN3 | {"moe_intermediate_size": 1536, "head_dim": 128},
    ),
    "falcon-7b": (  # it counts the head apart, though it is tied
        *(7_217_189_760 - 65_024 * 4544, "falcon", 32, 4544, 71, None, None, 65_024),
        {"new_decoder_architecture": False},
    ),
    # the model card of BLOOM
    "bloom": (176_247_271_424, "bloom", 70, 14_336, 112, 0, 0, 250_880, {}),
    # 671,026,419,200 with the correction of 256 scores in 58 routers, which no gradient changes
    "deepseek-v3": (
        *(671_026_419_200 - 58 * 256, "deepseek_v3", 61, 7168, 128, 128, 18_432, 129_280),
        DEEPSEEK,
    ),
}


def config_published(name):
    _, kind, *sizes, more = PUBLISHED[name]
    return config_of(kind, *sizes, **more)


def on_meta(model):
    """The layers, with shapes and without memory; a function that comes again is called once."""
    with torch.device("meta"):
        made = {make: make() for make in dict.fromkeys(model.layers)}
    return [made[make] for make in model.layers]


def count(model):
    """All parameters, those of a block as often as it comes, and a tied matrix once."""
    head, *rest = reversed(on_meta(model))
    known = {id(p) for p in rest[-1].parameters()}
    head = sum(p.numel() for p in head.parameters() if id(p) not in known)
    return head + sum(p.numel() for layer in rest for p in layer.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_of_the_published_models(name):
    assert count(read_model(config_published(name))) == PUBLISHED[name][0]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_published_models(name):
    assert count(read_model(PRESETS[name])) == PUBLISHED[name][0]
    assert 1e9 < PUBLISHED[name][0] < 71e9


# ----------------------------------------------------------------- closed forms, at random sizes


def closed_form(c, blocks, h, heads, kv, f, vocabulary):
    """Parameters, from the papers. h: hidden size, f: the MLP's, d: a head's (h / heads, here)."""
    kind, d = c["model_type"], h // heads
    if kind in ("gpt2", "opt", "bloom", "falcon"):  # LayerNorms, an MLP of two matrices
        f, k, bias, norms = f or 4 * h, h, c.get("enable_bias", c.get("bias", True)), 2
        places = {"gpt2": c.get("n_positions"), "opt": c.get("max_position_embeddings", 0) + 2}
        first = 2 * h if kind == "bloom" else places.get(kind, 0) * h
        if kind == "falcon":
            newer = c["new_decoder_architecture"]
            k = kv * d if newer else d if c["multi_query"] else h
            if newer or c["parallel_attn"]:
                norms = c.get("num_ln_in_parallel_attn", 2 if newer else 1)
        block = h * (h + 2 * k) + h * h + 2 * h * f + 2 * h * norms + bias * (3 * h + 2 * k + f)
        return vocabulary * h + first + blocks * block + 2 * h
    q, k, bias = heads * d, kv * d, c.get("attention_bias", False)
    attention = h * (q + 2 * k) + q * h + bias * (q + 2 * k + h)
    if kind == "deepseek_v3":
        r, s, plain, rotated, v = (c[key] for key in list(DEEPSEEK)[:5])
        queries = h * r + r + r * heads * (plain + rotated) if r else h * heads * (plain + rotated)
        attention = queries + h * (s + rotated) + s + s * heads * (plain + v) + heads * v * h
        attention += bias * ((r or 0) + s + rotated + h)
    attention += {"qwen2": q + 2 * k, "qwen3": 2 * d, "qwen3_moe": 2 * d}.get(kind, 0)
    dense, sparse, first = 3 * h * f + c.get("mlp_bias", False) * (2 * f + h), 0, blocks
    if "num_experts_per_tok" in c:
        number = c.get("num_local_experts") or c.get("num_experts") or c.get("n_routed_experts")
        each = 3 * h * c.get("moe_intermediate_size", f)
        sparse = number * (each + h) + c.get("n_shared_experts", 0) * each
        first = min(blocks, c.get("first_k_dense_replace", 0))
    norms = (4 if kind == "gemma2" else 2) * h
    mlps = first * dense + (blocks - first) * sparse
    ends = (1 if c["tie_word_embeddings"] else 2) * vocabulary * h + h
    return ends + blocks * (attention + norms) + mlps


def small(kind, draw):
    """A small config of the family, and the sizes that closed_form needs."""

    def any_of(**switches):
        return {key: draw.choice(values) for key, values in switches.items()}

    both, kv, width = [True, False], draw.choice([1, 2, 3]), draw.choice([4, 8])
    heads = kv * draw.choice([1, 2, 4])
    sizes = [draw.randint(1, 5), heads * width, heads, kv, draw.choice([20, 36]), 97]
    more = any_of(tie_word_embeddings=both) | {"head_dim": width}
    if kind in ("llama", "qwen3", "qwen3_moe", "gemma", "gemma2", "deepseek_v3"):
        more |= any_of(attention_bias=both)
    if kind == "llama":
        more |= any_of(mlp_bias=both)
    if kind == "gpt2":
        more = {"n_positions": 64}
    if kind == "opt":
        more = any_of(enable_bias=both) | {"max_position_embeddings": 64}
    if kind == "bloom":
        more, sizes[4] = {}, 0
    if kind == "falcon":
        more = any_of(
            new_decoder_architecture=both, multi_query=both, parallel_attn=both, bias=both
        )
        if more["new_decoder_architecture"] and draw.choice(both):
            more |= any_of(num_ln_in_parallel_attn=[1, 2])
    if kind == "mixtral":
        more |= {"num_local_experts": 4, "num_experts_per_tok": 2}
    if kind == "qwen3_moe":
        more |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
    if kind == "deepseek_v3":
        del more["head_dim"]
        sizes[1:4] = heads * width + 1, heads, heads
        more |= any_of(q_lora_rank=[10, None], n_shared_experts=[1, 2])
        more |= dict(zip(list(DEEPSEEK)[1:8], [12, 6, 4, 8, 4, 2, 12], strict=True))
        more |= any_of(first_k_dense_replace=[0, 1, 9])
    return config_of(kind, *sizes, **more), sizes


@pytest.mark.parametrize("kind", FAMILIES)
def test_parameters_of_any_size_are_the_closed_form(kind):
    draw = random.Random(kind)
    for _ in range(20):
        config, sizes = small(kind, draw)
        assert count(read_model(config, 16)) == closed_form(config, *sizes), config


def matrices(layer, share):
    """Numbers in the matrices that a token is multiplied with; share: of the experts."""
    return sum(
        round(p.numel() * (share if p.dim() == 3 else 1)) for p in layer.parameters() if p.dim() > 1
    )


ACTIVE = {"mixtral-8x7b": 13, "qwen3-30b-a3b": 3, "qwen3-235b-a22b": 22, "deepseek-v3": 37}


@pytest.mark.parametrize("name", ["gpt2", "falcon-7b", "gemma-2-9b", "qwen2-7b", *ACTIVE])
def test_products_are_those_of_the_matrices_that_a_token_meets(name):
    """And of attention: each query with each key, each score with each value."""
    config, tokens = config_published(name), 64
    model = read_model(config, tokens)
    layers, x = on_meta(model), torch.zeros(1, tokens, dtype=torch.int64, device="meta")
    number = config.get("n_routed_experts") or config.get("num_experts") or 8
    share, done, active = config.get("num_experts_per_tok", 2) / number, {}, 0
    for layer in layers:
        if layer not in done:
            with FlopCounterMode(display=False) as counter:
                x = layer(x)
            needed = 0 if layer is layers[0] else matrices(layer, share)
            done[layer] = needed
            attention = 0
            if layer not in (layers[0], layers[-1]):
                heads, part = model.layers[1].args[0].heads, layer.attention
                widths = 2 * part.width if hasattr(part, "width") else 128 + 64 + 128
                attention = 2 * tokens * tokens * heads * widths
            assert counter.get_total_flops() == 2 * tokens * needed + attention
        active += done[layer]
    if name in ACTIVE:  # the names of the models, and arXiv 2401.04088 and 2412.19437, in billions
        assert round(active / 1e9) == ACTIVE[name]


# ------------------------------------------------------------------------------ layers that run


@pytest.mark.parametrize("kind", FAMILIES)
def test_layers_run_forward_and_backward(kind):
    """On values, and on shapes without values; every parameter gets a gradient."""
    draw, tokens = random.Random(kind), 12
    torch.manual_seed(1)
    for _ in range(4):
        config, (_, hidden, *_, vocabulary) = small(kind, draw)
        model = read_model(config, tokens)
        ids = torch.randint(vocabulary, (2, tokens))
        for x, layers in (
            (ids, [make() for make in model.layers]),
            (ids.to("meta"), on_meta(model)),
        ):
            for layer in layers:
                x = layer(x)
                assert x.shape == (2, tokens, vocabulary if layer is layers[-1] else hidden)
            cross_entropy(x.flatten(0, 1), ids.flatten().to(x.device)).backward()
            for layer in layers:
                for name, parameter in layer.named_parameters():
                    assert parameter.grad is not None, name
                    if not x.is_meta:
                        assert parameter.grad.isfinite().all(), name
                        assert parameter.dim() == 1 or parameter.grad.any(), name


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_block_of_zeros_passes_its_input_on(kind):
    config, (_, hidden, *_) = small(kind, random.Random(kind))
    block, x = read_model(config, 8).layers[1](), torch.randn(1, 8, hidden)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
    assert torch.equal(block(x), x)


@pytest.mark.parametrize("kind", FAMILIES)
def test_no_token_sees_a_later_one(kind):
    config, _ = small(kind, random.Random(kind))
    layers = [make().eval() for make in read_model(config, 8).layers]
    ids = torch.arange(16).view(2, 8)
    changed = ids.clone()
    changed[:, 5] = 90
    x, y = ids, changed
    for layer in layers:
        x, y = layer(x), layer(y)
    assert torch.allclose(x[:, :5], y[:, :5], atol=1e-6)
    assert not torch.allclose(x[:, 5], y[:, 5], atol=1e-6)


def test_attention_is_a_softmax_over_the_tokens_before():
    q, k, v = (torch.randn(2, 5, heads, 4) for heads in (6, 2, 2))
    found = attend(q, k, v, 0.0)
    for head in range(6):
        scores = q[:, :, head] @ k[:, :, head // 3].mT / math.sqrt(4)
        scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
        expected = scores.softmax(-1) @ v[:, :, head // 3]
        assert torch.allclose(found[..., 4 * head : 4 * head + 4], expected, atol=1e-6)


@pytest.mark.parametrize("tokens", [8, 5, 1])
def test_each_token_goes_to_as_many_experts_as_it_should(tokens):
    """Compared with a loop over tokens. 5 of them, or 1, do not divide among 4 experts."""
    config, _ = small("mixtral", random.Random(1))
    sizes = read_model(config, 8).layers[1].args[0]
    experts, x = Experts(sizes), torch.randn(1, tokens, sizes.hidden)
    rows, each = 2 * tokens, math.ceil(2 * tokens / 4)
    scores = experts.router(x).softmax(-1).topk(2)[0]
    expected = torch.zeros_like(x)
    for row in range(rows):
        token, expert, rank = row % tokens, row // each, row // tokens
        gate, up = (x[0, token] @ w[expert] for w in (experts.gate, experts.up))
        expected[0, token] += scores[0, token, rank] * (silu(gate) * up @ experts.down[expert])
    assert torch.allclose(experts(x), expected, atol=1e-6)


def kept_by(compute):
    """The storages that autograd keeps, and their bytes."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = compute()
    return kept, y  # the graph keeps the storages


def test_rotary_positions_keep_nothing_but_one_table():
    """They are left out: attention keeps the rotated queries and keys in place of the others."""
    tokens, heads, width = 16, 2, 8
    x, weights = torch.randn(1, tokens, 16), [torch.randn(16, 16) for _ in "qkv"]
    angles = torch.arange(tokens)[:, None] * torch.rand(width // 2).repeat(2)
    cos, sin = angles.cos(), angles.sin()

    def run(rotary):
        def rotated(y):
            half = torch.cat([-y[..., width // 2 :], y[..., : width // 2]], -1)
            return y * cos + half * sin if rotary else y

        weights_now = [w.requires_grad_() for w in weights]
        q, k, v = ((x @ w).unflatten(-1, (heads, width)).transpose(1, 2) for w in weights_now)
        return sdpa(rotated(q), rotated(k), v, is_causal=True)

    (plain, _), (rotary, _) = kept_by(lambda: run(False)), kept_by(lambda: run(True))
    table = sum(rotary.pop(each.untyped_storage().data_ptr()) for each in (cos, sin))
    assert table == 2 * tokens * width * 4
    assert sum(rotary.values()) == sum(plain.values())


def test_dropout_is_the_configs():
    """A mask after attention, after the MLP and after the embedding; in training alone."""
    for rate, changes in ((0.1, True), (0.0, False)):
        rates = dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), rate)
        config = config_of("gpt2", 1, 16, 2, 0, None, 97, n_positions=8, **rates)
        ids = torch.arange(8).view(1, 8)
        embedding, block, _ = (make() for make in read_model(config).layers)
        x = embedding(ids).detach()
        assert torch.equal(embedding(ids), embedding(ids)) != changes
        assert torch.equal(block(x), block(x)) != changes
        assert torch.equal(block.attention(x), block.attention(x)) != changes
        block.eval()
        assert torch.equal(block(x), block(x))
    absent = config_of("gpt2", 1, 16, 2, 0, None, 97)  # Hugging Face's default is 0.1, GPT-2's
    assert [make() for make in read_model(absent).layers][1].dropout.p == 0.1


def test_activations_are_those_of_the_papers_or_the_files():
    for kind, key, value, expected in (
        *(("opt", "activation_function", None, relu), ("bloom", "n_inner", None, gelu)),
        *(("falcon", "activation", None, gelu), ("gemma", "hidden_activation", None, gelu)),
        *(("llama", "hidden_act", None, silu), ("llama", "hidden_act", "swish", silu)),
        *(("gpt2", "activation_function", "relu", relu), ("llama", "hidden_act", "gelu_new", gelu)),
    ):
        config, _ = small(kind, random.Random(1))
        assert read_model(config | {key: value}, 8).layers[1]().mlp.act is expected


@pytest.mark.parametrize(("newer", "said"), [(True, False), (False, True), (False, False)])
def test_attention_and_mlp_of_a_falcon_are_parallel_if_the_file_says_so_or_it_is_newer(newer, said):
    config = config_of("falcon", 1, 16, 2, 1, None, 97, new_decoder_architecture=newer)
    block = read_model(config | {"parallel_attn": said}, 8).layers[1]()
    for parameter in block.attention.parameters():
        parameter.data.zero_()  # then the MLP gets the block's input, through its norm
    x, norm = torch.randn(1, 8, 16), block.norms[-1]
    block.attention.out.weight.data.normal_()
    block.attention.v.weight.data.normal_()
    y = block(x) - x - block.attention(block.norms[0](x))
    assert torch.allclose(y, block.mlp(norm(x)), atol=1e-5) == (newer or said)


def test_logits_of_gemma_2_are_capped():
    """At 30, unless the file says otherwise; null: no cap. A cap keeps one tensor more."""
    for more, cap in (({}, 30), ({"final_logit_softcapping": 2}, 2)):
        config = config_of("gemma2", 1, 16, 2, 2, 20, 97, **more)
        head = read_model(config, 8).layers[-1]()
        plain = read_model(config | {"final_logit_softcapping": None}, 8).layers[-1]()
        x = torch.randn(1, 8, 16, requires_grad=True)
        with torch.no_grad():
            head.words.weight.copy_(100 * plain.words.weight)
            plain.words.weight.copy_(head.words.weight)
        assert plain(x).abs().max() > cap
        assert torch.allclose(head(x), cap * torch.tanh(plain(x) / cap), atol=1e-5)
        sizes = [sum(kept_by(partial(layer, x))[0].values()) for layer in (head, plain)]
        assert sizes[0] - sizes[1] == 4 * 8 * 97


def test_a_tied_head_has_the_matrix_of_the_embedding():
    for more in (TIED, UNTIED):
        config = config_of("llama", 1, 16, 2, 2, 20, 97, **more)
        model = read_model(config, 8)
        assert model.tied == more["tie_word_embeddings"]
        assert model.layers[-1]().words.weight.shape == (97, 16)  # on its own
        for _ in range(2):
            embedding, head = model.layers[0](), model.layers[-1]()
            assert (embedding.words.weight is head.words.weight) == model.tied
        other = read_model(config, 8).layers[-1]()
        assert other.words.weight is not embedding.words.weight


def test_equal_blocks_are_one_function():
    model = read_model(config_published("deepseek-v3"))
    assert len(model.layers) == 61 + 2
    assert model.blocks == 61
    assert len(set(model.layers[1:4])) == len(set(model.layers[4:-1])) == 1
    assert len(set(model.layers)) == 4
    model = read_model(config_published("mixtral-8x7b"))
    assert len(set(model.layers)) == 3


def test_what_is_told_about_a_model():
    model = read_model(PRESETS["llama-3.2-1b"])
    said = model.kind, model.vocabulary, model.hidden_size, model.blocks, model.tied
    assert said == ("llama", 128_256, 2048, 16, True)
    assert (model.positions, model.sequence, model.notes) == (131_072, 4096, [])
    assert read_model(PRESETS["llama-3.2-1b"], 200_000).sequence == 200_000
    assert read_model(PUBLISHED_GPT2).sequence == 1024


# ------------------------------------------------------------------------- keys, and mistakes

PUBLISHED_GPT2 = config_published("gpt2")
AS_PUBLISHED = {  # other keys of their files
    "gpt2": {
        **{"activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "n_ctx": 1024},
        **{"attn_pdrop": 0.1, "bos_token_id": 50_256, "embd_pdrop": 0.1, "eos_token_id": 50_256},
        **{"initializer_range": 0.02, "layer_norm_epsilon": 1e-5, "n_positions": 1024},
        **{"resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1},
        **{"summary_proj_to_labels": True, "summary_type": "cls_index", "output_past": True},
        **{"summary_use_proj": True, "task_specific_params": {"text-generation": {"do": True}}},
        **{"reorder_and_upcast_attn": False, "scale_attn_by_inverse_layer_idx": False},
        **{"scale_attn_weights": True, "transformers_version": "4.36.0", "use_cache": True},
    },
    "bloom-7b1": {
        **{"apply_residual_connection_post_layernorm": False, "attention_dropout": 0.0},
        **{"attention_softmax_in_fp32": True, "bias_dropout_fusion": True, "hidden_dropout": 0.0},
        **{"masked_softmax_fusion": True, "n_inner": None, "offset_alibi": 100, "seq_length": 2048},
        **{"pretraining_tp": 4, "skip_bias_add": True, "skip_bias_add_qkv": False},
        **{"slow_but_exact": False, "unk_token_id": 0, "torch_dtype": "float16"},
    },
    "falcon-7b": {
        **{"alibi": False, "bias": False, "multi_query": True, "parallel_attn": True},
        **{"num_kv_heads": 71, "auto_map": {"AutoConfig": "configuration_falcon.FalconConfig"}},
    },
    "gemma-2-9b": {
        **{"_name_or_path": "google/gemma-2-9b", "attn_logit_softcapping": 50.0, "head_dim": 256},
        **{"cache_implementation": "hybrid", "final_logit_softcapping": 30.0, "rope_theta": 1e4},
        **{"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"},
        **{"query_pre_attn_scalar": 256, "sliding_window": 4096, "sliding_window_size": 4096},
        **{"layer_types": ["sliding_attention", "full_attention"] * 21, "dtype": "bfloat16"},
    },
    "phi-4-mini": {
        **{"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False},
        **{"attention_bias": False, "partial_rotary_factor": 0.75, "resid_pdrop": 0.0},
        **{"rope_scaling": {"long_factor": [1, 1.1]}, "original_max_position_embeddings": 4096},
        **{"sliding_window": 262_144, "embd_pdrop": 0.0, "max_position_embeddings": 131_072},
    },
    "qwen3-30b-a3b": {
        **{"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True},
        **{"output_router_logits": False, "router_aux_loss_coef": 0.001, "sliding_window": None},
        **{"max_window_layers": 48, "use_sliding_window": False, "attention_bias": False},
    },
    "qwen2-7b": {"max_window_layers": 28, "use_sliding_window": False, "sliding_window": 1024},
    "deepseek-v3": {
        **{"aux_loss_alpha": 0.001, "ep_size": 1, "moe_layer_freq": 1, "n_group": 8},
        **{"norm_topk_prob": True, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid"},
        **{"seq_aux": True, "topk_group": 4, "topk_method": "noaux_tc", "hidden_act": "silu"},
        **{"max_position_embeddings": 163_840, "rope_scaling": {"factor": 40, "type": "yarn"}},
        **{"head_dim": 64, "qk_head_dim": 192},
    },
}


@pytest.mark.parametrize("name", AS_PUBLISHED)
def test_files_as_they_are_published_are_understood(name):
    model = read_model(config_published(name) | AS_PUBLISHED[name])
    assert count(model) == PUBLISHED[name][0]
    assert model.notes == []


def test_opt_has_two_more_positions():
    """The key prefix and many more of its file; closed_form has its parameters."""
    more = {
        "activation_dropout": 0.0,
        "do_layer_norm_before": True,
        "dropout": 0.1,
        "prefix": "</s>",
    }
    more |= {"enable_bias": True, "layerdrop": 0.0, "init_std": 0.02, "word_embed_proj_dim": 16}
    more |= {"_remove_final_layer_norm": False, "layer_norm_elementwise_affine": True}
    config = config_of("opt", 2, 16, 2, 0, 64, 97, max_position_embeddings=8, **more)
    assert read_model(config).layers[0]().places.weight.shape == (8 + 2, 16)


@pytest.mark.parametrize(
    ("more", "sequence", "note"),
    [
        ({"sliding_window": 512}, 1024, "sliding_window=512 is not counted"),
        ({"quantization_config": {"quant_method": "fp8"}}, 8, "quantization_config is not counted"),
        ({"sliding_window": 1024}, 1024, None),
    ],
)
def test_what_is_not_counted_is_told(more, sequence, note):
    notes = read_model(config_published("mistral-7b") | more, sequence).notes
    assert [text.partition(":")[0] for text in notes] == [note] * (note is not None)


def test_what_predicts_further_tokens_is_not_counted_and_told():
    model = read_model(config_published("deepseek-v3") | {"num_nextn_predict_layers": 1})
    assert model.notes == ["num_nextn_predict_layers is not counted"]
    assert count(model) == PUBLISHED["deepseek-v3"][0]


BAD = [  # model, what is changed, sequence, what the line says
    (
        "gpt2",
        {"model_type": "gpt3"},
        None,
        "unknown model_type='gpt3' in config.json: did you mean",
    ),
    ("gpt2", {"model_type": "t5"}, None, "it must be one of gpt2, opt, bloom, falcon, llama, mis"),
    ("gpt2", {"model_type": None}, None, "unknown model_type=None"),
    ("gpt2", {"model_type": ["gpt2"]}, None, "unknown model_type=['gpt2']"),
    ("gpt2", {}, 1025, "sequence=1025 must be at most 1024, the positions that this gpt2 model"),
    ("gpt2", {}, 0, "sequence=0 must be a whole number from 1 to"),
    ("gpt2", {}, True, "sequence=True must be a whole number"),
    ("llama-3-8b", {"hidden_size": "4096"}, None, "hidden_size='4096' must be a whole number from"),
    ("llama-3-8b", {"hidden_size": -1}, None, "hidden_size=-1 must be a whole number"),
    ("llama-3-8b", {"hidden_size": math.nan}, None, "hidden_size=nan must be a whole number"),
    ("llama-3-8b", {"hidden_size": True}, None, "hidden_size=True must be a whole number"),
    ("llama-3-8b", {"hidden_size": 4096.0}, None, "hidden_size=4096.0 must be a whole number"),
    ("llama-3-8b", {"hidden_size": None}, None, "config.json has no hidden_size or n_embd"),
    ("llama-3-8b", {"intermediate_size": None}, None, "no intermediate_size or n_inner"),
    ("mistral-7b", {"num_key_value_heads": None}, None, "no num_key_value_heads or num_kv_heads"),
    ("deepseek-v3", {"v_head_dim": None}, None, "has no v_head_dim, which a deepseek_v3 model"),
    ("llama-3-8b", {"num_hidden_layers": 10**6}, None, "num_hidden_layers=1000000 must be a whole"),
    ("llama-3-8b", {"num_attention_heads": 30}, None, "=30 must be a multiple of num_key_value_h"),
    ("gpt2", {"n_head": 7}, None, "hidden_size=768 must be a multiple of num_attention_heads=7"),
    ("deepseek-v3", {"num_key_value_heads": 64}, None, "num_key_value_heads=64 must be num_attent"),
    ("mixtral-8x7b", {"num_experts_per_tok": 9}, None, "num_experts_per_tok=9 must be at most num"),
    ("llama-3-8b", {"tie_word_embeddings": 1}, None, "tie_word_embeddings=1 must be one of True"),
    ("llama-3-8b", {"attention_dropout": 1}, None, "attention_dropout=1 must be a number from 0"),
    ("llama-3-8b", {"hidden_act": "relu2"}, None, "hidden_act='relu2' must be one of relu, gelu"),
    ("llama-3-8b", {"hidden_act": ["silu"]}, None, "hidden_act=['silu'] must be one of relu"),
    ("gpt2", {"hidden_size": 64}, None, "hidden_size=64 contradicts another key of config.json"),
    ("gpt2", {"word_embed_proj_dim": 512}, None, "word_embed_proj_dim=512 contradicts another"),
    # keys that change sizes and are not understood
    ("llama-3-8b", {"n_shared_experts": 2}, None, "n_shared_experts=2 in config.json is not"),
    ("llama-3-8b", {"num_local_experts": 8}, None, "num_local_experts=8 in config.json is not"),
    (
        "llama-3-8b",
        {"qkv_bias": True},
        None,
        "is not understood for llama: remove it if it changes",
    ),
    ("llama-3-8b", {"mlp_ratio": 2.5}, None, "mlp_ratio=2.5 in config.json is not understood"),
    ("llama-3-8b", {"n_ctx_layers": 2}, None, "n_ctx_layers=2 in config.json is not understood"),
    ("llama-3-8b", {"hidden": 3}, None, "hidden=3 in config.json is not understood"),
    ("llama-3-8b", {"norm": "none"}, None, "norm='none' in config.json is not understood"),
    ("llama-3-8b", {"block_configs": [{"ffn": 1}]}, None, "block_configs=[{'ffn': 1}] in config"),
    ("mistral-7b", {"attention_bias": True}, None, "attention_bias=True in config.json is not"),
    ("qwen2-7b", {"attention_bias": False}, None, "attention_bias=False in config.json is not"),
    ("gpt2", {"add_cross_attention": True}, None, "add_cross_attention=True in config.json is"),
    ("gpt2", {"num_key_value_heads": 3}, None, "num_key_value_heads=3 in config.json is not"),
    ("bloom", {"n_inner": 1024}, None, "n_inner=1024 in config.json is not understood for bloom"),
    ("phi-4", {"lm_head_bias": True}, None, "lm_head_bias=True in config.json is not understood"),
    ("deepseek-v3", {"moe_layer_freq": 2}, None, "moe_layer_freq=2 in config.json is not"),
    ("qwen3-30b-a3b", {"decoder_sparse_step": 2}, None, "decoder_sparse_step=2 in config.json"),
    ("qwen3-30b-a3b", {"mlp_only_layers": [0]}, None, "mlp_only_layers=[0] in config.json is not"),
]


@pytest.mark.parametrize(("name", "changes", "sequence", "line"), BAD)
def test_a_mistake_gets_one_line(name, changes, sequence, line):
    with pytest.raises(UserError) as error:
        read_model(config_published(name) | changes, sequence)
    assert line in str(error.value)
    assert "\n" not in str(error.value)
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("word_embed_proj_dim", 512),  # OPT-350M
        ("do_layer_norm_before", False),
        ("_remove_final_layer_norm", True),
        ("layer_norm_elementwise_affine", False),
        ("layerdrop", 0.1),
    ],
)
def test_unusual_opts_are_refused(key, value):
    with pytest.raises(UserError, match=f"{key}={value}"):
        read_model(config_of("opt", 24, 1024, 16, 0, 4096, 50_272) | {key: value})


def test_what_is_no_config_is_refused():
    for config in ([], "gpt2", None, {}):
        with pytest.raises(UserError, match="unknown model_type=None"):
            read_model(config)
