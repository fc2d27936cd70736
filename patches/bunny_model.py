"""Bunny's half of `llava_region.models.loading`: its classes, conversation templates, tokenisation and image handling.

`llava_model` has the same functions. Everything goes through Bunny's own code; what is added here is what its
`load_pretrained_model` is told by its caller (the model type), decides by the folder's name, or fixes at fp16.
"""

from __future__ import annotations

import contextlib
import copy
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from bunny import conversation
from bunny import model as bunny_models
from bunny.constants import DEFAULT_IMAGE_TOKEN
from bunny.util import data_utils
from bunny.util.mm_utils import process_images, tokenizer_image_token
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from llava_region.checkpoints.tensors import Checkpoint
from llava_region.decoder import is_vision
from llava_region.errors import LlavaRegionError

# model type in config.json: (model class, conversation template)
CLASSES = {
    "bunny-llama": (bunny_models.BunnyLlamaForCausalLM, "llama"),
    "bunny-phi3": (bunny_models.BunnyPhi3ForCausalLM, "phi3"),
    "bunny-phi": (bunny_models.BunnyPhiForCausalLM, "bunny"),
    "bunny-qwen2": (bunny_models.BunnyQwen2ForCausalLM, "bunny"),
    "bunny-stablelm": (bunny_models.BunnyStableLMForCausalLM, "bunny"),
    "bunny-minicpm": (bunny_models.BunnyMiniCPMForCausalLM, "minicpm"),
}
# backbones as they came, which transformers' own classes do not all know
BACKBONES = {
    "llama": "bunny-llama", "phi3": "bunny-phi3", "phi": "bunny-phi", "qwen2": "bunny-qwen2", "stablelm": "bunny-stablelm",
    "stablelm_epoch": "bunny-stablelm", "minicpm": "bunny-minicpm",
}  # fmt: skip
LLAMA3_EOS = 128001  # <|end_of_text|>: Bunny trains and generates with it whatever the tokenizer says
TOWER = "model.vision_tower."


def check(config: dict, folder) -> None:
    """Refuse, from `config.json` alone, what Bunny at the tested commit cannot run.

    Raises:
        LlavaRegionError: a model type that Bunny has not, or a vision tower that is not there.
    """
    kind = config.get("model_type")
    if kind not in CLASSES:
        raise LlavaRegionError(f"{folder} has model type '{kind}', which Bunny cannot run; allowed: {', '.join(CLASSES)}")
    tower = config.get("mm_vision_tower")
    if not tower:
        raise LlavaRegionError(f"the config.json of {folder} names no 'mm_vision_tower'; give a Bunny checkpoint, or a backbone as it came")
    if os.path.isabs(tower) and not os.path.exists(tower):
        raise LlavaRegionError(f"the vision tower {tower} that {folder}/config.json names is not there; mend 'mm_vision_tower' in it")


def build(weights, settings, *, dtype, device_map, attn_implementation):
    """Build the model of the config in folder `settings` with the weights of folder `weights`, its vision tower not yet loaded.

    Returns:
        (model, tokenizer, info): info as transformers' `output_loading_info` gives it.
    """
    raw = PretrainedConfig.get_config_dict(settings)[0]
    model_class = CLASSES[raw["model_type"]][0]
    config = model_class.config_class.from_pretrained(settings)
    config.__dict__.pop("quantization_config", None)  # of a QLoRA run, whose adapter goes onto the base in its own type
    config.continuous_training = False  # else the tower is loaded while the model is built
    if attn_implementation:  # as an argument beside a config, transformers 4.37 to 4.40 passes over "eager"
        config._attn_implementation = attn_implementation
    model, info = model_class.from_pretrained(
        weights, config=config, torch_dtype=dtype, device_map=device_map, low_cpu_mem_usage=True, output_loading_info=True
    )
    return model, load_tokenizer(weights, raw), info


def text_model_class(config: dict) -> type:
    """What loads a backbone of this config: Bunny's own copy of the model where it has one."""
    kind = BACKBONES.get(config.get("model_type"))
    if kind is None:
        return AutoModelForCausalLM
    return CLASSES[kind][0].__bases__[0]


