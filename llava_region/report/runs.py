"""Runs to report on: what `llava-region eval` wrote, joined with the region and the cost of the model that was evaluated.

A training run's own folder is read as a run without scores, which is enough for what is about cost (Figure 3).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_region import tasks
from llava_region.errors import LlavaRegionError
from llava_region.files import read_json
from llava_region.region import read_region_json
from llava_region.run_files import COST_FILE, REGION_FILE, RESULTS_FILE

# What is read of `results.json`, of each of its tasks, of a region and of `cost.json`: int is a count, float any number from 0.
RESULT_TYPES = {"model": str, "base": str, "upstream": str, "region": dict, "num_layers": int}
COUNT_TYPES = {"n": int, "missing": int, "unreadable_images": int, "cut_prompts": int, "limit": int}
REGION_TYPES = {"base_model": str, "pruned": dict, "reverted": dict, "scores": dict}
COST_TYPES = {"gpu_hours": float, "samples": float}
NAMES = {str: "text", dict: "an object", list: "a list", int: "a count", float: "a number from 0"}
BEYOND = 1e18  # no count of layers, answers, samples or hours


@dataclass
class Run:
    """One evaluated model.

    Attributes:
        name: the evaluation folder's name, preceded by as much of its path as is needed to tell the runs apart.
        folder: the evaluation folder.
        model: the model's folder, as `eval` recorded it.
        family: the backbone it was trained from (for a backbone, its own name): runs of one family are compared with each other.
        scores: task -> percent, for the tasks of which every question was asked and answered.
        partial: task -> (percent, what is missing), for the others; never averaged, never marked as best.
        flaws: task -> what may have lowered a complete score: unreadable images, cut prompts.
        layers: decoder layers tuned, in the numbers of the model before any pruning; None for a plain language model.
        num_layers: decoder layers before any pruning, None if not known.
        metric: the importance metric that the layers were chosen by, or None.
        pruned, reverted: how many decoder layers were removed, and how many were put back to the backbone's weights.
        cost: content of `cost.json`, or None.
        data_scale: part of the family's data that it was trained on, in percent.
    """

    name: str
    folder: Path
    model: str
    family: str
    scores: dict[str, float] = field(default_factory=dict)
    partial: dict[str, tuple[float | None, str]] = field(default_factory=dict)
    flaws: dict[str, str] = field(default_factory=dict)
    layers: tuple[int, ...] | None = None
    num_layers: int | None = None
    metric: str | None = None
    pruned: int = 0
    reverted: int = 0
    cost: dict[str, Any] | None = None
    data_scale: float = 100.0

    @property
    def num_tuned(self) -> int:
        """How many decoder layers were tuned; 0 for a plain language model."""
        return len(self.layers or ())

    @property
    def gpu_hours(self) -> float | None:
        """GPU hours of training, None if not known."""
        hours = (self.cost or {}).get("gpu_hours")
        return float(hours) if hours else None

    @property
    def is_full(self) -> bool:
        """Whether all decoder layers were tuned."""
        return self.layers is not None and self.num_layers is not None and len(self.layers) == self.num_layers


def read_runs(folders: list[Path], costs: dict[str, str] | None = None, scales: dict[str, str] | None = None) -> list[Run]:
    """Read evaluation folders.

    Args:
        folders: each the `--out` of `llava-region eval`, or a training run's own folder, which has no scores.
        costs: run name -> its `cost.json`, where that is not in the model's folder.
        scales: run name -> percent of the data, where it should not be computed from the samples in `cost.json`.

    Raises:
        LlavaRegionError: a folder is given twice or is neither of these, a file is malformed, or a name in `costs` or `scales`
            is not a run's.
    """
    names = _names(folders)
    for option, given in (("--cost", costs or {}), ("--data-scale", scales or {})):
        unknown = [name for name in given if name not in names]
        if unknown:
            raise LlavaRegionError(f"{option} names '{unknown[0]}', which is not a run; allowed: {', '.join(names)}")
    runs = [_read_run(name, folder, (costs or {}).get(name)) for name, folder in zip(names, folders, strict=True)]
    _join_families(runs)
    _set_data_scales(runs, scales or {})
    return runs


def _names(folders: list[Path]) -> list[str]:
    """The last part of each path, or as many parts as are needed to tell them all apart."""
    resolved = [folder.resolve() for folder in folders]
    twice = [str(f) for f, r in zip(folders, resolved, strict=True) if resolved.count(r) > 1]
    if twice:
        raise LlavaRegionError(f"{twice[0]} is given twice; give each run once")
    for depth in range(1, max((len(r.parts) for r in resolved), default=0) + 1):
        names = ["/".join(r.parts[-depth:]) for r in resolved]
        if len(set(names)) == len(names):
            return names
    return [str(r) for r in resolved]


def _read_run(name: str, folder: Path, cost: str | None) -> Run:
    data, path = _read_results(folder)
    model = str(data.get("model") or folder)
    check_types(path, data, RESULT_TYPES)
    region, upstream = data.get("region"), data.get("upstream")
    check_types(path, region or {}, REGION_TYPES)
    origin = (region or {}).get("base_model") or data.get("base") or (None if upstream else model)
    run = Run(name, folder, model, family=model_name(origin))
    for task, result in data["tasks"].items():
        _add_score(run, path, task, result)
    if region:
        _add_region(run, path, region)
    elif upstream and isinstance(count := data.get("num_layers"), int):  # without a region it was trained as upstream does: all layers
        run.num_layers, run.layers = count, tuple(range(count))
    run.cost = _read_cost(folder, model, cost)
    return run


def _read_results(folder: Path) -> tuple[dict[str, Any], Path]:
    """What `results.json` of an evaluation says, or the same keys for a training run's folder; and the file it came from."""
    path, region = folder / RESULTS_FILE, folder / REGION_FILE
    if not path.is_file() and region.is_file() and (folder / COST_FILE).is_file():
        return {"model": str(folder), "upstream": None, "region": read_region_json(folder), "tasks": {}}, region
    if not path.is_file():
        raise LlavaRegionError(
            f"{folder} holds no {RESULTS_FILE}; give the --out folder of 'llava-region eval', or a finished training run"
        )
    data = read_json(path)
    if not isinstance(data, dict) or not isinstance(data.get("tasks"), dict):
        raise LlavaRegionError(f"{path} has no 'tasks'; write it again with 'llava-region eval'")
    return data, path


