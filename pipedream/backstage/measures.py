"""What the simulated GPUs did with their time: idle times and their causes; and what they hold."""

import itertools
from collections.abc import Iterable
from typing import NamedTuple

from pipedream_simple import Event, Op, Schedule, Step, inputs_of, makespan, memory_held, result_of

from .text import clock


def tick(time: float) -> float:
    """A time without the last digits of rounding, so that 0.1 + 0.2 and 0.3 are one moment."""
    return float(f"{float(time):.12g}")


def rounded(events: list[Event]) -> list[Event]:
    """Events with times as in tick, so that ops that follow each other meet."""
    return [Event(op, device, tick(start), tick(end)) for op, device, start, end in events]


Links = dict[tuple[int, int], list[Event]]  # (from, to) -> messages in order, as simulate has them


class Idle(NamedTuple):
    """A time in which a GPU computes nothing, and why. str() says it in a sentence."""

    device: int
    start: float
    end: float
    cause: str  # a key of CAUSES
    next: Event | None  # what the GPU runs afterwards
    needed: Event | None  # whose result that waits for

    def __str__(self) -> str:
        ops = [event and short_name(event) for event in (self.next, self.needed)]
        sender, until = self.needed and self.needed.device, clock(self.end)
        return CAUSES[self.cause].format(self.device, *ops, sender, until)


def short_name(event: Event) -> str:
    """F3, for microbatch 3; on a GPU that holds several stages also 5F3, for stage 5."""
    op = event.op
    return f"{op.kind}{op.microbatch}" if op.stage == event.device else str(op)


CAUSES = {  # of idle time
    "fill": "GPU{0} cannot start until {4}: its first op, {1}, needs {2} of GPU{3}",
    "wait": "GPU{0} waits until {4}: its next op, {1}, needs {2} of GPU{3}",
    "link": "GPU{0} waits until {4}: what {1} needs is done, but the link from GPU{3} carries {2}",
    "send": "GPU{0} waits until {4}: what {1} needs is on its way from GPU{3}",
    "drain": "GPU{0} is done: nothing is left for it to run",
}


class Start(NamedTuple):
    """What decided when an op could start."""

    event: Event
    previous: Event | None  # on its GPU, before it or before the pair that it is in
    needed: Event | None  # whose result is its input
    message: Event | None  # which brings that from another GPU

    @property
    def arrived(self) -> float:
        """When its input is there."""
        last = self.message or self.needed
        return last.end if last else 0


def dependencies(events: list[Event], links: Links) -> list[Start]:
    """Each event with the one before it on its GPU, and where its input is from."""
    num_stages = 1 + max(event.op.stage for event in events)
    message_of = {result_of(m.op): m for link in links.values() for m in link}
    latest, pair = dict[int, Start](), partners(events)
    computed: dict[int, Event] = {}  # without updates
    made: dict[Step, Event] = {}
    starts = []
    for event in events:
        before = latest.get(event.device)
        previous = before and before.event
        if before and pair.get(event) == before.event:
            previous = before.previous
        steps = [step for step in inputs_of(event.op, num_stages) if step in made]
        needed, message = (each.get(steps[0]) if steps else None for each in (made, message_of))
        if event.op.kind == "U" and previous and previous.end < event.start:
            # Replicas update together, once the last of them has computed its gradients.
            peers = (e for e in computed.values() if e.op.stage == event.op.stage)
            needed = next((e for e in peers if e.end == event.start), None)
        starts.append(Start(event, previous, needed, message))
        latest[event.device], made[result_of(event.op)] = starts[-1], event
        if event.op.kind != "U":
            computed[event.device] = event
    return starts


def partners(events: list[Event]) -> dict[Event, Event]:
    """Each op of a pair, which run at the same time on one GPU -> the other one."""
    first: dict[tuple, Event] = {}
    both = ((first.setdefault(e[1:], e), e) for e in events if e.start < e.end)
    return {one: other for a, b in both if a != b for one, other in ((a, b), (b, a))}


