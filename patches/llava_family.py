"""What LLaVA and Bunny, which grew out of it, have in common: flags, names of parts, symbols that the hooks need."""

from __future__ import annotations

import functools
import importlib.util
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

from llava_region.decoder import Parts
from llava_region.errors import LlavaRegionError
from llava_region.patches.seams import import_upstream, require, require_fields
from llava_region.patches.upstream import Lora, Recipe, Upstream

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

FLAGS = {
    "model": "--model_name_or_path", "cache_dir": "--cache_dir", "data": "--data_path", "images": "--image_folder",
    "tower": "--vision_tower", "projector": "--pretrain_mm_mlp_adapter", "lora": "--lora_enable", "bits": "--bits",
    "double_quantised": "--double_quant", "trains_projector": "--freeze_mm_mlp_adapter", "projector_rate": "--mm_projector_lr",
    "trains_tower": "--unfreeze_vision_tower", "max_length": "--model_max_length",
}  # fmt: skip
MERGE = "prepare_inputs_labels_for_multimodal"  # the models' method that puts image features in; labels are the last it returns
TRAINING_FIELDS = (
    "lora_enable", "lora_r", "lora_alpha", "lora_bias", "bits", "mm_projector_lr", "model_max_length", "freeze_mm_mlp_adapter",
)  # fmt: skip


