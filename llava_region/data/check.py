"""Check a LLaVA-format data file and its images: a missing or corrupt image stops a run when it is reached, hours in."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llava_region.data.images import image_problem
from llava_region.errors import LlavaRegionError
from llava_region.files import read_json
from llava_region.progress import progress_bar

SAMPLE = 1000


def check_data(data_path: str | None, image_folder: str | None, check_images: str = "sample") -> list[dict]:
    """Check every record's form, and that images open.

    Args:
        check_images: `sample` opens 1,000 images (always the same), `all` every one, `none` none.

    Returns:
        the records.

    Raises:
        LlavaRegionError: names the first bad record, or counts and names the bad images.
    """
    if not data_path:
        raise LlavaRegionError("--data_path is missing; give a JSON file of LLaVA's format")
    records = read_json(Path(data_path))
    if not isinstance(records, list) or not records:
        raise LlavaRegionError(f"{data_path} holds no list of records; allowed: LLaVA's format, [{{'image', 'conversations': [...]}}, ...]")
    for number, record in enumerate(records):
        problem = record_problem(record)
        if problem:
            raise LlavaRegionError(f"record {number} of {data_path} {problem}")
    images = sorted({record["image"] for record in records if "image" in record})
    if images and not image_folder:
        raise LlavaRegionError(f"{data_path} names {len(images)} images; give their folder with --image_folder")
    if images and not Path(image_folder).is_dir():
        raise LlavaRegionError(f"--image_folder {image_folder} is no folder")
    if check_images == "sample" and len(images) > SAMPLE:
        images = random.Random(0).sample(images, SAMPLE)
    if images and check_images != "none":
        _check_images(Path(image_folder), images, check_images, data_path)
    return records


def record_problem(record) -> str | None:
    """What is wrong with one record of LLaVA's format, or None."""
    if not isinstance(record, dict):
        return "is no object"
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        return "has no 'conversations'"
    for turn in turns:
        if not isinstance(turn, dict) or turn.get("from") not in ("human", "gpt") or not isinstance(turn.get("value"), str):
            return "has a turn that is not {'from': 'human' or 'gpt', 'value': text}"
    # upstream skips a first turn that is not human, and asserts that roles alternate from there on
    roles = [turn["from"] for turn in (turns[1:] if turns[0]["from"] != "human" else turns)]
    if not roles or roles != (["human", "gpt"] * len(roles))[: len(roles)]:
        return "has turns that do not alternate between human and gpt"
    if "image" in record:
        if not isinstance(record["image"], str):
            return "has an 'image' that is no file name (one image a record)"
        if sum("<image>" in turn["value"] for turn in turns) > 1:
            return "names one image but places '<image>' in several turns, which would shift the images of the samples after it"
    return None


def _check_images(folder: Path, images: list[str], what: str, data_path: str) -> None:
    bad = []
    with ThreadPoolExecutor(16) as pool, progress_bar(f"checking images ({what})", len(images)) as advance:
        for name, problem in zip(images, pool.map(lambda name: image_problem(folder / name), images), strict=True):
            advance()
            if problem:
                bad.append(f"{name} ({problem})")
    if bad:
        checked = f"{len(images)} checked" if what == "sample" else f"{len(images)}"
        raise LlavaRegionError(
            f"{len(bad)} of {checked} images of {data_path} cannot be read in {folder}: {', '.join(bad[:3])}"
            f"{', ...' if len(bad) > 3 else ''}; mend the files or the records"
        )
