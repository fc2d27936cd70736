"""Read a LoRA run as PEFT and the upstreams write it: which module gets which update, and what else was trained.

`open_adapter` gives the adapter's tensors as they are stored, `read_adapter` what they mean, `trained_besides` and
`trained_whole` what was trained without LoRA.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from llava_region.checkpoints.adapter_config import lora_config, scalings_of, targeted
from llava_region.checkpoints.model_source import ModelLike, ModelSource
from llava_region.checkpoints.names import by_bare_name
from llava_region.checkpoints.tensors import Checkpoint, Entry, refuse_not_finite
from llava_region.decoder import layer_index
from llava_region.errors import LlavaRegionError
from llava_region.run_files import ADAPTER_CONFIG_FILE, ADAPTER_FILES

# Rows of a weight that are updated together: keeps the fp32 copy small, and in memory that is used again.
_ROWS = 256
_LORA_NAME = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")


@dataclass(frozen=True)
class LoraUpdate:
    """`W + scaling * B @ A` of one linear module: A is (rank, in), B is (out, rank)."""

    a: Entry
    b: Entry
    scaling: float
    fan_in_fan_out: bool = False
    module: str = ""

    def shape_for(self, weight: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the update for a weight of shape `weight`: (out, in), or (in, out) where the weight is stored so."""
        shape = (self.b.shape[0], self.a.shape[1])
        # PEFT itself ignores fan_in_fan_out on nn.Linear, hence only where nothing else fits
        return shape[::-1] if self.fan_in_fan_out and weight != shape else shape

    def halves(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B in fp32.

        Raises:
            LlavaRegionError: one of them holds NaN or infinity.
        """
        a, b = (
            refuse_not_finite(half.load().float(), f"{self.module}.lora_{letter}", "of the adapter", "give a checkpoint from before that")
            for half, letter in ((self.a, "A"), (self.b, "B"))
        )
        return a, b

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """Add the update to `weight` in place, computed in fp32 and cast once; returns it.

        Raises:
            LlavaRegionError: A or B holds NaN or infinity.
        """
        a, b = self.halves()
        if self.shape_for(tuple(weight.shape)) != (len(b), a.shape[1]):
            a, b = b.T, a.T
        for start in range(0, len(weight), _ROWS):
            rows = weight[start : start + _ROWS]
            rows.copy_(rows.float().addmm_(b[start : start + _ROWS], a, alpha=self.scaling))
        return weight


@dataclass(frozen=True)
class Adapter:
    """Updates by module name, and tensors trained whole (biases, `modules_to_save`) by name, both as in the bare model.

    Attributes:
        file: where they are stored.
    """

    config: dict
    updates: dict[str, LoraUpdate]
    tensors: dict[str, Entry]
    file: Path


def adapter_file(folder: Path) -> Path | None:
    """The file with a run's adapter, or None where there is none."""
    return next((folder / name for name in ADAPTER_FILES if (folder / name).is_file()), None)


def open_adapter(folder: Path) -> Checkpoint:
    """The tensors of a run's adapter under the names that PEFT stored them with; none is loaded.

    Raises:
        LlavaRegionError: there is no adapter, or a damaged one.
    """
    file = adapter_file(folder)
    if file is None:
        raise LlavaRegionError(f"{folder} holds no {ADAPTER_FILES[0]}; copy the whole run")
    return Checkpoint(file)


def read_adapter(run: ModelLike) -> Adapter:
    """Read `adapter_config.json` and the adapter's weights of a LoRA run; no tensor is loaded.

    Raises:
        LlavaRegionError: no LoRA adapter, a damaged one, one of a kind that cannot be merged exactly, or one of other layers than
            the run's region.
    """
    source = ModelSource.of(run)
    config, stored = lora_config(source), open_adapter(source.path)
    halves: dict[str, dict[str, Entry]] = {}
    tensors = {}
    nested = [name for name in stored if ".base_layer.lora_" in name]
    if nested:
        raise LlavaRegionError(
            f"'{nested[0]}' in {stored.path} is an adapter inside another: training started from a LoRA run; merge that run with "
            "'llava-region merge', and train from the result"
        )
    for name, entry in by_bare_name(stored, stored.path).items():
        match = _LORA_NAME.fullmatch(name)
        if match:
            halves.setdefault(match[1], {})[match[2]] = entry
        elif "lora_" in name:
            raise LlavaRegionError(f"'{name}' in {stored.path} is of a kind that is not merged here; allowed: LoRA on linear modules")
        else:
            tensors[name] = entry
    if not halves:
        raise LlavaRegionError(f"{stored.path} holds no LoRA weight, so there is nothing to merge; was the run saved to the end?")
    scalings = scalings_of(halves, source)
    updates = {module: _update(module, pair, scalings[module], config, stored.path) for module, pair in halves.items()}
    _check_layers(updates, source, stored.path)
    return Adapter(config, updates, tensors, stored.path)


def _check_layers(modules: Iterable[str], run: ModelSource, file: Path) -> None:
    """Refuse an adapter of other decoder layers than those that the run tuned."""
    if run.region is None:
        return
    found, region = {layer for name in modules if (layer := layer_index(name)) is not None}, set(run.region["layers"])
    if found != region:
        what, layers = ("lacks", region - found) if region - found else ("holds", found - region)
        raise LlavaRegionError(
            f"{file} {what} decoder layers {sorted(layers)}, and the region of the run is {sorted(region)}; copy both from the same run"
        )


def check_complete(adapter: Adapter, run: ModelSource, trained: Collection[str], base: Mapping[str, Entry]) -> None:
    """Refuse an adapter that lacks what its `adapter_config.json` says was trained: PEFT would leave it as it was initialised.

    Args:
        trained: names of what was trained whole, see `trained_whole`.
        base: the tensors of the model that the run was trained on.

    Raises:
        LlavaRegionError: names the first module that is not there.
    """
    # what has two dimensions in a decoder layer is linear
    linear = [name.removesuffix(".weight") for name, entry in base.items() if name.endswith(".weight") and len(entry.shape) == 2]
    wanted = targeted([module for module in linear if layer_index(module) is not None], adapter.config, run)
    whole = adapter.config.get("modules_to_save") or []
    whole = [whole] if isinstance(whole, str) else whole
    wanted_whole = [name for name in base if any(f".{name}".rpartition(".")[0].endswith(f".{module}") for module in whole)]
    lacking = [module for module in wanted if module not in adapter.updates] + [name for name in wanted_whole if name not in trained]
    if lacking:
        raise LlavaRegionError(
            f"{adapter.file} holds nothing for '{lacking[0]}' ({len(lacking)} such modules), which {ADAPTER_CONFIG_FILE} says was trained; "
            "the file is incomplete: copy it again, or save the adapter again"
        )


def trained_besides(run: ModelSource) -> dict[str, Entry]:
    """What a run trained besides its adapter (projector, unfrozen vision tower, resized embeddings), by name in the bare model.

    Of a pretraining that trained the projector alone: the projector. Empty where the file is not there, which
    `ModelSource.besides_file` tells.

    Raises:
        LlavaRegionError: the file is damaged, or holds one tensor of the model twice.
    """
    file = run.besides_file
    return by_bare_name(Checkpoint(file), file) if file else {}


def trained_whole(run: ModelSource, adapter: Adapter) -> dict[str, Entry]:
    """Every tensor that a LoRA run trained without LoRA, by name in the bare model. Those in the adapter's file go first: PEFT
    loads them last.
    """
    return {**trained_besides(run), **adapter.tensors}


def _update(module: str, pair: dict[str, Entry], scaling: tuple[int, float], config: dict, file: Path) -> LoraUpdate:
    if set(pair) != {"A", "B"}:
        raise LlavaRegionError(f"{file} holds only lora_{next(iter(pair))} of '{module}'; the file is incomplete, save the adapter again")
    a, b = pair["A"], pair["B"]
    rank, factor = scaling
    if len(a.shape) != 2 or len(b.shape) != 2 or not a.shape[0] == b.shape[1] == rank:
        raise LlavaRegionError(
            f"LoRA on '{module}' has A {a.shape} and B {b.shape}, {ADAPTER_CONFIG_FILE} says rank {rank}; files do not belong together"
        )
    return LoraUpdate(a, b, factor, bool(config.get("fan_in_fan_out")), module)
