"""The paper's Figures 2 to 4 for one's own runs: first the series, as plain numbers, then their drawing as PNG and SVG.

Only whole scores are drawn. Figure 3 has a panel a family of models, Figures 2 and 4 a panel a task and a file a family.
"""

from __future__ import annotations

import io
from pathlib import Path

from llava_region import files as atomic
from llava_region import tasks
from llava_region.errors import LlavaRegionError
from llava_region.region import sparse_layers
from llava_region.report import paper
from llava_region.report.formats import TITLES
from llava_region.report.runs import Run

PANELS = {2: ("ocrvqa", "textvqa", "tdiuc", "gqa"), 4: ("ocrvqa", "textvqa", "docvqa", "scienceqa")}
NEEDED = {
    2: f"a complete score of {', '.join(TITLES[task] for task in PANELS[2])}",
    3: "a cost.json (name it with --cost RUN=FILE)",
    4: f"layers pruned and a complete score of {', '.join(TITLES[task] for task in PANELS[4])}",
}
KEPT = 0.98  # Figure 2's dashed lines: this part of the all-layers score
# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHED, GREY = (0, (4, 3)), "#777777"


def figure_data(number: int, runs: list[Run], with_paper: bool = False) -> tuple[dict[str, list[dict]], list[str]]:
    """(family -> the figure's series, remarks on what was left out).

    Figure 2: `{"task", "data_percent", "layers": [...], "scores": [...], "full": all-layers score or None, "paper": bool}`.
    Figure 3: `{"layers": [...], "gpu_hours": [...], "full": hours of all layers or None, "device"}`. Figure 4: `{"task",
    "layers_tuned", "full": bool, "pruned": [...], "scores": [...]}`. Points are sorted by the horizontal axis.

    Raises:
        LlavaRegionError: no run has what the figure shows.
    """
    series = {2: _over_layers, 3: _over_cost, 4: _over_pruned}[number]
    data, remarks = {}, []
    for family in dict.fromkeys(run.family for run in runs):
        kept, left_out = _one_each([run for run in runs if run.family == family and run.layers is not None and not run.reverted])
        if found := series(kept):
            data[family] = found
            remarks += left_out
    if not data:
        raise LlavaRegionError(f"figure {number} needs runs with {NEEDED[number]}; none of the {len(runs)} given has it")
    if number == 2 and with_paper:
        data = {family: found + _paper_over_layers() for family, found in data.items()}
    return data, remarks


def _one_each(runs: list[Run]) -> tuple[list[Run], list[str]]:
    """One run a number of layers, data scale and number pruned: the evenly spread selection, as in the paper's figures, else the first."""
    kept: dict[tuple, Run] = {}
    for run in runs:
        key = (len(run.layers), run.data_scale, run.pruned)
        if key not in kept or (_is_sparse(run) and not _is_sparse(kept[key])):
            kept[key] = run
    left_out = [run.name for run in runs if run not in kept.values()]
    remark = f"left out, as another run tuned as many layers: {', '.join(left_out)}"
    return list(kept.values()), [remark] if left_out else []


def _is_sparse(run: Run) -> bool:
    return run.is_full or run.layers == tuple(sparse_layers(len(run.layers), run.num_layers))


def _points(runs: list[Run], task: str, x) -> tuple[list[int], list[float]]:
    pairs = sorted((x(run), run.scores[task]) for run in runs if task in run.scores)
    return [a for a, _ in pairs], [b for _, b in pairs]


def _over_layers(runs: list[Run]) -> list[dict]:
    runs = [run for run in runs if not run.pruned]
    out = []
    for task in PANELS[2]:
        for scale in sorted({run.data_scale for run in runs}, reverse=True):
            same = [run for run in runs if run.data_scale == scale]
            layers, scores = _points(same, task, lambda run: len(run.layers))
            full = next((run.scores[task] for run in same if run.is_full and task in run.scores), None)
            if layers:
                line = {"task": task, "data_percent": scale, "layers": layers, "scores": scores}
                out.append({**line, "full": full, "paper": False})
    return out


