"""OCRVQA, test: questions about book covers (Mishra et al., 2019; paper, section 3.2.1)."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path, PurePosixPath

from llava_region.files import read_json
from llava_region.tasks import ocr_questions
from llava_region.tasks.task import Example, File, Result, Task, locate

ANNOTATIONS = "ocrvqa/dataset.json"
IMAGES = "ocrvqa/images/"
TEST = 3  # the "split" of dataset.json: 1 train, 2 validation, 3 test


def examples(data_root: str | Path) -> list[Example]:
    """Test questions in the file's order; the reference is a list that holds the one right answer.

    The official file numbers books, not questions: a question's id is `BOOK_N`, where N counts the book's questions from 0.

    Raises:
        LlavaRegionError: the annotation file cannot be read.
    """
    folder = locate(data_root, IMAGES)
    present = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
    found = []
    for book, entry in read_json(locate(data_root, ANNOTATIONS)).items():
        if int(entry["split"]) != TEST:
            continue
        image = folder / _image_name(book, entry["imageURL"], present)
        for n, (question, answer) in enumerate(zip(entry["questions"], entry["answers"], strict=True)):
            found.append(Example(f"{book}_{n}", ocr_questions.PROMPT.format(question=question), image, [str(answer)]))
    return found


def _image_name(book: str, url: str, present: set[str]) -> str:
    """The official loader keeps the suffix of the URL; in LLaVA's copy all images are `.jpg`."""
    kept = book + PurePosixPath(url).suffix
    return kept if kept in present else f"{book}.jpg"


def score(examples: list[Example], answers: dict[Hashable, str]) -> Result:
    """`contains` (the paper's), `exact` and `anls`."""
    return ocr_questions.score(TASK, examples, answers)


TASK = Task(
    name="ocrvqa",
    title="OCRVQA",
    split="test",
    max_new_tokens=100,
    files=(
        File(ANNOTATIONS, "https://ocr-vqa.github.io, link 'Dataset' (a Google Drive folder)"),
        File(IMAGES, "https://ocr-vqa.github.io, script loadDataset.py of the same folder, which downloads the book covers"),
    ),
    visual=True,
    read=examples,
    score=score,
)
