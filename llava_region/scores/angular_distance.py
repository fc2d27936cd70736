"""Angular distance between consecutive layer inputs at the last token (Gromov et al., 2024; paper: section 4.1 and 6)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def last_token(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """The hidden state of each sample's last token that is not padding, on either side: (B, H) of (B, T, H)."""
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    last = (attention_mask * positions).argmax(-1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


def angular_distance(inputs: Tensor, outputs: Tensor, attention_mask: Tensor) -> Tensor:
    """arccos(cos(X_i, X_{i+1})) / pi at the last token: (B,), float64, 0 (unchanged) to 1 (opposite).

    Computed as 2 * atan2(|u - v|, |u + v|) / pi on normalised float64 vectors: arccos loses half of the digits near 0.

    Args:
        inputs: input of layer i, (B, T, H).
        outputs: its output, which is the input of layer i + 1, (B, T, H); for the last layer, its output before the final norm.
        attention_mask: true for tokens, (B, T).
    """
    u, v = (_unit(last_token(hidden, attention_mask).double()) for hidden in (inputs, outputs))
    return 2 * torch.atan2((u - v).norm(dim=-1), (u + v).norm(dim=-1)) / math.pi


def _unit(vectors: Tensor) -> Tensor:
    """A zero vector (the embedding of an EOS that also pads) stays zero, which puts it at a right angle to every other."""
    return vectors / vectors.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(vectors.dtype).tiny)
