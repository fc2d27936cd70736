"""What a run cost: `cost.json`, the source of the paper's Figure 3 (GPU hours) for the user's own runs."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llava_region.files import read_json, write_json
from llava_region.run_files import COST_FILE


class CostMeter(TrainerCallback):
    """Counts time, samples and tokens of a run; a resumed run goes on from what its checkpoint says.

    Tokens are those that enter the language model: text, and the features in place of every image.
    They are summed on the device and read once, at the end.
    """

    def __init__(self) -> None:
        self.before: dict[str, Any] = {
            "hours": 0.0,
            "gpu_hours": 0.0,
            "samples": 0.0,
            "tokens": 0.0,
            "seconds_per_step": None,
            "peak_memory_bytes": 0,
            "batches_by_layers_recomputed": {},
        }
        self.recomputed: list[int] = []  # batches of this rank in which 0, 1, 2... layers were recomputed, where that varies
        self.step_seconds: list[float] = []
        self.samples = 0
        self.tokens: torch.Tensor | None = None
        self.started: float | None = None
        self.step_started: float | None = None

    def resume(self, checkpoint: str | Path) -> None:
        """Take over the sums of the interrupted run from a checkpoint folder."""
        path = Path(checkpoint) / COST_FILE
        if path.is_file():
            saved = read_json(path)
            self.before = {key: saved.get(key, empty) for key, empty in self.before.items()}

    def count(self, inputs: Mapping[str, Any], image_tokens: torch.Tensor | None, features_per_image: int) -> None:
        """Add one micro batch.

        Args:
            inputs: `input_ids` (B, T), `attention_mask` (B, T); without ids, nothing is counted.
            image_tokens: (B, T) bool, True at the one token that an image's features replace.
            features_per_image: tokens that one image becomes.
        """
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

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.step_started = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.step_started is not None:
            self.step_seconds.append(time.perf_counter() - self.step_started)

    def totals(self, args: Any, state: Any, reduce_sum: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
        """The content of `cost.json`. Collective: every rank has to call it.

        Args:
            args: the TrainingArguments; state: transformers' `TrainerState`.
            reduce_sum: sum of a tensor over all ranks.
        """
        device = args.device
        tokens = self.tokens if self.tokens is not None else 0
        sums = torch.stack([torch.as_tensor(float(self.samples), device=device), torch.as_tensor(tokens, device=device).float()])
        samples, tokens = reduce_sum(sums.double()).tolist()
        gpus = args.world_size * max(args.n_gpu, 1)  # one process has several under torch.nn.DataParallel
        now = (time.perf_counter() - self.started) / 3600 if self.started else 0.0
        hours = self.before["hours"] + now
        samples, tokens = samples + self.before["samples"], tokens + self.before["tokens"]
        recomputed = self._recomputed(reduce_sum, device) if self.recomputed else self.before["batches_by_layers_recomputed"]
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        steady = self.step_seconds[1:] or self.step_seconds
        seconds = max(hours * 3600, 1e-9)
        return {
            "gpus": gpus,
            "hours": hours,
            "gpu_hours": self.before["gpu_hours"] + now * gpus,
            "steps": state.global_step,
            "seconds_per_step": statistics.median(steady) if steady else self.before["seconds_per_step"],
            "samples": samples,
            "tokens": tokens,
            "samples_per_second": samples / seconds,
            "tokens_per_second": tokens / seconds,
            "peak_memory_bytes": max(peak_memory(), self.before["peak_memory_bytes"]),
            "first_loss": losses[0] if losses else None,
            "last_loss": losses[-1] if losses else None,
            **({"batches_by_layers_recomputed": recomputed} if recomputed else {}),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        }

    def _recomputed(self, reduce_sum: Callable[[torch.Tensor], torch.Tensor], device: torch.device) -> dict[str, int]:
        """Micro batches of all ranks by the number of layers that were recomputed."""
        batches = dict(self.before["batches_by_layers_recomputed"])
        for layers, count in enumerate(reduce_sum(torch.tensor(self.recomputed, device=device)).tolist()):
            if count:
                batches[str(layers)] = batches.get(str(layers), 0) + count
        return {str(layers): batches[str(layers)] for layers in sorted(map(int, batches))}


def peak_memory() -> int:
    """Peak bytes of this process: allocated on the GPU where there is one, else resident in memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def write_cost(folder: str | Path, totals: Mapping[str, Any]) -> None:
    """Write `cost.json` into a folder."""
    write_json(Path(folder) / COST_FILE, totals)
