"""What layers does a public model have? From its config.json.

Plain PyTorch from token ids, (sequences, tokens) int64, to logits, with all the parameters of the
published model. The layers are there to be measured: what adds no parameter, no matrix product and
no byte that is kept is left out. So are rotary positions: attention keeps queries and keys once,
rotated or not, and all layers share one table of sines and cosines. ALiBi and a cap on attention
scores belong to the attention kernel, which keeps no scores. An activation is one kernel, which
keeps its input; a router ends in a softmax.
"""

import re
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace as Sizes  # of a model, under the names of NAMES
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipedream.backstage.text import nearest, shown
from pipedream_simple import COUNT, SWITCH, UserError, check_value

# ---------------------------------------------------------------------- what a config.json can say

NAMES = {  # here: in config.json
    **{"hidden": "hidden_size n_embd n_embed word_embed_proj_dim", "vocabulary": "vocab_size"},
    **{"blocks": "num_hidden_layers n_layer", "positions": "max_position_embeddings n_positions"},
    **{"heads": "num_attention_heads n_head", "kv_heads": "num_key_value_heads num_kv_heads"},
    **{"ffn": "intermediate_size n_inner ffn_dim ffn_hidden_size", "width": "head_dim"},
    **{"act": "hidden_act activation_function activation hidden_activation"},
    **{"tied": "tie_word_embeddings", "cap": "final_logit_softcapping", "bias": "bias enable_bias"},
    **{"qkv_bias": "attention_bias", "mlp_bias": "mlp_bias", "first_dropout": "embd_pdrop"},
    **{"dropout": "hidden_dropout resid_pdrop dropout", "top": "num_experts_per_tok"},
    **{"attention_dropout": "attention_dropout attn_pdrop", "shared": "n_shared_experts"},
    **{"experts": "num_experts num_local_experts n_routed_experts", "q_rank": "q_lora_rank"},
    **{"expert_ffn": "moe_intermediate_size", "first_sparse": "first_k_dense_replace"},
    **{"kv_rank": "kv_lora_rank", "plain": "qk_nope_head_dim", "rotated": "qk_rope_head_dim"},
    **{"v_width": "v_head_dim", "one_kv_head": "multi_query", "parallel": "parallel_attn"},
    **{"newer": "new_decoder_architecture", "norms": "num_ln_in_parallel_attn"},
}
DEFAULTS: dict[str, Any] = {  # of all that a config.json need not say; 0: see complete_sizes
    **{"norm": nn.RMSNorm, "act": "silu", "gated": True, "tied": False, "positions": 2048},
    **{"bias": False, "qkv_bias": False, "out_bias": True, "mlp_bias": False, "width": 0},
    **{"dropout": 0.0, "attention_dropout": 0.0, "first_dropout": 0.0, "learned": None},
    **dict.fromkeys(("first_norm", "qk_norm", "post_norm"), nn.Identity),
    **{"norms": 0, "parallel": False, "one_kv_head": True, "newer": False, "cap": 0.0},
}
COMMON = "hidden vocabulary blocks positions heads act tied attention_dropout"
LLAMA, MOE = "kv_heads ffn width", "experts top expert_ffn"
LATENT = "q_rank kv_rank plain rotated v_width"
GPT = {"norm": nn.LayerNorm, "act": "gelu", "gated": False, "tied": True, "kv_heads": 0, "ffn": 0}
GPT2 = {"dropout": 0.1, "attention_dropout": 0.1, "first_dropout": 0.1, "positions": 1024}
GEMMA = {"act": "gelu", "tied": True, "width": 256}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {  # keys besides the COMMON ones; other defaults
    "gpt2": ("ffn dropout first_dropout", GPT | GPT2 | {"bias": True, "learned": 0}),
    "opt": ("ffn dropout bias",  # with two more positions, for padding
            GPT | {"act": "relu", "dropout": 0.1, "bias": True, "learned": 2}),
    "bloom": ("dropout", GPT | {"bias": True, "first_norm": nn.LayerNorm}),
    "falcon": ("ffn kv_heads dropout bias one_kv_head parallel newer norms",
               GPT | {"parallel": True}),
    "llama": (f"{LLAMA} qkv_bias mlp_bias", {"kv_heads": 0}),
    "mistral": (LLAMA, {}),
    "mixtral": (f"{LLAMA} experts top", {"experts": 8, "top": 2}),
    "qwen2": (LLAMA, {"qkv_bias": True, "out_bias": False}),
    "qwen3": (f"{LLAMA} qkv_bias", {"qk_norm": nn.RMSNorm, "width": 128}),
    "qwen3_moe": (f"{LLAMA} {MOE} qkv_bias", {"qk_norm": nn.RMSNorm}),
    "gemma": (f"{LLAMA} qkv_bias", GEMMA),
    "gemma2": (f"{LLAMA} qkv_bias cap", GEMMA | {"post_norm": nn.RMSNorm, "cap": 30.0}),
    "phi3": (f"{LLAMA} dropout", {"kv_heads": 0}),
    "deepseek_v3": (f"{LLAMA} {MOE} {LATENT} qkv_bias shared first_sparse", {"kv_heads": 0}),
}  # fmt: skip
ACTIVATIONS: dict[Any, str] = {"relu": "relu", "gelu": "gelu", "silu": "silu", "swish": "silu"}
ACTIVATIONS |= dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), "gelu")
RULES_OF_TYPES = {bool: SWITCH, float: (float, 0, 0.99), str: ACTIVATIONS}  # others: COUNT
RULES_OF_NAMES = {  # where the type of the default does not say it
    **dict.fromkeys(("q_rank", "shared", "first_sparse"), (int, 0, 10_000_000)),
    **{"blocks": (int, 1, 10_000), "norms": (int, 1, 2), "cap": (float, 0, 1e6)},
}
NONE = "q_rank", "shared", "cap"  # null: it has none; of others, as if the key were not there
ONLY: dict[str, Any] = {  # understood with this value alone
    **{"do_layer_norm_before": True, "layer_norm_elementwise_affine": True, "ff_factor": 4},
    **{"_remove_final_layer_norm": False, "full_attn_mod": 1, "interpolate_factor": 1},
    **{"moe_layer_freq": 1, "decoder_sparse_step": 1},
}
NOT_COUNTED = "quantization_config", "num_nextn_predict_layers", "num_mtp_layers"
HARMLESS = re.compile(  # no size, no product, no byte that is kept
    r"""_(?!remove).* | rope_.* | summary_.* | .*_token_id | .*_fusion | .*alibi | model_type
    | architectures | auto_map | (torch_)?dtype | .*_version | use_cache | return_dict | prefix
    | task_specific_params | id2label | label2id | problem_type | output_past | n_ctx | seq_length
    | initializer_range | init_std | layer_norm_epsilon | rms_norm_eps | pretraining_tp | ep_size
    | original_max_position_embeddings | partial_rotary_factor | cache_implementation | layer_types
    | (use_)?sliding_window(_size)? | max_window_layers | query_pre_attn_scalar
    | scale_attn.* | attn_logit_softcapping | attention_softmax_in_fp32 | skip_bias_add
    | output_projection | qk_head_dim | norm_topk_prob | output_router_logits | aux_loss_alpha
    | router_aux_loss_coef | seq_aux | topk_method | scoring_func | n_group | topk_group
    | routed_scaling_factor | max_(sequence_)?length | temperature | top_[kp] | typical_p
    | num_beam.* | num_return_sequences | .*_penalty""",
    re.VERBOSE,
)

