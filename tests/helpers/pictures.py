"""Reading drawn figures back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import pytest
from matplotlib.figure import Figure

from llava_region import plotting


@contextmanager
def readable_svg() -> Iterator[None]:
    """SVG files written inside hold their texts as text, not as outlines."""
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        yield


def png_size(path: Path) -> tuple[int, int]:
    """Width and height of a PNG file, in pixels."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def saved_figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved from now on, as objects; their files are written as well."""
    seen: list[Figure] = []
    save = plotting.save

    def remember(figure: Figure, *paths: Path) -> list[Path]:
        seen.append(figure)
        return save(figure, *paths)

    monkeypatch.setattr(plotting, "save", remember)
    return seen
