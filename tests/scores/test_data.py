"""The samples that scoring reads from data files."""

import hashlib
import json

import pytest

from llava_region.errors import LlavaRegionError
from llava_region.scores.data import Dataset, Sample, read_samples

TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat"}]


@pytest.fixture
def write(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_text("")

    def file(name, records):
        (tmp_path / name).write_text(json.dumps(records))
        return tmp_path / name

    return file


def test_samples_say_where_they_come_from(write, tmp_path):
    files = [
        write("1.json", [{"conversations": TURNS[1:]}, {"image": "a.png", "conversations": TURNS}]),
        write("2.json", [{"conversations": TURNS}]),
    ]
    samples, datasets = read_samples(files, tmp_path)
    assert samples == [
        Sample(0, 0, 0, (), TURNS[1:]),
        Sample(0, 1, 1, (tmp_path / "a.png",), TURNS),
        Sample(1, 0, 0, (), TURNS),
    ]
    assert datasets == [Dataset(f, hashlib.sha256(f.read_bytes()).hexdigest(), n, n) for f, n in zip(files, (2, 1), strict=True)]


def test_a_prompt_takes_the_place_of_every_conversation(write, tmp_path):
    file = write("1.json", ["a.png", {"image": ["a.png", "b.png"]}, {"image": "b.png", "conversations": "anything"}, {}])
    samples, _ = read_samples([file], tmp_path, prompt="Describe it.")
    assert [[path.name for path in sample.images] for sample in samples] == [["a.png"], ["a.png", "b.png"], ["b.png"], []]
    assert all(sample.conversation is None for sample in samples)


def test_a_limit_draws_and_only_what_is_drawn_is_checked(write, tmp_path):
    records = [{"id": i, "conversations": TURNS[1:]} for i in range(30)]
    draws = {seed: [s.index for s in read_samples([write("1.json", records)], None, limit=5, seed=seed)[0]] for seed in (0, 1)}
    assert all(draw == sorted(set(draw)) and len(draw) == 5 for draw in draws.values()) and draws[0] != draws[1]
    bad = [record if i in draws[0] else {"image": "none.png"} for i, record in enumerate(records)]
    samples, datasets = read_samples([write("2.json", bad)], None, limit=5, seed=0)
    assert [(s.index, s.place) for s in samples] == [(index, place) for place, index in enumerate(draws[0])]
    assert (datasets[0].records, datasets[0].used) == (30, 5)
    with pytest.raises(LlavaRegionError, match="no 'conversations'"):
        read_samples([tmp_path / "2.json"], None, limit=5, seed=1)
