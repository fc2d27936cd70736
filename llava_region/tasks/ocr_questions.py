"""What OCRVQA and DocVQA share, whose questions are about text in an image: the prompt and the scorer."""

from __future__ import annotations

from collections.abc import Hashable

from llava_region.tasks import answers as answers_file
from llava_region.tasks.task import Example, Result, Task, percent
from llava_region.tasks.text_match import anls, contains, exact

PROMPT = "Please answer the question in one words.\n{question}"  # sic: the authors' wording, kept to compare with the paper


def score(task: Task, examples: list[Example], answers: dict[Hashable, str]) -> Result:
    """`contains` (the paper's accuracy), `exact` and `anls`, in percent; an example's reference is the list of right answers."""
    texts, missing = answers_file.texts(task, examples, answers)
    metrics = {
        name: percent([metric(text, example.reference) for text, example in zip(texts, examples, strict=True)])
        for name, metric in (("contains", contains), ("exact", exact), ("anls", anls))
    }
    return {"metric": "contains", "score": metrics["contains"], "n": len(examples), "missing": missing, **metrics}
