"""What the program says, found in other ways: training, time and plans, each from its rule.

Nothing here is shared with what it checks, except networks, batches and rows.
"""

import copy
import itertools
from collections import Counter, defaultdict, deque
from fractions import Fraction

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from pipedream_simple import build_stages, make_batches

# ----------------------------------------------------------------------------------- training


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


def delayed(config, delay_of_stage, make_optimizer):
    """W_s(b + 1) is the optimizer's step from W_s(b), along a gradient at older weights.

    The gradient of batch b is at version max(0, b - delay_s) of every stage. Whole batches in
    float64, and a list of copies of the network: no microbatches, no pipeline, no stash.
    make_optimizer gets all weights. Returns the losses and the final weights of each stage.
    """
    newest = [stage.double() for stage in build_stages(config)]
    network = nn.Sequential(*newest)
    optimizer, history, losses = make_optimizer([*network.parameters()]), [], []
    for b, (x, y) in enumerate(make_batches(config)):
        history.append(copy.deepcopy(newest))  # history[v][stage]
        read = [history[max(0, b - delay_of_stage(s))][s] for s in range(len(newest))]
        old = nn.Sequential(*read)
        old.zero_grad()
        loss = cross_entropy(old(x.double()), y)
        loss.backward()
        losses.append(loss.item())
        for w, was in zip(network.parameters(), old.parameters(), strict=True):
            w.grad = was.grad.clone()
        optimizer.step()
    return losses, [dict(stage.named_parameters()) for stage in newest]


def delayed_sgd(config, delay_of_stage):
    """The same with torch.optim.SGD, as the papers have it."""
    settings = {"lr": config["learning_rate"], "momentum": config["momentum"]}
    return delayed(config, delay_of_stage, lambda weights: torch.optim.SGD(weights, **settings))


def mismatches(schedule):
    """The backwards that read another weight version than their forward did. Stashing: none."""
    ops = [op for row in schedule for op in row]
    read = {op[:3]: op.version for op in ops}
    return [op for op in ops if op.kind == "B" and op.version != read[op.stage, "F", op.microbatch]]


# --------------------------------------------------------------------------------------- time


def clock(rows, in_batch, takes, travels, pairs=(), part=1):
    """GPUs and links, run from moment to moment: {(GPU, op): (start, end)}, and that of messages.

    No time is computed before its moment has come. A GPU that is free starts the next op of its row
    once the input is there. A result for another GPU stands in line until the link to that GPU, in
    that direction, is free. The F in pairs run together with the op behind them, and take this part
    of the time of both. An update waits for its batch's backwards on all GPUs that hold the stage.
    """
    last, todo = max(op.stage for row in rows for op in row), []
    for row in rows:
        ops = iter(row)
        todo.append(deque((op, next(ops)) if op[:3] in pairs else (op,) for op in ops))

    def needs(op):
        stage, kind, m, _ = op
        if kind == "F" and stage > 0:
            return stage - 1, "F", m
        if kind in "BI":
            return (stage + 1, "B", m) if stage < last else (stage, "F", m)
        return None

    def may_start(gpu, op):
        if op.kind == "U":
            return done[op.stage, op.microbatch // in_batch] == in_batch
        return needs(op) is None or (gpu, needs(op)) in here

    goes_to = {needs(op): gpu for gpu, row in enumerate(rows) for op in row}
    now, here, done = 0, set(), Counter()
    busy, lines = {}, defaultdict(deque)  # GPU, or (from, to) -> (end, ops); who waits for a link
    ops, messages = {}, {}
    while True:
        for place in [place for place, (end, _) in busy.items() if end == now]:
            for op in busy.pop(place)[1]:
                result = op.stage, op.kind.replace("I", "B"), op.microbatch
                if isinstance(place, tuple):
                    here.add((place[1], result))
                    continue
                here.add((place, result))
                done[op.stage, op.microbatch // in_batch] += op.kind in "BW"
                if (to := goes_to.get(result, place)) != place:
                    lines[place, to].append(op)
        for link, line in lines.items():
            if line and link not in busy:
                op = line.popleft()
                messages[link[0], op] = now, now + travels(op)
                busy[link] = now + travels(op), [op]
        for gpu, row in enumerate(todo):
            if row and gpu not in busy and all(may_start(gpu, op) for op in row[0]):
                block = row.popleft()
                end = now + sum(map(takes, block)) * (part if len(block) == 2 else 1)
                ops |= {(gpu, op): (now, end) for op in block}
                busy[gpu] = end, block
        if not busy:
            assert not any(todo), "a deadlock"
            return ops, messages
        now = min(end for end, _ in busy.values())


# -------------------------------------------------------------------------------------- plans


def divisions(first, last, units):
    """All ways to give consecutive layers to units in order: [(first, last, units), ...]."""
    if units and first <= last:
        yield [(first, last, units)]
    for number, cut in itertools.product(range(1, units), range(first, last)):
        for rest in divisions(cut + 1, last, units - number):
            yield [(first, cut, number), *rest]


def two_level_plans(num_layers, gpus, machines):
    """All plans: lists of (first, last, replicas in a machine, machines, which machines).

    Machines are divided among layers, and then the GPUs of each, in the same way in all machines
    that have the same layers (PipeDream, SOSP 2019, section 3.1: levels).
    """
    for outer in divisions(0, num_layers - 1, machines):
        for inner in itertools.product(*(divisions(a, b, gpus) for a, b, _ in outer)):
            yield [
                (first, last, copies, units, number)
                for number, (stages, (_, _, units)) in enumerate(zip(inner, outer, strict=True))
                for first, last, copies in stages
            ]


def counted(layers, plan, bandwidths):
    """Of each stage of a plan, seconds per minibatch: computing, adding up gradients, sending.

    Found by counting what passes the links of every GPU and every machine while each replica has
    one minibatch: bytes sent and received, over the bandwidth. As in the planner, each stage, and
    each of its two cuts, has the links to itself.
    """
    seconds = []
    for number, (first, last, *copies, machines) in enumerate(plan):
        round_of = [*itertools.product(*map(range, copies))]  # replicas: (GPU, machine)
        compute = sum(
            Fraction(layer.forward + layer.backward) for layer in layers[first : last + 1]
        )
        weights = sum(Fraction(layer.weights) for layer in layers[first : last + 1])
        adding = Fraction(0)
        for ring, bandwidth in zip(copies, bandwidths, strict=True):
            bytes_at = Counter()
            for _ in range(2 * (ring - 1)):  # sums go round, and then what they came to
                for unit in range(ring):  # passes one share to the next in the ring
                    bytes_at[unit] += weights / ring
                    bytes_at[(unit + 1) % ring] += weights / ring
            adding += max(bytes_at.values(), default=0) / Fraction(bandwidth)
        sending = Fraction(0)
        for other, layer in ((number - 1, first - 1), (number + 1, last)):
            if not 0 <= other < len(plan):
                continue
            bytes_at = Counter()
            for gpu, machine in round_of:  # an activation, and a gradient back
                bytes_at[0, gpu, machine] += 2 * Fraction(layers[layer].activation)
                if plan[other][-1] != machines:
                    bytes_at[1, machine] += 2 * Fraction(layers[layer].activation)
            times = (size / Fraction(bandwidths[link[0]]) for link, size in bytes_at.items())
            sending = max(sending, *times)
        seconds.append([time / len(round_of) for time in (compute, adding, sending)])
    return seconds
