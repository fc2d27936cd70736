"""How every command line of this package ends: with one line and an exit code, never a traceback.

Exit codes: 2 for what a user can fix, 70 for an unforeseen exception, 130 after Ctrl-C, 141 where nobody reads the output any more.
"""

from __future__ import annotations

import errno
import io
import os
import platform
import re
import select
import shlex
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from llava_region import processes
from llava_region.errors import LlavaRegionError, say

BAD_INPUT, UNFORESEEN, INTERRUPTED, NO_READER = 2, 70, 130, 141
NUDGE = 0.2  # seconds

_SYSTEM = {
    errno.ENOSPC: "free some space, or write to another disk",
    errno.EDQUOT: "free some space, or write to another disk",
    errno.EROFS: "give another folder",
    errno.EACCES: "change the permissions, or give another path",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.EMFILE: "raise the limit with 'ulimit -n'",
    errno.EPIPE: "what reads it has ended",
    errno.EIO: "look at the disk, or at the network file system",
}
_GPU_FULL = re.compile(r"CUDA(?: error)?: out of memory|CU(?:BLAS|DNN)_STATUS_ALLOC_FAILED|Cuda failure (?:\d+ )?'out of memory'")
_MEMORY_FULL = re.compile(r"DefaultCPUAllocator: (?:can't allocate|not enough) memory")
# libraries in C++ and Rust report a full disk in words of their own
_DISK_FULL = re.compile(r"No space left on device|Disk quota exceeded|PytorchStreamWriter failed writing file")
# what gloo and NCCL say in the processes that wait for one that has ended
_PEER_LOST = re.compile(r"(?i)connection (?:closed|reset) by peer|remote peer closed|ncclRemoteError")
_SECRET = re.compile(r"(?i)(token|password|secret|api[-_]?key)$")


@dataclass(frozen=True)
class Program:
    """A command line, as far as its end needs to know it.

    Attributes:
        name: starts the name of the file that a traceback is written to; argv: its arguments.
        debug: show tracebacks, and write no file.
        folders: where that file goes: the first one that can be written, else the current folder, else the system's for temporary files.
        smaller: what to do where memory is full.
        long: a training: every exception's traceback is kept in the file, and a reader that leaves is an error.
    """

    name: str
    argv: Sequence[str]
    debug: bool = False
    folders: Sequence[str] = ()
    smaller: str = "give a smaller --batch-size, another --device, or --dtype bfloat16, where the command has them"
    long: bool = False


def guarded(work: Callable[[], int], program: Program, whole_process: bool) -> int:
    """Run a command; whatever goes wrong ends in one line on stderr and an exit code, which is returned.

    An unforeseen exception is written to a file, with the command line and all versions. That is the last line of defence:
    what a user can fix should be a `LlavaRegionError`. SystemExit passes.

    Args:
        whole_process: nothing else is done in this process afterwards, so Ctrl-C may end it at once from then on.
    """
    if whole_process and isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name need not be text, nor all text ASCII
    with _interrupts(whole_process) as interrupts:
        try:
            code = work()
            _flush()
            interrupts.arrive()
        except BaseException as e:
            interrupts.arrive()
            code = _interrupted() if interrupts.received else _end(e, program)
        else:
            code = _interrupted() if interrupts.received else code
        finally:
            _leave_nothing_to_flush()
    return code


def _end(e: BaseException, program: Program) -> int:
    """Say what happened; returns the exit code.

    Raises:
        SystemExit: it was one.
    """
    if isinstance(e, KeyboardInterrupt):
        return _interrupted()
    pipe = e.__context__ if isinstance(e, SystemExit) else e  # typer makes SystemExit(1) of it
    if isinstance(pipe, BrokenPipeError) and any(map(_has_no_reader, (sys.stdout, sys.stderr))):
        if program.long:
            say("nobody reads the output any more (its pipe was closed); send it to a file, and start again")
        return NO_READER
    if not isinstance(e, Exception):
        raise e
    if program.debug:
        with suppress(OSError):
            traceback.print_exception(e)
    if isinstance(e, LlavaRegionError):
        if _place()[2]:  # not on the first node alone: what is wrong may be wrong on one of them
            say(str(e))
        return BAD_INPUT
    known = _known(e, program)
    lost = not known and isinstance(e, RuntimeError) and _PEER_LOST.search(str(e))
    why = f"another process of this run has ended, and its own output says why: {_short(e)}" if lost else known or _short(e)
    text = f"{_rank()}{why}"
    if program.debug or (known and not program.long):
        say(text)
    else:
        file = _write_log(e, program)
        label = "traceback" if known or lost else "unforeseen; traceback, versions and command line"
        say(f"{text} ({label}: {file or 'could not be written anywhere'}; --debug shows the traceback)")
        if file is None:
            with suppress(OSError):
                traceback.print_exception(e)
    return BAD_INPUT if known else UNFORESEEN


def gpu_is_full(e: Exception) -> bool:
    """Whether an exception says that a GPU has no memory left: torch's own class, or plain errors of CUDA and its libraries."""
    return any(kind.__name__ == "OutOfMemoryError" for kind in type(e).__mro__) or bool(_GPU_FULL.search(str(e)))


def _known(e: Exception, program: Program) -> str | None:
    """What to say about an exception that a machine's limits explain."""
    text = str(e)
    if gpu_is_full(e):
        return f"the GPU's memory is full; {program.smaller}: {_short(e)}"
    if isinstance(e, MemoryError) or _MEMORY_FULL.search(text):
        return f"this machine's memory is full; {program.smaller}, or use a machine with more: {_short(e)}"
    if isinstance(e, OSError) and e.errno in _SYSTEM:
        where = f"{os.fsdecode(e.filename)}: " if isinstance(e.filename, str | bytes) else ""
        return f"{where}{e.strerror}; {_SYSTEM[e.errno]}"
    if _DISK_FULL.search(text):
        return f"a file could not be written whole; {_SYSTEM[errno.ENOSPC]}: {_short(e)}"
    return None


