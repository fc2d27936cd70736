"""LLaVA's models: its classes, conversation templates, tokenisation and image handling."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from llava import conversation
from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN, DEFAULT_IMAGE_TOKEN
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.model.language_model.llava_mistral import LlavaMistralForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from llava_region.errors import LlavaRegionError
from llava_region.patches.llava_family import features_per_image
from llava_region.patches.model_side import Family, Merged, ModelSide

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


class LLaVAModels(ModelSide):
    """LLaVA-1.5 on Llama, and LLaVA-Mistral."""

    title = "LLaVA"
    conversation = conversation
    tower_keys = ("mm_vision_tower", "vision_tower")
    families = {
        "llava_llama": Family(LlavaLlamaForCausalLM, "vicuna_v1"),
        "llava": Family(LlavaLlamaForCausalLM, "vicuna_v1"),
        "llava_mistral": Family(LlavaMistralForCausalLM, "mistral_instruct"),
    }

    def check(self, config: Mapping[str, Any], folder: str | Path) -> None:
        """Also refuses transformers' own LLaVA format, and images cut into tiles."""
        if config.get("model_type") == "llava" and "text_config" in config:
            raise LlavaRegionError(
                f"{folder} is in the format of transformers' own LLaVA (llava-hf); give a checkpoint in LLaVA's own format"
            )
        if config.get("model_type") in self.families and config.get("image_aspect_ratio") == "anyres":
            raise LlavaRegionError(f"{folder} cuts images into tiles (image_aspect_ratio 'anyres', LLaVA-1.6); allowed: pad, square")
        super().check(config, folder)

    def build(self, weights: Path, settings: Path, **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, Any]]:
        model, tokenizer, info = super().build(weights, settings, **options)
        drop_cache_position(model)
        return model, tokenizer, info

    def text_model_class(self, config: Mapping[str, Any]) -> type:
        """transformers' own classes know all of LLaVA's backbones."""
        return AutoModelForCausalLM

    def load_tokenizer(self, folder: Path, config: Mapping[str, Any]) -> PreTrainedTokenizerBase:
        """LLaVA's training pads with the unknown token."""
        slow = {} if config.get("model_type") == "llava_mistral" else {"use_fast": False}
        tokenizer = AutoTokenizer.from_pretrained(folder, **slow)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
        return tokenizer

    def attach_vision(self, model: Any, tokenizer: PreTrainedTokenizerBase, weights: Path, extra: Mapping[str, torch.Tensor]) -> Any:
        """Also adds the image tokens that the config asks for."""
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

    def default_template(self, config: Mapping[str, Any]) -> str:
        """A plain LLM (no LLaVA model type) gets LLaVA v1.5's."""
        family = self.families.get(config.get("model_type", ""))
        return family.template if family else "vicuna_v1"

    def image_text(self, config: PretrainedConfig) -> str:
        if getattr(config, "mm_use_im_start_end", False):
            return DEFAULT_IM_START_TOKEN + DEFAULT_IMAGE_TOKEN + DEFAULT_IM_END_TOKEN
        return DEFAULT_IMAGE_TOKEN

    def input_ids(self, text: str, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
        return torch.as_tensor(tokenizer_image_token(text, tokenizer, return_tensors="pt"))

    def pixel_values(self, image: Image, processor: Any, config: PretrainedConfig) -> torch.Tensor:
        return process_images([image], processor, config)[0]

    def example(
        self, record: Mapping[str, Any], tokenizer: Any, template: str, config: PretrainedConfig
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from llava.train import train

        turns: Any = copy.deepcopy([record["conversations"]])
        settings: Any = SimpleNamespace(is_multimodal=True, mm_use_im_start_end=getattr(config, "mm_use_im_start_end", False))
        # it prints warnings of mismatched lengths
        with self.default_conversation(template), contextlib.redirect_stdout(sys.stderr):
            if "image" in record:
                turns = train.preprocess_multimodal(turns, settings)
            out = train.preprocess(turns, tokenizer, has_image="image" in record)
        return out["input_ids"][0], out["labels"][0]

    def features_per_image(self, model: Any) -> int:
        return features_per_image(model)

    def embed(self, model: Any, ids: torch.Tensor, labels: torch.Tensor, attention_mask: torch.Tensor, images: torch.Tensor) -> Merged:
        positions = torch.arange(ids.shape[1], device=ids.device)
        _, positions, mask, _, embeds, labels = model.prepare_inputs_labels_for_multimodal(
            ids, positions, attention_mask, None, labels, images, image_sizes=None
        )
        return Merged(embeds, labels, mask, positions)


def drop_cache_position(model: PreTrainedModel) -> None:
    """transformers >= 4.38 hands `cache_position` to `forward` while generating, which LLaVA's does not take."""
    if "cache_position" in inspect.signature(model.forward).parameters:
        return
    original = model.prepare_inputs_for_generation

    @functools.wraps(original)
    def prepare_inputs_for_generation(*args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs = original(*args, **kwargs)
        inputs.pop("cache_position", None)
        return inputs

    model.prepare_inputs_for_generation = prepare_inputs_for_generation
