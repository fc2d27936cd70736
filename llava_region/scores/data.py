"""What a model is scored on: conversations with their images, or images under one prompt, as the model takes them."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_region.data.images import read_pixels
from llava_region.data.records import PLACEHOLDER, Form, check_each, read_list, record_problem, require_images, scoring_images

if TYPE_CHECKING:
    from torch import Tensor

    from llava_region.models.loading import LoadedModel


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

    def to_dict(self) -> dict[str, Any]:
        return {"file": str(self.file), "sha256": self.sha256, "records": self.records, "used": self.used}


def read_samples(
    files: list[Path], image_folder: Path | None, *, limit: int | None = None, seed: int = 0, prompt: str | None = None
) -> tuple[list[Sample], list[Dataset]]:
    """Read data files and check that every image is there.

    Args:
        files: JSON lists. A record is a LLaVA-format object with `conversations` and maybe `image` (a name or a list of
            names), or, with `prompt`, an object with `image` or an image's name by itself (a list of Flickr30k images).
        image_folder: what the image names are relative to.
        limit: records of each file, drawn with `seed`, in the file's order; None: all. The others are not checked.
        prompt: takes the place of every record's conversation, after its images.

    Raises:
        LlavaRegionError: a malformed record, a missing image, another number of placeholders than images.
    """
    samples, datasets = [], []
    for number, file in enumerate(files):
        records = read_list(file)
        chosen = range(len(records))
        if limit is not None and limit < len(records):
            chosen = sorted(random.Random(seed).sample(chosen, limit))
        folder = image_folder or Path()  # `require_images` refuses images without one
        form = Form.SCORING if prompt is None else Form.PROMPTED
        check_each(((index, records[index]) for index in chosen), file, partial(record_problem, form=form))
        require_images([name for index in chosen for name in scoring_images(records[index])], image_folder, file)
        for place, index in enumerate(chosen):
            images = tuple(folder / name for name in scoring_images(records[index]))
            samples.append(Sample(number, index, place, images, records[index]["conversations"] if prompt is None else None))
        datasets.append(Dataset(file, hashlib.sha256(file.read_bytes()).hexdigest(), len(records), len(chosen)))
    return samples, datasets


def embed_inputs(loaded: LoadedModel, sample: Sample, prompt: str | None) -> tuple[Tensor, list[Tensor]]:
    """Token ids (T,) and pixel values (a list of (3, H, W)) of a sample, as `LoadedModel.embed` takes them.

    A whole conversation goes through the training template, answers included; the prompt, or a question without an
    answer, through the template with an empty answer.

    Raises:
        LlavaRegionError: an image cannot be read.
    """
    if sample.conversation is None:
        ids = loaded.input_ids(loaded.prompt(prompt or "", len(sample.images)))
    elif len(sample.conversation) == 1:
        question = sample.conversation[0]["value"].replace(PLACEHOLDER, "").strip()
        ids = loaded.input_ids(loaded.prompt(question, len(sample.images)))
    else:
        record = {"conversations": sample.conversation, **({"image": [str(p) for p in sample.images]} if sample.images else {})}
        ids = loaded.example(record)[0]
    return ids, [read_pixels(path, loaded.pixel_values) for path in sample.images]
