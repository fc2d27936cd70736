"""Logits only where a label is.

In training, upstream computes the head's logits for every position, in fp32, and then ignores those without a label: the
image's tokens, the question, the padding. Here the head sees only the positions whose next token is an answer's; the loss is
the same mean over the same positions, equal within the rounding of another order of summation. It is computed a slice of
positions at a time, gradient included, so that no more than `LOGITS_AT_ONCE` logits are ever in memory: at 16 x 2048 tokens
and Llama 3's vocabulary, upstream's take 68 GB.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from llava_region.data.labels import IGNORE_INDEX
from llava_region.decoder import find_decoder_layers

LOGITS_AT_ONCE = 2**26

# An upstream's `intercept_labels`: has a model hand its labels over; returns what undoes that, or None.
Intercept = Callable[[nn.Module, Callable[[torch.Tensor | None], torch.Tensor | None]], Callable[[], None] | None]


@dataclass
class _Batch:
    """The labels of the forward pass in flight: shape (samples, tokens), and rows (n,) and targets (n,) of the supervised positions.

    `awaited`: they are still on their way, to where image features are put in.
    """

    awaited: bool = False
    shape: tuple[int, ...] | None = None
    rows: torch.Tensor | None = None
    targets: torch.Tensor | None = None

    def receive(self, labels: torch.Tensor | None) -> torch.Tensor | None:
        """Take labels that are awaited; what the model goes on with in their place."""
        if not self.awaited or labels is None:
            return labels
        self.take(labels)
        return None

    def take(self, labels: torch.Tensor) -> None:
        """Position t predicts label t + 1; rows count through the flattened batch."""
        following = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()
        self.shape, self.rows = tuple(labels.shape), (following != IGNORE_INDEX).nonzero().squeeze(1)
        self.targets, self.awaited = following[self.rows], False


def causal_of(model: nn.Module) -> Any:
    """The model with the language-model head, out of PEFT's, DDP's and DeepSpeed's wrappers.

    Raises:
        LlavaRegionError: the model does not have one list of decoder layers.
    """
    prefix = find_decoder_layers(model).prefix.rsplit(".", 2)
    return model.get_submodule(prefix[0]) if len(prefix) == 3 else model


def why_not(model: nn.Module) -> str | None:
    """Why the loss of this model has to stay upstream's, or None."""
    if isinstance(model, nn.DataParallel):
        return "torch.nn.DataParallel copies the model in every step"
    causal = causal_of(model)
    if getattr(causal.config, "pretraining_tp", 1) > 1:
        return f"pretraining_tp is {causal.config.pretraining_tp}, so the head is not called as one module"
    if not causal.config.use_return_dict:
        return "the model's config has return_dict off"
    output = causal.get_output_embeddings()
    head = next((name for name, module in causal.named_children() if module is output), None)
    names = [inspect.unwrap(kind.forward).__code__.co_names for kind in type(causal).__mro__ if "forward" in vars(kind)]
    loss = next((n for n in names if head in n), ())
    if "CrossEntropyLoss" not in loss or "load_balancing_loss_func" in loss:
        return f"{type(causal).__name__}.forward does not compute the plain cross-entropy of {f'self.{head}' if head else 'a head'}"
    return None


def install(model: nn.Module, intercept: Intercept | None = None) -> str | None:
    """Have the model compute logits only at supervised positions while it trains; evaluation and generation are untouched.

    Upstream's own forward runs, with two seams: where image features are put in, labels are handed over instead of passed on,
    and the head's forward answers with the loss in the logits' place. The head is called as a module, exactly once per step,
    so ZeRO-3 gathers it as always, whatever number of slices each rank has.

    Args:
        model: as the trainer has wrapped it. Its outputs then hold `loss` and no logits.
        intercept: the upstream's `intercept_labels`; None for a plain language model, whose labels have their places already.

    Returns:
        Why it was left as it is (see `why_not`), or None when installed.
    """
    reason = why_not(model)
    if reason:
        return reason
    uninstall(model)
    causal, batch = causal_of(model), _Batch()
    head = causal.get_output_embeddings()
    undo = [_restore(causal, "forward"), _restore(head, "forward")]
    undo_intercept = intercept(causal, batch.receive) if intercept is not None else None
    if undo_intercept is not None:
        undo.append(undo_intercept)
    merges = undo_intercept is not None
    forward: Any = functools.wraps(causal.forward)(functools.partial(_forward, causal, causal.forward, batch, merges))
    forward.undo = undo
    head.forward = functools.partial(_head, causal, head, head.forward, batch)
    causal.forward = forward
    return None


