"""Load a finished model of any upstream: `load(folder)`, and what is refused before weights are read.

The upstream's own classes, templates and image handling are used (its `ModelSide`); here is what all share.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from llava_region import upstreams
from llava_region.checkpoints.model_source import ModelLike, ModelSource
from llava_region.decoder import find_decoder_layers
from llava_region.errors import LlavaRegionError
from llava_region.models.assemble import load_multimodal, load_text, quiet_errors
from llava_region.models.loaded import LoadedModel
from llava_region.run_files import ADAPTER_CONFIG_FILE, NON_LORA_FILE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from llava_region.upstreams import ModelSide, Upstream

DTYPES = {
    "float32": torch.float32, "fp32": torch.float32, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
    "float16": torch.float16, "fp16": torch.float16,
}  # fmt: skip


def load(
    folder: ModelLike, base: ModelLike | None = None, *, device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None, template: str | None = None, attn_implementation: str | None = None,
) -> LoadedModel:  # fmt: skip
    """Load a LLaVA or Bunny model, a LoRA run of one on its base (merged in memory), or a plain language model (text only).

    Args:
        folder: a folder, or a Hugging Face name in the local cache.
        base: what a LoRA run (or a pretrained projector) was trained on; for nothing else.
        device: default CUDA if there is any, else CPU.
        dtype: torch dtype or its name; default fp32 on CPU, else what `config.json` says, or bf16.
        template: conversation template; default the model's own.

    Raises:
        LlavaRegionError: not a model, an adapter without its base, an unknown template, a device that is not there, weights
            missing or left over.
    """
    source, on = ModelSource.of(folder), ModelSource.of(base) if base else None
    upstream, config = source.upstream, source.config
    check_base(source, on)
    side = _side(upstream, template)
    template = template or side.default_template(config)
    if template not in side.templates():
        raise LlavaRegionError(f"unknown template '{template}'; allowed: {', '.join(side.templates())}")
    if upstream:
        side.check(config, source.settings)
    _ = (on or source).checkpoint  # damaged files, missing shards, and .bin files with code in them end here
    device = _device(device)
    options = {
        "dtype": _dtype(dtype, device, config), "device_map": None if device.type == "cpu" else {"": device},
        "attn_implementation": attn_implementation,
    }  # fmt: skip
    with quiet_errors(source):
        if upstream:
            model, tokenizer, processor = load_multimodal(side, source, on, options)
        else:
            model, tokenizer, processor = *load_text(side, source, options), None
    if getattr(model.config, "tokenizer_model_max_length", None):
        tokenizer.model_max_length = model.config.tokenizer_model_max_length
    model.requires_grad_(False).to(device).eval()
    name, num_layers = upstream.name if upstream else None, len(find_decoder_layers(model).modules)
    return LoadedModel(model, tokenizer, processor, name, template, num_layers, source.path, side)


def check_base(model: ModelSource, base: ModelSource | None) -> None:
    """Refuse an adapter without its base, a base for a model that is whole, and a base of another depth.

    Raises:
        LlavaRegionError: see above.
    """
    if model.kind == "adapter" and base is None:
        raise LlavaRegionError(f"{model} is a LoRA run, an adapter only; give the model it was trained on with --base")
    if base is None:
        if model.kind != "whole":
            raise LlavaRegionError(
                f"{model} holds no weights (model*.safetensors or pytorch_model*.bin); give the folder of a finished model"
            )
        return
    if model.kind not in ("adapter", "projector"):
        raise LlavaRegionError(f"{model} is not a LoRA run (it has no {ADAPTER_CONFIG_FILE}), so it takes no base; leave out --base")
    if base.num_layers != model.num_layers:
        raise LlavaRegionError(
            f"the base {base} has {base.num_layers} decoder layers, {model} was trained on {model.num_layers}; give the base of that run"
        )
    if model.besides_file is None:
        raise LlavaRegionError(f"{model} holds no {NON_LORA_FILE} (the trained projector); give a checkpoint that has it")


def _side(upstream: Upstream | None, template: str | None) -> ModelSide:
    """The upstream's model side; for a plain LLM that of an installed upstream that has the template."""
    wanted = [upstream] if upstream else upstreams.every()
    found = [one.model_side() for one in wanted if one.installed()]
    if not found:
        title, titles = wanted[0].title, upstreams.titles()
        what = f"a {title} model needs {title}" if upstream else f"conversation templates come from {titles}, one of which has to be"
        raise LlavaRegionError(f"{what} installed in this environment; see the README's section on installing")
    return next((side for side in found if template in side.templates()), found[0])


def _device(asked: str | torch.device | None) -> torch.device:
    try:
        device = torch.device(asked or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as e:
        raise LlavaRegionError(f"unknown device '{asked}'; give cpu, cuda, or one GPU such as cuda:1") from e
    gpus = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise LlavaRegionError(f"there is no device '{asked}': torch sees {gpus} GPUs; give another, or cpu")
    return device


def _dtype(dtype: str | torch.dtype | None, device: torch.device, config: Mapping[str, Any]) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    name = dtype or ("float32" if device.type == "cpu" else config.get("torch_dtype") or "bfloat16")
    if name not in DTYPES:
        raise LlavaRegionError(f"unknown dtype '{name}'; allowed: {', '.join(DTYPES)}")
    return DTYPES[name]
