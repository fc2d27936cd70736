"""Which process this is by its environment, and two processes that share, tell and add up."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llava_region import processes

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
    assert torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo"
assert not torch.distributed.is_initialized()
if processes.is_first():
    print("agreed")
"""


def test_two_processes(tmp_path):
    (tmp_path / "two.py").write_text(TWO)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(tmp_path / "two.py")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0 and done.stdout == "agreed\n", done.stderr


def test_importing_it_does_not_import_torch():
    code = "import sys, llava_region.processes as p; p.rank(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0
