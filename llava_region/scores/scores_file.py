"""`scores.json`: what `llava-region score` writes, and how its metrics agree.

    {"num_layers": L, "model": {"folder", "fingerprint", "merged_from": of a merged model}, "base": likewise or null,
     "data": [{"file", "sha256", "records", "used"}], "samples": N,
     "metrics": {NAME: {"scores": [L numbers], "options": {...}, "samples": n or null for weights}},
     "correlation": {NAME: {NAME: Spearman's rho or null}},
     "instances": [{"data", "records": [numbers], "scores": [[L numbers] per record]}]}

A fingerprint tells a model by its config and samples of its weights, wherever it lies.
`llava_region.region` reads it: `--tune_layers scores.json:NAME:8[:spread]`.
"""

from __future__ import annotations

import numpy as np


def correlation(metrics: dict[str, dict]) -> dict[str, dict[str, float | None]]:
    """Spearman's rank correlation between every two metrics' scores; None where a metric gives all layers the same."""
    ranks = {name: _ranks(metric["scores"]) for name, metric in metrics.items()}
    return {a: {b: _pearson(ranks[a], ranks[b]) for b in ranks} for a in ranks}


def _ranks(scores: list[float]) -> np.ndarray:
    """Ranks from 0, ties sharing their mean."""
    values = np.asarray(scores, dtype=np.float64)
    ordered = np.sort(values)
    return (np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right") - 1) / 2


def _pearson(x: np.ndarray, y: np.ndarray) -> float | None:
    x, y = x - x.mean(), y - y.mean()
    size = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / size) if size else None
