"""Merge a LoRA run into a full LLaVA or Bunny model, without ever holding the model in memory.

Only weights that the adapter updates are computed, in fp32 and cast once; all others are copied byte for byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llava_region import upstreams
from llava_region.checkpoints.adapter import Adapter, LoraUpdate, check_complete, read_adapter, trained_whole
from llava_region.checkpoints.identity import merge_record
from llava_region.checkpoints.model_source import ModelLike, ModelSource
from llava_region.checkpoints.projector import check_projector_tensors, has_none
from llava_region.checkpoints.tensors import Computed, Entry, refuse_not_finite
from llava_region.checkpoints.whole_model import (
    ModelFolder,
    check_output,
    check_same_shape,
    main_dtype,
    read_model,
    side_files,
    write_model,
)
from llava_region.decoder import declared, is_projector, is_vision, layer_index, part_of
from llava_region.errors import LlavaRegionError
from llava_region.files import output_folder
from llava_region.run_files import ADAPTER_CONFIG_FILE, COST_FILE, NON_LORA_FILE, RUN_FILE, TOKENIZER_FILES


def merge(run: ModelLike, out: str | Path, base: ModelLike | None = None, *, force: bool = False) -> dict[str, Any]:
    """Write the full model that a LoRA run amounts to; it loads in upstream's `load_pretrained_model` without a base.

    Args:
        run: output folder of a LoRA run, or a `checkpoint-N` in it.
        out: folder to write; appears only when it is whole.
        base: model the run was trained on (for QLoRA: in 16 bit), a folder or a Hugging Face name in the local cache.
            Default: the one that the run names.
        force: replace `out`.

    Returns:
        `{"out", "run", "base", "layers": decoder layers that changed, "merged": weights computed, "copied": tensors copied,
        "bytes", "remarks": [str]}`.

    Raises:
        LlavaRegionError: not a LoRA run, another base, a damaged file, or something trained that has no place in the base.
    """
    source = ModelSource.of(run)
    model, remarks = merged_model(source, base)
    check_output(out, (source.path, model.path), force)
    with output_folder(out, force) as folder:
        size = write_model(model, folder, "merging")
    changed = [name for name, entry in model.tensors.items() if isinstance(entry, Computed) and isinstance(entry.load, _Merged)]
    return {
        "out": str(out), "run": str(run), "base": str(base or model.path), "merged": len(changed),
        "layers": sorted({layer for name in changed if (layer := layer_index(name)) is not None}),
        "copied": len(model.tensors) - len(changed),
        "bytes": size, "remarks": remarks,
    }  # fmt: skip


@dataclass(frozen=True)
class _Merged:
    """Loads a weight of the base with its update applied."""

    name: str
    weight: Entry
    update: LoraUpdate

    def __call__(self) -> torch.Tensor:
        hint = f"the sum is beyond {self.weight.dtype}, or the base is not finite; give the base in a wider type"
        return refuse_not_finite(self.update.apply(self.weight.load()), self.name, "as merged", hint)


@dataclass(frozen=True)
class _Trained:
    """Loads a tensor that was trained whole, in the type that it is written in."""

    name: str
    entry: Entry
    dtype: torch.dtype
    run: ModelSource

    def __call__(self) -> torch.Tensor:
        tensor = refuse_not_finite(self.entry.load(), self.name, f"in {self.run}", "give a checkpoint from before that")
        return refuse_not_finite(tensor.to(self.dtype), self.name, f"as {self.dtype}", "it is too large; give the base in a wider type")


def merged_model(run: ModelLike, base: ModelLike | None = None) -> tuple[ModelFolder, list[str]]:
    """The full model that a LoRA run amounts to, no tensor computed yet, and remarks for the user. See `merge`."""
    run = ModelSource.of(run)
    _refuse_full(run)
    adapter = read_adapter(run)
    config, region, known = run.config, run.region, upstreams.architectures()
    if config.get("model_type") not in known:
        raise LlavaRegionError(
            f"{run} is not a {upstreams.titles()} run: its model_type is '{config.get('model_type')}'; allowed: {', '.join(known)}"
        )
    base = base or (region or {}).get("base_model") or adapter.config.get("base_model_name_or_path")
    if not base:
        raise LlavaRegionError(f"{run} names no base model; give the one it was trained on with --base")
    model = read_model(origin := ModelSource.of(base))
    check_same_shape(config, model.config, (f"the run {run}", f"the base {base}"))
    if run.besides_file is None:
        raise LlavaRegionError(
            f"{run} holds no {NON_LORA_FILE} (the trained projector; upstream writes it only when a run ends); "
            "give a checkpoint that has it"
        )
    trained = trained_whole(run, adapter)
    tensors = _with_trained(model.tensors, trained, run, base)
    tensors = _with_updates(tensors, adapter, base)
    check_complete(adapter, run, trained, model.tensors)
    _check_vocabulary(tensors, config, run, base)
    if not any(map(is_projector, tensors)) and not has_none(config):
        raise LlavaRegionError(f"neither {run} nor {base} holds a projector, so the merged model could not see; give the whole run")
    check_projector_tensors(tensors, config, str(run))
    if region is not None:
        region = {**region, "merged_from": {"run": str(run), "base": str(base)}}
    merged = replace(model, config=_merged_config(config, tensors), tensors=tensors, region=region, side_files=_side_files(run, model))
    return replace(merged, merged_from=merge_record(run, origin)), _remarks(config, region)


def _refuse_full(run: ModelSource) -> None:
    if run.kind == "whole":
        raise LlavaRegionError(
            f"{run} is a whole model already (full tuning, or merged before): there is nothing to merge, use it as it is"
        )
    if run.kind != "adapter":
        raise LlavaRegionError(
            f"{run} is not a LoRA run: it holds no {ADAPTER_CONFIG_FILE}; give the output folder of one, or a checkpoint-N in it"
        )


def _with_updates(tensors: Mapping[str, Entry], adapter: Adapter, base: ModelLike) -> dict[str, Entry]:
    merged = dict(tensors)
    for module, update in adapter.updates.items():
        name = f"{module}.weight"
        weight = tensors.get(name)
        if weight is None:
            tied = f"; its {module} is tied to the embeddings" if module in declared().head else ""
            raise LlavaRegionError(f"the adapter updates '{name}', which {base} does not hold{tied}; give the base the run was trained on")
        if not weight.dtype.is_floating_point or weight.dtype.itemsize < 2:
            raise LlavaRegionError(f"'{name}' of {base} is quantised ({weight.dtype}); give the base in 16 or 32 bit")
        if weight.shape != update.shape_for(weight.shape):
            raise LlavaRegionError(
                f"'{name}' has shape {weight.shape} in {base}, the adapter was made for {update.shape_for(weight.shape)}; "
                "give the base of the run"
            )
        merged[name] = Computed(weight.dtype, weight.shape, _Merged(name, weight, update))
    return merged


def _with_trained(tensors: Mapping[str, Entry], trained: Mapping[str, Entry], run: ModelSource, base: ModelLike) -> dict[str, Entry]:
    """Put tensors that were trained whole in their place; the projector and the vision tower may be new.

    Raises:
        LlavaRegionError: one that belongs to no known part of a model, has no place in the base, or does not fit it.
    """
    merged = dict(tensors)
    dtype = main_dtype(tensors)
    for name, entry in trained.items():
        old = tensors.get(name)
        if part_of(name) not in ("projector", "vision") and old is None:
            raise LlavaRegionError(f"{run} trained '{name}', which {base} does not hold; give the base the run was trained on")
        if 0 in entry.shape:
            raise LlavaRegionError(f"'{name}' in {run} is empty, as ZeRO-3 leaves it when a run is not saved whole; save the run again")
        resized = _is_vocabulary(name, tensors) and old is not None and entry.shape[1:] == old.shape[1:]
        if old is not None and entry.shape != old.shape and not resized:
            raise LlavaRegionError(f"'{name}' has shape {old.shape} in {base} and {entry.shape} in {run}; give the base of the run")
        target = old.dtype if old is not None else dtype
        merged[name] = Computed(target, entry.shape, _Trained(name, entry, target, run))
    return merged


def _is_vocabulary(name: str, tensors: Mapping[str, Entry]) -> bool:
    """Whether a tensor has a row for each token: embeddings, head and the head's bias, but not the final norm, which is a vector."""
    ends = {*declared().embeddings, *declared().head}
    if is_vision(name) or layer_index(name) is not None or not ends & set(name.split(".")):
        return False
    weight = tensors.get(f"{name.rpartition('.')[0]}.weight")
    return weight is not None and len(weight.shape) == 2


