"""Records in LLaVA's format, read and checked in one place: `[{"image": name, "conversations": [turn, ...]}, ...]`.

A turn is `{"from": "human" or "gpt", "value": text}`. Who reads a file says by a `Form` how much of this it needs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from enum import Enum, auto
from functools import partial
from pathlib import Path
from typing import Any

from llava_region.data.json_list import items
from llava_region.errors import LlavaRegionError

PLACEHOLDER = "<image>"
LIST = "a list of records; allowed: a JSON list in LLaVA's format, [{'image': name, 'conversations': [...]}, ...]"


class Form(Enum):
    """What a record has to be.

    Attributes:
        TRAINING: what the upstreams' training takes: turns that alternate, at most one image.
        TURNS: the same, whoever speaks and in whatever order: some templates do not look at that.
        SCORING: turns of any speakers, and any number of images, each with its placeholder.
        PROMPTED: an object with any number of images, or an image's name by itself; a prompt takes the turns' place.
        OBJECT: any object.
    """

    TRAINING = auto()
    TURNS = auto()
    SCORING = auto()
    PROMPTED = auto()
    OBJECT = auto()


def read_records(path: Path, form: Form = Form.TRAINING) -> list[dict]:
    """All records of a file, each of the given form.

    Raises:
        LlavaRegionError: the file is not a list of records, or names the first record that is not of this form.
    """
    records = read_list(path)
    check_each(enumerate(records), path, partial(record_problem, form=form))
    return records


def read_list(path: Path) -> list[Any]:
    """The records of a file, unchecked.

    Raises:
        LlavaRegionError: it cannot be read, is not a JSON list, or is empty.
    """
    return [item.value for item in items(path, LIST)]


def record_name(number: int, record: Any) -> str:
    """What a record is called in messages: its number in the file, from 0, and its id where it has one."""
    given = record.get("id") if isinstance(record, dict) else None
    if given == "" or not isinstance(given, (str, int)):
        return f"record {number}"
    return f"record {number} (id {printable(str(given))})"


def printable(text: str) -> str:
    """Text of a data file as a message can hold it: short, and without halves of characters, which no stream writes."""
    return text[:60].encode(errors="backslashreplace").decode() + ("..." if len(text) > 60 else "")


def first_names(names: Sequence[str]) -> str:
    """The first three of some records, as a message names them."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def text_length(record: Mapping[str, Any]) -> int:
    """Characters of all turns of a record of the training form."""
    return sum(len(turn["value"]) for turn in record["conversations"])


def check_each(records: Iterable[tuple[int, Any]], path: Path, problem: Callable[[Any], str | None]) -> None:
    """Refuse the first record that has a problem.

    Args:
        records: each with its number in the file.
        path: the file, for the message.
        problem: what is wrong with a record, as the end of a sentence that begins with the record, or None.

    Raises:
        LlavaRegionError: names the record and its problem.
    """
    for number, record in records:
        found = problem(record)
        if found:
            raise LlavaRegionError(f"{record_name(number, record)} of {path} {found}")


def record_problem(record: Any, form: Form = Form.TRAINING) -> str | None:
    """What is wrong with one record, or None."""
    if form in (Form.SCORING, Form.PROMPTED):
        return _scoring_problem(record, prompted=form is Form.PROMPTED)
    if not isinstance(record, dict):
        return f"is a {type(record).__name__}, not an object; allowed: an object with 'conversations'"
    if form is Form.OBJECT:
        return None
    return _turns_problem(record) or (speakers_problem(record["conversations"]) if form is Form.TRAINING else None)


def speakers_problem(turns: Sequence[Mapping[str, Any]], alternate: bool = True) -> str | None:
    """What is wrong with who speaks in a record of the form `TURNS`, or None.

    Args:
        alternate: whether human and gpt have to take turns. The upstreams skip a first turn that is not human, and assert that from
            there on.
    """
    roles = [turn.get("from") for turn in turns]
    if not {"human", "gpt"}.issuperset(role if isinstance(role, str) else "" for role in roles):
        return "has a turn that is not {'from': 'human' or 'gpt', 'value': text}"
    roles = roles[roles[0] != "human" :]
    if alternate and roles != (["human", "gpt"] * len(roles))[: len(roles)]:
        return "has turns that do not alternate between human and gpt"
    return None