KEYS_OF_PRESETS = """model_type num_hidden_layers hidden_size num_attention_heads
    num_key_value_heads intermediate_size vocab_size max_position_embeddings tie_word_embeddings"""
PRESETS = {  # the models' own config.json; arXiv 2307.09288 (Llama 2), 2407.21783 (Llama 3), others
    name: dict(zip(KEYS_OF_PRESETS.split(), values, strict=True))
    for name, *values in (
        ("llama-3.2-1b", "llama", 16, 2048, 32, 8, 8192, 128_256, 131_072, True),
        ("llama-2-7b", "llama", 32, 4096, 32, 32, 11_008, 32_000, 4096, False),
        ("llama-2-13b", "llama", 40, 5120, 40, 40, 13_824, 32_000, 4096, False),
        ("llama-3-8b", "llama", 32, 4096, 32, 8, 14_336, 128_256, 8192, False),
        ("qwen3-8b", "qwen3", 36, 4096, 32, 8, 12_288, 151_936, 40_960, False),  # 2505.09388
        ("gemma-2-9b", "gemma2", 42, 3584, 16, 8, 14_336, 256_000, 8192, True),  # 2408.00118
        ("mixtral-8x7b", "mixtral", 32, 4096, 32, 8, 14_336, 32_000, 32_768, False),  # 2401.04088
        ("llama-2-70b", "llama", 80, 8192, 64, 8, 28_672, 32_000, 4096, False),
        ("llama-3-70b", "llama", 80, 8192, 64, 8, 28_672, 128_256, 8192, False),
    )
}


