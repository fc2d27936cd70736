"""Outputs appear whole under their name, or not at all."""

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llava_region import LlavaRegionError, locks
from llava_region.files import output_folder, refuse_existing, write_text

ROOT = Path(__file__).parents[1]


def test_a_folder_appears_when_it_is_whole(tmp_path):
    out = tmp_path / "out"
    with output_folder(out) as folder:
        (folder / "a").write_text("1")
        assert not out.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (out / "a").read_text() == "1"


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), output_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("1")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_not_part_of_the_next(tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "old").write_text("")
    with output_folder(tmp_path / "out"):
        pass
    assert list((tmp_path / "out").iterdir()) == []


def test_existing_outputs(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with output_folder(out) as folder:  # an empty folder may be filled
        (folder / "a").write_text("1")
    with pytest.raises(LlavaRegionError, match="--force"), output_folder(out):
        pass
    with output_folder(out, force=True) as folder:
        (folder / "b").write_text("2")
    assert [path.name for path in out.iterdir()] == ["b"] and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(LlavaRegionError, match="is a file"), output_folder(out / "b", force=True):
        pass
    assert (out / "b").read_text() == "2"


def test_text_is_replaced_whole(tmp_path):
    write_text(tmp_path / "t", "one")
    write_text(tmp_path / "t", "two")
    assert (tmp_path / "t").read_text() == "two" and len(list(tmp_path.iterdir())) == 1
    (tmp_path / "file").write_text("")
    with pytest.raises(LlavaRegionError, match="cannot write"):
        write_text(tmp_path / "file" / "t", "x")


WRITE = """
import sys, time
from pathlib import Path
from llava_region import LlavaRegionError, locks
from llava_region.files import output_folder

mark, out, force, unlocked = sys.argv[1], sys.argv[2], sys.argv[3] == "force", sys.argv[4] == "unlocked"
if unlocked:
    locks.held = lambda path: __import__("contextlib").nullcontext()
while not Path(out).with_name("go").exists():
    pass
try:
    with output_folder(out, force) as folder:
        for i in range(20):
            (folder / str(i)).write_text(mark)
except LlavaRegionError as e:
    sys.exit(f"error: {e}")
"""


@pytest.mark.parametrize("locked", ["locked", "unlocked"])
@pytest.mark.parametrize("force", ["", "force"], ids=["", "force"])
def test_two_processes_with_one_output(tmp_path, force, locked):
    """Exactly one whole folder appears; `unlocked` is a file system whose locks do not work."""
    for attempt in range(4):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        out = folder / "out"
        command = [sys.executable, "-c", WRITE]
        both = [subprocess.Popen([*command, mark, str(out), force, locked], stderr=subprocess.PIPE, text=True, cwd=ROOT) for mark in "ab"]
        time.sleep(0.3)
        (folder / "go").write_text("")
        errors = [process.communicate()[1] for process in both]
        won = [mark for mark, process in zip("ab", both, strict=True) if process.returncode == 0]
        assert won and (force or len(won) == 1), errors
        content = {path.read_text() for path in out.iterdir()}
        assert len(list(out.iterdir())) == 20 and len(content) == 1 and content <= set(won), errors
        for error in filter(None, errors):
            assert error.startswith("error: ") and error.count("\n") == 1 and ("in use" in error or "exists" in error)
        assert sorted(path.name for path in folder.iterdir()) == ["go", "out"]


def test_what_was_put_aside_to_be_replaced_comes_back(tmp_path):
    """A run with --force was killed between its two renames: the old output is the only one that is whole."""
    for name in (".out.abcdefgh.old", ".out.ijklmnop.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(name)
    with pytest.raises(KeyboardInterrupt), output_folder(tmp_path / "out", force=True):
        raise KeyboardInterrupt
    assert (tmp_path / "out" / "weights").read_text() == ".out.abcdefgh.old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_output_of_a_process_with_a_rank_is_held_too(tmp_path, monkeypatch):
    """Kubernetes' operators set RANK for every process, for those that are alone too."""
    monkeypatch.setenv("RANK", "1")
    with output_folder(tmp_path / "a" / "b" / "out") as folder:
        (folder / "weights").write_text("")
        assert (tmp_path / "a" / "b" / ".out.lock").exists()
    assert (tmp_path / "a" / "b" / "out" / "weights").exists()


def test_only_own_leftovers_are_removed(tmp_path):
    """Those of another output whose name begins alike belong to a process that may run."""
    names = [".out.abcdefgh.partial", ".out.abcdefgh.old", ".out.v2.abcdefgh.partial", ".out2.abcdefgh.partial", ".out.abcdefgh.txt"]
    for name in names:
        (tmp_path / name).mkdir()
    with output_folder(tmp_path / "out"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["out", *names[2:]])


def test_an_interrupt_between_the_renames_loses_nothing(tmp_path, monkeypatch):
    out = tmp_path / "out"
    with output_folder(out) as folder:
        (folder / "a").write_text("1")

    def rename(old, new, rename=os.rename):
        rename(old, new)
        if new.name.endswith(".old"):
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(KeyboardInterrupt), output_folder(out, force=True):
        pass
    assert (out / "a").read_text() == "1" and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_usual_permissions(tmp_path):
    with output_folder(tmp_path / "out"):
        pass
    (tmp_path / "usual").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "usual").stat().st_mode


def write(out: Path, content: str, force: bool = False) -> None:
    with output_folder(out, force) as folder:
        (folder / "a").write_text(content)


def test_a_link_stays_and_its_folder_is_replaced(tmp_path):
    disk, link = tmp_path / "disk", tmp_path / "here" / "out"
    (disk / "real").mkdir(parents=True)
    link.parent.mkdir()
    link.symlink_to(disk / "real")
    write(link, "1")
    with pytest.raises(LlavaRegionError, match="exists"):
        write(link, "2")
    write(Path(f"{link}/"), "3", force=True)
    assert link.is_symlink() and (disk / "real" / "a").read_text() == "3"
    assert [len(list(folder.iterdir())) for folder in (disk, link.parent)] == [1, 1]


def test_a_link_that_leads_nowhere_yet(tmp_path):
    link = tmp_path / "out"
    link.symlink_to(tmp_path / "real")
    write(link, "1")
    assert link.is_symlink() and (tmp_path / "real" / "a").read_text() == "1"
    (tmp_path / "unmounted").symlink_to(tmp_path / "no" / "disk")
    with pytest.raises(LlavaRegionError, match="whose folder does not exist"):
        write(tmp_path / "unmounted", "1")
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(LlavaRegionError, match="in a circle"):
        write(tmp_path / "circle", "1", force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["circle", "out", "real", "unmounted"]


def test_a_link_to_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "out").symlink_to("file")
    with pytest.raises(LlavaRegionError, match="out is a file; give a folder"):
        write(tmp_path / "out", "1", force=True)
    assert (tmp_path / "file").read_text() == "mine"
    write_text(tmp_path / "out", "new")
    assert (tmp_path / "out").is_symlink() and (tmp_path / "file").read_text() == "new"


@pytest.mark.parametrize("out", [".", "..", "x/..", "../here/"])
def test_the_current_folder_is_not_replaced(tmp_path, monkeypatch, out):
    here = tmp_path / "here"
    (here / "x").mkdir(parents=True)
    monkeypatch.chdir(here)
    with pytest.raises(LlavaRegionError, match="give a folder in it, such as"):
        write(Path(out), "1", force=True)
    (here / "x").rmdir()
    with pytest.raises(LlavaRegionError, match="the current folder, which cannot be replaced"):
        write(Path("."), "1")
    assert list(tmp_path.iterdir()) == [here] and list(here.iterdir()) == []
    monkeypatch.chdir("/")
    with pytest.raises(LlavaRegionError, match="the current folder"):
        write(Path("/"), "1", force=True)
    with pytest.raises(LlavaRegionError, match="a mount point"):
        write(Path("/proc"), "1", force=True)


def test_names_at_the_limit_and_beyond(tmp_path):
    write(tmp_path / ("n" * 255), "1")
    write_text(tmp_path / ("m" * 255), "1")
    assert len(list(tmp_path.iterdir())) == 2
    for call in (write, write_text):
        with pytest.raises(LlavaRegionError, match=r"cannot write .*: File name too long"):
            call(tmp_path / ("n" * 256), "1")


def test_a_folder_is_not_replaced_by_a_file(tmp_path):
    with pytest.raises(LlavaRegionError, match="is a folder; give the name of a file"):
        write_text(tmp_path, "1")


def test_pipes_and_devices_are_written_as_they_are(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "link").symlink_to(pipe)
    for name in (pipe, tmp_path / "link"):
        reader = subprocess.Popen(["cat", str(name)], stdout=subprocess.PIPE, text=True)
        refuse_existing(name)  # nothing is replaced, so no --force is asked for
        write_text(name, "through")
        assert reader.communicate(timeout=60)[0] == "through"
    assert pipe.is_fifo() and sorted(tmp_path.iterdir()) == [tmp_path / "link", pipe]
    with locks.held("/dev/null"):
        write_text("/dev/null", "1")
    assert Path("/dev/null").is_char_device()
    with pytest.raises(LlavaRegionError, match="cannot write /dev/full: No space left on device"):
        write_text("/dev/full", "1")
    with pytest.raises(LlavaRegionError, match="pipe is a file; give a folder"):
        write(pipe, "1", force=True)


def test_standard_output_as_output(tmp_path):
    data = tmp_path / "data.json"
    data.write_text("[" + ",".join(['{"id": "a", "conversations": []}'] * 4) + "]")
    command = [sys.executable, "-m", "llava_region", "subset", str(data), "--fraction", "1/2", "--out", "/dev/stdout"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done
    assert len(json.loads(done.stdout[: done.stdout.rindex("]") + 1])) == 2


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LlavaRegionError, match=r"cannot write .*/t: No space left on device"):
        write_text(tmp_path / "t", "1")
    assert list(tmp_path.iterdir()) == []
