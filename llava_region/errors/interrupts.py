"""Ctrl-C and SIGTERM that are not lost, whatever code they reach."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

NUDGE = 0.2  # seconds


def signal_code(number: int) -> int:
    """The exit code of a process that a signal has ended, as shells and schedulers know it."""
    return 128 + number


@dataclass
class Interrupt:
    """A signal that is received, if one comes: it raises KeyboardInterrupt, so that what is half done is cleaned up.

    Libraries catch KeyboardInterrupt while they are imported (`except:` around an optional import) and go on, or make another
    error of it. So it is raised again until it arrives, but not while code that it has reached is cleaning up.

    Attributes:
        number: of the signal that came first; 0: none has come.
        after: the handler of each signal that is received, once it has arrived.
    """

    number: int = 0
    after: dict[int, Any] = field(default_factory=dict)
    _again: bool = False
    _arrived: threading.Event = field(default_factory=threading.Event)
    _process: int = field(default_factory=os.getpid)
    _thread: int = field(default_factory=threading.get_ident)

    def __post_init__(self) -> None:
        self._repeats = threading.Thread(target=self._raise_again, daemon=True)

    def receive(self, number: int, frame: FrameType | None) -> None:
        """The handler of the signals."""
        if os.getpid() == self._process:  # workers that were forked have no such thread
            again, self._again = self._again, False
            if self._arrived.is_set() or (again and _on_its_way(sys.exc_info()[1])):
                return
            if not self.number:
                self.number = number
                self._repeats.start()
        raise KeyboardInterrupt

    def _raise_again(self) -> None:
        while not self._arrived.wait(NUDGE):
            self._again = True
            signal.pthread_kill(self._thread, signal.SIGINT)

    def arrive(self) -> None:
        """Say that it need not come again, nor be received from now on."""
        self._arrived.set()
        if self.number:
            self._repeats.join()
        for number, handler in self.after.items():
            signal.signal(number, handler)


def _on_its_way(e: BaseException | None) -> bool:
    """Whether the exception that is handled now is a KeyboardInterrupt, or was raised because of one."""
    seen: set[int] = set()
    while e is not None and id(e) not in seen:
        if isinstance(e, KeyboardInterrupt):
            return True
        seen.add(id(e))
        e = e.__cause__ or e.__context__
    return False


@contextmanager
def received(whole_process: bool, terminate: bool) -> Iterator[Interrupt]:
    """Receive Ctrl-C for the length of a block, and SIGTERM if asked for, where they are not ignored or somebody else's.

    Args:
        whole_process: nothing else is done in this process afterwards.
    """
    found = Interrupt()
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield found
        return
    # Python waits for threads and exit functions at its end, and prints a traceback for Ctrl-C there
    found.after[signal.SIGINT] = signal.SIG_DFL if whole_process else signal.default_int_handler
    if terminate and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        found.after[signal.SIGTERM] = signal.SIG_DFL
    for number in found.after:
        signal.signal(number, found.receive)
    unraisable = sys.unraisablehook

    def quiet(what: Any) -> None:
        if not issubclass(what.exc_type, KeyboardInterrupt):  # raised in a destructor, where it cannot go on
            unraisable(what)

    sys.unraisablehook = quiet
    try:
        yield found
    finally:
        found.arrive()
        if not whole_process:
            sys.unraisablehook = unraisable
