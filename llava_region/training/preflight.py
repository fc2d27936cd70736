"""What can be refused before weights load: a mistake should cost seconds, not a night on eight GPUs."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import tempfile
import warnings
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llava_region import processes
from llava_region.checkpoints.model_source import num_layers_in
from llava_region.errors import LlavaRegionError
from llava_region.files import read_json
from llava_region.region import Region
from llava_region.run_files import ADAPTER_CONFIG_FILE, CONFIG_FILE, GENERATION_CONFIG_FILE, WEIGHT_GLOBS
from llava_region.training.arguments import did_you_mean
from llava_region.training.deepspeed_config import corrected, gathers_weights, hidden_size, takes_cpu_adam
from llava_region.training.recompute_plan import check_flags
from llava_region.training.report_flags import login_problem, reporters
from llava_region.training.run_data import check_run_data
from llava_region.training.trainer_flags import check_trainer_flags

if TYPE_CHECKING:
    from llava_region.data.training_data import TrainingData
    from llava_region.upstreams import Recipe, Upstream

CONFIGS = "'llava-region recipes DIR' writes configs to start from into DIR/deepspeed"


class Preflight(NamedTuple):
    """What the checks read.

    Attributes:
        args: all flags; recipe: what they ask for.
        region: the decoder layers to tune.
        config: the model's `config.json`.
        records: the data's, on the first rank only.
        remarks: what was found out about the data, (name, one line) each.
    """

    args: Namespace
    recipe: Recipe
    region: Region
    config: dict[str, Any]
    records: TrainingData | None
    remarks: tuple[tuple[str, str], ...] = ()


def check(upstream: Upstream, flags: list[str]) -> Preflight:
    """Check a command line and everything it names.

    Args:
        flags: the command line after the upstream's name.

    Raises:
        LlavaRegionError: the first thing that is wrong.
    """
    args = parse(upstream.argument_classes(), flags)
    recipe = upstream.recipe(args)
    check_flags(args.region_checkpointing, args.region_memory, args.gradient_checkpointing)
    check_combination(args, recipe)
    check_no_adapter(recipe)
    config = model_config(recipe)
    upstream.check(args, config)  # another kind of model has another number of layers
    region = Region.parse(args.tune_layers, num_layers_in(config, f"{recipe.model}/{CONFIG_FILE}"))
    settings, said = check_deepspeed(args, recipe, config)
    check_trainer_flags(args, own_optimizer="optimizer" in settings)
    upstream.check_files(args, config)
    check_generation_config(args, recipe)
    check_output(args.output_dir)
    if "tensorboard" in reporters(args) and args.logging_dir:
        check_output(args.logging_dir, "--logging_dir")
    login = login_problem(args) if processes.is_first() else None
    if login and not args.dry_run:
        raise LlavaRegionError(login)
    records, remarks = check_run_data(upstream, args, recipe, config) if processes.is_first() else (None, ())
    if said and processes.is_first():
        remarks = (*remarks, ("DeepSpeed", f"{args.deepspeed}, corrected for this run: {'; '.join(said)}"))
    if login:  # training may be started elsewhere
        remarks = (*remarks, ("W&B", f"{login}; a training that starts here would be refused"))
    return Preflight(args, recipe, region, config, records, remarks)


def parse(classes: tuple[Any, ...], flags: list[str]) -> Namespace:
    """Parse flags into a namespace, without building the upstream's TrainingArguments (which starts devices and DeepSpeed).

    Raises:
        LlavaRegionError: an unknown flag, or a value of the wrong type.
    """
    from transformers import HfArgumentParser

    class Parser(HfArgumentParser):
        def error(self, message: str) -> None:
            unknown = re.findall(r"--[\w-]+", message) if message.startswith("unrecognized") else []
            message += did_you_mean(unknown, self._option_string_actions)
            raise LlavaRegionError(f"{message}; 'python -m llava_region.train UPSTREAM --help' lists the flags")

    return Parser(classes, allow_abbrev=False).parse_args(flags)


def check_combination(args: Namespace, recipe: Recipe) -> None:
    """Refuse flags that contradict a region.

    Raises:
        LlavaRegionError: names the flag and how to fix it.
    """
    if not recipe.model:
        raise LlavaRegionError(f"{recipe.flags['model']} is missing; give the folder or hub name of the model to tune")
    if not args.tune_layers.strip():
        raise LlavaRegionError("--tune_layers is empty; give a layer spec such as sparse:25%")
    for name in ("evaluation_strategy", "eval_strategy"):  # renamed in transformers 4.41
        if getattr(args, name, None) not in (None, "no"):
            raise LlavaRegionError(
                f"--{name} {getattr(args, name)} fails when its turn comes, as upstream has no evaluation data; allowed: no"
            )


def check_no_adapter(recipe: Recipe) -> None:
    """Refuse to start from a LoRA run: transformers would load its base and put the adapter on, and training a second one around it.

    That holds for whole weights next to an adapter too: transformers ignores them, and loads the base that the adapter names.

    Raises:
        LlavaRegionError: names the command that merges the run.
    """
    model, flag = str(recipe.model), recipe.flags["model"]
    folder = Path(model)
    if folder.is_dir():
        adapter = (folder / ADAPTER_CONFIG_FILE).is_file()
    else:
        try:
            adapter = model_file(recipe, ADAPTER_CONFIG_FILE) is not None
        except LlavaRegionError:  # offline, and not in the cache: transformers would not find it either
            adapter = False
    if not adapter:
        return
    if any(any(folder.glob(pattern)) for pattern in WEIGHT_GLOBS):
        raise LlavaRegionError(
            f"{flag} {model} holds {ADAPTER_CONFIG_FILE} next to whole weights, which transformers would ignore for those of the adapter's "
            f"base; if the adapter is merged into them, remove {ADAPTER_CONFIG_FILE}, else give a folder that holds one of the two"
        )
    raise LlavaRegionError(
        f"{flag} {model} is a LoRA run, and a second adapter would be trained around its own; merge it first with "
        f"'llava-region merge {shlex.quote(model)} --out MERGED', and give {flag} MERGED"
    )


def model_config(recipe: Recipe) -> dict[str, Any]:
    """`config.json` of the model to tune.

    Raises:
        LlavaRegionError: there is none, or the model can't be found.
    """
    path = model_file(recipe, CONFIG_FILE)
    if path is None:
        if Path(str(recipe.model)).is_dir():
            lacks = f"holds no {CONFIG_FILE}"
        else:
            lacks = "is not a folder, and no model of that name is on the hub or in its cache"
        raise LlavaRegionError(f"{recipe.flags['model']} {recipe.model} {lacks}; give the folder or hub name of a model")
    config = read_json(Path(path))
    if not isinstance(config, dict):
        raise LlavaRegionError(
            f"{path} holds {json.dumps(config)[:60]}, not the settings of a model; copy it again from where the model comes"
        )
    return config


def model_file(recipe: Recipe, name: str) -> str | None:
    """Local path of a file of the model to tune (a folder, or cached from or fetched from the hub); None if there is none.

    Raises:
        LlavaRegionError: the model can't be found.
    """
    from transformers.utils import cached_file

    model = str(recipe.model)
    if Path(model).is_dir():
        return str(Path(model) / name) if (Path(model) / name).is_file() else None
    try:
        return cached_file(model, name, cache_dir=recipe.cache_dir, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError) as e:
        why = str(e).strip().splitlines()[0]
        raise LlavaRegionError(f"{recipe.flags['model']} {model} is not a folder and not on the hub: {why}") from e


def deepspeed_settings(args: Namespace) -> dict[str, Any]:
    """The DeepSpeed config on the command line; empty without one."""
    return read_json(Path(args.deepspeed)) if args.deepspeed else {}


def zero_settings(args: Namespace) -> dict[str, Any]:
    """`zero_optimization` of the DeepSpeed config on the command line; empty without one."""
    return deepspeed_settings(args).get("zero_optimization", {})


def check_deepspeed(args: Namespace, recipe: Recipe, config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Check the DeepSpeed config against the run.

    Returns:
        the config as training takes it, empty without one, and what differs from the file, one phrase each.

    Raises:
        LlavaRegionError: a setting with which the run fails late, saves nothing, or trains at other rates.
    """
    if not args.deepspeed:
        return {}, []
    path = Path(args.deepspeed)
    if not path.is_file():
        raise LlavaRegionError(f"--deepspeed {path} is not there; {CONFIGS}")
    if importlib.util.find_spec("deepspeed") is None:
        raise LlavaRegionError("--deepspeed needs deepspeed; install it with 'pip install deepspeed'")
    settings, said = corrected(path, recipe, hidden_size(config))
    zero = settings.get("zero_optimization", {}) if isinstance(settings, dict) else None
    if not isinstance(zero, dict):
        raise LlavaRegionError(f"{path} is not a DeepSpeed config (a JSON object, as its 'zero_optimization' is); {CONFIGS}")
    if zero.get("stage", 0) not in (0, 1, 2, 3):
        raise LlavaRegionError(f"the 'stage' in {path} is {zero['stage']!r:.40}; allowed: 0, 1, 2 or 3")
    ignoring = next((part for part in ("optimizer", "scheduler") if part in settings), None)
    if ignoring and recipe.projector_rate is not None:
        flag = recipe.flags["projector_rate"]
        raise LlavaRegionError(f"the '{ignoring}' in {path} would ignore {flag}; remove that entry, the flags set the rates")
    if takes_cpu_adam(settings) and "optimizer" not in settings and "adamw" not in args.optim:
        raise LlavaRegionError(
            f"{path} offloads the optimizer, and DeepSpeed's AdamW would take the place of --optim {args.optim}; leave that flag out, or "
            'set "zero_force_ds_cpu_optimizer": false'
        )
    if zero.get("stage") == 3:
        _check_zero3(args, recipe, zero, path)
    return settings, said


