"""What Python and the command line write is held meanwhile: another process is refused, and nothing changes."""

import pytest

pytest.importorskip("llava.model")

from llava_region import LlavaRegionError, evaluate, locks
from llava_region.scores.score import Options, score
from tests.helpers.command_line import refused
from tests.helpers.data_roots import write_all


@pytest.fixture(params=["out.json"])
def held(request, tmp_path, monkeypatch):
    """An output that another process writes, and for which nobody waits."""
    out = tmp_path / request.param
    monkeypatch.setattr(locks, "STALE", 0.0)
    with locks.held(out), monkeypatch.context() as patch:
        patch.setattr(locks, "_held", {})
        yield out
    assert not out.exists()


def test_python_that_evaluates(held, llava_checkpoint, tmp_path):
    with pytest.raises(LlavaRegionError, match="in use: process "):
        evaluate(llava_checkpoint, ["gqa"], write_all(tmp_path / "root"), held)


def test_python_that_scores(held, llava_checkpoint, tiny):
    with pytest.raises(LlavaRegionError, match="in use: process "):
        score(llava_checkpoint, [tiny.data], held, Options(metrics=("block_influence",), image_folder=tiny.images))


@pytest.mark.parametrize(("option", "held"), [("--out", "out.json"), ("--plot", "out.png")], indirect=["held"])
def test_perplexity(held, llava_checkpoint, tiny, option, capsys):
    data = ["--data", tiny.data, "--image-folder", tiny.images]
    assert "in use: process " in refused(capsys, "perplexity", llava_checkpoint, *data, option, held)