def _turns_problem(record: dict) -> str | None:
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        return "has no 'conversations'; allowed: a list of turns"
    if not all(isinstance(turn, dict) and isinstance(turn.get("value"), str) for turn in turns):
        return "has a turn that is not {'from': 'human' or 'gpt', 'value': text}"
    if any(not _is_text(turn["value"]) for turn in turns):
        return "has half of a character (a lone surrogate, such as '\\ud83d') in its text, which no tokenizer takes; correct the text"
    if "image" in record:
        if not isinstance(record["image"], str) or not record["image"]:
            return "has an 'image' that is not a file name; allowed: one image per record"
        if not _is_file_name(record["image"]):
            return f"has an 'image' that no file can be called: '{printable(record['image'])}'"
        if any(PLACEHOLDER in turn["value"].replace(PLACEHOLDER, "") for turn in turns if PLACEHOLDER in turn["value"]):
            return f"has a '{PLACEHOLDER}' that is left when those in its text are taken out, which would shift the images after it"
        if sum(PLACEHOLDER in turn["value"] for turn in turns) > 1:
            return f"names one image but places '{PLACEHOLDER}' in several turns, which would shift the images of the samples after it"
    return None


def _is_text(text: str) -> bool:
    """Whether a text is whole: JSON can hold one half of a character that UTF-16 writes as two."""
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def _is_file_name(name: str) -> bool:
    """Whether a file can be called so; names that are not UTF-8 come as surrogates, which stand for their bytes."""
    try:
        return b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        return False


def _scoring_problem(record: Any, prompted: bool) -> str | None:
    if not isinstance(record, (dict, str)):
        return f"is a {type(record).__name__}; allowed: an object with 'conversations', or an image's name"
    names = record if isinstance(record, str) else record.get("image") or ()
    if not isinstance(names, Collection) or not all(isinstance(name, str) for name in names):
        return "has an 'image' that is neither a file name nor a list of file names"
    if prompted:
        return None
    turns = None if isinstance(record, str) else record.get("conversations")
    if not isinstance(turns, list) or not turns or not all(isinstance(t, dict) and isinstance(t.get("value"), str) for t in turns):
        return "has no 'conversations'; give --prompt to put one question to every image"
    images, placeholders = len(scoring_images(record)), sum(turn["value"].count(PLACEHOLDER) for turn in turns)
    if images and placeholders != images:
        return f"has {images} images and {placeholders} times {PLACEHOLDER}; give as many of one as of the other"
    return None


def training_images(records: Iterable[dict]) -> list[str]:
    """The images that records of the training form name, in their order; the upstreams look for the key alone."""
    return [record["image"] for record in records if "image" in record]


def scoring_images(record: dict | str) -> list[str]:
    """The images that a record of a scoring form names; an empty name or null is none."""
    names = record if isinstance(record, str) else record.get("image")
    return ([names] if isinstance(names, str) else list(names)) if names else []


def require_image_folder(count: int, folder: Path | None, path: Path, option: str = "--image-folder") -> None:
    """Refuse data with images without the folder that they are in.

    Args:
        count: how many images the data file `path` names.

    Raises:
        LlavaRegionError: says how to give the folder.
    """
    if count and folder is None:
        raise LlavaRegionError(f"{path} names {count} images; give the folder that they are in with {option}")


def require_images(names: Sequence[str], folder: Path | None, path: Path) -> None:
    """Refuse data whose images are not all there.

    Raises:
        LlavaRegionError: no folder is given, or it lacks images; counts them and names the first.
    """
    require_image_folder(len(names), folder, path)
    if folder is None:
        return
    missing = [name for name in names if not os.path.isfile(os.path.join(folder, name))]  # a Path would lose a slash at the end
    if missing:
        raise LlavaRegionError(
            f"{len(missing)} images are missing in {folder}, such as {missing[0]} of {path}; "
            "give the folder that they are in with --image-folder, or correct the data"
        )
