"""`--dry_run True`: what a run would train and hold in memory, from the model's config alone, on the meta device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

from llava_region import processes
from llava_region.decoder import is_projector, is_vision, layer_index
from llava_region.training.kept_memory import free_memory
from llava_region.training.preflight import Preflight, zero_settings
from llava_region.training.run import RegionRun
from llava_region.training.sizes import parse_size

# bytes a weight of a linear module: NF4 with (without) double quantisation of its scales, and LLM.int8
QUANTISED = {(4, True): 0.516, (4, False): 0.5625, (8, True): 1.0, (8, False): 1.0}


class Memory(NamedTuple):
    """Bytes a GPU for the states of a run, without activations."""

    weights: float
    gradients: float
    optimizer: float


def show(upstream, preflight: Preflight) -> None:
    """Print the layer map, the trainable parameters of each group and the estimated memory."""
    args, region = preflight.args, preflight.region
    run = RegionRun(region, upstream=upstream.NAME, non_lora_state=None)
    model = empty_model(upstream, preflight, run)
    world = args.dry_run_gpus or processes.world_size()
    stage = zero_settings(args).get("stage", 0)
    groups = trainable_groups(model)
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(groups.values())
    memory = estimate_memory(model, args, world, stage)
    images = sum("image" in record for record in preflight.records or ())
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    rows = [
        ("region", f"{region.spec}: {len(region)} of {region.num_layers} decoder layers ({len(region) / region.num_layers:.1%})"),
        ("layers", ",".join(map(str, region.layers))),
        ("map", region.map_line()),
        ("mode", f"{run.mode}, {precision}" + (f", {args.bits} bits" if args.bits != 16 else "")),
        ("model", f"{args.model_name_or_path}: {type(unwrapped(model)).__name__}, {total:,} parameters"),
        *[(f"trains {name}", f"{count:,}") for name, count in groups.items()],
        ("trains in all", f"{trainable:,} ({trainable / total:.2%})"),
        ("memory a GPU", f"{world} GPU{'s' * (world > 1)}, {f'ZeRO-{stage}' if stage else 'no ZeRO'}, without activations"),
        *[(f"  {name}", f"{value / 2**30:.2f} GiB") for name, value in memory._asdict().items()],
        ("  sum", f"{sum(memory) / 2**30:.2f} GiB"),
        *activation_rows(model, args, region, sum(memory)),
    ]
    if preflight.records is not None:
        rows.insert(5, ("data", f"{args.data_path}: {len(preflight.records):,} records, {images:,} with an image"))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


def check_region_memory(upstream, preflight: Preflight) -> None:
    """Refuse a `--region_memory` that no choice of layers meets, before weights load.

    Raises:
        LlavaRegionError: names the least that would do.
    """
    run = RegionRun(preflight.region, upstream=upstream.NAME, non_lora_state=None)
    activation_rows(empty_model(upstream, preflight, run), preflight.args, preflight.region, 0)


def activation_rows(model, args, region, states: float) -> list[tuple[str, str]]:
    """Memory of the activations under each `--region_checkpointing`, and what `auto` would choose where its limit is known:
    from `--region_memory`, or from this machine where training would run on it.

    Args:
        states: bytes of weights, gradients and optimizer states.

    Raises:
        LlavaRegionError: `--region_memory` can't be met.
    """
    import torch

    from llava_region.training import recompute as checkpointing

    if not args.gradient_checkpointing:
        return [("activations", "all kept (--gradient_checkpointing False)")]
    forced = checkpointing.why_all(model)
    if forced:
        return [("activations", f"every layer is recomputed: {forced}")]
    activations = checkpointing.activations_of(model, args)
    samples, length = checkpointing.largest_batch(args)
    rows = [("activations", f"largest batch, {samples} x {length} tokens, logits included, by --region_checkpointing")]
    for policy in ("all", "region", "none"):
        plan = checkpointing.make_plan(policy, region.layers, activations)
        rows.append((f"  {policy}", f"{plan.bytes_kept / 2**30:.2f} GiB, {len(plan.recompute)} layers recomputed"))
    if args.region_checkpointing != "auto":
        return [*rows, ("  chosen", args.region_checkpointing)]
    if args.region_memory:
        budget, limit = parse_size(args.region_memory), "--region_memory"
    elif torch.cuda.is_available() or args.use_cpu:
        device = torch.device("cpu" if args.use_cpu else "cuda")
        free = free_memory(device) * (1 - checkpointing.MARGIN)
        budget, limit = int(free - states) - max(activations.kept), f"what would fit on {device} here"
    else:
        return [*rows, ("  auto", "as few layers as fit, chosen when training starts by the GPU's free memory")]
    return [*rows, ("  auto", checkpointing.make_plan("auto", region.layers, activations, budget, limit).reason.partition(": ")[2])]


def empty_model(upstream, preflight: Preflight, run: RegionRun):
    """The upstream's model on the meta device, with LoRA and frozen parameters as training would have it."""
    import torch
    from peft import LoraConfig, get_peft_model

    args = preflight.args
    with torch.device("meta"):
        model = upstream.empty_model(args, preflight.config)
        if args.lora_enable:
            options = {"r": args.lora_r, "lora_alpha": args.lora_alpha, "lora_dropout": args.lora_dropout, "bias": args.lora_bias}
            model = get_peft_model(model, LoraConfig(target_modules=run.find_linear_names(model), task_type="CAUSAL_LM", **options))
    for name, parameter in model.named_parameters():
        if is_vision(name):
            parameter.requires_grad_(bool(getattr(args, "unfreeze_vision_tower", False)))
        elif is_projector(name):
            parameter.requires_grad_(not args.freeze_mm_mlp_adapter)
    wanted = {"bits": args.bits, "unfreeze_vision_tower": getattr(args, "unfreeze_vision_tower", False)}
    run.prepare_model(model, SimpleNamespace(**wanted))
    return model


