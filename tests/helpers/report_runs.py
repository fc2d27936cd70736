"""Evaluation folders in the form that `llava-region eval` writes; the paper's tables serve as known results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llava_region import tasks
from llava_region.region import Region
from llava_region.report import paper_numbers as paper
from llava_region.report.formats import Table
from llava_region.report.runs import read_runs
from llava_region.report.tables import TABLES, build_table, find_baselines
from llava_region.run_files import COST_FILE, REGION_FILE, RESULTS_FILE

LLAMA, VICUNA, VICUNA_13B = "meta-llama/Meta-Llama-3-8B-Instruct", "lmsys/vicuna-7b-v1.5", "lmsys/vicuna-13b-v1.5"
SPECS = ("sparse:8", "lower:8", "lower-middle:8", "upper-middle:8", "top:8", "hybrid:8")
WHOLE = dict(zip(tasks.VISUAL, paper.TABLE_2[0].scores, strict=True))


def region_of(spec: str, num_layers: int = 32, base: str = LLAMA, **more: Any) -> dict[str, Any]:
    """A region as `region.json` holds it."""
    return {**Region.parse(spec, num_layers).to_dict(), "base_model": base, "upstream": "llava", **more}


def evaluated(
    root: Path,
    name: str,
    scores: dict[str, float],
    region: dict[str, Any] | None = None,
    *,
    cost: dict[str, Any] | None = None,
    upstream: str | None = "llava",
    results: dict[str, Any] | None = None,
    **record: Any,
) -> Path:
    """An evaluation folder `root/name`, and the model's folder in `root/models` with its region and cost.

    Args:
        scores: task -> percent, of complete tasks.
        results: task -> its entry as written, for others.
        record: what else the results file says.
    """
    model = root / "models" / name
    model.mkdir(parents=True)
    if region:
        (model / REGION_FILE).write_text(json.dumps(region))
    if cost:
        (model / COST_FILE).write_text(json.dumps(cost))
    whole = {"metric": "accuracy", "n": 100, "missing": 0, "unreadable_images": 0}
    entries = {task: {**whole, "score": score} for task, score in scores.items()}
    data = {"model": str(model), "base": None, "upstream": upstream, "num_layers": 32, "region": region}
    (root / name).mkdir()
    (root / name / RESULTS_FILE).write_text(json.dumps({**data, "tasks": {**entries, **(results or {})}, **record}))
    return root / name


def printed(root: Path, rows: list[paper.Row], num_layers: int, base: str, prefix: str) -> list[Path]:
    """Evaluation folders with the scores of rows of the paper's Table 2 or 3."""
    out = []
    for row in rows:
        count = int(row.label.split()[0])
        spec = "all" if count == num_layers else f"sparse:{count}"
        scores = dict(zip(tasks.VISUAL, row.scores, strict=True))
        out.append(evaluated(root, f"{prefix}-{count}", scores, region_of(spec, num_layers, base)))
    return out


def table_of(number: int, folders: list[Path], *baselines: str, with_paper: bool = False, **options: Any) -> Table:
    """A table of these runs; `options` are those of `read_runs`."""
    runs = read_runs(folders, **options)
    return build_table(TABLES[number], runs, find_baselines(runs, list(baselines)), with_paper)


def without(task: str) -> dict[str, float]:
    """The scores of `WHOLE` but one."""
    return {name: score for name, score in WHOLE.items() if name != task}


def cost(samples: int, hours: float = 4.0, **more: Any) -> dict[str, Any]:
    """What `cost.json` says of a run on 8 GPUs that took so many GPU hours."""
    return {"gpus": 8, "hours": hours / 8, "gpu_hours": hours, "samples": samples, "device": "NVIDIA A800", **more}
