"""The files of a model, before anything of it is loaded: that they are here, whole, and this model's."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from llava_region.decoder import layer_index, part_of
from llava_region.errors import LlavaRegionError
from llava_region.run_files import CONFIG_FILE, WEIGHT_FILES

if TYPE_CHECKING:
    from torch import nn

    from llava_region.checkpoints.tensors import Checkpoint
    from llava_region.upstreams import Recipe, Upstream


def folder_of(model: str, flag: str, cache_dir: str | None = None) -> Path:
    """The folder with the files of a model: the one given, or that of a hub name in the cache, where its config is put if need be.

    Raises:
        LlavaRegionError: there is no such folder, or no config of that name on the hub or, offline, in its cache.
    """
    from transformers.utils import cached_file

    path = Path(model)
    if path.is_dir():
        if not (path / CONFIG_FILE).is_file():
            raise LlavaRegionError(f"{flag} {model} holds no {CONFIG_FILE}; give the folder or hub name of a model")
        return path
    if path.exists():
        raise LlavaRegionError(f"{flag} {model} is a file; give the folder or hub name of a model")
    try:
        return Path(str(cached_file(model, CONFIG_FILE, cache_dir=cache_dir))).parent
    except (OSError, ValueError) as e:
        raise LlavaRegionError(f"{flag} {model} is not a folder, and {_not_cached(model)}") from e


def _not_cached(model: str) -> str:
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        return f"not in the hub's cache, and HF_HUB_OFFLINE is set; run 'huggingface-cli download {model}' where there is a network"
    return "the hub has none of that name, or cannot be reached; give a folder, or a name that is in the cache"


def weights_in(model: str, flag: str, folder: Path) -> Checkpoint | None:
    """The weights of a model, unread; None where the hub has them and they are still to be fetched, or where only reading them
    whole would tell what they are.

    Args:
        folder: as `folder_of` says.

    Raises:
        LlavaRegionError: they are missing, incomplete or damaged, or could not be fetched.
    """
    from llava_region.checkpoints.tensors import Checkpoint, weight_files

    try:
        files = weight_files(folder)
    except LlavaRegionError as e:
        if Path(model).is_dir():
            raise LlavaRegionError(f"{flag}: {e}") from e
        _require_on_hub(model, flag)
        return None
    if any(file.suffix == ".bin" and not _can_be_mapped(file) for file in files):
        return None
    try:
        return Checkpoint(folder)
    except LlavaRegionError as e:
        raise LlavaRegionError(f"{flag}: {e}") from e


def _require_on_hub(model: str, flag: str) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_OFFLINE

    problem = f"{flag} {model}: its {CONFIG_FILE} is in the hub's cache, but not all of its weights, and {_not_cached(model)}"
    if HF_HUB_OFFLINE:
        raise LlavaRegionError(problem)
    try:
        names = HfApi().list_repo_files(model)
    except (OSError, ValueError) as e:  # requests' errors are OSErrors
        raise LlavaRegionError(problem) from e
    if not set(names) & set(WEIGHT_FILES):
        raise LlavaRegionError(f"{flag} {model} has no weights on the hub; allowed: {', '.join(WEIGHT_FILES)}")


def _can_be_mapped(file: Path) -> bool:
    """Whether the names in a `.bin` file can be read alone: not in the format before torch 1.6, nor where it exceeds the memory.

    A truncated file is left to the reader, who refuses it.
    """
    with file.open("rb") as f:
        old = f.read(1) == b"\x80" and not zipfile.is_zipfile(file)
    return not old and file.stat().st_size < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_backbone(upstream: Upstream, recipe: Recipe, model: nn.Module) -> None:
    """Compare the weights of the model to tune with the model that the upstream builds for them.

    transformers draws at random what the weights lack, and drops what the model has no place for.

    Args:
        model: on the meta device.

    Raises:
        LlavaRegionError: they are missing or damaged, or are those of another model.
    """
    name, flag = str(recipe.model), recipe.flags["model"]
    stored = weights_in(name, flag, folder_of(name, flag, recipe.cache_dir))
    if stored is None:
        return
    parameters = {key: tuple(p.shape) for key, p in model.named_parameters() if part_of(key) in ("layer", "embeddings", "head")}
    what = f"{flag} {name} is no model that {upstream.title} loads as {type(model).__name__}"
    require_tensors(stored, parameters, what)
    layers = {layer_index(key) for key in parameters}
    dropped = [
        key for key in stored if key.endswith((".weight", ".bias")) and key not in parameters and layer_index(key) in layers - {None}
    ]
    if dropped:
        raise LlavaRegionError(f"{what}: there is no place in it for {dropped[0]} ({len(dropped)} such tensors), which would be dropped")


def require_tensors(stored: Checkpoint, wanted: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Refuse weights that lack a tensor, or have it in another shape.

    Args:
        wanted: name in the model -> shape.
        what: how the message begins.

    Raises:
        LlavaRegionError: names the first such tensor.
    """
    from llava_region.checkpoints.tensors import name_in_backbone

    found = {key: name_in_backbone(key, stored) for key in wanted}
    lacking = [key for key, name in found.items() if name is None]
    if lacking:
        raise LlavaRegionError(
            f"{what}: its weights hold no {lacking[0]} ({len(lacking)} such tensors of {len(wanted)}, such as {_sample(stored)} are there)"
        )
    for key, name in found.items():
        shape = tuple(stored[str(name)].shape)
        if shape != wanted[key]:
            raise LlavaRegionError(f"{what}: {name} has the shape {shape}, and {CONFIG_FILE} asks for {wanted[key]}")


def _sample(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)[:2]) or "none"
