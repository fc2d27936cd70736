"""Read a file that holds one JSON list item by item, so that memory does not grow with the file."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from llava_region.errors import LlavaRegionError
from llava_region.files import read_json
from llava_region.progress import progress_bar

CHUNK = 1 << 22  # bytes
SPACE = re.compile(r"[ \t\n\r]*")  # JSON's, of one byte each


class Item(NamedTuple):
    """A value of the list, and which bytes of the file it is: the first one and how many."""

    value: Any
    start: int
    size: int


def items(path: Path, kind: str) -> Iterator[Item]:
    """The values of a JSON list, in their order; a file that is read to its end was a list, and not an empty one.

    Args:
        kind: what the file should be, for the message: `a list of records; allowed: ...`.

    Raises:
        LlavaRegionError: the file cannot be read, is not JSON, is not a list, or is empty.
    """
    count = 0
    try:
        with path.open("rb") as file, progress_bar(f"reading {path.name} (bytes)", path.stat().st_size) as advance:
            for item in _items(file):
                yield item
                advance(item.size)
                count += 1
    except OSError as e:
        raise LlavaRegionError(f"cannot read {path}: {e.strerror}") from e
    except (ValueError, RecursionError):
        if not isinstance(read_json(path), list):  # which says what is wrong with a file that is not JSON
            raise LlavaRegionError(f"{path} is not {kind}") from None
        raise
    if not count:
        raise LlavaRegionError(f"{path} is not {kind}")


def read_item(path: Path, start: int, size: int) -> bytes:
    """The bytes of an item again.

    Raises:
        LlavaRegionError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            file.seek(start)
            return file.read(size)
    except OSError as e:
        raise LlavaRegionError(f"cannot read {path}: {e.strerror}") from e


def _items(file: BinaryIO) -> Iterator[Item]:
    """
    Raises:
        ValueError: not a JSON list.
    """
    text = _Text(file)
    text.expect("[")
    if text.next() == "]":
        text.take(1)
    else:
        while True:
            yield text.value()
            mark = text.next()
            text.expect(",]")
            if mark == "]":
                break
    if text.next():
        raise ValueError("text after the list")


class _Text:
    """A window of a file's text, which moves on."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.decode = codecs.getincrementaldecoder("utf-8")().decode
        self.scan = json.JSONDecoder().raw_decode
        self.text, self.at, self.byte, self.ended = "", 0, 0, False

    def next(self) -> str:
        """The next character that is not space, at which the window then begins; empty at the end."""
        while True:
            self.take(SPACE.match(self.text, self.at).end() - self.at)  # type: ignore[union-attr]
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.more()

    def expect(self, characters: str) -> None:
        if self.next() not in [*characters]:
            raise ValueError(f"not one of {characters}")
        self.take(1)

    def value(self) -> Item:
        """The value that comes next."""
        self.next()
        while True:
            try:
                value, end = self.scan(self.text, self.at)
                if end + 2 < len(self.text) or self.ended:  # else a number may go on: 1 and e+5
                    return Item(value, self.byte, self.take(end - self.at))
            except ValueError:
                if self.ended:
                    raise
            self.more()

    def take(self, characters: int) -> int:
        """Move on; returns how many bytes these characters are in the file."""
        end = self.at + characters
        size = characters if self.text.isascii() else len(self.text[self.at : end].encode())
        self.at, self.byte = end, self.byte + size
        return size

    def more(self) -> None:
        """Make the window longer, twice as long where it holds a part of a value: a long value is then tried a few times only."""
        rest = self.text[self.at :]
        data = self.file.read(max(CHUNK, len(rest)))
        self.ended = not data
        self.text, self.at = rest + self.decode(data, final=self.ended), 0
