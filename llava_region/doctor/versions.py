"""The table of versions: what each upstream works with, and what it was tested with.

The numbers are the upstreams' own (`supported`, `pinned`); whatever `llava-region doctor` says of ranges, pins and tested sets is
read off this table.
"""

from __future__ import annotations

from dataclasses import dataclass

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from llava_region import upstreams

TESTED = ("torch", "transformers", "peft", "accelerate", "deepspeed")  # what a tested set is told by


@dataclass(frozen=True)
class Versions:
    """What one upstream says about one component.

    Attributes:
        supported: version range in which it is expected to work; empty: any.
        pinned: the version that it was tested with; None: no particular one.
    """

    supported: str = ""
    pinned: str | None = None


def versions() -> dict[str, dict[str, Versions]]:
    """The table: component -> name of the upstream -> versions. Every row has every upstream, in their order."""
    every = upstreams.every()
    components = dict.fromkeys(name for upstream in every for name in (*upstream.supported, *upstream.pinned))
    return {
        name: {upstream.name: Versions(upstream.supported.get(name, ""), upstream.pinned.get(name)) for upstream in every}
        for name in components
    }


def ranges(component: str) -> dict[str, tuple[str, ...]]:
    """The supported ranges of a component, each with the names of the upstreams that have it."""
    found: dict[str, tuple[str, ...]] = {}
    for name, row in versions().get(component, {}).items():
        found[row.supported] = (*found.get(row.supported, ()), name)
    return found


def span(component: str) -> str:
    """The smallest range without a gap that contains every upstream's: outside it no upstream is expected to work."""
    lows = [_bound(spec, ">=") for spec in ranges(component)]
    highs = [_bound(spec, "<") for spec in ranges(component)]
    low = [] if None in lows else [f">={min(filter(None, lows))}"]
    high = [] if None in highs else [f"<{max(filter(None, highs))}"]
    return ",".join(low + high)


def minors(spec: str) -> list[str]:
    """The minor releases of the major one that a range begins with: `>=3.10,<3.13` has 3.10, 3.11 and 3.12.

    Args:
        spec: a range with a lower bound and, above it, an upper one.
    """
    low = _bound(spec, ">=")
    assert low is not None, spec
    # a minor release is in the range where its last patch release is
    return [f"{low.major}.{minor}" for minor in range(100) if SpecifierSet(spec).contains(f"{low.major}.{minor}.999")]


def tested(name: str) -> str:
    """The set of versions with which an upstream ran end to end, as text."""
    upstream = upstreams.get(name)
    return ", ".join([upstream.tested, *(f"{part} {upstream.pinned[part]}" for part in TESTED if part in upstream.pinned)])


def _bound(spec: str, operator: str) -> Version | None:
    return next((Version(part.version) for part in SpecifierSet(spec) if part.operator == operator), None)
