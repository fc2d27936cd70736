"""Miniatures of a backbone and a vision tower: the user's configs with two layers and little width, and random weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_region.decoder import part_of
from llava_region.run_files import CONFIG_FILE

if TYPE_CHECKING:
    from torch import nn

    from llava_region.training.vision_files import TowerKind

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")
TOWER_WIDTH = 64


def shrunk(config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """A backbone's config with few layers and two attention heads, whose width is kept: rotary settings go by it."""
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    small = {"num_hidden_layers": layers, "num_attention_heads": 2, "hidden_size": 2 * width, "intermediate_size": 4 * width}
    if config.get("num_key_value_heads"):
        small["num_key_value_heads"] = 2 if config["num_key_value_heads"] == heads else 1
    return {key: value for key, value in {**config, **small}.items() if key != "visual_region"}


def write_backbone(folder: Path, model: nn.Module, config: Mapping[str, Any], source: Path) -> None:
    """Write a model as a folder to start from: its weights but those of the vision tower, a config, and all small files of `source`."""
    from safetensors.torch import save_file

    folder.mkdir()
    for file in source.iterdir():
        if file.is_file() and file.suffix not in WEIGHTS and not file.name.endswith(".index.json"):
            shutil.copy(file, folder)
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    tensors = {name: p.detach().contiguous() for name, p in model.named_parameters() if part_of(name) != "vision"}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def write_tower(folder: Path, tower: str, kind: TowerKind, layers: int) -> None:
    """Write a vision tower like another one, with as many patches, but with few layers and narrow, with that one's image processor."""
    import transformers

    config = getattr(transformers, kind.config).from_pretrained(tower)
    config.num_hidden_layers = min(layers, config.num_hidden_layers)
    config.hidden_size, config.intermediate_size, config.num_attention_heads = TOWER_WIDTH, TOWER_WIDTH, 2
    getattr(transformers, kind.model)(config).save_pretrained(folder)
    getattr(transformers, kind.processor).from_pretrained(tower).save_pretrained(folder)
