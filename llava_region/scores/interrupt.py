"""Stop a long pass between two batches: Ctrl-C, or the SIGTERM that torchrun and job schedulers send."""

from __future__ import annotations

import signal
from contextlib import contextmanager


class Stop:
    """`requested` turns true with the first signal; a second Ctrl-C raises KeyboardInterrupt."""

    def __init__(self):
        self.requested = False

    def _receive(self, number, frame):
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True


@contextmanager
def stop_on_signals():
    """Yields a `Stop`; the signals' earlier handlers are back when the block ends."""
    stop = Stop()
    before = {number: signal.signal(number, stop._receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
