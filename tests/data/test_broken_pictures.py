"""A picture that cannot be shown to a model ends `score` and `perplexity` in one line that names it; `eval` counts it."""

import json
import shutil

import pytest
from PIL import Image

pytest.importorskip("llava.model")

from llava_region.cli import main
from tests.helpers.broken_pictures import BROKEN, MAX_PIXELS

TURNS = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A circle"}]


@pytest.fixture(scope="module")
def model(llava_checkpoint, tmp_path_factory):
    """The checkpoint, of a model that crops its images instead of padding them."""
    folder = tmp_path_factory.mktemp("crops") / "llava-tiny"
    shutil.copytree(llava_checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    del config["image_aspect_ratio"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(params=[*BROKEN, "missing.png"])
def name(request, tmp_path, monkeypatch):
    """A broken picture's file name, the picture in `tmp_path`, and a data file that has it as its only record."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", MAX_PIXELS)
    if request.param in BROKEN:
        BROKEN[request.param](tmp_path / request.param)
    (tmp_path / "data.json").write_text(json.dumps([{"image": request.param, "conversations": TURNS}]))
    return request.param


def refused(capsys, *argv) -> str:
    assert main([str(part) for part in argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("error: ") == 1
    return captured.err.splitlines()[-1]


def test_score_names_it(model, tmp_path, capsys, name):
    data = ("--data", tmp_path / "data.json", "--image-folder", tmp_path, "--metrics", "block_influence")
    line = refused(capsys, "score", model, *data, "--out", tmp_path / "scores.json", "--device", "cpu")
    assert line.startswith("error: ") and name in line
    assert not list(tmp_path.glob("scores.json*"))


def test_perplexity_names_it(model, tmp_path, capsys, name):
    line = refused(capsys, "perplexity", model, "--data", tmp_path / "data.json", "--image-folder", tmp_path, "--device", "cpu")
    assert line.startswith("error: ") and name in line


def test_eval_counts_it(model, tmp_path, capsys, name):
    folder = tmp_path / "root" / "gqa"
    (folder / "images").mkdir(parents=True)
    question = {"imageId": "n1", "question": "What?", "answer": "no", "types": {"structural": "query"}, "isBalanced": True}
    (folder / "testdev_balanced_questions.json").write_text(json.dumps({"1": question}))
    if (tmp_path / name).exists():
        shutil.copy(tmp_path / name, folder / "images" / "n1.jpg")
    argv = ["eval", model, "--task", "gqa", "--data-root", folder.parent, "--out", tmp_path / "out", "--device", "cpu", "--json"]
    assert main([str(part) for part in argv]) == 0
    assert json.loads(capsys.readouterr().out)["gqa"]["unreadable_images"] == 1
