"""The paper's tables for one's own runs: per task, average over the eight visual tasks, percent of the all-layers run.

Tables 1 to 4 differ in how rows are named and ordered and in their tasks; table 0 has one row a run, with every task.
"""

from __future__ import annotations

from pathlib import Path

from llava_region import files as atomic
from llava_region import tasks
from llava_region.errors import LlavaRegionError
from llava_region.region import Region
from llava_region.report import paper
from llava_region.report.formats import TITLES, WRITERS, Line, Table, mark_best, missing_text, rounded
from llava_region.report.runs import Run

TEXT = ("mmlu", "bbh")
CAPTIONS = {
    0: "All runs",
    1: "Table 1: layer selection methods",
    2: "Table 2: numbers of layers",
    3: "Table 3: numbers of layers, several models",
    4: "Table 4: text-only tasks",
}
# Strategies of `--tune_layers` in Table 1's order, and the metrics of `llava-region score`.
STRATEGIES = {
    "sparse": "Sparse & Uniform",
    "lower": "Consecutive Lower",
    "lower-middle": "Consecutive Lower-middle",
    "upper-middle": "Consecutive Upper-middle",
    "top": "Consecutive Top",
    "hybrid": "Hybrid Top-Lower",
}
METRICS = {
    "image_attention": "Image Attention Score",
    "parameter_change": "Parameter Change Ratio",
    "block_influence": "Block Influence Score",
    "multimodal_block_influence": "Multimodal BI Score",
    "angular_distance": "Angular Distance",
    "angular_distance_weights": "Angular Distance (weights)",
}
OTHER = "Other selections"


def average(scores: dict[str, float], columns=tasks.VISUAL) -> float | None:
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
        names: runs that the user named, by name or folder, one a family. A family without one takes its only unpruned
            run that tuned all layers on all the data; where there is none or several, it has no baseline.

    Raises:
        LlavaRegionError: a name is no run, or two are of the same family.
    """
    found: dict[str, Run] = {}
    for name in names:
        run = next((r for r in runs if name == r.name or Path(name).resolve() == r.folder.resolve()), None)
        if run is None:
            raise LlavaRegionError(f"the baseline '{name}' is no run; allowed: {', '.join(r.name for r in runs)}")
        if run.family in found:
            raise LlavaRegionError(f"'{found[run.family].name}' and '{name}' are both of {run.family}; give one baseline a model")
        found[run.family] = run
    for family in {run.family for run in runs} - set(found):
        full = [r for r in runs if r.family == family and r.is_full and not r.pruned and not r.reverted and r.data_scale == 100]
        if len(full) == 1:
            found[family] = full[0]
    return found


def build_table(number: int, runs: list[Run], baselines: dict[str, Run], with_paper: bool = False) -> Table:
    """One of the paper's tables (1 to 4), or the plain one (0), for these runs.

    Args:
        baselines: as `find_baselines` gives them.
        with_paper: append the paper's rows, under headings that say so.
    """
    if 1 <= number <= 3:  # plain language models answer no visual task
        runs = [run for run in runs if run.layers is not None or any(task in run.scores for task in tasks.VISUAL)]
    several = len({run.family for run in runs}) > 1 or with_paper
    columns = TEXT if number == 4 else tasks.VISUAL if number else tuple(t for t in tasks.NAMES if t in tasks.VISUAL or _any_has(runs, t))
    lines = []
    for run in _ordered(number, runs, baselines):
        base = baselines.get(run.family)
        mean = average(run.scores) if number != 4 else None
        section = _strategy(run)[0] if number == 1 else ""
        line = Line(
            _label(number, run), run.name, run.family, ": ".join(filter(None, [run.family if several else "", section])),
            scores={c: run.scores[c] for c in columns if c in run.scores},
            partial={c: run.partial[c] for c in columns if c in run.partial},
            average=mean, relative=relative(mean, average(base.scores)) if base else None, baseline=run is base,
        )  # fmt: skip
        lines.append(line)
    _tell_apart(lines)
    table = Table(CAPTIONS[number], columns, lines, averaged=number != 4)
    table.notes = _notes(table, baselines, {run.name: run for run in runs})
    if with_paper and number:
        _add_paper(table, number)
    return table


def _any_has(runs: list[Run], task: str) -> bool:
    return any(task in run.scores or task in run.partial for run in runs)


def _ordered(number: int, runs: list[Run], baselines: dict[str, Run]) -> list[Run]:
    """Family by family, the baseline first, then as the paper orders the table; table 0 keeps the order given within a family."""
    families = list(dict.fromkeys(run.family for run in runs))
    names = list(STRATEGIES.values()) + list(METRICS.values())

    def key(run: Run):
        head = (families.index(run.family), baselines.get(run.family) is not run)
        if number == 0:
            return head
        section, label = _strategy(run)
        place = [paper.HEURISTIC, paper.IMPORTANCE, OTHER].index(section) if section else -1
        strategy = (place, names.index(label) if label in names else len(names)) if number == 1 else ()
        return (*head, run.layers is None, *strategy, -len(run.layers or ()), run.pruned, -run.data_scale)

    return sorted(runs, key=key)


def _strategy(run: Run) -> tuple[str, str]:
    """(section, label) of Table 1: by the metric that the layers were chosen by, else by the strategy that gives these layers."""
    if run.is_full:
        return "", "All layers"
    if run.layers is None:
        return OTHER, run.name
    if run.metric is not None:
        return paper.IMPORTANCE, METRICS.get(run.metric, run.metric.replace("_", " "))
    for name, label in STRATEGIES.items():
        if _same_layers(run, name):
            return paper.HEURISTIC, label
    for label, layers in paper.IMPORTANCE_SETS.items():
        if run.num_layers == 32 and run.layers == layers:
            return paper.IMPORTANCE, f"{label} (the paper's layers)"
    return OTHER, f"layers {','.join(map(str, run.layers))}"


def _same_layers(run: Run, strategy: str) -> bool:
    try:
        return Region.parse(f"{strategy}:{len(run.layers)}", run.num_layers).layers == run.layers
    except LlavaRegionError:
        return False  # so many layers do not fit from where this strategy starts


def _label(number: int, run: Run) -> str:
    count = "" if run.layers is None else f"{len(run.layers)} layer{'s' * (len(run.layers) != 1)}"
    if number == 0:
        label = run.name
    elif number == 1:
        label = _strategy(run)[1]
    elif number == 4:
        label = "LLM backbone" if run.layers is None else f"{'Fully' if run.is_full else 'Partial'}-trained ({count})"
    else:
        label = count or run.name
    label += f", {run.pruned} pruned" * (run.pruned > 0 and number > 0)
    label += f", {run.reverted} reverted" * (run.reverted > 0 and number > 0)
    return label + f", {run.data_scale:g}% of the data" * (run.data_scale < 100 and number > 0)


def _tell_apart(lines: list[Line]) -> None:
    """Add the run's name to labels that stand twice in a section."""
    seen = [(line.section, line.label) for line in lines]
    for line, key in zip(lines, seen, strict=True):
        if seen.count(key) > 1:
            line.label = f"{line.label} ({line.run})"


