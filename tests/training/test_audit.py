"""The first-step audit on hand-made models: what it must let pass, and what it must stop."""

import pytest
import torch
from torch import nn

from llava_region import LlavaRegionError, Region
from llava_region.training.audit import GradientAudit
from llava_region.training.run import check_trainable

CPU = torch.device("cpu")


class Model(nn.Module):
    """Three "decoder layers" of one weight each; `used` says which of them take part in the loss."""

    def __init__(self, used=(0, 1, 2)):
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(3))
        self.model.mm_projector = nn.Linear(2, 2)
        self.used = used

    def loss(self):
        return sum((self.model.layers[i](torch.ones(1, 2))).sum() for i in self.used)


def audited(model, layers, labels=(1,), reduce_max=lambda t: t):
    audit = GradientAudit(model, Region(tuple(layers), 3, "test"))
    audit.see_labels(torch.tensor([labels]))
    model.loss().backward()
    return audit, audit.conclude(CPU, reduce_max)


def frozen(model, *layers):
    for layer in layers:
        model.model.layers[layer].requires_grad_(False)
    return model


def test_a_right_step_passes_and_the_hooks_come_off():
    model = frozen(Model(), 1)
    audit, done = audited(model, [0, 2])
    assert done and audit.handles == []
    seen = len(audit.flags[0])
    model.loss().backward()
    assert len(audit.flags[0]) == seen


def test_a_region_layer_without_gradient_stops():
    with pytest.raises(LlavaRegionError, match=r"without a gradient: \[2\]"):
        audited(frozen(Model(used=(0, 1)), 1), [0, 2])


def test_a_gradient_outside_stops():
    with pytest.raises(LlavaRegionError, match=r"other layers with one: \[1\]"):
        audited(Model(), [0, 2])


def test_zero_gradients_count_as_none():
    model = frozen(Model(), 1)
    model.loss = lambda: 0 * sum(layer(torch.ones(1, 2)).sum() for layer in model.model.layers)
    with pytest.raises(LlavaRegionError, match=r"\[0, 2\]"):
        audited(model, [0, 2])


def test_a_batch_without_labels_is_not_judged():
    model = frozen(Model(used=(1,)), 1)
    model.loss = lambda: 0 * model.model.layers[0](torch.ones(1, 2)).sum()
    _, done = audited(model, [0, 2], labels=(-100,))
    assert done is False


def test_one_rank_with_gradients_is_enough():
    """Layer 2 got its gradient on another rank."""
    _, done = audited(frozen(Model(used=(0, 1)), 1), [0, 2], reduce_max=lambda t: torch.maximum(t, torch.tensor([0, 0, 1.0, 0, 0, 0])))
    assert done


class Seeing(Model):
    """With a vision tower that is to be trained, and takes part in the loss or not."""

    def __init__(self, tower_used):
        super().__init__()
        self.model.vision_tower = nn.Linear(2, 2)
        self.tower_used = tower_used

    def loss(self):
        return super().loss() + (self.model.vision_tower(torch.ones(1, 2)).sum() if self.tower_used else 0)


@pytest.mark.parametrize("image", [[False, True], [False, False]])
def test_an_unfrozen_tower_has_to_learn_from_images(image):
    """Without a gradient for the tower: stopped after some batches with images, never by batches of text."""
    model = Seeing(tower_used=False)
    audit = GradientAudit(model, Region((0, 1, 2), 3, "test"))

    def step():
        audit.see_labels(torch.tensor([[-100, 7]]), torch.tensor([image]))
        model.loss().backward()
        return audit.conclude(CPU, lambda t: t)

    assert [step() for _ in range(7)] == [False] * 7
    if any(image):
        with pytest.raises(LlavaRegionError, match="the vision tower was to be trained, but got no gradient from 8 batches"):
            step()
    else:
        assert step() is False
    assert audited(Seeing(tower_used=True), [0, 1, 2])[1]


def test_trainable_parameters_outside_are_refused():
    region = Region((0, 2), 3, "0,2")
    check_trainable(frozen(Model(), 1), region, lora=False, vision=False)
    with pytest.raises(LlavaRegionError, match=r"model\.layers\.1\.weight"):
        check_trainable(Model(), region, lora=False, vision=False)
    with pytest.raises(LlavaRegionError, match=r"\[2\] of the region"):
        check_trainable(frozen(Model(), 1, 2), region, lora=False, vision=False)
    model = frozen(Model(), 1)
    model.model.vision_tower = nn.Linear(2, 2)
    with pytest.raises(LlavaRegionError, match="vision_tower"):
        check_trainable(model, region, lora=False, vision=False)
    check_trainable(model, region, lora=False, vision=True)
