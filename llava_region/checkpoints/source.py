"""What a model's folder says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llava_region.errors import LlavaRegionError

# How configs name the number of decoder layers and their width H; the second and third are MPT's.
LAYER_COUNT_KEYS = ("num_hidden_layers", "n_layers", "n_layer")
WIDTH_KEYS = ("hidden_size", "d_model")


def num_layers_in(config: Any, name: str) -> int:
    """Number of decoder layers that a `config.json` names.

    Args:
        config: its content.
        name: how to call it in the message.

    Raises:
        LlavaRegionError: there is no layer count in it.
    """
    config = (config.get("text_config") or config) if isinstance(config, Mapping) else {}
    for key in LAYER_COUNT_KEYS:
        if isinstance(config.get(key), int):
            return config[key]
    raise LlavaRegionError(f"{name} names no 'num_hidden_layers' (or 'n_layers'), so the layers cannot be counted")


def width_in(config: Any) -> int | None:
    """Width H of the decoder layers that a config names (the content of a `config.json`, or transformers' object); None: it does not."""
    settings = config if isinstance(config, Mapping) else vars(config)
    return next((settings[key] for key in WIDTH_KEYS if settings.get(key)), None)
