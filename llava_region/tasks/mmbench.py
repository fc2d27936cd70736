"""MMBench, English dev: questions with up to four options under CircularEval (Liu et al., 2023b; paper, section 3.2.2).

The official TSV holds every question once for each rotation of its options: row `index`, `index + 1000000`, and so on, each
with the options one place further down than in the row before. For a file that has only base rows the rotations are generated
here, numbered in the same way. The official rotations leave the last option of some questions in its place ("All above are not
right"), so use the official file.
"""

from __future__ import annotations

import base64
import binascii
import csv
from collections import defaultdict
from collections.abc import Hashable
from pathlib import Path
from typing import NamedTuple, TypeGuard

from llava_region.errors import LlavaRegionError
from llava_region.tasks import answers as answers_file
from llava_region.tasks.choices import LETTERS, letter_or_text, lettered
from llava_region.tasks.task import LETTER_INSTRUCTION, Example, File, Result, Row, Task, locate, percent

QUESTIONS = "mmbench/mmbench_dev_20230712.tsv or mmbench/MMBench_DEV_EN_legacy.tsv or mmbench/MMBench_DEV_EN.tsv"
SOURCE = "https://download.openmmlab.com/mmclassification/datasets/mmbench/mmbench_dev_20230712.tsv"
ROTATION = 1_000_000
OPTIONS = "ABCD"
LONGEST_IMAGE_INDEX = 64  # characters; in some releases a rotation's image is the index of the row that has it


class Reference(NamedTuple):
    """The question's number without rotation, the rotation, the options as shown, the right letter, and the category."""

    base: int
    rotation: int
    options: list[str]
    answer: str
    category: str


def examples(data_root: str | Path) -> list[Example]:
    """Every row, base rows and rotations, in the file's order; a base row's generated rotations follow it.

    Raises:
        LlavaRegionError: the file cannot be read or lacks a column.
    """
    rows = _rows(locate(data_root, QUESTIONS))
    images = {row["index"]: row["image"] for row in rows}
    decoded: dict[str, bytes] = {}
    rotated = any(int(row["index"]) >= ROTATION for row in rows)
    found: list[Example] = []
    for row in rows:
        text = images.get(row["image"], row["image"]) if len(row["image"]) <= LONGEST_IMAGE_INDEX else row["image"]
        if text not in decoded:
            decoded[text] = _decode(text)
        options = _options(row)
        found += [_example(row, options, decoded[text], shift) for shift in range(1 if rotated else max(1, len(options)))]
    return found


def _rows(path: Path) -> list[dict[str, str]]:
    """The rows of the TSV by column name."""
    limit = csv.field_size_limit(1 << 30)  # an image in base64 is longer than csv's default of 131,072 characters
    try:
        with path.open(encoding="utf-8-sig", newline="") as f:
            rows = list(csv.DictReader(f, delimiter="\t"))
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise LlavaRegionError(f"cannot read {path}: {e}; download it again") from e
    finally:
        csv.field_size_limit(limit)
    needed = ("index", "question", "answer", "image", "A", "B")
    if absent := [name for name in needed if not rows or rows[0].get(name) is None]:
        raise LlavaRegionError(f"{path} lacks the columns {', '.join(absent)} or is cut off; download it again")
    for row in rows:  # those of the test split are kept by the benchmark's server
        if row["answer"] not in tuple(OPTIONS[: len(_options(row))]):
            raise LlavaRegionError(
                f"{path} row {row['index']} has the answer '{row['answer']}', which is none of its options; give the dev split, {SOURCE}"
            )
    return rows


def _decode(text: str) -> bytes:
    """The image's bytes; text that is not base64 is kept, and counted as a corrupt image when it is opened."""
    try:
        return base64.b64decode(text)
    except (binascii.Error, ValueError):
        return text.encode()


