"""Hooks on Bunny's own trainer. Tested with Bunny 08273ac, which is on no package index.

Left alone: the model, the data, the loss, PEFT and transformers. `applied` rebinds four names in `bunny.train.train`.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path

from llava_region.patches.seams import hooked, import_upstream, require, require_fields

from llava_region.errors import LlavaRegionError
from llava_region.training.dry_run import vision_model
from llava_region.training.trainer import RegionRun

NAME = "bunny"
TITLE = "Bunny"
TESTED = "Bunny 08273ac"
INSTALL = "put a checkout of BAAI-DCAI/Bunny at 08273ac on PYTHONPATH, or give the path of bunny/train/train.py in it"
SCRIPTS = ("train.py",)
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
MODEL_FIELDS = (
    "model_name_or_path",
    "model_type",
    "version",
    "vision_tower",
    "unfreeze_vision_tower",
    "use_s2",
    "tune_mm_mlp_adapter",
    "freeze_backbone",
    "pretrain_mm_mlp_adapter",
    "mm_projector_type",
)
# --model_type: (Bunny's class for it, model types of the config.json it can load, template it is trained with)
MODEL_TYPES = {
    "llama3-8b": ("BunnyLlamaForCausalLM", ("llama", "bunny-llama"), "llama"),
    "phi-3": ("BunnyPhi3ForCausalLM", ("phi3", "bunny-phi3"), "phi3"),
    "phi-2": ("BunnyPhiForCausalLM", ("phi", "phi-msft", "bunny-phi"), "bunny"),
    "phi-1.5": ("BunnyPhiForCausalLM", ("phi", "phi-msft", "bunny-phi"), "bunny"),
    "qwen1.5-1.8b": ("BunnyQwen2ForCausalLM", ("qwen2", "bunny-qwen2"), "bunny"),
    "stablelm-2": ("BunnyStableLMForCausalLM", ("stablelm", "stablelm_epoch", "bunny-stablelm"), "bunny"),
    "minicpm": ("BunnyMiniCPMForCausalLM", ("minicpm", "bunny-minicpm"), "minicpm"),
}
LLAMA3_EOS = 128001  # written into Bunny's train() for llama3-8b
SIGLIP_WIDTH = 1152  # of siglip-so400m, where the tower's config isn't on this machine
TOWERS = ("sig", "eva", "clip")  # Bunny tells a vision tower's kind by these in its path


def train_module():
    """`bunny.train.train`, checked for every symbol that the hooks and the preflight use.

    Raises:
        UnsupportedUpstream: not installed, or a symbol is missing or changed.
    """
    module = import_upstream("bunny.train.train", TITLE, INSTALL)
    require_fields(module, "ModelArguments", TESTED, MODEL_FIELDS)
    require_fields(module, "DataArguments", TESTED, ("data_path", "image_folder"))
    require_fields(module, "TrainingArguments", TESTED, TRAINING_FIELDS)
    require(module, "train", TESTED)
    require(module, "find_all_linear_names", TESTED, ("model",))
    require(module, "safe_save_model_for_hf_trainer", TESTED, ("trainer", "output_dir"))
    require(module, "get_peft_state_non_lora_maybe_zero_3", TESTED, ("named_params", "require_grad_only"))
    require(require(module, "conversation_lib", TESTED), "conv_templates", TESTED)
    trainer = require(module, "BunnyTrainer", TESTED)
    for method in ("create_optimizer", "_save_checkpoint", "_load_from_checkpoint", "_load_rng_state", "training_step"):
        require(trainer, method, TESTED)
    return module


@contextmanager
def applied(tune_layers, **options):
    """Hook `bunny.train.train` so that its `train()` tunes a region; everything is put back on leaving.

    Args:
        tune_layers: a layer spec, or a `Region`.
        options: further fields of `RegionRun`, such as `base_model`.

    Yields:
        the `RegionRun`, which knows the region once the model is there.

    Raises:
        UnsupportedUpstream: the Bunny that is found lacks a symbol.

    >>> with llava_region.patches.bunny.applied("sparse:25%"):  # doctest: +SKIP
    ...     bunny.train.train.train()
    """
    module = train_module()
    run = RegionRun(tune_layers, upstream=NAME, non_lora_state=module.get_peft_state_non_lora_maybe_zero_3, **options)
    with hooked(module, "BunnyTrainer", run):
        yield run


def version() -> str:
    """Version of the installed Bunny (all of its commits say 1.0), or `checkout` where it is used from its folder."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return f"bunny {installed('bunny')}"
    except PackageNotFoundError:
        return "checkout"


