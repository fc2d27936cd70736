"""What a model's folder says about itself, read once and handed on: `ModelSource`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llava_region import upstreams
from llava_region.errors import LlavaRegionError
from llava_region.files import parse_json, read_bytes
from llava_region.region import region_record
from llava_region.run_files import ADAPTER_CONFIG_FILE, CONFIG_FILE, NON_LORA_FILE, PROJECTOR_FILE, WEIGHT_GLOBS

if TYPE_CHECKING:
    from llava_region.checkpoints.tensors import Checkpoint
    from llava_region.upstreams import Upstream

Kind = Literal["whole", "adapter", "projector", "nothing"]

# How configs name the number of decoder layers and their width H; the second and third are MPT's.
LAYER_COUNT_KEYS = ("num_hidden_layers", "n_layers", "n_layer")
WIDTH_KEYS = ("hidden_size", "d_model")


class ModelSource:
    """The folder of a model or a run. Each of its small files is read at the first use of what it says, and never again.

    Functions that take a model accept a path or name too, and make the source themselves: whoever calls several of them
    makes it once with `ModelSource.of` and hands it on.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def of(cls, model: ModelLike) -> ModelSource:
        """The source of a path, or of a Hugging Face name in the local cache; a source is returned as it is.

        Raises:
            LlavaRegionError: there is no such folder.
        """
        return model if isinstance(model, ModelSource) else cls(locate(model))

    def __str__(self) -> str:
        return str(self.path)

    @cached_property
    def settings(self) -> Path:
        """Where its `config.json` lies: its own folder, or for a `checkpoint-N` that lacks one the run's.

        Raises:
            LlavaRegionError: neither holds one.
        """
        path = self.path
        for place in (path, path.resolve().parent) if path.name.startswith("checkpoint-") else (path,):
            if (place / CONFIG_FILE).is_file():
                return place
        raise LlavaRegionError(f"{path} holds no {CONFIG_FILE}; give the folder of a model or of a LoRA run")

    @cached_property
    def config_bytes(self) -> bytes:
        """`config.json` as it is on disk."""
        return read_bytes(self.settings / CONFIG_FILE)

    @cached_property
    def config(self) -> dict[str, Any]:
        """`config.json`; empty where it does not hold an object.

        Raises:
            LlavaRegionError: there is none, or it is not JSON.
        """
        config = parse_json(self.config_bytes, self.settings / CONFIG_FILE)
        return config if isinstance(config, dict) else {}

    @cached_property
    def upstream(self) -> Upstream | None:
        """The upstream that the model belongs to; None for a plain language model."""
        return upstreams.of_config(self.config)

    @cached_property
    def num_layers(self) -> int:
        """Decoder layers, as `config.json` counts them.

        Raises:
            LlavaRegionError: it does not.
        """
        return num_layers_in(self.config, str(self.settings / CONFIG_FILE))

    @cached_property
    def region(self) -> dict | None:
        """`region.json`, else `visual_region` of the config; None for a model that was not trained by this package."""
        return region_record(self.settings, self.config)

    @cached_property
    def kind(self) -> Kind:
        """What the folder holds: an adapter of a LoRA run, a whole model, nothing but a pretrained projector, or no weights."""
        if (self.path / ADAPTER_CONFIG_FILE).is_file():
            return "adapter"
        if any(any(self.path.glob(pattern)) for pattern in WEIGHT_GLOBS):
            return "whole"
        return "projector" if (self.path / PROJECTOR_FILE).is_file() else "nothing"

    @cached_property
    def adapter_config_bytes(self) -> bytes:
        """`adapter_config.json` as it is on disk."""
        return read_bytes(self.path / ADAPTER_CONFIG_FILE)

    @cached_property
    def adapter_config(self) -> dict[str, Any]:
        """`adapter_config.json`; empty where it does not hold an object.

        Raises:
            LlavaRegionError: there is none (see `kind`), or it is not JSON.
        """
        config = parse_json(self.adapter_config_bytes, self.path / ADAPTER_CONFIG_FILE)
        return config if isinstance(config, dict) else {}

    @property
    def besides_file(self) -> Path | None:
        """The file with what a run trained besides its adapter; of a pretraining that of its projector; None where it is not there."""
        file = self.path / NON_LORA_FILE
        if self.kind == "projector" and not file.is_file():
            return self.path / PROJECTOR_FILE
        return file if file.is_file() else None

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The tensors of a whole model.

        Raises:
            LlavaRegionError: not a checkpoint, or a damaged one.
        """
        from llava_region.checkpoints.tensors import Checkpoint

        return Checkpoint(self.path)


ModelLike = str | Path | ModelSource


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


def num_layers_in(config: Any, name: str) -> int:
    """Number of decoder layers that a `config.json` names.

    Args:
        config: its content.
        name: how to call it in the message.

    Raises:
        LlavaRegionError: there is no layer count in it.
    """
    config = (config.get("text_config") or config) if isinstance(config, Mapping) else {}
    for key in LAYER_COUNT_KEYS:
        if isinstance(config.get(key), int):
            return config[key]
    raise LlavaRegionError(f"{name} names no 'num_hidden_layers' (or 'n_layers'), so the layers cannot be counted")


def width_in(config: Any) -> int | None:
    """Width H of the decoder layers that a config names (the content of a `config.json`, or transformers' object); None: it does not."""
    settings = config if isinstance(config, Mapping) else vars(config)
    return next((settings[key] for key in WIDTH_KEYS if settings.get(key)), None)
