"""Check a LLaVA-format data file and its images: a missing or corrupt image stops a run when it is reached, hours in."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from llava_region.data.images import image_problem
from llava_region.data.records import PLACEHOLDER, first_names, require_image_folder
from llava_region.data.training_data import Survey, TrainingData
from llava_region.errors import LlavaRegionError
from llava_region.progress import progress_bar

SAMPLE = 1000
# Share of the records from which an image without its placeholder, or the reverse, is refused, if there are several: that is no slip
# in one record, but a file that lost its placeholders or its images.
MOST_UNPLACED = 0.01


def check_data(
    data_path: str | Path | None,
    image_folder: str | Path | None,
    check_images: str = "sample",
    record_check: Callable[[Mapping[str, Any]], str | None] | None = None,
    picture_problem: Callable[[int, int], str | None] = lambda width, height: None,
) -> TrainingData:
    """Check every record's form, and that images open.

    Args:
        check_images: `sample` opens 1,000 images (always the same), `all` every one, `none` none.
        record_check: see `TrainingData`.
        picture_problem: why training could not take an image of this width and height in pixels, or None.

    Returns:
        the records.

    Raises:
        LlavaRegionError: names the first bad record, or counts and names the bad images.
    """
    if not data_path:
        raise LlavaRegionError("--data_path is missing; give a JSON file of LLaVA's format")
    # the upstreams join names to it: to nothing, relative ones are of the current folder
    data_path, folder = Path(data_path), None if image_folder is None else Path(image_folder)
    records = TrainingData(data_path, record_check)
    images = sorted(set(records.survey.images))
    require_image_folder(len(images), folder, data_path, "--image_folder")
    if folder is None or not images:
        return records
    if not folder.is_dir() and not all(map(os.path.isabs, images)):
        raise LlavaRegionError(f"--image_folder {folder} is not a folder; give the one that the images' names are relative to")
    if check_images == "sample" and len(images) > SAMPLE:
        images = random.Random(0).sample(images, SAMPLE)
    if check_images != "none":
        _check_images(folder, images, check_images, data_path, picture_problem)
    return records


def check_placeholders(survey: Survey, path: str | Path) -> str | None:
    """Look for images that their records' texts do not place, which training ignores, and for places without an image, which stay
    words of the text.

    Returns:
        one line that counts them and names the first; None where there are none.

    Raises:
        LlavaRegionError: there are so many that a wrong file is likelier than a slip.
    """
    total = len(survey.lengths)
    found = [
        (f"{len(names):,} records {what} ({first_names(names)})", len(names))
        for names, what in (
            (survey.unplaced, f"have an image and no '{PLACEHOLDER}' in their text, so that training does not see it"),
            (survey.imageless, f"have '{PLACEHOLDER}' in their text and no image, so that training reads it as words"),
        )
        if names
    ]
    for text, count in found:
        if count > 1 and count >= MOST_UNPLACED * total:
            raise LlavaRegionError(f"of {total:,} records of {path}, {text}; allowed: less than {MOST_UNPLACED:.0%}; correct the records")
    return "; ".join(text for text, _ in found) or None


def _check_images(folder: Path, images: list[str], what: str, data_path: Path, picture_problem: Callable[[int, int], str | None]) -> None:
    bad = []

    def problem_of(name: str) -> str | None:
        return image_problem(os.path.join(folder, name), picture_problem)  # a Path would lose a slash at the end

    with ThreadPoolExecutor(16) as pool, progress_bar(f"checking images ({what})", len(images)) as advance:
        for name, problem in zip(images, pool.map(problem_of, images), strict=True):
            advance()
            if problem:
                bad.append(f"{name} ({problem})")
    if bad:
        checked = f"{len(images)} checked" if what == "sample" else f"{len(images)}"
        raise LlavaRegionError(
            f"{len(bad)} of {checked} images of {data_path} cannot be read in {folder}: {', '.join(bad[:3])}"
            f"{', ...' if len(bad) > 3 else ''}; fix the files or the records"
        )
