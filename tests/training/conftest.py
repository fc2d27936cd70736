"""Fixtures for the checks before weights load."""

from collections.abc import Callable

import pytest

from llava_region import train as region_train
from tests.helpers.training_runs import LORA, llava_flags


@pytest.fixture
def line_of(tiny, tmp_path, capsys, monkeypatch) -> Callable[..., str | None]:
    """Run LLaVA with changed flags up to its train(); returns the error line, or None where it got that far."""
    import llava.train.train as upstream

    monkeypatch.setattr(upstream, "train", lambda attn_implementation=None: None)

    def run(**changes) -> str | None:
        code = region_train.main(
            ["llava", *llava_flags(tiny, tmp_path / "out", **{**LORA, "dry_run_step": False, **changes}), "--tune_layers", "1,6"]
        )
        lines = capsys.readouterr().err.strip().splitlines()
        if code == 0:
            return None
        assert code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and not (tmp_path / "out").exists(), lines
        return lines[0]

    return run