def _paper_over_layers() -> list[dict]:
    """The line for all the data, whose numbers Table 2 gives; those of 25 and 10 % are not in the paper's text."""
    out = []
    for task in PANELS[2]:
        pairs = sorted((int(row.label.split()[0]), row.scores[tasks.VISUAL.index(task)]) for row in paper.TABLE_2)
        line = {"task": task, "data_percent": 100.0, "layers": [n for n, _ in pairs], "scores": [score for _, score in pairs]}
        out.append({**line, "full": pairs[-1][1], "paper": True})
    return out


def _over_cost(runs: list[Run]) -> list[dict]:
    """GPU hours over layers, of the runs on all the data; a pruned folder would only repeat its model's cost."""
    runs = [run for run in runs if run.cost and run.cost.get("gpu_hours") and run.data_scale == 100 and not run.pruned]
    hours = sorted((len(run.layers), float(run.cost["gpu_hours"])) for run in runs)
    if not hours:
        return []
    devices = sorted({f"{run.cost.get('gpus', '?')} × {run.cost.get('device', 'unknown device')}" for run in runs})
    full = next((float(run.cost["gpu_hours"]) for run in runs if run.is_full), None)
    return [{"layers": [n for n, _ in hours], "gpu_hours": [h for _, h in hours], "full": full, "device": ", ".join(devices)}]


def _over_pruned(runs: list[Run]) -> list[dict]:
    runs = [run for run in runs if run.data_scale == 100]
    out = []
    for task in PANELS[4]:
        for count in sorted({len(run.layers) for run in runs}, reverse=True):
            same = [run for run in runs if len(run.layers) == count]
            pruned, scores = _points(same, task, lambda run: run.pruned)
            if any(pruned):
                out.append({"task": task, "layers_tuned": count, "full": same[0].is_full, "pruned": pruned, "scores": scores})
    return out


def draw(number: int, data: dict[str, list[dict]], out: Path) -> list[Path]:
    """Write `figureN.png` and `.svg`; where Figure 2 or 4 has several families, each has files of its own with its name in theirs.

    Raises:
        LlavaRegionError: the folder is not writable.
    """
    if number == 3:
        figures = {"figure3": _draw_cost(data)}
    else:
        names = [f"figure{number}" if len(data) == 1 else f"figure{number}-{_file_part(family)}" for family in data]
        figures = {name: _draw_tasks(number, *item) for name, item in zip(names, data.items(), strict=True)}
    written = []
    for name, figure in figures.items():
        for kind in ("png", "svg"):
            image = io.BytesIO()
            figure.savefig(image, format=kind, dpi=200)
            written.append(out / f"{name}.{kind}")
            atomic.write_bytes(written[-1], image.getvalue())
    return written


def _file_part(family: str) -> str:
    return "".join(c if c.isalnum() or c in ".-_" else "-" for c in family)


def _panels(names: list[str], width: float, horizontal: str, vertical: str):
    """A figure with a row of axes, in the style of all figures here."""
    from matplotlib.figure import Figure  # without pyplot, no display and no global state takes part

    figure = Figure(figsize=(width, 3.6), layout="constrained")
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    for axis, name in zip(axes, names, strict=True):
        axis.set_title(name, fontsize=10)
        axis.set_xlabel(horizontal, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(vertical, fontsize=9)
    return figure, axes


def _draw_tasks(number: int, family: str, series: list[dict]):
    """Figure 2 or 4 of one family."""
    shown = [task for task in PANELS[number] if any(line["task"] == task for line in series)]
    horizontal = "layers tuned" if number == 2 else "layers pruned"
    figure, axes = _panels([TITLES[task] for task in shown], 3.1 * len(shown) + 0.4, horizontal, "score, %")
    figure.suptitle(family, fontsize=11)
    ticks = sorted({x for line in series for x in line["layers" if number == 2 else "pruned"]})
    for axis, task in zip(axes, shown, strict=True):
        axis.grid(axis="y", color="#dddddd", linewidth=0.6)
        (_plot_layers if number == 2 else _plot_pruned)(axis, [line for line in series if line["task"] == task], ticks, series)
        axis.set_xlim(-0.3, len(ticks) - 0.7)
        axis.set_xticks(range(len(ticks)), ticks)
    entries = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=min(len(entries), 5), fontsize=8, frameon=False)
    return figure


