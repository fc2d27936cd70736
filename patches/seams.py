"""The seams that LLaVA and Bunny share: names in the module that defines their train(), rebound and put back.

Both upstreams look up TrainingArguments, find_all_linear_names and the trainer class in that module's globals, so
rebinding a name there is enough. The module that defines a trainer is never touched: upstream writes
`super(LLaVATrainer, self)`, and a subclass bound under that name would call itself for ever.
"""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType

from llava_region.errors import UnsupportedUpstream
from llava_region.training.arguments import extend_arguments
from llava_region.training.trainer import RegionRun, finish, region_trainer


def import_upstream(name: str, title: str, mend: str) -> ModuleType:
    """Import a module of an upstream.

    Raises:
        UnsupportedUpstream: it is not installed, or fails to import; says how to get it.
    """
    try:
        return import_module(name)
    except Exception as e:  # transformers' lazy modules raise RuntimeError, clashing model types ValueError
        raise UnsupportedUpstream(f"cannot import {name} of {title}: {e}; {mend}") from e


def require(module: ModuleType, symbol: str, tested: str, parameters: tuple[str, ...] | None = None):
    """The symbol of an upstream module, after checking that it is there and takes the parameters that a hook relies on.

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
def rebound(module: ModuleType, **names):
    """Bind names in a module for the length of the block; what stood there before is put back, also after an error."""
    before = {name: getattr(module, name) for name in names}
    try:
        for name, value in names.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


@contextmanager
def hooked(module: ModuleType, trainer: str, run: RegionRun):
    """Bind a run's hooks in the module that defines the upstream's train(), and check and complete what it saved at the end.

    Args:
        trainer: name of the trainer class in that module.
    """
    names = {
        "TrainingArguments": extend_arguments(module.TrainingArguments),
        "find_all_linear_names": run.find_linear_names,
        trainer: region_trainer(getattr(module, trainer), run),
        "safe_save_model_for_hf_trainer": run.saving_without_cuda(module.safe_save_model_for_hf_trainer),
    }
    with rebound(module, **names):
        yield
        finish(run)


def argument_classes(module: ModuleType) -> tuple[type, type, type]:
    """The three dataclasses that train() parses its command line into, ours in place of TrainingArguments."""
    return module.ModelArguments, module.DataArguments, extend_arguments(module.TrainingArguments)
