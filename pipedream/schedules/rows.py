"""What does each GPU do in one batch? More schedules than the story has.

Each function lists the steps of one GPU in one batch, as in pipedream_simple.py. To add a schedule,
write such a function and name it in LIBRARY. Where a GPU holds several stages, it takes one more
argument, stages_per_gpu. Which GPU holds which stage follows from the rows.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator

from pipedream_simple import SCHEDULES, Step, UserError, one_f_one_b

Row = Iterator[Step]  # what one GPU does in a batch, in order


def interleaved(device: int, num_devices: int, num_microbatches: int, stages_per_gpu: int) -> Row:
    """1F1B with several small stages per GPU: device d holds the stages d, d + D, d + 2D ...

    With V stages per GPU a stage is 1 / V of what the GPU holds, so the pipeline fills V times as
    fast: a batch takes (V * M + D - 1) / V turns. The price is V times as many messages, and in a
    long batch (D - 1) / (D * V) more activations than 1F1B. M must be a multiple of D.
    Megatron-LM (Narayanan et al., SC 2021), section 2.2.2.

    >>> from pipedream_simple import format_rows
    >>> print(format_rows(interleaved(device, 2, 2, 2) for device in range(2)))  # D=2, M=2, V=2
    GPU0: F0 F1 F0 F1 B0 B1 B0 B1
    GPU1: F0 F1 F0 B0 F1 B1 B0 B1
    """
    if num_microbatches % num_devices:
        rule = f"must be a multiple of num_stages={num_devices} for interleaved"
        raise UserError(f"num_microbatches={num_microbatches} {rule}")

    def order(kind: str, laps: range) -> list[Step]:
        """D microbatches on the first of these stages, then on the next one, and so on."""
        groups, turns = range(0, num_microbatches, num_devices), range(num_devices)
        places = itertools.product(groups, laps, turns)
        return [(lap * num_devices + device, kind, first + i) for first, lap, i in places]

    forwards = order("F", range(stages_per_gpu))
    backwards = order("B", range(stages_per_gpu)[::-1])
    ahead = (stages_per_gpu - 1) * num_devices + 2 * (num_devices - 1 - device)
    steady = [*zip(forwards[ahead:], backwards, strict=False)]
    yield from forwards[:ahead]  # warmup
    yield from itertools.chain.from_iterable(steady)
    yield from backwards[len(steady) :]  # cooldown


def zb_h1(device: int, num_devices: int, num_microbatches: int, times: int = 1) -> Row:
    """1F1B with each backward cut in half: I, the gradient of the input, and W, of the weights.

    Other GPUs wait for I only. W fills time that would otherwise be idle: stage s runs it s
    microbatches later. So every stage holds S microbatches, as GPU0 does in any case, and about two
    thirds of the bubble are gone: with f = I = W = 1 a batch takes 3M + S - 1.
    Zero Bubble Pipeline Parallelism (Qi et al., ICLR 2024), the handcrafted schedule ZB-H1.

    >>> from pipedream_simple import format_rows
    >>> print(format_rows(zb_h1(device, 2, 3) for device in range(2)))  # S=2, M=3
    GPU0: F0 F1 I0 W0 F2 I1 W1 I2 W2
    GPU1: F0 I0 F1 I1 W0 F2 I2 W1 W2
    """
    ahead, later = times * (num_devices - 1 - device), times * device
    for _, kind, m in one_f_one_b(0, 1 + ahead, num_microbatches):
        yield device, "I" if kind == "B" else "F", m
        if kind == "B" and m >= later:
            yield device, "W", m - later
    for m in range(max(0, num_microbatches - later), num_microbatches):
        yield device, "W", m


def zb_h2(device: int, num_devices: int, num_microbatches: int) -> Row:
    """ZB-H1 with twice the warmup, and each W twice as late: no bubble, for twice the memory.

    A GPU that has started is never idle, if f = I = W, links are free and M >= 2S - 1. Then it
    holds 2S - 1 microbatches. Stage s starts s turns after stage 0, and is done with a batch as
    much later. So one batch takes as long as with ZB-H1, but the next one begins on each GPU right
    after its own update: N batches take 3MN + S - 1. Same paper, schedule ZB-H2.

    >>> from pipedream_simple import format_rows
    >>> print(format_rows(zb_h2(device, 2, 3) for device in range(2)))  # S=2, M=3
    GPU0: F0 F1 F2 I0 W0 I1 W1 I2 W2
    GPU1: F0 I0 F1 I1 F2 I2 W0 W1 W2
    """
    return zb_h1(device, num_devices, num_microbatches, times=2)


def limited(device: int, num_devices: int, num_microbatches: int, in_flight: int) -> Row:
    """1F1B with another limit of microbatches in flight: in_flight on GPU0, and 1 on the last.

    The limit falls evenly in between, rounded down. in_flight = S is 1F1B, and 1 is naive. 2S - 1
    leaves every result a second turn to arrive: eager 1F1B (Zhuang et al., MLSys 2023), which
    hides slow links at the price of almost twice the memory.

    >>> from pipedream_simple import format_rows
    >>> print(format_rows(limited(device, 2, 4, in_flight=3) for device in range(2)))  # S=2, M=4
    GPU0: F0 F1 F2 B0 F3 B1 B2 B3
    GPU1: F0 B0 F1 B1 F2 B2 F3 B3
    """
    behind = (in_flight - 1) * (num_devices - 1 - device) // max(1, num_devices - 1)
    # The row of a GPU that has so many GPUs behind it.
    return one_f_one_b(device, device + 1 + behind, num_microbatches)


LIBRARY: dict[str, tuple[Callable[..., Iterable[Step]], bool]] = {  # as SCHEDULES
    **SCHEDULES,
    "interleaved": (interleaved, True),
    "zb-h1": (zb_h1, True),
    "zb-h2": (zb_h2, True),
}
