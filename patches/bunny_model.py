"""Bunny's models: its classes, conversation templates, tokenisation and image handling."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from bunny import conversation  # pyright: ignore[reportAttributeAccessIssue] - takes bunny.py next to this file for it
from bunny import model as bunny_models  # pyright: ignore[reportAttributeAccessIssue]
from bunny.constants import DEFAULT_IMAGE_TOKEN
from bunny.util import data_utils
from bunny.util.mm_utils import process_images, tokenizer_image_token
from transformers import AutoModelForCausalLM, AutoTokenizer

from llava_region.checkpoints.tensors import Checkpoint
from llava_region.decoder import is_vision
from llava_region.errors import LlavaRegionError
from llava_region.patches.bunny import LLAMA3_EOS
from llava_region.patches.llava_family import features_per_image
from llava_region.patches.model_side import Family, Merged, ModelSide

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# backbones as they came, which transformers' own classes do not all know
BACKBONES = {
    "llama": "bunny-llama", "phi3": "bunny-phi3", "phi": "bunny-phi", "qwen2": "bunny-qwen2", "stablelm": "bunny-stablelm",
    "stablelm_epoch": "bunny-stablelm", "minicpm": "bunny-minicpm",
}  # fmt: skip
TOWER = "model.vision_tower."


class BunnyModels(ModelSide):
    """Bunny's six language models."""

    title = "Bunny"
    conversation = conversation
    unpadded_tasks = ("scienceqa",)  # bunny/eval/model_vqa_science.py
    families = {
        "bunny-llama": Family(bunny_models.BunnyLlamaForCausalLM, "llama"),
        "bunny-phi3": Family(bunny_models.BunnyPhi3ForCausalLM, "phi3"),
        "bunny-phi": Family(bunny_models.BunnyPhiForCausalLM, "bunny"),
        "bunny-qwen2": Family(bunny_models.BunnyQwen2ForCausalLM, "bunny"),
        "bunny-stablelm": Family(bunny_models.BunnyStableLMForCausalLM, "bunny"),
        "bunny-minicpm": Family(bunny_models.BunnyMiniCPMForCausalLM, "minicpm"),
    }

    def prepare_config(self, config: PretrainedConfig) -> None:
        config.continuous_training = False  # else the tower is loaded while the model is built

    def text_model_class(self, config: Mapping[str, Any]) -> type:
        """Bunny's own copy of the model where it has one."""
        kind = BACKBONES.get(config.get("model_type", ""))
        return AutoModelForCausalLM if kind is None else self.families[kind].model_class.__bases__[0]

    def load_tokenizer(self, folder: Path, config: Mapping[str, Any]) -> PreTrainedTokenizerBase:
        """Fast, padding with the unknown token; Llama 3 ends and pads with token 128001 whatever its tokenizer says."""
        kind = _family_name(config)
        # StableLM 2's first releases come with a tokenizer class of their own; Bunny trusts it too
        tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True, trust_remote_code=kind == "bunny-stablelm")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
        if kind == "bunny-llama" and len(tokenizer) > LLAMA3_EOS:
            tokenizer.eos_token_id = LLAMA3_EOS
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def attach_vision(self, model: Any, tokenizer: PreTrainedTokenizerBase, weights: Path, extra: Mapping[str, torch.Tensor]) -> Any:
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

    def default_template(self, config: Mapping[str, Any]) -> str:
        family = self.families.get(_family_name(config))
        return family.template if family else "bunny"

    def image_text(self, config: PretrainedConfig) -> str:
        return DEFAULT_IMAGE_TOKEN

    def input_ids(self, text: str, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
        return tokenizer_image_token(text, tokenizer, return_tensors="pt")

    def pixel_values(self, image: Image, processor: Any, config: PretrainedConfig) -> torch.Tensor:
        return process_images([image], processor, config)[0]

    def example(
        self, record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, template: str, config: PretrainedConfig
    ) -> tuple[torch.Tensor, torch.Tensor]:
        turns = copy.deepcopy([record["conversations"]])
        # it prints warnings of mismatched lengths
        with self.default_conversation(template), contextlib.redirect_stdout(sys.stderr):
            if "image" in record:
                turns = data_utils.preprocess_multimodal(turns, SimpleNamespace(is_multimodal=True))
            out = data_utils.preprocess(turns, tokenizer, has_image="image" in record)
        return out["input_ids"][0], out["labels"][0]

    def embed_text(self, model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
        """MiniCPM scales them."""
        return super().embed_text(model, ids) * getattr(model.config, "scale_emb", 1)

    def features_per_image(self, model: Any) -> int:
        return features_per_image(model)

    def embed(self, model: Any, ids: torch.Tensor, labels: torch.Tensor, attention_mask: torch.Tensor, images: torch.Tensor) -> Merged:
        positions = torch.arange(ids.shape[1], device=ids.device)
        _, positions, mask, _, embeds, labels = model.prepare_inputs_labels_for_multimodal(
            ids, positions, attention_mask, None, labels, images
        )
        # BunnyMiniCPM's forward does this to what the merge returns
        return Merged(embeds * getattr(model.config, "scale_emb", 1), labels, mask, positions)


def _family_name(config: Mapping[str, Any]) -> str:
    kind = str(config.get("model_type"))
    return BACKBONES.get(kind, kind)


def _tower_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The vision tower's tensors among the weights of a checkpoint; full tuning saves them, a backbone has none."""
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.tensor(name) for name in checkpoint if is_vision(name)}
