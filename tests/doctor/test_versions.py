"""The table of versions, and that nothing else says otherwise: what is installed for the tests, what the package requires."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from llava_region import doctor, upstreams
from llava_region.commands import doctor as command
from llava_region.doctor import versions
from llava_region.patches.upstream import Upstream
from tests.helpers.version_sets import requirements

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings it
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
NAMES = upstreams.names()


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def required() -> dict[str, str]:
    """What the package requires, extras included: component -> range."""
    settings = project()
    lines = settings["dependencies"] + [
        line for name in ("deepspeed", "qlora", "flash") for line in settings["optional-dependencies"][name]
    ]
    ranges = {requirement.name: str(requirement.specifier) for requirement in map(Requirement, lines)}
    return {"python": settings["requires-python"], **ranges}


def bounds(spec: str) -> tuple[Version, Version]:
    """(first version of a range, first version above it)."""
    at = {part.operator: Version(part.version) for part in SpecifierSet(spec)}
    assert set(at) <= {">=", "<"}, spec
    return at.get(">=", Version("0")), at.get("<", Version("9999"))


def pins(text: str) -> dict[str, str]:
    return dict(re.findall(r"^.*?([\w-]+)==([\w.]+)", text, re.MULTILINE))


def recipe(name: str) -> str:
    """The lines of the Makefile that make an upstream's environment."""
    (found,) = [part for part in (ROOT / "Makefile").read_text().split("\n\n") if f"-r tests/requirements-{name}.txt" in part]
    return found


def test_a_row_has_every_upstream(third: Upstream) -> None:
    table = versions.versions()
    assert all(tuple(row) == (*NAMES, "third") for row in table.values())
    assert table["transformers"]["bunny"] == versions.Versions(">=4.39.3,<4.42", "4.40.2")
    assert table["peft"]["third"] == versions.Versions("", None)
    assert list(table)[-1] == "jax" and table["jax"]["llava"] == versions.Versions("", None)


def test_ranges_and_their_span(third: Upstream) -> None:
    assert versions.ranges("torch") == {">=2.1": ("llava", "bunny"), ">=2.7": ("third",)}
    assert versions.span("transformers") == ">=4.36,<4.42"
    assert versions.span("torch") == ">=2.1"
    assert versions.span("numpy") == ""  # the third takes any
    assert versions.minors(">=3.10,<3.13") == ["3.10", "3.11", "3.12"]
    assert versions.minors(">=4.39.3,<4.42") == ["4.39", "4.40", "4.41"]


def test_the_sets_tested_as_text(third: Upstream) -> None:
    assert versions.tested("llava") == (
        "LLaVA c121f04 (llava-torch 1.2.2.post1), torch 2.13.0, transformers 4.37.2, peft 0.10.0, accelerate 0.34.2, deepspeed 0.16.9"
    )
    assert versions.tested("bunny") == (
        "Bunny 08273ac, torch 2.13.0, transformers 4.40.2, peft 0.10.0, accelerate 0.30.1, deepspeed 0.18.9"
    )
    assert versions.tested("third") == "Third abcdef0, torch 2.8.0, transformers 4.39.3"


@pytest.mark.parametrize("name", NAMES)
def test_every_pin_is_supported(name: str) -> None:
    upstream = upstreams.get(name)
    for set_ in (upstream.pinned, *upstream.also_tested.values()):
        assert {component for component, pin in set_.items() if pin not in SpecifierSet(upstream.supported[component])} == set()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("component", ["python", "transformers"])
def test_both_bounds_are_said_where_doctor_needs_them(name: str, component: str) -> None:
    low, high = bounds(upstreams.get(name).supported[component])
    assert Version("0") < low < high < Version("9999")


def sets_tested() -> list[tuple[str, Upstream, Mapping[str, str]]]:
    """(what make calls the environment, upstream, versions) of all that the tests run with."""
    sets = {upstream: {upstream.name: upstream.pinned, **upstream.also_tested} for upstream in upstreams.every()}
    return [(name, upstream, set_) for upstream, its in sets.items() for name, set_ in its.items()]


@pytest.mark.parametrize(("name", "upstream", "set_"), sets_tested(), ids=[name for name, *_ in sets_tested()])
def test_the_tests_install_what_is_pinned(name: str, upstream: Upstream, set_: Mapping[str, str]) -> None:
    (variable,) = re.findall(r"call make-venv,.*,\$\((\w+)\),", recipe(name))
    torch = re.findall(rf"^{variable} \?= (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    installed = pins("\n".join([requirements(name), recipe(name), *torch]))
    assert {component: installed.get(component) for component in set_} == set_
    for distribution in set(upstream.distributions) & set(installed):
        assert f"{distribution}=={installed[distribution]}" in upstream.get_command({})


def test_the_page_prints_the_sets() -> None:
    page = (ROOT / "llava_region/doctor/README.md").read_text()
    rows = [row.strip("|").split("|") for row in re.findall(r"^\| (?:next to|LLaVA|Bunny)\b.*\|$", page, re.MULTILINE)]
    (_, *head, _), *rows = [[cell.strip() for cell in row] for row in rows]
    printed = {command.strip("`"): dict(zip(head, cells, strict=True)) for _, *cells, command in rows}
    commands = {"llava": "make test", "bunny": "make test-bunny"}
    for name, _, set_ in sets_tested():
        assert printed.pop(commands.get(name, f"make test-{name}")) == {component: set_[component] for component in head}
    assert printed == {}


def test_the_package_requires_no_less_than_the_upstreams_need() -> None:
    """A version that an upstream is expected to work with can be installed next to this package."""
    ranges = required()
    for component, row in versions.versions().items():
        for column in row.values():
            low, high = bounds(column.supported)
            lowest, highest = bounds(ranges.get(component, ""))
            assert lowest <= low and high <= highest, component


@pytest.mark.parametrize("component", ["python", "torch", "transformers", "peft", "deepspeed", "numpy", "bitsandbytes", "flash-attn"])
def test_the_package_requires_no_more_than_the_upstreams_take(component: str) -> None:
    """And one that none works with is kept out."""
    assert SpecifierSet(required()[component]) == SpecifierSet(versions.span(component))


def test_doctor_names_no_upstream_and_repeats_no_version() -> None:
    files = [*Path(str(doctor.__file__)).parent.glob("*.py"), Path(str(command.__file__))]
    assert len(files) == 5
    words, ranges = set(), set()
    for upstream in upstreams.every():
        words |= {upstream.name, upstream.title, upstream.commit, upstream.trainer, type(upstream).__name__, *upstream.variables}
        words |= {*upstream.architectures.values(), *upstream.pinned.values(), *upstream.distributions}
        ranges |= set(upstream.supported.values())
    said = re.compile(rf"(?<![\w.])({'|'.join(map(re.escape, sorted(words)))})(?![\w.]|-region)", re.IGNORECASE)
    for file in files:
        text = file.read_text()
        assert said.findall(text) == [], file
        constants = {node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
        assert not constants & ranges, file
