"""One writer per output: a lock that a dead process never keeps, on one machine or between the nodes of a shared file system.

`.NAME.lock` next to the output is locked with `flock`, which the kernel gives back when the process ends, however it ends. Its
content says who has it. Where `flock` reaches only one machine, or nothing at all (some network file systems), the time of the
file decides: its holder renews it every `BEAT` seconds, and after `STALE` seconds without that the holder counts as dead.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shlex
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path

from llava_region import processes
from llava_region.errors import LlavaRegionError

BEAT = 20.0  # seconds
STALE = 180.0  # several beats: network file systems hand on the time of a file with a delay of up to a minute
SETTLE = 0.5  # seconds for the note of a process that starts at the same moment, where there is no flock

_BUSY = (errno.EWOULDBLOCK, errno.EACCES)
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
_LONGEST = 200  # bytes of a name, which may have 255 with all that is put around it

_held: set[tuple[int, Path]] = set()  # by this process; a forked child has another number, and holds nothing


@contextmanager
def held(output: str | Path, wait: float = 0.0) -> Iterator[None]:
    """Hold an output, a file or a folder that need not exist yet, for the length of a block.

    Of the processes of one run the first holds it for all. Inside another such block of the same process and output, nothing is
    done. The folder of the output is made where it is missing.

    Args:
        wait: seconds to wait for the output to come free. `STALE` lets a run that a scheduler moved to another node outwait the
            one that it replaces.

    Raises:
        LlavaRegionError: another process has it; says which and since when. Or its folder is not writable.
    """
    path = Path(os.path.realpath(output))
    ours = (os.getpid(), path)
    if ours in _held or not processes.is_first():
        yield
        return
    made: list[Path] = []
    try:
        made = _make_parents(path)
        file, handle = _take(path, wait)
    except OSError as e:
        raise LlavaRegionError(f"cannot write {output}: {e.strerror}") from e
    _held.add(ours)
    done = threading.Event()
    heart = threading.Thread(target=_beat, args=(handle, done), name=f"heartbeat of {file.name}", daemon=True)
    heart.start()
    try:
        yield
    finally:
        if os.getpid() == ours[0]:  # not in a child that was forked inside the block and left it by an exception
            done.set()
            heart.join()  # before the handle's number can be another file's
            _held.discard(ours)
            _release(file, handle)
            for folder in made:  # nothing was written after all
                with suppress(OSError):
                    folder.rmdir()


def hidden(path: Path, ending: str = "") -> str:
    """The start of the name of a hidden file next to `path`: `.NAME.`, shortened where NAME is too long to be extended."""
    name = path.name
    if len(os.fsencode(name)) > _LONGEST:
        name = f"{os.fsdecode(os.fsencode(name)[: _LONGEST // 2])}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}"
    return f".{name}.{ending}"


@dataclass(frozen=True)
class _Note:
    """Who holds an output.

    Attributes:
        boot: differs between two machines, and between before and after a restart; started: of the process, in clock ticks after
            that; since: local time.
    """

    host: str
    boot: str
    pid: int
    started: int
    command: str
    since: str

    @classmethod
    def mine(cls) -> _Note:
        program = Path(sys.argv[0]).name.replace("__main__.py", "llava-region")
        command = shlex.join([program, *sys.argv[1:]])
        since = datetime.now().isoformat(" ", "seconds")
        return cls(socket.gethostname(), _boot(), os.getpid(), _started(os.getpid()), command[:200], since)

    @classmethod
    def read(cls, handle: int) -> _Note | None:
        """None while its holder has not written it yet, and where it is not one of ours."""
        try:
            found = json.loads(os.pread(handle, 1 << 16, 0))
            return cls(**{field.name: found[field.name] for field in fields(cls)})
        except (ValueError, KeyError, TypeError):
            return None

    def write(self, handle: int) -> None:
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(asdict(self)).encode(), 0)

    def may_be_alive(self, handle: int, folder: Path, flock: bool) -> bool:
        """Whether the process that wrote it may still run; `flock`: we have the lock, so on this machine nobody else has it."""
        if self.boot == _boot() and (flock or (self.host == socket.gethostname() and _started(self.pid) != self.started)):
            return False
        if self.host == socket.gethostname() and self.boot != _boot():
            return False  # the machine was restarted
        return _now(folder) - os.fstat(handle).st_mtime < STALE

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} has been writing it since {self.since} ({self.command})"


def _take(path: Path, wait: float) -> tuple[Path, int]:
    """The lock's file and its open handle."""
    deadline = time.monotonic() + wait
    while True:
        file, handle = _open(path)
        try:
            flock = _flock(handle)
            if not _is_still(file, handle):  # its holder removed it between our opening and locking it
                os.close(handle)
                continue
            note = _Note.read(handle)
            if flock is not False and not (note and note.may_be_alive(handle, file.parent, bool(flock))):
                mine = _Note.mine()
                mine.write(handle)
                if flock is None:
                    time.sleep(SETTLE)
                    note = _Note.read(handle)
                if flock or note == mine:
                    return file, handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
        if time.monotonic() >= deadline:
            who = str(note) if note else "another process is writing it"
            far = note is not None and note.boot != _boot()
            dead = f"; if that machine is gone, try again after {STALE:g} seconds" if far else ""
            raise LlavaRegionError(f"{path} is in use: {who}; wait for it, stop it, or give another output{dead}")
        time.sleep(min(1.0, max(0.0, deadline - time.monotonic())))


def _open(path: Path) -> tuple[Path, int]:
    file = path.parent / hidden(path, "lock")
    flags = os.O_RDWR | os.O_CREAT
    try:
        return file, os.open(file, flags, 0o666)
    except OSError as e:
        if e.errno not in _READ_ONLY or not path.is_dir():
            raise
    file = path / ".lock"  # a writable folder in one that is not, as mounts of containers are
    return file, os.open(file, flags, 0o666)


def _flock(handle: int) -> bool | None:
    """Whether we have it now; None where the file system has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        return False if e.errno in _BUSY else None
    return True


def _is_still(file: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.stat(file), os.fstat(handle))
    except FileNotFoundError:
        return False


def _release(file: Path, handle: int) -> None:
    with suppress(OSError):
        if _is_still(file, handle):
            file.unlink()  # while we have it: whoever opened it before sees in `_is_still` that it is gone
    with suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_UN)  # closing would not do where a forked child has inherited the handle
    os.close(handle)


def _beat(handle: int, done: threading.Event) -> None:
    while not done.wait(BEAT):
        with suppress(OSError):
            os.utime(handle)


def _now(folder: Path) -> float:
    """The time by the clock of the file system, which another machine's files have too."""
    with tempfile.TemporaryFile(dir=folder) as f:
        return os.fstat(f.fileno()).st_mtime


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _started(pid: int) -> int:
    """When a process started, which tells it from an earlier one with its number; 0 if there is none."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return 0


def _make_parents(path: Path) -> list[Path]:
    """Make the folder that the output is in; returns what was made, the innermost first."""
    missing = []
    for folder in path.parents:
        if folder.exists():
            break
        missing.append(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    return missing
