"""`llava-region subset`: a random, nested part of a training file."""

from __future__ import annotations

import json
from pathlib import Path

import typer


def command(
    data: Path = typer.Argument(..., help="Training file in LLaVA's format: a JSON list of records."),
    fraction: str = typer.Option(..., "--fraction", help="Part to keep: 0.25, 25% or 1/4."),
    out: Path = typer.Option(..., "--out", help="File to write."),
    seed: int = typer.Option(0, "--seed", help="With the same seed, a smaller part lies inside a larger one."),
    force: bool = typer.Option(False, "--force", help="Replace the output if it exists."),
    as_json: bool = typer.Option(False, "--json", help='Print {"out", "fraction", "seed", "records", "images", "texts"}.'),
) -> None:
    """Keep a random part of a training file, with and without images in the proportion they had.

    Records keep their order. The same file, fraction and seed give the same part on every machine.
    """
    from llava_region import locks
    from llava_region.data.subset import parse_fraction, write_subset

    part = parse_fraction(fraction)
    with locks.held(out):
        kept = write_subset(data, out, part, seed, force)
    if as_json:
        counts = {"records": kept.images + kept.texts, "images": kept.images, "texts": kept.texts}
        print(json.dumps({"out": str(out), "fraction": float(part), "seed": seed, **counts}))
        return
    print(f"{out}: {kept.images + kept.texts:,} of {kept.all_images + kept.all_texts:,} records, seed {seed}")
    print(f"{kept.images:,} of {kept.all_images:,} with an image, {kept.texts:,} of {kept.all_texts:,} without")
