"""What the memory plan says a step takes, against what it takes: the same model under several limits, and batches of random length.

    python benchmarks/plan_memory.py --shape llava-7b --limits 20GB 30GB 45GB

Random weights, LoRA on the region, as in `train_step.py`. For every limit, and for the policies `all`, `region` and `none`, the plan
is made as in training, and one step of the planned batch is measured: on a CUDA GPU by `torch.cuda.max_memory_allocated` less what
was allocated before, on CPU as the tensors that autograd keeps. A plan is right if the measured peak is not above it, and useful if
it is not far below. With `--steps`, `auto` without a limit then trains batches of random length, and what the allocator holds
reserved is shown: run it with and without PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to see what fragmentation costs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from train_step import SHAPES, Mode, Shape, build, check_memory, machine, measure_peak, random_batch

from llava_region.errors import LlavaRegionError
from llava_region.region import Region
from llava_region.training import recompute, supervised_loss
from llava_region.training.sizes import format_size

POLICIES = ("all", "region", "none")


def planned(model: Any, region: Region, shape: Shape, policy: str, limit: str | None, device: torch.device) -> dict[str, Any]:
    """One step under one policy: what the plan says, and what was measured. The model's optimizer states are there by then."""
    mode = Mode("auto", model, region, shape, limit)
    try:
        mode.plan = plan = recompute.set_up(model, region.layers, mode.workload, policy, limit)
        supervised_loss.install(model)
        batch = random_batch(shape, 0.25, device)
        mode.step(batch)
        mode.optimizer.zero_grad(set_to_none=True)
        measured = measure_peak(mode, batch, device)
        gradients = sum(p.nbytes for p in model.parameters() if p.requires_grad) if device.type == "cuda" else 0
    except LlavaRegionError as e:
        return {"policy": policy, "limit": limit, "refused": str(e)}
    finally:
        model.zero_grad(set_to_none=True)
    peak = measured - gradients
    return {
        "policy": policy, "limit": limit, "recomputed": len(plan.recompute), "lean": plan.lean,
        "planned_bytes": plan.bytes_kept, "budget_bytes": plan.budget,
        "measured_bytes": peak, "gradient_bytes": gradients, "measured_to_planned": peak / plan.bytes_kept,
    }  # fmt: skip


def random_lengths(model: Any, region: Region, shape: Shape, steps: int, limit: str | None, device: torch.device) -> dict[str, Any]:
    """Train batches whose length is drawn between a quarter of the planned one and all of it; what the allocator made of it."""
    mode = Mode("auto", model, region, shape, limit)
    mode.plan = recompute.set_up(model, region.layers, mode.workload, "auto", limit)
    supervised_loss.install(model)
    draw, lengths, start = random.Random(0), [], time.perf_counter()
    found: dict[str, Any] = {"alloc_conf": os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""), "recomputed": len(mode.plan.recompute)}
    try:
        for _ in range(steps):
            lengths.append(draw.randint(shape.length // 4, shape.length))
            mode.step(random_batch(dataclasses.replace(shape, length=lengths[-1]), 0.25, device))
    except torch.cuda.OutOfMemoryError as e:
        found["out_of_memory"] = str(e).splitlines()[0]
    found |= {"batches_by_layers_recomputed": dict(mode.plan.batches.counts), "budget_bytes": mode.plan.budget}
    found |= {"lengths": lengths, "seconds": time.perf_counter() - start}
    if device.type == "cuda":
        statistics = torch.cuda.memory_stats(device)
        found |= {
            "peak_allocated_bytes": statistics["allocated_bytes.all.peak"], "peak_reserved_bytes": statistics["reserved_bytes.all.peak"],
            "retries": statistics["num_alloc_retries"],
        }  # fmt: skip
    return found


def run(shape_name: str, *, region: str, policies: list[str], limits: list[str], steps: int, length: int | None) -> dict[str, Any]:
    """Run the comparison.

    Returns:
        `{"shape", "device", ..., "plans": [{"policy", "limit", "planned_bytes", "measured_bytes", ...}], "random_lengths": {...} | None}`

    Raises:
        LlavaRegionError: the region does not fit the shape, or the shape the free memory.
    """
    shape = SHAPES[shape_name]
    shape = dataclasses.replace(shape, length=length or shape.length)
    device, dtype, name = machine()
    chosen = Region.parse(region, shape.layers)
    check_memory(shape_name, chosen, (), device, dtype)
    torch.manual_seed(0)
    model = build(shape, chosen, (), device, dtype)["region"]
    asked = [*((policy, None) for policy in policies), *(("auto", limit) for limit in limits)]
    plans = [planned(model, chosen, shape, policy, limit, device) for policy, limit in asked]
    return {
        "shape": shape_name, "samples": shape.samples, "length": shape.length, "layers": shape.layers, "region": list(chosen.layers),
        "device": name,
        "plans": plans, "random_lengths": random_lengths(model, chosen, shape, steps, None, device) if steps else None,
    }  # fmt: skip


def show(result: dict[str, Any]) -> None:
    """Print the comparison as a table."""
    print(f"{result['shape']} on {result['device']}, {result['samples']} x {result['length']} tokens")
    print(f"{'policy':<8} {'limit':>8} {'recomputed':>10} {'planned':>9} {'measured':>9}  measured / planned")
    for plan in result["plans"]:
        line = f"{plan['policy']:<8} {plan['limit'] or '-':>8} "
        if "refused" in plan:
            print(f"{line} refused: {plan['refused']}")
            continue
        print(f"{line}{plan['recomputed']:>10} {format_size(plan['planned_bytes']):>9} {format_size(plan['measured_bytes']):>9}  "
              f"{plan['measured_to_planned']:.2f}")  # fmt: skip
    if result["random_lengths"]:
        print(f"batches of random length: {json.dumps(result['random_lengths'])}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="cpu", help="backbone and batch (default: cpu)")
    parser.add_argument("--region", default="sparse:25%", help="layer spec (default: sparse:25%%)")
    parser.add_argument("--policies", nargs="*", choices=POLICIES, default=POLICIES, help="to measure besides auto (default: all three)")
    parser.add_argument("--limits", nargs="*", default=[], help="values of --region_memory to plan under, such as 20GB")
    parser.add_argument("--steps", type=int, default=0, help="steps of random length under auto (default: 0)")
    parser.add_argument("--length", type=int, help="tokens of every sequence of the planned batch (default: the shape's)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    args = parser.parse_args(argv)
    try:
        result = run(args.shape, region=args.region, policies=args.policies, limits=args.limits, steps=args.steps, length=args.length)
    except LlavaRegionError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    print(json.dumps(result, indent=2)) if args.json else show(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
