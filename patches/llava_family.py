"""What LLaVA and Bunny, which grew out of it, have in common: flags, names of parts, symbols that the hooks need."""

from __future__ import annotations

import functools
import importlib.util
import os
from abc import abstractmethod
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

from llava_region.checkpoints.model_source import width_in
from llava_region.data.records import speakers_problem
from llava_region.decoder import Parts
from llava_region.errors import LlavaRegionError
from llava_region.patches.miniature import shrunk, write_backbone, write_tower
from llava_region.patches.projectors import projector_shapes
from llava_region.patches.seams import import_upstream, require, require_fields
from llava_region.patches.upstream import Lora, Recipe, Upstream
from llava_region.patches.vocabulary import load_tokenizer
from llava_region.run_files import CONFIG_FILE
from llava_region.training.flag_values import AT_LEAST_ONE, BELOW_ONE, NOT_NEGATIVE, POSITIVE, Values, check_values, words
from llava_region.training.model_files import check_backbone, folder_of
from llava_region.training.trainer_flags import computes_fp16_on_cpu, trains_on_cpu
from llava_region.training.vision_files import TowerKind, check_projector

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FLAGS = {
    "model": "--model_name_or_path", "cache_dir": "--cache_dir", "data": "--data_path", "images": "--image_folder",
    "tower": "--vision_tower", "projector": "--pretrain_mm_mlp_adapter", "lora": "--lora_enable", "bits": "--bits",
    "double_quantised": "--double_quant", "trains_projector": "--freeze_mm_mlp_adapter", "projector_rate": "--mm_projector_lr",
    "trains_tower": "--unfreeze_vision_tower", "max_length": "--model_max_length", "template": "--version",
}  # fmt: skip
IMAGE = "<image>"  # where an image goes in a text
MERGE = "prepare_inputs_labels_for_multimodal"  # the models' method that puts image features in; labels are the last it returns
TRAINING_FIELDS = (
    "lora_enable", "lora_r", "lora_alpha", "lora_bias", "bits", "mm_projector_lr", "model_max_length", "freeze_mm_mlp_adapter",
)  # fmt: skip
# what the flags may be, and those of LoRA where it is asked for
VALUES = {
    "model_max_length": AT_LEAST_ONE,
    "mm_projector_lr": NOT_NEGATIVE,
    "image_aspect_ratio": words(
        ("square", "pad"), "means nothing to training, which would take square, while the result's config.json would say otherwise"
    ),
}
LORA_VALUES = {"lora_r": AT_LEAST_ONE, "lora_alpha": POSITIVE, "lora_dropout": BELOW_ONE}
QUANT_TYPES = words(("nf4", "fp4"))


