"""One training run of a region: what the hooks share, from the layer spec to the files of the finished run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_region import __version__
from llava_region.checkpoints.model_card import write_card
from llava_region.decoder import Part, find_decoder_layers, layer_index, linear_modules, part_of
from llava_region.errors import LlavaRegionError
from llava_region.files import write_json
from llava_region.region import Region
from llava_region.run_files import REGION_FILE, RUN_FILE

if TYPE_CHECKING:
    from torch import nn

    from llava_region.training.together import Start
    from llava_region.upstreams import Upstream


class RegionRun:
    """State of one run under the hooks.

    Args:
        tune_layers: a layer spec, parsed when the model's layer count is known, or a `Region`.
        upstream: whose trainer runs.
        upstream_version: recorded in `region.json`.
        base_model: the model that training starts from, recorded in `region.json`.
        start: how the run starts, where its ranks have agreed on that; None: as the upstream decides.
        fix_generation_config: fix an invalid generation config in memory instead of failing at the last save.
    """

    def __init__(
        self,
        tune_layers: str | Region,
        *,
        upstream: Upstream,
        upstream_version: str = "",
        base_model: str = "",
        start: Start | None = None,
        fix_generation_config: bool = False,
    ):
        self.region = tune_layers if isinstance(tune_layers, Region) else None
        self.spec = tune_layers.spec if isinstance(tune_layers, Region) else tune_layers
        self.upstream = upstream
        self.upstream_version = upstream_version
        self.base_model = base_model
        self.start = start
        self.fix_generation_config = fix_generation_config
        self.mode: str | None = None
        self.lora_modules: list[str] = []
        self.trainer: Any = None

    def resolve(self, model: nn.Module) -> Region:
        """The region, for this model's number of decoder layers.

        Raises:
            LlavaRegionError: the spec does not fit the model.
        """
        num_layers = len(find_decoder_layers(model).modules)
        if self.region is None:
            self.region = Region.parse(self.spec, num_layers)
        if self.region.num_layers != num_layers:
            raise LlavaRegionError(
                f"the region '{self.spec}' is for {self.region.num_layers} decoder layers, the model has {num_layers}; "
                "give a spec for this model"
            )
        return self.region

    def find_linear_names(self, model: nn.Module) -> list[str]:
        """In place of upstream's `find_all_linear_names`: full names within the region, so that PEFT targets exactly those.

        Upstream returns leaf names such as `q_proj`, which match every layer, and the vision tower where it is attached.

        Raises:
            LlavaRegionError: the model has an adapter already, around whose layers another would be put.
        """
        there = next((name for name, _ in model.named_parameters() if "lora_" in name), None)
        if there is not None:
            raise LlavaRegionError(
                f"the model has an adapter already ({there}); merge it with 'llava-region merge' and start from the result"
            )
        self.lora_modules = linear_modules(model, self.resolve(model).layers)
        return self.lora_modules

    def prepare_model(self, model: Any, args: Any) -> None:
        """Freeze what is not to be tuned (full tuning), check that nothing else trains, and note the region in the config.

        Args:
            args: the upstream's TrainingArguments.

        Raises:
            LlavaRegionError: a parameter outside the region, the projector and (if asked for) the vision tower trains, or one
                that belongs to no known part of a model.
        """
        region, recipe = self.resolve(model), self.upstream.recipe(args)
        lora = any("lora_" in name for name, _ in model.named_parameters())
        self.mode = ("lora" if recipe.bits == 16 else "qlora") if lora else "full"
        if not lora:
            freeze_outside(model, region)
        check_trainable(model, region, lora=lora, vision=recipe.trains_tower)
        model.config.visual_region = {"layers": list(region.layers), "num_layers": region.num_layers, "spec": region.spec}
        if self.fix_generation_config and getattr(model, "generation_config", None) is not None:
            model.generation_config.do_sample = True

    def record(self) -> dict:
        """The content of `region.json`."""
        assert self.region is not None, "the record of a run is written once its model is there"
        return {
            **self.region.to_dict(),
            "mode": self.mode,
            "base_model": self.base_model,
            "upstream": self.upstream.name,
            "upstream_version": self.upstream_version,
            "llava_region_version": __version__,
        }

    def write_record(self, folder: str | Path, card: bool = False) -> None:
        """Write `run.json`, where it is known, the model card if asked for, and then `region.json` into a folder."""
        if self.start is not None:
            write_json(Path(folder) / RUN_FILE, self.start.fingerprint.to_dict())
        if card:
            write_card(folder, region=self.record())
        write_json(Path(folder) / REGION_FILE, self.record())

    def saving_without_cuda(self, save: Callable[..., None]) -> Callable[..., None]:
        """Wrap the upstream's function that saves at the end, which calls `torch.cuda.synchronize` under DeepSpeed, GPU or not."""
        import torch

        @functools.wraps(save)
        def wrapped(trainer: Any, output_dir: str) -> None:
            if trainer.deepspeed and not torch.cuda.is_available():
                return trainer.save_model(output_dir)
            return save(trainer=trainer, output_dir=output_dir)

        return wrapped


def freeze_outside(model: nn.Module, region: Region) -> None:
    """Full tuning: of the language model only the region's decoder layers train; embeddings, final norm and head are frozen too.

    Raises:
        LlavaRegionError: a parameter that belongs to no known part of a model.
    """
    for name, parameter in model.named_parameters():
        if part_of(name) in ("layer", "embeddings", "head"):
            parameter.requires_grad_(layer_index(name) in region.layers)


def check_trainable(model: nn.Module, region: Region, *, lora: bool, vision: bool) -> None:
    """Refuse a model in which something trains that should not, or a region layer does not.

    Args:
        lora: whether the language model trains by LoRA alone.
        vision: whether the user asked for a trainable vision tower.

    Raises:
        LlavaRegionError: lists the parameters or layers; or a parameter belongs to no known part of a model.
    """
    parts: dict[str, Part] = {name: part_of(name) for name, _ in model.named_parameters()}  # frozen ones too
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    wrong = [name for name in trainable if not _may_train(name, parts[name], region, lora, vision)]
    if wrong:
        raise LlavaRegionError(
            f"{len(wrong)} parameters outside the region '{region.spec}' would train, such as {', '.join(wrong[:3])}; "
            "nothing was trained: report this with your command line"
        )
    idle = set(region.layers) - {layer_index(name) for name in trainable}
    if idle:
        raise LlavaRegionError(f"decoder layers {sorted(idle)} of the region '{region.spec}' have nothing to train")


def _may_train(name: str, part: Part, region: Region, lora: bool, vision: bool) -> bool:
    is_lora = "lora_" in name
    if part == "layer":
        return layer_index(name) in region.layers and is_lora == lora
    if part == "vision":
        return vision and not is_lora
    if part == "projector":
        return not is_lora
    return lora and not is_lora  # embeddings and head, whose rows for new tokens LLaVA trains next to LoRA
