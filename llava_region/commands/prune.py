"""`llava-region prune`: decoder layers outside the region removed."""

import json
from pathlib import Path

import typer


def command(
    model: Path = typer.Argument(..., help="Full LLaVA or Bunny model, or a LoRA run, which is merged on the way."),
    out: Path = typer.Option(..., "--out", help="Folder to write."),
    drop: int = typer.Option(None, "--drop", help="How many layers to drop: those with the lowest angular distance, outside --protect."),
    scores: Path = typer.Option(None, "--scores", help="File with angular_distance, written by 'llava-region score' for this model."),
    layers: str = typer.Option(None, "--layers", help="Drop exactly these, such as 21,23-25; instead of --drop."),
    protect: str = typer.Option(None, "--protect", help="Layers never to drop, or none. Default: the region the model was trained with."),
    base: str = typer.Option(None, "--base", help="For a LoRA run: what it was trained on. Default: the one the run names."),
    no_self_test: bool = typer.Option(False, "--no-self-test", help="Do not load the result and generate; for models larger than memory."),
    force: bool = typer.Option(False, "--force", help="Replace --out if it is there."),
    as_json: bool = typer.Option(False, "--json", help='Print {"out", "model", "dropped", "num_layers", "original_num_layers", ...}.'),
) -> None:
    """Remove decoder layers outside the visual region; the others are renumbered, so that the cache works."""
    from llava_region.surgery.prune import prune

    report = prune(
        model, out, drop=drop, scores=scores, layers=layers, protect=protect, base=base, force=force, check=not no_self_test
    )  # fmt: skip
    if as_json:
        print(json.dumps(report))
        return
    for remark in report["remarks"]:
        print(remark)
    dropped = ",".join(map(str, report["dropped"]))
    print(f"{out}: decoder layers {dropped} dropped, {report['num_layers']} of {report['original_num_layers']} left")
    print(f"region in new numbers: {','.join(map(str, report['layers'])) or 'none'}")
