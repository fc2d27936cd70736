"""MMLU and BIG-Bench-Hard on small data roots: what is asked, and hand-computed scores."""

import csv

import pytest

from llava_region import tasks
from llava_region.tasks import mmlu
from tests.helpers import data_roots


def test_mmlu_prompt(tmp_path):
    data_roots.write_mmlu(tmp_path, questions=2)
    examples = tasks.load("mmlu").examples(tmp_path)
    assert [e.question_id for e in examples[:3]] == ["abstract_algebra/0", "abstract_algebra/1", "anatomy/0"]
    shots = "".join(
        f"What is {n} plus {n}?\nA. {n}\nB. {n + 1}\nC. {n + 2}\nD. {n + 3}\nAnswer: {letter}\n\n" for n, letter in enumerate("BCDAB", 1)
    )
    assert examples[1].prompt == (
        "The following are multiple choice questions (with answers) about abstract algebra.\n\n" + shots + "What is 2 plus 2?\n"
        "A. 2\nB. 3\nC. 4\nD. 5\nAnswer with the option's letter from the given choices directly."
    )


def test_mmlu_quoted_questions_of_several_lines(tmp_path):
    data_roots.write_mmlu(tmp_path)
    with (tmp_path / "mmlu/test/anatomy_test.csv").open("w", newline="") as f:
        csv.writer(f).writerow(['A "long",\nquestion', "a,b", "c", "d", "e", "D"])
    example = next(e for e in tasks.load("mmlu").examples(tmp_path) if e.question_id == "anatomy/0")
    assert 'A "long",\nquestion\nA. a,b\nB. c\n' in example.prompt
    assert example.reference.answer == "D"


@pytest.mark.parametrize(
    ("prediction", "right"),
    [("B", True), ("The answer is B.", True), ("(B) because", True), ("Bananas", False), ("A dog, so B", True), ("A", False), ("", False)],
)
def test_mmlu_correct(prediction, right):
    assert mmlu.correct(prediction, "B") is right


def test_mmlu_micro_and_macro(tmp_path):
    """Anatomy (other) has three questions, the 56 other subjects one; all of anatomy and one of STEM are right."""
    data_roots.write_mmlu(tmp_path)
    with (tmp_path / "mmlu/test/anatomy_test.csv").open("w", newline="") as f:
        csv.writer(f).writerows([["?", 1, 2, 3, 4, "A"]] * 3)
    task = tasks.load("mmlu")
    examples = task.examples(tmp_path)
    answers = {task.key_of(e): "A" for e in examples}  # right in anatomy alone: the others' answer is B
    answers["astronomy/0"] = "B"
    result = task.score(examples, answers)
    assert result["n"] == 59
    assert result["score"] == result["micro_accuracy"] == pytest.approx(100 * 4 / 59)
    assert result["macro_accuracy"] == pytest.approx(100 * 2 / 57)
    assert result["categories"] == pytest.approx({"STEM": 100 / 18, "humanities": 0, "other": 100 * 3 / 16, "social sciences": 0})
    assert (result["subjects"]["anatomy"], result["subjects"]["astronomy"], result["subjects"]["virology"]) == (100, 100, 0)
    assert [len(names.split()) for names in mmlu.CATEGORIES.values()] == [18, 13, 12, 14]


def test_bbh_micro_and_macro(tmp_path):
    data_roots.write_bbh(tmp_path)
    item = {"input": "Yes {or} no?\nOptions:\n- Yes\n- No", "target": "Yes"}
    data_roots.write_json(tmp_path / "bbh/navigate.json", {"examples": [item] * 3})
    task = tasks.load("bbh")
    examples = task.examples(tmp_path)
    asked = next(e for e in examples if e.question_id == "navigate/2")
    assert asked.prompt == "Yes {or} no?\nOptions:\n- Yes\n- No\nPlease answer this question in a word or phrase"
    result = task.score(examples, {f"navigate/{n}": "Yes, I think" for n in (0, 2)})
    assert (result["n"], result["missing"]) == (29, 27)
    assert result["score"] == pytest.approx(100 * 2 / 29)
    assert result["macro_accuracy"] == pytest.approx(100 * (2 / 3) / 27)
    assert result["tasks"]["navigate"] == pytest.approx(200 / 3)
