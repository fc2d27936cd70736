"""Of `adapter_config.json` only what can be merged exactly is accepted, by everything that applies an adapter."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llava_region.checkpoints.adapter_config import lora_config
from llava_region.checkpoints.model_source import ModelSource
from llava_region.checkpoints.tensors import Checkpoint
from llava_region.errors import LlavaRegionError
from llava_region.models import load
from llava_region.scores.weight_changes import weight_changes
from llava_region.surgery.merge import merge
from llava_region.surgery.prune import prune
from tests.helpers.command_line import refused_without_output

# What PEFT 0.21 writes for a plain adapter beyond what 0.10 does.
NEWER = {
    "peft_version": "0.21.0", "exclude_modules": None, "trainable_token_indices": None, "eva_config": None, "corda_config": None,
    "lora_ga_config": None, "velora_config": None, "alora_invocation_tokens": None, "use_qalora": False, "qalora_group_size": 16,
    "monteclora_config": None, "lora_bias": False, "target_parameters": None, "use_bdlora": None, "arrow_config": None,
    "kasa_config": None, "ensure_weight_tying": False,
}  # fmt: skip
SET = {
    "loftq_config": {"loftq_bits": 4, "loftq_iter": 1}, "corda_config": {"corda_method": "kpm"}, "lora_ga_config": {"direction": "ArB2r"},
    "kasa_config": {"beta": 0.1}, "alora_invocation_tokens": [1, 2], "target_parameters": ["mlp.experts"], "lora_bias": True,
    "trainable_token_indices": [3], "use_qalora": True, "use_bdlora": {"nblocks": 2}, "arrow_config": {"top_k": 3},
    "an_option_of_tomorrow": 1,
}  # fmt: skip
WRONG = [
    ("r", "8"), ("r", 0), ("r", -8), ("r", True), ("r", 8.0), ("r", None), ("r", [8]),
    ("lora_alpha", [16]), ("lora_alpha", "16"), ("lora_alpha", 0), ("lora_alpha", -16), ("lora_alpha", True), ("lora_alpha", None),
    ("lora_alpha", float("nan")), ("lora_alpha", float("inf")),
    ("rank_pattern", [8]), ("rank_pattern", {"q_proj": "8"}), ("rank_pattern", {"q_proj": 0}), ("alpha_pattern", {"q_proj": float("nan")}),
    ("alpha_pattern", {"q_proj": None}), ("alpha_pattern", "q_proj"),
    ("use_rslora", "false"), ("fan_in_fan_out", 1), ("target_modules", 3), ("target_modules", ["q_proj", 1]), ("modules_to_save", {"a": 1}),
    ("layers_to_transform", "1"), ("layers_to_transform", [True]), ("bias", True), ("lora_dropout", "0"), ("peft_version", 21),
    ("base_model_name_or_path", ["base"]), ("auto_mapping", "x"), ("inference_mode", "yes"),
]  # fmt: skip


@pytest.fixture
def run(lora_run: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may spoil."""
    return Path(shutil.copytree(lora_run, tmp_path / "run-lora"))


def edit(run: Path, **values: object) -> None:
    file = run / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def refused(message: str, run: Path, base: Path) -> None:
    refused_without_output(message, run.parent / "out", lambda: merge(run, run.parent / "out", base))


@pytest.mark.parametrize("value", ["pissa", "pissa_niter_16", "olora", "OLoRA", "loftq", "corda", "lora_ga", "mica", "of tomorrow", 3, []])
def test_an_initialisation_that_may_have_changed_the_base_is_refused(tiny, run, value):
    edit(run, init_lora_weights=value)
    refused("'init_lora_weights' in .*; allowed: true, false, gaussian, eva, orthogonal, which leave the base", run, tiny.backbone)


@pytest.mark.parametrize("value", [True, False, None, "gaussian", "Gaussian", "eva", "orthogonal"])
def test_initialisations_that_leave_the_base_as_it_is(tiny, lora_run, run, tmp_path, value):
    edit(run, init_lora_weights=value, **({"eva_config": {"rho": 2.0}} if value == "eva" else {}))
    merge(run, tmp_path / "out", tiny.backbone)
    merge(lora_run, tmp_path / "plain", tiny.backbone)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "plain/model.safetensors").read_bytes()
    assert load(run, tiny.backbone, device="cpu").num_layers == 8


@pytest.mark.parametrize("field", SET)
def test_a_field_that_is_set_and_not_understood_is_refused_by_name(tiny, run, field):
    edit(run, **{**NEWER, field: SET[field]})
    refused(f"cannot be merged: .*'{field}' in adapter_config.json.*the PEFT that trained it", run, tiny.backbone)


def test_what_a_newer_peft_writes_for_a_plain_adapter_is_merged_and_loaded(tiny, run, tmp_path):
    edit(run, **NEWER)
    merge(run, tmp_path / "out", tiny.backbone)
    assert load(run, tiny.backbone, device="cpu").num_layers == 8


