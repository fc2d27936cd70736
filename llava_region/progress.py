"""Progress with time left, on stderr, for anything that takes more than a moment."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Item = TypeVar("Item")


class Advance(Protocol):
    """Moves a bar on."""

    def __call__(self, steps: float = 1) -> None: ...


def console(stderr: bool = False, highlight: bool = True, soft_wrap: bool = False) -> Console:
    """Where tables and bars are drawn; without colours and bold letters under NO_COLOR, of which rich keeps the latter."""
    colours = None if os.environ.get("NO_COLOR") else "auto"
    return Console(stderr=stderr, highlight=highlight, soft_wrap=soft_wrap, color_system=colours)


def deepspeed_on_stderr() -> None:
    """Have what DeepSpeed logs, which begins while it is imported, on stderr: its own handler writes to stdout, which is for results."""
    screen = logging.StreamHandler()

    def there(record: logging.LogRecord) -> bool:
        screen.handle(record)
        return False

    log = logging.getLogger("DeepSpeed")
    if not log.filters:
        log.addFilter(there)


@contextmanager
def progress_bar(description: str, total: float | None, enabled: bool = True) -> Iterator[Advance]:
    """A bar that the caller advances: yields `advance(steps=1)`. Drawn on a terminal only."""
    screen = console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=screen, disable=not enabled or not screen.is_terminal) as progress:
        task = progress.add_task(description, total=total)
        yield lambda steps=1: progress.advance(task, steps)


def track(items: Iterable[Item], description: str, total: int | None = None, enabled: bool = True) -> Iterator[Item]:
    """Yield the items, with a bar."""
    total = len(items) if total is None and isinstance(items, Sized) else total
    with progress_bar(description, total, enabled) as advance:
        for item in items:
            yield item
            advance()
