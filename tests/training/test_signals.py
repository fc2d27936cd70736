"""Signals before training, a second one, and those of others: in processes that do nothing else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAD = """
import hashlib, os, signal, sys, threading, time
from llava_region import train
from llava_region.training import signals

def work(request):
    {work}

def kill(number, after=0.0):
    if after:
        threading.Timer(after, os.kill, (os.getpid(), number)).start()
    else:
        os.kill(os.getpid(), number)

TERM, INT, USR1 = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1
train.train_region = work
code = train.main(["llava", "--tune_layers", "1"])
print("alive", signals.current(), flush=True)
sys.exit(code)
"""
TRAINING = "signals.current().training = True"
IN_C = "hashlib.pbkdf2_hmac('sha256', b'a', b'b', 10**9)"  # minutes without the interpreter, like a collective that waits


def run(*work: str, **environment: str) -> subprocess.CompletedProcess:
    """A training that is these statements."""
    without = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    env = {**without, "PYTHONPATH": str(Path(__file__).parents[2]), **environment}
    script = HEAD.format(work="\n    ".join(work))
    return subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(("number", "code", "name"), [("TERM", 143, "SIGTERM"), ("INT", 130, "Ctrl-C"), ("USR1", 138, "SIGUSR1")])
def test_before_training_it_ends_at_once(number, code, name):
    done = run(f"kill({number}); time.sleep(50)")
    assert done.returncode == code
    assert done.stderr == f"stopped by {name} before training began; nothing was saved\n"
    assert done.stdout == "alive None\n", "in order, by an exception"


def test_other_ranks_of_a_node_do_not_say_it_again():
    done = run("kill(TERM); time.sleep(50)", RANK="1", LOCAL_RANK="1", WORLD_SIZE="2")
    assert (done.returncode, done.stderr) == (143, "")


def test_what_tidies_up_is_not_interrupted_again():
    """torchrun hands on what has reached the ranks already."""
    done = run("try:", "    kill(TERM); time.sleep(50)", "finally:", "    kill(TERM); time.sleep(0.3); print('tidy')", RANK="0")
    assert done.returncode == 143 and done.stdout.startswith("tidy\n") and done.stderr.count("\n") == 1


def test_a_signal_that_a_library_swallows_while_it_is_imported_is_not_lost():
    done = run(
        "try:", "    kill(USR1); time.sleep(50)", "except BaseException:", "    time.sleep(0.2)", "assert signals.current().number == USR1"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("second", "code"), [("TERM", 143), ("INT", 130)])
def test_a_second_signal_ends_at_once_even_where_the_interpreter_waits(second, code):
    done = run(TRAINING, f"kill(TERM); kill({second}, after=0.7)", IN_C)
    assert done.returncode == code and done.stdout == ""
    first, last = done.stderr.splitlines()
    assert first == "SIGTERM: stopping after this step; once more stops at once, without a checkpoint"
    assert last.startswith("stopped at once by a second signal (")


def test_schedulers_may_ask_twice():
    """SIGUSR1 two minutes before the end, then SIGTERM, and half a minute later SIGKILL: that time is still there to save."""
    done = run(TRAINING, "kill(USR1); time.sleep(0.3); kill(TERM); time.sleep(0.3); assert signals.current().number == USR1")
    assert (done.returncode, done.stdout) == (0, "alive None\n")


@pytest.mark.parametrize(("after", "code"), [(0.2, 0), (3.3, 143)])
def test_under_a_launcher_a_copy_is_not_a_second_signal(after, code):
    done = run(TRAINING, f"kill(TERM); kill(TERM, after={after}); time.sleep({after} + 0.5)", RANK="0", LOCAL_RANK="0", WORLD_SIZE="2")
    assert done.returncode == code, done.stderr


def test_forked_children_leave_it_to_their_parent():
    """They ignore Ctrl-C and SIGUSR1, end by SIGTERM as ever, and what reaches them does not reach the parent."""
    fork = "child = os.fork()\n    if child == 0:\n        time.sleep(20); os._exit(7)"
    send = "for number in (INT, USR1, INT, TERM): time.sleep(0.1); os.kill(child, number)"
    done = run(TRAINING, fork, send, "assert os.waitpid(child, 0)[1] == TERM", "assert signals.current().number == 0")
    assert done.returncode == 0, done.stderr


LOADER = """\
import torch
class Slow(torch.utils.data.Dataset):
    def __len__(self): return 6
    def __getitem__(self, i): time.sleep(0.1); return i
def first(number): assert number in (0, 1)
loader = torch.utils.data.DataLoader(Slow(), num_workers=2, worker_init_fn=signals.Worker(first, signals.current().over))
seen = []
for batch in loader:
    seen.append(int(batch))
    for worker in torch.multiprocessing.active_children():
        for number in (INT, USR1, TERM): os.kill(worker.pid, number)
assert seen == list(range(6)), seen
batches = iter(loader); next(batches)
left = torch.multiprocessing.active_children()
assert len(left) == 2
signals.current().over.value = 1
for worker in left: worker.terminate(); worker.join(20); assert worker.exitcode == 0, worker
"""


def test_data_loader_workers_outlive_a_signal_for_all_and_end_when_the_run_does():
    pytest.importorskip("torch")
    done = run(*LOADER.splitlines())
    assert (done.returncode, done.stdout) == (0, "alive None\n"), done.stderr


def test_a_launcher_is_told_the_code(tmp_path):
    """By the file that it names; ranks that stopped together leave with 0 then, as torchrun would report a failure."""
    note = tmp_path / "code"
    stopped = "raise signals.Stopped(USR1, 'at step 3', agreed=True)"
    done = run(stopped, LLAVA_REGION_EXIT_CODE_FILE=str(note))
    assert (done.returncode, note.read_text(), done.stderr) == (0, "138", "at step 3\n")
    assert run("kill(TERM); time.sleep(50)", LLAVA_REGION_EXIT_CODE_FILE=str(note)).returncode == 143, "the other ranks may wait"
    assert note.read_text() == "143"
    assert run(stopped).returncode == 138
    done = run(stopped, LLAVA_REGION_EXIT_CODE_FILE=str(tmp_path / "missing" / "code"))
    assert done.returncode == 138 and "cannot be written" in done.stderr