def _notes(table: Table, baselines: dict[str, Run], runs: dict[str, Run]) -> list[str]:
    """What a reader has to know: the baselines, what bold means, and what each incomplete row lacks."""
    notes = []
    for family in dict.fromkeys(line.family for line in table.lines):
        base = baselines.get(family)
        if table.averaged and base is None:
            notes.append(f"{family} has no baseline: name one with --baseline")
        elif table.averaged and average(base.scores) is None:
            notes.append(f"the baseline of {family}, {base.name}, is incomplete, so there are no percentages")
        elif table.averaged:
            notes.append(f"percentages of {family} refer to {base.name}")
    if table.averaged and set(table.columns) & set(TEXT):
        notes.append("Avg is over the eight visual tasks")
    if mark_best(table):
        notes.append("bold: the best of a column among complete scores, baselines aside")
    for line in table.lines:
        if missing := missing_text(table, line):
            average_too = ", not averaged" if table.averaged else ""
            notes.append(f"{line.label} is incomplete{average_too}: {missing}")
        for task, flaw in runs[line.run].flaws.items():
            if task in table.columns:
                notes.append(f"{line.label}, {TITLES[task]}: {flaw}")
    return notes


def _add_paper(table: Table, number: int) -> None:
    """Append the paper's rows, and say where its averages do not follow from its own rows."""
    for row in paper.TABLES[number]:
        scores = dict(zip(table.columns, row.scores, strict=True))
        section = f"The paper's numbers: {row.section}" if row.section else f"The paper's numbers: {paper.BUNNY}"
        table.lines.append(
            Line(row.label, None, section, section, scores, average=row.average, relative=row.percent, paper=True)
        )  # fmt: skip
        mean = sum(row.scores) / len(row.scores)
        if row.average is not None and abs(mean - row.average) > 0.01:  # more than rounding of the scores can explain
            table.notes.append(f"the paper prints an average of {row.average:.2f} for {row.label}; its row gives {rounded(mean)}")
    table.notes.append("rows under The paper's numbers are as printed in Wang et al. (ACL 2025), not measured here")


def render(table: Table, form: str) -> str:
    """The table as `markdown`, `csv` or `latex`.

    Raises:
        LlavaRegionError: another form.
    """
    if form not in WRITERS:
        raise LlavaRegionError(f"unknown format '{form}'; allowed: {', '.join(WRITERS)}, all")
    return WRITERS[form][0](table)


def write_tables(tables: dict[int, Table], out: Path, form: str) -> list[Path]:
    """Write `table1.md`, `.csv`, `.tex`... (`runs.md` for table 0) into a folder; `all` stands for every form.

    Raises:
        LlavaRegionError: unknown form, or the folder is not writable.
    """
    written = []
    for number, table in tables.items():
        for name in WRITERS if form == "all" else [form]:
            text = render(table, name)
            written.append(out / f"{f'table{number}' if number else 'runs'}.{WRITERS[name][1]}")
            atomic.write_text(written[-1], text)
    return written
