"""Progress with time left, on stderr, for anything that takes more than a moment."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextmanager
def progress_bar(description: str, total: float | None, enabled: bool = True):
    """A bar that the caller advances: yields `advance(steps=1)`. Drawn on a terminal only."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not enabled or not console.is_terminal) as progress:
        task = progress.add_task(description, total=total)
        yield lambda steps=1: progress.advance(task, steps)


def track(items: Iterable, description: str, total: int | None = None, enabled: bool = True) -> Iterator:
    """Yield the items, with a bar."""
    total = len(items) if total is None and hasattr(items, "__len__") else total
    with progress_bar(description, total, enabled) as advance:
        for item in items:
            yield item
            advance()
