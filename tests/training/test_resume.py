"""What a run that goes on from a checkpoint restores."""

import random
from types import SimpleNamespace

import numpy
import pytest
import torch

from llava_region import LlavaRegionError
from llava_region.training.resume import (
    AllStepsDone,
    EpochOrder,
    NoStepTooMany,
    load_non_lora,
    load_trained_parameters_only,
    numpy_state_loadable,
)


def test_projector_has_to_fit(tmp_path):
    model = torch.nn.Linear(2, 2, bias=False)
    with pytest.raises(LlavaRegionError, match="no non_lora_trainables"):
        load_non_lora(model, tmp_path)
    torch.save({"weight": torch.ones(2, 2)}, tmp_path / "non_lora_trainables.bin")
    load_non_lora(model, tmp_path)
    assert torch.equal(model.weight, torch.ones(2, 2))
    with pytest.raises(LlavaRegionError, match="lacks bias, which the run trains"):
        load_non_lora(torch.nn.Linear(2, 2), tmp_path)
    torch.save({"weight": torch.ones(3, 2)}, tmp_path / "non_lora_trainables.bin")
    with pytest.raises(LlavaRegionError, match="does not fit the model"):
        load_non_lora(model, tmp_path)


def test_an_interrupted_epoch_begins_with_its_own_random_state_once(tmp_path):
    first = EpochOrder()
    first.on_epoch_begin(None, None, None)
    order = torch.randperm(100)
    torch.rand(7)  # whatever the steps draw
    first.save(tmp_path)
    resumed = EpochOrder()
    resumed.resume(tmp_path)
    torch.manual_seed(5)
    resumed.on_epoch_begin(None, None, None)
    assert torch.equal(torch.randperm(100), order) and torch.equal(resumed.state, first.state)
    resumed.on_epoch_begin(None, None, None)
    assert not torch.equal(torch.randperm(100), order)


def test_a_checkpoint_without_the_state_changes_nothing(tmp_path):
    order = EpochOrder()
    order.resume(tmp_path)
    before = torch.get_rng_state()
    order.on_epoch_begin(None, None, None)
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(order.state, before)


@pytest.mark.parametrize(("step", "steps_per_epoch", "taken"), [(6, 3, True), (7, 3, False), (1, 0, True)])
def test_between_two_epochs_the_order_is_that_of_the_state_which_was_loaded(step, steps_per_epoch, taken):
    order = EpochOrder()
    order.random_state_loaded(step, steps_per_epoch)
    assert (order.state is not None) == taken


@pytest.mark.parametrize(("step", "most", "ends"), [(4, 4, True), (5, 4, True), (3, 4, False), (3, 0, False)])
def test_no_step_too_many(step, most, ends):
    state = SimpleNamespace(global_step=step, max_steps=most)
    if not ends:
        return NoStepTooMany().on_train_begin(None, state, None)
    with pytest.raises(AllStepsDone):
        NoStepTooMany().on_train_begin(None, state, None)


def test_deepspeed_loads_what_trained_alone():
    class Engine:
        def load_checkpoint(self, folder, load_module_strict=True):
            return folder, load_module_strict

    accelerator = SimpleNamespace(prepare=lambda *parts: parts if len(parts) > 1 else parts[0])
    load_trained_parameters_only(accelerator)
    engine, scheduler = accelerator.prepare(Engine(), "a scheduler")
    assert engine.load_checkpoint("x") == ("x", False) and scheduler == "a scheduler"
    assert accelerator.prepare(Engine()).load_checkpoint("x") == ("x", False)


def test_random_states_of_transformers_are_read(tmp_path):
    """As transformers reads them: torch decides whether anything but weights is taken."""
    saved = {"python": random.getstate(), "numpy": numpy.random.get_state(), "cpu": torch.get_rng_state()}
    torch.save(saved, tmp_path / "rng_state.pth")
    with numpy_state_loadable():
        read = torch.load(tmp_path / "rng_state.pth")
    assert (read["numpy"][1] == saved["numpy"][1]).all()
