"""`llava-region layers`."""

from pathlib import Path

import pytest

from tests.helpers.command_line import refused, run


@pytest.mark.parametrize("name", ["config.json", "vicuna.json"])
def test_a_config_under_any_name(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / name).write_text('{"num_hidden_layers": 8}')
    assert "\n1,6\n" in run(capsys, "layers", tmp_path / name, "1,6").out
    (tmp_path / name).write_text("[]")
    assert name in refused(capsys, "layers", tmp_path / name, "1,6")