def _plot_layers(axis, lines: list[dict], ticks: list[int], series: list[dict]) -> None:
    """Score over layers tuned, evenly spaced as in the paper, with 98 % of each scale's all-layers score as a dashed line."""
    scales = sorted({line["data_percent"] for line in series}, reverse=True)
    for line in lines:
        colour = GREY if line["paper"] else COLOURS[scales.index(line["data_percent"]) % len(COLOURS)]
        label = "the paper's Bunny-Llama-3-8B-V, 100 % (Table 2)" if line["paper"] else f"{line['data_percent']:g} % of the data"
        style = {"linestyle": ":", "markerfacecolor": "white"} if line["paper"] else {}
        places = [ticks.index(n) for n in line["layers"]]
        axis.plot(places, line["scores"], marker="o", markersize=4, linewidth=1.5, color=colour, label=label, **style)
        if line["full"] is not None and not line["paper"]:
            axis.axhline(KEPT * line["full"], color=colour, linestyle=DASHED, linewidth=0.9)
    axis.plot([], [], color=GREY, linestyle=DASHED, linewidth=0.9, label=f"{100 * KEPT:g} % of all layers")


def _plot_pruned(axis, lines: list[dict], ticks: list[int], series: list[dict]) -> None:
    """Score over layers pruned: the model tuned in all layers dashed, the region's solid."""
    counts = sorted({line["layers_tuned"] for line in series}, reverse=True)
    for line in lines:
        count = line["layers_tuned"]
        label = f"all {count} layers tuned" if line["full"] else f"region of {count} layer{'s' * (count > 1)} tuned"
        style = {"linestyle": DASHED if line["full"] else "-", "color": COLOURS[counts.index(count) % len(COLOURS)]}
        axis.plot([ticks.index(n) for n in line["pruned"]], line["scores"], marker="o", markersize=4, linewidth=1.5, label=label, **style)


def _draw_cost(data: dict[str, list[dict]]):
    """Figure 3: a panel a family, bars over layers tuned, each with its saving against all layers."""
    series = {family: lines[0] for family, lines in data.items()}
    width = sum(max(2.6, 0.55 * len(line["layers"])) for line in series.values()) + 0.6
    figure, axes = _panels(list(series), width, "layers tuned", "GPU hours")
    for axis, line in zip(axes, series.values(), strict=True):
        axis.set_title(f"{axis.get_title()}\n", fontsize=10)
        axis.text(0.5, 1.03, line["device"], transform=axis.transAxes, ha="center", fontsize=8, color=GREY)
        axis.bar(range(len(line["layers"])), line["gpu_hours"], width=0.7, color=COLOURS[0])
        for place, hours in enumerate(line["gpu_hours"]):
            text = f"{hours:.1f}" if hours >= 1 else f"{hours:.2g}"
            if line["full"] and hours != line["full"]:
                text += f"\n{100 * (hours / line['full'] - 1):+.0f} %".replace("-", "−")
            axis.annotate(text, (place, hours), (0, 2), textcoords="offset points", ha="center", va="bottom", fontsize=7.5)
        axis.set_xticks(range(len(line["layers"])), line["layers"])
        axis.set_ylim(0, 1.2 * max(line["gpu_hours"]))
    return figure
