"""Merge a LoRA run into a full LLaVA or Bunny model, without ever holding the model in memory.

Only weights that the adapter updates are computed, in fp32 and cast once; all others are copied byte for byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from llava_region.checkpoints.adapter import Adapter, LoraUpdate, read_adapter
from llava_region.checkpoints.model_folder import (
    TOKENIZER_FILES,
    ModelFolder,
    cast,
    check_output,
    check_same_shape,
    locate,
    main_dtype,
    read_model,
    read_region,
    side_files,
    write_model,
)
from llava_region.checkpoints.tensors import Checkpoint, Computed, Entry, bare_name
from llava_region.decoder import is_projector, is_vision, layer_index
from llava_region.errors import LlavaRegionError
from llava_region.files import output_folder, read_json
from llava_region.models.loading import settings_folder
from llava_region.run_files import WEIGHT_FILES

NON_LORA, COST = "non_lora_trainables.bin", "cost.json"
# The class that upstream's save_pretrained would name for each model_type.
ARCHITECTURES = {
    "llava": "LlavaLlamaForCausalLM", "llava_llama": "LlavaLlamaForCausalLM", "llava_mistral": "LlavaMistralForCausalLM",
    "llava_mpt": "LlavaMptForCausalLM", "bunny-llama": "BunnyLlamaForCausalLM", "bunny-minicpm": "BunnyMiniCPMForCausalLM",
    "bunny-phi": "BunnyPhiForCausalLM", "bunny-phi3": "BunnyPhi3ForCausalLM", "bunny-qwen2": "BunnyQwen2ForCausalLM",
    "bunny-stablelm": "BunnyStableLMForCausalLM",
}  # fmt: skip


def merge(run: str | Path, out: str | Path, base: str | Path | None = None, *, force: bool = False) -> dict:
    """Write the full model that a LoRA run stands for; it loads in upstream's `load_pretrained_model` without a base.

    Args:
        run: output folder of a LoRA run, or a `checkpoint-N` in it.
        out: folder to write; appears only when it is whole.
        base: model the run was trained on (for QLoRA: in 16 bit), a folder or a Hugging Face name in the local cache.
            Default: the one that the run names.
        force: replace `out`.

    Returns:
        `{"out", "run", "base", "layers": decoder layers that changed, "merged": weights computed, "copied": tensors copied,
        "bytes", "remarks": [str]}`.

    Raises:
        LlavaRegionError: not a LoRA run, another base, a damaged file, or something trained that has no place in the base.
    """
    model, remarks = merged_model(run, base)
    check_output(out, (run, model.path), force)
    with output_folder(out, force) as folder:
        size = write_model(model, folder, "merging")
    changed = [name for name, entry in model.tensors.items() if isinstance(entry, Computed) and isinstance(entry.load, _Merged)]
    return {
        "out": str(out), "run": str(run), "base": str(base or model.path), "merged": len(changed),
        "layers": sorted({layer_index(name) for name in changed} - {None}), "copied": len(model.tensors) - len(changed),
        "bytes": size, "remarks": remarks,
    }  # fmt: skip


@dataclass(frozen=True)
class _Merged:
    """Loads a weight of the base with its update applied."""

    weight: Entry
    update: LoraUpdate

    def __call__(self) -> torch.Tensor:
        return self.update.apply(self.weight.load())


def merged_model(run: str | Path, base: str | Path | None = None) -> tuple[ModelFolder, list[str]]:
    """The full model that a LoRA run stands for, no tensor computed yet, and remarks for the user. See `merge`."""
    run = locate(run)
    _refuse_full(run)
    adapter = read_adapter(run)
    settings = settings_folder(run)
    config, region = read_json(settings / "config.json"), read_region(settings)
    if config.get("model_type") not in ARCHITECTURES:
        raise LlavaRegionError(
            f"{run} is no LLaVA or Bunny run: its model_type is '{config.get('model_type')}'; allowed: {', '.join(ARCHITECTURES)}"
        )
    base = base or (region or {}).get("base_model") or adapter.config.get("base_model_name_or_path")
    if not base:
        raise LlavaRegionError(f"{run} names no base model; give the one it was trained on with --base")
    model = read_model(base)
    check_same_shape(config, model.config, (f"the run {run}", f"the base {base}"))
    tensors = _with_trained(model.tensors, {**_trained_beside(run), **adapter.tensors}, run, base)
    tensors = _with_updates(tensors, adapter, base)
    _check_vocabulary(tensors, config, run, base)
    if not any(map(is_projector, tensors)):
        raise LlavaRegionError(
            f"neither {run} nor {base} holds a projector (mm_projector), so the merged model could not see; give the whole run"
        )
    if region is not None:
        region = {**region, "merged_from": {"run": str(run), "base": str(base)}}
    remarks = _remarks(config, region)
    merged = replace(
        model, config=_merged_config(config, tensors), tensors=tensors, region=region, side_files=_side_files(run, model, config)
    )
    return merged, remarks


def _refuse_full(run: Path) -> None:
    if (run / "adapter_config.json").is_file():
        return
    if any((run / name).is_file() for name in WEIGHT_FILES):
        raise LlavaRegionError(
            f"{run} is a whole model already (full tuning, or merged before): there is nothing to merge, use it as it is"
        )
    raise LlavaRegionError(f"{run} is no LoRA run: it holds no adapter_config.json; give the output folder of one, or a checkpoint-N in it")


def _trained_beside(run: Path) -> dict[str, Entry]:
    """What was trained beside the adapter (projector, unfrozen vision tower, resized embeddings), by name in the bare model."""
    if not (run / NON_LORA).is_file():
        raise LlavaRegionError(
            f"{run} holds no {NON_LORA} (the trained projector; upstream writes it only when a run ends); give a checkpoint that has it"
        )
    return {bare_name(name): entry for name, entry in Checkpoint(run / NON_LORA).items()}


def _with_updates(tensors: Mapping[str, Entry], adapter: Adapter, base) -> dict[str, Entry]:
    merged = dict(tensors)
    for module, update in adapter.updates.items():
        name = f"{module}.weight"
        weight = tensors.get(name)
        if weight is None:
            tied = "; its lm_head is tied to the embeddings" if module == "lm_head" else ""
            raise LlavaRegionError(f"the adapter updates '{name}', which {base} does not hold{tied}; give the base the run was trained on")
        if not weight.dtype.is_floating_point or weight.dtype.itemsize < 2:
            raise LlavaRegionError(f"'{name}' of {base} is quantised ({weight.dtype}); give the base in 16 or 32 bit")
        if weight.shape != update.shape_for(weight.shape):
            raise LlavaRegionError(
                f"'{name}' has shape {weight.shape} in {base}, the adapter was made for {update.shape_for(weight.shape)}; "
                "give the base of the run"
            )
        merged[name] = Computed(weight.dtype, weight.shape, _Merged(weight, update))
    return merged


def _with_trained(tensors: Mapping[str, Entry], trained: Mapping[str, Entry], run, base) -> dict[str, Entry]:
    """Put tensors that were trained whole in their place; the projector and the vision tower may be new."""
    merged = dict(tensors)
    dtype = main_dtype(tensors)
    for name, entry in trained.items():
        old = tensors.get(name)
        if old is None and not (is_projector(name) or is_vision(name)):
            raise LlavaRegionError(f"{run} trained '{name}', which {base} does not hold; give the base the run was trained on")
        if 0 in entry.shape:
            raise LlavaRegionError(f"'{name}' in {run} is empty, as ZeRO-3 leaves it when a run is not saved whole; save the run again")
        resized = _is_vocabulary(name) and old is not None and entry.shape[1:] == old.shape[1:]
        if old is not None and entry.shape != old.shape and not resized:
            raise LlavaRegionError(f"'{name}' has shape {old.shape} in {base} and {entry.shape} in {run}; give the base of the run")
        merged[name] = cast(entry, old.dtype if old is not None else dtype)
    return merged


def _is_vocabulary(name: str) -> bool:
    return name.endswith(("embed_tokens.weight", "lm_head.weight", "lm_head.bias", "transformer.wte.weight")) and not is_vision(name)


def _check_vocabulary(tensors: Mapping[str, Entry], config: dict, run, base) -> None:
    for name, entry in tensors.items():
        if _is_vocabulary(name) and entry.shape[0] != config.get("vocab_size", entry.shape[0]):
            raise LlavaRegionError(
                f"{run} has a vocabulary of {config['vocab_size']}, but '{name}' of {base} has {entry.shape[0]} rows "
                f"and {NON_LORA} does not replace it; give the base of the run"
            )


def _merged_config(config: dict, tensors: Mapping[str, Entry]) -> dict:
    config = {**config, "architectures": [ARCHITECTURES[config["model_type"]]], "use_cache": True}
    config["torch_dtype"] = str(main_dtype(tensors)).removeprefix("torch.")
    config.pop("quantization_config", None)
    return config


def _remarks(config: dict, region: dict | None) -> list[str]:
    quantised = config.get("quantization_config") or (region or {}).get("mode") == "qlora"
    return ["trained on a quantised base (QLoRA), merged onto the base in its own type: answers may differ slightly"] if quantised else []


def _side_files(run: Path, base: ModelFolder, config: dict) -> dict[str, Path]:
    """The base's tokenizer and code, as upstream takes them; the run's tokenizer where training resized the vocabulary; its cost."""

    def has_tokenizer(files) -> bool:
        return any(name in files for name in TOKENIZER_FILES)

    own = side_files(run)
    resized = config.get("vocab_size") != base.config.get("vocab_size")
    if has_tokenizer(own) and (resized or not has_tokenizer(base.side_files)):
        files = {**{name: file for name, file in base.side_files.items() if file.suffix == ".py"}, **own}
    else:
        files = base.side_files
    cost = settings_folder(run) / COST  # of this training, not of the base's
    return {**{name: file for name, file in files.items() if name != COST}, **({COST: cost} if cost.is_file() else {})}
