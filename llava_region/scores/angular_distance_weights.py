"""Angular distance between a decoder layer's weights and the backbone's (paper: appendix A, with Gromov et al.'s formula)."""

from __future__ import annotations

import math
from collections.abc import Iterable

from llava_region.scores.weight_changes import TensorChange


def angular_distance_weights(layer: Iterable[TensorChange]) -> float:
    """Mean over a layer's parameter tensors of arccos(theta' . theta / (|theta'| |theta|)) / pi, each tensor as one vector.

    The paper writes the formula for "the j-th parameter" and averages "all parameters within each layer": a parameter is
    taken to be a tensor, and each counts the same. Exactly 0 for a layer that did not change.
    """
    angles = [_angle(tensor) for tensor in layer]
    return sum(angles) / len(angles)


def _angle(t: TensorChange) -> float:
    """Angle between theta and theta + delta, over pi; 1/2 if one of the two is zero and the other not.

    Equal to 2 * atan2(|u - v|, |u + v|) of the normalised vectors, from sums of one pass: with Lagrange's identity
    |theta|^2 |theta'|^2 - (theta . theta')^2 = |theta|^2 |delta|^2 - (theta . delta)^2, in which nothing large cancels.
    """
    if t.change_square == 0:
        return 0.0
    if t.square == 0 or t.square + 2 * t.cross + t.change_square <= 0:
        return 0.5
    across = math.sqrt(max(t.square * t.change_square - t.cross**2, 0.0))
    return math.atan2(across, t.square + t.cross) / math.pi
