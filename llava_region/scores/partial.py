"""What a pass over the data has found so far, on disk next to the output, so that an interrupted one can go on.

One file per process, `OUT.partial` and `OUT.partial.1`, ...; each holds the sums over the batches that this process did.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llava_region import files as atomic
from llava_region.errors import LlavaRegionError
from llava_region.files import read_json
from llava_region.scores.sums import Sums


@dataclass
class Progress:
    """What one process, or all of them, found in the batches done.

    Attributes:
        identity: the model, data and options it was found with.
        sums: over the samples of these batches.
        done: the batches' numbers.
        attention: image attention of single samples for the heat map, (L,) each, by data set and record number.
    """

    identity: dict
    sums: Sums
    done: list[int] = field(default_factory=list)
    attention: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def merge(self, other: Progress) -> None:
        """Add what another process found."""
        self.sums.table += other.sums.table
        self.done = sorted(self.done + other.done)
        for dataset, rows in other.attention.items():
            self.attention.setdefault(dataset, {}).update(rows)

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        found = {"done": self.done, "table": self.sums.table.tolist(), "attention": self.attention}
        atomic.write_json(path, {"identity": self.identity, **found})


def partial_file(out: Path, rank: int = 0) -> Path:
    """Where a process keeps its progress."""
    return out.with_name(f"{out.name}.partial" + (f".{rank}" if rank else ""))


def partial_files(out: Path) -> list[Path]:
    """All that an interrupted run left, of however many processes; the first process's first."""
    own = re.compile(re.escape(partial_file(out).name) + r"(\.\d+)?")
    return sorted(path for path in out.parent.glob("*.partial*") if own.fullmatch(path.name))


def resume(out: Path, identity: dict, num_layers: int) -> Progress:
    """What an interrupted run found, its files merged; nothing found if there are none.

    Raises:
        LlavaRegionError: a file is damaged, or of another model, other data or options.
    """
    progress = Progress(identity, Sums(num_layers))
    for path in partial_files(out):
        part = _load(path, identity, num_layers)
        # a run killed while it put its files together leaves both the parts and their sum
        if not set(part.done) <= set(progress.done):
            progress.merge(part)
    return progress


def _load(path: Path, identity: dict, num_layers: int) -> Progress:
    data = read_json(path)
    try:
        found, done, attention = data["identity"], data["done"], data["attention"]
        sums = Sums(num_layers)
        other = next((key for key in identity if _wherever(found.get(key)) != _wherever(json.loads(json.dumps(identity[key])))), None)
        if other:
            older = ", or by a version that told models apart by the times of their files" if other in ("model", "base") else ""
            raise LlavaRegionError(f"{path} was made with another {other}{older}; give the same as then, or start again with --force")
        table = torch.tensor(data["table"], dtype=torch.float64)
        if table.shape != sums.table.shape:
            raise LlavaRegionError(f"{path} is damaged: its table is {list(table.shape)}; start again with --force")
        sums.table = table
    except (KeyError, TypeError, RuntimeError, AttributeError) as e:
        raise LlavaRegionError(f"{path} is damaged ({e}); start again with --force") from e
    return Progress(found, sums, done, attention)


def _wherever(part: Any) -> Any:
    """A part of an identity, where a model's folder is left out: a copy of the model is the same model."""
    return {key: value for key, value in part.items() if key != "folder"} if isinstance(part, dict) else part
