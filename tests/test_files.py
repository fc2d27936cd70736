"""Outputs appear whole under their name, or not at all."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llava_region import LlavaRegionError
from llava_region.files import output_folder, write_text

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
    locks._take = lambda path, wait: (path, __import__("os").open("/dev/null", 0))
    locks._release = lambda *_: None
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
