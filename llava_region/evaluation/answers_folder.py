"""Answers on disk while a benchmark runs: appended as they come, resumable after a kill, at the end in the questions' order.

OUT/settings.json     which model answers, and which questions it is asked: a resume must agree
OUT/TASK.jsonl        LLaVA's form: {"question_id", "prompt", "text", "model_id", "metadata"} per line
OUT/TASK.rankN.jsonl  what a process other than the first has answered so far; gone when the task is finished
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

from llava_region.errors import LlavaRegionError
from llava_region.files import read_json, write_json, write_text
from llava_region.run_files import SETTINGS_FILE
from llava_region.tasks import Example, Task
from llava_region.tasks.task import read_jsonl

UNREADABLE = "unreadable_image"  # key of a row's metadata: why its image could not be shown to the model


class Answers:
    """The answers of one task under an output folder, read and written by `rank` of several processes.

    Raises:
        LlavaRegionError: a line of a file is not JSON, other than a last one that a kill cut short.
    """

    def __init__(self, out: Path, task: Task, rank: int = 0) -> None:
        self.out, self.task = out, task
        self.merged = out / f"{task.name}.jsonl"
        self.own = self.merged if rank == 0 else out / f"{task.name}.rank{rank}.jsonl"

    def files(self) -> list[Path]:
        """All that hold answers."""
        return [file for file in (self.merged, *sorted(self.out.glob(f"{self.task.name}.rank*.jsonl"))) if file.is_file()]

    def drop_cut_lines(self) -> None:
        """Drop the last line of a file where a kill cut it short."""
        for file in self.files():
            whole = file.read_bytes().rpartition(b"\n")
            if whole[2]:
                os.truncate(file, len(whole[0]) + len(whole[1]))

    def rows(self) -> dict[Hashable, dict]:
        """The answers so far by the key of their question; one that saw its image replaces one that did not."""
        found: dict[Hashable, dict] = {}
        for file in self.files():
            for row in read_jsonl(file):
                key = self.task.key(row)
                if key not in found or not unreadable(row):
                    found[key] = row
        return found

    def append(self, rows: list[dict]) -> None:
        """Write rows to this process's file, through to the disk."""
        with self.own.open("a", encoding="utf-8") as f:
            f.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            f.flush()
            os.fsync(f.fileno())

    def merge(self, examples: list[Example]) -> dict[Hashable, dict]:
        """Join the files of all processes to one in the examples' order; returns its rows by key."""
        rows = self.rows()
        ordered = {key: rows[key] for key in map(self.task.key_of, examples) if key in rows}
        write_text(self.merged, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ordered.values()))
        for file in self.files()[1:]:
            file.unlink()
        return ordered


def unreadable(row: dict) -> bool:
    """Whether the question was not asked because its image could not be read; asked again by a resumed run."""
    return UNREADABLE in (row.get("metadata") or {})


def check_settings(out: Path, settings: Mapping[str, Any]) -> None:
    """Refuse to go on with answers of another model, or to other questions.

    Raises:
        LlavaRegionError: names what differs from what `settings.json` in `out` says.
    """
    if not (out / SETTINGS_FILE).is_file():
        answered = next(out.glob("*.jsonl"), None) if out.is_dir() else None
        if answered:
            raise LlavaRegionError(f"{answered} is there without a {SETTINGS_FILE}, so it is not known what answered; give another --out")
        return
    before = read_json(out / SETTINGS_FILE)
    differing = [name for name in ("weights", "template", "dtype") if before.get(name) != settings[name]]
    if differing:
        name = differing[0]
        was, now = ("", "") if name == "weights" else (f" ({before.get(name)})", f" ({settings[name]})")
        raise LlavaRegionError(f"the answers in {out} are of a model with other {name}{was} than this one{now}; give another --out")
    for name, digest in settings["tasks"].items():
        if before.get("tasks", {}).get(name, digest) != digest:
            raise LlavaRegionError(f"the answers to {name} in {out} are to other questions or prompts than these; give another --out")


def write_settings(out: Path, settings: Mapping[str, Any]) -> None:
    """Write `settings.json`, keeping the tasks that an earlier run recorded."""
    before = read_json(out / SETTINGS_FILE).get("tasks", {}) if (out / SETTINGS_FILE).is_file() else {}
    write_json(out / SETTINGS_FILE, {**settings, "tasks": {**before, **settings["tasks"]}})


def questions_digest(task: Task, examples: list[Example]) -> str:
    """A digest of all that the task asks of a model, images aside."""
    digest = hashlib.sha256(f"{task.name} {task.max_new_tokens}".encode())
    for example in examples:
        digest.update(json.dumps([str(task.key_of(example)), example.prompt]).encode())
    return digest.hexdigest()