def load_tokenizer(folder, config: dict):
    """The tokenizer as Bunny loads it for training: fast, padding with the unknown token; Llama 3 ends and pads with token 128001."""
    kind = config.get("model_type")
    kind = BACKBONES.get(kind, kind)
    # StableLM 2's first releases come with a tokenizer class of their own; Bunny trusts it too
    tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True, trust_remote_code=kind == "bunny-stablelm")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if kind == "bunny-llama" and len(tokenizer) > LLAMA3_EOS:
        tokenizer.eos_token_id = LLAMA3_EOS
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def attach_vision(model, tokenizer, weights, extra: dict):
    """Load the vision tower, in the model's dtype and on its device; where the tower was trained, with the weights of that training.

    Args:
        weights: folder of the model, or of a LoRA run's base; a tower that it holds goes before the one `mm_vision_tower` names.
        extra: tensors that a LoRA run trained beside its adapter; its tower's go before both.

    Returns:
        The image processor.

    Raises:
        LlavaRegionError: the trained tower is not there, or is not that of the config.
    """
    model.resize_token_embeddings(len(tokenizer))
    tower = model.get_vision_tower()
    if not tower.is_loaded:
        tower.load_model()
    trained = {**_tower_tensors(Path(weights)), **{name: tensor for name, tensor in extra.items() if is_vision(name)}}
    if getattr(model.config, "unfreeze_vision_tower", False) and not trained:
        raise LlavaRegionError(
            f"{weights} was trained with --unfreeze_vision_tower, but its trained vision tower is not there; give the whole run"
        )
    if trained:
        fit = tower.load_state_dict({name.removeprefix(TOWER): tensor for name, tensor in trained.items()}, strict=False)
        odd = [*fit.missing_keys, *fit.unexpected_keys]
        if odd:
            raise LlavaRegionError(
                f"the vision tower in {weights} is not the one of its config.json: {odd[0]} and {len(odd) - 1} more differ"
            )
    tower.to(device=model.device, dtype=model.dtype)
    return tower.image_processor


def _tower_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The vision tower's tensors among the weights of a checkpoint; full tuning saves them, a backbone has none."""
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.tensor(name) for name in checkpoint if is_vision(name)}


def templates() -> list[str]:
    """Names of the conversation templates."""
    return list(conversation.conv_templates)


def default_template(config: dict) -> str:
    """The template that Bunny trains a model of this config with; for a backbone that of the Bunny made of it."""
    kind = config.get("model_type")
    return CLASSES.get(BACKBONES.get(kind, kind), (None, "bunny"))[1]


def prompt(template: str, question: str, images: int, config) -> str:
    """The question after `images` image placeholders, in the conversation template, with an empty answer."""
    turns = conversation.conv_templates[template].copy()
    turns.append_message(turns.roles[0], f"{DEFAULT_IMAGE_TOKEN}\n" * images + question)
    turns.append_message(turns.roles[1], None)
    return turns.get_prompt()


def stop_text(template: str) -> str:
    """The text that ends an answer in this template, besides the EOS token; may be empty."""
    turns = conversation.conv_templates[template]
    return (turns.sep2 if turns.sep_style == conversation.SeparatorStyle.TWO else turns.sep) or ""


def input_ids(text: str, tokenizer) -> torch.LongTensor:
    """Token ids (T,) of a prompt, -200 where it says `<image>`."""
    return tokenizer_image_token(text, tokenizer, return_tensors="pt")


def pixel_values(image, processor, config) -> torch.Tensor:
    """One RGB image as the vision tower takes it, (3, H, W)."""
    return process_images([image], processor, config)[0]


def example(record: dict, tokenizer, template: str, config) -> tuple[torch.LongTensor, torch.LongTensor]:
    """One training record through Bunny's own preprocessing: ids (T,) and labels (T,), -100 but on answers and EOS."""
    turns = copy.deepcopy([record["conversations"]])
    default = conversation.default_conversation
    conversation.default_conversation = conversation.conv_templates[template]
    try:
        with contextlib.redirect_stdout(sys.stderr):  # it prints warnings of mismatched lengths
            if "image" in record:
                turns = data_utils.preprocess_multimodal(turns, SimpleNamespace(is_multimodal=True))
            out = data_utils.preprocess(turns, tokenizer, has_image="image" in record)
    finally:
        conversation.default_conversation = default
    return out["input_ids"][0], out["labels"][0]


def embed_tokens(model, ids) -> torch.Tensor:
    """Embeddings (..., H) of text tokens as the first decoder layer takes them; MiniCPM scales them."""
    return model.get_input_embeddings()(ids) * getattr(model.config, "scale_emb", 1)


def embed(model, ids, labels, attention_mask, images):
    """Bunny's own merge of text and image features.

    Args:
        ids: (B, T) with placeholders -200, which Bunny overwrites; labels: (B, T); attention_mask: (B, T) bool, False on padding.
        images: (N, 3, H, W), one an image in the order of the placeholders, and one (unused) for each sample without any.

    Returns:
        (inputs_embeds (B, L, H), labels (B, L), attention_mask (B, L), position_ids (B, L)); labels are -100 on images and padding.
    """
    positions = torch.arange(ids.shape[1], device=ids.device)
    _, positions, mask, _, embeds, labels = model.prepare_inputs_labels_for_multimodal(ids, positions, attention_mask, None, labels, images)
    # BunnyMiniCPM's forward does this to what the merge returns
    return embeds * getattr(model.config, "scale_emb", 1), labels, mask, positions
