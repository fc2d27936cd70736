"""The records of a training run, of which files of gigabytes are common: each is read from disk when it is asked for."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

from llava_region.data.json_list import items, read_item
from llava_region.data.records import LIST, PLACEHOLDER, Form, check_each, record_name, record_problem, text_length
from llava_region.files import parse_json


@dataclass
class Survey:
    """What is known of all records after one look at each.

    Attributes:
        lengths: characters of text of each; with_image: whether each has an image, 0 or 1.
        images: the names of the images, in the records' order.
        unplaced: names of records that have an image and no placeholder; imageless: of those with a placeholder and no image.
    """

    lengths: array[int] = field(default_factory=lambda: array("Q"))
    with_image: bytearray = field(default_factory=bytearray)
    images: list[str] = field(default_factory=list)
    unplaced: list[str] = field(default_factory=list)
    imageless: list[str] = field(default_factory=list)

    def add(self, record: Mapping[str, Any]) -> None:
        """Look at the next record, which is of the training form."""
        number, has_image = len(self.lengths), "image" in record  # the upstreams look for the key alone
        placed = any(PLACEHOLDER in turn["value"] for turn in record["conversations"])
        self.lengths.append(text_length(record))
        self.with_image.append(has_image)
        if has_image:
            self.images.append(record["image"])
        if placed != has_image:
            (self.imageless if placed else self.unplaced).append(record_name(number, record))


class TrainingData(Sequence[dict[str, Any]]):
    """The records of a file, all of the form that training takes.

    Args:
        path: a JSON list in LLaVA's format.
        record_check: why training could not take a record of the form `TURNS`, as the end of a sentence that begins with it, or None;
            left out, the turns have to alternate.

    Attributes:
        survey: what is known of all of them.

    Raises:
        LlavaRegionError: the file is not a list of records, or names the first one that training could not take.
    """

    def __init__(self, path: Path, record_check: Callable[[Mapping[str, Any]], str | None] | None = None):
        self.path, self.survey = path, Survey()
        self.starts, self.sizes = array("Q"), array("Q")
        form = Form.TURNS if record_check else Form.TRAINING
        for number, item in enumerate(items(path, LIST)):
            check_each([(number, item.value)], path, lambda record: record_problem(record, form) or (record_check and record_check(record)))
            self.survey.add(item.value)
            self.starts.append(item.start)
            self.sizes.append(item.size)

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, number: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, number: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, number: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(number, slice):
            return [self[one] for one in range(*number.indices(len(self)))]
        return parse_json(read_item(self.path, self.starts[number], self.sizes[number]), self.path)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (item.value for item in items(self.path, LIST))
