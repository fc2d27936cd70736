"""What cost.json says of a run that was interrupted, or runs on several GPUs."""

import json
from types import SimpleNamespace

import pytest
import torch

from llava_region.training.cost import CostMeter


def arguments(ranks: int, gpus_a_rank: int = 1) -> SimpleNamespace:
    return SimpleNamespace(world_size=ranks, n_gpu=gpus_a_rank, device=torch.device("cpu"))


STATE = SimpleNamespace(global_step=10, log_history=[{"loss": 2.0}, {"loss": 1.0}])


def totals(meter: CostMeter, args: SimpleNamespace) -> dict:
    return meter.totals(args, STATE, lambda tensor: tensor * args.world_size)


def test_a_resumed_run_adds_to_what_its_checkpoint_says(tmp_path):
    """On fewer GPUs than before: the hours of each part count with its own number."""
    saved = {"hours": 2.0, "gpu_hours": 16.0, "samples": 100, "tokens": 900, "seconds_per_step": 0.5, "peak_memory_bytes": 10**15}
    (tmp_path / "cost.json").write_text(json.dumps(saved))
    meter = CostMeter()
    meter.resume(tmp_path)
    meter.on_train_begin(None, None, None)
    meter.started -= 3600
    inputs = {"input_ids": torch.tensor([[1, 0, 3]]), "attention_mask": torch.ones(1, 3, dtype=torch.bool)}
    meter.count(inputs, torch.tensor([[False, True, False]]), features_per_image=16)
    cost = totals(meter, arguments(4))
    assert cost["hours"] == pytest.approx(3, abs=1e-2) and cost["gpu_hours"] == pytest.approx(20, abs=1e-2)
    assert cost["samples"] == 104 and cost["tokens"] == 900 + 4 * 18 and cost["gpus"] == 4
    # no step was made since
    assert cost["seconds_per_step"] == 0.5 and cost["peak_memory_bytes"] == 10**15


def test_one_process_with_several_gpus():
    meter = CostMeter()
    meter.on_train_begin(None, None, None)
    meter.started -= 3600
    cost = totals(meter, arguments(1, gpus_a_rank=2))
    assert cost["gpus"] == 2 and cost["gpu_hours"] == pytest.approx(2, abs=1e-2)