def _add_score(run: Run, path: Path, task: str, result: Any) -> None:
    """Put a task's score into `scores` if it is over all questions, else into `partial`."""
    if task not in tasks.NAMES:
        raise LlavaRegionError(f"{path} has an unknown task '{task}'; allowed: {', '.join(tasks.NAMES)}")
    result = result if isinstance(result, dict) else {}
    check_types(path, result, COUNT_TYPES)
    score = result.get("score")
    if isinstance(score, bool) or not isinstance(score, (int, float)) or not 0 <= score <= 100:
        raise LlavaRegionError(f"the score of {task} in {path} is {score!r}; allowed: 0 to 100 percent")
    asked, missing = result.get("n") or 0, result.get("missing") or 0
    if result.get("limit") or not asked:
        run.partial[task] = (score, f"limited to the first {asked:,}")
    elif missing:
        run.partial[task] = (score, f"{missing:,} answers missing")
    else:
        run.scores[task] = float(score)
        flaws = ((result.get("unreadable_images"), "unreadable images"), (result.get("cut_prompts"), "prompts cut"))
        if text := " and ".join(f"{count:,} {what}" for count, what in flaws if count):
            run.flaws[task] = text


def _add_region(run: Run, path: Path, region: dict[str, Any]) -> None:
    """Set the layers tuned, in the numbers of the model before pruning, and how many were pruned or reverted."""
    pruned = region.get("pruned") or {}
    layers, count = pruned.get("original_layers", region.get("layers")), pruned.get("original_num_layers", region.get("num_layers"))
    dropped, reverted = pruned.get("dropped", []), (region.get("reverted") or {}).get("layers", [])
    if not isinstance(layers, list) or not all(type(number) is int for number in (count, *layers)):
        raise LlavaRegionError(f"the region in {path} names no 'layers' or 'num_layers'; write it again with 'llava-region eval'")
    if not isinstance(dropped, list) or not isinstance(reverted, list):
        raise LlavaRegionError(f"the pruned or reverted layers in {path} are not a list; write it again with 'llava-region eval'")
    run.layers, run.num_layers, run.pruned = tuple(layers), count, len(dropped)
    run.reverted = len(reverted)
    run.metric = (region.get("scores") or {}).get("metric")


