"""How the layers of a run were chosen, in the words and the order of Table 1."""

from __future__ import annotations

from typing import NamedTuple

from llava_region.errors import LlavaRegionError
from llava_region.region import Region
from llava_region.report import paper_numbers as paper
from llava_region.report.runs import Run

# Strategies of `--tune_layers` in Table 1's order, and the metrics of `llava-region score`.
STRATEGIES = {
    "sparse": "Sparse & Uniform",
    "lower": "Consecutive Lower",
    "lower-middle": "Consecutive Lower-middle",
    "upper-middle": "Consecutive Upper-middle",
    "top": "Consecutive Top",
    "hybrid": "Hybrid Top-Lower",
}
METRICS = {
    "image_attention": "Image Attention Score",
    "parameter_change": "Parameter Change Ratio",
    "block_influence": "Block Influence Score",
    "multimodal_block_influence": "Multimodal BI Score",
    "angular_distance": "Angular Distance",
    "angular_distance_weights": "Angular Distance (weights)",
}
ALL_LAYERS, OTHER = "", "Other selections"  # sections, as well as the paper's two
SECTIONS = (ALL_LAYERS, paper.HEURISTIC, paper.IMPORTANCE, OTHER)
LABELS = (*STRATEGIES.values(), *METRICS.values())


class Selection(NamedTuple):
    """A section of Table 1 and a row's label in it."""

    section: str
    label: str


def selection_of(run: Run) -> Selection:
    """Named after the metric that the layers were chosen by, else after the strategy that gives these layers."""
    if run.layers is None:
        return Selection(OTHER, run.name)
    if run.is_full:
        return Selection(ALL_LAYERS, "All layers")
    if run.metric is not None:
        return Selection(paper.IMPORTANCE, METRICS.get(run.metric, run.metric.replace("_", " ")))
    for name, label in STRATEGIES.items():
        if run.layers == _layers_by(name, run):
            return Selection(paper.HEURISTIC, label)
    for label, layers in paper.IMPORTANCE_SETS.items():
        if run.num_layers == 32 and run.layers == layers:
            return Selection(paper.IMPORTANCE, f"{label} (the paper's layers)")
    return Selection(OTHER, f"layers {','.join(map(str, run.layers))}")


def place_of(selection: Selection) -> tuple[int, int]:
    """Sort key: Table 1's order, with labels that it does not have last in their section."""
    section, label = selection
    return SECTIONS.index(section), LABELS.index(label) if label in LABELS else len(LABELS)


def _layers_by(strategy: str, run: Run) -> tuple[int, ...] | None:
    """As many layers as the run tuned, chosen by a strategy; None where so many do not fit from where it starts."""
    try:
        return Region.parse(f"{strategy}:{run.num_tuned}", run.num_layers or 0).layers
    except LlavaRegionError:
        return None
