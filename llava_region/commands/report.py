"""`llava-region report`: the paper's tables and figures for one's own runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import typer

from llava_region.run_files import COST_FILE


def command(
    runs: list[Path] = typer.Argument(None, metavar="DIR...", help="Output folders of llava-region eval; for Figure 3 also of training."),
    baseline: list[str] = typer.Option(
        [], "--baseline", metavar="RUN", help="Run that percentages refer to, one per model. Default: the one that tuned all layers."
    ),
    table: list[int] = typer.Option(
        [], "--table", min=1, max=4, help="Table of the paper to print; repeatable. Default: one table of all tasks, a row per run."
    ),
    figure: list[int] = typer.Option([], "--figure", min=1, max=5, help="Figure of the paper to draw into --out; repeatable."),
    perplexity: list[Path] = typer.Option(
        [], "--perplexity", help="For Figure 1: what llava-region perplexity --out wrote, of a model and of its backbone; repeatable."
    ),
    scores: list[Path] = typer.Option([], "--scores", help="For Figure 5: a file of llava-region score with image_attention; repeatable."),
    form: str | None = typer.Option(None, "--format", help="markdown, csv, latex or all. Default: markdown, or all with --out."),
    out: Path | None = typer.Option(None, "--out", help="Folder for the files; files of the same names in it are replaced."),
    paper: bool = typer.Option(False, "--paper", help="Add the paper's own numbers, marked as the paper's."),
    cost: list[str] = typer.Option([], "--cost", metavar="RUN=FILE", help=f"A run's {COST_FILE}, if it is not in the model's folder."),
    data_scale: list[str] = typer.Option(
        [],
        "--data-scale",
        metavar="RUN=PERCENT",
        help=f"Percent of the data that a run was trained on. Default: its samples in {COST_FILE}, divided by the most samples of any "
        "run of the same model.",
    ),
    as_json: bool = typer.Option(False, "--json", help='Print {"tables", "figures", "files"}, unrounded.'),
) -> None:
    """Make the paper's Tables 1-4 and Figures 1-5 for your own runs.

    A run is shown as incomplete, and never averaged, if a task is missing, was limited or was not fully answered.
    """
    from llava_region import locks
    from llava_region.errors import LlavaRegionError
    from llava_region.report.build import build_report, write_report
    from llava_region.report.formats import formats_of
    from llava_region.report.runs import read_runs
    from llava_region.report.sources import Sources, read_perplexities, read_scores

    form = form or ("all" if out else "markdown")
    formats = formats_of(form)
    if out is None and not as_json and (figure or form == "all"):
        raise LlavaRegionError(f"{'a figure' if figure else '--format all'} makes files; name their folder with --out DIR")
    for number, given, option in ((1, perplexity, "--perplexity"), (5, scores, "--scores")):
        if given and number not in figure:
            raise LlavaRegionError(f"{option} is for Figure {number}; give --figure {number}, or leave it out")
    if not runs and (table or not figure):
        raise LlavaRegionError("no run is given; give the output folders of llava-region eval")
    found = read_runs(runs or [], _pairs("--cost", cost), _pairs("--data-scale", data_scale))
    report = build_report(Sources(found, read_perplexities(perplexity), read_scores(scores)), table, figure, baseline, paper)
    for remark in report.remarks:
        print(remark, file=sys.stderr)
    files = []
    if out:
        with locks.held(out):
            files = [str(path) for path in write_report(report, out, form)]
    if as_json:
        print(json.dumps({**report.to_dict(), "files": files}))
    elif out:
        print("\n".join(files))
    else:
        print("\n".join(formats[0].render(one) for one in report.tables.values()), end="")
    if report.refused:
        raise LlavaRegionError("; ".join(report.refused))


def _pairs(option: str, given: list[str]) -> dict[str, str]:
    """`RUN=VALUE` arguments as a dict."""
    from llava_region.errors import LlavaRegionError

    for text in given:
        if "=" not in text:
            raise LlavaRegionError(f"{option} '{text}' has no '='; write {option} RUN={'FILE' if option == '--cost' else '25%'}")
    return dict(text.split("=", 1) for text in given)