def _check_vocabulary(tensors: Mapping[str, Entry], config: Mapping[str, Any], run: ModelSource, base: ModelLike) -> None:
    for name, entry in tensors.items():
        if _is_vocabulary(name, tensors) and entry.shape[0] != config.get("vocab_size", entry.shape[0]):
            raise LlavaRegionError(
                f"{run} has a vocabulary of {config['vocab_size']}, but '{name}' of {base} has {entry.shape[0]} rows "
                f"and {NON_LORA_FILE} does not replace it; give the base of the run"
            )


def _merged_config(config: Mapping[str, Any], tensors: Mapping[str, Entry]) -> dict[str, Any]:
    config = {**config, "architectures": [upstreams.architectures()[config["model_type"]]], "use_cache": True}
    config["torch_dtype"] = str(main_dtype(tensors)).removeprefix("torch.")
    config.pop("quantization_config", None)
    return config


def _remarks(config: Mapping[str, Any], region: dict | None) -> list[str]:
    quantised = config.get("quantization_config") or (region or {}).get("mode") == "qlora"
    return ["trained on a quantised base (QLoRA), merged onto the base in its own type: answers may differ slightly"] if quantised else []


def _side_files(run: ModelSource, base: ModelFolder) -> dict[str, Path]:
    """The base's tokenizer and code, as upstream takes them; the run's tokenizer where training resized the vocabulary; its records."""

    def has_tokenizer(files: Mapping[str, Path]) -> bool:
        return any(name in files for name in TOKENIZER_FILES)

    own = side_files(run.path)
    resized = run.config.get("vocab_size") != base.config.get("vocab_size")
    if has_tokenizer(own) and (resized or not has_tokenizer(base.side_files)):
        files = {**{name: file for name, file in base.side_files.items() if file.suffix == ".py"}, **own}
    else:
        files = base.side_files
    records = {name: run.settings / name for name in (COST_FILE, RUN_FILE)}  # of this training, not of the base's
    return {
        **{name: file for name, file in files.items() if name not in records},
        **{name: file for name, file in records.items() if file.is_file()},
    }
