"""Block influence and multimodal block influence: how much a decoder layer turns its tokens (paper: section 4.1, appendix A)."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cosine_similarity


def token_cosines(inputs: Tensor, outputs: Tensor) -> Tensor:
    """Cosine of every token before and after a layer.

    In float32 with each token's own norms: in float16 the product of two norms passes 65504 and the cosine silently
    becomes 0.

    Args:
        inputs, outputs: the layer's own input and output, (B, T, H), any dtype.

    Returns:
        (B, T), float32.
    """
    return cosine_similarity(inputs.float(), outputs.float(), dim=-1)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of each row of `values` (B, T) over the positions where `mask` (B, T) is true: (B,); NaN for a row without any."""
    return values.masked_fill(~mask, 0).sum(-1) / mask.sum(-1)


def block_influence(cosines: Tensor, attention_mask: Tensor) -> Tensor:
    """1 - mean over a sample's tokens of cos(X_i[t], X_{i+1}[t]), padding left out: (B,)."""
    return 1 - masked_mean(cosines, attention_mask)


def modality_cosines(cosines: Tensor, attention_mask: Tensor, image_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cosine over a sample's image tokens and over its text tokens: two of (B,); NaN where a sample has none of a kind.

    Args:
        cosines: from `token_cosines`, (B, T).
        attention_mask: true for tokens, false for padding, (B, T).
        image_mask: true at the positions of image tokens, wherever they stand, (B, T).
    """
    return masked_mean(cosines, attention_mask & image_mask), masked_mean(cosines, attention_mask & ~image_mask)


def multimodal_block_influence(image_cosines: Tensor, text_cosines: Tensor) -> Tensor:
    """1 - (E[image tokens] + E[text tokens]) / 2, from each layer's two means over samples, (L,) each: (L,).

    Each mean goes over the samples that have tokens of that kind, so a text-only sample counts in the text mean alone.
    """
    return 1 - (image_cosines + text_cosines) / 2