@pytest.mark.parametrize("field, value", WRONG, ids=[f"{field}={value!r}" for field, value in WRONG])
def test_values_of_wrong_types_are_one_line(tiny, run, field, value):
    edit(run, **{field: value})
    refused(f"'{field}' in .*adapter_config.json is .*; allowed: ", run, tiny.backbone)


@pytest.mark.parametrize("field", ["r", "lora_alpha"])
def test_rank_and_alpha_have_to_be_there(tiny, run, field):
    file = run / "adapter_config.json"
    file.write_text(json.dumps({key: value for key, value in json.loads(file.read_text()).items() if key != field}))
    refused(f"has no '{field}'", run, tiny.backbone)


APPLY: dict[str, Callable[[Path, Path], object]] = {
    "prune": lambda run, base: prune(run, run.parent / "out", layers="4", base=base),
    "load": lambda run, base: load(run, base, device="cpu"),
    "weight metrics": lambda run, base: weight_changes(run, base, 1e-8),
}


@pytest.mark.parametrize("use", APPLY)
def test_everything_that_applies_an_adapter_checks_it(tiny, run, use):
    for values in ({"init_lora_weights": "olora"}, {"init_lora_weights": True, "alora_invocation_tokens": [1]}):
        edit(run, **values)
        with pytest.raises(LlavaRegionError, match=next(reversed(values))):
            APPLY[use](run, tiny.backbone)


Q = "model.layers.1.self_attn.q_proj"
DISAGREED = {
    "anchored alpha": (
        {"alpha_pattern": {f"^{Q}": 64}},
        rf"'\^{Q}' of alpha_pattern matches '{Q}'.*alpha 16 or .* alpha 64",
    ),
    "anchored rank": ({"rank_pattern": {f"^{Q}": 4}}, rf"'\^{Q}' of rank_pattern matches '{Q}'"),
    "anchored, with wildcards": ({"alpha_pattern": {r"^model\.layers\.\d+\.self_attn\.q_proj": 64}}, "of alpha_pattern matches"),
    "alternatives": ({"alpha_pattern": {"q_proj|v_proj": 64}}, r"matches 'model.layers.\d.self_attn.v_proj'"),
    "whole name, then its end": (
        {"alpha_pattern": {Q: 3, "q_proj": 64}},
        "and 'q_proj' of alpha_pattern both match",
    ),
    "from the start": ({"alpha_pattern": {"model.*q_proj": 64}}, "of alpha_pattern matches"),
    "other keys": ({"rank_pattern": {"q_proj": 8}, "alpha_pattern": {r"self_attn\.q_proj": 2}}, "both match"),
}


@pytest.mark.parametrize("name", DISAGREED)
def test_keys_that_pefts_versions_match_differently_are_refused(tiny, run, name):
    values, message = DISAGREED[name]
    edit(run, **values)
    refused(message, run, tiny.backbone)
    with pytest.raises(LlavaRegionError, match=message):
        load(run, tiny.backbone, device="cpu")


@pytest.mark.parametrize(
    "pattern",
    [
        {"q_proj": 64, Q: 3}, {Q: 3}, {"(q|v)_proj": 64}, {r"layers\.1\.mlp\..*": 3, "mlp.up_proj": 5}, {r"[kq]_proj": 3},
        {f"^{Q}": 16}, {"no_such_module": 3}, {"layers.1.self_attn.q_proj": 2.5},
    ],
    ids=repr,
)  # fmt: skip
def test_keys_that_all_versions_match_alike_equal_peft(tiny, run, tmp_path, pattern):
    edit(run, alpha_pattern=pattern)
    merge(run, tmp_path / "out", tiny.backbone)
    theirs = load(run, tiny.backbone, device="cpu").model.state_dict()
    ours = Checkpoint(tmp_path / "out")
    assert all(torch.allclose(ours.tensor(name), theirs[name], atol=1e-5) for name in ours)


ENDLESS = {"nested": r"(([a-z0-9_.])+)+!", "alternatives": r"(\w+\.?)*!"}


@pytest.mark.parametrize("name", ENDLESS)
def test_an_expression_that_never_ends_is_refused(tiny, run, monkeypatch, name):
    monkeypatch.setattr("llava_region.checkpoints.pattern_keys.SECONDS", 0.5)
    edit(run, alpha_pattern={ENDLESS[name]: 3})
    refused(r"takes longer than 0.5 s to match; use names of modules as keys", run, tiny.backbone)
    with pytest.raises(LlavaRegionError, match="takes longer"):
        load(run, tiny.backbone, device="cpu")


@pytest.mark.parametrize("key", ["(q_proj", "*", "a{2,1}", "(" * 50000 + ")" * 50000], ids=["bracket", "star", "range", "deep"])
def test_a_key_that_is_no_regular_expression_is_one_line(tiny, run, key):
    edit(run, rank_pattern={key: 8})
    refused("cannot be matched: one of them is not a regular expression", run, tiny.backbone)


def test_a_long_value_is_cut_in_the_message(run):
    edit(run, target_modules={"a": "b" * 1000})
    with pytest.raises(LlavaRegionError) as error:
        lora_config(ModelSource(run))
    assert len(str(error.value)) < 400 + len(str(run))
