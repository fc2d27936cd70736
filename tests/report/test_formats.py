"""A table as Markdown, CSV and LaTeX: rounding, what is bold, what is escaped."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

import pytest

from llava_region import tasks
from llava_region.report.formats import comma_separated, latex, mark_best, markdown, rounded
from tests.helpers.report_runs import VICUNA_13B, WHOLE, evaluated, region_of, table_of


def test_rounding_is_half_up() -> None:
    assert [rounded(x) for x in (62.8575, 50.2925, 0.005, 100, 59.325)] == ["62.86", "50.29", "0.01", "100.00", "59.33"]


def test_best_is_within_a_family_and_among_several(tmp_path: Path) -> None:
    worse = {task: score - 1 for task, score in WHOLE.items()}
    regions = [region_of("all", 40, VICUNA_13B), region_of("sparse:10", 40, VICUNA_13B), region_of("sparse:9", 40, VICUNA_13B)]
    regions += [region_of("all"), region_of("sparse:8")]
    scores = [WHOLE, WHOLE, worse, worse, worse]
    table = table_of(3, [evaluated(tmp_path, f"r{i}", *pair) for i, pair in enumerate(zip(scores, regions, strict=True))])
    assert mark_best(table) == {(1, column) for column in (*tasks.VISUAL, "average")}  # a lone candidate is not best
    regions = [region_of("sparse:6"), region_of("sparse:4")]
    more = [evaluated(tmp_path, f"more{i}", {**worse, "gqa": 10 + i}, region) for i, region in enumerate(regions)]
    table = table_of(3, [*(tmp_path / f"r{i}" for i in range(5)), *more])
    assert {i for i, column in mark_best(table) if column == "gqa"} == {1, 4}


def test_markdown_and_latex_hold_the_same_cells(table_2: list[Path]) -> None:
    table = table_of(2, table_2, "bunny-32")
    rows = [line for line in markdown(table).splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1
    assert rows[4] == "| 8 layers | **62.65** | 29.51 | 48.33 | 83.68 | 73.88 | 63.68 | 78.78 | 62.43 | **62.87** | 98.99 |"
    text = latex(table)
    row = next(line for line in text.splitlines() if line.startswith("8 layers"))
    assert row == r"8 layers & \textbf{62.65} & 29.51 & 48.33 & 83.68 & 73.88 & 63.68 & 78.78 & 62.43 & \textbf{62.87} & 98.99 \\"
    assert {line.count("&") for line in text.splitlines() if "&" in line} == {10}
    assert text.count("{") == text.count("}")


def test_latex_escapes_names(tmp_path: Path) -> None:
    text = latex(table_of(0, [evaluated(tmp_path, "run_8&50%", WHOLE, region_of("all"))]))
    assert r"run\_8\&50\% & 64.26" in text and not re.search(r"(?<!\\)%(?! needs)", text)


def test_csv_is_unrounded_and_says_whose_numbers(table_2: list[Path]) -> None:
    rows = list(csv.DictReader(io.StringIO(comma_separated(table_of(2, table_2, with_paper=True)))))
    assert [row["source"] for row in rows] == ["own"] * 7 + ["paper"] * 7
    assert float(rows[2]["average"]) == pytest.approx(62.8675, abs=1e-9) and rows[2]["run"] == "bunny-8" and rows[0]["baseline"] == "1"
