"""What does the run look like in a profiler? A Chrome trace.

    python -m pipedream trace run.json     then open it at ui.perfetto.dev or chrome://tracing

A time unit of the simulation is a millisecond of the trace.
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

from pipedream.backstage.measures import held_by
from pipedream.backstage.output import write
from pipedream.schedules.files import file_of
from pipedream.schedules.plans import Plan, make_plan
from pipedream_simple import Event, count, inputs_of, result_of

FLAGS = {"FILE": "to write: a name that ends in .json"}


def main(config: dict, file: Path) -> None:
    plan = make_plan(config)
    events = [*trace_events(plan)]
    text = json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}, default=float)  # NumPy, too
    write(file, lambda path: path.write_text(text, "utf-8"), file_of(config), ".json")
    print(f"{file}: {plan.name}, {count(len(events), 'event')}; open it at ui.perfetto.dev")


def trace_events(plan: Plan) -> Iterator[dict]:
    """One track per GPU, one event per op, arrows for what is sent, counters for what is held.

    A trace counts in microseconds.
    """
    from pipedream_visual import KINDS

    for device in range(len(plan.schedule)):
        yield {"ph": "M", "name": "process_name", "pid": device, "args": {"name": f"GPU{device}"}}
    made = {result_of(event.op): event for event in plan.events}
    sent, held = itertools.count(), [iter(held_by(row)) for row in plan.schedule]
    for event in plan.events:
        op, device, start, end = event
        counters = "microbatches in flight", "weight versions"
        for what, number in zip(counters, next(held[device]), strict=True):
            args = {"held": number}
            yield {"ph": "C", "name": what, "pid": device, "ts": 1000 * end, "args": args}
        here = {"pid": device, "tid": 0, "ts": 1000 * start, "args": op._asdict()}
        if op.kind == "U":
            yield {**here, "ph": "i", "s": "p", "name": f"update to v{op.version + 1}"}
            continue
        name, lasts = {"name": str(op), "cat": KINDS[op.kind]}, 1000 * (end - start)
        yield {**here, **name, "ph": "X", "dur": lasts}
        for step in inputs_of(op, plan.config["num_stages"]):
            if made[step].device != device:
                yield from arrow(made[step], event, next(sent))


def arrow(sender: Event, receiver: Event, number: int) -> Iterator[dict]:
    """From the middle of one op to the middle of the one that needs its result."""
    what = "activations" if receiver.op.kind == "F" else "gradients"
    both = {"name": what, "cat": "sent", "id": number, "tid": 0}
    began, ended = ({"pid": e.device, "ts": 500 * (e.start + e.end)} for e in (sender, receiver))
    yield {**both, "ph": "s", **began}
    yield {**both, "ph": "f", **ended, "bp": "e"}