def _short(e: BaseException, longest: int = 300) -> str:
    text = " ".join(str(e).split())
    text = text if len(text) <= longest else f"{text[:longest]} ..."
    return f"{type(e).__name__}: {text}" if text else type(e).__name__


def _place() -> tuple[int, int, bool]:
    """Number of this process, how many there are, and whether it is the first on its node."""
    try:
        return processes.rank(), processes.world_size(), processes.is_first_on_node()
    except ValueError:  # RANK and the like are not numbers, which may be the very error
        return 0, 1, True


def _rank() -> str:
    rank, ranks, _ = _place()
    return f"rank {rank}: " if ranks > 1 else ""


def _write_log(e: BaseException, program: Program) -> Path | None:
    """A new file with a traceback and what is needed to understand it; None where no folder can be written."""
    text = "\n".join([*_circumstances(program), "", "".join(traceback.format_exception(e))])
    start = f"{program.name}-{time.strftime('%Y%m%d-%H%M%S')}-{f'rank{_place()[0]}-' if _rank() else ''}"
    for folder in (*program.folders, os.curdir, tempfile.gettempdir()):
        with suppress(OSError):
            handle, name = tempfile.mkstemp(dir=folder, prefix=start, suffix=".log")
            with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as f:
                f.write(text)
            return Path(name).absolute()
    return None


def _circumstances(program: Program) -> Iterator[str]:
    from importlib.metadata import distributions

    yield f"command line: {program.name} {shlex.join(_without_secrets(program.argv))}"
    yield f"folder: {os.environ.get('PWD')}"  # the current one may be gone
    yield f"process: rank {_place()[0]} of {_place()[1]}, {platform.node()}"
    yield f"python {platform.python_version()} ({sys.executable}), {platform.platform()}"
    yield f"package: {Path(__file__).parents[1]}"
    yield "installed: " + " ".join(sorted({f"{one.metadata['Name']}=={one.version}" for one in distributions()}, key=str.lower))


def _without_secrets(argv: Sequence[str]) -> Iterator[str]:
    hide = False
    for arg in argv:
        name, sign, _ = arg.partition("=")
        secret = arg.startswith("-") and bool(_SECRET.search(name))
        yield f"{name}=***" if secret and sign else "***" if hide and not arg.startswith("-") else arg
        hide = secret and not sign


def _flush() -> None:
    """Write out what was printed, so that it fails here and not when Python ends.

    Raises:
        BrokenPipeError: nobody reads it any more.
        LlavaRegionError: it cannot be written, such as to a full disk.
    """
    if sys.stdout is None or sys.stdout.closed:
        return
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as e:
        raise LlavaRegionError(f"cannot write to standard output: {e.strerror}") from e


def _leave_nothing_to_flush() -> None:
    """Let what cannot be written go, so that Python, which tries again at its end, does not print about it."""
    for stream in (sys.stdout, sys.stderr):
        if stream is None or stream.closed:
            continue
        try:
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def _has_no_reader(stream: TextIO | None) -> bool:
    """Whether a stream is a pipe that is closed at its other end."""
    if stream is None:
        return False
    poll = select.poll()
    try:
        poll.register(stream.fileno(), 0)
    except (OSError, ValueError):  # not a file, or a closed one
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _interrupted() -> int:
    if _place()[2]:
        say("interrupted", label="")
    return INTERRUPTED


@dataclass
class _Interrupts:
    """Ctrl-C that is not lost.

    Libraries catch KeyboardInterrupt while they are imported (`except:` around an optional import) and go on, or make another
    error of it. So it is raised again until it arrives, but not while code that it has reached is cleaning up.
    """

    after: Callable[[int, FrameType | None], Any] | int | None = None  # the handler of SIGINT once it has arrived; None: not ours
    received: bool = False
    _again: bool = False
    _arrived: threading.Event = field(default_factory=threading.Event)
    _process: int = field(default_factory=os.getpid)
    _thread: int = field(default_factory=threading.get_ident)

    def __post_init__(self) -> None:
        self._repeats = threading.Thread(target=self._raise_again, daemon=True)

    def receive(self, number: int, frame: FrameType | None) -> None:
        """The handler of SIGINT."""
        if os.getpid() == self._process:  # workers that were forked have no such thread
            again, self._again = self._again, False
            if self._arrived.is_set() or (again and _on_its_way(sys.exc_info()[1])):
                return
            if not self.received:
                self.received = True
                self._repeats.start()
        raise KeyboardInterrupt

    def _raise_again(self) -> None:
        while not self._arrived.wait(NUDGE):
            self._again = True
            signal.pthread_kill(self._thread, signal.SIGINT)

    def arrive(self) -> None:
        """Say that it need not come again, nor be received from now on."""
        self._arrived.set()
        if self.received:
            self._repeats.join()
        if self.after is not None:
            signal.signal(signal.SIGINT, self.after)


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
def _interrupts(whole_process: bool) -> Iterator[_Interrupts]:
    """Receive Ctrl-C for the length of a block, where it is not ignored or somebody else's."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield _Interrupts()
        return
    # Python waits for threads and exit functions at its end, and prints a traceback for Ctrl-C there
    found = _Interrupts(after=signal.SIG_DFL if whole_process else signal.default_int_handler)
    signal.signal(signal.SIGINT, found.receive)
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