def model_name(path: str | None) -> str:
    """Last part of a model's folder or hub id; for a folder in the hub's cache, the model's name and not the snapshot's hash."""
    parts = Path(path).parts if path else ()
    cached = next((part for part in parts if part.startswith("models--")), None)
    return cached.split("--")[-1] if cached else parts[-1] if parts else ""


def _read_cost(folder: Path, model: str, given: str | None) -> dict[str, Any] | None:
    """`cost.json` as given, else of the model's folder (for a `checkpoint-N`, also the run's), else of the evaluation's parent."""
    if given is not None:
        path = Path(given) / COST_FILE if Path(given).is_dir() else Path(given)
        cost_given = _cost(path)
        if cost_given.get("gpu_hours") is None:
            raise LlavaRegionError(f"{path} holds no 'gpu_hours'; give the {COST_FILE} that a training wrote")
        return cost_given
    places = [Path(model), Path(model).parent if Path(model).name.startswith("checkpoint-") else None, folder.resolve().parent]
    for place in places:
        # the folder above the evaluation may hold the cost of another model: it must be the folder of a run
        if place is not None and (place / COST_FILE).is_file() and (place / REGION_FILE).is_file():
            return _cost(place / COST_FILE)
    return None


def _cost(path: Path) -> dict[str, Any]:
    cost = read_json(path)
    check_types(path, cost, COST_TYPES)
    return cost


def check_types(path: Path, data: Any, wanted: Mapping[str, type]) -> None:
    """Refuse a value of another kind than was written; one that is missing or null is not looked at.

    Raises:
        LlavaRegionError: names the first.
    """
    if not isinstance(data, dict):
        raise LlavaRegionError(f"{path} holds {data!r:.40} in place of an object; write it again")
    for key, kind in wanted.items():
        value = data.get(key)
        right = isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)
        if value is not None and (not right or (kind in (int, float) and not 0 <= value < BEYOND)):
            raise LlavaRegionError(f"'{key}' in {path} is {value!r:.40}; allowed: {NAMES[kind]}")


def _join_families(runs: list[Run]) -> None:
    """Put a model of unknown origin, such as a released one, into the only family with as many layers, if there is just one."""
    for run in [run for run in runs if not run.family]:
        fitting = {other.family for other in runs if other.family and run.num_layers in (None, other.num_layers)}
        run.family = fitting.pop() if len(fitting) == 1 else model_name(run.model)


def _set_data_scales(runs: list[Run], scales: dict[str, str]) -> None:
    """Percent of the data: as given, else a run's samples divided by the most samples of any run of its family."""
    most: dict[str, float] = {}
    for run in runs:
        samples = (run.cost or {}).get("samples") or 0
        most[run.family] = max(most.get(run.family, 0), samples)
    for run in runs:
        samples = (run.cost or {}).get("samples")
        if run.name in scales:
            run.data_scale = _percent(scales[run.name], run.name)
        elif samples and most[run.family]:
            run.data_scale = max(1.0, float(round(100 * samples / most[run.family])))


def _percent(text: str, name: str) -> float:
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        value = math.nan
    if not 0 < value <= 100:
        raise LlavaRegionError(f"the data scale '{text}' of {name} is out of range; allowed: above 0 to 100 percent")
    return value
