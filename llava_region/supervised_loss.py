"""Logits only where a label is.

In training, upstream computes the head's logits for every position, in fp32, and then ignores those without a label: the
image's tokens, the question, the padding. Here the head sees only the positions whose next token is an answer's; the loss is
the same mean over the same positions, equal within the rounding of another order of summation.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from llava_region.checkpointing import causal_of

IGNORE_INDEX = -100


@dataclass
class _Batch:
    """The labels of the forward pass in flight: shape (samples, tokens), and rows (n,) and targets (n,) of the supervised positions.

    `awaited`: they are still on their way through `prepare_inputs_labels_for_multimodal`.
    """

    awaited: bool = False
    shape: tuple[int, ...] | None = None
    rows: torch.Tensor | None = None
    targets: torch.Tensor | None = None

    def take(self, labels: torch.Tensor) -> None:
        """Position t predicts label t + 1; rows count through the flattened batch."""
        following = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()
        self.shape, self.rows = tuple(labels.shape), (following != IGNORE_INDEX).nonzero().squeeze(1)
        self.targets, self.awaited = following[self.rows], False


def why_not(model: nn.Module) -> str | None:
    """Why the loss of this model has to stay upstream's, or None."""
    if isinstance(model, nn.DataParallel):
        return "torch.nn.DataParallel copies the model in every step"
    causal = causal_of(model)
    if getattr(causal.config, "pretraining_tp", 1) > 1:
        return f"pretraining_tp is {causal.config.pretraining_tp}, so the head is not called as one module"
    if not causal.config.use_return_dict:
        return "the model's config has return_dict off"
    names = [inspect.unwrap(kind.forward).__code__.co_names for kind in type(causal).__mro__ if "forward" in vars(kind)]
    loss = next((n for n in names if "lm_head" in n), ())
    if "CrossEntropyLoss" not in loss or "load_balancing_loss_func" in loss:
        return f"{type(causal).__name__}.forward does not compute the plain cross-entropy of self.lm_head"
    return None


def install(model: nn.Module) -> str | None:
    """Have the model compute logits only at supervised positions while it trains; evaluation and generation are untouched.

    Upstream's own forward runs, with two seams: `prepare_inputs_labels_for_multimodal` (where there is one) hands its labels
    over instead of passing them on, and a pre-hook of the head selects the positions. The head is called as a module, exactly
    once a step, so ZeRO-3 gathers it as ever.

    Args:
        model: as the trainer has wrapped it. Its outputs then hold `loss` and no logits.

    Returns:
        Why it was left as it is (see `why_not`), or None when installed.
    """
    reason = why_not(model)
    if reason:
        return reason
    uninstall(model)
    causal, batch = causal_of(model), _Batch()
    handle = causal.get_output_embeddings().register_forward_pre_hook(functools.partial(_select, batch))
    forward = functools.wraps(causal.forward)(functools.partial(_forward, causal, causal.forward, batch))
    forward.undo = [handle.remove, _restore(causal, "forward")]
    prepare = getattr(causal, "prepare_inputs_labels_for_multimodal", None)
    if prepare is not None:
        forward.undo.append(_restore(causal, "prepare_inputs_labels_for_multimodal"))
        causal.prepare_inputs_labels_for_multimodal = functools.wraps(prepare)(functools.partial(_prepare, prepare, batch))
    causal.forward = forward
    return None


def uninstall(model: nn.Module) -> None:
    """Give the model its own forward back."""
    for undo in getattr(causal_of(model).forward, "undo", ()):
        undo()


def _restore(module: nn.Module, name: str):
    """A function that puts the attribute back: the instance's own, or the class's where the instance had none."""
    if name in vars(module):
        return functools.partial(setattr, module, name, vars(module)[name])
    return functools.partial(delattr, module, name)


def _forward(causal, upstream, batch: _Batch, *args, **kwargs):
    labels = kwargs.get("labels")
    if not causal.training or labels is None or kwargs.get("return_dict") is False:
        return upstream(*args, **kwargs)
    if kwargs.get("inputs_embeds") is not None or not hasattr(causal, "prepare_inputs_labels_for_multimodal"):
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
            f"{type(causal).__name__}.forward did not call prepare_inputs_labels_for_multimodal; give --supervised_logits False"
        )
    return type(outputs)(loss=F.cross_entropy(outputs.logits, batch.targets))


def _prepare(upstream, batch: _Batch, *args, **kwargs):
    *prepared, labels = upstream(*args, **kwargs)
    if not batch.awaited or labels is None:
        return (*prepared, labels)
    batch.take(labels)
    return (*prepared, None)


def _select(batch: _Batch, head: nn.Module, args: tuple):
    """Pre-hook of the head: hidden states (samples, tokens, hidden) to (n, hidden)."""
    if batch.rows is None:
        return None
    hidden = args[0]
    if tuple(hidden.shape[:2]) != batch.shape:
        raise ValueError(f"labels of shape {batch.shape} do not fit hidden states of shape {tuple(hidden.shape)}")
    return (hidden.flatten(0, 1).index_select(0, batch.rows), *args[1:])
