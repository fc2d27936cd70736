"""The model that a run would train, on the meta device: its shapes and what of it trains, without a weight."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING, Any

from llava_region.decoder import part_of
from llava_region.training.run import RegionRun

if TYPE_CHECKING:
    from torch import nn

    from llava_region.training.preflight import Preflight
    from llava_region.upstreams import Recipe, Upstream


def empty_model(upstream: Upstream, preflight: Preflight) -> nn.Module:
    """The upstream's model on the meta device, with LoRA and frozen parameters as training would have it.

    Raises:
        LlavaRegionError: a parameter belongs to no known part of a model, or the config makes no model.
    """
    import torch

    args, recipe = preflight.args, preflight.recipe
    run = RegionRun(preflight.region, upstream=upstream)
    with torch.device("meta"):
        model = _with_lora(upstream.meta_model(args, preflight.config), recipe, run)
    for name, parameter in model.named_parameters():
        part = part_of(name)
        if part == "vision":
            parameter.requires_grad_(recipe.trains_tower)
        elif part == "projector":
            parameter.requires_grad_(recipe.trains_projector)
    run.prepare_model(model, Namespace(**vars(args)))
    return model


def _with_lora(model: Any, recipe: Recipe, run: RegionRun) -> nn.Module:
    if recipe.lora is None:
        return model
    from peft import LoraConfig, get_peft_model

    lora = recipe.lora
    options: dict[str, Any] = {"r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout, "bias": lora.bias}
    return get_peft_model(model, LoraConfig(target_modules=run.find_linear_names(model), task_type="CAUSAL_LM", **options))


def unwrapped(model: Any) -> nn.Module:
    """The upstream's model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