class LLaVAFamily(Upstream):
    """An upstream with LLaVA's command line. A subclass adds `model_fields`, the model flags that it needs itself, and
    `values`, those with a closed set of values."""

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
    data_module_name: ClassVar[str]  # the module with its dataset
    model_fields: ClassVar[tuple[str, ...]]
    values: ClassVar[Mapping[str, Values]] = {}
    train_parameters: ClassVar[tuple[str, ...]] = ()  # of train() itself
    default_projector: ClassVar[str]  # of a config that names no type

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
        self.data_module()
        return module

    def data_module(self) -> ModuleType:
        """The module that makes ids and labels of records, checked for what the preflight's sample calls.

        Raises:
            UnsupportedUpstream: a symbol is missing or changed.
        """
        data = import_upstream(self.data_module_name, self.title, self.how_to_get)
        require(data, "preprocess_multimodal", self.tested, ("sources", "data_args"))
        require(data, "preprocess", self.tested, ("sources", "tokenizer", "has_image"))
        return data

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
        check_values(args, {**VALUES, **self.values})
        _check_unusable(args)
        _check_tower_on_cpu(args)
        if args.tune_mm_mlp_adapter:
            raise LlavaRegionError("--tune_mm_mlp_adapter True trains the projector alone; leave it out, or --tune_layers")
        if args.freeze_backbone and not args.lora_enable:
            raise LlavaRegionError(
                "--freeze_backbone True freezes the whole language model; leave it out, --tune_layers freezes what is outside the region"
            )
        if args.lora_enable:
            check_values(args, LORA_VALUES)
        if args.lora_enable and args.lora_bias != "none":
            raise LlavaRegionError(f"--lora_bias {args.lora_bias} would train biases outside the region; allowed: none")
        if args.bits not in (4, 8, 16):
            raise LlavaRegionError(f"--bits {args.bits} is unknown; allowed: 4, 8 or 16")
        if args.bits != 16 and not args.lora_enable:
            raise LlavaRegionError(
                f"--bits {args.bits} quantises the weights, which then cannot be tuned; add --lora_enable True, or use --bits 16"
            )
        if args.bits == 4:
            check_values(args, {"quant_type": QUANT_TYPES})
        if args.bits != 16 and importlib.util.find_spec("bitsandbytes") is None:
            raise LlavaRegionError(f"--bits {args.bits} needs bitsandbytes; install it with 'pip install bitsandbytes'")
        if args.lora_enable and importlib.util.find_spec("deepspeed") is None:
            raise LlavaRegionError("saving a LoRA run imports deepspeed, even if it is not used; install it with 'pip install deepspeed'")

    def record_check(self, args: Namespace) -> Callable[[Mapping[str, Any]], str | None]:
        """Records without a word, which the sampler asserts; what the template asserts of its turns."""
        template = self.template(args)
        grouped = getattr(args, "group_by_modality_length", False)

        def problem(record: Mapping[str, Any]) -> str | None:
            turns = record["conversations"]
            if grouped and all(not turn["value"] or turn["value"].isspace() for turn in turns):
                return "has no word in any turn, which --group_by_modality_length True does not take; remove it, or leave the flag out"
            return template_problem(template, args.version, turns, "image" in record)

        return problem

    def vision_tower(self, config: Mapping[str, Any]) -> str | None:
        return config.get("mm_vision_tower")

    def picture_problem(self, args: Namespace, width: int, height: int) -> str | None:
        """transformers' image processors take a height of 1 or 3 for the colour channels: an error, or a garbled picture."""
        side = max(width, height) if args.image_aspect_ratio == "pad" else height
        return f"of {width} x {height} pixels, a height that is taken for colour channels" if side in (1, 3) else None

    def template(self, args: Namespace) -> Any:
        """The conversation template that training takes with these flags."""
        return self.train_module().conversation_lib.conv_templates[args.version]

    def check_files(self, args: Namespace, config: Mapping[str, Any]) -> None:
        """Vision tower, backbone, tokenizer and projector."""
        self.check_tower(args, config)
        model: Any = self.meta_model(args, config)
        recipe = self.recipe(args)
        check_backbone(self, recipe, model)
        tokenizer = load_tokenizer(args.model_name_or_path, FLAGS["model"], lambda: self.load_tokenizer(args))
        self.check_tokenizer(args, tokenizer, model.get_input_embeddings().weight.shape[0])
        widths = model.config.mm_hidden_size, model.config.hidden_size
        if args.mm_projector_type == "identity" and widths[0] != widths[1]:
            raise LlavaRegionError(
                f"--mm_projector_type identity needs a vision tower as wide as the language model, not {widths[0]} and {widths[1]}; "
                "give mlp2x_gelu"
            )
        if recipe.projector:
            wanted = {name: tuple(tensor.shape) for name, tensor in model.get_model().mm_projector.state_dict().items()}
            projector_type = f"--mm_projector_type {args.mm_projector_type}"
            check_projector(recipe.projector, FLAGS["projector"], wanted, "mm_projector", projector_type)

    def write_miniature(self, args: Namespace, config: Mapping[str, Any], layers: int, folder: Path) -> dict[str, Any] | None:
        tower, kind = self.tower_of(args, config)
        if "num_attention_heads" not in config:  # MPT
            return None
        changes = {
            "model_name_or_path": "backbone", "data_path": "data.json", "pretrain_mm_mlp_adapter": None, "cache_dir": None, "bits": 16,
            "image_folder": None if args.image_folder is None else os.path.abspath(args.image_folder),
            "vision_tower": os.path.abspath(tower),
        }  # fmt: skip
        if kind is not None:
            changes["vision_tower"] = f"tower-{kind.title.lower()}"
            # Bunny takes the features of the last layer but one
            deep_enough = max(layers, abs(getattr(args, "mm_vision_select_layer", -2)))
            write_tower(folder / changes["vision_tower"], tower, kind, deep_enough)
        small, here = shrunk(config, layers), str(folder / changes["vision_tower"])
        if config.get("mm_vision_tower"):  # training goes on with the model's own
            small["mm_vision_tower"] = here
        built: Any = self.empty_model(Namespace(**{**vars(args), "vision_tower": here}), small)
        if config.get("mm_vision_tower"):
            small |= {"mm_vision_tower": changes["vision_tower"], "mm_hidden_size": built.config.mm_hidden_size}
        source = folder_of(args.model_name_or_path, FLAGS["model"], args.cache_dir)
        write_backbone(folder / "backbone", built, small, source)
        return changes

    @abstractmethod
    def tower_of(self, args: Namespace, config: Mapping[str, Any]) -> tuple[str, TowerKind | None]:
        """The vision tower that training uses, and its kind; None: not one of transformers'."""

    @abstractmethod
    def check_tower(self, args: Namespace, config: Mapping[str, Any]) -> None:
        """Refuse a vision tower that the upstream cannot load, or would fill with random weights.

        Raises:
            LlavaRegionError: names the flag and how to fix it.
        """

    @abstractmethod
    def load_tokenizer(self, args: Namespace) -> PreTrainedTokenizerBase:
        """The tokenizer of the model to tune, loaded as train() loads it."""

    @abstractmethod
    def check_tokenizer(self, args: Namespace, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
        """Refuse a tokenizer that does not go with the model or with the flags.

        Args:
            rows: of the model's embeddings.

        Raises:
            LlavaRegionError: says what to change.
        """

    def trained_besides_lora(self, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, torch.Tensor]:
        return self.train_module().get_peft_state_non_lora_maybe_zero_3(named_parameters)

    def projector_tensors(self, config: Mapping[str, Any]) -> Mapping[str, tuple[int, ...]] | None:
        kind, width = config.get("mm_projector_type", self.default_projector), width_in(config)
        features = config.get("mm_hidden_size")
        if not isinstance(kind, str) or not isinstance(features, int) or not isinstance(width, int):
            raise LlavaRegionError(
                f"'mm_projector_type' ({kind}), 'mm_hidden_size' ({features}) and 'hidden_size' ({width}) in {CONFIG_FILE} do not say "
                f"what the projector is, without which {self.title} cannot load the model; copy that file again from the run"
            )
        shapes = projector_shapes(kind, features, width)
        if shapes is None:
            return None
        inner = "transformer" if config.get("model_type") == "llava_mpt" else "model"
        newline = {f"{inner}.image_newline": (width,)} if "unpad" in str(config.get("mm_patch_merge_type")) else {}
        return {**{f"{inner}.mm_projector.{name}": shape for name, shape in shapes.items()}, **newline}

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


def template_problem(template: Any, version: str, turns: Sequence[Mapping[str, Any]], has_image: bool) -> str | None:
    """What a template's preprocessing asserts of a record's turns and does not find there, or None."""
    kind = template.sep_style.name
    # the plain one does not look at the speakers, and that of v0 not at their order
    speakers = speakers_problem(turns, alternate=kind != "SINGLE") if kind != "PLAIN" else None
    if speakers:
        return speakers
    if kind == "PLAIN":
        if len(turns) != 2 or IMAGE not in turns[0]["value"]:
            return f"is not an image with its caption, two turns with '{IMAGE}' in the first, as --version {version} takes them"
        if not has_image and IMAGE in turns[1]["value"]:
            return f"places '{IMAGE}' in both turns, which would shift the images of the samples after it"
    if kind == "LLAMA_2" and not next((turn["value"] for turn in turns if turn["from"] == "human"), "none"):
        return f"begins with an empty question, which --version {version} does not take"
    return None


def _check_tower_on_cpu(args: Namespace) -> None:
    """Both upstreams put the vision tower into fp16 unless bf16 is asked for; torch 2.1, which they pin, cannot run that on a CPU."""
    import torch

    if not args.bf16 and trains_on_cpu(args) and not computes_fp16_on_cpu():
        raise LlavaRegionError(
            f"torch {torch.__version__} has no fp16 convolutions on a CPU, and upstream puts the vision tower into fp16; give --bf16 True"
        )


def _check_unusable(args: Namespace) -> None:
    """Flags of the upstream and of transformers that its train() ignores, or cannot train with."""
    if getattr(args, "lora_weight_path", ""):
        raise LlavaRegionError(
            f"--lora_weight_path {args.lora_weight_path} is read by nobody: training would start without it; leave it out, and merge "
            "that run with 'llava-region merge' to start from it"
        )
    if args.label_smoothing_factor:
        raise LlavaRegionError(
            f"--label_smoothing_factor {args.label_smoothing_factor} fails at the first step, as the model puts image features among the "
            "labels; allowed: 0"
        )
    if args.neftune_noise_alpha is not None:
        raise LlavaRegionError(
            f"--neftune_noise_alpha {args.neftune_noise_alpha} fails at the first step, as samples are embedded one by one; leave it out"
        )


def features_per_image(model: Any) -> int:
    """Patches of the vision tower, each of which becomes a token; 1 for a model that has no tower yet."""
    return getattr(model.get_vision_tower(), "num_patches", 1)


def tokens_of_tower(tower: str | None, class_token: bool = False) -> int:
    """Tokens that a vision tower makes of an image, from its config alone; 1 where that is not on this machine.

    Args:
        class_token: whether the class token is kept next to the patches.
    """
    config = _vision_config(tower) if tower else None
    return 1 if config is None else (config.image_size // config.patch_size) ** 2 + class_token


def settings_without_tower(config: Mapping[str, Any]) -> dict[str, Any]:
    """A model's config as arguments of a config class: without the vision tower, which would be loaded from disk."""
    return {key: value for key, value in config.items() if key not in ("mm_vision_tower", "model_type", "architectures")}


def vision_model(tower: str) -> PreTrainedModel | None:
    """A vision tower's transformers model on the default device, from its config alone; None where that is not on this machine."""
    from transformers import AutoModel

    config = _vision_config(tower)
    return None if config is None else AutoModel.from_config(config)


def _vision_config(tower: str) -> Any:
    """A vision tower's own config; None where it is not on this machine. The upstreams do not look for towers under --cache_dir."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(tower)
    except (OSError, ValueError):
        return None
    return getattr(config, "vision_config", config)
