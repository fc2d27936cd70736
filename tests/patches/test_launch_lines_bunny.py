"""Bunny's published training lines work with one word changed: flags and DeepSpeed config as its checkout has them."""
# ruff: noqa: E402 - Bunny can be imported only after the shims

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import bunny_shims

if bunny_shims.why_not():
    pytest.skip(bunny_shims.why_not(), allow_module_level=True)
bunny_shims.apply()

import bunny.model

from llava_region.train import main
from tests.helpers.bunny_models import MODEL_TYPES, BunnyFiles, write_bunny
from tests.helpers.command_line import run
from tests.helpers.launch_lines import flags_in, words_of
from tests.helpers.sparse_models import write_hole
from tests.helpers.training_runs import torchrun, train

ROOT = Path(str(bunny_shims.bunny_root()))
SCRIPTS = ("finetune_full.sh", "finetune_lora.sh")
SHAPES = {
    "llama3-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "phi-3": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 32},
}


def line(files: BunnyFiles, folder: Path, script: str, **changes: Any) -> tuple[list[str], Path]:
    """The words of a published line, with a user's own paths and model; and the DeepSpeed config that it names."""
    flags = flags_in(ROOT / "script" / "train" / script)
    config = ROOT / flags["deepspeed"]
    paths = {
        "deepspeed": config, "model_name_or_path": files.backbone, "model_type": files.model_type, "version": files.version,
        "data_path": files.data, "image_folder": files.images, "vision_tower": files.vision_tower, "pretrain_mm_mlp_adapter": None,
        "output_dir": folder / ("bunny-lora" if "lora" in script else "bunny"),
    }  # fmt: skip
    return words_of({**flags, **paths, **changes}), config


@pytest.fixture(scope="module", params=SHAPES)
def large(request, tmp_path_factory) -> BunnyFiles:
    """A model of the real shape whose weights take no disk."""
    files = write_bunny(tmp_path_factory.mktemp(request.param), request.param)
    path = files.backbone / "config.json"
    settings = {**json.loads(path.read_text()), **SHAPES[request.param]}
    path.write_text(json.dumps(settings))
    model_class = getattr(bunny.model, f"Bunny{MODEL_TYPES[request.param][0]}ForCausalLM")
    with torch.device("meta"):
        write_hole(files.backbone, model_class(model_class.config_class(**settings)))
    return files


@pytest.mark.parametrize("script", SCRIPTS)
def test_published_line_passes_a_dry_run(large, tmp_path, capsys, script):
    words, config = line(large, tmp_path, script)
    before = config.read_bytes()
    rehearse = ["--dry_run", "True", "--dry_run_step", "False"]
    done = run(capsys, str(ROOT / "bunny/train/train.py"), *words, "--tune_layers", "sparse:25%", *rehearse, main=main)
    assert done.code == 0, done.err
    (said,) = (text for text in done.out.splitlines() if text.startswith("DeepSpeed"))
    hidden = SHAPES[large.model_type]["hidden_size"]
    assert said.endswith(f'"auto" would be a fraction for hidden size {hidden}, and is {9 * hidden * hidden // 10}')
    assert config.read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize(("script", "model_type"), [("finetune_full.sh", "phi-3"), ("finetune_lora.sh", "llama3-8b")])
def test_published_line_trains(tmp_path, script, model_type):
    """Hidden size 64 makes a fraction of "auto"."""
    here = {"tf32": None, "model_max_length": 512, "dataloader_num_workers": 0, "per_device_train_batch_size": 2, "max_steps": 2}
    words, _ = line(write_bunny(tmp_path, model_type), tmp_path, script, **here)
    done = train([*words, "--tune_layers", "1,6"], upstream="bunny", launcher=torchrun(2, 29733))
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert done.stdout.count("corrected for this run") == 1
    assert "first step: layers 1,6 have gradients, no other" in done.stdout
