"""A third upstream is one class and one line of the table: train a region of a codebase that shares no name with LLaVA's."""

import importlib
import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("peft")

from llava_region import train as region_train
from llava_region import upstreams
from llava_region.decoder import Parts, layer_index

HERE = Path(__file__).parent


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """The codebase on the path and in the table; returns the folder of a model to start from and its data file."""
    monkeypatch.syspath_prepend(str(HERE / "toy_codebase"))
    monkeypatch.setitem(upstreams.TABLE, "toy", "tests.patches.toy_upstream")
    module = importlib.import_module("toy.train")
    torch.manual_seed(0)
    module.ToyModel(module.ToyConfig()).save_pretrained(tmp_path / "start")
    turns = [{"from": "human", "value": "what is it"}, {"from": "gpt", "value": "a circle"}]
    (tmp_path / "talk.json").write_text(json.dumps([{"conversations": turns}] * 8))
    return tmp_path / "start", tmp_path / "talk.json"


def flags(toy, out: Path, *more: str) -> list[str]:
    given = {
        "start_from": toy[0], "talk": toy[1], "output_dir": out, "max_steps": 2, "learning_rate": 1e-2, "use_cpu": True,
        "report_to": "none", "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant",
    }  # fmt: skip
    return ["toy", *(part for name, value in given.items() for part in (f"--{name}", str(value))), *more]


def test_it_is_short():
    assert len((HERE / "toy_upstream.py").read_text().splitlines()) < 80


def test_lora_trains_the_region_alone(toy, tmp_path, capsys):
    out = tmp_path / "out"
    assert region_train.main(flags(toy, out, "--rank", "4", "--tune_layers", "0,2")) == 0, capsys.readouterr().err
    adapter = load_file(out / "adapter_model.safetensors")
    assert {layer_index(name) for name in adapter} == {0, 2}
    record = json.loads((out / "region.json").read_text())
    assert record["layers"] == [0, 2] and record["upstream"] == "toy" and record["mode"] == "lora"
    cost = json.loads((out / "cost.json").read_text())
    assert cost["tokens"] == 2 * 2 * 21  # two steps of two samples of 20 characters and an image
    # a checkpoint holds the projector, and the same command again goes on from the last one
    beside = torch.load(out / "checkpoint-1" / "non_lora_trainables.bin", weights_only=True)
    assert {name.rpartition("bridge")[1] for name in beside} == {"bridge"}
    assert region_train.main(flags(toy, out, "--rank", "4", "--tune_layers", "0,2", "--max_steps", "3")) == 0
    assert "resuming from" in capsys.readouterr().out


def test_a_gpu_that_is_full_in_the_optimizers_step(toy, tmp_path, capsys, monkeypatch):
    def step(self, closure=None):
        raise torch.cuda.OutOfMemoryError(f"CUDA out of memory. {'Tried to allocate 2.00 GiB. ' * 20}")

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    assert region_train.main(flags(toy, tmp_path / "out", "--tune_layers", "1", "--gradient_checkpointing", "False")) == 2
    assert "to train in less memory, give --gradient_checkpointing True. CUDA out" in capsys.readouterr().err


def test_waiting_for_data_is_told(toy, tmp_path, capsys, monkeypatch):
    records = importlib.import_module("toy.train").Records
    plain = records.__getitem__
    monkeypatch.setattr(records, "__getitem__", lambda self, i: (time.sleep(0.2), plain(self, i))[1])
    assert region_train.main(flags(toy, tmp_path / "out", "--tune_layers", "1", "--save_strategy", "no")) == 0
    cost = json.loads((tmp_path / "out" / "cost.json").read_text())
    # two samples a step
    assert 0.4 <= cost["data_seconds_per_step"] <= cost["seconds_per_step"]
    assert "of each step's" in capsys.readouterr().out


def test_full_tuning_changes_the_region_and_the_projector_alone(toy, tmp_path):
    out = tmp_path / "out"
    assert region_train.main(flags(toy, out, "--tune_layers", "1")) == 0
    before, after = load_file(toy[0] / "model.safetensors"), load_file(out / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{part}.{kind}" for part in ("stack.1.mix", "bridge") for kind in ("weight", "bias")}


def test_dry_run(toy, tmp_path, capsys):
    assert region_train.main(flags(toy, tmp_path / "out", "--rank", "4", "--tune_layers", "sparse:50%", "--dry_run", "True")) == 0
    printed = capsys.readouterr().out
    assert "#..#" in printed and "trains LoRA" in printed and "trains projector" in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rank", ["0", "4"], ids=["full", "lora"])
@pytest.mark.parametrize("missing", ["projector", "embeddings", "head", "vision"])
def test_a_part_that_nobody_declared_is_an_error(toy, tmp_path, capsys, monkeypatch, missing, rank):
    """Never frozen and never trained by default."""
    upstream = upstreams.get("toy")
    monkeypatch.setattr(type(upstream), "parts", replace(upstream.parts, **{missing: ()}))
    upstreams._union.cache_clear()
    name = {"projector": "bridge", "embeddings": "words", "head": "answer", "vision": "eye"}[missing]
    try:
        assert region_train.main(flags(toy, tmp_path / "out", "--rank", rank, "--tune_layers", "0")) == 2
    finally:
        upstreams._union.cache_clear()
    error = capsys.readouterr().err
    assert f"{name}.weight' belongs to no part of a model that is known here" in error
    assert not list((tmp_path / "out").glob("*"))


def test_its_own_refusals_and_help(toy, tmp_path, capsys):
    assert region_train.main(flags(toy, tmp_path / "out", "--rank", "-1", "--tune_layers", "0")) == 2
    assert "error: --rank -1 is negative" in capsys.readouterr().err
    assert region_train.main(["toy", "--help"]) == 0
    assert "toy's flags:" in (shown := capsys.readouterr().out) and "--start_from" in shown and "llava|bunny|toy" in shown
    script = HERE / "toy_codebase" / "toy" / "train.py"
    assert region_train.parse([str(script), "--rank", "4"]).upstream is upstreams.get("toy")


def test_parts_are_joined():
    one = Parts(("a.b",), ("p",), ("v",), ("e",), ("h",), ("mm_",))
    two = Parts(("c",), ("p", "q"), (), ("e",), ("n",))
    both = one | two
    assert both.layers == ("a.b", "c") and both.projector == ("p", "q") and both.head == ("h", "n") and both.config_prefixes == ("mm_",)
    assert both.layer_pattern.search("x.a.b.12.y")[1] == "12" and not both.layer_pattern.search("x.aXb.1")
