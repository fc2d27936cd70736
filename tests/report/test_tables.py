"""The paper's tables: its own numbers as known results, baselines, labels, order, and what is incomplete."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest

from llava_region import tasks
from llava_region.errors import LlavaRegionError
from llava_region.region import Region
from llava_region.report import paper_numbers as paper
from llava_region.report.formats import cells, comma_separated, heads, mark_best, rounded
from llava_region.report.runs import read_runs
from llava_region.report.selections import METRICS
from llava_region.report.tables import TABLES, build_table, find_baselines, relative
from tests.helpers.report_runs import LLAMA, SPECS, VICUNA, VICUNA_13B, WHOLE, evaluated, printed, region_of, table_of, without

# Printed averages that do not follow from the printed row: what the row gives.
NOT_FROM_THE_ROW = {"Sparse & Uniform": "62.87", "Consecutive Top": "59.33", "8 layers": "62.87", "6 layers": "62.77"}
# 57.68 or 57.69: within what rounding of the eight scores can do.
ROUNDING = {(paper.LLAVA_7B, "6 layers"): "57.68"}


def test_table_1_of_the_paper_reproduces(tmp_path: Path) -> None:
    metrics = [
        {"scores": {"file": "s.json", "metric": metric}} for metric in METRICS if metric != "angular_distance_weights"
    ]  # the five of Table 1, in its order
    regions = [region_of("all"), *map(region_of, SPECS)]
    regions += [region_of(",".join(map(str, layers)), **more) for layers, more in zip(paper.IMPORTANCE_SETS.values(), metrics, strict=True)]
    folders = [
        evaluated(tmp_path, f"run{i}", dict(zip(tasks.VISUAL, row.scores, strict=True)), region)
        for i, (row, region) in enumerate(zip(paper.TABLE_1, regions, strict=True))
    ]
    table = table_of(1, folders[::-1], "run0")  # the order given does not matter
    assert [(line.section, line.label) for line in table.lines] == [(row.section, row.label) for row in paper.TABLE_1]
    for line, row in zip(table.lines, paper.TABLE_1, strict=True):
        assert rounded(line.average) == NOT_FROM_THE_ROW.get(row.label, f"{row.average:.2f}")
    assert rounded(table.lines[5].average) == "59.33" and paper.TABLE_1[5].average == 58.08
    best = {(table.lines[i].label, column) for i, column in mark_best(table)}
    assert best == {
        ("Parameter Change Ratio", "ocrvqa"), ("Hybrid Top-Lower", "docvqa"), ("Sparse & Uniform", "refcocog"),
        ("Image Attention Score", "tdiuc"), ("Sparse & Uniform", "mmbench"), ("Angular Distance", "mmbench"),
        ("Sparse & Uniform", "gqa"), ("Consecutive Upper-middle", "scienceqa"), ("Angular Distance", "textvqa"),
        ("Sparse & Uniform", "average"),
    }  # fmt: skip


@pytest.mark.parametrize("number", [2, 3])
def test_tables_2_and_3_of_the_paper_reproduce(tmp_path: Path, number: int) -> None:
    families = {paper.BUNNY: (32, LLAMA), paper.LLAVA_7B: (32, VICUNA), paper.LLAVA_13B: (40, VICUNA_13B)}
    folders = []
    for family, (num_layers, base) in families.items():
        rows = [row for row in TABLES[number].paper_rows if row.section == family]
        folders += printed(tmp_path, rows[::-1], num_layers, base, family)
    table = table_of(number, folders)
    assert [line.label for line in table.lines] == [row.label for row in TABLES[number].paper_rows]
    full = None
    for line, row in zip(table.lines, TABLES[number].paper_rows, strict=True):
        exception = ROUNDING.get((row.section, row.label)) or (NOT_FROM_THE_ROW.get(row.label) if number == 2 else None)
        assert rounded(line.average) == (exception or f"{row.average:.2f}")
        if row.percent is None:
            full, base_average = row, line.average
            assert line.baseline and line.relative == 100
            continue
        # The paper divided averages: its printed ones give its percentages to the last digit but one of rounding.
        assert relative(row.average, full.average) == pytest.approx(row.percent, abs=0.0101)
        assert line.relative == pytest.approx(100 * line.average / base_average)
        assert line.relative == pytest.approx(row.percent, abs=0.0101 if not exception and row.label != "9 layers" else 0.026)


def test_the_papers_tables_are_whole() -> None:
    assert [len(table.paper_rows) for table in TABLES.values()] == [0, 12, 7, 10, 6]
    for number in (1, 2, 3, 4):
        assert {len(row.scores) for row in TABLES[number].paper_rows} == {2 if number == 4 else 8}
    assert paper.TABLE_1[0].scores == paper.TABLE_2[0].scores and paper.TABLE_1[1].scores == paper.TABLE_2[2].scores


def test_the_papers_rows_are_marked_and_never_best(table_2: list[Path]) -> None:
    table = table_of(2, table_2, with_paper=True)
    own, theirs = table.lines[:7], table.lines[7:]
    assert not any(line.paper for line in own) and all(line.paper and line.section.startswith("The paper's numbers") for line in theirs)
    assert [line.average for line in theirs] == [row.average for row in paper.TABLE_2]
    assert {i for i, _ in mark_best(table)} <= set(range(1, 7))
    assert "the paper prints an average of 62.78 for 6 layers; its row gives 62.77" in table.notes
    assert "not measured here" in table.notes[-1]
    assert any("58.08 for Consecutive Top; its row gives 59.33" in note for note in table_of(1, table_2, with_paper=True).notes)


@pytest.mark.parametrize(
    ("scores", "results", "cell", "note"),
    [
        (without("gqa"), {}, "-", "GQA not evaluated"),
        (WHOLE, {"gqa": {"score": 99.5, "n": 50, "missing": 0, "limit": 50}}, "(99.50)", "GQA limited to the first 50"),
        (WHOLE, {"gqa": {"score": 99.5, "n": 12578, "missing": 1200}}, "(99.50)", "GQA 1,200 answers missing"),
    ],
)
def test_an_incomplete_run_is_shown_as_such_and_never_averaged(
    tmp_path: Path, scores: dict[str, float], results: dict[str, Any], cell: str, note: str
) -> None:
    folders = [
        evaluated(tmp_path, "full", WHOLE, region_of("all")),
        evaluated(tmp_path, "whole-8", WHOLE, region_of("sparse:8")),
        evaluated(tmp_path, "whole-6", WHOLE, region_of("sparse:6")),
        evaluated(tmp_path, "part", scores, region_of("sparse:4"), results=results),
    ]
    table = table_of(2, folders)
    line = table.lines[-1]
    assert (line.label, line.average, line.relative) == ("4 layers", None, None)
    shown = cells(table, 3, str)
    assert shown[tasks.VISUAL.index("gqa")] == cell and shown[-2:] == ["incomplete", "-"]
    assert f"4 layers is incomplete, not averaged: {note}" in table.notes
    assert (3, "gqa") not in mark_best(table) and (1, "gqa") in mark_best(table)
    row = list(csv.DictReader(io.StringIO(comma_separated(table))))[-1]
    assert (row["gqa"], row["average"], row["percent_of_baseline"], row["incomplete"]) == ("", "", "", note)


def test_an_incomplete_baseline_gives_no_percentages(tmp_path: Path) -> None:
    folders = [evaluated(tmp_path, "full", without("gqa"), region_of("all")), evaluated(tmp_path, "8", WHOLE, region_of("sparse:8"))]
    table = table_of(2, folders)
    assert [line.relative for line in table.lines] == [None, None] and table.lines[1].average is not None
    assert any("full, is incomplete, so there are no percentages" in note for note in table.notes)


def test_flaws_of_complete_scores_are_noted(tmp_path: Path) -> None:
    flawed = {"gqa": {"score": 60.0, "n": 12578, "missing": 0, "unreadable_images": 3, "cut_prompts": 2}}
    table = table_of(2, [evaluated(tmp_path, "a", WHOLE, region_of("all"), results=flawed)])
    assert "32 layers, GQA: 3 unreadable images and 2 prompts cut" in table.notes and table.lines[0].average is not None


def test_baselines(tmp_path: Path) -> None:
    runs = read_runs(
        [
            evaluated(tmp_path, "all", WHOLE, region_of("all")),
            evaluated(tmp_path, "8", WHOLE, region_of("sparse:8")),
            evaluated(tmp_path, "all-pruned", WHOLE, region_of("0-29", 30, pruned={"original_layers": list(range(32)),
                      "original_num_layers": 32, "dropped": [28, 29]})),
            evaluated(tmp_path, "13b-10", WHOLE, region_of("sparse:10", 40, VICUNA_13B)),
        ]
    )  # fmt: skip
    found = find_baselines(runs, [])
    assert {family: run.name for family, run in found.items()} == {"Meta-Llama-3-8B-Instruct": "all"}
    assert find_baselines(runs, ["8"])["Meta-Llama-3-8B-Instruct"].name == "8"
    assert find_baselines(runs, [str(tmp_path / "8")])["Meta-Llama-3-8B-Instruct"].name == "8"
    with pytest.raises(LlavaRegionError, match="'none' is not a run; allowed: all, 8, all-pruned, 13b-10"):
        find_baselines(runs, ["none"])
    with pytest.raises(LlavaRegionError, match="one baseline per model"):
        find_baselines(runs, ["8", "all"])
    notes = build_table(TABLES[2], runs, found).notes
    assert "vicuna-13b-v1.5 has no baseline: name one with --baseline" in notes


def test_the_baseline_is_not_a_run_on_less_data(scaled: list[Path]) -> None:
    (base,) = find_baselines(read_runs(scaled), []).values()
    assert base.name == "32-100"


def test_percentages_are_of_the_named_baseline(tmp_path: Path) -> None:
    half = {task: score / 2 for task, score in WHOLE.items()}
    folders = [evaluated(tmp_path, "all", WHOLE, region_of("all")), evaluated(tmp_path, "half", half, region_of("sparse:8"))]
    assert [line.relative for line in table_of(2, folders, "half").lines] == [pytest.approx(100), pytest.approx(200)]


def test_labels(tmp_path: Path) -> None:
    pruned = {"original_layers": Region.parse("sparse:8", 32).to_dict()["layers"], "original_num_layers": 32, "dropped": [25, 27, 29]}
    regions = {
        "a": region_of("0,4,8,12,18,22,26,30"),  # what sparse:8 means, written out
        "b": region_of("1,2,3,4,5,27,29,31"),
        "c": region_of("1,2,9"),
        "d": region_of("0,4,8,12,18,22,24,27", 29, pruned=pruned),
        "e": region_of("top:8", reverted={"layers": [24, 25]}),
        "f": region_of("16-23"),
        "g": region_of("16-23"),
        "h": region_of("30"),
    }
    folders = [evaluated(tmp_path, name, WHOLE, region) for name, region in regions.items()]
    labels = {line.run: line.label for line in table_of(1, folders).lines}
    assert labels == {
        "a": "Sparse & Uniform",
        "b": "Image Attention Score (the paper's layers)",
        "c": "layers 1,2,9",
        "d": "Sparse & Uniform, 3 pruned",
        "e": "Consecutive Top, 2 reverted",
        "f": "Consecutive Upper-middle (f)",
        "g": "Consecutive Upper-middle (g)",
        "h": "layers 30",
    }
    labels = {line.run: line.label for line in table_of(3, folders).lines}
    assert labels["h"] == "1 layer" and labels["c"] == "3 layers" and labels["d"] == "8 layers, 3 pruned"


def test_table_4_has_the_backbone_next_to_its_models(tmp_path: Path) -> None:
    text = {"mmlu": 50.52, "bbh": 26.85}
    folders = [
        evaluated(tmp_path, "vicuna-7b-v1.5", {"mmlu": 49.78, "bbh": 29.33}, None, upstream=None),
        evaluated(tmp_path, "8", {"mmlu": 50.74, "bbh": 31.64}, region_of("sparse:8", base=VICUNA)),
        evaluated(tmp_path, "all", {**text, "gqa": 1.0}, region_of("all", base=VICUNA)),
        evaluated(tmp_path, "released", text, None, upstream="llava"),  # upstream's own: no region.json, all layers
    ]
    table = table_of(4, folders, "all")
    assert [line.label for line in table.lines] == [
        "Fully-trained (32 layers) (all)", "Fully-trained (32 layers) (released)", "Partial-trained (8 layers)", "LLM backbone",
    ]  # fmt: skip
    assert len({line.family for line in table.lines}) == 1 and not table.averaged
    assert heads(table) == ["MMLU", "BIG-bench-Hard"]
    assert not any("incomplete" in note for note in table.notes)
    assert "vicuna-7b-v1.5" not in {line.run for line in table_of(2, folders).lines}  # it answers no visual task
