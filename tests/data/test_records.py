"""The form of records in LLaVA's format."""

import pytest

from llava_region.data.check import record_problem

HUMAN, GPT = {"from": "human", "value": "<image>\nHi"}, {"from": "gpt", "value": "Hello"}


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"conversations": [HUMAN, GPT]}, None),
        ({"conversations": [{"from": "gpt", "value": "x"}, HUMAN, GPT]}, None),  # upstream skips the first
        ({"image": "a.png", "conversations": [HUMAN, GPT, {"from": "human", "value": "and?"}, GPT]}, None),
        ([], "no object"),
        ({}, "no 'conversations'"),
        ({"conversations": []}, "no 'conversations'"),
        ({"conversations": [{"from": "user", "value": "x"}]}, "turn that is not"),
        ({"conversations": [{"from": "human"}]}, "turn that is not"),
        ({"conversations": [HUMAN, HUMAN]}, "alternate"),
        ({"image": ["a.png", "b.png"], "conversations": [HUMAN, GPT]}, "one image a record"),
        ({"image": "a.png", "conversations": [HUMAN, GPT, HUMAN, GPT]}, "several turns"),
    ],
)
def test_records(record, problem):
    found = record_problem(record)
    assert found is None if problem is None else problem in found
