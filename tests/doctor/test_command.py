"""`llava-region doctor`, on the machine that the tests run on and on made-up ones."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version

from llava_region.cli import main
from llava_region.commands.doctor import rows
from llava_region.doctor import facts as machine
from llava_region.doctor.rules import diagnose
from llava_region.patches.upstream import Upstream
from tests.helpers.version_sets import LLAVA, facts


@pytest.mark.slow
def test_the_command_on_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor", "--json"])
    data = json.loads(capsys.readouterr().out)
    assert data["works"] == any(data["trains"].values()) == (code == 0)
    import torch
    import transformers

    versions = data["facts"]["versions"]
    # PyPI's CUDA builds say 2.1.2, and 2.1.2+cu121 when they are imported
    assert Version(versions["torch"]).public == Version(torch.__version__).public and versions["transformers"] == transformers.__version__
    assert len(data["facts"]["gpus"]) == torch.cuda.device_count()
    assert data["facts"]["broken"].keys() <= versions.keys()


def test_the_table_and_the_exit_status(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    bad = facts(deepspeed="0.19.8")
    monkeypatch.setattr(machine, "collect", lambda: bad)
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "0.19.8" in text and "DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed==0.16.9" in text
    assert "LLaVA: training cannot work" in text and "Bunny: not installed" in text
    monkeypatch.setattr(machine, "collect", lambda: dataclasses.replace(bad, versions=LLAVA))
    assert main(["doctor"]) == 0
    assert "LLaVA: training can work" in capsys.readouterr().out


def test_one_column_per_upstream(third: Upstream) -> None:
    set_ = facts(third="")
    table = {row[0]: row[1:] for row in rows(set_, diagnose(set_))}
    assert list(table)[:4] == ["python", "torch", "cuda", "GPU"] and list(table)[-3:] == ["LLaVA", "Bunny", "Third"]
    assert table["torch"] == ("2.13.0+cu126", ">=2.1", ">=2.1", ">=2.7", "ok")
    assert table["cuda"] == ("12.6", "any", "any", "any", "ok")
    assert table["peft"] == ("0.10.0", ">=0.10,<0.14", ">=0.10,<0.13", "any", "ok")
    assert table["LLaVA"] == ("1.2.2.post1", "c121f04", "", "", "ok")
    assert table["Bunny"] == ("not installed", "", "08273ac", "", "-")
    assert table["Third"] == ("no version", "", "", "abcdef0", "ok")


def python(code: str, *path: Path) -> subprocess.CompletedProcess[str]:
    """Run code in an interpreter of its own, with folders first on its path."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, path), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)


def test_neither_torch_nor_transformers_is_imported_here() -> None:
    code = (
        "import sys; from llava_region.cli import main; from llava_region.doctor import facts; start = facts._start; "
        "facts._start = lambda code: start('pass'); main(['doctor']); main(['doctor', '--json']); "
        "print([name for name in sys.modules if name.split('.')[0] in ('torch', 'transformers', 'peft', 'llava', 'bunny')])"
    )
    done = python(code)
    assert done.stdout.strip().endswith("[]"), done.stdout + done.stderr


def test_it_works_where_nothing_can_be_imported(tmp_path: Path) -> None:
    for module in ("torch/__init__.py", "transformers/__init__.py", "bunny/__init__.py", "bunny/train/train.py"):
        (tmp_path / module).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / module).write_text(f"raise RuntimeError('{module} is broken')")
    done = python("import sys; from llava_region.cli import main; sys.exit(main(['doctor', '--json']))", tmp_path)
    assert done.returncode == 1, done.stderr
    data = json.loads(done.stdout)
    assert not data["works"] and set(data) == {"works", "trains", "tested", "facts", "findings"}
    found = {finding["component"]: finding["text"] for finding in reversed(data["findings"]) if finding["level"] == "error"}
    assert found["torch"] == "importing it fails: RuntimeError: torch/__init__.py is broken"
    assert found["bunny"] == "importing its trainer fails: RuntimeError: bunny/__init__.py is broken"
    assert set(data["findings"][0]) == {"level", "component", "text", "mend", "upstreams"}


@pytest.mark.parametrize("columns", [40, 60, 200])
def test_nothing_is_cut(columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    set_ = facts(deepspeed="0.19.8", torch="2.13.0+cu126.a.long.local.version")
    monkeypatch.setattr(machine, "collect", lambda: set_)
    monkeypatch.setenv("COLUMNS", str(columns))
    main(["doctor"])
    text = capsys.readouterr().out
    assert "…" not in text and ("┃" in text) == (columns == 200)
    for row in rows(set_, diagnose(set_)):
        line = next(line for line in text.splitlines() if line.replace("│", " ").split()[:1] == row[0].split()[:1])
        assert all(cell in line for cell in row), (row, line)


def test_no_escapes_under_no_color(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "collect", lambda: facts(deepspeed="0.19.8"))
    for name, value in (("FORCE_COLOR", "1"), ("TERM", "xterm-256color"), ("COLUMNS", "200")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    main(["doctor"])
    assert "\x1b[" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    main(["doctor"])
    assert "\x1b[" not in capsys.readouterr().out
