"""Data for scoring and perplexity, made from the benchmarks' own files and from text files."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from llava_region import tasks
from llava_region.data.records import read_records
from tests.helpers.data_roots import write_all
from tests.scripts.test_launchers import SCRIPTS

SCRIPT = SCRIPTS / "reproduce" / "score_data.py"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_all(tmp_path_factory.mktemp("root"))


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("score_data", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, words)], capture_output=True, text=True)


@pytest.mark.parametrize("name", [name for name in tasks.NAMES if name != "mmbench"])
def test_answers_are_those_that_the_scorer_counts_as_right(root, tmp_path, script, name):
    """Every question of every benchmark; the box of RefCOCOg is rounded as LLaVA's training data is."""
    done = run("answers", name, "--data-root", root, "--out", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    records = read_records(tmp_path / "out.json")
    task = tasks.load(name)
    examples = task.examples(root)
    assert len(records) == len(examples)
    assert all((root / record["image"]).is_file() for record in records if "image" in record)
    assert any("image" in record for record in records) == task.visual
    answers = {task.key_of(example): record["conversations"][1]["value"] for example, record in zip(examples, records, strict=True)}
    score = task.score(examples, answers)["score"]
    assert score == pytest.approx(100, abs=3 if name == "refcocog" else 1e-9), answers


def test_images_inside_a_file_are_refused(root, tmp_path):
    done = run("answers", "mmbench", "--data-root", root, "--out", tmp_path / "out.json")
    assert done.returncode == 2 and "keeps its images inside" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out.json").exists()


def test_paragraphs(tmp_path, script):
    words = [f"word{n}" for n in range(60)]
    (tmp_path / "a.txt").write_text("short one\n\n" + " ".join(words) + "\n \n\n" + "\n".join(words[:40]) + "\n")
    done = run("text", tmp_path / "a.txt", "--out", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    first, second = read_records(tmp_path / "out.json")
    assert first["conversations"][0]["value"].split() == words[:20] and first["conversations"][1]["value"].split() == words[20:]
    assert second["id"] == "a.txt/2" and len(second["conversations"][1]["value"].split()) == 20
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    assert "give text files in UTF-8" in run("text", tmp_path / "b.txt", "--out", tmp_path / "no.json").stderr
    (tmp_path / "c.txt").write_text("few words")
    assert "has 40 words" in run("text", tmp_path / "c.txt", "--out", tmp_path / "no.json").stderr
    assert not (tmp_path / "no.json").exists()


def test_a_limit_draws_the_same_records_each_time(tmp_path, script):
    records = [{"id": str(n)} for n in range(100)]
    drawn = script.some(records, 10)
    assert drawn == script.some(records, 10) and len(drawn) == 10
    assert [int(record["id"]) for record in drawn] == sorted(int(record["id"]) for record in drawn)
    assert script.some(records, 100) == records and script.some(records, None) == records
    done = run("answers", "gqa", "--data-root", tmp_path, "--out", tmp_path / "o", "--limit", "0")
    assert done.returncode == 2 and "at least 1" in done.stderr
    assert run("task", "gqa", "docvqa", "--data-root", tmp_path, "--out", tmp_path / "o").returncode == 2
