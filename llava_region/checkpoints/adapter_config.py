"""What `adapter_config.json` of a LoRA run says, and which of it can be merged exactly: everything else is refused by name.

The same check serves all that applies an adapter: merging, pruning (which merges on the way), loading and the weight metrics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

from llava_region.checkpoints.model_source import ModelSource
from llava_region.checkpoints.pattern_keys import RULES, WHOLE, BadPattern, Matches, matches
from llava_region.errors import LlavaRegionError
from llava_region.run_files import ADAPTER_CONFIG_FILE

# How A and B were filled before training. These leave the base as it is; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA train on a changed
# base. PEFT writes `true` where it converted such an adapter to one for the unchanged base.
_INITIALISATIONS = ("gaussian", "eva", "orthogonal")
# Options that change the merged weight in ways that LLaVA and Bunny cannot produce; those not named here are refused without a reason.
_REASONS = {
    "use_dora": "DoRA's magnitudes are not merged here",
    "layer_replication": "the adapter replicates layers",
    "megatron_config": "the adapter was made for Megatron",
    "loftq_config": "LoftQ trains on a changed base",
    "corda_config": "CorDA trains on a changed base",
    "lora_ga_config": "LoRA-GA trains on a changed base",
    "kasa_config": "KaSA trains on a changed base",
    "alora_invocation_tokens": "the adapter is on for a part of the tokens only",
    "arrow_config": "the adapter is one of several that a router chooses from",
    "target_parameters": "the adapter is on parameters, not on linear modules",
    "trainable_token_indices": "single rows of the embeddings were trained",
    "use_qalora": "QA-LoRA pools its input",
}

_Values = tuple[int, float]


class _Field(NamedTuple):
    fits: Callable[[Any], bool]
    allowed: str


def _is_flag(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and _is_positive(value)


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_names(value: Any) -> bool:
    return _is_text(value) or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def _is_indices(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return value is None or all(isinstance(index, int) and not isinstance(index, bool) for index in values)


def _is_object(value: Any) -> bool:
    return value is None or isinstance(value, dict)


def _is_pattern_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or (isinstance(value, dict) and all(map(fits, value.values())))


def _is_initialisation(value: Any) -> bool:
    return _is_flag(value) or (isinstance(value, str) and value.lower() in _INITIALISATIONS)


_FLAG = _Field(_is_flag, "true or false")
_TEXT = _Field(_is_text, "a text, or null")
_NAMES = _Field(_is_names, "a list of names, or a text")
_ANY = _Field(lambda value: True, "anything")
_FIELDS = {
    # what the merged weight is made of
    "r": _Field(_is_rank, "a whole number from 1 on"),
    "lora_alpha": _Field(_is_positive, "a number above 0"),
    "rank_pattern": _Field(_is_pattern_of(_is_rank), "an object from names to whole numbers from 1 on"),
    "alpha_pattern": _Field(_is_pattern_of(_is_positive), "an object from names to numbers above 0"),
    "use_rslora": _FLAG,
    "fan_in_fan_out": _FLAG,
    "init_lora_weights": _Field(_is_initialisation, f"true, false, {', '.join(_INITIALISATIONS)}, which leave the base as it is"),
    # which tensors there are: their names say it too
    "bias": _Field(lambda value: value in (None, "none", "all", "lora_only"), "none, all, lora_only"),
    "modules_to_save": _NAMES,
    "target_modules": _NAMES,
    "exclude_modules": _NAMES,
    "layers_pattern": _NAMES,
    "layers_to_transform": _Field(_is_indices, "a list of whole numbers"),
    # what the training or PEFT itself goes by
    "lora_dropout": _Field(lambda value: value is None or _is_number(value), "a number"),
    "base_model_name_or_path": _TEXT,
    "peft_type": _TEXT,
    "peft_version": _TEXT,
    "revision": _TEXT,
    "task_type": _TEXT,
    "inference_mode": _FLAG,
    "auto_mapping": _Field(_is_object, "an object, or null"),
    "runtime_config": _ANY,  # where to compute
    "eva_config": _ANY,  # of an initialisation that leaves the base as it is; the ranks that it chose are in rank_pattern
    # of an option that is refused where it is set, and PEFT writes this whether it is or not
    "megatron_core": _ANY,
    "qalora_group_size": _ANY,
}


def lora_config(source: ModelSource) -> dict[str, Any]:
    """`adapter_config.json` of a LoRA run, every field of it understood: what is set can be merged exactly, or changes no weight.

    Raises:
        LlavaRegionError: it is not of a LoRA adapter; a field has a value of a wrong type; or a field is set that cannot be merged
            or is not known here.
    """
    config, file = source.adapter_config, source.path / ADAPTER_CONFIG_FILE
    if config.get("peft_type") != "LORA":
        raise LlavaRegionError(f"{file} is not of a LoRA adapter; allowed: peft_type LORA")
    for key in ("r", "lora_alpha"):
        if key not in config:
            raise LlavaRegionError(f"{file} has no '{key}'; copy the file again from the run")
    for key, value in config.items():
        known = _FIELDS.get(key)
        if known is None and value:
            reason = _REASONS.get(key, "it was made with an option that is not merged here")
            raise LlavaRegionError(
                f"the adapter in {source} cannot be merged: {reason} ('{key}' in {ADAPTER_CONFIG_FILE}); "
                "merge it with the PEFT that trained it"
            )
        if known is not None and not known.fits(value):
            hint = "; convert the adapter with PEFT's path_initial_model_for_weight_conversion" if key == "init_lora_weights" else ""
            raise LlavaRegionError(f"'{key}' in {file} is {_shortened(repr(value))}; allowed: {known.allowed}{hint}")
    return config


def scalings_of(modules: Collection[str], source: ModelSource) -> dict[str, tuple[int, float]]:
    """Rank of a run's adapter on each module, and what B @ A is multiplied with: alpha / r, with rsLoRA alpha / sqrt(r).

    `rank_pattern` and `alpha_pattern` override both for modules that a key matches. PEFT's versions match keys by different rules;
    what is returned is the value by all of them.

    Args:
        modules: names as in the bare model.

    Raises:
        LlavaRegionError: as `lora_config`; a key is not a regular expression, or takes too long to match; or PEFT's versions find
            different values for a module.
    """
    config = lora_config(source)
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    try:
        found = matches({**ranks, **alphas}, modules)
    except BadPattern as e:
        names = ", ".join(repr(key) for key in {**ranks, **alphas})
        raise LlavaRegionError(
            f"the keys of rank_pattern and alpha_pattern in {source.path / ADAPTER_CONFIG_FILE} cannot be matched: {e}; "
            f"use names of modules as keys (they are {_shortened(names)})"
        ) from e
    values = {module: _agreed(module, config, ranks, alphas, found) for module in modules}
    root = bool(config.get("use_rslora"))
    return {module: (rank, alpha / (math.sqrt(rank) if root else rank)) for module, (rank, alpha) in values.items()}


def targeted(modules: Collection[str], config: Mapping[str, Any], source: ModelSource) -> list[str]:
    """Those of the base's linear modules that `target_modules` and the fields beside it name, by PEFT's rule; none where layers are
    named by number, which PEFT's versions count in different ways.

    Args:
        config: as `lora_config` returns it.

    Raises:
        LlavaRegionError: an expression cannot be matched.
    """
    names = config.get("target_modules")
    if names is None or config.get("layers_to_transform") is not None:
        return []
    chosen = _named(names, modules, source, "target_modules")
    excluded = _named(config.get("exclude_modules") or [], modules, source, "exclude_modules")
    return [module for module in chosen if module not in excluded]


def _named(names: str | list[str], modules: Collection[str], source: ModelSource, field: str) -> list[str]:
    if not isinstance(names, str):
        ends = tuple(f".{name}" for name in names)
        return [module for module in modules if f".{module}".endswith(ends)]
    try:
        found = matches([names], modules, (WHOLE,))
    except BadPattern as e:
        raise LlavaRegionError(
            f"'{field}' in {source.path / ADAPTER_CONFIG_FILE} cannot be matched: {e}; use a list of names of modules"
        ) from e
    return [module for module in modules if (WHOLE, names, module) in found]


def _agreed(module: str, config: Mapping[str, Any], ranks: Mapping[str, int], alphas: Mapping[str, float], found: Matches) -> _Values:
    """Rank and alpha of a module, the same by all of PEFT's versions."""

    def first(keys: Iterable[str], rule: str) -> str:
        return next((key for key in keys if (rule, key, module) in found), module)

    values: dict[_Values, None] = {}  # in the order of PEFT's versions
    for rule in RULES:
        # older versions look for one key in both patterns, newer ones for one in each
        both = first([*ranks, *alphas], rule)
        for rank_key, alpha_key in ((both, both), (first(ranks, rule), first(alphas, rule))):
            values[ranks.get(rank_key, config["r"]), alphas.get(alpha_key, config["lora_alpha"])] = None
    if len(values) == 1:
        return next(iter(values))
    keys = [
        f"'{key}' of {name}"
        for name, pattern in (("rank_pattern", ranks), ("alpha_pattern", alphas))
        for key in pattern
        if key == module or any((rule, key, module) in found for rule in RULES)
    ]
    meant = " or ".join(f"r {rank} with alpha {alpha:g}" for rank, alpha in values)
    match = f"both match '{module}'" if len(keys) > 1 else f"matches '{module}'"
    raise LlavaRegionError(
        f"{' and '.join(keys)} {match}, and PEFT's versions disagree what that means ({meant}); merge it with the PEFT that trained it, "
        f"or write full names of modules as keys in {ADAPTER_CONFIG_FILE}"
    )


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."
