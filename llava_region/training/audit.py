"""The audit of the first training step: every region layer has a gradient, and no other layer has one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from llava_region.data.labels import IGNORE_INDEX
from llava_region.decoder import layer_index, part_of
from llava_region.errors import LlavaRegionError
from llava_region.region import Region

if TYPE_CHECKING:
    from torch import nn

MAX_UNSUPERVISED_STEPS = 100
MAX_BLIND_STEPS = 8  # micro steps with a supervised image sample: one may be cut before its answer, not all


class GradientAudit:
    """Watches gradients of all trainable parameters until every region layer was judged, and the vision tower if it trains.

    A layer is judged as a whole: LoRA's A has a zero gradient at the first step, as B starts at zero. Hooks on the
    parameters see the gradients under ZeRO-3 too, where `parameter.grad` is gone after the backward pass.
    """

    def __init__(self, model: nn.Module, region: Region) -> None:
        self.region = region
        self.flags: dict[int, list[torch.Tensor]] = {layer: [] for layer in range(region.num_layers)}
        self.supervised: list[torch.Tensor] = []
        self.steps = self.blind_steps = 0
        self.handles: list[Any] = []
        self.tower: list[torch.Tensor] | None = None  # of an unfrozen vision tower
        self.images: list[torch.Tensor] = []
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            layer = layer_index(name)
            if layer is not None:
                self.handles.append(parameter.register_hook(self._hook(self.flags[layer])))
            elif part_of(name) == "vision":
                self.tower = [] if self.tower is None else self.tower
                self.handles.append(parameter.register_hook(self._hook(self.tower)))

    @staticmethod
    def _hook(flags: list[torch.Tensor]) -> Callable[[torch.Tensor], None]:
        def see(gradient: torch.Tensor) -> None:
            flags.append((gradient != 0).any())

        return see

    def see_labels(self, labels: torch.Tensor | None, image_tokens: torch.Tensor | None = None) -> None:
        """Note whether a batch has any token to learn from: without one, gradients are rightly zero.

        Args:
            labels: (B, T), `IGNORE_INDEX` where there is nothing to learn.
            image_tokens: (B, T) bool, where an image is; a tower learns from samples that have an image and a label.
        """
        self.images = []
        if labels is not None:
            supervised = labels != IGNORE_INDEX
            self.supervised.append(supervised.any())
            if image_tokens is not None:
                self.images.append((supervised.any(1) & image_tokens.any(1)).any())

    def conclude(self, device: torch.device, reduce_max: Callable[[torch.Tensor], torch.Tensor]) -> bool:
        """After a micro step: True once all is well, False where no rank had a token to learn from yet.

        Args:
            device: where to reduce over ranks.
            reduce_max: element-wise maximum of a tensor over all ranks.

        Raises:
            LlavaRegionError: a region layer or an unfrozen vision tower got no gradient, or another layer did; lists the layers.
        """
        self.steps += 1
        seen = [self._any(self.flags[layer], device) for layer in range(self.region.num_layers)]
        seen += [self._any(flags, device) for flags in (self.supervised, self.images, self.tower or [])]
        *layers, supervised, images, tower = reduce_max(torch.stack(seen).float()).tolist()
        with_gradient = {layer for layer, flag in enumerate(layers) if flag}
        missing = sorted(set(self.region.layers) - with_gradient)
        if missing and not supervised and self.steps < MAX_UNSUPERVISED_STEPS:
            return False
        self.blind_steps += bool(images)
        blind = self.tower is not None and not tower
        if not missing and blind and self.blind_steps < MAX_BLIND_STEPS:
            return False
        self.remove()
        extra = sorted(with_gradient - set(self.region.layers))
        if missing or extra:
            raise LlavaRegionError(
                f"the first step's gradients are wrong: region layers without a gradient: {missing or 'none'}; "
                f"other layers with one: {extra or 'none'}; region: {list(self.region.layers)}. Training was stopped, nothing was saved"
            )
        if blind:
            raise LlavaRegionError(
                f"the vision tower was to be trained, but got no gradient from {self.blind_steps} batches with images; training was stopped"
            )
        return True

    @staticmethod
    def _any(flags: list[torch.Tensor], device: torch.device) -> torch.Tensor:
        return torch.stack([f.to(device) for f in flags]).any() if flags else torch.zeros((), dtype=torch.bool, device=device)

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()
        self.handles = []
