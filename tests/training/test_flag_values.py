"""Flags with a closed set of values, and numbers out of range: refused before weights load; what upstream trains with is accepted."""

import json
import sys

import pytest
import torch
import transformers
from packaging.version import Version

pytest.importorskip("llava.train.train")
pytest.importorskip("deepspeed")

from llava_region.training.trainer_flags import computes_fp16_on_cpu
from tests.helpers.training_runs import write_zero3

NOT_NUMBERS = ("inf", "nan")


REFUSED = {
    "image_aspect_ratio": (("anyres", "Pad", "none"), "allowed: square, pad"),
    "mm_projector_type": (
        ("mlp2x_relu", "mlpx_gelu", "cross_attn", "mlp2x_gelu_"),
        "allowed: linear, identity, mlp2x_gelu (or another depth)",
    ),
    "mm_vision_select_feature": (("cls", "patches"), "allowed: patch, cls_patch"),
    "mm_patch_merge_type": (("unpad", ""), "allowed: flat, spatial, spatial_unpad"),
    "optim": (("adam", "adamw"), "adamw_torch"),
    "lr_scheduler_type": (("cosinus",), "choose from 'linear', 'cosine'"),
    "save_strategy": (("step",), "choose from 'no', 'steps', 'epoch'"),
    "report_to": (("wandbb",), "(the last two alone)"),
    "fsdp": (("shard",), "transformers' trainer refuses these flags"),
    "lora_r": (("0", "-8"), "allowed: 1 or more"),
    "lora_alpha": (("0", "-16"), "allowed: a number above 0"),
    "lora_dropout": (("1.5", "1", "-0.1", "nan"), "allowed: 0 or more, but below 1"),
    "learning_rate": (("0", "-0.0002", *NOT_NUMBERS), "allowed: a number above 0"),
    "mm_projector_lr": (("-0.0002", "nan"), "allowed: 0 or more"),
    "weight_decay": (("-0.1", "nan"), "allowed: 0 or more"),
    "warmup_ratio": (("1.5", "-0.03"), "allowed: a number from 0 to 1"),
    "warmup_steps": (("-1",), "allowed: 0 or more"),
    "per_device_train_batch_size": (("0", "-4"), "allowed: 1 or more"),
    "gradient_accumulation_steps": (("0",), "allowed: 1 or more"),
    "dataloader_num_workers": (("-1",), "allowed: 0 or more"),
    "model_max_length": (("0", "-1"), "allowed: 1 or more"),
    "seed": (("-1", str(2**32)), "allowed: 0 to 4294967295"),
    "adam_beta2": (("1",), "allowed: 0 or more, but below 1"),
    "logging_steps": (("0",), "requires non-zero --logging_steps"),
}


@pytest.mark.parametrize("flag", REFUSED)
def test_refused(line_of, flag):
    values, allowed = REFUSED[flag]
    for value in values:
        line = line_of(**{flag: value})
        assert line and allowed in line, (value, line)
        assert f"--{flag}" in line or "refuses these flags" in line


ACCEPTED = {
    "image_aspect_ratio": ("square", "pad", None),
    "mm_projector_type": ("linear", "mlp1x_gelu", "mlp12x_gelu", None),
    "mm_vision_select_feature": ("patch", "cls_patch"),
    "mm_patch_merge_type": ("flat", "spatial", "spatial_unpad"),
    "version": ("v0.5", "v1", "llava_v1", "mistral_instruct"),
    "optim": ("adamw_torch", "adamw_hf", "adafactor", "sgd", "adagrad", "rmsprop"),
    "lr_scheduler_type": ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"),
    "lora_dropout": ("0", "0.99"),
    "mm_projector_lr": ("0", None),
    "warmup_ratio": ("0", "1"),
    "warmup_steps": ("0", "100"),  # longer than the run, as in a trial of a long run's command line
    "max_steps": ("1", "2"),
    "num_train_epochs": ("0", "nan"),  # not looked at beside max_steps
    "quant_type": ("int4",),  # not looked at with 16 bits
    "report_to": ("none", "all"),
    "save_steps": ("0", "0.25", "3"),
    "max_grad_norm": ("0", "-1"),  # do not clip
}


@pytest.mark.parametrize("flag", ACCEPTED)
def test_accepted(line_of, flag):
    for value in ACCEPTED[flag]:
        assert line_of(**{flag: value}) is None, value


def test_epochs(line_of):
    for value in ("0", "-1", *NOT_NUMBERS):
        line = line_of(max_steps=None, num_train_epochs=value)
        assert line == f"error: --num_train_epochs {float(value)} is not among its values; allowed: a number above 0"
    for steps in (None, "0", "-1"):  # upstream trains by the epochs then
        assert line_of(max_steps=steps, num_train_epochs="0.1") is None


