"""Training written down as in the papers: no schedule, no pipeline, nothing of the trainer."""

from torch.func import functional_call
from torch.nn.functional import cross_entropy

from pipedream_simple import build_stages, make_batches


def delayed_sgd(config, delay_of_stage):
    """W_s(b + 1) = W_s(b) - lr * grad_s of batch b, at version max(0, b - delay_s) of every stage.

    One ordinary network, whole batches, float64: no microbatches, no pipeline, no stash. Returns
    the losses and the final weights of each stage.
    """
    stages = [stage.double() for stage in build_stages(config)]
    history = [[dict(stage.named_parameters()) for stage in stages]]  # history[v][stage]
    losses = []
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
        rate = config["learning_rate"]
        history.append(
            [
                {name: w.detach() - rate * weights[name].grad for name, w in newest.items()}
                for newest, weights in zip(history[-1], read, strict=True)
            ]
        )
    return losses, history[-1]
