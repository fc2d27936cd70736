"""Upstream LLaVA under real DeepSpeed ZeRO-3: two CPU ranks over gloo, by both launchers."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("llava.train.train")
pytest.importorskip("deepspeed")

from tests.helpers.training_runs import (
    LORA,
    ZERO3,
    adapter,
    environment,
    layers_of,
    llava_flags,
    needs_zero_on_cpu,
    projector,
    torchrun,
    train,
    write_zero3,
)

pytestmark = [pytest.mark.slow, needs_zero_on_cpu]

RECIPES = Path(__file__).parents[2] / "scripts" / "deepspeed"
# bf16: upstream casts the vision tower to half precision, which ZeRO-3 does not mix with fp32
ZERO = {"use_cpu": None, "bf16": True, "save_strategy": "steps", "save_steps": 2, "max_steps": 5}


def deepspeed(ranks: int, port: int) -> tuple[str, ...]:
    return (os.path.join(os.path.dirname(sys.executable), "deepspeed"), "--num_gpus", str(ranks), "--master_port", str(port), "--module")


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    return {**ZERO, "deepspeed": write_zero3(tmp_path_factory.mktemp("config"))}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A projector to start from, so that a test knows where it started."""
    path = tmp_path_factory.mktemp("projector") / "mm_projector.bin"
    torch.manual_seed(1)
    shapes = {"0.weight": (64, 32), "0.bias": (64,), "2.weight": (64, 64), "2.bias": (64,)}
    # biases start at zero, where bf16 resolves single steps of 2e-5
    start = {name: torch.randn(shape) * 0.1 if name.endswith("weight") else torch.zeros(shape) for name, shape in shapes.items()}
    torch.save({f"model.mm_projector.{name}": tensor for name, tensor in start.items()}, path)
    return path


@pytest.fixture(scope="module")
def whole(tiny, options, pretrained, tmp_path_factory):
    out = tmp_path_factory.mktemp("zero3") / "whole"
    flags = llava_flags(tiny, out, pretrain_mm_mlp_adapter=pretrained, **options, **LORA)
    done = train([*flags, "--tune_layers", "1,6"], launcher=torchrun(2, 29631))
    assert done.returncode == 0, done.stderr[-4000:]
    return out, done, flags


def test_torchrun_saves_the_region_whole(whole):
    out, done, _ = whole
    tensors = adapter(out)
    assert layers_of(tensors) == {1, 6} and len(tensors) == 28
    assert all(tensor.numel() and (tensor != 0).any() for tensor in tensors.values())
    assert "first step: layers 1,6 have gradients" in done.stdout
    for folder in (out / "checkpoint-2", out / "checkpoint-4"):
        assert layers_of(adapter(folder)) == {1, 6} and len(projector(folder)) == 4 and (folder / "region.json").exists()
        assert all(tensor.numel() for tensor in projector(folder).values())
    cost = json.loads((out / "cost.json").read_text())
    assert cost["gpus"] == 2 and cost["samples"] == 40 and cost["trainable_parameters"] == 22656


def test_learning_rates(whole, pretrained):
    """Adam moves a weight by about its rate a step. A shifted group would give the projector 2e-4."""
    out, _, _ = whole
    before = torch.load(pretrained, weights_only=True)
    after = {name.removeprefix("base_model.model."): tensor for name, tensor in projector(out).items()}
    moved = max((after[name].float() - before[name]).abs().max() for name in before if name.endswith("bias"))
    assert 4 * 2e-5 < moved < 5.5 * 2e-5, "five steps at 2e-5"
    largest = max(tensor.abs().max() for name, tensor in adapter(out).items() if "lora_B" in name)
    assert 4 * 2e-4 < largest < 5.5 * 2e-4, "five steps at 2e-4"


