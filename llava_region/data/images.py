"""Read pictures, a few batches ahead of the model, in worker threads."""

from __future__ import annotations

import io
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from llava_region.errors import LlavaRegionError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

Item = TypeVar("Item")
Result = TypeVar("Result")


class UnreadableImage(LlavaRegionError):
    """An image is missing, cannot be decoded to its end, or is of a shape that the model's image processor refuses."""

    def __init__(self, source: str | Path | bytes, cause: Exception) -> None:
        """`source`: the image's file, or its encoded bytes; `cause`: what the decoder or the image processor raised."""
        name = f"an image of {len(source)} bytes" if isinstance(source, bytes) else source
        reason = "it is missing" if isinstance(cause, FileNotFoundError) else f"{type(cause).__name__}: {cause}"
        super().__init__(f"cannot read {name} ({reason}); fix or replace the file")


def read_image(source: str | Path | bytes) -> Image:
    """A picture, from a file or its encoded bytes, decoded whole, as a PIL image in RGB.

    Raises:
        UnreadableImage: says which file and why.
    """
    with _opened(source) as image:
        return image.convert("RGB")


def read_pixels(source: str | Path | bytes, pixel_values: Callable[[Image], Tensor]) -> Tensor:
    """A picture as a model takes it, (3, H, W).

    Args:
        pixel_values: the model's, `LoadedModel.pixel_values`.

    Raises:
        UnreadableImage: says which file and why.
    """
    image = read_image(source)
    try:
        return pixel_values(image)
    except LlavaRegionError:
        raise
    except ValueError as e:  # the image processor's, for one pixel's height and the like
        raise UnreadableImage(source, e) from e


def image_problem(path: str | Path, picture_problem: Callable[[int, int], str | None] = lambda width, height: None) -> str | None:
    """Why an image file cannot be decoded to its end (`missing`, or `corrupt: ` and the kind of error) or used, or None.

    Args:
        picture_problem: why an image of this width and height cannot be used, or None.
    """
    if not os.path.isfile(path):  # False for a name that is too long
        return "missing"
    try:
        with _opened(path) as image:
            size = image.size  # as it is stored: neither upstream turns it as EXIF says, and `draft` makes it smaller
            image.draft("RGB", (32, 32))  # lets JPEG decode at a fraction of its size; the whole file is read all the same
            image.load()
    except UnreadableImage as e:
        return f"corrupt: {type(e.__cause__).__name__}"
    return picture_problem(*size)


@contextmanager
def _opened(source: str | Path | bytes) -> Iterator[Image]:
    """A PIL image to decode inside the block; what goes wrong there is raised as `UnreadableImage`."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            yield image
    except Exception as e:  # PIL's decoders raise whatever a broken file leads them to; a decompression bomb is not an OSError
        raise UnreadableImage(source, e) from e


def prefetch(function: Callable[[Item], Result], items: Iterable[Item], workers: int = 4) -> Iterator[tuple[Item, Result]]:
    """Yield (item, function(item)) in the items' order, with `2 * workers` calls at most ahead of the consumer.

    An exception of `function` is raised where its item's turn comes.
    """
    pool = ThreadPoolExecutor(workers)
    pending: deque[tuple[Item, Future[Result]]] = deque()
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
