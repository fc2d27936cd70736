"""What cost.json says of a run that was interrupted, or runs on several GPUs."""

import json
import time
from types import SimpleNamespace

import pytest
import torch

from llava_region.training.cost import CostMeter


def arguments(ranks: int, gpus_a_rank: int = 1) -> SimpleNamespace:
    return SimpleNamespace(world_size=ranks, n_gpu=gpus_a_rank, device=torch.device("cpu"))


STATE = SimpleNamespace(global_step=10, log_history=[{"loss": 2.0}, {"loss": 1.0}])


def totals(meter: CostMeter, args: SimpleNamespace) -> dict:
    """Of ranks that all did what this one did, the last of which took three times as much of everything."""
    return meter.totals(args, STATE, lambda tensor, how: tensor * (args.world_size if how == "sum" else min(args.world_size, 3)))


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


def test_the_slowest_and_the_fullest_rank_are_named():
    one, many = CostMeter(), CostMeter()
    for meter in (one, many):
        meter.on_train_begin(None, None, None)
        meter.step_seconds, meter.data_seconds = [9.0, 1.0, 2.0, 1.0], [5.0, 0.1, 0.1, 0.4]
    alone, four = totals(one, arguments(1)), totals(many, arguments(4))
    assert (alone["seconds_per_step"], alone["data_seconds_per_step"]) == (1.0, pytest.approx(0.2))  # without the first step
    assert (four["seconds_per_step"], four["data_seconds_per_step"]) == (3.0, pytest.approx(0.6))
    assert four["peak_memory_bytes"] > 2 * alone["peak_memory_bytes"]


def test_waiting_for_data_is_part_of_a_step_and_saving_is_not():
    meter = CostMeter()
    meter.on_train_begin(None, None, None)
    meter.on_epoch_begin(None, None, None)
    inputs = {"input_ids": torch.tensor([[1, 2]])}
    for _ in range(2):
        for done in (meter.on_substep_end, meter.on_step_end):
            time.sleep(0.02)  # the batch is made
            meter.count(inputs, None, 16)
            time.sleep(0.01)  # and trained on
            done(None, None, None)
        time.sleep(0.5)  # a checkpoint is saved
        meter.on_save(None, None, None)
    for seconds, waited in zip(meter.step_seconds, meter.data_seconds, strict=True):
        assert 0.04 <= waited <= seconds - 0.02 and seconds < 0.5
