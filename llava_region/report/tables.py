"""The paper's tables for one's own runs: score per task, average over the eight visual tasks, percent of the all-layers run.

What sets the tables apart (tasks, names and order of the rows) is in `TABLES`; table 0 has one row per run, with every task.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from llava_region import files, tasks
from llava_region.errors import LlavaRegionError
from llava_region.report import paper_numbers as paper
from llava_region.report.formats import TITLES, Line, Table, formats_of, mark_best, missing_text, rounded
from llava_region.report.runs import Run
from llava_region.report.selections import place_of, selection_of

TEXT = ("mmlu", "bbh")


@dataclass(frozen=True)
class PaperTable:
    """How one table is made from runs.

    Attributes:
        file_name: of its files, without the suffix.
        caption: its title.
        columns: tasks that are always shown.
        label: run -> what its row is called.
        order: run -> sort key within its family, below the baseline; equal keys stay in the order given.
        section: run -> heading that its row appears under; empty for none.
        optional_columns: tasks that are shown where any run has them.
        averaged: whether rows have the mean of the eight visual tasks, in percent of the baseline's too.
        visual_only: whether plain language models are left out unless they answered a visual task.
        paper_rows: the paper's own numbers, in the order of `columns`.
    """

    file_name: str
    caption: str
    columns: tuple[str, ...]
    label: Callable[[Run], str]
    order: Callable[[Run], tuple]
    section: Callable[[Run], str] = lambda run: ""
    optional_columns: tuple[str, ...] = ()
    averaged: bool = True
    visual_only: bool = True
    paper_rows: tuple[paper.Row, ...] = ()


def _changes(run: Run) -> str:
    """What else sets a run apart, to append to its label."""
    pruned = f", {run.pruned} pruned" if run.pruned else ""
    reverted = f", {run.reverted} reverted" if run.reverted else ""
    return pruned + reverted + (f", {run.data_scale:g}% of the data" if run.data_scale < 100 else "")


def _count(run: Run) -> str:
    return f"{run.num_tuned} layer{'s' * (run.num_tuned != 1)}"


def _selection_label(run: Run) -> str:
    return selection_of(run).label + _changes(run)


def _count_label(run: Run) -> str:
    return (run.name if run.layers is None else _count(run)) + _changes(run)


def _training_label(run: Run) -> str:
    kind = "LLM backbone" if run.layers is None else f"{'Fully' if run.is_full else 'Partial'}-trained ({_count(run)})"
    return kind + _changes(run)


def _most_layers_first(run: Run) -> tuple:
    return run.layers is None, -run.num_tuned, run.pruned, -run.data_scale


def _by_selection(run: Run) -> tuple:
    return run.layers is None, place_of(selection_of(run)), *_most_layers_first(run)


TABLES = {
    0: PaperTable(
        "runs", "All runs", tasks.VISUAL, optional_columns=TEXT, label=lambda run: run.name, order=lambda run: (), visual_only=False
    ),
    1: PaperTable(
        "table1",
        "Table 1: layer selection methods",
        tasks.VISUAL,
        label=_selection_label,
        order=_by_selection,
        section=lambda run: selection_of(run).section,
        paper_rows=paper.TABLE_1,
    ),
    2: PaperTable(
        "table2",
        "Table 2: numbers of layers",
        tasks.VISUAL,
        label=_count_label,
        order=_most_layers_first,
        paper_rows=paper.TABLE_2,
    ),
    3: PaperTable(
        "table3",
        "Table 3: numbers of layers, several models",
        tasks.VISUAL,
        label=_count_label,
        order=_most_layers_first,
        paper_rows=paper.TABLE_3,
    ),
    4: PaperTable(
        "table4",
        "Table 4: text-only tasks",
        TEXT,
        label=_training_label,
        order=_most_layers_first,
        averaged=False,
        visual_only=False,
        paper_rows=paper.TABLE_4,
    ),
}


def average(scores: dict[str, float], columns: Sequence[str] = tasks.VISUAL) -> float | None:
    """Mean of the columns' scores (Avg of Tables 1 to 3), or None if one is missing."""
    if any(column not in scores for column in columns):
        return None
    return sum(scores[column] for column in columns) / len(columns)


def relative(value: float | None, baseline: float | None) -> float | None:
    """`value` in percent of `baseline`, or None if either is unknown."""
    return None if value is None or not baseline else 100 * value / baseline


def find_baselines(runs: list[Run], names: list[str]) -> dict[str, Run]:
    """Family -> the run that its percentages refer to.

    Args:
        names: runs that the user named, by name or folder, one per family. A family without one takes its only unpruned
            run that tuned all layers on all the data; where there is none or several, it has no baseline.

    Raises:
        LlavaRegionError: a name is not a run's, or two are of the same family.
    """
    found: dict[str, Run] = {}
    for name in names:
        run = next((r for r in runs if name == r.name or Path(name).resolve() == r.folder.resolve()), None)
        if run is None:
            raise LlavaRegionError(f"the baseline '{name}' is not a run; allowed: {', '.join(r.name for r in runs)}")
        if run.family in found:
            raise LlavaRegionError(f"'{found[run.family].name}' and '{name}' are both of {run.family}; give one baseline per model")
        found[run.family] = run
    for family in {run.family for run in runs} - set(found):
        full = [r for r in runs if r.family == family and r.is_full and not r.pruned and not r.reverted and r.data_scale == 100]
        if len(full) == 1:
            found[family] = full[0]
    return found


