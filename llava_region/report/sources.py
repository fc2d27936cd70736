"""What figures are made of besides runs: what `llava-region perplexity` (Figure 1) and `llava-region score` (Figure 5) wrote."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_region.errors import LlavaRegionError
from llava_region.files import read_json
from llava_region.report.runs import BEYOND, Run, check_types, model_name

Content = dict[str, Any]
PERPLEXITY_TYPES = {"model": str, "upstream": str, "base": str, "rows": list}
SCORES_TYPES = {"num_layers": int, "model": dict, "instances": list}


@dataclass(frozen=True)
class Sources:
    """What a report is made of.

    Attributes:
        runs: evaluated, or trained.
        perplexities: contents of files of `llava-region perplexity`, each with its `"family"`, the backbone's name.
        scores: contents of scores files that hold instances, each with its `"family"`, here the model's own name.
    """

    runs: list[Run]
    perplexities: list[Content] = field(default_factory=list)
    scores: list[Content] = field(default_factory=list)


def read_perplexities(files: list[Path]) -> list[Content]:
    """Read what `llava-region perplexity --out` wrote, of models and of backbones.

    Raises:
        LlavaRegionError: a file is malformed, or of a version that did not note whether its data have images.
    """
    found = _read(files, PERPLEXITY_TYPES, _check_rows)
    return [{**one, "family": model_name(one.get("base") or one.get("model"))} for one in found]


def read_scores(files: list[Path]) -> list[Content]:
    """Read scores files with image attention by instance.

    Raises:
        LlavaRegionError: a file is malformed, or holds no instances.
    """
    found = _read(files, SCORES_TYPES, _check_instances)
    return [{**one, "family": model_name((one.get("model") or {}).get("folder"))} for one in found]


def _read(files: list[Path], types: dict[str, type], check: Callable[[Path, Content], None]) -> Iterator[Content]:
    for path in files:
        content = read_json(path)
        check_types(path, content, types)
        check(path, content)
        yield content


def _check_rows(path: Path, content: Content) -> None:
    for row in content.get("rows") or [None]:
        if not isinstance(row, dict) or not _is_row(**{key: row.get(key) for key in ("data", "visual", "reverted", "perplexity")}):
            raise LlavaRegionError(
                f"{path} is not what 'llava-region perplexity --out' of this version writes ({row!r:.60}); make it again"
            )


def _is_row(data: Any, visual: Any, reverted: Any, perplexity: Any) -> bool:
    return (
        isinstance(data, str)
        and isinstance(visual, bool)
        and isinstance(reverted, list)
        and all(type(layer) is int for layer in reverted)
        and (perplexity is None or (type(perplexity) in (int, float) and perplexity >= 1))  # infinite is written as None
    )


def _check_instances(path: Path, content: Content) -> None:
    count, blocks = content.get("num_layers"), content.get("instances")
    if not blocks or not count:
        raise LlavaRegionError(f"{path} holds no image attention by instance; score image_attention, with --instances above 0")
    for block in blocks:
        rows = block.get("scores") if isinstance(block, dict) and isinstance(block.get("data"), str) else None
        if not isinstance(rows, list) or not all(
            isinstance(row, list) and len(row) == count and all(type(x) in (int, float) and 0 <= x < BEYOND for x in row) for row in rows
        ):
            raise LlavaRegionError(f"{path} holds {block!r:.60} among its instances; score again")
