"""Benchmarks put to the tiny LLaVA end to end: batches, ranks, kills and resumes, bad images, and answers files without a model."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("llava.model")

import torch

from llava_region import tasks
from llava_region.checkpoints.identity import weights_digest
from llava_region.cli import main
from llava_region.errors import LlavaRegionError
from llava_region.evaluation import evaluate as evaluation
from llava_region.evaluation.evaluate import batches, evaluate, score_predictions
from llava_region.models import LoadedModel, load
from llava_region.tasks import mmlu
from tests.helpers.command_line import refused
from tests.helpers.data_roots import save_picture, write_all, write_mmlu
from tests.helpers.finished_models import without_base


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("root"))


@pytest.fixture
def short(monkeypatch):
    """Tasks as they are, but for short answers: the tiny model, untrained, seldom ends one."""
    real = tasks.load
    monkeypatch.setattr(tasks, "load", lambda name: replace(real(name), max_new_tokens=6))


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def without_generation(monkeypatch):
    def refuse(*_):
        raise AssertionError("nothing was left to ask")

    monkeypatch.setattr(LoadedModel, "generate", refuse)


@pytest.fixture(scope="module")
def whole(llava_checkpoint, root, tmp_path_factory):
    """All ten tasks, asked in batches of 5: the output folder and what `evaluate` returned."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        real = tasks.load
        patch.setattr(tasks, "load", lambda name: replace(real(name), max_new_tokens=6))
        return out, evaluate(llava_checkpoint, tasks.NAMES, root, out, batch_size=5, device="cpu")


@pytest.mark.parametrize("name", tasks.NAMES)
def test_a_task_end_to_end(whole, root, llava_checkpoint, name):
    out, results = whole
    examples = tasks.load(name).examples(root)
    answered = rows(out / f"{name}.jsonl")
    assert [(r["question_id"], r["prompt"]) for r in answered] == [(e.question_id, e.row("")["prompt"]) for e in examples]
    assert all(row["model_id"] == "llava-tiny" and row["metadata"].keys() <= {"cut_prompt"} for row in answered)
    result = results[name]
    assert result["missing"] == result["unreadable_images"] == 0 and "limit" not in result and result["n"] > 1
    scored = score_predictions(name, out / f"{name}.jsonl", root)
    assert scored == {key: result[key] for key in scored}
    record = json.loads((out / "results.json").read_text())
    assert record["tasks"] == json.loads(json.dumps(results))
    assert (record["model"], record["num_layers"], record["upstream"]) == (str(llava_checkpoint), 8, "llava")
    assert sorted(p.name for p in out.iterdir()) == sorted([*(f"{n}.jsonl" for n in tasks.NAMES), "results.json", "settings.json"])


def test_a_question_at_a_time_gives_the_same_answers(whole, llava_checkpoint, root, tmp_path, short):
    names = ["gqa", "textvqa", "scienceqa", "mmbench"]
    single = evaluate(llava_checkpoint, names, root, tmp_path / "out", batch_size=1, workers=1, device="cpu")
    for name in names:
        assert (tmp_path / "out" / f"{name}.jsonl").read_bytes() == (whole[0] / f"{name}.jsonl").read_bytes()
        assert single[name] == whole[1][name]
    assert len({row["text"] for name in names for row in rows(whole[0] / f"{name}.jsonl")}) > 5


def test_shots_are_dropped_until_a_prompt_fits(llava_checkpoint, root, monkeypatch):
    loaded = load(llava_checkpoint, device="cpu")
    example = mmlu.TASK.examples(root)[0]
    whole_ids, excess = evaluation._fit(loaded, mmlu.TASK, example)
    assert excess == 0 and len(whole_ids) <= 512
    fitted = [evaluation._fit(loaded, mmlu.TASK, example)]
    for maximum in (300, 60):
        monkeypatch.setattr(loaded.model.config, "tokenizer_model_max_length", maximum)
        fitted.append(evaluation._fit(loaded, mmlu.TASK, example))
    counts = [loaded.tokenizer.decode(ids).count("Answer:") for ids, _ in fitted]
    assert counts[0] > counts[1] > counts[2] == 0
    assert fitted[1][1] == 0 and fitted[2][1] == len(fitted[2][0]) - 60 > 0


