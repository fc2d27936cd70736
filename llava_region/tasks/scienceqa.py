"""ScienceQA, test: multiple-choice school questions; the paper's figure is over those with an image (Lu et al., 2022)."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Hashable
from pathlib import Path
from typing import Any, NamedTuple

from llava_region.errors import LlavaRegionError
from llava_region.files import read_json
from llava_region.tasks import answers as answers_file
from llava_region.tasks.choices import LETTERS
from llava_region.tasks.task import LETTER_INSTRUCTION, Example, File, Result, Task, locate, percent

PROBLEMS = "scienceqa/problems.json"
SPLITS = "scienceqa/pid_splits.json"
PROMPTS = "scienceqa/llava_test_CQM-A.json or scienceqa/bunny_test_CQM-A.json"
IMAGES = "scienceqa/images/test/ or scienceqa/test/"
PROBLEM_SOURCE = "https://github.com/lupantech/ScienceQA, folder data/scienceqa"
LETTERS_ALLOWED = LETTERS[:5]
SENTENCE = re.compile(r"The answer is ([A-Z])(?=\W)")


class Reference(NamedTuple):
    """The right option's index, the number of options, whether there is an image, and the subject."""

    answer: int
    options: int
    has_image: bool
    subject: str


def examples(data_root: str | Path) -> list[Example]:
    """The 4,241 test questions, of which 2,017 have an image, with the prompts and in the order of LLaVA's file.

    Raises:
        LlavaRegionError: a file cannot be read, or the prompts lack a test problem.
    """
    problems = read_json(locate(data_root, PROBLEMS))
    test = set(read_json(locate(data_root, SPLITS))["test"])
    folder, path = locate(data_root, IMAGES), locate(data_root, PROMPTS)
    rows = [row for row in read_json(path) if row["id"] in test]
    if absent := test - {row["id"] for row in rows}:
        raise LlavaRegionError(f"{path} lacks {len(absent)} of the {len(test)} test problems, such as {min(absent)}; download it again")
    return [_example(row, problems[row["id"]], folder) for row in rows]


def _example(row: dict[str, Any], problem: dict[str, Any], folder: Path) -> Example:
    """The question of a row of LLaVA's file and the official problem with the same id."""
    question = row["conversations"][0]["value"].replace("<image>", "").strip()
    image = folder / row["image"] if "image" in row else None
    reference = Reference(problem["answer"], len(problem["choices"]), image is not None, problem["subject"])
    return Example(row["id"], f"{question}\n{LETTER_INSTRUCTION}", image, reference, shows_image=True)


def parse(text: str) -> str | None:
    """The option letter of an answer: alone, before `. `, or in exactly one "The answer is X."; None for anything else.

    As in LLaVA's scorer, which the paper uses, except that the first letter of a word ("The answer is Apple") does not count.
    """
    text = text.strip()
    if text[:1] in tuple(LETTERS_ALLOWED) and (len(text) == 1 or text[1:3] == ". "):
        return text[0]
    found = SENTENCE.findall(text)
    return found[0] if len(found) == 1 else None


def correct(prediction: str, reference: Reference) -> bool:
    """Whether the answer names the right option."""
    letter = parse(prediction)
    return letter is not None and letter == LETTERS[: reference.options][reference.answer]


def score(examples: list[Example], answers: dict[Hashable, str]) -> Result:
    """Accuracy over the questions with an image (the paper's), the same by subject, and accuracy over all questions.

    "n" and "missing" count questions with an image. "accuracy_all" is None if no question without an image was answered, as in
    a run over the image questions alone.
    """
    hits: defaultdict[tuple[bool, str], list[bool]] = defaultdict(list)
    missing, text_answered = 0, False
    texts, _ = answers_file.texts(TASK, examples, answers)
    for text, example in zip(texts, examples, strict=True):
        answered = TASK.key_of(example) in answers
        hits[example.reference.has_image, example.reference.subject].append(correct(text, example.reference))
        missing += example.reference.has_image and not answered
        text_answered |= answered and not example.reference.has_image
    with_image = {subject: of for (has_image, subject), of in sorted(hits.items()) if has_image}
    images = [hit for of in with_image.values() for hit in of]
    return {
        "metric": "accuracy_image",
        "score": percent(images),
        "n": len(images),
        "missing": missing,
        "accuracy_image": percent(images),
        "accuracy_all": percent([hit for of in hits.values() for hit in of]) if text_answered else None,
        "n_all": len(examples),
        "subjects": {subject: percent(of) for subject, of in with_image.items()},
    }


TASK = Task(
    name="scienceqa",
    title="ScienceQA",
    split="test, with image",
    max_new_tokens=1024,
    files=(
        File(PROBLEMS, PROBLEM_SOURCE),
        File(SPLITS, PROBLEM_SOURCE),
        File(PROMPTS, "LLaVA's eval.zip, linked in https://github.com/haotian-liu/LLaVA/blob/main/docs/Evaluation.md"),
        File(IMAGES, "https://github.com/lupantech/ScienceQA, tools/download.sh (test.zip)"),
    ),
    visual=True,
    read=examples,
    score=score,
)
