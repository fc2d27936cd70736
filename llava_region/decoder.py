"""Tell the parts of a model apart by the names of its parameters, and find the decoder layers of its language model.

Which names there are is what the upstreams declare (`Parts`); a parameter that nobody declared is an error, so that
nothing is trained or frozen by default.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NamedTuple

from llava_region.errors import LlavaRegionError

if TYPE_CHECKING:
    from torch import nn

Part = Literal["layer", "projector", "vision", "embeddings", "head"]


@dataclass(frozen=True)
class Parts:
    """How an upstream names the parts of its models.

    Attributes:
        layers: dotted names of the list of decoder layers. Wrappers (PEFT's `base_model.model.`, DeepSpeed's and DDP's
            `module.`) may come before.
        projector: components of a dotted name that say that it belongs to the projector.
        vision: the same for the vision tower, whose own layers are never decoder layers.
        embeddings: the same for what the language model has in front of its decoder layers.
        head: the same for what it has behind them: final norm and language modelling head.
        config_prefixes: how settings of the vision part begin in `config.json`.
    """

    layers: tuple[str, ...]
    projector: tuple[str, ...]
    vision: tuple[str, ...]
    embeddings: tuple[str, ...]
    head: tuple[str, ...]
    config_prefixes: tuple[str, ...] = ()

    def __or__(self, other: Parts) -> Parts:
        """The names of both."""
        return Parts(*(tuple(dict.fromkeys(getattr(self, f.name) + getattr(other, f.name))) for f in fields(Parts)))

    @cached_property
    def layer_pattern(self) -> re.Pattern[str]:
        """Matches the name of a layer with its number, which is group 1."""
        names = "|".join(map(re.escape, self.layers))
        return re.compile(rf"(?:^|\.)(?:{names})\.(\d+)(?=\.|$)")


class DecoderLayers(NamedTuple):
    """The decoder layers: their dotted name in the model (without the index) and the `nn.ModuleList` that holds them."""

    prefix: str
    modules: nn.ModuleList


def declared() -> Parts:
    """What all upstreams declare."""
    from llava_region import upstreams

    return upstreams.parts()


def part_of(name: str) -> Part:
    """The part of the model that a parameter of this dotted name belongs to.

    Raises:
        LlavaRegionError: a name that no upstream declares.

    >>> part_of(f"base_model.model.{declared().layers[0]}.3.self_attn.q_proj.lora_A.weight")
    'layer'
    """
    if layer_index(name) is not None:
        return "layer"
    parts, components = declared(), set(name.split("."))
    others: tuple[Part, ...] = ("vision", "projector", "embeddings", "head")
    for part in others:
        if components & set(getattr(parts, part)):
            return part
    raise LlavaRegionError(
        f"'{name}' belongs to no part of a model that is known here (decoder layers, projector, vision tower, embeddings, head), "
        "so it is not known whether it should train; declare it in the 'parts' of the upstream"
    )


def layer_index(name: str) -> int | None:
    """Decoder layer that a module, parameter or checkpoint tensor of this dotted name belongs to, or None.

    >>> layers, tower = declared().layers[0], declared().vision[0]
    >>> layer_index(f"base_model.model.{layers}.3.self_attn.q_proj.lora_A.weight")
    3
    >>> layer_index(f"{tower}.{layers}.3.mlp.fc1.weight") is None
    True
    """
    if is_vision(name) or is_projector(name):
        return None
    match = declared().layer_pattern.search(name)
    return int(match[1]) if match else None


def with_layer_index(name: str, index: int) -> str:
    """The name that the same tensor has in decoder layer `index`. `name` must be of a decoder layer (see `layer_index`).

    >>> with_layer_index(f"{declared().layers[0]}.3.self_attn.q_proj.weight", 2) == f"{declared().layers[0]}.2.self_attn.q_proj.weight"
    True
    """
    match = declared().layer_pattern.search(name)
    if match is None:
        raise ValueError(f"'{name}' is not in a decoder layer")
    start, end = match.span(1)
    return f"{name[:start]}{index}{name[end:]}"


def is_projector(name: str) -> bool:
    """Whether a parameter of this name belongs to the projector (or resampler, or another part between tower and layers)."""
    return not set(name.split(".")).isdisjoint(declared().projector)


def is_vision(name: str) -> bool:
    """Whether a parameter of this name belongs to the vision tower."""
    return not set(name.split(".")).isdisjoint(declared().vision)


def is_embeddings(name: str) -> bool:
    """Whether a parameter of this name belongs to the language model's token embeddings."""
    return not is_vision(name) and any(component in declared().embeddings for component in name.split("."))


def find_decoder_layers(model: nn.Module) -> DecoderLayers:
    """The language model's decoder layers, in a bare model or under PEFT, DDP or DeepSpeed.

    Raises:
        LlavaRegionError: none or several candidates were found.
    """
    from torch import nn

    pattern = declared().layer_pattern
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or layer_index(f"{name}.0") != 0:
            continue
        match = pattern.search(f"{name}.0")
        if match and match.end() == len(name) + 2:
            found.append(DecoderLayers(name, module))
    if len(found) != 1:
        raise LlavaRegionError(
            f"{type(model).__name__} has {len(found)} lists of decoder layers ({', '.join(f.prefix for f in found) or 'none'}); "
            f"allowed: one, called {' or '.join(map(repr, declared().layers))}"
        )
    return found[0]


def parent_of(model: nn.Module) -> nn.Module:
    """The module that holds the decoder layers and runs them one after the other (LlamaModel, MptModel...).

    Raises:
        LlavaRegionError: as `find_decoder_layers`.
    """
    prefix = find_decoder_layers(model).prefix
    return model.get_submodule(prefix.rpartition(".")[0])


def linear_modules(model: nn.Module, layers: Iterable[int]) -> list[str]:
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
