"""Layer specs: every set printed in the paper, the grammar's edges, and regions taken from scores."""

import json

import pytest

from llava_region import LlavaRegionError, Region
from llava_region.checkpoints.model_source import ModelSource
from llava_region.region import layer_ranges, read_region_json

PAPER = [  # section 4.1 and footnote 2 of section 4.2
    ("sparse:8", 32, [0, 4, 8, 12, 18, 22, 26, 30]),
    ("sparse:25%", 32, [0, 4, 8, 12, 18, 22, 26, 30]),
    ("sparse:16", 32, list(range(0, 32, 2))),
    ("sparse:6", 32, [0, 6, 12, 18, 24, 30]),
    ("sparse:4", 32, [0, 10, 20, 30]),
    ("sparse:2", 32, [0, 31]),
    ("sparse:1", 32, [31]),
    ("sparse:32", 32, list(range(32))),
    ("sparse:10", 40, [0, 4, 8, 12, 16, 22, 26, 30, 34, 38]),
    ("sparse:25%", 40, [0, 4, 8, 12, 16, 22, 26, 30, 34, 38]),
    ("lower:8", 32, list(range(8))),
    ("lower-middle:8", 32, list(range(8, 16))),
    ("upper-middle:8", 32, list(range(16, 24))),
    ("top:8", 32, list(range(24, 32))),
    ("hybrid:8", 32, [0, 1, 2, 3, 28, 29, 30, 31]),
]
OTHERS = [
    ("all", 4, [0, 1, 2, 3]),
    ("0,4,8-11", 32, [0, 4, 8, 9, 10, 11]),
    ("7,1", 8, [1, 7]),
    (" 1 , 6 ", 8, [1, 6]),
    ("sparse:12.5%", 32, [0, 10, 20, 30]),
    ("sparse:12.5%", 12, [0, 11]),  # 1.5 rounds to 2
    ("sparse:100%", 3, [0, 1, 2]),
    ("sparse:6", 8, [0, 1, 3, 4, 6, 7]),  # more than half: evenly rounded over all
    ("hybrid:3", 8, [0, 1, 7]),
]
BAD = [
    "8", "sparse:0", "sparse:120%", "3-1", "a", "", " ", "sparse:", "1,,2", "missing.json:bi:4", "1,1", "0-2,2", "-1", "1-", "sparse:9",
    "sparse:8.5", "sparse:5%", "sparse:%", "sparse", "dense:4", "all:2", "sparse:4:spread", "upper-middle:5",
    "lower-middle:7", "1;2", "٣", "1.0",
]  # fmt: skip


@pytest.mark.parametrize(("spec", "num_layers", "layers"), PAPER + OTHERS)
def test_spec(spec, num_layers, layers):
    region = Region.parse(spec, num_layers)
    assert list(region.layers) == layers
    assert Region.from_dict(region.to_dict()) == region


@pytest.mark.parametrize("spec", BAD)
def test_bad_spec_is_one_line_that_says_what_is_allowed(spec):
    with pytest.raises(LlavaRegionError) as error:
        Region.parse(spec, 8)
    assert "\n" not in str(error.value) and len(str(error.value)) > 20


@pytest.mark.parametrize("num_layers", range(1, 61))
def test_sparse_always_gives_as_many_layers_as_asked(num_layers):
    for count in range(1, num_layers + 1):
        assert len(Region.parse(f"sparse:{count}", num_layers)) == count


def scores(path, values, **extra):
    path.write_text(json.dumps({"num_layers": len(values), "metrics": {"bi": {"scores": values}}, **extra}))
    return path


def test_scores_take_the_highest_and_ties_go_to_the_lower_layer(tmp_path):
    path = scores(tmp_path / "s.json", [0.1, 0.5, 0.5, 0.9, 0.5, 0.0, 0.2, 0.3])
    region = Region.parse(f"{path}:bi:3", 8)
    assert region.layers == (1, 2, 3)
    assert region.scores["metric"] == "bi" and len(region.scores["sha256"]) == 64
    assert Region.parse(f"{path}:bi:25%", 8).layers == (1, 3)


def test_scores_spread_takes_the_best_of_each_block(tmp_path):
    path = scores(tmp_path / "s.json", [0.9, 0.8, 0.1, 0.1, 0.3, 0.2, 0.0, 0.0])
    assert Region.parse(f"{path}:bi:4:spread", 8).layers == (0, 2, 4, 6)


@pytest.mark.parametrize(
    ("spec", "values", "message"),
    [
        ("nope:2", [1.0] * 8, "no metric 'nope'; allowed: bi"),
        ("bi:2", [1.0] * 4, "scores 4 layers, the model has 8"),
        ("bi:2", [1.0] * 7 + [float("nan")], "finite"),
        ("bi:9", [1.0] * 8, "allowed: 1 to 8"),
        ("bi", [1.0] * 8, "incomplete"),
        ("bi:2:spred", [1.0] * 8, "'spred' in .* is not a layer count"),
    ],
)
def test_bad_scores(tmp_path, spec, values, message):
    path = scores(tmp_path / "s.json", values)
    with pytest.raises(LlavaRegionError, match=message):
        Region.parse(f"{path}:{spec}", 8)


