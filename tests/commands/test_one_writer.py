"""No command writes where another process is writing."""

from pathlib import Path

import pytest

from llava_region import locks
from tests.helpers.command_line import refused

MODEL = '{"num_hidden_layers": 8, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}'


@pytest.mark.parametrize(
    "argv",
    [
        ["recipes", "OUT"],
        ["subset", "DATA", "--fraction", "1/2", "--out", "OUT"],
        ["eval", "MODEL", "--task", "mmlu", "--data-root", "DATA", "--out", "OUT"],
        ["score", "MODEL", "--metrics", "parameter_change", "--out", "OUT"],
    ],
    ids=lambda argv: argv[0],
)
def test_an_output_in_use_is_refused(
    argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"OUT": tmp_path / "out.json", "DATA": tmp_path / "data.json", "MODEL": tmp_path / "model"}
    places["DATA"].write_text("[" + ",".join(['{"id": "a", "conversations": []}'] * 4) + "]")
    places["MODEL"].mkdir()
    (places["MODEL"] / "config.json").write_text(MODEL)
    (places["MODEL"] / "model.safetensors").write_bytes(b"")
    before = sorted(tmp_path.iterdir())
    with locks.held(places["OUT"]), monkeypatch.context() as patch:
        patch.setattr(locks, "_held", {})  # as another process sees it
        patch.setattr(locks, "STALE", 0)
        assert "in use: process " in refused(capsys, *[places.get(arg, arg) for arg in argv])
    assert sorted(tmp_path.iterdir()) == before
