"""What do layers, updates and messages cost on this machine?

    python -m pipedream profile my_model.py my.csv   of your model; then: plan my.csv
    python -m pipedream profile my_model.py          only print it
    python -m pipedream profile my.csv               of the network of pipedream_simple.py

MODEL is a file like examples/my_model.py. Several processes train on one microbatch at the same
time, since in a run all are busy: each with a GPU, or with its share of the CPU. They go on until
both halves of the time say the same; where that does not happen, the numbers are refused.
"""

import math
import os
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from pipedream.backstage.output import check_output, write
from pipedream.backstage.text import shorten
from pipedream.planning.clock import Network, time_layers
from pipedream.planning.models import from_python
from pipedream.planning.profiles import Layer, write_chain
from pipedream.processes.launch import become_rank, in_group, launch, place, say
from pipedream.schedules.plans import PLAN_CONFIG, check_plan_config
from pipedream_simple import UserError, build_stages, check_value, count, format_table, make_batches

FLAGS = {
    "[MODEL]": "a file with LAYERS; without it the network of pipedream_simple.py",
    "[FILE]": "my.csv: what the layers cost",
    "--processes N": "that compute at the same time; 1: then no message is measured (2)",
    "--bf16": "compute in bfloat16, as torch.autocast does",
}
LEGEND = """\
   Milliseconds, means. Of a microbatch: forward (F) and backward (B), or
   backward in PyTorch's halves, to the input (I) and to the weights (W); of an
   update, once per batch; of the output as a message to another process. The
   update of layer 0 includes the drawing of a batch, the last layer the loss.
   +-: half of the rounds lie that close."""
KEYS = {
    "num_microbatches": 8,  # per batch; the times are those of one
    "device": "auto",  # auto (a GPU for each process, if there are so many), cpu or cuda
    "network": "transformer",  # this and the rest: of the network of pipedream_simple.py
    "num_stages": 4,  # times layers_per_stage: how many layers it has
    "layers_per_stage": 3,
    "hidden_size": 64,
    "batch_size": 32,
}


def main(
    config: dict,
    model: Path | None = None,
    file: Path | None = None,
    processes: int = 2,
    bf16: bool = False,
) -> None:
    """Refuse what can be refused; then start the processes, in each of which this runs again."""
    if model and model.suffix == ".csv" and not file:
        model, file = None, model
    check_value("processes", processes, (int, 1, 16))
    if file:
        check_output(file, ".csv")
    found = load(config, model)
    if "RANK" not in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
        place(config["device"], 0, processes)
        sys.exit(2 if launch(processes, 600) else 0)
    become_rank()
    device = place(config["device"], int(os.environ["LOCAL_RANK"]), processes)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    work = partial(measure_model, config, found, device, bf16)
    try:
        layers, spread = in_group(work, backend, 600)
        if os.environ["RANK"] == "0":
            if file:
                write(file, lambda part: part.write_text(write_chain(layers), "utf-8"), model)
            lines = format_profile(layers, spread, file, config["num_microbatches"])
            print(*lines, sep="\n", flush=True)
    except UserError as error:
        print(f"{sys.argv[0]}: {error}", file=sys.stderr, flush=True)
        os._exit(2)  # while Python takes itself down, a thread of gloo's may abort the process


def load(config: dict, path: Path | None) -> Any:
    """The reader's file, or what stands for the network of pipedream_simple.py."""
    if path:
        for key in [*KEYS][2:]:
            if config[key] != KEYS[key]:
                raise UserError(f"{key}={config[key]} is not for {path}: change it in there")
        check_value("num_microbatches", config["num_microbatches"], (int, 1, 1_000_000))
        sizes = {"num_microbatches": config["num_microbatches"], "microbatch_size": None}
        found = from_python(path, {**sizes, "sequence": None, "layers": None})
        if odd := [name for name in ("my_loss", "my_optimizer") if not hasattr(found.file, name)]:
            raise UserError(f"{path} must have {odd[0]}, as examples/my_model.py does")
        layers = found.layers[: len(found.file.LAYERS)]  # without the loss
        return SimpleNamespace(**{"CLIP": math.inf, **vars(found.file), "LAYERS": layers})
    config = {**PLAN_CONFIG, **config}
    check_plan_config(config)
    layers = [layer for stage in build_stages(config) for layer in stage.children()]
    makers = [partial(lambda layer: layer, layer) for layer in layers]
    settings = {"lr": config["learning_rate"], "momentum": config["momentum"]}
    optimizer = partial(torch.optim.SGD, **settings)
    batch = (*make_batches(config)[0], config["batch_size"])
    names = {"my_loss": cross_entropy, "my_optimizer": optimizer, "my_batch": lambda number: batch}
    return SimpleNamespace(LAYERS=makers, CLIP=math.inf, **names)


def measure_model(
    config: dict, model: Any, device: torch.device, bf16: bool
) -> tuple[list[Layer], list[float]]:
    x, y, *_ = model.my_batch(0)
    size = len(x) // config["num_microbatches"]
    whose = Path(getattr(model, "__file__", "the network of pipedream_simple.py")).name
    layers = count(len(model.LAYERS), "layer")
    say(f"Measuring {layers} of {whose},\n   on microbatches of {size} rows ...\n")
    network = Network(model, x[:size], y[:size], device, bf16)
    return time_layers(network, model.my_batch, lambda line: say(line + "\n"))


def format_profile(
    layers: list[Layer], spread: list[float], file: Path | None, microbatches: int
) -> list[str]:
    more = f" --microbatches {microbatches}" * (microbatches != 8)  # its default
    table = [["layer", "F", "B", "I", "W", "update", "message", "+-", "KiB sent", ""]]
    for number, (layer, part) in enumerate(zip(layers, spread, strict=True)):
        halves = layer.input_gradient, layer.weight_gradient
        times = layer.forward, layer.backward, *halves, layer.update, layer.message
        cells = (f"{1000 * (time or 0):.3f}" for time in times)
        name = layer.name if len(layer.name) <= 20 else layer.name[:17] + "..."
        sent = f"{layer.activation / 1024:,.0f}"
        table.append([str(number), *cells, f"{part:.0%}", sent, name])
    lines = ["", *shorten(format_table(table), 40, "layers"), LEGEND]
    front = next((n for n, layer in enumerate(layers) if layer.backward), 0)
    if any(layer.weights for layer in layers[:front]):
        lines.append("   Frozen layers in front run no backward: true of the first stage only.")
    if file:
        lines.append(f"\n{file}: now python -m pipedream plan {file} --gpus 2 --straight{more}")
    return lines
