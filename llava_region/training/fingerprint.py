"""What decides the result of a run, as `run.json` in every checkpoint holds it: a run goes on as the same run, or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import re
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_region import __version__, processes
from llava_region.checkpoints.identity import weights_digest
from llava_region.errors import LlavaRegionError
from llava_region.files import read_json
from llava_region.run_files import RUN_FILE, TRAINER_STATE_FILE
from llava_region.training.model_files import folder_of
from llava_region.training.preflight import Preflight, deepspeed_settings

if TYPE_CHECKING:
    from llava_region.data.training_data import TrainingData
    from llava_region.upstreams import Recipe, Upstream

# Flags that do not decide what is trained: what is logged and saved and where, how much memory it takes, how data is read.
FREE = frozenset({
    "output_dir", "overwrite_output_dir", "run_name", "report_to", "disable_tqdm", "local_rank", "debug", "cache_dir",
    "resume_from_checkpoint", "lazy_preprocess", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor",
    "dataloader_persistent_workers", "skip_memory_metrics", "gradient_checkpointing", "gradient_checkpointing_kwargs", "use_cpu",
    "no_cuda", "use_mps_device", "do_train", "do_eval", "do_predict", "past_index", "prediction_loss_only", "load_best_model_at_end",
    "per_device_eval_batch_size", "per_gpu_eval_batch_size", "metric_for_best_model", "greater_is_better", "fix_generation_config",
    "full_determinism", "tune_layers", "mp_parameters",
})  # fmt: skip
FREE_BEGINNINGS = (
    "log", "save_", "hub_", "push_to_hub", "eval", "ddp_", "dry_run", "check_", "region_", "include_", "torch_compile", "jit_",
)  # fmt: skip
# The same in a DeepSpeed config, by the beginning of the dotted name.
DEEPSPEED_FREE = (
    "steps_per_print", "wall_clock_breakdown", "dump_state", "memory_breakdown", "flops_profiler", "comms_logger", "tensorboard", "wandb",
    "csv_monitor", "comet", "activation_checkpointing", "checkpoint", "compile", "zero_optimization.overlap_comm",
    "zero_optimization.contiguous_gradients", "zero_optimization.sub_group_size", "zero_optimization.reduce_bucket_size",
    "zero_optimization.allgather_bucket_size", "zero_optimization.stage3_max_live_parameters",
    "zero_optimization.stage3_max_reuse_distance", "zero_optimization.stage3_prefetch_bucket_size",
    "zero_optimization.stage3_param_persistence_threshold", "zero_optimization.stage3_gather_16bit_weights_on_model_save",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save",
    # transformers refuses those that do not agree with the flags, which are compared
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
)  # fmt: skip
# Compared by more than their values.
STEPS = ("max_steps", "num_train_epochs")
BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
PATHS = ("model", "data", "images", "tower", "projector")  # of a `Recipe`: compared by what they lead to
PACKAGES = ("torch", "transformers", "peft", "accelerate", "deepspeed")


@dataclass(frozen=True)
class Fingerprint:
    """What decides the result of a run.

    Attributes:
        upstream: whose trainer runs.
        flags: those that decide, with their values; `tune_layers` is in `region.json`.
        contents: flag -> what the path behind it holds, by size and digest. Where it lies does not matter.
        steps: `max_steps` and `num_train_epochs`, which may rise.
        batch: samples per device and step, accumulation, devices; processes: how many, as one may have several devices.
        deepspeed: the settings of its config that decide, by dotted name; None: it is not used.
        versions: of the packages that train.
    """

    upstream: str
    flags: dict[str, Any]
    contents: dict[str, str]
    steps: dict[str, float]
    batch: dict[str, int]
    processes: int
    deepspeed: dict[str, Any] | None
    versions: dict[str, str]

    @classmethod
    def of(cls, upstream: Upstream, checked: Preflight) -> Fingerprint:
        """Of the run that a command line asks for. Reads the data once, and samples of the model.

        Raises:
            LlavaRegionError: one of its files cannot be read.
        """
        args, recipe = checked.args, checked.recipe
        paths = path_flags(recipe)
        flags = {name: _plain(value) for name, value in vars(args).items() if _decides(name) and name not in paths}
        return cls(
            upstream=upstream.name,
            flags=flags,
            contents=dict(_contents(recipe, args, checked.records)),
            steps={name: float(getattr(args, name)) for name in STEPS},
            batch={**{name: int(getattr(args, name)) for name in BATCH}, "devices": _devices(args)},
            processes=processes.world_size(),
            deepspeed=dict(_deciding(deepspeed_settings(args))) if args.deepspeed else None,
            versions={**dict(_versions()), "llava_region": __version__, upstream.name: upstream.version()},
        )

    @classmethod
    def read(cls, checkpoint: Path) -> Fingerprint | None:
        """That of the run which wrote a checkpoint; None where that was an earlier version of this package.

        Raises:
            LlavaRegionError: it is damaged.
        """
        path = checkpoint / RUN_FILE
        if not path.is_file():
            return None
        found = read_json(path)
        try:
            return cls(**{name: found[name] for name in cls.__dataclass_fields__})
        except (KeyError, TypeError) as e:
            raise LlavaRegionError(f"{path} is damaged ({e}); resume from the checkpoint before, or give another --output_dir") from e

    def to_dict(self) -> dict[str, Any]:
        """The content of `run.json`."""
        return asdict(self)

    @property
    def samples_per_step(self) -> int:
        """In one step of the optimizer."""
        per_device, accumulation = (self.batch[name] for name in BATCH)
        return per_device * accumulation * self.batch["devices"]


def differences(before: Fingerprint, now: Fingerprint, total: int | None = None) -> Iterator[str]:
    """What two runs that should be the same differ in, `flag: was A, is B`.

    Args:
        total: steps that the first was to have.
    """
    if before.upstream != now.upstream:
        yield f"upstream: was {before.upstream}, is {now.upstream}"
    for name in sorted(before.flags.keys() & now.flags.keys()):
        if before.flags[name] != now.flags[name]:
            yield f"--{name}: was {before.flags[name]}, is {now.flags[name]}"
    for name in sorted(before.contents.keys() | now.contents.keys()):
        was, given = before.contents.get(name, "not given"), now.contents.get(name, "not given")
        if was != given:
            yield f"the content of {name}: was {shortened(was)}, is {shortened(given)}"
    yield from _other_batch(before, now)
    yield from _other_deepspeed(before.deepspeed, now.deepspeed)
    yield from _fewer_steps(before.steps, now.steps, total)


def _other_batch(before: Fingerprint, now: Fingerprint) -> Iterator[str]:
    was, given = before.batch["devices"], now.batch["devices"]
    if before.samples_per_step != now.samples_per_step:
        yield f"samples per step: was {_split(before)}, is {_split(now)}"
    elif was != given and (before.deepspeed is not None or now.deepspeed is not None):
        yield f"GPUs under DeepSpeed, which has an optimizer state for each: was {was}, is {given}"
    elif (before.processes == 1) != (now.processes == 1):  # accelerate gives the sampler of several a random source of its own
        yield (
            f"processes: was {before.processes}, is {now.processes}, and one draws the order of the samples otherwise than several, "
            "so that some would be seen twice and others never"
        )


def _other_deepspeed(before: dict[str, Any] | None, now: dict[str, Any] | None) -> Iterator[str]:
    if before is None or now is None:
        if before is not now:
            yield f"--deepspeed: was {'not given' if before is None else 'given'}, is {'not given' if now is None else 'given'}"
        return
    for name in sorted(before.keys() | now.keys()):
        was, given = before.get(name, "not set"), now.get(name, "not set")
        if was != given:
            yield f"{name} in --deepspeed: was {was}, is {given}"


def _fewer_steps(before: dict[str, float], now: dict[str, float], total: int | None) -> Iterator[str]:
    if now["max_steps"] > 0 >= before["max_steps"]:  # the length was given in epochs
        if total is not None and now["max_steps"] < total:
            yield f"--max_steps: was not given and came to {total}, is {now['max_steps']:g}, and may only rise"
        return
    for name in STEPS:
        if now[name] < before[name]:
            yield f"--{name}: was {before[name]:g}, is {now[name]:g}, and may only rise"


def remarks(before: Fingerprint, now: Fingerprint) -> Iterator[str]:
    """What differs and may, but should be known."""
    for name in STEPS:
        if now.steps[name] > before.steps[name]:
            yield f"--{name} was {before.steps[name]:g}, is {now.steps[name]:g}: from here on the learning rate follows the longer schedule"
    if before.samples_per_step == now.samples_per_step and before.batch != now.batch:
        yield f"a step's {now.samples_per_step} samples were {_split(before)}, are {_split(now)}: with other random states"
    changed = [
        f"{name} {before.versions.get(name, 'none')} -> {now.versions.get(name, 'none')}"
        for name in sorted(before.versions.keys() | now.versions.keys())
        if before.versions.get(name) != now.versions.get(name)
    ]
    if changed:
        yield f"versions changed since the checkpoint: {', '.join(changed)}"


def check_same_run(checkpoint: Path, now: Fingerprint) -> list[str]:
    """Refuse to go on from a checkpoint of another run.

    Returns:
        lines to print: what differs and may.

    Raises:
        LlavaRegionError: names what differs, with both values.
    """
    before = Fingerprint.read(checkpoint)
    if before is None:
        return [f"{checkpoint} holds no {RUN_FILE}, so it is not known whether it was trained with the same flags and data"]
    state = checkpoint / TRAINER_STATE_FILE
    found = list(differences(before, now, int(read_json(state)["max_steps"]) if state.is_file() else None))
    if found:
        raise LlavaRegionError(
            f"{checkpoint} is of another run: {'; '.join(found)}; give the same as then, or another --output_dir to start afresh"
        )
    return list(remarks(before, now))


def path_flags(recipe: Recipe) -> set[str]:
    """Names of the flags that are compared by what they lead to."""
    return {recipe.flags[kind].lstrip("-") for kind in PATHS if kind in recipe.flags} | {"deepspeed"}


def _decides(name: str) -> bool:
    return name not in (*FREE, *STEPS, *BATCH) and not name.startswith((*FREE_BEGINNINGS, "_"))


def _contents(recipe: Recipe, args: Namespace, records: TrainingData | None) -> Iterator[tuple[str, str]]:
    flag = {kind: recipe.flags.get(kind, kind) for kind in PATHS}
    if recipe.data and processes.is_first_on_node():  # which reads it for all of its node
        yield flag["data"], _file(recipe.data)
    if recipe.projector:
        yield flag["projector"], _file(recipe.projector)
    if recipe.model:
        yield flag["model"], _model(recipe.model, flag["model"], recipe.cache_dir)
    if recipe.tower:  # which the upstreams do not look for under --cache_dir
        yield flag["tower"], _model(recipe.tower, flag["tower"], None)
    if records and recipe.images is not None:
        yield flag["images"], _images(Path(recipe.images), records.survey.images)


def _deciding(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings by dotted name, without those that do not decide what is trained."""
    if not isinstance(settings, dict):
        yield prefix, settings
        return
    for name, value in settings.items():
        dotted = f"{prefix}.{name}" if prefix else str(name)
        if not dotted.startswith(DEEPSPEED_FREE):
            yield from _deciding(value, dotted)


