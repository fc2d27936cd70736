"""The benchmarks of scores and of the checkpoint tools refuse what does not fit, before they write or allocate it."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections import namedtuple
from pathlib import Path
from types import ModuleType

import pytest

from tests.helpers.command_line import refused

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_of_{name}", BENCHMARKS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its data classes look up their annotations
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("checkpoints", [], "--size-gb 4 takes 16 GB on disk, and 5 GB are free in "),
        ("scores", ["--only", "weights"], "--size-gb 4 takes 8 GB on disk, and 5 GB are free in "),
    ],
)
def test_a_full_disk(
    name: str, flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**10, 5 * 10**9, 5 * 10**9))
    line = refused(capsys, "--size-gb", 4, "--folder", tmp_path, *flags, main=script(name).main)
    assert message in line and str(tmp_path) in line and not list(tmp_path.iterdir())


def test_a_model_that_does_not_fit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("scores")
    monkeypatch.setattr(module, "free_memory", lambda device: 10**9)
    line = refused(
        capsys, "--only", "activations", "--hidden", 4096, "--layers", 32, "--batch-size", 1, "--device", "cpu", main=module.main
    )
    assert "--hidden 4096 --layers 32 is a model of 25.9 GB, and 1 GB are free on cpu" in line


def test_what_fits_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--hidden", "64", "--layers", "2", "--tokens", "60", "--repeat", "1", "--device", "cpu", "--only", "activations"]
    assert script("scores").main(flags) == 0 and "plain_seconds" in capsys.readouterr().out
    assert script("checkpoints").main(["--size-gb", "0.05", "--repeat", "1", "--folder", str(tmp_path)]) == 0
    assert "cp -r" in capsys.readouterr().out and not list(tmp_path.iterdir())