def test_nothing_is_asked_twice(whole, llava_checkpoint, root, tmp_path, short, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(whole[0], out)
    without_generation(monkeypatch)
    assert evaluate(llava_checkpoint, ["gqa", "bbh"], root, out, batch_size=5, device="cpu") == {n: whole[1][n] for n in ("gqa", "bbh")}
    assert json.loads((out / "results.json").read_text()) == json.loads((whole[0] / "results.json").read_text())


def test_a_line_cut_short_is_asked_again(whole, llava_checkpoint, root, tmp_path, short, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(whole[0], out)
    complete = (out / "bbh.jsonl").read_bytes()
    lines = complete.splitlines(keepends=True)
    (out / "bbh.jsonl").write_bytes(b"".join(lines[3:9]) + lines[10][:-25])
    asked = []
    real = LoadedModel.generate
    monkeypatch.setattr(LoadedModel, "generate", lambda self, ids, *rest: asked.append(len(ids)) or real(self, ids, *rest))
    result = evaluate(llava_checkpoint, ["bbh"], root, out, batch_size=5, device="cpu")
    assert (out / "bbh.jsonl").read_bytes() == complete and result["bbh"] == whole[1]["bbh"]
    assert 21 <= sum(asked) <= 27  # whole batches, so that answers cannot depend on what was answered before


def command(*arguments) -> list[str]:
    return [sys.executable, "-m", "llava_region", "eval", *map(str, arguments), "--device", "cpu"]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
CHECKOUT = Path(__file__).parents[2]


def test_killed_and_resumed_gives_the_same_answers(llava_checkpoint, tmp_path):
    write_mmlu(tmp_path / "root", questions=1)
    arguments = ("--task", "mmlu", "--data-root", tmp_path / "root", "--batch-size", 2, "--limit", 24)
    out, answers = tmp_path / "killed", tmp_path / "killed" / "mmlu.jsonl"
    process = subprocess.Popen(command(llava_checkpoint, *arguments, "--out", out), cwd=CHECKOUT, env=ENVIRONMENT)
    deadline = time.monotonic() + 240
    while not (answers.is_file() and answers.read_bytes().count(b"\n") >= 4):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    first = rows(answers) if answers.read_bytes().endswith(b"\n") else rows(answers)[:-1]
    assert 4 <= len(first) < 24 and not (out / "results.json").exists()
    resumed = evaluate(llava_checkpoint, ["mmlu"], tmp_path / "root", out, batch_size=2, limit=24, device="cpu")
    unbroken = evaluate(llava_checkpoint, ["mmlu"], tmp_path / "root", tmp_path / "unbroken", batch_size=2, limit=24, device="cpu")
    assert answers.read_bytes() == (tmp_path / "unbroken" / "mmlu.jsonl").read_bytes() and resumed == unbroken
    assert all(row in rows(answers) for row in first)


def test_two_ranks_agree_with_one(llava_checkpoint, root, tmp_path):
    names = ["gqa", "bbh"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "-m", "llava_region", "eval"]
    options = [
        "--task",
        ",".join(names),
        "--data-root",
        str(root),
        "--out",
        str(tmp_path / "two"),
        "--batch-size",
        "2",
        "--limit",
        "7",
        "--json",
    ]
    done = subprocess.run(
        [*launch, str(llava_checkpoint), *options, "--device", "cpu"], cwd=CHECKOUT, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    one = evaluate(llava_checkpoint, names, root, tmp_path / "one", batch_size=2, limit=7, device="cpu")
    assert json.loads(done.stdout) == json.loads(json.dumps(one))
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == sorted(p.name for p in (tmp_path / "one").iterdir())
    for name in names:
        assert (tmp_path / "two" / f"{name}.jsonl").read_bytes() == (tmp_path / "one" / f"{name}.jsonl").read_bytes()


def test_what_a_dead_rank_answered_is_kept(whole, llava_checkpoint, root, tmp_path, short, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(whole[0], out)
    lines = (out / "bbh.jsonl").read_bytes().splitlines(keepends=True)
    (out / "bbh.jsonl").write_bytes(b"".join(lines[:7]) + lines[7][:9])
    (out / "bbh.rank1.jsonl").write_bytes(b"".join(lines[7:]) + b'{"question')
    without_generation(monkeypatch)
    evaluate(llava_checkpoint, ["bbh"], root, out, batch_size=5, device="cpu")
    assert (out / "bbh.jsonl").read_bytes() == b"".join(lines) and not (out / "bbh.rank1.jsonl").exists()


def test_answers_of_another_model_or_to_other_questions_are_refused(whole, llava_checkpoint, lora_run, tiny, root, tmp_path, short):
    out = whole[0]
    with pytest.raises(LlavaRegionError, match="of a model with other weights than this one; give another --out"):
        evaluate(lora_run, ["gqa"], root, out, base=tiny.backbone, device="cpu")
    with pytest.raises(LlavaRegionError, match=r"other template \(vicuna_v1\) than this one \(llava_v1\)"):
        evaluate(llava_checkpoint, ["gqa"], root, out, template="llava_v1", device="cpu")
    with pytest.raises(LlavaRegionError, match=r"other dtype \(float32\) than this one \(bfloat16\)"):
        evaluate(llava_checkpoint, ["gqa"], root, out, dtype="bf16", device="cpu")
    changed = tmp_path / "root"
    shutil.copytree(root / "gqa", changed / "gqa")
    file = changed / "gqa" / "testdev_balanced_questions.json"
    file.write_text(file.read_text().replace("overcast", "sunny"))
    with pytest.raises(LlavaRegionError, match=r"answers to gqa .* are to other questions"):
        evaluate(llava_checkpoint, ["gqa"], changed, out, device="cpu")
    shutil.copytree(out, tmp_path / "out")
    (tmp_path / "out" / "settings.json").unlink()
    with pytest.raises(LlavaRegionError, match="not known what answered"):
        evaluate(llava_checkpoint, ["gqa"], root, tmp_path / "out", device="cpu")


def test_the_weights_digest_sees_one_changed_layer(llava_checkpoint, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(llava_checkpoint, tmp_path / "same")
    assert weights_digest(tmp_path / "same") == weights_digest(llava_checkpoint) != weights_digest(llava_checkpoint, tmp_path / "same")
    file = next((tmp_path / "same").glob("*.safetensors"))
    tensors = load_file(file)
    for name in tensors:
        if "model.layers.5." in name:
            tensors[name] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    assert weights_digest(tmp_path / "same") != weights_digest(llava_checkpoint)


def test_bad_images_are_counted_wrong_and_asked_again_when_mended(llava_checkpoint, root, tmp_path, short, whole):
    shutil.copytree(root / "gqa", tmp_path / "gqa")
    image = tmp_path / "gqa" / "images" / "n2.jpg"
    image.write_bytes(image.read_bytes()[:300])
    (tmp_path / "gqa" / "images" / "n1.jpg").unlink()
    result = evaluate(llava_checkpoint, ["gqa"], tmp_path, tmp_path / "out", batch_size=5, device="cpu")["gqa"]
    assert (result["unreadable_images"], result["missing"], result["score"], result["n"]) == (3, 0, 0, 3)
    answered = rows(tmp_path / "out" / "gqa.jsonl")
    assert [row["text"] for row in answered] == ["", "", ""]
    assert "missing" in answered[0]["metadata"]["unreadable_image"] and "n2.jpg" in answered[1]["metadata"]["unreadable_image"]
    shutil.copy(root / "gqa" / "images" / "n2.jpg", image)
    save_picture(tmp_path / "gqa" / "images" / "n1.jpg", "green")
    assert evaluate(llava_checkpoint, ["gqa"], tmp_path, tmp_path / "out", batch_size=5, device="cpu")["gqa"] == whole[1]["gqa"]
    assert (tmp_path / "out" / "gqa.jsonl").read_bytes() == (whole[0] / "gqa.jsonl").read_bytes()


def test_a_lora_run_brings_its_region_and_a_limit_is_noted(lora_run, tiny, root, tmp_path, short):
    results = evaluate(lora_run, ["gqa", "bbh"], root, tmp_path / "out", base=tiny.backbone, limit=2, device="cpu")
    assert [(r["n"], r["limit"]) for r in results.values()] == [(2, 2), (2, 2)]
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert record["region"]["layers"] == [1, 6] and record["base"] == str(tiny.backbone)
    full = evaluate(lora_run, ["gqa"], root, tmp_path / "out", device="cpu")  # the base that the run names is the same
    assert full["gqa"]["n"] == 3 and "limit" not in full["gqa"]
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert record["tasks"]["gqa"]["n"] == 3 and record["tasks"]["bbh"]["limit"] == 2


def test_a_plain_language_model_does_text_tasks(tiny, root, tmp_path, short):
    with pytest.raises(LlavaRegionError, match="cannot do gqa; allowed: mmlu, bbh"):
        evaluate(tiny.backbone, ["bbh", "gqa"], root, tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()
    results = evaluate(tiny.backbone, ["bbh"], root, tmp_path / "out", device="cpu", limit=4)
    assert results["bbh"]["n"] == 4
    assert json.loads((tmp_path / "out" / "results.json").read_text())["upstream"] is None


def test_a_batch_too_large_for_the_gpu_is_halved():
    class Model:
        calls: list[int] = []

        def generate(self, ids, pictures, max_new_tokens):
            self.calls.append(len(ids))
            if len(ids) > 2:
                raise torch.cuda.OutOfMemoryError("full")
            return [f"{i}{p}" for i, p in zip(ids, pictures, strict=True)]

    assert evaluation._generate(Model(), [1, 2, 3, 4, 5], list("abcde"), 9) == ["1a", "2b", "3c", "4d", "5e"]
    assert Model.calls == [5, 2, 3, 1, 2]


def test_batches_put_images_and_long_prompts_first(root):
    examples = tasks.load("scienceqa").examples(root) + tasks.load("mmlu").examples(root)[:3]
    found = batches(examples, 2)
    lengths = [(e.image is None, -len(e.prompt)) for batch in found for e in batch]
    assert lengths == sorted(lengths) and [len(batch) for batch in found] == [2, 2, 2]


def test_wrong_input_is_one_line_and_writes_nothing(llava_checkpoint, lora_run, root, tmp_path, capsys):
    model, out = str(llava_checkpoint), str(tmp_path / "out")
    data = ["--data-root", str(root)]
    assert "unknown task 'vqa'" in refused(capsys, "eval", model, "--task", "gqa,vqa", *data, "--out", out)
    assert "--task is missing" in refused(capsys, "eval", model, *data, "--out", out)
    assert "--data-root is missing" in refused(capsys, "eval", model, "--task", "gqa", "--out", out)
    assert "give a MODEL" in refused(capsys, "eval", "--task", "gqa", *data, "--out", out)
    assert "neither MODEL nor --out" in refused(capsys, "eval", model, "--task", "gqa", *data, "--predictions", "x")
    gone = without_base(lora_run, tmp_path / "llava-tiny-lora")
    assert "with --base: /gone/base is not here" in refused(capsys, "eval", gone, "--task", "gqa", *data, "--out", out)
    nameless = without_base(lora_run, tmp_path / "nameless-lora", None)
    assert "was trained on with --base" in refused(capsys, "eval", nameless, "--task", "gqa", *data, "--out", out)
    assert "there is no folder" in refused(capsys, "eval", str(tmp_path / "none"), "--task", "gqa", *data, "--out", out)
    (tmp_path / "root").mkdir()
    message = refused(capsys, "eval", model, "--task", "gqa,mmlu", "--data-root", str(tmp_path / "root"), "--out", out)
    assert "gqa/images/" in message and "stanford.edu" in message and "mmlu/dev/" in message
    assert not Path(out).exists()


def test_answers_are_scored_without_torch(root, tmp_path):
    example, *_ = tasks.load("gqa").examples(root)
    (tmp_path / "answers.jsonl").write_text(json.dumps(example.row("No.")) + "\n")
    argv = ["eval", "--task", "gqa", "--data-root", str(root), "--predictions", str(tmp_path / "answers.jsonl"), "--json"]
    code = f"import sys; from llava_region.cli import main; code = main({argv!r}); sys.exit(code or 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)["gqa"]
    assert (result["n"], result["missing"]) == (3, 2) and result["score"] == pytest.approx(100 / 3)


def test_the_list_names_every_tasks_files(capsys):
    assert main(["eval", "--list"]) == 0
    text = capsys.readouterr().out
    assert main(["eval", "--list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert list(listed) == list(tasks.NAMES)
    for task in listed.values():
        for file in task["files"]:
            assert file["path"] in text and file["source"] in text


def test_the_table_names_what_went_wrong(capsys):
    from llava_region.commands.eval import _show

    _show({"gqa": {"score": 61.25, "n": 12578, "metric": "accuracy", "missing": 0, "unreadable_images": 7, "cut_prompts": 0}})
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["gqa", "61.25", "12,578", "accuracy"] and lines[2].split()[:2] == ["7", "images"] and len(lines) == 3
