"""What is put over the upstream trainer: freezing, optimizer groups, the first step, checkpoints, cost."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from transformers.trainer_utils import TrainOutput, get_last_checkpoint

from llava_region.errors import LlavaRegionError
from llava_region.run_files import NON_LORA_FILE
from llava_region.training import signals
from llava_region.training.checkpoint_to_resume import check_asked, check_resumable, drop_incomplete
from llava_region.training.cost import CostMeter, write_cost
from llava_region.training.deepspeed_config import correct, corrected, hidden_size
from llava_region.training.first_step import FirstStep
from llava_region.training.learning_rates import name_and_drop_groups
from llava_region.training.recompute import out_of_memory_hint
from llava_region.training.reports import Reports
from llava_region.training.resume import (
    AllStepsDone,
    BeginsAt,
    EpochOrder,
    NoStepTooMany,
    load_non_lora,
    load_to_numbered_cpus,
    load_trained_parameters_only,
    missing_random_states,
    numpy_state_loadable,
)
from llava_region.training.run import RegionRun
from llava_region.training.stopping import StopAtStep

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.data import DataLoader
    from transformers import Trainer
else:
    Trainer = object


def region_trainer(upstream_trainer: type, run: RegionRun) -> type:
    """A subclass of the upstream trainer, with this run's hooks; it bears the upstream's name.

    Raises:
        LlavaRegionError: the hooks of another run are applied.
    """
    if issubclass(upstream_trainer, RegionTrainerMixin):
        raise LlavaRegionError(
            f"the hooks of a run on '{upstream_trainer.run.spec}' are applied; leave its 'with applied(...)' block first"
        )
    return type(upstream_trainer.__name__, (RegionTrainerMixin, upstream_trainer), {"run": run})


class RegionTrainerMixin(Trainer):
    """Goes before an upstream's trainer (over transformers' Trainer) in the order of methods."""

    run: ClassVar[RegionRun]
    args: Any  # upstream's TrainingArguments with this package's flags
    model: Any
    accelerator: Any

    def __init__(self, model: Any = None, args: Any = None, **kwargs: Any) -> None:
        self.run.prepare_model(model, args)
        region = self.run.resolve(model)
        if self.run.start is None:
            checkpoint = check_resumable(args.output_dir, region, self.run.mode != "full", bool(args.deepspeed))
            check_asked(args.resume_from_checkpoint, checkpoint, args.output_dir)
        self._correct_deepspeed(model, args)
        if args.ddp_find_unused_parameters is None and args.gradient_checkpointing and not self.run.upstream.recipe(args).trains_tower:
            # transformers has DDP look for parameters that a step leaves out, under PEFT; what is recomputed is then counted twice. Here
            # a step leaves none out, unless a tower trains whose last layer is not used.
            args.ddp_find_unused_parameters = False
        super().__init__(model=model, args=args, **kwargs)
        self.run.trainer = self
        self.first_step = FirstStep(self, region)
        self.meter = CostMeter()
        self.epoch_order = EpochOrder()
        self.reports = Reports(self)
        self.stop = StopAtStep(self)
        self.add_callback(self.stop)
        self.add_callback(self.meter)
        self.add_callback(self.reports)
        self.add_callback(self.epoch_order)
        self.add_callback(NoStepTooMany)
        self.accelerator.wait_for_everyone()  # every rank has looked at the checkpoints that are there
        if self.args.should_save:
            for path in drop_incomplete(self.args.output_dir):
                print(f"removed {path}, which a killed run had not finished writing")
            Path(self.args.output_dir).mkdir(parents=True, exist_ok=True)
            self.run.write_record(self.args.output_dir)
        # upstream looks for checkpoints right after this, on every rank
        self.accelerator.wait_for_everyone()

    def _correct_deepspeed(self, model: Any, args: Any) -> None:
        """Correct what of a DeepSpeed config depends on the model; the rest was, when the arguments were made."""
        if not args.deepspeed:
            return
        recipe, hidden = self.run.upstream.recipe(args), hidden_size(model.config)
        correct(args.hf_deepspeed_config.config, recipe, hidden)
        if self.run.start is None and args.process_index == 0:  # else the preflight has said it
            _, said = corrected(args.deepspeed, recipe, hidden)
            if said:
                print(f"DeepSpeed: {args.deepspeed}, corrected for this run: {'; '.join(said)}", flush=True)

    def create_optimizer(self) -> torch.optim.Optimizer:
        optimizer: Any = super().create_optimizer()
        name_and_drop_groups(optimizer, self.model)
        return optimizer

    def get_train_dataloader(self) -> DataLoader:
        loader = super().get_train_dataloader()
        if (listener := signals.current()) is not None:
            loader.worker_init_fn = signals.Worker(loader.worker_init_fn, listener.over)
        return loader

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any) -> torch.Tensor:
        upstream = self.run.upstream
        self.meter.count(inputs, upstream.image_tokens(inputs), upstream.features_per_image(self.model))
        self.first_step.before(model, inputs)
        loss = super().training_step(model, inputs, *args)
        self.first_step.after()
        return loss

    def log(self, logs: dict[str, float], *args: Any) -> None:
        recomputed = self.reports.layers_recomputed() if "loss" in logs else None
        super().log(logs if recomputed is None else {**logs, "layers_recomputed": recomputed}, *args)

    def over_ranks(self, tensor: torch.Tensor, how: Literal["sum", "max"]) -> torch.Tensor:
        """Sum or maximum of a tensor over all ranks. Collective."""
        if self.args.world_size == 1 or not torch.distributed.is_initialized():
            return tensor
        tensor = tensor.to(self.args.device)
        torch.distributed.all_reduce(tensor, getattr(torch.distributed.ReduceOp, how.upper()))
        return tensor

    def cost_totals(self) -> dict[str, Any]:
        """What the run has cost so far, over all ranks. Collective: every rank has to call it."""
        plan = self.first_step.plan
        if plan is not None and plan.batches is not None:
            self.meter.recomputed = [plan.batches.counts[layers] for layers in range(len(plan.batches.levels.order) + 1)]
        return self.meter.totals(self.args, self.state, self.over_ranks)

    def _save_checkpoint(self, model: Any, trial: Any, metrics: dict[str, float] | None = None) -> None:
        """Save as upstream, then add what upstream leaves out; older checkpoints are removed only after that."""
        extra = self.run.upstream.trained_besides_lora(self.model.named_parameters()) if self.run.mode != "full" else None
        totals = self.cost_totals()
        self._rotation: dict[str, Any] | None = None
        super()._save_checkpoint(model, trial, metrics)
        self.accelerator.wait_for_everyone()  # all ranks have written their part
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            if extra is not None:
                torch.save(extra, folder / NON_LORA_FILE)
            self.model.config.save_pretrained(folder)
            self.epoch_order.save(folder)
            write_cost(folder, {**totals, "stopped_by": self.stop.reason} if self.stop.reason else totals)
            self.run.write_record(folder, card=True)  # last: its presence says that the checkpoint is whole
            if self._rotation:
                super()._rotate_checkpoints(**self._rotation)
        self.accelerator.wait_for_everyone()

    def _rotate_checkpoints(self, use_mtime: bool = False, output_dir: str | None = None) -> None:
        """Put off until the new checkpoint is whole."""
        self._rotation = {"use_mtime": use_mtime, "output_dir": output_dir}

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        if self.run.start is not None:  # the ranks have agreed; upstream lets each look for itself
            resume_from_checkpoint = str(self.run.start.checkpoint) if self.run.start.checkpoint else None
        elif resume_from_checkpoint is True:
            # None where upstream's glob found only the likes of `checkpoint-best`
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir)
        if resume_from_checkpoint:
            self._go_on_from(str(resume_from_checkpoint))
        if self.is_deepspeed_enabled:
            # DeepSpeed accumulates by itself; its engine's no_sync, which accelerate would enter, refuses ZeRO and steps
            self.accelerator.no_sync = lambda model: nullcontext()
        try:
            with out_of_memory_hint(self.args.region_checkpointing, self.args.gradient_checkpointing):
                output = super().train(resume_from_checkpoint, *args, **kwargs)
        except AllStepsDone:
            output = TrainOutput(self.state.global_step, 0.0, {})
        self.stop.raise_if_stopped(self.state, self.args.output_dir)
        return output

    def _go_on_from(self, folder: str) -> None:
        if self.is_world_process_zero():
            print(f"resuming from {folder}", flush=True)
        for name in missing_random_states(folder, self.args.process_index, self.args.world_size):
            print(f"{folder} lacks {name}: what is drawn from it (the order of samples, dropout) is drawn anew", flush=True)
        load_to_numbered_cpus()
        self.add_callback(BeginsAt(folder))
        self.meter.resume(folder)
        self.epoch_order.resume(folder)
        if self.is_deepspeed_enabled and self.run.mode != "full":
            load_trained_parameters_only(self.accelerator)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Restore the projector too; upstream restores the adapter alone. (DeepSpeed restores both from its own files.)"""
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.run.mode != "full":
            load_non_lora(self.model, resume_from_checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with numpy_state_loadable():
            super()._load_rng_state(checkpoint)
        batches: Any = self.callback_handler.train_dataloader
        steps_per_epoch = len(batches) // self.args.gradient_accumulation_steps
        self.epoch_order.random_state_loaded(self.state.global_step, steps_per_epoch)
