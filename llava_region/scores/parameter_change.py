"""Parameter change ratio: how far a decoder layer's weights moved from the backbone's (Zhao et al., 2023; paper: appendix A)."""

from __future__ import annotations

import math
from collections.abc import Iterable

from llava_region.errors import LlavaRegionError
from llava_region.scores.weight_changes import TensorChange

FORMS = ("elementwise", "norm", "l1")


def parameter_change(layer: Iterable[TensorChange], form: str = "elementwise") -> float:
    """The change of one decoder layer, over all its elements together.

    Args:
        layer: the layer's tensors.
        form: `elementwise`, the paper's: mean of |(theta' - theta) / theta| over the elements with |theta| >= eps, as a zero
            makes it infinite; `norm`: |theta' - theta|_2 / |theta|_2; `l1`: sum |theta' - theta| / sum |theta|.

    Raises:
        LlavaRegionError: there is nothing to divide by.
    """
    layer = list(layer)
    if form == "elementwise":
        change, size = sum(t.ratio for t in layer), sum(t.numel - t.masked for t in layer)
    elif form == "norm":
        change, size = (math.sqrt(sum(getattr(t, name) for t in layer)) for name in ("change_square", "square"))
    else:
        change, size = sum(t.change_absolute for t in layer), sum(t.absolute for t in layer)
    if size == 0:
        raise LlavaRegionError(
            f"the backbone's decoder layer {layer[0].layer} holds only zeros (or less than --eps), and a ratio to them has no value; "
            "lower --eps, or leave parameter_change out"
        )
    return change / size


def masked(layer: Iterable[TensorChange]) -> int:
    """Elements of a layer that `elementwise` leaves out, |theta| < eps."""
    return sum(t.masked for t in layer)
