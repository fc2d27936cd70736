"""What can be refused before weights load: a mistake should cost seconds, not a night on eight GPUs."""

from __future__ import annotations

import importlib.util
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

from llava_region import processes
from llava_region.data.check import check_data
from llava_region.errors import LlavaRegionError
from llava_region.files import read_json
from llava_region.patches.seams import argument_classes
from llava_region.region import Region, num_layers_of
from llava_region.training.recompute import check_flags
from llava_region.training.resume import check_resumable


class Preflight(NamedTuple):
    """What the checks read: the flags, the region, the model's `config.json`, and the records (on the first rank only)."""

    args: Namespace
    region: Region
    config: dict
    records: list[dict] | None


def check(upstream, module, flags: list[str]) -> Preflight:
    """Check a command line and everything it names.

    Args:
        upstream: hooks module, `llava_region.patches.llava` or `.bunny`.
        module: the upstream's module with train().
        flags: the command line after the upstream's name.

    Raises:
        LlavaRegionError: the first thing that is wrong.
    """
    args = parse(argument_classes(module), flags)
    check_flags(args.region_checkpointing, args.region_memory, args.gradient_checkpointing)
    check_combination(args)
    config_file = model_file(args, "config.json")
    if config_file is None:
        name = args.model_name_or_path
        lacks = "holds no config.json" if Path(name).is_dir() else "is no folder, and no model of that name is on the hub or in its cache"
        raise LlavaRegionError(f"--model_name_or_path {name} {lacks}; give the folder or hub name of a model")
    config = read_json(Path(config_file))
    region = Region.parse(args.tune_layers, num_layers_of(config_file))
    upstream.check_arguments(args, config)
    check_vision(args)
    check_deepspeed(args, config)
    check_generation_config(args)
    check_output(args)
    check_resumable(args.output_dir, region, bool(args.lora_enable))
    records = check_data(args.data_path, args.image_folder, args.check_images) if processes.is_first() else None
    return Preflight(args, region, config, records)


def parse(classes, flags: list[str]):
    """Parse flags into a namespace, without building the upstream's TrainingArguments (which starts devices and DeepSpeed).

    Raises:
        LlavaRegionError: an unknown flag, or a value of the wrong type.
    """
    from transformers import HfArgumentParser

    class Parser(HfArgumentParser):
        def error(self, message):
            raise LlavaRegionError(f"{message}; 'python -m llava_region.train {{llava,bunny}} --help' lists the flags")

    return Parser(classes, allow_abbrev=False).parse_args(flags)


