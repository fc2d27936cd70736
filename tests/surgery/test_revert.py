"""Reverted layers are the backbone's to the bit, everything else the model's."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from llava_region.checkpoints.tensors import Checkpoint
from llava_region.cli import main
from llava_region.decoder import layer_index
from llava_region.surgery.revert import revert
from tests.helpers.command_line import refused_without_output

pytest.importorskip("llava.model")
REGION = {"layers": [1, 6], "num_layers": 8, "spec": "1,6"}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.tensor(name) for name in checkpoint}


@pytest.fixture
def model(llava_checkpoint, tmp_path) -> Path:
    """A copy of the checkpoint with a region, which a test may spoil."""
    folder = Path(shutil.copytree(llava_checkpoint, tmp_path / "llava-model"))
    (folder / "region.json").write_text(json.dumps({**REGION, "base_model": "x", "upstream": "llava", "mode": "full"}))
    return folder


@pytest.mark.parametrize(("layers", "expected"), [("all", range(8)), ("0,3-4", (0, 3, 4)), ([7, 2], (2, 7)), ("none", ()), ([], ())])
def test_named_layers_and_no_others(tiny, model, tmp_path, layers, expected):
    report = revert(model, tiny.backbone, layers, tmp_path / "out")
    tuned, backbone, got = weights(model), weights(tiny.backbone), weights(tmp_path / "out")
    assert set(got) == set(tuned) and report["layers"] == list(expected)
    assert not torch.equal(tuned["model.layers.3.mlp.up_proj.weight"], backbone["model.layers.3.mlp.up_proj.weight"])
    for name, tensor in got.items():
        assert torch.equal(tensor, (backbone if layer_index(name) in expected else tuned)[name]), name
    region, config = (json.loads((tmp_path / "out" / name).read_text()) for name in ("region.json", "config.json"))
    assert region["layers"] == [1, 6]
    if expected:
        assert region["reverted"] == {"layers": list(expected), "base": str(tiny.backbone)}
        assert config.pop("reverted_layers") == list(expected)
    else:
        assert "reverted" not in region
    assert config == json.loads((model / "config.json").read_text())


def test_upstream_loads_it(tiny, model, tmp_path):
    from llava.model.builder import load_pretrained_model

    revert(model, tiny.backbone, "0-3", tmp_path / "llava-reverted")
    tokenizer, loaded, processor, _ = load_pretrained_model(str(tmp_path / "llava-reverted"), None, "llava-reverted", device="cpu")
    assert len(tokenizer) == 512 and processor is not None
    name = "model.layers.2.self_attn.q_proj.weight"
    assert torch.equal(loaded.state_dict()[name], Checkpoint(tiny.backbone).tensor(name).half())


def test_layers_are_cast_to_the_models_type(tiny, model, tmp_path):
    from transformers import LlamaForCausalLM

    LlamaForCausalLM.from_pretrained(tiny.backbone, torch_dtype=torch.float16).save_pretrained(tmp_path / "half", max_shard_size="200KB")
    revert(model, tmp_path / "half", "2", tmp_path / "out")
    name = "model.layers.2.mlp.down_proj.weight"
    got = weights(tmp_path / "out")[name]
    assert got.dtype == torch.float32 and torch.equal(got, weights(tiny.backbone)[name].half().float())


def test_headless_backbone_and_stored_buffers(tiny, model, tmp_path):
    """A backbone saved without its head lacks the `model.` of every name; old Llamas store rotary_emb.inv_freq."""
    from transformers import LlamaModel

    bare = LlamaModel.from_pretrained(tiny.backbone)
    state = {**bare.state_dict(), "layers.2.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    bare.save_pretrained(tmp_path / "bare", state_dict=state)
    revert(model, tmp_path / "bare", "2", tmp_path / "out")
    name = "model.layers.2.mlp.down_proj.weight"
    assert torch.equal(weights(tmp_path / "out")[name], weights(tiny.backbone)[name]) and set(weights(tmp_path / "out")) == set(
        weights(model)
    )


def test_reverting_twice_notes_both(tiny, model, tmp_path):
    revert(model, tiny.backbone, "5", tmp_path / "one")
    revert(tmp_path / "one", tiny.backbone, "2,5", tmp_path / "two")
    assert json.loads((tmp_path / "two/region.json").read_text())["reverted"]["layers"] == [2, 5]


def test_a_model_without_a_region_stays_without(tiny, llava_checkpoint, tmp_path):
    revert(llava_checkpoint, tiny.backbone, "5", tmp_path / "out")
    assert not (tmp_path / "out/region.json").exists()
    assert json.loads((tmp_path / "out/config.json").read_text())["reverted_layers"] == [5]


def refused(message: str, model: Path, base: Path, layers: str, out: Path) -> None:
    refused_without_output(message, out, lambda: revert(model, base, layers, out))


def test_wrong_inputs_are_refused(tiny, model, lora_run, tmp_path):
    from llava_region.data.tiny import write_backbone

    out = tmp_path / "out"
    refused("layer 8 in '8' is beyond", model, tiny.backbone, "8", out)
    refused("layer spec is empty", model, tiny.backbone, "", out)
    refused("is a LoRA run", lora_run, tiny.backbone, "1", out)
    refused("there is no folder", model, tmp_path / "no", "1", out)
    write_backbone(tmp_path / "deep", num_layers=9, hidden_size=64)
    refused("num_hidden_layers 9", model, tmp_path / "deep", "1", out)
    write_backbone(tmp_path / "wide", num_layers=8, hidden_size=128)
    refused("hidden_size 128", model, tmp_path / "wide", "1", out)
    config = json.loads((tmp_path / "wide/config.json").read_text())
    (tmp_path / "wide/config.json").write_text(json.dumps({**config, "hidden_size": 64, "intermediate_size": 128}))
    refused("has shape", model, tmp_path / "wide", "1", out)


@pytest.mark.parametrize(("side", "message"), [("model", "which the model does not"), ("base", "holds no 'model.layers.1")])
def test_a_tensor_on_one_side_only_is_refused(tiny, model, tmp_path, side, message):
    from safetensors.torch import load_file, save_file

    base = Path(shutil.copytree(tiny.backbone, tmp_path / "base"))
    file = (model if side == "model" else base) / "model.safetensors"
    tensors = load_file(file)
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, file, {"format": "pt"})
    refused(message, model, base, "1", tmp_path / "out")


def test_command(tiny, model, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["revert", str(model), "--base", str(tiny.backbone), "--layers", "sparse:25%", "--out", str(out)]
    assert main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["layers"] == [0, 7] and report["tensors"] == 18 and report["tensors"] + report["copied"] == len(weights(model))
    assert main(arguments) == 2 and capsys.readouterr().err.count("\n") == 1
    assert main([*arguments, "--force"]) == 0 and "0,7 as in" in capsys.readouterr().out
    assert main([*arguments[:-1], str(model), "--force"]) == 2
    assert "would replace the input" in capsys.readouterr().err and (model / "model.safetensors").exists()