class LLaVAFamily(Upstream):
    """An upstream with LLaVA's command line. A subclass adds `model_fields`, the model flags that it needs itself."""

    parts = Parts(
        # Llama, Mistral, Phi, Phi-3, Qwen2, StableLM, MiniCPM; MPT
        layers=("model.layers", "transformer.blocks"),
        projector=("mm_projector", "vision_resampler", "image_newline"),
        vision=("vision_tower",),
        embeddings=("embed_tokens", "wte"),
        head=("norm", "final_layernorm", "norm_f", "lm_head"),
        config_prefixes=("mm_",),
    )
    save: ClassVar[str] = "safe_save_model_for_hf_trainer"
    model_fields: ClassVar[tuple[str, ...]]
    train_parameters: ClassVar[tuple[str, ...]] = ()  # of train() itself

    def owns(self, config: Mapping[str, Any]) -> bool:
        return str(config.get("model_type") or "").startswith(self.name)

    def train_module(self) -> ModuleType:
        module = import_upstream(self.train_module_name, self.title, self.how_to_get)
        require_fields(module, "ModelArguments", self.tested, self.model_fields)
        require_fields(module, "DataArguments", self.tested, ("data_path", "image_folder"))
        require_fields(module, "TrainingArguments", self.tested, TRAINING_FIELDS)
        require(module, "train", self.tested, self.train_parameters or None)
        require(module, self.linear_names, self.tested, ("model",))
        require(module, self.save, self.tested, ("trainer", "output_dir"))
        require(module, "get_peft_state_non_lora_maybe_zero_3", self.tested, ("named_params", "require_grad_only"))
        require(require(module, "conversation_lib", self.tested), "conv_templates", self.tested)
        trainer = require(module, self.trainer, self.tested)
        for method in ("create_optimizer", "_save_checkpoint", "_load_from_checkpoint", "_load_rng_state", "training_step"):
            require(trainer, method, self.tested)
        return module

    def recipe(self, args: Any) -> Recipe:
        def flag(name: str, default: Any = None) -> Any:
            return getattr(args, name, default)

        lora = None
        if flag("lora_enable"):
            lora = Lora(args.lora_r, args.lora_alpha, flag("lora_dropout", 0.0), args.lora_bias)
        return Recipe(
            model=flag("model_name_or_path"), cache_dir=flag("cache_dir"), data=flag("data_path"), images=flag("image_folder"),
            tower=flag("vision_tower"), projector=flag("pretrain_mm_mlp_adapter"), lora=lora, bits=flag("bits", 16),
            double_quantised=bool(flag("double_quant", True)), trains_projector=not flag("freeze_mm_mlp_adapter"),
            projector_rate=flag("mm_projector_lr"), trains_tower=bool(flag("unfreeze_vision_tower")),
            max_length=flag("model_max_length", 2048), flags=FLAGS,
        )  # fmt: skip

    def check(self, args: Namespace, config: Mapping[str, Any]) -> None:
        if args.tune_mm_mlp_adapter:
            raise LlavaRegionError("--tune_mm_mlp_adapter True trains the projector alone; leave it out, or --tune_layers")
        if args.freeze_backbone and not args.lora_enable:
            raise LlavaRegionError(
                "--freeze_backbone True freezes the whole language model; leave it out, --tune_layers freezes what is outside the region"
            )
        if args.lora_enable and args.lora_bias != "none":
            raise LlavaRegionError(f"--lora_bias {args.lora_bias} would train biases outside the region; allowed: none")
        if args.bits not in (4, 8, 16):
            raise LlavaRegionError(f"--bits {args.bits} is unknown; allowed: 4, 8 or 16")
        if args.bits != 16 and not args.lora_enable:
            raise LlavaRegionError(
                f"--bits {args.bits} quantises the weights, which then cannot be tuned; add --lora_enable True, or use --bits 16"
            )
        if args.bits != 16 and importlib.util.find_spec("bitsandbytes") is None:
            raise LlavaRegionError(f"--bits {args.bits} needs bitsandbytes; install it with 'pip install bitsandbytes'")
        if args.lora_enable and importlib.util.find_spec("deepspeed") is None:
            raise LlavaRegionError("saving a LoRA run imports deepspeed, even if it is not used; install it with 'pip install deepspeed'")

    def trained_besides_lora(self, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, torch.Tensor]:
        return self.train_module().get_peft_state_non_lora_maybe_zero_3(named_parameters)

    def image_tokens(self, inputs: Mapping[str, Any]) -> torch.Tensor | None:
        ids = inputs.get("input_ids")
        return None if ids is None else ids < 0  # IMAGE_TOKEN_INDEX is -200; no token of a vocabulary is negative

    def features_per_image(self, model: nn.Module) -> int:
        return features_per_image(model) if hasattr(model, "get_vision_tower") else 1

    def intercept_labels(
        self, model: nn.Module, receive: Callable[[torch.Tensor | None], torch.Tensor | None]
    ) -> Callable[[], None] | None:
        merge = getattr(model, MERGE, None)
        if merge is None:
            return None

        @functools.wraps(merge)
        def merged(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
            *prepared, labels = merge(*args, **kwargs)
            return (*prepared, receive(labels))

        own = vars(model).get(MERGE)  # None where it is the class's
        setattr(model, MERGE, merged)
        return functools.partial(delattr, model, MERGE) if own is None else functools.partial(setattr, model, MERGE, own)

    def checkout_of(self, script: Path) -> Path | None:
        """Of `ROOT/llava/train/train_mem.py`, for example: ROOT."""
        parents = script.resolve().parents
        return parents[2] if len(parents) > 2 and (parents[0].name, parents[1].name) == ("train", self.name) else None


def features_per_image(model: Any) -> int:
    """Patches of the vision tower, each of which becomes a token; 1 for a model that has no tower yet."""
    return getattr(model.get_vision_tower(), "num_patches", 1)


def settings_without_tower(config: Mapping[str, Any]) -> dict[str, Any]:
    """A model's config as arguments of a config class: without the vision tower, which would be loaded from disk."""
    return {key: value for key, value in config.items() if key not in ("mm_vision_tower", "model_type", "architectures")}


def vision_model(tower: str, cache_dir: str | None = None) -> PreTrainedModel | None:
    """A vision tower's transformers model on the default device, from its config alone; None where it is not on this machine."""
    from transformers import AutoConfig, AutoModel

    try:
        config = AutoConfig.from_pretrained(tower, cache_dir=cache_dir)
    except (OSError, ValueError):
        return None
    config = getattr(config, "vision_config", config)
    return AutoModel.from_config(config)
