"""Answers files go both ways: LLaVA's own scorers take ours, and ours take any that LLaVA's scripts or an editor leave."""

import json
import subprocess
import sys

import pytest

from llava_region import LlavaRegionError, tasks
from llava_region.tasks import answers
from tests.helpers import data_roots
from tests.helpers.command_line import run
from tests.helpers.training_runs import environment


@pytest.mark.parametrize("given", [["A", "A", "D. Fiji"], ["The answer is A.", "C", "B"]])
def test_llavas_scorer_of_scienceqa_takes_ours(tmp_path, given):
    """It tells questions with an image by `<image>` in the prompt, and divides by their number."""
    pytest.importorskip("llava.eval")
    data_roots.write_scienceqa(tmp_path)
    task = tasks.load("scienceqa")
    examples = task.examples(tmp_path)
    rows = [example.row(text) for example, text in zip(examples, given, strict=True)]
    (tmp_path / "ours.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = [str(tmp_path / name) for name in ("ours.jsonl", "output.jsonl", "result.json")]
    command = [sys.executable, "-m", "llava.eval.eval_science_qa", "--base-dir", str(tmp_path / "scienceqa"), "--split", "test"]
    command += [word for pair in zip(("--result-file", "--output-file", "--output-result"), files, strict=True) for word in pair]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=120)
    assert done.returncode == 0, done.stderr[-1500:]
    ours = task.score(examples, answers.pair(task, examples, rows))
    assert f"IMG-Accuracy: {ours['score']:.2f}%" in done.stdout and f"Accuracy: {ours['accuracy_all']:.2f}%, IMG" in done.stdout


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_encodings_and_line_ends(tmp_path, encoding, end):
    rows = [{"question_id": 7, "prompt": "é", "text": "模型"}, {"question_id": "8", "prompt": "", "text": "a"}]
    path = tmp_path / "answers.jsonl"
    path.write_bytes(end.join(json.dumps(row, ensure_ascii=False) for row in rows).encode(encoding))
    assert answers.read(path) == rows


def test_another_encoding_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('{"question_id": 7, "text": "é"}'.encode("latin-1"))
    with pytest.raises(LlavaRegionError, match=r"is not a text file in UTF-8 .*; save it in that encoding"):
        answers.read(tmp_path / "a.jsonl")


ODD = [None, True, 3, 3.5, -1, "", [], [1], {}, {"a": 1}, "xxxxx"]


@pytest.mark.parametrize("name", ["gqa", "textvqa", "scienceqa", "mmbench", "docvqa", "ocrvqa", "tdiuc", "refcocog", "mmlu", "bbh"])
def test_fields_of_any_type_are_scored_or_refused_in_one_line(name, tmp_path, capsys):
    root = data_roots.write_all(tmp_path / "root")
    task = tasks.load(name)
    rows = [example.row("A") for example in task.examples(root)[:3]]
    path = tmp_path / "answers.jsonl"
    for field in ("question_id", "prompt", "text", "round_id", "options"):
        for value in ODD:
            path.write_text("\n".join(json.dumps({**row, field: value}) for row in rows))
            done = run(capsys, "eval", "--task", name, "--data-root", root, "--predictions", path, "--json")
            assert done.code == 0 or (done.code == 2 and done.err.count("\n") == 1 and done.err.startswith("error: ")), (field, value, done)
            if field == "text" and not isinstance(value, str):
                assert done.code == 2 and 'row 1 lacks "question_id" (text or a whole number) or "text" (text)' in done.err


def test_rounds_are_known_by_their_options(tmp_path):
    """As LLaVA's `--all-rounds` writes them; whichever way they turn."""
    data_roots.write_mmbench(tmp_path, rotations=False)
    task = tasks.load("mmbench")
    examples = task.examples(tmp_path)
    four = ["red", "green", "blue", "white"]
    for turn in (1, -1):
        rows = []
        for question, options, right in ((241, four, "red"), (252, ["yes", "no"], "yes")):
            for number in range(len(options)):
                shift = turn * number % len(options)
                shown = options[shift:] + options[:shift]
                rows.append({"question_id": question, "round_id": number, "options": shown, "text": "ABCD"[shown.index(right)]})
        assert task.score(examples, answers.pair(task, examples, rows))["score"] == 100
    rows = [{"question_id": 241, "round_id": 1, "text": "A", "prompt": ""}]
    with pytest.raises(LlavaRegionError, match=r"row 1 of the answers to mmbench has a 'round_id' and no list of texts as 'options'"):
        answers.pair(task, examples, rows)


def test_a_questions_file_without_answers(tmp_path):
    """The test split of MMBench: every answer would be wrong."""
    data_roots.write_mmbench(tmp_path)
    (path,) = (tmp_path / "mmbench").glob("*.tsv")
    head, *lines = path.read_text().splitlines()
    at = head.split("\t").index("answer")
    rows = [line.split("\t") for line in lines]
    for given in ("", "nan", "E", "AB"):
        path.write_text("\n".join([head, *("\t".join([*row[:at], given, *row[at + 1 :]]) for row in rows)]) + "\n")
        with pytest.raises(LlavaRegionError, match=rf"has the answer '{given}', which is none of its options; give the dev split"):
            tasks.load("mmbench").examples(tmp_path)


def test_what_an_editor_leaves_in_mmlu(tmp_path):
    """An empty line at the end, and an encoding mark at the beginning."""
    data_roots.write_mmlu(tmp_path)
    before = tasks.load("mmlu").examples(tmp_path)
    path = tmp_path / "mmlu/test/anatomy_test.csv"
    path.write_bytes("\ufeff".encode() + path.read_bytes().rstrip() + b"\r\n\r\n")
    assert tasks.load("mmlu").examples(tmp_path) == before
