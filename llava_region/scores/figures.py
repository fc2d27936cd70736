"""Figures of a scores file: each metric's score by layer, and image attention by instance and layer (the paper's Figure 5)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llava_region import plotting
from llava_region.plotting import COLOURS, GREY

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Scores above zero whose highest is below so many times the lowest are points on an axis of their own: bars begin at zero, where
# such scores look all alike.
FLAT = 1.5


def draw(scores: dict[str, Any], folder: Path, top: dict[str, list[int]]) -> list[Path]:
    """Draw every metric and, if there are instances, the heat map; returns the PNG files, `METRIC.png` and `image_attention_instances.png`.

    Args:
        scores: the content of a scores file.
        folder: made if it does not exist.
        top: metric -> the layers to highlight.

    Raises:
        LlavaRegionError: the folder is not writable.
    """
    files = [_draw_ranking(name, metric["scores"], top[name], folder / f"{name}.png") for name, metric in scores["metrics"].items()]
    if scores.get("instances"):
        files += plotting.save(heat_map(scores), folder / "image_attention_instances.png")
    return files


def _draw_ranking(name: str, values: list[float], top: list[int], path: Path) -> Path:
    title = f"top {len(top)}: {', '.join(map(str, top))}"
    figure, (panel,) = plotting.new_figure(max(5, 0.25 * len(values) + 1.5), 3, [title])
    colours = [COLOURS[1] if layer in top else GREY for layer in range(len(values))]
    if 0 < max(values) < FLAT * min(values):
        panel.vlines(range(len(values)), min(values), values, color=colours, linewidth=1)
        panel.scatter(range(len(values)), values, color=colours, s=20)
    else:
        panel.bar(range(len(values)), values, color=colours)
    panel.set(xlabel="decoder layer", ylabel=name.replace("_", " "))
    panel.locator_params(axis="x", integer=True)
    plotting.save(figure, path)
    return path


def heat_map(scores: dict[str, Any]) -> Figure:
    """The heat map of a scores file that holds instances: instances down, decoder layers across.

    Each instance is scaled to its own largest layer, as they differ in length.
    """
    blocks = [dataset for dataset in scores["instances"] if dataset["scores"]]
    rows = np.concatenate([np.asarray(block["scores"]) for block in blocks])
    rows = rows / np.maximum(rows.max(axis=1, keepdims=True), np.finfo(float).tiny)
    height = min(12, max(3, 0.05 * len(rows) + 1.5))
    figure, (panel,) = plotting.new_figure(max(5, 0.2 * scores["num_layers"] + 2), height)
    image = panel.imshow(rows, aspect="auto", interpolation="nearest", cmap="viridis")
    bar = figure.colorbar(image)
    bar.set_label("share of the highest layer", size=plotting.LABEL)
    bar.ax.tick_params(labelsize=plotting.SMALL)
    ends = np.cumsum([len(block["scores"]) for block in blocks])
    for end in ends[:-1]:
        panel.axhline(end - 0.5, color="white", linewidth=1)
    middles = ends - np.asarray([len(block["scores"]) for block in blocks]) / 2 - 0.5
    panel.set_yticks(middles, [block["data"] for block in blocks])
    panel.set(xlabel="decoder layer", ylabel=f"{len(rows)} instances, by data file")
    return figure
