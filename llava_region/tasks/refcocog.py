"""RefCOCOg, test (umd split): the bounding box of what a sentence describes (Yu et al., 2016; paper, section 3.2.1)."""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path, PurePosixPath

from llava_region.tasks import answers as answers_file
from llava_region.tasks.task import Example, File, Result, Task, locate, percent, read_jsonl

PROMPT = "Please provide the bounding box coordinate of the region this sentence describes: {sent}"
ANNOTATIONS = "refcocog/refcocog_test.jsonl"
IMAGES = "refcocog/train2014/ or coco/train2014/"

NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
BOX = re.compile(r"\[\s*" + r"\s*,\s*".join([f"({NUMBER})"] * 4) + r"\s*\]")

Box = tuple[float, float, float, float]


def padded_box(box: list[float], width: int, height: int) -> Box:
    """A box in pixels (x1, y1, x2, y2) as fractions of the side of the square that the image, centred, is padded to."""
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    x1, y1, x2, y2 = box
    return (x1 + left) / side, (y1 + top) / side, (x2 + left) / side, (y2 + top) / side


def parse_box(text: str) -> Box | None:
    """The first bracket of four numbers in an answer, corners sorted; None if there is none. It may lie outside the picture."""
    match = BOX.search(text)
    if match is None:
        return None
    x1, y1, x2, y2 = map(float, match.groups())
    return min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)


def is_outside(box: Box) -> bool:
    """Whether a box reaches out of the picture, as one in pixels does, or one in thousandths."""
    return min(box) < 0 or max(box) > 1


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes with sorted corners; 0 for two boxes without area."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    shared = width * height
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / union if union > 0 else 0.0


def examples(data_root: str | Path) -> list[Example]:
    """One example per line. Its id is the line's number from 0, as the file has no ids; its reference is the box in the padded square.

    Raises:
        LlavaRegionError: the annotation file cannot be read.
    """
    folder = locate(data_root, IMAGES)
    return [
        Example(
            number,
            PROMPT.format(sent=row["sent"]),
            folder / PurePosixPath(row["image"]).name,
            padded_box(row["bbox"], row["width"], row["height"]),
        )
        for number, row in enumerate(read_jsonl(locate(data_root, ANNOTATIONS)))
    ]


def score(examples: list[Example], answers: dict[Hashable, str]) -> Result:
    """Mean IoU (the paper's), the share of boxes with IoU of at least 0.5, and the numbers of answers without a box ("unparsed") and with
    one that reaches out of the picture ("outside"), whose whole area counts."""
    texts, missing = answers_file.texts(TASK, examples, answers)
    boxes = [parse_box(text) for text in texts]
    overlaps = [0.0 if box is None else iou(box, example.reference) for box, example in zip(boxes, examples, strict=True)]
    mean = percent(overlaps)
    return {
        "metric": "mean_iou",
        "score": mean,
        "n": len(examples),
        "missing": missing,
        "mean_iou": mean,
        "acc@0.5": percent([overlap >= 0.5 for overlap in overlaps]),
        "unparsed": sum(box is None for box in boxes) - missing,
        "outside": sum(box is not None and is_outside(box) for box in boxes),
    }


TASK = Task(
    name="refcocog",
    title="RefCOCOg",
    split="test (umd)",
    max_new_tokens=128,
    files=(
        File(
            ANNOTATIONS,
            "https://ofasys-wlcb.oss-cn-wulanchabu.aliyuncs.com/Qwen-VL/evaluation/refcocog/refcocog_test.jsonl, the annotations of "
            "https://github.com/lichengunc/refer as JSON lines",
        ),
        File(IMAGES, "http://images.cocodataset.org/zips/train2014.zip"),
    ),
    visual=True,
    read=examples,
    score=score,
)
