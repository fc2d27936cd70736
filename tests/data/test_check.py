"""The check of a training file's images, before a run needs them."""

import json

import pytest
from PIL import Image

from llava_region.data import check as data_check
from llava_region.data.check import check_data, check_placeholders
from llava_region.data.training_data import Survey
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
    monkeypatch.setattr(data_check, "image_problem", lambda path, *more: opened.append(path) or original(path, *more))
    check_data(tmp_path / "d.json", tmp_path, "sample")
    assert len(opened) == 3
    check_data(tmp_path / "d.json", tmp_path, "all")
    assert len(opened) == 13


def record(question: str, image: bool = True, **more) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "Grey"}]
    return {**({"image": "a.png"} if image else {}), "conversations": turns, **more}


def said_of(records: list[dict]) -> str | None:
    survey = Survey()
    for one in records:
        survey.add(one)
    return check_placeholders(survey, "d.json")


GOOD, TEXT = record("<image>\nWhat?"), record("Hi", image=False)
UNPLACED, WITHOUT = record("What?", id="u"), record("What? <image>", image=False)


def test_placeholders_and_images_that_belong_together():
    assert said_of([GOOD, TEXT, record("And <image> <image>?")]) is None


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (UNPLACED, "have an image and no '<image>' in their text, so that training does not see it (record 0 (id u)"),
        (WITHOUT, "have '<image>' in their text and no image, so that training reads it as words (record 0"),
    ],
)
@pytest.mark.parametrize(
    ("count", "total", "refused"), [(1, 1, 0), (1, 4, 0), (2, 4, 1), (2, 200, 1), (2, 201, 0), (9, 1000, 0), (1000, 1000, 1)]
)
def test_a_slip_is_said_and_a_wrong_file_refused(bad, problem, count, total, refused):
    records = [bad] * count + [GOOD] * (total - count)
    if not refused:
        said = said_of(records)
        assert said and said.startswith(f"{count} records {problem}") and ("..." in said) == (count > 3)
        return
    with pytest.raises(LlavaRegionError, match=f"of {total:,} records of d.json, {count:,} records have.*allowed: less than 1%") as error:
        said_of(records)
    assert problem in str(error.value)


def test_both_kinds_are_said():
    said = said_of([UNPLACED, WITHOUT] + [TEXT] * 198)
    assert said and "1 records have an image" in said and "; 1 records have '<image>'" in said


def test_what_training_asks_of_records_and_pictures(tmp_path):
    Image.new("RGB", (7, 1)).save(tmp_path / "a.png")
    (tmp_path / "d.json").write_text(json.dumps([TEXT, {**GOOD, "id": 9}]))
    with pytest.raises(LlavaRegionError, match=r"record 1 \(id 9\) of .*d.json is no good"):
        check_data(tmp_path / "d.json", tmp_path, record_check=lambda record: "is no good" if "image" in record else None)
    with pytest.raises(LlavaRegionError, match=r"1 of 1 checked images of .* a.png \(of 7 x 1 pixels\)"):
        check_data(tmp_path / "d.json", tmp_path, picture_problem=lambda width, height: f"of {width} x {height} pixels")
    assert len(check_data(tmp_path / "d.json", tmp_path, "none", picture_problem=lambda width, height: "bad")) == 2
