"""The files and flags that a run of the real Bunny names: refused before weights load, in the words of the flag.

Runs where BUNNY_ROOT names a checkout of BAAI-DCAI/Bunny at 08273ac.
"""
# ruff: noqa: E402 - Bunny can be imported only after the shims

import json
import shutil

import pytest
import torch

from tests.helpers import bunny_shims

if bunny_shims.why_not():
    pytest.skip(bunny_shims.why_not(), allow_module_level=True)
bunny_shims.apply()

import bunny.train.train as upstream

from llava_region import train as region_train
from llava_region.data.tiny import write_vision_tower
from tests.helpers.bunny_models import MODEL_TYPES, bunny_flags, write_bunny
from tests.helpers.training_runs import LORA, environment


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_bunny(tmp_path_factory.mktemp("bunny"), "phi-2")


@pytest.fixture
def line_of(files, tmp_path, capsys, monkeypatch):
    """Run Bunny with changed flags up to its train(); returns the error line, or None where it got that far."""
    monkeypatch.setattr(upstream, "train", lambda: None)

    def run(**changes) -> str | None:
        code = region_train.main(
            ["bunny", *bunny_flags(files, tmp_path / "out", **{**LORA, "dry_run_step": False, **changes}), "--tune_layers", "1,6"]
        )
        lines = capsys.readouterr().err.strip().splitlines()
        assert code in (0, 2) and len(lines) <= 1, lines
        return lines[0] if code else None

    return run


def test_words(line_of):
    assert "allowed: square, pad" in line_of(image_aspect_ratio="anyres")
    assert "allowed: linear, identity, spp_v1" in line_of(mm_projector_type="mlp2x_relu")
    assert "--mm_projector_type spp is not among its values" in line_of(mm_projector_type="spp")
    assert "--model_type is missing; allowed: llama3-8b" in line_of(model_type=None)
    for kind in ("linear", "mlp3x_gelu", "ldp", "vanilla", "minigpt", "spp_v2"):
        assert line_of(mm_projector_type=kind) is None, kind
    for ratio in ("square", "pad", None):
        assert line_of(image_aspect_ratio=ratio) is None


def test_a_path_that_tells_the_wrong_kind_of_tower(line_of, files, tmp_path):
    """Bunny takes a CLIP in a folder 'design' for a SigLIP, and transformers would draw its weights at random."""
    clip = tmp_path / "design" / "clip-tiny"
    write_vision_tower(clip)
    assert "is no SigLIP vision tower: its config.json says 'clip_vision_model'" in line_of(vision_tower=clip)
    siglip = shutil.copytree(files.vision_tower, tmp_path / "clip-like")
    assert "is no CLIP vision tower: its config.json says 'siglip_vision_model'" in line_of(vision_tower=siglip)
    assert line_of(vision_tower=shutil.move(clip, tmp_path / "clip-tiny")) is None


def test_eva_is_a_file(line_of, tmp_path):
    assert "Bunny takes it for EVA-CLIP by 'eva' in its path" in line_of(vision_tower=tmp_path / "eva")
    (tmp_path / "eva.pt").write_bytes(b"weights")
    line = line_of(vision_tower=tmp_path / "eva.pt", dry_run=True, model_max_length=2048)  # EVA-CLIP makes 1024 tokens a picture
    assert line is None, line


def test_tower_files(line_of, files, tmp_path):
    siglip = shutil.copytree(files.vision_tower, tmp_path / "siglip")
    (siglip / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 28, "width": 28}}))
    assert "makes pictures of 28 x 28, but config.json says 56" in line_of(vision_tower=siglip)
    assert line_of(vision_tower=siglip, use_s2=True) is None  # which sets the size itself
    (siglip / "preprocessor_config.json").unlink()
    assert "has no preprocessor_config.json that SiglipImageProcessor can use" in line_of(vision_tower=siglip)
    assert "not in the hub's cache" in line_of(vision_tower="google/siglip-so400m-patch14-384")


def test_patches_by_four(line_of, files, tmp_path):
    """Three by three patches, as the 27 by 27 of Bunny's own SigLIP are odd too."""
    from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=42, patch_size=14
    )
    SiglipVisionModel(config).save_pretrained(tmp_path / "siglip")
    SiglipImageProcessor(size={"height": 42, "width": 42}).save_pretrained(tmp_path / "siglip")
    line = line_of(vision_tower=tmp_path / "siglip", mm_projector_type="minigpt")
    assert line and "takes patches by four" in line and "makes 9" in line
    assert line_of(vision_tower=tmp_path / "siglip", mm_projector_type="ldp") is None


def test_projector(line_of, tmp_path):
    file = tmp_path / "mm_projector.bin"
    good = {"0.weight": (64, 32), "0.bias": (64,), "2.weight": (64, 64), "2.bias": (64,)}
    torch.save({f"model.mm_projector.{name}": torch.zeros(shape) for name, shape in good.items()}, file)
    assert line_of(pretrain_mm_mlp_adapter=file) is None
    line = line_of(pretrain_mm_mlp_adapter=file, use_s2=True)  # three resolutions side by side
    assert line and "0.weight has the shape (64, 32), but the vision tower and the language model ask for (64, 96)" in line
    assert line_of(pretrain_mm_mlp_adapter=file, mm_projector_type="linear").endswith("give --mm_projector_type mlp2x_gelu")
    file.write_bytes(b"")
    assert "is empty" in line_of(pretrain_mm_mlp_adapter=file)


def test_backbone_and_tokenizer(line_of, files, tmp_path):
    backbone = shutil.copytree(files.backbone, tmp_path / "backbone")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (backbone / name).unlink()
    assert "holds no tokenizer that can be loaded" in line_of(model_name_or_path=backbone)
    shutil.rmtree(backbone)
    shutil.copytree(files.backbone, backbone)
    (backbone / "model.safetensors").unlink()
    assert "it holds none of model.safetensors" in line_of(model_name_or_path=backbone)
    shutil.copy(files.vision_tower / "model.safetensors", backbone)
    assert "is no model that Bunny loads as BunnyPhiForCausalLM" in line_of(model_name_or_path=backbone)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_dry_run_rehearses(tmp_path, capsys, monkeypatch, model_type):
    """Bunny's own train() on a miniature of each model type, with its tokenizer."""
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])  # the shims
    flags = bunny_flags(write_bunny(tmp_path, model_type), tmp_path / "out", dry_run=True, bf16=True, **LORA)
    assert region_train.main(["bunny", *flags, "--tune_layers", "1,6"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert "4 records of the data through Bunny's train() on a miniature" in last and "2 steps, loss " in last
