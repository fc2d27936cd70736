"""The real Bunny's own train(), hooked, on tiny models of all its model types in one process.

Runs where BUNNY_ROOT names a checkout of BAAI-DCAI/Bunny at 08273ac, in an environment with transformers 4.39 to 4.41.
"""
# ruff: noqa: E402 - Bunny can be imported only after the shims

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import bunny_shims

if bunny_shims.why_not():
    pytest.skip(bunny_shims.why_not(), allow_module_level=True)
bunny_shims.apply()

from llava_region import LlavaRegionError
from llava_region import train as region_train
from llava_region.models import loading as models
from llava_region.patches import bunny
from tests.helpers import bunny_models
from tests.helpers.bunny_models import bunny_flags, write_bunny
from tests.helpers.model_cards import run_code
from tests.helpers.training_runs import LORA, adapter, environment, layers_of, projector, same, train

BF16 = {"bf16": True}


@pytest.fixture(scope="session")
def tiny_bunny(tmp_path_factory):
    """The tiny files of a model type; made once each. Never write into them."""
    folder, made = tmp_path_factory.mktemp("bunny"), {}

    def files(model_type="phi-2"):
        if model_type not in made:
            made[model_type] = write_bunny(folder, model_type)
        return made[model_type]

    return files


def run_here(files, out, tune_layers="1,6", **changes) -> int:
    """Train in this process, which saves the seconds that imports take."""
    own = [] if tune_layers is None else ["--tune_layers", tune_layers]
    return region_train.main(["bunny", *bunny_flags(files, out, **changes), *own])


def tensors_of(folder):
    return load_file(folder / "model.safetensors")


def linear_names(files, layers) -> set[str]:
    """The linear modules of a backbone's layers, read from its weights: every matrix in a decoder layer is one."""
    return {
        name.removesuffix(".weight")
        for name, tensor in tensors_of(files.backbone).items()
        if tensor.ndim == 2 and layers_of([name]) <= layers
    }


def upstream_load(folder, files, base=True):
    from bunny.model.builder import load_pretrained_model

    name = "bunny-lora" if base else "bunny-full"
    return load_pretrained_model(str(folder), str(files.backbone) if base else None, name, files.model_type, device="cpu")


@pytest.mark.parametrize("model_type", bunny_models.MODEL_TYPES)
def test_every_model_type(tiny_bunny, tmp_path, model_type, capsys):
    """LoRA on exactly the region's linears; Bunny loads it; our loader gives the same logits and answers."""
    files, out = tiny_bunny(model_type), tmp_path / "bunny-lora"
    assert run_here(files, out, **LORA) == 0
    tensors = adapter(out)
    names = {name.removeprefix("base_model.model.").split(".lora_")[0] for name in tensors}
    assert names == linear_names(files, {1, 6}) and all((tensor != 0).any() for tensor in tensors.values())
    printed = capsys.readouterr().out
    assert "first step: layers 1,6 have gradients, no other; learning rates: llm 0.0002, projector 2e-05" in printed
    assert "tokenization mismatch" not in printed
    region = json.loads((out / "region.json").read_text())
    assert (region["layers"], region["num_layers"], region["upstream"], region["mode"]) == ([1, 6], 8, "bunny", "lora")
    check_loading(out, files)
    # of some, this transformers has no class: their own code comes with the real models
    known = json.loads((files.backbone / "config.json").read_text())["model_type"] not in ("phi3", "minicpm", "stablelm_epoch")
    blocks = run_code(out, {f"PATH/TO/{files.backbone.name}": files.backbone}, blocks=3 if known else 2)
    assert [len(layers) for layers in blocks] == [8] * (3 if known else 2)


