"""`make gpu`: each part is reported, whatever becomes of it; what it prints is read from the benchmarks' own output."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.benchmarks.test_limits import script
from tests.helpers.command_line import refused

gpu = script("gpu")


def rows(found: Any) -> Iterator[tuple[Any, ...]]:
    yield "name", "value"
    yield from found.items()


def part(code: str, minutes: float = 1, needs: tuple[str, ...] = (), **environment: str) -> Any:
    return gpu.Part("part", ["-c", code], minutes, rows, needs, environment)


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        (part("print('noise'); print('{\"a\": 1}')"), {"printed": {"a": 1}}),
        (part("import os, json; print(json.dumps({'a': os.environ['A']}))", A="b"), {"printed": {"a": "b"}}),
        (part("", needs=("json", "no_such_module")), {"not_run": "no_such_module not installed"}),
        (part("import time; time.sleep(60)", minutes=0.02), {"not_run": "stopped after 0.02 minutes"}),
        (part("raise SystemExit('error: full')"), {"not_run": "exit status 1: error: full"}),
        (part("print('{')"), {"not_run": "exit status 0: {"}),
    ],
    ids=["prints", "environment", "missing", "too long", "fails", "half"],
)
def test_what_becomes_of_a_part(asked, found, tmp_path):
    assert {name: value for name, value in gpu.run_part(asked, tmp_path).items() if name != "seconds"} == found


def test_tests_by_how_they_ended(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 0\n@pytest.mark.skip('no GPU')\ndef test_c(): pass\n"
        "@pytest.fixture\ndef broken(): 1 / 0\ndef test_d(broken): pass\n"
    )
    tests = gpu.Part("tests", ["-m", "pytest", str(tmp_path), f"--junitxml={tmp_path / 'tests.xml'}"], 1, gpu.test_rows)
    found = gpu.run_part(tests, tmp_path)["printed"]
    assert found == {
        "passed": ["test_it::test_a"],
        "failed": ["test_it::test_b", "test_it::test_d"],
        "skipped": {"test_it::test_c": "no GPU"},
    }
    assert list(gpu.test_rows(found))[1:] == [
        ("test_it::test_b", "failed"), ("test_it::test_d", "failed"), ("test_it::test_c", "skipped: no GPU"), ("1 tests", "passed")
    ]  # fmt: skip


def test_the_report_is_written_after_each_part(tmp_path, monkeypatch, capsys):
    out = tmp_path / "report"
    read = f"json.loads(pathlib.Path({str(out)!r} + '.json').read_text())['parts']"
    seen = f"import json, pathlib; print(json.dumps({{'before': sorted({read})}}))"
    first = gpu.Part("tests", ["-c", "print('{}')"], 1, rows, ("no_such_module",))
    last = gpu.Part("last | one", ["-c", seen, f"--junitxml={tmp_path}"], 1, rows)
    monkeypatch.setattr(gpu, "parts", lambda shape, folder: [first, last])
    assert gpu.main(["--shape", "tiny", "--out", str(out)]) == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["parts"]["last | one"]["printed"] == {"before": ["tests"]} and report["shape"] == "tiny"
    text = (tmp_path / "report.md").read_text()
    assert "Not run: no_such_module not installed." in text and "| before | ['tests'] |" in text and "junitxml" not in text
    assert "not run: no_such_module not installed" in capsys.readouterr().out


def test_real_output_becomes_tables(tmp_path):
    """Of the parts that take seconds with the smallest shape."""
    for wanted in ("plan", "fixed segments", "versions"):
        (asked,) = [one for one in gpu.parts("tiny", tmp_path) if one.name == wanted]
        found = gpu.run_part(asked, tmp_path)
        assert "printed" in found, found
        head, *body = asked.rows(found["printed"])
        assert len(body) >= 3 and all(len(row) == len(head) for row in body)


def test_every_shape_has_parts_that_exist(tmp_path):
    for shape in gpu.SHAPES:
        for one in gpu.parts(shape, tmp_path):
            assert one.command[0] == "-m" or Path(one.command[0]).is_file()
    assert sum(one.minutes for one in gpu.parts("llava-7b", tmp_path)) <= 24


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(tmp_path, capsys):
    line = refused(capsys, "--out", tmp_path / "report", main=gpu.main)
    assert "no NVIDIA GPU is here" in line and "--shape tiny" in line and not list(tmp_path.iterdir())
