"""The eight visual tasks on small data roots: what is asked, and hand-computed scores."""

import base64
import csv
import io
import json

import pytest
from PIL import Image

from llava_region import tasks
from llava_region.errors import LlavaRegionError
from llava_region.tasks import answers, mmbench, refcocog, scienceqa, tdiuc, textvqa
from tests.helpers import data_roots

LETTER = "Answer with the option's letter from the given choices directly."


def run(name, root, texts):
    """Score `texts`, one per example, in order; None leaves the question unanswered."""
    task = tasks.load(name)
    examples = task.examples(root)
    given = {task.key_of(example): text for example, text in zip(examples, texts, strict=True) if text is not None}
    return task.score(examples, given)


def test_ocrvqa(tmp_path):
    data_roots.write_ocrvqa(tmp_path)
    examples = tasks.load("ocrvqa").examples(tmp_path)
    assert [e.question_id for e in examples] == ["0001_0", "0001_1", "0002_0"]
    assert examples[0].prompt == "Please answer the question in one words.\nWho wrote this book?"
    assert [e.image.name for e in examples] == ["0001.jpg", "0001.jpg", "0002.gif"]
    assert all(e.image.exists() for e in examples)
    result = run("ocrvqa", tmp_path, ["Lee", "", "YES"])
    assert result["score"] == result["contains"] == pytest.approx(200 / 3)
    assert result["exact"] == pytest.approx(100 / 3)
    assert result["n"] == 3 and result["missing"] == 0


def test_docvqa(tmp_path):
    data_roots.write_docvqa(tmp_path)
    examples = tasks.load("docvqa").examples(tmp_path)
    assert [e.question_id for e in examples] == [49153, 49154, 49155]
    assert all(e.image.exists() for e in examples)
    result = run("docvqa", tmp_path, ["5/5/70", "j. müller jr", None])
    assert result["contains"] == result["score"] == pytest.approx(200 / 3)
    assert result["exact"] == pytest.approx(100 / 3)
    assert result["anls"] == pytest.approx(100 * (1 + 9 / 12) / 3)  # 3 characters deleted of 12
    assert result["missing"] == 1


def test_padded_box():
    assert refcocog.padded_box([0, 0, 32, 48], 64, 48) == (0, 8 / 64, 0.5, 56 / 64)
    assert refcocog.padded_box([3, 5, 28, 40], 30, 41) == (8 / 41, 5 / 41, 33 / 41, 40 / 41)  # (41 - 30) // 2 = 5
    assert refcocog.padded_box([1, 2, 3, 4], 10, 10) == (0.1, 0.2, 0.3, 0.4)


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("[0.1, 0.2, 0.3, 0.4]", (0.1, 0.2, 0.3, 0.4)),
        ("The box is [ .1,0.20 , 3e-1,0.4 ] there", (0.1, 0.2, 0.3, 0.4)),
        ("[0.3, 0.4, 0.1, 0.2]", (0.1, 0.2, 0.3, 0.4)),  # swapped corners
        ("[0.3, 0.2, 0.1, 0.4]", (0.1, 0.2, 0.3, 0.4)),
        ("[-0.5, 0, 1.7, 1]", (-0.5, 0, 1.7, 1)),  # as it is: to clip it would give a box in pixels a score
        ("[dog] [0, 0, 1, 1] [0, 0, 0, 0]", (0, 0, 1, 1)),  # the first bracket of four numbers
        ("[0.1, 0.2, 0.3]", None),
        ("[0.1, 0.2, 0.3, 0.4, 0.5]", None),
        ("0.1, 0.2, 0.3, 0.4", None),
        ("[a, b, c, d]", None),
        ("[nan, 0, 1, 1]", None),
        ("", None),
    ],
)
def test_parse_box(text, box):
    assert refcocog.parse_box(text) == box


