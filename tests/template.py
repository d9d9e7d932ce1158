"""The template in processes of the tests, and the same training without any pipeline."""

import contextlib
import importlib.util
import logging
import os
import random
import sys
import zlib
from argparse import Namespace

import numpy as np
import torch
import torch.distributed as dist
from conftest import ROOT
from torch import nn
from torch.nn.functional import cross_entropy

sys.path.append(str(ROOT / "examples"))
import pipeline

PIPELINE = pipeline.Pipeline
FLAGS = {"cut": None, "schedule": "1f1b", "microbatches": 4, "replicas": 1, "recompute": False}
FLAGS |= {"bf16": False, "steps": 3, "until": None, "save": None, "resume": None, "processes": None}
SMALL = {"WIDTH": 16, "DEPTH": 6, "LENGTH": 12, "BATCH": 12, "EVAL_BATCH": 7, "DROPOUT": 0.0}
SMALL |= {"EVAL_EVERY": 2, "SAVE_EVERY": 2, "CLIP": 0.3}


class Turned(nn.Module):
    """Returns what is not contiguous."""

    def forward(self, x):
        return x.transpose(1, 2).contiguous().transpose(1, 2)


class View(nn.Module):
    """Returns its input's memory in another shape."""

    def forward(self, x):
        return x.flatten(1).view(x.shape)


class Again(nn.Module):
    """A third layer with the weight of the embedding."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(256, SMALL["WIDTH"]))

    def forward(self, x):
        return x + torch.tanh(x * self.weight.mean(0))


class Alias(Again):
    """Has that weight under two names."""

    def __init__(self):
        super().__init__()
        self.same = nn.ParameterList([self.weight])

    def forward(self, x):
        return super().forward(x) + self.same[0].mean(0)


class Luck(nn.Module):
    """Dropout with the generators of Python and NumPy."""

    def forward(self, x):
        return x * random.random() + np.random.rand() if self.training else x


class Single(nn.Linear):
    """In float32, among layers in float64."""

    def __init__(self):
        super().__init__(SMALL["WIDTH"], SMALL["WIDTH"], dtype=torch.float32)

    def forward(self, x):
        return super().forward(x.float()).double()


class Average(nn.Module):
    """Assigns a buffer, instead of changing it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * (1 + x.detach().mean())
        return x + self.mean


class Counted(nn.Tanh):
    """Counts in Python how often it has run."""

    runs = 0

    def forward(self, x):
        Counted.runs += 1
        return super().forward(x)


class WithNumber(torch.optim.SGD):
    """Its state is a number, which divides the step."""

    def step(self):
        for weight in self.param_groups[0]["params"]:
            number = self.state[weight]["number"] = self.state[weight].get("number", 0) + 1
            weight.data -= self.param_groups[0]["lr"] / number * weight.grad


def frozen(make):
    return lambda: make().requires_grad_(False)


def load(change=None):
    """examples/my_model.py as a module: small, in float64, and changed by the code in change."""
    torch.set_default_dtype(torch.float64)
    spec = importlib.util.spec_from_file_location("my_model", ROOT / "examples" / "my_model.py")
    model = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(model)
    vars(model).update(SMALL)
    model.LAYERS = [model.Embed, *[model.Block] * model.DEPTH, model.head]
    model.TIED = [((0, "token.weight"), (model.DEPTH + 1, "1.weight"))]
    exec(change or "", {**globals(), "model": model})
    return model


def plain(change=None, steps=3, slices=None, bf16=False):
    """The losses of one process without a pipeline, evaluation included.

    slices: how many microbatches have a dropout of their own; None: the whole batch at once.
    """
    model, losses = load(change), []
    layers = made(model)
    weights = [w for w in nn.ModuleList(layers).parameters() if w.requires_grad]
    optimizer = model.my_optimizer(weights)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: model.my_rate(step, steps))

    def loss_of(number, train):
        x, y, _ = model.my_batch(number, train)
        outputs = []
        for k, part in enumerate(x.tensor_split(slices) if slices else [x]):
            for place, layer in enumerate(layers):
                if slices:
                    seed("dropout", model.SEED, slices * number + k, place)
                part = layer.train(train)(part)
            outputs.append(part)
        return cross_entropy(torch.cat(outputs).flatten(0, 1), y.flatten(), ignore_index=-100)

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=bf16)

    for step in range(steps):
        optimizer.zero_grad()
        with autocast:
            loss = loss_of(step, True)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, model.CLIP)
        optimizer.step()
        rate.step()
        losses.append(loss.item())
        if (step + 1) % model.EVAL_EVERY == 0:
            with torch.no_grad(), autocast:
                losses.append(loss_of(0, False).item())
    return losses


def seed(*what):
    number = zlib.crc32(repr(what).encode())
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)


def made(model):
    """Its layers with their first weights, tied."""
    layers = []
    for place, make in enumerate(model.LAYERS):
        seed("weights", model.SEED, place)
        layers.append(make())
    for (first, name), *others in model.TIED:
        for place, other in others:
            path, _, leaf = other.rpartition(".")
            setattr(layers[place].get_submodule(path), leaf, layers[first].get_parameter(name))
    return layers


def work(cases, look=None):
    """In a process: the losses of each (flags, change), or what it has done wrong.

    With look, a pair: and what look(pipeline) returns afterwards.
    """
    world = str(dist.get_world_size())
    os.environ |= {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "LOCAL_RANK": "0"}
    logging.disable()
    dist.init_process_group = dist.destroy_process_group = lambda *_: None  # there is one
    found = []
    for flags, change in cases:
        made = []
        pipeline.Pipeline = lambda *given, made=made: made.append(PIPELINE(*given)) or made[0]
        with contextlib.redirect_stdout(None):
            try:
                result = pipeline.run(load(change), Namespace(**FLAGS | flags))
            except Exception as error:
                known = isinstance(error, pipeline.UserError)
                error = error if known else error.__cause__ or error  # the engine wraps them
                if not isinstance(error, pipeline.UserError):
                    raise
                result = str(error)
        found.append((result, look(made[0])) if look else result)
    return found