def _given(value: str | None) -> TypeGuard[str]:
    """Whether a cell has content; some releases write "nan" or "none" into empty ones."""
    return value is not None and value.strip().lower() not in ("", "nan", "none")


def _options(row: dict[str, str]) -> list[str]:
    """The options up to the first that is empty."""
    options: list[str] = []
    for letter in OPTIONS:
        option = row.get(letter)
        if not _given(option):
            break
        options.append(option)
    return options


def _example(row: dict[str, str], options: list[str], image: bytes, shift: int) -> Example:
    """The row with its options moved down by `shift` places, the last ones to the top."""
    index = int(row["index"]) + shift * ROTATION
    shown = options[len(options) - shift :] + options[: len(options) - shift]
    answer = row["answer"]
    if shift:
        answer = LETTERS[(LETTERS.index(answer) + shift) % len(options)]
    hint = [row["hint"]] if _given(row.get("hint")) else []
    prompt = "\n".join([*hint, row["question"], lettered(shown), LETTER_INSTRUCTION])
    reference = Reference(index % ROTATION, index // ROTATION, shown, answer, row.get("category") or "")
    return Example(index, prompt, image, reference, aliases=(_round_key(reference.base, shown),))


def key(row: Row) -> Hashable:
    """The row's index. LLaVA's `--all-rounds` writes all rotations under one id with a `round_id`, and each one's options in its order:
    such a row is known by these.

    Raises:
        ValueError: a round without its options.
    """
    question_id, round_id = str(row["question_id"]), row.get("round_id")
    if round_id in (None, 0, "0", "") or not question_id.isdigit():
        return question_id
    options = row.get("options")
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise ValueError("has a 'round_id' and no list of texts as 'options', by which the rotation is known")
    return _round_key(int(question_id) % ROTATION, options)


def _round_key(base: int, options: list[str]) -> tuple[str, ...]:
    return (str(base), *options)


def correct(prediction: str, reference: Reference) -> bool:
    """Whether the answer's first standalone letter, or the one option that it spells out, is the right one."""
    return letter_or_text(prediction, reference.options) == reference.answer


def score(examples: list[Example], answers: dict[Hashable, str]) -> Result:
    """CircularEval (the paper's): a question is right if every rotation is; also plain accuracy over the base rows.

    If base rows are answered but no rotation is, as in a run over the base rows alone, CircularEval cannot be known: "circular"
    is None, "score" is the plain accuracy, "metric" is "accuracy", and the rotations count as "missing". "missing" and "rows"
    count rows; "n" counts questions.
    """
    texts, missing = answers_file.texts(TASK, examples, answers)
    hits = [correct(text, example.reference) for text, example in zip(texts, examples, strict=True)]
    category_of: dict[int, str] = {}
    questions: defaultdict[int, list[bool]] = defaultdict(list)
    categories: defaultdict[str, list[bool]] = defaultdict(list)
    for hit, example in zip(hits, examples, strict=True):
        questions[example.reference.base].append(hit)
        category_of.setdefault(example.reference.base, example.reference.category)
    for question, rotations in questions.items():
        categories[category_of[question]].append(all(rotations))
    accuracy = percent([hit for hit, example in zip(hits, examples, strict=True) if example.reference.rotation == 0])
    circular = percent([all(rotations) for rotations in questions.values()])
    known = not answers or any(example.reference.rotation and TASK.key_of(example) in answers for example in examples)
    return {
        "metric": "circular" if known else "accuracy",
        "score": circular if known else accuracy,
        "n": len(questions),
        "missing": missing,
        "rows": len(examples),
        "circular": circular if known else None,
        "accuracy": accuracy,
        "categories": {name: percent(categories[name]) for name in sorted(categories)} if known else None,
    }


TASK = Task(
    name="mmbench",
    title="MMBench",
    split="dev (English)",
    max_new_tokens=128,
    files=(File(QUESTIONS, SOURCE),),
    visual=True,
    read=examples,
    score=score,
    key=key,
)
