"""The records a model is scored on: LLaVA-format conversations, or lists of images under one prompt."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path

from llava_region.data.images import read_pixels
from llava_region.errors import LlavaRegionError
from llava_region.files import read_json

PLACEHOLDER = "<image>"


@dataclass(frozen=True)
class Sample:
    """One record.

    Attributes:
        dataset: number of its data file.
        index: its number in the file.
        place: its number among the file's records that are used.
        images: paths of its images.
        conversation: its turns; None: the prompt takes their place.
    """

    dataset: int
    index: int
    place: int
    images: tuple[Path, ...]
    conversation: list[dict] | None


@dataclass(frozen=True)
class Dataset:
    """What `scores.json` says about a data file."""

    file: Path
    sha256: str
    records: int
    used: int

    def to_dict(self) -> dict:
        return {"file": str(self.file), "sha256": self.sha256, "records": self.records, "used": self.used}


def read_samples(
    files: list[Path], image_folder: Path | None, *, limit: int | None = None, seed: int = 0, prompt: str | None = None
) -> tuple[list[Sample], list[Dataset]]:
    """Read data files and check that every image is there.

    Args:
        files: JSON lists. A record is a LLaVA-format object with `conversations` and maybe `image` (a name or a list of
            names), or, with `prompt`, an object with `image` or an image's name by itself (a list of Flickr30k images).
        image_folder: what the image names are relative to.
        limit: records of each file, drawn with `seed`, in the file's order; None: all.
        prompt: takes the place of every record's conversation, after its images.

    Raises:
        LlavaRegionError: a malformed record, a missing image, another number of placeholders than images.
    """
    samples, datasets = [], []
    for number, file in enumerate(files):
        records = read_json(file)
        if not isinstance(records, list) or not records:
            raise LlavaRegionError(f"{file} is not a list of records; give a JSON list in LLaVA's format, or of image names with --prompt")
        chosen = range(len(records))
        if limit is not None and limit < len(records):
            chosen = sorted(random.Random(seed).sample(chosen, limit))
        samples += [_sample(records[index], (number, index, place), file, image_folder, prompt) for place, index in enumerate(chosen)]
        datasets.append(Dataset(file, hashlib.sha256(file.read_bytes()).hexdigest(), len(records), len(chosen)))
    _check_images(samples)
    return samples, datasets


def _sample(record, numbers: tuple[int, int, int], file: Path, image_folder: Path | None, prompt: str | None) -> Sample:
    where = f"record {numbers[1]} of {file}"
    record = {"image": record} if isinstance(record, str) else record
    if not isinstance(record, dict):
        raise LlavaRegionError(f"{where} is a {type(record).__name__}; allowed: an object with 'conversations', or an image's name")
    names = record.get("image") or []
    names = [names] if isinstance(names, str) else names
    if names and image_folder is None:
        raise LlavaRegionError(f"{where} has an image, {names[0]}; give the folder it is in with --image-folder")
    images = tuple(image_folder / name for name in names)
    if prompt is not None:
        return Sample(*numbers, images, None)
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns or not all(isinstance(t, dict) and isinstance(t.get("value"), str) for t in turns):
        raise LlavaRegionError(f"{where} has no 'conversations'; give --prompt to put one question to every image")
    placeholders = sum(turn["value"].count(PLACEHOLDER) for turn in turns)
    if images and placeholders != len(images):
        raise LlavaRegionError(f"{where} has {len(images)} images and {placeholders} times {PLACEHOLDER}; they have to be as many")
    return Sample(*numbers, images, turns)


def _check_images(samples: list[Sample]) -> None:
    missing = [path for sample in samples for path in sample.images if not path.is_file()]
    if missing:
        raise LlavaRegionError(f"{len(missing)} images are missing, the first is {missing[0]}; mend --image-folder or the data")


def embed_inputs(loaded, sample: Sample, prompt: str | None):
    """Token ids (T,) and pixel values (a list of (3, H, W)) of a sample, as `LoadedModel.embed` takes them.

    A whole conversation goes through the training template, answers included; the prompt, or a question without an
    answer, through the template with an empty answer.

    Raises:
        LlavaRegionError: an image cannot be read.
    """
    if sample.conversation is None:
        ids = loaded.input_ids(loaded.prompt(prompt, len(sample.images)))
    elif len(sample.conversation) == 1:
        question = sample.conversation[0]["value"].replace(PLACEHOLDER, "").strip()
        ids = loaded.input_ids(loaded.prompt(question, len(sample.images)))
    else:
        record = {"conversations": sample.conversation, **({"image": [str(p) for p in sample.images]} if sample.images else {})}
        ids = loaded.example(record)[0]
    return ids, [read_pixels(path, loaded.pixel_values) for path in sample.images]
