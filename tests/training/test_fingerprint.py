"""A run resumes as the same run, or not at all: what differs is named, what may differ is a short list."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("llava.train.train")

from llava_region import LlavaRegionError
from llava_region.train import main
from llava_region.training.fingerprint import Fingerprint, check_same_run, differences, remarks
from tests.helpers.command_line import run
from tests.helpers.training_runs import LORA, llava_flags

RUN = Fingerprint(
    upstream="llava",
    flags={"learning_rate": 2e-4, "version": "v1"},
    contents={"--data_path": "a", "--model_name_or_path": "m"},
    steps={"max_steps": -1.0, "num_train_epochs": 1.0},
    batch={"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1, "devices": 8},
    processes=8,
    deepspeed={"zero_optimization.stage": 3},
    versions={"torch": "2.1.2"},
)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"upstream": "bunny"}, "upstream: was llava, is bunny"),
        ({"flags": {"learning_rate": 1e-4, "version": "v1"}}, "--learning_rate: was 0.0002, is 0.0001"),
        (
            {"contents": {**RUN.contents, "--data_path": f"9 bytes, sha256 {'b' * 64}"}},
            f"--data_path: was a, is 9 bytes, sha256 {'b' * 12}",
        ),
        ({"contents": {"--data_path": "a"}}, "the content of --model_name_or_path: was m, is not given"),
        ({"contents": {**RUN.contents, "--pretrain_mm_mlp_adapter": "p"}}, "--pretrain_mm_mlp_adapter: was not given, is p"),
        ({"batch": {**RUN.batch, "devices": 4}}, "samples per step: was 128 (16 per device x 1 accumulated x 8 devices), is 64 (16 "),
        ({"batch": {**RUN.batch, "devices": 4, "gradient_accumulation_steps": 2}}, "an optimizer state for each: was 8, is 4"),
        ({"steps": {"max_steps": -1.0, "num_train_epochs": 0.5}}, "--num_train_epochs: was 1, is 0.5, and may only rise"),
        ({"steps": {"max_steps": 50.0, "num_train_epochs": 1.0}}, "--max_steps: was not given and came to 100, is 50, and may only rise"),
        ({"deepspeed": None}, "--deepspeed: was given, is not given"),
        ({"deepspeed": {}}, "zero_optimization.stage in --deepspeed: was 3, is not set"),
        ({"deepspeed": None, "processes": 1}, "--deepspeed: was given"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value.split(":")[0],
)
def test_what_differs_is_named(changed: dict, said: str) -> None:
    now = replace(RUN, **changed)
    assert any(said in line for line in differences(RUN, now, total=100)), list(differences(RUN, now, total=100))
    assert not list(differences(now, now)) and not list(remarks(now, now))


def test_what_may_differ_is_said() -> None:
    now = replace(
        RUN,
        steps={"max_steps": -1.0, "num_train_epochs": 2.0},
        batch={"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "devices": 8},
        versions={"torch": "2.2.0"},
    )
    assert not list(differences(RUN, now))
    said = list(remarks(RUN, now))
    assert "--num_train_epochs was 1, is 2" in said[0] and "(8 per device x 2 accumulated" in said[1] and "torch 2.1.2 -> 2.2.0" in said[2]
    in_steps = replace(RUN, steps={"max_steps": 100.0, "num_train_epochs": 1.0})
    assert not list(differences(RUN, in_steps, total=100))
    ddp = replace(RUN, deepspeed=None)  # every process has all of the optimizer
    fewer = replace(ddp, processes=4, batch={"per_device_train_batch_size": 32, "gradient_accumulation_steps": 1, "devices": 4})
    assert not list(differences(ddp, fewer))
    # nn.DataParallel: one process with as many devices, which draws the order of samples from another random source
    assert "processes: was 8, is 1, and one draws the order" in next(iter(differences(ddp, replace(ddp, processes=1))))


def test_a_checkpoint_of_0_1_0_and_a_damaged_one(tmp_path: Path) -> None:
    assert "not known" in check_same_run(tmp_path, RUN)[0]
    for content in ("{", "[]", "{}"):
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(LlavaRegionError, match=r"run\.json"):
            check_same_run(tmp_path, RUN)
    (tmp_path / "run.json").write_text(json.dumps(RUN.to_dict()))
    assert check_same_run(tmp_path, RUN) == []


@pytest.fixture(scope="module")
def stopped(tiny, tmp_path_factory) -> Path:
    """The folder of a LoRA run that was lost after its second step of four, and copies of what it read."""
    folder = tmp_path_factory.mktemp("stopped")
    for name in ("vicuna-tiny", "clip-tiny", "data.json"):
        source = tiny.backbone.parent / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    assert main(command(tiny, folder / "run")) == 0
    shutil.rmtree(folder / "run" / "checkpoint-4")
    (folder / "run" / "cost.json").unlink()
    return folder


def command(tiny, out: Path, **changes: object) -> list[str]:
    options = {**LORA, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, **changes}
    return ["llava", *llava_flags(tiny, out, **options), "--tune_layers", "1,6"]


OTHERS = {
    "lora_alpha": 32, "learning_rate": 1e-4, "weight_decay": 0.1, "seed": 7, "lr_scheduler_type": "cosine", "max_steps": 3,
    "group_by_modality_length": False, "model_max_length": 256, "image_aspect_ratio": "square", "per_device_train_batch_size": 2,
    "mm_projector_lr": 1e-5, "max_grad_norm": 0.5, "lora_dropout": 0.2, "warmup_ratio": 0.5, "mm_vision_select_layer": -1,
    "adam_beta2": 0.95,
}  # fmt: skip


@pytest.mark.parametrize("flag", OTHERS)
def test_another_flag_is_refused_before_weights_load(tiny, stopped, capsys, monkeypatch, flag: str) -> None:
    monkeypatch.setattr("llava_region.train.launch", lambda *_: pytest.fail("weights would be loaded"))
    before = sorted(path.name for path in (stopped / "run").rglob("*"))
    ran = run(capsys, *command(tiny, stopped / "run", **{flag: OTHERS[flag]}), main=main)
    said = "samples per step" if flag == "per_device_train_batch_size" else f"--{flag}: was "
    assert ran.code == 2 and ran.err.count("\n") == 1 and "is of another run: " in ran.err and said in ran.err, ran
    assert sorted(path.name for path in (stopped / "run").rglob("*")) == before and not (stopped / ".run.lock").exists()


def test_other_content_is_refused(tiny, stopped, tmp_path, capsys, monkeypatch) -> None:
    """One record less, another projector, another backbone and tower of the same shapes."""
    monkeypatch.setattr("llava_region.train.launch", lambda *_: pytest.fail("weights would be loaded"))
    (tmp_path / "data.json").write_text(json.dumps(json.loads(tiny.data.read_text())[1:]))
    for name in ("vicuna-tiny", "clip-tiny"):
        shutil.copytree(tiny.backbone.parent / name, tmp_path / name)
        weights = tmp_path / name / "model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    for flag, name in (("data_path", "data.json"), ("model_name_or_path", "vicuna-tiny"), ("vision_tower", "clip-tiny")):
        ran = run(capsys, *command(tiny, stopped / "run", **{flag: tmp_path / name}), main=main)
        assert ran.code == 2 and f"the content of --{flag}: was " in ran.err and "sha256" in ran.err, ran


def test_the_same_content_elsewhere_resumes(tiny, stopped, tmp_path, capsys) -> None:
    """Files that were moved, other logging and saving, more steps, and the flag that names the checkpoint."""
    out = tmp_path / "run"
    shutil.copytree(stopped / "run", out)
    moved = {"data_path": stopped / "data.json", "model_name_or_path": stopped / "vicuna-tiny", "vision_tower": stopped / "clip-tiny"}
    free = {"logging_steps": 2, "save_steps": 1, "dataloader_num_workers": 1, "max_steps": 6, "resume_from_checkpoint": "True"}
    ran = run(capsys, *command(tiny, out, **moved, **free), main=main)
    assert ran.code == 0, ran.err[-3000:]
    assert f"resuming from {out}/checkpoint-2" in ran.out and "note: --max_steps was 4, is 6" in ran.out
    assert json.loads((out / "cost.json").read_text())["steps"] == 6
    assert json.loads((out / "checkpoint-6" / "run.json").read_text())["steps"]["max_steps"] == 6


def test_a_checkpoint_of_another_step_is_refused(tiny, stopped, tmp_path, capsys) -> None:
    """Its folder was replaced by hand, or while the run was loading."""
    out = tmp_path / "run"
    shutil.copytree(stopped / "run", out)
    renamed = (out / "checkpoint-2").rename(out / "checkpoint-3")
    ran = run(capsys, *command(tiny, out), main=main)
    assert ran.code == 2 and f"resumes from {renamed}, but would go on after step 2" in ran.err, ran.err[-2000:]
