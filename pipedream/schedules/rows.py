"""What does each GPU do in one batch? More schedules than the story has.

Each function lists the steps of one GPU in one batch, as in pipedream_simple.py. To add a schedule,
write such a function and name it in LIBRARY. If the reader may choose how many stages a GPU holds,
it takes one more argument, stages_per_gpu. Which GPU holds which stage follows from the rows. A
forward of kind "F&" runs at the same time as the backward that comes next in its row.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from pipedream_simple import SCHEDULES, Step, UserError, one_f_one_b

Row = Iterator[Step]  # what one GPU does in a batch, in order


def interleaved(
    device: int, num_devices: int, num_microbatches: int, stages_per_gpu: int, hops: int = 2
) -> Row:
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
        rule = f"must be a multiple of num_stages={num_devices} for this schedule"
        raise UserError(f"num_microbatches={num_microbatches} {rule}")

    def order(kind: str, laps: range) -> list[Step]:
        """D microbatches on the first of these stages, then on the next one, and so on."""
        groups, turns = range(0, num_microbatches, num_devices), range(num_devices)
        places = itertools.product(groups, laps, turns)
        return [(lap * num_devices + device, kind, first + i) for first, lap, i in places]

    forwards = order("F", range(stages_per_gpu))
    backwards = order("B", range(stages_per_gpu)[::-1])
    ahead = (stages_per_gpu - 1) * num_devices + hops * (num_devices - 1 - device)
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
    """ZB-H1 with twice the warmup, and each W twice as late: hardly a bubble, for twice the memory.

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


def looped_bfs(device: int, num_devices: int, num_microbatches: int, stages_per_gpu: int) -> Row:
    """GPipe with several small stages per GPU, placed as in interleaved: breadth first.

    All microbatches pass a GPU's first stage, then all pass its next one; the backwards come in
    reverse. The bubble is that of interleaved, a batch takes (V * M + D - 1) / V turns, for any M
    from D on. A microbatch is back at GPU0 M - D turns before it is needed, which hides messages
    shorter than an op. The price is GPipe's memory: all M microbatches. (It was made for sharded
    weights: a stage gathers its own only twice per batch.)
    Breadth-First Pipeline Parallelism (Lamy-Poirier, MLSys 2023), section 4.

    >>> from pipedream_simple import format_rows
    >>> print(format_rows(looped_bfs(device, 2, 2, 2) for device in range(2)))  # D=2, M=2, V=2
    GPU0: F0 F1 F0 F1 B1 B0 B1 B0
    GPU1: F0 F1 F0 F1 B1 B0 B1 B0
    """
    stages = range(device, num_devices * stages_per_gpu, num_devices)
    yield from ((stage, "F", m) for stage in stages for m in range(num_microbatches))
    yield from ((s, "B", m) for s in stages[::-1] for m in reversed(range(num_microbatches)))


def interleaved_zb(
    device: int, num_devices: int, num_microbatches: int, stages_per_gpu: int
) -> Row:
    """Interleaved with each backward cut in half: I at once, and W device d's d backwards later.

    With free links one more forward ahead for each GPU behind is enough, not two, and W
    fills what would be idle. With f = I = W the bubble is a third of interleaved's, (D - 1) / V,
    and no GPU holds more than D microbatches. But nothing is left to hide a message, so slow links
    cost much. M must be a multiple of D. V = 1 is ZB-H1.
    PyTorch's ScheduleInterleavedZeroBubble, after Zero Bubble (Qi et al., ICLR 2024), section 2.

    >>> from pipedream_simple import format_rows
    >>> print(format_rows(interleaved_zb(device, 2, 2, 2) for device in range(2)))  # D=2, M=2, V=2
    GPU0: F0 F1 F0 F1 I0 W0 I1 W1 I0 W0 I1 W1
    GPU1: F0 F1 F0 I0 F1 I1 W0 I0 W1 I1 W0 W1
    """
    owed: list[Step] = []  # the W of every I that has none yet
    for stage, kind, m in interleaved(device, num_devices, num_microbatches, stages_per_gpu, 1):
        yield stage, "I" if kind == "B" else "F", m
        owed += [(stage, "W", m)] * (kind == "B")
        if kind == "B" and len(owed) > device:
            yield owed.pop(0)
    yield from owed


def in_a_v(device: int, num_devices: int, num_microbatches: int, ops: str) -> Row:
    """The steps of a GPU that holds two stages: d (down), and 2D - 1 - d on the way back (up).

    ops names kind and way, such as "F-down I-up": each is for the next microbatch of its kind and
    way, or for none if all have been. The kind B counts as an I and its W.
    """
    turn = Counter[tuple[str, str]]()  # (kind, way) -> the next microbatch
    for kind, way in (op.split("-") for op in ops.split()):
        m = turn["I" if kind == "B" else kind[0], way]
        turn.update((half, way) for half in ("IW" if kind == "B" else kind[0]))
        if m < num_microbatches:
            yield (device if way == "down" else 2 * num_devices - 1 - device), kind, m


