"""`llava-region report`: what is printed and written, and what is refused in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llava_region import locks
from tests.helpers.command_line import refused, run
from tests.helpers.hostile_files import with_wrong_values


def test_command_prints_markdown_and_json(table_2: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = run(capsys, "report", *table_2, "--baseline", "bunny-32", "--table", 2)
    assert code == 0 and "| 16 layers |" in text and "98.97" in text
    code, text, _ = run(capsys, "report", *table_2, "--table", 2, "--table", 1, "--json")
    data = json.loads(text)
    assert set(data["tables"]) == {"1", "2"} and data["files"] == []
    assert data["tables"]["2"]["lines"][1]["relative"] == pytest.approx(100 * 62.8575 / 63.51125)
    code, text, error = run(capsys, "report", *table_2, "--paper")
    assert code == 0 and "bunny-32" in text and "go with --table" in error  # all tasks, run by run


def test_command_writes_every_form(scaled: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report"
    code, text, error = run(capsys, "report", *scaled, "--table", 2, "--figure", 2, "--figure", 3, "--paper", "--out", out)
    names = {"table2.md", "table2.csv", "table2.tex", "figure2.png", "figure2.svg", "figure3.png", "figure3.svg"}
    assert code == 0 and {path.name for path in out.iterdir()} == names and len(text.splitlines()) == len(names)
    assert error == "figure 3: the paper's text gives no numbers for it\n"
    code, text, _ = run(capsys, "report", *scaled, "--table", 4, "--format", "csv", "--out", tmp_path / "csv")
    assert [path.name for path in (tmp_path / "csv").iterdir()] == ["table4.csv"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--baseline", "none"], "the baseline 'none' is not a run"),
        (["--table", "5"], "--table"),
        (["--figure", "6"], "--figure"),
        (["--figure", "2"], "--out DIR"),
        (["--format", "html"], "unknown format 'html'; allowed: markdown, csv, latex, all"),
        (["--format", "all"], "--out DIR"),
        (["--cost", "bunny-8"], "has no '='"),
        (["--cost", "x=cost.json"], "--cost names 'x'"),
        (["--cost", "bunny-8=/nowhere/cost.json"], "cannot read"),
        (["--figure", "4", "--out", "OUT"], "figure 4 needs runs with layers pruned"),
        (["--figure", "1", "--out", "OUT"], "figure 1 needs files of 'llava-region perplexity'"),
        (["--figure", "5", "--out", "OUT"], "figure 5 needs a scores file"),
        (["--scores", "scores.json"], "--scores is for Figure 5; give --figure 5"),
        (["--perplexity", "p.json", "--figure", "2", "--out", "OUT"], "--perplexity is for Figure 1; give --figure 1"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    table_2: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    before = sorted(tmp_path.iterdir())
    code, text, error = run(capsys, "report", *table_2, *[str(tmp_path / "out") if a == "OUT" else a for a in argv])
    assert code == 2 and text == "" and message in error and error.count("\n") == 1 and error.startswith("error: ")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "has no 'tasks'"),
        ('{"model": "m", "tasks": {"vqa": {"score": 1, "n": 1}}}', "unknown task 'vqa'"),
        ('{"model": "m", "tasks": {"gqa": {"score": 140, "n": 1}}}', "the score of gqa in"),
        ('{"model": "m", "tasks": {"gqa": {"n": 1}}}', "is None; allowed: 0 to 100"),
        ('{"model": "m", "tasks": {"gqa": 3}}', "the score of gqa in"),
        ('{"model": "m", "tasks": {}, "region": {"layers": [1]}}', "names no 'layers' or 'num_layers'"),
    ],
)
def test_malformed_results_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str) -> None:
    (tmp_path / "results.json").write_text(content)
    code, _, error = run(capsys, "report", tmp_path)
    assert code == 2 and message in error and error.count("\n") == 1


def test_a_folder_without_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = run(capsys, "report", tmp_path)
    assert code == 2 and "holds no results.json; give the --out folder of 'llava-region eval'" in error


def test_tables_need_neither_torch_nor_matplotlib(table_2: list[Path]) -> None:
    code = "import sys; from llava_region.cli import main; main(sys.argv[1:]); print(sorted({'torch', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code, "report", *map(str, table_2)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_report_in_use_is_refused(
    table_2: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with locks.held(tmp_path / "out"):
        with monkeypatch.context() as patch:
            patch.setattr(locks, "_held", {})
            assert "in use: process " in refused(capsys, "report", *table_2, "--table", 2, "--out", tmp_path / "out")
        assert not (tmp_path / "out").exists()
    assert run(capsys, "report", *table_2, "--table", 2, "--out", tmp_path / "out").code == 0


def test_values_of_wrong_kinds_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a field holds, `report` shows a table or says what is wrong; what eval and training write stays readable."""
    monkeypatch.chdir(tmp_path)
    sys.stdout.reconfigure(errors="backslashreplace")  # as the command does where it has a process of its own
    model, results, cost = tmp_path / "model", tmp_path / "run" / "results.json", tmp_path / "model" / "cost.json"
    for folder in (model, results.parent):
        folder.mkdir()
    entry = {"metric": "accuracy", "score": 50.0, "n": 100, "missing": 0, "unreadable_images": 0, "cut_prompts": 1, "limit": None}
    cut = {"original_layers": [1, 6], "original_num_layers": 8, "dropped": [2]}
    region = {"layers": [1, 5], "num_layers": 7, "base_model": "m", "pruned": cut, "reverted": {"layers": [0]}, "scores": {"metric": "x"}}
    whole = {"model": str(model), "base": None, "upstream": "llava", "num_layers": 8, "region": region, "tasks": {"gqa": entry}}
    paid = {"gpu_hours": 1.5, "samples": 100.0, "gpus": 8, "device": "gpu"}
    (model / "region.json").write_text(json.dumps(region))

    def refused_in(what: str, data: dict, file: Path) -> int:
        file.write_text(json.dumps(data))
        code, out, error = run(capsys, "report", results.parent, "--table", "1", "--table", "4")
        assert (code == 2 and error.count("\n") == 1 and out == "") or code == 0, f"{what}: {error}"
        return code

    assert refused_in("as written", whole, results) == 0 and refused_in("as written", paid, cost) == 0
    codes = [refused_in(f"cost {name}", data, cost) for name, data in with_wrong_values(paid).items()]
    assert refused_in("as written", paid, cost) == 0
    codes += [refused_in(f"results {name}", data, results) for name, data in with_wrong_values(whole).items()]
    for name, data in with_wrong_values(entry).items():
        codes.append(refused_in(f"entry {name}", {**whole, "tasks": {"gqa": data}}, results))
    for name, data in with_wrong_values(region).items():
        codes.append(refused_in(f"region {name}", {**whole, "region": data}, results))
    for name, data in with_wrong_values(cut).items():
        codes.append(refused_in(f"pruned {name}", {**whole, "region": {**region, "pruned": data}}, results))
    assert codes.count(2) > 150 and codes.count(0) > 20


def test_a_figure_without_runs_keeps_the_tables(table_2: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    code, text, error = run(capsys, "report", *table_2, "--table", 2, "--figure", 4, "--figure", 2, "--out", out)
    assert code == 2 and error.startswith("error: figure 4 needs runs with layers pruned") and error.count("\n") == 1
    assert {path.name for path in out.iterdir()} == {"table2.md", "table2.csv", "table2.tex", "figure2.png", "figure2.svg"}
    assert str(out / "table2.md") in text
    line = refused(capsys, "report", *table_2, "--figure", 4, "--out", tmp_path / "none")  # nothing is left to write
    assert "figure 4 needs runs" in line and not (tmp_path / "none").exists()


def test_a_table_needs_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no run is given" in refused(capsys, "report")
    assert "no run is given" in refused(capsys, "report", "--table", 2, "--figure", 5, "--out", tmp_path / "out")
