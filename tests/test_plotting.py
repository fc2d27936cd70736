"""How every figure is made and written."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from llava_region import plotting
from llava_region.errors import LlavaRegionError

STARTS = {".png": b"\x89PNG\r\n\x1a\n", ".svg": b"<?xml", ".pdf": b"%PDF-"}


def drawn() -> Figure:
    figure, (panel,) = plotting.new_figure(3, 2)
    panel.plot([0, 1], [1, 2])
    return figure


def test_a_figure_is_written_in_every_format(tmp_path: Path) -> None:
    paths = [tmp_path / "new" / f"figure{suffix}" for suffix in (*plotting.FORMATS, ".PNG")]
    assert plotting.save(drawn(), *paths) == paths
    assert all(path.read_bytes().startswith(STARTS[path.suffix.lower()]) for path in paths)
    assert sorted((tmp_path / "new").iterdir()) == sorted(paths)  # nothing temporary is left


@pytest.mark.parametrize("name", ["figure.jpeg", "figure", "figure.png.txt"])
def test_an_unknown_format_is_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(LlavaRegionError, match=r"cannot be written as '.*'; allowed: \.png, \.svg, \.pdf"):
        plotting.save(drawn(), tmp_path / "whole.png", tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_figure_that_cannot_be_drawn_leaves_every_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / "figure.png", tmp_path / "figure.svg"]
    plotting.save(drawn(), *paths)
    before = [path.read_bytes() for path in paths]
    broken = drawn()
    broken.axes[0].set_title("another")
    write = broken.savefig

    def fail_at_svg(image: io.BytesIO, format: str, **options: Any) -> None:
        if format == "svg":
            raise ValueError("cannot draw")
        write(image, format=format, **options)

    monkeypatch.setattr(broken, "savefig", fail_at_svg)
    with pytest.raises(ValueError, match="cannot draw"):
        plotting.save(broken, *paths)
    assert [path.read_bytes() for path in paths] == before and sorted(tmp_path.iterdir()) == sorted(paths)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LlavaRegionError, match="cannot write"):
        plotting.save(drawn(), tmp_path / "file" / "figure.png")


def test_panels_have_one_style() -> None:
    figure, panels = plotting.new_figure(6, 3, ["left", "right"], share_y=True)
    assert tuple(figure.get_size_inches()) == (6, 3) and [panel.get_title() for panel in panels] == ["left", "right"]
    for panel in panels:
        assert not panel.spines["top"].get_visible() and not panel.spines["right"].get_visible()
        assert panel.title.get_size() == plotting.TITLE and panel.xaxis.label.get_size() == plotting.LABEL
    assert panels[0].get_shared_y_axes().joined(*panels)


def test_matplotlib_is_imported_by_the_first_figure_alone() -> None:
    names = "print(*[name in sys.modules for name in ('matplotlib', 'matplotlib.pyplot')])"
    code = f"import sys; from llava_region import plotting; {names}; plotting.new_figure(1, 1); {names}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1], check=True)
    assert done.stdout.split() == ["False", "False", "True", "False"]
