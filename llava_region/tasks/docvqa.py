"""DocVQA, validation: questions about scanned documents (Mathew et al., 2021; paper, section 3.2.1)."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path, PurePosixPath

from llava_region.files import read_json
from llava_region.tasks import ocr_questions
from llava_region.tasks.task import Example, File, Result, Task, locate

ANNOTATIONS = "docvqa/val_v1.0_withQT.json or docvqa/spdocvqa_qas/val_v1.0_withQT.json or docvqa/val/val_v1.0.json"
IMAGES = "docvqa/documents/ or docvqa/spdocvqa_images/ or docvqa/val/documents/"
SOURCE = "https://rrc.cvc.uab.es/?ch=17&com=downloads (free account), task 1 'Single Page Document VQA'"


def examples(data_root: str | Path) -> list[Example]:
    """The 5,349 questions in the file's order; the reference is the list of right answers.

    Raises:
        LlavaRegionError: the annotation file cannot be read.
    """
    folder = locate(data_root, IMAGES)
    return [
        Example(
            entry["questionId"],
            ocr_questions.PROMPT.format(question=entry["question"]),
            folder / PurePosixPath(entry["image"]).name,  # "documents/NAME.png"; the archive of the images names its folder differently
            [str(answer) for answer in entry["answers"]],
        )
        for entry in read_json(locate(data_root, ANNOTATIONS))["data"]
    ]


def score(examples: list[Example], answers: dict[Hashable, str]) -> Result:
    """`contains` (the paper's), `exact` and `anls` (the benchmark's own)."""
    return ocr_questions.score(TASK, examples, answers)


TASK = Task(
    name="docvqa",
    title="DocVQA",
    split="val",
    max_new_tokens=100,
    files=(File(ANNOTATIONS, f"{SOURCE}, annotations"), File(IMAGES, f"{SOURCE}, images")),
    visual=True,
    read=examples,
    score=score,
)
