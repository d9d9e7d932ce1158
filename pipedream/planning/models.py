"""Which layers are measured? Those of a known model, a config.json, or the reader's own file."""

import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pipedream.backstage.text import shown
from pipedream.schedules.files import read_text
from pipedream_simple import UserError

from .families import NAMES, PRESETS, read_model


class Model(NamedTuple):
    """Layers to measure, and a microbatch for them."""

    name: str
    layers: list[Callable[[], nn.Module]]  # the last one is the loss, where there is one
    input: Callable[[], Tensor]  # makes what the first layer gets
    ends: tuple[int, int]  # layers before and after those that an even cut counts
    about: list[str]  # its parts, what was changed, what is not counted
    file: Any = None  # the module, where it is the reader's
    heads: int = 1  # of attention, among which a layer can be split; of a file this is not known


def load_model(model: str, config: dict) -> Model:
    """A preset, a config.json, or a Python file with LAYERS and my_batch. UserError: what is wrong.

    config has the keys sequence, layers, num_microbatches and microbatch_size; None: the model's.
    """
    path, presets = Path(model), ", ".join(PRESETS)
    if path.suffix == ".py":
        return from_python(path, config)
    if model in PRESETS:
        return from_config(model, PRESETS[model], config)
    if path.suffix == ".json":
        text = read_text(path)
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{str(path)[-200:]}: {error}") from None
        if not isinstance(found, dict):
            raise UserError(f"{str(path)[-200:]} must hold the keys of one model")
        return from_config(path.name, found, config)
    raise UserError(f"MODEL={shown(model)} must be one of {presets}, a config.json, or a .py file")


# ------------------------------------------------------------------------------- public models


class TokenLoss(nn.Module):
    """Cross-entropy in fp32, as models are trained: it keeps a copy of the logits."""

    def forward(self, logits: Tensor) -> Tensor:  # (sequences, tokens, vocabulary) in
        logits = logits.flatten(0, -2).float()
        return cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64))


def from_config(name: str, found: dict, config: dict) -> Model:
    about, keys = [], NAMES["blocks"].split()
    if (layers := config["layers"]) is not None:
        before = next((found[key] for key in keys if key in found), None)
        found = {key: value for key, value in found.items() if key not in keys}
        found[keys[0]] = layers
        about.append(f"layers={layers} instead of {before}")
    public = read_model(found, config["sequence"])
    rows = config["microbatch_size"] or 1
    sizes = f"embedding, {public.blocks} blocks and head; microbatches of {rows} x"
    about = [f"{sizes} {public.sequence:,} tokens", *about, *public.notes]
    ids = partial(torch.zeros, rows, public.sequence, dtype=torch.int64)
    return Model(name, [*public.layers, TokenLoss], ids, (1, 2), about, heads=public.heads)


# ------------------------------------------------------------------------------- the reader's file


class OwnLoss(nn.Module):
    """my_loss of the reader's file, on the targets of a microbatch."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor], targets: Tensor):
        super().__init__()
        self.loss = lambda output: loss(output, targets)

    def forward(self, output: Tensor) -> Tensor:
        return self.loss(output)


def from_python(path: Path, config: dict) -> Model:
    """LAYERS, functions that make a layer; my_batch(number, train=True) -> x, y, how many count.

    Also, where it has them, my_loss(output, target) and TIED.
    """
    name, module = str(path)[-200:], import_file(path)
    for key in ("sequence", "layers"):
        if config[key] is not None:
            raise UserError(f"{key}={config[key]} is for public models: change it in {name}")
    try:
        layers, batch = [*module.LAYERS], module.my_batch
        x, y, *_ = batch(0)
        rows, parts = len(x), config["num_microbatches"]
        size = config["microbatch_size"] or rows // parts
        x, y = (part[:1].cpu().expand(size, *part.shape[1:]).contiguous() for part in (x, y))
    except Exception as error:
        what = "LAYERS, a list of functions, and my_batch(number): tensors x and y, and a count"
        raise UserError(f"{name} must have {what}: {one_line(error)}") from None
    if config["microbatch_size"] is None and rows % parts:
        rule = f"num_microbatches={parts} must divide its {rows} rows"
        rule += ", or give --microbatch_size" * ("gpus" in config)  # fit
        raise UserError(f"my_batch of {name}: {rule}")
    about = [f"{len(layers)} layers; microbatches of {size} x {(*x.shape[1:],)}"]
    layers = tied_together(layers, getattr(module, "TIED", []), name)
    if loss := getattr(module, "my_loss", None):
        return Model(name, [*layers, lambda: OwnLoss(loss, y)], lambda: x, (0, 1), about, module)
    about.append("it has no my_loss: no loss is counted")
    return Model(name, layers, lambda: x, (0, 0), about, module)


Tie = Sequence[tuple[int, str]]  # parameters that are one: layer and name


def tied_together(layers: list[Callable[[], nn.Module]], ties: Sequence[Tie], file: str) -> list:
    """The functions, such that layers that are made later share what is tied with the first."""
    made: dict[int, nn.Module] = {}

    def tied(place: int) -> nn.Module:
        layer = made[place] = layers[place]()
        for (first, name), *others in map(sorted, ties):
            for other, own in others:
                if other == place:
                    path, _, leaf = own.rpartition(".")
                    layer.get_parameter(own)  # it must have one
                    setattr(layer.get_submodule(path), leaf, made[first].get_parameter(name))
        return layer

    places = {place for tie in ties for place, _ in tie}
    if odd := places - {*range(len(layers))}:
        raise UserError(f"TIED of {file} names layer {min(odd)}: there are {len(layers)}")
    makers = enumerate(layers)
    return [partial(tied, place) if place in places else make for place, make in makers]


def import_file(path: Path) -> Any:
    """The module in that file, as if it were imported from its folder."""
    read_text(path)
    name = "model_of_the_reader"  # its own may be that of another module
    spec: Any = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))
    try:
        sys.modules[name] = module
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"{str(path)[-200:]} cannot be imported: {one_line(error)}") from None
    finally:
        sys.path.pop(0)
    return module


def one_line(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text[:200]}"
