"""The real Bunny under real DeepSpeed ZeRO-3: two CPU ranks over gloo."""
# ruff: noqa: E402 - Bunny can be imported only after the shims

import json
import os
import shutil
import signal
import subprocess
import time

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import bunny_shims

if bunny_shims.why_not():
    pytest.skip(bunny_shims.why_not(), allow_module_level=True)
bunny_shims.apply()

from tests.helpers.bunny_models import bunny_flags, write_bunny
from tests.helpers.training_runs import LORA, adapter, environment, layers_of, projector, torchrun, train, write_zero3

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    config = write_zero3(tmp_path_factory.mktemp("config"))
    schedule = {"lr_scheduler_type": "constant", "warmup_ratio": 0.0}
    return {"use_cpu": None, "bf16": True, "save_strategy": "steps", "save_steps": 2, "max_steps": 4, "deepspeed": config, **schedule}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_bunny(tmp_path_factory.mktemp("llama"), "llama3-8b")


@pytest.fixture(scope="module")
def phi(tmp_path_factory):
    return write_bunny(tmp_path_factory.mktemp("phi"), "phi-2")


def run_zero3(flags, port):
    done = train([*flags, "--tune_layers", "1,6"], upstream="bunny", launcher=torchrun(2, port))
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def test_llama_trains_the_region_and_bunny_loads_it(llama, options, tmp_path):
    from bunny.model.builder import load_pretrained_model

    out = tmp_path / "bunny-lora"
    changes = {"max_steps": 2, "gradient_accumulation_steps": 2}  # the recipe on 8 GPUs accumulates
    done = run_zero3(bunny_flags(llama, out, **{**options, **changes}, **LORA), 29651)
    assert "first step: layers 1,6 have gradients, no other; learning rates: llm 0.0002, projector 2e-05" in done.stdout
    for folder in (out, out / "checkpoint-2"):
        tensors = adapter(folder)
        assert layers_of(tensors) == {1, 6} and len(tensors) == 28 and all(tensor.numel() for tensor in tensors.values())
        assert len(projector(folder)) == 4 and all(tensor.numel() for tensor in projector(folder).values())
    largest = max(tensor.abs().max() for name, tensor in adapter(out).items() if "lora_B" in name)
    assert 1.5 * 2e-4 < largest < 2.5 * 2e-4, "two steps at 2e-4"
    cost = json.loads((out / "cost.json").read_text())
    assert cost["gpus"] == 2 and cost["samples"] == 16
    _, model, _, _ = load_pretrained_model(str(out), str(llama.backbone), "bunny-lora", "llama3-8b", device="cpu")
    base = load_file(llama.backbone / "model.safetensors")
    for layer in range(8):
        name = f"model.layers.{layer}.self_attn.q_proj.weight"
        assert torch.equal(model.state_dict()[name], base[name].half()) == (layer not in (1, 6))


def test_killed_and_resumed_ends_close(phi, options, tmp_path):
    flags = bunny_flags(phi, tmp_path / "whole", **options, **LORA)
    run_zero3(flags, 29652)
    killed = tmp_path / "killed"
    flags = [str(killed) if flag == str(tmp_path / "whole") else flag for flag in flags]
    command = [*torchrun(2, 29653), "llava_region.train", "bunny", *flags, "--tune_layers", "1,6"]
    victim = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.time() + 200
    while not (killed / "checkpoint-2" / "region.json").exists() and victim.poll() is None and time.time() < deadline:
        time.sleep(0.02)
    os.killpg(victim.pid, signal.SIGKILL)
    victim.wait()
    assert (killed / "checkpoint-2" / "region.json").exists() and not (killed / "cost.json").exists()
    if (killed / "checkpoint-4").exists():
        shutil.rmtree(killed / "checkpoint-4")
    run_zero3(flags, 29654)
    for read in (adapter, projector):
        expected, found = read(tmp_path / "whole"), read(killed)
        assert expected.keys() == found.keys()
        for name in expected:
            torch.testing.assert_close(found[name].float(), expected[name].float(), atol=2e-5, rtol=2e-2)


def test_full_tuning_with_the_tower_unfrozen_then_continued(phi, options, tmp_path):
    """The model is saved whole, the tower with it; LoRA goes on from there, on the region alone."""
    full, again = tmp_path / "full", tmp_path / "bunny-lora"
    changes = {"save_strategy": "no", "max_steps": 2, "learning_rate": 1e-2, "mm_projector_lr": 1e-2, "unfreeze_vision_tower": True}
    run_zero3(bunny_flags(phi, full, **{**options, **changes}), 29655)
    base, saved = load_file(phi.backbone / "model.safetensors"), load_file(full / "model.safetensors")
    changed = {name for name in base if not torch.equal(base[name].bfloat16(), saved[name].bfloat16())}
    assert layers_of(changed) == {1, 6}
    tower = load_file(phi.vision_tower / "model.safetensors")
    name = "vision_model.encoder.layers.0.mlp.fc1.weight"
    assert not torch.equal(saved[f"model.vision_tower.vision_tower.{name}"].bfloat16(), tower[name].bfloat16())

    config = json.loads((full / "config.json").read_text())
    (full / "config.json").write_text(json.dumps({**config, "continuous_training": True}))
    flags = bunny_flags(phi._replace(backbone=full), again, **{**options, **LORA, "save_strategy": "no", "max_steps": 1})
    run_zero3(flags, 29656)
    assert layers_of(adapter(again)) == {1, 6} and len(adapter(again)) == 24
