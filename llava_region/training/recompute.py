"""Which decoder layers recompute their activations in the backward pass.

Upstream recomputes all of them. A layer outside the visual region has no weight gradients, so it keeps little, and
recomputing it is the largest avoidable cost of a step that trains a region: here only as many layers are recomputed as
the memory asks for. Gradients are the same to the bit.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from llava_region.decoder import find_decoder_layers, layer_index
from llava_region.errors import LlavaRegionError, UnsupportedUpstream
from llava_region.training.kept_memory import causal_of, free_memory, measure, parent_of, sample_model
from llava_region.training.sizes import format_size, parse_size
from llava_region.training.supervised_loss import logits_at_once

POLICIES = ("auto", "all", "region", "none")
# Of the free memory, what is left alone: allocator fragmentation, and what other libraries take later.
MARGIN = 0.1
# Bytes a logit of the loss takes at its worst, under upstream's loss: the head's output, its copy in fp32, the copy that is
# shifted by one position, and the log-softmax.
LOGIT_BYTES = 16
# Bytes a trainable parameter still takes after the first step began, without DeepSpeed: gradient and AdamW's two moments.
TRAINABLE_BYTES = 12


@dataclass(frozen=True)
class Activations:
    """What there is to choose from, for the largest batch that can come.

    Attributes:
        kept: bytes each decoder layer keeps for its backward pass where it is not recomputed, beside its input.
        costs: relative time of each layer's forward pass, which recomputing it adds.
        layer_input: bytes of one layer's input, kept in any case.
        first: lowest layer that is differentiated; below it nothing is kept.
        mask: bytes of the attention mask that all layers share.
        head: bytes that the final norm, the logits and the loss take at the end of the forward pass.
    """

    kept: tuple[int, ...]
    costs: tuple[float, ...]
    layer_input: int
    first: int = 0
    mask: int = 0
    head: int = 0

    def peak(self, recompute) -> int:
        """Most bytes alive at once for the backward pass: at the end of the forward pass, or while a layer is run again."""
        recompute, alive, peak = set(recompute), self.mask, 0
        for layer in range(self.first, len(self.kept)):
            alive += self.layer_input
            peak = max(peak, alive + self.kept[layer])
            alive += 0 if layer in recompute else self.kept[layer]
        return max(peak, alive + self.head)


@dataclass(frozen=True)
class Plan:
    """Which decoder layers are recomputed.

    Attributes:
        recompute: their indices, ascending.
        policy: `all`, `region`, `none` or `auto`, as asked for.
        reason: one line for people.
        bytes_kept: peak bytes of activations under this plan, for the largest batch that can come.
        budget: bytes they may take; None where nothing limits the choice.
        first: lowest layer that is differentiated; the layers below run without autograd.
    """

    recompute: tuple[int, ...]
    policy: str
    reason: str
    bytes_kept: int
    budget: int | None
    first: int = 0


def check_flags(policy: str, memory: str | None, gradient_checkpointing: bool = True) -> None:
    """Refuse malformed values of `--region_checkpointing` and `--region_memory`.

    Raises:
        LlavaRegionError: names the flag, the value and what is allowed.
    """
    if policy not in POLICIES:
        raise LlavaRegionError(f"--region_checkpointing '{policy}' is unknown; allowed: {', '.join(POLICIES)}")
    if policy in ("all", "region") and not gradient_checkpointing:
        raise LlavaRegionError(f"--region_checkpointing {policy} needs --gradient_checkpointing True; add it, or leave the policy out")
    if memory is None:
        return
    parse_size(memory)
    if policy != "auto" or not gradient_checkpointing:
        raise LlavaRegionError(
            f"--region_memory {memory} limits what --region_checkpointing auto keeps; "
            "it needs that policy and --gradient_checkpointing True, or leave it out"
        )


def make_plan(policy: str, region, activations: Activations, budget: int | None = None, limit: str | None = None) -> Plan:
    """Choose the layers to recompute.

    Args:
        policy: `all`; `region`: the layers in `region`; `none`; `auto`: as few as fit `budget`, those first that free the
            most bytes for the time they take, the lower first among equals, since they are run again when less is alive.
        region: indices of the tuned layers.
        budget: bytes of activations that fit, for `auto`.
        limit: where the budget comes from, in words; a budget set by hand must hold, one that was estimated may be missed.

    Raises:
        LlavaRegionError: recomputing every layer does not meet `--region_memory`.
    """
    count, first = len(activations.kept), activations.first
    candidates = range(first, count)
    if policy == "auto":
        recompute = _as_few_as_fit(activations, budget)
    else:
        recompute = {"all": candidates, "none": (), "region": [i for i in candidates if i in region]}[policy]
    recompute = tuple(sorted(recompute))
    peak = activations.peak(recompute)
    if policy == "auto" and peak > budget and limit == "--region_memory":
        raise LlavaRegionError(
            f"--region_memory {format_size(budget)} is too little: with every layer recomputed, activations and logits "
            f"of the largest batch take {format_size(peak)}; raise it, or lower --per_device_train_batch_size or --model_max_length"
        )
    again = "no layer is recomputed" if not recompute else f"{len(recompute)} of {count} layers are recomputed ({_ranges(recompute)})"
    reason = f"--region_checkpointing {policy}: {again}; activations and logits take up to {format_size(peak)}"
    if policy == "auto":
        reason += f" of {format_size(max(budget, 0))} ({limit})" + (", which may not be enough" if peak > budget else "")
    if first:
        reason += f"; layers below {first} run without autograd"
    return Plan(recompute, policy, reason, peak, budget, first)


def _as_few_as_fit(activations: Activations, budget: int) -> list[int]:
    saved = {i: activations.kept[i] / activations.costs[i] for i in range(activations.first, len(activations.kept))}
    recompute: list[int] = []
    for layer in sorted(saved, key=lambda i: (-saved[i], i)):
        if activations.peak(recompute) <= budget:
            break
        recompute.append(layer)
    return recompute


def _ranges(layers: tuple[int, ...]) -> str:
    """0,4,8-11 for (0, 4, 8, 9, 10, 11)."""
    starts = [i for i in layers if i - 1 not in layers]
    ends = [i for i in layers if i + 1 not in layers]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def largest_batch(args) -> tuple[int, int]:
    """Samples and tokens a sample of the largest batch: both upstreams cut a sample to `model_max_length` before the image's
    tokens are put in, and again after."""
    return args.per_device_train_batch_size, args.model_max_length


def activations_of(model: nn.Module, args, context=nullcontext) -> Activations:
    """Measure what a model's tuned and frozen decoder layers keep for the largest batch.

    Layers that can't be run by themselves are measured on a sample of the same shape: those of a model on the meta device
    (the dry run's; the attention kernel is then this machine's), and those that ZeRO-3 spreads over the ranks.

    Args:
        model: as it trains: bare, or under PEFT, DDP or DeepSpeed.
        args: upstream's TrainingArguments with `supervised_logits`.
        context: makes the context the forward pass runs in (autocast).
    """
    modules = find_decoder_layers(model).modules
    tuned = [any(p.requires_grad for p in module.parameters()) for module in modules]
    examples = {kind: tuned.index(kind) for kind in (True, False) if kind in tuned}
    parent = parent_of(model)
    weight = parent.get_input_embeddings().weight
    device, dtype = weight.device, weight.dtype
    if weight.is_meta:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    if weight.is_meta or hasattr(weight, "ds_id"):
        sample = sample_model(parent.config, type(causal_of(model)), lora=_lora_config(model), dtype=dtype, device=device)
        kept = dict(zip((False, True), measure(sample, (0, 1), context).values(), strict=True))
    else:
        measured = measure(model, examples.values(), context)
        kept = {kind: measured[layer] for kind, layer in examples.items()}
    samples, length = largest_batch(args)
    sizes = {kind: found.at(samples, length) for kind, found in kept.items()}
    costs = {kind: _cost(modules[layer]) for kind, layer in examples.items()}
    width = getattr(parent.config, "hidden_size", None) or parent.config.d_model
    tokens, itemsize = samples * length, dtype.itemsize
    return Activations(
        kept=tuple(sizes[kind] for kind in tuned),
        costs=tuple(costs[kind] for kind in tuned),
        layer_input=tokens * width * itemsize,
        first=lowest_differentiated(model),
        mask=tokens * length * itemsize,
        # the final norm works in fp32; of the selected positions there are hidden states and gradients
        head=tokens * width * (8 + 3 * itemsize) + logits_at_once(model, tokens, args.supervised_logits and not args.fp16) * LOGIT_BYTES,
    )


def _cost(layer: nn.Module) -> float:
    """Multiplications a token in the layer's linear modules, LoRA's included: what its forward time goes by."""
    return float(sum(m.in_features * m.out_features for m in layer.modules() if isinstance(m, nn.Linear)))


def _lora_config(model: nn.Module):
    configs = [m.peft_config for m in model.modules() if isinstance(getattr(m, "peft_config", None), dict)]
    return next(iter(configs[0].values())) if configs else None


def lowest_differentiated(model: nn.Module) -> int:
    """Lowest decoder layer that autograd has to reach: 0 where anything in front of the layers trains (projector, embeddings,
    vision tower), else the lowest layer with a trainable parameter."""
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    layers = [layer_index(name) for name in trainable]
    outside = [name for name, layer in zip(trainable, layers, strict=True) if layer is None]
    behind = ("norm", "final_layernorm", "norm_f", "lm_head")  # of Llama and its kin, Phi, MPT; the head
    if any(not set(name.split(".")) & set(behind) for name in outside):
        return 0
    return min((layer for layer in layers if layer is not None), default=0)


def automatic_budget(model: nn.Module, activations: Activations, device: torch.device) -> int:
    """Bytes of activations that fit on the device, the least over all ranks: what is free, less a margin, what the backward
    pass of a layer needs beside them, and gradients and optimizer states that are not yet there."""
    optimizer = 0
    if not hasattr(model, "zero_optimization"):  # DeepSpeed's engine has made them by now
        optimizer = sum(p.numel() for p in model.parameters() if p.requires_grad) * TRAINABLE_BYTES
    budget = int(free_memory(device) * (1 - MARGIN)) - optimizer - max(activations.kept)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        least = torch.tensor(budget, dtype=torch.int64, device=device)
        torch.distributed.all_reduce(least, op=torch.distributed.ReduceOp.MIN)
        budget = int(least)
    return budget


def set_up(model: nn.Module, region, args, context=nullcontext) -> Plan:
    """Measure, choose and install, before the first step; every rank comes to the same plan.

    Args:
        model: as the trainer has wrapped it, gradient checkpointing switched on.
        region: indices of the tuned layers.
        args: upstream's TrainingArguments with this package's flags.
        context: makes the context the forward pass runs in (autocast).

    Raises:
        UnsupportedUpstream: the model's own checkpointing can't be told apart by layer, and `region` or `none` was asked for.
        LlavaRegionError: `--region_memory` can't be met.
    """
    policy = args.region_checkpointing
    forced = why_all(model)
    if forced and policy in ("region", "none"):
        raise UnsupportedUpstream(f"--region_checkpointing {policy} is not possible here: {forced}; allowed: all")
    if forced:
        return Plan(tuple(range(len(find_decoder_layers(model).modules))), "all", f"every layer is recomputed: {forced}", 0, None)
    activations = activations_of(model, args, context)
    budget, limit = None, None
    if policy == "auto" and args.region_memory:
        budget, limit = parse_size(args.region_memory), "--region_memory"
    elif policy == "auto":
        device = next(parent_of(model).parameters()).device
        budget, limit = automatic_budget(model, activations, device), f"what fits on {device}"
    plan = make_plan(policy, region, activations, budget, limit)
    install(model, plan)
    return plan


def why_all(model: nn.Module) -> str | None:
    """Why the model has to recompute every layer, or None."""
    if isinstance(model, nn.DataParallel):
        return "torch.nn.DataParallel copies the layers in every step (launch with torchrun or deepspeed instead)"
    parent = parent_of(model)
    if "_gradient_checkpointing_func" not in inspect.unwrap(type(parent).forward).__code__.co_names:
        return f"{type(parent).__module__}.{type(parent).__name__}.forward calls torch.utils.checkpoint itself"
    return None


def install(model: nn.Module, plan: Plan) -> None:
    """Have the model recompute the layers of `plan.recompute` and run the others directly; replaces an earlier plan.

    The seam is `_gradient_checkpointing_func` of the module that runs the decoder layers: transformers 4.36 to 4.41 and
    Bunny's modelling files call it with `layer.__call__` and the layer's arguments. The vision tower has its own.

    Raises:
        UnsupportedUpstream: the model does not call it, or gradient checkpointing is not switched on.
    """
    forced = why_all(model)
    if forced:
        raise UnsupportedUpstream(f"{forced}, so its layers can't be recomputed singly; allowed: --region_checkpointing all")
    uninstall(model)
    parent, modules = parent_of(model), find_decoder_layers(model).modules
    if not parent.gradient_checkpointing or not hasattr(parent, "_gradient_checkpointing_func"):
        raise UnsupportedUpstream(f"{type(parent).__name__} has gradient checkpointing switched off; give --gradient_checkpointing True")
    index = {id(module): i for i, module in enumerate(modules)}
    parent._gradient_checkpointing_func = _checkpoint_some(parent._gradient_checkpointing_func, index, plan)


def uninstall(model: nn.Module) -> None:
    """Give the model its own checkpointing back."""
    parent = parent_of(model)
    function = parent.__dict__.get("_gradient_checkpointing_func")
    if hasattr(function, "upstream"):
        parent._gradient_checkpointing_func = function.upstream


def _checkpoint_some(upstream: Callable, index: dict[int, int], plan: Plan) -> Callable:
    recompute = frozenset(plan.recompute)
    reentrant = getattr(upstream, "keywords", {}).get("use_reentrant") is not False

    def checkpoint(function, hidden, *arguments):
        layer = index[id(function.__self__)]
        if layer < plan.first:
            with torch.no_grad():
                return function(hidden, *arguments)
        if layer not in recompute:
            return function(hidden, *arguments)
        if reentrant and not hidden.requires_grad:
            # reentrant checkpointing of an input without gradient would train nothing in this layer
            hidden = hidden.detach().requires_grad_()
        return upstream(function, hidden, *arguments)

    checkpoint.upstream = upstream
    return checkpoint


@contextmanager
def out_of_memory_hint(args):
    """Have an out-of-memory error name the flag that mends it; the error keeps its class and its own message.

    Args:
        args: upstream's TrainingArguments with `region_checkpointing`.
    """
    error = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)
    try:
        yield
    except error as e:
        hint = {
            "none": "--region_checkpointing region or all",
            "region": "--region_checkpointing all",
            "auto": "--region_checkpointing region or all, or --region_memory with less than was kept",
            "all": "a smaller --per_device_train_batch_size",
        }[args.region_checkpointing]
        hint = hint if args.gradient_checkpointing else "--gradient_checkpointing True"
        raise type(e)(f"{e} To train in less memory: {hint}.") from e