def test_iou():
    assert refcocog.iou((0, 0, 1, 1), (0, 0, 1, 1)) == 1
    assert refcocog.iou((0, 0, 1, 1), (0.5, 0.5, 1.5, 1.5)) == pytest.approx(0.25 / 1.75)
    assert refcocog.iou((0, 0, 0.2, 1), (0.5, 0, 1, 1)) == 0
    assert refcocog.iou((0.5, 0.5, 0.5, 0.5), (0.5, 0.5, 0.5, 0.5)) == 0  # no area


def test_refcocog(tmp_path):
    data_roots.write_refcocog(tmp_path)
    examples = tasks.load("refcocog").examples(tmp_path)
    assert [e.question_id for e in examples] == [0, 1, 2]
    assert examples[0].prompt.endswith("this sentence describes: the dog on the left")
    assert all(e.image.exists() for e in examples)
    half = "[0, 0.125, 0.25, 0.875]"  # half of the first box: IoU 0.5 counts for the accuracy
    result = run("refcocog", tmp_path, [half, "no box", None])
    assert result["score"] == result["mean_iou"] == pytest.approx(50 / 3)
    assert result["acc@0.5"] == pytest.approx(100 / 3)
    assert (result["n"], result["missing"], result["unparsed"], result["outside"]) == (3, 1, 1, 0)
    # a box in pixels, whose clipped form would be the whole picture; one that reaches over the edge; and numbers of any size
    result = run("refcocog", tmp_path, ["[0, 0, 640, 480]", "[0.2, -0.1, 0.5, 0.5]", "[1e308, -1e308, 1e400, 3]"])
    assert result["score"] < 34 and result["mean_iou"] < 34 and result["outside"] == 3 and result["unparsed"] == 0
    assert refcocog.iou(refcocog.parse_box("[0, 0, 640, 480]"), (0, 0, 1, 1)) == pytest.approx(1 / 640 / 480)


@pytest.mark.parametrize(
    ("prediction", "answer", "right"),
    [("Two", "2", True), ("2", "two", True), ("Red ", "red", True), ("", "no", False), ("twenty-one", "21", True), ("red.", "red", False)],
)
def test_tdiuc_correct(prediction, answer, right):
    assert tdiuc.correct(prediction, answer) is right


def test_tdiuc(tmp_path):
    data_roots.write_tdiuc(tmp_path)
    examples = tasks.load("tdiuc").examples(tmp_path)
    assert [e.question_id for e in examples] == [1, 2, 3, 4]  # the absurd one is left out
    assert examples[0].prompt == "What color is the wall? Answer the question in one word."
    assert all(e.image.exists() for e in examples)
    result = run("tdiuc", tmp_path, ["Red", "2", "two", "no"])  # types: 100, 50, 100
    assert result["score"] == 75
    assert result["arithmetic_mpt"] == pytest.approx(250 / 3)
    assert result["harmonic_mpt"] == pytest.approx(3 / (1 / 100 + 1 / 50 + 1 / 100))
    assert result["types"] == {"color": 100, "counting": 50, "object_presence": 100}
    assert run("tdiuc", tmp_path, ["Red", "2", "one", "yes"])["harmonic_mpt"] == 0  # a type without a right answer


def test_tdiuc_files_that_do_not_belong_together(tmp_path):
    data_roots.write_tdiuc(tmp_path)
    data_roots.write_json(tmp_path / "tdiuc/mscoco_val2014_annotations.json", {"annotations": []})
    with pytest.raises(LlavaRegionError, match="no annotation of question 1"):
        tasks.load("tdiuc").examples(tmp_path)


