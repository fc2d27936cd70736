"""What a run tells W&B and TensorBoard, where the user reports there: its region, and which layers are recomputed.

transformers' own callbacks send the flags, the losses, and the model's config with its `visual_region`.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, WandbCallback

if TYPE_CHECKING:
    from llava_region.training.recompute_plan import Plan
    from llava_region.training.trainer import RegionTrainerMixin

NAME = "llava_region"  # of the group in W&B's config, and of TensorBoard's text


class Reports(TrainerCallback):
    """Adds to what is reported: once, after the first step, when the plan is made."""

    def __init__(self, trainer: RegionTrainerMixin) -> None:
        self.trainer = trainer
        self._told = False
        self._counted: Counter[int] = Counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._told or not state.is_world_process_zero:
            return
        self._told = True
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, WandbCallback) and callback._wandb is not None and callback._wandb.run is not None:
                callback._wandb.config.update({NAME: self.facts()}, allow_val_change=True)
            elif isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                callback.tb_writer.add_text(NAME, json.dumps(self.facts(), indent=2))

    def facts(self) -> dict[str, Any]:
        """Region and recomputation of the run."""
        plan = self.trainer.first_step.plan
        return {**self.trainer.run.record(), "recomputation": None if plan is None else _of_plan(plan)}

    def layers_recomputed(self) -> float | None:
        """Layers recomputed on this rank, the mean over its batches since the last call; None where that does not vary."""
        plan = self.trainer.first_step.plan
        if plan is None or plan.batches is None:
            return None
        since = plan.batches.counts - self._counted
        self._counted = plan.batches.counts.copy()
        return round(sum(layers * batches for layers, batches in since.items()) / since.total(), 2) if since else None


def _of_plan(plan: Plan) -> dict[str, Any]:
    return {
        "policy": plan.policy, "reason": plan.reason, "layers_of_the_largest_batch": list(plan.recompute), "lean": plan.lean,
        "bytes_kept": plan.bytes_kept, "budget_bytes": plan.budget, "per_batch": plan.batches is not None,
    }  # fmt: skip
