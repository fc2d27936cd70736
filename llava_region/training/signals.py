"""Signals that ask a training to stop: SIGTERM, SIGUSR1 and Ctrl-C (SIGINT), from the start of the process to its end.

Until training begins, the first of them ends the process at once. Then it is only noted: `stopping` asks for it after every optimizer
step. One that comes again ends the process at once, wherever it is. That is seen to by a thread: Python runs handlers of
signals between two of its own instructions only, and a rank whose neighbour is lost may wait in one instruction for ever.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import RawValue
from types import FrameType
from typing import Any

from llava_region import processes
from llava_region.errors import say

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
EXIT_CODE_FILE = "LLAVA_REGION_EXIT_CODE_FILE"  # set by the launchers of scripts/train, as torchrun's own exit code is always 1
COPIES = 3.0  # seconds: torchrun and deepspeed hand a signal on that has reached the ranks already


class Stopped(SystemExit):
    """Training was stopped by a signal; `code` is 128 plus its number, as shells have it.

    Attributes:
        number: of the signal.
        line: what to tell the user.
        agreed: whether all ranks stop here, with a checkpoint.
    """

    def __init__(self, number: int, line: str, agreed: bool = False):
        super().__init__(128 + number)
        self.number, self.line, self.agreed = number, line, agreed

    def exit_code(self) -> int:
        """The code to leave with, after it was noted for a launcher that asked for it.

        Such a launcher leaves with the code itself. So where all ranks stop together, they leave with 0: torchrun would
        report a failure otherwise.
        """
        noted = _note(128 + self.number)
        return 0 if noted and self.agreed else 128 + self.number


class Signals:
    """What has come so far.

    Attributes:
        number: of the first signal, 0 before.
        training: whether a signal has to wait for the end of a step, or of the last save.
        over: shared with the data loader's workers: whether the run needs them no longer.
        before: the handlers that were there.
    """

    def __init__(self) -> None:
        self.number = 0
        self.training = False
        self.over: Any = RawValue("b", 0)
        self.before: dict[signal.Signals, Any] = {}
        self._seen: set[int] = set()
        self._since = 0.0
        self._raised = False

    def note(self, number: int) -> None:
        """One more signal; ends the process if it is one that came before, or Ctrl-C after any."""
        now = time.monotonic()
        if not self.number:
            self.number, self._since = number, now
            if self.training:
                _say(f"{_name(number)}: stopping after this step; once more stops at once, without a checkpoint")
        elif "RANK" in os.environ and now - self._since < COPIES:
            pass
        elif number in self._seen or number == signal.SIGINT:
            _note(128 + number)
            _say(f"stopped at once by a second signal ({_name(number)}); run the same command again to resume from the last checkpoint")
            os._exit(128 + number)
        self._seen.add(number)

    def interrupt(self, number: int, frame: FrameType | None) -> None:
        """The handler, in the main thread.

        Raises:
            Stopped: training has not begun.
        """
        if not self.training and not self._raised:
            self._raised = True  # a second exception would come in the way of what the first one tidies up
            raise Stopped(number, f"stopped by {_name(number)} before training began; nothing was saved")


_listening: Signals | None = None


def current() -> Signals | None:
    """The signals of this run; None where they are not listened to, as under another program's own signal handlers."""
    return _listening


@contextmanager
def listening() -> Iterator[None]:
    """Listen for the length of a block; the handlers from before are back when it ends. Elsewhere than in the main thread, or
    inside another such block, nothing is done."""
    global _listening
    if _listening is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    signals = _listening = Signals()
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    woken = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    signals.before = {number: signal.signal(number, signals.interrupt) for number in SIGNALS}
    thread = threading.Thread(target=_watch, args=(signals, reading), name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signals.over.value = 1
        for number, handler in signals.before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        signal.set_wakeup_fd(woken)
        _listening = None
        os.close(writing)
        thread.join()
        os.close(reading)


def heeded(train: Callable[[], None]) -> int:
    """Run a training that heeds signals, and leave its process group however it ends.

    Returns:
        the exit code: 0, or that of the signal that stopped it.
    """
    with listening():
        try:
            train()
            code = 0
            _note(code)
        except Stopped as stopped:
            if processes.is_first() if stopped.agreed else processes.is_first_on_node():
                say(stopped.line, label="")
            code = stopped.exit_code()
        except BaseException:
            processes.leave(None)
            raise
        processes.leave(code)
        return code


def _watch(signals: Signals, reading: int) -> None:
    while arrived := os.read(reading, 64):
        for number in arrived:
            if number in SIGNALS:
                signals.note(number)


def _in_child() -> None:
    """Give a child that was forked the handlers from before, but for Ctrl-C and SIGUSR1: its parent decides about those."""
    global _listening
    if _listening is None:
        return
    before, _listening = _listening.before, None
    signal.set_wakeup_fd(-1)  # it is the parent's pipe
    signal.signal(signal.SIGTERM, before[signal.SIGTERM] or signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


os.register_at_fork(after_in_child=_in_child)


class Worker:
    """A data loader's `worker_init_fn`: the worker outlives a signal for the whole process group, as the step needs its batches."""

    def __init__(self, first: Callable[[int], None] | None, over: Any):
        self.first, self.over = first, over

    def __call__(self, number: int) -> None:
        signal.signal(signal.SIGTERM, self._terminated)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        if self.first is not None:
            self.first(number)

    def _terminated(self, number: int, frame: FrameType | None) -> None:
        if self.over.value:
            os._exit(0)


def _note(code: int) -> bool:
    """Tell the launcher that asked for it the exit code; returns whether one did."""
    path = os.environ.get(EXIT_CODE_FILE)
    if not path:
        return False
    try:
        with open(path, "w") as file:
            file.write(str(code))
    except OSError as e:
        _say(f"{EXIT_CODE_FILE} names {path}, which cannot be written: {e.strerror}")
        return False
    return True


def _name(number: int) -> str:
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def _say(line: str) -> None:
    if processes.is_first_on_node():
        say(line, label="")
