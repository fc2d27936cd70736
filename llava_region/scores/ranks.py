"""Several processes over one set of data, as torchrun starts them: who does what, and adding up what they found."""

from __future__ import annotations

import os
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch


class Ranks(NamedTuple):
    """This process among those that torchrun started; alone: rank 0 of 1."""

    rank: int
    size: int
    local_rank: int

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> str | None:
        """This process's GPU, or None where there is only one process or no GPU (then the loader chooses)."""
        return f"cuda:{self.local_rank}" if self.size > 1 and torch.cuda.is_available() else None

    def share(self, items: list) -> list:
        """This process's part of a list, every size-th."""
        return items[self.rank :: self.size]

    def broadcast(self, value):
        """The first process's value, in all."""
        if self.size == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value) -> list:
        """Every process's value, by rank, in all."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        torch.distributed.all_gather_object(values, value)
        return values

    def add_up(self, table: torch.Tensor) -> torch.Tensor:
        """Sum of a CPU tensor over the processes, in all."""
        if self.size > 1:
            torch.distributed.all_reduce(table)
        return table


@contextmanager
def join_ranks():
    """The processes of this run; gloo joins them, as only a few numbers are exchanged, and on CPU."""
    ranks = Ranks(*(int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))))
    if ranks.size > 1:
        # one rank may wait for another that compares weights or got the longer samples
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=1))
    try:
        yield ranks
    finally:
        if ranks.size > 1:
            torch.distributed.destroy_process_group()
