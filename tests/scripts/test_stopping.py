"""Signals for the launchers and the Slurm file: a stand-in for torchrun starts ranks that heed signals as a training does."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 138}
LAUNCHER = """#!{python}
import os, signal, subprocess, sys, time
from pathlib import Path

folder = Path({folder!r})
if sys.argv[1] == "-c":  # the launcher asks what is installed
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
if "LOCAL_RANK" not in os.environ:  # like torchrun: ranks in sessions of their own, code 1 if one fails, deaf to SIGUSR1
    (folder / "launcher").touch()
    if (folder / "slow").exists():
        time.sleep(60)
    ranks = [subprocess.Popen([sys.executable, *sys.argv], env={{**os.environ, "LOCAL_RANK": n, "RANK": n, "WORLD_SIZE": "2"}},
             start_new_session=True) for n in "01"]
    sys.exit(any([rank.wait() for rank in ranks]))
sys.path.insert(0, {root!r})
from llava_region.training import signals

def train():
    signals.current().training = True
    (folder / ("rank" + os.environ["LOCAL_RANK"])).touch()
    if (folder / "fails").exists():
        raise SystemExit(5)
    while not signals.current().number and not (folder / "done").exists():
        time.sleep(0.01)
    if signals.current().number:
        time.sleep(0.5)  # the other rank has got it too, and a copy may come
        raise signals.Stopped(signals.current().number, "stopped at step 3", agreed=True)

code = signals.heeded(train)
(folder / ("left" + os.environ["LOCAL_RANK"])).touch()
if (folder / "done").exists():
    time.sleep(1)
