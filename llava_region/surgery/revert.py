"""Put decoder layers of a tuned model back to its backbone's weights (section 4.1, Figure 1 left).

What a model loses when a layer goes back to the language model it was tuned from shows what tuning put there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_region.checkpoints.model_source import ModelLike
from llava_region.checkpoints.tensors import NOT_TRAINED, Entry, name_in_backbone
from llava_region.checkpoints.whole_model import ModelFolder, cast, check_output, check_same_shape, read_model, write_model
from llava_region.decoder import layer_index
from llava_region.errors import LlavaRegionError
from llava_region.files import output_folder
from llava_region.region import Region

if TYPE_CHECKING:
    import torch


def revert(model: ModelLike, base: ModelLike, layers: str | Iterable[int], out: str | Path, *, force: bool = False) -> dict[str, Any]:
    """Write the model with the given decoder layers as they are in the backbone; the rest, projector included, stays.

    Args:
        model: a full LLaVA or Bunny model.
        base: the language model it was tuned from, a folder or a Hugging Face name in the local cache.
        layers: a layer spec (`0,4,8-11`, `sparse:25%`), `none`, or indices.
        out: folder to write; appears only when it is whole. `region.json` and `config.json` in it name the reverted layers.
        force: replace `out`.

    Returns:
        `{"out", "model", "base", "layers", "tensors": tensors reverted, "copied": tensors kept, "bytes"}`.

    Raises:
        LlavaRegionError: not a model, a damaged one, a spec that does not fit, or a backbone of another shape.
    """
    tuned, backbone = read_model(model), read_model(base)
    check_output(out, (tuned.path, backbone.path), force)
    chosen = chosen_layers(layers, tuned.num_layers)
    check_same_shape(tuned.config, backbone.config, (f"the model {model}", f"the base {base}"))
    back = backbone_tensors(tuned.tensors, backbone.tensors, chosen, base)
    reverted = _noted(replace(tuned, tensors={**tuned.tensors, **back}), chosen, base)
    with output_folder(out, force) as folder:
        size = write_model(reverted, folder, "reverting")
    return {
        "out": str(out), "model": str(model), "base": str(base), "layers": list(chosen), "tensors": len(back),
        "copied": len(tuned.tensors) - len(back), "bytes": size,
    }  # fmt: skip


def chosen_layers(layers: str | Iterable[int], num_layers: int) -> tuple[int, ...]:
    """Layers of a spec, of `none`, or of indices, ascending.

    Raises:
        LlavaRegionError: they do not fit a model of `num_layers` decoder layers.
    """
    if not isinstance(layers, str):
        layers = ",".join(map(str, layers)) or "none"
    return () if layers.strip() == "none" else Region.parse(layers, num_layers).layers


def backbone_tensors(
    tuned: Mapping[str, Entry | torch.Tensor], backbone: Mapping[str, Entry], layers: Iterable[int], base: ModelLike
) -> dict[str, Entry]:
    """The backbone's tensors of the given decoder layers, under the tuned model's names and in its types.

    Args:
        base: how to call the backbone in messages.

    Raises:
        LlavaRegionError: the two do not hold the same tensors in these layers, shape for shape.
    """
    wanted, found = set(layers), {}
    for name, entry in tuned.items():
        if layer_index(name) not in wanted or name.endswith(NOT_TRAINED):
            continue
        key = name_in_backbone(name, backbone)
        if key is None:
            raise LlavaRegionError(f"the base {base} holds no '{name}'; give the language model that was tuned")
        if backbone[key].shape != entry.shape:
            raise LlavaRegionError(
                f"'{name}' has shape {entry.shape}, {backbone[key].shape} in the base {base}; give the language model that was tuned"
            )
        found[name] = cast(backbone[key], entry.dtype)
    extra = [n for n in backbone if layer_index(n) in wanted and n not in tuned and not n.endswith(NOT_TRAINED)]
    if extra:
        raise LlavaRegionError(f"the base {base} holds '{extra[0]}', which the model does not; give the language model that was tuned")
    return found


def _noted(model: ModelFolder, layers: tuple[int, ...], base: ModelLike) -> ModelFolder:
    """Note the reverted layers, with those of earlier reverts, in config and region."""
    if not layers:
        return model
    before = model.config.get("reverted_layers", [])
    all_layers = sorted({*before, *layers})
    region = model.region and {**model.region, "reverted": {"layers": all_layers, "base": str(base)}}
    return replace(model, config={**model.config, "reverted_layers": all_layers}, region=region)
