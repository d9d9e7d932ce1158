"""Stages on several GPUs that take turns: their schedule, its simulated time, and its training."""

import copy
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import pipedream_simple as simple
from pipedream.schedules.plans import story_config
from pipedream_simple import CONFIG, Event, Op, Run, Schedule, Step, UserError, Weights, Worker

from .profiles import Layer
from .search import Partition, count_in_flight

# ---------------------------------------------------------------------------------- simulated


def replicated(replicas: list[int], num_microbatches: int) -> Iterator[list[Step]]:
    """1F1B-RR: stage s is on replicas[s] GPUs, which take turns: microbatch m goes to m mod R_s.

    One row per GPU, the replicas of a stage next to each other. Each runs 1F1B on its microbatches.
    Before the first backward it runs one forward for each GPU from its stage on, shared among its
    replicas: on stage 0 that is NOAM. PipeDream (SOSP 2019), section 3.2.

    >>> print(simple.format_rows(replicated([2, 1], 4)))
    GPU0: F0 F2 B0 B2
    GPU1: F1 F3 B1 B3
    GPU2: F0 B0 F1 B1 F2 B2 F3 B3
    """
    for stage, copies in enumerate(replicas):
        in_flight = count_in_flight(copies, sum(replicas[stage + 1 :]))
        for replica in range(copies):
            row = simple.one_f_one_b(0, in_flight, num_microbatches // copies)  # GPU0 of in_flight
            yield [(stage, kind, m * copies + replica) for _, kind, m in row]


def simulate_replicas(
    replicas: list[int], config: dict, times: dict | None = None
) -> tuple[Schedule, list[Event]]:
    """The rows of 1F1B-RR, and when they run. The replicas of a stage update together.

    times[kind][stage] may say what ops take, U included, as in simulate.
    """
    in_batch = config["num_microbatches"]
    rows = replicated(replicas, in_batch * config["num_batches"])
    switches = config["weight_stashing"], config["vertical_sync"]
    schedule = simple.pin_versions(rows, in_batch, *switches)

    def inputs(op: Op, num_stages: int) -> list[Step]:
        """An update needs the last backward of its batch on every replica of its stage."""
        if op.kind != "U":
            return simple.inputs_of(op, num_stages)
        end, copies = (op.microbatch // in_batch + 1) * in_batch, replicas[op.stage]
        return [(op.stage, "B", m) for m in range(end - copies, end)]

    takes = times and (lambda op: times[op.kind][op.stage])
    events = simple.simulate(schedule, config, takes, inputs)
    # At the same moment, an update comes before what reads its result.
    return schedule, sorted(events, key=lambda event: (event.start, event.op.kind != "U"))


def simulate_partition(partition: Partition, layers: list[Layer]) -> float:
    """Seconds per minibatch of 1F1B-RR with the partition's times, messages free.

    A batch is as many minibatches as the replicas share evenly, and its update takes all-reduce's
    time for as many. Counted in the middle third of a run, where the pipeline is full, on the stage
    that is slowest there: others may still be catching up. So this is never less than what a stage
    computes and adds up.
    """
    stages = partition.stages
    replicas = [stage.replicas for stage in stages]
    batch = math.lcm(*replicas)
    third = 2 * math.ceil(2 * sum(replicas) / batch + 1)  # batches: even, as some runs alternate
    num_batches = 3 * third
    if sum(replicas) > 256 or batch * num_batches * len(stages) > 300_000:
        raise UserError("with so many GPUs, or such replicas, the run is too long")
    spans = [layers[stage.first : stage.last + 1] for stage in stages]
    times = {
        "F": [sum(layer.forward for layer in span) for span in spans],
        "B": [sum(layer.backward for layer in span) for span in spans],
        "U": [batch * stage.all_reduce for stage in stages],
    }
    sizes = {"num_stages": len(stages), "num_microbatches": batch, "num_batches": num_batches}
    _, events = simulate_replicas(replicas, {**CONFIG, "comm_time": 0, **sizes}, times)
    done = {(op.stage, op.version): end for op, _, _, end in events if op.kind == "U"}
    seconds = max(done[s, 2 * third] - done[s, third] for s in range(len(stages)))
    return seconds / (batch * third)


# ------------------------------------------------------------------------------------ trained


class Replicas(nn.Module):
    """Copies of a stage, each with weights of its own, that take turns."""

    def __init__(self, stage: nn.Module, number: int):
        super().__init__()
        self.copies = nn.ModuleList(copy.deepcopy(stage) for _ in range(number))
        self.turn = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.copies[self.turn](x)


class ReplicatedWorker(Worker):
    """The GPUs of a replicated stage. Before an update they add up their gradients."""

    module: Replicas

    def __init__(self, stage: nn.Module, config: dict, number: int):
        super().__init__(Replicas(stage, number), config)
        self.number = self.missing = number

    def forward(self, op: Op, x: Tensor, labels: Tensor | None = None) -> Tensor:
        self.module.turn = op.microbatch % self.number
        result = super().forward(op, x, labels)
        x, output, weights = self.in_flight[op.microbatch]
        own = {k: w for k, w in weights.items() if k.startswith(f"copies.{self.module.turn}.")}
        self.in_flight[op.microbatch] = x, output, own  # a backward is about these alone
        return result

    def update(self, op: Op) -> None:
        """When the last replica has come: all-reduce, and then the update on each of them."""
        self.missing -= 1
        if self.missing == 0:
            for name, _ in self.module.copies[0].named_parameters():
                keys = [f"copies.{replica}.{name}" for replica in range(self.number)]
                total = torch.stack([self.gradient[key] for key in keys]).sum(dim=0)
                self.gradient |= dict.fromkeys(keys, total)
            super().update(op)
            self.missing = self.number


def train_replicated(
    config: dict,
    replicas: list[int],
    dtype: torch.dtype = torch.float32,
    watch: Callable[[Op, Worker], object] = lambda op, worker: None,
) -> tuple[Run, Schedule, list[Event]]:
    """Train the config's network with 1F1B-RR for real; weights have names as in Replicas.

    UserError: replicas that are not numbers, or do not share num_microbatches evenly.
    """
    config = story_config({**config, "num_stages": len(replicas), "schedule": "pipedream"})
    simple.check_config(config)
    for number in replicas:
        simple.check_value("replicas", number, (int, 1, 64))
        if config["num_microbatches"] % number:
            microbatches = f"num_microbatches={config['num_microbatches']}"
            raise UserError(f"{microbatches} must be a multiple of {number}, a stage's replicas")
    schedule, events = simulate_replicas(replicas, config)
    sizes = iter(replicas)
    run = simple.train(
        config, dtype, watch, events, lambda stage, _: ReplicatedWorker(stage, config, next(sizes))
    )
    return run, schedule, events


def differences(weights: Weights) -> float:
    """The largest difference between a replica's weights and those of the first replica."""
    first = {k.split(".", 2)[2]: w for k, w in reversed(weights.items())}
    apart = ((w - first[k.split(".", 2)[2]]).detach().abs().max() for k, w in weights.items())
    return max(map(float, apart))
