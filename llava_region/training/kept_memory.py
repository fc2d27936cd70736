"""What a decoder layer keeps for the backward pass, measured by running one, and the memory there is for it."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from llava_region import processes
from llava_region.decoder import find_decoder_layers, linear_modules
from llava_region.errors import UnsupportedUpstream

# Sequence lengths that are measured. Equal remainders by 16, since attention kernels pad to multiples of 8 or 16;
# not such a multiple, so that what padding costs is in the figure.
LENGTHS = (17, 33, 49)
SAMPLES = 2


@dataclass(frozen=True)
class KeptBytes:
    """Bytes that one decoder layer keeps for its backward pass, beside its input and its parameters.

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


def parent_of(model: nn.Module) -> nn.Module:
    """The module that holds the decoder layers and runs them one after the other (LlamaModel, MptModel...)."""
    prefix = find_decoder_layers(model).prefix
    return model.get_submodule(prefix.rpartition(".")[0])


def causal_of(model: nn.Module) -> nn.Module:
    """The model with the language-model head (LlavaLlamaForCausalLM...), out of PEFT's, DDP's and DeepSpeed's wrappers."""
    prefix = find_decoder_layers(model).prefix.rsplit(".", 2)
    return model.get_submodule(prefix[0]) if len(prefix) == 3 else model


def measure(model: nn.Module, layers: Iterable[int], context=nullcontext) -> dict[int, KeptBytes]:
    """Run the given decoder layers on a few random tokens and count what autograd keeps.

    The layers run inside their own model's forward, so that masks, position ids and ALiBi biases are the model's, in
    training mode and with the attention kernel of this device; all other layers are skipped. The random state and the
    model are left as they were.

    Args:
        model: bare, or under PEFT, DDP or DeepSpeed; not partitioned by ZeRO-3 (see `sample_model`).
        layers: indices of the decoder layers.
        context: makes the context that training runs in (autocast).

    Raises:
        UnsupportedUpstream: the model checkpoints its layers by itself, not through `_gradient_checkpointing_func`.
    """
    parent, modules = parent_of(model), find_decoder_layers(model).modules
    index = {id(module): i for i, module in enumerate(modules)}
    wanted, sizes = set(layers), {i: [] for i in layers}

    def probe(function, hidden, *arguments):
        layer = index[id(function.__self__)]
        if layer not in wanted:
            return (hidden,)
        output, kept = _kept_by(function, hidden.detach().requires_grad_(), arguments)
        sizes[layer].append(kept)
        return output

    saved = {name: parent.__dict__.get(name) for name in ("_gradient_checkpointing_func", "gradient_checkpointing")}
    training = {module: module.training for module in parent.modules()}
    devices = [p.device for p in parent.parameters() if p.device.type == "cuda"][:1]
    try:
        parent.train()
        parent._gradient_checkpointing_func, parent.gradient_checkpointing = probe, True
        with torch.random.fork_rng(devices), torch.enable_grad():
            for length in LENGTHS:
                with context():
                    parent(**_random_inputs(parent, length), use_cache=False)
    finally:
        for module, mode in training.items():
            module.training = mode
        for name, value in saved.items():
            if value is None:
                parent.__dict__.pop(name, None)
            else:
                setattr(parent, name, value)
    if not all(len(found) == len(LENGTHS) for found in sizes.values()):
        raise UnsupportedUpstream(
            f"{type(parent).__module__}.{type(parent).__name__} calls torch.utils.checkpoint itself, so its layers can't be measured"
        )
    return {layer: KeptBytes.fit(found) for layer, found in sizes.items()}


def _kept_by(function, hidden: torch.Tensor, arguments: tuple):
    """Output of a bound `layer.__call__`, and the bytes of the storages autograd keeps that would not live anyway."""
    layer = function.__self__
    alive = [*layer.parameters(), *layer.buffers(), hidden, *(a for a in arguments if isinstance(a, torch.Tensor))]
    known = {_storage(tensor)[0] for tensor in alive}
    kept = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        address, size = _storage(tensor)
        if address not in known:
            kept[address] = size
        return tensor  # the graph holds it, so its address is not given to another tensor meanwhile

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = function(hidden, *arguments)
    return output, sum(kept.values())


@contextmanager
def saved_peak():
    """Follow what autograd keeps for the backward pass within the block, forward and backward on this thread (so: on CPU).

    Yields a function that returns the most bytes that were alive at once, parameters not counted. What a checkpoint keeps,
    and what it computes again, is included.
    """
    users: dict[tuple[int, int], int] = {}
    alive = peak = 0

    class Kept:
        def __init__(self, tensor):
            nonlocal alive, peak
            self.tensor, self.storage = tensor, _storage(tensor)
            users[self.storage] = users.get(self.storage, 0) + 1
            alive += self.storage[1] if users[self.storage] == 1 else 0
            peak = max(peak, alive)

        def __del__(self):
            nonlocal alive
            users[self.storage] -= 1
            if not users[self.storage]:
                del users[self.storage]
                alive -= self.storage[1]

    def pack(tensor):
        return tensor if isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter) else Kept(tensor)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor if isinstance(kept, Kept) else kept):
        yield lambda: peak


def _storage(tensor: torch.Tensor) -> tuple[int, int]:
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def _random_inputs(parent: nn.Module, length: int) -> dict[str, torch.Tensor]:
    """Embeddings (2, length, hidden) and a mask that pads the second sample, so that masked kernels are the ones measured."""
    weight = parent.get_input_embeddings().weight
    width = getattr(parent.config, "hidden_size", None) or parent.config.d_model
    mask = torch.ones(SAMPLES, length, dtype=torch.long, device=weight.device)
    mask[1, -1] = 0
    return {"inputs_embeds": torch.randn(SAMPLES, length, width, device=weight.device).to(weight.dtype), "attention_mask": mask}


def sample_model(config, model_class: type, *, lora=None, dtype=torch.float32, device="cpu") -> nn.Module:
    """A model of two decoder layers of the config's shape, layer 0 frozen and layer 1 tuned, weights undefined.

    For measuring where the real layers can't be run by themselves: before weights are loaded, and under ZeRO-3.

    Args:
        config: of the backbone or of a LLaVA or Bunny model; its vision tower is left out.
        model_class: of the causal language model (LlavaLlamaForCausalLM...).
        lora: a PEFT `LoraConfig`, of which everything but the target modules is used; None for full tuning.
    """
    config = copy.deepcopy(config)
    for name in ("num_hidden_layers", "n_layers"):
        if hasattr(config, name):
            setattr(config, name, 2)
    config.vocab_size, config.pad_token_id = 8, None
    for name in [name for name in vars(config) if name.startswith("mm_")]:
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


def free_memory(device: torch.device) -> int:
    """Bytes that one more tensor of this process may take on the device: on CUDA what the driver has free and what the
    allocator holds unused; on CPU this rank's share of what the machine, or its control group, has left."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(_available_memory(), _group_memory()) // processes.local_world_size()


def _available_memory() -> int:
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():  # not Linux: half of what is installed
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return int(re.search(r"^MemAvailable:\s*(\d+) kB", meminfo.read_text(), re.MULTILINE)[1]) * 1024


def _group_memory(root: Path = Path("/sys/fs/cgroup")) -> int | float:
    """What the control group (container, batch job) may still take; infinite where it has no limit."""
    limit, current = root / "memory.max", root / "memory.current"
    if not limit.is_file() or limit.read_text().strip() == "max":
        return float("inf")
    return int(limit.read_text()) - int(current.read_text())
