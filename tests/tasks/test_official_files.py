"""GQA and BIG-Bench-Hard on the full official files; skipped if these are not next to the checkout."""

import json
import random
import tarfile
from collections import Counter, defaultdict

import pytest

from llava_region import tasks
from llava_region.tasks import answers
from tests.helpers import data_roots


@pytest.fixture(scope="module")
def gqa(tmp_path_factory):
    """(data root, the official file's content)."""
    if not data_roots.gqa_archive().exists():
        pytest.skip(f"no {data_roots.gqa_archive()}: GQA's official questions are not next to the checkout")
    root = tmp_path_factory.mktemp("gqa")
    (root / "gqa").mkdir()
    with tarfile.open(data_roots.gqa_archive()) as archive:
        content = archive.extractfile("testdev_balanced_questions.json").read()
    (root / "gqa/testdev_balanced_questions.json").write_bytes(content)
    return root, json.loads(content)


@pytest.fixture(scope="module")
def bbh():
    """{task: its items} of the official files."""
    if not data_roots.bbh_source().exists():
        pytest.skip(f"no {data_roots.bbh_source()}: the official BIG-Bench-Hard files are not next to the checkout")
    return {path.stem: json.loads(path.read_text())["examples"] for path in sorted(data_roots.bbh_source().glob("*.json"))}


def score(name, root, rows):
    task = tasks.load(name)
    examples = task.examples(root)
    return task.score(examples, answers.pair(task, examples, rows))


def test_gqa_right_answers(gqa):
    root, questions = gqa
    result = score("gqa", root, [{"question_id": key, "text": q["answer"].capitalize() + "."} for key, q in questions.items()])
    assert (result["score"], result["n"], result["missing"]) == (100, 12578, 0)
    assert result["types"] == dict.fromkeys(("choose", "compare", "logical", "query", "verify"), 100)


def test_gqa_shuffled_answers(gqa):
    root, questions = gqa
    right = [q["answer"] for q in questions.values()]
    shuffled = random.Random(0).sample(right, len(right))
    result = score("gqa", root, [{"question_id": key, "text": text} for key, text in zip(questions, shuffled, strict=True)])
    pairs = Counter(zip(right, shuffled, strict=True))  # an independent count: of pairs of answers, not of questions
    agreeing = sum(count for (a, b), count in pairs.items() if a == b)
    assert 0 < agreeing < len(right)
    assert result["score"] == pytest.approx(100 * agreeing / 12578)
    opened = [a == b for q, a, b in zip(questions.values(), right, shuffled, strict=True) if q["types"]["structural"] == "query"]
    assert result["open"] == pytest.approx(100 * sum(opened) / len(opened))


def test_gqa_half_answered(gqa):
    root, questions = gqa
    keys = list(questions)[::2]
    result = score("gqa", root, [{"question_id": key, "text": questions[key]["answer"]} for key in keys])
    assert result["missing"] == 12578 - len(keys)
    assert result["score"] == pytest.approx(100 * len(keys) / 12578)


def test_bbh_right_answers(bbh):
    assert sum(map(len, bbh.values())) == 6511
    for wording in ("{}", "{}.", "The answer is {}.", "Let me think. So the answer is: {}"):
        rows = [
            {"question_id": f"{task}/{n}", "text": wording.format(item["target"])}
            for task, items in bbh.items()
            for n, item in enumerate(items)
        ]
        result = score("bbh", data_roots.bbh_source().parent, rows)
        wrong = {task: value for task, value in result["tasks"].items() if value != 100}
        assert (result["score"], result["macro_accuracy"], result["n"], wrong) == (100, 100, 6511, {})


def test_bbh_shuffled_answers(bbh):
    """Within each task: accuracy is the share of places where the shuffled targets equal the targets."""
    rng, rows, agreeing, shares = random.Random(0), [], 0, {}
    for task, items in bbh.items():
        order = rng.sample(range(len(items)), len(items))
        rows += [{"question_id": f"{task}/{n}", "text": items[m]["target"]} for n, m in enumerate(order)]
        places = defaultdict(set)
        for n, item in enumerate(items):
            places[item["target"]].add(n)
        same = sum(n in places[items[m]["target"]] for n, m in enumerate(order))
        agreeing += same
        shares[task] = 100 * same / len(items)
    result = score("bbh", data_roots.bbh_source().parent, rows)
    assert 0 < agreeing < 6511
    assert result["score"] == pytest.approx(100 * agreeing / 6511)
    assert result["macro_accuracy"] == pytest.approx(sum(shares.values()) / 27)
    assert result["tasks"] == pytest.approx(shares)


def test_bbh_letter_alone_and_option_spelt_out(bbh):
    """`B` and the option's text are as good as `(B)`, wherever an option's text is not part of another's."""
    items = bbh["tracking_shuffled_objects_three_objects"]
    for text in (lambda item: item["target"][1], lambda item: item["input"].split(item["target"] + " ")[1].split("\n")[0]):
        rows = [{"question_id": f"tracking_shuffled_objects_three_objects/{n}", "text": text(item)} for n, item in enumerate(items)]
        assert score("bbh", data_roots.bbh_source().parent, rows)["tasks"]["tracking_shuffled_objects_three_objects"] == 100
