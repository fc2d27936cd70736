"""What a dry run says of the memory that activations take."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("llava.train.train")

from llava_region.train import main
from tests.helpers.command_line import Ran, run
from tests.helpers.training_runs import llava_flags


def command(tiny, folder: Path, **flags) -> list[str]:
    return ["llava", *llava_flags(tiny, folder / "run", **{"dry_run": True, "dry_run_step": False, **flags}), "--tune_layers", "2,6"]


def dry_run(tiny, tmp_path, capsys, **flags) -> Ran:
    return run(capsys, *command(tiny, tmp_path, **flags), main=main)


def test_dry_run_shows_what_each_policy_takes(tiny, tmp_path, capsys):
    code, out, _ = dry_run(tiny, tmp_path, capsys, freeze_mm_mlp_adapter=True, region_memory="60MB")
    assert code == 0
    rows = dict(line.split(maxsplit=1) for line in out.splitlines() if line)
    assert rows["activations"].startswith("largest batch, 4 x 512 tokens")
    counts = [rows[policy].partition(", ")[2] for policy in ("all", "region", "none")]
    assert counts == ["6 layers recomputed", "2 layers recomputed", "0 layers recomputed"]
    assert "of 60 MB (--region_memory); layers below 2 run without autograd" in rows["auto"]


def test_a_limit_that_cannot_be_met_is_refused_before_weights_load(tiny, tmp_path, capsys):
    for dry in (True, False):
        ran = run(capsys, *command(tiny, tmp_path, region_memory="1MB", dry_run=dry), main=main)
        assert ran.code == 2 and ran.err.startswith("error: --region_memory 1 MB is too little") and ran.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_dry_run_without_a_limit(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "all kept (--gradient_checkpointing False)" in dry_run(tiny, tmp_path, capsys, gradient_checkpointing=False).out
    assert "what would fit on cpu here" in dry_run(tiny, tmp_path, capsys).out
    assert "chosen when training starts by the GPU's free memory" in dry_run(tiny, tmp_path, capsys, use_cpu=None).out
    assert dry_run(tiny, tmp_path, capsys, region_checkpointing="region").out.splitlines()[-1].split() == ["chosen", "region"]
