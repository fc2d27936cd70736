"""What a GPU holds of a model that trains, besides activations: weights, gradients and the optimizer's states, by the stage of ZeRO."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from llava_region.decoder import part_of
from llava_region.training.deepspeed_config import is_offloaded

if TYPE_CHECKING:
    from torch import nn

    from llava_region.upstreams import Recipe

# bytes per weight of a linear module: NF4 with (without) double quantisation of its scales, and LLM.int8
QUANTISED = {(4, True): 0.516, (4, False): 0.5625, (8, True): 1.0, (8, False): 1.0}


class Memory(NamedTuple):
    """Bytes per GPU for the states of a run, without activations."""

    weights: float
    gradients: float
    optimizer: float


def estimate_memory(model: nn.Module, args: Namespace, recipe: Recipe, gpus: int, zero: Mapping[str, Any]) -> Memory:
    """Bytes per GPU of weights, gradients and AdamW's states.

    Args:
        zero: `zero_optimization` of a DeepSpeed config, empty without one. ZeRO-1 shards the optimizer's states, 2 the gradients too, 3
            the weights too; what is offloaded is not on the GPU. In half precision DeepSpeed keeps fp32 weights and two moments, 12
            bytes per trainable parameter.
    """
    half = args.bf16 or args.fp16
    width = 2 if half else 4
    stage = zero.get("stage", 0)
    weights = sum(p.numel() * _bytes_per_weight(name, p, recipe, width) for name, p in model.named_parameters())
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    states = 12 if half and args.deepspeed else 2 * width
    trained_here = trainable * (not is_offloaded(zero, "optimizer"))
    return Memory(
        weights * (not is_offloaded(zero, "param")) / (gpus if stage >= 3 else 1),
        trained_here * width / (gpus if stage >= 2 else 1),
        trained_here * states / (gpus if stage >= 1 else 1),
    )


def _bytes_per_weight(name: str, parameter: nn.Parameter, recipe: Recipe, width: int) -> float:
    quantised = recipe.bits != 16 and in_few_bits(name, parameter)
    return QUANTISED[recipe.bits, recipe.double_quantised] if quantised else width


def in_few_bits(name: str, parameter: nn.Parameter) -> bool:
    """Whether QLoRA has a parameter in 4 or 8 bits: the upstreams exempt the projector alone, so the head is among them."""
    return part_of(name) in ("layer", "head") and parameter.dim() == 2 and "lora_" not in name
