"""A user's DeepSpeed config, corrected in memory where DeepSpeed would refuse it or train at other rates. No file is written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_region.errors import LlavaRegionError
from llava_region.files import read_json

if TYPE_CHECKING:
    from llava_region.upstreams import Recipe

PREFETCH = "stage3_prefetch_bucket_size"
# DeepSpeed's names of the setting with which ZeRO-3 saves whole weights; the last one is of before 0.6
GATHER = (
    "stage3_gather_16bit_weights_on_model_save", "gather_16bit_weights_on_model_save", "stage3_gather_fp16_weights_on_model_save",
)  # fmt: skip
# counts of elements, which DeepSpeed takes as whole numbers only from 0.15 on
COUNTS = (
    "reduce_bucket_size", "allgather_bucket_size", "sub_group_size", PREFETCH, "stage3_param_persistence_threshold",
    "stage3_model_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance", "prefetch_bucket_size",
    "param_persistence_threshold", "model_persistence_threshold", "max_live_parameters", "max_reuse_distance",
)  # fmt: skip
# the flag that decides where such an entry is left out, and the types of which a trainer has its own
BY_FLAGS = {
    "optimizer": ("--optim", ("adam", "adamw")), "scheduler": ("--lr_scheduler_type", ("warmuplr", "warmupdecaylr", "warmupcosinelr")),
}  # fmt: skip


def correct(settings: dict[str, Any], recipe: Recipe, hidden: int | None = None) -> list[str]:
    """Correct a config in place. To correct it twice changes nothing more.

    Args:
        settings: a DeepSpeed config, as its file holds it.
        recipe: what the flags ask for.
        hidden: hidden size of the language model, from which the trainer fills `"auto"`; None: not known yet.

    Returns:
        what was corrected, one phrase each.
    """
    said = []
    zero = settings.get("zero_optimization")
    if isinstance(zero, dict):
        said += _whole_counts(zero)
        if zero.get("stage") == 3 and zero.get(PREFETCH) == "auto" and hidden and not (0.9 * hidden * hidden).is_integer():
            zero[PREFETCH] = int(0.9 * hidden * hidden)
            said.append(f'"{PREFETCH}": "auto" would be a fraction for hidden size {hidden}, and is {zero[PREFETCH]}')
    for part in BY_FLAGS if recipe.projector_rate is not None else ():
        if part in settings and left_to_flags(part, settings[part]):
            del settings[part]
            flag = recipe.flags["projector_rate"]
            said.append(f"its '{part}' would ignore {flag}, and is left out: {BY_FLAGS[part][0]} decides")
    return said


def corrected(path: str | Path, recipe: Recipe, hidden: int | None = None) -> tuple[dict[str, Any], list[str]]:
    """The config in a file, corrected, and what was. The file stays as it is.

    Raises:
        LlavaRegionError: it cannot be read.
    """
    settings = read_json(Path(path))
    return settings, correct(settings, recipe, hidden) if isinstance(settings, dict) else []


def left_to_flags(part: str, entry: Any) -> bool:
    """Whether an 'optimizer' or 'scheduler' says no more than the flags do: AdamW, a warm-up, and "auto" for every number."""
    if not isinstance(entry, Mapping) or str(entry.get("type")).lower() not in BY_FLAGS[part][1]:
        return False
    return all(value == "auto" for value in (entry.get("params") or {}).values())


def gathers_weights(zero: Mapping[str, Any]) -> bool:
    """Whether ZeRO-3 saves whole weights."""
    return any(zero.get(name) for name in GATHER)


def hidden_size(config: Any) -> int | None:
    """The hidden size that the trainer fills `"auto"` with.

    Args:
        config: a model's config, or the content of a `config.json`.
    """
    found = config if isinstance(config, Mapping) else vars(config)
    return found.get("hidden_size") or found.get("d_model") or max(found.get("hidden_sizes") or [0]) or None


def _whole_counts(zero: dict[str, Any]) -> list[str]:
    said = []
    for name in COUNTS:
        value = zero.get(name)
        if isinstance(value, float) and 0 <= value < float("inf") and not value.is_integer():
            zero[name] = int(value)
            said.append(f'"{name}": {value} is not a whole number, and is {zero[name]}')
    return said


def is_offloaded(zero: Mapping[str, Any], what: str) -> bool:
    """Whether ZeRO keeps something outside the GPU: `param` or `optimizer`."""
    return (zero.get(f"offload_{what}") or {}).get("device", "none") != "none"


def takes_cpu_adam(settings: Mapping[str, Any]) -> bool:
    """Whether the optimizer is offloaded, and is DeepSpeed's Adam for CPUs: accelerate has it take the place of the trainer's."""
    own = settings.get("optimizer")
    if not is_offloaded(settings.get("zero_optimization", {}), "optimizer"):
        return False
    if own is None:
        return settings.get("zero_force_ds_cpu_optimizer", True)
    return str(own.get("type")).lower() in ("adam", "adamw") and not (own.get("params") or {}).get("torch_adam")


def build_cpu_adam(path: str | Path, recipe: Recipe) -> None:
    """Have DeepSpeed compile its Adam for CPUs where a config needs it. It would do so after weights are loaded.

    Raises:
        LlavaRegionError: it cannot be compiled here.
    """
    settings, _ = corrected(path, recipe)
    if not takes_cpu_adam(settings):
        return
    from deepspeed.ops import op_builder

    builders: Any = op_builder  # which gets its content when it is imported, by what the machine has
    try:
        builders.CPUAdamBuilder().load(verbose=False)
    except Exception as e:  # of torch, ninja, the compiler or CUDA
        why = " ".join(str(e).split())[:200]
        raise LlavaRegionError(
            f"{path} offloads the optimizer, for which DeepSpeed compiles its Adam, and that failed ({why}); it needs a C++ compiler and "
            "ninja, and with a GPU the CUDA toolkit of torch's version (CUDA_HOME); or give a config without offload_optimizer"
        ) from e
