"""Why does a GPU wait, why in this order, and why on these weights? Told from rows and events."""

from pipedream.backstage.measures import (
    Idle,
    deciding,
    dependencies,
    held_by,
    held_up,
    idle_times,
    in_short,
    partners,
    short_name,
    tick,
)
from pipedream.backstage.text import clock
from pipedream.schedules.plans import Plan
from pipedream.schedules.rows import LIBRARY
from pipedream_simple import Event, Op, Step


def critical_path(plan: Plan) -> list[Event]:
    """A chain of ops that sets the makespan: none of them could have started any earlier.

    Each starts when the previous one has ended, on the same GPU, or when its result arrives; or if
    a busy link held that up, when the results before it have passed. There may be several such
    chains. Times must be rounded, so that ops that follow each other meet.
    """
    waited = deciding(dependencies(plan.events, plan.links))
    before = held_up(plan.events, plan.links)
    event_of = {event.op: event for event in plan.events}
    event: Event | None = max(plan.events, key=lambda event: event.end)
    path = []
    while event:
        path.append(event)
        _, previous, needed, message = waited[event]
        event = previous if previous and previous.end == event.start else needed
        if message and event is needed:
            while message in before:  # back to the one that left as soon as it was made
                message = before[message]
            event = event_of[message.op]
    return path[::-1]


ORDER = {  # why does another op have to wait? About Idle.next {next} and the other op {other}
    "none": "Nothing else is ready to run.",
    "flush": "{other} could run{since}, but it belongs to the next batch, which waits for the "
    "update: the flush.",
    "limit": "{other} could run{since}, but GPU{device} already holds {held} in flight, its limit "
    "in this schedule.",
    "pair": "{other} could run{since}, but it runs together with {next}.",
    "row": "{other} could run{since}, but this schedule puts {next} first.",
}
READS = {  # why does an op read its weight version {v}? Said of the op; {new} is the newest then
    "first": "It reads v{v}, the initial weights.",
    "fresh": "It reads v{v}, up to date, as in plain SGD.",
    "stale": "It reads v{v}, the newest here. Plain SGD would read v{batch}, but that still waits "
    "for microbatches in flight.",
    "pinned": "It reads v{v}, which the first forward of its batch pinned, though v{new} exists.",
    "synced": "It reads v{v}, which stage 0 pinned for its batch. (The newest here is v{new}.)",
    "same": "It reads v{v}, as its forward did.",
    "stashed": "It reads v{v}, as its forward did: v{v} was stashed for it. (v{new} is newer.)",
    "wrong": "It reads v{v}, the newest, but its forward read v{forward}: the gradient is wrong.",
    "W": "It reads no weights, only what its forward and its I left.",
    "U": "It turns v{v} into v{made}: the batch has no more backwards on this GPU.",
}
SAYS = {  # of an op
    "runs": "GPU{gpu} runs {op} from {start} to {end}.",
    "with": "It runs together with {op}, as a pair: from when both inputs are there.",
    "needed": "Its input is from {op} of GPU{gpu}, done at {end}.",
    "needed by": "Its result goes to {op} of GPU{gpu}, at {start}.",
}


def said(key: str, event: Event) -> str:
    start, end = clock(event.start), clock(event.end)
    return SAYS[key].format(gpu=event.device, op=short_name(event), start=start, end=end)


