"""The figures of a scores file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex

from llava_region.plotting import COLOURS
from llava_region.scores.figures import draw
from tests.helpers.pictures import png_size, saved_figures

SCORES = {
    "num_layers": 4,
    "metrics": {"block_influence": {"scores": [0.1, 0.4, 0.2, 0.3]}, "image_attention": {"scores": [4.0, 3.0, 2.0, 1.0]}},
    "instances": [
        {"data": "docvqa.json", "scores": [[1.0, 2.0, 4.0, 0.0], [5.0, 0.0, 0.0, 0.0]]},
        {"data": "empty.json", "scores": []},
        {"data": "ocrvqa.json", "scores": [[0.0, 0.0, 0.0, 0.0]]},
    ],
}


def test_a_ranking_highlights_the_top_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = saved_figures(monkeypatch)
    files = draw(SCORES, tmp_path / "new", {"block_influence": [1, 3], "image_attention": [0]})
    assert [file.name for file in files] == ["block_influence.png", "image_attention.png", "image_attention_instances.png"]
    assert all(min(png_size(file)) > 400 for file in files)
    (panel,) = seen[0].axes
    assert (panel.get_title(), panel.get_xlabel(), panel.get_ylabel()) == ("top 2: 1, 3", "decoder layer", "block influence")
    assert [bar.get_height() for bar in panel.patches] == [0.1, 0.4, 0.2, 0.3]
    assert [to_hex(bar.get_facecolor()).upper() == COLOURS[1] for bar in panel.patches] == [False, True, False, True]


def test_the_heat_map_scales_each_instance_by_its_highest_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = saved_figures(monkeypatch)
    draw({**SCORES, "metrics": {}}, tmp_path, {})
    panel, bar = seen[0].axes
    assert np.array_equal(panel.images[0].get_array(), [[0.25, 0.5, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    assert [label.get_text() for label in panel.get_yticklabels()] == ["docvqa.json", "ocrvqa.json"]
    assert list(panel.get_yticks()) == [0.5, 2] and bar.get_ylabel() == "share of the highest layer"


def test_without_instances_there_is_no_heat_map(tmp_path: Path) -> None:
    assert draw({**SCORES, "metrics": {}, "instances": []}, tmp_path, {}) == []


def test_scores_that_differ_little_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bars begin at zero: of image attention, the same within some percent in all layers, nothing was seen."""
    seen = saved_figures(monkeypatch)
    values = {
        "flat": [100.0, 101.0, 103.0, 102.0],
        "steep": [1.0, 2.0, 3.0, 4.0],
        "zero": [0.0, 1.0, 1.1, 1.2],
        "below": [-1.0, 1.0, 1.2, 1.1],
    }
    metrics = {name: {"scores": scores} for name, scores in values.items()}
    draw({"num_layers": 4, "metrics": metrics}, tmp_path, {name: [2] for name in metrics})
    (flat,), *bars = [figure.axes for figure in seen]
    low, high = flat.get_ylim()
    assert 95 < low < 100 and 103 < high < 108 and not flat.patches
    points = flat.collections[-1]
    assert points.get_offsets().tolist() == [[layer, score] for layer, score in enumerate(values["flat"])]
    assert [to_hex(colour).upper() == COLOURS[1] for colour in points.get_facecolors()] == [False, False, True, False]
    for (panel,), scores in zip(bars, list(values.values())[1:], strict=True):
        assert [bar.get_height() for bar in panel.patches] == scores and panel.get_ylim()[0] <= 0


def test_the_heat_map_says_what_its_rows_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = saved_figures(monkeypatch)
    draw({**SCORES, "metrics": {}}, tmp_path, {})
    assert seen[0].axes[0].get_ylabel() == "3 instances, by data file"
