"""Layers that are kept for the backward pass, without what is cheap to compute again: RMS norms, and the product behind a gate.

A norm written in Python keeps its input in fp32 (twice the bytes in bfloat16), and the product of an activation and what it gates keeps
the activation too. Of a frozen Llama layer that is more than a third of what is kept, and next to none of its time. Matrix products and
attention are kept. The values are the same to the bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint


class LeanLayers:
    """Wraps the norms and activations of decoder layers; they work as before but within `active`.

    Args:
        layers: decoder layers.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self._active = False
        self._wrapped: list[nn.Module] = []
        for layer in layers:
            for parent in layer.modules():
                for module in parent.children():
                    if _is_norm(module) and not _is_partitioned(module):
                        self._wrap(module, _norm_again)
                    elif isinstance(module, nn.SiLU | nn.GELU):  # keep their input alone
                        if _is_gated(parent):
                            self._wrap(module, _Gate)
                    elif type(module).__module__ == "transformers.activations":  # written in Python
                        self._wrap(module, _gate_again if _is_gated(parent) else _again)

    def _wrap(self, module: nn.Module, lean: Callable[[Callable[..., Any], torch.Tensor], Any]) -> None:
        forward = module.forward

        def wrapped(inputs: torch.Tensor) -> Any:
            return lean(forward, inputs) if self._active and torch.is_grad_enabled() else forward(inputs)

        module.forward = wrapped
        self._wrapped.append(module)

    @contextmanager
    def active(self, whether: bool = True) -> Iterator[None]:
        """Within the block, layers that run keep less."""
        before, self._active = self._active, whether
        try:
            yield
        finally:
            self._active = before

    def remove(self) -> None:
        """Leave the modules as they were."""
        for module in self._wrapped:
            vars(module).pop("forward", None)
        self._wrapped = []


def _is_norm(module: nn.Module) -> bool:
    """A norm that computes by itself; fused ones keep no more than their input."""
    name = type(module).__name__
    return name.endswith("RMSNorm") and not name.startswith("Liger") and type(module).__module__.partition(".")[0] != "torch"


def _is_partitioned(module: nn.Module) -> bool:
    """Whether ZeRO-3 gathers the module's weights for its forward only, so that they are not there to compute again."""
    return any(hasattr(p, "ds_id") and not getattr(p, "ds_persist", False) for p in module.parameters(recurse=False))


def _is_gated(mlp: nn.Module) -> bool:
    """Whether an MLP makes a gate and as many values for it, so that a product takes the activation. Where a matrix product does, it
    must see a tensor: that of ZeRO-3, among others, is no function of torch's."""
    children: list[Any] = [*mlp.children()]
    layers = [child for child in children if hasattr(child, "in_features") and hasattr(child, "out_features")]
    return any(2 * down.in_features == sum(other.out_features for other in layers if other is not down) for down in layers)


def _again(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
    """The function's value, of which the inputs alone are kept."""
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def _norm_again(norm: Callable[..., torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
    """In fp32 a norm keeps its input as it is, and next to nothing besides."""
    return norm(inputs) if inputs.dtype == torch.float32 else _again(norm, inputs)


def _gate_again(activation: Callable[..., torch.Tensor], inputs: torch.Tensor) -> _Gate:
    return _Gate(functools.partial(_again, activation), inputs)


class _Gate:
    """An activation's value that is not computed yet: a product with it keeps the factors alone. Anything else sees a tensor."""

    def __init__(self, activation: Callable[[torch.Tensor], torch.Tensor], inputs: torch.Tensor) -> None:
        self._activation, self._inputs = activation, inputs
        self._computed: torch.Tensor | None = None

    def _value(self) -> torch.Tensor:
        if self._computed is None:
            self._computed = self._activation(self._inputs)
        return self._computed

    def __mul__(self, other: torch.Tensor) -> torch.Tensor:
        return _again(lambda inputs, other: self._activation(inputs) * other, self._inputs, other)

    def __rmul__(self, other: torch.Tensor) -> torch.Tensor:
        return _again(lambda inputs, other: other * self._activation(inputs), self._inputs, other)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._value(), name)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if function in (torch.Tensor.mul, torch.Tensor.__mul__, torch.mul) and len(args) == 2 and not kwargs and isinstance(args[1], cls):
            return args[1].__rmul__(args[0])
        given: Any = tree_map(lambda arg: arg._value() if isinstance(arg, cls) else arg, (args, kwargs or {}))
        return function(*given[0], **given[1])
