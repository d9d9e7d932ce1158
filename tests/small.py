"""Small plans, and what is done with them in several files."""

import torch
from reference import delayed_sgd

from pipedream.schedules.halves import train_plan
from pipedream.schedules.memory import MemoryMeter
from pipedream.schedules.plans import PLAN_CONFIG, make_plan

SMALL = {**PLAN_CONFIG, "hidden_size": 12, "device": "cpu", "num_batches": 3}
FLUSHING = (  # in the order of tables
    *("naive", "gpipe", "1f1b", "interleaved", "looped-bfs", "interleaved-zb"),
    *("zb-h1", "zb-h2", "zb-v", "dualpipe-v"),
)
V_SHAPED = "zb-v", "dualpipe-v"  # two stages per GPU


def fits(schedule, num_stages, num_microbatches):
    """Is that schedule possible at this size?"""
    if schedule.startswith("interleaved"):
        return num_microbatches % num_stages == 0
    return schedule != "dualpipe-v" or num_microbatches >= 2 * num_stages


def plan_of(schedule, chunks_per_gpu=1, **settings):
    return make_plan(
        {**SMALL, "schedule": str(schedule), "chunks_per_gpu": chunks_per_gpu, **settings}
    )


def cells_of(plan):
    """[["0F0", ...] of each GPU] of its first batch; the forward of a pair is an F&."""
    first = [
        [op for op in row if op.microbatch < plan.config["num_microbatches"]]
        for row in plan.schedule
    ]
    return [
        [
            f"{s}{kind}{'&' * ((s, kind, m) in plan.pairs)}{m}"
            for s, kind, m, _ in row
            if kind != "U"
        ]
        for row in first
    ]


def assert_close(ours, theirs, tolerance=1e-12):
    """The weights of all stages."""
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for name, w in mine.items():
            torch.testing.assert_close(
                w.detach(), other[name].detach(), rtol=0, atol=tolerance, msg=name
            )


def same_as_recurrence(plan, delay=lambda stage: 0):
    """Train in float64: the losses and weights of delayed SGD, of plain SGD without a delay."""
    run = train_plan(plan, torch.float64)
    losses, weights = delayed_sgd(plan.config, delay)
    torch.testing.assert_close(torch.tensor(run.losses), torch.tensor(losses), rtol=0, atol=1e-12)
    assert_close(run.weights, weights)
    return run


def peak_of(plan):
    """What the meter counts, per GPU."""
    meter = MemoryMeter(plan.schedule)
    meter.train(plan)
    return meter.peak
