"""What a benchmark is to the rest of the package: files, examples, and a scorer."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from llava_region.errors import LlavaRegionError

LETTER_INSTRUCTION = "Answer with the option's letter from the given choices directly."
PHRASE_INSTRUCTION = "Answer the question using a single word or phrase."


class File(NamedTuple):
    """A file a task needs.

    Attributes:
        path: relative to the data root; several that do equally are joined by " or ", the last character `/` marks an image
            folder (read only to generate answers), and `{part}` stands for each of the task's `parts`.
        source: where the official file is downloaded from.
    """

    path: str
    source: str

    @property
    def is_folder(self) -> bool:
        return self.path.endswith("/")


@dataclass(frozen=True)
class Example:
    """One question.

    Attributes:
        question_id: as in the official file.
        prompt: the text after `<image>\\n`, without the chat template.
        image: file (it may be missing), the encoded bytes (they may be broken), or None for a question without image.
        reference: what the task's scorer compares an answer with.
        aliases: other keys under which an answers file may hold this question.
    """

    question_id: str | int
    prompt: str
    image: Path | bytes | None = None
    reference: Any = None
    aliases: tuple[Hashable, ...] = ()

    def row(self, text: str) -> dict:
        """The row of an answers file in LLaVA's form."""
        return {"question_id": self.question_id, "prompt": self.prompt, "text": text}


def id_key(row: dict) -> Hashable:
    """Key of an answers file's row: its `question_id`, number or string alike."""
    return str(row["question_id"])


@dataclass(frozen=True)
class Task:
    """A benchmark.

    Attributes:
        name: as after `--task`; also the name of its folder under the data root.
        title: as in the paper's tables.
        split: the part of the data set that is evaluated.
        max_new_tokens: of greedy decoding.
        files: what the data root has to hold.
        visual: whether its questions have images.
        read: (data root) -> list[Example]; called through `examples`.
        score: (examples, {key: answer}) -> {"metric", "score", "n", "missing", ...}; "score" is the paper's metric in
            percent, "n" the questions it is over, "missing" those without an answer, which count as wrong.
        key: (row of an answers file) -> key of its question.
        parts: what `{part}` in the files' paths stands for.
        shorten: (prompt) -> the prompt with one shot less, or None where it has none left; None for a task without shots.
    """

    name: str
    title: str
    split: str
    max_new_tokens: int
    files: tuple[File, ...]
    visual: bool
    read: Callable[[str | Path], list[Example]]
    score: Callable[[list[Example], dict[Hashable, str]], dict]
    key: Callable[[dict], Hashable] = id_key
    parts: tuple[str, ...] = ()
    shorten: Callable[[str], str | None] | None = None

    def key_of(self, example: Example) -> Hashable:
        """The key under which the example's answer is looked up: that of the row written for it."""
        return self.key(example.row(""))

    def examples(self, data_root: str | Path) -> list[Example]:
        """The task's questions; needs the annotation files, not the images.

        Raises:
            LlavaRegionError: a file is missing, cannot be read, is not in the official format, or holds no question.
        """
        if missing := self.missing_files(data_root, images=False):
            raise LlavaRegionError(f"{data_root} lacks {'; '.join(missing)}")
        try:
            found = self.read(data_root)
        except LlavaRegionError:
            raise
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as e:
            sources = ", ".join(dict.fromkeys(file.source for file in self.files if not file.is_folder))
            raise LlavaRegionError(
                f"a file of {self.name} in {data_root} is not in the official format ({type(e).__name__}: {e}); get it from {sources}"
            ) from e
        if not found:
            raise LlavaRegionError(f"the files of {self.name} in {data_root} hold no question; download them again")
        return found

    def missing_files(self, data_root: str | Path, images: bool = True) -> list[str]:
        """What the data root lacks, each with its source; without `images`, image folders are not asked for."""
        missing = []
        for file in self.files:
            if file.is_folder and not images:
                continue
            parts = self.parts if "{part}" in file.path else ("",)
            absent = [part for part in parts if not locate(data_root, file.path.replace("{part}", part)).exists()]
            if absent and len(absent) == len(self.parts):
                missing.append(f"{file.path.replace('{part}', '*')} ({len(absent)} files; {file.source})")
            elif absent:
                missing.append(f"{', '.join(file.path.replace('{part}', part) for part in absent)} ({file.source})")
        return missing


def locate(data_root: str | Path, path: str) -> Path:
    """Where a task's file is: the first of its alternatives there is, else the first of them.

    The task's own folder may be given as data root: the leading `NAME/` of `path` is then left out where there is no such folder.
    """
    root, alternatives = Path(data_root), path.split(" or ")
    if not (root / path.partition("/")[0]).is_dir():
        alternatives += [alternative.partition("/")[2] for alternative in alternatives]
    return next((root / a for a in alternatives if (root / a).exists()), root / alternatives[0])


def read_jsonl(path: Path) -> list[dict]:
    """A file of one JSON object a line; blank lines are passed over.

    Raises:
        LlavaRegionError: it is missing, or a line is not a JSON object; the message gives the line's number.
    """
    rows = []
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as e:
        raise LlavaRegionError(f"cannot read {path}: {e.strerror}") from e
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as e:
            raise LlavaRegionError(f"{path} line {number} is not JSON ({e}); mend or remove the line") from e
        if not isinstance(row, dict):
            raise LlavaRegionError(f"{path} line {number} is not a JSON object; mend or remove the line")
        rows.append(row)
    return rows


def percent(values: list[float]) -> float:
    """Mean of values in [0, 1], in percent; 0 for none."""
    return 100.0 * sum(values) / len(values) if values else 0.0