def _check_zero3(args: Namespace, recipe: Recipe, zero: Mapping[str, Any], path: Path) -> None:
    if recipe.bits != 16:
        raise LlavaRegionError(f"{recipe.flags['bits']} {recipe.bits} does not work with ZeRO-3; use a ZeRO-2 config; {CONFIGS}")
    if not (args.bf16 or args.fp16):
        raise LlavaRegionError("ZeRO-3 needs --bf16 True or --fp16 True: upstream casts the vision tower to half precision in any case")
    if not gathers_weights(zero):
        raise LlavaRegionError(f'{path} would save checkpoints without weights; set "stage3_gather_16bit_weights_on_model_save": true')


def check_generation_config(args: Namespace, recipe: Recipe) -> None:
    """Full tuning saves the model's generation config at the very end, and transformers refuses an invalid one there.

    Raises:
        LlavaRegionError: it would be refused; says which file to fix.
    """
    if recipe.lora is not None or args.fix_generation_config:
        return
    path = Path(str(model_file(recipe, GENERATION_CONFIG_FILE) or model_file(recipe, CONFIG_FILE)))
    problem = generation_config_problem(path)
    if problem:
        raise LlavaRegionError(
            f'{path} cannot be saved after training ({problem.split(". ")[0]}); set "do_sample": true in it, '
            "or add --fix_generation_config True"
        )


def generation_config_problem(path: Path) -> str | None:
    """Why transformers would not save the generation settings in this file, a `generation_config.json` or a `config.json`."""
    from transformers import GenerationConfig, PretrainedConfig

    settings = read_json(path)
    if path.name == CONFIG_FILE:  # transformers takes the settings from there
        settings = GenerationConfig.from_model_config(PretrainedConfig.from_dict(settings)).to_dict()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            GenerationConfig(**settings).validate()
        except ValueError as e:
            return str(e)
    return str(caught[0].message) if caught else None


def check_output(output: str, flag: str = "--output_dir") -> None:
    """Check that an output folder can be written, without making it.

    Raises:
        LlavaRegionError: it can't.
    """
    folder = Path(output).absolute()
    if folder.exists() and not folder.is_dir():
        raise LlavaRegionError(f"{flag} {folder} is a file; give a folder")
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as e:
        raise LlavaRegionError(f"{flag} {folder} cannot be written: {e.strerror}") from e