def check_arguments(args, config: dict) -> None:
    """Refuse what Bunny alone would find out after loading weights, or never.

    Args:
        config: the `config.json` of the model to tune.

    Raises:
        LlavaRegionError: names the flag and how to mend it.
    """
    if args.model_type not in MODEL_TYPES:
        raise LlavaRegionError(f"--model_type {args.model_type} is unknown to Bunny; allowed: {', '.join(MODEL_TYPES)}")
    _, kinds, template = MODEL_TYPES[args.model_type]
    if config.get("model_type") not in kinds:
        raise LlavaRegionError(
            f"--model_type {args.model_type} does not fit {args.model_name_or_path}, whose config.json says '{config.get('model_type')}'; "
            f"allowed for it: {', '.join(kinds)}"
        )
    if args.model_type == "llama3-8b" and config.get("vocab_size", 0) <= LLAMA3_EOS:
        raise LlavaRegionError(
            f"--model_type llama3-8b ends answers with token {LLAMA3_EOS}, but {args.model_name_or_path} has "
            f"{config.get('vocab_size')} tokens; give a Llama 3"
        )
    templates = sys.modules["bunny.train.train"].conversation_lib.conv_templates
    if args.version not in templates:
        raise LlavaRegionError(
            f"--version {args.version} is no conversation template, and Bunny would take 'bunny' without a word; "
            f"allowed: {', '.join(templates)}; --model_type {args.model_type} is trained with {template}"
        )
    _check_tower(args)
    if config.get("mm_vision_tower"):
        _check_continued(args, config)


def _check_tower(args) -> None:
    if not args.vision_tower:
        raise LlavaRegionError("--vision_tower is missing; give google/siglip-so400m-patch14-384")
    kinds = [kind for kind in TOWERS if kind in args.vision_tower.lower()]
    if not kinds:
        raise LlavaRegionError(
            f"--vision_tower {args.vision_tower} is of no kind that Bunny can tell; allowed: a path that contains {', '.join(TOWERS)}"
        )
    if args.use_s2 and kinds[0] != "sig":
        raise LlavaRegionError(f"--use_s2 True works with SigLIP alone, not with {args.vision_tower}; leave it out")
    if args.unfreeze_vision_tower and not args.bf16 and not args.deepspeed:
        raise LlavaRegionError(
            "--unfreeze_vision_tower True without bf16 would train the tower in plain fp16, where its updates vanish; add --bf16 True"
        )


def _check_continued(args, config: dict) -> None:
    """Training goes on from a Bunny checkpoint: its own tower and projector are used, whatever the flags say of theirs."""
    tower, model = config["mm_vision_tower"], args.model_name_or_path
    if Path(tower).is_absolute() and not Path(tower).exists():
        raise LlavaRegionError(f"the vision tower {tower} that {model}/config.json names is not there; mend 'mm_vision_tower' in it")
    if config.get("unfreeze_vision_tower") and not config.get("continuous_training"):
        raise LlavaRegionError(
            f"{model} has a vision tower of its own, trained with --unfreeze_vision_tower, which Bunny would leave out; "
            'set "continuous_training": true in its config.json'
        )
    for name, ours in (("mm_projector_type", "mlp2x_gelu"), ("use_s2", False)):
        if getattr(args, name) != config.get(name, ours):
            raise LlavaRegionError(f"--{name} {getattr(args, name)} does not fit {model}; give --{name} {config.get(name, ours)}")


def empty_model(args, config: dict):
    """Bunny's model on the default device (meta, in a dry run) from a config alone, with projector and vision tower.

    Args:
        args: the flags, parsed.
        config: `config.json` of the model that training starts from.
    """
    from bunny.model.multimodal_projector.builder import build_vision_projector

    model_class = require(sys.modules["bunny.train.train"], MODEL_TYPES[args.model_type][0], TESTED)
    # a Bunny checkpoint's own tower would be loaded from disk
    settings = {key: value for key, value in config.items() if key not in ("mm_vision_tower", "model_type", "architectures")}
    model = model_class(model_class.config_class(**settings))
    inner = model.get_model()
    tower = vision_model(args.vision_tower, args.cache_dir)
    model.config.mm_projector_type = args.mm_projector_type
    scales = 3 if args.use_s2 else 1  # S2 lays the features of three resolutions side by side
    model.config.mm_hidden_size = scales * (tower.config.hidden_size if tower is not None else SIGLIP_WIDTH)
    inner.mm_projector = build_vision_projector(model.config)
    if tower is not None:
        inner.vision_tower = tower
    return model


def entry(script: str):
    """What an upstream train script does when it is run, as a function without arguments.

    Raises:
        LlavaRegionError: another script than bunny/train/train.py.
    """
    if script not in SCRIPTS:
        raise LlavaRegionError(f"'{script}' is no train script of Bunny that is known here; allowed: {', '.join(SCRIPTS)}")

    def run():
        sys.modules["bunny.train.train"].train()

    return run


def checkout_of(script: Path) -> Path | None:
    """Root of the checkout that a train script lies in (`ROOT/bunny/train/train.py`), or None if it is not Bunny's."""
    parents = script.resolve().parents
    return parents[2] if len(parents) > 2 and (parents[0].name, parents[1].name) == ("train", "bunny") else None
