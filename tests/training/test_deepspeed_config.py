"""A user's DeepSpeed config is corrected in memory, and only where it has to be."""

import copy
import json

import pytest

from llava_region.patches.upstream import Recipe
from llava_region.training.deepspeed_config import correct, corrected, gathers_weights, hidden_size, left_to_flags, takes_cpu_adam
from tests.helpers.launch_lines import CONFIGS

LORA = Recipe(projector_rate=2e-5, flags={"projector_rate": "--projector_lr"})
PREFETCH = "stage3_prefetch_bucket_size"


def config(name: str = "zero3", **zero):
    settings = copy.deepcopy(CONFIGS[name])
    settings["zero_optimization"].update(zero)
    return settings


@pytest.mark.parametrize(("hidden", "integer"), [(4096, 15099494), (64, 3686), (3072, 8493465), (72, 4665), (1, 0)])
def test_a_fraction_becomes_the_whole_number_below(hidden, integer):
    settings = config()
    (said,) = correct(settings, LORA, hidden)
    assert settings == config(**{PREFETCH: integer})
    assert said == f'"{PREFETCH}": "auto" would be a fraction for hidden size {hidden}, and is {integer}'
    assert correct(settings, LORA, hidden) == [], "twice changes nothing more"


@pytest.mark.parametrize(("name", "hidden"), [("zero3", 5120), ("zero3", 2560), ("zero3", None), ("zero2", 4096), ("zero2", 64)])
def test_what_works_stays(name, hidden):
    settings = config(name)
    assert correct(settings, LORA, hidden) == [] and settings == config(name)
    given = config(**{PREFETCH: 15099494, "reduce_bucket_size": 5e8})  # a float without a fraction is taken
    assert correct(copy.deepcopy(given), LORA, hidden or 4096) == []


def test_fractions_that_the_user_wrote():
    settings = config(**{PREFETCH: 15099494.4, "reduce_bucket_size": 16777216.5})
    assert len(correct(settings, Recipe())) == 2
    assert settings == config(**{PREFETCH: 15099494, "reduce_bucket_size": 16777216})
    ratio = config(offload_optimizer={"device": "cpu", "ratio": 0.3}, stage3_max_live_parameters=float("inf"), sub_group_size=-1.5)
    assert correct(ratio, Recipe()) == [], "no count of elements, or nothing that has a number below"


def test_an_optimizer_that_says_what_the_flags_say_is_left_out_for_the_projectors_rate():
    settings = config("zero3_offload")
    said = correct(settings, LORA, 5120)
    assert [part.split("'")[1] for part in said] == ["optimizer", "scheduler"] and all("--projector_lr" in part for part in said)
    assert settings.keys() == CONFIGS["zero3_offload"].keys() - {"optimizer", "scheduler"}
    one_rate = config("zero3_offload")
    assert correct(one_rate, Recipe(), 5120) == [] and one_rate == CONFIGS["zero3_offload"]


@pytest.mark.parametrize(
    ("part", "entry"),
    [
        ("optimizer", {"type": "AdamW", "params": {"lr": 1e-4}}), ("optimizer", {"type": "Lion", "params": {"lr": "auto"}}),
        ("optimizer", {}), ("optimizer", "AdamW"), ("scheduler", {"type": "WarmupLR", "params": {"warmup_num_steps": 10}}),
        ("scheduler", {"type": "OneCycle"}),
    ],
)  # fmt: skip
def test_what_says_more_than_the_flags_is_not_left_out(part, entry):
    assert not left_to_flags(part, entry)
    settings = {**config(), part: entry}
    assert correct(settings, LORA, 5120) == [] and part in settings


def test_the_file_stays(tmp_path):
    path = tmp_path / "zero3.json"
    path.write_text(json.dumps(config()))
    before = path.read_bytes(), path.stat().st_mtime_ns
    settings, said = corrected(path, LORA, 4096)
    assert settings["zero_optimization"][PREFETCH] == 15099494 and len(said) == 1
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


def test_weights_are_gathered_by_each_of_deepspeeds_names():
    zero = pytest.importorskip("deepspeed.runtime.zero.config")
    for name in ("zero3", "zero3_offload"):
        settings = CONFIGS[name]["zero_optimization"]
        assert gathers_weights(settings)
        assert zero.DeepSpeedZeroConfig(**settings).gather_16bit_weights_on_model_save
    assert not gathers_weights({"stage": 3}) and not gathers_weights({"stage3_gather_16bit_weights_on_model_save": False})


def test_hidden_size():
    from transformers import LlamaConfig

    assert hidden_size(LlamaConfig(hidden_size=96)) == 96
    assert hidden_size({"d_model": 128}) == 128 and hidden_size({"hidden_sizes": [8, 32]}) == 32 and hidden_size({}) is None


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"zero_optimization": {"stage": 3}}, False),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "none"}, "offload_param": {"device": "cpu"}}}, False),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, True),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, True),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}, "zero_force_ds_cpu_optimizer": False}, False),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}, "optimizer": {"type": "AdamW"}}, True),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}, "optimizer": {"type": "Lion"}}, False),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}, "optimizer": {"type": "Adam", "params": {"torch_adam": True}}},
            False,
        ),
    ],
)
def test_who_needs_deepspeeds_adam(settings, expected):
    assert takes_cpu_adam(settings) is expected