def test_mmbench_official_file(tmp_path):
    data_roots.write_mmbench(tmp_path)
    task = tasks.load("mmbench")
    examples = task.examples(tmp_path)
    by_id = {e.question_id: e for e in examples}
    assert sorted(by_id) == [241, 252, 1000241, 1000252, 2000241, 3000241]
    assert by_id[241].prompt == f"Look at\nit.\nWhich colour?\nA. red\nB. green\nC. blue\nD. white\n{LETTER}"
    assert by_id[252].prompt == f'Is it "red"?\nA. yes\nB. no\n{LETTER}'
    assert Image.open(io.BytesIO(by_id[241].image)).size == (32, 24)
    assert by_id[1000241].reference.options == ["white", "red", "green", "blue"] and by_id[1000241].reference.answer == "B"
    right = {task.key_of(e): e.reference.answer for e in examples}
    assert task.score(examples, right)["score"] == 100
    result = task.score(examples, {**right, "2000241": "B. wrong"})  # one rotation wrong: the question is
    assert (result["circular"], result["accuracy"], result["score"], result["metric"]) == (50, 100, 50, "circular")
    assert result["categories"] == {"colour": 0, "existence": 100}
    always_a = task.score(examples, dict.fromkeys(right, "A"))
    assert (always_a["circular"], always_a["accuracy"]) == (0, 100)


def test_mmbench_base_rows_get_the_official_rotations(tmp_path):
    data_roots.write_mmbench(tmp_path / "official")
    data_roots.write_mmbench(tmp_path / "base", rotations=False)
    task = tasks.load("mmbench")
    official = {e.question_id: e for e in task.examples(tmp_path / "official")}
    generated = {e.question_id: e for e in task.examples(tmp_path / "base")}
    assert generated == official


def test_mmbench_answers_to_base_rows_alone(tmp_path):
    data_roots.write_mmbench(tmp_path)
    task = tasks.load("mmbench")
    examples = task.examples(tmp_path)
    result = task.score(examples, {"241": "A", "252": "B"})
    assert (result["score"], result["accuracy"], result["circular"], result["metric"]) == (50, 50, None, "accuracy")
    assert (result["n"], result["missing"], result["categories"]) == (2, 4, None)
    base = [e for e in examples if not e.reference.rotation]
    alone = task.score(base, {"241": "A", "252": "B"})  # nor where the rotations were not asked
    assert (alone["score"], alone["circular"], alone["metric"], alone["missing"]) == (50, None, "accuracy", 0)
    partly = task.score(examples, {"241": "A", "252": "A", "1000252": "B"})
    assert (partly["score"], partly["metric"], partly["missing"]) == (50, "circular", 3)


def test_mmbench_images_by_reference_and_broken(tmp_path):
    """Some releases write a rotation's image as the index of the row that holds it; broken base64 is kept, to fail when opened."""
    rows = data_roots.mmbench_rows()
    rows.append({**rows[0], "index": 1000241, "image": "241"})
    rows.append({**rows[0], "index": 2000241, "image": "abcde"})
    path = tmp_path / "mmbench/mmbench_dev_20230712.tsv"
    path.parent.mkdir()
    with path.open("w", newline="") as f:
        writer = csv.DictWriter(f, data_roots.MMBENCH_COLUMNS, delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    by_id = {e.question_id: e for e in tasks.load("mmbench").examples(tmp_path)}
    assert by_id[1000241].image == by_id[241].image == base64.b64decode(rows[0]["image"])
    with pytest.raises(OSError):
        Image.open(io.BytesIO(by_id[2000241].image))


def test_mmbench_long_images_leave_csv_as_it_was(tmp_path):
    data_roots.write_mmbench(tmp_path)
    path = tmp_path / "mmbench/mmbench_dev_20230712.tsv"
    rows = data_roots.mmbench_rows()[:1]
    rows[0]["image"] = base64.b64encode(b"\0" * 200_000).decode()
    with path.open("w", newline="") as f:
        writer = csv.DictWriter(f, data_roots.MMBENCH_COLUMNS, delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    before = csv.field_size_limit(150_000)
    try:
        assert len(tasks.load("mmbench").examples(tmp_path)[0].image) == 200_000
        assert csv.field_size_limit() == 150_000
    finally:
        csv.field_size_limit(before)


def test_mmbench_cut_off_file(tmp_path):
    path = tmp_path / "mmbench/mmbench_dev_20230712.tsv"
    path.parent.mkdir()
    path.write_text("index\tquestion\n1\twhat\n")
    with pytest.raises(LlavaRegionError, match="lacks the columns answer, image, A, B"):
        tasks.load("mmbench").examples(tmp_path)


def test_mmbench_reads_the_option_spelt_out():
    reference = mmbench.Reference(1, 0, ["red", "light blue"], "B", "")
    assert mmbench.correct("Light blue.", reference)
    assert not mmbench.correct("blue", reference)
    assert not mmbench.correct("", reference)


def test_gqa(tmp_path):
    data_roots.write_gqa(tmp_path)
    examples = tasks.load("gqa").examples(tmp_path)
    assert examples[0].prompt == "Is it overcast?\nAnswer the question using a single word or phrase."
    assert [e.image.name for e in examples] == ["n1.jpg", "n2.jpg", "n2.jpg"]
    result = run("gqa", tmp_path, ["No.", "woman", "RED"])
    assert result["score"] == pytest.approx(200 / 3)
    assert (result["binary"], result["open"]) == (100, 0)
    assert result["types"] == {"choose": 100, "query": 0, "verify": 100}
    assert run("gqa", tmp_path, ["", "the women", "not red"])["score"] == 0


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        (" B\n", "B"),
        ("B. Chile", "B"),
        ("The answer is C.", "C"),
        ("LECTURE: ... The answer is D, as shown.", "D"),
        ("The answer is A. The answer is B.", None),  # two
        ("The answer is Apple.", None),  # inside a word
        ("Blue", None),
        ("(B)", None),
        ("b", None),
        ("", None),
    ],
)
def test_scienceqa_parse(text, letter):
    assert scienceqa.parse(text) == letter


