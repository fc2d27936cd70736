"""The files of a vision tower and of a pretrained projector, before weights are loaded: that they are what the run asks for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llava_region.errors import LlavaRegionError
from llava_region.files import read_json
from llava_region.run_files import CONFIG_FILE
from llava_region.training.model_files import folder_of, require_tensors, weights_in

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

# what a file begins with that was downloaded in place of another
NO_WEIGHTS = {
    b"version https://git-lfs": "a pointer of git-lfs; fetch the file with 'git lfs pull'",
    b"<": "a web page; download the file again",
}


class TowerKind(NamedTuple):
    """A kind of vision tower, by the names of transformers' classes for it.

    Attributes:
        title: for people.
        model_types: those in `config.json` that its classes load rightly.
    """

    title: str
    model_types: tuple[str, ...]
    config: str
    model: str
    processor: str


CLIP = TowerKind("CLIP", ("clip", "clip_vision_model"), "CLIPVisionConfig", "CLIPVisionModel", "CLIPImageProcessor")
SIGLIP = TowerKind("SigLIP", ("siglip", "siglip_vision_model"), "SiglipVisionConfig", "SiglipVisionModel", "SiglipImageProcessor")


def check_tower(tower: str, flag: str, kind: TowerKind, resized: bool = False) -> PretrainedConfig:
    """Check config, image processor and the names of the weights of a vision tower.

    Args:
        resized: whether the upstream sets another image size itself.

    Returns:
        the vision tower's config.

    Raises:
        LlavaRegionError: a file is missing or damaged, or is not this kind of tower's.
    """
    import torch
    import transformers

    folder = folder_of(tower, flag)
    found = read_json(folder / CONFIG_FILE)
    model_type = found.get("model_type") if isinstance(found, dict) else None
    if model_type not in kind.model_types:
        raise LlavaRegionError(
            f"{flag} {tower} is no {kind.title} vision tower: its {CONFIG_FILE} says '{model_type}'; allowed: {', '.join(kind.model_types)}"
        )
    config = getattr(transformers, kind.config).from_pretrained(tower)
    size = _processed_size(tower, flag, kind)
    if not resized and size != (config.image_size, config.image_size):
        raise LlavaRegionError(
            f"{flag} {tower}: its image processor makes pictures of {size[0]} x {size[1]}, but {CONFIG_FILE} says {config.image_size}; "
            "take both files from the same tower"
        )
    stored = weights_in(tower, flag, folder)
    if stored is not None:
        with torch.device("meta"):
            model = getattr(transformers, kind.model)(config)
        # what comes behind the layers is not used
        wanted = {key: tuple(p.shape) for key, p in model.named_parameters() if ".encoder.layers." in key or ".embeddings." in key}
        require_tensors(stored, wanted, f"{flag} {tower} is no {kind.title} vision tower")
    return config


def _processed_size(tower: str, flag: str, kind: TowerKind) -> tuple[int, int]:
    """Height and width that the tower's image processor gives a picture."""
    import transformers
    from PIL import Image

    try:
        processor = getattr(transformers, kind.processor).from_pretrained(tower)
        pixels = processor.preprocess(Image.new("RGB", (64, 48)), return_tensors="pt")["pixel_values"]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
        raise LlavaRegionError(
            f"{flag} {tower} has no preprocessor_config.json that {kind.processor} can use ({e}); copy that of the tower into it"
        ) from e
    return tuple(pixels.shape[-2:])


def check_projector(path: str, flag: str, wanted: Mapping[str, tuple[int, ...]], prefix: str, type_flag: str) -> None:
    """Check the file of a pretrained projector against the projector that the run builds.

    Args:
        wanted: name in the projector -> shape.
        prefix: what the upstream looks for in the names of the file's tensors; what follows it and a dot is the name.
        type_flag: the flag and value that decide the projector's type.

    Raises:
        LlavaRegionError: no file of tensors, or another projector.
    """
    import torch

    tensors = read_tensors(path, flag)
    odd = [key for key in tensors if prefix in key and f"{prefix}." not in key]
    named = {key.split(f"{prefix}.")[1]: value for key, value in tensors.items() if f"{prefix}." in key}
    if odd or set(named) != set(wanted):
        what = f"holds {', '.join(sorted(named)) or 'none'} of {prefix}" if not odd else f"holds '{odd[0]}'"
        raise LlavaRegionError(
            f"{flag} {path} {what}, but {type_flag} has {', '.join(sorted(wanted)) or 'none'}; {_advice(named, type_flag)}"
        )
    for key, value in named.items():
        if tuple(value.shape) != wanted[key]:
            raise LlavaRegionError(
                f"{flag} {path}: {key} has the shape {tuple(value.shape)}, but the vision tower and the language model ask for "
                f"{wanted[key]}; give the projector that was pretrained with both"
            )
        if not bool(torch.isfinite(value).all()):
            raise LlavaRegionError(
                f"{flag} {path}: {key} holds values that are not finite: its pretraining diverged; give another projector"
            )


def _advice(named: Mapping[str, Any], type_flag: str) -> str:
    """What to give, by the names of the tensors that are there."""
    flag = type_flag.split()[0]
    if set(named) == {"weight", "bias"}:
        return f"give {flag} linear"
    depth = len([key for key in named if re.fullmatch(r"\d+\.weight", key)])
    if depth and set(named) == {f"{2 * i}.{kind}" for i in range(depth) for kind in ("weight", "bias")}:
        return f"give {flag} mlp{depth}x_gelu"
    return "give the mm_projector.bin of a pretraining with that type"


def read_tensors(path: str, flag: str) -> dict[str, torch.Tensor]:
    """The tensors of a file that the upstream opens with `torch.load`.

    Raises:
        LlavaRegionError: it is not there, or no such file.
    """
    import torch

    from llava_region.checkpoints.tensors import UNREADABLE, load_mapped

    file = Path(path)
    if not file.is_file():
        raise LlavaRegionError(f"{flag} {path} is not there; give the mm_projector.bin of the pretraining")
    with file.open("rb") as f:
        start = f.read(64)
    problem = next((text for begin, text in NO_WEIGHTS.items() if start.startswith(begin)), None if start else "empty; copy it again")
    if problem:
        raise LlavaRegionError(f"{flag} {path} is {problem}")
    try:
        tensors = load_mapped(file)
    except UNREADABLE as e:
        raise LlavaRegionError(
            f"{flag} {path} is truncated, or no file of tensors that torch.load can read; copy or download it again"
        ) from e
    if not isinstance(tensors, Mapping) or not all(isinstance(k, str) and isinstance(t, torch.Tensor) for k, t in tensors.items()):
        raise LlavaRegionError(f"{flag} {path} is no file of named tensors; give the mm_projector.bin of the pretraining")
    return dict(tensors)
