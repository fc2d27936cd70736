"""Image attention: the attention mass that flows into image tokens in a decoder layer (paper: appendix A, Figure 5).

The probabilities are computed anew from the queries and keys that the layer itself made (`attention_inputs`), so the score
does not depend on the attention implementation the model runs with, and no whole attention matrix is ever kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Elements of one block of attention scores, (B, heads, queries, keys): 4 MiB, the size of a CPU's cache, or 64 MiB on a GPU.
BLOCK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 24}


def image_attention(
    queries: Tensor,
    keys: Tensor,
    scale: float,
    attention_mask: Tensor,
    image_mask: Tensor,
    *,
    first: int = 0,
    layer_mask: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention into image tokens, summed over heads and queries, over (image tokens x heads): (B,), float32.

    0 for a sample without image tokens. Softmax in float32, in blocks of queries.

    Args:
        queries: (B, heads, T, D), rotated.
        keys: (B, key heads, T, D), rotated; heads is a multiple of key heads (grouped-query attention).
        scale: factor on the products, as a rule D ** -0.5.
        attention_mask: true for tokens, (B, T); padding neither asks nor is attended.
        image_mask: true at the positions of image tokens, (B, T).
        first: position of the first image token in the batch, or lower; queries before it cannot see any.
        layer_mask: what the layer itself let its queries see, (B or 1, 1, T, >= T), where it is more than causal and padding.
        bias: added to the scores before softmax (ALiBi), (heads, 1 or T, T).
    """
    batch, heads, length, _ = queries.shape
    received = torch.zeros(batch, length, device=queries.device)  # attention into each token, over heads and queries
    step = max(1, BLOCK_ELEMENTS.get(queries.device.type, 1 << 20) // (batch * heads * length))
    for begin in range(first, length, step):
        end = min(begin + step, length)
        visible = _visible(attention_mask, layer_mask, begin, end)
        probabilities = _probabilities(queries[:, :, begin:end], keys[:, :, :end], scale, visible, _rows(bias, begin, end))
        asking = attention_mask[:, None, begin:end].expand(-1, heads, -1).reshape(batch, 1, -1).float()
        received[:, :end] += (asking @ probabilities.flatten(1, 2)).squeeze(1)
    image = attention_mask & image_mask
    return (received * image).sum(-1) / (image.sum(-1).clamp(min=1) * heads)


def _visible(attention_mask: Tensor, layer_mask: Tensor | None, begin: int, end: int) -> Tensor:
    """Which keys (up to `end`) the queries `begin` to `end` see: (B, 1, queries, keys)."""
    positions = torch.arange(end, device=attention_mask.device)
    visible = (positions <= positions[begin:, None]) & attention_mask[:, None, None, :end]
    return visible if layer_mask is None else visible & layer_mask[:, :, begin:end, :end]


def _rows(bias: Tensor | None, begin: int, end: int) -> Tensor | None:
    """The bias of a block; one row for all queries differs from theirs by a constant, which softmax does not see."""
    if bias is None:
        return None
    return (bias if bias.shape[1] == 1 else bias[:, begin:end])[..., :end].float()


def _probabilities(queries: Tensor, keys: Tensor, scale: float, visible: Tensor, bias: Tensor | None) -> Tensor:
    """Softmax over the keys, (B, heads, queries, keys), float32; a row without a visible key (padding) is uniform."""
    batch, heads, asked, size = queries.shape
    grouped = (queries.float() * scale).reshape(batch, keys.shape[1], -1, size)
    scores = (grouped @ keys.float().transpose(-1, -2)).view(batch, heads, asked, -1)
    if bias is not None:
        scores += bias
    return scores.masked_fill_(~visible, torch.finfo(torch.float32).min).softmax(-1)
