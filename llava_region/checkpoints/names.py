"""From the name that a tensor is stored under to its name in the model itself, without what wrappers put around it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from llava_region.errors import LlavaRegionError

# components that torch.compile, FSDP and activation checkpointing add wherever they wrap a module
_WRAPPED = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# what DDP and DeepSpeed, and PEFT, put in front; in any order, and PEFT twice where it wraps its own model
_IN_FRONT = ("module.", "base_model.model.")
T = TypeVar("T")


def unwrapped(name: str) -> str:
    """Name of a tensor without what wraps a model as a whole or its modules; what PEFT puts into a module stays.

    >>> unwrapped("_orig_mod.module.base_model.model.decoder.3._checkpoint_wrapped_module.up_proj.base_layer.weight")
    'decoder.3.up_proj.base_layer.weight'
    """
    name = ".".join(part for part in name.split(".") if part not in _WRAPPED)
    while wrapper := next(filter(name.startswith, _IN_FRONT), None):
        name = name.removeprefix(wrapper)
    return name


def bare_name(name: str) -> str:
    """Name of a tensor in the model itself, without what PEFT, DDP, FSDP, torch.compile and the like put around it.

    >>> bare_name("module.base_model.model.decoder.3.up_proj.base_layer.weight")
    'decoder.3.up_proj.weight'
    """
    name = unwrapped(name)
    return name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".").replace(".modules_to_save.", ".")


def by_bare_name(tensors: Mapping[str, T], where: object) -> dict[str, T]:
    """The same tensors by their names in the model itself.

    Args:
        where: the file or folder that they are from, for the message.

    Raises:
        LlavaRegionError: two of them are the same tensor of the model, so that one would be lost.
    """
    stored: dict[str, str] = {}
    for name in tensors:
        twin = stored.setdefault(bare_name(name), name)
        if twin != name:
            raise LlavaRegionError(
                f"{where} holds both '{twin}' and '{name}', which are one tensor of the model; save it again from one model, and merge "
                "an adapter before another is trained"
            )
    return {bare: tensors[name] for bare, name in stored.items()}
