"""What LLaVA and Bunny share, as far as it can be asked without either."""

import pytest
import torch
from torch import nn

from llava_region import upstreams


@pytest.mark.parametrize("name", upstreams.names())
def test_an_image_is_a_negative_id(name):
    upstream = upstreams.get(name)
    assert upstream.image_tokens({"input_ids": torch.tensor([[1, -200, 0]])}).tolist() == [[False, True, False]]
    assert upstream.image_tokens({}) is None
    assert upstream.features_per_image(nn.Linear(1, 1)) == 1


@pytest.mark.parametrize("name", upstreams.names())
def test_labels_are_handed_over_where_image_features_are_put_in(name):
    class Model(nn.Module):
        def prepare_inputs_labels_for_multimodal(self, ids, labels=None):
            return ids, None, labels

    upstream, model, seen = upstreams.get(name), Model(), []
    undo = upstream.intercept_labels(model, lambda labels: seen.append(labels))
    assert model.prepare_inputs_labels_for_multimodal(1, labels=2) == (1, None, None) and seen == [2]
    undo()
    assert "prepare_inputs_labels_for_multimodal" not in vars(model)
    assert model.prepare_inputs_labels_for_multimodal(1, labels=2) == (1, None, 2)
    assert upstream.intercept_labels(nn.Linear(1, 1), seen.append) is None


def test_a_method_of_the_model_itself_comes_back():
    model = nn.Linear(1, 1)
    own = model.prepare_inputs_labels_for_multimodal = lambda ids, labels=None: (ids, labels)
    undo = upstreams.get("llava").intercept_labels(model, lambda labels: None)
    assert model.prepare_inputs_labels_for_multimodal is not own
    undo()
    assert model.prepare_inputs_labels_for_multimodal is own
