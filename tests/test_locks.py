"""One writer per output, however the writer before it ended."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from llava_region import LlavaRegionError, locks

ROOT = Path(__file__).parents[1]
HOLD = "import sys, time; from llava_region import locks\nwith locks.held(sys.argv[1]): print('held', flush=True); time.sleep(60)"


@pytest.fixture
def holder(tmp_path):
    """Another process that holds `tmp_path / "out"`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def note(tmp_path: Path, age: float, **changed: object) -> Path:
    """What a process of another machine would have left, its last heartbeat `age` seconds ago."""
    mine = {**vars(locks._Note.mine()), "host": "node17", "boot": "another", "pid": 4711, **changed}
    file = tmp_path / ".out.lock"
    file.write_text(json.dumps(mine))
    os.utime(file, (time.time() - age,) * 2)
    return file


def test_a_second_process_is_refused_and_told_who(tmp_path, holder):
    with pytest.raises(LlavaRegionError) as refusal, locks.held(tmp_path / "out"):
        pass
    message = str(refusal.value)
    assert "\n" not in message and f"process {holder.pid} on " in message and " since 20" in message and "another output" in message
    with locks.held(tmp_path / "out2"):  # another output is free
        pass


def test_a_killed_process_holds_nothing(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / ".out.lock").exists()
    with locks.held(tmp_path / "out"):
        assert f'"pid": {os.getpid()}' in (tmp_path / ".out.lock").read_text()
    assert list(tmp_path.iterdir()) == []


def test_a_waiting_process_gets_it(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)  # not waited for: it may be alive for a moment
    with locks.held(tmp_path / "out", wait=20):
        pass


def test_a_forked_child_does_not_keep_it(tmp_path):
    with locks.held(tmp_path / "out"):
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
    try:
        with locks.held(tmp_path / "out"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_process_of_another_machine_counts_by_its_heartbeat(tmp_path):
    note(tmp_path, age=locks.STALE + 5)
    with locks.held(tmp_path / "out"):
        pass
    note(tmp_path, age=locks.STALE - 30)
    with pytest.raises(LlavaRegionError, match=r"process 4711 on node17 .* if that machine is gone"), locks.held(tmp_path / "out"):
        pass
    assert json.loads((tmp_path / ".out.lock").read_text())["host"] == "node17"  # the refused one left it alone
    note(tmp_path, age=locks.STALE - 1)  # and who waits outlives it
    with locks.held(tmp_path / "out", wait=20):
        pass


def test_a_restarted_machine_holds_nothing(tmp_path, monkeypatch):
    host = locks._Note.mine().host
    note(tmp_path, age=100, host=host)
    monkeypatch.setattr(locks, "_uptime", lambda: 90.0)
    with locks.held(tmp_path / "out"):
        pass


def test_two_machines_of_one_name_are_two(tmp_path, monkeypatch):
    """Containers and images are often all called the same."""
    note(tmp_path, age=100, host=locks._Note.mine().host)
    monkeypatch.setattr(locks, "_uptime", lambda: 110.0)
    with pytest.raises(LlavaRegionError, match="process 4711 "), locks.held(tmp_path / "out"):
        pass


def test_a_process_of_another_container_counts_by_its_heartbeat(tmp_path, monkeypatch):
    """Its number means nothing here, where flock does not tell either."""
    monkeypatch.setattr(locks, "_flock", lambda handle: None)
    monkeypatch.setattr(locks, "SETTLE", 0.01)
    mine = locks._Note.mine()
    note(tmp_path, age=100, host=mine.host, boot=mine.boot, pid=2**22 + 1, namespace="pid:[1]")
    with pytest.raises(LlavaRegionError, match="in use"), locks.held(tmp_path / "out"):
        pass
    note(tmp_path, age=100, host=mine.host, boot=mine.boot, pid=2**22 + 1)  # one of our own, and not there
    with locks.held(tmp_path / "out"):
        pass


def test_who_was_overtaken_leaves_the_lock_of_its_successor(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "_flock", lambda handle: None)
    monkeypatch.setattr(locks, "SETTLE", 0.01)
    with locks.held(tmp_path / "out"):
        note(tmp_path, age=0)  # of a machine that thought this one dead
    assert json.loads((tmp_path / ".out.lock").read_text())["host"] == "node17"


def test_where_flock_is_of_each_machine_the_last_note_wins(tmp_path, monkeypatch):
    """Two machines start at one moment, and each gets its own flock."""
    monkeypatch.setattr(locks, "_is_of_one_machine", lambda folder: False)
    monkeypatch.setattr(locks.time, "sleep", lambda seconds: note(tmp_path, age=0))
    with pytest.raises(LlavaRegionError, match="node17"), locks.held(tmp_path / "out"):
        pass


def test_this_disk_is_of_one_machine_and_an_unknown_one_is_not(tmp_path, monkeypatch):
    assert locks._is_of_one_machine(Path("/dev/shm"))
    monkeypatch.setattr(locks, "_OF_ONE_MACHINE", ())
    assert not locks._is_of_one_machine(Path("/dev/shm"))


def test_a_lock_file_that_others_may_take_over(tmp_path):
    """In a folder that several people may write, whatever the umask of the first."""
    before = os.umask(0o077)
    try:
        with locks.held(tmp_path / "out"):
            assert (tmp_path / ".out.lock").stat().st_mode & 0o777 == 0o666
    finally:
        os.umask(before)


def test_without_a_heartbeat_nothing_is_held(tmp_path, monkeypatch):
    def full(self: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(locks.threading.Thread, "start", full)
    with pytest.raises(RuntimeError), locks.held(tmp_path / "out"):
        pass
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == [] and not locks._held


def test_a_block_in_another_thread_keeps_it(tmp_path):
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with locks.held(tmp_path / "out"):
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=other)
    with locks.held(tmp_path / "out"):
        thread.start()
        assert inside.wait(60)
    assert (tmp_path / ".out.lock").exists()
    leave.set()
    thread.join()
    assert not (tmp_path / ".out.lock").exists()


RANK = """
import sys
from llava_region import LlavaRegionError, locks
try:
    with locks.held_by_run(sys.argv[1], wait=float(sys.argv[2])):
        print("inside")
except LlavaRegionError as e:
    print(e)
"""


def test_all_ranks_hold_it_or_none(tmp_path, holder):
    """Launched without an agent, as srun does: a rank that waited for the first one would wait for ever."""

    def run(out: Path, port: str) -> list[str]:
        environment = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, "-c", RANK, str(out), "0"]
        both = [
            subprocess.Popen(command, env={**environment, "RANK": str(rank)}, cwd=ROOT, stdout=subprocess.PIPE, text=True)
            for rank in range(2)
        ]
        return [process.communicate(timeout=240)[0] for process in both]

    assert all(f"process {holder.pid} on " in printed for printed in run(tmp_path / "out", "29671"))
    assert run(tmp_path / "out2", "29672") == ["inside\n"] * 2


