"""Training written down as in the papers: no schedule, no pipeline, nothing of the trainer."""

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from pipedream_simple import build_stages, make_batches


def plain_sgd(config):
    """torch.optim.SGD on whole batches of one ordinary network, in float64: losses and weights."""
    stages = [stage.double() for stage in build_stages(config)]
    network = nn.Sequential(*stages)
    rate, momentum = config["learning_rate"], config["momentum"]
    optimizer = torch.optim.SGD(network.parameters(), lr=rate, momentum=momentum)
    losses = []
    for x, y in make_batches(config):
        optimizer.zero_grad()
        loss = cross_entropy(network(x.double()), y)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    return losses, [dict(stage.named_parameters()) for stage in stages]


def delayed_sgd(config, delay_of_stage):
    """W_s(b + 1) = W_s(b) - lr * u_s(b), and u_s(b) = momentum * u_s(b - 1) + grad_s of batch b.

    The gradient is at version max(0, b - delay_s) of every stage. One ordinary network, whole
    batches, float64: no microbatches, no pipeline, no stash. Returns the losses and the final
    weights of each stage.
    """
    stages = [stage.double() for stage in build_stages(config)]
    history = [[dict(stage.named_parameters()) for stage in stages]]  # history[v][stage]
    losses = []
    u = [dict.fromkeys(weights, 0.0) for weights in history[0]]
    for b, (x, y) in enumerate(make_batches(config)):
        read = []
        for stage in range(len(stages)):
            version = history[max(0, b - delay_of_stage(stage))][stage]
            read.append({n: w.detach().clone().requires_grad_() for n, w in version.items()})
        h = x.double()
        for stage, weights in zip(stages, read, strict=True):
            h = functional_call(stage, weights, (h,))
        loss = cross_entropy(h, y)
        loss.backward()
        losses.append(loss.item())
        rate, momentum = config["learning_rate"], config["momentum"]
        u = [
            {name: momentum * old[name] + w.grad for name, w in weights.items()}
            for old, weights in zip(u, read, strict=True)
        ]
        history.append(
            [
                {name: w.detach() - rate * step[name] for name, w in newest.items()}
                for newest, step in zip(history[-1], u, strict=True)
            ]
        )
    return losses, history[-1]


def mismatches(schedule):
    """The backwards that read another weight version than their forward did. Stashing: none."""
    ops = [op for row in schedule for op in row]
    read = {op[:3]: op.version for op in ops}
    return [op for op in ops if op.kind == "B" and op.version != read[op.stage, "F", op.microbatch]]
