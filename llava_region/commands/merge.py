"""`llava-region merge`: a LoRA run into a full model."""

import json
from pathlib import Path

import typer


def command(
    run: Path = typer.Argument(..., help="Output folder of a LoRA run, or a checkpoint-N in it."),
    out: Path = typer.Option(..., "--out", help="Folder to write."),
    base: str = typer.Option(None, "--base", help="Model the run was trained on (QLoRA: in 16 bit). Default: the one the run names."),
    force: bool = typer.Option(False, "--force", help="Replace --out if it is there."),
    as_json: bool = typer.Option(False, "--json", help='Print {"out", "run", "base", "layers", "merged", "copied", "bytes", "remarks"}.'),
) -> None:
    """Merge a LoRA run into a full model, which upstream loads without a base; never holds the model in memory."""
    from llava_region.surgery.merge import merge

    report = merge(run, out, base, force=force)
    if as_json:
        print(json.dumps(report))
        return
    for remark in report["remarks"]:
        print(remark)
    layers, size = ",".join(map(str, report["layers"])), f"{report['bytes'] / 1e9:.2f} GB"
    print(f"{out}: {report['merged']} weights in decoder layers {layers} merged, {report['copied']} copied, {size}")
