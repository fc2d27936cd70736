"""`llava-region score`: how important each decoder layer is, by several metrics."""

import json
import sys
from pathlib import Path

import typer

HELP_METRICS = (
    "all, or names with commas: block_influence, multimodal_block_influence, angular_distance, image_attention (these need --data); "
    "parameter_change, angular_distance_weights (these need --base)."
)
HELP_DATA = (
    "JSON list in LLaVA's format; give the option once per file; the whole conversation is read, answers included. With --prompt also a "
    "list of image names."
)
HELP_PROMPT = (
    "Ask this of every image instead of the records' own conversations. The paper's authors scored block influence on 1,000 Flickr30k "
    'images with "Please describe this image in detail."'
)
HELP_BASE = "The backbone to compare weights with; for a LoRA run also what it was trained on. Default: the one that the run names."


def command(
    model: str = typer.Argument(..., help="LLaVA or Bunny model, or a LoRA run; a plain language model for metrics without images."),
    metrics: str = typer.Option("all", "--metrics", help=HELP_METRICS),
    data: list[Path] = typer.Option([], "--data", help=HELP_DATA),
    image_folder: Path = typer.Option(None, "--image-folder", help="Folder that the images' names are relative to."),
    base: str = typer.Option(None, "--base", help=HELP_BASE),
    prompt: str = typer.Option(None, "--prompt", help=HELP_PROMPT),
    limit: int = typer.Option(None, "--limit", min=1, help="Records of each data file, drawn at random with --seed. Default: all."),
    seed: int = typer.Option(0, "--seed", help="Of --limit."),
    batch_size: int = typer.Option(4, "--batch-size", min=1, help="Samples in one forward pass."),
    instances: int = typer.Option(
        50, "--instances", min=0, help="Records of each data file kept one by one for the heat map of image attention."
    ),
    eps: float = typer.Option(1e-6, "--eps", min=0, help="parameter_change leaves out weights of the backbone smaller than this."),
    device: str = typer.Option(None, "--device", help="cuda, cuda:1, cpu. Default: a GPU if there is one."),
    dtype: str = typer.Option(None, "--dtype", help="float32, bfloat16 or float16. Default: the model's own on a GPU, float32 on a CPU."),
    template: str = typer.Option(None, "--template", help="Conversation template. Default: the model's own."),
    attention: str = typer.Option(None, "--attn-implementation", help="eager, sdpa or flash_attention_2. Default: the upstream's."),
    out: Path = typer.Option(..., "--out", help="File to write: --tune_layers FILE:METRIC:8 trains by it."),
    resume: bool = typer.Option(False, "--resume", help="Go on with what an interrupted run left next to --out."),
    force: bool = typer.Option(False, "--force", help="Replace --out, and what an interrupted run left."),
    plot: Path = typer.Option(None, "--plot", help="Folder for figures: each metric by layer, image attention by instance and layer."),
    top: int = typer.Option(None, "--top", help="How many layers to name as the highest. Default: a quarter of them."),
    spread: bool = typer.Option(False, "--spread", help="Name the best layer of each of --top equal blocks instead."),
    as_json: bool = typer.Option(False, "--json", help="Print what was written (without instances), and the highest layers."),
) -> None:
    """Score every decoder layer by importance metrics; several GPUs: torchrun --nproc_per_node N -m llava_region score ..."""
    from llava_region.checkpoints.model_source import ModelSource
    from llava_region.errors.interrupts import signal_code
    from llava_region.scores.metrics import parse_metrics
    from llava_region.scores.pass_over_data import Interrupted
    from llava_region.scores.rankings import check_top, show
    from llava_region.scores.score import Options, score

    source = ModelSource.of(model)
    check_top(source, top)
    options = Options(
        metrics=parse_metrics(metrics), image_folder=image_folder, base=base, limit=limit, seed=seed, prompt=prompt, batch_size=batch_size,
        instances=instances, eps=eps, device=device, dtype=dtype, template=template, attn_implementation=attention, resume=resume,
        force=force,
    )  # fmt: skip
    try:
        result = score(source, data, out, options)
    except Interrupted as e:
        print(e, file=sys.stderr)
        raise typer.Exit(signal_code(e.number)) from e
    if result is not None:
        report = show(result, out, top, spread, plot, quiet=as_json)
        if as_json:
            print(json.dumps(report))
