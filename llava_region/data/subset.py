"""Random, nested subsets of a training file in LLaVA's format: the data scales of section 4.3 (100, 25 and 10 %)."""

from __future__ import annotations

import hashlib
import json
import math
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from llava_region import files as atomic
from llava_region.data.records import Form, read_records
from llava_region.errors import LlavaRegionError
from llava_region.progress import progress_bar


class Subset(NamedTuple):
    """What `write_subset` wrote: records taken and records there were, each with and without an image."""

    images: int
    all_images: int
    texts: int
    all_texts: int


def parse_fraction(text: str) -> Fraction:
    """`0.25`, `25%` or `1/4` as an exact fraction, above 0 and at most 1.

    Raises:
        LlavaRegionError: malformed or out of range.
    """
    try:
        number = Fraction(text.strip().removesuffix("%").strip())
    except (ValueError, ZeroDivisionError) as e:
        raise LlavaRegionError(f"the fraction '{text}' is not a number; allowed: above 0 and at most 1, such as 0.25 or 25%") from e
    fraction = number / 100 if text.strip().endswith("%") else number
    if not 0 < fraction <= 1:
        raise LlavaRegionError(f"the fraction '{text}' is out of range; allowed: above 0 and at most 1, such as 0.25 or 25%")
    return fraction


def choose(has_image: list[bool], fraction: Fraction, seed: int) -> list[int]:
    """Indices of the records to keep, ascending.

    Records with and without an image are drawn apart, `fraction` of each, rounded half up. Each group is ordered by
    a hash of seed and index, and its head is taken: so a smaller fraction with the same seed lies inside a larger one,
    and no random generator whose algorithm could change takes part.
    """
    chosen: list[int] = []
    for kind in (True, False):
        group = [index for index, image in enumerate(has_image) if image is kind]
        group.sort(key=lambda index: (hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=16).digest(), index))
        chosen += group[: math.floor(fraction * len(group) + Fraction(1, 2))]
    return sorted(chosen)


def write_subset(data: str | Path, output: str | Path, fraction: Fraction, seed: int = 0, force: bool = False) -> Subset:
    """Write `fraction` of the records of `data` (a JSON list), in their order, one record per line.

    Raises:
        LlavaRegionError: `data` is not a JSON list of records, the fraction keeps none, or `output` exists and `force` is not set.
    """
    data, output = Path(data), Path(output)
    if output.exists() and data.exists() and output.samefile(data):
        raise LlavaRegionError(f"the output {output} is the data file itself; give another output")
    if output.is_dir():
        raise LlavaRegionError(f"the output {output} is a folder; give the name of a file")
    atomic.refuse_existing(output, force)
    with progress_bar("Reading, choosing, writing", 3) as advance:
        records = read_records(data, Form.OBJECT)
        advance()
        has_image = ["image" in record for record in records]  # upstream tells the two apart by this key alone
        chosen = choose(has_image, fraction, seed)
        if not chosen:
            raise LlavaRegionError(f"{float(fraction):g} of the {len(records)} records of {data} is less than one; give a larger fraction")
        advance()
        atomic.write_text(output, "[\n" + ",\n".join(json.dumps(records[index]) for index in chosen) + "\n]\n")
        advance()
    images = sum(has_image[index] for index in chosen)
    return Subset(images, sum(has_image), len(chosen) - images, len(records) - sum(has_image))
