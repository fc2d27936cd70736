"""Who may import whom: only `patches/` touches an upstream, arrows point one way, and the command line starts without torch."""

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llava_region import upstreams

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "llava_region").rglob("*.py"))
PATCHES = sorted((ROOT / "patches").glob("*.py"))
# From the bottom up: a module imports from its own line and those above it, never from below. `patches` is a plugin on top of
# what it hooks; `upstreams` looks it up by name.
LAYERS = (
    ("errors", "run_files"),
    ("files", "locks", "progress", "processes"),
    ("region", "plotting"),
    ("decoder", "upstreams"),
    ("data", "checkpoints"),
    ("models",),
    ("surgery", "scores", "evaluation", "training", "tasks"),
    ("patches", "report", "doctor"),
    ("commands",),
    ("cli", "train", "__main__", "__init__"),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imported(path: Path, type_checking: bool = True) -> Iterator[str]:
    """Dotted names of the modules that a file imports, wherever in it."""
    tree = ast.parse(path.read_text())
    skipped = set()
    if not type_checking:
        blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
        skipped = {id(child) for block in blocks for child in ast.walk(block)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            package = (ROOT / node.module.replace(".", "/")).is_dir()
            yield from (f"{node.module}.{alias.name}" if package else node.module for alias in node.names)


def room(dotted: str) -> str:
    """The room of a module of this package: `training`, `files`; of the package itself `__init__`."""
    parts = dotted.split(".")
    known = len(parts) > 1 and (parts[1] in LEVEL or (ROOT / "llava_region" / f"{parts[1]}.py").exists())
    return parts[1] if known else "__init__"


def own_room(path: Path) -> str:
    relative = path.relative_to(ROOT).with_suffix("")
    return "patches" if relative.parts[0] == "patches" else room(".".join(relative.parts))


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_package_never_imports_an_upstream(path):
    assert not {name.split(".")[0] for name in imported(path)} & {"llava", "bunny"}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_patches_are_imported_in_one_place(path):
    found = [name for name in imported(path) if name.startswith("llava_region.patches")]
    if path.name == "upstreams.py":
        assert not [name for name in imported(path, type_checking=False) if name.startswith("llava_region.patches")]  # by name alone
    else:
        assert not found and "llava_region.patches" not in path.read_text()


@pytest.mark.parametrize("path", [*MODULES, *PATCHES], ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_point_one_way(path):
    own = own_room(path)
    assert own in LEVEL, f"say in LAYERS where '{own}' belongs"
    for name in imported(path):
        other = room(name)
        if not name.startswith("llava_region") or other == own or (own == "upstreams" and other == "patches"):
            continue
        if other == "__init__":  # the version, and errors and Region, which the face hands on
            assert name in ("llava_region.__version__", "llava_region.errors"), name
            continue
        assert LEVEL[other] <= LEVEL[own], f"{own} imports {name}, which lies above it"


def test_every_room_is_in_the_list_and_the_top_is_small():
    top = {p.stem for p in (ROOT / "llava_region").glob("*.py")}
    rooms = {p.parent.name for p in (ROOT / "llava_region").glob("*/__init__.py")}
    assert top | rooms | {"patches"} == set(LEVEL)
    assert len(top) <= 14


def names_of_upstreams() -> re.Pattern[str]:
    """Classes, functions, commits, tensor prefixes and flags of the upstreams."""
    from llava_region.patches.llava_family import FLAGS, TRAINING_FIELDS

    words, flags = {"lm_head", "final_layernorm", "norm_f"}, {flag.removeprefix("--") for flag in FLAGS.values()} | set(TRAINING_FIELDS)
    for upstream in upstreams.every():
        parts = upstream.parts
        words |= {*upstream.architectures.values(), upstream.commit, upstream.trainer, upstream.save, *upstream.distributions[:-1]}
        words |= {*parts.layers, *parts.projector, *parts.embeddings, *(f"{name}." for name in parts.vision)}
        flags |= set(upstream.model_fields)
    words |= {"LlavaLlama", "LlavaMistral", "conv_templates", "get_vision_tower", "mm_vision_tower", "mm_use_im_start_end"}
    flags -= {"bits", "version", "model_type", "lora_r", "lora_alpha", "cache_dir", "image_folder", "data_path"}  # PEFT's too, or our own
    word, flag = ("|".join(map(re.escape, sorted(names))) for names in (words, flags))
    # `mm_projector.bin` is a file's name
    return re.compile(rf"(?<![\w])(?:{word})(?!\w|\.bin)|(?:--|args\.|[\"'])(?:{flag})(?!\w)|--bits\b")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_outside_patches_names_what_is_an_upstreams(path):
    pattern = names_of_upstreams()
    found = [f"{n}: {line.strip()}" for n, line in enumerate(path.read_text().splitlines(), 1) if pattern.search(line)]
    assert not found


def test_the_grep_finds_what_it_is_for():
    pattern = names_of_upstreams()
    for text in ("--mm_projector_lr", "args.lora_enable", '"LlavaLlamaForCausalLM"', "c121f04", "model.layers.3", "(mm_projector)"):
        assert pattern.search(text), text
    for text in ("base_model_name_or_path", "mm_projector.bin", "lora_alpha", "model.layers_of", "tokenizer.model_max_length"):
        assert not pattern.search(text), text


def test_two_clones_are_not_mixed(tmp_path):
    """An editable install of one clone, another clone first on the path: the package of one, the patches of the other."""
    other = tmp_path / "other"
    shutil.copytree(ROOT / "llava_region", other / "llava_region", ignore=shutil.ignore_patterns("__pycache__"))
    code = (
        "import sys, types, llava_region, importlib.machinery, importlib.util\n"
        "spec = importlib.machinery.PathFinder.find_spec('patches', [sys.argv[1]])\n"
        "module = types.ModuleType('llava_region.patches'); module.__file__ = spec.origin; module.__path__ = [sys.argv[1] + '/patches']\n"
        "sys.modules['llava_region.patches'] = module\n"  # what the editable install's finder does
        "from llava_region.train import main\n"
        "sys.exit(main(['llava', '--help']))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True, cwd=other)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stdout == "", done.stderr
    assert f"llava_region comes from {other}/llava_region, but llava_region.patches from {ROOT}/patches" in done.stderr
    same = subprocess.run([sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True, cwd=ROOT)
    assert same.returncode == 0, same.stderr


def test_command_line_starts_without_torch():
    code = (
        "import sys, llava_region.cli; llava_region.cli.main(['--help']); print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env={**os.environ, "COLUMNS": "80"})
    assert done.stdout.strip().endswith("[]"), done.stdout + done.stderr
    listed = done.stdout.split("Commands:")[1]
    assert "..." not in listed and "revert      Put decoder layers back to the backbone's weights\n" in listed


def test_upstreams_are_known_without_torch():
    code = (
        "import sys; from llava_region import upstreams; upstreams.parts(); "
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_layers_command(tmp_path):
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 32}')
    command = [sys.executable, "-m", "llava_region", "layers", str(tmp_path)]
    done = subprocess.run([*command, "sparse:8", "--json"], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == '{"layers": [0, 4, 8, 12, 18, 22, 26, 30], "num_layers": 32, "spec": "sparse:8"}\n'
    command[-1] += "/config.json"
    assert subprocess.run([*command, "sparse:8"], capture_output=True, text=True, cwd=ROOT).stdout.startswith("sparse:8: 8 of 32")
    done = subprocess.run([*command, "sparse:99"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
