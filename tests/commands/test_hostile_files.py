"""Every file that a command reads, replaced by one that no program should trip over: one line, exit code 2, nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("llava.train.train")
pytest.importorskip("deepspeed")

from llava_region import train
from llava_region.cli import main
from tests.helpers.command_line import run
from tests.helpers.data_roots import write_all
from tests.helpers.hostile_files import hostile_files
from tests.helpers.training_runs import LORA, llava_flags


def copied(folder: Path, to: Path, replaced: str) -> Path:
    """A folder of links to another's files, without one of them; returns the path of that one."""
    to.mkdir(parents=True)
    for file in folder.iterdir():
        if file.name != replaced:
            (to / file.name).symlink_to(file)
    return to / replaced


@pytest.fixture(scope="module")
def places(tiny, llava_checkpoint, lora_run, tmp_path_factory) -> dict[str, Path]:
    """Whole folders to copy, and files next to which a command reads the hostile one."""
    root = tmp_path_factory.mktemp("whole")
    data_root = root / "benchmarks"
    write_all(data_root)
    results = root / "results"
    results.mkdir()
    (results / "results.json").write_text(
        json.dumps({"model": str(llava_checkpoint), "upstream": "llava", "num_layers": 8, "tasks": {"gqa": {"score": 50.0, "n": 100}}})
    )
    return {
        "MODEL": llava_checkpoint, "RUN": lora_run, "BASE": tiny.backbone, "DATA": tiny.data, "IMAGES": tiny.images, "ROOT": data_root,
        "RESULTS": results,
    }  # fmt: skip


# name -> (which folder's file is replaced, that file's name, command). HOSTILE is the file, FOLDER the copy that it is in.
READERS = {
    "layers: config": ("MODEL", "config.json", "layers FOLDER sparse:2"),
    "layers: region": ("RUN", "region.json", "layers FOLDER"),
    "layers: scores": (None, "scores.json", "layers MODEL HOSTILE:angular_distance:2"),
    "merge: adapter config": ("RUN", "adapter_config.json", "merge FOLDER --base BASE --out OUT"),
    "merge: adapter": ("RUN", "adapter_model.safetensors", "merge FOLDER --base BASE --out OUT"),
    "merge: projector": ("RUN", "non_lora_trainables.bin", "merge FOLDER --base BASE --out OUT"),
    "merge: config": ("RUN", "config.json", "merge FOLDER --base BASE --out OUT"),
    "merge: base's config": ("BASE", "config.json", "merge RUN --base FOLDER --out OUT"),
    "merge: base's weights": ("BASE", "model.safetensors", "merge RUN --base FOLDER --out OUT"),
    "revert: config": ("MODEL", "config.json", "revert FOLDER --base BASE --layers 1 --out OUT"),
    "revert: weights": ("MODEL", "model.safetensors", "revert FOLDER --base BASE --layers 1 --out OUT"),
    "prune: scores": (None, "scores.json", "prune MODEL --drop 2 --scores HOSTILE --protect none --out OUT"),
    "prune: config": ("MODEL", "config.json", "prune FOLDER --layers 2 --out OUT"),
    "subset": (None, "data.json", "subset HOSTILE --fraction 1/2 --out OUT"),
    "score: data": (None, "data.json", "score MODEL --data HOSTILE --image-folder IMAGES --out OUT"),
    "score: config": ("MODEL", "config.json", "score FOLDER --data DATA --image-folder IMAGES --out OUT"),
    "score: base's weights": ("BASE", "model.safetensors", "score MODEL --metrics parameter_change --base FOLDER --out OUT"),
    "perplexity: data": (None, "data.json", "perplexity MODEL --data HOSTILE --image-folder IMAGES --out OUT"),
    "perplexity: config": ("MODEL", "config.json", "perplexity FOLDER --data DATA --image-folder IMAGES --out OUT"),
    "eval: predictions": (None, "answers.jsonl", "eval --task gqa --data-root ROOT --predictions HOSTILE"),
    "eval: config": ("MODEL", "config.json", "eval FOLDER --task gqa --data-root ROOT --out OUT"),
    "report: results": ("RESULTS", "results.json", "report FOLDER --table 1"),
    "report: cost": (None, "cost.json", "report RESULTS --table 1 --cost results=HOSTILE"),
    "train: data": (None, "data.json", "train --data_path HOSTILE"),
    "train: config": ("BASE", "config.json", "train --model_name_or_path FOLDER"),
    "train: DeepSpeed's config": (None, "zero.json", "train --deepspeed HOSTILE"),
    "train: scores": (None, "scores.json", "train --tune_layers HOSTILE:angular_distance:2"),
}

# any object is a DeepSpeed config
FITS = {"train: DeepSpeed's config": {"json {}", 'json {"": null}', 'json {"a": {"b": []}}'}}


def put(reader: str, places: dict[str, Path], tiny: object, tmp_path: Path) -> tuple[Path, list[str], Callable[[list[str]], int]]:
    """Set a reader up; returns the path for the hostile file, the arguments, and the command line that takes them."""
    folder, name, command = READERS[reader]
    file = copied(places[folder], tmp_path / "copy", name) if folder else tmp_path / name
    known = {**places, "HOSTILE": file, "FOLDER": file.parent, "OUT": tmp_path / "out"}
    words = [next((w.replace(key, str(path)) for key, path in known.items() if key in w), w) for w in command.split()]
    if words[0] != "train":
        return file, words, main
    flags = llava_flags(tiny, tmp_path / "out", **LORA)
    return file, ["llava", *flags, "--tune_layers", "1,6", "--dry_run", "True", *words[1:]], train.main


@pytest.mark.parametrize("reader", READERS)
def test_a_hostile_file_is_one_line(reader, places, tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file, argv, line = put(reader, places, tiny, tmp_path)
    before = set(tmp_path.rglob("*"))
    wrong = {}
    hostile = {name: content for name, content in hostile_files().items() if name not in FITS.get(reader, ())}
    for name, content in hostile.items():
        file.write_bytes(content)
        code, out, err = run(capsys, *argv, main=line)
        if code != 2 or out or err.count("\n") != 1 or not err.startswith("error: "):
            wrong[name] = (code, out[-200:], err[-600:])
        file.unlink()
        for left in set(tmp_path.rglob("*")) - before:
            wrong[name] = (*wrong.get(name, ()), f"left {left}")
            left.unlink()
    assert not wrong, "\n".join(f"{name}: {how}" for name, how in wrong.items())
