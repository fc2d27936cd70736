"""`llava-region report`: the paper's tables and figures for one's own runs."""

import dataclasses
import json
import sys
from pathlib import Path

import typer


def command(
    runs: list[Path] = typer.Argument(..., metavar="DIR...", help="Output folders of llava-region eval; for Figure 3 also of training."),
    baseline: list[str] = typer.Option(
        [], "--baseline", metavar="RUN", help="Run that percentages refer to, one a model. Default: the one that tuned all layers."
    ),
    table: list[int] = typer.Option(
        [], "--table", min=1, max=4, help="Table of the paper to print; repeatable. Default: all tasks, run by run."
    ),
    figure: list[int] = typer.Option([], "--figure", min=2, max=4, help="Figure of the paper to draw into --out; repeatable."),
    form: str = typer.Option(None, "--format", help="markdown, csv, latex or all. Default: markdown, or all with --out."),
    out: Path = typer.Option(None, "--out", help="Folder for the files; those of an earlier report in it are replaced."),
    paper: bool = typer.Option(False, "--paper", help="Set the paper's own numbers beside, marked as such."),
    cost: list[str] = typer.Option([], "--cost", metavar="RUN=FILE", help="A run's cost.json, where it is not in its model's folder."),
    data_scale: list[str] = typer.Option(
        [],
        "--data-scale",
        metavar="RUN=PERCENT",
        help="Part of the data a run was trained on. Default: its samples in cost.json against the most of any run of that model.",
    ),
    as_json: bool = typer.Option(False, "--json", help='Print {"tables", "figures", "files"}, unrounded.'),
):
    """Make the paper's Tables 1-4 and Figures 2-4 for your own runs.

    A run with a task missing, cut short or not fully answered is shown as incomplete and never averaged.
    """
    from llava_region.errors import LlavaRegionError
    from llava_region.progress import track
    from llava_region.report import figures as plots
    from llava_region.report import tables as report
    from llava_region.report.formats import WRITERS
    from llava_region.report.runs import read_runs

    form = form or ("all" if out else "markdown")
    if form not in (*WRITERS, "all"):
        raise LlavaRegionError(f"unknown format '{form}'; allowed: {', '.join(WRITERS)}, all")
    if out is None and not as_json and (figure or form == "all"):
        raise LlavaRegionError(f"{'a figure' if figure else '--format all'} makes files; name their folder with --out DIR")
    found = read_runs(runs, _pairs("--cost", cost), _pairs("--data-scale", data_scale))
    baselines = report.find_baselines(found, baseline)
    numbers = table or ([] if figure else [0])
    tables = {number: report.build_table(number, found, baselines, paper) for number in dict.fromkeys(numbers)}
    if paper and 0 in tables:
        print("the paper's numbers go with --table 1 to 4 and --figure 2", file=sys.stderr)
    figures, files = {}, []
    for number in dict.fromkeys(figure):
        figures[number], remarks = plots.figure_data(number, found, paper)
        if paper and number != 2:
            remarks.append("the paper's text gives no numbers for it")
        for remark in remarks:
            print(f"figure {number}: {remark}", file=sys.stderr)
    if out is not None:
        files += report.write_tables(tables, out, form)
        for number, data in track(figures.items(), "Drawing figures"):
            files += plots.draw(number, data, out)
    if as_json:
        data = {"tables": {n: dataclasses.asdict(t) for n, t in tables.items()}, "figures": figures, "files": [str(f) for f in files]}
        print(json.dumps(data))
    elif out is None:
        print("\n".join(report.render(t, form) for t in tables.values()), end="")
    else:
        print("\n".join(map(str, files)))


def _pairs(option: str, given: list[str]) -> dict[str, str]:
    from llava_region.errors import LlavaRegionError

    for text in given:
        if "=" not in text:
            raise LlavaRegionError(f"{option} '{text}' has no '='; write {option} RUN={'FILE' if option == '--cost' else '25%'}")
    return dict(text.split("=", 1) for text in given)
