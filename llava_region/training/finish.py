"""The end of a run: what it has to hold is read again before it is called done."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open

from llava_region.checkpoints.adapter import adapter_file, trained_besides
from llava_region.checkpoints.model_card import write_card
from llava_region.checkpoints.model_source import ModelSource
from llava_region.checkpoints.names import bare_name
from llava_region.checkpoints.tensors import Checkpoint
from llava_region.decoder import layer_index
from llava_region.errors import LlavaRegionError
from llava_region.region import Region
from llava_region.run_files import NON_LORA_FILE
from llava_region.training.cost import write_cost

WAITED = 0.1  # of a step's time: what more is spent waiting for data is worth a line

if TYPE_CHECKING:
    from torch import nn

    from llava_region.training.run import RegionRun


def finish(run: RegionRun) -> None:
    """After upstream's train(): re-read what was saved, and write `region.json`, the model card and, last, `cost.json`. Collective.

    Raises:
        LlavaRegionError: the saved adapter or model is not the region's, or the adapter was not changed by training.
    """
    trainer, region = run.trainer, run.region
    if trainer is None or region is None or not trainer.meter.started:
        return
    totals = trainer.cost_totals()
    trainer.accelerator.wait_for_everyone()
    if not trainer.args.should_save:
        return
    folder = Path(trainer.args.output_dir)
    if run.mode == "full":
        check_full(folder, region)
    else:
        check_adapter(folder, region, run.lora_modules)
        check_besides(folder, trainer.model)
    run.write_record(folder)
    totals["layers"], totals["num_layers"] = list(region.layers), region.num_layers
    totals["trainable_parameters"] = sum(getattr(p, "ds_numel", p.numel()) for p in trainer.model.parameters() if p.requires_grad)
    write_card(folder, cost=totals)
    write_cost(folder, totals)
    batches = totals.get("batches_by_layers_recomputed")
    if batches:
        print(f"layers recomputed: {', '.join(f'{layers} in {count:,}' for layers, count in batches.items())} batches")
    step, waited = totals["seconds_per_step"] or 0.0, totals["data_seconds_per_step"] or 0.0
    if waited > WAITED * step:
        workers = trainer.args.dataloader_num_workers
        print(
            f"{waited:.2f} s of each step's {step:.2f} s were spent waiting for data; more than --dataloader_num_workers {workers} may help"
        )
    print(f"done: {folder} ({totals['gpu_hours']:.2f} GPU hours, {totals['samples_per_second']:.1f} samples/s)")


def check_adapter(folder: str | Path, region: Region, modules: Iterable[str]) -> int:
    """Re-read a finished LoRA run: its layers are exactly the region's, none is empty, all were changed by training.

    Args:
        modules: full names of those that LoRA was put on; the file has to hold A and B of each, and nothing else.

    Returns:
        the number of tensors in the adapter.

    Raises:
        LlavaRegionError: says what is wrong with which layers.
    """
    file = adapter_file(Path(folder))
    if file is None:
        raise LlavaRegionError(f"the finished run left no adapter in {folder}")
    stored = Checkpoint(file)
    empty = [name for name, entry in stored.items() if 0 in entry.shape]
    if empty:
        raise LlavaRegionError(f"{file} holds empty tensors, such as {empty[0]}: the run was not saved; see the checkpoints")
    tensors = {name: entry.load() for name, entry in stored.items()}
    diverged = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if diverged:
        raise LlavaRegionError(f"{file} holds values that are not finite, such as in {diverged[0]}: training diverged; see the losses")
    layers = {layer_index(name) for name in tensors}
    if layers != set(region.layers):
        raise LlavaRegionError(f"{file} holds layers {sorted(layers, key=str)}, the region is {list(region.layers)}")
    expected = {f"base_model.model.{module}.lora_{half}.weight" for module in modules for half in "AB"}
    wrong = sorted(expected ^ set(tensors))
    if wrong:
        what = "lacks" if wrong[0] in expected else "holds, besides what LoRA was put on,"
        raise LlavaRegionError(f"{file} {what} {wrong[0]} ({len(wrong)} such tensors): the run was not saved whole; see the checkpoints")
    # LoRA's B starts at zero, so a layer whose B are all zero was not trained
    changed = {layer_index(name) for name, tensor in tensors.items() if ".lora_B." in name and bool((tensor != 0).any())}
    if changed != set(region.layers):
        raise LlavaRegionError(
            f"layers {sorted(set(region.layers) - changed)} in {file} were not changed by training; "
            "was the learning rate 0 in every step, as in a run no longer than its warm-up?"
        )
    return len(tensors)


def check_besides(folder: str | Path, model: nn.Module) -> None:
    """Re-read what a finished LoRA run trained besides its adapter: every tensor, and nothing else, in its own shape.

    Args:
        model: as it was trained.

    Raises:
        LlavaRegionError: names the tensor that is missing, unknown or of another shape.
    """
    wanted = {
        bare_name(name): tuple(getattr(parameter, "ds_shape", parameter.shape))  # under ZeRO-3 a rank holds a part
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and "lora_" not in name
    }
    found = {name: entry.shape for name, entry in trained_besides(ModelSource(Path(folder))).items()}
    wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if wrong:
        shapes = f"there it is {found.get(wrong[0], 'missing')}, trained was {wanted.get(wrong[0], 'none of that name')}"
        raise LlavaRegionError(
            f"{NON_LORA_FILE} in {folder} does not hold '{wrong[0]}' as it was trained ({len(wrong)} such tensors; {shapes}): "
            "the run was not saved whole; see the checkpoints"
        )


def check_full(folder: str | Path, region: Region) -> None:
    """Re-read the headers of a finished full-tuning run: every region layer is there and none of its tensors is empty.

    Raises:
        LlavaRegionError: no model was saved, or layers are missing or empty.
    """
    files = sorted(Path(folder).glob("model*.safetensors"))
    if not files:
        if any(Path(folder).glob("pytorch_model*.bin")):
            return
        raise LlavaRegionError(f"the finished run left no model in {folder}")
    filled = set()
    for file in files:
        with safe_open(file, framework="pt") as f:
            filled |= {layer_index(name) for name in f.keys() if 0 not in f.get_slice(name).get_shape()}  # noqa: SIM118
    missing = sorted(set(region.layers) - filled)
    if missing:
        raise LlavaRegionError(f"layers {missing} are missing or empty in {folder}: the run was not saved; see the checkpoints")
