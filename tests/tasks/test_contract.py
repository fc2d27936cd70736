"""What is true of every task: files named, right answers 100 %, no answer 0 %, keys, and refusals."""

import json
import shutil
import subprocess
import sys

import pytest

from llava_region import tasks
from llava_region.errors import LlavaRegionError
from llava_region.tasks import answers
from tests.helpers import data_roots


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """All ten tasks' files. Never write into it."""
    return data_roots.write_all(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("name", tasks.NAMES)
def test_right_answers_score_100_and_no_answers_0(name, root):
    task = tasks.load(name)
    examples = task.examples(root)
    rows = [json.loads(json.dumps(e.row(data_roots.right_answer(name, e)))) for e in examples]
    result = task.score(examples, answers.pair(task, examples, rows))
    assert (result["score"], result["missing"]) == (100, 0)
    assert result[result["metric"]] == result["score"]
    json.dumps(result)
    empty = task.score(examples, answers.pair(task, examples, [{**row, "text": " "} for row in rows]))
    assert (empty["score"], empty["missing"], empty["n"]) == (0, 0, result["n"])
    none = task.score(examples, {})
    assert (none["score"], none["metric"]) == (0, result["metric"])
    assert none["missing"] == none.get("rows", none["n"]) > 0


@pytest.mark.parametrize("name", tasks.NAMES)
def test_examples_need_no_images_and_have_keys_of_their_own(name, root, tmp_path):
    """A copy of the annotation files alone gives the same questions; a row written to an answers file comes back to its question."""
    task = tasks.load(name)
    for file in task.files:
        for part in task.parts or ("",):
            if not file.is_folder:
                path = file.path.split(" or ")[0].replace("{part}", part)
                (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(root / path, tmp_path / path)
    with_images, without = task.examples(root), task.examples(tmp_path)
    assert [(e.question_id, e.prompt) for e in with_images] == [(e.question_id, e.prompt) for e in without]
    assert len({task.key_of(e) for e in without}) == len(without)
    assert (not task.visual) == all(e.image is None for e in without)
    for e in without:
        assert task.key(json.loads(json.dumps(e.row("x")))) == task.key_of(e)


@pytest.mark.parametrize("name", tasks.NAMES)
def test_the_tasks_own_folder_may_be_the_data_root(name, root):
    task = tasks.load(name)
    assert task.missing_files(root) == task.missing_files(root / name) == []
    assert task.examples(root / name) == task.examples(root) or task.visual  # image paths are under the folder given
    assert len(task.examples(root / name)) == len(task.examples(root))


def test_unknown_task_lists_the_allowed_ones():
    with pytest.raises(LlavaRegionError, match=r"unknown task 'vqav2'; allowed: ocrvqa, docvqa, .*, bbh"):
        tasks.load("vqav2")


def test_parse_names():
    assert tasks.parse_names("gqa, textvqa,gqa") == ["gqa", "textvqa"]
    assert tasks.parse_names("all") == list(tasks.NAMES)
    for text in ("", ",", "gqa,nothing"):
        with pytest.raises(LlavaRegionError, match="allowed: ocrvqa"):
            tasks.parse_names(text)


def test_check_names_every_missing_file_and_its_source(root, tmp_path):
    tasks.check(list(tasks.NAMES), root)
    with pytest.raises(LlavaRegionError) as error:
        tasks.check(list(tasks.NAMES), tmp_path)
    message = str(error.value)
    assert "\n" not in message
    for name in tasks.NAMES:
        for file in tasks.load(name).files:
            assert file.path.split(" or ")[0].replace("{part}", "*") in message
            assert file.source in message


def test_check_without_images_asks_for_annotations_only(root, tmp_path):
    (tmp_path / "gqa").mkdir()
    shutil.copy(root / "gqa/testdev_balanced_questions.json", tmp_path / "gqa")
    tasks.check(["gqa"], tmp_path, images=False)
    with pytest.raises(LlavaRegionError, match=r"lacks gqa/images/ or gqa/data/images/ \(https://downloads"):
        tasks.check(["gqa"], tmp_path)


def test_missing_subjects_are_named(root, tmp_path):
    shutil.copytree(root / "mmlu", tmp_path / "mmlu")
    (tmp_path / "mmlu/test/virology_test.csv").unlink()
    (tmp_path / "mmlu/test/anatomy_test.csv").unlink()
    with pytest.raises(LlavaRegionError, match=r"lacks mmlu/test/anatomy_test.csv .*, mmlu/test/virology_test.csv .*berkeley"):
        tasks.check(["mmlu"], tmp_path)
    with pytest.raises(LlavaRegionError, match="virology"):
        tasks.load("mmlu").examples(tmp_path)


def test_llavas_own_folder_layout_is_found(root, tmp_path):
    shutil.copytree(root / "gqa", tmp_path / "gqa/data")
    task = tasks.load("gqa")
    assert task.missing_files(tmp_path) == []
    assert all(e.image.exists() for e in task.examples(tmp_path))


@pytest.mark.parametrize(
    ("name", "path", "content", "message"),
    [
        ("gqa", "gqa/testdev_balanced_questions.json", '{"1": {"question": "?"}}', "not in the official format .KeyError"),
        ("gqa", "gqa/testdev_balanced_questions.json", "[1, 2]", "not in the official format"),
        ("gqa", "gqa/testdev_balanced_questions.json", '{"1": ', "is not valid JSON"),
        ("gqa", "gqa/testdev_balanced_questions.json", "{}", "contain no questions"),
        ("refcocog", "refcocog/refcocog_test.jsonl", '{"sent": "a"}\n{"sent"', "line 2 is not JSON .*; fix or remove the line"),
        ("refcocog", "refcocog/refcocog_test.jsonl", "[1]\n", "line 1 is not a JSON object"),
        ("ocrvqa", "ocrvqa/dataset.json", '{"1": {"imageURL": "a.jpg", "split": 1}}', "contain no questions"),
        ("bbh", "bbh/navigate.json", '{"canary": ""}', "not in the official format"),
        ("mmlu", "mmlu/test/virology_test.csv", "question,choice0,choice1,choice2,choice3,answer\n", "row 1 is not a question"),
        ("mmlu", "mmlu/dev/virology_dev.csv", "q,1,2,3,4,A\n", "1 rows, needed: 5"),
    ],
)
def test_files_of_another_format_are_refused_in_one_line(name, path, content, message, root, tmp_path):
    shutil.copytree(root / name, tmp_path / name)
    (tmp_path / path).write_text(content)
    with pytest.raises(LlavaRegionError, match=message) as error:
        tasks.load(name).examples(tmp_path)
    assert "\n" not in str(error.value)


def test_answers_pair(root):
    task = tasks.load("docvqa")
    examples = task.examples(root)
    rows = [
        {"question_id": "49153", "text": "first"},  # a string for the file's number
        {"question_id": 49153, "text": "second"},  # the last row of a question counts
        {"question_id": 7, "text": "of another split"},
    ]
    assert answers.pair(task, examples, rows) == {"49153": "second"}
    assert answers.pair(task, examples, []) == {}
    with pytest.raises(
        LlavaRegionError, match=r"none of the 1 answers belongs to a question of docvqa \(first question_id: 7, the task's: 49153\)"
    ):
        answers.pair(task, examples, rows[2:])


def test_answers_of_another_task_are_refused(root):
    """Whatever ids the other task's answers have, they do not cause a crash."""
    for name in tasks.NAMES:
        for other in tasks.NAMES:
            if name != other:
                task = tasks.load(name)
                rows = [{"question_id": f"no-{e.question_id}", "text": ""} for e in tasks.load(other).examples(root)]
                with pytest.raises(LlavaRegionError, match="give the answers file of this task"):
                    answers.pair(task, task.examples(root), rows)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question_id": 1, "text": "a"}\n{"quest', "line 2 is not JSON"),
        ('{"question_id": 1}\n', "row 1 lacks"),
        ('{"text": "a"}\n', "row 1 lacks"),
    ],
)
def test_broken_answers_files_are_refused(content, message, tmp_path):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(LlavaRegionError, match=message):
        answers.read(tmp_path / "a.jsonl")
    with pytest.raises(LlavaRegionError, match="cannot read"):
        answers.read(tmp_path / "none.jsonl")


def test_answers_may_hold_line_separators(tmp_path):
    """U+2028 and others do not end a line of a jsonl file."""
    (tmp_path / "a.jsonl").write_text('{"question_id": 1, "text": "a\u2028b\x85c"}\n\n', encoding="utf-8")
    assert answers.read(tmp_path / "a.jsonl") == [{"question_id": 1, "text": "a\u2028b\x85c"}]


def test_scoring_imports_no_torch():
    code = (
        "import sys; from llava_region import tasks\nfor name in tasks.NAMES: tasks.load(name)\n"
        "assert not {'torch', 'transformers', 'llava', 'bunny'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
