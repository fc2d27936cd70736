"""`--deepspeed auto`: ZeRO-2, ZeRO-3, or ZeRO-3 with offload, by what a GPU has to hold and by how the GPUs are joined.

ZeRO-2 holds all weights on each GPU. ZeRO-3 gathers them twice per step: 13.5 GB for a 7B model, which takes 0.1 s over NVLink and 1 s
over PCIe or between nodes. What ZeRO-2 holds more is missing for activations, so that layers may have to be recomputed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llava_region import processes
from llava_region.checkpoints.model_source import num_layers_in
from llava_region.files import read_json, recipes_folder
from llava_region.region import Region
from llava_region.run_files import CONFIG_FILE, RUN_FILE
from llava_region.training.deepspeed_config import is_offloaded
from llava_region.training.empty_model import empty_model
from llava_region.training.kept_memory import MARGIN, activations_of
from llava_region.training.model_states import estimate_memory
from llava_region.training.preflight import Preflight, model_config, parse
from llava_region.training.recompute import why_all
from llava_region.training.recompute_plan import Activations, Levels, Workload
from llava_region.training.sizes import format_size

if TYPE_CHECKING:
    from torch import nn

    from llava_region.upstreams import Upstream

AUTO = "auto"  # the value of --deepspeed
CONFIGS = ("zero2", "zero3", "zero3_offload")  # from the fastest to the smallest


@dataclass(frozen=True)
class Need:
    """What a GPU has to hold under one of this package's DeepSpeed configs.

    Attributes:
        name: of the config; states: bytes of weights, gradients and the optimizer's states.
        activations: of the largest batch; None: none is recomputed or all are, whatever the memory.
    """

    name: str
    states: float
    activations: Activations | None

    @property
    def least(self) -> float:
        """Bytes with every layer recomputed."""
        return self.states + (self.activations.peak(range(len(self.activations.kept))) if self.activations else 0)

    @property
    def most(self) -> float:
        """Bytes with no layer recomputed."""
        return self.states + (self.activations.peak(()) if self.activations else 0)

    def level(self, room: float) -> int:
        """How much of the largest batch is computed again (`Levels`) where so many bytes are free."""
        if self.activations is None:
            return 0
        return Levels.of(self.activations).least(self.activations, int(room - self.states))


def config_path(name: str) -> Path:
    """The file of one of this package's DeepSpeed configs."""
    return recipes_folder() / "deepspeed" / f"{name}.json"


def names_for(args: Namespace, quantised: bool) -> tuple[str, ...]:
    """The configs that a run can train under: packed weights cannot be sharded, and the upstreams cast the tower to half in any case."""
    return CONFIGS[:1] if quantised or not (args.bf16 or args.fp16) else CONFIGS


def needs_of(model: nn.Module, preflight: Preflight, gpus: int) -> list[Need]:
    """What a GPU has to hold under each config that the run can train under.

    Args:
        model: on the meta device, as it trains.
    """
    args, recipe = preflight.args, preflight.recipe
    by_layer = args.gradient_checkpointing and not why_all(model)
    activations = activations_of(model, Workload.of(args, recipe.max_length)) if by_layer else None
    found = []
    for name in names_for(args, recipe.bits != 16):
        zero = read_json(config_path(name))["zero_optimization"]
        found.append(Need(name, sum(estimate_memory(model, args, recipe, gpus, zero)), activations))
    return found


def choose(needs: Sequence[Need], room: float, joined: bool) -> tuple[str, str]:
    """The config to train under, and why.

    Args:
        room: bytes of a GPU that may be filled.
        joined: whether all GPUs reach each other over NVLink, so that gathering weights costs little.
    """
    size = format_size(room)
    first = next((need for need in needs if need.least <= room), needs[-1])
    if first.least > room:
        return first.name, f"{format_size(first.least)} per GPU of {size} that may be filled, which may not be enough"
    if first is not needs[0]:
        return first.name, f"{needs[0].name} does not fit into {size}"
    more = first.level(room) - needs[1].level(room) if len(needs) > 1 else 0
    if more > 0 and joined:
        return needs[1].name, f"{more} layers fewer are recomputed in the largest batch than under {first.name}, and NVLink joins the GPUs"
    why = f"weights are not gathered in every step, and it fits into {size}"
    return first.name, why + (f", with {more} layers more recomputed in the largest batch" if more > 0 else "")


