"""Train the layers of my_model.py as a pipeline, on PyTorch's engines. Here is nothing to edit.

Top to bottom: the cut, a step, evaluation, checkpoints, errors, main. The losses are those of one
process, whatever the cut, the schedule and the number of processes. With dropout, too, as long as
replicas * microbatches stays: its seed is made of the step, the microbatch and the layer. (A weight
that gets no gradient counts as one whose gradient is zero; a batch norm sees one microbatch.)
"""

import argparse
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zlib
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class
from torch.distributed.run import main as torchrun
from torch.utils.checkpoint import checkpoint

ONE = {"1f1b": "1F1B", "gpipe": "GPipe"}  # with one stage per process; the others have several
SCHEDULES = ONE | {"interleaved": "Interleaved1F1B", "interleaved-zb": "InterleavedZeroBubble"}
SCHEDULES |= {"looped-bfs": "LoopedBFS", "zb-v": "ZBVZeroBubble", "dualpipe-v": "DualPipeV"}
LAUNCHED = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


class UserError(Exception):
    """What a reader can put right."""


def seed(*what):
    """From here on, random numbers depend on this alone: not on the process, nor on the past."""
    number = zlib.crc32(repr(what).encode())
    for generator in (torch.default_generator.manual_seed, np.random.seed, random.seed):
        generator(number)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(number)  # (torch.manual_seed also asks all other kinds: 0.2 ms)


class Forgotten:
    """What the module notes in its buffers in here, such as averages, is forgotten."""

    def __init__(self, module):
        self.parts = [*module.modules()]

    def __enter__(self):
        buffers = [(part, *named) for part in self.parts for named in part.named_buffers("", False)]
        self.kept = [(part, name, buffer, buffer.clone()) for part, name, buffer in buffers]

    def __exit__(self, *_):
        for part, name, buffer, value in self.kept:
            buffer.data = value
            setattr(part, name, buffer)


def run_layer(layer, x, *what):
    seed(*what)
    return layer(x)


def run_twice(layer, x, *what):
    """The same, but it keeps only x, and runs again in the backward: as before, seed included."""
    settings = {"use_reentrant": False, "preserve_rng_state": False}
    settings["context_fn"] = lambda: (nullcontext(), Forgotten(layer))
    return checkpoint(run_layer, layer, x, *what, **settings)


# ---------------------------------------------------------------------------------- the cut


class Stage(nn.Module):
    """Some of the layers, under their places in the whole list."""

    def __init__(self, model, places, args, device):
        super().__init__()
        self.layers, self.seed, self.args, self.tried = nn.ModuleDict(), model.SEED, args, False
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.bf16)
        for place in places:
            seed("weights", model.SEED, place)
            self.layers[str(place)] = model.LAYERS[place]().to(device).train()

    def forward(self, x, number):
        """number: of the microbatch, so that each one has its own dropout."""
        if not self.tried:  # the engine's first call: to see shapes, on memory that nobody wrote
            self.tried = True
            with Forgotten(self):
                return self(torch.zeros_like(x, requires_grad=x.requires_grad), number)
        x = x.clone()  # x is the engine's; this one a layer may change
        if x.requires_grad:
            x.register_hook(torch.Tensor.contiguous)  # a gradient that is sent has to be
        run = run_twice if self.args.recompute and self.training else run_layer
        for place, layer in self.layers.items():
            try:
                with self.autocast:
                    x = run(layer, x, "dropout", self.seed, int(number), int(place))
            except Exception as error:
                raise UserError(f"layer {place}: {type(error).__name__}: {error}") from error
            if not isinstance(x, torch.Tensor):
                raise UserError(f"layer {place} returns a {type(x).__name__}: want one tensor")
        if x.is_floating_point() and self.training and not x.requires_grad:
            x.requires_grad_()  # of frozen layers: else zb-v would forget what comes behind them
        return x.clone(memory_format=torch.contiguous_format)  # zb-v may not detach a view


