"""Of `adapter_config.json` only what can be merged exactly is accepted, by everything that applies an adapter."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from llava_region.checkpoints.adapter_config import lora_config
from llava_region.checkpoints.source import ModelSource
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


def test_a_long_value_is_cut_in_the_message(run):
    edit(run, target_modules={"a": "b" * 1000})
    with pytest.raises(LlavaRegionError) as error:
        lora_config(ModelSource(run))
    assert len(str(error.value)) < 400 + len(str(run))