class PublicModel(NamedTuple):
    """What to measure, and what to say about it."""

    kind: str  # the model_type
    layers: list[Callable[[], nn.Module]]  # embedding, blocks, head; one function for equal blocks
    vocabulary: int
    hidden_size: int
    heads: int  # of attention
    blocks: int
    positions: int  # learned, or as many as it was made for
    sequence: int  # tokens
    tied: bool  # the head's matrix is the embedding's
    notes: list[str]  # what config.json says and is not counted


def read_model(config: dict, sequence: int | None = None) -> PublicModel:
    """The layers that a config.json describes, for sequences of at most 4,096 tokens unless given.

    UserError: a family or a key that is not understood, a key that is missing, a wrong value.
    """
    n = read_sizes(config)
    sequence = min(n.positions, 4096) if sequence is None else sequence
    check_value("sequence", sequence, COUNT)
    if n.learned is not None and sequence > n.positions:
        rule = f"at most {n.positions}, the positions that this {n.kind} model learns"
        raise UserError(f"sequence={sequence} must be {rule}")
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    notes = [f"{key} is not counted" for key in NOT_COUNTED if config.get(key)]
    if window and not (isinstance(window, int) and window >= sequence):
        notes += [f"sliding_window={shown(window)} is not counted: attention is over all tokens"]
    dense, sparse = partial(DecoderBlock, n, FeedForward), partial(DecoderBlock, n, Experts)
    first = min(n.first_sparse if n.experts else n.blocks, n.blocks)
    blocks = [dense] * first + [sparse] * (n.blocks - first)
    layers: list[Any] = [partial(TokenEmbedding, n), *blocks, partial(LanguageHead, n)]
    sizes = n.vocabulary, n.hidden, n.heads, n.blocks, n.positions, sequence
    return PublicModel(n.kind, layers, *sizes, n.tied, notes)


def read_sizes(config: dict) -> Sizes:
    """All sizes of the model, from its family and its config.json, checked."""
    kind = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(kind, str) or kind not in FAMILIES:
        hint = nearest(str(kind), FAMILIES) or f": it must be one of {', '.join(FAMILIES)}"
        raise UserError(f"unknown model_type={shown(kind)} in config.json{hint}")
    more, facts = FAMILIES[kind]
    keys, defaults, found = f"{COMMON} {more}".split(), DEFAULTS | facts, dict[str, Any]()
    same = {theirs: ours for ours in NAMES for theirs in NAMES[ours].split()}
    fixed = ONLY | {theirs: facts[ours] for theirs, ours in same.items() if ours in facts}
    for key, value in config.items():
        ours = same.get(key, "")
        if HARMLESS.fullmatch(key) or key in NOT_COUNTED or (value is None and ours not in NONE):
            continue
        if ours in keys:
            value = 0 if value is None else value
            rule = RULES_OF_NAMES.get(ours) or RULES_OF_TYPES.get(type(defaults.get(ours)), COUNT)
            check_value(key, value, rule)
            value = ACTIVATIONS[value] if rule is ACTIVATIONS else value
            if found.setdefault(ours, value) != value:
                raise UserError(f"{key}={value} contradicts another key of config.json")
        elif value != fixed[key] if key in fixed else value:
            what = f"{key[:60]}={shown(value)} in config.json is not understood for {kind}"
            raise UserError(f"{what}: remove it if it changes no size")
    missing = [" or ".join(NAMES[ours].split()) for ours in keys if ours not in found | defaults]
    if missing:
        raise UserError(f"config.json has no {missing[0]}, which a {kind} model needs")
    n = Sizes(kind=kind, matrix=None, **(dict.fromkeys(NAMES, 0) | defaults | found))
    complete_sizes(n)
    return n


