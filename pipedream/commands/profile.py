"""What do layers, stages and messages cost on this machine?

    python -m pipedream profile              measure, and simulate with the measured times
    python -m pipedream profile my.csv       and write what `plan my.csv` reads

`plan` calls a microbatch a minibatch.
"""

import statistics
from pathlib import Path

import torch

import pipedream_simple as simple
from pipedream.backstage.output import write
from pipedream.backstage.text import shorten
from pipedream.planning.clock import describe_layers, measure_stages, microbatch_size, time_message
from pipedream.planning.profiles import write_chain
from pipedream.schedules.plans import Plan, all_plans, run_rows, times_of

FLAGS = {"[FILE]": "my.csv: what the layers cost"}
TAKES = (
    "num_stages num_microbatches layers_per_stage hidden_size batch_size num_batches "
    "learning_rate momentum seed device network weight_stashing vertical_sync recompute "
    "chunks_per_gpu in_flight weight_gradient_time"
)
DEFAULTS = {"network": "transformer"}


def main(config: dict, file: Path | None = None) -> None:
    """Measure all layers, all stages, and what stage 0 sends; then print it, and simulate."""
    layers, num_stages = describe_layers(config), config["num_stages"]
    one_each = {**config, "num_stages": len(layers), "layers_per_stage": 1}
    of_layers, of_stages = ([*measure_stages(c).values()] for c in (one_each, config))
    size = int(layers[config["layers_per_stage"] - 1].activation)
    message, reason = time_message(size) if num_stages > 1 else (0.0, "there is one stage")
    if file:
        times = zip(layers, *of_layers[:2], strict=True)
        timed = [c._replace(forward=f / 1000, backward=b / 1000) for c, f, b in times]
        write(file, lambda part: part.write_text(write_chain(timed), "utf-8"), suffix=".csv")
    print_measured(config, of_layers, [layer.name for layer in layers], of_stages)
    print(f"A message of {size:,} bytes between two processes: {message:.3f} ms")
    if reason:
        print(f"   Not measured, so taken as free: {reason}")
    print_simulated(config, of_stages, message)


def print_measured(config: dict, of_layers: list, names: list[str], of_stages: list) -> None:
    """Milliseconds: of layers and of stages forward, backward and update, each a list."""
    device = simple.choose_device(config["device"])
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    images = simple.count(microbatch_size(config), "image")
    print(f"Measured on {where}: milliseconds per microbatch of {images}, and per update")
    print("(medians, without the first batch)\n")
    print(format_times("layer", of_layers, names))
    print(format_times("stage", of_stages, [""] * config["num_stages"]))
    both = [*map(sum, zip(*of_stages[:2], strict=True))]
    if len(both) > 1:
        slowest, excess = both.index(max(both)), max(both) / statistics.fmean(both) - 1
        print(f"Bottleneck: stage {slowest}, which takes {excess:.0%} longer than the mean")


def format_times(what: str, times: list[list[float]], names: list[str]) -> str:
    table = [[what, "forward", "backward", "update", ""]]
    for number, (name, *costs) in enumerate(zip(names, *times, strict=True)):
        name = name if len(name) <= 40 else name[:37] + "..."
        table.append([str(number), *(f"{cost:.3f}" for cost in costs), name])
    return "\n".join([*shorten(simple.format_table(table), 20, f"{what}s"), ""])


def print_simulated(config: dict, of_stages: list[list[float]], message: float) -> None:
    """Each schedule, on as many devices as there are stages, against all of it on one."""
    forward, backward, update = of_stages
    times = {"forward_time": forward, "backward_time": backward, "comm_time": message}
    plans, reasons = all_plans({**config, **times})
    one_gpu = config["num_microbatches"] * sum([*forward, *backward]) + sum(update)
    print(f"\nSimulated with these times on {simple.count(len(update), 'such device')}:")
    table = [["schedule", "ms per batch", "busy", f"speed-up over one device ({one_gpu:.3g} ms)"]]
    for plan in plans:
        events = with_updates(plan, update)
        batch = simple.makespan(events) / config["num_batches"]
        cells = f"{batch:.3g}", f"{simple.utilization(events):.1%}", f"{one_gpu / batch:.2f}x"
        table.append([plan.name, *cells])
    lines = [*simple.format_table(table), *[simple.RECOMPUTED] * config["recompute"], *reasons]
    print("\n".join(lines))


def with_updates(plan: Plan, update: list[float]) -> list[simple.Event]:
    """The plan's events if the update of a GPU takes time; all its stages together take that."""
    on_gpu = zip(update, ({op.stage for op in row} for row in plan.schedule), strict=True)
    of_stage = {s: time / len(stages) for time, stages in on_gpu for s in stages}
    times = {**times_of(plan.config), "U": of_stage}
    return run_rows(plan.schedule, plan.config, plan.pairs, times)[0]
