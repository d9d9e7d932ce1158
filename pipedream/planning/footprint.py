"""What does a transformer keep on each GPU of a pipeline? Counted, not measured."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from pipedream_simple import Op

NETWORK = ["layers", "hidden_size", "heads", "kv_heads", "ffn", "vocabulary", "sequence"]
PRESETS = {  # Touvron et al. 2023 (arXiv 2307.09288), and the models' own configuration files
    "llama-2-7b": (32, 4096, 32, 32, 11_008, 32_000, 4096),
    "llama-2-70b": (80, 8192, 64, 8, 28_672, 32_000, 4096),
}
PRECISION = {"bf16": (2, 4), "fp32": (4, 0)}  # bytes of a number, and of the optimizer's copy
STATE_BYTES = {"sgd": 0, "momentum": 4, "adam": 8}  # per parameter, next to that copy


class Memory(NamedTuple):
    """Bytes on a GPU."""

    weights: float
    gradients: float
    optimizer: float
    stash: float  # older versions of the weights
    activations: float


def complete(config: dict) -> dict:
    """The config with its model's numbers where none are given, cut into one stage per GPU."""
    preset = dict(zip(NETWORK, PRESETS[config["model"]], strict=True))
    net = {k: preset[k] if value is None else value for k, value in config.items()}
    return {**net, "stages": net["gpus"]}


def count_parameters(net: dict) -> tuple[int, int]:
    """Of a layer of Llama 2, and of the embedding; the head has as many, and a norm.

    Queries, keys, values and the projection after them; an MLP of three matrices; two norms.
    """
    h, keys = net["hidden_size"], net["hidden_size"] // net["heads"] * net["kv_heads"]
    return 2 * h * h + 2 * h * keys + 3 * h * net["ffn"] + 2 * h, net["vocabulary"] * h


def count_activations(h: int, heads: int, kv_heads: int, ffn: int, mlp: int = 4) -> int:
    """Numbers that a layer keeps per token, from its forward to its backward.

    Input and output of two norms, queries, output of attention; keys and values; a scale per norm
    and its mean, and one per head. The MLP keeps its hidden size mlp times: 1 with ReLU, 2 with
    GELU, 4 with SwiGLU. Korthikanti et al. 2022 (arXiv 2205.05198), section 4.1, counts 34 h bytes
    with GELU and ffn = 4 h: these 2 (8 h + 2 * 4 h), and 2 h of dropout, which is left out here.
    """
    return 6 * h + 2 * (h // heads) * kv_heads + mlp * ffn + 4 + heads


def layers_in_stage(net: dict, stage: int) -> int:
    """As even as possible; where it is not, the first stages have one more."""
    return net["layers"] // net["stages"] + (stage < net["layers"] % net["stages"])


def parameters_of(net: dict, stage: int) -> int:
    """Of the stage's layers, of the embedding in front and of norm and head at the end."""
    first, last = stage == 0, stage == net["stages"] - 1
    of_layer, embedding = count_parameters(net)
    ends = embedding * (first + last) + net["hidden_size"] * last
    return layers_in_stage(net, stage) * of_layer + ends


def activations_of(net: dict, stage: int, inputs: int, whole: int) -> int:
    """Bytes. inputs and whole: microbatches of which it keeps the input, and all activations."""
    size, _ = PRECISION[net["precision"]]
    tokens = net["microbatch_size"] * net["sequence"]
    of_token = count_activations(net["hidden_size"], net["heads"], net["kv_heads"], net["ffn"])
    if not net["flash_attention"]:  # the softmax; same section
        of_token += net["sequence"] * net["heads"]
    kept = size * layers_in_stage(net, stage) * tokens * of_token
    if stage == net["stages"] - 1:
        kept += 4 * tokens * net["vocabulary"]  # for the loss, in fp32
    return inputs * size * tokens * net["hidden_size"] + whole * kept


def memory_of(net: dict, stage: int, versions: int, inputs: int, whole: int) -> Memory:
    """What a stage takes while it keeps so many weight versions and microbatches."""
    size, fp32_copy = PRECISION[net["precision"]]
    parameters = parameters_of(net, stage)
    weights = parameters * size
    state = parameters * (fp32_copy + STATE_BYTES[net["optimizer"]])
    activations = activations_of(net, stage, inputs, whole)
    return Memory(weights, weights, state, weights * (versions - 1), activations)


def memory_of_gpu(net: dict, versions: int, held: Iterable[tuple[int, int, int]]) -> Memory:
    """The sum of its stages, which keep what held says: (stage, inputs, whole)."""
    stages = (memory_of(net, stage, versions, *number) for stage, *number in held)
    return Memory(*map(sum, zip(*stages, strict=True)))


def microbatches_held(row: list[Op], recompute: bool) -> Iterator[tuple[tuple[int, int, int], ...]]:
    """During each op of a row, for each of its stages: (stage, inputs, whole).

    inputs and whole: microbatches of which it keeps the input, and all activations. Without
    recompute a microbatch has all of them from its F to its B, or its W. With recompute only its
    input, until its B or I runs the forward again.
    """
    inputs, whole = Counter[int](), Counter[int]()
    stages = sorted({op.stage for op in row})
    for stage, kind, *_ in row:
        (inputs if recompute else whole)[stage] += kind == "F"
        if recompute and kind in ("B", "I"):
            inputs[stage], whole[stage] = inputs[stage] - 1, whole[stage] + 1
        yield tuple((each, inputs[each], whole[each]) for each in stages)
        whole[stage] -= kind in ("B", "W")
