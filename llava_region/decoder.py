"""Find the decoder layers of the language model in a LLaVA or Bunny model, never those of its vision tower."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from llava_region.errors import LlavaRegionError

if TYPE_CHECKING:
    from torch import nn

# Everything of a multimodal model that is not the language model.
PROJECTOR = ("mm_projector", "vision_resampler", "image_newline")
VISION = ("vision_tower",)
# `model.layers.3.`: Llama, Mistral, Phi, Phi-3, Qwen2, StableLM, MiniCPM. `transformer.blocks.3.`: MPT. Wrappers
# (PEFT's `base_model.model.`, DeepSpeed's and DDP's `module.`) may stand before.
_LAYER = re.compile(r"(?:^|\.)(?:model\.layers|transformer\.blocks)\.(\d+)(?=\.|$)")


class DecoderLayers(NamedTuple):
    """The decoder layers: their dotted name in the model (without the index) and the `nn.ModuleList` that holds them."""

    prefix: str
    modules: nn.ModuleList


def layer_index(name: str) -> int | None:
    """Decoder layer that a module, parameter or checkpoint tensor of this dotted name belongs to, or None.

    >>> layer_index("base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight")
    3
    >>> layer_index("model.vision_tower.vision_tower.vision_model.encoder.layers.3.mlp.fc1.weight") is None
    True
    """
    if is_vision(name) or is_projector(name):
        return None
    match = _LAYER.search(name)
    return int(match[1]) if match else None


def with_layer_index(name: str, index: int) -> str:
    """The name that the same tensor has in decoder layer `index`. `name` must be of a decoder layer (see `layer_index`).

    >>> with_layer_index("model.layers.3.self_attn.q_proj.weight", 2)
    'model.layers.2.self_attn.q_proj.weight'
    """
    start, end = _LAYER.search(name).span(1)
    return f"{name[:start]}{index}{name[end:]}"


def is_projector(name: str) -> bool:
    """Whether a parameter of this name belongs to the projector (or resampler, or LLaVA-1.6's image newline)."""
    return any(part in PROJECTOR for part in name.split("."))


def is_vision(name: str) -> bool:
    """Whether a parameter of this name belongs to the vision tower."""
    return any(part in VISION for part in name.split("."))


def find_decoder_layers(model: nn.Module) -> DecoderLayers:
    """The language model's decoder layers, in a bare model or under PEFT, DDP or DeepSpeed.

    Raises:
        LlavaRegionError: none or several candidates were found.
    """
    from torch import nn

    found = [
        DecoderLayers(name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and layer_index(f"{name}.0") == 0 and _LAYER.search(f"{name}.0").end() == len(name) + 2
    ]
    if len(found) != 1:
        raise LlavaRegionError(
            f"{type(model).__name__} has {len(found)} lists of decoder layers ({', '.join(f.prefix for f in found) or 'none'}); "
            "allowed: one, called 'model.layers' (Llama, Mistral, Phi, Qwen2...) or 'transformer.blocks' (MPT)"
        )
    return found[0]


def linear_modules(model: nn.Module, layers) -> list[str]:
    """Full dotted names of the linear modules within the given decoder layers, in model order.

    `bnb.nn.Linear4bit` and `Linear8bitLt` are `nn.Linear` themselves, so quantised models are covered. Modules that
    PEFT put inside an adapter are not listed again.

    Raises:
        LlavaRegionError: the model has no such layer, or a layer holds no linear module.
    """
    from torch import nn

    wanted = set(layers)
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and layer_index(n) in wanted and "lora_" not in n]
    empty = wanted - {layer_index(n) for n in names}
    if empty:
        raise LlavaRegionError(f"decoder layers {sorted(empty)} of {type(model).__name__} hold no linear module to put LoRA on")
    return names
