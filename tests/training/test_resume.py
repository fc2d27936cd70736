"""What a run that goes on from a checkpoint restores."""

import pytest
import torch

from llava_region import LlavaRegionError
from llava_region.training.resume import load_non_lora


def test_projector_has_to_fit(tmp_path):
    model = torch.nn.Linear(2, 2)
    with pytest.raises(LlavaRegionError, match="no non_lora_trainables"):
        load_non_lora(model, tmp_path)
    torch.save({"weight": torch.ones(2, 2)}, tmp_path / "non_lora_trainables.bin")
    load_non_lora(model, tmp_path)
    assert torch.equal(model.weight, torch.ones(2, 2))
    torch.save({"weight": torch.ones(3, 2)}, tmp_path / "non_lora_trainables.bin")
    with pytest.raises(LlavaRegionError, match="does not fit the model"):
        load_non_lora(model, tmp_path)
