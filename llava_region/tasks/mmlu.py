"""MMLU, test, five-shot: 57 subjects, four options (Hendrycks et al., 2020; paper, section 5.3). Text only."""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Hashable
from pathlib import Path
from typing import NamedTuple

from llava_region.errors import LlavaRegionError
from llava_region.tasks import answers as answers_file
from llava_region.tasks.choices import lettered, stated_letter
from llava_region.tasks.task import LETTER_INSTRUCTION, Example, File, Result, Task, locate, percent

SHOTS = 5
COLUMNS = 6  # question, four options, letter
SOURCE = "https://people.eecs.berkeley.edu/~hendrycks/data.tar"
DEV = "mmlu/dev/{part}_dev.csv or mmlu/data/dev/{part}_dev.csv"
TEST = "mmlu/test/{part}_test.csv or mmlu/data/test/{part}_test.csv"

FIRST_SHOT = re.compile(r"\A(The following are .*?\.\n\n).*?\nAnswer: [A-D]\n\n", re.DOTALL)

CATEGORIES = {
    "STEM": """abstract_algebra astronomy college_biology college_chemistry college_computer_science college_mathematics
        college_physics computer_security conceptual_physics electrical_engineering elementary_mathematics high_school_biology
        high_school_chemistry high_school_computer_science high_school_mathematics high_school_physics high_school_statistics
        machine_learning""",
    "humanities": """formal_logic high_school_european_history high_school_us_history high_school_world_history international_law
        jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy prehistory professional_law world_religions""",
    "social sciences": """econometrics high_school_geography high_school_government_and_politics high_school_macroeconomics
        high_school_microeconomics high_school_psychology human_sexuality professional_psychology public_relations
        security_studies sociology us_foreign_policy""",
    "other": """anatomy business_ethics clinical_knowledge college_medicine global_facts human_aging management marketing
        medical_genetics miscellaneous nutrition professional_accounting professional_medicine virology""",
}
CATEGORY_OF = {subject: category for category, subjects in CATEGORIES.items() for subject in subjects.split()}


class Reference(NamedTuple):
    """The right letter and the subject."""

    answer: str
    subject: str


def examples(data_root: str | Path) -> list[Example]:
    """The 14,042 questions, subjects in alphabetical order; a question's id is `SUBJECT/N`, where N counts the file's rows from 0.

    Raises:
        LlavaRegionError: a file cannot be read, has a row that does not have six columns, or has too few rows.
    """
    found: list[Example] = []
    for subject in sorted(CATEGORY_OF):
        shots = _rows(locate(data_root, DEV.replace("{part}", subject)), SHOTS)[:SHOTS]
        header = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
        header += "".join(f"{_question(row)}\nAnswer: {row[-1]}\n\n" for row in shots)
        for n, row in enumerate(_rows(locate(data_root, TEST.replace("{part}", subject)), 1)):
            prompt = f"{header}{_question(row)}\n{LETTER_INSTRUCTION}"
            found.append(Example(f"{subject}/{n}", prompt, None, Reference(row[-1], subject)))
    return found


def shorten(prompt: str) -> str | None:
    """The prompt without its first shot, as the official evaluation drops shots from a prompt that is too long; None if it has none."""
    shorter = FIRST_SHOT.sub(r"\1", prompt, count=1)
    return None if shorter == prompt else shorter


def _question(row: list[str]) -> str:
    """The question and its lettered options."""
    return f"{row[0]}\n{lettered(row[1:-1])}"


def _rows(path: Path, least: int) -> list[list[str]]:
    """The file's rows, at least `least`: question, four options, letter."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as f:
            rows = [row for row in csv.reader(f) if row]  # an editor may leave an empty line at the end
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise LlavaRegionError(f"cannot read {path}: {e}; download it again") from e
    wrong = next((n for n, row in enumerate(rows, 1) if len(row) != COLUMNS or row[-1] not in tuple("ABCD")), None)
    if wrong or len(rows) < least:
        what = f"row {wrong} is not a question, four options and a letter" if wrong else f"{len(rows)} rows, needed: {least}"
        raise LlavaRegionError(f"{path}: {what}; download it again")
    return rows


def correct(prediction: str, answer: str) -> bool:
    """Whether the first standalone letter of the answer is the right one."""
    return stated_letter(prediction, 4) == answer


def score(examples: list[Example], answers: dict[Hashable, str]) -> Result:
    """Accuracy over all questions (the paper's), the mean over subjects, and accuracy by category and by subject."""
    texts, missing = answers_file.texts(TASK, examples, answers)
    subjects: defaultdict[str, list[bool]] = defaultdict(list)
    categories: defaultdict[str, list[bool]] = defaultdict(list)
    for text, example in zip(texts, examples, strict=True):
        hit = correct(text, example.reference.answer)
        subjects[example.reference.subject].append(hit)
        categories[CATEGORY_OF[example.reference.subject]].append(hit)
    micro = percent([hit for hits in subjects.values() for hit in hits])
    by_subject = {name: percent(hits) for name, hits in sorted(subjects.items())}
    return {
        "metric": "micro_accuracy",
        "score": micro,
        "n": len(examples),
        "missing": missing,
        "micro_accuracy": micro,
        "macro_accuracy": sum(by_subject.values()) / len(by_subject),
        "categories": {name: percent(categories[name]) for name in sorted(categories)},
        "subjects": by_subject,
    }


TASK = Task(
    name="mmlu",
    title="MMLU",
    split="test, 5-shot",
    max_new_tokens=32,
    files=(File(DEV, f"{SOURCE}, folder data/dev"), File(TEST, f"{SOURCE}, folder data/test")),
    visual=False,
    read=examples,
    score=score,
    parts=tuple(sorted(CATEGORY_OF)),
    shorten=shorten,
)
