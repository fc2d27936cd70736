"""What preflight refuses, each case by itself: one line, exit 2, nothing written, no weights read."""

import json
import shutil
import sys

import pytest

pytest.importorskip("llava.train.train")
pytest.importorskip("deepspeed")

from llava_region import train as region_train
from llava_region.data.check import check_data
from tests.helpers.sparse_models import write_sparse_llama
from tests.helpers.training_runs import LORA, llava_flags, write_zero3


@pytest.fixture
def refused(tiny, tmp_path, capsys, monkeypatch):
    """Run with changed flags; returns the error line. Fails if anything is written or a model is built."""
    import llava.train.train as upstream

    monkeypatch.setattr(upstream, "train", lambda attn_implementation=None: pytest.fail("went on to train"))

    def run(own=("--tune_layers", "1,6"), **changes) -> str:
        code = region_train.main(["llava", *llava_flags(tiny, tmp_path / "out", **{**LORA, **changes}), *own])
        lines = capsys.readouterr().err.strip().splitlines()
        assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), (code, lines)
        assert not (tmp_path / "out").exists()
        return lines[0]

    return run


def test_flags(refused):
    assert "unrecognized arguments: --tune_layer" in refused(own=("--tune_layers", "1", "--tune_layer", "2"))
    assert "did you mean --tune_layers?" in refused(own=("--tune_layer", "1"))
    assert "choose from 'sample', 'all', 'none'" in refused(check_images="some")
    assert "needs --tune_layers" in refused(own=("--dry_run", "True"))
    assert "trains the projector alone" in refused(tune_mm_mlp_adapter=True)
    assert "freezes the whole language model" in refused(lora_enable=False, freeze_backbone=True)
    assert "allowed: none" in refused(lora_bias="all")
    assert "upstream has no evaluation data" in refused(evaluation_strategy="steps")
    assert "allowed: 4, 8 or 16" in refused(bits=3)
    assert "add --lora_enable True" in refused(bits=4, lora_enable=False)
    assert "--vision_tower is missing" in refused(vision_tower=None)
    assert "--version vicuna is not a conversation template" in refused(version="vicuna")
    assert "invalid float value" in refused(learning_rate="fast")


def test_missing_files(refused, tmp_path):
    assert "holds no config.json" in refused(model_name_or_path=tmp_path)
    assert "is not a folder, and no model of that name" in refused(model_name_or_path="someone/nothing")
    assert "--vision_tower" in refused(vision_tower=tmp_path / "tower")
    assert "mm_projector.bin of the pretraining" in refused(pretrain_mm_mlp_adapter=tmp_path / "p.bin")
    assert "cannot read" in refused(data_path=tmp_path / "data.json")
    assert "is not a folder" in refused(image_folder=tmp_path / "images")
    assert "'llava-region recipes DIR' writes configs" in refused(deepspeed=tmp_path / "zero3.json")


def test_start_from_a_lora_run(refused, lora_run, tiny, tmp_path, monkeypatch):
    """transformers would load the adapter's base, and PEFT nest a second adapter in the first."""
    line = refused(model_name_or_path=lora_run)
    assert f"{lora_run} is a LoRA run" in line and f"'llava-region merge {lora_run} --out MERGED'" in line
    # a checkpoint of one, of a run by upstream itself: no config.json
    checkpoint = tmp_path / "a run" / "checkpoint-5"
    checkpoint.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(lora_run / name, checkpoint)
    assert f"llava-region merge '{checkpoint}' --out" in refused(model_name_or_path=checkpoint)
    assert "is a LoRA run" in refused(model_name_or_path=checkpoint, lora_enable=False)
    both = tmp_path / "both"
    shutil.copytree(tiny.backbone, both)
    shutil.copy(lora_run / "adapter_config.json", both)
    line = refused(model_name_or_path=both)
    assert "next to whole weights, which transformers would ignore" in line and "remove adapter_config.json" in line
    # by its hub name, in the cache
    repository = tmp_path / "hub" / "models--someone--run"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    shutil.copytree(lora_run, repository / "snapshots" / "abc")
    line = refused(model_name_or_path="someone/run", cache_dir=tmp_path / "hub")
    assert "'llava-region merge someone/run --out MERGED'" in line


