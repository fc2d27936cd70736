"""What is done before the first step of a run, and looked at after it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from llava_region.training import recompute, supervised_loss
from llava_region.training.audit import GradientAudit
from llava_region.training.learning_rates import check_rates
from llava_region.training.recompute_plan import Workload

if TYPE_CHECKING:
    from torch import nn

    from llava_region.region import Region
    from llava_region.training.recompute_plan import Plan
    from llava_region.training.trainer import RegionTrainerMixin


class FirstStep:
    """Prepares a run's first step and judges its gradients; says on the first rank what was found. Idle afterwards.

    Before it: no more layers are recomputed than the memory asks for, and logits are computed only where labels are. After
    it: the gradients are where they belong, and the learning rates are those asked for. Where no rank had a token to learn
    from, the step that follows is judged instead.
    """

    def __init__(self, trainer: RegionTrainerMixin, region: Region) -> None:
        self.trainer, self.region = trainer, region
        self.audit: GradientAudit | None = None
        self.passed = False
        self.plan: Plan | None = None

    def before(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        """Before a micro step. Collective in the first one.

        Args:
            model: as the trainer has wrapped it.
            inputs: what the model is given.

        Raises:
            LlavaRegionError: the layers to recompute were asked for, and are not possible.
        """
        if self.passed:
            return
        first = self.audit is None
        if self.audit is None:
            self.audit = GradientAudit(self.trainer.model, self.region)
        self.audit.see_labels(inputs.get("labels"), self.trainer.run.upstream.image_tokens(inputs))
        if first:
            self._say(self._set_up(model))

    def after(self) -> None:
        """After a micro step. Collective until the first step has passed.

        Raises:
            LlavaRegionError: the gradients or the learning rates are wrong.
        """
        trainer = self.trainer
        if self.audit is None or not self.audit.conclude(trainer.args.device, lambda flags: trainer.over_ranks(flags, "max")):
            return
        self.audit, self.passed = None, True
        projector_rate = trainer.run.upstream.recipe(trainer.args).projector_rate
        rates = check_rates(trainer.optimizer, trainer.lr_scheduler, trainer.args.learning_rate, projector_rate)
        layers = ",".join(map(str, self.region.layers))
        said = ", ".join(f"{part} {rate:g}" for part, rate in rates.items())
        self._say([f"first step: layers {layers} have gradients, no other; learning rates: {said}"])

    def _set_up(self, model: nn.Module) -> list[str]:
        trainer, args, said = self.trainer, self.trainer.args, []
        if args.gradient_checkpointing:
            workload = Workload.of(args, trainer.run.upstream.recipe(args).max_length)
            flags = args.region_checkpointing, args.region_memory
            # measuring draws random numbers: dropout must go on as if it had not
            with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
                self.plan = recompute.set_up(model, self.region.layers, workload, *flags, trainer.accelerator.autocast)
            said.append(self.plan.reason)
        if args.supervised_logits:
            kept = supervised_loss.install(model, trainer.run.upstream.intercept_labels)
            said.append(f"logits at every position: {kept}" if kept else "logits at supervised positions only")
        return said

    def _say(self, lines: list[str]) -> None:
        if lines and self.trainer.is_world_process_zero():
            print("\n".join(lines), flush=True)
