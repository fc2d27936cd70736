"""`llava-region layers`: which layers a spec means for a model."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from llava_region.region import Region


def command(
    model: Path = typer.Argument(..., help="Folder with a config.json: a model, a backbone, or a run's output."),
    specs: list[str] = typer.Argument(
        None, metavar="SPEC", help="Layer specs, such as sparse:25%. Without one: the region the folder was trained with."
    ),
    as_json: bool = typer.Option(False, "--json", help='Print {"layers", "num_layers", "spec"}, on a line for each spec.'),
) -> None:
    """Show which decoder layers a spec means for a model, or the region a model was trained with.

    Of several specs nothing is shown unless all of them fit.
    """
    from llava_region.checkpoints.model_source import ModelSource, num_layers_in
    from llava_region.files import read_json
    from llava_region.region import Region
    from llava_region.run_files import CONFIG_FILE

    model = model.parent if model.name == CONFIG_FILE and model.is_file() else model
    if not specs:
        regions = [_trained(model)]
    else:  # a file: a config under any name
        count = num_layers_in(read_json(model), str(model)) if model.is_file() else ModelSource.of(model).num_layers
        regions = [Region.parse(spec, count) for spec in specs]
    for region in regions:
        print(json.dumps(region.to_dict()) if as_json else _described(region))


def _described(region: Region) -> str:
    """A region for people: how many layers, which, and the map."""
    share = f"{len(region)} of {region.num_layers} decoder layers ({len(region) / region.num_layers:.1%})"
    return "\n".join((f"{region.spec}: {share}", ",".join(map(str, region.layers)), region.map_line()))


def _trained(model: Path) -> Region:
    """The region that a model was trained with.

    Raises:
        LlavaRegionError: it was not trained by this package, or there is no model.
    """
    from llava_region.checkpoints.model_source import ModelSource
    from llava_region.errors import LlavaRegionError
    from llava_region.region import Region
    from llava_region.run_files import REGION_FILE

    if not (model / REGION_FILE).is_file():
        source = ModelSource.of(model)
        if source.region is None and source.num_layers:  # a model it is
            raise LlavaRegionError(
                f"{model} was not trained with --tune_layers, so it has no region of its own; give a layer spec, such as "
                f"'llava-region layers {shlex.quote(str(model))} sparse:25%'"
            )
    return Region.load(model)
