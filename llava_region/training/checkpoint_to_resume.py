"""Which `checkpoint-N` of a run may be resumed, and which were cut off while they were being written.

`region.json` is written last: a checkpoint without it is not whole.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from llava_region.errors import LlavaRegionError
from llava_region.region import Region, read_region_json
from llava_region.run_files import (
    ADAPTER_FILES,
    NON_LORA_FILE,
    OPTIMIZER_FILE,
    OPTIMIZER_FILES,
    REGION_FILE,
    SCHEDULER_FILE,
    TRAINER_STATE_FILE,
    WEIGHT_FILES,
)


def checkpoints(output_dir: str | Path) -> list[Path]:
    """`checkpoint-N` folders of a run, by rising N."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def check_resumable(output_dir: str | Path, region: Region, lora: bool, deepspeed: bool) -> Path | None:
    """The checkpoint that a run in this folder will resume from, or None if it starts afresh.

    Args:
        lora, deepspeed: whether the run that is asked for trains LoRA, and whether it runs under DeepSpeed.

    Raises:
        LlavaRegionError: the folder's checkpoints are of another region or mode, not of this trainer, or the last lacks a file.
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
    if not complete:
        return None
    check_whole(complete[-1], lora, deepspeed)
    return complete[-1]


def check_whole(checkpoint: Path, lora: bool, deepspeed: bool) -> None:
    """Refuse a checkpoint that lacks what training goes on from; transformers would silently start that part afresh.

    Raises:
        LlavaRegionError: names the missing file.
    """
    states = (*OPTIMIZER_FILES, SCHEDULER_FILE)
    if not any((checkpoint / name).is_file() for name in states) and not any(checkpoint.glob("global_step*")):
        raise LlavaRegionError(
            f"{checkpoint} holds no optimizer and scheduler (--save_only_model True), so its run would start again at the first "
            "learning rate; give another --output_dir, or remove the checkpoints"
        )
    needed: list[tuple[str, ...]] = [(TRAINER_STATE_FILE,)]
    if deepspeed:  # the weights are in DeepSpeed's own folder
        needed += [("latest",)]
        latest = checkpoint / "latest"
        if latest.is_file():
            needed += [(latest.read_text(encoding="utf-8", errors="replace").strip() or "global_step*",)]
    else:
        needed += [(OPTIMIZER_FILE, "optimizer*"), (SCHEDULER_FILE,)]
        needed += [ADAPTER_FILES, (NON_LORA_FILE,)] if lora else [WEIGHT_FILES]
    for names in needed:
        if not any(next(checkpoint.glob(name), None) for name in names):
            raise LlavaRegionError(
                f"{checkpoint} lacks {names[0]}, without which its run cannot go on as it was; "
                "remove that checkpoint to resume from the one before, or give another --output_dir"
            )


def check_asked(asked: str | None, last: Path | None, output_dir: str | Path) -> None:
    """Refuse a `--resume_from_checkpoint` that would not be followed: upstream's train() itself looks only into its output folder.

    Args:
        asked: the flag's value; last: the checkpoint that the run resumes from.

    Raises:
        LlavaRegionError: says from what the run would resume.
    """
    if asked is None or (last is not None and (asked == "True" or Path(asked).resolve() == last.resolve())):
        return
    found = f"which is {last}" if last else f"and {output_dir} holds none"
    raise LlavaRegionError(
        f"--resume_from_checkpoint {asked} cannot be followed: a run resumes from the last whole checkpoint of its --output_dir, {found}; "
        "leave the flag out and give the --output_dir of the run to resume (without the checkpoints after the one that you want)"
    )


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