def check_loading(out, files):
    from PIL import Image

    tokenizer, model, _, _ = upstream_load(out, files)
    base, merged = tensors_of(files.backbone), model.state_dict()
    changed = {name for name in base if layers_of([name]) != {None} and not torch.equal(merged[name], base[name].half())}
    assert {name.removesuffix(".weight") for name in changed} == linear_names(files, {1, 6})

    ours = models.load(out, base=files.backbone, dtype="float16")
    assert ours.tokenizer.eos_token_id == tokenizer.eos_token_id
    with Image.open(files.images / "3.png") as image:
        pixels = ours.pixel_values(image.resize((70, 40)))
        # Bunny's own script for this benchmark does not pad
        bare = ours.image_processor.preprocess(image.resize((70, 40)).convert("RGB"), return_tensors="pt")["pixel_values"][0]
        assert torch.equal(ours.pixel_values(image.resize((70, 40)), "scienceqa"), bare) and not torch.equal(pixels, bare)
    ids, text = ours.input_ids(ours.prompt("What color is this?", 1)), ours.input_ids(ours.prompt("What is 1 plus 2?"))
    with torch.inference_mode():
        expected = model(input_ids=ids[None].clone(), images=pixels[None].half()).logits
        batch = ours.embed([ids], [[pixels]])
        found = ours.model(inputs_embeds=batch.inputs_embeds, position_ids=batch.position_ids).logits
        torch.testing.assert_close(found, expected, atol=4e-3, rtol=0)
        expected = model(input_ids=text[None]).logits
        found = ours.model(inputs_embeds=ours.embed([text], [[]]).inputs_embeds).logits
        torch.testing.assert_close(found, expected, atol=4e-3, rtol=0)
        answer = model.generate(
            ids[None].clone(), images=pixels[None].half(), do_sample=False, max_new_tokens=4, pad_token_id=tokenizer.pad_token_id
        )[0, len(ids) :]
    assert ours.generate([ids, text], [[pixels], []], 4)[0] == tokenizer.decode(answer, skip_special_tokens=True).strip()
    sample = json.loads(files.data.read_text())[0]
    _, labels = ours.example(sample)
    ending = tokenizer.eos_token
    assert ours.tokenizer.decode(labels[labels != -100]).strip() == sample["conversations"][1]["value"] + ending


