"""BIG-Bench-Hard, zero-shot: 27 tasks of reasoning (Suzgun et al., 2022; paper, section 5.3). Text only."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from pathlib import Path
from typing import NamedTuple

from llava_region.files import read_json
from llava_region.tasks import answers as answers_file
from llava_region.tasks.short_answer import matches
from llava_region.tasks.task import Example, File, Result, Task, locate, percent

PROMPT = "{input}\nPlease answer this question in a word or phrase"
FILE = "bbh/{part}.json or bbh/bbh/{part}.json"
NAMES = """boolean_expressions causal_judgement date_understanding disambiguation_qa dyck_languages formal_fallacies
    geometric_shapes hyperbaton logical_deduction_five_objects logical_deduction_seven_objects logical_deduction_three_objects
    movie_recommendation multistep_arithmetic_two navigate object_counting penguins_in_a_table
    reasoning_about_colored_objects ruin_names salient_translation_error_detection snarks sports_understanding
    temporal_sequences tracking_shuffled_objects_five_objects tracking_shuffled_objects_seven_objects
    tracking_shuffled_objects_three_objects web_of_lies word_sorting"""


class Reference(NamedTuple):
    """The right answer, the question, and the BIG-Bench-Hard task that it belongs to."""

    target: str
    question: str
    task: str


def examples(data_root: str | Path) -> list[Example]:
    """The 6,511 questions, tasks in alphabetical order; a question's id is `TASK/N`, where N counts the file's questions from 0.

    Raises:
        LlavaRegionError: a file cannot be read.
    """
    found: list[Example] = []
    for task in NAMES.split():
        for n, item in enumerate(read_json(locate(data_root, FILE.replace("{part}", task)))["examples"]):
            reference = Reference(item["target"], item["input"], task)
            found.append(Example(f"{task}/{n}", PROMPT.format(input=item["input"]), None, reference))
    return found


def score(examples: list[Example], answers: dict[Hashable, str]) -> Result:
    """Accuracy over all questions (the paper's), the mean over the tasks, and accuracy by task."""
    texts, missing = answers_file.texts(TASK, examples, answers)
    hits: defaultdict[str, list[bool]] = defaultdict(list)
    for text, example in zip(texts, examples, strict=True):
        hits[example.reference.task].append(matches(text, example.reference.target, example.reference.question))
    tasks = {name: percent(of_task) for name, of_task in sorted(hits.items())}
    micro = percent([hit for of_task in hits.values() for hit in of_task])
    return {
        "metric": "micro_accuracy",
        "score": micro,
        "n": len(examples),
        "missing": missing,
        "micro_accuracy": micro,
        "macro_accuracy": sum(tasks.values()) / len(tasks),
        "tasks": tasks,
    }


TASK = Task(
    name="bbh",
    title="BIG-Bench-Hard",
    split="test, 0-shot",
    max_new_tokens=128,
    files=(File(FILE, "https://github.com/suzgunmirac/BIG-Bench-Hard, folder bbh"),),
    visual=False,
    read=examples,
    score=score,
    parts=tuple(NAMES.split()),
)
