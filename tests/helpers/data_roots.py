"""Small data roots in the official formats of the ten benchmarks, for the tests: a few questions each, images made here.

`write_all(root)` fills one root for all of them; `right_answer(name, example)` is an answer that its scorer counts as fully right.
"""

import base64
import csv
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

from llava_region.tasks import Example, bbh, mmlu
from llava_region.tasks.choices import LETTERS

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220)}
PHRASE = "Answer the question using a single word or phrase."


def bbh_source() -> Path:
    """Folder of the official BIG-Bench-Hard files next to the checkout; it may be absent."""
    return Path(__file__).resolve().parents[2] / "../shared/data/bbh"


def gqa_archive() -> Path:
    """Archive of the official GQA questions next to the checkout; it may be absent."""
    return Path(__file__).resolve().parents[2] / "../shared/data/gqa/testdev_balanced_questions.tar.gz"


def picture(colour: str, size: tuple[int, int] = (32, 24)) -> Image.Image:
    """An image of one colour with a white pixel in the middle; `size` is width and height in pixels."""
    image = Image.new("RGB", size, COLOURS[colour])
    image.putpixel((size[0] // 2, size[1] // 2), (255, 255, 255))
    return image


def save_picture(path: Path, colour: str, size: tuple[int, int] = (32, 24)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(colour, size).save(path)


def write_json(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_ocrvqa(root: Path) -> None:
    """Two test books with three questions, one image a `.gif`, and a train book."""
    books = {
        "0001": ("http://books.example/a.jpg", 3, ["Who wrote this book?", "What is the title of this book?"], ["Ann Lee", "Red Café"]),
        "0002": ("http://books.example/b.gif", 3, ["Is this a cookbook?"], ["Yes"]),
        "0003": ("http://books.example/c.jpg", 1, ["What type of book is this?"], ["Travel"]),
    }
    fields = ("imageURL", "split", "questions", "answers")
    write_json(root / "ocrvqa/dataset.json", {book: dict(zip(fields, entry, strict=True)) for book, entry in books.items()})
    save_picture(root / "ocrvqa/images/0001.jpg", "red", (24, 40))
    save_picture(root / "ocrvqa/images/0002.gif", "blue", (24, 40))


def write_docvqa(root: Path) -> None:
    """Three questions about two pages, one with two right answers."""
    rows = [
        (49153, "What is the date?", "documents/page_1.png", ["May 5, 1970", "5/5/70"]),
        (49154, "Who signed?", "documents/page_1.png", ["J. Müller"]),
        (49155, "What is the total?", "documents/page_2.png", ["$1,250.00"]),
    ]
    fields = ("questionId", "question", "image", "answers")
    data = [dict(zip(fields, row, strict=True), data_split="val", docId=1) for row in rows]
    write_json(root / "docvqa/val_v1.0_withQT.json", {"dataset_name": "SP-DocVQA", "dataset_split": "val", "data": data})
    save_picture(root / "docvqa/documents/page_1.png", "green", (30, 44))
    save_picture(root / "docvqa/documents/page_2.png", "blue", (44, 30))


def write_refcocog(root: Path) -> None:
    """Three sentences: a wide image and a tall one."""
    wide, tall = ("COCO_train2014_000000000001.jpg", 64, 48), ("COCO_train2014_000000000002.jpg", 30, 40)
    boxes = [(wide, "the dog on the left", [0, 0, 32, 48]), (wide, "a red ball", [40, 10, 60, 30]), (tall, "the man", [3, 5, 28, 40])]
    rows = [
        {"image": f"data/coco/train2014/{name}", "sent": sent, "bbox": box, "width": width, "height": height}
        for (name, width, height), sent, box in boxes
    ]
    write_jsonl(root / "refcocog/refcocog_test.jsonl", rows)
    for (name, width, height), colour in ((wide, "red"), (tall, "green")):
        save_picture(root / "refcocog/train2014" / name, colour, (width, height))


def write_tdiuc(root: Path) -> None:
    """Four questions of three types, and one of the type `absurd`."""
    rows = [
        (1, 42, "What color is the wall?", "red", "color"),
        (2, 42, "How many dogs are there?", "two", "counting"),
        (3, 42, "How many cats are there?", "1", "counting"),
        (4, 73, "Is there a dog?", "no", "object_presence"),
        (5, 73, "What breed is the dog?", "doesnotapply", "absurd"),
    ]
    questions = [{"question_id": i, "image_id": image, "question": question} for i, image, question, _, _ in rows]
    annotations = [
        {"question_id": i, "image_id": image, "question_type": kind, "answers": [{"answer": answer, "answer_id": 1}]}
        for i, image, _, answer, kind in rows
    ]
    write_json(root / "tdiuc/OpenEnded_mscoco_val2014_questions.json", {"questions": questions})
    write_json(root / "tdiuc/mscoco_val2014_annotations.json", {"annotations": annotations})
    save_picture(root / "tdiuc/val2014/COCO_val2014_000000000042.jpg", "red")
    save_picture(root / "tdiuc/val2014/COCO_val2014_000000000073.jpg", "blue")


MMBENCH_COLUMNS = ("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "l2-category", "split")


def mmbench_rows() -> list[dict[str, Any]]:
    """Two base questions: four options and a hint; two options."""
    buffer = io.BytesIO()
    picture("red").save(buffer, "JPEG")
    image = base64.b64encode(buffer.getvalue()).decode()
    shared = {"image": image, "source": "test", "split": "dev", "hint": "", "C": "", "D": ""}
    options = {"A": "red", "B": "green", "C": "blue", "D": "white"}
    return [
        {**shared, **options, "index": 241, "question": "Which colour?", "hint": "Look at\nit.", "answer": "A", "category": "colour",
         "l2-category": "perception"},
        {**shared, "A": "yes", "B": "no", "index": 252, "question": 'Is it "red"?', "answer": "A", "category": "existence",
         "l2-category": "reasoning"},
    ]  # fmt: skip


def write_mmbench(root: Path, rotations: bool = True) -> None:
    """The two questions, with their rotations as in the official file (3 + 1 more rows), or alone."""
    rows = mmbench_rows()
    for row in mmbench_rows() if rotations else []:
        letters = [letter for letter in "ABCD" if row[letter]]
        for shift in range(1, len(letters)):
            moved = {letter: row[letters[(i - shift) % len(letters)]] for i, letter in enumerate(letters)}
            answer = letters[(letters.index(row["answer"]) + shift) % len(letters)]
            rows.append({**row, **moved, "answer": answer, "index": row["index"] + shift * 1_000_000})
    path = root / "mmbench/mmbench_dev_20230712.tsv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as f:
        writer = csv.DictWriter(f, MMBENCH_COLUMNS, delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)


def write_gqa(root: Path) -> None:
    """Three questions: open, verify, choose."""
    rows = {
        "201307251": ("n1", "Is it overcast?", "no", "verify"),
        "201640614": ("n2", "Who is wearing the dress?", "women", "query"),
        "202225914": ("n2", "Is the cup red or blue?", "red", "choose"),
    }
    questions = {
        key: {"imageId": image, "question": question, "answer": answer, "types": {"structural": kind}, "isBalanced": True}
        for key, (image, question, answer, kind) in rows.items()
    }
    write_json(root / "gqa/testdev_balanced_questions.json", questions)
    save_picture(root / "gqa/images/n1.jpg", "green")
    save_picture(root / "gqa/images/n2.jpg", "red")


def write_scienceqa(root: Path) -> None:
    """Three test problems, two of them with an image, and a train problem."""
    rows = {
        "4": ("Which is red?", ["the apple", "the sky"], 0, "image.png", "natural science", "test"),
        "7": ("Which month is first?", ["May", "June", "April"], 2, None, "language science", "test"),
        "12": ("What is shown?", ["Peru", "Chile", "Cuba", "Fiji"], 1, "image.png", "social science", "test"),
        "13": ("What is it?", ["a", "b"], 1, "image.png", "social science", "train"),
    }
    fields = ("question", "choices", "answer", "image", "subject", "split")
    problems = {pid: dict(zip(fields, row, strict=True), hint="", lecture="", solution="") for pid, row in rows.items()}
    write_json(root / "scienceqa/problems.json", problems)
    splits = {split: [pid for pid, row in rows.items() if row[-1] == split] for split in ("train", "test")}
    write_json(root / "scienceqa/pid_splits.json", splits)
    prompts = []
    for pid in splits["test"]:
        question, choices, _, image, *_ = rows[pid]
        text = "\n".join([question, *(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))])
        turns = [{"from": "human", "value": f"<image>\n{text}" if image else text}, {"from": "gpt", "value": "The answer is A."}]
        prompts.append({"id": pid, "conversations": turns, **({"image": f"{pid}/{image}"} if image else {})})
        if image:
            save_picture(root / f"scienceqa/images/test/{pid}/{image}", "blue")
    write_json(root / "scienceqa/llava_test_CQM-A.json", prompts)


def write_textvqa(root: Path) -> None:
    """Three questions, two of them about one image."""
    rows = [
        (34602, "003a8ae2ef43b901", "What is the brand of this camera?", ["dakota"] * 7 + ["dakota digital", "clos culombu", "nous"]),
        (34603, "003a8ae2ef43b901", "What does the small white text spell?", ["copenhagen"] * 10),
        (34604, "0054c91397f2fe05", "How many bottles?", ["2"] * 2 + ["two"] * 2 + ["3"] * 6),
    ]
    data = [
        {"question_id": i, "image_id": image, "question": question, "answers": answers, "set_name": "val"}
        for i, image, question, answers in rows
    ]
    write_json(root / "textvqa/TextVQA_0.5.1_val.json", {"dataset_name": "textvqa", "data": data})
    prompts = [
        {
            "image": f"{image}.jpg",
            "question_id": image,
            "text": f"{question}\nReference OCR token: DAKOTA, DIGITAL, 2\n{PHRASE}",
            "category": "default",
        }
        for _, image, question, _ in rows
    ]
    write_jsonl(root / "textvqa/llava_textvqa_val_v051_ocr.jsonl", prompts)
    for image in {image for _, image, _, _ in rows}:
        save_picture(root / f"textvqa/train_images/{image}.jpg", "green")


def write_mmlu(root: Path, questions: int = 1) -> None:
    """All 57 subjects: five shots, and `questions` test questions each, whose right letters are B, C, D, A, ..."""
    for subject in mmlu.CATEGORY_OF:
        for split, count in (("dev", 5), ("test", questions)):
            path = root / f"mmlu/{split}/{subject}_{split}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", encoding="utf-8", newline="") as f:
                for n in range(1, count + 1):
                    csv.writer(f).writerow([f"What is {n} plus {n}?", *range(n, n + 4), "ABCD"[n % 4]])


def write_bbh(root: Path, questions: int = 1) -> None:
    """All 27 files with the first few official questions, or with made-up ones if the official files are absent."""
    made_up = [{"input": f"Which is {n}?\nOptions:\n(A) {n}\n(B) none", "target": "(A)"} for n in range(questions)]
    for name in bbh.TASK.parts:
        source = bbh_source() / f"{name}.json"
        items = json.loads(source.read_text(encoding="utf-8"))["examples"][:questions] if source.exists() else made_up
        write_json(root / f"bbh/{name}.json", {"canary": "", "examples": items})


WRITERS = {
    "ocrvqa": write_ocrvqa, "docvqa": write_docvqa, "refcocog": write_refcocog, "tdiuc": write_tdiuc, "mmbench": write_mmbench,
    "gqa": write_gqa, "scienceqa": write_scienceqa, "textvqa": write_textvqa, "mmlu": write_mmlu, "bbh": write_bbh,
}  # fmt: skip


def write_all(root: Path) -> Path:
    """Write a data root with all ten tasks and return it."""
    for write in WRITERS.values():
        write(root)
    return root


def right_answer(name: str, example: Example) -> str:
    """An answer to the example that its task's scorer counts as fully right."""
    reference = example.reference
    if name in ("ocrvqa", "docvqa"):
        return reference[0]
    if name == "refcocog":
        return str([round(value, 6) for value in reference])
    if name == "scienceqa":
        return LETTERS[reference.answer]
    if name == "textvqa":
        return max(reference, key=reference.count)
    return reference.target if name == "bbh" else reference.answer