def test_who_waits_says_for_whom(tmp_path, holder, capsys):
    with pytest.raises(LlavaRegionError, match="in use"), locks.held(tmp_path / "out", wait=0.1):
        pass
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"process {holder.pid} on " in said and "waiting up to 0 seconds" in said


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"host": 1}', b"\xff\xfe"], ids=["empty", "cut", "list", "fields", "bytes"])
def test_a_damaged_note_does_not_block(tmp_path, content):
    (tmp_path / ".out.lock").write_bytes(content)
    with locks.held(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_heartbeat_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "BEAT", 0.05)
    with locks.held(tmp_path / "out"):
        file = tmp_path / ".out.lock"
        os.utime(file, (0, 0))
        deadline = time.monotonic() + 20
        while time.time() - file.stat().st_mtime > 60:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_without_flock_the_note_decides(tmp_path, monkeypatch, holder):
    """As on file systems that have no locks: a live process is seen by its note, a dead one too."""
    monkeypatch.setattr(locks, "_flock", lambda handle: None)
    monkeypatch.setattr(locks, "SETTLE", 0.01)
    with pytest.raises(LlavaRegionError, match=f"process {holder.pid} "), locks.held(tmp_path / "out"):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with locks.held(tmp_path / "out"):
        pass


def test_the_same_process_may_hold_it_twice(tmp_path):
    with locks.held(tmp_path / "mine"), locks.held(tmp_path / "x" / ".." / "mine"):
        pass
    assert not (tmp_path / ".mine.lock").exists()


def test_folders_are_made_and_leave_with_it(tmp_path):
    with locks.held(tmp_path / "a" / "b" / "out"):
        assert (tmp_path / "a" / "b").is_dir()
    assert list(tmp_path.iterdir()) == []
    with locks.held(tmp_path / "a" / "b" / "out"):
        (tmp_path / "a" / "kept").write_text("")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["kept"]
    with pytest.raises(LlavaRegionError, match="cannot write"), locks.held(tmp_path / "a" / "kept" / "out"):
        pass


def test_a_link_and_its_target_are_one_output(tmp_path, holder):
    (tmp_path / "link").symlink_to("out")
    with pytest.raises(LlavaRegionError, match="in use"), locks.held(tmp_path / "link"):
        pass


def test_the_longest_name(tmp_path):
    with locks.held(tmp_path / ("é" * 127)), locks.held(tmp_path / ("é" * 126 + "a")):
        assert len(list(tmp_path.iterdir())) == 2