def unwrapped(model):
    """The upstream's model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def trainable_groups(model) -> dict[str, int]:
    """Trainable parameters of each group: LoRA, decoder layers, projector, vision tower."""
    groups: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = (
                "LoRA"
                if "lora_" in name
                else "vision tower"
                if is_vision(name)
                else "projector"
                if is_projector(name)
                else "decoder layers"
            )
            groups[group] = groups.get(group, 0) + parameter.numel()
    return groups


def estimate_memory(model, args, world: int, stage: int) -> Memory:
    """Bytes a GPU of weights, gradients and AdamW's states.

    Args:
        world: number of GPUs.
        stage: ZeRO stage, 0 for none. ZeRO-1 shards the optimizer's states, 2 the gradients too, 3 the weights too;
            in half precision DeepSpeed keeps fp32 weights and two moments, 12 bytes a trainable parameter.
    """
    half = args.bf16 or args.fp16
    width = 2 if half else 4
    weights = sum(parameter.numel() * _bytes_a_weight(name, parameter, args, width) for name, parameter in model.named_parameters())
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    states = 12 if half and args.deepspeed else 2 * width
    return Memory(
        weights / (world if stage >= 3 else 1),
        trainable * width / (world if stage >= 2 else 1),
        trainable * states / (world if stage >= 1 else 1),
    )


def _bytes_a_weight(name: str, parameter, args, width: int) -> float:
    quantised = args.bits != 16 and layer_index(name) is not None and parameter.dim() == 2 and "lora_" not in name
    return QUANTISED[args.bits, bool(args.double_quant)] if quantised else width


def vision_model(tower: str, cache_dir: str | None = None):
    """A vision tower's transformers model on the default device, from its config alone; None where it isn't on this machine."""
    from transformers import AutoConfig, AutoModel

    try:
        config = AutoConfig.from_pretrained(tower, cache_dir=cache_dir)
    except (OSError, ValueError):
        return None
    config = getattr(config, "vision_config", config)
    return AutoModel.from_config(config)
