"""Data files for `llava-region score` as the paper scores (appendix A), made from what is on disk already.

python score_data.py images FOLDER --out FILE                    the names of all images, to ask one prompt about each (Flickr30k)
python score_data.py task NAME --data-root DIR --out FILE        a benchmark's questions, without answers, for image attention
python score_data.py check TASKS --data-root DIR [--images FOLDER]   write nothing; fail if the tasks' files or the images are missing
"""

import argparse
import os
import sys
from pathlib import Path

from llava_region import tasks
from llava_region.errors import LlavaRegionError
from llava_region.files import write_json

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png"}


def image_names(folder: Path) -> list[str]:
    """Names of the images in a folder, sorted, so that a random draw with a seed is the same everywhere.

    Raises:
        LlavaRegionError: no such folder, or no image in it.
    """
    found = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES) if folder.is_dir() else []
    if not found:
        raise LlavaRegionError(f"{folder} holds no images; give the folder of Flickr30k's .jpg files")
    return found


def questions(task: str, data_root: Path) -> list[dict]:
    """A visual benchmark's questions as LLaVA-format records with an empty answer; images are relative to `data_root`.

    Raises:
        LlavaRegionError: unknown task, or its files are missing.
    """
    examples = tasks.load(task).examples(data_root)
    records = []
    for example in examples:
        turns = [{"from": "human", "value": f"<image>\n{example.prompt}"}, {"from": "gpt", "value": ""}]
        records.append({"id": str(example.question_id), "image": os.path.relpath(example.image, data_root), "conversations": turns})
    return records


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("images", "task", "check"))
    parser.add_argument("source", help="image folder, the task's name, or names separated by commas")
    parser.add_argument("--data-root", type=Path, help="folder with the benchmarks' official files, one folder per task")
    parser.add_argument("--images", type=Path, help="check that this folder has images")
    parser.add_argument("--out", type=Path, help="file to write")
    args = parser.parse_args()
    for kinds, option in ((("images", "task"), "out"), (("task", "check"), "data_root")):
        if args.kind in kinds and not getattr(args, option):
            parser.error(f"{args.kind} needs --{option.replace('_', '-')}")
    try:
        if args.kind == "check":
            tasks.check(tasks.parse_names(args.source), args.data_root)
            if args.images:
                image_names(args.images)
            return 0
        data = image_names(Path(args.source)) if args.kind == "images" else questions(args.source, args.data_root)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.out, data)
    except LlavaRegionError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