def complete_sizes(n: Sizes) -> None:
    """Fill in what follows from other sizes."""
    if n.kind == "falcon":
        n.parallel = n.parallel or n.newer
        n.kv_heads = n.kv_heads if n.newer else int(n.one_kv_head)
    n.norms = (n.norms or 1 + n.newer) if n.parallel else 2
    n.kv_heads, n.ffn = n.kv_heads or n.heads, n.ffn or 4 * n.hidden
    n.expert_ffn = n.expert_ffn or n.ffn
    n.qkv_bias, n.mlp_bias = n.qkv_bias or n.bias, n.mlp_bias or n.bias
    n.out_bias = n.out_bias and n.qkv_bias
    pairs = [("heads", "kv_heads")] + [("hidden", "heads")] * (not n.width and not n.kv_rank)
    for what, parts in pairs:
        if getattr(n, what) % getattr(n, parts):
            names = [f"{NAMES[each].split()[0]}={getattr(n, each)}" for each in (what, parts)]
            raise UserError(" must be a multiple of ".join(names))
    n.width = n.width or n.hidden // n.heads
    if n.kv_rank and n.kv_heads != n.heads:
        raise UserError(f"num_key_value_heads={n.kv_heads} must be num_attention_heads={n.heads}")
    if n.top > n.experts:
        raise UserError(f"num_experts_per_tok={n.top} must be at most num_experts={n.experts}")


# ----------------------------------------------------------------------------------------- layers


class TokenEmbedding(nn.Module):
    def __init__(self, n: Sizes):
        super().__init__()
        self.words, self.dropout = nn.Embedding(n.vocabulary, n.hidden), nn.Dropout(n.first_dropout)
        self.norm, learned = n.first_norm(n.hidden), n.learned is not None
        self.places = nn.Embedding(n.positions + n.learned, n.hidden) if learned else None
        n.matrix = self.words.weight if n.tied else None  # for the head

    def forward(self, ids: Tensor) -> Tensor:  # (sequences, tokens) in; out: with hidden numbers
        x = self.words(ids)
        if self.places is not None:
            x = x + self.places(torch.arange(ids.shape[1], device=ids.device))
        return self.dropout(self.norm(x))


class LanguageHead(nn.Module):
    def __init__(self, n: Sizes):
        super().__init__()
        self.norm, self.words = n.norm(n.hidden), nn.Linear(n.hidden, n.vocabulary, bias=False)
        self.words.weight = self.words.weight if n.matrix is None else n.matrix
        self.cap = n.cap

    def forward(self, x: Tensor) -> Tensor:  # out: (sequences, tokens, vocabulary)
        logits = self.words(self.norm(x))
        return torch.tanh(logits / self.cap) * self.cap if self.cap else logits


class DecoderBlock(nn.Module):
    def __init__(self, n: Sizes, mlp: Callable[[Sizes], nn.Module]):
        super().__init__()
        self.norms = nn.ModuleList(n.norm(n.hidden) for _ in range(n.norms))
        self.attention, self.mlp = LatentAttention(n) if n.kv_rank else SelfAttention(n), mlp(n)
        self.after = nn.ModuleList(n.post_norm(n.hidden) for _ in range(2))
        self.parallel, self.dropout = n.parallel, nn.Dropout(n.dropout)

    def forward(self, x: Tensor) -> Tensor:
        if self.parallel:  # most Falcons: both read the input, through one norm or one each
            y = [norm(x) for norm in self.norms]
            return x + self.dropout(self.attention(y[0]) + self.mlp(y[-1]))
        x = x + self.dropout(self.after[0](self.attention(self.norms[0](x))))
        return x + self.dropout(self.after[1](self.mlp(self.norms[1](x))))


