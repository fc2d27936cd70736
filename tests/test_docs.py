"""The documentation names only what is there: links, paths, commands, flags, settings, make targets and imports."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import typer

from llava_region.cli import app
from llava_region.training.arguments import OWN_FLAGS

ROOT = Path(__file__).parents[1]
FOLDERS = ("llava_region", "patches", "scripts", "benchmarks")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])
COMMANDS = typer.main.get_command(app()).commands
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced code blocks of a page in the given languages."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [text for language, text in found if language in languages]


def code(page: Path) -> list[str]:
    """Everything on a page that is code: shell lines with their continuations, and inline code."""
    shell = "".join(blocks(page, "bash", "")).replace("\\\n", " ").splitlines()
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [*shell, *(span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", prose))]


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def words(line: str) -> list[str]:
    """The words of a command, without comments and <placeholders>."""
    return shlex.split(re.sub(r"<[^>]*>", "", line), comments=True)


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """(subcommand, its words) for each use of `llava-region` as a command on a page, also under torchrun."""
    found = []
    for line in code(page):
        called = re.match(r"(?:\$ )?(?:torchrun .*-m llava_region|llava-region) ([a-z]+)\b(.*)", line)
        if called:
            found.append((called[1], words(called[2])))
    return found


@by_page
def test_links_lead_somewhere(page):
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{target} does not exist"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE)
            assert anchor in map(slug, headings), f"{path} has no heading for #{anchor}"


@by_page
def test_paths_exist(page):
    for path in re.findall(rf"(?<![\w./-])((?:{'|'.join((*FOLDERS, 'tests', '.ci'))})/[\w./-]*)", "\n".join(code(page))):
        if "NAME" not in path:  # a placeholder
            assert (ROOT / path).exists(), f"{path} does not exist"


@by_page
def test_commands_and_their_flags_exist(page):
    for name, arguments in commands(page):
        assert name in COMMANDS, f"llava-region {name} does not exist"
        known = {option for parameter in COMMANDS[name].params for option in parameter.opts} | {"--help"}
        given = {word.split("=")[0] for word in arguments if word.startswith("--")}
        assert given <= known, f"llava-region {name} has no {', '.join(sorted(given - known))}"


@by_page
def test_make_targets_exist(page):
    makefile = (ROOT / "Makefile").read_text()
    for line in code(page):
        target = re.match(r"make ([a-z-]+)", line)
        if target:
            assert re.search(rf"^{target[1]}:", makefile, re.MULTILINE), f"make {target[1]} does not exist"


@by_page
def test_imports_work(page):
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("llava_region"):
                for name in node.names:
                    parent = import_module(node.module)
                    assert hasattr(parent, name.name) or import_module(f"{node.module}.{name.name}")


SHELL = "\n".join(path.read_text() for path in (ROOT / "scripts").rglob("*") if path.suffix in {".sh", ".sbatch"})
NAME = r"[A-Z][A-Z0-9_]{2,}"
# in capitals too: variables of other programs, signals, placeholders, arguments of the container recipe
NO_SETTINGS = {"HF_HOME", "HF_HUB_OFFLINE", "CUDA_HOME", "PWD", "SIGTERM", "SIGKILL", "SIGUSR1", "USR1", "GPU", "MIG", "DIR", "FILE"}
NO_SETTINGS |= {"UPSTREAM", "EXTRA_PACKAGES"}


def is_read(setting: str) -> bool:
    """Whether a script takes the value of this variable, itself or by its name. Comments do not count."""
    own = re.sub("^(LLAVA_7B|LLAVA_13B|BUNNY_LLAMA3_8B)_(?!SPECS)", "", setting)
    lines = re.sub(r"^\s*#.*$", "", SHELL, flags=re.MULTILINE)
    return bool(re.search(rf"\$\{{?{own}\b|\b(?:whole_number|switch) {own}\b", lines))


@pytest.mark.parametrize("name", ["train", "reproduce"])
def test_settings_exist(name):
    """Every setting that the launchers' and drivers' pages name, with a value or without, is read by a script."""
    text = "\n".join(code(ROOT / "scripts" / name / "README.md"))
    named = set(re.findall(rf"(?<![\w./-])({NAME})(?![\w./-])", text)) - NO_SETTINGS
    assert len(named) > 10 and [setting for setting in sorted(named) if not is_read(setting)] == []


@pytest.mark.parametrize("file", ["train/common.sh", "reproduce/common.sh", "slurm/train.sbatch"])
def test_settings_that_the_help_lists_exist(file):
    lines = re.findall(r"^#   ([A-Z].*?)(?:   +|$)", (ROOT / "scripts" / file).read_text(), re.MULTILINE)
    named = {name for line in lines for name in re.findall(NAME, re.sub(r"=\S*", "", line))}  # without the values
    assert len(named) > 2 and [setting for setting in sorted(named) if not is_read(setting)] == []


def test_readme_lists_every_command_once_with_a_link():
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if re.match(r"\| `(llava-region|python -m)", line)]
    listed = [re.match(r"\| `([^`]+)`", row)[1] for row in rows]
    assert sorted(listed) == sorted(["python -m llava_region.train", *(f"llava-region {name}" for name in COMMANDS)])
    for row, name in zip(rows, listed, strict=True):
        cells = row.strip("| ").split(" | ")
        assert len(cells) == 4 and cells[2].startswith(f"`{name}") and re.search(r"\]\([^)]+\)", cells[3])


def test_training_page_lists_every_flag():
    rows = re.findall(r"^\| `(--\w+)", (ROOT / "llava_region" / "training" / "README.md").read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(OWN_FLAGS)


def test_readme_can_be_read_to_the_end():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 210


def test_layers_example_is_what_the_command_prints(tmp_path, capsys):
    from llava_region.cli import main

    (tmp_path / "config.json").write_text('{"num_hidden_layers": 32}')
    assert main(["layers", str(tmp_path), "sparse:25%"]) == 0
    assert capsys.readouterr().out in (ROOT / "README.md").read_text()


def test_every_page_is_reached_from_the_readme():
    reached, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        if page in reached or not page.is_file():
            continue
        reached.add(page)
        targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text())]
        todo += [(page.parent / target).resolve() for target in targets if target.endswith(".md") and ":" not in target]
    assert set(PAGES) <= reached


IDIOMS = re.compile(
    r"\b(without a word|ha(?:s|ve) not got|stands for|for ever|nobody tried|mend|passes over|beside"
    r"|is no (?:folder|file|checkout)|a folder a task|bytes a GPU|one a (?:model|line|node))\b"
)
PROSE = [*PAGES, *(path for folder in ("scripts", "benchmarks") for path in sorted((ROOT / folder).rglob("*.*")) if path.suffix != ".md")]


@pytest.mark.parametrize("path", [path for path in PROSE if "__pycache__" not in path.parts], ids=lambda p: str(p.relative_to(ROOT)))
def test_english_is_plain(path):
    """Readers' first language is often another: idioms that a review found hard to read do not come back."""
    text = " ".join(path.read_text().replace("#", " ").split())
    assert IDIOMS.findall(text) == []


PYTHON_SCRIPTS = ["scripts/demo.py", "scripts/reproduce/score_data.py"]
PYTHON_SCRIPTS += [f"benchmarks/{path.name}" for path in sorted((ROOT / "benchmarks").glob("*.py"))]


@pytest.mark.parametrize("script", PYTHON_SCRIPTS)
def test_script_explains_itself_and_starts_nothing(script, tmp_path):
    """`--help` prints the description and leaves what is there alone (the demo replaces its folder)."""
    (tmp_path / "demo-output").mkdir()
    (tmp_path / "demo-output" / "mine").touch()
    done = subprocess.run([sys.executable, str(ROOT / script), "--help"], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0 and done.stdout.startswith("usage: ") and len(done.stdout.splitlines()) > 5, done.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["demo-output", "mine"]