def zero_rows(model: nn.Module, preflight: Preflight, gpus: int) -> list[tuple[str, str]]:
    """What a dry run says of the configs: what each takes per GPU, and which one to use."""
    if gpus == 1 or (not preflight.args.deepspeed and preflight.args.use_cpu):
        return []
    needs = needs_of(model, preflight, gpus)
    rows = [("DeepSpeed", "per GPU, with all layers recomputed to none (largest batch)")]
    rows += [(f"  {need.name}", f"{format_size(need.least)} to {format_size(need.most)}") for need in needs]
    room = room_on_gpu(preflight.args)
    if room is not None:
        return [*rows, ("  advice", ": ".join(choose(needs, room, joined_by_nvlink(gpus))))]
    smallest = [f"{need.name} on GPUs of {format_size(need.least / (1 - MARGIN))} or more" for need in needs[:2]]
    return [*rows, ("  advice", ", else ".join([*smallest, *[need.name for need in needs[2:]]]))]


def chosen(upstream: Upstream, flags: list[str]) -> str | None:
    """The config that `--deepspeed auto` of a command line means; None: it does not say so. Prints which and why.

    A run that goes on keeps the one that it has.

    Raises:
        LlavaRegionError: what has to be known of the model is missing or wrong.
    """
    if with_config(flags, "") == flags:
        return None
    args = parse(upstream.argument_classes(), flags)
    name, why = _of_checkpoint(args) or _of_model(upstream, args)
    print(f"--deepspeed auto: {name}, {why}", flush=True)
    return name


def with_config(flags: list[str], name: str | None) -> list[str]:
    """A command line with the file of a config in place of `auto`."""
    at = next((i for i, arg in enumerate(flags) if arg == f"--deepspeed={AUTO}" or flags[i : i + 2] == ["--deepspeed", AUTO]), None)
    if at is None or name is None:
        return flags
    return [*flags[:at], "--deepspeed", str(config_path(name)), *flags[at + 1 + ("=" not in flags[at]) :]]


def _of_checkpoint(args: Namespace) -> tuple[str, str] | None:
    """The config that the last checkpoint was trained under, as a run has to go on under the same."""
    from transformers.trainer_utils import get_last_checkpoint

    last = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
    run = Path(last) / RUN_FILE if last else None
    before = read_json(run).get("deepspeed") if run is not None and run.is_file() else None
    if not before:
        return None
    was = (before.get("zero_optimization.stage"), before.get("zero_optimization.offload_optimizer.device", "none") != "none")
    for name in CONFIGS:
        zero = read_json(config_path(name))["zero_optimization"]
        if was == (zero["stage"], is_offloaded(zero, "optimizer")):
            return name, f"as in {last}"
    return None


def _of_model(upstream: Upstream, args: Namespace) -> tuple[str, str]:
    recipe = upstream.recipe(args)
    config = model_config(recipe)
    upstream.check(args, config)
    region = Region.parse(args.tune_layers, num_layers_in(config, f"{recipe.model}/{CONFIG_FILE}"))
    checked = Preflight(args, recipe, region, config, None)
    gpus = args.dry_run_gpus or processes.world_size()
    room = room_on_gpu(args)
    if room is None:
        return names_for(args, recipe.bits != 16)[:2][-1], "as there is no GPU here to choose by"
    return choose(needs_of(empty_model(upstream, checked), checked, gpus), room, joined_by_nvlink(gpus))


def room_on_gpu(args: Namespace) -> float | None:
    """Bytes that a process may fill: of its GPU, or its share of the memory where it trains on a CPU; None: there is no GPU here."""
    import torch

    if args.use_cpu:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / processes.local_world_size()
    elif torch.cuda.is_available():
        total = torch.cuda.get_device_properties(processes.local_rank() % torch.cuda.device_count()).total_memory
    else:
        return None
    return total * (1 - MARGIN)


def joined_by_nvlink(gpus: int) -> bool:
    """Whether all GPUs of a run are on this node, and NVLink joins each with each."""
    import torch

    if gpus > torch.cuda.device_count() or shutil.which("nvidia-smi") is None:
        return False
    said = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=60)
    return said.returncode == 0 and all_linked(said.stdout)


def all_linked(matrix: str) -> bool:
    """Whether what `nvidia-smi topo -m` prints has NVLink between each two GPUs.

    >>> all_linked("\\tGPU0\\tGPU1\\tNIC0\\nGPU0\\tX\\tNV18\\tSYS\\nGPU1\\tNV18\\tX\\tSYS")
    True
    """
    plain = re.sub(r"\x1b\[[\d;]*m", "", matrix)  # it underlines its header, on a terminal or not
    rows = [line.split() for line in plain.splitlines() if re.match(r"GPU\d+\s", line)]
    return bool(rows) and all(re.fullmatch(r"X|NV\d+", entry) for row in rows for entry in row[1 : len(rows) + 1])
