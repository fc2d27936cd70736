"""A table of scores, and how it looks as Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import ROUND_HALF_UP, Decimal
from typing import NamedTuple

from llava_region.errors import LlavaRegionError

TITLES = {
    "ocrvqa": "OCRVQA", "docvqa": "DocVQA", "refcocog": "RefCOCOg", "tdiuc": "TDIUC", "mmbench": "MMBench", "gqa": "GQA",
    "scienceqa": "ScienceQA", "textvqa": "TextVQA", "mmlu": "MMLU", "bbh": "BIG-bench-Hard",
}  # fmt: skip
INCOMPLETE = "incomplete"


@dataclass
class Line:
    """One row.

    Attributes:
        label: what the row shows.
        run: the run's name, None for the paper's rows.
        family: the model that the row's run was trained from; rows of one family are compared.
        section: heading that the row appears under.
        scores: task -> percent, complete tasks only.
        partial: task -> (percent or None, what is missing).
        average: mean over the eight visual tasks, None unless all are complete.
        relative: percent of the baseline's average, None if either is unknown.
        baseline: whether it is the run that the others are compared with.
        paper: whether the numbers are the paper's.
    """

    label: str
    run: str | None
    family: str = ""
    section: str = ""
    scores: dict[str, float] = field(default_factory=dict)
    partial: dict[str, tuple[float | None, str]] = field(default_factory=dict)
    average: float | None = None
    relative: float | None = None
    baseline: bool = False
    paper: bool = False


@dataclass
class Table:
    """A title, task names as columns, rows, whether these have averages, and notes to print below."""

    title: str
    columns: tuple[str, ...]
    lines: list[Line]
    averaged: bool
    notes: list[str] = field(default_factory=list)


def rounded(value: float) -> str:
    """Two decimals, half up, as the paper prints (rounding 62.8575 as a binary number would depend on its last bit)."""
    return str(Decimal(str(round(value, 8))).quantize(Decimal("0.01"), ROUND_HALF_UP))


def mark_best(table: Table) -> set[tuple[int, str]]:
    """(row index, column) of each family's best complete scores; baselines and the paper's rows do not count (Table 1's caption).

    A column with one candidate has no best. Ties are all marked.
    """
    marked: set[tuple[int, str]] = set()
    for family in {line.family for line in table.lines}:
        own = [(i, line) for i, line in enumerate(table.lines) if line.family == family and not line.paper and not line.baseline]
        for column in (*table.columns, "average"):
            values = {i: line.average if column == "average" else line.scores.get(column) for i, line in own}
            shown = {i: rounded(value) for i, value in values.items() if value is not None}
            best = max(shown.values(), key=Decimal, default=None)
            marked |= {(i, column) for i, text in shown.items() if text == best and len(shown) > 1}
    return marked


def heads(table: Table) -> list[str]:
    """The column heads that follow the label's."""
    return [TITLES[column] for column in table.columns] + (["Avg", "% of baseline"] if table.averaged else [])


def cells(table: Table, index: int, bold: Callable[[str], str]) -> list[str]:
    """A row's cells after the label; `bold` marks the text of a best score."""
    line, best = table.lines[index], mark_best(table)
    out = []
    for column in table.columns:
        if column in line.scores:
            text = rounded(line.scores[column])
            out.append(bold(text) if (index, column) in best else text)
        else:
            score = line.partial.get(column, (None, ""))[0]
            out.append("-" if score is None else f"({rounded(score)})")
    if table.averaged:
        average = INCOMPLETE if line.average is None else rounded(line.average)
        out.append(bold(average) if (index, "average") in best else average)
        out.append("-" if line.relative is None else rounded(line.relative))
    return out


def markdown(table: Table) -> str:
    """GitHub's Markdown: sections as rows of their own, notes as a list."""
    names = heads(table)
    rows = [f"| {' | '.join(['Run', *names])} |", f"|{' --- |' + ' ---: |' * len(names)}"]
    section = ""
    for index, line in enumerate(table.lines):
        if line.section != section:
            section = line.section
            rows.append(f"| *{_escape_bar(section)}* |{'  |' * len(names)}")
        rows.append(f"| {' | '.join([_escape_bar(line.label), *cells(table, index, lambda text: f'**{text}**')])} |")
    notes = "".join(f"\n- {note}" for note in table.notes)
    return f"### {table.title}\n\n" + "\n".join(rows) + "\n" + (notes + "\n" if notes else "")


def _escape_bar(text: str) -> str:
    return text.replace("|", "\\|")


def comma_separated(table: Table) -> str:
    """CSV for programs: unrounded scores, `source` is `own` or `paper`, `incomplete` says what is missing."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    tail = ["average", "percent_of_baseline"] if table.averaged else []
    writer.writerow(["label", "run", "section", "source", *table.columns, *tail, "baseline", "incomplete"])
    for line in table.lines:
        values = [line.scores.get(column) for column in table.columns]
        values += [line.average, line.relative] if table.averaged else []
        texts = ["" if value is None else f"{value:.10g}" for value in values]
        source = "paper" if line.paper else "own"
        writer.writerow([line.label, line.run or "", line.section, source, *texts, int(line.baseline), missing_text(table, line)])
    return out.getvalue()


def missing_text(table: Table, line: Line) -> str:
    """What an incomplete row lacks, such as `GQA not evaluated, MMBench 3 answers missing`; empty for a complete row."""
    lacks = [(c, line.partial.get(c, (None, "not evaluated"))[1]) for c in table.columns if c not in line.scores]
    return ", ".join(f"{TITLES[column]} {why}" for column, why in lacks)


def latex(table: Table) -> str:
    """A booktabs table; needs `\\usepackage{booktabs}`."""
    names = heads(table)
    rows = [
        "% needs \\usepackage{booktabs}",
        "\\begin{table}",
        "\\centering\\small",
        f"\\begin{{tabular}}{{l{'r' * len(names)}}}",
        "\\toprule",
        " & ".join(["Run", *map(_escape_latex, names)]) + " \\\\",
        "\\midrule",
    ]
    section = ""
    for index, line in enumerate(table.lines):
        if line.section != section:
            section = line.section
            rows.append(f"\\multicolumn{{{len(names) + 1}}}{{l}}{{\\textit{{{_escape_latex(section)}}}}} \\\\")
        rows.append(" & ".join([_escape_latex(line.label), *cells(table, index, lambda text: f"\\textbf{{{text}}}")]) + " \\\\")
    caption = " ".join([f"{table.title}.", *(f"{note[:1].upper()}{note[1:].rstrip('.')}." for note in table.notes)])
    return "\n".join([*rows, "\\bottomrule", "\\end{tabular}", f"\\caption{{{_escape_latex(caption)}}}", "\\end{table}", ""])


def _escape_latex(text: str) -> str:
    special = {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"}
    return "".join(special.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in text)


class Format(NamedTuple):
    """How a table is written as text, and the suffix of its file."""

    render: Callable[[Table], str]
    suffix: str


FORMATS = {"markdown": Format(markdown, "md"), "csv": Format(comma_separated, "csv"), "latex": Format(latex, "tex")}


def formats_of(name: str) -> list[Format]:
    """The format of that name, or every one for `all`.

    Raises:
        LlavaRegionError: another name.
    """
    if name != "all" and name not in FORMATS:
        raise LlavaRegionError(f"unknown format '{name}'; allowed: {', '.join(FORMATS)}, all")
    return list(FORMATS.values()) if name == "all" else [FORMATS[name]]
