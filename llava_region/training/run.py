"""One training run of a region: what the hooks share, from the layer spec to the files of the finished run."""

from __future__ import annotations

import functools
from pathlib import Path

from llava_region import __version__
from llava_region.decoder import find_decoder_layers, is_projector, is_vision, layer_index, linear_modules
from llava_region.errors import LlavaRegionError
from llava_region.files import write_json
from llava_region.region import Region
from llava_region.run_files import REGION_FILE


class RegionRun:
    """State of one run under the hooks.

    Args:
        tune_layers: a layer spec, parsed when the model's layer count is known, or a `Region`.
        upstream: `llava` or `bunny`.
        non_lora_state: the upstream's function that gathers the trained weights that are not LoRA's.
        upstream_version: recorded in `region.json`.
        base_model: the model that training starts from, recorded in `region.json`.
        fix_generation_config: mend an invalid generation config in memory instead of failing at the last save.
    """

    def __init__(
        self, tune_layers: str | Region, *, upstream: str, non_lora_state, upstream_version="", base_model="", fix_generation_config=False
    ):
        self.region = tune_layers if isinstance(tune_layers, Region) else None
        self.spec = tune_layers.spec if self.region else tune_layers
        self.upstream = upstream
        self.upstream_version = upstream_version
        self.base_model = base_model
        self.fix_generation_config = fix_generation_config
        self.non_lora_state = non_lora_state
        self.mode: str | None = None
        self.trainer = None

    def resolve(self, model) -> Region:
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

    def find_linear_names(self, model) -> list[str]:
        """In place of upstream's `find_all_linear_names`: full names within the region, so that PEFT targets exactly those.

        Upstream returns leaf names such as `q_proj`, which match every layer, and the vision tower where it is attached.
        """
        return linear_modules(model, self.resolve(model).layers)

    def prepare_model(self, model, args) -> None:
        """Freeze what is not to be tuned (full tuning), check that nothing else trains, and note the region in the config.

        Raises:
            LlavaRegionError: a parameter outside the region, the projector and (if asked for) the vision tower trains.
        """
        region = self.resolve(model)
        lora = any("lora_" in name for name, _ in model.named_parameters())
        self.mode = ("qlora" if getattr(args, "bits", 16) in (4, 8) else "lora") if lora else "full"
        if not lora:
            freeze_outside(model, region)
        check_trainable(model, region, lora=lora, vision=bool(getattr(args, "unfreeze_vision_tower", False)))
        model.config.visual_region = {"layers": list(region.layers), "num_layers": region.num_layers, "spec": region.spec}
        if self.fix_generation_config and getattr(model, "generation_config", None) is not None:
            model.generation_config.do_sample = True

    def record(self) -> dict:
        """The content of `region.json`."""
        return {
            **self.region.to_dict(),
            "mode": self.mode,
            "base_model": self.base_model,
            "upstream": self.upstream,
            "upstream_version": self.upstream_version,
            "llava_region_version": __version__,
        }

    def write_record(self, folder) -> None:
        """Write `region.json` into a folder."""
        write_json(Path(folder) / REGION_FILE, self.record())

    def saving_without_cuda(self, save):
        """Wrap upstream's `safe_save_model_for_hf_trainer`, which calls `torch.cuda.synchronize` under DeepSpeed, GPU or not."""
        import torch

        @functools.wraps(save)
        def wrapped(trainer, output_dir):
            if trainer.deepspeed and not torch.cuda.is_available() and not getattr(trainer.args, "tune_mm_mlp_adapter", False):
                return trainer.save_model(output_dir)
            return save(trainer=trainer, output_dir=output_dir)

        return wrapped


def freeze_outside(model, region: Region) -> None:
    """Full tuning: of the language model only the region's decoder layers train; embeddings, final norm and head are frozen too."""
    for name, parameter in model.named_parameters():
        if is_projector(name) or is_vision(name):
            continue
        parameter.requires_grad_(layer_index(name) in region.layers)


def check_trainable(model, region: Region, *, lora: bool, vision: bool) -> None:
    """Refuse a model in which something trains that should not, or a region layer does not.

    Args:
        lora: whether the language model trains by LoRA alone.
        vision: whether the user asked for a trainable vision tower.

    Raises:
        LlavaRegionError: lists the parameters or layers.
    """
    wrong, layers = [], set()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = layer_index(name)
        if layer is not None:
            layers.add(layer)
            if layer not in region.layers or (lora and "lora_" not in name):
                wrong.append(name)
        elif is_vision(name):
            if not vision or "lora_" in name:
                wrong.append(name)
        elif is_projector(name):
            if "lora_" in name:
                wrong.append(name)
        elif not lora or "lora_" in name:
            wrong.append(name)
    if wrong:
        raise LlavaRegionError(
            f"{len(wrong)} parameters outside the region '{region.spec}' would train, such as {', '.join(wrong[:3])}; "
            "nothing was trained: report this with your command line"
        )
    if layers != set(region.layers):
        raise LlavaRegionError(f"decoder layers {sorted(set(region.layers) - layers)} of the region '{region.spec}' have nothing to train")
