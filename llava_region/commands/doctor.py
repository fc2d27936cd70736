"""`llava-region doctor`: what is installed, what breaks, and what fixes it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from llava_region.doctor.facts import Facts
    from llava_region.doctor.rules import Finding

COLOURS = {"error": "red", "warning": "yellow", "note": "dim", "ok": "green"}


def command(as_json: bool = typer.Option(False, "--json", help='Print {"works", "trains", "tested", "facts", "findings"}.')) -> int:
    """Show what is installed, what is supported with it, what will break, and the command that fixes it.

    Exit status 1 if training cannot work with any upstream.
    """
    from llava_region.doctor import facts as machine
    from llava_region.doctor import rules

    facts = machine.collect()
    findings = rules.diagnose(facts)
    if as_json:
        print(json.dumps(rules.report(facts, findings), indent=2))
    else:
        _show(facts, findings)
    return 0 if any(rules.trains(facts, findings).values()) else 1


def _show(facts: Facts, findings: list[Finding]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from llava_region import upstreams
    from llava_region.doctor import rules, versions
    from llava_region.progress import console

    screen = console(soft_wrap=True)
    titles, found = [upstream.title for upstream in upstreams.every()], rows(facts, findings)
    if _width(titles, found) <= screen.width:
        table = Table("Component", "Installed", *(f"With {title}" for title in titles), "State")
        for *cells, state in found:
            table.add_row(*map(escape, cells), f"[{COLOURS.get(state, 'dim')}]{state}[/]")
        screen.print(table, soft_wrap=False)
    else:  # cells would be cut
        for component, installed, *ranges, state in found:
            supported = "; ".join(f"{title} {one}" for title, one in zip(titles, ranges, strict=True) if one)
            line = f"{component} {installed} ({supported}): "
            screen.print(f"{escape(line)}[{COLOURS.get(state, 'dim')}]{state}[/]", highlight=False)
    for finding in findings:
        screen.print(f"[{COLOURS[finding.level]}]{finding.level}[/] {finding.component}: {escape(finding.text)}", highlight=False)
        if finding.mend:
            screen.print(f"    {escape(finding.mend)}", highlight=False)
    able = rules.trains(facts, findings)
    for upstream in upstreams.every():
        installed = "training cannot work" if facts.has(upstream.name) else "not installed"
        text = "training can work" if able[upstream.name] else installed
        screen.print(f"{upstream.title}: {text}; tested: {versions.tested(upstream.name)}", highlight=False)


def _width(titles: list[str], found: list[tuple[str, ...]]) -> int:
    """Columns that the table takes with nothing cut."""
    heads = ("Component", "Installed", *(f"With {title}" for title in titles), "State")
    return 1 + sum(3 + max(map(len, column)) for column in zip(heads, *found, strict=True))


def rows(facts: Facts, findings: list[Finding]) -> list[tuple[str, ...]]:
    """The table: component, installed version, the range supported with each upstream, and the worst finding's level."""
    from llava_region import upstreams
    from llava_region.doctor.versions import versions

    worst: dict[str, str] = {}
    for finding in findings:  # errors come first
        worst.setdefault(finding.component, finding.level)

    def state(component: str) -> str:
        return worst.get(component, "ok" if facts.has(component) else "-")

    out: list[tuple[str, ...]] = []
    for component, row in versions().items():
        supported = (column.supported or "any" for column in row.values())
        out.append((component, facts.versions.get(component, "not installed"), *supported, state(component)))
    anything = ["any"] * len(upstreams.names())
    out.insert(2, ("cuda", facts.cuda or "none in torch", *anything, worst.get("cuda", "ok")))
    out.insert(3, ("GPU", ", ".join(facts.gpus) or "none", *anything, worst.get("cuda", "ok")))
    for upstream in upstreams.every():
        installed = (facts.versions[upstream.name] or "no version") if facts.has(upstream.name) else "not installed"
        commits = (upstream.commit if name == upstream.name else "" for name in upstreams.names())
        out.append((upstream.title, installed, *commits, state(upstream.name)))
    return out
