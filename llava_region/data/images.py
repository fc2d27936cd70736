"""Read pictures, a few batches ahead of the model, in worker threads."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from llava_region.errors import LlavaRegionError

Item = TypeVar("Item")
Result = TypeVar("Result")


class UnreadableImage(LlavaRegionError):
    """An image file is missing, or is no image that can be decoded to its end."""


def read_image(source: str | Path | bytes):
    """A picture, from a file or its encoded bytes, decoded whole, as a PIL image in RGB.

    Raises:
        UnreadableImage: says which file and why.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return image.convert("RGB")
    except Exception as e:  # PIL's decoders raise whatever a broken file leads them to
        name = f"an image of {len(source)} bytes" if isinstance(source, bytes) else source
        reason = "it is missing" if isinstance(e, FileNotFoundError) else f"{type(e).__name__}: {e}"
        raise UnreadableImage(f"cannot read {name} ({reason}); mend or replace the file") from e


def prefetch(function: Callable[[Item], Result], items: Iterable[Item], workers: int = 4) -> Iterator[tuple[Item, Result]]:
    """Yield (item, function(item)) in the items' order, with `2 * workers` calls at most ahead of the consumer.

    An exception of `function` is raised where its item's turn comes.
    """
    pool = ThreadPoolExecutor(workers)
    pending: deque = deque()
    try:
        for item in items:
            pending.append((item, pool.submit(function, item)))
            if len(pending) > 2 * workers:
                done, future = pending.popleft()
                yield done, future.result()
        while pending:
            done, future = pending.popleft()
            yield done, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
