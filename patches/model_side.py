"""How an upstream's finished models are loaded and talked to (`ModelSide`), with the half that LLaVA and Bunny share.

Everything goes through the upstream's own classes, templates, tokenisation and image handling. What is added here is what
its `load_pretrained_model` is told by its caller, decides by the folder's name, or fixes at fp16.
"""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from transformers import PretrainedConfig

from llava_region.errors import LlavaRegionError

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Family(NamedTuple):
    """One model type of `config.json`: the class that runs it, and the conversation template that it is trained with."""

    model_class: Any
    template: str


class Merged(NamedTuple):
    """A batch with image features in place: embeddings (B, L, H), labels (B, L), mask (B, L) bool, position ids (B, L)."""

    embeds: torch.Tensor
    labels: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor


class ModelSide(ABC):
    """An upstream's models.

    Attributes:
        title: the upstream's name, for people.
        families: by model type.
        conversation: the upstream's module with `conv_templates`.
        tower_keys: where a config names the vision tower.
        unpadded_tasks: benchmarks whose images the upstream's own script for them does not pad, whatever the config says.
    """

    title: ClassVar[str]
    families: ClassVar[Mapping[str, Family]]
    conversation: ClassVar[Any]
    tower_keys: ClassVar[tuple[str, ...]] = ("mm_vision_tower",)
    unpadded_tasks: ClassVar[tuple[str, ...]] = ()

    # -- loading

    def check(self, config: Mapping[str, Any], folder: str | Path) -> None:
        """Refuse, from `config.json` alone, what the upstream at the tested commit cannot run.

        Raises:
            LlavaRegionError: an unknown model type, or a vision tower that is not there.
        """
        kind = config.get("model_type")
        if kind not in self.families:
            raise LlavaRegionError(f"{folder} has model type '{kind}', which {self.title} cannot run; allowed: {', '.join(self.families)}")
        tower = next((config[key] for key in self.tower_keys if config.get(key)), None)
        if not tower:
            raise LlavaRegionError(
                f"the config.json of {folder} names no 'mm_vision_tower'; give a {self.title} checkpoint, or a backbone as it came"
            )
        if os.path.isabs(tower) and not os.path.exists(tower):
            raise LlavaRegionError(f"the vision tower {tower} that {folder}/config.json names is not there; fix 'mm_vision_tower' in it")

    def build(
        self, weights: Path, settings: Path, *, dtype: torch.dtype, device_map: dict[str, Any] | None, attn_implementation: str | None
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, Any]]:
        """Build the model of the config in folder `settings` with the weights of folder `weights`, its vision tower not yet loaded.

        Returns:
            (model, tokenizer, info): info as transformers' `output_loading_info` gives it.
        """
        raw = PretrainedConfig.get_config_dict(settings)[0]
        model_class = self.families[raw["model_type"]].model_class
        config = model_class.config_class.from_pretrained(settings)
        config.__dict__.pop("quantization_config", None)  # of a QLoRA run, whose adapter goes onto the base in its own type
        self.prepare_config(config)
        if attn_implementation:  # as an argument next to a config, transformers 4.37 to 4.40 ignores "eager"
            config._attn_implementation = attn_implementation
        model, info = model_class.from_pretrained(
            weights, config=config, torch_dtype=dtype, device_map=device_map, low_cpu_mem_usage=True, output_loading_info=True
        )
        return model, self.load_tokenizer(weights, raw), info

    def prepare_config(self, config: PretrainedConfig) -> None:  # noqa: B027 - most upstreams need none
        """Change what the upstream would act on while the model is built, other than as asked for here."""

    @abstractmethod
    def text_model_class(self, config: Mapping[str, Any]) -> type:
        """What loads a backbone of this config."""

    @abstractmethod
    def load_tokenizer(self, folder: Path, config: Mapping[str, Any]) -> PreTrainedTokenizerBase:
        """The tokenizer as the upstream loads it for training, able to pad."""

    @abstractmethod
    def attach_vision(self, model: Any, tokenizer: PreTrainedTokenizerBase, weights: Path, extra: Mapping[str, torch.Tensor]) -> Any:
        """Load the vision tower, in the model's dtype and on its device; where it was trained, with the weights of that training.

        Args:
            weights: folder of the model, or of a LoRA run's base; a tower that it holds goes before the one the config names.
            extra: what a run trained besides its adapter, by its name in the bare model.

        Returns:
            The image processor.

        Raises:
            LlavaRegionError: the trained tower is not there, or is not that of the config.
        """

    # -- prompts

    def templates(self) -> list[str]:
        """Names of the conversation templates."""
        return list(self.conversation.conv_templates)

    @abstractmethod
    def default_template(self, config: Mapping[str, Any]) -> str:
        """The template that a model of this config is trained with; for a backbone that of the model made of it."""

    def prompt(self, template: str, question: str, images: int, config: PretrainedConfig) -> str:
        """The question after `images` image placeholders, in the conversation template, with an empty answer."""
        turns = self.conversation.conv_templates[template].copy()
        turns.append_message(turns.roles[0], f"{self.image_text(config)}\n" * images + question)
        turns.append_message(turns.roles[1], None)
        return turns.get_prompt()

    @abstractmethod
    def image_text(self, config: PretrainedConfig) -> str:
        """What stands in a prompt for one image."""

    def stop_text(self, template: str) -> str:
        """The text that ends an answer in this template, besides the EOS token; may be empty."""
        turns = self.conversation.conv_templates[template]
        styles = self.conversation.SeparatorStyle
        two = turns.sep_style in (styles.TWO, getattr(styles, "LLAMA_2", None))
        return (turns.sep2 if two else turns.sep) or ""

    @contextlib.contextmanager
    def default_conversation(self, template: str) -> Iterator[None]:
        """Have the upstream's training preprocessing use this template within the block."""
        before = self.conversation.default_conversation
        self.conversation.default_conversation = self.conversation.conv_templates[template]
        try:
            yield
        finally:
            self.conversation.default_conversation = before

    # -- tensors

    @abstractmethod
    def input_ids(self, text: str, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
        """Token ids (T,) of a prompt, negative where it says `<image>`."""

    @abstractmethod
    def pixel_values(self, image: Image, processor: Any, config: PretrainedConfig) -> torch.Tensor:
        """One RGB image as the vision tower takes it, (3, H, W)."""

    @abstractmethod
    def example(
        self, record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, template: str, config: PretrainedConfig
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One training record through the upstream's own preprocessing: ids (T,) and labels (T,), -100 but on answers and EOS."""

    @abstractmethod
    def features_per_image(self, model: Any) -> int:
        """Tokens that one image becomes in the language model."""

    def embed_text(self, model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
        """Embeddings (..., H) of text tokens as the first decoder layer takes them."""
        return model.get_input_embeddings()(ids)

    @abstractmethod
    def embed(self, model: Any, ids: torch.Tensor, labels: torch.Tensor, attention_mask: torch.Tensor, images: torch.Tensor) -> Merged:
        """The upstream's own merge of text and image features.

        Args:
            ids: (B, T) with negative placeholders, which the upstream may overwrite; labels: (B, T); attention_mask: (B, T)
                bool, False on padding.
            images: (N, 3, H, W), one per image in the order of the placeholders, and one (unused) for each sample without any.

        Returns:
            labels are -100 on images and padding.
        """
