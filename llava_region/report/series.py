"""What the paper's Figures 2 to 4 show, as plain numbers: the series of one family of models.

Only complete scores are shown, each series is sorted by its horizontal axis, and every function gives an empty list where the
runs have nothing to show.
"""

from __future__ import annotations

from collections.abc import Callable
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


def paper_scores_over_layers() -> list[Series]:
    """Figure 2's line for all the data, whose numbers Table 2 gives; those of 25 and 10 % are not in the paper's text."""
    out = []
    for task in TASKS_OVER_LAYERS:
        pairs = sorted((int(row.label.split()[0]), row.scores[tasks.VISUAL.index(task)]) for row in paper.TABLE_2)
        line = {"task": task, "data_percent": 100.0, "layers": [n for n, _ in pairs], "scores": [score for _, score in pairs]}
        out.append({**line, "full": pairs[-1][1], "paper": True})
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
