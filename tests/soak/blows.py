"""What happens to running work: killed, told to stop, out of disk space, started twice."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import psutil

from tests.helpers.training_runs import environment

CHECKOUT = Path(__file__).parents[2]
LIMIT = 600  # seconds for one process, on a machine that does other things too
# mounts a disk of SIZE kB at DISK, which only the command sees, and keeps what it wrote there
ON_A_SMALL_DISK = """
disk=$1 size=$2 kept=$3; shift 3
mount -t tmpfs -o "size=${size}k" none "$disk" || exit 99
[ -d "$kept" ] && { cp -a "$kept/." "$disk" || exit 99; }
"$@"; code=$?
rm -rf "$kept" && mkdir "$kept" && cp -a "$disk/." "$kept" || exit 99
exit $code
"""


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        hit: it was still running when the blow came.
    """

    code: int
    printed: str
    seconds: float
    hit: bool = False


class Running:
    """A process that was started, with all its output in a file: a pipe would stay open in what a killed launcher leaves."""

    def __init__(self, command: list[str]) -> None:
        self.log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (closed in `end`)
        self.began = time.monotonic()
        self.process = subprocess.Popen(command, cwd=CHECKOUT, env=environment(), stdout=self.log, stderr=subprocess.STDOUT)

    def after(self, seconds: float) -> bool:
        """Whether it still runs then."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return True
        return False

    def everyone(self) -> list[psutil.Process]:
        """It and all that it started."""
        first = psutil.Process(self.process.pid)
        return [first, *first.children(recursive=True)]

    def end(self, hit: bool = False) -> Ended:
        """Wait for its end."""
        if self.after(LIMIT):
            send(self.everyone(), signal.SIGKILL)
            raise AssertionError(f"{self.process.args} does not end")
        with self.log:
            self.log.seek(0)
            return Ended(self.process.returncode, self.log.read(), time.monotonic() - self.began, hit)


def send(processes: list[psutil.Process], number: signal.Signals) -> None:
    """A signal to all of these that still run."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def run(command: list[str]) -> Ended:
    """To its end, undisturbed."""
    return Running(command).end()


def killed(command: list[str], moment: float) -> Ended:
    """SIGKILL to all its processes after `moment` seconds."""
    running = Running(command)
    hit = running.after(moment)
    if hit:
        everyone = running.everyone()
        send(everyone, signal.SIGKILL)
        psutil.wait_procs(everyone[1:], timeout=LIMIT)
    return running.end(hit)


def stopped(command: list[str], moment: float) -> Ended:
    """SIGTERM after `moment` seconds to the process that was started, as a scheduler does."""
    running = Running(command)
    hit = running.after(moment)
    if hit:
        running.process.terminate()
    return running.end(hit)


def twice(command: list[str], moment: float) -> list[Ended]:
    """The same once more after `moment` seconds; both to their ends."""
    first = Running(command)
    hit = first.after(moment)
    second = Running(command)
    return [first.end(hit), second.end(hit)]


def kilobytes(folder: Path) -> int:
    """What a folder takes on a disk in memory, which gives whole pages of 4 KiB."""
    return 4 * sum(1 + path.stat().st_size // 4096 for path in (folder, *folder.rglob("*")))


def out_of_space(command: list[str], folder: Path, kilobytes: int) -> Ended:
    """On a disk of this size, mounted at `folder`, in which the command writes."""
    kept = folder.with_name(folder.name + ".kept")
    if folder.exists():
        os.rename(folder, kept)
    folder.mkdir()
    ended = run(["unshare", "-rm", "sh", "-c", ON_A_SMALL_DISK, "sh", str(folder), str(kilobytes), str(kept), *command])
    assert ended.code != 99, ended.printed
    folder.rmdir()
    os.rename(kept, folder)
    return replace(ended, hit=ended.code != 0)


@cache
def can_mount() -> bool:
    """Whether this user may have a disk of its own (user namespaces are off in some containers)."""
    with tempfile.TemporaryDirectory() as folder:
        mount = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", folder]
        return shutil.which("unshare") is not None and subprocess.run(mount, capture_output=True).returncode == 0
