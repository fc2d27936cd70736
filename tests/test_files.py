"""Outputs appear whole under their name, or not at all."""

import pytest

from llava_region import LlavaRegionError
from llava_region.files import output_folder, write_text


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
