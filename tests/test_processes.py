"""Which process this is by its environment, and two processes that share, tell and add up."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from llava_region import LlavaRegionError, processes

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


def numbers() -> tuple[int, int, int, int]:
    return processes.rank(), processes.local_rank(), processes.world_size(), processes.local_world_size()


@pytest.mark.parametrize("value", [None, ""])
def test_alone(monkeypatch, value):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    assert numbers() == (0, 0, 1, 1) and processes.is_first() and processes.is_first_on_node()
    with processes.joined():
        processes.barrier()
        assert not torch.distributed.is_initialized()
        assert processes.share([1, 2, 3]) == [1, 2, 3] and processes.broadcast("a") == "a" and processes.gather("a") == ["a"]
        assert processes.add_up(torch.ones(2)).tolist() == [1, 1]


def test_the_launchers_variables(monkeypatch):
    for name, value in zip(VARIABLES, (9, 1, 16, 8), strict=True):
        monkeypatch.setenv(name, str(value))
    assert numbers() == (9, 1, 16, 8) and not processes.is_first() and not processes.is_first_on_node()
    assert processes.share(list(range(40))) == [9, 25]
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert processes.is_first_on_node()


def test_a_gpu_for_each_process_unless_a_certain_one_is_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    asked = (None, "cuda", "cuda:0", "cpu")
    assert [processes.device(name) for name in asked] == list(asked)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert [processes.device(name) for name in asked] == ["cuda:3", "cuda:3", "cuda:0", "cpu"]


TWO = """
import torch
from llava_region import processes

with processes.joined():
    with processes.joined():
        processes.barrier()
    number = processes.rank()
    assert processes.broadcast(f"from {number}") == "from 0"
    assert processes.gather({number: processes.share([5, 6, 7])}) == [{0: [5, 7]}, {1: [6]}]
    table = torch.full((2,), 1.5 + number, dtype=torch.float64)
    assert processes.add_up(table) is table and table.tolist() == [4, 4]
    assert not torch.distributed.is_initialized()  # which would need a network interface that all nodes share
torch.distributed.init_process_group("gloo")  # a trainer's, after it, at the same store
with processes.joined():
    assert processes.gather(number) == [0, 1]
torch.distributed.destroy_process_group()
if processes.is_first():
    print("agreed")
"""


def test_two_processes(tmp_path):
    (tmp_path / "two.py").write_text(TWO)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(tmp_path / "two.py")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0 and done.stdout == "agreed\n", done.stderr


FAILING = """
import sys, time
from llava_region import LlavaRegionError, processes

try:
    with processes.joined():
        if processes.rank() == int(sys.argv[1]):
            raise LlavaRegionError("out of tune")
        processes.gather(1)
except LlavaRegionError as e:
    print(e, flush=True)
"""


def two(folder: Path, code: str, *arguments: str) -> list[str]:
    """What two processes print that are started without a launcher's agent, as srun does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "two.py").write_text(code)
    started = []
    for number in range(2):
        own = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, **{name: str(value) for name, value in own.items()}, "PYTHONPATH": str(Path(__file__).parents[1])}
        command = [sys.executable, str(folder / "two.py"), *arguments]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment))
    ended = [one.communicate(timeout=60) for one in started]
    assert [one.returncode for one in started] == [0, 0], ended
    return [printed.strip() for printed, _ in ended]


def test_two_processes_without_an_agent(tmp_path):
    assert two(tmp_path, TWO) == ["agreed", ""]


@pytest.mark.parametrize("number", [0, 1])
def test_one_that_fails_ends_both(tmp_path, number):
    begun = time.monotonic()
    printed = two(tmp_path, FAILING, str(number))
    assert printed[number] == "out of tune" and printed[1 - number] == f"process {number}: out of tune"
    assert time.monotonic() - begun < 45, "one waits for the other"


def test_processes_that_cannot_reach_each_other(monkeypatch):
    """A cluster's image that leaves WORLD_SIZE in the environment."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(LlavaRegionError, match=r"process 0 of 2 does not reach .* unset WORLD_SIZE"), processes.joined():
        pytest.fail("joined")


def test_importing_it_does_not_import_torch():
    code = "import sys, llava_region.processes as p; p.rank(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0
