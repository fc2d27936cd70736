"""The paper's figures for one's own runs, as PNG and SVG.

Figure 3 has one panel per family of models; Figures 2 and 4 have one panel per task, and a file for each family. Figure 1 has
a file for each family too, Figure 5 one for each model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_region import plotting
from llava_region.errors import LlavaRegionError
from llava_region.plotting import COLOURS, DASHED, GREY
from llava_region.report import series
from llava_region.report.formats import TITLES
from llava_region.report.runs import Run
from llava_region.report.series import Series
from llava_region.report.sources import Sources
from llava_region.run_files import COST_FILE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Families = dict[str, list[Series]]  # family of models -> its series
Plot = Callable[["Axes", list[Series], list[int], list[Series]], None]  # panel, its series, all panels' ticks, all series

HEIGHT = 3.6  # inches
KEPT = 0.98  # Figure 2's dashed lines: this part of the all-layers score


@dataclass(frozen=True)
class PaperFigure:
    """How one figure is made from runs.

    Attributes:
        number: in the paper, and in the names of its files.
        needs: what a run must have to be shown, for the message when none has it.
        series: the runs of one family -> what is shown of them; None: `families` says all.
        families: everything given -> what is shown, by family.
        draw: the families that one file shows -> the figure.
        one_file: whether all families are in one file; else each has its own.
        paper_series: family -> the paper's own numbers of that model, where its text gives them.
    """

    number: int
    needs: str
    series: Callable[[list[Run]], list[Series]] | None
    draw: Callable[[Families], Figure]
    one_file: bool = False
    paper_series: Callable[[str], list[Series]] | None = None
    families: Callable[[Sources], Families] | None = None


def figure_data(kind: PaperFigure, sources: Sources, with_paper: bool = False) -> tuple[Families, list[str]]:
    """(family -> the figure's series, remarks on what was left out).

    Args:
        kind: one of `FIGURES`, whose `series` says what a series holds.
        with_paper: append the paper's own series of a family's model to those of the family.

    Raises:
        LlavaRegionError: no run has what the figure shows.
    """
    data: Families = {}
    remarks: list[str] = []
    if kind.families is not None:
        data = kind.families(sources)
    if kind.series is not None:
        data, remarks = _of_runs(kind.series, sources.runs)
    if not data:
        raise LlavaRegionError(f"figure {kind.number} needs {kind.needs}; none of the {len(sources.runs)} runs given has it")
    if with_paper and kind.paper_series is None:
        remarks.append("the paper's text gives no numbers for it")
    elif with_paper and kind.paper_series is not None:
        for family, found in data.items():
            theirs = kind.paper_series(family)
            if not theirs:
                remarks.append(f"the paper has no numbers of {family}")
            data[family] = found + theirs
    return data, remarks


def _of_runs(of_family: Callable[[list[Run]], list[Series]], runs: list[Run]) -> tuple[Families, list[str]]:
    data: Families = {}
    remarks = []
    for family in dict.fromkeys(run.family for run in runs):
        whole = [run for run in runs if run.family == family and run.layers is not None and not run.reverted]
        kept, left_out = series.one_of_each(whole)
        if found := of_family(kept):
            data[family] = found
            if left_out:
                remarks.append(f"left out, as another run tuned as many layers: {', '.join(left_out)}")
    return data, remarks


def draw(kind: PaperFigure, data: Families, out: Path) -> list[Path]:
    """Write `figureN.png` and `.svg`; where Figure 2 or 4 has several families, `figureN-FAMILY.png` and `.svg` for each.

    Raises:
        LlavaRegionError: the folder is not writable.
    """
    name = f"figure{kind.number}"
    if kind.one_file or len(data) == 1:
        parts = {name: data}
    else:
        parts = {f"{name}-{_file_part(family)}": {family: lines} for family, lines in data.items()}
    written = []
    for name, families in parts.items():
        written += plotting.save(kind.draw(families), out / f"{name}.png", out / f"{name}.svg")
    return written


def _file_part(family: str) -> str:
    return "".join(c if c.isalnum() or c in ".-_" else "-" for c in family)


def draw_over_layers(families: Families) -> Figure:
    """Figure 2 of one family: score over the number of layers tuned, a line per part of the data."""
    return _draw_tasks(families, series.TASKS_OVER_LAYERS, "layers", "layers tuned", _plot_layers)


def draw_over_pruned(families: Families) -> Figure:
    """Figure 4 of one family: score over the number of layers pruned, a line per number of layers tuned."""
    return _draw_tasks(families, series.TASKS_OVER_PRUNED, "pruned", "layers pruned", _plot_pruned)


def _draw_tasks(families: Families, tasks: tuple[str, ...], key: str, horizontal: str, plot: Plot) -> Figure:
    """A panel for each of the tasks that the only family has; `key` names the horizontal values of a series."""
    ((family, lines),) = families.items()
    shown = [task for task in tasks if any(line["task"] == task for line in lines)]
    figure, panels = plotting.new_figure(3.1 * len(shown) + 0.4, HEIGHT, [TITLES[task] for task in shown])
    figure.suptitle(family, fontsize=11)
    panels[0].set_ylabel("score, %")
    ticks = sorted({place for line in lines for place in line[key]})
    for panel, task in zip(panels, shown, strict=True):
        panel.set_xlabel(horizontal)
        panel.grid(axis="y", color="#dddddd", linewidth=0.6)
        plot(panel, [line for line in lines if line["task"] == task], ticks, lines)
        panel.set_xlim(-0.3, len(ticks) - 0.7)
        panel.set_xticks(range(len(ticks)), [str(tick) for tick in ticks])
    _add_legend(figure, panels)
    return figure


def _add_legend(figure: Figure, panels: list[Axes]) -> None:
    """One legend below the panels, each label once."""
    entries = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    columns = min(len(entries), 5)
    figure.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=columns, fontsize=plotting.SMALL, frameon=False)


def _plot_layers(panel: Axes, lines: list[Series], ticks: list[int], every: list[Series]) -> None:
    """Score over layers tuned, evenly spaced as in the paper, with 98 % of each scale's all-layers score as a dashed line."""
    scales = sorted({line["data_percent"] for line in every}, reverse=True)
    for line in lines:
        colour = GREY if line["paper"] else COLOURS[scales.index(line["data_percent"]) % len(COLOURS)]
        label = f"the paper's {line['of']}, 100 % of the data" if line["paper"] else f"{line['data_percent']:g} % of the data"
        style: dict[str, Any] = {"linestyle": ":", "markerfacecolor": "white"} if line["paper"] else {}
        places = [ticks.index(n) for n in line["layers"]]
        panel.plot(places, line["scores"], marker="o", markersize=4, linewidth=1.5, color=colour, label=label, **style)
        if line["full"] is not None and not line["paper"]:
            panel.axhline(KEPT * line["full"], color=colour, linestyle=DASHED, linewidth=0.9)
    panel.plot([], [], color=GREY, linestyle=DASHED, linewidth=0.9, label=f"{100 * KEPT:g} % of all layers")


def _plot_pruned(panel: Axes, lines: list[Series], ticks: list[int], every: list[Series]) -> None:
    """Score over layers pruned: the model tuned in all layers dashed, the region's solid."""
    counts = sorted({line["layers_tuned"] for line in every}, reverse=True)
    for line in lines:
        count = line["layers_tuned"]
        label = f"all {count} layers tuned" if line["full"] else f"region of {count} layer{'s' * (count > 1)} tuned"
        style, colour = DASHED if line["full"] else "-", COLOURS[counts.index(count) % len(COLOURS)]
        places = [ticks.index(n) for n in line["pruned"]]
        panel.plot(places, line["scores"], marker="o", markersize=4, linewidth=1.5, linestyle=style, color=colour, label=label)


def draw_cost(families: Families) -> Figure:
    """Figure 3: a panel per family, bars over layers tuned, each with its saving compared with all layers."""
    lines = {family: only for family, (only,) in families.items()}
    width = sum(max(2.6, 0.55 * len(line["layers"])) for line in lines.values()) + 0.6
    figure, panels = plotting.new_figure(width, HEIGHT, [f"{family}\n" for family in lines])
    panels[0].set_ylabel("GPU hours")
    for panel, line in zip(panels, lines.values(), strict=True):
        panel.set_xlabel("layers tuned")
        panel.text(0.5, 1.03, line["device"], transform=panel.transAxes, ha="center", fontsize=plotting.SMALL, color=GREY)
        panel.bar(range(len(line["layers"])), line["gpu_hours"], width=0.7, color=COLOURS[0])
        for place, hours in enumerate(line["gpu_hours"]):
            text = _hours_text(hours, line["full"])
            panel.annotate(text, (place, hours), (0, 2), textcoords="offset points", ha="center", va="bottom", fontsize=7.5)
        panel.set_xticks(range(len(line["layers"])), [str(n) for n in line["layers"]])
        panel.set_ylim(0, 1.2 * max(line["gpu_hours"]))
    return figure


def _hours_text(hours: float, full: float | None) -> str:
    text = f"{hours:.1f}" if hours >= 1 else f"{hours:.2g}"
    if full and hours != full:
        text += f"\n{100 * (hours / full - 1):+.0f} %".replace("-", "−")
    return text


def perplexity_and_pruning(sources: Sources) -> Families:
    """Figure 1: of each family the bars of perplexity, then the lines of accuracy over layers pruned, either of which may be missing."""
    pruned, _ = _of_runs(series.scores_over_pruned_of_full, sources.runs)
    families = dict.fromkeys([*(content["family"] for content in sources.perplexities), *pruned])
    bars = {name: series.perplexity_bars([c for c in sources.perplexities if c["family"] == name]) for name in families}
    return {name: found for name in families if (found := [*bars[name], *pruned.get(name, [])])}


def draw_perplexity_and_pruning(families: Families) -> Figure:
    """Figure 1 of one family: perplexity with layers reverted on the left, accuracy with layers pruned on the right."""
    from llava_region.evaluation.perplexity_plot import draw_bars, width_of

    ((family, found),) = families.items()
    bars, lines = ([one for one in found if ("perplexity" in one) == left] for left in (True, False))
    widths = ([width_of(bars) - 1.5] if bars else []) + ([4.0] if lines else [])
    titles = ["layers reverted"] * bool(bars) + ["layers pruned"] * bool(lines)
    figure, panels = plotting.new_figure(sum(widths), HEIGHT + 0.8, titles, widths=widths)
    figure.suptitle(family, fontsize=11)
    if bars:
        draw_bars(panels[0], bars, [bar["rise"] for bar in bars])
        panels[0].set_xlabel("rise: with images over the model as trained, of text over the backbone", fontsize=plotting.SMALL)
    if lines:
        _plot_tasks_over_pruned(panels[-1], lines)
    for panel in panels:
        panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize=plotting.SMALL, frameon=False)
    return figure


