"""Stop a long pass between two batches: Ctrl-C, or the SIGTERM that torchrun and job schedulers send."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stop:
    """Waits for a signal; a second Ctrl-C raises KeyboardInterrupt.

    Attributes:
        number: of the first signal; 0: none has come.
    """

    def __init__(self) -> None:
        self.number = 0

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = self.number or number


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Yields a `Stop`; the signals' earlier handlers are back when the block ends."""
    stop = Stop()
    before = {number: signal.signal(number, stop._receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
