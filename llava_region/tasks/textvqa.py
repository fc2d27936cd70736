"""TextVQA, validation: reading text in photos, with ten people's answers per question (Singh et al., 2019; paper, section 3.2.2)."""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path

from llava_region.errors import LlavaRegionError
from llava_region.files import read_json
from llava_region.tasks import answers as answers_file
from llava_region.tasks.task import Example, File, Result, Row, Task, locate, percent, read_jsonl
from llava_region.tasks.vqa_normalise import normalise

ANNOTATIONS = "textvqa/TextVQA_0.5.1_val.json"
PROMPTS = "textvqa/llava_textvqa_val_v051_ocr.jsonl"
IMAGES = "textvqa/train_images/"
OLD_PROMPT = re.compile(r"OCR tokens: .*Question: (.*?) Short answer:", re.DOTALL)
IMAGE_ID_LENGTH = 16  # hexadecimal digits; the annotations' own question ids are shorter numbers


def question_of(prompt: str) -> str:
    """The question in a prompt, lower case: without the line of OCR tokens and without the instruction."""
    if old := OLD_PROMPT.match(prompt):
        return old[1].strip().lower()
    lines = [line for line in prompt.removeprefix("<image>\n").split("\n") if not line.startswith("Reference OCR token:")]
    if len(lines) > 1:
        lines.pop()
    return "\n".join(lines).strip().lower()


def key(row: Row) -> Hashable:
    """Image id and question, which together identify a question in LLaVA's answers; of a row whose id is a number, the number.

    Raises:
        ValueError: the prompt is no text.
    """
    question_id = str(row["question_id"])
    if question_id.isdigit() and len(question_id) < IMAGE_ID_LENGTH:
        return question_id
    prompt = row.get("prompt") or ""
    if not isinstance(prompt, str):
        raise ValueError(f"has a {type(prompt).__name__} as 'prompt'; allowed: the text that was asked")
    return question_id, question_of(prompt)


def examples(data_root: str | Path) -> list[Example]:
    """The 5,000 questions with LLaVA's prompts, in the order of LLaVA's file; the reference is the list of ten answers.

    `question_id` is the image's id, as in LLaVA's file; the annotations' unique number is an alias.

    Raises:
        LlavaRegionError: a file cannot be read, or the two files do not have the same questions.
    """
    annotations_path, prompts_path = locate(data_root, ANNOTATIONS), locate(data_root, PROMPTS)
    annotations = {(str(a["image_id"]), a["question"].strip().lower()): a for a in read_json(annotations_path)["data"]}
    rows = read_jsonl(prompts_path)
    pairs = [(row, (str(row["question_id"]), question_of(row["text"]))) for row in rows]
    differing = set(annotations).symmetric_difference(pair for _, pair in pairs)
    if differing:
        raise LlavaRegionError(
            f"{len(differing)} questions are in only one of {annotations_path} and {prompts_path}, such as {min(differing)}; "
            "download both again"
        )
    folder = locate(data_root, IMAGES)
    return [
        Example(row["question_id"], row["text"], folder / row["image"], a["answers"], (str(a["question_id"]),))
        for row, a in ((row, annotations[pair]) for row, pair in pairs)
    ]


def vqa_accuracy(prediction: str, references: list[str]) -> float:
    """The mean, over leaving out each of the people in turn, of min(1, n/3), n of the remaining people having given this answer."""
    if not prediction.strip():
        return 0.0  # would equal a person's answer that is only an article
    answer = normalise(prediction)
    agree = [normalise(reference) == answer for reference in references]
    return sum(min(1.0, (sum(agree) - own) / 3) for own in agree) / len(agree)


def score(examples: list[Example], answers: dict[Hashable, str]) -> Result:
    """The VQA accuracy (the paper's)."""
    texts, missing = answers_file.texts(TASK, examples, answers)
    accuracy = percent([vqa_accuracy(text, example.reference) for text, example in zip(texts, examples, strict=True)])
    return {"metric": "vqa_accuracy", "score": accuracy, "n": len(examples), "missing": missing, "vqa_accuracy": accuracy}


TASK = Task(
    name="textvqa",
    title="TextVQA",
    split="val",
    max_new_tokens=128,
    files=(
        File(ANNOTATIONS, "https://dl.fbaipublicfiles.com/textvqa/data/TextVQA_0.5.1_val.json"),
        File(PROMPTS, "LLaVA's eval.zip, linked in https://github.com/haotian-liu/LLaVA/blob/main/docs/Evaluation.md"),
        File(IMAGES, "https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip"),
    ),
    visual=True,
    read=examples,
    score=score,
    key=key,
)