def test_output_folder(refused, tmp_path):
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(output_dir=tmp_path / "file")
    assert "cannot be written" in refused(output_dir="/proc/none/out")


def test_checkpoints_of_another_trainer(refused, tmp_path):
    (tmp_path / "foreign" / "checkpoint-5").mkdir(parents=True)
    assert "comes from a run without --tune_layers" in refused(output_dir=tmp_path / "foreign")


def test_checkpoint_that_is_asked_for(refused, tmp_path):
    """Upstream's train() does not read the flag: the run would start from nothing."""
    for asked in (tmp_path / "nothing" / "checkpoint-5", "True", False):
        line = refused(resume_from_checkpoint=asked)
        assert f"--resume_from_checkpoint {asked} cannot be followed" in line and "holds none; leave the flag out" in line


def test_deepspeed_config(refused, tmp_path):
    path = write_zero3(tmp_path)
    good = json.loads(path.read_text())

    def with_zero(**settings):
        path.write_text(json.dumps({**good, "zero_optimization": {**good["zero_optimization"], **settings}}))

    with_zero(stage3_gather_16bit_weights_on_model_save=False)
    assert "without weights" in refused(deepspeed=path, bf16=True)
    path.write_text(json.dumps({**good, "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}}))
    assert "'optimizer' in" in (line := refused(deepspeed=path)) and "would ignore --mm_projector_lr" in line
    # DeepSpeed's schedulers give every parameter group the one rate
    path.write_text(json.dumps({**good, "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-4}}}))
    assert "'scheduler' in" in (line := refused(deepspeed=path)) and "would ignore --mm_projector_lr" in line
    with_zero(offload_optimizer={"device": "cpu"})
    line = refused(deepspeed=path, bf16=True, optim="adafactor")
    assert "offloads the optimizer, and DeepSpeed's AdamW would take the place of --optim adafactor; leave that flag out" in line
    path.write_text("{")
    assert "not valid JSON" in refused(deepspeed=path)
    path.write_text(json.dumps(good))
    assert "ZeRO-3 needs --bf16" in refused(deepspeed=path)


def test_generation_config_that_cannot_be_saved(refused, tiny, tmp_path):
    backbone = tmp_path / "backbone"
    shutil.copytree(tiny.backbone, backbone)
    (backbone / "generation_config.json").write_text(json.dumps({"temperature": 0.9, "top_p": 0.6}))
    line = refused(lora_enable=False, model_name_or_path=backbone)
    assert "generation_config.json" in line and "do_sample" in line and "--fix_generation_config" in line
    (backbone / "generation_config.json").unlink()
    config = json.loads((backbone / "config.json").read_text())
    (backbone / "config.json").write_text(json.dumps({**config, "temperature": 0.9}))
    assert "/config.json cannot be saved" in refused(lora_enable=False, model_name_or_path=backbone)


def test_missing_deepspeed_and_bitsandbytes(refused, monkeypatch):
    import importlib.util

    original = importlib.util.find_spec
    hidden = {"deepspeed", "bitsandbytes"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in hidden else original(name, *a))
    assert "pip install bitsandbytes" in refused(bits=4)
    assert "saving a LoRA run imports deepspeed" in refused()


def test_images(refused, tiny, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    records = json.loads(tiny.data.read_text())[:6]
    for record in records:
        if "image" in record:
            shutil.copy(tiny.images / record["image"], folder)
    path = tmp_path / "data.json"
    path.write_text(json.dumps(records))
    assert len(check_data(path, folder)) == 6
    names = sorted({record["image"] for record in records if "image" in record})
    (folder / names[0]).unlink()
    whole = (folder / names[1]).read_bytes()
    (folder / names[1]).write_bytes(whole[: len(whole) // 2])
    line = refused(data_path=path, image_folder=folder)
    assert f"{names[0]} (missing)" in line and f"{names[1]} (corrupt" in line and line.startswith("error: 2 of")
    check_data(path, folder, "none")


def test_upstream_is_named_or_found(capsys, tmp_path):
    other = tmp_path / "train.py"
    other.write_text("")
    for argv, message in (
        ([], "not named"),
        (["lava", "--tune_layers", "1"], "neither an upstream nor a file"),
        ([str(other), "--tune_layers", "1"], "not a train script of LLaVA"),
        (["--bf16", "True", "llava"], "not named"),
    ):
        assert region_train.main(argv) == 2
        assert message in capsys.readouterr().err


def test_missing_flash_attention(tiny, tmp_path, capsys, monkeypatch):
    import importlib.util

    original = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "flash_attn" else original(name, *a))
    script = tmp_path / "llava" / "train" / "train_mem.py"
    script.parent.mkdir(parents=True)
    script.write_text("")
    try:
        assert region_train.main([str(script), *llava_flags(tiny, tmp_path / "out", **LORA), "--tune_layers", "1,6"]) == 2
    finally:
        sys.path.remove(str(tmp_path))
    assert "asks for flash attention, which is not installed" in capsys.readouterr().err


def test_one_error_a_node_and_one_dry_run(tiny, tmp_path, capsys, monkeypatch):
    flags = ["llava", *llava_flags(tiny, tmp_path / "out", **LORA), "--tune_layers"]
    for rank, local_rank, lines in (("0", "0", 1), ("1", "1", 0), ("8", "0", 1)):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert region_train.main([*flags, "9"]) == 2
        assert len(capsys.readouterr().err.splitlines()) == lines
        assert region_train.main([*flags, "1", "--dry_run", "True", "--dry_run_step", "False"]) == 0
        assert ("trains in all" in capsys.readouterr().out) == (rank == "0")


def test_upstream_that_breaks_while_importing(tmp_path, monkeypatch):
    """transformers' lazy modules raise RuntimeError where a version does not fit."""
    from llava_region import UnsupportedUpstream
    from llava_region.patches.seams import import_upstream

    (tmp_path / "broken_upstream.py").write_text("raise RuntimeError('Failed to import transformers.models.llama')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UnsupportedUpstream, match=r"cannot import broken_upstream of LLaVA: Failed to import .*; mend it"):
        import_upstream("broken_upstream", "LLaVA", "mend it")


def test_help_names_every_flag(capsys):
    assert region_train.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert "--tune_layers" in shown and "--dry_run" in shown and "sparse:25%" in shown and "%%" not in shown


def test_dry_run_of_13b_takes_seconds(tiny, tmp_path, capsys):
    """From the meta device: 40 layers of LLaVA-1.5-13B's shape, ZeRO-3 on eight GPUs, of weights nothing but names and shapes."""
    shape = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 40}
    folder = write_sparse_llama(tmp_path / "vicuna-13b", tiny.backbone, vocab_size=32000, **shape)
    changes = {
        "model_name_or_path": folder,
        "deepspeed": write_zero3(tmp_path),
        "bf16": True,
        "use_cpu": None,
        "lora_r": 128,
        "lora_alpha": 256,
    }
    flags = llava_flags(tiny, tmp_path / "out", **{**LORA, **changes})
    own = ["--tune_layers", "sparse:25%", "--dry_run", "True", "--dry_run_gpus", "8"]
    assert region_train.main(["llava", *flags, *own]) == 0
    shown = capsys.readouterr().out
    # LoRA of rank 128 on 10 layers: 128 * (in + out) of four 5120 x 5120, two 5120 x 13824 and one back
    lora = 10 * 128 * (4 * (5120 + 5120) + 3 * (5120 + 13824))
    assert f"{lora:,}" in shown and "0,4,8,12,16,22,26,30,34,38" in shown and "8 GPUs, ZeRO-3" in shown
    assert sys.getsizeof(shown) < 10_000 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [None, "3", [3], {}, 4, 1.5])
def test_a_stage_that_is_none(refused, tmp_path, value):
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": value}}))
    assert "allowed: 0, 1, 2 or 3" in refused(deepspeed=tmp_path / "zero.json")


@pytest.mark.parametrize(("key", "value"), [("hidden_size", 1.5), ("num_attention_heads", "x"), ("vocab_size", True), ("hidden_act", 1)])
def test_a_config_that_makes_no_model(refused, tiny, tmp_path, key, value):
    shutil.copytree(tiny.backbone, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, key: value}))
    line = refused(own=("--tune_layers", "1,6", "--dry_run", "True"), model_name_or_path=tmp_path / "model")
    assert f"cannot build a model from the config.json of {tmp_path / 'model'}" in line
