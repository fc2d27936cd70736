"""One pass over the samples for all activation metrics, shared by the processes of a run, and saved when it is interrupted."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from llava_region import processes
from llava_region.data.images import prefetch
from llava_region.progress import progress_bar
from llava_region.scores.activations import measure
from llava_region.scores.data import Sample, embed_inputs
from llava_region.scores.interrupt import Stop, stop_on_signals
from llava_region.scores.partial import Progress, partial_file, partial_files, resume
from llava_region.scores.sums import Sums

if TYPE_CHECKING:
    from llava_region.models.loading import LoadedModel

    Inputs = list[tuple[torch.Tensor, list[torch.Tensor]]]  # of each sample of a batch, as `embed_inputs` returns them

SAVE_SECONDS = 60
WORKERS = 1  # threads that prepare batches; no more, as the upstreams' preprocessing sets a global template while it runs


class Interrupted(Exception):
    """The pass was stopped by a signal; what it found is saved.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


@dataclass(frozen=True)
class Plan:
    """What a pass does: its samples in batches, the metrics, and where and under which identity progress is kept.

    Attributes:
        batches: the samples, in order; all processes have the same.
        prompt: see `data.read_samples`.
        instances: image attention is kept for the first so many records of each data file.
    """

    batches: list[list[Sample]]
    metrics: tuple[str, ...]
    prompt: str | None
    instances: int
    out: Path
    identity: dict

    @property
    def samples(self) -> int:
        return sum(map(len, self.batches))


def run_pass(loaded: LoadedModel, plan: Plan, resumed: bool) -> Progress:
    """Score every batch that is not done yet; returns what all processes found, the same in each.

    Several processes have to be joined (`processes.joined`).

    Raises:
        Interrupted: after Ctrl-C or SIGTERM and the batch that was running.
        LlavaRegionError: an image cannot be read (progress is saved too), or an earlier run's progress does not belong to this one.
    """
    found = _start(loaded.num_layers, plan, resumed)
    done = set(processes.broadcast(found.done))
    mine = processes.share([number for number in range(len(plan.batches)) if number not in done])
    own_file = partial_file(plan.out, processes.rank())
    with stop_on_signals() as stop:
        try:
            _score_batches(loaded, plan, mine, found, stop)
        except Exception:  # a broken image, memory full: what was found so far is worth keeping
            if found.done:
                found.save(own_file)
            raise
        if processes.world_size() > 1:  # another process may be stopped while this one waits for it
            found.save(own_file)
        return _together(found)


def _score_batches(loaded: LoadedModel, plan: Plan, mine: list[int], found: Progress, stop: Stop) -> None:
    path = partial_file(plan.out, processes.rank())
    with progress_bar("scoring (batches)", len(mine), enabled=processes.is_first()) as advance:
        saved = time.monotonic()
        for number, inputs in prefetch(lambda number: _inputs(loaded, plan, number), mine, WORKERS):
            if stop.number:
                break
            _add_batch(loaded, plan, number, inputs, found)
            advance()
            if time.monotonic() - saved > SAVE_SECONDS:
                found.save(path)
                saved = time.monotonic()
    if stop.number:
        found.save(path)
        done = sum(len(plan.batches[number]) for number in found.done)
        who = f"process {processes.rank()}: " if processes.world_size() > 1 else ""
        raise Interrupted(stop.number, f"{who}interrupted after {done} of {plan.samples} samples, saved in {path}; go on with --resume")


def _start(num_layers: int, plan: Plan, resumed: bool) -> Progress:
    """The first process takes over what earlier processes found, in one file; the others begin with nothing."""
    found = Progress(plan.identity, Sums(num_layers))
    if not processes.is_first():
        return found
    earlier = partial_files(plan.out)
    if resumed and earlier:
        found = resume(plan.out, plan.identity, num_layers)
        found.save(partial_file(plan.out))
        earlier = [path for path in earlier if path != partial_file(plan.out)]
    for path in earlier:
        path.unlink()
    return found


def _inputs(loaded: LoadedModel, plan: Plan, number: int) -> Inputs:
    """A batch's token ids and pixel values, read and decoded while the model runs on the batch before."""
    return [embed_inputs(loaded, sample, plan.prompt) for sample in plan.batches[number]]


@torch.inference_mode()
def _add_batch(loaded: LoadedModel, plan: Plan, number: int, inputs: Inputs, found: Progress) -> None:
    ids, images = zip(*inputs, strict=True)
    batch = loaded.embed(list(ids), list(images))
    attention = measure(loaded.model, batch, plan.metrics, found.sums)
    found.done.append(number)
    if attention is None:
        return
    for sample, row in zip(plan.batches[number], attention, strict=True):
        if sample.place < plan.instances and not row.isnan().any():  # no image, or the upstream's length limit cut it off
            found.attention.setdefault(str(sample.dataset), {})[str(sample.index)] = row.tolist()


def _together(found: Progress) -> Progress:
    """What all processes found: the sums reduced, the single samples gathered."""
    table = processes.add_up(found.sums.table.clone())
    total = Progress(found.identity, Sums(table.shape[1] - 1))
    total.sums.table += table
    for attention in processes.gather(found.attention):
        for dataset, rows in attention.items():
            total.attention.setdefault(dataset, {}).update(rows)
    return total
