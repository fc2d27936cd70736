"""What decoder layers keep for the backward pass, measured by running them, and the memory there is for it."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from llava_region import processes
from llava_region.checkpoints.model_source import LAYER_COUNT_KEYS, width_in
from llava_region.decoder import declared, find_decoder_layers, layer_index, linear_modules, parent_of, part_of
from llava_region.errors import UnsupportedUpstream
from llava_region.training.kept_tensors import kept_by
from llava_region.training.lean_layers import LeanLayers
from llava_region.training.recompute_plan import Activations, Workload
from llava_region.training.supervised_loss import causal_of, logits_at_once

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PretrainedConfig

    Context = Callable[[], AbstractContextManager[Any]]

# Of the free memory, what is left alone: allocator fragmentation, and what other libraries take later.
MARGIN = 0.1
# Bytes a logit of the loss takes at its worst, under upstream's loss: the head's output, its copy in fp32, the copy that is
# shifted by one position, and the log-softmax.
LOGIT_BYTES = 16
# Bytes a trainable parameter still takes after the first step began, without DeepSpeed: gradient and AdamW's two moments.
TRAINABLE_BYTES = 12
# Sequence lengths that are measured. Equal remainders by 16, since attention kernels pad to multiples of 8 or 16;
# not such a multiple, so that what padding costs is in the figure.
LENGTHS = (17, 33, 49)
SAMPLES = 2
SAMPLE = {False: 0, True: 1}  # layers of `sample_model`, by whether they are tuned


@dataclass(frozen=True)
class KeptBytes:
    """Bytes that one decoder layer keeps for its backward pass, in addition to its input and its parameters.

    Attributes:
        constant: whatever the batch is (weights that autocast has cast).
        per_token: for every token of the batch.
        per_token_squared: for every token, times the tokens of its sequence (eager attention's scores).
    """

    constant: float
    per_token: float
    per_token_squared: float

    def at(self, samples: int, length: int) -> int:
        """Bytes for `samples` sequences of `length` tokens each."""
        return round(self.constant + samples * length * (self.per_token + length * self.per_token_squared))

    @classmethod
    def fit(cls, sizes: list[int], samples: int = SAMPLES, lengths: tuple[int, int, int] = LENGTHS) -> KeptBytes:
        """The three terms from the bytes measured at three equidistant sequence lengths."""
        step = lengths[1] - lengths[0]
        squared = max((sizes[2] - 2 * sizes[1] + sizes[0]) / (2 * step * step), 0.0)
        linear = max((sizes[2] - sizes[0]) / (2 * step) - squared * (lengths[2] + lengths[0]), 0.0)
        constant = max(sizes[1] - linear * lengths[1] - squared * lengths[1] ** 2, 0.0)
        return cls(constant, linear / samples, squared / samples)


def measure(model: nn.Module, layers: Iterable[int], context: Context = nullcontext, lean: bool = False) -> dict[int, KeptBytes]:
    """Run the given decoder layers on a few random tokens and count what autograd keeps.

    The layers run inside their own model's forward, so that masks, position ids and ALiBi biases are the model's, in
    training mode and with the attention kernel of this device; all other layers are skipped. The random state and the
    model are left as they were.

    Args:
        model: bare, or under PEFT, DDP or DeepSpeed; not partitioned by ZeRO-3 (see `sample_model`).
        layers: indices of the decoder layers.
        context: makes the context that training runs in (autocast).
        lean: whether norms and gates are computed again (`lean_layers`).

    Raises:
        UnsupportedUpstream: the model checkpoints its layers by itself, not through `_gradient_checkpointing_func`.
    """
    parent, modules = parent_of(model), find_decoder_layers(model).modules
    index = {id(module): i for i, module in enumerate(modules)}
    sizes: dict[int, list[int]] = {i: [] for i in layers}
    wrapped = LeanLayers(modules[i] for i in sizes)

    def probe(function: Any, hidden: torch.Tensor, *arguments: Any) -> Any:
        layer = index[id(function.__self__)]
        if layer not in sizes:
            return (hidden,)
        with wrapped.active(lean):
            output, kept = kept_by(function, hidden.detach().requires_grad_(), *arguments)
        sizes[layer].append(kept)
        return output

    devices = [p.device for p in parent.parameters() if p.device.type == "cuda"][:1]
    try:
        with _layers_run_by(parent, probe), torch.random.fork_rng(devices), torch.enable_grad():
            for length in LENGTHS:
                with context():
                    parent(**_random_inputs(parent, length), use_cache=False)
    finally:
        wrapped.remove()
    if not all(len(found) == len(LENGTHS) for found in sizes.values()):
        raise UnsupportedUpstream(
            f"{type(parent).__module__}.{type(parent).__name__} calls torch.utils.checkpoint itself, so its layers can't be measured"
        )
    return {layer: KeptBytes.fit(found) for layer, found in sizes.items()}


@contextmanager
def _layers_run_by(parent: Any, function: Callable[..., Any]) -> Iterator[None]:
    """Within the block, in training mode, `function(layer.__call__, hidden, *arguments)` runs each decoder layer of `parent`."""
    saved = {name: parent.__dict__.get(name) for name in ("_gradient_checkpointing_func", "gradient_checkpointing")}
    training = {module: module.training for module in parent.modules()}
    try:
        parent.train()
        parent._gradient_checkpointing_func, parent.gradient_checkpointing = function, True
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for name, value in saved.items():
            if value is None:
                parent.__dict__.pop(name, None)
            else:
                setattr(parent, name, value)


def _random_inputs(parent: Any, length: int) -> dict[str, torch.Tensor]:
    """Embeddings (2, length, hidden) and a mask that pads the second sample, so that masked kernels are the ones measured."""
    weight = parent.get_input_embeddings().weight
    mask = torch.ones(SAMPLES, length, dtype=torch.long, device=weight.device)
    mask[1, -1] = 0
    embeds = torch.randn(SAMPLES, length, _width(parent.config), device=weight.device)
    return {"inputs_embeds": embeds.to(weight.dtype), "attention_mask": mask}


def _width(config: PretrainedConfig) -> int:
    width = width_in(config)
    if width is None:
        raise UnsupportedUpstream(f"{type(config).__name__} does not say how wide the decoder layers are, so they can't be measured")
    return width


def sample_model(
    config: PretrainedConfig,
    model_class: type[Any],
    *,
    lora: LoraConfig | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """A model of two decoder layers of the config's shape, layer 0 frozen and layer 1 tuned, weights undefined.

    For measuring where the real layers can't be run by themselves: before weights are loaded, and under ZeRO-3.

    Args:
        config: of the backbone or of an upstream's model; its vision tower is left out.
        model_class: of the causal language model.
        lora: of which everything but the target modules is used; None for full tuning.
    """
    config = copy.deepcopy(config)
    for name in LAYER_COUNT_KEYS:
        if hasattr(config, name):
            setattr(config, name, 2)
    config.vocab_size, config.pad_token_id = 8, None
    for name in [name for name in vars(config) if name.startswith(declared().config_prefixes)]:
        delattr(config, name)  # upstream's classes build a vision tower where the config names one
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device("meta"):
            model = model_class(config)
        model.to_empty(device=device).requires_grad_(False)
        modules = find_decoder_layers(model).modules
    finally:
        torch.set_default_dtype(default)
    if lora is None:
        modules[1].requires_grad_(True)
        return model
    from peft import LoraConfig, get_peft_model

    names = linear_modules(model, [1])
    options = {"r": lora.r, "lora_alpha": lora.lora_alpha, "lora_dropout": lora.lora_dropout, "bias": lora.bias}
    return get_peft_model(model, LoraConfig(target_modules=names, use_rslora=lora.use_rslora, **options))


class _Unmultiplied(TorchDispatchMode):
    """Within the block, products of matrices have their shapes and undefined values.

    A sample's weights are undefined anyway, and what autograd keeps does not depend on them. In bfloat16 on a CPU, the products of a
    layer of 13B took torch 2.1 a minute.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            left, right = args[-2:]
            return left.new_empty((left.shape[0], right.shape[1]))
        return func(*args, **kwargs or {})


def activations_of(model: nn.Module, workload: Workload, context: Context = nullcontext) -> Activations:
    """What a model's decoder layers keep for the largest batch, measured; see `activations_by_size`."""
    return activations_by_size(model, workload, context)(workload.samples, workload.length)


def activations_by_size(model: nn.Module, workload: Workload, context: Context = nullcontext) -> Callable[[int, int], Activations]:
    """Measure what a model's tuned and frozen decoder layers keep; the result tells it for so many samples of so many tokens.

    Layers that can't be run by themselves are measured on a sample of the same shape: those of a model on the meta device
    (the dry run's; the attention kernel is then this machine's), and those that ZeRO-3 spreads over the ranks.

    Args:
        model: as it trains: bare, or under PEFT, DDP or DeepSpeed.
        context: makes the context the forward pass runs in (autocast).
    """
    modules = find_decoder_layers(model).modules
    tuned = [any(p.requires_grad for p in module.parameters()) for module in modules]
    examples = {kind: tuned.index(kind) for kind in (True, False) if kind in tuned}
    parent: Any = parent_of(model)
    weight = parent.get_input_embeddings().weight
    dtype = getattr(torch, workload.dtype) if weight.is_meta else weight.dtype
    measured, places = (model, examples) if not (weight.is_meta or hasattr(weight, "ds_id")) else (_sample_of(model, dtype), SAMPLE)

    def keeps(lean: bool) -> dict[bool, KeptBytes]:
        with _Unmultiplied() if measured is not model else nullcontext():
            found = measure(measured, places.values(), context, lean)
        return {kind: found[layer] for kind, layer in places.items()}

    kept = keeps(lean=False)
    # in fp32 less than a fifth is saved, for as much time as recomputing so many layers takes
    lean = None if dtype == torch.float32 else keeps(lean=True)
    costs = tuple(_cost(modules[examples[kind]]) for kind in tuned)
    width, itemsize, first = _width(parent.config), dtype.itemsize, lowest_differentiated(model)
    supervised = workload.supervised_logits and workload.dtype != "float16"

    def all_layers(by_kind: dict[bool, KeptBytes], samples: int, length: int) -> tuple[int, ...]:
        sizes = {kind: found.at(samples, length) for kind, found in by_kind.items()}
        return tuple(sizes[kind] for kind in tuned)

    def at(samples: int, length: int) -> Activations:
        tokens = samples * length
        return Activations(
            kept=all_layers(kept, samples, length),
            costs=costs,
            layer_input=tokens * width * itemsize,
            first=first,
            mask=tokens * length * itemsize,
            # the final norm works in fp32; of the selected positions there are hidden states and gradients
            head=tokens * width * (8 + 3 * itemsize) + logits_at_once(model, tokens, supervised) * LOGIT_BYTES,
            lean=None if lean is None else all_layers(lean, samples, length),
        )

    return at


def _sample_of(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A sample of a model whose layers cannot be run by themselves, where it can be run."""
    parent: Any = parent_of(model)
    weight = parent.get_input_embeddings().weight
    device = weight.device if not weight.is_meta else "cuda" if torch.cuda.is_available() else "cpu"
    # the CPU of torch 2.1 knows little of float16; bfloat16 keeps as many bytes
    stored = torch.bfloat16 if str(device) == "cpu" and dtype == torch.float16 else dtype
    return sample_model(parent.config, type(causal_of(model)), lora=_lora_config(model), dtype=stored, device=device)


def _cost(layer: nn.Module) -> float:
    """Multiplications per token in the layer's linear modules, LoRA's included: its forward time is proportional to them."""
    return float(sum(m.in_features * m.out_features for m in layer.modules() if isinstance(m, nn.Linear)))


def _lora_config(model: nn.Module) -> LoraConfig | None:
    for module in model.modules():
        configs: Any = getattr(module, "peft_config", None)
        if isinstance(configs, dict):
            return next(iter(configs.values()))
    return None


def lowest_differentiated(model: nn.Module) -> int:
    """Lowest decoder layer that autograd has to reach: 0 where anything in front of the layers trains (projector, embeddings,
    vision tower), else the lowest layer with a trainable parameter.

    Raises:
        LlavaRegionError: a trainable parameter belongs to no known part of a model.
    """
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    if not {"embeddings", "projector", "vision"}.isdisjoint(part_of(name) for name in trainable):
        return 0
    return min((layer for name in trainable if (layer := layer_index(name)) is not None), default=0)


def automatic_budget(model: nn.Module, activations: Activations, device: torch.device) -> int:
    """Bytes of activations that fit on the device, the least over all ranks. Collective.

    That is what is free, less a margin, what the backward pass of one layer needs in addition, and gradients and optimizer
    states that are not yet there.
    """
    optimizer = 0
    if not hasattr(model, "zero_optimization"):  # DeepSpeed's engine has made them by now
        optimizer = sum(p.numel() for p in model.parameters() if p.requires_grad) * TRAINABLE_BYTES
    budget = int(free_memory(device) * (1 - MARGIN)) - optimizer - max(activations.kept)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        least = torch.tensor(budget, dtype=torch.int64, device=device)
        torch.distributed.all_reduce(least, op=torch.distributed.ReduceOp.MIN)
        budget = int(least)
    return budget


def free_memory(device: torch.device) -> int:
    """Bytes that one more tensor of this process may take on the device: on CUDA what the driver has free and what the
    allocator holds unused; on CPU this rank's share of what the machine, or its control group, has left."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(min(_available_memory(), _group_memory())) // processes.local_world_size()


def _available_memory() -> int:
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():  # not Linux: half of what is installed
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return next(int(line.split()[1]) for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:")) * 1024


def _group_memory(root: Path = Path("/sys/fs/cgroup")) -> int | float:
    """What the control group (container, batch job) may still take; infinite where it has no limit."""
    limit, current = root / "memory.max", root / "memory.current"
    if not limit.is_file() or limit.read_text().strip() == "max":
        return float("inf")
    return int(limit.read_text()) - int(current.read_text())
