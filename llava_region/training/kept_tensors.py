"""The tensors that a forward pass keeps for its backward pass: those of one layer, and the most of a whole step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map


def kept_by(function: Callable[..., Any], *arguments: Any) -> tuple[Any, int]:
    """Run a function on tensors that need gradients, and count the bytes of what it made that lives on for the backward pass.

    Whatever holds it is counted: autograd, or a function that keeps tensors out of autograd's sight, as bitsandbytes' product in 8 bits
    does with its input. What was there before (arguments, parameters) is not.

    Returns:
        a copy of the output, cut off from its graph; the bytes.
    """
    with _Made() as made:
        output = function(*arguments)
    copy = tree_map(lambda part: part.detach().clone() if isinstance(part, torch.Tensor) else part, output)
    graph = [part.grad_fn for part in tree_flatten(output)[0] if isinstance(part, torch.Tensor)]  # it holds what is kept, not the output
    del output
    kept = made.alive()
    del graph
    return copy, kept


class _Made(TorchDispatchMode):
    """Within the block, notes the storages that operations make. Those that they are given and nobody made were there before."""

    def __init__(self) -> None:
        super().__init__()
        self._bytes: dict[StorageWeakRef, int] = {}  # 0: was there before

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        for storage in _storages((args, kwargs)):
            self._bytes.setdefault(StorageWeakRef(storage), 0)
        output = func(*args, **kwargs or {})
        for storage in _storages(output):
            self._bytes.setdefault(StorageWeakRef(storage), storage.nbytes())
        return output

    def alive(self) -> int:
        """Bytes of those made that somebody still holds."""
        return sum(size for storage, size in self._bytes.items() if not storage.expired())


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    return (value.untyped_storage() for value in tree_flatten(values)[0] if isinstance(value, torch.Tensor))


@contextmanager
def saved_peak() -> Iterator[Callable[[], int]]:
    """Follow what autograd keeps for the backward pass within the block, forward and backward on this thread (so: on CPU).

    Yields a function that returns the most bytes that were alive at once, parameters not counted. What a checkpoint keeps,
    and what it computes again, is included.
    """
    users: dict[tuple[int, int], int] = {}
    alive = peak = 0

    class Kept:
        def __init__(self, tensor: torch.Tensor) -> None:
            nonlocal alive, peak
            self.tensor, self.storage = tensor, _storage(tensor)
            users[self.storage] = users.get(self.storage, 0) + 1
            alive += self.storage[1] if users[self.storage] == 1 else 0
            peak = max(peak, alive)

        def __del__(self) -> None:
            nonlocal alive
            users[self.storage] -= 1
            if not users[self.storage]:
                del users[self.storage]
                alive -= self.storage[1]

    def pack(tensor: torch.Tensor) -> torch.Tensor | Kept:
        return tensor if isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter) else Kept(tensor)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor if isinstance(kept, Kept) else kept):
        yield lambda: peak


def _storage(tensor: torch.Tensor) -> tuple[int, int]:
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()