def uninstall(model: nn.Module) -> None:
    """Give the model its own forward back."""
    for undo in getattr(causal_of(model).forward, "undo", ()):
        undo()


def _restore(module: nn.Module, name: str) -> Callable[[], None]:
    """A function that puts the attribute back: the instance's own, or the class's where the instance had none."""
    if name in vars(module):
        return functools.partial(setattr, module, name, vars(module)[name])
    return functools.partial(delattr, module, name)


def _forward(causal: nn.Module, upstream: Callable[..., Any], batch: _Batch, merges: bool, *args: Any, **kwargs: Any) -> Any:
    """In place of the model's forward. `merges`: it puts image features in itself, unless it is given embeddings."""
    labels = kwargs.get("labels")
    if not causal.training or labels is None or kwargs.get("return_dict") is False:
        return upstream(*args, **kwargs)
    if kwargs.get("inputs_embeds") is not None or not merges:
        batch.take(labels)
        kwargs["labels"] = None
    else:
        batch.awaited = True
    try:
        outputs = upstream(*args, **kwargs)
    finally:
        missed, batch.awaited, batch.rows = batch.awaited, False, None
    if missed:
        raise RuntimeError(
            f"{type(causal).__name__}.forward did not put image features in where it was expected to; give --supervised_logits False"
        )
    return type(outputs)(loss=outputs.logits)


def _head(causal: Any, head: nn.Module, upstream: Callable[..., Any], batch: _Batch, hidden: torch.Tensor) -> torch.Tensor:
    """In place of the head's forward: the loss, a scalar, from hidden states (samples, tokens, hidden); logits where no labels wait."""
    if batch.rows is None or batch.targets is None:
        return upstream(hidden)
    if tuple(hidden.shape[:2]) != batch.shape:
        raise ValueError(f"labels of shape {batch.shape} do not fit hidden states of shape {tuple(hidden.shape)}")
    hidden = hidden.flatten(0, 1).index_select(0, batch.rows)
    if not _in_slices(head, hidden.dtype):
        return F.cross_entropy(upstream(hidden).float(), batch.targets)
    return _LossInSlices.apply(hidden, batch.targets, upstream, causal.config.vocab_size)


def _in_slices(head: nn.Module, dtype: torch.dtype) -> bool:
    """Whether the loss's gradient may be taken in the forward pass: not of a head that trains itself, and not in fp16, where
    it would vanish before the loss is scaled up."""
    if torch.is_autocast_enabled() and torch.get_autocast_gpu_dtype() == torch.float16:
        return False
    return dtype != torch.float16 and not any(p.requires_grad for p in head.parameters())


class _LossInSlices(torch.autograd.Function):
    """Mean cross-entropy of hidden states (n, hidden) under a frozen head against targets (n,), a slice at a time.

    The gradient is taken slice by slice in the forward pass already, so that logits need not be kept, nor the head be run again.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, targets: torch.Tensor, logits_of: Callable[[torch.Tensor], torch.Tensor], vocabulary: int
    ) -> torch.Tensor:
        gradient = torch.empty_like(hidden)
        total = torch.zeros((), device=hidden.device)
        start, size = 0, max(LOGITS_AT_ONCE // vocabulary, 1)
        while start < len(targets):
            part = hidden[start : start + size].detach().requires_grad_()
            with torch.enable_grad():
                loss = F.cross_entropy(logits_of(part).float(), targets[start : start + size], reduction="sum") / len(targets)
            gradient[start : start + size] = torch.autograd.grad(loss, part)[0]
            total += loss.detach()
            start += size
        ctx.save_for_backward(gradient)
        return total if len(targets) else total / 0  # not a number, as upstream's mean over no label

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return ctx.saved_tensors[0] * grad_output, None, None, None


def logits_at_once(model: nn.Module, tokens: int, supervised: bool) -> int:
    """Most logits that are in memory together for a batch of `tokens`, every position of which may have a label.

    Args:
        supervised: whether this module's loss is asked for (`--supervised_logits`), and not in fp16.
    """
    causal = causal_of(model)
    everything = tokens * causal.config.vocab_size
    head = causal.get_output_embeddings()
    dtype = next(head.parameters()).dtype
    return min(everything, LOGITS_AT_ONCE) if supervised and not why_not(model) and _in_slices(head, dtype) else everything