def test_scienceqa(tmp_path):
    data_roots.write_scienceqa(tmp_path)
    examples = tasks.load("scienceqa").examples(tmp_path)
    assert [e.question_id for e in examples] == ["4", "7", "12"]
    assert examples[0].prompt == f"Which is red?\nA. the apple\nB. the sky\n{LETTER}"
    assert examples[1].image is None and examples[0].image.exists()
    result = run("scienceqa", tmp_path, ["A", "A", "D. Fiji"])
    assert (result["score"], result["n"], result["missing"]) == (50, 2, 0)
    assert result["accuracy_all"] == pytest.approx(100 / 3)
    assert result["subjects"] == {"natural science": 100, "social science": 0}
    only_images = run("scienceqa", tmp_path, ["A", None, None])
    assert (only_images["score"], only_images["missing"], only_images["accuracy_all"]) == (50, 1, None)
    assert run("scienceqa", tmp_path, ["E", "E", "E"])["score"] == 0  # past the last option


def test_scienceqa_prompts_of_another_split(tmp_path):
    data_roots.write_scienceqa(tmp_path)
    path = tmp_path / "scienceqa/llava_test_CQM-A.json"
    rows = json.loads(path.read_text())
    data_roots.write_json(path, [*rows, {**rows[0], "id": "13"}])  # a train problem among the test problems
    assert [e.question_id for e in tasks.load("scienceqa").examples(tmp_path)] == ["4", "7", "12"]
    data_roots.write_json(path, rows[:2])
    with pytest.raises(LlavaRegionError, match="lacks 1 of the 3 test problems, such as 12"):
        tasks.load("scienceqa").examples(tmp_path)


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("Dakota", 1),  # 7 of 10 agree
        ("the dakota.", 1),
        ("dakota digital", 0.9 * 1 / 3),  # given by one: 9 times of 10 one other agrees, once none
        ("", 0),
        ("camera", 0),
    ],
)
def test_vqa_accuracy(prediction, expected):
    references = ["dakota"] * 7 + ["Dakota Digital", "clos culombu", "nous les gosses"]
    assert textvqa.vqa_accuracy(prediction, references) == pytest.approx(expected)


