"""What is put over the upstream trainer: freezing, optimizer groups, the first-step audit, checkpoints, cost."""

from __future__ import annotations

import functools
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import TrainOutput, get_last_checkpoint

from llava_region.errors import LlavaRegionError
from llava_region.run_files import EPOCH_RNG_FILE, NON_LORA_FILE
from llava_region.training import recompute as checkpointing
from llava_region.training import supervised_loss
from llava_region.training.audit import GradientAudit, check_rates, name_and_drop_groups
from llava_region.training.cost import CostMeter, write_cost
from llava_region.training.finish import check_adapter, check_full
from llava_region.training.resume import check_resumable, drop_incomplete, load_non_lora
from llava_region.training.run import RegionRun

__all__ = ["RegionRun", "RegionTrainerMixin", "finish", "region_trainer"]


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


class RegionTrainerMixin:
    """Goes before LLaVATrainer or BunnyTrainer (both over transformers' Trainer) in the order of methods."""

    run: RegionRun

    def __init__(self, model=None, args=None, **kwargs):
        self.run.prepare_model(model, args)
        check_resumable(args.output_dir, self.run.region, self.run.mode != "full")
        super().__init__(model=model, args=args, **kwargs)
        self.run.trainer = self
        self.meter = CostMeter()
        self.epoch_order = EpochOrder()
        self.add_callback(self.meter)
        self.add_callback(self.epoch_order)
        self.add_callback(NoStepTooMany)
        self.set_up = False
        self.audit: GradientAudit | None = None
        self.first_step_done = False
        self.accelerator.wait_for_everyone()  # every rank has looked at the checkpoints that are there
        if self.args.should_save:
            for path in drop_incomplete(self.args.output_dir):
                print(f"removed {path}, which a killed run had not finished writing")
            Path(self.args.output_dir).mkdir(parents=True, exist_ok=True)
            self.run.write_record(self.args.output_dir)
        # upstream looks for checkpoints right after this, on every rank
        self.accelerator.wait_for_everyone()

    def create_optimizer(self):
        optimizer = super().create_optimizer()
        name_and_drop_groups(optimizer, self.model)
        return optimizer

    def training_step(self, model, inputs, *args):
        if not self.first_step_done and self.audit is None:
            self.audit = GradientAudit(self.model, self.run.region)
        if self.audit:
            self.audit.see_labels(inputs.get("labels"), inputs.get("input_ids"))
        tower = self.model.get_vision_tower() if hasattr(self.model, "get_vision_tower") else None
        self.meter.count(inputs, getattr(tower, "num_patches", 1))
        with checkpointing.out_of_memory_hint(self.args):
            if not self.set_up:
                self._set_up_step(model)
            loss = super().training_step(model, inputs, *args)
        if self.audit and self.audit.conclude(self.args.device, lambda t: self._over_ranks(t, "max")):
            self._first_step_passed()
        return loss

    def _set_up_step(self, model):
        """Before the first step: recompute no more layers than the memory asks for, compute logits only where labels are."""
        self.set_up, said = True, []
        if self.args.gradient_checkpointing:
            # measuring draws random numbers: dropout must go on as if it had not
            with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
                plan = checkpointing.set_up(model, self.run.region.layers, self.args, self.accelerator.autocast)
            said.append(plan.reason)
        if self.args.supervised_logits:
            kept = supervised_loss.install(model)
            said.append(f"logits at every position: {kept}" if kept else "logits at supervised positions only")
        if self.is_world_process_zero() and said:
            print("\n".join(said), flush=True)

    def _first_step_passed(self):
        self.audit, self.first_step_done = None, True
        rates = check_rates(self.optimizer, self.lr_scheduler, self.args.learning_rate, getattr(self.args, "mm_projector_lr", None))
        if self.is_world_process_zero():
            said = ", ".join(f"{part} {rate:g}" for part, rate in rates.items())
            print(
                f"first step: layers {','.join(map(str, self.run.region.layers))} have gradients, no other; learning rates: {said}",
                flush=True,
            )

    def _over_ranks(self, tensor: torch.Tensor, how: str) -> torch.Tensor:
        """Sum or maximum of a tensor over all ranks."""
        if self.args.world_size == 1 or not torch.distributed.is_initialized():
            return tensor
        tensor = tensor.to(self.args.device)
        torch.distributed.all_reduce(tensor, getattr(torch.distributed.ReduceOp, how.upper()))
        return tensor

    def cost_totals(self) -> dict:
        """What the run has cost so far, over all ranks. Collective: every rank has to call it."""
        return self.meter.totals(self.args, self.state, lambda t: self._over_ranks(t, "sum"))

    def _save_checkpoint(self, model, trial, metrics=None):
        """Save as upstream, then add what upstream leaves out; older checkpoints are removed only after that."""
        extra = self.run.upstream.trained_besides_lora(self.model.named_parameters()) if self.run.mode != "full" else None
        totals = self.cost_totals()
        self._rotation = None
        super()._save_checkpoint(model, trial, metrics)
        self.accelerator.wait_for_everyone()  # all ranks have written their part
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            if extra is not None:
                torch.save(extra, folder / NON_LORA_FILE)
            self.model.config.save_pretrained(folder)
            self.epoch_order.save(folder)
            write_cost(folder, totals)
            self.run.write_record(folder)  # last: its presence says that the checkpoint is whole
            if self._rotation:
                super()._rotate_checkpoints(**self._rotation)
        self.accelerator.wait_for_everyone()

    def _rotate_checkpoints(self, use_mtime=False, output_dir=None):
        """Put off until the new checkpoint is whole."""
        self._rotation = {"use_mtime": use_mtime, "output_dir": output_dir}

    def train(self, resume_from_checkpoint=None, **kwargs):
        if resume_from_checkpoint is True:
            # None where upstream's glob found only the likes of `checkpoint-best`
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir)
        if resume_from_checkpoint:
            folder = resume_from_checkpoint
            if self.is_world_process_zero():
                print(f"resuming from {folder}", flush=True)
            self.meter.resume(folder)
            self.epoch_order.resume(folder)
            if self.is_deepspeed_enabled and self.run.mode != "full":
                self._load_trained_parameters_only()
        if self.is_deepspeed_enabled:
            # DeepSpeed accumulates by itself; its engine's no_sync, which accelerate would enter, refuses ZeRO and steps
            self.accelerator.no_sync = lambda model: nullcontext()
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        except AllStepsDone:
            return TrainOutput(self.state.global_step, 0.0, {})

    def _load_trained_parameters_only(self):
        """Let DeepSpeed load a LoRA checkpoint, which holds only what trained.

        transformers saves it so, but up to 4.37 loads it strictly, and fails over every frozen parameter.
        """
        prepare = self.accelerator.prepare

        def prepare_lenient(*args, **kwargs):
            prepared = prepare(*args, **kwargs)
            for part in prepared if isinstance(prepared, tuple) else (prepared,):
                if hasattr(part, "load_checkpoint"):
                    part.load_checkpoint = functools.partial(part.load_checkpoint, load_module_strict=False)
            return prepared

        self.accelerator.prepare = prepare_lenient

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """Restore the projector too; upstream restores the adapter alone. (DeepSpeed restores both from its own files.)"""
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.run.mode != "full":
            load_non_lora(self.model, resume_from_checkpoint)

    def _load_rng_state(self, checkpoint):
        with _numpy_state_loadable():
            super()._load_rng_state(checkpoint)
        steps_an_epoch = max(len(self.callback_handler.train_dataloader) // self.args.gradient_accumulation_steps, 1)
        if self.state.global_step % steps_an_epoch == 0:
            # between two epochs the order is drawn after this, not before
            self.epoch_order.state = torch.random.get_rng_state()


class AllStepsDone(Exception):
    """The checkpoint that a run resumes from is that of its last step."""


class NoStepTooMany(TrainerCallback):
    """Ends a run that resumes from the checkpoint of its last step; transformers would train one more."""

    def on_train_begin(self, args, state, control, **kwargs):
        if 0 < state.max_steps <= state.global_step:
            raise AllStepsDone


class EpochOrder(TrainerCallback):
    """Makes a run that resumes within an epoch see the same order of samples as one never stopped.

    Upstream's sampler draws an epoch's order from torch's global random state as it is when the epoch begins, which a
    resumed process has not got: it is kept in the checkpoint.
    """

    def __init__(self):
        self.state: torch.Tensor | None = None
        self.restored: torch.Tensor | None = None

    def on_epoch_begin(self, args, state, control, **kwargs):
        if self.restored is not None:
            torch.random.set_rng_state(self.restored)
            self.restored = None
        self.state = torch.random.get_rng_state()

    def save(self, folder: Path) -> None:
        """Write the state that the current epoch began with into a checkpoint folder."""
        torch.save(self.state, folder / EPOCH_RNG_FILE)

    def resume(self, folder) -> None:
        """Read the state from a checkpoint folder, to be set when the interrupted epoch begins again."""
        path = Path(folder) / EPOCH_RNG_FILE
        self.restored = torch.load(path, weights_only=True) if path.is_file() else None


@contextmanager
def _numpy_state_loadable():
    """Let torch.load read transformers' saved random states, which hold a NumPy array, under torch >= 2.6's `weights_only`."""
    import numpy

    safe_globals = getattr(torch.serialization, "safe_globals", None)
    reconstruct = numpy.zeros(1).__reduce__()[0]  # where it lives differs between NumPy 1 and 2
    allowed = [reconstruct, numpy.ndarray, numpy.dtype, type(numpy.dtype(numpy.uint32))]
    with safe_globals(allowed) if safe_globals else nullcontext():
        yield


def finish(run: RegionRun) -> None:
    """After upstream's train(): re-read what was saved, and write `region.json` and, last, `cost.json`. For every rank.

    Raises:
        LlavaRegionError: the saved adapter is not the region's, or was not changed by training.
    """
    trainer = run.trainer
    if trainer is None or not trainer.meter.started:
        return
    totals = trainer.cost_totals()
    trainer.accelerator.wait_for_everyone()
    if not trainer.args.should_save:
        return
    folder = Path(trainer.args.output_dir)
    check_full(folder, run.region) if run.mode == "full" else check_adapter(folder, run.region)
    run.write_record(folder)
    totals["layers"], totals["num_layers"] = list(run.region.layers), run.region.num_layers
    totals["trainable_parameters"] = sum(getattr(p, "ds_numel", p.numel()) for p in trainer.model.parameters() if p.requires_grad)
    write_cost(folder, totals)
    print(f"done: {folder} ({totals['gpu_hours']:.2f} GPU hours, {totals['samples_per_second']:.1f} samples/s)")
