"""One writer per output, however the writer before it ended."""

import json
import os
import signal
import subprocess
import sys
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


def test_a_restarted_machine_holds_nothing(tmp_path):
    note(tmp_path, age=0, host=locks._Note.mine().host)
    with locks.held(tmp_path / "out"):
        pass


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


def test_the_same_process_may_hold_it_twice_and_other_ranks_do_nothing(tmp_path, monkeypatch, holder):
    with locks.held(tmp_path / "mine"), locks.held(tmp_path / "x" / ".." / "mine"):
        pass
    assert not (tmp_path / ".mine.lock").exists()
    monkeypatch.setenv("RANK", "1")
    with locks.held(tmp_path / "out"):
        pass


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
