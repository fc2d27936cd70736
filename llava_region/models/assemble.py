"""Weights into an upstream's model: whole checkpoints, LoRA runs merged on their base, pretrained projectors; never in part."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import torch

from llava_region.checkpoints.tensors import Checkpoint, bare_name
from llava_region.decoder import is_projector, is_vision, layer_index
from llava_region.errors import LlavaRegionError


@contextmanager
def quiet_errors(folder: Path):
    """Silence transformers' list of weights not used (we check them), and turn its errors into ours."""
    from safetensors import SafetensorError
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except LlavaRegionError:
        raise
    except (OSError, RuntimeError, ValueError, SafetensorError) as e:
        raise LlavaRegionError(f"cannot load {folder}: {' '.join(str(e).split())[:400]}") from e
    finally:
        logging.set_verbosity(before)


def load_text(side, folder: Path, config: dict, options: dict):
    """A plain language model through transformers, and the tokenizer as the upstream loads it."""
    attention = {"attn_implementation": options["attn_implementation"]} if options["attn_implementation"] else {}
    model, info = side.text_model_class(config).from_pretrained(
        folder,
        torch_dtype=options["dtype"],
        device_map=options["device_map"],
        low_cpu_mem_usage=True,
        output_loading_info=True,
        **attention,
    )
    _refuse_incomplete(model, info, folder)
    return model, side.load_tokenizer(folder, config)


def load_multimodal(side, folder: Path, base: Path | None, settings: Path, options: dict):
    """A model, or an adapter or projector on its base, through the upstream's model side; returns model, tokenizer, image processor.

    Args:
        settings: folder of the config to build the model of.
        options: dtype, device_map and attn_implementation, as for its `build`.
    """
    weights = base or folder
    model, tokenizer, info = side.build(weights, settings, **options)
    extra = _trained_beside(folder) if base else {}
    _refuse_incomplete(model, info, weights, extra)
    _put(model, extra, folder)
    if (folder / "adapter_config.json").is_file():
        model = _merge_adapter(model, folder)
    processor = side.attach_vision(model, tokenizer, weights, extra)
    return model, tokenizer, processor


def _trained_beside(folder: Path) -> dict[str, torch.Tensor]:
    """What a run trained outside its adapter (the projector), by its name in the bare model."""
    name = "non_lora_trainables.bin" if (folder / "non_lora_trainables.bin").is_file() else "mm_projector.bin"
    tensors = Checkpoint(folder / name)
    return {bare_name(name): tensors.tensor(name) for name in tensors}


def _put(model, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Copy tensors into the model by name; the vision tower's, not loaded yet, are left to `attach_vision`."""
    tensors = {name: tensor.to(device=model.device, dtype=model.dtype) for name, tensor in tensors.items() if not is_vision(name)}
    # a projector that the base lacks is still on the meta device, where copying would do nothing
    unknown = model.load_state_dict(tensors, strict=False, assign=True).unexpected_keys
    if unknown:
        raise LlavaRegionError(f"{folder} holds weights that its model has not: {unknown[0]} and {len(unknown) - 1} more")


def _refuse_incomplete(model, info: dict, folder: Path, extra=()) -> None:
    """A model whose layers were partly absent would run with random numbers; left-over layers mean another model.

    Raises:
        LlavaRegionError: such a tensor, by name.
    """
    # under newer torch transformers takes all tensors on the meta device for one tied group, and reports none of it missing
    absent = {*info["missing_keys"], *(name for name, parameter in model.named_parameters() if parameter.is_meta)}
    missing = sorted(name for name in absent if not is_vision(name) and name not in extra)
    surplus = [name for name in info["unexpected_keys"] if layer_index(name) is not None and not name.endswith("inv_freq")]
    if missing:
        hint = "give the LoRA run or the merged model instead" if all(map(is_projector, missing)) else "the checkpoint is incomplete"
        raise LlavaRegionError(f"{folder} lacks {missing[0]} ({len(missing)} tensors in all); {hint}")
    if surplus:
        raise LlavaRegionError(f"{folder} has tensors beyond the layers of its config.json, such as {surplus[0]}; mend num_hidden_layers")


def _merge_adapter(model, folder: Path):
    """The model with the adapter of `folder` merged in by PEFT.

    Raises:
        LlavaRegionError: adapter and model do not match tensor for tensor, which PEFT would pass over.
    """
    from peft import PeftModel

    files = [file for file in (folder / "adapter_model.safetensors", folder / "adapter_model.bin") if file.is_file()]
    if not files:
        raise LlavaRegionError(f"{folder} holds no adapter_model.safetensors; copy the whole run")
    stored = {name for name in Checkpoint(files[0]) if "lora_" in name}
    model = PeftModel.from_pretrained(model, folder)
    wanted = {name.replace(".default", "") for name, _ in model.named_parameters() if "lora_" in name}
    if stored != wanted:
        odd = sorted(stored ^ wanted)
        raise LlavaRegionError(f"the adapter in {folder} does not fit its base: {odd[0]} ({len(odd)} tensors) is on one side only")
    dtype = model.dtype
    model = model.merge_and_unload()
    for parameter in model.parameters():  # some of PEFT's versions merge in fp32; buffers (rotary frequencies) keep theirs
        parameter.data = parameter.data.to(dtype)
    return model
