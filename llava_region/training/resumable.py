"""Which `checkpoint-N` of a run may be resumed, and which were cut off while they were being written.

`region.json` is written last: a checkpoint without it is not whole.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from llava_region.errors import LlavaRegionError
from llava_region.region import Region, read_region_json
from llava_region.run_files import REGION_FILE, SCHEDULER_FILE


def checkpoints(output_dir: str | Path) -> list[Path]:
    """`checkpoint-N` folders of a run, by rising N."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def check_resumable(output_dir: str | Path, region: Region, lora: bool) -> Path | None:
    """The checkpoint that a run in this folder will resume from, or None if it starts afresh.

    Raises:
        LlavaRegionError: the folder's checkpoints are of another region or mode, not of this trainer, or hold the model alone.
    """
    folder = Path(output_dir)
    found = checkpoints(folder)
    if not found:
        return None
    complete = [path for path in found if (path / REGION_FILE).is_file()]
    if not complete and not (folder / REGION_FILE).is_file():
        raise LlavaRegionError(
            f"{found[-1]} holds no {REGION_FILE}: it comes from a run without --tune_layers; give another --output_dir, or remove it"
        )
    record = read_region_json(complete[-1] if complete else folder)
    saved = Region.from_dict(record)
    if (saved.layers, saved.num_layers) != (region.layers, region.num_layers):
        raise LlavaRegionError(
            f"{complete[-1] if complete else folder} was trained on layers {list(saved.layers)} of {saved.num_layers} "
            f"('{saved.spec}'), now '{region.spec}' asks for {list(region.layers)} of {region.num_layers}; "
            "give the same --tune_layers, or another --output_dir"
        )
    if record.get("mode") and (record["mode"] == "full") == lora:
        raise LlavaRegionError(
            f"{folder} holds checkpoints of {record['mode']} tuning, and now {'LoRA' if lora else 'full tuning'} is asked for; "
            "ask for the same, or give another --output_dir"
        )
    if complete and not (complete[-1] / SCHEDULER_FILE).is_file() and not any(complete[-1].glob("global_step*")):
        raise LlavaRegionError(
            f"{complete[-1]} holds no optimizer and scheduler (--save_only_model True), so its run would start again at the first "
            "learning rate; give another --output_dir, or remove the checkpoints"
        )
    return complete[-1] if complete else None


def drop_incomplete(output_dir: str | Path) -> list[Path]:
    """Remove checkpoints that a killed run had not finished writing, so that training resumes from the one before.

    Returns:
        the removed folders.
    """
    folder = Path(output_dir)
    broken = [path for path in checkpoints(folder) if not (path / REGION_FILE).is_file()]
    broken += sorted(folder.glob("tmp-checkpoint-*"))
    for path in broken:
        shutil.rmtree(path)
    return broken