def test_a_run_that_is_all_warm_up(line_of):
    line = line_of(max_steps=1, warmup_ratio=0.03, lr_scheduler_type="cosine")
    assert line and "--max_steps 1 is its whole warm-up, at a learning rate of 0" in line
    assert line_of(max_steps=2, warmup_ratio=0.03, lr_scheduler_type="cosine") is None
    assert line_of(max_steps=1, warmup_ratio=0.03, lr_scheduler_type="constant") is None


def test_flags_that_do_not_go_together(line_of):
    assert "--fp16 True and --bf16 True exclude each other" in line_of(fp16=True, bf16=True)
    line = line_of(load_best_model_at_end=True, save_strategy="steps")
    assert "transformers' trainer refuses these flags: --load_best_model_at_end requires the save and eval strategy to match" in line
    assert "reduce_lr_on_plateau requires an eval strategy" in line_of(lr_scheduler_type="reduce_lr_on_plateau")
    line = line_of(lr_scheduler_type="inverse_sqrt")
    assert "division by zero" in line if Version(transformers.__version__) < Version("4.41") else line is None
    assert line_of(lr_scheduler_type="inverse_sqrt", warmup_steps=1) is None
    assert "lr_end" in line_of(lr_scheduler_type="polynomial", learning_rate=1e-8)


def test_flags_that_fail_at_the_first_step(line_of):
    assert "--label_smoothing_factor 0.1 fails at the first step" in line_of(label_smoothing_factor=0.1)
    assert "--neftune_noise_alpha 5.0 fails at the first step" in line_of(neftune_noise_alpha=5)
    assert line_of(label_smoothing_factor=0) is None


def test_a_flag_that_upstream_ignores(line_of, lora_run):
    assert "is read by nobody" in line_of(lora_weight_path=lora_run)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tf32_and_fp16_without_a_gpu(line_of):
    """Refused in a run; a dry run may be for GPUs that are elsewhere. transformers trains in fp16 on a CPU from 4.41 on."""
    for use_cpu in (None, True):
        assert "transformers' trainer refuses these flags" in line_of(tf32=True, use_cpu=use_cpu)
        if Version(transformers.__version__) < Version("4.41"):
            why = "transformers' trainer refuses these flags" if computes_fp16_on_cpu() else "has no fp16 convolutions"
            assert why in line_of(fp16=True, bf16=None, use_cpu=use_cpu)
    for flag in ("tf32", "fp16", "bf16"):
        assert line_of(**{"bf16": None, flag: True, "use_cpu": None, "dry_run": True}) is None
    assert "refuses these flags" in line_of(tf32=True, use_cpu=True, dry_run=True)
    assert line_of(bf16=True) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_torch_without_convolutions_in_fp16(line_of, monkeypatch):
    """As 2.1, which LLaVA pins: upstream's vision tower is in fp16 where bf16 is not asked for."""
    monkeypatch.setattr("llava_region.patches.llava_family.computes_fp16_on_cpu", lambda: False)
    for use_cpu in (None, True):
        assert "has no fp16 convolutions on a CPU" in line_of(bf16=None, use_cpu=use_cpu)
    assert line_of(bf16=True) is None and line_of(bf16=None, use_cpu=None, dry_run=True) is None
    assert line_of(fp16=True, bf16=None, use_cpu=None, dry_run=True) is None
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert "has no fp16 convolutions on a CPU" in line_of(bf16=None, use_cpu=True)


def test_packages_that_are_not_there(line_of, monkeypatch):
    """Those of loggers and of optimizers."""
    from transformers import integrations

    line = line_of(report_to="mlflow")
    assert "--report_to mlflow: its package is not installed" in line and line.endswith(" or none")
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    line = line_of(optim="adamw_bnb_8bit")
    assert "--optim adamw_bnb_8bit cannot be used here: Trainer tried to instantiate bnb" in line
    assert "apex" in line_of(optim="adamw_apex_fused")
    monkeypatch.setattr(integrations, "get_available_reporting_integrations", lambda: ["tensorboard"])
    assert line_of(report_to="wandb").endswith("or give --report_to tensorboard or none")
    assert line_of(report_to="tensorboard") is None


def test_an_optimizer_of_deepspeeds_own(line_of, tmp_path):
    """--optim is not looked at then."""
    path = write_zero3(tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "optimizer": {"type": "AdamW"}}))
    flags = {"deepspeed": path, "bf16": True, "mm_projector_lr": None, "optim": "adamw_apex_fused"}
    assert line_of(**flags) is None


def test_offline_and_to_the_hub(line_of):
    assert "--push_to_hub True needs the hub" in line_of(push_to_hub=True)


def test_nothing_is_left_in_the_environment(line_of):
    import os

    before = dict(os.environ)
    assert line_of(bf16=True, dry_run=True) is None and line_of(bf16=True, torch_compile=True, lora_r=0) is not None
    assert dict(os.environ) == before
