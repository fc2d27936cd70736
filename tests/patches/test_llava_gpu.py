"""Upstream LLaVA's own train(), hooked, on a GPU: every way of spreading a run that a command line can ask for, and QLoRA."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("llava.train.train")
pytest.importorskip("deepspeed")

from tests.helpers.training_runs import LORA, adapter, environment, layers_of, llava_flags, projector, torchrun

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CONFIGS = Path(__file__).parents[2] / "scripts" / "deepspeed"
ON_GPU = {"use_cpu": None, "bf16": True, "save_strategy": "steps", "save_steps": 1, "max_steps": 3, **LORA}
SECONDS = 150  # for one training, the build of DeepSpeed's CPU optimizer included


def start(flags: list[str], launcher: tuple[str, ...] = (), **variables: str) -> subprocess.Popen:
    """Start a training of layers 1 and 6 on the first GPU; its output goes to one pipe."""
    env = environment(PYTHONPATH=os.pathsep.join([str(CONFIGS.parents[1]), os.environ.get("PYTHONPATH", "")]), CUDA_VISIBLE_DEVICES="0")
    env.pop("DS_ACCELERATOR", None)
    command = [*(launcher or (sys.executable, "-m")), "llava_region.train", "llava", *flags, "--tune_layers", "1,6"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    return subprocess.Popen(command, env={**env, **variables}, **pipes)


def finished(process: subprocess.Popen) -> str:
    """Wait for a training; returns what it printed."""
    try:
        said, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"not done after {SECONDS} s: {process.communicate()[0][-3000:]}") from None
    assert process.returncode == 0, said[-3000:]
    return said


def check(out: Path, said: str) -> None:
    """The run trained the region and the projector, and saved them whole."""
    assert "first step: layers 1,6 have gradients, no other" in said
    tensors = adapter(out)
    assert layers_of(tensors) == {1, 6} and len(tensors) == 28 and all(torch.isfinite(t).all() and (t != 0).any() for t in tensors.values())
    assert len(projector(out)) == 4 and all(torch.isfinite(t).all() for t in projector(out).values())


@pytest.mark.parametrize("policy", ["auto", "all", "region", "none"])
def test_data_parallel_over_nccl(tiny, tmp_path, policy):
    flags = llava_flags(tiny, tmp_path / "run", **ON_GPU, region_checkpointing=policy)
    check(tmp_path / "run", finished(start(flags, torchrun(1))))


@pytest.mark.parametrize("config", ["zero2", "zero3", "zero3_offload"])
def test_zero_over_nccl(tiny, tmp_path, config):
    flags = llava_flags(tiny, tmp_path / "run", **ON_GPU, deepspeed=CONFIGS / f"{config}.json")
    check(tmp_path / "run", finished(start(flags, torchrun(1))))


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_killed_and_resumed(tiny, tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    out = tmp_path / "run"
    flags = llava_flags(tiny, out, **{**ON_GPU, "max_steps": 6}, bits=bits)
    process, end = start(flags), time.monotonic() + SECONDS
    while not (out / "checkpoint-2" / "region.json").exists():
        assert process.poll() is None and time.monotonic() < end, process.communicate(timeout=5)[0][-3000:]
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    said = finished(start(flags))
    assert f"resuming from {out / 'checkpoint-'}" in said
    check(out, said)
