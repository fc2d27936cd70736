"""What doctor finds on a machine."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from llava_region.doctor import facts


def test_a_probe_that_fails_or_hangs_is_reported() -> None:
    assert facts._end(facts._start("print('x')")) == (None, "x\n")
    assert facts._end(facts._start("import no_such_module"))[0] == "ModuleNotFoundError: No module named 'no_such_module'"
    assert facts._end(facts._start("import os; os.abort()"))[0] == "exit status -6"
    assert facts._end(facts._start("import time; time.sleep(60)"), seconds=0.2)[0] == "no end after 0.2 s"


def test_upstreams_are_found_without_importing_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "bunny"
    (package / "train").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    assert facts._trainer_file("bunny.train.train") is None or "bunny" not in sys.modules
    (package / "train" / "train.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert facts._trainer_file("bunny.train.train") == package / "train" / "train.py"


def test_locks_of_killed_builds_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    assert facts._locks() == ()
    lock.touch()
    assert facts._locks() == (str(lock),)


def test_unmet_requirements_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["tokenizers<0.19,>=0.14", "torch>=9; extra == 'torch'", "numpy>=1.17", "absent-package>=1"]
    monkeypatch.setattr(facts.metadata, "requires", lambda name: lines)
    monkeypatch.setattr(facts.metadata, "version", lambda name: {"tokenizers": "0.20.0", "numpy": "1.26.4", "torch": "0.1"}[name])
    monkeypatch.setattr(facts, "_version", lambda name: None if name == "absent-package" else facts.metadata.version(name))
    assert list(facts._unmet({"transformers": "4.37.2"})) == [("transformers", "tokenizers<0.19,>=0.14", "0.20.0")]


def test_the_variables_that_matter_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    start = facts._start
    monkeypatch.setattr(facts, "_start", lambda code: start("print()"))
    monkeypatch.setenv("BUNNY_ROOT", "/b")
    monkeypatch.setenv("DS_BUILD_OPS", "1")
    monkeypatch.setenv("CUDA_HOME", "/c")
    assert facts.collect().environment == {"BUNNY_ROOT": "/b", "DS_BUILD_OPS": "1"}
