"""Weights into an upstream's model: whole checkpoints, LoRA runs merged on their base, pretrained projectors; never in part."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from llava_region.checkpoints.adapter import open_adapter, read_adapter, trained_besides
from llava_region.checkpoints.adapter_config import lora_config
from llava_region.checkpoints.names import unwrapped
from llava_region.checkpoints.tensors import refuse_not_finite
from llava_region.decoder import is_projector, is_vision, layer_index
from llava_region.errors import LlavaRegionError
from llava_region.run_files import CONFIG_FILE

if TYPE_CHECKING:
    import torch

    from llava_region.checkpoints.model_source import ModelSource
    from llava_region.upstreams import ModelSide


@contextmanager
def quiet_errors(model: ModelSource) -> Iterator[None]:
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
        raise LlavaRegionError(f"cannot load {model}: {' '.join(str(e).split())[:400]}") from e
    finally:
        logging.set_verbosity(before)


def load_text(side: ModelSide, source: ModelSource, options: Mapping[str, Any]) -> tuple[Any, Any]:
    """A plain language model through transformers, and the tokenizer as the upstream loads it."""
    attention = {"attn_implementation": options["attn_implementation"]} if options["attn_implementation"] else {}
    model, info = side.text_model_class(source.config).from_pretrained(
        source.path,
        torch_dtype=options["dtype"],
        device_map=options["device_map"],
        low_cpu_mem_usage=True,
        output_loading_info=True,
        **attention,
    )
    _refuse_incomplete(model, info, source)
    return model, side.load_tokenizer(source.path, source.config)


def load_multimodal(side: ModelSide, source: ModelSource, base: ModelSource | None, options: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """A model, or an adapter or projector on its base, through the upstream's model side; returns model, tokenizer, image processor.

    Args:
        options: dtype, device_map and attn_implementation, as for its `build`.
    """
    weights = base or source
    if source.kind == "adapter":
        read_adapter(source)  # refuses, before weights load, what PEFT would misread
    model, tokenizer, info = side.build(weights.path, source.settings, **options)
    extra = {name: entry.load() for name, entry in trained_besides(source).items()} if base else {}
    _refuse_incomplete(model, info, weights, extra)
    _put(model, extra, source)
    if source.kind == "adapter":
        model = _merge_adapter(model, source)
    processor = side.attach_vision(model, tokenizer, weights.path, extra)
    return model, tokenizer, processor


def _put(model: Any, tensors: Mapping[str, torch.Tensor], source: ModelSource) -> None:
    """Copy tensors into the model by name; the vision tower's, not loaded yet, are left to `attach_vision`."""
    hint = f"loaded as {model.dtype}; give a checkpoint from before that, or load it in a wider type"
    for name, tensor in tensors.items():
        refuse_not_finite(tensor.to(model.dtype), name, f"in {source}", hint)
    tensors = {name: tensor.to(device=model.device, dtype=model.dtype) for name, tensor in tensors.items() if not is_vision(name)}
    # a projector that the base lacks is still on the meta device, where copying would do nothing
    unknown = model.load_state_dict(tensors, strict=False, assign=True).unexpected_keys
    if unknown:
        raise LlavaRegionError(f"{source} holds weights that its model does not have: {unknown[0]} and {len(unknown) - 1} more")


def _refuse_incomplete(model: Any, info: Mapping[str, Any], source: ModelSource, extra: Collection[str] = ()) -> None:
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
        raise LlavaRegionError(f"{source} lacks {missing[0]} ({len(missing)} tensors in all); {hint}")
    if surplus:
        raise LlavaRegionError(f"{source} has tensors beyond the layers of its {CONFIG_FILE}, such as {surplus[0]}; fix num_hidden_layers")


def _merge_adapter(model: Any, run: ModelSource) -> Any:
    """The model with the adapter of a run merged in by PEFT.

    Raises:
        LlavaRegionError: adapter and model do not match tensor for tensor, which PEFT would ignore.
    """
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    # fields of a newer PEFT, which change no weight, are errors to an older one; so are newer initialisations, which are overwritten
    known = {field.name for field in fields(LoraConfig)}
    settings = {key: value for key, value in lora_config(run).items() if key in known and value is not None}
    config = LoraConfig(**{**settings, "init_lora_weights": True, "inference_mode": True})
    model = get_peft_model(model, config)
    stored = {_peft_name(name): entry for name, entry in open_adapter(run.path).items()}
    wanted = {name.replace(".default", "") for name, _ in model.named_parameters() if "lora_" in name}
    odd = sorted({name for name in stored if "lora_" in name} ^ wanted)
    if odd:
        raise LlavaRegionError(f"the adapter in {run} does not fit its base: {odd[0]} ({len(odd)} tensors) is on one side only")
    result = set_peft_model_state_dict(model, {name: entry.load() for name, entry in stored.items()})
    unused = [name for name in result.unexpected_keys if not is_vision(name)]  # the frozen tower's, next to biases; it is not loaded yet
    if unused:
        raise LlavaRegionError(f"the adapter in {run} does not fit its base: no place for {unused[0]} ({len(unused)} tensors)")
    dtype = model.dtype
    model = model.merge_and_unload()
    for parameter in model.parameters():  # some of PEFT's versions merge in fp32; buffers (rotary frequencies) keep theirs
        parameter.data = parameter.data.to(dtype)
    for module in read_adapter(run).updates:
        hint = f"the adapter is not finite, or the sum is beyond {dtype}; give a checkpoint from before that, or load it in a wider type"
        refuse_not_finite(model.get_parameter(f"{module}.weight"), module, f"of {run}, merged,", hint)
    return model


def _peft_name(name: str) -> str:
    """The name of an adapter's tensor as PEFT itself stores it, whatever was wrapped around the model."""
    return f"base_model.model.{unwrapped(name).replace('.default.', '.')}"
