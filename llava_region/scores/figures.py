"""Figures of a scores file: each metric's score by layer, and image attention by instance and layer (the paper's Figure 5)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

TOP, OTHER = "#c44e52", "#8c8c8c"


def draw(scores: dict, folder: Path, top: dict[str, list[int]]) -> list[Path]:
    """Draw every metric and, if there are instances, the heat map; returns the PNG files, `METRIC.png` and `image_attention_instances.png`.

    Args:
        scores: the content of a scores file.
        folder: made if it is not there.
        top: the layers to set off, a metric.
    """
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    files = [_draw_ranking(name, metric["scores"], top[name], folder / f"{name}.png") for name, metric in scores["metrics"].items()]
    if scores.get("instances"):
        files.append(_draw_instances(scores, folder / "image_attention_instances.png"))
    return files


def _draw_ranking(name: str, values: list[float], top: list[int], path: Path) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(5, 0.25 * len(values) + 1.5), 3), layout="constrained")
    axes = figure.add_subplot()
    axes.bar(range(len(values)), values, color=[TOP if layer in top else OTHER for layer in range(len(values))])
    axes.set(xlabel="decoder layer", ylabel=name.replace("_", " "), title=f"top {len(top)}: {', '.join(map(str, top))}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, dpi=150)
    return path


def _draw_instances(scores: dict, path: Path) -> Path:
    """Instances down, decoder layers across; each instance scaled to its own largest layer, as they differ in length."""
    from matplotlib.figure import Figure

    blocks = [dataset for dataset in scores["instances"] if dataset["scores"]]
    rows = np.concatenate([np.asarray(block["scores"]) for block in blocks])
    rows = rows / np.maximum(rows.max(axis=1, keepdims=True), np.finfo(float).tiny)
    figure = Figure(figsize=(max(5, 0.2 * scores["num_layers"] + 2), min(12, max(3, 0.05 * len(rows) + 1.5))), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(rows, aspect="auto", interpolation="nearest", cmap="viridis")
    figure.colorbar(image, label="share of the highest layer")
    ends = np.cumsum([len(block["scores"]) for block in blocks])
    for end in ends[:-1]:
        axes.axhline(end - 0.5, color="white", linewidth=1)
    middles = ends - np.asarray([len(block["scores"]) for block in blocks]) / 2 - 0.5
    axes.set_yticks(middles, [block["data"] for block in blocks])
    axes.set(xlabel="decoder layer")
    figure.savefig(path, dpi=150)
    return path