def test_killed_and_resumed_ends_close(whole, tmp_path):
    out, _, flags = whole
    killed = tmp_path / "killed"
    flags = [str(killed) if flag == str(out) else flag for flag in flags] + ["--tune_layers", "1,6"]
    command = [*torchrun(2, 29632), "llava_region.train", "llava", *flags]
    victim = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 200
    while not (killed / "checkpoint-2" / "region.json").exists() and victim.poll() is None and time.time() < deadline:
        time.sleep(0.02)
    for process in [*psutil.Process(victim.pid).children(recursive=True), victim]:
        process.send_signal(signal.SIGKILL)
    victim.wait()
    assert (killed / "checkpoint-2" / "region.json").exists() and not (killed / "cost.json").exists()
    resumed = train(flags, launcher=torchrun(2, 29633))
    assert resumed.returncode == 0, resumed.stderr[:6000]
    for read in (adapter, projector):
        expected, found = read(out), read(killed)
        assert expected.keys() == found.keys()
        for name in expected:
            torch.testing.assert_close(found[name].float(), expected[name].float(), atol=2e-5, rtol=2e-2)


def offloaded(flags: list[str], out: Path) -> list[str]:
    """The flags of a run into another folder, with weights and optimizer in the CPU's memory."""
    given = dict(zip(flags[::2], flags[1::2], strict=True))
    given |= {"--deepspeed": str(RECIPES / "zero3_offload.json"), "--output_dir": str(out)}
    return [part for item in given.items() for part in item]


def test_offloaded_ends_close(whole, tmp_path):
    """DeepSpeed's own Adam, which is compiled here, takes the same steps."""
    out, _, flags = whole
    done = train([*offloaded(flags, tmp_path / "run"), "--tune_layers", "1,6"], launcher=torchrun(2))
    assert done.returncode == 0, done.stderr[-4000:]
    assert "first step: layers 1,6 have gradients" in done.stdout
    for read in (adapter, projector):
        expected, found = read(out), read(tmp_path / "run")
        assert expected.keys() == found.keys()
        for name in expected:
            torch.testing.assert_close(found[name].float(), expected[name].float(), atol=2e-5, rtol=2e-2)


def test_an_adam_that_cannot_be_compiled_is_found_before_weights_load(whole, tmp_path, monkeypatch):
    _, _, flags = whole
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setenv("CXX", "/bin/false")
    done = train([*offloaded(flags, tmp_path / "run"), "--tune_layers", "1,6"])
    line = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and "offloads the optimizer, for which DeepSpeed compiles its Adam, and that failed" in line, done.stderr
    assert "or give a config without offload_optimizer" in line and not (tmp_path / "run").exists()


def test_deepspeed_launcher_and_full_tuning(tiny, options, tmp_path):
    """`--local_rank` comes first; only the region and the projector change; the model is saved, not its shards."""
    out = tmp_path / "full"
    flags = llava_flags(tiny, out, **{**options, "save_strategy": "no", "max_steps": 2, "learning_rate": 1e-2})
    done = train([*flags, "--tune_layers", "1,6"], launcher=deepspeed(2, 29634))
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    base, saved = load_file(tiny.backbone / "model.safetensors"), load_file(out / "model.safetensors")
    changed = {name for name in base if not torch.equal(base[name].bfloat16(), saved[name].bfloat16())}
    assert layers_of(changed) == {1, 6}


def test_zero2_accumulates_gradients(tiny, tmp_path):
    """accelerate would enter the engine's `no_sync` between micro batches, which DeepSpeed refuses."""
    config = {**ZERO3, "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000000, "allgather_bucket_size": 1000000}}
    (tmp_path / "zero2.json").write_text(json.dumps(config))
    out = tmp_path / "run"
    options = {**ZERO, **LORA, "deepspeed": tmp_path / "zero2.json", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    done = train([*llava_flags(tiny, out, **options), "--tune_layers", "1,6"], launcher=torchrun(2, 29635))
    assert done.returncode == 0, done.stderr[-4000:]
    assert layers_of(adapter(out)) == {1, 6} and len(projector(out / "checkpoint-4")) == 4
    assert "learning rates: llm 0.0002, projector 2e-05" in done.stdout
    cost = json.loads((out / "cost.json").read_text())
    assert cost["steps"] == 5 and cost["samples"] == 2 * 2 * 3 * 5
