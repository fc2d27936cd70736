"""LLaVA's published training lines work with one word changed: their own flags, their own DeepSpeed configs as they are."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("llava.train.train")
pytest.importorskip("deepspeed")

import llava.train

from llava_region.patches import llava_family
from llava_region.train import main
from tests.helpers.command_line import run
from tests.helpers.launch_lines import CONFIGS, LINES, words_of
from tests.helpers.sparse_models import write_sparse_llama
from tests.helpers.training_runs import adapter, environment, layers_of, needs_zero_on_cpu, projector, torchrun, train

SHAPES = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40, "vocab_size": 32000},
}
SCRIPT = Path(llava.train.__path__[0]) / "train_mem.py"
# where training goes: here, on two CPUs, and for two steps
HERE = {
    "tf32": None, "model_max_length": 512, "dataloader_num_workers": 0, "per_device_train_batch_size": 4, "max_steps": 2,
    "warmup_ratio": 0.0, "lr_scheduler_type": "constant", "disable_tqdm": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tiny, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("shapes")
    return {name: write_sparse_llama(folder / f"vicuna-{name}-v1.5", tiny.backbone, **shape) for name, shape in SHAPES.items()}


def write_config(folder: Path, name: str) -> Path:
    path = folder / f"{name}.json"
    path.write_text(json.dumps(CONFIGS[name], indent=4))
    return path


def line(tiny, folder: Path, script: str, config: str | None = None, **changes: Any) -> tuple[list[str], Path]:
    """The words of a published line, with a user's own paths; and the DeepSpeed config that it names."""
    flags, its_config = LINES[script]
    path = write_config(folder, config or its_config)
    paths = {
        "deepspeed": path, "model_name_or_path": tiny.backbone, "data_path": tiny.data, "image_folder": tiny.images,
        "vision_tower": tiny.vision_tower, "output_dir": folder / ("llava-lora" if "lora" in script else "llava"),
    }  # fmt: skip
    return words_of({**flags, **paths, **changes}), path


@pytest.fixture
def with_packages(monkeypatch):
    """As if wandb and bitsandbytes were installed: a dry run only looks whether they are. PEFT would import the second."""
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: found("json" if name == "wandb" else name, *rest))
    pretending = SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: found("json" if name == "bitsandbytes" else name)))
    monkeypatch.setattr(llava_family, "importlib", pretending)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("script", LINES)
def test_published_line_passes_a_dry_run(tiny, models, tmp_path, capsys, with_packages, script, shape):
    words, path = line(tiny, tmp_path, script, model_name_or_path=models[shape])
    before = path.read_bytes()
    rehearse = ["--dry_run_step", str(script.startswith("v1_5") and shape == "7b")]
    done = run(capsys, str(SCRIPT), *words, "--tune_layers", "sparse:25%", "--dry_run", "True", *rehearse, main=main)
    assert done.code == 0, done.err
    assert path.read_bytes() == before
    said = [text for text in done.out.splitlines() if text.startswith("DeepSpeed")]
    if path.stem == "zero3" and shape == "7b":
        assert len(said) == 1 and said[0].endswith('"auto" would be a fraction for hidden size 4096, and is 15099494')
    else:
        assert said == [], "nothing is said where nothing is corrected"


@pytest.mark.parametrize("script", ["v1_5/finetune.sh", "v1_5/finetune_lora.sh"])
def test_published_line_with_the_offloading_config_passes_a_dry_run(tiny, models, tmp_path, capsys, with_packages, script):
    """Its optimizer would train the projector at LoRA's rate; full tuning has one rate, and keeps it."""
    words, _ = line(tiny, tmp_path, script, "zero3_offload", model_name_or_path=models["13b"])
    done = run(capsys, str(SCRIPT), *words, "--tune_layers", "sparse:25%", "--dry_run", "True", "--dry_run_step", "False", main=main)
    assert done.code == 0, done.err
    said = [text for text in done.out.splitlines() if text.startswith("DeepSpeed")]
    assert len(said) == ("lora" in script) and ("'optimizer' would ignore --mm_projector_lr" in done.out) == ("lora" in script)


@needs_zero_on_cpu
@pytest.mark.slow
@pytest.mark.parametrize("script", ["v1_5/finetune.sh", "v1_5/finetune_lora.sh"])
@pytest.mark.parametrize("config", ["zero2", "zero3"])
def test_published_line_trains(tiny, tmp_path, script, config):
    """Hidden size 64 makes a fraction of "auto". bf16 and the projector's own rate are the line's."""
    words, path = line(tiny, tmp_path, script, config, report_to="none", **HERE)
    before = path.read_bytes()
    done = train([*words, "--tune_layers", "1,6"], launcher=torchrun(2, 29731))
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert done.stdout.count("corrected for this run") == (config == "zero3") and path.read_bytes() == before
    out = tmp_path / ("llava-lora" if "lora" in script else "llava")
    rates = "llm 0.0002, projector 2e-05" if "lora" in script else "learning rates: "
    assert "first step: layers 1,6 have gradients, no other" in done.stdout and rates in done.stdout
    if "lora" in script:
        assert layers_of(adapter(out)) == {1, 6} and len(projector(out)) == 4
    else:
        assert str(path).encode() in (out / "training_args.bin").read_bytes(), "the arguments name the user's own file"


@pytest.mark.slow
@needs_zero_on_cpu
def test_the_hooks_alone_correct_too(tiny, tmp_path):
    """`with applied(...)` has no preflight. A fraction that the user wrote is read as soon as weights are loaded."""
    words, path = line(tiny, tmp_path, "v1_5/finetune_lora.sh", report_to="none", **HERE)
    settings = json.loads(path.read_text())
    settings["zero_optimization"]["reduce_bucket_size"] = 4096.5
    path.write_text(json.dumps(settings))
    (tmp_path / "mine.py").write_text(
        "import llava.train.train as upstream\n"
        "from llava_region.patches import llava as region\n"
        'with region.applied("1,6"):\n'
        "    upstream.train()\n"
    )
    command = [*torchrun(2, 29732)[:-1], str(tmp_path / "mine.py"), *words]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert done.stdout.count("corrected for this run") == 1 and '"reduce_bucket_size": 4096.5 is not a whole number' in done.stdout
    assert layers_of(adapter(tmp_path / "llava-lora")) == {1, 6}
