"""Figure 1 (left): perplexity of a model with sets of layers reverted to the backbone, grouped by data file."""

from __future__ import annotations

from pathlib import Path

from llava_region.errors import LlavaRegionError
from llava_region.files import refuse_existing

FORMATS = (".png", ".svg", ".pdf")


def check_plot(path: Path, force: bool = False) -> None:
    """Refuse a figure that could not be written at the end.

    Raises:
        LlavaRegionError: unknown format, or the file exists and `force` is not set.
    """
    if path.suffix.lower() not in FORMATS:
        raise LlavaRegionError(f"a figure cannot be written as '{path.name}'; allowed: {', '.join(FORMATS)}")
    refuse_existing(path, force)


def layer_text(layers: list[int]) -> str:
    """Layers as ranges: `0-3,8`; `none` for no layer."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][1] == layer - 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) or "none"


def rises(rows: list[dict]) -> list[float | None]:
    """Of each row the perplexity's rise over its data file's unreverted row, in percent; None where either is not finite."""
    baseline = {row["data"]: row["perplexity"] for row in rows if not row["reverted"]}
    return [100 * (r["perplexity"] / b - 1) if r["perplexity"] and (b := baseline[r["data"]]) else None for r in rows]


def draw(rows: list[dict], path: Path) -> None:
    """Write grouped bars: a group a data file, a bar a set of reverted layers, the rise over the unreverted bar written on it.

    Bars span orders of magnitude where early layers go back, hence a logarithmic axis.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    files = list(dict.fromkeys(row["data"] for row in rows))
    sets = list(dict.fromkeys(tuple(row["reverted"]) for row in rows))
    figure = Figure(figsize=(3.5 + 0.7 * len(files) * (len(sets) + 1), 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(sets)
    for row, rise in zip(rows, rises(rows), strict=True):
        number = sets.index(tuple(row["reverted"]))
        x = files.index(row["data"]) + (number - (len(sets) - 1) / 2) * width
        name = "reverted: " + layer_text(row["reverted"]) if row["reverted"] else "as trained"
        first = row["data"] == files[0]
        bar = axes.bar(x, row["perplexity"] or 0, width * 0.9, color=f"C{number % 10}", label=name if first else None)
        axes.bar_label(bar, [_label(row["perplexity"], rise if row["reverted"] else None)], fontsize=7, padding=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.margins(y=0.15)
    axes.set_ylim(bottom=1)  # no perplexity is lower
    axes.set_xticks(range(len(files)), [Path(name).stem for name in files])
    axes.set_ylabel("perplexity of answers (log scale)")
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)  # inside it would lie on the bars
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    figure.savefig(partial, dpi=200)
    partial.replace(path)


def _label(value: float | None, rise: float | None) -> str:
    if value is None:
        return "beyond\nnumbers"
    return f"{value:.4g}" if rise is None else f"{value:.4g}\n{rise:+.3g} %"
