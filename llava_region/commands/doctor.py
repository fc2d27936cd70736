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
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from llava_region import upstreams
    from llava_region.doctor import rules, versions

    table = Table("Component", "Installed", *(f"With {upstream.title}" for upstream in upstreams.every()), "State")
    for *cells, state in rows(facts, findings):
        table.add_row(*map(escape, cells), f"[{COLOURS.get(state, 'dim')}]{state}[/]")
    console = Console(soft_wrap=True)
    console.print(table, soft_wrap=False)
    for finding in findings:
        console.print(f"[{COLOURS[finding.level]}]{finding.level}[/] {finding.component}: {escape(finding.text)}", highlight=False)
        if finding.mend:
            console.print(f"    {escape(finding.mend)}", highlight=False)
    able = rules.trains(facts, findings)
    for upstream in upstreams.every():
        installed = "training cannot work" if facts.has(upstream.name) else "not installed"
        text = "training can work" if able[upstream.name] else installed
        console.print(f"{upstream.title}: {text}; tested: {versions.tested(upstream.name)}", highlight=False)


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
