"""The ranking of the layers by each metric, their correlation, and the figures, as `llava-region score` shows them."""

from __future__ import annotations

from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from llava_region.checkpoints.model_source import ModelLike, ModelSource
from llava_region.errors import LlavaRegionError
from llava_region.region import Region
from llava_region.scores.figures import draw


def check_top(model: ModelLike, top: int | None) -> None:
    """Refuse a --top that is not a number of layers of the model.

    Raises:
        LlavaRegionError: it is not, or this is not a model.
    """
    layers = ModelSource.of(model).num_layers
    if top is not None and not 1 <= top <= layers:
        raise LlavaRegionError(f"--top is {top}; allowed: 1 to {layers}, the model's decoder layers")


def show(result: dict, out: Path, top: int | None, spread: bool, plot: Path | None, quiet: bool = False) -> dict:
    """Print the tables (unless `quiet`), draw the figures if asked, and return both as data.

    Args:
        result: the content of the scores file `out`.
        top: how many layers to name; None: a quarter of them.
        spread: the best of each of `top` equal blocks.
    """
    count = top or max(1, result["num_layers"] // 4)
    specs = {name: f"{out}:{name}:{count}" + (":spread" if spread else "") for name in result["metrics"]}
    layers = {name: list(Region.parse(spec, result["num_layers"]).layers) for name, spec in specs.items()}
    figures = draw(result, plot, layers) if plot else []
    if not quiet:
        console = Console(highlight=False)
        console.print(_rankings(result, layers, count, spread))
        if len(result["metrics"]) > 1:
            console.print(_correlations(result["correlation"]))
        console.print(f"{out}: train by it with --tune_layers {next(iter(specs.values()))}", soft_wrap=True)
        for path in figures:
            console.print(str(path), soft_wrap=True)
    kept = {name: value for name, value in result.items() if name != "instances"}
    return {"out": str(out), "top": layers, "figures": [str(path) for path in figures], **kept}


def _rankings(result: dict, layers: dict[str, list[int]], count: int, spread: bool) -> Table:
    table = Table(box=SIMPLE)
    table.add_column("metric", no_wrap=True)
    for title in ("samples", f"top {count}" + (", one a block" if spread else ""), "layers from high to low"):
        table.add_column(title)
    for name, metric in result["metrics"].items():
        ranked = sorted(range(result["num_layers"]), key=lambda layer: (-metric["scores"][layer], layer))
        samples = "" if metric["samples"] is None else str(metric["samples"])
        table.add_row(name, samples, ",".join(map(str, layers[name])), " ".join(map(str, ranked)))
    return table


def _correlations(correlation: dict) -> Table:
    names = list(correlation)
    table = Table(box=SIMPLE, padding=0)
    table.add_column("rank correlation", no_wrap=True)
    for i in range(len(names)):
        table.add_column(str(i + 1), justify="right", min_width=6)
    for i, name in enumerate(names):
        row = ("" if correlation[name][other] is None else f"{correlation[name][other]:.2f}" for other in names)
        table.add_row(f"{i + 1} {name}", *row)
    return table
