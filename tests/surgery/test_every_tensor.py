"""Every tensor of a run is used under its own name, or refused by it: nothing is lost, and nothing is made up."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_region.checkpoints.tensors import Checkpoint
from llava_region.errors import LlavaRegionError
from llava_region.models import load
from llava_region.scores.weight_changes import weight_changes
from llava_region.surgery.merge import merge
from llava_region.surgery.prune import prune
from llava_region.surgery.revert import revert

pytest.importorskip("llava.model")
Tensors = dict[str, torch.Tensor]
BESIDES, ADAPTER = "non_lora_trainables.bin", "adapter_model.safetensors"
ROOT = "base_model.model."
PROJECTOR = f"{ROOT}model.mm_projector"
Q = f"{ROOT}model.layers.1.self_attn.q_proj"


@pytest.fixture
def run(lora_run, tmp_path) -> Path:
    """A copy of the run that a test may spoil."""
    return Path(shutil.copytree(lora_run, tmp_path / "run-lora"))


def change(folder: Path, file: str, how: Callable[[Tensors], Tensors]) -> None:
    if file.endswith(".bin"):
        torch.save(how(torch.load(folder / file, weights_only=True)), folder / file)
    else:
        save_file(how(load_file(folder / file)), folder / file, {"format": "pt"})


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def prefixed(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def inside(wrapper: str, before: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.replace(before, f"{wrapper}.{before}"): tensor for name, tensor in tensors.items()}


# what torch.compile, FSDP, DDP, activation checkpointing and PEFT put around the names, see tests/checkpoints/test_names.py
WRAPPERS = {
    "compiled": prefixed("_orig_mod."), "FSDP": prefixed("_fsdp_wrapped_module."), "PEFT twice": prefixed(ROOT),
    "DDP": prefixed("module."), "compiled, DDP": prefixed("_orig_mod.module."), "PEFT of a compiled model": inside("_orig_mod", "model.l"),
    "checkpointed layers": inside("_checkpoint_wrapped_module", "self_attn"),
    "compiled projector": inside("_orig_mod", "0.weight"), "FSDP projector": inside("_fsdp_wrapped_module", "mm_projector"),
}  # fmt: skip


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_names_of_wrappers_give_the_same_model(tiny, lora_run, run, tmp_path, wrapper):
    for file in (BESIDES, ADAPTER):
        change(run, file, WRAPPERS[wrapper])
    merge(run, tmp_path / "out", tiny.backbone)
    merge(lora_run, tmp_path / "plain", tiny.backbone)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "plain/model.safetensors").read_bytes()
    ours = load(run, tiny.backbone, device="cpu").model.state_dict()
    theirs = load(lora_run, tiny.backbone, device="cpu").model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert weight_changes(run, tiny.backbone, 1e-8) == weight_changes(lora_run, tiny.backbone, 1e-8)


def without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


def adding(name: str, *shape: int) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: torch.ones(shape)}


def renaming(before: str, after: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.replace(before, after): tensor for name, tensor in tensors.items()}


SPOILED = {
    "a projector under a name of nobody": (BESIDES, renaming("mm_projector", "my_wrapper.mm_projector"), "my_wrapper.mm_projector.0.bias"),
    "a projector tensor missing": (BESIDES, without("mm_projector.2.bias"), "lacks 'model.mm_projector.2.bias'"),
    "a layer of another projector": (BESIDES, adding(f"{PROJECTOR}.4.weight", 64, 64), "holds 'model.mm_projector.4.weight'"),
    "a projector of another width": (BESIDES, adding(f"{PROJECTOR}.0.weight", 64, 16), r"'model.mm_projector.0.weight' .*\(64, 16\)"),
    "a projector flattened by FSDP": (
        BESIDES,
        lambda tensors: {f"{PROJECTOR}._fsdp_wrapped_module._flat_param": torch.ones(9)},
        "holds 'model.mm_projector._flat_param'",
    ),
    "one tensor twice": (BESIDES, adding(f"_orig_mod.{PROJECTOR}.0.bias", 64), "which are one tensor of the model"),
    "an adapter in an adapter": (ADAPTER, renaming("q_proj.lora", "q_proj.base_layer.lora"), "is an adapter inside another"),
    "an adapter around an adapter": (
        ADAPTER,
        lambda tensors: {**tensors, **{name.replace(".lora_", ".base_layer.lora_"): t.clone() for name, t in tensors.items()}},
        "is an adapter inside another",
    ),
    "an adapter's tensor twice": (ADAPTER, adding(f"module.{Q}.lora_A.weight", 8, 64), "which are one tensor of the model"),
    "a layer missing": (ADAPTER, without("layers.6."), r"lacks decoder layers \[6\], and the region of the run is \[1, 6\]"),
    "a layer too many": (ADAPTER, renaming("layers.6.", "layers.5."), r"lacks decoder layers \[6\]"),
    "a module missing": (ADAPTER, without("layers.1.self_attn.q_proj"), "holds nothing for 'model.layers.1.self_attn.q_proj' .*incomplete"),
    "half of a module missing": (ADAPTER, without("layers.1.self_attn.q_proj.lora_B"), "holds only lora_A"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILED)
def test_what_cannot_be_used_is_refused_by_name(tiny, run, tmp_path, name):
    file, how, message = SPOILED[name]
    change(run, file, how)
    with pytest.raises(LlavaRegionError, match=message):
        merge(run, tmp_path / "out", tiny.backbone)
    with pytest.raises(LlavaRegionError, match=message):
        prune(run, tmp_path / "out", layers="4", base=tiny.backbone)
    with pytest.raises(LlavaRegionError):
        load(run, tiny.backbone, device="cpu")
    if file == ADAPTER:
        with pytest.raises(LlavaRegionError, match=message):
            weight_changes(run, tiny.backbone, 1e-8)
    assert [path.name for path in tmp_path.iterdir()] == [run.name]


TARGETS = {
    "leaf names": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "an expression": r"(?i)model\.layers\.\d+\.(self_attn|mlp)\..*_proj",
}  # fmt: skip


@pytest.mark.parametrize("targets", TARGETS)
def test_a_run_of_the_upstream_alone(tiny, tmp_path, targets):
    """It has LoRA on every layer, whatever way `target_modules` says so; what is not there was expected."""
    from tests.helpers.finished_models import write_lora_run

    run = write_lora_run(tiny, tmp_path / "all-lora", range(8))
    (run / "region.json").unlink()
    edit(run / "config.json", visual_region=None)
    edit(run / "adapter_config.json", target_modules=TARGETS[targets])
    merge(run, tmp_path / "out", tiny.backbone)
    assert load(run, tiny.backbone, device="cpu").num_layers == 8
    change(run, ADAPTER, without("layers.3."))
    with pytest.raises(LlavaRegionError, match=r"holds nothing for 'model.layers.3.* \(7 such modules\)"):
        merge(run, tmp_path / "other", tiny.backbone)
    edit(run / "adapter_config.json", exclude_modules=r".*\.layers\.3\..*")
    merge(run, tmp_path / "other", tiny.backbone)


def test_an_expression_that_never_ends_is_refused(tiny, run, tmp_path):
    edit(run / "adapter_config.json", target_modules=r"(([a-z0-9_.])+)+!")
    with pytest.raises(LlavaRegionError, match=r"'target_modules' .* cannot be matched: one of them takes longer"):
        merge(run, tmp_path / "out", tiny.backbone)


def test_modules_saved_whole_are_expected(tiny, run, tmp_path):
    edit(run / "adapter_config.json", modules_to_save=["lm_head"])
    with pytest.raises(LlavaRegionError, match=r"holds nothing for 'lm_head\.weight'"):
        merge(run, tmp_path / "out", tiny.backbone)
    head = torch.randn(512, 64)
    change(run, ADAPTER, lambda tensors: {**tensors, f"{ROOT}lm_head.weight": head})
    merge(run, tmp_path / "out", tiny.backbone)
    assert torch.equal(Checkpoint(tmp_path / "out").tensor("lm_head.weight"), head)
    assert torch.equal(load(run, tiny.backbone, device="cpu").model.lm_head.weight, head)


def test_a_tensor_beside_lora_that_peft_would_pass_over(tiny, run):
    change(run, ADAPTER, adding(f"{ROOT}model.layers.1.self_attn.q_proj.bias", 64))
    with pytest.raises(LlavaRegionError, match=r"no place for .*q_proj\.bias"):
        load(run, tiny.backbone, device="cpu")


def test_the_frozen_towers_biases_next_to_lora_are_taken(tiny, run):
    """LLaVA's `--lora_bias all` stores every bias; the tower's are those that it comes with."""
    change(run, ADAPTER, adding(f"{ROOT}model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias", 64))
    assert load(run, tiny.backbone, device="cpu").num_layers == 8


def test_an_identity_projector_has_no_tensors(tiny, run, tmp_path):
    edit(run / "config.json", mm_projector_type="identity", mm_hidden_size=64)
    change(run, BESIDES, lambda tensors: {})
    merge(run, tmp_path / "out", tiny.backbone)
    assert not [name for name in Checkpoint(tmp_path / "out") if "mm_projector" in name]


def test_a_config_without_the_widths_is_refused(tiny, run, tmp_path):
    config = json.loads((run / "config.json").read_text())
    del config["mm_hidden_size"]
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(LlavaRegionError, match=r"'mm_hidden_size' \(None\)"):
        merge(run, tmp_path / "out", tiny.backbone)


# -- whole models


@pytest.fixture
def whole(llava_checkpoint, tmp_path) -> Path:
    return Path(shutil.copytree(llava_checkpoint, tmp_path / "llava-whole"))


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module."])
def test_a_whole_model_under_the_names_of_a_wrapper(tiny, llava_checkpoint, whole, tmp_path, prefix):
    change(whole, "model.safetensors", prefixed(prefix))
    for name, model in (("plain", llava_checkpoint), ("out", whole)):
        revert(model, tiny.backbone, "3", tmp_path / name)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "plain/model.safetensors").read_bytes()
    prune(whole, tmp_path / "pruned", layers="4")


WHOLE = {
    "an adapter unmerged": (adding("model.layers.1.self_attn.q_proj.lora_A.default.weight", 8, 64), "saved with its adapter unmerged"),
    "another projector": (renaming("mm_projector.2.", "mm_projector.4."), "holds 'model.mm_projector.4.bias' and lacks"),
    "a projector of another width": (adding("model.mm_projector.0.weight", 64, 16), r"shape \(64, 16\), and its config.json asks"),
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_whole_models_that_would_not_load_are_refused(tiny, whole, tmp_path, name):
    how, message = WHOLE[name]
    change(whole, "model.safetensors", how)
    for use in (
        lambda: revert(whole, tiny.backbone, "3", tmp_path / "out"),
        lambda: prune(whole, tmp_path / "out", layers="4", check=False, protect="none"),
    ):
        with pytest.raises(LlavaRegionError, match=message):
            use()


def test_a_checkpoint_is_resumed_with_all_that_it_trains(tmp_path):
    from llava_region.training.resume import load_non_lora

    model = torch.nn.ModuleDict({"mm_projector": torch.nn.Linear(2, 2)})
    torch.save({"mm_projector.weight": torch.zeros(2, 2)}, tmp_path / BESIDES)
    with pytest.raises(LlavaRegionError, match=r"lacks mm_projector\.bias, which the run trains"):
        load_non_lora(model, tmp_path)
