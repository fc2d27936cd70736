"""LLaVA's half of `llava_region.models.loading`: its classes, conversation templates, tokenisation and image handling.

`bunny_model` has the same functions. Everything goes through LLaVA's own code; what is added here is what its
`load_pretrained_model` decides by the folder's name or fixes at fp16.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import os
import sys
from types import SimpleNamespace

import torch
from llava import conversation
from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN, DEFAULT_IMAGE_TOKEN
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.language_model.llava_mistral import LlavaMistralConfig, LlavaMistralForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from llava_region.errors import LlavaRegionError

# `llava` is what LLaVA called its Llama models before transformers took that name for a model of its own
CLASSES = {
    "llava_llama": (LlavaConfig, LlavaLlamaForCausalLM, "vicuna_v1"),
    "llava": (LlavaConfig, LlavaLlamaForCausalLM, "vicuna_v1"),
    "llava_mistral": (LlavaMistralConfig, LlavaMistralForCausalLM, "mistral_instruct"),
}


def check(config: dict, folder) -> None:
    """Refuse, from `config.json` alone, what LLaVA at the tested commit cannot run.

    Raises:
        LlavaRegionError: transformers' own LLaVA format, LLaVA-MPT, images in tiles, or a vision tower that is not there.
    """
    kind = config.get("model_type")
    if kind == "llava" and "text_config" in config:
        raise LlavaRegionError(f"{folder} is in the format of transformers' own LLaVA (llava-hf); give a checkpoint in LLaVA's own format")
    if kind not in CLASSES:
        raise LlavaRegionError(f"{folder} has model type '{kind}', which LLaVA cannot run; allowed: {', '.join(CLASSES)}")
    if config.get("image_aspect_ratio") == "anyres":
        raise LlavaRegionError(f"{folder} cuts images into tiles (image_aspect_ratio 'anyres', LLaVA-1.6); allowed: pad, square")
    tower = config.get("mm_vision_tower") or config.get("vision_tower")
    if not tower:
        raise LlavaRegionError(f"the config.json of {folder} names no 'mm_vision_tower'; give a LLaVA checkpoint, or a backbone as it came")
    if os.path.isabs(tower) and not os.path.exists(tower):
        raise LlavaRegionError(f"the vision tower {tower} that {folder}/config.json names is not there; mend 'mm_vision_tower' in it")


def build(weights, settings, *, dtype, device_map, attn_implementation):
    """Build the model of the config in folder `settings` with the weights of folder `weights`, its vision tower not yet loaded.

    Returns:
        (model, tokenizer, info): info as transformers' `output_loading_info` gives it.
    """
    raw = LlavaConfig.get_config_dict(settings)[0]
    config_class, model_class, _ = CLASSES[raw["model_type"]]
    config = config_class.from_pretrained(settings)
    config.__dict__.pop("quantization_config", None)  # of a QLoRA run, whose adapter goes onto the base in its own type
    if attn_implementation:  # as an argument beside a config, transformers 4.37 to 4.40 passes over "eager"
        config._attn_implementation = attn_implementation
    model, info = model_class.from_pretrained(
        weights, config=config, torch_dtype=dtype, device_map=device_map, low_cpu_mem_usage=True, output_loading_info=True
    )
    _drop_cache_position(model)
    return model, load_tokenizer(weights, raw), info


def text_model_class(config: dict) -> type:
    """What loads a backbone: transformers' own classes know all of LLaVA's."""
    return AutoModelForCausalLM


def load_tokenizer(folder, config: dict):
    """The tokenizer as LLaVA loads it, able to pad: LLaVA's training pads with the unknown token."""
    slow = {} if config.get("model_type") == "llava_mistral" else {"use_fast": False}
    tokenizer = AutoTokenizer.from_pretrained(folder, **slow)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def _drop_cache_position(model) -> None:
    """transformers >= 4.38 hands `cache_position` to `forward` while generating, which LLaVA's does not take."""
    if "cache_position" in inspect.signature(model.forward).parameters:
        return
    original = model.prepare_inputs_for_generation

    @functools.wraps(original)
    def prepare_inputs_for_generation(*args, **kwargs):
        inputs = original(*args, **kwargs)
        inputs.pop("cache_position", None)
        return inputs

    model.prepare_inputs_for_generation = prepare_inputs_for_generation


