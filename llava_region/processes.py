"""The processes of one run: which of them this is, who does what, and what they tell each other.

torchrun, deepspeed and job schedulers say by the environment (RANK, LOCAL_RANK, WORLD_SIZE) which process this is; where they
do not, it is alone. Training's own communication is the upstream trainer's; what is here exchanges only a few numbers, on CPU
(gloo), for the tools that share their work.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

Item = TypeVar("Item")

# Only waiting can run into it: for the process with the longest answers, the slowest disk, or the weights to compare. One
# that died is noticed by the launcher, which stops the others, so the limit is beyond any run.
TIMEOUT = timedelta(days=30)
LEAVING = 10.0  # seconds; a group whose other processes are lost, or busy, may not let go
SETTLE = 0.2  # seconds

_stores: list[Any] = []


def rank() -> int:
    """Number of this process among all, from 0."""
    return _number("RANK", 0)


def world_size() -> int:
    """How many processes there are."""
    return _number("WORLD_SIZE", 1)


def local_rank() -> int:
    """Number of this process among those of its node, from 0."""
    return _number("LOCAL_RANK", 0)


def local_world_size() -> int:
    """How many processes there are on this node."""
    return _number("LOCAL_WORLD_SIZE", 1)


def _number(name: str, alone: int) -> int:
    return int(os.environ.get(name) or alone)


def is_first() -> bool:
    """Whether this is the process that reports and writes for all."""
    return rank() == 0


def is_first_on_node() -> bool:
    """Whether this is the process that reports for its node."""
    return local_rank() == 0


def device(asked: str | None) -> str | None:
    """The device of this process: with several processes and CUDA a GPU of its own, unless a certain one was asked for."""
    import torch

    if asked in (None, "cuda") and world_size() > 1 and torch.cuda.is_available():
        return f"cuda:{local_rank()}"
    return asked


def share(items: list[Item]) -> list[Item]:
    """This process's part of a list that is the same in all: every `world_size()`-th item."""
    return items[rank() :: world_size()]


@contextmanager
def joined() -> Iterator[None]:
    """Join the processes for the length of a block; the functions below need it where there are several.

    All processes have to enter it. Inside another such block, or where the caller has joined them, nothing is done.
    """
    if world_size() == 1:
        yield
        return
    from torch import distributed

    if distributed.is_initialized():
        yield
        return
    # Names of its own in the store: whoever joins the processes afterwards, such as a trainer, would find those of this group there.
    # The store is kept, as the process that serves it could not open its port again at once.
    store, number, size = next(distributed.rendezvous("env://", timeout=TIMEOUT))
    _stores.append(store)
    store = distributed.PrefixStore(f"llava_region/{len(_stores)}", store)
    distributed.init_process_group("gloo", store=store, rank=number, world_size=size, timeout=TIMEOUT)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def leave(code: int | None) -> None:
    """Leave the process group that a training has made, before Python ends.

    A thread of gloo holds the tensors of the last operation for a moment after it is done. If it lets go of them while Python
    ends, the process aborts, with everything saved: `terminate called without an active exception`. To destroy the group
    ends its threads only where nothing else refers to it, as DDP and DeepSpeed do; so they are given time besides.

    Args:
        code: the process is over and may end with it at once, if the group does not let go; None: after an error, which is
            still to be reported.
    """
    if "torch" not in sys.modules:
        return
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return
    gc.collect()  # what refers to a group, such as the wrapper of a model, keeps its threads
    thread = threading.Thread(target=distributed.destroy_process_group, daemon=True)
    thread.start()
    thread.join(LEAVING)
    time.sleep(SETTLE)
    if thread.is_alive() and code is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def barrier() -> None:
    """Wait for all processes."""
    if world_size() > 1:
        from torch import distributed

        distributed.barrier()


def broadcast(value: Item) -> Item:
    """The first process's value, in all."""
    if world_size() == 1:
        return value
    from torch import distributed

    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: Item) -> list[Item]:
    """Every process's value, by rank, in all."""
    if world_size() == 1:
        return [value]
    from torch import distributed

    values = [value] * world_size()
    distributed.all_gather_object(values, value)
    return values


def add_up(table: Tensor) -> Tensor:
    """The sum of a CPU tensor over the processes, in all, written into `table` too."""
    if world_size() > 1:
        from torch import distributed

        distributed.all_reduce(table)
    return table