def check_combination(args) -> None:
    """Refuse flags that contradict a region.

    Raises:
        LlavaRegionError: names the flag and how to mend it.
    """
    if not args.model_name_or_path:
        raise LlavaRegionError("--model_name_or_path is missing; give the folder or hub name of the model to tune")
    if not args.tune_layers.strip():
        raise LlavaRegionError("--tune_layers is empty; give a layer spec such as sparse:25%")
    if args.tune_mm_mlp_adapter:
        raise LlavaRegionError("--tune_mm_mlp_adapter True trains the projector alone; leave out --tune_layers, or --tune_mm_mlp_adapter")
    if args.freeze_backbone and not args.lora_enable:
        raise LlavaRegionError(
            "--freeze_backbone True freezes the whole language model; leave it out, --tune_layers freezes what lies outside"
        )
    for name in ("evaluation_strategy", "eval_strategy"):  # renamed in transformers 4.41
        if getattr(args, name, None) not in (None, "no"):
            raise LlavaRegionError(
                f"--{name} {getattr(args, name)} fails when its turn comes, as upstream has no evaluation data; allowed: no"
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
        raise LlavaRegionError("saving a LoRA run imports deepspeed, also where it isn't used; install it with 'pip install deepspeed'")


def model_file(args, name: str) -> str | None:
    """Local path of a file of the model to tune (a folder, or cached from or fetched from the hub); None if there is none.

    Raises:
        LlavaRegionError: the model can't be found.
    """
    from transformers.utils import cached_file

    folder = Path(args.model_name_or_path)
    if folder.is_dir():
        return str(folder / name) if (folder / name).is_file() else None
    quiet = {"_raise_exceptions_for_missing_entries": False}
    try:
        return cached_file(args.model_name_or_path, name, cache_dir=args.cache_dir, **quiet)
    except (OSError, ValueError) as e:
        why = str(e).strip().splitlines()[0]
        raise LlavaRegionError(f"--model_name_or_path {args.model_name_or_path} is no folder and not on the hub: {why}") from e


def check_vision(args) -> None:
    """Check the vision tower and the pretrained projector, where they are given as paths.

    Raises:
        LlavaRegionError: a path that does not exist.
    """
    tower = args.vision_tower
    if tower and tower.startswith(("/", ".", "~")) and not (Path(tower) / "config.json").is_file():
        raise LlavaRegionError(f"--vision_tower {tower} holds no config.json; give the folder or hub name of a vision tower")
    projector = args.pretrain_mm_mlp_adapter
    if projector and not Path(projector).is_file():
        raise LlavaRegionError(f"--pretrain_mm_mlp_adapter {projector} is not there; give the mm_projector.bin of the pretraining")


def zero_settings(args) -> dict:
    """`zero_optimization` of the DeepSpeed config on the command line; empty without one."""
    return read_json(Path(args.deepspeed)).get("zero_optimization", {}) if args.deepspeed else {}


def check_deepspeed(args, config: dict) -> None:
    """Check the DeepSpeed config against the run.

    Raises:
        LlavaRegionError: a setting with which the run fails late, saves nothing, or trains at other rates.
    """
    if not args.deepspeed:
        return
    path = Path(args.deepspeed)
    if not path.is_file():
        raise LlavaRegionError(f"--deepspeed {path} is not there; scripts/deepspeed/ has configs to start from")
    if importlib.util.find_spec("deepspeed") is None:
        raise LlavaRegionError("--deepspeed needs deepspeed; install it with 'pip install deepspeed'")
    settings = read_json(path)
    zero = settings.get("zero_optimization", {})
    ignoring = next((part for part in ("optimizer", "scheduler") if part in settings), None)
    if ignoring and args.mm_projector_lr is not None:
        raise LlavaRegionError(f"the '{ignoring}' in {path} would ignore --mm_projector_lr; remove that entry, the flags set the rates")
    if zero.get("stage") != 3:
        return
    if args.bits != 16:
        raise LlavaRegionError(f"--bits {args.bits} does not work with ZeRO-3; use a ZeRO-2 config such as scripts/deepspeed/zero2.json")
    if not (args.bf16 or args.fp16):
        raise LlavaRegionError("ZeRO-3 needs --bf16 True or --fp16 True: upstream casts the vision tower to half precision in any case")
    if not zero.get("stage3_gather_16bit_weights_on_model_save"):
        raise LlavaRegionError(f'{path} would save checkpoints without weights; set "stage3_gather_16bit_weights_on_model_save": true')
    hidden = config.get("hidden_size") or config.get("d_model") or 0
    if zero.get("stage3_prefetch_bucket_size") == "auto" and (9 * hidden * hidden) % 10:
        raise LlavaRegionError(
            f'"stage3_prefetch_bucket_size": "auto" in {path} becomes a fraction for hidden size {hidden}, which DeepSpeed '
            "refuses; give an integer"
        )


def check_generation_config(args) -> None:
    """Full tuning saves the model's generation config at the very end, and transformers refuses an invalid one there.

    Raises:
        LlavaRegionError: it would be refused; says which file to mend.
    """
    import warnings

    from transformers import GenerationConfig, PretrainedConfig

    if args.lora_enable or args.fix_generation_config:
        return
    path = model_file(args, "generation_config.json") or model_file(args, "config.json")
    settings = read_json(Path(path))
    if Path(path).name == "config.json":  # transformers takes the settings from there
        settings = GenerationConfig.from_model_config(PretrainedConfig.from_dict(settings)).to_dict()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            GenerationConfig(**settings).validate()
            problem = str(caught[0].message) if caught else None
        except ValueError as e:
            problem = str(e)
    if problem:
        raise LlavaRegionError(
            f'{path} cannot be saved after training ({problem.split(". ")[0]}); set "do_sample": true in it, '
            "or add --fix_generation_config True"
        )


def check_output(args) -> None:
    """Check that the output folder can be written, without making it.

    Raises:
        LlavaRegionError: it can't.
    """
    folder = Path(args.output_dir).absolute()
    if folder.exists() and not folder.is_dir():
        raise LlavaRegionError(f"--output_dir {folder} is a file; give a folder")
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as e:
        raise LlavaRegionError(f"--output_dir {folder} cannot be written: {e.strerror}") from e
