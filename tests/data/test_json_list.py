"""A JSON list read item by item gives what the json module gives, wherever the file's pieces end."""

import json
import os
import random
import subprocess
import sys

import pytest

from llava_region.data import json_list
from llava_region.data.json_list import items, read_item
from llava_region.errors import LlavaRegionError

VALUES = [
    {"id": 7, "text": "a\nb \u00e9 \u4f60 \U0001f389", "more": [[], {}, [{"x": None}]]}, "\u4f60", "", "plain", 0, -1, 12345, 1.5, -2.5e-7,
    1e300, 3e5, True, False, None, [], {}, {"a": {"b": ["]", "}", '"', "\\"]}}, "\\\"[{,", "\ud83d",
]  # fmt: skip


def read(path, size, monkeypatch):
    monkeypatch.setattr(json_list, "CHUNK", size)
    return list(items(path, "a list"))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("written", [{}, {"ensure_ascii": False}, {"indent": 3}, {"separators": (",", ":")}])
def test_same_as_json(tmp_path, monkeypatch, size, written):
    path = tmp_path / "d.json"
    draw = random.Random(0)
    for values in [VALUES] + [draw.choices(VALUES, k=draw.randint(1, 6)) for _ in range(20)]:
        text = json.dumps(values, **written).encode("utf-8", "backslashreplace")
        path.write_bytes(b" \r\n\t" + text + b"\n ")
        found = read(path, size, monkeypatch)
        assert [item.value for item in found] == values
        for item in found:  # the same bytes, found again
            assert json.loads(read_item(path, item.start, item.size)) == item.value


def test_numbers_that_only_python_writes(tmp_path, monkeypatch):
    path = tmp_path / "d.json"
    path.write_text("[Infinity, -Infinity, NaN, 1E+5, 1e-5, 10.25]")
    found = [item.value for item in read(path, 1, monkeypatch)]
    assert found[:2] == [float("inf"), float("-inf")] and found[2] != found[2] and found[3:] == [1e5, 1e-5, 10.25]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "is not a list of things"),
        (' { "a": [1] }', "is not a list of things"),
        ('"text"', "is not a list of things"),
        ("", "is not valid JSON: Expecting value"),
        ("[1, 2", "is not valid JSON: Expecting ',' delimiter"),
        ("[1, ]", "is not valid JSON"),
        ("[1] 2", "is not valid JSON: Extra data"),
        ("[1 2]", "is not valid JSON: Expecting ',' delimiter"),
        ('[{"a": 1}, {"a": 2]', "is not valid JSON"),
        ('{"a": 1}\n{"a": 2}', "is JSON lines"),
        ("[1]\n[2]", "is JSON lines"),
        ("[" * 100_000, "nested too deeply"),
        ("\ufeff[1]", "is not valid JSON: Unexpected UTF-8 BOM"),
        (b'["\xff"]', "is not valid JSON: 'utf-8' codec can't decode"),
        (b'["\xc3', "is not valid JSON: 'utf-8' codec can't decode"),
        (None, "cannot read .*: No such file"),
    ],
)
@pytest.mark.parametrize("size", [1, 1000])
def test_what_is_wrong_is_said_as_for_any_json_file(tmp_path, monkeypatch, text, message, size):
    path = tmp_path / "d.json"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    monkeypatch.setattr(json_list, "CHUNK", size)
    with pytest.raises(LlavaRegionError, match=message):
        list(items(path, "a list of things"))


def test_an_error_of_the_reader_of_items_is_its_own(tmp_path):
    (tmp_path / "d.json").write_text("[1]")
    with pytest.raises(ValueError, match="mine"):
        for _ in items(tmp_path / "d.json", "a list"):
            raise ValueError("mine")


MEASURE = """
import resource, sys
from pathlib import Path
from llava_region.data.training_data import TrainingData
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
before = peak()
data = TrainingData(Path(sys.argv[1]))
sum(len(record) for record in data)
print(len(data), peak() - before, data[len(data) // 2]["id"], data[-1]["id"])
"""


def test_memory_does_not_grow_with_the_file(tmp_path):
    turns = [{"from": "human", "value": "What? " * 100}, {"from": "gpt", "value": "This. " * 1000}]
    path, count = tmp_path / "d.json", 10_000
    with path.open("w") as file:
        for number in range(count):
            file.write(("," if number else "[") + json.dumps({"id": number, "conversations": turns}))
        file.write("]")
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1"}
    result = subprocess.run([sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, env=environment, check=True)
    records, grown, middle, last = map(int, result.stdout.split())
    assert (records, middle, last) == (count, count // 2, count - 1)
    assert path.stat().st_size > 64_000_000 and grown < 40_000_000
