"""`llava-region recipes`: the shell launchers and DeepSpeed configs of this package, copied into a folder."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import typer

from llava_region.files import recipes_folder

FOLDERS = {
    "train": "one launcher per model; the settings are listed at the top of common.sh",
    "reproduce": "one driver for each of the paper's tables and figures",
    "slurm": "a job file for several nodes",
    "deepspeed": "configs for ZeRO-2, ZeRO-3 and ZeRO-3 with offload",
}


def command(
    folder: Path = typer.Argument(..., help="Folder to write."),
    force: bool = typer.Option(False, "--force", help="Replace the folder if it exists."),
    as_json: bool = typer.Option(False, "--json", help='Print {"out", "files"}.'),
) -> None:
    """Copy the launchers, the drivers of the paper's tables, the Slurm file and the DeepSpeed configs into a folder.

    They call the installed llava_region, find each other by relative paths, and can be run from any folder.
    """
    files = copy(folder, force)
    if as_json:
        print(json.dumps({"out": str(folder), "files": files}))
        return
    for name, text in FOLDERS.items():
        print(f"{folder / name}: {text}")
    print("To print a launcher's command line without running it:")
    print(f"    DRY_RUN=1 {shlex.quote(str(folder.absolute() / 'train' / 'llava_7b.sh'))}")


def copy(folder: Path, force: bool = False) -> list[str]:
    """Copy the recipes; executable files stay executable. Returns the paths of the files, relative to `folder`, sorted.

    Raises:
        LlavaRegionError: the folder exists and is not empty, and `force` is not set; or it cannot be written.
    """
    from shutil import copy2, copytree, ignore_patterns

    from llava_region.files import output_folder

    source = recipes_folder()
    with output_folder(folder, force) as temporary:
        copy2(source / "launching.sh", temporary)
        for name in FOLDERS:
            copytree(source / name, temporary / name, ignore=ignore_patterns("__pycache__"))
        return sorted(path.relative_to(temporary).as_posix() for path in temporary.rglob("*") if path.is_file())
