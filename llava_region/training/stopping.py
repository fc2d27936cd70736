"""Ending a training after the current optimizer step, with a whole checkpoint, when a signal asked for it."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llava_region.training import signals

if TYPE_CHECKING:
    from llava_region.training.trainer import RegionTrainerMixin


class StopAtStep(TrainerCallback):
    """Asks all ranks after every optimizer step whether one of them got a signal; then all save and stop.

    A signal may reach some ranks alone, or some a step earlier. So each step costs one all-reduce of a number, besides those
    of its gradients.

    Attributes:
        number: of the signal that the run stops for; 0: none.
    """

    def __init__(self, trainer: RegionTrainerMixin):
        self.trainer = trainer
        self.number = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        listener = signals.current()
        if listener is not None:
            listener.training = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        listener = signals.current()
        if listener is None or state.global_step >= state.max_steps:  # after the last step the run is finished as ever
            return
        self.number = int(self.trainer.over_ranks(torch.tensor(listener.number), "max"))
        if self.number:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False
            if getattr(args, "save_only_model", False):  # could not be resumed
                args.save_only_model = False

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.number:
            control.should_save = control.should_evaluate = False  # this step's checkpoint is there
            # at the end of a loop transformers reads the best checkpoint, and with a limit of 1 removes all others
            args.load_best_model_at_end, args.save_total_limit = False, None

    @property
    def reason(self) -> str | None:
        """The signal's name, None where the run goes on."""
        return signal.Signals(self.number).name if self.number else None

    def raise_if_stopped(self, state: TrainerState, output_dir: str) -> None:
        """To be called after training, before anything is saved as finished.

        Raises:
            Stopped: a signal ended it.
        """
        if self.number:
            folder = Path(output_dir) / f"checkpoint-{state.global_step}"
            line = f"stopped by {self.reason} at step {state.global_step} of {state.max_steps}; run the same command again to resume"
            raise signals.Stopped(self.number, f"{line} from {folder}", agreed=True)
