"""How every command line of this package ends: with one line and an exit code, never a traceback.

Exit codes: 2 for what a user can fix, 70 for an unforeseen exception, 130 after Ctrl-C, 143 after SIGTERM, 141 where nobody reads the
output any more.
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
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from llava_region import processes
from llava_region.errors import LlavaRegionError, say
from llava_region.errors.interrupts import received, signal_code

BAD_INPUT, UNFORESEEN, NO_READER = 2, 70, 141

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
        whole_process: nothing else is done in this process afterwards, so signals may end it at once from then on. Only then a tool
            receives SIGTERM as it does Ctrl-C: elsewhere it is to end more than the tool.
    """
    if whole_process and isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name need not be text, nor all text ASCII
    with received(whole_process, terminate=whole_process and not program.long) as interrupt:
        try:
            code = work()
            _flush()
            interrupt.arrive()
        except BaseException as e:
            interrupt.arrive()
            code = _stopped(interrupt.number) if interrupt.number else _end(e, program)
        else:
            code = _stopped(interrupt.number) if interrupt.number else code
        finally:
            _leave_nothing_to_flush()
    return code


def _end(e: BaseException, program: Program) -> int:
    """Say what happened; returns the exit code.

    Raises:
        SystemExit: it was one.
    """
    if isinstance(e, KeyboardInterrupt):
        return _stopped(signal.SIGINT)
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


def _stopped(number: int) -> int:
    if _place()[2]:
        say("interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}", label="")
    return signal_code(number)
