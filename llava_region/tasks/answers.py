"""Answers files in LLaVA's form: one JSON object per line, with `question_id`, `prompt` and `text`."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path

from llava_region.errors import LlavaRegionError
from llava_region.tasks.task import Example, Row, Task, read_jsonl


def read(path: str | Path) -> list[Row]:
    """The rows of an answers file.

    Raises:
        LlavaRegionError: it is missing or empty, or a line is not a JSON object with `question_id` and a string `text`.
    """
    rows = read_jsonl(Path(path))
    if not rows:
        raise LlavaRegionError(f"{path} holds no answers; give the file that a model's answers were written to")
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("question_id"), str | int) or not isinstance(row.get("text"), str):
            raise LlavaRegionError(
                f'{path} row {number} lacks "question_id" (text or a whole number) or "text" (text), as LLaVA\'s answers files have them'
            )
    return rows


def pair(task: Task, examples: list[Example], rows: list[Row]) -> dict[Hashable, str]:
    """Answers by the key of their question. Rows that belong to no question are ignored; of several rows for one question the last counts.

    Raises:
        LlavaRegionError: a row has a field of a wrong type; or there are rows, but none belongs to a question of the task.
    """
    keys: dict[Hashable, Hashable] = {}
    for example in examples:
        key = task.key_of(example)
        keys.update(dict.fromkeys((key, *example.aliases), key))
    answers: dict[Hashable, str] = {}
    for number, row in enumerate(rows, 1):
        try:
            key = task.key(row)
        except ValueError as e:
            raise LlavaRegionError(f"row {number} of the answers to {task.name} {e}; correct the row") from e
        if key in keys:
            answers[keys[key]] = row["text"]
    if rows and not answers:
        raise LlavaRegionError(
            f"none of the {len(rows)} answers belongs to a question of {task.name} (first question_id: {rows[0]['question_id']!r}, "
            f"the task's: {examples[0].question_id!r}); give the answers file of this task"
        )
    return answers


def texts(task: Task, examples: list[Example], answers: dict[Hashable, str]) -> tuple[list[str], int]:
    """Answers in the examples' order, "" for an example without an answer, and the number of those."""
    found = [answers.get(task.key_of(example)) for example in examples]
    return ["" if text is None else text for text in found], sum(text is None for text in found)
