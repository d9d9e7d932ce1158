"""What do ops, messages and layers take here? Measured."""

import contextlib
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

from pipedream.backstage.storages import Storages
from pipedream.schedules.plans import story_config
from pipedream_simple import Op, UserError, Worker, choose_device, train

from .profiles import Layer

CLOCK = {"F": "forward_time", "B": "backward_time", "U": "update_time"}  # what a run takes


def now(device: torch.device) -> float:
    """The time in seconds, once the device has finished all its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def microbatch_size(config: dict) -> int:
    return config["batch_size"] // config["num_microbatches"]


def measure_stages(config: dict, average: Callable = statistics.median) -> dict[str, list[float]]:
    """Milliseconds of a microbatch's forward and backward, and of an update, on each stage.

    Real training, one microbatch at a time: between two ops of a stage the others work, so it finds
    its caches as cold as in a run. The first batch warms up and does not count.
    """
    device, size = choose_device(config["device"]), microbatch_size(config)
    config = story_config(config) | {"schedule": "naive", "num_batches": 6}
    config |= {"num_microbatches": 4, "batch_size": 4 * size}
    took: dict[tuple[str, int], list[float]] = {}
    last = 0.0

    def watch(op: Op, worker: Worker) -> None:
        nonlocal last
        start, last = last, now(device)
        if op.version > 0:
            took.setdefault((op.kind, op.stage), []).append(1000 * (last - start))

    train(config, watch=watch)
    stages = range(config["num_stages"])
    return {key: [average(took[kind, s]) for s in stages] for kind, key in CLOCK.items()}


# ----------------------------------------------------------------------------------- messages


def measure_message(x: Tensor, work: Callable[[], object] = lambda: None) -> float:
    """Milliseconds that a tensor like x takes from rank 0 to rank 1. All ranks call this.

    Rank 1 waits for it; rank 0 sends it and goes on with some work, as in a run. (On a CPU a
    message may then take longer: what sends it has to share the core.)
    """
    rank, took = dist.get_rank(), []
    for _ in range(23):
        dist.all_reduce(torch.zeros(1))  # wait for all; on the CPU, so that gloo carries it
        start = now(x.device)
        if rank < 2:
            message = dist.isend(x, 1) if rank == 0 else dist.irecv(x, 0)
            if rank == 0:
                work()
            message.wait()  # type: ignore[union-attr]
        took.append(1000 * (now(x.device) - start))
    median = torch.tensor(statistics.median(took[3:]))  # 3 warm up
    dist.broadcast(median, src=1)
    return median.item()


# ------------------------------------------------------------------------------------- layers

KINDS = "FBIWU"
AGREED, APART = 0.03, 0.1  # parts of the whole by which the first and the second half may differ
ALONE = 0.85  # part of the time in which a process must have had its core
CHECKS, EACH, MOST = 3, 1, 30  # so often in a row they must agree; seconds between, and in all


class Network:
    """The layers of a model and one of its microbatches: it trains on that, and takes the time.

    model has LAYERS, my_loss, my_optimizer and CLIP, as examples/my_model.py does.
    """

    def __init__(self, model: Any, x: Tensor, y: Tensor, device: torch.device, bf16: bool = False):
        self.x, self.y = x.to(device).clone(), y.to(device).clone()  # no view of a whole batch
        self.device, self.loss = device, model.my_loss
        with in_a_line("LAYERS"):
            self.layers = [make().to(device).train() for make in model.LAYERS]
        self.weights = [[w for w in layer.parameters() if w.requires_grad] for layer in self.layers]
        with in_a_line("my_optimizer"):
            spare = nn.Parameter(torch.zeros(1, 1))  # it has no gradient, but no list is empty
            self.optimizers = [model.my_optimizer([*own, spare]) for own in self.weights]
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] *= 1e-9  # after many rounds the weights are still what they were
        with in_a_line("CLIP"):
            self.clip, self.bf16 = float(model.CLIP), bf16

    def run(self, number: int, x: Tensor) -> Tensor:
        """The output of that layer; of the last one the loss."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            with in_a_line(f"layer {number}"):
                x = self.layers[number](x)
            with in_a_line("my_loss"):
                return self.loss(x, self.y) if number == len(self.layers) - 1 else x

    def update(self, number: int) -> None:
        """What a step does with the gradients of that layer."""
        gradients = [w.grad for w in self.weights[number] if w.grad is not None]
        if gradients:
            norm = nn.utils.get_total_norm(gradients)
            nn.utils.clip_grads_with_norm_(self.weights[number], self.clip, norm)
            self.optimizers[number].step()
            self.optimizers[number].zero_grad(set_to_none=False)

    def round(self, halves: bool, update: bool) -> np.ndarray:
        """Train on the microbatch: all layers forward, then backward, so that caches are cold.

        Returns [layer, kind of KINDS] in milliseconds: F; B, or with halves I and W, as PyTorch's
        engine splits a backward; U, if asked for. NaN: not measured.
        """
        took = np.zeros((len(self.layers), len(KINDS)))
        missing = ("B" if halves else "IW") + "U" * (not update)
        took[:, [KINDS.index(kind) for kind in missing]] = math.nan

        def timed(number: int, kind: str, work: Callable[[], Any]) -> Any:
            start = now(self.device)
            with in_a_line(f"layer {number}, {kind}"):
                result = work()
            took[number, KINDS.index(kind)] = 1000 * (now(self.device) - start)
            return result

        x, runs = self.x, list[tuple[Tensor, Tensor]]()
        for number in range(len(self.layers)):
            given = x.detach().requires_grad_(x.requires_grad)
            x = timed(number, "F", partial(self.run, number, given.clone()))
            runs.append((given, x))
        gradient = None  # of the loss
        for number, (given, x) in reversed([*enumerate(runs)]):
            weights = self.weights[number]
            if halves and given.requires_grad:
                end = [x.clone()], gradient if gradient is None else [gradient]  # it is detached
                work = partial(stage_backward_input, *end, [given], iter(weights))
                _, groups = timed(number, "I", work)
                timed(number, "W", partial(stage_backward_weight, iter(weights), groups))
            elif x.requires_grad:  # the engine does not split that of the first one to be trained
                back = partial(torch.autograd.backward, x, gradient)
                timed(number, "W" if halves else "B", back)
            gradient = given.grad
        for number in range(len(self.layers) if update else 0):
            timed(number, "U", partial(self.update, number))
        return took

    def rounds(self, tell: Callable[[str], object]) -> np.ndarray:
        """[round, layer, kind]: as many as it takes until both halves of them say the same.

        All ranks of a group measure at the same time, as in a run all are busy, and equally long.
        UserError: they never do, or other programs took the cores.
        """
        self.round(halves=False, update=True), self.round(halves=True, update=True)  # warm up
        rounds, checks, told = list[np.ndarray](), 0, 0.0
        seconds = worked = longest = 0.0
        while checks < CHECKS and longest < MOST:
            start, before = now(self.device), time.process_time()
            while (took := now(self.device) - start) < EACH or len(rounds) < 10:
                for number in range(10):
                    rounds.append(self.round(halves=number % 2 == 1, update=number == 9))
            seconds, worked = seconds + took, worked + time.process_time() - before
            worst = torch.tensor([apart(rounds), 1 - worked / seconds, seconds])
            if dist.is_initialized():
                dist.all_reduce(worst, dist.ReduceOp.MAX)
            differ, idle, longest = worst.tolist()
            checks = checks + 1 if differ < AGREED else 0
            if longest // 5 > told:
                told = longest // 5
                tell(f"   {len(rounds)} rounds in {longest:.0f} s: halves differ by {differ:.0%}")
        if differ > APART or (self.device.type == "cpu" and idle > 1 - ALONE):
            why = f"the two halves of the time differ by {differ:.0%} (at most {APART:.0%})"
            if differ <= APART:
                why = f"a process had a core for {1 - idle:.0%} of the time (at least {ALONE:.0%})"
            raise UserError(f"too noisy to trust: {why}: is something else running here?")
        return np.stack(rounds)

    def describe(self) -> Iterator[Layer]:
        """Names and bytes of the layers, without times."""
        x = self.x
        for number, layer in enumerate(self.layers):
            given = x.detach().requires_grad_(x.requires_grad)
            saved = Storages()

            def note(tensor: Tensor, saved: Storages = saved) -> Tensor:
                saved.note([tensor])
                return tensor

            with saved_tensors_hooks(note, lambda tensor: tensor):
                x = self.run(number, given.clone())  # a layer may change it
            there = itertools.chain(layer.parameters(), layer.buffers())
            saved -= {tensor.untyped_storage() for tensor in there}
            parts = layer if isinstance(layer, nn.Sequential) else [layer]
            name = "+".join(type(part).__name__ for part in parts)
            weights = sum(w.nbytes for w in layer.parameters())
            yield Layer(name, 0, 0, x.nbytes, weights, saved.nbytes)

    def messages(self, layers: list[Layer]) -> list[float]:
        """Seconds from rank 0 to rank 1 of what each layer sends; 0 for the last one's loss."""
        took, x = dict[float, float](), self.x.detach()
        for number, layer in enumerate(layers[:-1]):
            with torch.no_grad():
                sent = self.run(number, x.clone())
                if layer.activation not in took:
                    work, message = partial(self.run, number, x.clone()), sent.contiguous().clone()
                    took[layer.activation] = measure_message(message, work) / 1000
            x = sent
        return [*(took[layer.activation] for layer in layers[:-1]), 0.0]


