"""What a benchmark consists of: files, examples and a scorer; and the helpers that the tasks share."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from llava_region.errors import LlavaRegionError
from llava_region.files import read_bytes

LETTER_INSTRUCTION = "Answer with the option's letter from the given choices directly."
PHRASE_INSTRUCTION = "Answer the question using a single word or phrase."

Row = dict[str, Any]  # one line of an answers file: "question_id", "text", most often "prompt", and whatever else its writer added
Result = dict[str, Any]  # "metric", "score", "n", "missing", and the task's own figures; see `Task.score`


class File(NamedTuple):
    """A file that a task needs.

    Attributes:
        path: relative to the data root. Alternatives are joined by " or "; a `/` at the end marks an image folder (read only to
            generate answers); `{part}` is replaced by each of the task's `parts`.
        source: where the official file is downloaded from.
    """

    path: str
    source: str

    @property
    def is_folder(self) -> bool:
        """Whether it is an image folder."""
        return self.path.endswith("/")


@dataclass(frozen=True)
class Example:
    """One question.

    Attributes:
        question_id: as in the official file.
        prompt: the text after `<image>\\n`, without the chat template.
        image: a file (it may be missing), encoded bytes (they may be corrupt), or None for a question without an image.
        reference: what the task's scorer compares an answer with; its type is the task's own.
        aliases: other keys under which an answers file may hold this question.
        shows_image: whether an answers file has `<image>` in front of the prompt, as LLaVA's scorer of the task looks for it.
    """

    question_id: str | int
    prompt: str
    image: Path | bytes | None = None
    reference: Any = None
    aliases: tuple[Hashable, ...] = ()

    shows_image: bool = False

    def row(self, text: str) -> Row:
        """The row of an answers file in LLaVA's form."""
        mark = "<image>\n" if self.shows_image and self.image is not None else ""
        return {"question_id": self.question_id, "prompt": mark + self.prompt, "text": text}


def id_key(row: Row) -> Hashable:
    """The key of an answers file's row: its `question_id` as a string, so that 7 and "7" are the same question."""
    return str(row["question_id"])


@dataclass(frozen=True)
class Task:
    """A benchmark.

    Attributes:
        name: as after `--task`; also the name of its folder under the data root.
        title: as in the paper's tables.
        split: the part of the data set that is evaluated.
        max_new_tokens: the most tokens that greedy decoding may generate.
        files: what the data root must hold.
        visual: whether its questions have images.
        read: (data root) -> list[Example]; called through `examples`.
        score: (examples, {key: answer}) -> {"metric", "score", "n", "missing", ...}; "score" is the paper's metric in
            percent, "n" the number of questions that it is the mean of, "missing" the number of those without an answer, which
            count as wrong.
        key: (row of an answers file) -> key of its question.
        parts: the values of `{part}` in the files' paths.
        shorten: (prompt) -> the prompt with one example answer (shot) fewer, or None if it has none left; None for a task
            without shots.
    """

    name: str
    title: str
    split: str
    max_new_tokens: int
    files: tuple[File, ...]
    visual: bool
    read: Callable[[str | Path], list[Example]]
    score: Callable[[list[Example], dict[Hashable, str]], Result]
    key: Callable[[Row], Hashable] = id_key
    parts: tuple[str, ...] = ()
    shorten: Callable[[str], str | None] | None = None

    def key_of(self, example: Example) -> Hashable:
        """The key under which the example's answer is looked up: that of the row written for it."""
        return self.key(example.row(""))

    def examples(self, data_root: str | Path) -> list[Example]:
        """The task's questions; needs the annotation files, not the images.

        Raises:
            LlavaRegionError: a file is missing, cannot be read, is not in the official format, or contains no questions.
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
            raise LlavaRegionError(f"the files of {self.name} in {data_root} contain no questions; download them again")
        return found

    def missing_files(self, data_root: str | Path, images: bool = True) -> list[str]:
        """What the data root lacks, each with its source; image folders only with `images`."""
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
    """Where a task's file is: the first of its alternatives that exists, or the first of all if none does.

    The data root may be the task's own folder: if it has no folder `NAME`, the leading `NAME/` of `path` is optional.
    """
    root, alternatives = Path(data_root), path.split(" or ")
    if not (root / path.partition("/")[0]).is_dir():
        alternatives += [alternative.partition("/")[2] for alternative in alternatives]
    return next((root / a for a in alternatives if (root / a).exists()), root / alternatives[0])


def read_jsonl(path: Path) -> list[Row]:
    """A file of one JSON object per line; blank lines are ignored.

    Raises:
        LlavaRegionError: it is missing, is not in one of Unicode's encodings (with or without its mark), or a line is not a JSON object;
            the message gives the line's number.
    """
    rows = []
    data = read_bytes(path)
    try:
        text = data.decode(json.detect_encoding(data))
    except UnicodeDecodeError as e:
        raise LlavaRegionError(f"{path} is not a text file in UTF-8 ({e}); save it in that encoding") from e
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise LlavaRegionError(f"{path} line {number} is not JSON ({e}); {_advice(text)}") from e
        if not isinstance(row, dict):
            raise LlavaRegionError(f"{path} line {number} is not a JSON object; {_advice(text)}")
        rows.append(row)
    return rows


def _advice(text: str) -> str:
    if text.lstrip().startswith("["):
        return "this looks like a JSON list; allowed: JSON lines, one object per line. Make them of it: jq -c '.[]' FILE"
    return "fix or remove the line"


def percent(values: Sequence[float]) -> float:
    """Mean of values in [0, 1], in percent; 0 if there are none."""
    return 100.0 * sum(values) / len(values) if values else 0.0
