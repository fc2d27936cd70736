"""`--dry_run True`: what a run would train and hold in memory, from the model's config alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llava_region import processes
from llava_region.decoder import part_of
from llava_region.training.empty_model import empty_model, unwrapped
from llava_region.training.kept_memory import MARGIN, activations_of, free_memory
from llava_region.training.model_states import Memory, estimate_memory
from llava_region.training.preflight import Preflight, zero_settings
from llava_region.training.recompute import why_all
from llava_region.training.recompute_plan import BY_HAND, Workload, make_plan
from llava_region.training.sizes import parse_size
from llava_region.training.zero_choice import zero_rows

if TYPE_CHECKING:
    from torch import nn

    from llava_region.upstreams import Upstream

# what a trainable parameter is counted under, by the part of the model that it is in
GROUPS = {"layer": "decoder layers", "projector": "projector", "vision": "vision tower", "embeddings": "embeddings", "head": "head"}


@dataclass(frozen=True)
class Estimate:
    """What a run would train and hold.

    Attributes:
        model: name of the model's class; parameters: how many it has.
        trains: trainable parameters by group: LoRA, decoder layers, projector, vision tower.
        gpus: how many the memory is for; stage: of ZeRO, 0 for none.
        memory: bytes per GPU, without activations.
        activations: rows about the activations' memory and the stages of ZeRO, (name, text) each.
    """

    model: str
    parameters: int
    trains: dict[str, int]
    gpus: int
    stage: int
    memory: Memory
    activations: list[tuple[str, str]]


def estimate(upstream: Upstream, preflight: Preflight) -> Estimate:
    """Build the model on the meta device and count.

    Raises:
        LlavaRegionError: `--region_memory` can't be met.
    """
    args = preflight.args
    model = empty_model(upstream, preflight)
    gpus = args.dry_run_gpus or processes.world_size()
    zero = zero_settings(args)
    memory = estimate_memory(model, args, preflight.recipe, gpus, zero)
    return Estimate(
        model=type(unwrapped(model)).__name__, parameters=sum(p.numel() for p in model.parameters()), trains=trainable_groups(model),
        gpus=gpus, stage=zero.get("stage", 0), memory=memory,
        activations=[*activation_rows(model, preflight, sum(memory)), *zero_rows(model, preflight, gpus)],
    )  # fmt: skip


def show(preflight: Preflight, found: Estimate, rehearsed: str | None = None) -> None:
    """Print the layer map, the trainable parameters of each group, the estimated memory, and what was rehearsed."""
    args, recipe, region = preflight.args, preflight.recipe, preflight.region
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    trainable = sum(found.trains.values())
    rows = [
        ("region", f"{region.spec}: {len(region)} of {region.num_layers} decoder layers ({len(region) / region.num_layers:.1%})"),
        ("layers", ",".join(map(str, region.layers))),
        ("map", region.map_line()),
        ("mode", f"{recipe.mode}, {precision}" + (f", {recipe.bits} bits" if recipe.bits != 16 else "")),
        ("model", f"{recipe.model}: {found.model}, {found.parameters:,} parameters"),
        *_data_rows(preflight),
        *[(f"trains {name}", f"{count:,}") for name, count in found.trains.items()],
        ("trains in all", f"{trainable:,} ({trainable / found.parameters:.2%})"),
        (
            "memory per GPU",
            f"{found.gpus} GPU{'s' * (found.gpus > 1)}, {f'ZeRO-{found.stage}' if found.stage else 'no ZeRO'}, without activations",
        ),
        *[(f"  {name}", f"{value / 2**30:.2f} GiB") for name, value in found.memory._asdict().items()],
        ("  sum", f"{sum(found.memory) / 2**30:.2f} GiB"),
        *found.activations,
        *([("rehearsal", rehearsed)] if rehearsed else []),
    ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


def _data_rows(preflight: Preflight) -> list[tuple[str, str]]:
    if preflight.records is None:
        return []
    images = len(preflight.records.survey.images)
    return [("data", f"{preflight.recipe.data}: {len(preflight.records):,} records, {images:,} with an image"), *preflight.remarks]


def check_region_memory(upstream: Upstream, preflight: Preflight) -> None:
    """Refuse a `--region_memory` that no choice of layers meets, before weights load.

    Raises:
        LlavaRegionError: names the least that would do.
    """
    activation_rows(empty_model(upstream, preflight), preflight, 0)


def activation_rows(model: nn.Module, preflight: Preflight, states: float) -> list[tuple[str, str]]:
    """Memory of the activations under each `--region_checkpointing`, and what `auto` would choose where its limit is known:
    from `--region_memory`, or from this machine where training would run on it.

    Args:
        states: bytes of weights, gradients and optimizer states.

    Raises:
        LlavaRegionError: `--region_memory` can't be met.
    """
    import torch

    args, region = preflight.args, preflight.region
    if not args.gradient_checkpointing:
        return [("activations", "all kept (--gradient_checkpointing False)")]
    forced = why_all(model)
    if forced:
        return [("activations", f"every layer is recomputed: {forced}")]
    workload = Workload.of(args, preflight.recipe.max_length)
    activations = activations_of(model, workload)
    rows = [("activations", f"largest batch, {workload.samples} x {workload.length} tokens, logits included, by --region_checkpointing")]
    for policy in ("all", "region", "none"):
        plan = make_plan(policy, region.layers, activations)
        rows.append((f"  {policy}", f"{plan.bytes_kept / 2**30:.2f} GiB, {len(plan.recompute)} layers recomputed"))
    if args.region_checkpointing != "auto":
        return [*rows, ("  chosen", args.region_checkpointing)]
    if args.region_memory:
        budget, origin = parse_size(args.region_memory), BY_HAND
    elif torch.cuda.is_available() or args.use_cpu:
        device = torch.device("cpu" if args.use_cpu else "cuda")
        free = free_memory(device) * (1 - MARGIN)
        budget, origin = int(free - states) - max(activations.kept), f"what would fit on {device} here"
    else:
        return [*rows, ("  auto", "as few layers as fit, chosen when training starts by the GPU's free memory")]
    return [*rows, ("  auto", make_plan("auto", region.layers, activations, budget, origin).reason.partition(": ")[2])]


def trainable_groups(model: nn.Module) -> dict[str, int]:
    """Trainable parameters of each group: LoRA, decoder layers, projector, vision tower.

    Raises:
        LlavaRegionError: one belongs to no known part of a model.
    """
    groups: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = "LoRA" if "lora_" in name else GROUPS[part_of(name)]
            groups[group] = groups.get(group, 0) + parameter.numel()
    return groups
