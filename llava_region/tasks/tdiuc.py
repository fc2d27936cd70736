"""TDIUC, validation: 12 types of questions about photos (Kafle and Kanan, 2017; paper, section 3.2.1)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from pathlib import Path
from typing import NamedTuple

from llava_region.errors import LlavaRegionError
from llava_region.files import read_json
from llava_region.tasks import answers as answers_file
from llava_region.tasks.number_words import to_digits
from llava_region.tasks.task import Example, File, Result, Task, locate, percent

PROMPT = "{question} Answer the question in one word."
LEFT_OUT = "absurd"  # questions that the image cannot answer: not part of the paper's figure
QUESTIONS = "tdiuc/OpenEnded_mscoco_val2014_questions.json or tdiuc/Questions/OpenEnded_mscoco_val2014_questions.json"
ANNOTATIONS = "tdiuc/mscoco_val2014_annotations.json or tdiuc/Annotations/mscoco_val2014_annotations.json"
IMAGES = "tdiuc/val2014/ or tdiuc/Images/val2014/ or coco/val2014/"
SOURCE = "https://kushalkafle.com/data/TDIUC.zip"


class Reference(NamedTuple):
    """The right answer and the type of a question."""

    answer: str
    question_type: str


def examples(data_root: str | Path) -> list[Example]:
    """Questions in the file's order, without those of type `absurd`.

    Raises:
        LlavaRegionError: a file cannot be read, or a question has no annotation.
    """
    folder = locate(data_root, IMAGES)
    path = locate(data_root, ANNOTATIONS)
    annotations = {entry["question_id"]: entry for entry in read_json(path)["annotations"]}
    found: list[Example] = []
    for entry in read_json(locate(data_root, QUESTIONS))["questions"]:
        annotation = annotations.get(entry["question_id"])
        if annotation is None:
            raise LlavaRegionError(f"{path} has no annotation of question {entry['question_id']}; give the two files of one TDIUC.zip")
        if annotation["question_type"] != LEFT_OUT:
            image = folder / f"COCO_val2014_{int(entry['image_id']):012d}.jpg"
            reference = Reference(annotation["answers"][0]["answer"], annotation["question_type"])
            found.append(Example(entry["question_id"], PROMPT.format(question=entry["question"]), image, reference))
    return found


def correct(prediction: str, answer: str) -> bool:
    """Whether they are equal, ignoring case, outer spaces, and whether numbers are written as words."""
    return to_digits(prediction).strip() == to_digits(answer).strip()


def score(examples: list[Example], answers: dict[Hashable, str]) -> Result:
    """Simple accuracy (the paper's), and the arithmetic and the harmonic mean of the accuracies per question type ("mpt")."""
    texts, missing = answers_file.texts(TASK, examples, answers)
    hits: defaultdict[str, list[bool]] = defaultdict(list)
    for text, example in zip(texts, examples, strict=True):
        hits[example.reference.question_type].append(correct(text, example.reference.answer))
    types = {name: percent(hits[name]) for name in sorted(hits)}
    accuracy = percent([hit for of_type in hits.values() for hit in of_type])
    return {
        "metric": "accuracy",
        "score": accuracy,
        "n": len(examples),
        "missing": missing,
        "accuracy": accuracy,
        "arithmetic_mpt": sum(types.values()) / len(types),
        "harmonic_mpt": len(types) / sum(1 / value for value in types.values()) if all(types.values()) else 0.0,
        "types": types,
    }


TASK = Task(
    name="tdiuc",
    title="TDIUC",
    split="val",
    max_new_tokens=512,
    files=(
        File(QUESTIONS, f"{SOURCE}, folder Questions"),
        File(ANNOTATIONS, f"{SOURCE}, folder Annotations"),
        File(IMAGES, "http://images.cocodataset.org/zips/val2014.zip"),
    ),
    visual=True,
    read=examples,
    score=score,
)