sys.exit(code)
"""


class Run:
    """A launcher of scripts/train over the stand-in."""

    def __init__(self, folder: Path, script=SCRIPTS / "train" / "llava_7b.sh", arguments=(), **environment):
        self.folder = folder
        python = folder / "python"
        python.write_text(LAUNCHER.format(python=sys.executable, folder=str(folder), root=str(SCRIPTS.parent)))
        python.chmod(0o755)
        path = os.pathsep.join([str(folder), os.environ["PATH"]])
        settings = {"PYTHON": python, "LAUNCHER": "torchrun", "NUM_GPUS": 2, "OUT": folder / "llava-lora", "PATH": path, **environment}
        env = {"HOME": "/", **{name: str(value) for name, value in settings.items()}}
        command = ["bash", str(script), *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self.process = subprocess.Popen(command, env=env, start_new_session=True, **pipes)

    def until(self, *names: str) -> None:
        deadline = time.monotonic() + 30
        while not all((self.folder / name).exists() for name in names):
            assert time.monotonic() < deadline and self.process.poll() is None, f"no {names}"
            time.sleep(0.01)

    def end(self) -> tuple[int, list[str]]:
        """Exit code and lines; nothing that it started may be left."""
        started = psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        printed, _ = self.process.communicate(timeout=30)
        _, left = psutil.wait_procs(started, timeout=10)
        assert not left
        return self.process.returncode, [line for line in printed.splitlines() if not line.startswith("global batch 128: ")]


@pytest.mark.parametrize("number", CODES)
def test_a_signal_goes_to_the_ranks_and_their_code_comes_back(tmp_path, number):
    run = Run(tmp_path)
    run.until("rank0", "rank1")
    os.kill(run.process.pid, number)
    code, lines = run.end()
    assert code == CODES[number]
    name = "Ctrl-C" if number == signal.SIGINT else number.name
    assert lines == [f"{name}: stopping after this step; once more stops at once, without a checkpoint", "stopped at step 3"]


def test_a_terminals_ctrl_c_is_for_the_whole_group_and_arrives_once(tmp_path):
    run = Run(tmp_path)
    run.until("rank0", "rank1")
    os.killpg(run.process.pid, signal.SIGINT)
    assert run.end()[0] == 130


def test_a_closed_terminal_is_like_sigterm(tmp_path):
    run = Run(tmp_path)
    run.until("rank0", "rank1")
    os.killpg(run.process.pid, signal.SIGHUP)
    assert run.end()[0] == 143


def test_slurm_may_signal_every_process_of_a_job(tmp_path):
    """Where processes are tracked by `proctrack/linuxproc`."""
    run = Run(tmp_path)
    run.until("rank0", "rank1")
    for process in [psutil.Process(run.process.pid), *psutil.Process(run.process.pid).children(recursive=True)]:
        process.send_signal(signal.SIGUSR1)
    assert run.end()[0] == 138


@pytest.mark.parametrize("number", CODES)
def test_before_there_are_ranks_it_ends_at_once(tmp_path, number):
    (tmp_path / "slow").touch()
    run = Run(tmp_path)
    run.until("launcher")
    os.kill(run.process.pid, number)
    code, lines = run.end()
    assert (code, lines) == (CODES[number], [f"stopped by {number.name} before training began; nothing was saved"])


def test_a_signal_after_the_end_leaves_a_finished_run_finished(tmp_path):
    (tmp_path / "done").touch()
    run = Run(tmp_path)
    run.until("left0", "left1")
    os.kill(run.process.pid, signal.SIGTERM)
    assert run.end() == (0, [])


def test_a_failure_keeps_the_launchers_code(tmp_path):
    (tmp_path / "fails").touch()
    assert Run(tmp_path).end()[0] == 1
    assert Run(tmp_path, PYTHON=tmp_path / "missing").end()[0] == 127


def test_one_process_gets_the_signal_itself(tmp_path):
    """Without torchrun nothing stands between."""
    run = Run(tmp_path, LAUNCHER="python", NUM_GPUS=1, LOCAL_RANK=0)
    run.until("rank0")
    os.kill(run.process.pid, signal.SIGUSR1)
    assert run.end()[0] == 138


SLURM = {"SLURM_JOB_NUM_NODES": 1, "SLURM_GPUS_ON_NODE": 2, "SLURM_JOB_NODELIST": "gpu07", "SLURM_JOB_ID": 1234}


def slurm_job(folder: Path, **environment) -> Run:
    """A job of one node. `srun` is the task itself, whose number is kept; `scontrol` notes what it is asked."""
    (folder / "scontrol").write_text(f'#!/bin/sh\n[ "$1" = show ] && echo gpu07 || echo "$@" >>{folder}/asked\n')
    (folder / "srun").write_text(f'#!/bin/sh\nshift 2\necho $$ >{folder}/task\nSLURM_NODEID=0 exec "$@"\n')
    for name in ("scontrol", "srun"):
        (folder / name).chmod(0o755)
    launcher = SCRIPTS / "train" / "llava_7b.sh"
    return Run(folder, SCRIPTS / "slurm" / "train.sbatch", [launcher], **{**SLURM, **environment})


@pytest.mark.parametrize(
    ("number", "restarts", "code", "asked"),
    [(signal.SIGUSR1, 0, 138, "requeue 1234\n"), (signal.SIGUSR1, 100, 138, None), (signal.SIGTERM, 0, 143, None)],
)
def test_a_job_stopped_ahead_of_its_time_limit_goes_back_into_the_queue(tmp_path, number, restarts, code, asked):
    """By `scancel` or a preemption it does not: Slurm decides about those."""
    run = slurm_job(tmp_path, SLURM_RESTART_COUNT=restarts)
    run.until("rank0", "rank1")
    if number == signal.SIGTERM:
        os.kill(run.process.pid, number)  # at the time limit the batch script gets it besides
    os.kill(int((tmp_path / "task").read_text()), number)
    assert run.end()[0] == code
    assert ((tmp_path / "asked").read_text() if asked else None) == asked and (asked or not (tmp_path / "asked").exists())


def test_a_finished_or_failed_job_does_not(tmp_path):
    (tmp_path / "done").touch()
    assert slurm_job(tmp_path).end()[0] == 0
    (tmp_path / "fails").touch()
    assert slurm_job(tmp_path).end()[0] == 1
    assert not (tmp_path / "asked").exists()


def test_slurm_is_asked_for_the_signal():
    text = (SCRIPTS / "slurm" / "train.sbatch").read_text()
    for line in ("--signal=USR1@120", "--requeue", "--open-mode=append"):
        assert f"\n#SBATCH {line}\n" in text