@pytest.mark.parametrize("model_type", bunny_models.MODEL_TYPES)
def test_all_layers_equals_upstream(tiny_bunny, tmp_path, model_type):
    """`--tune_layers all` and upstream untouched end with the same weights; supervised logits alone may round otherwise."""
    files, flags = tiny_bunny(model_type), {**LORA, "lora_dropout": 0.05}
    torch.manual_seed(42)  # as the hooked run does; upstream draws LoRA's start and the projector before it seeds
    assert run_here(files, tmp_path / "upstream", tune_layers=None, **flags) == 0
    assert run_here(files, tmp_path / "exact", tune_layers="all", supervised_logits=False, **flags) == 0
    assert same(adapter(tmp_path / "exact"), adapter(tmp_path / "upstream"))
    assert same(projector(tmp_path / "exact"), projector(tmp_path / "upstream"))
    assert not (tmp_path / "upstream" / "region.json").exists()
    losses = [json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"][0]["loss"] for name in ("upstream", "exact")]
    assert run_here(files, tmp_path / "ours", tune_layers="all", **flags) == 0
    losses.append(json.loads((tmp_path / "ours" / "cost.json").read_text())["first_loss"])
    assert losses[0] == losses[1] == pytest.approx(losses[2], abs=2e-4)
    for name, tensor in adapter(tmp_path / "upstream").items():
        torch.testing.assert_close(adapter(tmp_path / "ours")[name], tensor, atol=2e-4, rtol=1e-2)


def test_full_tuning_changes_the_region_and_the_projector_alone(tiny_bunny, tmp_path):
    files = tiny_bunny()
    assert run_here(files, tmp_path / "full") == 0
    base, saved = tensors_of(files.backbone), tensors_of(tmp_path / "full")
    assert layers_of(name for name in base if not torch.equal(base[name], saved[name])) == {1, 6}
    assert any("mm_projector" in name for name in saved)
    _, model, _, _ = upstream_load(tmp_path / "full", files, base=False)
    assert torch.equal(model.state_dict()["model.layers.1.mlp.fc1.weight"], saved["model.layers.1.mlp.fc1.weight"].half())


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A projector to start from, so that a test knows where it started."""
    path = tmp_path_factory.mktemp("projector") / "mm_projector.bin"
    torch.manual_seed(1)
    shapes = {"0.weight": (64, 32), "0.bias": (64,), "2.weight": (64, 64), "2.bias": (64,)}
    torch.save({f"model.mm_projector.{name}": torch.randn(shape) * 0.1 for name, shape in shapes.items()}, path)
    return path


def test_learning_rates(tiny_bunny, tmp_path, pretrained):
    """Adam's first step moves every weight by its rate: 2e-4 for B, 2e-5 for the projector."""
    flags = {**LORA, "pretrain_mm_mlp_adapter": pretrained, "max_steps": 1, "lr_scheduler_type": "constant"}
    assert run_here(tiny_bunny(), tmp_path / "run", **flags) == 0
    before = torch.load(pretrained, weights_only=True)
    after = projector(tmp_path / "run")
    moved = max((tensor - before[name.removeprefix("base_model.model.")]).abs().max() for name, tensor in after.items())
    largest = max(tensor.abs().max() for name, tensor in adapter(tmp_path / "run").items() if "lora_B" in name)
    assert moved == pytest.approx(2e-5, rel=1e-2) and largest == pytest.approx(2e-4, rel=1e-2)


def test_killed_and_resumed_ends_the_same(tiny_bunny, tmp_path):
    """Across an epoch's end, with dropout, under SIGKILL: adapter and projector equal to the bit; every checkpoint is whole."""
    files = tiny_bunny()
    options = {**LORA, "lora_dropout": 0.1, "max_steps": 24, "save_strategy": "steps", "save_steps": 4, "save_total_limit": 2}
    whole = train([*bunny_flags(files, tmp_path / "whole", **options), "--tune_layers", "1,6"], upstream="bunny")
    assert whole.returncode == 0, whole.stderr[-3000:]
    flags = [*bunny_flags(files, tmp_path / "killed", **options), "--tune_layers", "1,6"]
    command = [sys.executable, "-m", "llava_region.train", "bunny", *flags]
    victim = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    marker = tmp_path / "killed" / "checkpoint-16" / "region.json"
    deadline = time.time() + 120
    while not marker.exists() and victim.poll() is None and time.time() < deadline:
        time.sleep(0.005)
    os.killpg(victim.pid, signal.SIGKILL)
    victim.wait()
    assert marker.exists() and not (tmp_path / "killed" / "cost.json").exists()
    assert layers_of(adapter(marker.parent)) == {1, 6} and len(projector(marker.parent)) == 4
    resumed = train(flags, upstream="bunny")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert same(adapter(tmp_path / "whole"), adapter(tmp_path / "killed"))
    assert same(projector(tmp_path / "whole"), projector(tmp_path / "killed"))


@pytest.fixture(scope="module")
def unfrozen(tiny_bunny, tmp_path_factory):
    """A LoRA run that trained the vision tower too."""
    out = tmp_path_factory.mktemp("unfrozen") / "bunny-lora"
    flags = {**LORA, **BF16, "unfreeze_vision_tower": True, "save_strategy": "steps", "save_steps": 1, "mm_projector_lr": 1e-2}
    flags["lr_scheduler_type"] = "constant"
    assert run_here(tiny_bunny(), out, **flags) == 0
    return out, flags


def tower_of(tensors) -> dict:
    return {name.split("vision_tower.", 1)[1]: tensor for name, tensor in tensors.items() if "vision_tower" in name}


def test_unfrozen_tower_trains_is_saved_and_loaded(unfrozen, tiny_bunny):
    out, files = unfrozen[0], tiny_bunny()
    assert layers_of(adapter(out)) == {1, 6}
    start = load_file(files.vision_tower / "model.safetensors")
    for folder in (out / "checkpoint-1", out / "checkpoint-2", out):
        tower = tower_of(projector(folder))
        assert len(tower) == len(start)
        moved = (
            tower["vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"].float()
            - start["vision_model.encoder.layers.0.mlp.fc1.weight"]
        ).abs()
        steps = 1 if folder.name == "checkpoint-1" else 2
        assert 0.9e-2 < moved.max() < steps * 1.3e-2, "the tower goes with --mm_projector_lr"
    _, model, _, _ = upstream_load(out, files)
    expected = {name: tensor.half() for name, tensor in tower_of(projector(out)).items()}
    assert same(model.get_vision_tower().state_dict(), expected)
    ours = models.load(out, base=files.backbone, dtype="float16")
    assert same(ours.model.get_vision_tower().state_dict(), expected)


def test_unfrozen_tower_is_resumed(unfrozen, tiny_bunny, tmp_path):
    out, flags = unfrozen
    shutil.copytree(out / "checkpoint-1", tmp_path / "run" / "checkpoint-1")
    assert run_here(tiny_bunny(), tmp_path / "run", **flags) == 0
    assert same(projector(tmp_path / "run"), projector(out)) and same(adapter(tmp_path / "run"), adapter(out))


@pytest.fixture(scope="module")
def checkpoint(tiny_bunny, tmp_path_factory):
    """A Bunny checkpoint: full tuning with the tower unfrozen."""
    out = tmp_path_factory.mktemp("checkpoint") / "bunny-full"
    flags = {"unfreeze_vision_tower": True, "mm_projector_lr": 1e-2, "lr_scheduler_type": "constant", **BF16}
    assert run_here(tiny_bunny(), out, **flags) == 0
    return out


def test_a_trained_tower_is_not_left_out_without_a_word(checkpoint, tiny_bunny, tmp_path, capsys):
    files = tiny_bunny()._replace(backbone=checkpoint)
    assert run_here(files, tmp_path / "again", **LORA, **BF16) == 2
    assert 'set "continuous_training": true in its config.json' in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("unfreeze", [False, True])
def test_continued_from_a_checkpoint(checkpoint, tiny_bunny, tmp_path, unfreeze):
    """Upstream would put LoRA on SigLIP, which is attached before PEFT; the checkpoint's own tower is kept."""
    start = tmp_path / "start"
    shutil.copytree(checkpoint, start)
    config = json.loads((start / "config.json").read_text())
    (start / "config.json").write_text(json.dumps({**config, "continuous_training": True}))
    files, out = tiny_bunny()._replace(backbone=start), tmp_path / "bunny-lora"
    assert run_here(files, out, tune_layers="0,3", unfreeze_vision_tower=unfreeze, **LORA, **BF16) == 0
    tensors = adapter(out)
    names = {name.removeprefix("base_model.model.").split(".lora_")[0] for name in tensors}
    assert names == linear_names(tiny_bunny(), {0, 3})
    trained = tower_of(tensors_of(checkpoint))
    loaded = models.load(out, base=start, dtype="bfloat16").model.get_vision_tower().state_dict()
    assert same(loaded, tower_of(projector(out)) if unfreeze else trained) and len(trained) > 40


def test_full_tuning_continued(checkpoint, tiny_bunny, tmp_path):
    files = tiny_bunny()._replace(backbone=checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    start = tmp_path / "start"
    shutil.copytree(checkpoint, start)
    (start / "config.json").write_text(json.dumps({**config, "continuous_training": True}))
    assert run_here(files._replace(backbone=start), tmp_path / "full", tune_layers="top:2", **BF16) == 0
    before, after = tensors_of(checkpoint), tensors_of(tmp_path / "full")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert layers_of(changed) == {None, 6, 7} and {name for name in changed if layers_of([name]) == {None}} <= {
        name for name in before if "mm_projector" in name
    }


def test_a_tower_that_gets_no_gradient_is_caught(tiny_bunny, tmp_path, capsys, monkeypatch):
    """The audit, end to end: the tower's features are detached."""
    from bunny.model.multimodal_encoder.siglip.siglip_encoder import SiglipVisionTower

    select = SiglipVisionTower.feature_select
    monkeypatch.setattr(SiglipVisionTower, "feature_select", lambda self, outs: select(self, outs).detach())
    assert run_here(tiny_bunny(), tmp_path / "out", unfreeze_vision_tower=True, max_steps=12, **LORA, **BF16) == 2
    assert "the vision tower was to be trained, but got no gradient" in capsys.readouterr().err
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_a_layer_unfrozen_outside_the_region_is_caught(tiny_bunny, tmp_path, capsys, monkeypatch):
    """The check before training, end to end: something unfroze layer 2 behind our back."""
    from bunny.model.bunny_arch import BunnyMetaModel

    initialize = BunnyMetaModel.initialize_vision_modules

    def and_unfreeze(self, model_args):
        self.layers[2].requires_grad_(True)
        initialize(self, model_args)

    monkeypatch.setattr(BunnyMetaModel, "initialize_vision_modules", and_unfreeze)
    assert run_here(tiny_bunny(), tmp_path / "out", **LORA) == 2
    assert "parameters outside the region '1,6' would train, such as base_model.model.model.layers.2." in capsys.readouterr().err


BAD = {
    "unknown model type": ({"model_type": "phi-9"}, "--model_type phi-9 is unknown to Bunny"),
    "another model": ({"model_type": "qwen1.5-1.8b"}, "whose config.json says 'phi'"),
    "no template": ({"version": None}, "is not a conversation template"),
    "unknown template": (
        {"version": "v1"},
        "llama; --model_type phi-2 is trained with bunny",
    ),
    "no tower": ({"vision_tower": None}, "--vision_tower is missing"),
    "tower of unknown kind": ({"vision_tower": "openai/vit"}, "allowed: a path that contains sig, eva, clip"),
    "s2 on CLIP": ({"vision_tower": "openai/clip-vit-large-patch14", "use_s2": True}, "--use_s2 True works with SigLIP alone"),
    "tower in fp16": ({"unfreeze_vision_tower": True}, "add --bf16 True"),
    "projector alone": ({"tune_mm_mlp_adapter": True}, "--tune_mm_mlp_adapter"),
}


@pytest.mark.parametrize("what", BAD)
def test_refused_before_weights_load(tiny_bunny, tmp_path, capfd, what):
    changes, message = BAD[what]
    assert run_here(tiny_bunny(), tmp_path / "out", **{**LORA, **changes}) == 2
    errors = capfd.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and errors[0].startswith("error: ") and message in errors[0]
    assert not (tmp_path / "out").exists()


def test_llama3_needs_its_end_token(tiny_bunny, tmp_path, capsys):
    files = tiny_bunny("llama3-8b")
    small = tmp_path / "small"
    small.mkdir()
    config = json.loads((files.backbone / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**config, "vocab_size": 32000}))
    assert run_here(files._replace(backbone=small), tmp_path / "out", **LORA) == 2
    assert "ends answers with token 128001" in capsys.readouterr().err


def test_dry_run_writes_nothing(tiny_bunny, tmp_path, capsys):
    assert run_here(tiny_bunny(), tmp_path / "out", dry_run=True, dry_run_gpus=8, **LORA) == 0
    shown = capsys.readouterr().out
    assert ".#....#." in shown and "8 GPUs" in shown and not (tmp_path / "out").exists()


def test_script_by_path(tiny_bunny, tmp_path):
    """The path of bunny/train/train.py in a checkout stands for Bunny, behind the launcher's --local_rank."""
    script = str(bunny_shims.bunny_root() / "bunny" / "train" / "train.py")
    request = region_train.parse(["--local_rank=0", script, "--bf16", "True"])
    assert request.upstream is bunny.UPSTREAM and request.script == "train.py" and request.flags == ["--local_rank=0", "--bf16", "True"]
    sys.path.remove(str(bunny_shims.bunny_root().resolve()))
    with pytest.raises(LlavaRegionError, match=r"'pretrain.py' is not a known train script of Bunny"):
        bunny.UPSTREAM.entry("pretrain.py")
