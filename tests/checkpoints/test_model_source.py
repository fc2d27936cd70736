"""A model's folder: what it says, that it is read once, and that its files are named in one place."""

import ast
import hashlib
import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from llava_region import cli, run_files
from llava_region.checkpoints.identity import weights_digest
from llava_region.checkpoints.model_source import ModelSource, num_layers_in, width_in
from llava_region.errors import LlavaRegionError

ROOT = Path(__file__).parents[2]
PACKAGES = (str(ROOT / "llava_region"), str(ROOT / "patches"))
_watching: list[Counter] = []


def test_layer_counts_of_configs(tmp_path):
    for config, count in (({"num_hidden_layers": 5}, 5), ({"n_layers": 7}, 7), ({"text_config": {"num_hidden_layers": 9}}, 9)):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert ModelSource.of(tmp_path).num_layers == count
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(LlavaRegionError, match="names no 'num_hidden_layers'"):
        _ = ModelSource.of(tmp_path).num_layers
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(LlavaRegionError, match="not valid JSON"):
        _ = ModelSource.of(tmp_path).num_layers
    assert num_layers_in({"n_layer": 3}, "it") == 3


def test_width_of_configs():
    transformers = pytest.importorskip("transformers")
    assert width_in({"hidden_size": 64}) == width_in({"d_model": 64}) == 64 and width_in({}) is None
    assert width_in(transformers.LlamaConfig(hidden_size=32)) == width_in(transformers.MptConfig(d_model=32)) == 32


def test_what_a_folder_holds(tiny, lora_run, llava_checkpoint, tmp_path):
    assert [ModelSource.of(path).kind for path in (lora_run, llava_checkpoint, tiny.backbone, tmp_path)] == [
        "adapter", "whole", "whole", "nothing"
    ]  # fmt: skip
    (tmp_path / "mm_projector.bin").write_bytes(b"")
    pretrained, run = ModelSource.of(tmp_path), ModelSource.of(lora_run)
    assert pretrained.kind == "projector" and pretrained.besides_file == tmp_path / "mm_projector.bin"
    assert run.besides_file == lora_run / "non_lora_trainables.bin" and ModelSource.of(llava_checkpoint).besides_file is None
    assert run.upstream.name == "llava" and ModelSource.of(tiny.backbone).upstream is None
    assert run.adapter_config["peft_type"] == "LORA" and run.region["base_model"] == str(tiny.backbone)
    assert ModelSource.of(run) is run and str(run) == str(lora_run)


def test_a_checkpoint_without_settings_has_those_of_its_run(lora_run, tmp_path):
    folder = Path(shutil.copytree(lora_run, tmp_path / "run" / "checkpoint-3"))
    for name in ("config.json", "region.json"):
        (folder / name).rename(tmp_path / "run" / name)
    source = ModelSource.of(folder)
    assert source.settings == tmp_path / "run" and source.num_layers == 8 and source.region["layers"] == [1, 6]
    (tmp_path / "run" / "config.json").unlink()
    with pytest.raises(LlavaRegionError, match=r"holds no config\.json"):
        _ = ModelSource.of(folder).num_layers


def digest_of_0_1_0(*folders: Path) -> str:
    """What `settings.json` of version 0.1.0 calls a model's weights."""
    digest = hashlib.sha256()
    for folder in folders:
        files = [*folder.glob("config.json"), *folder.glob("adapter_config.json"), *folder.glob("*.safetensors"), *folder.glob("*.bin")]
        for file in sorted(file for file in files if file.name not in ("optimizer.bin", "training_args.bin", "scheduler.bin")):
            data = file.read_bytes()
            digest.update(f"{file.name} {len(data)}".encode())
            for sample in range(64):
                start = max(0, len(data) - 4096) * sample // 63
                digest.update(data[start : start + 4096])
    return digest.hexdigest()


