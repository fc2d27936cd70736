"""Upstream LLaVA's own train(), hooked, on the tiny model in one process."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("llava.train.train")
pytest.importorskip("deepspeed")

from llava_region import LlavaRegionError
from llava_region import train as region_train
from tests.helpers.training_runs import LORA, adapter, environment, layers_of, llava_flags, projector, same, train


def run_here(tiny, out, tune_layers="1,6", **changes) -> int:
    """Train in this process, which saves the seconds that imports take."""
    own = [] if tune_layers is None else ["--tune_layers", tune_layers]
    return region_train.main(["llava", *llava_flags(tiny, out, **changes), *own])


@pytest.fixture(scope="module")
def lora(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("lora") / "run"
    done = train([*llava_flags(tiny, out, save_strategy="steps", save_steps=1, **LORA), "--tune_layers", "1,6"])
    assert done.returncode == 0, done.stderr[-3000:]
    return out, done


def test_lora_holds_exactly_the_region(lora):
    out, done = lora
    tensors = adapter(out)
    assert layers_of(tensors) == {1, 6} and len(tensors) == 28
    assert all((tensor != 0).any() for tensor in tensors.values())
    assert "first step: layers 1,6 have gradients, no other; learning rates: llm 0.0002, projector 2e-05" in done.stdout
    region = json.loads((out / "region.json").read_text())
    assert region["layers"] == [1, 6] and region["num_layers"] == 8 and region["spec"] == "1,6"
    assert region["mode"] == "lora" and region["upstream"] == "llava" and region["base_model"].endswith("vicuna-tiny")
    assert json.loads((out / "config.json").read_text())["visual_region"] == {"layers": [1, 6], "num_layers": 8, "spec": "1,6"}


def test_projector_trains(lora):
    out, _ = lora
    first, last = projector(out / "checkpoint-1"), projector(out)
    assert len(last) == 4 and all("mm_projector" in name for name in last)
    assert not same(first, last)


def test_every_checkpoint_is_whole(lora):
    out, _ = lora
    for number in (1, 2):
        folder = out / f"checkpoint-{number}"
        assert layers_of(adapter(folder)) == {1, 6} and projector(folder)
        assert json.loads((folder / "config.json").read_text())["visual_region"]["layers"] == [1, 6]
        assert json.loads((folder / "region.json").read_text())["layers"] == [1, 6]


def test_cost(lora):
    cost = json.loads((lora[0] / "cost.json").read_text())
    assert cost["gpus"] == 1 and cost["steps"] == 2 and cost["samples"] == 8
    # 16 patches an image in the tiny tower, and some text
    assert cost["tokens"] > 8 * 16 and cost["peak_memory_bytes"] > 1e6 and cost["trainable_parameters"] == 22656
    assert cost["first_loss"] > 0 and cost["layers"] == [1, 6]
    assert 0 < cost["data_seconds_per_step"] < cost["seconds_per_step"] * 2  # a median of the one, a mean of the other


def test_arguments_load_without_us(lora):
    """training_args.bin is a pickle: it must not need llava_region."""
    saved = str(lora[0] / "checkpoint-2" / "training_args.bin")
    code = f"import torch, llava.train.train; a = torch.load({saved!r}, weights_only=False)"
    code += "; import sys; assert type(a) is llava.train.train.TrainingArguments; assert 'llava_region' not in sys.modules"
    code += "; print(a.tune_layers)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert done.stdout.strip().endswith("1,6"), done.stderr[-2000:]


def test_upstream_loads_the_run(lora, tiny, tmp_path):
    from llava.model.builder import load_pretrained_model

    (tmp_path / "llava-lora-run").symlink_to(lora[0])
    _, model, _, _ = load_pretrained_model(
        str(tmp_path / "llava-lora-run"), str(tiny.backbone), "llava-lora-run", device="cpu", device_map="cpu"
    )
    base = load_file(tiny.backbone / "model.safetensors")
    for layer in range(8):
        name = f"model.layers.{layer}.self_attn.q_proj.weight"
        assert torch.equal(model.state_dict()[name], base[name].half()) == (layer not in (1, 6))


@pytest.mark.parametrize("grouped", [True, False])
def test_killed_and_resumed_ends_the_same(tiny, tmp_path, grouped):
    """Across an epoch's end, with dropout, under SIGKILL: adapter and projector equal to the bit."""
    options = {**LORA, "lora_dropout": 0.1, "max_steps": 32, "save_strategy": "steps", "save_steps": 5, "save_total_limit": 2}
    options |= {"group_by_modality_length": grouped, "per_device_train_batch_size": 3, "warmup_ratio": 0.1, "lr_scheduler_type": "cosine"}
    whole = train([*llava_flags(tiny, tmp_path / "whole", **options), "--tune_layers", "1,6"])
    assert whole.returncode == 0, whole.stderr[-3000:]
    flags = [*llava_flags(tiny, tmp_path / "killed", **options), "--tune_layers", "1,6"]
    command = [sys.executable, "-m", "llava_region.train", "llava", *flags]
    victim = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    # 24 steps an epoch: the checkpoint resumed from lies in the second one
    marker = tmp_path / "killed" / "checkpoint-25" / "region.json"
    deadline = time.time() + 120
    while not marker.exists() and victim.poll() is None and time.time() < deadline:
        time.sleep(0.005)
    os.killpg(victim.pid, signal.SIGKILL)
    victim.wait()
    assert marker.exists() and not (tmp_path / "killed" / "cost.json").exists()
    resumed = train(flags)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert same(adapter(tmp_path / "whole"), adapter(tmp_path / "killed"))
    assert same(projector(tmp_path / "whole"), projector(tmp_path / "killed"))
    costs = [json.loads((tmp_path / name / "cost.json").read_text()) for name in ("whole", "killed")]
    assert costs[0]["samples"] == costs[1]["samples"] and costs[0]["steps"] == costs[1]["steps"] == 32


