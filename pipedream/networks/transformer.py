"""A transformer that reads an image as 64 tokens: --network transformer

The first and the last layer cost something else than those between, which is what real cuts are
about. A file beside this one, with make_layers(size, depth), is another network, by its name.
"""

from torch import Tensor, nn

from pipedream_simple import UserError

NUM_HEADS = 4


class Embedding(nn.Module):
    """A vector for the grey value of a pixel, 0 to 16, plus one for its place in the image."""

    def __init__(self, size: int):
        super().__init__()
        self.value, self.place = nn.Embedding(17, size), nn.Embedding(64, size)

    def forward(self, x: Tensor) -> Tensor:  # (microbatch_size, 64) in, one token per pixel out
        return self.value(x.long()) + self.place.weight


def make_layers(size: int, depth: int) -> list[nn.Module]:
    """Layers of attention and MLP. The first one also embeds, and the last one has the head."""
    if size % NUM_HEADS:
        raise UserError(f"hidden_size={size} must be a multiple of its {NUM_HEADS} heads")
    layers: list[nn.Module] = [
        nn.TransformerEncoderLayer(size, NUM_HEADS, size, 0.0, batch_first=True, norm_first=True)
        for _ in range(depth)
    ]
    norm = nn.LayerNorm(size)
    nn.init.constant_(norm.weight, 1 / 8)  # or SGD diverges: all 64 tokens go into each logit
    layers[0] = nn.Sequential(Embedding(size), layers[0])
    layers[-1] = nn.Sequential(layers[-1], norm, nn.Flatten(), nn.Linear(64 * size, 10))
    return layers