def cut_into_stages(layers, size, args):
    """Of each stage: its layers, and its process among the size that make a pipeline."""
    one, v = args.schedule in ONE, args.schedule.endswith("-v")
    count = size if one else 2 * size
    cut = sorted({0, *(args.cut or [layers * stage // count for stage in range(count)])})
    odd = len(cut) != count if one or v else len(cut) % size
    if odd or cut[0] < 0 or cut[-1] >= layers:
        takes = f"{count} stages" if one or v else f"a multiple of {size} stages"
        rule = f"--schedule {args.schedule} on {size} processes takes {takes}, none empty"
        raise UserError(f"--cut {cut} of {layers} layers: {rule}")
    spans = [range(*ends) for ends in zip(cut, [*cut[1:], layers], strict=True)]
    last = len(cut) - 1  # a V comes back over the same processes; the others start again
    return spans, [min(s, last - s) if v else s % size for s in range(len(cut))]


class Pipeline:
    """This process's stages, with their optimizer and engine."""

    def __init__(self, model, args, device):
        self.model, self.args, self.device, self.shape = model, args, device, None
        world, one = dist.get_world_size(), args.schedule in ONE
        if world % args.replicas:
            raise UserError(f"--replicas {args.replicas} must divide the {world} processes")
        size = world // args.replicas
        spans, self.home = cut_into_stages(len(model.LAYERS), size, args)
        homes = {place: home for home, span in zip(self.home, spans, strict=True) for place in span}
        mesh = init_device_mesh(device.type, (args.replicas, size), mesh_dim_names=("data", "pipe"))
        self.replica, self.here = mesh.get_local_rank("data"), mesh.get_local_rank("pipe")
        self.data, pipe = mesh.get_group("data"), mesh.get_group("pipe")
        self.rows = mesh.mesh.tolist()  # the processes of each replica
        mine = [stage for stage, home in enumerate(self.home) if home == self.here]
        check_layers(model, homes)
        self.stages = {stage: Stage(model, spans[stage], args, device) for stage in mine}
        self.tie(homes)
        weights = [w for stage in self.stages.values() for w in stage.parameters()]
        self.weights = [w for w in dict.fromkeys(weights) if w.requires_grad]
        self.checked = False  # my_loss is a sum
        for weight in self.weights:
            weight.grad = torch.zeros_like(weight)
        some = self.weights or [nn.Parameter(torch.zeros(0))]  # an optimizer needs one
        self.optimizer = model.my_optimizer(some)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        stages = [PipelineStage(self.stages[s], s, len(spans), device, group=pipe) for s in mine]
        make, stages = get_schedule_class(SCHEDULES[args.schedule]), stages[0] if one else stages
        try:  # gradients stay sums: they are divided once, by what counts in the whole batch
            self.engine = make(stages, args.microbatches, loss_fn=self.loss, scale_grads=False)
        except ValueError as error:
            flags = f"--schedule {args.schedule} --microbatches {args.microbatches}"
            raise UserError(f"{flags}, {len(spans)} stages: {error}") from None

    def tie(self, homes):
        """What is tied: one parameter within a process, a group to add gradients across them."""
        layers = {int(p): s.layers[p] for s in self.stages.values() for p in s.layers}
        self.tied, self.copies = [], set()
        for tie in self.model.TIED:
            here = [(layers[place], name) for place, name in tie if place in layers]
            for layer, name in here:
                weight, old = here[0][0].get_parameter(here[0][1]), layer.get_parameter(name)
                for part in layer.modules():
                    for leaf, each in [*part.named_parameters("", False, False)]:
                        if each is old:
                            setattr(part, leaf, weight)
            where = [*dict.fromkeys(homes[place] for place, _ in tie)]
            for row in self.rows if len(where) > 1 else []:
                group = dist.new_group([row[home] for home in where])  # by all processes
                if here and row == self.rows[self.replica]:
                    dist.broadcast(weight.detach(), row[where[0]], group)
                    self.tied += [(weight, group)] if weight.requires_grad else []
                    self.copies |= {weight} if self.here != where[0] else set()

    # ------------------------------------------------------------------------------- a step

    def batch(self, number, train):
        """What counts in the batch; this replica's rows: numbers of microbatches, x and y."""
        x, y, count = self.model.my_batch(number, train)
        if not all(isinstance(z, torch.Tensor) and z.ndim for z in (x, y)) or len(x) != len(y):
            raise UserError("my_batch must return two tensors of as many rows, and what counts")
        content = [z.cpu().contiguous().view(torch.uint8).numpy().tobytes() for z in (x, y)]
        sums = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=self.device)
        sums[dist.get_rank()] = zlib.crc32(b"".join([*content, repr(float(count)).encode()]))
        dist.all_reduce(sums)
        if odd := [rank for rank, other in enumerate(sums) if other != sums[0]]:
            raise UserError(f"my_batch({number}, {train}) of processes {odd} is not that of 0")
        slices = self.args.replicas * self.args.microbatches
        self.shape = self.shape or x.shape
        if train and (x.shape != self.shape or len(x) % slices):
            rule = f"the same for all steps, rows a multiple of replicas * microbatches, {slices}"
            raise UserError(f"my_batch({number}): x is {[*x.shape]}, must be {rule}")
        numbers = torch.arange(slices) + slices * number
        mine = [z.tensor_split(self.args.replicas)[self.replica] for z in (numbers, x, y)]
        return float(count) or 1.0, mine[0], *(z.to(self.device) for z in mine[1:])

    def loss(self, output, target):
        """my_loss of a microbatch; as a sum, it is twice as much for a row given twice."""
        row, my_loss = (output[:1], target[:1]), self.model.my_loss
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bf16):
            loss = my_loss(output, target)
            number = isinstance(loss, torch.Tensor) and loss.ndim == 0
            if not number or loss.requires_grad != output.requires_grad:
                raise UserError("my_loss must return one number with a gradient: a sum")
            if not self.checked and output.isfinite().all():
                one, two = my_loss(*row), my_loss(*(torch.cat([z, z]) for z in row))
                if not abs(two - 2 * one) <= 0.1 * abs(one):  # it may be NaN
                    raise UserError("my_loss must be a sum: it is divided by what counts")
        return loss

    def train(self, step):
        """What one process does with the whole batch; return the loss."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self.model.my_rate(step, self.args.steps)
        self.optimizer.zero_grad(set_to_none=False)
        (count, numbers, x, y), losses = self.batch(step, train=True), []
        inputs = [x] if 0 in self.stages else []
        self.engine.step(*inputs, number=numbers, target=y, losses=losses, return_outputs=False)
        self.checked = True
        for weight in self.weights:
            dist.all_reduce(weight.grad.div_(count), group=self.data)
        for weight, group in self.tied:
            dist.all_reduce(weight.grad, group=group)
        mine = [weight.grad for weight in self.weights if weight not in self.copies]
        square = nn.utils.get_total_norm(mine).to(self.device) ** 2 / self.args.replicas
        loss = sum(losses, torch.zeros_like(square)).detach() / count
        both = torch.stack([loss.double(), square.double()])
        dist.all_reduce(both)  # over stages and replicas
        loss, norm = both[0].item(), both[1].sqrt()
        if not both.isfinite().all():
            raise UserError(f"step {step}: loss {loss}, norm of the gradient {norm:g}")
        nn.utils.clip_grads_with_norm_(self.weights, self.model.CLIP, norm)
        self.optimizer.step()
        for stage in self.stages.values() if self.args.replicas > 1 else []:
            for buffer in stage.buffers():  # of the first replica, as DDP does
                dist.broadcast(buffer, self.rows[0][self.here], self.data)
        return loss

    # --------------------------------------------------------------------------- evaluation

    @torch.no_grad()
    def evaluate(self):
        """The loss of a batch of any size: forward only, stage after stage."""
        count, _, *xy = self.batch(0, train=False)
        loss, row = torch.zeros((), device=self.device), self.rows[self.replica]
        for x, y in zip(*(z.tensor_split(self.args.microbatches) for z in xy), strict=True):
            for number, stage in self.stages.items() if len(x) else ():
                before, _, after = [self.here, *self.home, self.here][number : number + 3]
                if before != self.here:
                    dist.recv_object_list(box := [None], row[before])
                    x = box[0].to(self.device)
                x = stage.eval()(x, 0)
                stage.train()
                if after != self.here:
                    dist.send_object_list([x.cpu()], row[after])
                if number == len(self.home) - 1:
                    loss += self.loss(x, y) / count
        dist.all_reduce(loss)
        return loss.item()

    # -------------------------------------------------------------------------- checkpoints

    def state(self, step):
        """What a checkpoint holds, under the layers' places in the whole list."""
        tensors = {"step": torch.tensor(step), f"TIED {self.model.TIED}": torch.tensor(0)}
        for stage in self.stages.values():
            tensors |= stage.layers.state_dict()
        return tensors | {key: state[name] for key, state, name in self.moments()}

    def moments(self):
        """The optimizer's: key in a checkpoint, the dict that holds it, its name there."""
        for stage in self.stages.values():
            for place, weight in stage.layers.named_parameters(remove_duplicate=False):
                for name in self.optimizer.state.get(weight, ()):
                    yield f"optimizer.{place}.{name}", self.optimizer.state[weight], name

    def save(self, step):
        part, whole = self.args.save / "part", self.args.save / f"step{step:08d}"
        dcp.save(self.state(step), checkpoint_id=part)  # waits for all processes
        if dist.get_rank() == 0:
            part.rename(whole)  # now it counts, and those before it can go
            for old in sorted(whole.parent.glob("step*"))[:-1]:
                shutil.rmtree(old)
            print(f"saved {whole}", flush=True)

    def resume(self):
        """Load the last checkpoint; the step to go on with."""
        found = [max(self.args.resume.glob("step*"), default=None)]
        dist.broadcast_object_list(found)
        if not found[0]:
            raise UserError(f"--resume {self.args.resume}: no checkpoint is there")
        self.optimizer.step()  # makes the state to load into; the weights are loaded, too
        tensors, keys = self.state(0), [None] * dist.get_world_size()
        dist.all_gather_object(keys, {*tensors})
        saved = {*dcp.FileSystemReader(found[0]).read_metadata().state_dict_metadata}
        if odd := sorted(saved ^ set().union(*keys)):
            raise UserError(f"--resume {found[0]} is of another model: {odd[0]} is only in one")
        dcp.load(tensors, checkpoint_id=found[0])
        for key, state, name in self.moments():
            state[name] = tensors[key]  # where it is no tensor
        return int(tensors["step"])


def check_run(model, args):
    """Refuse numbers that are not above 0, and machines that do not have the same in hand."""
    given, marks, seen = ([None] * dist.get_world_size() for _ in range(3))
    dist.all_gather_object(given, {**vars(args), "my_model.py": Path(model.__file__).read_bytes()})
    for rank, other in enumerate(given):
        if odd := [key for key in other if other[key] != given[0][key]]:
            raise UserError(f"processes 0 and {rank} were started with different {odd[0]}")
    for key in ("EVAL_EVERY", "SAVE_EVERY", "CLIP"):
        value = getattr(model, key)
        if not (isinstance(value, (int, float)) and value > 0):
            raise UserError(f"{key}={value} must be a number above 0 (inf: never)")
    if args.save:
        if args.save != args.resume and [*args.save.glob("step*")]:
            raise UserError(f"--save {args.save} holds another run: take a new folder, or --resume")
        args.save.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=args.save) as mark:
            dist.all_gather_object(marks, mark.name)
            dist.all_gather_object(seen, all(Path(mark).exists() for mark in marks))
        if not all(seen):
            raise UserError(f"--save {args.save} is not one folder for all machines")


def check_layers(model, homes):
    """Refuse TIED with a wrong name, and what is shared across processes without it."""
    layers, seen = [], {}
    for place, make in enumerate(model.LAYERS):
        if isinstance(make, nn.Module):
            raise UserError(f"LAYERS[{place}] is a layer: it must be a function that makes one")
        try:
            with torch.device("meta"):  # without memory
                layers.append(make())
        except Exception:
            layers.append(make())  # it computes while it is made
        for name, weight in layers[-1].named_parameters():
            if homes[first := seen.setdefault(weight, place)] != homes[place]:
                raise UserError(f"layers {first} and {place} share {name}: it must be in TIED")
    ends = [end for tie in model.TIED for end in tie]
    try:
        for tie in model.TIED:
            weights = [layers[place].get_parameter(name) for place, name in tie]
            if len({(w.shape, w.dtype, w.requires_grad) for w in weights}) > 1:
                raise UserError(f"TIED: {tie} differ in shape or dtype, or only one is frozen")
    except (AttributeError, IndexError) as error:
        raise UserError(f"TIED: {tie}: {error}") from None
    if len(ends) > len({*ends}):
        raise UserError("TIED names a parameter twice: want all that are one in one line")


# ---------------------------------------------------------------------------- errors, main


def end(error, model):
    """Say in a line what went wrong, and end this process; torchrun ends the others."""
    errors = [error]
    while errors[-1].__cause__:  # the engine wraps what a layer raises
        errors.append(errors[-1].__cause__)
    known, root = [each for each in errors if isinstance(each, UserError)], errors[-1]
    if isinstance(root, dcp.CheckpointException):  # one for all processes
        root = next(iter(root.failures.values()))[0]
    frames = [f for f in traceback.extract_tb(root.__traceback__) if f.filename == model.__file__]
    where = f"line {frames[-1].lineno} of {Path(model.__file__).name}: " if frames else ""
    line = f"{where}{known[0] if known else f'{type(root).__name__}: {root}'}"
    rank = int(os.environ.get("RANK", 0))
    if "through the graph a second time" in line:
        line += " (zb-v and interleaved-zb: is one weight used twice in a stage?)"
    if "by peer" in line or "pair.cc" in line:  # as gloo says it
        line = "lost another process"
        time.sleep(3)  # it says why
    time.sleep(rank > 0)  # where all make the same mistake, one says it
    print(f"process {rank}: {' '.join(line.split())[:500]}", file=sys.stderr, flush=True)
    os._exit(2 if known else 1)  # without waiting for the threads of gloo


def positive(text):
    if int(text) < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return int(text)


def refuse(line):
    raise UserError(line)


def main(model):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.error, add, some = refuse, parser.add_argument, {"type": positive, "metavar": "N"}
    add("--processes", **some, help="start N processes here, without torchrun (2)")
    add("--cut", type=int, nargs="+", metavar="LAYER", help="the first layer of each stage")
    add("--schedule", choices=SCHEDULES, default="1f1b", metavar="NAME", help=", ".join(SCHEDULES))
    add("--microbatches", **some, default=8, help="of each replica's batch (8)")
    add("--replicas", **some, default=1, help="pipelines that share each batch (1)")
    add("--recompute", action="store_true", help="keep inputs of layers only, and run them again")
    add("--bf16", action="store_true", help="compute in bfloat16, as torch.autocast does")
    add("--steps", **some, default=200, help="batches of the whole run (200)")
    add("--until", **some, help="save after N steps, and stop")
    add("--save", type=Path, metavar="DIR", help="every SAVE_EVERY steps and at the end")
    add("--resume", type=Path, metavar="DIR", help="go on from the last step saved there")
    try:
        args = parser.parse_args()
        if args.until and not args.save:
            raise UserError("--until needs --save")
        if args.save and args.save.is_file():
            raise UserError(f"--save {args.save} is not a folder")
        logging.disable()  # where a process fails, PyTorch would print the whole schedule
        if os.environ.keys() >= LAUNCHED:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # without a traceback
            run(model, args)
            os._exit(0)  # while Python takes itself down, a thread of gloo's may abort the process
        else:
            start(args.processes or 2)
    except (KeyboardInterrupt, SignalException) as error:
        os._exit(128 + getattr(error, "sigval", signal.SIGINT))
    except (Exception, dcp.CheckpointException) as error:
        end(error, model)


def start(processes):
    """What torchrun does, with one line where a process fails instead of forty."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    print(f"starting {processes} processes", flush=True)
    flags = ["--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={processes}"]
    try:
        torchrun([*flags, *sys.argv])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            print(f"process {rank} was ended by signal {-failure.exitcode}", file=sys.stderr)
        sys.exit(max(1, failure.exitcode))


def run(model, args):
    """Train in one of the processes that torchrun has started; return the losses."""
    world, parent = int(os.environ["WORLD_SIZE"]), os.getppid()
    if args.processes not in (None, world):
        raise UserError(f"--processes {args.processes}: torchrun has started {world}")
    device = torch.device("cpu")
    if gpu := torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"]):
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo")
    check_run(model, args)
    pipeline, losses = Pipeline(model, args, device), []
    say = print if dist.get_rank() == 0 else lambda *_, **__: None
    first, stop = pipeline.resume() if args.resume else 0, min(args.until or args.steps, args.steps)
    if first >= stop:
        say(f"nothing to do: {args.resume} holds step {first} of {stop}")
    for step in range(first, stop):
        if os.getppid() != parent:
            raise UserError("what has started the processes is gone")
        start = time.perf_counter()
        losses.append(pipeline.train(step))
        took = 1000 * (time.perf_counter() - start)
        say(f"step {step}: loss {losses[-1]:.6f} in {took:.0f} ms", flush=True)
        if (step + 1) % model.EVAL_EVERY == 0:
            losses.append(pipeline.evaluate())
            say(f"evaluation: loss {losses[-1]:.6f}", flush=True)
        if args.save and ((step + 1) % model.SAVE_EVERY == 0 or step + 1 == stop):
            pipeline.save(step + 1)
    dist.destroy_process_group()
    return losses
