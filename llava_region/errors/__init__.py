"""Errors that a user can fix, and how a line is said to them."""

from __future__ import annotations

import sys
from contextlib import suppress


class LlavaRegionError(ValueError):
    """Bad input. The message says what was given, what is allowed and how to fix it, in one line."""


class UnsupportedUpstream(LlavaRegionError):
    """The installed LLaVA or Bunny lacks a symbol that a hook needs, or has it with another signature."""


def say(message: str, label: str = "error: ") -> None:
    """Print one line on stderr, whatever is in the message and wherever stderr leads."""
    if sys.stderr is None:  # closed by the shell: `2>&-`
        return
    encoding = sys.stderr.encoding or "utf-8"
    line = (label + " ".join(message.split())).encode(encoding, "backslashreplace").decode(encoding)
    with suppress(OSError):
        sys.stderr.write(line + "\n")  # in one piece, as other ranks write there too
        sys.stderr.flush()
