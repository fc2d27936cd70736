"""The hooks: import an upstream's module, check the symbols that are needed, and rebind names in it for the length of a block."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from types import ModuleType
from typing import TYPE_CHECKING, Any

from packaging.requirements import Requirement

from llava_region.errors import UnsupportedUpstream

if TYPE_CHECKING:
    from llava_region.patches.upstream import Upstream
    from llava_region.training.run import RegionRun


def import_upstream(name: str, title: str, fix: str) -> ModuleType:
    """Import a module of an upstream.

    Args:
        fix: what a user has to do to have it.

    Raises:
        UnsupportedUpstream: it is not installed, or fails to import; says how to get it.
    """
    try:
        return import_module(name)
    except Exception as e:  # transformers' lazy modules raise RuntimeError, clashing model types ValueError
        raise UnsupportedUpstream(f"cannot import {name} of {title}: {e}; {_what_helps(e, name) or fix}") from e


def _what_helps(error: BaseException, name: str) -> str | None:
    """The pip command for a package that the import of `name` misses, or else for those whose versions this package does not take.

    None where neither is so, and where the upstream itself is missing: how to get it is another's word.
    """
    cause: BaseException | None = error
    while cause is not None:
        missing = (cause.name or "").partition(".")[0] if isinstance(cause, ModuleNotFoundError) else ""
        if missing == name.partition(".")[0]:
            return None
        if missing and missing != "llava_region":
            # with torch named, pip takes the version that was made for it, and does not replace it
            torch = f" torch=={version('torch').partition('+')[0]}" if missing == "torchvision" else ""
            return f"the package '{missing}' is missing: pip install {missing}{torch}"
        cause = cause.__cause__ or cause.__context__
    wrong = [f"'{found.name}{found.specifier}'" for found in map(Requirement, requires("llava-region") or ()) if _misses(found)]
    return f"installed versions do not fit: pip install {' '.join(wrong)}" if wrong else None


def _misses(requirement: Requirement) -> bool:
    """Whether a version outside the required range is installed; what only an extra asks for is left out."""
    if requirement.marker is not None:
        return False
    try:
        return not requirement.specifier.contains(version(requirement.name), prereleases=True)
    except PackageNotFoundError:
        return False


def require(module: ModuleType | type, symbol: str, tested: str, parameters: tuple[str, ...] | None = None) -> Any:
    """The symbol of an upstream module, after checking that it exists and takes the parameters that a hook relies on.

    Raises:
        UnsupportedUpstream: names the dotted path and the tested commit.
    """
    path = f"{module.__name__}.{symbol}"
    if not hasattr(module, symbol):
        raise UnsupportedUpstream(f"{path} is missing; tested with {tested}: install that version")
    found = getattr(module, symbol)
    if parameters is not None and tuple(inspect.signature(found).parameters)[: len(parameters)] != parameters:
        raise UnsupportedUpstream(
            f"{path} takes {tuple(inspect.signature(found).parameters)}, expected {parameters}; tested with {tested}: install that version"
        )
    return found


def require_fields(module: ModuleType, symbol: str, tested: str, fields: tuple[str, ...]) -> type:
    """An upstream dataclass, after checking that it has the fields that preflight and the hooks read.

    Raises:
        UnsupportedUpstream: names the first missing field.
    """
    found = require(module, symbol, tested)
    missing = [name for name in fields if name not in getattr(found, "__dataclass_fields__", {})]
    if missing:
        raise UnsupportedUpstream(f"{module.__name__}.{symbol} has no field '{missing[0]}'; tested with {tested}: install that version")
    return found


@contextmanager
def rebound(module: ModuleType, **names: Any) -> Iterator[None]:
    """Bind names in a module for the length of the block; what they were before is put back, also after an error."""
    before = {name: getattr(module, name) for name in names}
    try:
        for name, value in names.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


@contextmanager
def hooked(upstream: Upstream, run: RegionRun) -> Iterator[None]:
    """Bind a run's hooks in the upstream's module with train(); at the end, check and complete what it saved.

    At most four names are rebound there: train() looks them up in its own module's globals. Left alone: the model, the
    data, the loss, PEFT and, but for a backbone in 4 or 8 bits, transformers; and the module that defines the trainer, whose
    `super(ItsTrainer, self)` would call itself endlessly if a subclass were bound under that name.

    Raises:
        UnsupportedUpstream: the installed upstream lacks a symbol.
        LlavaRegionError: on leaving, if what was saved is not the region's.
    """
    from llava_region.patches.quantised import quantised_loading
    from llava_region.training.arguments import extend_arguments
    from llava_region.training.finish import finish
    from llava_region.training.trainer import region_trainer

    module = upstream.train_module()
    names = {
        "TrainingArguments": extend_arguments(module.TrainingArguments, upstream.recipe),
        upstream.linear_names: run.find_linear_names,
        upstream.trainer: region_trainer(getattr(module, upstream.trainer), run),
    }
    if upstream.save is not None:
        names[upstream.save] = run.saving_without_cuda(getattr(module, upstream.save))
    with quantised_loading(), rebound(module, **names):
        yield
        finish(run)
