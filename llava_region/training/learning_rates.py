"""The learning rates of a run: each part of the model trains at the one that was asked for, or training stops."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llava_region.decoder import part_of
from llava_region.errors import LlavaRegionError

if TYPE_CHECKING:
    import torch
    from torch import nn

PART = "region_part"  # key of an optimizer group that says what it trains: llm, projector, or both


def name_and_drop_groups(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Drop empty optimizer groups, and note in each group what it trains.

    DeepSpeed drops empty groups itself, but after the scheduler was built on them, which shifts the learning rates by
    one group; newer torch raises instead.

    Raises:
        LlavaRegionError: a parameter belongs to no known part of a model.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    for group in optimizer.param_groups:
        # an unfrozen vision tower has the projector's rate
        parts = {"projector" if part_of(names[id(p)]) in ("projector", "vision") else "llm" for p in group["params"]}
        group[PART] = parts.pop() if len(parts) == 1 else "both"


def check_rates(optimizer: Any, scheduler: Any, learning_rate: float, projector_rate: float | None) -> dict[str, float]:
    """The base learning rate of each part, after checking that it is the one asked for.

    Args:
        optimizer, scheduler: torch's, or DeepSpeed's and accelerate's around them.
        projector_rate: None: the projector trains at `learning_rate` too.

    Returns:
        `{"llm": rate, "projector": rate}`, of the parts that train; empty where the scheduler does not tell.

    Raises:
        LlavaRegionError: the optimizer and scheduler disagree, or a part would train at another rate.
    """
    base = getattr(scheduler, "base_lrs", None)
    groups = optimizer.param_groups
    if base is None or any(PART not in group for group in groups):
        return {}
    if len(base) != len(groups):
        raise LlavaRegionError(f"the scheduler has {len(base)} learning rates for {len(groups)} optimizer groups; training was stopped")
    wanted = {"llm": learning_rate, "both": learning_rate, "projector": learning_rate if projector_rate is None else projector_rate}
    found = {}
    for rate, group in zip(base, groups, strict=True):
        if abs(rate - wanted[group[PART]]) > 1e-12 + 1e-6 * abs(rate):
            raise LlavaRegionError(f"the {group[PART]} would train at {rate}, not at {wanted[group[PART]]} as asked; training was stopped")
        for part in ("llm", "projector") if group[PART] == "both" else (group[PART],):
            found[part] = rate
    return found
