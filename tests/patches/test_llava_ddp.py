"""LoRA on a region of upstream LLaVA under DDP, without DeepSpeed, on two CPU ranks."""

import pytest

pytest.importorskip("llava.train.train")

from tests.helpers.training_runs import LORA, adapter, layers_of, llava_flags, needs_bf16_over_gloo, projector, same, torchrun, train

pytestmark = [pytest.mark.slow, needs_bf16_over_gloo]
POLICIES = ("all", "region", "auto", "none")


def test_every_policy_trains_the_same(tiny, tmp_path):
    """Where a tuned layer was recomputed, DDP ended the first step: "a parameter was marked as ready twice"."""
    for policy in POLICIES:
        flags = [*llava_flags(tiny, tmp_path / policy, **LORA, region_checkpointing=policy), "--tune_layers", "1,6"]
        done = train(flags, launcher=torchrun(2))
        assert done.returncode == 0, done.stderr[-3000:]
        tensors = adapter(tmp_path / policy)
        assert layers_of(tensors) == {1, 6} and all((tensor != 0).any() for tensor in tensors.values())
        assert same(tensors, adapter(tmp_path / "all"))
        assert same(projector(tmp_path / policy), projector(tmp_path / "all"))
