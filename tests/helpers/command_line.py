"""Run a command line in this process, and see that what is wrong ends in one line."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from llava_region import LlavaRegionError
from llava_region.cli import main as llava_region_main

Main = Callable[[list[str]], int]


class Ran(NamedTuple):
    """Exit code and what was printed."""

    code: int
    out: str
    err: str


def run(capsys: pytest.CaptureFixture[str], *argv: object, main: Main = llava_region_main) -> Ran:
    """Run `llava-region`, or another command's `main`; its arguments may be paths and numbers."""
    code = main([str(part) for part in argv])
    return Ran(code, *capsys.readouterr())


def refused(capsys: pytest.CaptureFixture[str], *argv: object, main: Main = llava_region_main) -> str:
    """Run a command that is to be refused: exit code 2, one `error: ...` line, nothing else printed; returns the line."""
    ran = run(capsys, *argv, main=main)
    assert ran.code == 2 and ran.out == "" and ran.err.startswith("error: ") and ran.err.count("\n") == 1, ran
    return ran.err


def refused_without_output(message: str, out: Path, call: Callable[[], object]) -> None:
    """A call that is to be refused in one line that matches `message`, with nothing left at or next to `out`."""
    with pytest.raises(LlavaRegionError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
    assert not out.exists() and not list(out.parent.glob(".*.partial"))


def logits(model: torch.nn.Module, **inputs: object) -> torch.Tensor:
    """What a model computes, without a graph."""
    with torch.inference_mode():
        return model(**inputs).logits
