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
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from pathlib import Path

from llava_region import processes
from llava_region.errors import LlavaRegionError

BEAT = 20.0  # seconds
STALE = 180.0  # several beats: network file systems hand on the time of a file with a delay of up to a minute
SETTLE = 0.5  # seconds for the note of a process that starts at the same moment, where flock does not tell

_BUSY = (errno.EWOULDBLOCK, errno.EACCES)
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
_LONGEST = 200  # bytes of a name, which may have 255 with all that is put around it

# file systems of one machine; on any other, flock may reach only the machine that it is called on
_OF_ONE_MACHINE = ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "ramfs", "overlay", "aufs")

_held: dict[Path, _Lock] = {}  # by this process
_guard = threading.Lock()  # of what is in there


@contextmanager
def held(output: str | Path, wait: float = 0.0) -> Iterator[None]:
    """Hold an output, a file or a folder that need not exist yet, for the length of a block.

    Inside another such block of the same process and output, nothing is done. Nor is it for a pipe or device. The folder of the
    output is made where it is missing.

    Args:
        wait: seconds to wait for the output to come free; a line says so. `STALE` lets a run that a scheduler moved to another
            node outwait the one that it replaces.

    Raises:
        LlavaRegionError: another process has it; says which and since when. Or its folder is not writable.
    """
    if is_stream(output):
        yield
        return
    path = Path(os.path.realpath(output))
    with _guard:
        lock = _held.get(path)
        if lock:
            lock.users += 1
    if lock is None:
        lock = _acquire(path, output, wait)
    try:
        yield
    finally:
        _leave(path, lock)


@contextmanager
def held_by_run(output: str | Path, wait: float = 0.0) -> Iterator[None]:
    """The same for all processes of a run, which have to enter it together: the first holds the output, and they are joined.

    Raises:
        LlavaRegionError: in all of them, where the first one is refused. One that went on alone would wait for it.
    """
    with processes.joined(), ExitStack() as stack:
        problem = None
        if processes.is_first():
            try:
                stack.enter_context(held(output, wait))
            except LlavaRegionError as e:
                problem = str(e)
        problem = processes.broadcast(problem)
        if problem:
            raise LlavaRegionError(problem)
        yield


def is_stream(path: str | Path) -> bool:
    """Whether a path is there, and is neither a file nor a folder: a named pipe, a terminal, /dev/null, ..."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


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
            that; namespace: of its number; since: local time.
    """

    host: str
    boot: str
    pid: int
    started: int
    namespace: str
    command: str
    since: str

    @classmethod
    def mine(cls) -> _Note:
        program = Path(sys.argv[0]).name.replace("__main__.py", "llava-region")
        command = shlex.join([program, *sys.argv[1:]])
        since = datetime.now().isoformat(" ", "seconds")
        return cls(socket.gethostname(), _boot(), os.getpid(), _started(os.getpid()), _namespace(), command[:200], since)

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
        if self.boot == _boot():
            if flock or (self.namespace == _namespace() and _started(self.pid) != self.started):
                return False
        elif self.host == socket.gethostname() and _seconds_since_beat(handle, folder) > _uptime():
            return False  # this machine was restarted since; another one of the same name is not this one
        return _seconds_since_beat(handle, folder) < STALE

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} has been writing it since {self.since} ({self.command})"


@dataclass(eq=False)
class _Lock:
    """An output that this process holds.

    Attributes:
        users: blocks that are open, of any thread; made: folders that were made for the output.
    """

    file: Path
    handle: int
    note: _Note
    users: int = 1
    made: list[Path] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)
    heart: threading.Thread | None = None

    def start(self) -> None:
        """Let its heart beat."""
        self.heart = threading.Thread(target=self._beat, name=f"heartbeat of {self.file.name}", daemon=True)
        self.heart.start()

    def _beat(self) -> None:
        while not self.done.wait(BEAT):
            with suppress(OSError):
                os.utime(self.handle)

    def release(self) -> None:
        """Give the output back, unless another process took it because this one had not beaten for too long."""
        self.done.set()
        if self.heart is not None and self.heart.ident is not None:
            self.heart.join()  # before the handle's number can be another file's
        with suppress(OSError):
            if _is_still(self.file, self.handle) and _Note.read(self.handle) == self.note:
                self.file.unlink()  # while we have it: whoever opened it before sees in `_is_still` that it is gone
        with suppress(OSError):
            fcntl.flock(self.handle, fcntl.LOCK_UN)  # closing would not do where a process that is being started has the handle too
        os.close(self.handle)
        for folder in self.made:  # nothing was written after all
            with suppress(OSError):
                folder.rmdir()