def _plot_tasks_over_pruned(panel: Axes, lines: list[Series]) -> None:
    for number, line in enumerate(lines):
        colour = COLOURS[number % len(COLOURS)]
        panel.plot(line["pruned"], line["scores"], marker="o", markersize=4, linewidth=1.5, color=colour, label=TITLES[line["task"]])
    panel.set(xlabel="layers pruned, all layers tuned", ylabel="score, %")
    panel.set_xticks(sorted({place for line in lines for place in line["pruned"]}))
    panel.grid(axis="y", color="#dddddd", linewidth=0.6)


def attention_by_instance(sources: Sources) -> Families:
    """Figure 5: of each model what its scores file says of every instance."""
    return {content["family"]: [content] for content in sources.scores}


def draw_attention(families: Families) -> Figure:
    """Figure 5 of one model."""
    from llava_region.scores.figures import heat_map

    ((model, (content,)),) = families.items()
    figure = heat_map(content)
    figure.suptitle(f"image attention, {model}", fontsize=plotting.TITLE)
    return figure


def _titles(tasks: tuple[str, ...]) -> str:
    return ", ".join(TITLES[task] for task in tasks)


_OVER_LAYERS = PaperFigure(
    2,
    f"runs with a complete score of {_titles(series.TASKS_OVER_LAYERS)}",
    series.scores_over_layers,
    draw_over_layers,
    paper_series=series.paper_scores_over_layers,
)
_COST = PaperFigure(3, f"runs with a {COST_FILE} (name it with --cost RUN=FILE)", series.hours_over_layers, draw_cost, one_file=True)
_OVER_PRUNED = PaperFigure(
    4,
    f"runs with layers pruned and a complete score of {_titles(series.TASKS_OVER_PRUNED)}",
    series.scores_over_pruned,
    draw_over_pruned,
)
_PERPLEXITY = PaperFigure(
    1,
    f"files of 'llava-region perplexity' (--perplexity FILE), or runs tuned in all layers, with layers pruned and a complete score of "
    f"{_titles(series.TASKS_OVER_PRUNED)}",
    None,
    draw_perplexity_and_pruning,
    families=perplexity_and_pruning,
)
_ATTENTION = PaperFigure(
    5, "a scores file with image attention by instance (--scores FILE)", None, draw_attention, families=attention_by_instance
)
FIGURES = {figure.number: figure for figure in (_PERPLEXITY, _OVER_LAYERS, _COST, _OVER_PRUNED, _ATTENTION)}
