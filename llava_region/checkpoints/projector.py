"""Hold the tensors of a projector against what the model's config says it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llava_region import upstreams
from llava_region.decoder import is_projector, is_vision
from llava_region.errors import LlavaRegionError
from llava_region.run_files import CONFIG_FILE

if TYPE_CHECKING:
    from llava_region.checkpoints.tensors import Entry


def has_none(config: Mapping[str, Any]) -> bool:
    """Whether the projector that a config names has no tensors at all."""
    upstream = upstreams.of_config(config)
    return upstream is not None and upstream.projector_tensors(config) == {}


def check_projector_tensors(tensors: Mapping[str, Entry], config: Mapping[str, Any], where: str) -> None:
    """Refuse a projector other than the one that loading builds, where the upstream declares which that is.

    Loading leaves out, without a word, what has no place in the model, and fills what is missing with random numbers.

    Args:
        tensors: those of the whole model, by name in it.
        config: its `config.json`.
        where: how to call the model in messages.

    Raises:
        LlavaRegionError: a tensor is missing, has no place, or has another shape; names it.
    """
    upstream = upstreams.of_config(config)
    wanted = upstream.projector_tensors(config) if upstream else None
    if wanted is None:
        return
    found = {name: tuple(entry.shape) for name, entry in tensors.items() if is_projector(name) and not is_vision(name)}
    odd, lacking = sorted(found.keys() - wanted), sorted(wanted.keys() - found)
    if odd or lacking:
        what = " and ".join([f"holds '{name}'" for name in odd[:1]] + [f"lacks '{name}'" for name in lacking[:1]])
        raise LlavaRegionError(
            f"{where} {what}, and the projector that its {CONFIG_FILE} names has {', '.join(wanted) or 'no tensors'}; "
            "give a run whose weights and config.json belong together"
        )
    for name, shape in found.items():
        if shape != wanted[name]:
            raise LlavaRegionError(
                f"'{name}' in {where} has shape {shape}, and its {CONFIG_FILE} asks for {wanted[name]}; "
                "give a run whose weights and config.json belong together"
            )
