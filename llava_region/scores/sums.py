"""What the pass over the data adds up: per decoder layer and quantity, a sum over samples and their number."""

from __future__ import annotations

import torch
from torch import Tensor

from llava_region.errors import LlavaRegionError
from llava_region.scores.block_influence import multimodal_block_influence

# one value per sample and layer each
QUANTITIES = ("block_influence", "image_cosine", "text_cosine", "angular_distance", "image_attention")
NEEDED = {
    "block_influence": ("block_influence",),
    "multimodal_block_influence": ("image_cosine", "text_cosine"),
    "angular_distance": ("angular_distance",),
    "image_attention": ("image_attention",),
}


class Sums:
    """Float64 sums of the quantities over samples; two of them over different samples add up to one.

    Attributes:
        table: (quantities, L + 1); the last column counts the samples.
    """

    def __init__(self, num_layers: int) -> None:
        self.table = torch.zeros(len(QUANTITIES), num_layers + 1, dtype=torch.float64)

    def add(self, quantity: str, values: Tensor, counted: Tensor) -> None:
        """Add the samples of a batch where `counted` (B,) is true; `values` are (L, B), float64."""
        row = self.table[QUANTITIES.index(quantity)]
        row[:-1] += values[:, counted].sum(-1)
        row[-1] += counted.sum()

    def mean(self, quantity: str) -> Tensor:
        """Mean over the counted samples: (L,), float64; NaN if there were none."""
        row = self.table[QUANTITIES.index(quantity)]
        return row[:-1] / row[-1]

    def count(self, quantity: str) -> int:
        """Samples that counted for a quantity."""
        return int(self.table[QUANTITIES.index(quantity), -1])

    def scores(self, metric: str) -> list[float]:
        """A metric's score of each layer.

        Raises:
            LlavaRegionError: no sample counted, or a score is not a finite number.
        """
        if any(self.count(quantity) == 0 for quantity in NEEDED[metric]):
            raise LlavaRegionError(f"no sample has the tokens {metric} needs (image and text); leave it out or give other data")
        means = [self.mean(quantity) for quantity in NEEDED[metric]]
        scores = multimodal_block_influence(*means) if metric == "multimodal_block_influence" else means[0]
        bad = (~scores.isfinite()).nonzero().flatten().tolist()
        if bad:
            raise LlavaRegionError(f"{metric} of layer {bad[0]} is not a finite number: the model itself overflows; give --dtype float32")
        return scores.tolist()

    def samples(self, metric: str) -> int:
        """Samples behind a metric; for multimodal block influence those with an image."""
        return self.count(NEEDED[metric][0])