def _file(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
        return f"{file.tell():,} bytes, sha256 {digest.hexdigest()}"


def _model(name: str, flag: str, cache_dir: str | None) -> str:
    """A digest of a model's config and of samples of its weights; of a hub name the name and the revision that is in the cache."""
    if Path(name).is_file():  # EVA-CLIP's weights are one file
        return f"{Path(name).stat().st_size} bytes"
    if Path(name).is_dir():
        return f"sha256 {weights_digest(name)}"
    return f"{name} {folder_of(name, flag, cache_dir).name}"


def _images(folder: Path, names: list[str], count: int = 256) -> str:
    """A digest of the sizes of some images, spread over the data."""
    digest = hashlib.sha256(f"{len(names)}".encode())
    for name in names[:: max(1, len(names) // count)]:
        path = os.path.join(folder, name)
        digest.update(f"{name} {os.path.getsize(path) if os.path.isfile(path) else 'missing'}".encode("utf-8", "surrogatepass"))
    return f"{len(names):,} images, sha256 {digest.hexdigest()}"


def _devices(args: Namespace) -> int:
    """GPUs that a batch is for: one per process, or under nn.DataParallel all that one process sees."""
    import torch

    if processes.world_size() > 1 or getattr(args, "use_cpu", False) or getattr(args, "no_cuda", False):
        return processes.world_size()
    return max(1, torch.cuda.device_count())


def _versions() -> Iterator[tuple[str, str]]:
    for name in PACKAGES:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            continue


def _plain(value: Any) -> Any:
    """A flag's value as JSON gives it back."""
    return json.loads(json.dumps(value, default=lambda other: other.value if isinstance(other, Enum) else str(other)))


def shortened(content: str) -> str:
    """The first twelve digits of a digest are enough to see that it is another one."""
    return re.sub(r"(sha256 [0-9a-f]{12})[0-9a-f]+", r"\1", content)


def _split(run: Fingerprint) -> str:
    per_device, accumulation = (run.batch[name] for name in BATCH)
    return f"{run.samples_per_step} ({per_device} per device x {accumulation} accumulated x {run.batch['devices']} devices)"
