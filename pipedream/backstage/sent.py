"""What a GPU sends for one update of the weights, in bytes, as the papers count it."""


def in_ring(gpus: int, size: float) -> float:
    """Each of these GPUs sends so much to gather size bytes, or to reduce and scatter them.

    An all-reduce is one after the other.
    """
    return (gpus - 1) / gpus * size


def sent_to_replicas(
    gpus: int, zero: int, weights: float, gradients: float, passes: int = 1
) -> float:
    """Data parallelism, or a stage of ZeRO (section 7 of its paper); passes: microbatches of a GPU.

    Stage 1 reduces and scatters gradients, and gathers new weights. Stage 2 scatters gradients
    after each microbatch; stage 3 also gathers weights for each forward and each backward.
    """
    scatter, gather = in_ring(gpus, gradients), in_ring(gpus, weights)
    whole = 2 * scatter, scatter + gather  # data parallelism, and stage 1
    return [*whole, passes * scatter + gather, passes * (scatter + 2 * gather)][zero]


def sent_in_layers(gpus: int, activations: float, forwards: int = 1) -> float:
    """Tensor parallelism: activations, of all blocks, are all-reduced twice each way (Megatron-LM).

    With sequence parallelism these are as many bytes, gathered and scattered. forwards: 2 if each
    layer runs again before its backward.
    """
    return (2 * forwards + 2) * 2 * in_ring(gpus, activations)
