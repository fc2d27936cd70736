"""Hooks on LLaVA's own trainer. Tested with LLaVA c121f04, which PyPI has as llava-torch 1.2.2.post1.

Left alone: the model, the data, the loss, PEFT and transformers. `applied` rebinds four names in `llava.train.train`.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path

from llava_region.patches.seams import hooked, import_upstream, require, require_fields

from llava_region.errors import LlavaRegionError
from llava_region.training.dry_run import vision_model
from llava_region.training.trainer import RegionRun

NAME = "llava"
TITLE = "LLaVA"
TESTED = "LLaVA c121f04 (llava-torch 1.2.2.post1)"
INSTALL = "install it with 'pip install --no-deps llava-torch==1.2.2.post1', or give the path of llava/train/train.py in a checkout"
SCRIPTS = ("train.py", "train_mem.py", "train_xformers.py")
TRAINING_FIELDS = (
    "lora_enable",
    "lora_r",
    "lora_alpha",
    "lora_bias",
    "bits",
    "mm_projector_lr",
    "model_max_length",
    "freeze_mm_mlp_adapter",
)
MODEL_FIELDS = ("model_name_or_path", "vision_tower", "tune_mm_mlp_adapter", "freeze_backbone", "pretrain_mm_mlp_adapter")


def train_module():
    """`llava.train.train`, checked for every symbol that the hooks and the preflight use.

    Raises:
        UnsupportedUpstream: not installed, or a symbol is missing or changed.
    """
    module = import_upstream("llava.train.train", TITLE, INSTALL)
    require_fields(module, "ModelArguments", TESTED, MODEL_FIELDS)
    require_fields(module, "DataArguments", TESTED, ("data_path", "image_folder"))
    require_fields(module, "TrainingArguments", TESTED, TRAINING_FIELDS)
    require(module, "train", TESTED, ("attn_implementation",))
    require(module, "find_all_linear_names", TESTED, ("model",))
    require(module, "safe_save_model_for_hf_trainer", TESTED, ("trainer", "output_dir"))
    require(module, "get_peft_state_non_lora_maybe_zero_3", TESTED, ("named_params", "require_grad_only"))
    trainer = require(module, "LLaVATrainer", TESTED)
    for method in ("create_optimizer", "_save_checkpoint", "_load_from_checkpoint", "_load_rng_state", "training_step"):
        require(trainer, method, TESTED)
    return module


@contextmanager
def applied(tune_layers, **options):
    """Hook `llava.train.train` so that its `train()` tunes a region; everything is put back on leaving.

    Args:
        tune_layers: a layer spec, or a `Region`.
        options: further fields of `RegionRun`, such as `base_model`.

    Yields:
        the `RegionRun`, which knows the region once the model is there.

    Raises:
        UnsupportedUpstream: the installed LLaVA lacks a symbol.

    >>> with llava_region.patches.llava.applied("sparse:25%"):  # doctest: +SKIP
    ...     llava.train.train.train(attn_implementation="sdpa")
    """
    module = train_module()
    run = RegionRun(tune_layers, upstream=NAME, non_lora_state=module.get_peft_state_non_lora_maybe_zero_3, **options)
    with hooked(module, "LLaVATrainer", run):
        yield run


def version() -> str:
    """Version of the installed LLaVA; coarse: the tested commit and its neighbours all carry the same."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    for distribution in ("llava-torch", "llava"):
        try:
            return f"{distribution} {installed(distribution)}"
        except PackageNotFoundError:
            continue
    return "checkout"


def check_arguments(args, config: dict) -> None:
    """Refuse what LLaVA alone would only find out later.

    Raises:
        LlavaRegionError: no vision tower, so that upstream would train a text-only model; an unknown conversation template.
    """
    if not args.vision_tower:
        raise LlavaRegionError(
            "--vision_tower is missing, without which LLaVA trains a text-only model; give openai/clip-vit-large-patch14-336"
        )
    templates = sys.modules["llava.train.train"].conversation_lib.conv_templates
    if args.version not in templates and args.version != "v0.5":  # which LLaVA knows beside them
        raise LlavaRegionError(
            f"--version {args.version} is no conversation template, and LLaVA would take vicuna_v1 without a word; "
            f"allowed: {', '.join(templates)}, v0.5"
        )


def empty_model(args, config: dict):
    """LLaVA's model on the default device (meta, in a dry run) from a config alone, with projector and vision tower.

    Args:
        args: the flags, parsed.
        config: `config.json` of the model that training starts from.
    """
    from llava.model.multimodal_projector.builder import build_vision_projector

    mpt = "mpt" in args.model_name_or_path
    name = "LlavaMptForCausalLM" if mpt else "LlavaLlamaForCausalLM"
    model_class = require(sys.modules["llava.train.train"], name, TESTED)
    # a LLaVA checkpoint's own tower would be loaded from disk
    settings = {key: value for key, value in config.items() if key not in ("mm_vision_tower", "model_type", "architectures")}
    model = model_class(model_class.config_class(**settings))
    inner = model.get_model()
    tower = vision_model(args.vision_tower, args.cache_dir)
    model.config.mm_projector_type = args.mm_projector_type
    model.config.mm_hidden_size = tower.config.hidden_size if tower is not None else 1024
    inner.mm_projector = build_vision_projector(model.config)
    if tower is not None:
        inner.vision_tower = tower
    return model


def entry(script: str):
    """What an upstream train script does when it is run, as a function without arguments.

    Args:
        script: file name of one of `SCRIPTS`; each asks for another attention implementation.

    Raises:
        LlavaRegionError: another script.
    """
    if script not in SCRIPTS:
        raise LlavaRegionError(f"'{script}' is no train script of LLaVA that is known here; allowed: {', '.join(SCRIPTS)}")
    if script == "train_xformers.py":
        # replaces Llama's attention, and has to run before the model classes are used
        patch = import_upstream("llava.train.llama_xformers_attn_monkey_patch", TITLE, "install xformers, or use train_mem.py")
        patch.replace_llama_attn_with_xformers_attn()
    attention = "flash_attention_2" if script == "train_mem.py" else None

    def run():
        sys.modules["llava.train.train"].train(attn_implementation=attention)

    return run


def checkout_of(script: Path) -> Path | None:
    """Root of the checkout that a train script lies in (`ROOT/llava/train/train_mem.py`), or None if it is not LLaVA's."""
    parents = script.resolve().parents
    return parents[2] if len(parents) > 2 and (parents[0].name, parents[1].name) == ("train", "llava") else None
