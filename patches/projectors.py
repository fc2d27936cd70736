"""The tensors of each projector that LLaVA and Bunny build, from the config alone: name in the projector -> shape.

Held against the upstreams' own builders in `tests/patches/test_projectors.py`.
"""

from __future__ import annotations

import re

Shapes = dict[str, tuple[int, ...]]


def projector_shapes(kind: str, features: int, width: int) -> Shapes | None:
    """The tensors of a projector; None for a kind that is not known here.

    Args:
        kind: as `mm_projector_type` names it.
        features: of an image patch, `mm_hidden_size`.
        width: H of the language model.
    """
    if kind == "identity":
        return {}
    if kind == "linear":
        return _linear("", features, width)
    if mlp := re.fullmatch(r"mlp(\d+)x_gelu", kind):
        return _layers([("0.", features, width)] + [(f"{2 * i}.", width, width) for i in range(1, int(mlp[1]))])
    if kind.startswith("spp"):
        return _layers([("linear_0.", features, features), ("linear_1.", features, width), ("linear_2.", width, width)])
    if kind in ("minigpt", "vanilla"):  # four patches side by side
        return _linear("linear.", 4 * features, width)
    return _ldp(features, width) if kind == "ldp" else None


def _linear(name: str, inner: int, outer: int) -> Shapes:
    return {f"{name}weight": (outer, inner), f"{name}bias": (outer,)}


def _layers(layers: list[tuple[str, int, int]]) -> Shapes:
    return {key: shape for layer in layers for key, shape in _linear(*layer).items()}


def _ldp(features: int, width: int) -> Shapes:
    """MobileVLM's projector: two linear layers, then two inverted residual blocks of MobileNetV3."""
    shapes = _layers([("model.mlp.1.", features, width), ("model.mlp.3.", width, width)])
    squeezed = max(8, (width // 4 + 4) // 8 * 8)  # torchvision rounds to eights, but not down by more than a tenth
    squeezed += 8 if squeezed < 0.9 * (width // 4) else 0
    for block in ("model.mb_block.1.block.", "model.mb_block.2.block."):
        shapes |= {f"{block}0.0.weight": (width, 1, 3, 3), f"{block}2.0.weight": (width, width, 1, 1)}
        shapes |= {f"{block}{norm}.{half}": (width,) for norm in ("0.1", "2.1") for half in ("weight", "bias")}
        shapes |= {f"{block}1.fc1.weight": (squeezed, width, 1, 1), f"{block}1.fc1.bias": (squeezed,)}
        shapes |= {f"{block}1.fc2.weight": (width, squeezed, 1, 1), f"{block}1.fc2.bias": (width,)}
    return shapes
