"""GQA, testdev balanced: compositional questions about photos (Hudson and Manning, 2019; paper, section 3.2.2)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from pathlib import Path
from typing import NamedTuple

from llava_region.files import read_json
from llava_region.tasks import answers as answers_file
from llava_region.tasks.task import PHRASE_INSTRUCTION, Example, File, Result, Task, locate, percent

ANNOTATIONS = "gqa/testdev_balanced_questions.json or gqa/data/testdev_balanced_questions.json"
IMAGES = "gqa/images/ or gqa/data/images/"


class Reference(NamedTuple):
    """The right answer, and the question's structural type: query (open), verify, logical, choose or compare (binary)."""

    answer: str
    structural: str


def examples(data_root: str | Path) -> list[Example]:
    """The 12,578 questions in the file's order.

    Raises:
        LlavaRegionError: the annotation file cannot be read.
    """
    folder = locate(data_root, IMAGES)
    return [
        Example(
            key,
            f"{entry['question']}\n{PHRASE_INSTRUCTION}",
            folder / f"{entry['imageId']}.jpg",
            Reference(entry["answer"], entry["types"]["structural"]),
        )
        for key, entry in read_json(locate(data_root, ANNOTATIONS)).items()
    ]


def correct(prediction: str, answer: str) -> bool:
    """Whether they are equal after LLaVA's conversion: without full stops at the end, in lower case."""
    return prediction.strip().rstrip(".").lower() == answer


def score(examples: list[Example], answers: dict[Hashable, str]) -> Result:
    """Accuracy over all questions (the paper's), over binary and over open ones, and by structural type."""
    texts, missing = answers_file.texts(TASK, examples, answers)
    hits: defaultdict[str, list[bool]] = defaultdict(list)
    for text, example in zip(texts, examples, strict=True):
        hits[example.reference.structural].append(correct(text, example.reference.answer))
    accuracy = percent([hit for of_type in hits.values() for hit in of_type])
    return {
        "metric": "accuracy",
        "score": accuracy,
        "n": len(examples),
        "missing": missing,
        "accuracy": accuracy,
        "binary": percent([hit for name, of_type in hits.items() if name != "query" for hit in of_type]),
        "open": percent(hits.get("query", [])),
        "types": {name: percent(hits[name]) for name in sorted(hits)},
    }


TASK = Task(
    name="gqa",
    title="GQA",
    split="testdev balanced",
    max_new_tokens=128,
    files=(
        File(ANNOTATIONS, "https://downloads.cs.stanford.edu/nlp/data/gqa/questions1.2.zip"),
        File(IMAGES, "https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip"),
    ),
    visual=True,
    read=examples,
    score=score,
)
