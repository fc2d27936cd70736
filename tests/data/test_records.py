"""The form of records in LLaVA's format."""

import json

import pytest

from llava_region.data.records import (
    Form,
    check_each,
    read_records,
    record_name,
    record_problem,
    require_images,
    scoring_images,
    training_images,
)
from llava_region.errors import LlavaRegionError

HUMAN, GPT = {"from": "human", "value": "<image>\nHi"}, {"from": "gpt", "value": "Hello"}


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"conversations": [HUMAN, GPT]}, None),
        ({"conversations": [{"from": "gpt", "value": "x"}, HUMAN, GPT]}, None),  # upstream skips the first
        ({"image": "a.png", "conversations": [HUMAN, GPT, {"from": "human", "value": "and?"}, GPT]}, None),
        ([], "not an object"),
        ({}, "no 'conversations'"),
        ({"conversations": []}, "no 'conversations'"),
        ({"conversations": [{"from": "user", "value": "x"}]}, "turn that is not"),
        ({"conversations": [{"from": "human"}]}, "turn that is not"),
        ({"conversations": [HUMAN, HUMAN]}, "alternate"),
        ({"image": ["a.png", "b.png"], "conversations": [HUMAN, GPT]}, "one image per record"),
        ({"image": "a.png", "conversations": [HUMAN, GPT, HUMAN, GPT]}, "several turns"),
        ({"image": "", "conversations": [HUMAN, GPT]}, "'image' that is not a file name"),  # upstream would open the folder
        ({"image": None, "conversations": [HUMAN, GPT]}, "'image' that is not a file name"),
        ({"image": "a\ud800.png", "conversations": [HUMAN, GPT]}, "'image' that no file can be called: 'a\\ud800.png'"),
        ({"image": "a\0.png", "conversations": [HUMAN, GPT]}, "'image' that no file can be called"),
        ({"image": "a\udcff.png", "conversations": [HUMAN, GPT]}, None),  # the byte 0xff of a name that is not UTF-8
        ({"image": "/elsewhere/\u4f60 b.png", "conversations": [HUMAN, GPT]}, None),
        ({"conversations": [HUMAN, {"from": "gpt", "value": "half \ud83d of it"}]}, "half of a character (a lone surrogate"),
        ({"conversations": [{"from": "human", "value": "\udc00"}, GPT]}, "half of a character (a lone surrogate"),
        ({"conversations": [HUMAN, {"from": "gpt", "value": "whole \U0001f389, none \0 and \ufffd"}]}, None),
        ({"image": "a.png", "conversations": [{"from": "human", "value": "<im<image>age>"}, GPT]}, "that is left when those"),
        ({"conversations": [{"from": "human", "value": "<im<image>age>"}, GPT]}, None),
        ({"image": "a.png", "conversations": [{"from": "human", "value": "<image> or <image>?"}, GPT]}, None),  # becomes one
        ({"image": "a.png", "conversations": [{"from": "human", "value": "Draw"}, HUMAN | {"from": "gpt"}]}, None),
        ({"id": 5, "extra": {"a": [1]}, "model": "x", "conversations": [HUMAN | {"weight": 1}, GPT]}, None),
    ],
)
def test_training_records(record, problem):
    found = record_problem(record)
    assert found is None if problem is None else problem in found


PLAIN = [{"from": "user", "value": "Hi"}]
TWO = [{"from": "user", "value": "<image> or <image>?"}]


@pytest.mark.parametrize(
    ("record", "scoring", "prompted"),
    [
        ({"conversations": PLAIN}, None, None),
        ({"conversations": [HUMAN, HUMAN], "image": None}, None, None),
        ({"conversations": [HUMAN], "image": "a.png"}, None, None),
        ({"conversations": TWO, "image": ["a.png", "b.png"]}, None, None),
        ({"conversations": TWO, "image": ["a.png"]}, "1 images and 2 times <image>", None),
        ({"conversations": TWO, "image": [1, 2]}, "neither a file name nor a list", "neither a file name nor a list"),
        ({"conversations": TWO, "image": 5}, "neither a file name nor a list", "neither a file name nor a list"),
        ({"conversations": [{"from": "human"}]}, "no 'conversations'; give --prompt", None),
        ({"image": "a.png"}, "no 'conversations'; give --prompt", None),
        ("a.png", "no 'conversations'; give --prompt", None),
        (["a.png"], "is a list; allowed: an object with", "is a list; allowed: an object with"),
    ],
)
def test_records_to_score(record, scoring, prompted):
    for form, problem in ((Form.SCORING, scoring), (Form.PROMPTED, prompted)):
        found = record_problem(record, form)
        assert found is None if problem is None else problem in found


def test_any_object():
    assert record_problem({}, Form.OBJECT) is None
    assert record_problem("a.png", Form.OBJECT) == "is a str, not an object; allowed: an object with 'conversations'"


def test_the_names_of_images():
    assert training_images([{"image": "a"}, {}, {"image": ""}]) == ["a", ""]  # upstream looks for the key alone
    cases = ({"image": "a"}, {"image": ["a", "b"]}, {"image": ""}, {"image": None}, {}, "a")
    assert [scoring_images(record) for record in cases] == [["a"], ["a", "b"], [], [], [], ["a"]]


def test_a_file_is_read_whole_or_its_first_bad_record_named(tmp_path):
    path = tmp_path / "data.json"
    good = {"conversations": [HUMAN, GPT]}
    path.write_text(json.dumps([good, {"conversations": PLAIN}, 3]))
    with pytest.raises(LlavaRegionError, match=r"record 1 of .*/data.json has a turn that is not"):
        read_records(path)
    with pytest.raises(LlavaRegionError, match=r"record 2 of .*/data.json is a int"):
        read_records(path, Form.SCORING)
    path.write_text(json.dumps([good]))
    assert read_records(path) == [good]
    for content in ("{}", "[]", "null", '"a"'):
        path.write_text(content)
        with pytest.raises(LlavaRegionError, match=r"/data.json is not a list of records; allowed: a JSON list"):
            read_records(path, Form.OBJECT)


def test_a_record_is_named_by_number_and_id():
    cases = [({}, ""), ({"id": "a"}, " (id a)"), ({"id": 0}, " (id 0)"), ({"id": ""}, ""), ({"id": None}, ""), ({"id": [1]}, ""), ([], "")]
    for record, name in [*cases, ({"id": "\ud800" + "x" * 70}, " (id \\ud800" + "x" * 59 + "...)")]:
        assert record_name(3, record) == "record 3" + name


def test_a_check_of_another_kind_names_the_record_too(tmp_path):
    check_each([(7, "abc")], tmp_path, lambda record: None)
    with pytest.raises(LlavaRegionError, match=r"record 9 of d has 3 tokens"):
        check_each([(7, "ab"), (9, "abc")], "d", lambda record: "has 3 tokens" if len(record) == 3 else None)


def test_images_are_all_there_or_counted(tmp_path):
    (tmp_path / "a.png").write_text("")
    require_images(["a.png", "a.png"], tmp_path, "d.json")
    require_images([], None, "d.json")
    with pytest.raises(LlavaRegionError, match=r"2 images are missing in .*, such as b\.png of d\.json; .* --image-folder"):
        require_images(["a.png", "b.png", "c.png"], tmp_path, "d.json")
    with pytest.raises(LlavaRegionError, match=r"d\.json names 1 images; give the folder that they are in with --image-folder"):
        require_images(["a.png"], None, "d.json")
