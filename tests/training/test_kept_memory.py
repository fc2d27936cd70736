"""What decoder layers keep for the backward pass, as measured, and the memory there is."""

import copy

import pytest
import torch
from packaging.version import Version
from torch import nn

from llava_region.decoder import parent_of
from llava_region.training import kept_memory as memory
from llava_region.training.kept_memory import KeptBytes, measure
from llava_region.training.kept_tensors import saved_peak
from llava_region.training.recompute import install
from tests.helpers.region_models import FAMILIES, assert_equal, batch, build, gradients, plan_of, workload


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize(("family", "attention"), [("llama", "sdpa"), ("llama", "eager"), ("phi", "eager"), ("mpt", "eager")])
def test_measured_bytes_are_what_a_longer_batch_keeps(family, attention, lora):
    """One layer kept more than none: the difference in peak is what was measured on short sequences."""
    model = build(family, region=(4,), lora=lora, dropout=0.1, attention=attention)
    inputs = batch(samples=3, length=16 * 12 + 1)
    for layer, kept in measure(model, (2, 4)).items():
        peaks = []
        for recompute in (range(6), [i for i in range(6) if i != layer]):
            install(model, plan_of(recompute))
            peaks.append(_forward_bytes(model, inputs))
        assert kept.at(3, 16 * 12 + 1) == pytest.approx(peaks[1] - peaks[0], rel=1e-2)  # the rotary angles do not grow with the samples
    assert measure(model, (4,))[4].per_token > measure(model, (2,))[2].per_token
    whole = attention != "sdpa" or Version(torch.__version__) < Version("2.2")  # whose kernel on CPU keeps the weights of attention
    assert (measure(model, (2,))[2].per_token_squared > 0) == whole


def _forward_bytes(model, inputs) -> int:
    """Bytes kept when the forward pass of the decoder layers ends."""
    with saved_peak() as peak:
        hidden = model.get_input_embeddings()(inputs["input_ids"])
        output = parent_of(model)(inputs_embeds=hidden, attention_mask=inputs["attention_mask"])
        found = peak()
    del output
    return found


def test_measuring_leaves_model_and_random_state_alone():
    model = build(dropout=0.2)
    model.get_input_embeddings().eval()
    before, expected = torch.get_rng_state(), gradients(model)
    state = copy.copy(parent_of(model).__dict__)
    torch.set_rng_state(before)
    measure(model, (1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert parent_of(model).__dict__ == state
    assert not model.get_input_embeddings().training
    assert_equal(gradients(model), expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora", [True, False])
def test_a_sample_of_two_layers_keeps_what_the_model_keeps(family, lora):
    from peft import LoraConfig

    model = build(family, lora=lora, dropout=0.05)
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.05) if lora else None
    sample = memory.sample_model(parent_of(model).config, FAMILIES[family][0], lora=config)
    assert list(measure(sample, (0, 1)).values()) == list(measure(model, (2, 4)).values())


def test_a_model_on_the_meta_device_is_planned_as_the_real_one():
    model = build(region=(1, 4), dropout=0.05)
    expected = memory.activations_of(model, workload())
    assert memory.activations_of(model.to("meta"), workload()) == expected


@pytest.mark.parametrize(
    ("trains", "lowest"),
    [((), 1), (("norm",), 1), (("lm_head",), 1), (("embed_tokens",), 0), (("mm_projector",), 0), (("image_newline",), 0)],
)
def test_lowest_differentiated_layer(trains, lowest):
    model = build(lora=False, projector_trains=False)
    parent = model.get_decoder()
    parent.mm_projector, parent.image_newline = nn.Linear(2, 2), nn.Parameter(torch.zeros(2))
    for module in (parent.mm_projector, parent.image_newline):
        module.requires_grad_(False)
    for name, parameter in model.named_parameters():
        if set(name.split(".")) & set(trains):
            parameter.requires_grad_(True)
    assert memory.lowest_differentiated(model) == lowest


def test_fit_recovers_all_three_terms():
    sizes = [1000 + 2 * length * (30 + 5 * length) for length in memory.LENGTHS]
    assert KeptBytes.fit(sizes) == KeptBytes(1000, 30, 5)
    assert KeptBytes.fit(sizes).at(4, 10) == 1000 + 40 * (30 + 50)


def test_free_memory_on_cpu_minds_ranks_and_control_group(monkeypatch, tmp_path):
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("2000\n")
    assert memory._group_memory(tmp_path) == 3000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._group_memory(tmp_path) == float("inf")
    monkeypatch.setattr(memory, "_available_memory", lambda: 10_000)
    monkeypatch.setattr(memory, "_group_memory", lambda: 8_000)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert memory.free_memory(torch.device("cpu")) == 4_000