def deciding(starts: list[Start]) -> dict[Event, Start]:
    """Each event -> what it waited for: of a pair both wait for the input that arrives last."""
    of, pair = {start.event: start for start in starts}, partners([s.event for s in starts])
    blocks = {event: (start, of[pair.get(event, event)]) for event, start in of.items()}
    return {e: max(both, key=lambda s: (s.arrived, s.event.op)) for e, both in blocks.items()}


def held_up(events: list[Event], links: Links) -> dict[Event, Event]:
    """A message that had to wait -> the one that the link carried until this one could leave."""
    made = {event.op: event.end for event in events}
    neighbors = itertools.chain.from_iterable(map(itertools.pairwise, links.values()))
    return {message: before for before, message in neighbors if made[message.op] < message.start}


def idle_times(events: list[Event], links: Links) -> list[Idle]:
    """When was a GPU idle, and why? Sorted by start; together they are the bubble.

    >>> from pipedream_simple import CONFIG, build_schedule, simulate
    >>> config = {**CONFIG, "num_stages": 2, "num_microbatches": 1, "num_batches": 1}
    >>> for idle in idle_times(simulate(build_schedule(config), config), {}):
    ...     print(f"t{idle.start}: {idle}")
    t0: GPU1 cannot start until t1: its first op, F0, needs F0 of GPU0
    t1: GPU0 waits until t3: its next op, B0, needs B0 of GPU1
    t3: GPU1 is done: nothing is left for it to run
    """
    idle, last, over = [], {}, makespan(events)
    before, event_of = held_up(events, links), {event.op: event for event in events}
    waited = dict.fromkeys(deciding(dependencies(events, links)).values())  # of a pair one
    for event, previous, needed, message in waited:
        device, free_at = event.device, previous.end if previous else 0
        ready_at = max(free_at, needed.end) if needed else free_at  # and then it has to travel
        waits = [("wait" if previous else "fill", free_at, ready_at, needed)]
        leaves = max(ready_at, message.start) if message else ready_at
        waits.append(("send", leaves, event.start, needed))
        while message in before and message and message.start > ready_at:  # for that, and that ...
            message = before[message]
            first = max(ready_at, message.start)
            waits.append(("link", first, message.end, event_of[message.op]))
        idle += [Idle(device, a, b, cause, event, other) for cause, a, b, other in waits if a < b]
        last[device] = event
    ends = ((device, event.end) for device, event in last.items())
    idle += [Idle(device, end, over, "drain", None, None) for device, end in ends if end < over]
    return sorted(idle, key=lambda wait: (wait.start, wait.device))


def held_by(row: list[Op]) -> list[tuple[float, int]]:
    """As memory_held, in whole microbatches: on one of a GPU's V stages it holds 1 / V of one."""
    held, num_stages = memory_held(row), len({op.stage for op in row})
    return [(n / num_stages, alive) for n, alive in held] if num_stages > 1 else [*held]


def peak_in_flight(schedule: Schedule) -> list[float]:
    """The most microbatches that each device holds at once."""
    return [max(in_flight for in_flight, _ in held_by(row)) for row in schedule]


def in_short(microbatches: Iterable[float]) -> list[str]:
    """4, 4.5, 4.67: parts of a microbatch are told with three digits."""
    return [f"{number:.3g}" for number in microbatches]


def peak_versions(schedule: Schedule) -> list[int]:
    """The most weight versions that each device holds at once, of each of its stages."""
    alive = [max(alive for _, alive in memory_held(row)) for row in schedule]
    return [n // len({op.stage for op in row}) for n, row in zip(alive, schedule, strict=True)]


def staleness(schedule: Schedule, num_microbatches: int) -> list[int]:
    """Per device, the most updates that a forward misses: plain SGD reads version b for batch b."""
    forwards = [[op for op in row if op.kind == "F"] for row in schedule]
    return [max(op.microbatch // num_microbatches - op.version for op in row) for row in forwards]
