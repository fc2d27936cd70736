"""A model folder as a whole."""

import json

import pytest
import torch
from safetensors.torch import save_file

from llava_region.checkpoints.whole_model import read_model
from llava_region.errors import LlavaRegionError


@pytest.mark.parametrize("prefix", ["model.layers", "layers", "transformer.blocks", "blocks"])
def test_layers_are_counted_with_and_without_a_head(tmp_path, prefix):
    """A backbone saved without its language modelling head lacks the first part of each name."""
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 2}))
    save_file({f"{prefix}.{i}.ffn.weight": torch.ones(1) for i in range(2)}, tmp_path / "model.safetensors")
    model = read_model(tmp_path)
    assert model.num_layers == 2 and list(model.tensors) == [f"{prefix}.{i}.ffn.weight" for i in range(2)]
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 3}))
    with pytest.raises(LlavaRegionError, match="counts 3 decoder layers, the weights hold 2"):
        read_model(tmp_path)
