"""Which GPUs a launcher takes, however they are named, and on how many nodes: the global batch that it says is what it trains with."""

import os
import re
import shlex
from itertools import pairwise

import pytest

from tests.scripts.test_launchers import RECIPES, SCRIPTS, flags_of, refusal, run_script

UUIDS = [f"GPU-{digit * 8}-aaaa-bbbb-cccc-{digit * 12}" for digit in "0123"]
MIGS = [f"MIG-{digit * 8}-aaaa-bbbb-cccc-{digit * 12}" for digit in "01"]
NAMED = {"0,1": 2, "0,1,": 2, " 2, 5 ": 2, "3": 1, "0,1,2,3": 4, ",".join(UUIDS): 4, f"{UUIDS[0]},": 1, MIGS[0]: 1, "0,1,-1,2": 2, "": 1}


def start(model, *flags, **env):
    """The words of a launcher's command line, and the global batch that it says."""
    done = run_script(SCRIPTS / "train" / f"{model}.sh", *flags, DRY_RUN=1, **env)
    assert done.returncode == 0, done.stderr
    (said,) = re.findall(r"^global batch (\d+): ", done.stderr, re.M)
    return shlex.split(done.stdout), int(said)


def ranks_of(words):
    """How many processes a command line starts in all."""
    options = dict(pairwise(words))
    if "torch.distributed.run" in words:
        return int(options["--nproc_per_node"]) * int(options.get("--nnodes", 1))
    if "--include" in options:
        return len(options["--include"].split(":")[1].split(","))
    return int(options.get("--num_gpus", 1))


def batch_of(words):
    flags = flags_of(words)
    return int(flags["--per_device_train_batch_size"]) * int(flags["--gradient_accumulation_steps"]) * ranks_of(words)


@pytest.mark.parametrize("names", NAMED, ids=[name[:12] or "none" for name in NAMED])
@pytest.mark.parametrize("mode", ["lora", "qlora", "full"])
@pytest.mark.parametrize("model", RECIPES)
def test_the_batch_that_is_said_is_trained_with(model, mode, names):
    words, said = start(model, MODE=mode, CUDA_VISIBLE_DEVICES=names)
    assert (ranks_of(words), said, batch_of(words)) == (NAMED[names], 128, 128)


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
@pytest.mark.parametrize("gpus", ["1", "2", "02"])
def test_fewer_than_visible_are_the_first(launcher, gpus):
    words, said = start("llava_7b", LAUNCHER=launcher, NUM_GPUS=gpus, CUDA_VISIBLE_DEVICES="4,5,6,7")
    assert ranks_of(words) == int(gpus) and said == batch_of(words) == 128
    first = "4,5"[: 2 * int(gpus) - 1]
    assert (f"localhost:{first}" if launcher == "deepspeed" else f"CUDA_VISIBLE_DEVICES={first}") in words


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"NUM_GPUS": 4, "CUDA_VISIBLE_DEVICES": "0,1"}, "NUM_GPUS is 4, but a process here can use 2"),
        ({"NUM_GPUS": 2, "CUDA_VISIBLE_DEVICES": UUIDS[0]}, "set NUM_GPUS=1"),
        ({"NUM_GPUS": 2, "CUDA_VISIBLE_DEVICES": ",".join(MIGS)}, "can use 1"),
        ({"NUM_GPUS": 2, "CUDA_VISIBLE_DEVICES": "0,"}, "can use 1"),
        ({"CUDA_VISIBLE_DEVICES": "0,0"}, "names 0 twice"),
        ({"CUDA_VISIBLE_DEVICES": "0;1"}, "allowed: indices, or names"),
        ({"CUDA_VISIBLE_DEVICES": UUIDS[0], "LAUNCHER": "deepspeed"}, "set LAUNCHER=torchrun"),
        ({"NUM_GPUS": "08x"}, "NUM_GPUS is '08x'"),
        ({"NUM_GPUS": "-1"}, "NUM_GPUS is '-1'"),
    ],
)
def test_other_gpus_are_refused(env, says):
    assert says in refusal("llava_7b", **env)


def test_numbers_may_begin_with_zero():
    assert start("llava_7b", NUM_GPUS="08")[1] == 128
    words, _ = start("llava_7b", NNODES="02", NODE_RANK="01", MASTER_ADDR="a", NUM_GPUS="08", BATCH="08")
    assert words[words.index("--node_rank") + 1] == "1" and batch_of(words) == 128


