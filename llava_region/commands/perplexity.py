"""`llava-region perplexity`: how well a model predicts answers, as it is and with layers back at the backbone's weights."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import typer


def command(
    model: Path = typer.Argument(..., help="A LLaVA or Bunny model, a LoRA run, or a plain language model (text only)."),
    data: list[Path] = typer.Option(..., "--data", help="JSON file in LLaVA's format; give the option once per file."),
    image_folder: Path = typer.Option(None, "--image-folder", help="Folder that the records' images are relative to."),
    revert_sweep: str = typer.Option(
        None, "--revert-sweep", help="Sets of layers to put back, with ; between: '0-3;28-31;sparse:25%'. In memory; nothing is written."
    ),
    base: str = typer.Option(
        None,
        "--base",
        help="The backbone (the language model before visual tuning): what the sweep puts back, and what a LoRA run goes on. Default for a "
        "LoRA run: the model that it names.",
    ),
    lora_base: str = typer.Option(
        None,
        "--lora-base",
        help="For a LoRA run that was trained on another model than the backbone: that model. --base is then the sweep's alone.",
    ),
    template: str = typer.Option(None, "--template", help="Conversation template. Default: the model's own."),
    batch_size: int = typer.Option(8, "--batch-size", min=1, help="Records per batch; the result does not depend on it."),
    workers: int = typer.Option(4, "--workers", min=1, help="Threads that read images."),
    device: str = typer.Option(None, "--device", help="cuda, cuda:1, cpu. Default: cuda if there is any."),
    dtype: str = typer.Option(None, "--dtype", help="float32, bfloat16 or float16. Default: float32 on CPU, else the model's own."),
    out: Path = typer.Option(None, "--out", help="Write the rows as JSON."),
    plot: Path = typer.Option(None, "--plot", help="Draw the bars of Figure 1 (left): .png, .svg or .pdf."),
    force: bool = typer.Option(False, "--force", help="Replace --out and --plot if they exist."),
    as_json: bool = typer.Option(False, "--json", help="Print what --out writes: model, base, template and rows."),
) -> None:
    """Perplexity on the answers of LLaVA-format files, teacher-forced through the model's training template.

    With --revert-sweep also for each set of decoder layers put back to the backbone's weights (paper, Figure 1, left).
    """
    from llava_region import locks
    from llava_region.evaluation.perplexity import sweep
    from llava_region.evaluation.perplexity_plot import check_plot, draw
    from llava_region.files import refuse_existing, write_json

    with ExitStack() as stack:
        for path in filter(None, (out, plot)):
            stack.enter_context(locks.held(path))
        if out:
            refuse_existing(out, force)
        if plot:
            check_plot(plot, force)
        result = sweep(
            model, data, image_folder=image_folder, base=base, lora_base=lora_base, revert=revert_sweep, batch_size=batch_size,
            workers=workers, device=device, dtype=dtype, template=template,
        )  # fmt: skip
        rows = result["rows"]
        if out:
            write_json(out, result)
        if plot:
            draw(rows, plot)
    if as_json:
        print(json.dumps(result))
    else:
        _show(rows)


def _show(rows: list[dict[str, Any]]) -> None:
    from llava_region.evaluation.perplexity_plot import rises
    from llava_region.region import layer_ranges

    print(f"{'data':<32}{'reverted layers':<24}{'perplexity':>12}{'rise':>10}{'tokens':>10}")
    for row, rise in zip(rows, rises(rows), strict=True):
        value = "inf" if row["perplexity"] is None else f"{row['perplexity']:.4f}"
        percent = "" if rise is None or not row["reverted"] else f"{rise:+.2f} %"
        print(f"{Path(row['data']).name:<32}{layer_ranges(row['reverted']):<24}{value:>12}{percent:>10}{row['tokens']:>10,}")
    skipped = {row["data"]: row["unlabelled"] for row in rows if row["unlabelled"]}
    for name, count in skipped.items():
        print(f"{name}: {count} records have no answer token within the model's maximum length, and count for nothing")
