"""Train, examine and prune the visual region of LLaVA-style models (Wang et al., ACL 2025).

    >>> from llava_region import Region, load, merge, revert, prune, evaluate

Importing the package is cheap: torch, LLaVA and Bunny are imported where they are first needed.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from llava_region.errors import LlavaRegionError, UnsupportedUpstream
from llava_region.region import Region

if TYPE_CHECKING:
    from llava_region.evaluation.evaluate import evaluate
    from llava_region.models.loading import load
    from llava_region.surgery.merge import merge
    from llava_region.surgery.prune import prune
    from llava_region.surgery.revert import revert

__version__ = "0.2.0.dev0"

__all__ = [
    "LlavaRegionError", "Region", "UnsupportedUpstream", "__version__", "evaluate", "load", "merge", "prune", "revert",
]  # fmt: skip


class _Verb(ModuleType):
    """What the package is for, as a function: `llava_region.merge(run, out)`.

    It is a module too, since 0.1.0 had modules of these names: `from llava_region.merge import merge` goes on working.
    """

    def __init__(self, name: str, home: str):
        super().__init__(f"{__name__}.{name}", f"See `{home}`, which is imported at the first use.")
        self.__spec__ = ModuleSpec(self.__name__, None)  # importlib.util.find_spec asks for it
        self._verb, self._home = name, home

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # the import system asks for __path__ and the like
            raise AttributeError(name)
        return getattr(import_module(self._home), name)

    def __call__(self, *args, **kwargs) -> Any:
        return getattr(self, self._verb)(*args, **kwargs)


for _name, _home in {
    "evaluate": "llava_region.evaluation.evaluate",
    "merge": "llava_region.surgery.merge",
    "prune": "llava_region.surgery.prune",
    "revert": "llava_region.surgery.revert",
    "weights": "llava_region.checkpoints.tensors",  # a module in 0.1.0, and no verb
}.items():
    sys.modules[f"{__name__}.{_name}"] = globals()[_name] = _Verb(_name, _home)


def __getattr__(name: str) -> Any:
    if name == "load":
        return import_module("llava_region.models").load
    if name == "models":
        return import_module("llava_region.models")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
