"""What a run cost: `cost.json`, the source of the paper's Figure 3 (GPU hours) for the user's own runs."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llava_region.files import read_json, write_json
from llava_region.run_files import COST_FILE

OverRanks = Callable[[torch.Tensor, Literal["sum", "max"]], torch.Tensor]  # sum or maximum of a tensor over all ranks, a collective


class CostMeter(TrainerCallback):
    """Counts time, samples and tokens of a run; a resumed run goes on from what its checkpoint says.

    Tokens are those that enter the language model: text, and the features in place of every image.
    They are summed on the device and read once, at the end.

    A step's time is that of its micro batches, from when the trainer asks for one until it is done with it. What is logged, saved
    or evaluated between two steps is left out.
    """

    def __init__(self) -> None:
        self.before: dict[str, Any] = {
            "hours": 0.0,
            "gpu_hours": 0.0,
            "samples": 0.0,
            "tokens": 0.0,
            "seconds_per_step": None,
            "data_seconds_per_step": None,
            "peak_memory_bytes": 0,
            "batches_by_layers_recomputed": {},
        }
        self.recomputed: list[int] = []  # batches of this rank in which 0, 1, 2... layers were recomputed, where that varies
        self.step_seconds: list[float] = []
        self.data_seconds: list[float] = []  # of each step, the part in which the trainer waited for its batches
        self.samples = 0
        self.tokens: torch.Tensor | None = None
        self.started: float | None = None
        self._asked: float | None = None  # when the trainer asked for the next batch
        self._step = self._waited = 0.0  # seconds of the step that has begun

    def resume(self, checkpoint: str | Path) -> None:
        """Take over the sums of the interrupted run from a checkpoint folder."""
        path = Path(checkpoint) / COST_FILE
        if path.is_file():
            saved = read_json(path)
            self.before = {key: saved.get(key, empty) for key, empty in self.before.items()}

    def count(self, inputs: Mapping[str, Any], image_tokens: torch.Tensor | None, features_per_image: int) -> None:
        """Add one micro batch, which has just arrived.

        Args:
            inputs: `input_ids` (B, T), `attention_mask` (B, T); without ids, nothing is counted.
            image_tokens: (B, T) bool, True at the one token that an image's features replace.
            features_per_image: tokens that one image becomes.
        """
        if self._asked is not None:
            self._waited += time.perf_counter() - self._asked
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        if ids is None:
            return
        self.samples += ids.shape[0]
        tokens = ids.numel() if mask is None else mask.sum()
        if image_tokens is not None:
            tokens = tokens + image_tokens.sum() * (features_per_image - 1)
        self.tokens = tokens if self.tokens is None else self.tokens + tokens

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.started = time.perf_counter()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._asked = time.perf_counter()

    # the trainer asks for the next batch right after the last of these
    on_log = on_save = on_evaluate = on_epoch_begin

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A micro batch is done; more of the same step follow."""
        now = time.perf_counter()
        if self._asked is not None:
            self._step += now - self._asked
        self._asked = now

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.on_substep_end(args, state, control)
        self.step_seconds.append(self._step)
        self.data_seconds.append(self._waited)
        self._step = self._waited = 0.0

    def totals(self, args: Any, state: Any, over_ranks: OverRanks) -> dict[str, Any]:
        """The content of `cost.json`: what all ranks did together, and the time and memory of the one that took most. Collective.

        Args:
            args: the TrainingArguments; state: transformers' `TrainerState`.
        """
        device = args.device
        tokens = self.tokens if self.tokens is not None else 0
        sums = torch.stack([torch.as_tensor(float(self.samples), device=device), torch.as_tensor(tokens, device=device).float()])
        samples, tokens = over_ranks(sums.double(), "sum").tolist()
        gpus = args.world_size * max(args.n_gpu, 1)  # one process has several under torch.nn.DataParallel
        now = (time.perf_counter() - self.started) / 3600 if self.started else 0.0
        hours = self.before["hours"] + now
        samples, tokens = samples + self.before["samples"], tokens + self.before["tokens"]
        recomputed = self._recomputed(over_ranks, device) if self.recomputed else self.before["batches_by_layers_recomputed"]
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        step, waited = statistics.median(_steady(self.step_seconds)), statistics.fmean(_steady(self.data_seconds))
        most = torch.tensor([step, waited, peak_memory()], dtype=torch.float64, device=device)
        step, waited, peak = over_ranks(most, "max").tolist()
        seconds = max(hours * 3600, 1e-9)
        return {
            "gpus": gpus,
            "hours": hours,
            "gpu_hours": self.before["gpu_hours"] + now * gpus,
            "steps": state.global_step,
            "seconds_per_step": step if self.step_seconds else self.before["seconds_per_step"],
            "data_seconds_per_step": waited if self.step_seconds else self.before["data_seconds_per_step"],
            "samples": samples,
            "tokens": tokens,
            "samples_per_second": samples / seconds,
            "tokens_per_second": tokens / seconds,
            "peak_memory_bytes": max(int(peak), self.before["peak_memory_bytes"]),
            "first_loss": losses[0] if losses else None,
            "last_loss": losses[-1] if losses else None,
            **({"batches_by_layers_recomputed": recomputed} if recomputed else {}),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        }

    def _recomputed(self, over_ranks: OverRanks, device: torch.device) -> dict[str, int]:
        """Micro batches of all ranks by the number of layers that were recomputed."""
        batches = dict(self.before["batches_by_layers_recomputed"])
        for layers, count in enumerate(over_ranks(torch.tensor(self.recomputed, device=device), "sum").tolist()):
            if count:
                batches[str(layers)] = batches.get(str(layers), 0) + count
        return {str(layers): batches[str(layers)] for layers in sorted(map(int, batches))}


def _steady(seconds: list[float]) -> list[float]:
    """Without the first step, which compiles kernels and starts the data's workers."""
    return seconds[1:] or seconds or [0.0]


def peak_memory() -> int:
    """Peak bytes of this process: allocated on the GPU where there is one, else resident in memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def write_cost(folder: str | Path, totals: Mapping[str, Any]) -> None:
    """Write `cost.json` into a folder."""
    write_json(Path(folder) / COST_FILE, totals)
