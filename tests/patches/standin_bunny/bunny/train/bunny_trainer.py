"""The trainer: four optimizer groups, of which some may be empty, and super() by name, as upstream has it."""

import torch
from transformers import Trainer


class BunnyTrainer(Trainer):
    def create_optimizer(self):
        groups = [{"params": [], "weight_decay": 0.0} for _ in range(4)]
        for group in groups[2:]:
            group["lr"] = self.args.mm_projector_lr or self.args.learning_rate
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                late = 2 * ("mm_projector" in name or "vision_tower" in name)
                groups[late + name.endswith("bias")]["params"].append(parameter)
        self.optimizer = torch.optim.AdamW(groups, lr=self.args.learning_rate)
        return self.optimizer

    def _save_checkpoint(self, model, trial, metrics=None):
        super(BunnyTrainer, self)._save_checkpoint(model, trial, metrics)  # noqa: UP008
