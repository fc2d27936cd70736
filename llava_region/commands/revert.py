"""`llava-region revert`: decoder layers back to the backbone's weights."""

import json
from pathlib import Path

import typer


def command(
    model: Path = typer.Argument(..., help="Full LLaVA or Bunny model."),
    base: str = typer.Option(..., "--base", help="The language model it was tuned from."),
    layers: str = typer.Option(..., "--layers", help="Layer spec such as 0,4,8-11 or sparse:25%, or none."),
    out: Path = typer.Option(..., "--out", help="Folder to write."),
    force: bool = typer.Option(False, "--force", help="Replace --out if it is there."),
    as_json: bool = typer.Option(False, "--json", help='Print {"out", "model", "base", "layers", "tensors", "copied", "bytes"}.'),
) -> None:
    """Put decoder layers back to the backbone's weights; the rest and the projector stay as they are."""
    from llava_region.surgery.revert import revert

    report = revert(model, base, layers, out, force=force)
    if as_json:
        print(json.dumps(report))
        return
    back = ",".join(map(str, report["layers"])) or "none"
    print(f"{out}: decoder layers {back} as in {base} ({report['tensors']} tensors), {report['copied']} tensors kept")
