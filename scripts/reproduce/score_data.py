"""Data files for `llava-region score` and `perplexity` as the paper measures, made from what is on disk already.

python score_data.py images FOLDER --out FILE                    the names of all images, to ask one prompt about each (Flickr30k)
python score_data.py task NAME --data-root DIR --out FILE        a benchmark's questions, without answers, for image attention
python score_data.py answers NAME --data-root DIR --out FILE [--limit N]   its questions with the right answers, for perplexity (Figure 1)
python score_data.py text FILE... --out FILE [--limit N]         paragraphs of text files, for perplexity
python score_data.py check TASKS [--made-of TASKS] [--data-root DIR] [--images FOLDER] [--texts FILE...]   write nothing; fail if one of the
    others would fail with these: without DIR, if a name is unknown; with it, also if a file, images or texts are missing
"""

import argparse
import os
import random
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from llava_region import tasks
from llava_region.errors import LlavaRegionError
from llava_region.files import write_json
from llava_region.tasks.choices import LETTERS

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png"}
OPENING = 20  # words of a paragraph that stand as the question; the rest is what perplexity is measured on


def image_names(folder: Path) -> list[str]:
    """Names of the images in a folder, sorted, so that a random draw with a seed is the same everywhere.

    Raises:
        LlavaRegionError: no such folder, or no image in it.
    """
    found = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES) if folder.is_dir() else []
    if not found:
        raise LlavaRegionError(f"{folder} holds no images; give the folder of Flickr30k's .jpg files")
    return found


def questions(task: str, data_root: Path, answered: bool = False) -> list[dict]:
    """A benchmark's questions as LLaVA-format records; images are relative to `data_root`.

    Args:
        answered: with the right answers; else with empty ones.

    Raises:
        LlavaRegionError: unknown task, its files are missing, or its images are not files.
    """
    records = []
    for example in tasks.load(task).examples(data_root):
        if isinstance(example.image, bytes):
            raise LlavaRegionError(f"{task} keeps its images inside its own file, and training data names files; give another task")
        answer = answer_text(example.reference) if answered else ""
        picture = {"image": os.path.relpath(example.image, data_root)} if example.image else {}
        records.append({"id": str(example.question_id), **picture, **turns(("<image>\n" if picture else "") + example.prompt, answer)})
    return records


def turns(question: str, answer: str) -> dict:
    """One question and one answer in LLaVA's form."""
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


def answer_text(reference: Any) -> str:
    """The right answer as a model should write it: of several the most frequent, of a choice its letter, of a box its corners."""
    if isinstance(reference, list):
        return Counter(reference).most_common(1)[0][0]
    answer = next((getattr(reference, name) for name in ("target", "answer") if hasattr(reference, name)), reference)
    if isinstance(answer, tuple):
        return f"[{', '.join(f'{corner:.2f}' for corner in answer)}]"
    return LETTERS[answer] if isinstance(answer, int) else str(answer)


def paragraphs(files: list[Path]) -> list[dict]:
    """The paragraphs of text files (UTF-8, blank lines between them) as records: of each the first words are the question.

    Raises:
        LlavaRegionError: a file is missing or not in UTF-8, or no paragraph is long enough.
    """
    records = []
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise LlavaRegionError(f"cannot read {path} ({e}); give text files in UTF-8") from e
        for number, words in enumerate(part.split() for part in re.split(r"\n\s*\n", text)):
            if len(words) >= 2 * OPENING:
                records.append({"id": f"{path.name}/{number}", **turns(" ".join(words[:OPENING]), " ".join(words[OPENING:]))})
    if not records:
        raise LlavaRegionError(f"no paragraph of {', '.join(map(str, files))} has {2 * OPENING} words; give longer texts")
    return records


def some(records: list[dict], limit: int | None, seed: int = 0) -> list[dict]:
    """At most `limit` records, drawn at random, in their order."""
    if limit is None or limit >= len(records):
        return records
    return [records[i] for i in sorted(random.Random(seed).sample(range(len(records)), limit))]


def check(names: str, args: argparse.Namespace) -> None:
    """Fail where a later call with these names and files would.

    Raises:
        LlavaRegionError: an unknown name; with a data root, what is missing or of another form.
    """
    made_of = tasks.parse_names(args.made_of) if args.made_of else []
    asked = list(dict.fromkeys([*tasks.parse_names(names), *made_of]))
    if args.data_root:
        tasks.check(asked, args.data_root)
        for task in made_of:
            questions(task, args.data_root)
    if args.images:
        image_names(args.images)
    if args.texts:
        paragraphs(args.texts)


def _records(args: argparse.Namespace) -> list[dict]:
    if args.kind == "text":
        found = paragraphs([Path(name) for name in args.source])
    else:
        found = questions(args.source[0], args.data_root, answered=args.kind == "answers")
    return some(found, args.limit)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("images", "task", "answers", "text", "check"))
    parser.add_argument("source", nargs="+", help="image folder, the task's name, names separated by commas, or text files")
    parser.add_argument("--data-root", type=Path, help="folder with the benchmarks' official files, one folder per task")
    parser.add_argument("--images", type=Path, help="check: that this folder has images")
    parser.add_argument("--made-of", default="", help="check: benchmarks that data will be made of, names separated by commas")
    parser.add_argument("--texts", type=Path, nargs="+", help="check: text files that data will be made of")
    parser.add_argument("--limit", type=int, help="answers, text: draw at most so many records at random, always the same")
    parser.add_argument("--out", type=Path, help="file to write")
    args = parser.parse_args()
    for kinds, option in ((("images", "task", "answers", "text"), "out"), (("task", "answers"), "data_root")):
        if args.kind in kinds and not getattr(args, option):
            parser.error(f"{args.kind} needs --{option.replace('_', '-')}")
    if args.kind != "text" and len(args.source) > 1:
        parser.error(f"{args.kind} takes one source, not {len(args.source)}")
    if args.limit is not None and args.limit < 1:
        parser.error(f"--limit {args.limit}: at least 1")
    source = args.source[0]
    try:
        if args.kind == "check":
            check(source, args)
            return 0
        data: list = image_names(Path(source)) if args.kind == "images" else _records(args)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.out, data)
    except LlavaRegionError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
