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