def _acquire(path: Path, output: str | Path, wait: float) -> _Lock:
    made: list[Path] = []
    try:
        made = _make_parents(path)
        lock = _take(path, wait)
    except OSError as e:
        raise LlavaRegionError(f"cannot write {output}: {e.strerror}") from e
    lock.made = made
    try:
        lock.start()
        with _guard:
            _held[path] = lock
    except BaseException:
        lock.release()
        raise
    return lock


def _leave(path: Path, lock: _Lock) -> None:
    with _guard:
        if _held.get(path) is not lock:  # in a child that was forked inside the block and left it by an exception
            return
        lock.users -= 1
        if lock.users:
            return
        del _held[path]
    lock.release()


def _forget() -> None:
    """In a forked child, which holds nothing: an open handle would keep the lock for as long as the child lives."""
    global _guard
    _guard = threading.Lock()
    for lock in _held.values():
        os.close(lock.handle)
    _held.clear()


os.register_at_fork(after_in_child=_forget)


def _take(path: Path, wait: float) -> _Lock:
    """The lock of an output, once nobody else has it."""
    deadline, said = time.monotonic() + wait, False
    while True:
        lock, note = _try(path)
        if lock:
            return lock
        who = str(note) if note else "another process is writing it"
        left = deadline - time.monotonic()
        if left <= 0:
            far = note is not None and note.boot != _boot()
            dead = f"; if that machine is gone, try again after {STALE:g} seconds" if far else ""
            raise LlavaRegionError(f"{path} is in use: {who}; wait for it, stop it, or give another output{dead}")
        if not said:
            print(f"{path} is in use: {who}; waiting up to {left:.0f} seconds for it", file=sys.stderr, flush=True)
            said = True
        time.sleep(min(1.0, left))


def _try(path: Path) -> tuple[_Lock | None, _Note | None]:
    """The lock, or None and who has it."""
    file, handle = _open(path)
    try:
        flock = _flock(handle)
        if not _is_still(file, handle):  # its holder removed it between our opening and locking it
            return _try(path)
        note = _Note.read(handle)
        if flock is False or (note and note.may_be_alive(handle, file.parent, bool(flock))):
            return None, note
        mine = _Note.mine()
        mine.write(handle)
        if flock is None or not _is_of_one_machine(file.parent):
            time.sleep(SETTLE)
            note = _Note.read(handle)
            if note != mine:
                return None, note
        lock, handle = _Lock(file, handle, mine), -1
        return lock, None
    finally:
        if handle >= 0:
            os.close(handle)


def _open(path: Path) -> tuple[Path, int]:
    file = path.parent / hidden(path, "lock")
    while True:
        with suppress(FileNotFoundError):
            return file, os.open(file, os.O_RDWR)
        try:
            return file, _create(file)
        except FileExistsError:  # made meanwhile
            continue
        except OSError as e:
            if e.errno not in _READ_ONLY or not path.is_dir():
                raise
            file = path / ".lock"  # a writable folder in one that is not, as mounts of containers are


def _create(file: Path) -> int:
    handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    with suppress(OSError):
        os.fchmod(handle, 0o666)  # in a folder that several people may write, each may take over from a dead process of another
    return handle


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


def _seconds_since_beat(handle: int, folder: Path) -> float:
    """By the clock of the file system, which another machine's files have too."""
    with tempfile.TemporaryFile(dir=folder) as f:
        return os.fstat(f.fileno()).st_mtime - os.fstat(handle).st_mtime


def _is_of_one_machine(folder: Path) -> bool:
    """Whether a folder is on a file system that no other machine has mounted."""
    number = os.stat(folder).st_dev
    device = f"{os.major(number)}:{os.minor(number)}"
    try:
        mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    except OSError:
        return False
    return any(fields[2] == device and fields[fields.index("-") + 1] in _OF_ONE_MACHINE for fields in mounts)


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _uptime() -> float:
    """Seconds since this machine was started."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _namespace() -> str:
    """Of process numbers: containers on one machine have their own."""
    try:
        return os.readlink("/proc/self/ns/pid")
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
