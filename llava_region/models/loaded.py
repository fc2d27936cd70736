"""A loaded model of any upstream, and what it is asked: prompts, batches with images in place, greedy answers."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llava_region.data.labels import IGNORE_INDEX
from llava_region.errors import LlavaRegionError

if TYPE_CHECKING:
    from PIL.Image import Image

    from llava_region.upstreams import ModelSide


@dataclass
class Embedded:
    """A batch ready for the language model; L is the longest sample's length with its image features in place.

    Attributes:
        inputs_embeds: (B, L, H), zero on padding.
        attention_mask: (B, L) bool, False on padding.
        position_ids: (B, L), 0-based from each sample's first token.
        labels: (B, L), -100 on images and padding, or None if none were given.
        image_mask: (B, L) bool, True exactly where an image's features are.
    """

    inputs_embeds: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    labels: Tensor | None
    image_mask: Tensor


@dataclass
class LoadedModel:
    """A model in eval mode with what it takes to talk to it.

    `upstream` is `llava`, `bunny`, or None for a plain LLM (text only)."""

    model: Any
    tokenizer: Any
    image_processor: Any
    upstream: str | None
    template: str
    num_layers: int
    folder: Path
    side: ModelSide

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    @property
    def max_length(self) -> int | None:
        """Tokens, image features included, after which the upstream cuts a sequence; None: never."""
        return getattr(self.model.config, "tokenizer_model_max_length", None)

    @property
    def image_tokens(self) -> int:
        """Tokens that an image becomes; 0 for a plain language model."""
        return 0 if self.image_processor is None else self.side.features_per_image(self.model)

    def prompt(self, question: str, images: int = 0) -> str:
        """The question after `images` image placeholders in the model's conversation template, with an empty answer."""
        return self.side.prompt(self.template, question, images, self.model.config)

    def input_ids(self, prompt: str) -> Tensor:
        """Token ids (T,) of a prompt, negative for each `<image>`."""
        return self.side.input_ids(prompt, self.tokenizer)

    def pixel_values(self, image: Image, task: str | None = None) -> Tensor:
        """A PIL image as the vision tower takes it: (3, H, W), padded to a square where the config says `pad`.

        Args:
            task: the benchmark that it belongs to, for which the upstream's own script may not pad it.

        Raises:
            LlavaRegionError: a plain LLM sees no images.
        """
        if self.image_processor is None:
            raise LlavaRegionError(f"{self.folder} is a language model without a vision tower; give it text only")
        config = self.model.config
        if task in self.side.unpadded_tasks:
            config = copy.copy(config)
            config.image_aspect_ratio = None
        return self.side.pixel_values(image.convert("RGB"), self.image_processor, config)

    def example(self, record: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """A LLaVA-format record through the training template: ids (T,) and labels (T,), -100 but on answers and their EOS.

        Where the upstream's own preprocessing gives a record up (it prints a tokenisation mismatch), every label is -100.
        """
        return self.side.example(record, self.tokenizer, self.template, self.model.config)

    def embed(
        self, input_ids: list[Tensor], images: Sequence[Sequence[Tensor]], labels: Sequence[Tensor] | None = None,
        padding_side: str = "right",
    ) -> Embedded:  # fmt: skip
        """Put image features in the place of their placeholders and pad to a batch.

        Args:
            input_ids: a list of (T,) with negative placeholders.
            images: for each sample, its images in order, each (3, H, W).
            labels: a list of (T,), or None.

        Raises:
            LlavaRegionError: a sample has another number of images than placeholders.
        """
        for i, (ids, pictures) in enumerate(zip(input_ids, images, strict=True)):
            if int((ids < 0).sum()) != len(pictures):
                raise LlavaRegionError(f"sample {i} has {int((ids < 0).sum())} image placeholders and {len(pictures)} images")
        # Each token's label is its own index while the upstream merges, cuts and pads: what comes back as -100 is image or padding.
        own = [torch.arange(len(ids)) for ids in input_ids]
        if any(map(len, images)):
            embeds, index, mask, positions = self._embed_images(input_ids, images, own, padding_side)
        else:
            embeds, index, mask, positions = self._embed_text(input_ids, own, padding_side)
        image_mask = mask & (index == IGNORE_INDEX)
        if labels is not None:
            rows = [
                torch.where(i == IGNORE_INDEX, i, label.to(i.device)[i.clamp(min=0)]) for i, label in zip(index, labels, strict=True)
            ]  # fmt: skip
            return Embedded(embeds, mask, positions, torch.stack(rows), image_mask)
        return Embedded(embeds, mask, positions, None, image_mask)

    def _embed_images(
        self, input_ids: list[Tensor], images: Sequence[Sequence[Tensor]], own: list[Tensor], padding_side: str
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Embeddings (B, L, H), index, mask and positions (B, L), merged by the upstream; -100 in index where an image is."""
        ids = pad_sequence(input_ids, batch_first=True).to(self.device)
        mask = pad_sequence([torch.ones_like(i, dtype=torch.bool) for i in own], batch_first=True).to(self.device)
        index = pad_sequence(own, batch_first=True, padding_value=IGNORE_INDEX).to(self.device)
        blank = torch.zeros_like(next(picture for pictures in images for picture in pictures))
        pixels = torch.stack([picture for pictures in images for picture in (pictures or [blank])])
        pixels = pixels.to(device=self.device, dtype=self.model.dtype)
        config = self.model.config
        before = getattr(config, "tokenizer_padding_side", "right")
        config.tokenizer_padding_side = padding_side
        try:
            return self.side.embed(self.model, ids, index, mask, pixels)
        finally:
            config.tokenizer_padding_side = before

    def _embed_text(self, input_ids: list[Tensor], own: list[Tensor], padding_side: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Without images the upstreams embed the ids and nothing else; done here, which spares them a blank image per sample."""
        length = max(map(len, input_ids))
        length = length if self.max_length is None else min(length, self.max_length)
        shape = (len(input_ids), length)
        ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
        positions, indices = torch.zeros_like(ids), torch.full(shape, IGNORE_INDEX)
        for i, (sample, index) in enumerate(zip(input_ids, own, strict=True)):
            n = min(len(sample), length)
            where = slice(0, n) if padding_side == "right" else slice(length - n, length)
            ids[i, where], mask[i, where], positions[i, where], indices[i, where] = sample[:n], True, torch.arange(n), index[:n]
        ids, mask, positions, indices = (x.to(self.device) for x in (ids, mask, positions, indices))
        embeds = self.side.embed_text(self.model, ids)
        return embeds * mask.unsqueeze(-1), indices, mask, positions

    @torch.inference_mode()
    def generate(self, input_ids: list[Tensor], images: Sequence[Sequence[Tensor]], max_new_tokens: int) -> list[str]:
        """Greedy answers to a batch of prompts (see `embed`), without special tokens, cut at the template's stop text, stripped.

        Only the EOS tokens are taken from the model's generation config: no sampling, no repetition penalty.
        """
        from transformers import GenerationConfig, GenerationMixin

        batch = self.embed(input_ids, images, padding_side="left")
        eos = _eos_token_ids(self.model, self.tokenizer)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else eos[0]
        config = GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=eos, pad_token_id=pad)
        # transformers' generate, as LLaVA's own refuses embeddings; without the empty ids some versions put a BOS token before the answer
        none = torch.zeros((len(input_ids), 0), dtype=torch.long, device=self.device)
        out = GenerationMixin.generate(
            self.model, none, inputs_embeds=batch.inputs_embeds, attention_mask=batch.attention_mask.long(), generation_config=config
        )
        stop = self.side.stop_text(self.template)
        answers = self.tokenizer.batch_decode(out, skip_special_tokens=True)
        return [(answer.split(stop)[0] if stop.strip() else answer).strip() for answer in answers]


def _eos_token_ids(model: Any, tokenizer: Any) -> list[int]:
    for eos in (getattr(model.generation_config, "eos_token_id", None), model.config.eos_token_id, tokenizer.eos_token_id):
        if eos is not None:
            return list(eos) if isinstance(eos, (list, tuple)) else [eos]
    raise LlavaRegionError("the model names no EOS token, so its answers would never end; set 'eos_token_id' in its config.json")