def test_vqa_accuracy_of_few_people():
    references = ["2", "two", "2", *["3"] * 7]  # three agree on 2: three times of ten 2/3, else 1
    assert textvqa.vqa_accuracy("Two", references) == pytest.approx((3 * 2 / 3 + 7) / 10)
    assert textvqa.vqa_accuracy("", ["the"] * 10) == 0


def test_vqa_accuracy_equals_upstream():
    upstream = pytest.importorskip("llava.eval.m4c_evaluator").TextVQAAccuracyEvaluator()
    references = ["red", "Red.", "the red", "two", "2", "t-shirt", "t shirt", "dont", "don't", "red"]
    for prediction in ["red", "2", "T-Shirt", "dont", "a", "blue", "The Red!"]:
        expected = upstream.eval_pred_list([{"pred_answer": prediction, "gt_answers": references}])
        assert textvqa.vqa_accuracy(prediction, references) == pytest.approx(expected), prediction


@pytest.mark.parametrize(
    ("prompt", "question"),
    [
        ("What Brand?\nReference OCR token: A, B\nAnswer the question using a single word or phrase.", "what brand?"),
        ("<image>\nWhat brand?\nReference OCR token: \nAnswer the question using a single word or phrase.", "what brand?"),
        ("Reference OCR token: A\nWhat brand?\nAnswer the question using a single word or phrase.", "what brand?"),
        ("What brand?\nAnswer the question using a single word or phrase.", "what brand?"),
        ("OCR tokens: A, B\nQuestion: What brand? Short answer:", "what brand?"),
    ],
)
def test_textvqa_question_of(prompt, question):
    assert textvqa.question_of(prompt) == question
    if upstream := _upstream_prompt_processor():
        assert upstream(prompt.removeprefix("<image>\n")).strip() == question


def test_textvqa_image_id_of_digits_only():
    """16 digits are an image's id that happens to have no letter; fewer are a question's number."""
    row = {"prompt": "What?\nAnswer the question using a single word or phrase."}
    assert textvqa.key({**row, "question_id": "1234567890123456"}) == ("1234567890123456", "what?")
    assert textvqa.key({**row, "question_id": 34602}) == "34602"


def _upstream_prompt_processor():
    try:
        from llava.eval.eval_textvqa import prompt_processor
    except ImportError:
        return None
    return prompt_processor


def test_textvqa(tmp_path):
    data_roots.write_textvqa(tmp_path)
    task = tasks.load("textvqa")
    examples = task.examples(tmp_path)
    assert [e.question_id for e in examples] == ["003a8ae2ef43b901", "003a8ae2ef43b901", "0054c91397f2fe05"]
    assert len({task.key_of(e) for e in examples}) == 3
    assert examples[0].image.exists()
    texts = ["dakota", "Copenhagen", "2"]
    expected = 100 * (1 + 1 + 1) / 3  # "2" and "two" are four of ten
    as_llava = [e.row(text) for e, text in zip(examples, texts, strict=True)]
    by_number = [{"question_id": i, "prompt": "", "text": text} for i, text in zip((34602, 34603, 34604), texts, strict=True)]
    as_strings = [{**row, "question_id": str(row["question_id"])} for row in by_number]
    for rows in (as_llava, by_number, as_strings, as_llava[::-1]):
        assert task.score(examples, answers.pair(task, examples, rows))["score"] == pytest.approx(expected)
    swapped = [{**as_llava[0], "text": "copenhagen"}, {**as_llava[1], "text": "dakota"}]
    result = task.score(examples, answers.pair(task, examples, swapped))
    assert (result["score"], result["missing"]) == (0, 1)


def test_textvqa_files_that_do_not_belong_together(tmp_path):
    data_roots.write_textvqa(tmp_path)
    path = tmp_path / "textvqa/llava_textvqa_val_v051_ocr.jsonl"
    path.write_text(path.read_text().split("\n")[0] + "\n")
    with pytest.raises(LlavaRegionError, match="2 questions are in only one of"):
        tasks.load("textvqa").examples(tmp_path)
