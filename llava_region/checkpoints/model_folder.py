"""A model folder as a whole: config, tensors and the small files beside them, read lazily and written in one stream."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from llava_region.checkpoints.tensors import Checkpoint, Computed, Entry, write_checkpoint
from llava_region.decoder import layer_index
from llava_region.errors import LlavaRegionError
from llava_region.files import read_json, refuse_existing, write_json
from llava_region.region import num_layers_of
from llava_region.run_files import REGION_FILE

# Two models whose configs differ in one of these have tensors of different shapes. The second line is MPT's.
SHAPE_KEYS = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers",
    "d_model", "expansion_ratio", "n_heads", "n_layers",
)  # fmt: skip
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json")
_SIDE_SUFFIXES = (".json", ".model", ".txt", ".py", ".tiktoken", ".jinja")
_WRITTEN_HERE = ("config.json", "generation_config.json", REGION_FILE)
_OF_TRAINING = (
    "adapter_config.json", "trainer_state.json", "all_results.json", "train_results.json", "zero_to_fp32.py"
)  # fmt: skip
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
    """

    path: Path
    config: dict
    tensors: dict[str, Entry]
    region: dict | None = None
    generation_config: dict | None = None
    side_files: dict[str, Path] = field(default_factory=dict)

    @property
    def num_layers(self) -> int:
        return next(self.config[key] for key in ("num_hidden_layers", "n_layers", "n_layer") if isinstance(self.config.get(key), int))


def locate(model: str | Path) -> Path:
    """The folder of a model: a path, or a Hugging Face name that is in the local cache. Nothing is downloaded.

    Raises:
        LlavaRegionError: neither.
    """
    path = Path(model)
    if path.is_dir():
        return path
    if path.exists():
        raise LlavaRegionError(f"{model} is a file; give the folder of a model")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)):
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils import HFValidationError, LocalEntryNotFoundError

        try:
            return Path(snapshot_download(str(model), local_files_only=True))
        except (LocalEntryNotFoundError, HFValidationError) as e:
            raise LlavaRegionError(
                f"there is no folder {model}, nor is it in the Hugging Face cache; download it with 'huggingface-cli download {model}'"
            ) from e
    raise LlavaRegionError(f"there is no folder {model}; give the folder of a model")


def read_model(model: str | Path) -> ModelFolder:
    """Open a model folder; no tensor is loaded.

    Raises:
        LlavaRegionError: not a checkpoint, or a damaged one; `config.json` counts other decoder layers than there are tensors for.
    """
    path = locate(model)
    count = num_layers_of(path)
    config = read_json(path / "config.json")
    if "text_config" in config:
        raise LlavaRegionError(
            f"{model} is in transformers' own LLaVA format ('text_config'); give a checkpoint of upstream LLaVA or Bunny"
        )
    tensors = dict(Checkpoint(path))
    found = {layer_index(name) for name in tensors} - {None}
    headless = {layer_index(f"model.{name}") for name in tensors} - {None}
    if (found or headless) != set(range(count)):
        raise LlavaRegionError(
            f"{path}/config.json counts {count} decoder layers, the weights hold {len(found or headless)}; give a whole checkpoint"
        )
    generation = path / "generation_config.json"
    return ModelFolder(path, config, tensors, read_region(path), read_json(generation) if generation.is_file() else None, side_files(path))


def read_region(path: Path) -> dict | None:
    """`region.json` of a folder, else `visual_region` of its config; None for a model that was not trained by this package."""
    if (path / REGION_FILE).is_file():
        return read_json(path / REGION_FILE)
    return read_json(path / "config.json").get("visual_region")


def side_files(path: Path) -> dict[str, Path]:
    """Files that a model needs beside config and weights: tokenizer, image processor, its own code, licences; and its `cost.json`."""
    skip = (*_WRITTEN_HERE, *_OF_TRAINING)
    return {
        file.name: file
        for file in sorted(path.iterdir())
        if file.is_file() and file.name not in skip and not file.name.startswith(".") and not file.name.endswith(".index.json")
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
    write_json(folder / "config.json", model.config)
    if model.generation_config is not None:
        write_json(folder / "generation_config.json", savable(model.generation_config))
    if model.region is not None:
        write_json(folder / REGION_FILE, model.region)
    return size


def savable(generation_config: dict) -> dict:
    """Without sampling options where sampling is off: they have no effect, but transformers refuses to save them."""
    if generation_config.get("do_sample"):
        return generation_config
    return {key: value for key, value in generation_config.items() if key not in _SAMPLING}


def check_output(out: str | Path, inputs: Iterable[str | Path], force: bool) -> None:
    """Refuse to write over what is read, or over what is there.

    Raises:
        LlavaRegionError: `out` is an input or holds one, or exists and `force` is not set.
    """
    final = Path(out).resolve()
    for folder in inputs:
        if Path(folder).resolve().is_relative_to(final):
            raise LlavaRegionError(f"--out {out} would replace the input {folder}; give another folder")
    refuse_existing(out, force)


def check_same_shape(model: Mapping, base: Mapping, names: tuple[str, str]) -> None:
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
