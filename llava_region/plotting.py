"""The one place that makes figures and writes them: a common style, a list of formats, and files that are never half written."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llava_region import files
from llava_region.errors import LlavaRegionError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")
# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREY = "#777777"
DASHED = (0, (4, 3))
TITLE, LABEL, SMALL = 10, 9, 8  # points: titles, axis labels, and everything else
DOTS_PER_INCH = 200  # of PNG files


def new_figure(
    width: float, height: float, titles: Sequence[str] = ("",), share_y: bool = False, widths: Sequence[float] | None = None
) -> tuple[Figure, list[Axes]]:
    """An empty figure with a row of panels, in the style of every figure of this package.

    Args:
        width, height: of the whole figure, in inches.
        titles: one panel is made for each; an empty title is not drawn.
        widths: of the panels, in any unit; None: all alike.
        share_y: whether the panels have one vertical axis in common.
    """
    from matplotlib.figure import Figure  # not pyplot: it needs no display and keeps no global state

    figure = Figure(figsize=(width, height), layout="constrained")
    panels: list[Axes] = list(figure.subplots(1, len(titles), squeeze=False, sharey=share_y, width_ratios=widths)[0])
    for panel, title in zip(panels, titles, strict=True):
        panel.set_title(title, fontsize=TITLE)
        panel.xaxis.label.set_fontsize(LABEL)
        panel.yaxis.label.set_fontsize(LABEL)
        panel.tick_params(labelsize=SMALL)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, panels


def check_format(path: Path) -> None:
    """Refuse a file name that `save` could not write.

    Raises:
        LlavaRegionError: the name does not end in one of `FORMATS`.
    """
    if path.suffix.lower() not in FORMATS:
        raise LlavaRegionError(f"a figure cannot be written as '{path.name}'; allowed: {', '.join(FORMATS)}")


def save(figure: Figure, *paths: Path) -> list[Path]:
    """Write a figure to one or more files, the format of each taken from its name; folders are made.

    All formats are drawn before the first file is written, and each file appears whole or not at all.

    Raises:
        LlavaRegionError: a name does not end in one of `FORMATS`, or a folder is not writable.
    """
    for path in paths:
        check_format(path)
    for path, content in [(path, _drawn(figure, path.suffix.removeprefix("."))) for path in paths]:
        files.write_bytes(path, content)
    return list(paths)


def _drawn(figure: Figure, kind: str) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format=kind, dpi=DOTS_PER_INCH)
    return content.getvalue()
