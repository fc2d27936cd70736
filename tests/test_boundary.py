"""Who may import whom: only `patches/` touches an upstream, and the command line starts without torch."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
UPSTREAMS = {"llava", "bunny"}


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", sorted((ROOT / "llava_region").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_package_never_imports_an_upstream(path):
    assert not imports(path) & UPSTREAMS


def test_command_line_starts_without_torch():
    code = (
        "import sys, llava_region.cli; llava_region.cli.main(['--help']); print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env={**os.environ, "COLUMNS": "80"})
    assert done.stdout.strip().endswith("[]"), done.stdout + done.stderr
    listed = done.stdout.split("Commands:")[1]
    assert "..." not in listed and "revert      Put decoder layers back to the backbone's weights\n" in listed


def test_layers_command(tmp_path):
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 32}')
    command = [sys.executable, "-m", "llava_region", "layers", str(tmp_path)]
    done = subprocess.run([*command, "sparse:8", "--json"], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == '{"layers": [0, 4, 8, 12, 18, 22, 26, 30], "num_layers": 32, "spec": "sparse:8"}\n'
    done = subprocess.run([*command, "sparse:99"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
