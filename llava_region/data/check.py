"""Check a LLaVA-format data file and its images: a missing or corrupt image stops a run when it is reached, hours in."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llava_region.data.images import image_problem
from llava_region.data.records import read_records, require_image_folder, training_images
from llava_region.errors import LlavaRegionError
from llava_region.progress import progress_bar

SAMPLE = 1000


def check_data(data_path: str | Path | None, image_folder: str | Path | None, check_images: str = "sample") -> list[dict]:
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
    data_path, folder = Path(data_path), Path(image_folder) if image_folder else None
    records = read_records(data_path)
    images = sorted(set(training_images(records)))
    require_image_folder(len(images), folder, data_path, "--image_folder")
    if folder is None or not images:
        return records
    if not folder.is_dir():
        raise LlavaRegionError(f"--image_folder {folder} is not a folder; give the one that the images' names are relative to")
    if check_images == "sample" and len(images) > SAMPLE:
        images = random.Random(0).sample(images, SAMPLE)
    if check_images != "none":
        _check_images(folder, images, check_images, data_path)
    return records


def _check_images(folder: Path, images: list[str], what: str, data_path: Path) -> None:
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
            f"{', ...' if len(bad) > 3 else ''}; fix the files or the records"
        )