def test_finished_run_started_again_stays(lora, tiny, tmp_path):
    """transformers alone would train one more step from the checkpoint of the last."""
    import shutil

    out = tmp_path / "run"
    shutil.copytree(lora[0], out)
    assert run_here(tiny, out, save_strategy="steps", save_steps=1, **LORA) == 0
    assert same(adapter(out), adapter(lora[0])) and same(projector(out), projector(lora[0]))
    assert json.loads((out / "cost.json").read_text())["steps"] == 2


def test_checkpoint_cut_off_is_dropped(lora, tiny, tmp_path):
    """Without its region.json, written last, checkpoint-2 counts as unfinished: the run resumes from checkpoint-1."""
    import shutil

    out = tmp_path / "run"
    shutil.copytree(lora[0], out)
    (out / "checkpoint-2" / "region.json").unlink()
    (out / "checkpoint-2" / "adapter_model.safetensors").write_bytes(b"half")
    done = train([*llava_flags(tiny, out, save_strategy="steps", save_steps=1, **LORA), "--tune_layers", "1,6"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "checkpoint-2, which a killed run had not finished writing" in done.stdout
    assert f"resuming from {out / 'checkpoint-1'}\n" in done.stdout
    assert same(adapter(out), adapter(lora[0])) and same(projector(out), projector(lora[0]))


def test_resume_with_another_region_is_refused(lora, tiny, capsys):
    assert run_here(tiny, lora[0], tune_layers="1,5", **LORA) == 2
    assert "was trained on layers [1, 6] of 8" in capsys.readouterr().err
    assert run_here(tiny, lora[0]) == 2
    assert "lora tuning" in capsys.readouterr().err


def test_a_folder_like_a_checkpoint_is_not_resumed(tiny, tmp_path):
    (tmp_path / "run" / "checkpoint-best").mkdir(parents=True)
    assert run_here(tiny, tmp_path / "run", max_steps=1, **LORA) == 0
    assert (tmp_path / "run" / "cost.json").exists() and (tmp_path / "run" / "checkpoint-best").exists()


def test_resume_from_the_model_alone_is_refused(lora, tiny, tmp_path, capsys):
    """It would go on silently, with the learning rate back at its start."""
    import shutil

    shutil.copytree(lora[0] / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    for name in ("optimizer.pt", "scheduler.pt"):
        (tmp_path / "run" / "checkpoint-2" / name).unlink()
    assert run_here(tiny, tmp_path / "run", **LORA) == 2
    assert "holds no optimizer and scheduler" in capsys.readouterr().err


def test_full_tuning_changes_the_region_and_the_projector_alone(tiny, tmp_path):
    assert run_here(tiny, tmp_path / "full", mm_projector_lr=2e-5) == 0
    base = load_file(tiny.backbone / "model.safetensors")
    saved = load_file(tmp_path / "full" / "model.safetensors")
    changed = {name for name in base if not torch.equal(base[name].to(saved[name].dtype), saved[name])}  # bf16 where --bf16 is needed
    assert layers_of(changed) == {1, 6}, "embeddings, norm and head stay too"
    assert any("mm_projector" in name for name in saved)
    assert json.loads((tmp_path / "full" / "region.json").read_text())["mode"] == "full"


def test_lora_from_a_checkpoint_stays_off_the_vision_tower(tiny, llava_checkpoint, tmp_path):
    """Upstream's leaf names put LoRA on an attached tower."""
    assert run_here(tiny, tmp_path / "again", tune_layers="0,3", model_name_or_path=llava_checkpoint, **LORA) == 0
    tensors = adapter(tmp_path / "again")
    assert layers_of(tensors) == {0, 3} and len(tensors) == 28


def test_frozen_projector_stays(tiny, llava_checkpoint, tmp_path):
    assert run_here(tiny, tmp_path / "frozen", model_name_or_path=llava_checkpoint, freeze_mm_mlp_adapter=True, **LORA) == 0
    assert projector(tmp_path / "frozen") == {}


def test_all_layers_equals_upstream(tiny, tmp_path):
    """`--tune_layers all` and upstream untouched end with the same adapter and projector, to the bit."""
    # the loss over labelled positions alone is summed in another order
    assert run_here(tiny, tmp_path / "ours", tune_layers="all", supervised_logits=False, lora_dropout=0.05, **LORA) == 0
    torch.manual_seed(42)  # as the hooked run does; upstream draws LoRA's start before it seeds
    assert run_here(tiny, tmp_path / "upstream", tune_layers=None, lora_dropout=0.05, **LORA) == 0
    assert same(adapter(tmp_path / "ours"), adapter(tmp_path / "upstream"))
    assert same(projector(tmp_path / "ours"), projector(tmp_path / "upstream"))
    assert not (tmp_path / "upstream" / "region.json").exists()


def test_learning_rates(tiny, tmp_path):
    """Adam's first step moves every weight by its rate: 2e-4 for B, 2e-5 for the projector."""
    pretrained = tmp_path / "mm_projector.bin"
    torch.manual_seed(1)
    shapes = {"0.weight": (64, 32), "0.bias": (64,), "2.weight": (64, 64), "2.bias": (64,)}
    torch.save({f"model.mm_projector.{name}": torch.randn(shape) * 0.1 for name, shape in shapes.items()}, pretrained)
    assert run_here(tiny, tmp_path / "run", pretrain_mm_mlp_adapter=pretrained, max_steps=1, **LORA) == 0
    before = torch.load(pretrained, weights_only=True)
    moved = max(
        (tensor - before[name.removeprefix("base_model.model.")]).abs().max() for name, tensor in projector(tmp_path / "run").items()
    )
    largest = max(tensor.abs().max() for name, tensor in adapter(tmp_path / "run").items() if "lora_B" in name)
    assert moved == pytest.approx(2e-5, rel=1e-2) and largest == pytest.approx(2e-4, rel=1e-2)


def test_bad_specs_write_nothing(tiny, tmp_path, capfd):
    for spec in ("8", "sparse:0", "sparse:120%", "3-1", "a", "", "sparse:", "1,,2", "missing.json:bi:4"):
        assert run_here(tiny, tmp_path / "out", tune_layers=spec, **LORA) == 2, spec
        errors = capfd.readouterr().err.strip().splitlines()
        assert len(errors) == 1 and errors[0].startswith("error: "), spec
    assert not (tmp_path / "out").exists()


def test_dry_run_writes_nothing(tiny, tmp_path, capsys):
    assert run_here(tiny, tmp_path / "out", dry_run=True, dry_run_gpus=8, **LORA) == 0
    shown = capsys.readouterr().out
    assert ".#....#." in shown and "16,384" in shown and "6,272" in shown and "8 GPUs" in shown
    assert not (tmp_path / "out").exists()


def test_a_gradient_that_stops_short_is_caught(tiny, tmp_path, capsys):
    """The audit, end to end: the output of layer 1 is detached, so that it cannot learn."""
    import llava.train.train as upstream

    from llava_region.decoder import find_decoder_layers

    class Detaching(upstream.LLaVATrainer):
        def __init__(self, model=None, **kwargs):
            layer = find_decoder_layers(model).modules[1]
            layer.register_forward_hook(lambda module, inputs, output: (output[0].detach().requires_grad_(), *output[1:]))
            super().__init__(model=model, **kwargs)

    original, upstream.LLaVATrainer = upstream.LLaVATrainer, Detaching
    try:
        code = run_here(tiny, tmp_path / "out", gradient_checkpointing=False, **LORA)
    finally:
        upstream.LLaVATrainer = original
    assert code == 2 and "region layers without a gradient: [1]" in capsys.readouterr().err
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_scripts_ask_for_their_attention(monkeypatch, tmp_path, capsys):
    """A checkout's script by path: which attention implementation train() gets."""
    import llava.train.train as upstream

    from llava_region.patches import llava

    asked = []
    monkeypatch.setattr(upstream, "train", lambda attn_implementation=None: asked.append(attn_implementation))
    for script in ("train.py", "train_mem.py", "train_xformers.py"):
        path = tmp_path / "llava" / "train" / script
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
        request = region_train.parse(["--local_rank=0", str(path), "--bf16", "True"])
        assert request.upstream is llava.UPSTREAM and request.script == script and request.flags == ["--local_rank=0", "--bf16", "True"]
        llava.UPSTREAM.entry(script)()
        sys.path.remove(str(tmp_path))
    assert asked == [None, "flash_attention_2", None]
    # the class that LLaVA's patch replaces is not the one that computes
    assert "train_xformers.py: attention is torch's own (SDPA)" in capsys.readouterr().out
    llava.UPSTREAM.check_script("train_xformers.py")
    with pytest.raises(LlavaRegionError, match="flash attention, which is not installed; install flash-attn, or give"):
        llava.UPSTREAM.check_script("train_mem.py")
    monkeypatch.setattr("transformers.utils.is_torch_sdpa_available", lambda: False)  # torch 2.1.0
    with pytest.raises(LlavaRegionError, match="xformers, which is not installed; install xformers, or give"):
        llava.UPSTREAM.check_script("train_xformers.py")


def test_library_resumes_and_removes_nothing_of_another_run(lora, tiny, tmp_path, monkeypatch):
    """Without the command's preflight too: checkpoints of another region, or of upstream's own trainer, stay as they are."""
    import shutil

    import llava.train.train as upstream

    from llava_region.patches import llava

    out = tmp_path / "run"
    shutil.copytree(lora[0], out)
    monkeypatch.setattr(sys, "argv", ["train", *llava_flags(tiny, out, **LORA)])
    with pytest.raises(LlavaRegionError, match=r"was trained on layers \[1, 6\]"), llava.applied("1,5"):
        upstream.train()
    for path in out.rglob("region.json"):
        path.unlink()
    with pytest.raises(LlavaRegionError, match=r"comes from a run without --tune_layers"), llava.applied("1,6"):
        upstream.train()
    assert (out / "checkpoint-2" / "adapter_model.safetensors").exists()
