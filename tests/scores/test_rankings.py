"""The tables that `llava-region score` prints."""

from __future__ import annotations

import json

import pytest

from llava_region.scores.metrics import METRICS
from llava_region.scores.rankings import show


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_nothing_is_cut(columns, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    metrics = {name: {"scores": [float(layer) for layer in range(32)], "samples": 1000} for name in METRICS}
    correlation = {name: dict.fromkeys(metrics, 0.25) for name in metrics}
    out = tmp_path / "my scores.json"
    result = {"num_layers": 32, "metrics": metrics, "correlation": correlation}
    out.write_text(json.dumps(result))
    show(result, out, None, False, None)
    text = capsys.readouterr().out
    assert "…" not in text and text.count("0.25") == len(metrics) ** 2
    assert text.count("31,30,29,28,27,26,25,24") + text.count("24,25,26,27,28,29,30,31") == len(metrics)
    assert all(sum(line.split()[:1] == [name] for line in text.splitlines()) == 1 for name in metrics)
    assert f"--tune_layers '{out}:{next(iter(metrics))}:8'" in text
