"""One run under the hooks: what it refuses of a model."""

from types import SimpleNamespace

import pytest
import torch

from llava_region import LlavaRegionError
from llava_region.decoder import linear_modules
from llava_region.training.run import RegionRun


def model_of(layer: torch.nn.Module) -> torch.nn.Module:
    """A decoder of one layer, under LLaVA's name for it."""
    model = torch.nn.Module()
    model.model = torch.nn.Module()
    model.model.layers = torch.nn.ModuleList([layer])
    return model


def test_lora_is_not_put_around_lora():
    """Of a model that was loaded with an adapter: as linear modules go, the adapter's `base_layer` is one."""
    run = RegionRun("0", upstream=SimpleNamespace(name="llava"))
    plain = model_of(torch.nn.ModuleDict({"up_proj": torch.nn.Linear(2, 2)}))
    assert run.find_linear_names(plain) == run.lora_modules == ["model.layers.0.up_proj"]
    parts = {name: torch.nn.Linear(2, 2) for name in ("base_layer", "lora_A", "lora_B")}
    adapted = model_of(torch.nn.ModuleDict({"up_proj": torch.nn.ModuleDict(parts)}))
    assert linear_modules(adapted, [0]) == ["model.layers.0.up_proj.base_layer"]
    with pytest.raises(LlavaRegionError, match=r"has an adapter already .*; merge it with 'llava-region merge'"):
        run.find_linear_names(adapted)
