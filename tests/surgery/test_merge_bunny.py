"""Merged, reverted and pruned Bunny models load in Bunny's own builder. Needs the real Bunny (BUNNY_ROOT)."""

import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llava_region.checkpoints.tensors import Checkpoint
from llava_region.decoder import is_vision, layer_index, linear_modules
from llava_region.surgery.merge import merge
from llava_region.surgery.prune import prune
from llava_region.surgery.revert import revert
from tests.helpers import bunny_shims
from tests.helpers.bunny_models import MODEL_TYPES, write_bunny

if bunny_shims.why_not():
    pytest.skip(bunny_shims.why_not(), allow_module_level=True)
bunny_shims.apply()


def bunny_run(files, folder: Path, layers=(1, 6), unfreeze: bool = False, bias: str = "none") -> Path:
    """A LoRA run in the layout Bunny's train() leaves, with random weights; with `unfreeze`, of the vision tower too."""
    import bunny.model
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = getattr(bunny.model, f"Bunny{MODEL_TYPES[files.model_type][0]}ForCausalLM").from_pretrained(files.backbone)
    vision = {"vision_tower": str(files.vision_tower), "mm_projector_type": "mlp2x_gelu", "pretrain_mm_mlp_adapter": None, "use_s2": False}
    model.get_model().initialize_vision_modules(SimpleNamespace(**vision))
    config = {"image_aspect_ratio": "pad", "tokenizer_model_max_length": 512, "use_s2": False, "unfreeze_vision_tower": unfreeze}
    region = {"layers": list(layers), "num_layers": 8, "spec": "1,6"}
    for key, value in {**config, "tokenizer_padding_side": "right", "visual_region": region}.items():
        setattr(model.config, key, value)
    targets = linear_modules(model, layers)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets, bias=bias, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or is_vision(name) or (bias == "all" and "bias" in name):
                parameter.add_(torch.randn_like(parameter).mul(0.1).half())
    folder.mkdir()
    trained = {
        k: v.detach().clone()
        for k, v in model.named_parameters()
        if "lora_" not in k and ("mm_projector" in k or (unfreeze and is_vision(k)))
    }
    adapter = {k: v.half().float() for k, v in model.named_parameters() if "lora_" in k or (bias == "all" and "bias" in k)}
    model.config.save_pretrained(folder)
    model.save_pretrained(folder, state_dict=adapter)
    torch.save(trained, folder / "non_lora_trainables.bin")
    (folder / "region.json").write_text(json.dumps({**region, "base_model": str(files.backbone), "upstream": "bunny", "mode": "lora"}))
    return folder


def builder_loads(folder: Path, base, model_type: str):
    from bunny.model.builder import load_pretrained_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        name = "bunny-lora" if base else "bunny"
        return load_pretrained_model(str(folder), base and str(base), name, model_type, device="cpu")[1]


@pytest.mark.parametrize(
    ("model_type", "unfreeze"), [("phi-2", True), ("phi-3", False), ("qwen1.5-1.8b", False), ("minicpm", False), ("stablelm-2", True)]
)
def test_merged_model_is_the_one_bunny_builds_from_the_run(tmp_path, model_type, unfreeze):
    files = write_bunny(tmp_path / "tiny", model_type)
    run = bunny_run(files, tmp_path / "bunny-lora", unfreeze=unfreeze)
    same_as_bunnys(files, run, tmp_path / "merged")


def test_biases_trained_with_the_adapter(tmp_path):
    """bias="all" of upstream's --lora_bias: those of modules under LoRA have `base_layer` in their name. Qwen has three a layer."""
    files = write_bunny(tmp_path / "tiny", "qwen1.5-1.8b")
    changed = same_as_bunnys(files, bunny_run(files, tmp_path / "bunny-lora", bias="all"), tmp_path / "merged", layers=range(8))
    assert {f"model.layers.{i}.self_attn.{m}_proj.bias" for i in range(8) for m in "qkv"} <= set(changed)


def same_as_bunnys(files, run: Path, out: Path, layers=(1, 6)) -> list[str]:
    """Merge; the model that Bunny loads is the one it builds from the run. Returns the backbone's tensors that changed."""
    model_type = files.model_type
    merge(run, out)
    theirs = builder_loads(run, files.backbone, model_type).state_dict()
    model = builder_loads(out, None, model_type)
    ours = model.state_dict()
    assert set(ours) == set(theirs) and model.config.architectures == [type(model).__name__]
    backbone = Checkpoint(files.backbone)
    changed = [name for name in backbone if not torch.equal(backbone.tensor(name).half(), ours[name])]
    assert {layer_index(name) for name in changed} == set(layers)
    for name, tensor in theirs.items():
        # upstream adds in fp16 what we add in fp32: a few fp16 steps of the larger summand apart at most
        assert torch.allclose(ours[name].float(), tensor.float(), rtol=2**-9, atol=2**-11), name
        assert name in changed or torch.equal(ours[name], tensor), name
    return changed


def test_unfrozen_vision_tower_is_in_the_merged_model(tmp_path):
    files = write_bunny(tmp_path / "tiny", "phi-2")
    run = bunny_run(files, tmp_path / "bunny-lora", unfreeze=True)
    merge(run, tmp_path / "merged")
    trained = torch.load(run / "non_lora_trainables.bin", weights_only=True)
    model = builder_loads(tmp_path / "merged", None, "phi-2").state_dict()
    vision = [name for name in trained if is_vision(name)]
    assert len(vision) > 20
    assert all(torch.equal(model[name.removeprefix("base_model.model.")], trained[name].half()) for name in vision)


@pytest.mark.parametrize("model_type", ["phi-3", "qwen1.5-1.8b"])
def test_pruned_and_reverted_load_and_generate(tmp_path, model_type):
    files = write_bunny(tmp_path / "tiny", model_type)
    run = bunny_run(files, tmp_path / "bunny-lora")
    report = prune(run, tmp_path / "pruned", layers="2,5")  # merges on the way; its self test generates with the cache on and off
    assert report["new_to_old"] == [0, 1, 3, 4, 6, 7]
    model = builder_loads(tmp_path / "pruned", None, model_type).float()
    assert model.config.num_hidden_layers == 6 and [layer.self_attn.layer_idx for layer in model.model.layers] == list(range(6))
    ids = torch.arange(5, 12).unsqueeze(0)
    tokens = [model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=cache, eos_token_id=-1) for cache in (True, False)]
    assert torch.equal(*tokens) and tokens[0].shape[1] == 12
    merge(run, tmp_path / "merged")
    revert(tmp_path / "merged", files.backbone, "1", tmp_path / "reverted")
    name = next(n for n in Checkpoint(files.backbone) if n.startswith("model.layers.1.mlp") and n.endswith("weight"))
    assert torch.equal(
        builder_loads(tmp_path / "reverted", None, model_type).state_dict()[name], Checkpoint(files.backbone).tensor(name).half()
    )
