"""Lengths of sequences as LLaVA's instruction data has them, in the batches that LLaVA's own sampler makes of them."""

from __future__ import annotations

import argparse
import math
import random
import sys

SAMPLES, GPUS, LONGEST = 16, 8, 2048  # LLaVA's recipe, and where it cuts
IMAGE = 576  # tokens that an image becomes
# Share of the samples, median and spread (sigma of the logarithm) of the tokens of text. Chosen so that a sample has about 900 tokens
# in the middle, as llava_v1_5_mix665k.json has: 624,610 of its records have an image, the others are long conversations.
WITH_IMAGE, TEXT_ONLY = (0.94, 220.0, 0.4), (0.06, 1000.0, 0.8)


def mix665k(batches: int, longest: int = LONGEST, seed: int = 0) -> list[list[int]]:
    """Lengths of the sequences in each of the batches that one GPU of eight gets, padding left out.

    Args:
        longest: all lengths are scaled so that the longest has so many tokens.
    """
    import torch
    from llava.train.llava_trainer import get_modality_length_grouped_indices

    draw = random.Random(seed)
    text = [_text(draw) for _ in range(40 * GPUS * SAMPLES)]
    order = get_modality_length_grouped_indices(text, SAMPLES, GPUS, generator=torch.Generator().manual_seed(seed))
    mine = [order[start : start + SAMPLES] for start in range(0, len(order) - SAMPLES + 1, SAMPLES * GPUS)]
    chosen = mine[:: max(len(mine) // batches, 1)][:batches]
    return [[max(round(_whole(text[i]) * longest / LONGEST), 2) for i in batch] for batch in chosen]


def _text(draw: random.Random) -> int:
    """Tokens of one sample's text; negative for one without an image, as LLaVA's sampler tells them apart."""
    image = draw.random() < WITH_IMAGE[0]
    _, median, spread = WITH_IMAGE if image else TEXT_ONLY
    tokens = max(round(median * math.exp(draw.gauss(0.0, spread))), 10)
    return tokens if image else -tokens


def _whole(text: int) -> int:
    return min(IMAGE + text if text > 0 else -text, LONGEST)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=10, help="how many batches to print (default: 10)")
    for batch in mix665k(parser.parse_args(argv).batches):
        print(*batch)
    return 0


if __name__ == "__main__":
    sys.exit(main())
