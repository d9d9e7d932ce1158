"""What the simulated GPUs did with their time: idle times and their causes; and what they hold."""

from collections.abc import Iterator
from typing import NamedTuple

from pipedream_simple import Event, Schedule, Step, inputs_of, makespan, memory_held, result_of

from .text import clock


def tick(time: float) -> float:
    """A time without the last digits of rounding, so that 0.1 + 0.2 and 0.3 are one moment."""
    return float(f"{float(time):.12g}")


def rounded(events: list[Event]) -> list[Event]:
    """Events with times as in tick, so that ops that follow each other meet."""
    return [Event(op, device, tick(start), tick(end)) for op, device, start, end in events]


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
    "send": "GPU{0} waits until {4}: what {1} needs is on its way from GPU{3}",
    "drain": "GPU{0} is done: nothing is left for it to run",
}


def dependencies(events: list[Event]) -> Iterator[tuple[Event, Event | None, Event | None]]:
    """Each event, the previous one on its GPU, and the one whose result it needs, if any."""
    num_stages = 1 + max(event.op.stage for event in events)
    latest: dict[int, Event] = {}
    computed: dict[int, Event] = {}  # as latest, without updates
    made: dict[Step, Event] = {}
    for event in events:
        previous = latest.get(event.device)
        needed = next((made.get(step) for step in inputs_of(event.op, num_stages)), None)
        if event.op.kind == "U" and previous and previous.end < event.start:
            # Replicas update together, once the last of them has computed its gradients.
            peers = (e for e in computed.values() if e.op.stage == event.op.stage)
            needed = next((e for e in peers if e.end == event.start), None)
        yield event, previous, needed
        latest[event.device] = made[result_of(event.op)] = event
        if event.op.kind != "U":
            computed[event.device] = event


def idle_times(events: list[Event]) -> list[Idle]:
    """When was a GPU idle, and why? Sorted by start; together they are the bubble.

    >>> from pipedream_simple import CONFIG, build_schedule, simulate
    >>> config = {**CONFIG, "num_stages": 2, "num_microbatches": 1, "num_batches": 1}
    >>> for idle in idle_times(simulate(build_schedule(config), config)):
    ...     print(f"t{idle.start}: {idle}")
    t0: GPU1 cannot start until t1: its first op, F0, needs F0 of GPU0
    t1: GPU0 waits until t3: its next op, B0, needs B0 of GPU1
    t3: GPU1 is done: nothing is left for it to run
    """
    idle, last, over = [], {}, makespan(events)
    for event, previous, needed in dependencies(events):
        device, free_at = event.device, previous.end if previous else 0
        ready_at = max(free_at, needed.end) if needed else free_at  # and then it has to travel
        waits = ("wait" if previous else "fill", free_at, ready_at), ("send", ready_at, event.start)
        idle += [Idle(device, a, b, cause, event, needed) for cause, a, b in waits if a < b]
        last[device] = event
    ends = ((device, event.end) for device, event in last.items())
    idle += [Idle(device, end, over, "drain", None, None) for device, end in ends if end < over]
    return sorted(idle, key=lambda wait: (wait.start, wait.device))


def peak_in_flight(schedule: Schedule) -> list[int]:
    """The most microbatches that each device holds at once."""
    return [max(in_flight for in_flight, _ in memory_held(row)) for row in schedule]


def peak_versions(schedule: Schedule) -> list[int]:
    """The most weight versions that each device holds at once, of each of its stages."""
    alive = [max(alive for _, alive in memory_held(row)) for row in schedule]
    return [n // len({op.stage for op in row}) for n, row in zip(alive, schedule, strict=True)]


def staleness(schedule: Schedule, num_microbatches: int) -> list[int]:
    """Per device, the most updates that a forward misses: plain SGD reads version b for batch b."""
    forwards = [[op for op in row if op.kind == "F"] for row in schedule]
    return [max(op.microbatch // num_microbatches - op.version for op in row) for row in forwards]
