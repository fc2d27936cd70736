"""What the paper's figures show, as plain numbers: the series of one family of models.

Only complete scores are shown, each series is sorted by its horizontal axis, and every function gives an empty list where the
runs have nothing to show.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llava_region import tasks
from llava_region.region import sparse_layers
from llava_region.report import paper_numbers as paper
from llava_region.report.runs import Run

Series = dict[str, Any]

TASKS_OVER_LAYERS = ("ocrvqa", "textvqa", "tdiuc", "gqa")  # the panels of Figure 2
TASKS_OVER_PRUNED = ("ocrvqa", "textvqa", "docvqa", "scienceqa")  # and of Figure 4


def one_of_each(runs: list[Run]) -> tuple[list[Run], list[str]]:
    """One run per number of layers tuned, data scale and number pruned, and the names of the runs left out.

    Of several, the one with evenly spread layers is taken, as in the paper's figures; else the first.
    """
    kept: dict[tuple, Run] = {}
    for run in runs:
        key = (run.num_tuned, run.data_scale, run.pruned)
        if key not in kept or (_is_sparse(run) and not _is_sparse(kept[key])):
            kept[key] = run
    return list(kept.values()), [run.name for run in runs if run not in kept.values()]


def _is_sparse(run: Run) -> bool:
    return run.is_full or run.layers == tuple(sparse_layers(run.num_tuned, run.num_layers or 0))


def _points(runs: list[Run], task: str, horizontal: Callable[[Run], int]) -> tuple[list[int], list[float]]:
    pairs = sorted((horizontal(run), run.scores[task]) for run in runs if task in run.scores)
    return [place for place, _ in pairs], [score for _, score in pairs]


def scores_over_layers(runs: list[Run]) -> list[Series]:
    """Figure 2: `{"task", "data_percent", "layers": [...], "scores": [...], "full": all-layers score or None, "paper": False}`."""
    runs = [run for run in runs if not run.pruned]
    out = []
    for task in TASKS_OVER_LAYERS:
        for scale in sorted({run.data_scale for run in runs}, reverse=True):
            same = [run for run in runs if run.data_scale == scale]
            layers, scores = _points(same, task, lambda run: run.num_tuned)
            full = next((run.scores[task] for run in same if run.is_full and task in run.scores), None)
            if layers:
                line = {"task": task, "data_percent": scale, "layers": layers, "scores": scores}
                out.append({**line, "full": full, "paper": False})
    return out


def paper_scores_over_layers(family: str) -> list[Series]:
    """Figure 2's line for all the data, of the paper's model that a family is of: Tables 2 and 3 give the numbers.

    As `scores_over_layers`, with `"paper": True` and `"of"`, the paper's name for the model and its table. Empty for a family that
    the paper does not have. The numbers of 25 and 10 % of the data are not in its text.
    """
    out = []
    for task, (pattern, name, table, rows) in itertools.product(TASKS_OVER_LAYERS, paper.OVER_LAYERS):
        if re.fullmatch(pattern, family, re.IGNORECASE):
            pairs = sorted((int(row.label.split()[0]), row.scores[tasks.VISUAL.index(task)]) for row in rows)
            line = {"task": task, "data_percent": 100.0, "layers": [n for n, _ in pairs], "scores": [score for _, score in pairs]}
            out.append({**line, "full": pairs[-1][1], "paper": True, "of": f"{name} (Table {table})"})
    return out


def hours_over_layers(runs: list[Run]) -> list[Series]:
    """Figure 3, of the runs on all the data: one `{"layers": [...], "gpu_hours": [...], "full": hours of all layers or None, "device"}`.

    A pruned folder is left out, as it would only repeat the cost of the model that was pruned.
    """
    known = [(run, hours) for run in runs if (hours := run.gpu_hours) and run.data_scale == 100 and not run.pruned]
    if not known:
        return []
    bars = sorted((run.num_tuned, hours) for run, hours in known)
    costs = [run.cost or {} for run, _ in known]
    devices = sorted({f"{cost.get('gpus', '?')} × {cost.get('device', 'unknown device')}" for cost in costs})
    full = next((hours for run, hours in known if run.is_full), None)
    return [{"layers": [n for n, _ in bars], "gpu_hours": [h for _, h in bars], "full": full, "device": ", ".join(devices)}]


def scores_over_pruned(runs: list[Run]) -> list[Series]:
    """Figure 4, of the runs on all the data: `{"task", "layers_tuned", "full": bool, "pruned": [...], "scores": [...]}`."""
    runs = [run for run in runs if run.data_scale == 100]
    out = []
    for task in TASKS_OVER_PRUNED:
        for count in sorted({run.num_tuned for run in runs}, reverse=True):
            same = [run for run in runs if run.num_tuned == count]
            pruned, scores = _points(same, task, lambda run: run.pruned)
            if any(pruned):
                out.append({"task": task, "layers_tuned": count, "full": same[0].is_full, "pruned": pruned, "scores": scores})
    return out


def perplexity_bars(contents: list[dict[str, Any]]) -> list[Series]:
    """Figure 1, left, of the perplexity files of one family: bars in groups by data file.

    The rise is that of the caption: of data with images over the model as trained, of text over the backbone.

    Returns:
        `{"data", "visual", "reverted": [layers], "backbone": bool, "perplexity": value or None, "rise": percent or None}`; the
        backbone's own bar goes before those of the model, and has no rise, nor has the model as trained on data with images.
    """
    trained = [row for content in contents if content.get("upstream") for row in content["rows"]]
    own = {Path(row["data"]).stem: row for content in contents if not content.get("upstream") for row in content["rows"]}
    as_trained = {row["data"]: row["perplexity"] for row in trained if not row["reverted"]}
    out = []
    for data in dict.fromkeys(row["data"] for row in trained):
        backbone = own.get(Path(data).stem)
        if backbone is not None:
            out.append({**_bar(backbone, None), "data": data, "backbone": True})
        for row in (row for row in trained if row["data"] == data):
            over = as_trained.get(data) if row["visual"] else backbone and backbone["perplexity"]
            out.append(_bar(row, None if row["visual"] and not row["reverted"] else over))
    return out


def _bar(row: dict[str, Any], over: float | None) -> Series:
    value = row["perplexity"]
    rise = 100 * (value / over - 1) if value and over else None
    return {**{key: row[key] for key in ("data", "visual", "reverted", "perplexity")}, "backbone": False, "rise": rise}


def scores_over_pruned_of_full(runs: list[Run]) -> list[Series]:
    """Figure 1, right: the series of Figure 4 of the model that was tuned in all layers, of every task of Figure 4."""
    return [line for line in scores_over_pruned(runs) if line["full"]]
