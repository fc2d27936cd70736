"""Layers that keep less: the same gradients to the bit."""

import pytest
import torch

from llava_region.decoder import find_decoder_layers
from llava_region.training.kept_memory import measure
from llava_region.training.kept_tensors import saved_peak
from llava_region.training.lean_layers import LeanLayers
from llava_region.training.recompute import install
from tests.helpers.region_models import FAMILIES, assert_equal, batch, build, count_forwards, gradients, plan_of


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("lora", "dropout"), [(True, 0.0), (True, 0.3), (False, 0.0)])
def test_gradients_are_the_same_to_the_bit(family, dtype, lora, dropout):
    model = build(family, lora=lora, dropout=dropout).to(dtype)
    expected = gradients(model)
    counts = count_forwards(model)
    for recompute in ((), (1, 2)):
        install(model, plan_of(recompute, lean=True))
        counts[:] = [0] * 6
        assert_equal(gradients(model), expected)
        assert counts == [2 if i in recompute else 1 for i in range(6)]


@pytest.mark.parametrize("family", FAMILIES)
def test_products_that_are_no_functions_of_torch(family, monkeypatch):
    """ZeRO-3 puts its own in the place of torch's, which takes tensors alone."""
    zero = pytest.importorskip("deepspeed.runtime.zero.linear")
    model = build(family).to(torch.bfloat16)
    expected = gradients(model)
    monkeypatch.setattr(torch.nn.functional, "linear", zero.zero3_linear_wrap)
    install(model, plan_of(lean=True))
    assert_equal(gradients(model), expected)


@pytest.mark.parametrize(("family", "least"), [("llama", 0.3), ("mistral", 0.3), ("phi", 0.4)])
def test_a_frozen_layer_keeps_less(family, least):
    """In units of hidden size, of a Llama layer: 16 with everything, 10 without norms and gate. Phi's activation keeps most of all."""
    model = build(family).to(torch.bfloat16)
    with torch.autocast("cpu", enabled=False):
        kept = {lean: measure(model, [0], lean=lean)[0] for lean in (False, True)}
    assert kept[True].per_token < (1 - least) * kept[False].per_token


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_measured_is_what_is_kept(family):
    model = build(family).to(torch.bfloat16)
    for lean in (False, True):
        peaks = []
        for length in (33, 65):
            install(model, plan_of(lean=lean))
            with saved_peak() as peak:
                gradients(model, batch(2, length))
            peaks.append(peak())
        measured = measure(model, [0, 1], lean=lean)
        grown = sum((2 if i == 1 else 4) * (kept.at(2, 65) - kept.at(2, 33)) for i, kept in measured.items())
        # the layers' inputs, and what is around the layers, comes in addition
        assert grown < peaks[1] - peaks[0] < 1.6 * grown


def test_left_as_they_were():
    model = build()
    modules = [module for module in model.modules() if "forward" in vars(module)]
    layers = find_decoder_layers(model).modules
    lean = LeanLayers(layers)
    assert len([module for module in model.modules() if "forward" in vars(module)]) == len(modules) + 18
    with lean.active(), torch.no_grad():
        assert isinstance(layers[0].mlp.act_fn(torch.ones(2)), torch.Tensor)  # nothing to keep
    lean.remove()
    assert [module for module in model.modules() if "forward" in vars(module)] == modules


def test_a_gate_is_a_tensor_to_everything_but_a_product():
    model = build()
    layers = find_decoder_layers(model).modules
    activation = layers[0].mlp.act_fn
    inputs, other = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    expected = torch.nn.functional.silu(inputs)
    with LeanLayers(layers).active():
        for product in (activation(inputs) * other, other * activation(inputs), torch.mul(other, activation(inputs))):
            assert torch.equal(product, expected * other)
        gate = activation(inputs)
        assert gate.shape == (3, 4) and torch.equal(gate + other, expected + other) and torch.equal(torch.cat([gate, other])[:3], expected)
        assert torch.equal(gate.to(torch.float64), expected.double()) and torch.equal(gate * 2.0, expected * 2.0)
