"""How long does a step take, with which schedule and which cut? Simulated with measured times."""

import functools
from itertools import pairwise
from typing import NamedTuple

from pipedream.backstage.text import progress
from pipedream.schedules.plans import PLAN_CONFIG, make_plan, run_rows
from pipedream_simple import Op, UserError

from .decide import refused
from .layouts import MOST_SIMULATED
from .profiles import Layer, sent_after
from .search import best_partition

ONE_EACH = "1f1b", "gpipe"  # with one stage per GPU; with two:
TWO_EACH = "interleaved", "looped-bfs", "zb-v", "interleaved-zb", "dualpipe-v"


class Step(NamedTuple):
    """A step of training: all microbatches of a batch, and the update."""

    schedule: str
    firsts: list[int]  # the first layer of each stage
    seconds: float


def possible_steps(
    layers: list[Layer],
    gpus: int,
    num_microbatches: int,
    bandwidth: float | None = None,
    memory: float | None = None,
) -> tuple[list[Step], list[str]]:
    """With each schedule of examples/pipeline.py, the simpler ones first; and reasons why not.

    The cut is that of best_partition. bandwidth: bytes per second, both directions together; None:
    messages take what was measured. memory: bytes of a GPU, as of best_partition.
    """
    rate = bandwidth or measured_rate(layers)
    steps, reasons = list[Step](), dict[str, list[str]]()
    if gpus * num_microbatches > MOST_SIMULATED:
        what = f"microbatches={num_microbatches} * gpus={gpus}"
        raise UserError(f"{what} must be at most {MOST_SIMULATED:,}")

    @functools.cache
    def cut(number: int) -> list[int]:
        limit = memory if number == gpus else None  # two stages of a GPU share its memory
        stages = best_partition(layers, [number], [rate], straight=True, memory=limit).stages
        return [stage.first for stage in stages]

    for name in (*ONE_EACH, *TWO_EACH):
        number = gpus if name in ONE_EACH else 2 * gpus
        try:
            if why := refused(name, gpus, num_microbatches):
                raise UserError(why)
            progress(f"simulating {name}" if gpus * num_microbatches > 1024 else "")
            sizes = gpus, num_microbatches, bandwidth, memory
            steps.append(Step(name, cut(number), time_step(layers, cut(number), name, *sizes)))
        except UserError as error:
            why = str(error).partition(": use")[0].replace("num_stages", "gpus")
            reasons.setdefault(why.replace("num_m", "m"), []).append(name)
    progress("")
    return steps, [f"Left out: {', '.join(names)}: {why}." for why, names in reasons.items()]


def measured_rate(layers: list[Layer]) -> float:
    """Bytes per second, both directions together, of the largest message. UserError: unknown."""
    largest = max(layers[:-1], key=lambda layer: layer.activation, default=layers[0])
    if not (largest.message and largest.activation):
        raise UserError("the profile has no times of messages: give --bandwidth, bytes per second")
    return 2 * largest.activation / largest.message


def time_step(
    layers: list[Layer],
    firsts: list[int],
    schedule: str,
    gpus: int,
    num_microbatches: int,
    bandwidth: float | None = None,
    memory: float | None = None,
) -> float:
    """Seconds, with stages that begin with these layers, on PyTorch's engine.

    That asks for a message right before the op that needs it, so no message is hidden: it counts as
    a part of that op. And all GPUs wait for each other before the update, since clipping needs the
    norm of all gradients. (What ties add is not counted.) UserError: a GPU keeps more than memory.
    """
    sizes = {"num_stages": gpus, "layers_per_stage": 2, "chunks_per_gpu": 2, "num_batches": 1}
    sizes |= {"num_microbatches": num_microbatches, "batch_size": num_microbatches}
    plan = make_plan({**PLAN_CONFIG, "schedule": schedule, **sizes})
    home = {op.stage: gpu for gpu, row in enumerate(plan.schedule) for op in row}
    spans = [layers[first:end] for first, end in pairwise([*firsts, len(layers)])]
    most = max(most_kept(row, spans) for row in plan.schedule)
    if memory is not None and most > memory:
        raise UserError(f"a GPU keeps {most / 1e9:.4g} GB")
    sums = [[sum(costs) for costs in zip(*map(costs_of_ops, span), strict=True)] for span in spans]
    times = dict(zip("FBIWU", map(list, zip(*sums, strict=True)), strict=True))
    for stage in range(1, len(spans)):
        if home[stage] != home[stage - 1]:
            layer = spans[stage - 1][-1]
            message = 2 * sent_after(layer) / bandwidth if bandwidth else layer.message or 0
            times["F"][stage] += message
            times["B"][stage - 1] += message
            times["I"][stage - 1] += message
    events, _ = run_rows(plan.schedule, plan.config, plan.pairs, times)
    updates = (sum(times["U"][s] for s in {op.stage for op in row}) for row in plan.schedule)
    return max(event.end for event in events if event.op.kind != "U") + max(updates)


def most_kept(row: list[Op], spans: list[list[Layer]]) -> float:
    """Bytes on a GPU: weights, and at its fullest moment what layers keep of microbatches."""
    kept = [sum(c.activation if c.kept is None else c.kept for c in span) for span in spans]
    now = most = 0.0
    for stage, kind, *_ in row:
        now += {"F": kept[stage], "B": -kept[stage], "W": -kept[stage]}.get(kind, 0)
        most = max(most, now)
    return most + sum(layer.weights for stage in {op.stage for op in row} for layer in spans[stage])


def costs_of_ops(layer: Layer) -> tuple[float, float, float, float, float]:
    """Seconds of F, B, I, W and U."""
    halves = layer.input_gradient, layer.weight_gradient
    i, w = (layer.backward / 2 if half is None else half for half in halves)
    return layer.forward, layer.backward, i, w, layer.update
