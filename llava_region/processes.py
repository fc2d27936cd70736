"""The processes of one run: which of them this is, who does what, and what they tell each other.

torchrun, deepspeed and job schedulers say by the environment (RANK, LOCAL_RANK, WORLD_SIZE) which process this is; where they
do not, it is alone. Training's own communication is the upstream trainer's; what is here exchanges only a few numbers, before
training and for the tools that share their work.
"""

from __future__ import annotations

import gc
import os
import pickle
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from llava_region.errors import LlavaRegionError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import Store

Item = TypeVar("Item")

START = timedelta(minutes=30)  # for the processes of all nodes to have started, as torch's own groups wait
LEAVING = 10.0  # seconds; a group whose other processes are lost, or busy, may not let go
SETTLE = 0.2  # seconds
SHORTEST, LONGEST = 0.005, 0.2  # seconds between two looks at what another process may have said

_meeting: _Meeting | None = None
_blocks = 0  # of `joined`, one inside another


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


class _Meeting:
    """The processes of a run, which tell each other values by the store of torch's rendezvous.

    There is no process group: gloo would need a network interface by which all nodes reach each other, which training over
    NCCL may never have needed. Every process has to take part in the same exchanges, in the same order.

    Args:
        store: where the upstream's own process group meets later; number, size: which process this is, of how many.
    """

    def __init__(self, store: Store, number: int, size: int) -> None:
        self.store, self.number, self.size = store, number, size
        self.round = 0

    @classmethod
    def of_this_run(cls) -> _Meeting:
        """Of the processes that a launcher started.

        Raises:
            LlavaRegionError: the environment does not say where the first of them is, or it cannot be reached.
        """
        from torch.distributed import PrefixStore, rendezvous

        try:
            store, number, size = next(rendezvous("env://", timeout=START))
        except (RuntimeError, ValueError) as e:
            where = ":".join(os.environ.get(name, f"({name} is not set)") for name in ("MASTER_ADDR", "MASTER_PORT"))
            raise LlavaRegionError(
                f"process {rank()} of {world_size()} does not reach the first one at {where}: {' '.join(str(e).split())[:200]}; start "
                "all of them by torchrun or deepspeed, or unset WORLD_SIZE for a run of one process"
            ) from e
        # processes that torchrun has started again find what those before them left in the store
        return cls(PrefixStore(f"llava_region/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store), number, size)

    def exchange(self, value: Item) -> list[Item]:
        """Every process's value, by number.

        Raises:
            LlavaRegionError: another process has failed or ended.
        """
        self.round += 1
        answer = f"{self.round}/all"
        if self.number:
            self._set(f"{self.round}/{self.number}", value)
            return self._get(answer)
        values = [value, *(self._get(f"{self.round}/{number}") for number in range(1, self.size))]
        self._set(answer, values)
        for number in range(1, self.size):
            self._forget(f"{self.round}/{number}")
        self._forget(f"{self.round - 1}/all")  # which all have read, as they are in this round
        return values

    def fail(self, problem: str) -> None:
        """Let those that wait for this process know that it has ended."""
        with suppress(LlavaRegionError):  # the first process has ended before, and with it those that would wait
            self._set("failed", f"process {self.number}: {problem}")

    def part(self) -> None:
        """Wait for the others to have read what they were told: the store ends with the first process, and a launcher ends the others."""
        with suppress(RuntimeError):  # the store is gone, and with it the reason to wait
            self.store.add(f"{self.round}/left", 1)
            deadline = time.monotonic() + LEAVING
            while self.store.add(f"{self.round}/left", 0) < self.size and time.monotonic() < deadline:
                time.sleep(SHORTEST)

    def _set(self, name: str, value: Any) -> None:
        try:
            self.store.set(name, pickle.dumps(value))  # type: ignore[arg-type]  # it takes bytes, as `get` gives them
            self.store.add(f"{name}/told", 1)
        except RuntimeError as e:
            raise LlavaRegionError(f"process 0 has ended, as process {self.number} found; its own output says why") from e

    def _told(self, name: str) -> bool:
        """Whether a value has this name, by a counter: the stores of torch 2.1, which LLaVA pins, have no `check`."""
        return self.store.add(f"{name}/told", 0) > 0

    def _forget(self, name: str) -> None:
        for key in (name, f"{name}/told"):
            self.store.delete_key(key)

    def _get(self, name: str) -> Any:
        pause = SHORTEST
        try:
            while not self._told(name):
                if self._told("failed"):
                    raise LlavaRegionError(pickle.loads(self.store.get("failed")))
                time.sleep(pause)
                pause = min(pause * 1.5, LONGEST)
            return pickle.loads(self.store.get(name))
        except RuntimeError as e:
            raise LlavaRegionError(f"process 0 has ended, as process {self.number} found; its own output says why") from e


@contextmanager
def joined() -> Iterator[None]:
    """Join the processes for the length of a block; the functions below need it where there are several.

    All processes have to enter it. Inside another such block, or where the caller has a process group, nothing is done. The
    meeting is kept: the upstream's own process group meets at the same store.

    Raises:
        LlavaRegionError: they cannot reach each other.
    """
    global _meeting, _blocks
    if world_size() == 1 or (_meeting is None and _has_group()):
        yield
        return
    if _meeting is None:
        _meeting = _Meeting.of_this_run()
    _blocks += 1
    try:
        yield
    except BaseException as e:
        if _blocks == 1:
            _meeting.fail(str(e) or type(e).__name__)
        raise
    finally:
        _blocks -= 1
        if _blocks == 0:
            _meeting.part()


def _has_group() -> bool:
    if "torch" not in sys.modules:
        return False
    from torch import distributed

    return distributed.is_available() and distributed.is_initialized()


def leave(code: int | None) -> None:
    """Leave the process group that a training has made, before Python ends.

    A thread of gloo holds the tensors of the last operation for a moment after it is done. If it lets go of them while Python
    ends, the process aborts, with everything saved: `terminate called without an active exception`. To destroy the group
    ends its threads only where nothing else refers to it, as DDP and DeepSpeed do; so they are given time besides.

    Args:
        code: the process is over and may end with it at once, if the group does not let go; None: after an error, which is
            still to be reported.
    """
    if not _has_group():
        return
    from torch import distributed

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
    gather(None)


def broadcast(value: Item) -> Item:
    """The first process's value, in all."""
    return gather(value if is_first() else None)[0]  # type: ignore[return-value]


def gather(value: Item) -> list[Item]:
    """Every process's value, by rank, in all.

    Raises:
        LlavaRegionError: another process has failed or ended.
    """
    if world_size() == 1:
        return [value]
    if _meeting is not None:
        return _meeting.exchange(value)
    from torch import distributed

    values = [value] * world_size()
    distributed.all_gather_object(values, value)
    return values


def add_up(table: Tensor) -> Tensor:
    """The sum of a small CPU tensor over the processes, in all, written into `table` too."""
    if world_size() > 1:
        import torch

        table.copy_(torch.stack(gather(table)).sum(0))
    return table
