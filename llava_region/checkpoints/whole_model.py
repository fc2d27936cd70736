"""A model folder as a whole: config, tensors and the small files around them, read lazily and written in one stream."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llava_region import upstreams
from llava_region.checkpoints.model_card import write_card
from llava_region.checkpoints.model_source import LAYER_COUNT_KEYS, WIDTH_KEYS, ModelLike, ModelSource, num_layers_in
from llava_region.checkpoints.names import by_bare_name
from llava_region.checkpoints.projector import check_projector_tensors
from llava_region.checkpoints.tensors import Computed, Entry, write_checkpoint
from llava_region.decoder import declared, is_projector, layer_index
from llava_region.errors import LlavaRegionError
from llava_region.files import follow_links, read_json, refuse_existing, write_json
from llava_region.run_files import (
    ADAPTER_CONFIG_FILE,
    CONFIG_FILE,
    GENERATION_CONFIG_FILE,
    MERGED_FROM_FILE,
    REGION_FILE,
    TRAINER_FILES,
)

# Two models whose configs differ in one of these have tensors of different shapes. The last two are MPT's.
SHAPE_KEYS = (
    *WIDTH_KEYS, *LAYER_COUNT_KEYS, "intermediate_size", "num_attention_heads", "num_key_value_heads", "expansion_ratio", "n_heads",
)  # fmt: skip
VISION_TYPES = ("clip", "siglip")  # with both of their halves, or the vision model alone
_SIDE_SUFFIXES = (".json", ".model", ".txt", ".py", ".tiktoken", ".jinja")
_NOT_COPIED = (CONFIG_FILE, GENERATION_CONFIG_FILE, MERGED_FROM_FILE, REGION_FILE, ADAPTER_CONFIG_FILE, *TRAINER_FILES)
_SAMPLING = ("temperature", "top_p", "top_k", "typical_p", "epsilon_cutoff", "eta_cutoff", "min_p")


@dataclass
class ModelFolder:
    """What a model folder holds or will hold.

    Attributes:
        path: where it was read.
        config: `config.json`.
        tensors: name to `Stored` or `Computed`, in the order in which they are written.
        region: `region.json` (else `visual_region` of the config), or None.
        generation_config: `generation_config.json`, or None.
        side_files: tokenizer, image processor and model code files to copy, by name.
        merged_from: for a model that is merged right now, its `merge_record`.
    """

    path: Path
    config: dict
    tensors: dict[str, Entry]
    region: dict | None = None
    generation_config: dict | None = None
    side_files: dict[str, Path] = field(default_factory=dict)
    merged_from: dict[str, str] | None = None

    @property
    def num_layers(self) -> int:
        """Decoder layers, as the config counts them."""
        return num_layers_in(self.config, str(self.path / CONFIG_FILE))


def read_model(model: ModelLike) -> ModelFolder:
    """Open a model folder; no tensor is loaded.

    Raises:
        LlavaRegionError: a vision tower, not a checkpoint, or a damaged one; `config.json` counts other decoder layers than the
            tensors are for, or names another projector.
    """
    source = ModelSource.of(model)
    path, config, count = source.path, source.config, source.num_layers
    if str(config.get("model_type")).startswith(VISION_TYPES):
        raise LlavaRegionError(
            f"{model} is a vision tower (model_type '{config['model_type']}'), not a language model; give the model that was tuned"
        )
    if "text_config" in config:
        raise LlavaRegionError(
            f"{model} is in transformers' own LLaVA format ('text_config'); give a checkpoint of upstream {upstreams.titles()}"
        )
    tensors = by_bare_name(source.checkpoint, source)
    lora = next((name for name in tensors if ".lora_" in name), None)
    if lora:
        raise LlavaRegionError(f"{model} was saved with its adapter unmerged: it holds '{lora}'; save it as a LoRA run, and merge that")
    if any(map(is_projector, tensors)):
        check_projector_tensors(tensors, config, str(model))
    # a backbone saved without its head lacks the first part of each name
    roots = ("", *dict.fromkeys(f"{layers.partition('.')[0]}." for layers in declared().layers))
    found = next((layers for root in roots if (layers := {layer_index(f"{root}{name}") for name in tensors} - {None})), set())
    if found != set(range(count)):
        raise LlavaRegionError(
            f"{path}/{CONFIG_FILE} counts {count} decoder layers, the weights hold {len(found)}; give a whole checkpoint"
        )
    generation = path / GENERATION_CONFIG_FILE
    return ModelFolder(path, config, tensors, source.region, read_json(generation) if generation.is_file() else None, side_files(path))


def side_files(path: Path) -> dict[str, Path]:
    """Files that a model needs besides config and weights: tokenizer, image processor, its own code, licences; and its `cost.json`."""
    return {
        file.name: file
        for file in sorted(path.iterdir())
        if file.is_file() and file.name not in _NOT_COPIED and not file.name.startswith(".") and not file.name.endswith(".index.json")
        if file.suffix in _SIDE_SUFFIXES or file.name.startswith(("LICENSE", "NOTICE"))
    }  # fmt: skip


def write_model(model: ModelFolder, folder: Path, description: str) -> int:
    """Fill an existing, empty folder with the model; returns the bytes of its tensors.

    Raises:
        LlavaRegionError: the disk is full or cannot be written.
    """
    size = write_checkpoint(folder, model.tensors, description=description)
    try:
        for name, file in model.side_files.items():
            shutil.copyfile(file, folder / name)
    except OSError as e:
        raise LlavaRegionError(f"cannot write {folder.parent}: {e.strerror or e}") from e
    write_json(folder / CONFIG_FILE, model.config)
    if model.generation_config is not None:
        write_json(folder / GENERATION_CONFIG_FILE, savable(model.generation_config))
    if model.merged_from is not None:
        write_json(folder / MERGED_FROM_FILE, model.merged_from)
    if model.region is not None:
        write_json(folder / REGION_FILE, model.region)
    write_card(folder, base=model.path if model.merged_from is not None else None, config=model.config, region=model.region)
    return size


def savable(generation_config: dict[str, Any]) -> dict[str, Any]:
    """Without sampling options where sampling is off: they have no effect, but transformers refuses to save them."""
    if generation_config.get("do_sample"):
        return generation_config
    return {key: value for key, value in generation_config.items() if key not in _SAMPLING}


def check_output(out: str | Path, inputs: Iterable[str | Path], force: bool) -> None:
    """Refuse to write over what is read, or over what is there.

    Raises:
        LlavaRegionError: `out` is an input or holds one, or exists and `force` is not set.
    """
    final = follow_links(out)
    for folder in inputs:
        if Path(folder).resolve().is_relative_to(final):
            raise LlavaRegionError(f"--out {out} would replace the input {folder}; give another folder")
    refuse_existing(out, force)


def check_same_shape(model: Mapping[str, Any], base: Mapping[str, Any], names: tuple[str, str]) -> None:
    """Refuse a base that is another model, by the configs alone.

    Args:
        names: how to call the two in the message.

    Raises:
        LlavaRegionError: they differ in width or depth; names the key and both values.
    """
    for key in SHAPE_KEYS:
        if key in model and key in base and model[key] != base[key]:
            raise LlavaRegionError(
                f"{names[1]} has {key} {base[key]}, {names[0]} has {model[key]}; give the base that model was trained on"
            )


def main_dtype(tensors: Mapping[str, Entry]) -> torch.dtype:
    """The type of most bytes."""
    sizes: Counter = Counter()
    for entry in tensors.values():
        sizes[entry.dtype] += entry.nbytes
    return sizes.most_common(1)[0][0]


def cast(entry: Entry, dtype: torch.dtype) -> Entry:
    """The same tensor in another type; itself where it has that type."""
    return entry if entry.dtype == dtype else Computed(dtype, entry.shape, lambda: entry.load().to(dtype))
