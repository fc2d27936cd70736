"""Run a command line in this process, and look at what it printed."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest

Main = Callable[[list[str]], int]


class Ran(NamedTuple):
    """Exit code and output of a command."""

    code: int
    out: str
    err: str


def run(main: Main, capsys: pytest.CaptureFixture[str], *argv: object) -> Ran:
    """Run a command's `main`; its arguments are made strings."""
    code = main([str(arg) for arg in argv])
    captured = capsys.readouterr()
    return Ran(code, captured.out, captured.err)


def refused(main: Main, capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one line on stderr that bad input is refused with; nothing may be on stdout."""
    code, out, err = run(main, capsys, *argv)
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith("error: "), (code, out, err)
    return err.rstrip("\n")
