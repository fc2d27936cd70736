"""One pass over the samples for all activation metrics, shared by the processes of a run, and saved when it is interrupted."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from llava_region.data.images import prefetch
from llava_region.progress import progress_bar
from llava_region.scores.activations import measure
from llava_region.scores.data import Sample, embed_inputs
from llava_region.scores.interrupt import Stop, stop_on_signals
from llava_region.scores.partial import Progress, partial_file, partial_files, resume
from llava_region.scores.ranks import Ranks
from llava_region.scores.sums import Sums

SAVE_SECONDS = 60
WORKERS = 1  # threads that prepare batches; no more, as the upstreams' preprocessing sets a global template while it runs


class Interrupted(Exception):
    """The pass was stopped by a signal; what it found is saved."""


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


def run_pass(loaded, plan: Plan, ranks: Ranks, resumed: bool) -> Progress:
    """Score every batch that is not done yet; returns what all processes found, the same in each.

    Raises:
        Interrupted: after Ctrl-C or SIGTERM and the batch that was running.
        LlavaRegionError: an image cannot be read (progress is saved too), or an earlier run's progress does not belong to this one.
    """
    found = _start(loaded.num_layers, plan, ranks, resumed)
    done = set(ranks.broadcast(found.done))
    mine = ranks.share([number for number in range(len(plan.batches)) if number not in done])
    with stop_on_signals() as stop:
        try:
            _score_batches(loaded, plan, mine, found, ranks, stop)
        except Exception:  # a broken image, memory full: what was found so far is worth keeping
            if found.done:
                found.save(partial_file(plan.out, ranks.rank))
            raise
        if ranks.size > 1:  # another process may be stopped while this one waits for it
            found.save(partial_file(plan.out, ranks.rank))
        return _together(found, ranks)


def _score_batches(loaded, plan: Plan, mine: list[int], found: Progress, ranks: Ranks, stop: Stop) -> None:
    with progress_bar("scoring (batches)", len(mine), enabled=ranks.first) as advance:
        saved = time.monotonic()
        for number, inputs in prefetch(lambda number: _inputs(loaded, plan, number), mine, WORKERS):
            if stop.requested:
                break
            _add_batch(loaded, plan, number, inputs, found)
            advance()
            if time.monotonic() - saved > SAVE_SECONDS:
                found.save(partial_file(plan.out, ranks.rank))
                saved = time.monotonic()
    if stop.requested:
        path = partial_file(plan.out, ranks.rank)
        found.save(path)
        done = sum(len(plan.batches[number]) for number in found.done)
        who = f"process {ranks.rank}: " if ranks.size > 1 else ""
        raise Interrupted(f"{who}interrupted after {done} of {plan.samples} samples, saved in {path}; go on with --resume")


def _start(num_layers: int, plan: Plan, ranks: Ranks, resumed: bool) -> Progress:
    """The first process takes over what earlier processes found, in one file; the others begin with nothing."""
    found = Progress(plan.identity, Sums(num_layers))
    if not ranks.first:
        return found
    earlier = partial_files(plan.out)
    if resumed and earlier:
        found = resume(plan.out, plan.identity, num_layers)
        found.save(partial_file(plan.out))
        earlier = [path for path in earlier if path != partial_file(plan.out)]
    for path in earlier:
        path.unlink()
    return found


def _inputs(loaded, plan: Plan, number: int) -> list:
    """The batch's token ids and pixel values, read and decoded while the model runs on the one before."""
    return [embed_inputs(loaded, sample, plan.prompt) for sample in plan.batches[number]]


@torch.inference_mode()
def _add_batch(loaded, plan: Plan, number: int, inputs: list, found: Progress) -> None:
    ids, images = zip(*inputs, strict=True)
    batch = loaded.embed(list(ids), list(images))
    attention = measure(loaded.model, batch, plan.metrics, found.sums)
    found.done.append(number)
    if attention is None:
        return
    for sample, row in zip(plan.batches[number], attention, strict=True):
        if sample.place < plan.instances and not row.isnan().any():  # no image, or the upstream's length limit cut it off
            found.attention.setdefault(str(sample.dataset), {})[str(sample.index)] = row.tolist()


def _together(found: Progress, ranks: Ranks) -> Progress:
    """What all processes found: the sums reduced, the single samples gathered."""
    table = ranks.add_up(found.sums.table.clone())
    total = Progress(found.identity, Sums(table.shape[1] - 1))
    total.sums.table += table
    for attention in ranks.gather(found.attention):
        for dataset, rows in attention.items():
            total.attention.setdefault(dataset, {}).update(rows)
    return total