def test_answers_of_0_1_0_are_still_recognised(lora_run, llava_checkpoint, tiny):
    assert weights_digest(llava_checkpoint) == digest_of_0_1_0(llava_checkpoint)
    assert weights_digest(lora_run, tiny.backbone) == digest_of_0_1_0(lora_run, tiny.backbone)


# -- read once


def _audit(event: str, arguments: tuple) -> None:
    """Count the files that our own code opens to read, not those that transformers or PEFT open when we call them."""
    if event != "open" or not _watching or not isinstance(arguments[0], str):
        return
    if not arguments[0].endswith(("config.json", "region.json")) or "w" in str(arguments[1] or ""):
        return
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith((sys.base_prefix + "/lib", "<frozen")):
        if "site-packages" in frame.f_code.co_filename:
            break
        frame = frame.f_back
    if frame is not None and frame.f_code.co_filename.startswith(PACKAGES):
        _watching[-1][arguments[0]] += 1


@contextmanager
def our_reads() -> Iterator[Counter]:
    """How often our code opens each settings file within the block."""
    if not hasattr(_audit, "installed"):
        sys.addaudithook(_audit)  # there is no taking it off again
        _audit.installed = True
    _watching.append(Counter())
    try:
        yield _watching[-1]
    finally:
        _watching.pop()


def command(name: str, tiny, model: Path, run: Path, tmp_path: Path) -> list[str]:
    data = ["--data", tiny.data, "--image-folder", tiny.images]
    scored = ["--metrics", "block_influence,parameter_change", "--limit", 2, "--device", "cpu", "--out", tmp_path / "scores.json"]
    return {
        "score": ["score", model, *data, "--base", tiny.backbone, *scored],
        "score a run": ["score", run, *data, *scored],
        "merge": ["merge", run, "--out", tmp_path / "out"],
        "revert": ["revert", model, "--base", tiny.backbone, "--layers", "1", "--out", tmp_path / "out"],
        "prune": ["prune", run, "--layers", "2", "--out", tmp_path / "out"],
        "eval": ["eval", run, "--base", tiny.backbone, "--task", "mmlu", "--limit", 1, "--data-root", tmp_path, "--out", tmp_path / "out"],
        "perplexity": ["perplexity", run, *data, "--base", tiny.backbone, "--revert-sweep", "1", "--device", "cpu"],
        "layers": ["layers", run, "sparse:2"],
    }[name]  # fmt: skip


@pytest.mark.parametrize("name", ["score", "score a run", "merge", "revert", "prune", "eval", "perplexity", "layers"])
def test_a_command_reads_each_settings_file_once(tiny, llava_checkpoint, lora_run, tmp_path, name):
    if name == "eval":
        from tests.helpers.data_roots import write_mmlu

        write_mmlu(tmp_path)
    with our_reads() as reads:
        assert cli.main([str(part) for part in command(name, tiny, llava_checkpoint, lora_run, tmp_path)]) == 0
    assert reads, "nothing was seen"
    assert {path: count for path, count in reads.items() if count > 1} == {}


# -- every file's name in one place


def names() -> set[str]:
    """What `run_files` calls files, without patterns and a tokenizer's, which only tokenizers write."""
    values = [value for key, value in vars(run_files).items() if key.isupper() and key != "TOKENIZER_FILES"]
    return {name for value in values for name in ([value] if isinstance(value, str) else value) if "*" not in name}


def literals(path: Path) -> list[str]:
    """The strings of a module that are a file's name, or a path that ends in one; text that names a file in words is not."""
    tree = ast.parse(path.read_text())
    words = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    found = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in words)
    return [f"{path.name}:{node.lineno}: {node.value}" for node in found if node.value.rpartition("/")[2] in names()]


def test_the_names_of_files_are_in_one_module():
    assert {"config.json", "region.json", "cost.json", "adapter_config.json", "non_lora_trainables.bin", "settings.json"} <= names()
    modules = [path for path in (ROOT / "llava_region").rglob("*.py") if path.name != "run_files.py"]
    assert [literal for path in modules for literal in literals(path)] == []
