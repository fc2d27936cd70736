"""`llava-region layers`."""

import json
from pathlib import Path

import pytest

from tests.helpers.command_line import refused, run


@pytest.mark.parametrize("name", ["config.json", "vicuna.json"])
def test_a_config_under_any_name(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / name).write_text('{"num_hidden_layers": 8}')
    assert "\n1,6\n" in run(capsys, "layers", tmp_path / name, "1,6").out
    (tmp_path / name).write_text("[]")
    assert name in refused(capsys, "layers", tmp_path / name, "1,6")


def test_a_model_without_a_region(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "a model"
    model.mkdir()
    (model / "config.json").write_text('{"num_hidden_layers": 8}')
    line = refused(capsys, "layers", model)
    assert "was not trained with --tune_layers" in line and f"'llava-region layers '{model}' sparse:25%'" in line
    assert "there is no folder" in refused(capsys, "layers", tmp_path / "none")
    (model / "config.json").write_text('{"num_hidden_layers": 8, "visual_region": {"layers": [1], "num_layers": 8}}')
    assert run(capsys, "layers", model).code == 0
    (model / "region.json").write_text('{"layers": [1, 6], "num_layers": 8}')
    (model / "config.json").unlink()  # the region alone is enough
    assert "\n1,6\n" in run(capsys, "layers", model).out


def test_several_specs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 8}')
    shown = run(capsys, "layers", tmp_path, "1,6", "sparse:2").out
    assert shown == run(capsys, "layers", tmp_path, "1,6").out + run(capsys, "layers", tmp_path, "sparse:2").out
    lines = run(capsys, "layers", tmp_path, "all", "1,6", "--json").out.splitlines()
    assert [len(json.loads(line)["layers"]) for line in lines] == [8, 2]
    assert "layer 8 in '8'" in refused(capsys, "layers", tmp_path, "1,6", "8")
