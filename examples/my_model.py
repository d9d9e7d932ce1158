"""Train your own model as a pipeline. Copy this file, and replace my_layers and my_batches.
Loss and optimizer are in main; the loss must be the mean over a batch, as cross_entropy is.

torchrun --nproc-per-node 2 examples/my_model.py
"""

import os
import sys
from inspect import signature

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.nn.functional import cross_entropy

NUM_MICROBATCHES = 8  # slices of a batch; at least as many as processes
NUM_BATCHES = 20


def my_layers():
    """Your model as a list: each layer takes the previous one's output, of a fixed shape."""
    hidden = [nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(6)]
    return [nn.Linear(2, 32), *hidden, nn.Linear(32, 2)]


def my_batches():
    """Your data. All batches have the same size, a multiple of NUM_MICROBATCHES."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(NUM_BATCHES):
        x = torch.randn(64, 2, generator=generator)
        yield x, (x[:, 0] * x[:, 1] > 0).long()  # the class says whether the signs are the same


def main():
    if "RANK" not in os.environ:
        sys.exit("start it as: torchrun --nproc-per-node 2 examples/my_model.py")
    if "return_outputs" not in signature(Schedule1F1B.step).parameters:
        sys.exit(f"torch {torch.__version__} is too old for this file, which needs 2.10 or newer")
    gpu = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    dist.init_process_group("nccl" if gpu else "gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # all processes begin with the same weights
    layers = my_layers()
    first, end = len(layers) * rank // size, len(layers) * (rank + 1) // size  # this rank's part
    module = nn.Sequential(*layers[first:end]).to(device)
    stage = PipelineStage(module, rank, size, device)
    schedule = Schedule1F1B(stage, NUM_MICROBATCHES, loss_fn=cross_entropy)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)  # of this rank's part
    for number, (x, y) in enumerate(my_batches()):
        losses = []  # of the microbatches; filled on the last stage
        inputs = [x.to(device)] if rank == 0 else []
        schedule.step(*inputs, target=y.to(device), losses=losses, return_outputs=False)
        optimizer.step()
        optimizer.zero_grad()
        if rank == size - 1:
            print(f"batch {number}: loss {torch.stack(losses).mean():.6f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
