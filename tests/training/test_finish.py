"""A finished run is read again: what must be refused, on files written by hand."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from llava_region import LlavaRegionError, Region
from llava_region.training.finish import check_adapter, check_full, finish

REGION = Region((1, 6), 8, "1,6")
MODULES = [f"model.layers.{layer}.self_attn.q_proj" for layer in (1, 6)]


def adapter(**changes) -> dict[str, torch.Tensor]:
    """LoRA of two layers, one module each; `changes` go by `LAYER_A` or `LAYER_B`, such as `l6_B`."""
    tensors = {f"l{layer}_{part}": torch.full((2, 2), 0.5) for layer in (1, 6) for part in "AB"} | changes
    names = {key: f"base_model.model.model.layers.{key[1]}.self_attn.q_proj.lora_{key[3]}.weight" for key in tensors}
    return {names[key]: tensor for key, tensor in tensors.items() if tensor is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"l1_A": torch.zeros(2, 2)}, None),
        ({"l6_B": torch.zeros(2, 2)}, r"layers \[6\] .* were not changed by training"),
        ({"l6_B": torch.tensor([[float("nan")] * 2] * 2)}, "not finite"),
        ({"l6_A": torch.zeros(0)}, "empty tensors"),
        ({"l6_A": None, "l6_B": None}, r"holds layers \[1\], the region is \[1, 6\]"),
        ({"l3_B": torch.ones(2, 2)}, r"holds layers \[1, 3, 6\]"),
    ],
)
def test_adapter(tmp_path, changes, message):
    save_file(adapter(**changes), tmp_path / "adapter_model.safetensors")
    if message is None:
        assert check_adapter(tmp_path, REGION, MODULES) == 4
        return
    with pytest.raises(LlavaRegionError, match=message):
        check_adapter(tmp_path, REGION, MODULES)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (
            "model.layers.1.self_attn.q_proj.base_layer",
            r"holds, besides what LoRA was put on, .*q_proj\.base_layer\.lora_A\.weight \(2 such",
        ),
        ("model.layers.6.mlp.up_proj", r"holds, besides what LoRA was put on, .*up_proj\.lora_A"),
        ("base_model.model.model.layers.6.self_attn.q_proj", "holds, besides what LoRA was put on"),
    ],
)
def test_an_adapter_holds_nothing_besides(tmp_path, module, message):
    """An adapter within an adapter is of the region's layers too."""
    more = {f"base_model.model.{module}.lora_{half}.weight": torch.ones(2, 2) for half in "AB"}
    save_file(adapter() | more, tmp_path / "adapter_model.safetensors")
    with pytest.raises(LlavaRegionError, match=message):
        check_adapter(tmp_path, REGION, MODULES)


def test_an_adapter_holds_every_module(tmp_path):
    save_file(adapter(), tmp_path / "adapter_model.safetensors")
    with pytest.raises(LlavaRegionError, match=r"lacks .*layers\.6\.mlp\.up_proj\.lora_A\.weight"):
        check_adapter(tmp_path, REGION, [*MODULES, "model.layers.6.mlp.up_proj"])


def test_no_adapter(tmp_path):
    with pytest.raises(LlavaRegionError, match="left no adapter"):
        check_adapter(tmp_path, REGION, MODULES)


def test_full_model(tmp_path):
    with pytest.raises(LlavaRegionError, match="left no model"):
        check_full(tmp_path, REGION)
    tensors = {f"model.layers.{i}.mlp.weight": torch.ones(2) for i in range(8)}
    save_file(tensors, tmp_path / "model.safetensors")
    check_full(tmp_path, REGION)
    save_file(tensors | {"model.layers.6.mlp.weight": torch.zeros(0)}, tmp_path / "model.safetensors")
    with pytest.raises(LlavaRegionError, match=r"layers \[6\] are missing or empty"):
        check_full(tmp_path, REGION)


@pytest.mark.parametrize("trainer", [None, SimpleNamespace(meter=SimpleNamespace(started=None))])
def test_a_run_that_never_trained_is_not_judged(trainer):
    finish(SimpleNamespace(trainer=trainer, region=REGION, mode="lora"))
