"""`llava-region doctor`: what is installed, what breaks, and what mends it."""

import json

import typer


def command(as_json: bool = typer.Option(False, "--json", help='Print {"works", "trains", "tested", "facts", "findings"}.')):
    """Show what is installed, what is supported with it, what will break, and the command that mends it.

    Exit status 1 if training can work with neither LLaVA nor Bunny.
    """
    from llava_region.doctor import rules as doctor

    facts = doctor.collect()
    findings = doctor.diagnose(facts)
    if as_json:
        print(json.dumps(doctor.report(facts, findings), indent=2))
    else:
        _show(facts, findings)
    return 0 if any(doctor.trains(facts, findings).values()) else 1


def _show(facts, findings) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from llava_region.doctor import rules as doctor

    colours = {"error": "red", "warning": "yellow", "note": "dim", "ok": "green"}
    table = Table("Component", "Installed", "With LLaVA", "With Bunny", "State")
    for name, installed, llava, bunny, state in rows(facts, findings):
        table.add_row(name, escape(installed), llava, bunny, f"[{colours.get(state, 'dim')}]{state}[/]")
    console = Console(soft_wrap=True)
    console.print(table, soft_wrap=False)
    for finding in findings:
        console.print(f"[{colours[finding.level]}]{finding.level}[/] {finding.component}: {escape(finding.text)}", highlight=False)
        if finding.mend:
            console.print(f"    {escape(finding.mend)}", highlight=False)
    for upstream, able in doctor.trains(facts, findings).items():
        text = "training can work" if able else "training cannot work" if facts.has(upstream) else "not installed"
        console.print(f"{doctor.TITLES[upstream]}: {text}; tested: {doctor.TESTED[upstream]}", highlight=False)


def rows(facts, findings) -> list[tuple[str, str, str, str, str]]:
    """The table: component, installed version, ranges supported with LLaVA and with Bunny, and the worst finding's level."""
    from llava_region.doctor import rules as doctor

    worst: dict[str, str] = {}
    for finding in findings:  # errors come first
        worst.setdefault(finding.component, finding.level)
    out = []
    for component, specs in doctor.SUPPORTED.items():
        installed = facts.versions.get(component, "not installed")
        state = worst.get(component, "ok" if facts.has(component) else "-")
        out.append((component, installed, specs["llava"], specs["bunny"], state))
    out.insert(2, ("cuda", facts.cuda or "none in torch", "any", "any", worst.get("cuda", "ok")))
    out.insert(3, ("GPU", ", ".join(facts.gpus) or "none", "any", "any", worst.get("cuda", "ok")))
    for upstream, commit in (("llava", "c121f04"), ("bunny", "08273ac")):
        version = (facts.versions[upstream] or "no version") if facts.has(upstream) else "not installed"
        supported = (commit, "") if upstream == "llava" else ("", commit)
        state = worst.get(upstream, "ok" if facts.has(upstream) else "-")
        out.append((doctor.TITLES[upstream], version, *supported, state))
    return out
