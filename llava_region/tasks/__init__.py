"""The paper's ten benchmarks (sections 3.2 and 5.3): from examples to a score. One module per task; nothing here imports torch.

    task = tasks.load("gqa")
    tasks.check(["gqa"], data_root)                # every missing file, in one error
    examples = task.examples(data_root)            # list[Example]; needs the annotation files only
    rows = answers.read(path)                      # [{"question_id", "prompt", "text"}, ...], as LLaVA writes them
    result = task.score(examples, answers.pair(task, examples, rows))

A question is identified by its **key**: `task.key(row)` of a row of an answers file. A row written from an example has that
example's `question_id` and `prompt`, so `task.key(example.row(text))` is the example's own key, and a resumed run compares
keys. The key is `str(question_id)`, with two exceptions: for TextVQA, LLaVA's `question_id` is the image's id, and the
question is read from the prompt; for MMBench, a row's `round_id` counts the rotations.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from llava_region.errors import LlavaRegionError
from llava_region.tasks.task import Example, File, Task

NAMES: tuple[str, ...] = ("ocrvqa", "docvqa", "refcocog", "tdiuc", "mmbench", "gqa", "scienceqa", "textvqa", "mmlu", "bbh")
VISUAL = NAMES[:8]  # the columns of Tables 1 to 3, in the paper's order; their mean is the tables' "Avg"

__all__ = ["NAMES", "VISUAL", "Example", "File", "Task", "check", "load", "parse_names"]


def load(name: str) -> Task:
    """The task of that name.

    Raises:
        LlavaRegionError: there is no such task; the message lists the allowed names.
    """
    if name not in NAMES:
        raise LlavaRegionError(f"unknown task '{name}'; allowed: {', '.join(NAMES)}")
    return import_module(f"llava_region.tasks.{name}").TASK


def parse_names(text: str) -> list[str]:
    """`--task gqa,textvqa` as a list of names, in the order given, each once; `all` means every task.

    Raises:
        LlavaRegionError: a name is unknown or none is given.
    """
    names = list(NAMES) if text == "all" else list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not names:
        raise LlavaRegionError(f"no task given; allowed: {', '.join(NAMES)}, or all")
    for name in names:
        load(name)
    return names


def check(names: list[str], data_root: str | Path, images: bool = True) -> None:
    """Refuse a data root that lacks a file of one of the tasks.

    Args:
        images: whether the image folders are needed; to score an existing answers file they are not.

    Raises:
        LlavaRegionError: names every missing file and where to get it.
    """
    missing = [line for name in names for line in load(name).missing_files(data_root, images)]
    if missing:
        raise LlavaRegionError(f"{data_root} lacks {'; '.join(missing)}")
