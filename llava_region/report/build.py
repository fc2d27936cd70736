"""A whole report: the tables and figures asked for, first as data, then as files."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_region.errors import LlavaRegionError
from llava_region.progress import track
from llava_region.report.figures import FIGURES, Families, draw, figure_data
from llava_region.report.formats import Table
from llava_region.report.sources import Sources
from llava_region.report.tables import TABLES, build_table, find_baselines, write_tables


@dataclass
class Report:
    """What is shown of some runs.

    Attributes:
        tables: number -> table.
        figures: number -> family -> series.
        remarks: what a reader of the figures has to know, a line each.
        refused: why a figure that was asked for could not be made.
    """

    tables: dict[int, Table] = field(default_factory=dict)
    figures: dict[int, Families] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """`tables` and `figures` as plain data, unrounded."""
        return {"tables": {number: dataclasses.asdict(table) for number, table in self.tables.items()}, "figures": self.figures}


def build_report(sources: Sources, tables: list[int], figures: list[int], baselines: list[str], with_paper: bool = False) -> Report:
    """The tables and figures of these numbers.

    Args:
        tables: numbers of `TABLES`; without any, and without figures, the plain table of all tasks.
        figures: numbers of `FIGURES`.
        baselines: runs that percentages refer to, by name or folder, at most one per family.
        with_paper: add the paper's own numbers, where its text gives them.

    Raises:
        LlavaRegionError: a baseline is not one of the runs, or nothing that was asked for can be made.
    """
    report, runs = Report(), sources.runs
    found = find_baselines(runs, baselines)
    for number in tables or ([] if figures else [0]):
        report.tables[number] = build_table(TABLES[number], runs, found, with_paper)
    if with_paper and any(not TABLES[number].paper_rows for number in report.tables):
        report.remarks.append("the paper's numbers go with --table 1 to 4 and --figure 2")
    for number in dict.fromkeys(figures):
        try:
            report.figures[number], remarks = figure_data(FIGURES[number], sources, with_paper)
        except LlavaRegionError as e:  # what was asked for beside it is made
            report.refused.append(str(e))
            continue
        report.remarks += [f"figure {number}: {remark}" for remark in remarks]
    if not report.tables and not report.figures:
        raise LlavaRegionError("; ".join(report.refused))
    return report


def write_report(report: Report, out: Path, form: str) -> list[Path]:
    """Write the tables, in one format or `all`, and the figures, as PNG and SVG, into a folder; returns the files.

    Raises:
        LlavaRegionError: unknown format, or the folder is not writable.
    """
    written = write_tables(report.tables, out, form)
    for number, data in track(report.figures.items(), "Drawing figures"):
        written += draw(FIGURES[number], data, out)
    return written
