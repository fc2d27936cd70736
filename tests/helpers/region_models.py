"""Small models of several families as upstream has them when training starts, a batch, and what a step of theirs does."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MptConfig,
    MptForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from llava_region.data.labels import IGNORE_INDEX
from llava_region.decoder import find_decoder_layers, linear_modules
from llava_region.training.recompute_plan import Plan, Workload

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4, "vocab_size": 50}
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {**SHAPE, "num_key_value_heads": 2}),
    "mistral": (MistralForCausalLM, MistralConfig, {**SHAPE, "num_key_value_heads": 2}),
    "phi": (PhiForCausalLM, PhiConfig, {**SHAPE, "resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "mpt": (MptForCausalLM, MptConfig, {"d_model": 32, "n_heads": 4, "n_layers": 6, "vocab_size": 50, "expansion_ratio": 2}),
}


def build(
    family: str = "llama",
    region: tuple[int, ...] = (1, 4),
    *,
    lora: bool = True,
    dropout: float = 0.0,
    reentrant: bool = True,
    projector_trains: bool = True,
    attention: str | None = None,
) -> Any:
    """A model as upstream has it when training starts: LoRA or full tuning on the region, embeddings made to require grad."""
    from peft import LoraConfig, get_peft_model

    model_class, config_class, shape = FAMILIES[family]
    torch.manual_seed(0)
    config = config_class(**shape)
    if attention:
        config._attn_implementation = attention
    model = model_class(config)
    names = linear_modules(model, region)
    layers = find_decoder_layers(model).modules
    model.enable_input_require_grads()
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=names))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    else:
        model.requires_grad_(False)
        for layer in region:
            layers[layer].requires_grad_(True)
    if projector_trains:
        model.get_input_embeddings().weight.requires_grad_(True)  # in the projector's place: something in front of the layers
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return model.train()


def batch(samples: int = 2, length: int = 24, vocab: int = 50) -> dict[str, torch.Tensor]:
    """Ids, mask and labels (samples, length); the second sample is padded."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocab, (samples, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORE_INDEX)}


def gradients(model: Any, inputs: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """Gradients of one step, by the parameter's name."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(7)
    model(**(inputs or batch())).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def count_forwards(model: nn.Module) -> list[int]:
    """Times each decoder layer is run, counted on from here."""
    counts = [0] * len(find_decoder_layers(model).modules)
    for index, layer in enumerate(find_decoder_layers(model).modules):
        # before, not after: recomputation without reentrance stops at the last tensor it needs
        layer.register_forward_pre_hook(lambda *_, i=index: counts.__setitem__(i, counts[i] + 1))
    return counts


def workload(samples: int = 2, length: int = 24) -> Workload:
    """The largest step of a run whose batches are as `batch` makes them, with upstream's loss."""
    return Workload(samples, length, supervised_logits=False)


def plan_of(recompute: Iterable[int] = (), first: int = 0, lean: bool = False) -> Plan:
    """A plan that recomputes these layers of every batch."""
    return Plan(tuple(recompute), "auto", "", 0, None, first, lean)


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The same tensors, to the bit."""
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different
