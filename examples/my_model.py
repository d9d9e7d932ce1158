"""A model of your own, trained as a pipeline. Edit this file; pipeline.py beside it does the rest.

python examples/my_model.py --processes 2
torchrun --nproc-per-node 2 examples/my_model.py --schedule zb-v --save checkpoints

The example is a small causal transformer that learns the bytes of the README (or of this file).
"""

import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during a slow import: no traceback

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

WIDTH, DEPTH, LENGTH, DROPOUT, IGNORED = 64, 4, 64, 0.1, -100
BATCH, EVAL_BATCH = 32, 48  # sequences
EVAL_EVERY, SAVE_EVERY = 50, 50  # steps
CLIP, SEED = 1.0, 0  # the largest norm of the gradient; of first weights and dropout
README = Path(__file__).resolve().parents[1] / "README.md"
TEXT = README if README.exists() else Path(__file__)  # or any other


# Layers: each gets the tensor that the one before returns, and returns one of the same shape in
# every step. The dimensions of x and y begin with the sequences of the batch.
class Embed(nn.Module):
    def __init__(self):
        super().__init__()
        self.token, self.place = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.dropout = nn.Dropout(DROPOUT)
        for weight in self.parameters():
            nn.init.normal_(weight, std=0.1)  # small: one is the weight of the head, too

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.token(x) + self.place.weight[: x.shape[1]])


class Block(nn.TransformerEncoderLayer):
    def __init__(self):
        super().__init__(WIDTH, 4, 4 * WIDTH, DROPOUT, batch_first=True, norm_first=True)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], x.device)
        return super().forward(x, mask, is_causal=True)


def head() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256, bias=False))


# Functions: a process makes its own layers only, so what they make must not depend on the others.
LAYERS = [Embed, *[Block] * DEPTH, head]
TIED = [((0, "token.weight"), (DEPTH + 1, "1.weight"))]  # parameters that are one: layer and name


def my_batch(number: int, train: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets, and how many targets count. All processes must draw the same batch."""
    generator = torch.Generator().manual_seed(2 * number + train)  # no more: a run can be resumed
    text = torch.tensor([*TEXT.read_bytes()])
    text = text.unfold(0, LENGTH + 1, LENGTH)  # pieces; each tenth one is for evaluation
    tenth, rows = torch.arange(len(text)) % 10 == 0, BATCH if train else EVAL_BATCH
    text = text[tenth ^ train]
    pieces = text[torch.randint(len(text), (rows,), generator=generator)]
    length = torch.randint(LENGTH // 4, LENGTH + 1, (rows, 1), generator=generator)
    padding = torch.arange(LENGTH) >= length  # at the end, where no other token sees it
    x, y = pieces[:, :-1].masked_fill(padding, 0), pieces[:, 1:].masked_fill(padding, IGNORED)
    return x, y, (y != IGNORED).sum()


def my_loss(output: Tensor, target: Tensor) -> Tensor:
    """The sum over the targets that count. It will be divided by their number in the batch."""
    output, target = output.flatten(0, 1), target.flatten()
    return cross_entropy(output, target, ignore_index=IGNORED, reduction="sum")


def my_optimizer(weights: list[nn.Parameter]) -> torch.optim.Optimizer:
    matrices = {"params": [weight for weight in weights if weight.ndim > 1]}
    others = {"params": [weight for weight in weights if weight.ndim < 2], "weight_decay": 0.0}
    return torch.optim.AdamW([matrices, others], lr=3e-3, weight_decay=0.01)


def my_rate(step: int, steps: int) -> float:
    """The factor of the learning rate: warmup, then decay."""
    return min((step + 1) / 10, 1 - 0.9 * step / steps)


if __name__ == "__main__":
    from pipeline import main

    main(sys.modules[__name__])
