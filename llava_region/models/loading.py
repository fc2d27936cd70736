"""Load a finished model of any upstream and put questions and images to it, the same way for all.

The upstream's own classes, templates and image handling are used (its `ModelSide`); here is what all share: LoRA runs on
their base, batches with the true positions of the image tokens, greedy generation.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils.rnn import pad_sequence

from llava_region import upstreams
from llava_region.checkpoints.model_folder import locate
from llava_region.checkpoints.tensors import Checkpoint
from llava_region.decoder import find_decoder_layers
from llava_region.errors import LlavaRegionError
from llava_region.files import read_json
from llava_region.models.assemble import load_multimodal, load_text, quiet_errors
from llava_region.region import num_layers_of

if TYPE_CHECKING:
    from llava_region.upstreams import ModelSide

IGNORE = -100
DTYPES = {
    "float32": torch.float32, "fp32": torch.float32, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
    "float16": torch.float16, "fp16": torch.float16,
}  # fmt: skip


@dataclass
class Embedded:
    """A batch ready for the language model; L is the longest sample's length with its image features in place.

    Attributes:
        inputs_embeds: (B, L, H), zero on padding.
        attention_mask: (B, L) bool, False on padding.
        position_ids: (B, L), 0-based from each sample's first token.
        labels: (B, L), -100 on images and padding, or None if none were given.
        image_mask: (B, L) bool, True exactly where an image's features stand.
    """

    inputs_embeds: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor | None
    image_mask: torch.Tensor


@dataclass
class LoadedModel:
    """A model in eval mode with what it takes to talk to it. `upstream` is `llava`, `bunny`, or None for a plain LLM (text only)."""

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

    def input_ids(self, prompt: str) -> torch.LongTensor:
        """Token ids (T,) of a prompt, negative for each `<image>`."""
        return self.side.input_ids(prompt, self.tokenizer)

    def pixel_values(self, image) -> torch.Tensor:
        """A PIL image as the vision tower takes it: (3, H, W), padded to a square where the config says `pad`.

        Raises:
            LlavaRegionError: a plain LLM sees no images.
        """
        if self.image_processor is None:
            raise LlavaRegionError(f"{self.folder} is a language model without a vision tower; give it text only")
        return self.side.pixel_values(image.convert("RGB"), self.image_processor, self.model.config)

    def example(self, record: dict) -> tuple[torch.LongTensor, torch.LongTensor]:
        """A LLaVA-format record through the training template: ids (T,) and labels (T,), -100 but on answers and their EOS.

        Where the upstream's own preprocessing gives a record up (it prints a tokenisation mismatch), every label is -100.
        """
        return self.side.example(record, self.tokenizer, self.template, self.model.config)

    def embed(self, input_ids, images, labels=None, padding_side: str = "right") -> Embedded:
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
        index = [torch.arange(len(ids)) for ids in input_ids]
        if any(map(len, images)):
            embeds, index, mask, positions = self._embed_images(input_ids, images, index, padding_side)
        else:
            embeds, index, mask, positions = self._embed_text(input_ids, index, padding_side)
        image_mask = mask & (index == IGNORE)
        if labels is not None:
            rows = [
                torch.where(i == IGNORE, i, label.to(i.device)[i.clamp(min=0)]) for i, label in zip(index, labels, strict=True)
            ]  # fmt: skip
            labels = torch.stack(rows)
        return Embedded(embeds, mask, positions, labels, image_mask)

    def _embed_images(self, input_ids, images, index, padding_side: str):
        ids = pad_sequence(input_ids, batch_first=True).to(self.device)
        mask = pad_sequence([torch.ones_like(i, dtype=torch.bool) for i in index], batch_first=True).to(self.device)
        index = pad_sequence(index, batch_first=True, padding_value=IGNORE).to(self.device)
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

    def _embed_text(self, input_ids, index, padding_side: str):
        """Without images the upstreams embed the ids and nothing else; done here, which spares them a blank image a sample."""
        length = max(map(len, input_ids))
        length = length if self.max_length is None else min(length, self.max_length)
        shape = (len(input_ids), length)
        ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
        positions, indices = torch.zeros_like(ids), torch.full(shape, IGNORE)
        for i, (sample, own) in enumerate(zip(input_ids, index, strict=True)):
            n = min(len(sample), length)
            where = slice(0, n) if padding_side == "right" else slice(length - n, length)
            ids[i, where], mask[i, where], positions[i, where], indices[i, where] = sample[:n], True, torch.arange(n), own[:n]
        ids, mask, positions, indices = (x.to(self.device) for x in (ids, mask, positions, indices))
        embeds = self.side.embed_text(self.model, ids)
        return embeds * mask.unsqueeze(-1), indices, mask, positions

    @torch.inference_mode()
    def generate(self, input_ids, images, max_new_tokens: int) -> list[str]:
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


def _eos_token_ids(model, tokenizer) -> list[int]:
    for eos in (getattr(model.generation_config, "eos_token_id", None), model.config.eos_token_id, tokenizer.eos_token_id):
        if eos is not None:
            return list(eos) if isinstance(eos, (list, tuple)) else [eos]
    raise LlavaRegionError("the model names no EOS token, so its answers would never end; set 'eos_token_id' in its config.json")


def upstream_of(folder: str | Path) -> str | None:
    """Which upstream a model or LoRA run belongs to: `llava`, `bunny`, or None for a plain language model.

    Raises:
        LlavaRegionError: the folder is not there or is no model.
    """
    found = upstreams.of_config(read_json(settings_folder(folder) / "config.json"))
    return found.name if found else None


def settings_folder(folder: str | Path) -> Path:
    """Where a model's `config.json` lies: its own folder, or for a `checkpoint-N` that lacks one the run's.

    Raises:
        LlavaRegionError: neither holds one.
    """
    folder = Path(folder)
    for place in (folder, folder.resolve().parent) if folder.name.startswith("checkpoint-") else (folder,):
        if (place / "config.json").is_file():
            return place
    raise LlavaRegionError(f"{folder} holds no config.json; give the folder of a model or of a LoRA run")


def load(
    folder: str | Path, base: str | Path | None = None, *, device=None, dtype=None, template: str | None = None,
    attn_implementation: str | None = None,
) -> LoadedModel:  # fmt: skip
    """Load a LLaVA or Bunny model, a LoRA run of one on its base (merged in memory), or a plain language model (text only).

    Args:
        folder: a folder, or a Hugging Face name in the local cache.
        base: what a LoRA run (or a pretrained projector) was trained on; for nothing else.
        device: default CUDA if there is any, else CPU.
        dtype: torch dtype or its name; default fp32 on CPU, else what `config.json` says, or bf16.
        template: conversation template; default the model's own.

    Raises:
        LlavaRegionError: not a model, an adapter without its base, an unknown template, a device that is not there, weights
            missing or left over.
    """
    folder, base = locate(folder), locate(base) if base else None
    upstream = upstream_of(folder)
    check_base(folder, base)
    settings = settings_folder(folder)
    config = read_json(settings / "config.json")
    side = _side(upstream, template)
    template = template or side.default_template(config)
    if template not in side.templates():
        raise LlavaRegionError(f"unknown template '{template}'; allowed: {', '.join(side.templates())}")
    if upstream:
        side.check(config, settings)
    Checkpoint(base or folder)  # damaged files, missing shards, and .bin files with code in them end here
    device = _device(device)
    options = {
        "dtype": _dtype(dtype, device, config), "device_map": None if device.type == "cpu" else {"": device},
        "attn_implementation": attn_implementation,
    }  # fmt: skip
    with quiet_errors(folder):
        if upstream:
            model, tokenizer, processor = load_multimodal(side, folder, base, settings, options)
        else:
            model, tokenizer, processor = *load_text(side, folder, config, options), None
    if getattr(model.config, "tokenizer_model_max_length", None):
        tokenizer.model_max_length = model.config.tokenizer_model_max_length
    model.requires_grad_(False).to(device).eval()
    return LoadedModel(model, tokenizer, processor, upstream, template, len(find_decoder_layers(model).modules), folder, side)


def check_base(folder: Path, base: Path | None) -> None:
    """Refuse an adapter without its base, a base for a model that is whole, and a base of another depth.

    Raises:
        LlavaRegionError: see above.
    """
    adapter = (folder / "adapter_config.json").is_file()
    whole = any(any(folder.glob(f"{stem}*.{kind}")) for stem, kind in (("model", "safetensors"), ("pytorch_model", "bin")))
    projector = (folder / "mm_projector.bin").is_file() and not whole
    if adapter and base is None:
        raise LlavaRegionError(f"{folder} is a LoRA run, an adapter only; give the model it was trained on with --base")
    if base is None and not whole:
        raise LlavaRegionError(f"{folder} holds no weights (model*.safetensors or pytorch_model*.bin); give the folder of a finished model")
    if base is None:
        return
    if not adapter and not projector:
        raise LlavaRegionError(f"{folder} is no LoRA run (it has no adapter_config.json), so it takes no base; leave out --base")
    layers, own = num_layers_of(base), num_layers_of(settings_folder(folder))
    if layers != own:
        raise LlavaRegionError(f"the base {base} has {layers} decoder layers, {folder} was trained on {own}; give the base of that run")
    if adapter and not (folder / "non_lora_trainables.bin").is_file():
        raise LlavaRegionError(f"{folder} holds no non_lora_trainables.bin (the trained projector); give a checkpoint that has it")


def _side(upstream: str | None, template: str | None) -> ModelSide:
    """The upstream's model side; for a plain LLM that of an installed upstream that has the template."""
    wanted = [upstreams.get(upstream)] if upstream else upstreams.every()
    found = [one.model_side() for one in wanted if one.installed()]
    if not found:
        title, titles = wanted[0].title, upstreams.titles()
        what = f"a {title} model needs {title}" if upstream else f"conversation templates come from {titles}, one of which has to be"
        raise LlavaRegionError(f"{what} installed in this environment; see the README's section on installing")
    return next((side for side in found if template in side.templates()), found[0])


def _device(asked) -> torch.device:
    try:
        device = torch.device(asked or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as e:
        raise LlavaRegionError(f"unknown device '{asked}'; give cpu, cuda, or one GPU such as cuda:1") from e
    gpus = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise LlavaRegionError(f"there is no device '{asked}': torch sees {gpus} GPUs; give another, or cpu")
    return device


def _dtype(dtype, device: torch.device, config: dict) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    name = dtype or ("float32" if device.type == "cpu" else config.get("torch_dtype") or "bfloat16")
    if name not in DTYPES:
        raise LlavaRegionError(f"unknown dtype '{name}'; allowed: {', '.join(DTYPES)}")
    return DTYPES[name]
