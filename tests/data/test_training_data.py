"""Training records that stay on disk, and what one look at each of them finds."""

import json

import pytest

from llava_region.data.records import text_length
from llava_region.data.training_data import TrainingData
from llava_region.errors import LlavaRegionError


def record(question, answer="Yes", **more):
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **more}


RECORDS = [
    record("<image>\nWhat \u00e9?", image="b.png", id="one"),
    record("Hi"),
    record("What?", "\u4f60" * 9, image="a.png", id=3),
    record("<image> where?"),
    record("\U0001f389 <image>", image="b.png"),
]


@pytest.fixture
def data(tmp_path):
    (tmp_path / "d.json").write_text(json.dumps(RECORDS, ensure_ascii=False, indent=1), encoding="utf-8")
    return TrainingData(tmp_path / "d.json")


def test_it_is_the_list(data):
    assert list(data) == RECORDS and len(data) == 5
    assert [data[number] for number in (4, 0, -1, 2)] == [RECORDS[number] for number in (4, 0, -1, 2)]
    assert data[1:3] == RECORDS[1:3] and RECORDS[3] in data
    with pytest.raises(IndexError):
        data[5]


def test_the_survey(data):
    found = data.survey
    assert list(found.lengths) == [text_length(one) for one in RECORDS]
    assert found.images == ["b.png", "a.png", "b.png"] and list(found.with_image) == [1, 0, 1, 0, 1]
    assert found.unplaced == ["record 2 (id 3)"] and found.imageless == ["record 3"]


def test_the_first_record_that_training_could_not_take(data):
    with pytest.raises(LlavaRegionError, match=r"record 2 \(id 3\) of .*d.json is too long"):
        TrainingData(data.path, lambda one: "is too long" if text_length(one) > 12 and one.get("id") == 3 else None)
    data.path.write_text(json.dumps([*RECORDS, {"id": "x"}]))
    with pytest.raises(LlavaRegionError, match=r"record 5 \(id x\) of .*d.json has no 'conversations'"):
        TrainingData(data.path, lambda one: None if one["conversations"] else "has no turn")


def test_a_file_that_is_taken_away_meanwhile(data):
    data.path.unlink()
    with pytest.raises(LlavaRegionError, match="cannot read"):
        data[0]
