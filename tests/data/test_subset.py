"""`llava-region subset`: proportion, nesting, the same part everywhere."""

import json
import random
from fractions import Fraction
from itertools import pairwise

import pytest

from llava_region.data.subset import choose, parse_fraction, write_subset
from llava_region.errors import LlavaRegionError
from tests.helpers.command_line import run


def records(images: int, texts: int) -> list[dict]:
    """Records with and without an image, mixed."""
    kinds = [True] * images + [False] * texts
    random.Random(1).shuffle(kinds)
    turns = [{"from": "human", "value": "<image>\nWas ist das? \u4f60"}, {"from": "gpt", "value": "ein Kreis"}]
    return [{"id": f"r{i}", **({"image": f"{i}.png"} if image else {}), "conversations": turns} for i, image in enumerate(kinds)]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(records(800, 200)))
    return path


def subset(data, fraction, seed=0):
    out = data.parent / f"{fraction}-{seed}.json".replace("/", "_")
    write_subset(data, out, parse_fraction(fraction), seed)
    return json.loads(out.read_text())


@pytest.mark.parametrize(
    ("images", "texts", "fraction", "expected"),
    [(800, 200, "0.25", (200, 50)), (800, 200, "10%", (80, 20)), (7, 3, "1/2", (4, 2)), (9, 1, "0.1", (1, 0)), (0, 40, "0.25", (0, 10))],
)
def test_counts_of_both_kinds(images, texts, fraction, expected):
    kinds = ["image" in r for r in records(images, texts)]
    chosen = choose(kinds, parse_fraction(fraction), seed=3)
    assert (sum(kinds[i] for i in chosen), sum(not kinds[i] for i in chosen)) == expected


def test_a_tenth_lies_inside_a_quarter_and_records_are_whole_and_in_order(data):
    whole = json.loads(data.read_text())
    quarter, tenth = subset(data, "0.25"), subset(data, "0.1")
    places = [whole.index(r) for r in quarter]  # index() compares whole records
    assert places == sorted(places) and len(quarter) == 250
    assert all(r in quarter for r in tenth) and len(tenth) == 100


def test_every_fraction_is_nested():
    kinds = ["image" in r for r in records(31, 17)]
    parts = [set(choose(kinds, Fraction(i, 50), seed=5)) for i in range(1, 51)]
    assert all(small <= large for small, large in pairwise(parts))
    assert parts[-1] == set(range(48))


def test_the_choice_is_fixed_for_all_machines():
    # Written out: another order on another Python or machine would not show in any other test.
    assert choose([True] * 12 + [False] * 8, Fraction(1, 4), seed=0) == [6, 9, 11, 15, 19]
    assert choose([True] * 12 + [False] * 8, Fraction(1, 4), seed=1) == [1, 7, 8, 12, 14]


def test_seeds_differ(data):
    assert subset(data, "0.25", seed=0) != subset(data, "0.25", seed=1)


def test_the_choice_is_spread_over_the_file():
    kinds = [True] * 20_000
    chosen = choose(kinds, Fraction(1, 10), seed=0)
    tenths = [sum(i * 2000 <= c < (i + 1) * 2000 for c in chosen) for i in range(10)]
    assert all(abs(count - 200) < 4 * (200 * 0.9) ** 0.5 for count in tenths), tenths


@pytest.mark.parametrize("text", ["0", "-0.1", "1.01", "101%", "a quarter", "", "1/0", "nan", "inf"])
def test_fractions_refused(text):
    with pytest.raises(LlavaRegionError, match="allowed: above 0 and at most 1"):
        parse_fraction(text)


def test_fraction_is_exact():
    assert parse_fraction("0.1") == Fraction(1, 10) == parse_fraction(" 10 % ")


def test_command_prints_counts_and_refuses_to_overwrite(data, capsys):
    out = data.parent / "quarter.json"
    code, text, _ = run(capsys, "subset", data, "--fraction", "25%", "--out", out, "--json")
    assert code == 0
    assert json.loads(text) == {"out": str(out), "fraction": 0.25, "seed": 0, "records": 250, "images": 200, "texts": 50}
    before = out.read_bytes()
    code, text, error = run(capsys, "subset", data, "--fraction", "10%", "--out", out)
    assert code == 2 and "--force" in error and out.read_bytes() == before
    code, text, _ = run(capsys, "subset", data, "--fraction", "10%", "--out", out, "--force")
    assert code == 0 and "100 of 1,000 records" in text and len(json.loads(out.read_text())) == 100


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"id": 1}', "is not valid JSON"),
        ('{"id": 1}', "is not a list of records"),
        ("[]", "is not a list of records"),
        ('[{"id": 1}, 3]', "record 1 of"),
        ('[{"id": 1}]', "less than one"),
        (b"\xff\xfe\x00", "is not valid JSON"),
    ],
)
def test_bad_data_is_one_line_and_writes_nothing(tmp_path, capsys, content, message):
    data, out = tmp_path / "data.json", tmp_path / "out.json"
    data.write_bytes(content if isinstance(content, bytes) else content.encode())
    code, text, error = run(capsys, "subset", data, "--fraction", "0.25", "--out", out)
    assert code == 2 and text == "" and message in error and error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == [data]


def test_the_data_file_is_never_replaced(data, capsys):
    before = data.read_bytes()
    code, _, error = run(capsys, "subset", data, "--fraction", "0.25", "--out", data, "--force")
    assert code == 2 and "the data file itself" in error and data.read_bytes() == before


def test_missing_data(tmp_path, capsys):
    code, _, error = run(capsys, "subset", tmp_path / "none.json", "--fraction", "0.25", "--out", tmp_path / "o.json")
    assert code == 2 and "cannot read" in error