def time_layers(
    network: Network,
    draw: Callable[[int], object],
    tell: Callable[[str], object] = lambda line: None,
) -> tuple[list[Layer], list[float]]:
    """The layers with their times, and by which part of F and B the rounds of each vary (+-).

    All ranks of a group call this, and get the same: the mean of what they measured. draw(number)
    makes a batch, which takes its time once per step, as the update does: it is added to that of
    layer 0. tell(line) is called every five seconds.
    """
    layers = [*network.describe()]
    rounds = network.rounds(tell)
    first, third = np.nanquantile(rounds[:, :, :2], (0.25, 0.75), axis=0)
    mean = np.nanmean(rounds, axis=0)  # not the median: a run is the sum of all, slow ones too
    spread = (third - first).sum(axis=1) / mean[:, :2].sum(axis=1) / 2
    drawn = [now(network.device)]
    for number in range(1, 6):
        with in_a_line("my_batch"):
            draw(number)
        drawn.append(now(network.device))
    mean[0, KINDS.index("U")] += 1000 * np.diff(drawn).mean()
    times, messages = torch.from_numpy(mean), [0.0] * len(layers)
    if dist.is_initialized():
        dist.all_reduce(times)
        times /= dist.get_world_size()
        messages = network.messages(layers) if dist.get_world_size() > 1 else messages
    timed = []
    for layer, row, message in zip(layers, times / 1000, messages, strict=True):
        f, b, i, w, u = row.tolist()
        halves = {"input_gradient": i, "weight_gradient": w}
        timed.append(layer._replace(forward=f, backward=b, update=u, message=message, **halves))
    return timed, spread.tolist()


@contextlib.contextmanager
def in_a_line(what: str) -> Iterator[None]:
    """Whatever the reader's functions raise becomes a UserError of one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise UserError(f"{what}: {type(error).__name__}: {text}") from None


def apart(rounds: list[np.ndarray]) -> float:
    """By which part of the whole do the means of the first and the second half differ?"""
    half = len(rounds) // 2
    one, other = (
        np.nanmean(np.array(some)[..., :2], axis=0) for some in (rounds[:half], rounds[half:])
    )
    return 2 * abs(one - other).sum() / (one + other).sum()
