"""Figure 1 (left): perplexity of a model with sets of layers reverted to the backbone, grouped by data file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_region import plotting
from llava_region.files import refuse_existing
from llava_region.region import layer_ranges

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, Any]  # of `sweep`: "data", "reverted" (layers), "perplexity" (None if not finite), "tokens", "unlabelled"

LOWEST = 1  # no perplexity is lower
BACKBONE = "the backbone"


def check_plot(path: Path, force: bool = False) -> None:
    """Refuse a figure that could not be written at the end.

    Raises:
        LlavaRegionError: unknown format, or the file exists and `force` is not set.
    """
    plotting.check_format(path)
    refuse_existing(path, force)


def rises(rows: list[Row]) -> list[float | None]:
    """Of each row the perplexity's rise over its data file's unreverted row, in percent; None where either is not finite."""
    baseline = {row["data"]: row["perplexity"] for row in rows if not row["reverted"]}
    return [100 * (r["perplexity"] / b - 1) if r["perplexity"] and (b := baseline[r["data"]]) else None for r in rows]


def draw(rows: list[Row], path: Path) -> None:
    """Write grouped bars: a group per data file, a bar per set of reverted layers, with the rise over the unreverted bar on it.

    Raises:
        LlavaRegionError: unknown format, or the folder is not writable.
    """
    figure, (panel,) = plotting.new_figure(width_of(rows), 4)
    draw_bars(panel, rows, [rise if row["reverted"] else None for row, rise in zip(rows, rises(rows), strict=True)])
    figure.legend(loc="outside right upper", fontsize=plotting.SMALL, frameon=False)  # inside it would cover bars
    plotting.save(figure, path)


def width_of(rows: list[Row]) -> float:
    """Inches that the bars of these rows and their legend take."""
    return 3.0 + 0.62 * len(rows) + 0.4 * len({row["data"] for row in rows})


def draw_bars(panel: Axes, rows: list[Row], texts: list[float | None]) -> None:
    """Draw a group of bars per data file.

    Args:
        rows: of a sweep; one with `"backbone": True` is the backbone's own.
        texts: a rise in percent to write on each bar, or None.
    """
    groups = {data: [one for one in rows if one["data"] == data] for data in dict.fromkeys(row["data"] for row in rows)}
    names = list(dict.fromkeys(map(_name, rows)))
    colours = {name: f"C{number % 10}" for number, name in enumerate(name for name in names if name != BACKBONE)} | {
        BACKBONE: plotting.GREY
    }
    width = 0.8 / max(map(len, groups.values()))
    seen = set()
    for row, rise in zip(rows, texts, strict=True):
        group, name = groups[row["data"]], _name(row)
        number = next(place for place, other in enumerate(group) if other is row)
        place = list(groups).index(row["data"]) + (number - (len(group) - 1) / 2) * width
        height = row["perplexity"] or LOWEST  # not 0: a logarithmic axis has no place for it, nor for the text on it
        bar = panel.bar(place, height, width * 0.9, color=colours[name], label=None if name in seen else name)  # one legend entry each
        seen.add(name)
        panel.bar_label(bar, [_bar_text(row["perplexity"], rise)], fontsize=7, padding=2)
    _set_log_axis(panel)
    panel.set_xticks(range(len(groups)), [Path(name).stem for name in groups])
    panel.set_ylabel("perplexity of answers (log scale)")


def _name(row: Row) -> str:
    if row.get("backbone"):
        return BACKBONE
    return f"reverted: {layer_ranges(row['reverted'])}" if row["reverted"] else "as trained"


def _set_log_axis(panel: Axes) -> None:
    """Bars differ by orders of magnitude where early layers are reverted."""
    from matplotlib.ticker import LogLocator, NullFormatter

    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.margins(y=0.15)
    panel.set_ylim(bottom=LOWEST)


def _bar_text(value: float | None, rise: float | None) -> str:
    if value is None:
        return "not\nfinite"
    return f"{value:.4g}" if rise is None else f"{value:.4g}\n{rise:+.3g} %"
