"""Names that real wrappers give are mapped to those of the bare model, and none is lost on the way."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from llava_region.checkpoints.names import bare_name, by_bare_name, unwrapped
from llava_region.errors import LlavaRegionError

if TYPE_CHECKING:
    from collections.abc import Iterator

NAME = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def process_group(tmp_path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def small() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 20}
    return LlamaForCausalLM(LlamaConfig(**shape))


def with_lora(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))


def checkpointed(model: Any) -> Any:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, LlamaDecoderLayer))
    return model


def sharded(model: Any) -> Any:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    policy = ModuleWrapPolicy({LlamaDecoderLayer})
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu"))


def replicated(model: Any) -> Any:
    return nn.parallel.DistributedDataParallel(model)


def compiled_layers(model: Any) -> Any:
    model.model.layers[1] = torch.compile(model.model.layers[1])
    return model


WRAPPED = {
    "torch.compile": torch.compile, "a compiled layer": compiled_layers, "DDP": replicated, "FSDP": sharded,
    "activation checkpointing": checkpointed, "FSDP over checkpointing": lambda model: sharded(checkpointed(model)),
    "DDP over torch.compile": lambda model: replicated(torch.compile(model)),
    "torch.compile over DDP": lambda model: torch.compile(replicated(model)),
}  # fmt: skip


@pytest.mark.parametrize("wrap", WRAPPED)
def test_names_under_real_wrappers(process_group, wrap):
    wanted = {name: tuple(parameter.shape) for name, parameter in small().named_parameters()}
    wrapped = {name: tuple(parameter.shape) for name, parameter in WRAPPED[wrap](small()).named_parameters()}
    assert wrapped.keys() != wanted.keys()
    assert by_bare_name(wrapped, "the run").keys() == wanted.keys()


PEFT: dict[str, Any] = {
    "PEFT": with_lora, "PEFT twice": lambda model: with_lora(with_lora(model)),
    "PEFT of a compiled model": lambda m: with_lora(torch.compile(m)),
    "a compiled PEFT model": lambda model: torch.compile(with_lora(model)), "PEFT under DDP": lambda model: replicated(with_lora(model)),
    "PEFT twice, compiled": lambda model: torch.compile(with_lora(with_lora(model))),
}  # fmt: skip


@pytest.mark.parametrize("wrap", PEFT)
def test_names_under_peft(process_group, wrap):
    names = [name for name, p in PEFT[wrap](small()).named_parameters() if p.requires_grad]
    found = by_bare_name(dict.fromkeys(names), "the run")
    lora = {f"model.layers.{i}.self_attn.q_proj.lora_{half}.default.weight" for i in range(2) for half in "AB"}
    assert lora | {"lm_head.weight"} == found.keys()


def test_names():
    assert bare_name("base_model.model.model.mm_projector.0.weight") == "model.mm_projector.0.weight"
    assert bare_name("module.model.norm.weight") == "model.norm.weight"
    assert bare_name("base_model.model.transformer.blocks.2.ffn.up_proj.weight") == "transformer.blocks.2.ffn.up_proj.weight"
    assert bare_name("base_model.model.lm_head.modules_to_save.default.weight") == "lm_head.weight"
    assert bare_name("module._fsdp_wrapped_module.base_model.model.base_model.model." + NAME) == NAME
    assert unwrapped("_orig_mod.a.base_layer.weight") == "a.base_layer.weight"
    assert bare_name("model.module.weight") == "model.module.weight" and bare_name("model.my_orig_mod.w") == "model.my_orig_mod.w"


def test_two_names_of_one_tensor_are_refused():
    with pytest.raises(LlavaRegionError, match=rf"run.bin holds both '{NAME}' and '_orig_mod.{NAME}', which are one tensor"):
        by_bare_name({NAME: 1, f"_orig_mod.{NAME}": 2}, "run.bin")
