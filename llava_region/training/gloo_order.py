"""A DeepSpeed defect that only gloo shows: ZeRO-3 gathers several parameters at once and waits for the last gather alone.

NCCL runs them in order, so on GPUs that is enough. Gloo has two threads: an earlier gather may end later and overwrite
what was loaded into the parameter meanwhile. Any module with a weight and a bias can end up with random weights.
Seen with DeepSpeed 0.16.9 and 0.18.9.
"""

from __future__ import annotations

from typing import Any


def wait_for_every_gather() -> None:
    """Make asynchronous gathers in this process complete before they are handed back. To be called before DeepSpeed starts."""
    import torch.distributed

    gather = torch.distributed.all_gather_into_tensor

    def all_gather_into_tensor(output_tensor: Any, input_tensor: Any, group: Any = None, async_op: bool = False) -> Any:
        handle = gather(output_tensor, input_tensor, group=group, async_op=async_op)
        if handle is not None:
            handle.wait()
        return handle

    torch.distributed.all_gather_into_tensor = all_gather_into_tensor