def zb_v(device: int, num_devices: int, num_microbatches: int) -> Row:
    """Hardly a bubble at the memory of 1F1B: two stages per GPU, laid out as a V, cut backwards.

    The stages go down the GPUs and up again, so GPU0 holds the first and the last one. A microbatch
    that has come up again starts its backward where it is, and gives back early what it holds: no
    GPU keeps more than D whole microbatches. A GPU that has started is never idle, if f = I = W,
    links are free and M >= 2D - 1: N batches take 3MN + (D - 1) / 2. The price: messages for twice
    as many stages, a GPU0 with both embedding and output layer, and with other times than equal
    ones, or slow links, a bubble again.
    Zero Bubble (Qi et al., ICLR 2024), section 6; Qi et al., NeurIPS 2024 (arXiv 2405.15362).

    >>> from pipedream_simple import format_rows
    >>> print(format_rows(zb_v(device, 2, 3) for device in range(2)))  # D=2, M=3
    GPU0: F0 F1 F2 F0 I0 W0 F1 I1 W1 I0 W0 F2 I2 W2 I1 W1 I2 W2
    GPU1: F0 F0 F1 F1 I0 W0 F2 I0 W0 F2 I1 W1 I1 I2 I2 W1 W2 W2
    """
    down, up, most = device, num_devices - device, max(2 * num_devices - 1, num_microbatches)
    ops = "F-down " * (2 * up - 1) + "F-up F-down " * down + "F-up I-up W-up " * up  # warmup
    ops += "F-down I-down W-down F-up I-up W-up " * (most - num_devices - up + 1)
    ops += "I-down W-down F-up I-up W-up " * (up - 1) + "I-down I-up " * down  # cooldown
    ops += "I-down W-down " * up + "W-up " * down + "W-down " * down
    return in_a_v(device, num_devices, num_microbatches, ops)


def dualpipe_v(device: int, num_devices: int, num_microbatches: int) -> Row:
    """DualPipe in a V: forwards run together with backwards, so that their messages hide.

    Placed as zb_v. In its middle a GPU overlaps the forward of one microbatch with the backward of
    another that goes the other way: while one computes, the other communicates. Here the pair is
    one op. It waits for both inputs, takes overlap_time times the two, and only then hands over its
    results: with 1 it is slower than the two one after the other. W is cut off only where a GPU
    would be idle. With f, B and W of a stage, and F&B of a pair, the GPUs at the bottom of the V
    are idle for (D - 1) * (F&B + B - 3W), if f = I >= W and F&B >= B; the others, which have fewer
    pairs to save time with, for less. (With f > I, as by default, it is more.) A GPU holds D + 1/2
    microbatches. M must be at least 2D.
    DeepSeek-V3 (arXiv 2412.19437), section 3.2.1, cut in half: without its second copy of the
    weights (DualPipeV, by Sea AI Lab and DeepSeek).

    >>> from pipedream_simple import format_rows
    >>> print(format_rows(dualpipe_v(device, 2, 4) for device in range(2)))  # D=2, M=4
    GPU0: F0 F1 F2 F0 I0 W0 F1 F&3 B1 F&2 B0 B2 F&3 B1 B3 I2 W2 I3 W3
    GPU1: F0 F0 F1 F1 F2 B0 F&2 B0 F&3 B1 F&3 B1 B2 B2 I3 I3 W3 W3
    """
    if num_microbatches < 2 * num_devices:
        rule = f"must be at least {2 * num_devices} (2 * num_stages) for dualpipe-v"
        raise UserError(f"num_microbatches={num_microbatches} {rule}")
    down, up = device + 1, num_devices - 1 - device
    ops = "F-down " * 2 * up + "F-down F-up " * down + "I-up W-up F-up " * up  # warmup
    first = "F&" if up else "F"  # GPU D - 1 starts its first backward without delay
    pairs = "F&-down B-up F&-up B-down " * (num_microbatches - 2 * num_devices + down)
    ops += pairs.replace("F&", first, 1) + "B-up F&-up B-down " * up
    ways = ["up", "down"] * down + ["down"] * up  # of the last backwards: only `down` stay whole
    last = [f"{'B' if i < down else 'I'}-{way}" for i, way in enumerate(ways)]
    owed = [f"W-{way}" for way in ways[down:]]
    cooldown = [*last[: 2 * down], *itertools.chain(*zip(owed, last[2 * down :], strict=False))]
    return in_a_v(device, num_devices, num_microbatches, ops + " ".join(cooldown + owed[up:]))


LIBRARY: dict[str, tuple[Callable[..., Iterable[Step]], bool]] = {  # as SCHEDULES
    **SCHEDULES,
    "interleaved": (interleaved, True),
    "looped-bfs": (looped_bfs, True),
    "interleaved-zb": (interleaved_zb, True),
    "zb-h1": (zb_h1, True),
    "zb-h2": (zb_h2, True),
    "zb-v": (zb_v, True),
    "dualpipe-v": (dualpipe_v, True),
}
