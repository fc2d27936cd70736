"""Which of several processes this one is, when `torchrun` started them, and where they wait for each other."""

from __future__ import annotations

import os
from datetime import timedelta


def rank() -> int:
    """Number of this process among all, from 0."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", 1))


def device(asked: str | None) -> str | None:
    """The device of this process: with several processes and CUDA a GPU of its own, unless one was asked for."""
    import torch

    if asked in (None, "cuda") and world_size() > 1 and torch.cuda.is_available():
        return f"cuda:{int(os.environ.get('LOCAL_RANK', 0))}"
    return asked


def barrier() -> None:
    """Wait for all processes, however long the slowest takes."""
    if world_size() == 1:
        return
    from torch import distributed

    if not distributed.is_initialized():
        # gloo: nothing is exchanged but the waiting, which must not end before the slowest shard is through
        distributed.init_process_group("gloo", timeout=timedelta(days=30))
    distributed.barrier()