def build_table(kind: PaperTable, runs: list[Run], baselines: dict[str, Run], with_paper: bool = False) -> Table:
    """One of the paper's tables, or the plain one, for these runs.

    Args:
        kind: one of `TABLES`.
        baselines: as `find_baselines` gives them.
        with_paper: append the paper's rows, under headings that say so.
    """
    if kind.visual_only:
        runs = [run for run in runs if run.layers is not None or any(task in run.scores for task in tasks.VISUAL)]
    several = len({run.family for run in runs}) > 1 or with_paper
    columns = (*kind.columns, *(task for task in kind.optional_columns if _any_has(runs, task)))
    lines = [_line(kind, columns, run, baselines.get(run.family), several) for run in _ordered(kind, runs, baselines)]
    _tell_apart(lines)
    table = Table(kind.caption, columns, lines, kind.averaged)
    table.notes = _notes(table, baselines, {run.name: run for run in runs})
    if with_paper and kind.paper_rows:
        _add_paper(table, kind.paper_rows)
    return table


def _any_has(runs: list[Run], task: str) -> bool:
    return any(task in run.scores or task in run.partial for run in runs)


def _ordered(kind: PaperTable, runs: list[Run], baselines: dict[str, Run]) -> list[Run]:
    """Family by family, the baseline first, then as the paper orders the table."""
    families = list(dict.fromkeys(run.family for run in runs))
    return sorted(runs, key=lambda run: (families.index(run.family), baselines.get(run.family) is not run, *kind.order(run)))


def _line(kind: PaperTable, columns: tuple[str, ...], run: Run, baseline: Run | None, name_family: bool) -> Line:
    mean = average(run.scores) if kind.averaged else None
    headings = (run.family if name_family else "", kind.section(run))
    return Line(
        kind.label(run),
        run.name,
        run.family,
        section=": ".join(filter(None, headings)),
        scores={column: run.scores[column] for column in columns if column in run.scores},
        partial={column: run.partial[column] for column in columns if column in run.partial},
        average=mean,
        relative=relative(mean, average(baseline.scores)) if baseline else None,
        baseline=run is baseline,
    )


def _tell_apart(lines: list[Line]) -> None:
    """Add the run's name to labels that occur twice in a section."""
    seen = [(line.section, line.label) for line in lines]
    for line, key in zip(lines, seen, strict=True):
        if seen.count(key) > 1:
            line.label = f"{line.label} ({line.run})"


def _notes(table: Table, baselines: dict[str, Run], runs: dict[str, Run]) -> list[str]:
    """What a reader has to know: the baselines, what bold means, what each incomplete row lacks, and what may have lowered a score."""
    notes = []
    for family in dict.fromkeys(line.family for line in table.lines) if table.averaged else ():
        notes.append(_baseline_note(family, baselines.get(family)))
    if table.averaged and set(table.columns) & set(TEXT):
        notes.append("Avg is over the eight visual tasks")
    if mark_best(table):
        notes.append("bold: the best of a column among complete scores, baselines aside")
    for line in table.lines:
        if missing := missing_text(table, line):
            average_too = ", not averaged" if table.averaged else ""
            notes.append(f"{line.label} is incomplete{average_too}: {missing}")
        flaws = runs[line.run].flaws if line.run else {}
        notes += [f"{line.label}, {TITLES[task]}: {flaw}" for task, flaw in flaws.items() if task in table.columns]
    return notes


def _baseline_note(family: str, baseline: Run | None) -> str:
    if baseline is None:
        return f"{family} has no baseline: name one with --baseline"
    if average(baseline.scores) is None:
        return f"the baseline of {family}, {baseline.name}, is incomplete, so there are no percentages"
    return f"percentages of {family} refer to {baseline.name}"


def _add_paper(table: Table, rows: tuple[paper.Row, ...]) -> None:
    """Append the paper's rows, and say where its averages do not follow from its own rows."""
    for row in rows:
        section = f"The paper's numbers: {row.section or paper.BUNNY}"
        scores = dict(zip(table.columns, row.scores, strict=True))
        table.lines.append(Line(row.label, None, section, section, scores, average=row.average, relative=row.percent, paper=True))
        mean = sum(row.scores) / len(row.scores)
        if row.average is not None and abs(mean - row.average) > 0.01:  # more than rounding of the scores can explain
            table.notes.append(f"the paper prints an average of {row.average:.2f} for {row.label}; its row gives {rounded(mean)}")
    table.notes.append("rows under The paper's numbers are as printed in Wang et al. (ACL 2025), not measured here")


def write_tables(tables: dict[int, Table], out: Path, form: str) -> list[Path]:
    """Write tables into a folder: `table1.md`, `.csv`, `.tex`... (`runs.md` for table 0).

    Args:
        tables: number -> table.
        form: `markdown`, `csv`, `latex`, or `all` for every one of them.

    Raises:
        LlavaRegionError: unknown form, or the folder is not writable.
    """
    written = []
    for number, table in tables.items():
        for one in formats_of(form):
            written.append(out / f"{TABLES[number].file_name}.{one.suffix}")
            files.write_text(written[-1], one.render(table))
    return written
