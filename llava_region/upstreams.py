"""The training codebases that this package hooks: the one table that knows their names, and the one place that imports `patches`.

Each entry is a module with an object `UPSTREAM`, an `Upstream` (its docstrings say what one has to provide; how to add one is in
`patches/README.md`). Importing it imports neither torch nor the upstream itself.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from llava_region.errors import LlavaRegionError

if TYPE_CHECKING:
    from llava_region.decoder import Parts
    from llava_region.patches.model_side import ModelSide
    from llava_region.patches.tokenisation import Tokenisation
    from llava_region.patches.upstream import Recipe, Upstream

    __all__ = ["ModelSide", "Recipe", "Tokenisation", "Upstream"]  # for the annotations of other modules

TABLE = {"llava": "llava_region.patches.llava", "bunny": "llava_region.patches.bunny"}


def names() -> tuple[str, ...]:
    """What the upstreams are called, on the command line and in `region.json`."""
    return tuple(TABLE)


def get(name: str) -> Upstream:
    """The upstream of that name.

    Raises:
        LlavaRegionError: there is none, or this package and `patches` come from two clones.
    """
    if name not in TABLE:
        raise LlavaRegionError(f"unknown upstream '{name}'; allowed: {', '.join(TABLE)}")
    check_one_clone()
    return import_module(TABLE[name]).UPSTREAM


def every() -> list[Upstream]:
    """All upstreams, in the table's order."""
    return [get(name) for name in TABLE]


def titles(word: str = "or") -> str:
    """Their names as people write them: `LLaVA or Bunny`."""
    *first, last = (upstream.title for upstream in every())
    return f"{', '.join(first)} {word} {last}" if first else last


def of_config(config: Mapping) -> Upstream | None:
    """The upstream that a model's `config.json` belongs to; None for a plain language model."""
    return next((upstream for upstream in every() if upstream.owns(config)), None)


def architectures() -> dict[str, str]:
    """Class that an upstream's `save_pretrained` names in `config.json`, by model type."""
    return {kind: name for upstream in every() for kind, name in upstream.architectures.items()}


def parts() -> Parts:
    """What all upstreams declare of the names of parameters."""
    return _union(tuple(TABLE))


@functools.cache
def _union(names: tuple[str, ...]) -> Parts:
    first, *others = (get(name).parts for name in names)
    return functools.reduce(lambda a, b: a | b, others, first)


@functools.cache
def check_one_clone() -> None:
    """Refuse `llava_region` from one place with `llava_region.patches` from another: their versions need not fit.

    That happens with an editable install of one clone and another clone first on the path.

    Raises:
        LlavaRegionError: names both folders.
    """
    package = Path(__file__).resolve().parent
    found = import_module("llava_region.patches").__file__
    patches = Path(found).resolve().parent if found else None
    # a checkout has the folder next to the package, an installed wheel inside it
    if patches not in (package / "patches", package.parent / "patches"):
        raise LlavaRegionError(
            f"llava_region comes from {package}, but llava_region.patches from {patches}: two clones are mixed; run 'pip install -e .' "
            f"in {package.parent}, or take it off PYTHONPATH and out of the current folder"
        )