@pytest.mark.parametrize(
    ("listed", "gpus"),
    [("GPU 0: A\nGPU 1: A\n", 2), ("GPU 0: A\n  MIG 1g.10gb Device 0: x\n  MIG 1g.10gb Device 1: x\n", 1), ("No devices found.\n", 1)],
)
def test_gpus_that_nvidia_smi_lists(tmp_path, listed, gpus):
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\nprintf '{listed}'\n")
    smi.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    assert ranks_of(start("llava_7b", PATH=path)[0]) == gpus
    assert start("llava_7b", PATH=path, NUM_GPUS=8)[1] == 128, "a printed command may be for another machine"
    done = run_script(SCRIPTS / "train" / "llava_7b.sh", PATH=path, NUM_GPUS=8, PYTHON="true")
    assert (done.returncode, "NUM_GPUS is 8, but" in done.stderr) == ((2, True) if "GPU" in listed else (0, False))


def test_one_process_sees_one_gpu():
    """With several, transformers would train on all of them, with a batch for each."""
    words, said = start("llava_7b", LAUNCHER="python", NUM_GPUS=1, CUDA_VISIBLE_DEVICES="2,3")
    assert words[:2] == ["env", "CUDA_VISIBLE_DEVICES=2"] and said == batch_of(words) == 128


def test_flags_after_the_name_are_counted():
    assert start("llava_7b", "--per_device_train_batch_size", "4", NUM_GPUS=8)[1] == 32
    assert start("llava_7b", "--gradient_accumulation_steps=4", NUM_GPUS=8)[1] == 512


def test_pods_of_a_pytorchjob():
    pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "MASTER_ADDR": "job-master-0", "MASTER_PORT": 23456, "WORLD_SIZE": 4, "RANK": 2}
    words, said = start("llava_7b", NUM_GPUS=8, **pod)
    assert " ".join(words[3:13]) == "--nproc_per_node 8 --nnodes 4 --node_rank 2 --master_addr job-master-0 --master_port 23456"
    assert said == 128 and ranks_of(words) == 32 and batch_of(words) == 128
    newer = {"PET_NNODES": 2, "PET_NODE_RANK": 1, "PET_NPROC_PER_NODE": 4, "WORLD_SIZE": 8, "RANK": 4}
    words, said = start("llava_7b", **{**pod, **newer})
    assert " ".join(words[3:9]) == "--nproc_per_node 4 --nnodes 2 --node_rank 1" and said == batch_of(words) == 128
    assert "NNODES is '1:4'" in refusal("llava_7b", **{**pod, "PET_NNODES": "1:4"})
    words, _ = start("llava_7b", NUM_GPUS=8, WORLD_SIZE=4, RANK=2)
    assert ranks_of(words) == 8, "elsewhere these may be a scheduler's own numbers"


def test_rendezvous_without_ranks():
    words, said = start("llava_7b", NNODES=2, NUM_GPUS=8, RDZV_ENDPOINT="node0:29400", RDZV_ID="run7")
    assert " ".join(words[3:13]) == "--nproc_per_node 8 --nnodes 2 --rdzv_backend c10d --rdzv_endpoint node0:29400 --rdzv_id run7"
    assert said == batch_of(words) == 128


def test_hostfile(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# two nodes\nnode0 slots=8\n\nnode1 slots=8")
    words, said = start("llava_7b", HOSTFILE=path, CUDA_VISIBLE_DEVICES="0,1")
    assert words[3:6] == ["--hostfile", str(path), "--module"] and said == 128
    flags = flags_of(words)
    assert int(flags["--per_device_train_batch_size"]) * int(flags["--gradient_accumulation_steps"]) * 16 == 128
    assert "leave one of them out" in refusal("llava_7b", HOSTFILE=path, LAUNCHER="torchrun")
    assert "names 2 hosts" in refusal("llava_7b", HOSTFILE=path, NNODES=3)
    assert "slots=8; leave NUM_GPUS out" in refusal("llava_7b", HOSTFILE=path, NUM_GPUS=4)
    for text, says in {"a slots=8\nb slots=4\n": "different numbers", "a\n": "allowed: HOST slots=GPUS", "\n": "names no host"}.items():
        path.write_text(text)
        assert says in refusal("llava_7b", HOSTFILE=path)
    assert "not a file" in refusal("llava_7b", HOSTFILE=tmp_path / "none")