def test_layers_as_text():
    assert layer_ranges([]) == "none" and layer_ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
    for spec, num_layers, layers in PAPER:
        assert list(Region.parse(layer_ranges(layers), num_layers).layers) == layers, spec


def test_region_of_a_folder(tmp_path):
    region = {"layers": [1, 6], "num_layers": 8, "spec": "1,6"}
    with pytest.raises(LlavaRegionError, match=r"no region\.json"):
        Region.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"visual_region": region}))
    assert Region.load(tmp_path).layers == (1, 6)
    (tmp_path / "region.json").write_text(json.dumps({**region, "layers": [2]}))
    assert Region.load(tmp_path).layers == (2,), "region.json comes first"


@pytest.mark.parametrize("spec", ["all", "sparse:2", "sparse:25%", "0,4", "upper-middle:1"])
def test_a_model_of_more_layers_than_there_can_be(spec):
    """A damaged file may say anything: no list of 10**30 layers is begun."""
    with pytest.raises(LlavaRegionError, match="a model has 1 to 100000 decoder layers, got 1000"):
        Region.parse(spec, 10**30)
    with pytest.raises(LlavaRegionError, match="decoder layers"):
        Region.from_dict({"layers": [1], "num_layers": 10**30})
    assert len(Region.parse("all", 1000)) == 1000


RECORD = {"layers": [1, 6], "num_layers": 8, "spec": "1,6"}
PRUNED = {
    "layers": [1, 4], "num_layers": 5, "spec": "1,4",
    "pruned": {
        "dropped": [2, 4, 7], "original_num_layers": 8, "new_to_old": [0, 1, 3, 5, 6], "original_layers": [1, 6], "original_spec": "1,6",
    },
}  # fmt: skip
ALL_GONE = {
    **PRUNED, "layers": [], "num_layers": 6, "spec": "",
    "pruned": {**PRUNED["pruned"], "dropped": [1, 6], "new_to_old": [0, 2, 3, 4, 5, 7]},
}  # fmt: skip
MALFORMED = [
    *[({**RECORD, "layers": layers}, "'layers' in") for layers in (
        [-1, 2], "1,6", [1, 1], [], True, [1.0, 6.0], [1, 8], [6, 1], [True, 6], None, {"1": 6}, 1, ["1", "6"], [[1, 6]], [1, None],
    )],
    *[({**RECORD, "num_layers": count}, "'num_layers' in") for count in (None, "8", 8.0, True, 0, -8, [8])],
    ({**RECORD, "num_layers": 4}, "'layers' in"),
    *[({**RECORD, key: 3}, f"'{key}' in .*is 3; allowed") for key in ("spec", "base_model", "reverted", "pruned", "merged_from", "scores")],
    ({**RECORD, "reverted": {"layers": [9]}}, "'layers' in 'reverted' of"),
    ({**RECORD, "pruned": {}}, "'original_num_layers' in 'pruned' of"),
    ({**PRUNED, "pruned": {**PRUNED["pruned"], "new_to_old": [0, 1]}}, "has 2 layers for 5"),
    ({**PRUNED, "pruned": {**PRUNED["pruned"], "new_to_old": [0, 1, 3, 5, 8]}}, "'new_to_old' in"),
    ({**PRUNED, "pruned": {**PRUNED["pruned"], "original_layers": "1,6"}}, "'original_layers' in"),
    ({**PRUNED, "layers": [1, 3]}, r"pruning left are \[1, 4\]"),
    ({**PRUNED, "layers": []}, r"pruning left are \[1, 4\]"),
    ([1, 6], "is .* allowed: an object"),
    ("1,6", "is '1,6'; allowed: an object"),
]  # fmt: skip


@pytest.mark.parametrize("place", ["region.json", "config.json"])
@pytest.mark.parametrize(("record", "message"), MALFORMED)
def test_a_record_that_cannot_be_true(tmp_path, place, record, message):
    (tmp_path / place).write_text(json.dumps(record if place == "region.json" else {"visual_region": record}))
    if place == "region.json":
        (tmp_path / "config.json").write_text("{}")
    for read in (Region.load, read_region_json, lambda folder: ModelSource(folder).region):
        with pytest.raises(LlavaRegionError, match=message) as error:
            read(tmp_path)
        assert place in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("record", [
    RECORD, PRUNED, ALL_GONE, {"layers": [0], "num_layers": 1}, {**RECORD, "scores": None, "pruned": None, "base_model": None},
    {**RECORD, "reverted": {"layers": [0, 7], "base": "b"}, "merged_from": {"run": "r", "base": "b"}, "of a later version": [3]},
])  # fmt: skip
def test_a_record_that_can_be_true(tmp_path, record):
    (tmp_path / "region.json").write_text(json.dumps(record))
    (tmp_path / "config.json").write_text("{}")
    assert read_region_json(tmp_path) == record == ModelSource(tmp_path).region
    if record["layers"]:
        assert list(Region.load(tmp_path).layers) == record["layers"]
