"""Recomputation and the loss at supervised positions, on the model classes of the real Bunny."""
# ruff: noqa: E402 - Bunny can be imported only after the shims

import pytest
import torch

from tests.helpers import bunny_shims

if bunny_shims.why_not():
    pytest.skip(bunny_shims.why_not(), allow_module_level=True)
bunny_shims.apply()

import bunny.model

from llava_region.decoder import find_decoder_layers
from llava_region.patches.bunny import UPSTREAM
from llava_region.training import recompute as ckpt
from llava_region.training import supervised_loss
from tests.helpers.bunny_models import MODEL_TYPES
from tests.helpers.region_models import assert_equal, count_forwards, gradients, workload

# phi-1.5 has phi-2's classes
TYPES = [name for name in MODEL_TYPES if name != "phi-1.5"]


def build(model_type: str, region=(1, 4)):
    """Bunny's model of six decoder layers, those of the region fully tuned, embeddings made to require grad as under its train()."""
    name, _, _, _, extra = MODEL_TYPES[model_type]
    model_class = getattr(bunny.model, f"Bunny{name}ForCausalLM")
    torch.manual_seed(0)
    config = model_class.config_class(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4, pad_token_id=0, **extra
    )
    model = model_class(config).requires_grad_(False)
    for i in region:
        find_decoder_layers(model).modules[i].requires_grad_(True)
    model.enable_input_require_grads()
    model.get_input_embeddings().requires_grad_(True)
    model.config.use_cache = False
    model.gradient_checkpointing_enable()
    return model.train()


@pytest.mark.parametrize("model_type", [name for name in TYPES if name != "stablelm-2"])
@pytest.mark.parametrize("policy", ["all", "region", "none", "auto"])
def test_gradients_equal_full_recomputation_to_the_bit(model_type, policy):
    model = build(model_type)
    expected = gradients(model)
    plan = ckpt.set_up(model, (1, 4), workload(), policy)
    assert plan.recompute == {"all": tuple(range(6)), "region": (1, 4)}.get(policy, ())
    counts = count_forwards(model)
    assert_equal(gradients(model), expected)
    assert counts == [2 if i in plan.recompute else 1 for i in range(6)]


def test_stablelm_checkpoints_by_itself():
    model = build("stablelm-2")
    expected = gradients(model)
    plan = ckpt.set_up(model, (1, 4), workload(), "auto")
    assert plan.policy == "all" and "BunnyStableLMModel.forward calls torch.utils.checkpoint itself" in plan.reason
    assert_equal(gradients(model), expected)
    with pytest.raises(ckpt.UnsupportedUpstream, match="--region_checkpointing region is not possible here"):
        ckpt.set_up(model, (1, 4), workload(), "region")


@pytest.mark.parametrize("model_type", TYPES)
def test_supervised_loss_is_bunnys(model_type, monkeypatch):
    monkeypatch.setattr(supervised_loss, "LOGITS_AT_ONCE", 7 * 50)
    model = build(model_type)
    expected = gradients(model)
    assert supervised_loss.install(model, UPSTREAM.intercept_labels) is None
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-7, msg=name)
