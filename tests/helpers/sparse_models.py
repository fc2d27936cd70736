"""Model folders of any size that take no disk: configs, a tokenizer, and weights files that are headers before a hole."""

import json
import os
import shutil
from pathlib import Path
from typing import Any


def write_sparse_llama(folder: Path, tokenizer: Path, **shape: int) -> Path:
    """A Llama whose weights are zeros that no disk holds; `shape` are fields of its config. The tokenizer is copied."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**shape)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(tokenizer / name, folder)
    write_hole(folder, model)
    return folder


def write_hole(folder: Path, model: Any) -> None:
    """The weights of a model on the meta device, as zeros that no disk holds."""
    header, end = {}, 0
    for name, parameter in model.named_parameters():
        start, end = end, end + 2 * parameter.numel()
        header[name] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        os.truncate(f.fileno(), 8 + len(text) + end)
