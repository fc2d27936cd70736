"""`llava-region recipes`: what is copied works from its new place, and nothing is overwritten."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from llava_region import files
from llava_region.cli import main
from llava_region.commands import recipes

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def shell(*words: str, cwd: Path, **env: str) -> str:
    """What a script prints that ends well, with nothing in the environment but PATH, HOME and `env`."""
    env = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **env}
    done = subprocess.run(words, env=env, capture_output=True, text=True, cwd=cwd, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def copied(tmp_path, capsys) -> Path:
    folder = tmp_path / "my recipes"
    assert main(["recipes", str(folder)]) == 0
    capsys.readouterr()
    return folder


def test_copies_all_recipes_and_nothing_else(copied):
    expected = {
        path.relative_to(SCRIPTS).as_posix(): path.read_bytes()
        for path in [SCRIPTS / "launching.sh", *(p for name in recipes.FOLDERS for p in (SCRIPTS / name).iterdir())]
        if path.is_file()
    }
    found = {path.relative_to(copied).as_posix(): path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    assert found == expected
    for name in ("train/llava_7b.sh", "reproduce/table1.sh", "reproduce/score_data.py", "slurm/train.sbatch", "deepspeed/zero2.json"):
        assert name in found
    assert "demo.py" not in found


def test_executable_files_stay_executable(copied):
    runnable = {path.relative_to(copied).as_posix() for path in copied.rglob("*.*") if path.is_file() and os.access(path, os.X_OK)}
    assert runnable == {
        path.relative_to(SCRIPTS).as_posix()
        for folder in ("train", "reproduce")
        for path in (SCRIPTS / folder).glob("*.sh")
        if path.name not in ("common.sh", "checks.sh", "supervise.sh")
    }


def test_launcher_works_from_another_folder(copied, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    words = shlex.split(shell(str(copied / "train" / "llava_7b.sh"), cwd=elsewhere, DRY_RUN="1", NUM_GPUS="8"))
    assert words[words.index("--deepspeed") + 1] == str(copied / "deepspeed" / "zero3.json")
    original = shlex.split(shell(str(SCRIPTS / "train" / "llava_7b.sh"), cwd=elsewhere, DRY_RUN="1", NUM_GPUS="8"))
    assert [word.replace(str(copied), str(SCRIPTS)) for word in words] == original


def test_driver_works_from_another_folder(copied, tmp_path):
    lines = shell(str(copied / "reproduce" / "table3.sh"), cwd=tmp_path, DRY_RUN="1", NUM_GPUS="1").splitlines()
    trained = [shlex.split(line) for line in lines if "llava_region.train" in line]
    assert trained and all(words[words.index("--deepspeed") + 1].startswith(str(copied)) for words in trained)


def test_printed_command_runs(tmp_path, capsys):
    """The command it ends with can be pasted into a shell, whatever the folder is called."""
    assert main(["recipes", str(tmp_path / "my recipes")]) == 0
    out = capsys.readouterr().out
    for name in recipes.FOLDERS:
        assert str(tmp_path / "my recipes" / name) in out
    assert "llava_region.train llava" in shell("bash", "-c", out.splitlines()[-1], cwd=tmp_path)


def test_existing_folder_is_refused(copied, capsys):
    (copied / "mine.txt").write_text("mine")
    assert main(["recipes", str(copied)]) == 2
    assert capsys.readouterr().err == f"error: {copied} exists; give another output, or --force to replace it\n"
    assert (copied / "mine.txt").is_file()
    assert main(["recipes", str(copied), "--force"]) == 0
    assert not (copied / "mine.txt").exists() and (copied / "train" / "llava_7b.sh").is_file()


def test_json(tmp_path, capsys):
    assert main(["recipes", str(tmp_path / "r"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["out"] == str(tmp_path / "r") and "train/llava_7b.sh" in printed["files"]
    assert all((tmp_path / "r" / name).is_file() for name in printed["files"])


def test_a_copy_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "recipes_folder", lambda: tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError):
        recipes.copy(tmp_path / "r")
    assert list(tmp_path.iterdir()) == []


def test_installed_recipes_go_before_a_checkouts(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "__file__", str(tmp_path / "llava_region" / "files.py"))
    assert files.recipes_folder() == tmp_path / "scripts"
    (tmp_path / "llava_region" / "recipes").mkdir(parents=True)
    assert files.recipes_folder() == tmp_path / "llava_region" / "recipes"


def test_command_needs_no_torch(tmp_path):
    code = f"import sys; from llava_region.cli import main; main(['recipes', {str(tmp_path / 'r')!r}]); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=SCRIPTS.parent)
    assert done.stdout.splitlines()[-1] == "False", done.stderr
