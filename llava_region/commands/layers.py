"""`llava-region layers`: which layers a spec means for a model."""

import json
from pathlib import Path

import typer


def command(
    model: Path = typer.Argument(..., help="Folder with a config.json: a model, a backbone, or a run's output."),
    spec: str = typer.Argument(None, help="Layer spec, such as sparse:25%. Without it: the region the folder was trained with."),
    as_json: bool = typer.Option(False, "--json", help='Print {"layers", "num_layers", "spec"}.'),
) -> None:
    """Show which decoder layers a spec means for a model, or the region a model was trained with."""
    from llava_region.checkpoints.model_source import ModelSource, num_layers_in
    from llava_region.files import read_json
    from llava_region.region import Region
    from llava_region.run_files import CONFIG_FILE

    model = model.parent if model.name == CONFIG_FILE and model.is_file() else model
    if spec is None:
        region = Region.load(model)
    else:  # a file: a config under any name
        region = Region.parse(spec, num_layers_in(read_json(model), str(model)) if model.is_file() else ModelSource.of(model).num_layers)
    if as_json:
        print(json.dumps(region.to_dict()))
        return
    print(f"{region.spec}: {len(region)} of {region.num_layers} decoder layers ({len(region) / region.num_layers:.1%})")
    print(",".join(map(str, region.layers)))
    print(region.map_line())
