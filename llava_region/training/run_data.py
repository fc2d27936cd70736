"""The data of a run, before weights load: every record's form, images, batches, and a sample through the upstream's tokenisation."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from llava_region import processes
from llava_region.data.check import check_data, check_placeholders
from llava_region.errors import LlavaRegionError
from llava_region.training.sampled_records import check_records

if TYPE_CHECKING:
    from llava_region.data.training_data import TrainingData
    from llava_region.upstreams import Recipe, Upstream


def check_run_data(
    upstream: Upstream, args: Namespace, recipe: Recipe, config: Mapping[str, Any]
) -> tuple[TrainingData, tuple[tuple[str, str], ...]]:
    """Check the records that a command line names.

    Args:
        config: the model's `config.json`.

    Returns:
        the records, and what was found out about them: (name, one line) each.

    Raises:
        LlavaRegionError: the first thing that is wrong.
    """
    pictures = partial(upstream.picture_problem, args)
    records = check_data(recipe.data, recipe.images, args.check_images, upstream.record_check(args), pictures)
    check_batch(args, len(records), str(recipe.data))
    remarks = {
        "placeholders": check_placeholders(records.survey, str(recipe.data)),
        "sample": check_records(upstream, args, recipe, config, records),
    }
    return records, tuple((name, text) for name, text in remarks.items() if text)


def check_batch(args: Namespace, records: int, data: str) -> None:
    """Refuse data that make no batch: the trainer would find an epoch without a step, after loading weights.

    Raises:
        LlavaRegionError: incomplete batches are left out, and there are too few records for a whole one.
    """
    ranks = 1 if getattr(args, "split_batches", False) else processes.world_size()
    batch = args.per_device_train_batch_size * ranks
    if args.dataloader_drop_last and records < batch:
        raise LlavaRegionError(
            f"{data} has {records} records, which --dataloader_drop_last True leaves out, as a batch has {batch} "
            f"(--per_device_train_batch_size {args.per_device_train_batch_size}, {ranks} processes); leave that flag out, or give more data"
        )
