"""Have a model recompute the activations of some decoder layers in the backward pass, instead of all (see `recompute_plan`)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llava_region.decoder import find_decoder_layers, parent_of
from llava_region.errors import UnsupportedUpstream
from llava_region.errors.ending import gpu_is_full
from llava_region.training.kept_memory import activations_by_size, automatic_budget
from llava_region.training.lean_layers import LeanLayers
from llava_region.training.recompute_plan import BY_HAND, BatchPlans, Choice, Levels, Plan, Workload, make_plan
from llava_region.training.sizes import parse_size

if TYPE_CHECKING:
    from llava_region.training.kept_memory import Context

SEAM = "_gradient_checkpointing_func"  # of the module that runs the decoder layers


def set_up(
    model: nn.Module,
    region: Collection[int],
    workload: Workload,
    policy: str = "auto",
    memory: str | None = None,
    context: Context = nullcontext,
) -> Plan:
    """Measure, choose and install, before the first step; every rank comes to the same plan.

    Args:
        model: as the trainer has wrapped it, gradient checkpointing switched on.
        region: indices of the tuned layers.
        policy: `--region_checkpointing`; memory: `--region_memory`.
        context: makes the context the forward pass runs in (autocast).

    Raises:
        UnsupportedUpstream: the model's own checkpointing can't be told apart by layer, and `region` or `none` was asked for.
        LlavaRegionError: `--region_memory` can't be met.
    """
    forced = why_all(model)
    if forced and policy in ("region", "none"):
        raise UnsupportedUpstream(f"--region_checkpointing {policy} is not possible here: {forced}; allowed: all")
    if forced:
        return Plan(tuple(range(len(find_decoder_layers(model).modules))), "all", f"every layer is recomputed: {forced}", 0, None)
    at = activations_by_size(model, workload, context)
    activations = at(workload.samples, workload.length)
    budget, origin = None, None
    if policy == "auto" and memory:
        budget, origin = parse_size(memory), BY_HAND
    elif policy == "auto":
        device = next(parent_of(model).parameters()).device
        budget, origin = automatic_budget(model, activations, device), f"what fits on {device}"
    plan = make_plan(policy, region, activations, budget, origin)
    if budget is not None:
        # ranks of ZeRO-3 gather a layer's weights together, once more where it is recomputed
        partitioned = any(hasattr(p, "ds_id") for p in model.parameters())
        agree = _highest_of_ranks(next(parent_of(model).parameters()).device) if partitioned else None
        plan = replace(plan, batches=BatchPlans(at, Levels.of(activations), budget, agree))
    install(model, plan)
    return plan


def _highest_of_ranks(device: torch.device) -> Callable[[int], int]:
    def agree(level: int) -> int:
        highest = torch.tensor(level, device=device)
        torch.distributed.all_reduce(highest, op=torch.distributed.ReduceOp.MAX)
        return int(highest)

    return agree


def why_all(model: nn.Module) -> str | None:
    """Why the model has to recompute every layer, or None."""
    if isinstance(model, nn.DataParallel):
        return "torch.nn.DataParallel copies the layers in every step (launch with torchrun or deepspeed instead)"
    parent = parent_of(model)
    if SEAM not in inspect.unwrap(type(parent).forward).__code__.co_names:
        return f"{type(parent).__module__}.{type(parent).__name__}.forward calls torch.utils.checkpoint itself"
    return None


def install(model: nn.Module, plan: Plan) -> None:
    """Have the model recompute the layers that the plan says and run the others directly; replaces an earlier plan.

    The seam is `_gradient_checkpointing_func` of the module that runs the decoder layers: transformers 4.36 to 4.41, and
    modelling files written like its own, call it with `layer.__call__` and the layer's arguments. The vision tower has its own.

    Raises:
        UnsupportedUpstream: the model does not call it, or gradient checkpointing is not switched on.
    """
    forced = why_all(model)
    if forced:
        raise UnsupportedUpstream(f"{forced}, so its layers can't be recomputed singly; allowed: --region_checkpointing all")
    uninstall(model)
    parent: Any = parent_of(model)
    if not parent.gradient_checkpointing or not hasattr(parent, SEAM):
        raise UnsupportedUpstream(f"{type(parent).__name__} has gradient checkpointing switched off; give --gradient_checkpointing True")
    setattr(parent, SEAM, _checkpoint_some(getattr(parent, SEAM), find_decoder_layers(model).modules, plan))


def uninstall(model: nn.Module) -> None:
    """Give the model its own checkpointing back."""
    parent = parent_of(model)
    function: Any = vars(parent).get(SEAM)
    if hasattr(function, "upstream"):
        setattr(parent, SEAM, function.upstream)
        function.lean.remove()


def _checkpoint_some(upstream: Callable[..., Any], layers: nn.ModuleList, plan: Plan) -> Callable[..., Any]:
    index = {id(module): i for i, module in enumerate(layers)}
    lean = LeanLayers(layers if plan.lean or plan.batches is not None else ())
    choice = Choice(frozenset(plan.recompute), plan.lean)
    reentrant = getattr(upstream, "keywords", {}).get("use_reentrant") is not False

    def checkpoint(function: Any, hidden: torch.Tensor, *arguments: Any) -> Any:
        nonlocal choice
        layer = index[id(function.__self__)]
        if layer == 0 and plan.batches is not None:
            choice = plan.batches.choose(*hidden.shape[:2])
        if layer < plan.first:
            with torch.no_grad():
                return function(hidden, *arguments)
        if layer not in choice.recompute:
            with lean.active(choice.lean):
                return function(hidden, *arguments)
        if reentrant and not hidden.requires_grad:
            # reentrant checkpointing of an input without gradient would train nothing in this layer
            hidden = hidden.detach().requires_grad_()
        return upstream(function, hidden, *arguments)

    seam: Any = checkpoint
    seam.upstream, seam.lean = upstream, lean  # for uninstall
    return seam


@contextmanager
def out_of_memory_hint(policy: str, gradient_checkpointing: bool) -> Iterator[None]:
    """Have it name the flag that helps when the GPU's memory is full; the error keeps its class and its own message.

    Args:
        policy: `--region_checkpointing`.
    """
    try:
        yield
    except RuntimeError as e:
        if not gpu_is_full(e):
            raise
        hint = {
            "none": "--region_checkpointing region or all",
            "region": "--region_checkpointing all",
            "auto": "--region_checkpointing region or all, or --region_memory with less than was kept",
            "all": "a smaller --per_device_train_batch_size",
        }[policy]
        hint = hint if gradient_checkpointing else "--gradient_checkpointing True"
        raise type(e)(f"to train in less memory, give {hint}. {e}") from e  # first, since the messages are long and get cut
