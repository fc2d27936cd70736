"""Finished models for the tests, written with upstream LLaVA's and PEFT's own classes, in the layout upstream's train() leaves."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import torch

from llava_region.decoder import linear_modules

VISION_ARGS = {
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "pretrain_mm_mlp_adapter": None,
    "mm_patch_merge_type": "flat",
    "mm_projector_type": "mlp2x_gelu",
}


def llava_model(tiny, seed: int = 0):
    """Upstream's LLaVA-Llama on the tiny backbone with its vision tower and a fresh projector, fp32."""
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

    torch.manual_seed(seed)
    model = LlavaLlamaForCausalLM.from_pretrained(tiny.backbone)
    model.get_model().initialize_vision_modules(SimpleNamespace(vision_tower=str(tiny.vision_tower), **VISION_ARGS))
    model.config.image_aspect_ratio = "pad"
    model.config.tokenizer_padding_side = "right"
    model.config.tokenizer_model_max_length = 512
    model.config.mm_use_im_start_end = False
    model.config.mm_use_im_patch_token = False
    model.config.use_cache = True
    return model.float()


def save_tokenizer(tiny, folder: Path) -> None:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(tiny.backbone, use_fast=False).save_pretrained(folder)


def write_llava_checkpoint(tiny, folder: Path, perturb: float = 0.02) -> Path:
    """A full checkpoint whose decoder layers differ from the backbone's by noise of standard deviation `perturb`."""
    model = llava_model(tiny)
    with torch.no_grad():
        for parameter in model.get_model().layers.parameters():
            parameter.add_(torch.randn_like(parameter) * perturb)
    model.save_pretrained(folder)
    save_tokenizer(tiny, folder)
    return folder


def write_lora_run(tiny, folder: Path, layers, **lora) -> Path:
    """A LoRA run as upstream leaves it, with random (non-zero) A and B, plus our region.json."""
    from peft import LoraConfig, get_peft_model

    model = llava_model(tiny)
    projector = {f"base_model.model.model.mm_projector.{k}": v.clone() for k, v in model.get_model().mm_projector.state_dict().items()}
    options = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "bias": "none", "task_type": "CAUSAL_LM", **lora}
    model = get_peft_model(model, LoraConfig(target_modules=linear_modules(model, layers), **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    region = {"layers": list(layers), "num_layers": 8, "spec": ",".join(map(str, layers))}
    model.config.visual_region = region
    folder.mkdir(parents=True)
    model.config.save_pretrained(folder)
    state = {k: v for k, v in model.named_parameters() if "lora_" in k}
    model.save_pretrained(folder, state_dict=state)
    torch.save(projector, folder / "non_lora_trainables.bin")
    record = {**region, "base_model": str(tiny.backbone), "upstream": "llava", "mode": "lora"}
    (folder / "region.json").write_text(json.dumps(record))
    return folder


def without_base(run: Path, folder: Path, base: object = "/gone/base") -> Path:
    """A copy of a LoRA run that names another base, by default one that is not there; None: none at all."""
    shutil.copytree(run, folder)
    for name, key in (("region.json", "base_model"), ("adapter_config.json", "base_model_name_or_path")):
        data = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**data, key: None if base is None else str(base)}))
    return folder
