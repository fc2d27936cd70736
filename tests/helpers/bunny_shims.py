"""What the real Bunny needs to be imported and to train without CUDA. For the tests only.

Child processes (torchrun, deepspeed) get the same through `tests/startup/sitecustomize.py` on PYTHONPATH.
"""

import importlib.util
import os
import sys
import types
from importlib.metadata import version
from pathlib import Path

NO_BUNNY = "BUNNY_ROOT does not name a checkout of BAAI-DCAI/Bunny at 08273ac"


def bunny_root() -> Path | None:
    """The checkout that BUNNY_ROOT names, or None."""
    root = os.environ.get("BUNNY_ROOT")
    return Path(root) if root and (Path(root) / "bunny/train/train.py").is_file() else None


def why_not() -> str | None:
    """Why the real Bunny cannot be tested here, or None if it can: what the tests give as the reason for their skip."""
    if bunny_root() is None:
        return NO_BUNNY
    missing = [name for name in ("timm", "torchvision", "easy_vqa", "deepspeed") if importlib.util.find_spec(name) is None]
    if missing:
        return f"BUNNY_ROOT is set, but Bunny needs {', '.join(missing)}"
    transformers = version("transformers")
    if not (4, 39) <= tuple(int(n) for n in transformers.split(".")[:2]) <= (4, 41):
        return f"BUNNY_ROOT is set, but Bunny needs transformers 4.39 to 4.41, not {transformers}"
    return None


def apply() -> None:
    """Put the checkout on the path and stand in for the CUDA-only parts of its imports. May be called again."""
    root = str(bunny_root())
    if root not in sys.path:
        sys.path.append(root)
    import torch

    _define_torchvision_ops(torch)
    if importlib.util.find_spec("xformers") is None:
        _stub_xformers()


def _define_torchvision_ops(torch) -> None:
    """A torchvision wheel made for another torch cannot load its library, and then fails to import for lack of two operators."""
    spec = importlib.util.find_spec("torchvision")
    library = next(Path(spec.origin).parent.glob("_C*.so"), None)
    try:
        torch.ops.load_library(str(library))
    except OSError:
        library = None
    if library is None and "torchvision_ops" not in _KEEP:
        ops = torch.library.Library("torchvision", "DEF")
        ops.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        ops.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEEP["torchvision_ops"] = ops


def _stub_xformers() -> None:
    package, ops = types.ModuleType("xformers"), types.ModuleType("xformers.ops")
    for module in (package, ops):
        module.__spec__ = importlib.util.spec_from_loader(module.__name__, loader=None)
    package.ops, package.__path__ = ops, []
    sys.modules.update({"xformers": package, "xformers.ops": ops})


_KEEP: dict = {}  # a library's operators go when the object goes
