"""Read JSON, and write files whole: under a temporary name first, so that a killed command leaves nothing under the final one."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llava_region.errors import LlavaRegionError


def write_text(path: str | Path, text: str) -> None:
    """Write a text file (UTF-8) so that its name only ever holds the whole text.

    Raises:
        LlavaRegionError: the folder is not writable.
    """
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file so that its name only ever holds all of it.

    Raises:
        LlavaRegionError: the folder is not writable.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    except OSError as e:
        raise LlavaRegionError(f"cannot write {path}: {e.strerror}") from e
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes files that only their owner may read
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


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
    except ValueError as e:
        raise LlavaRegionError(f"{path} is not valid JSON: {e}") from e


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

    Yields the temporary folder, `.NAME.partial` next to the final one; what an earlier killed run left there is removed.

    Raises:
        LlavaRegionError: `path` exists and is not an empty folder, and `force` is not set; or it is a file, or its parent is
            not writable.
    """
    final = Path(path)
    refuse_existing(final, force)
    if final.exists() and not final.is_dir():
        raise LlavaRegionError(f"{final} is a file; give a folder")
    temporary = final.parent / f".{final.name}.partial"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    except OSError as e:
        raise LlavaRegionError(f"cannot write {final}: {e.strerror}") from e
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    old = final.parent / f".{final.name}.old"
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(final, old)
    os.rename(temporary, final)
    shutil.rmtree(old, ignore_errors=True)


def refuse_existing(path: str | Path, force: bool = False) -> None:
    """Refuse to replace an output: a file, or a folder that is not empty.

    Raises:
        LlavaRegionError: there is one at `path`, and `force` is not set.
    """
    path = Path(path)
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists() and not force:
        raise LlavaRegionError(f"{path} exists; give another output, or --force to replace it")
