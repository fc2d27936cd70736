"""Read JSON, and write files whole: under a temporary name first, so that a killed command leaves nothing under the final one."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llava_region import locks
from llava_region.errors import LlavaRegionError


def write_text(path: str | Path, text: str) -> None:
    """Write a text file (UTF-8) so that its name only ever holds the whole text.

    Raises:
        LlavaRegionError: the folder is not writable.
    """
    # half of a pair, as in names that are not text, becomes \udcff, which JSON reads back
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file so that its name only ever holds all of it; a link stays, and the file that it leads to is written.

    A pipe or device, such as `/dev/stdout`, gets the data as it is: there is no file to replace.

    Raises:
        LlavaRegionError: the folder is not writable, the disk is full, or `path` is a folder.
    """
    if locks.is_stream(path):
        _send(path, data)
        return
    final = follow_links(path)
    try:
        if final.is_dir():
            raise LlavaRegionError(f"{path} is a folder; give the name of a file")
        final.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=final.parent, prefix=locks.hidden(final), suffix=".partial")
    except OSError as e:
        raise LlavaRegionError(f"cannot write {path}: {e.strerror}") from e
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes files that only their owner may read
        os.replace(temporary, final)
    except BaseException as e:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(e, OSError):
            raise LlavaRegionError(f"cannot write {path}: {e.strerror}") from e
        raise


def _send(path: str | Path, data: bytes) -> None:
    try:
        with open(path, "wb") as f:
            f.write(data)
    except BrokenPipeError:  # its reader has seen enough
        raise
    except OSError as e:
        raise LlavaRegionError(f"cannot write {path}: {e.strerror}") from e


def write_json(path: str | Path, data: Any) -> None:
    """`write_text` of indented JSON with a final newline."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def read_bytes(path: str | Path) -> bytes:
    """The content of a file.

    Raises:
        LlavaRegionError: it cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as e:
        raise LlavaRegionError(f"cannot read {path}: {e.strerror}") from e


def parse_json(data: bytes, path: str | Path) -> Any:
    """JSON that was read from `path`.

    Raises:
        LlavaRegionError: it is not JSON.
    """
    try:
        return json.loads(data.decode("utf-8"))
    except RecursionError:
        raise LlavaRegionError(f"{path} is not valid JSON: lists or objects are nested too deeply") from None
    except ValueError as e:
        if _is_json_lines(data):
            raise LlavaRegionError(
                f"{path} is JSON lines, one value per line; allowed: one JSON value. Make one list of it: jq -s . {shlex.quote(str(path))}"
            ) from e
        raise LlavaRegionError(f"{path} is not valid JSON: {e}") from e


def _is_json_lines(data: bytes) -> bool:
    """Whether the first two lines are JSON objects or lists each."""
    try:
        lines = data.strip().split(b"\n", 2)[:2]
        return len(lines) == 2 and all(isinstance(json.loads(line), dict | list) for line in lines)
    except (ValueError, RecursionError):
        return False


def read_json(path: str | Path) -> Any:
    """Read and parse a JSON file.

    Raises:
        LlavaRegionError: it cannot be read or is not JSON.
    """
    return parse_json(read_bytes(path), path)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


@contextmanager
def output_folder(path: str | Path, force: bool = False) -> Iterator[Path]:
    """A folder to fill, which appears under `path` only when the block ends without an error.

    Yields a temporary folder next to the final one, `.NAME.RANDOM.partial`; what earlier killed runs left there is removed. The
    output is locked meanwhile (see `locks.held`). Where a file system's locks fail, two writers still cannot mix: one of them wins,
    the other is refused, and with `force` the last one wins.

    A link stays a link, and the folder that it leads to is made or replaced: it is how people put results on another disk.

    Raises:
        LlavaRegionError: `path` exists and is not an empty folder, and `force` is not set; or it is a file, a folder that cannot be
            replaced (the current one, a mount point), a link that leads nowhere, or too long a name; another process is writing it,
            or its parent is not writable.
    """
    refuse_existing(path, force)
    final = follow_links(path)
    if final.exists() and not final.is_dir():
        raise LlavaRegionError(f"{path} is a file; give a folder")
    _refuse_irreplaceable(path, final)
    with locks.held(final):
        _clear_up(final)
        refuse_existing(final, force)
        temporary = _new_folder(final, "partial")
        try:
            yield temporary
            _put_in_place(temporary, final, force)
        except BaseException as e:
            if isinstance(e, OSError) and not temporary.exists():  # see `_clear_up`
                raise LlavaRegionError(f"{final} is in use: another process writes it now; wait for it, or give another output") from e
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def follow_links(path: str | Path) -> Path:
    """Where an output really goes: absolute, without links; it need not exist.

    Raises:
        LlavaRegionError: a link leads in a circle, or into a folder that does not exist.
    """
    final = Path(os.path.realpath(path))
    try:
        if final.is_symlink():
            raise LlavaRegionError(f"{path} is a link that leads in a circle; remove it, or give another output")
        # whoever made the link meant a folder that is not there now, such as a disk that is not mounted
        if Path(path).is_symlink() and not final.parent.is_dir():
            raise LlavaRegionError(f"{path} is a link to {final}, whose folder does not exist; make that folder, or give another output")
    except OSError as e:
        raise LlavaRegionError(f"cannot write {path}: {e.strerror}") from e
    return final


