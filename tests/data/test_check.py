"""The check of a training file's images, before a run needs them."""

import json

import pytest
from PIL import Image

from llava_region.data import check as data_check
from llava_region.data.check import check_data
from llava_region.errors import LlavaRegionError


def test_truncated_jpeg_is_seen(tmp_path):
    image = Image.effect_noise((300, 300), 90).convert("RGB")
    image.save(tmp_path / "a.jpg")
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(data[: len(data) // 2])
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Noise"}]
    (tmp_path / "d.json").write_text(json.dumps([{"image": "a.jpg", "conversations": turns}]))
    with pytest.raises(LlavaRegionError, match="corrupt"):
        check_data(tmp_path / "d.json", tmp_path)


def test_only_a_sample_is_opened_by_default(tmp_path, monkeypatch):
    monkeypatch.setattr(data_check, "SAMPLE", 3)
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Grey"}]
    for i in range(10):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{i}.png")
    (tmp_path / "d.json").write_text(json.dumps([{"image": f"{i}.png", "conversations": turns} for i in range(10)]))
    opened = []
    original = data_check.image_problem
    monkeypatch.setattr(data_check, "image_problem", lambda path: opened.append(path.name) or original(path))
    check_data(tmp_path / "d.json", tmp_path, "sample")
    assert len(opened) == 3
    check_data(tmp_path / "d.json", tmp_path, "all")
    assert len(opened) == 13