def attend(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """Causal attention. (sequences, tokens, heads, width) in, (sequences, tokens, all) out."""
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    options: Any = {"is_causal": True, "enable_gqa": q.shape[1] != k.shape[1], "dropout_p": dropout}
    return functional.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    def __init__(self, n: Sizes):
        super().__init__()
        self.width, self.dropout, bias = n.width, n.attention_dropout, n.qkv_bias
        self.q = nn.Linear(n.hidden, n.heads * n.width, bias=bias)
        self.k, self.v = (nn.Linear(n.hidden, n.kv_heads * n.width, bias=bias) for _ in range(2))
        self.q_norm, self.k_norm = n.qk_norm(n.width), n.qk_norm(n.width)
        self.out = nn.Linear(n.heads * n.width, n.hidden, bias=n.out_bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (each(x).unflatten(-1, (-1, self.width)) for each in (self.q, self.k, self.v))
        return self.out(attend(self.q_norm(q), self.k_norm(k), v, self.dropout * self.training))


class LatentAttention(nn.Module):
    """Keys and values out of one small vector: DeepSeek-V2, arXiv 2405.04434, section 2.1."""

    def __init__(self, n: Sizes):
        super().__init__()
        self.sizes = n.heads, n.kv_rank, n.rotated, n.plain, n.v_width
        self.dropout, bias, width = n.attention_dropout, n.qkv_bias, n.heads * (n.plain + n.rotated)
        first = [nn.Linear(n.hidden, n.q_rank, bias=bias), n.norm(n.q_rank)] if n.q_rank else []
        self.q = nn.Sequential(*first, nn.Linear(n.q_rank or n.hidden, width, bias=False))
        self.down = nn.Linear(n.hidden, n.kv_rank + n.rotated, bias=bias)
        self.norm = n.norm(n.kv_rank)
        self.up = nn.Linear(n.kv_rank, n.heads * (n.plain + n.v_width), bias=False)
        self.out = nn.Linear(n.heads * n.v_width, n.hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        heads, kv_rank, rotated, plain, v_width = self.sizes
        small, same = self.down(x).split([kv_rank, rotated], -1)
        k, v = self.up(self.norm(small)).unflatten(-1, (heads, -1)).split([plain, v_width], -1)
        k = torch.cat([k, same.unsqueeze(2).expand(-1, -1, heads, -1)], -1)
        q = self.q(x).unflatten(-1, (heads, -1))
        return self.out(attend(q, k, v, self.dropout * self.training))


class FeedForward(nn.Module):
    def __init__(self, n: Sizes, width: int = 0):
        super().__init__()
        self.act, width = getattr(functional, n.act), width or n.ffn
        self.up = nn.Linear(n.hidden, width, bias=n.mlp_bias)
        self.gate = nn.Linear(n.hidden, width, bias=n.mlp_bias) if n.gated else None
        self.down = nn.Linear(width, n.hidden, bias=n.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(self.act(self.up(x)))
        return self.down(self.act(self.gate(x)) * self.up(x))


class Experts(nn.Module):
    """Each token goes to some of many MLPs; their outputs are weighted with the router's scores.

    Every expert gets equally many tokens, as training aims at: without values there is no choice.
    Rows of zeros fill up what is not a multiple. DeepSeek's correction of the router is not a
    parameter, as no gradient changes it.
    """

    def __init__(self, n: Sizes):
        super().__init__()
        self.act, self.top, self.number = getattr(functional, n.act), n.top, n.experts
        self.router, shape = nn.Linear(n.hidden, n.experts, bias=False), (n.hidden, n.expert_ffn)
        self.gate, self.up = (nn.Parameter(torch.randn(n.experts, *shape) / 50) for _ in range(2))
        self.down = nn.Parameter(torch.randn(n.experts, *shape[::-1]) / 50)
        self.shared = FeedForward(n, n.shared * n.expert_ffn) if n.shared else None

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)  # (tokens, hidden)
        scores = self.router(flat).float().softmax(-1).topk(self.top)[0]  # (tokens, top)
        rows = len(flat) * self.top
        copies = functional.pad(flat.repeat(self.top, 1), (0, 0, 0, -rows % self.number))
        y = copies.unflatten(0, (self.number, -1))  # (experts, tokens of each, hidden)
        y = (self.act(y @ self.gate) * (y @ self.up) @ self.down).flatten(0, 1)[:rows]
        y = (y.unflatten(0, (self.top, -1)) * scores.to(y.dtype).t().unsqueeze(-1)).sum(0)
        return y.view_as(x) if self.shared is None else y.view_as(x) + self.shared(x)