class Reasons:
    """Why a GPU runs its ops in this order, and on these weights: all from rows and events."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.starts = {start.event: start for start in dependencies(plan.events, plan.links)}
        self.ready: dict[Op, float] = {}  # when the input of an op is there
        self.place: dict[Op, int] = {}  # in its row
        self.newest: dict[Op, int] = {}  # version on the op's stage
        ended: dict[Step, float] = {}
        for (op, _, _, end), start in self.starts.items():
            is_w = op.kind == "W"
            self.ready[op] = ended[op.stage, "I", op.microbatch] if is_w else start.arrived
            ended[op[:3]] = end
        for row in plan.schedule:
            made = {op.stage: 0 for op in row}
            for place, op in enumerate(row):
                self.place[op], self.newest[op] = place, made[op.stage]
                made[op.stage] += op.kind == "U"
        self.event_of = {event.op: event for event in plan.events}
        self.held = [[0, *(held for held, _ in held_by(row))] for row in plan.schedule]
        self.pair, self.before = partners(plan.events), held_up(plan.events, plan.links)
        self.flushes = LIBRARY.get(plan.config["schedule"], (None, True))[1]  # a file does, too
        self.forward = {op[::2]: op for op in self.place if op.kind == "F"}

    def order(self, idle: Idle) -> tuple[str, Event | None]:
        """Of an idle time: why does the row not put another op first? And which one could run?"""
        if idle.next is None:
            return "", None
        row, pair = self.plan.schedule[idle.device], (idle.next, self.pair.get(idle.next))
        place = min(self.place[event.op] for event in pair if event)
        message, leaves = self.starts[idle.next].message if idle.cause == "send" else None, ""
        if message in self.before and message:
            first = short_name(self.event_of[self.before[message].op])
            leaves = f"It could not leave before {clock(message.start)}, after {first}. "
        start, end = tick(idle.start), tick(idle.end)
        others = (op for op in row[place:] if op != idle.next.op and op.kind != "U")
        other = next((op for op in others if tick(self.ready[op]) < end), None)
        held = self.held[idle.device]
        if other is None:
            return leaves + ORDER["none"], None
        key = "row"
        if self.pair.get(self.event_of[other]) == idle.next:
            key = "pair"
        elif other.kind == "F" and self.flushes and other.version > self.newest[idle.next.op]:
            key = "flush"
        elif other.kind == "F" and held[place] == max(held):
            key = "limit"
        ready = tick(self.ready[other])
        since = f" from {clock(ready)} on" if ready > start else ""
        (number,) = in_short([held[place]])
        microbatches = f"{number} microbatch{'es' * (number != '1')}"
        words = {"held": microbatches, "since": since, "device": idle.device}
        text = ORDER[key].format(next="{next}", other="{other}", **words)
        return leaves + text, self.event_of[other]

    def reads(self, op: Op) -> str:
        """Why does this op read the weight version that it reads?"""
        v, new, config = op.version, self.newest[op], self.plan.config
        batch, forward = op.microbatch // config["num_microbatches"], self.forward[op[::2]].version
        if op.kind in "WU":
            key = op.kind
        elif op.kind != "F":
            key = "wrong" if v != forward else "stashed" if v < new else "same"
        elif v == batch:
            key = "fresh" if v else "first"
        elif config["vertical_sync"] and v < new:
            key = "synced"
        else:
            key = "pinned" if v < new else "stale"
        return READS[key].format(v=v, new=new, batch=batch, forward=forward, made=v + 1)

    def explain_idle(self, idle: Idle) -> str:
        """One or two sentences: what the GPU waits for, and why it runs nothing else meanwhile."""
        text, other = self.order(idle)
        names = {"next": idle.next and short_name(idle.next), "other": other and short_name(other)}
        return f"{idle}. {text.format(**names)}".strip()

    def busy(self, event: Event, needed: Event) -> str:
        """What a GPU runs now, and whether that or something later is what others wait for."""
        line = f"GPU{event.device} runs {short_name(event)} until {clock(event.end)}"
        if needed in (event, self.pair.get(event)):
            return f"{line}."
        in_batch = self.plan.config["num_microbatches"]
        batch, later = (e.op.microbatch // in_batch for e in (event, needed))
        then = "after the flush" if self.flushes and batch < later else "after that"
        return f"{line}, and {short_name(needed)} {then}."


def explain_moment(plan: Plan, device: int, time: float) -> list[str]:
    """What a GPU does at a time before the makespan, and why; if it waits, then also for whom."""
    plan = plan.rounded()
    reasons, time = Reasons(plan), tick(time)
    found_at: list[Event | Idle] = [*plan.events, *idle_times(plan.events, plan.links)]

    def at(device: int) -> Event | Idle:
        mine = (found for found in found_at if found.device == device)
        return next(found for found in mine if found.start <= time < found.end)

    found = at(device)
    if isinstance(found, Event):
        return explain_op(reasons, found)
    lines = [reasons.explain_idle(found)]
    while isinstance(found, Idle) and found.needed and found.needed.end > time:
        needed, found = found.needed, at(found.needed.device)
        lines.append(f"{found}." if isinstance(found, Idle) else reasons.busy(found, needed))
    return lines


def explain_op(reasons: Reasons, event: Event) -> list[str]:
    """What a GPU runs, on which weights and why, and where its input and its result go."""
    lines = [said("runs", event) + " " + reasons.reads(event.op)]
    lines += [said("with", other) for e, other in reasons.pair.items() if e == event]
    starts = reasons.starts.values()
    lines += [said("needed", s.needed) for s in starts if s.event == event and s.needed]
    return lines + [said("needed by", s.event) for s in starts if s.needed == event]