def _refuse_irreplaceable(path: str | Path, final: Path) -> None:
    """Refuse a folder that cannot be replaced as a whole.

    Raises:
        LlavaRegionError: says why.
    """
    if not final.exists():
        return
    here = Path.cwd()
    if here.is_relative_to(final):
        why = "the current folder" if here == final else "a folder that the current one is in"
    elif os.path.ismount(final):
        why = "a mount point"
    else:
        return
    raise LlavaRegionError(f"{path} is {why}, which cannot be replaced as a whole; give a folder in it, such as {Path(path) / 'output'}")


def _new_folder(final: Path, ending: str) -> Path:
    """A new hidden folder next to `final`, with the usual permissions."""
    try:
        folder = Path(tempfile.mkdtemp(dir=final.parent, prefix=locks.hidden(final), suffix=f".{ending}"))
        folder.chmod(0o777 & ~_umask())  # mkdtemp makes folders that only their owner may read
    except OSError as e:
        raise LlavaRegionError(f"cannot write {final}: {e.strerror}") from e
    return folder


def _clear_up(final: Path) -> None:
    """Undo what killed runs left; whoever holds the output's lock knows that their processes are gone.

    An output that one of them had put aside to replace it goes back, as there is no other. The rest is removed. Each is renamed
    before it is emptied: should a process write there after all, then it fails, and its output lacks no file.
    """
    # 0.1.0 had one name for all runs
    own = re.compile(re.escape(locks.hidden(final)) + r"(?:[a-z0-9_]{8}\.)?(partial|old)")
    left = [(found[1], path) for path in final.parent.iterdir() if (found := own.fullmatch(path.name)) and path.is_dir()]
    for kind, path in left:
        with suppress(OSError):  # another process was faster, or may not be disturbed
            if kind == "old" and not final.exists() and any(path.iterdir()):
                os.rename(path, final)
                continue
            gone = _new_folder(final, "old")
            try:
                os.rename(path, gone)
            finally:
                shutil.rmtree(gone, ignore_errors=True)


def _put_in_place(temporary: Path, final: Path, force: bool) -> None:
    """Rename a whole folder to its final name: nothing that is there is lost without `force`.

    Raises:
        LlavaRegionError: another process, which no lock kept out, has written `final` meanwhile and `force` is not set.
    """
    aside: list[Path] = []
    try:
        while not _renamed(temporary, final):
            refuse_existing(final, force)
            aside.append(_new_folder(final, "old"))
            with suppress(FileNotFoundError):  # another process has just moved it away
                os.rename(final, aside[-1])
    except BaseException as e:
        if aside:
            with suppress(OSError):  # fails where there is one again
                os.rename(aside[-1], final)
        if isinstance(e, OSError) and temporary.exists():
            raise LlavaRegionError(f"cannot write {final}: {e.strerror}") from e
        raise
    finally:
        for old in aside:
            shutil.rmtree(old, ignore_errors=True)


def _renamed(folder: Path, final: Path) -> bool:
    """Rename a folder, also to the name of an empty one; False where there is one with content."""
    try:
        os.rename(folder, final)
    except OSError as e:
        if e.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    return True


def refuse_existing(path: str | Path, force: bool = False) -> None:
    """Refuse to replace an output: a file, or a folder that is not empty. Nothing is replaced in a pipe or device.

    Raises:
        LlavaRegionError: there is one at `path`, and `force` is not set; or no output can have that name.
    """
    path = Path(path)
    try:
        if path.is_dir() and not any(path.iterdir()):
            return
        if path.exists() and not locks.is_stream(path) and not force:
            raise LlavaRegionError(f"{path} exists; give another output, or --force to replace it")
    except OSError as e:  # such as a name that is too long
        raise LlavaRegionError(f"cannot write {path}: {e.strerror}") from e


def recipes_folder() -> Path:
    """Where this package's launchers and DeepSpeed configs are: `recipes/` in an installed wheel, `scripts/` next to it in a checkout."""
    package = Path(__file__).parent
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "scripts"