def attach_vision(model, tokenizer, weights, extra: dict):
    """Add the image tokens the config asks for and load the vision tower, in the model's dtype and on its device.

    Returns:
        The image processor.
    """
    if getattr(model.config, "mm_use_im_patch_token", True):
        tokenizer.add_tokens([DEFAULT_IMAGE_PATCH_TOKEN], special_tokens=True)
    if getattr(model.config, "mm_use_im_start_end", False):
        tokenizer.add_tokens([DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN], special_tokens=True)
    model.resize_token_embeddings(len(tokenizer))
    tower = model.get_vision_tower()
    if not tower.is_loaded:
        tower.load_model()
    tower.to(device=model.device, dtype=model.dtype)
    return tower.image_processor


def templates() -> list[str]:
    """Names of the conversation templates."""
    return list(conversation.conv_templates)


def default_template(config: dict) -> str:
    """The template a model of this config was tuned with; a plain LLM (no LLaVA model type) gets LLaVA v1.5's."""
    return CLASSES.get(config.get("model_type"), (None, None, "vicuna_v1"))[2]


def prompt(template: str, question: str, images: int, config) -> str:
    """The question after `images` image placeholders, in the conversation template, with an empty answer."""
    token = DEFAULT_IMAGE_TOKEN
    if getattr(config, "mm_use_im_start_end", False):
        token = DEFAULT_IM_START_TOKEN + token + DEFAULT_IM_END_TOKEN
    turns = conversation.conv_templates[template].copy()
    turns.append_message(turns.roles[0], f"{token}\n" * images + question)
    turns.append_message(turns.roles[1], None)
    return turns.get_prompt()


def stop_text(template: str) -> str:
    """The text that ends an answer in this template, besides the EOS token; may be empty."""
    turns = conversation.conv_templates[template]
    two = turns.sep_style in (conversation.SeparatorStyle.TWO, conversation.SeparatorStyle.LLAMA_2)
    return (turns.sep2 if two else turns.sep) or ""


def input_ids(text: str, tokenizer) -> torch.LongTensor:
    """Token ids (T,) of a prompt, -200 where it says `<image>`."""
    return tokenizer_image_token(text, tokenizer, return_tensors="pt")


def pixel_values(image, processor, config) -> torch.Tensor:
    """One RGB image as the vision tower takes it, (3, H, W)."""
    return process_images([image], processor, config)[0]


def example(record: dict, tokenizer, template: str, config) -> tuple[torch.LongTensor, torch.LongTensor]:
    """One training record through LLaVA's own preprocessing: ids (T,) and labels (T,), -100 but on answers and EOS."""
    from llava.train import train

    turns = copy.deepcopy([record["conversations"]])
    settings = SimpleNamespace(is_multimodal=True, mm_use_im_start_end=getattr(config, "mm_use_im_start_end", False))
    default = conversation.default_conversation
    conversation.default_conversation = conversation.conv_templates[template]
    try:
        with contextlib.redirect_stdout(sys.stderr):  # it prints warnings of mismatched lengths
            if "image" in record:
                turns = train.preprocess_multimodal(turns, settings)
            out = train.preprocess(turns, tokenizer, has_image="image" in record)
    finally:
        conversation.default_conversation = default
    return out["input_ids"][0], out["labels"][0]


def embed_tokens(model, ids) -> torch.Tensor:
    """Embeddings (..., H) of text tokens as the first decoder layer takes them."""
    return model.get_input_embeddings()(ids)


def embed(model, ids, labels, attention_mask, images):
    """LLaVA's own merge of text and image features.

    Args:
        ids: (B, T) with placeholders -200; labels: (B, T); attention_mask: (B, T) bool, False on padding.
        images: (N, 3, H, W), one an image in the order of the placeholders, and one (unused) for each sample without any.

    Returns:
        (inputs_embeds (B, L, H), labels (B, L), attention_mask (B, L), position_ids (B, L)); labels are -100 on images and padding.
    """
    positions = torch.arange(ids.shape[1], device=ids.device)
    _, positions, mask, _, embeds, labels = model.prepare_inputs_labels_for_multimodal(
        ids, positions, attention_mask, None, labels, images, image_sizes=None
    )
    return embeds, labels, mask, positions
