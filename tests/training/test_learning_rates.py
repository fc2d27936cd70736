"""The learning rates that parts of a model train at: those that were asked for, or training stops."""

import pytest
import torch
from torch import nn

from llava_region import LlavaRegionError
from llava_region.training.learning_rates import check_rates, name_and_drop_groups
from tests.training.test_audit import Model


def test_empty_groups_are_dropped_before_a_scheduler_is_built():
    model = Model()
    groups = [
        {"params": list(model.model.layers.parameters())},
        {"params": []},
        {"params": [model.model.mm_projector.weight], "lr": 2e-5},
        {"params": [model.model.mm_projector.bias], "lr": 2e-5},
    ]
    optimizer = torch.optim.AdamW(groups, lr=2e-4)
    name_and_drop_groups(optimizer, model)
    assert [group["region_part"] for group in optimizer.param_groups] == ["llm", "projector", "projector"]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    assert check_rates(optimizer, scheduler, 2e-4, 2e-5) == {"llm": 2e-4, "projector": 2e-5}


def test_what_a_group_trains_goes_by_the_declared_parts():
    model = Model()
    model.model.vision_tower = nn.Linear(2, 2)
    both = [*model.model.layers.parameters(), model.model.mm_projector.weight]
    optimizer = torch.optim.AdamW([{"params": [model.model.vision_tower.weight]}, {"params": both}])
    name_and_drop_groups(optimizer, model)
    assert [group["region_part"] for group in optimizer.param_groups] == ["projector", "both"]
    model.model.resampler = nn.Linear(2, 2)
    optimizer.add_param_group({"params": [model.model.resampler.weight]})
    with pytest.raises(LlavaRegionError, match=r"'model\.resampler\.weight' belongs to no part of a model"):
        name_and_drop_groups(optimizer, model)


def test_shifted_rates_stop():
    model = Model()
    optimizer = torch.optim.AdamW(
        [{"params": list(model.model.layers.parameters())}, {"params": [model.model.mm_projector.weight], "lr": 2e-5}]
    )
    name_and_drop_groups(optimizer, model)

    class Shifted:
        base_lrs = (2e-4, 2e-4)

    with pytest.raises(LlavaRegionError, match=r"the projector would train at 0\.0002, not at 2e-05"):
        check_rates(optimizer, Shifted, 2e-4, 2e-5)
    Shifted.base_lrs = (2e-4, 2e-4, 2e-5)
    with pytest.raises(LlavaRegionError, match="3 learning rates for 2 optimizer groups"):
        check_rates(optimizer, Shifted, 2e-4, 2e-5)
