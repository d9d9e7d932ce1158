"""Bytes that exist: the meter against the formula, against shapes, and against leaks."""

import pytest
import torch
from small import SMALL, peak_of, plan_of

import pipedream.schedules.memory
from pipedream.schedules.memory import Bytes, MeteredWorker, memory_formula
from pipedream.schedules.plans import all_plans
from pipedream.schedules.rows import LIBRARY


@pytest.mark.parametrize(
    "settings",
    [
        {"num_microbatches": 1},
        {"num_microbatches": 8, "num_batches": 5},
        {"num_stages": 1, "layers_per_stage": 1, "chunks_per_gpu": 1},
        {"num_stages": 3, "layers_per_stage": 2, "chunks_per_gpu": 2, "num_microbatches": 6},
        {"num_stages": 4, "layers_per_stage": 1, "chunks_per_gpu": 1},
        {"num_stages": 1, "layers_per_stage": 1, "chunks_per_gpu": 1, "recompute": True},
        {"recompute": True, "momentum": 0.9},
        {"num_microbatches": 8, "num_batches": 5, "recompute": True},
        {"num_microbatches": 8, "layers_per_stage": 6, "comm_time": [3, 0, 9, 1]},
        {"num_microbatches": 8, "layers_per_stage": 6, "recompute": True, "overlap_time": 0.5},
    ],
    ids=str,
)
def test_measured_memory_is_what_the_formula_says(settings):
    plans, reasons = all_plans({**SMALL, "batch_size": 24, **settings})
    assert len(plans) + len(reasons) == len(LIBRARY) + 2
    assert not reasons or settings.get("layers_per_stage") != 6
    for plan in plans:
        assert peak_of(plan) == memory_formula(plan), plan.name


def test_the_meter_counts_the_storages_of_a_plain_forward():
    """One Linear on one stage: its input, its output, and what the loss keeps."""
    plan = plan_of("gpipe", num_stages=1, layers_per_stage=1, num_microbatches=2, batch_size=6)
    logits = torch.zeros(3, 10)
    numbers = 3 * 64 + logits.numel() + 1 + 1  # x, log-probabilities, loss, sum of weights
    of_one = 4 * numbers + 8 * 3  # and the labels
    one_version = 4 * (64 * 10 + 10)
    assert peak_of(plan) == [Bytes(one_version, 2 * of_one, one_version)]


def test_the_transformers_memory_is_measured_and_shrinks_with_recompute():
    """From shapes: F keeps the tokens, or what the stage before has sent; no formula of ours."""
    sizes = {"network": "transformer", "batch_size": 12, "layers_per_stage": 2, "num_batches": 2}
    peak = {}
    for name, recompute in (("naive", False), ("gpipe", False), ("gpipe", True), ("1f1b", True)):
        plan = plan_of(name, **sizes, recompute=recompute, momentum=0.5)
        peak[name, recompute] = peak_of(plan)
    for stage, one in enumerate(peak["naive", False]):
        x = 4 * 3 * 64 * (12 if stage else 1)
        assert peak["gpipe", False][stage].activations == 4 * one.activations
        assert peak["gpipe", True][stage].activations == 3 * x + one.activations
        assert peak["1f1b", True][stage].activations == (3 - stage) * x + one.activations
        for held in peak.values():
            assert held[stage].velocities == held[stage].gradients == one.weights


@pytest.mark.parametrize("what", ["weights", "activations", "gradients", "velocities"])
def test_the_meter_sees_memory_that_a_worker_forgets_to_free(monkeypatch, what):
    kept = []

    class Leaky(MeteredWorker):
        def keep(self, **held):
            kept.append(held.get(what))

        def update(self, op):
            self.keep(weights=[*self.versions.values()], gradients=self.gradient)
            super().update(op)
            self.keep(velocities=self.velocity)

        def forward(self, op, x, labels=None):
            output = super().forward(op, x, labels)
            self.keep(activations=self.in_flight[op.microbatch][0])
            return output

    plan = plan_of("1f1b", momentum=0.9)
    monkeypatch.setattr(pipedream.schedules.memory, "MeteredWorker", Leaky)
    for found, expected in zip(peak_of(plan), memory_formula(plan), strict=True):
        for field in Bytes._fields:
            more = getattr(found, field) > getattr(expected, field)
            assert more == (field == what)
