"""The template in processes of the tests, and the same training without any pipeline."""

import contextlib
import importlib.util
import logging
import os
import sys
import zlib
from argparse import Namespace

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


class Again(nn.Module):
    """A third layer with the weight of the embedding."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(256, SMALL["WIDTH"]))

    def forward(self, x):
        return x + torch.tanh(x * self.weight.mean(0))


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


def plain(change=None, steps=3, slices=None):
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
                    what = ("dropout", model.SEED, slices * number + k, place)
                    torch.manual_seed(zlib.crc32(repr(what).encode()))
                part = layer.train(train)(part)
            outputs.append(part)
        return cross_entropy(torch.cat(outputs).flatten(0, 1), y.flatten(), ignore_index=-100)

    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(step, True)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, model.CLIP)
        optimizer.step()
        rate.step()
        losses.append(loss.item())
        if (step + 1) % model.EVAL_EVERY == 0:
            with torch.no_grad():
                losses.append(loss_of(0, False).item())
    return losses


def made(model):
    """Its layers with their first weights, tied."""
    layers = []
    for place, make in enumerate(model.LAYERS):
        torch.manual_seed(zlib.crc32(repr(("weights", model.SEED, place)).encode()))
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
