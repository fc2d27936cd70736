"""Figure 1 (left): the bars and what is written on them."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava_region.errors import LlavaRegionError
from llava_region.evaluation.perplexity_plot import Row, check_plot, draw
from tests.helpers.pictures import readable_svg, saved_figures


@pytest.fixture
def rows() -> list[Row]:
    """Two data files, each as trained and with two sets of layers reverted, one of which makes the perplexity infinite."""
    sets = (([], 2.5), ([0, 1, 2, 3], None), ([28, 29, 31], 2.625))
    return [{"data": f"in/{name}.json", "reverted": layers, "perplexity": value} for name in ("docvqa", "wiki") for layers, value in sets]


def test_every_bar_has_its_text(rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = saved_figures(monkeypatch)
    with readable_svg():
        draw(rows, tmp_path / "new" / "figure1.svg")
    text = (tmp_path / "new" / "figure1.svg").read_text()
    for word in ("docvqa", "wiki", "as trained", "reverted: 0-3", "reverted: 28-29,31", "perplexity of answers (log scale)"):
        assert text.count(f">{word}<") == 1, word
    for word in ("2.5", "2.625", "+5 %", "not", "finite"):
        assert text.count(f">{word}<") == 2, word
    (panel,) = seen[0].axes
    assert [bar.get_height() for bar in panel.patches] == [2.5, 1, 2.625] * 2 and panel.get_ylim()[0] == 1


def test_a_plot_that_could_not_be_written_is_refused_first(tmp_path: Path) -> None:
    check_plot(tmp_path / "new.pdf")
    with pytest.raises(LlavaRegionError, match=r"allowed: \.png, \.svg, \.pdf"):
        check_plot(tmp_path / "new.jpeg")
    (tmp_path / "old.png").write_text("")
    with pytest.raises(LlavaRegionError, match="exists"):
        check_plot(tmp_path / "old.png")
    check_plot(tmp_path / "old.png", force=True)
