"""Do I need a pipeline, and which? The list of README, section 5.

Steps 1 to 4 divide the GPUs: the first layout that fits is taken. Steps 5 and 6 are about the
schedule of a pipeline. What a GPU holds, and times, come from the caller.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from .layouts import MOST_SIMULATED, NO_PIPELINE, RECOMPUTE, Layout, Way, gigabytes

TITLES = (
    "Does it fit on one GPU?",
    "Does it fit with ZeRO?",
    "Does it fit in parts?",
    "Does it fit with recompute?",
    "Which schedule?",
    "Do old gradients pay?",
)
SIMPLEST = (  # of PyTorch's schedules, the simplest first
    *(NO_PIPELINE, "1f1b", "gpipe", "interleaved", "looped-bfs", "zb-h1", "zb-v"),
    *("interleaved-zb", "dualpipe-v"),
)
FEWEST = {"1f1b": 1, "dualpipe-v": 2}  # microbatches per GPU, or PyTorch refuses
IN_ROUNDS = "interleaved", "interleaved-zb", "zb-h1"  # about as many at a time as there are GPUs
CLOSE = 1.05  # a simpler schedule may take so many times as long as the fastest
MUCH, MORE = 1.5, 2.7  # times as many batches: what one late batch costs Adam at most, and seven


class Case(NamedTuple):
    """What steps 1 to 4 ask about."""

    gpus: int
    machine: int
    heads: int  # of attention, which tensor parallelism divides
    memory: float
    batches: list[int]  # microbatches in a batch: the number given, then more and smaller ones
    need: Callable[[Layout, str], float]  # bytes, with that recompute; inf: impossible


class Found(NamedTuple):
    """The first layout that fits, or else the one that needs least."""

    need: float
    layout: Layout
    fits: bool


def candidates(case: Case) -> Iterator[tuple[str, list[Layout]]]:
    """Of each step: the kind of recompute, and what is tried in this order."""
    one = Layout(case.gpus, 1, 1, 0, case.machine, case.batches[0])
    zero, parts = [one._replace(zero=stage) for stage in (1, 2, 3)], list[Layout]()
    for number in range(2, case.gpus + 1):  # as few parts as fit: Megatron-LM (2021), takeaway 2
        if case.gpus % number == 0:
            tensor = math.gcd(number, case.machine, case.heads)  # takeaway 1
            sizes = {"tensor": tensor, "stages": number // tensor, "zero": int(number < case.gpus)}
            parts.append(one._replace(replicas=case.gpus // number, **sizes))
    yield from (("none", tries) for tries in ([one], zero, parts or [one]))
    yield "layer", [one, *zero, *parts]


def first_fit(case: Case, tries: list[Layout], kind: str) -> Found:
    found = Found(math.inf, tries[0], False)
    for layout in tries:
        for number in case.batches:
            tried = layout._replace(microbatches=number)
            need, divides = case.need(tried, kind), number % layout.replicas == 0
            if need <= case.memory and divides:
                free = layout.zero or int(layout.replicas > 1)  # stage 1 sends no more than none
                return Found(need, tried._replace(zero=free), True)
            found = min(found, Found(need, tried, False))
    return found


def walk(case: Case) -> tuple[list[str], Found]:
    """What steps 1 to 4 say, and the first layout that fits."""
    said, all_found = list[str](), list[Found]()
    for title, (kind, tries) in zip(TITLES, candidates(case), strict=False):
        found = first_fit(case, tries, kind)
        what = f"{gigabytes(found.need)} GB" + f" ({found.layout})" * (len(said) > 0)
        if not found.fits and found.need <= case.memory:
            replicas = f"{found.layout.replicas} replicas"
            what += f" would do, but {case.batches[0]} microbatches are no multiple of {replicas}"
        elif found.need == math.inf:
            what = "the layers cannot be cut so"
        said.append(f"{len(said) + 1}. {title} {'Yes' if found.fits else 'No'}: {what}.")
        all_found.append(found)
        if found.fits:
            return said, found
    return said, min(all_found)


def enough_gpus(case: Case) -> int:
    """Twice as many, and again, until it fits with recompute; 0: not even 256 would do."""
    for gpus in (case.gpus << n for n in range(1, 9) if case.gpus << n <= 256):
        if not (batches := [number for number in case.batches if gpus * number <= MOST_SIMULATED]):
            return 0
        more = case._replace(gpus=gpus, batches=batches[-1:])
        *_, (kind, tries) = candidates(more)
        if first_fit(more, tries, kind).fits:
            return gpus
    return 0


def choose(ways: list[Way], layout: Layout, memory: float) -> tuple[list[str], Way | None, str]:
    """What steps 5 and 6 say, a schedule of PyTorch, and its recompute: as little as can be."""
    fitting, kind = list[Way](), ""
    sizes = layout.stages, layout.each
    known = [way for way in ways if way.name in SIMPLEST and not refused(way.name, *sizes)]
    for kind in RECOMPUTE:
        fitting = [way for way in known if way.needs[kind].total <= memory]
        if fitting:
            break
    else:
        return [], None, kind
    fitting.sort(key=lambda way: SIMPLEST.index(way.name))
    fastest = min(way.times[kind] for way in fitting)
    best = next(way for way in fitting if way.times[kind] <= CLOSE * fastest)
    times = ", ".join(f"{way.name} {way.times[kind]:.2f}" for way in fitting)
    said = [
        f"5. {TITLES[4]} {times}: {best.name} is the first within {CLOSE - 1:.0%} of the fastest.",
        f"6. {TITLES[5]} {old_gradients(ways, best, kind, layout, memory)}",
    ]
    return said if layout.stages > 1 else [], best, kind


def refused(schedule: str, gpus: int, microbatches: int) -> str:
    """Why PyTorch's engine does not take so many microbatches; nothing where it does."""
    fewest, rounds = FEWEST.get(schedule, 0) * gpus, max(1, microbatches // gpus)
    if microbatches < fewest:
        return f"PyTorch's engine asks for {fewest} microbatches"
    if schedule in IN_ROUNDS and microbatches % rounds:
        return f"PyTorch's engine asks for a multiple of {rounds} microbatches"
    return ""


def old_gradients(ways: list[Way], best: Way, kind: str, layout: Layout, memory: float) -> str:
    """Is the best way so slow that PipeDream is worth a try?"""
    enough = layout.each >= layout.stages - 1  # then no gradient is more than one batch late
    name, much = ("pipedream 2BW", MUCH) if enough else ("pipedream 2019", MORE)
    old = next((way for way in ways if way.name == name), None)
    if old is None or old.needs[kind].total > memory:
        return f"No: {name} does not fit."
    ratio = best.times[kind] / old.times[kind]
    text = f"{best.name} takes {ratio:.2f} times as long as {name}"
    if ratio < much:
        return f"No: {text}, less than {much}."
    tolerant = "If your optimizer tolerates delay, measure first: python -m pipedream worth"
    return f"Perhaps: {text}. {tolerant}"
