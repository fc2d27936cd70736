"""The importance metrics by name. A new one: a file of its own here, its name and meaning in these tables."""

from __future__ import annotations

from llava_region.errors import LlavaRegionError

# computed in one pass over the data (`activations`)
ACTIVATION_METRICS = ("block_influence", "multimodal_block_influence", "angular_distance", "image_attention")
# computed from the weights and the backbone's (`weight_changes`)
WEIGHT_METRICS = ("parameter_change", "angular_distance_weights")
METRICS = ACTIVATION_METRICS + WEIGHT_METRICS
# what each score is, in the words of `scores.json`
MEANING = {
    "block_influence": "1 - mean cosine of a token before and after the layer, over tokens, then samples",
    "multimodal_block_influence": "1 - (mean over image tokens + mean over text tokens) / 2",
    "angular_distance": "arccos(cosine) / pi of the layer's input and output at the last token",
    "image_attention": "attention into image tokens, over heads and queries, by image tokens and heads",
}


def parse_metrics(text: str) -> tuple[str, ...]:
    """`all` or names with commas, in the order of `METRICS`.

    Raises:
        LlavaRegionError: an unknown name.
    """
    names = {name.strip() for name in text.split(",")}
    if names == {"all"}:
        return METRICS
    unknown = sorted(names - set(METRICS))
    if unknown:
        raise LlavaRegionError(f"unknown metric '{unknown[0]}'; allowed: all, or of {', '.join(METRICS)}")
    return tuple(name for name in METRICS if name in names)
