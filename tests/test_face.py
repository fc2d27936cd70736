"""What `import llava_region` gives: a cheap import, the functions of the face, and the import paths of 0.1.0."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# the import paths that the README of 0.1.0 named, and where they lead now
OLD_PATHS = {
    "llava_region.merge.merge": "llava_region.surgery.merge",
    "llava_region.revert.revert": "llava_region.surgery.revert",
    "llava_region.prune.prune": "llava_region.surgery.prune",
    "llava_region.weights.Checkpoint": "llava_region.checkpoints.tensors",
    "llava_region.evaluate.evaluate": "llava_region.evaluation.evaluate",
    "llava_region.evaluate.score_predictions": "llava_region.evaluation.evaluate",
    "llava_region.models.load": "llava_region.models.loading",
}
VERBS = ("evaluate", "merge", "prune", "revert")


def printed(code: str) -> str:
    """What a fresh interpreter prints, without its last newline."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.rstrip("\n")


@pytest.mark.parametrize("line", ["import llava_region", "from llava_region import Region, merge, revert, prune, evaluate"])
def test_import_is_cheap(line):
    assert printed(f"{line}; import sys; print([m for m in ('torch', 'transformers', 'llava', 'bunny') if m in sys.modules])") == "[]"


@pytest.mark.parametrize("way", ["import a.b", "from a.b import c", "from a import b", "attribute"])
def test_old_import_paths_go_on_working(way):
    """Every path in one interpreter, since each of them imports torch; `test_old_modules_import_alone` takes them one by one."""
    lines = []
    for path in OLD_PATHS:
        module, name = path.rsplit(".", 1)
        package, child = module.split(".")
        lines.append(
            {
                "import a.b": f"import {module}; f = {path}",
                "from a.b import c": f"from {module} import {name} as f",
                "from a import b": f"from {package} import {child} as b; f = b.{name}",
                "attribute": f"import {package}; f = getattr({package}.{child}, {name!r})",
            }[way]
            + "; print(f.__module__, f.__qualname__)"
        )
    assert printed("\n".join(lines)).splitlines() == [f"{home} {path.rsplit('.', 1)[1]}" for path, home in OLD_PATHS.items()]


@pytest.mark.parametrize("module", sorted({path.rsplit(".", 1)[0] for path in OLD_PATHS} - {"llava_region.models"}))
def test_old_modules_import_alone(module):
    """Each is a module of that name, as soon as the package is imported, and still imports no torch."""
    code = f"import {module}, sys, types\nm = sys.modules[{module!r}]\n"
    code += "print(isinstance(m, types.ModuleType), m.__name__, 'torch' in sys.modules)"
    assert printed(code) == f"True {module} False"


def test_face_is_functions():
    """Called, each is the function it is named after, with its arguments."""
    code = "from llava_region import evaluate, merge, prune, revert\nfor f in (evaluate, merge, prune, revert):\n"
    code += "    try:\n        f()\n    except TypeError as e:\n        print(e)"
    assert [line.split(" missing ")[0] for line in printed(code).splitlines()] == [f"{name}()" for name in VERBS]


def test_face_calls_reach_the_function(tmp_path):
    """The face's `merge` refuses what the command refuses, with the package's own error."""
    code = (
        "import llava_region\n"
        f"try:\n    llava_region.merge({str(tmp_path / 'no-run')!r}, {str(tmp_path / 'out')!r})\n"
        "except llava_region.LlavaRegionError as e:\n    print('refused:', e)"
    )
    assert printed(code).startswith("refused: ") and not (tmp_path / "out").exists()


def test_region_and_load():
    assert printed("from llava_region import Region; print(Region.parse('sparse:25%', 32).layers)") == "(0, 4, 8, 12, 18, 22, 26, 30)"
    assert printed("from llava_region import load; print(load.__module__)") == "llava_region.models.loading"


def test_everything_promised_is_there():
    code = "import llava_region; print([name for name in llava_region.__all__ if getattr(llava_region, name, None) is None])"
    assert printed(code) == "[]"


@pytest.mark.parametrize("name", ["nothing", "surgeon"])
def test_unknown_name_is_an_attribute_error(name):
    code = f"import llava_region\ntry:\n    llava_region.{name}\nexcept AttributeError as e:\n    print(e)"
    assert printed(code) == f"module 'llava_region' has no attribute '{name}'"


def test_old_modules_can_be_looked_up():
    assert importlib.util.find_spec("llava_region.merge") is not None
