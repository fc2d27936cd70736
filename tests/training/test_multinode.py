"""Two "nodes" of one rank each, on this machine, through the launcher; one is lost, and the same command goes on."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers.training_runs import adapter, environment, layers_of, needs_zero_on_cpu, projector

pytestmark = needs_zero_on_cpu
pytest.importorskip("llava.train.train")
pytest.importorskip("deepspeed")

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
# Adam divides by the gradient's size, which makes a coin toss of gradients near zero; with this epsilon it does not.
FLAGS = [
    "--adam_epsilon", "1.0", "--tf32", "False", "--lora_r", "8", "--lora_dropout", "0", "--model_max_length", "256",
    "--dataloader_num_workers", "0", "--max_steps", "4",
]  # fmt: skip
TIMEOUT = 240  # the first ZeRO run on a machine builds DeepSpeed's CPU extension


@pytest.fixture
def settings(tiny, tmp_path) -> dict:
    """Environment of the launcher for two ranks in all on the tiny model, ZeRO-3 over gloo, the same random start each time."""
    folder = tmp_path / "settings"
    folder.mkdir()
    config = json.loads((SCRIPTS / "deepspeed" / "zero3.json").read_text())
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 100  # so that the tiny model is partitioned at all
    (folder / "zero3.json").write_text(json.dumps(config))
    # upstream seeds its run after the adapter has got its random values
    (folder / "sitecustomize.py").write_text("import torch\n\ntorch.manual_seed(0)\n")
    own = {
        "MODEL": tiny.backbone, "VISION_TOWER": tiny.vision_tower, "PROJECTOR": "", "DATA": tiny.data, "IMAGES": tiny.images,
        "TUNE_LAYERS": "1,6", "ZERO": folder / "zero3.json", "LAUNCHER": "torchrun", "GLOBAL_BATCH": 8, "BATCH": 4, "SAVE_STEPS": 1,
        "PYTHON": sys.executable,
    }  # fmt: skip
    path = os.pathsep.join([str(folder), environment()["PYTHONPATH"]])
    return environment(PYTHONPATH=path, **{name: str(value) for name, value in own.items()})


def node(settings, out, **env) -> subprocess.Popen:
    """Start the launcher, its output in one pipe."""
    env = {**settings, "OUT": str(out), **{name: str(value) for name, value in env.items()}}
    command = ["bash", str(SCRIPTS / "train" / "llava_7b.sh"), *FLAGS]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=env, **pipes)


def two_nodes(settings, out) -> list[subprocess.Popen]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [node(settings, out, NUM_GPUS=1, NNODES=2, NODE_RANK=r, MASTER_ADDR="127.0.0.1", MASTER_PORT=port) for r in (0, 1)]


def finish(*nodes) -> None:
    """Wait until all have ended well."""
    try:
        for run in nodes:
            printed, _ = run.communicate(timeout=TIMEOUT)
            assert run.returncode == 0, printed[-3000:]
    finally:
        lose(*nodes)


def lose(*nodes) -> None:
    """SIGKILL to everything that a node runs; torchrun's ranks are in sessions of their own."""
    for run in nodes:
        if run.poll() is None:
            for process in [*psutil.Process(run.pid).children(recursive=True), run]:
                process.kill()
            run.communicate()


def assert_close(out, reference) -> None:
    """The same adapter and projector as the reference, but for the rounding of another way to sum over the ranks."""
    mine, other = adapter(out), adapter(reference)
    assert layers_of(mine) == {1, 6} and mine.keys() == other.keys()
    for read in (adapter, projector):
        for name, tensor in read(out).items():
            expected = read(reference)[name]
            assert expected.norm() > 0, name
            assert (tensor - expected).norm() <= 1e-3 * expected.norm(), name


def test_two_nodes_one_of_them_lost_train_what_one_node_does(settings, tmp_path):
    """The run goes on from its checkpoint when both nodes are started again, and ends with the adapter of one node with two ranks."""
    whole, out = tmp_path / "one/llava-lora", tmp_path / "two/llava-lora"
    nodes = two_nodes(settings, out)
    try:
        deadline = time.monotonic() + TIMEOUT
        while not (out / "checkpoint-2" / "region.json").is_file():  # a checkpoint's last file
            assert time.monotonic() < deadline and nodes[1].poll() is None, "no checkpoint was written"
            time.sleep(0.02)
        lose(nodes[1])
    finally:
        lose(*nodes)
    assert not (out / "cost.json").exists()
    finish(*two_nodes(settings, out))
    finish(node(settings, whole, NUM_GPUS=2))
    assert_close(out, whole)
    cost = json.loads((out / "cost.json").read_text())
    assert (cost["gpus"], cost["steps"]) == (2, 4)
