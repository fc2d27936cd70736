"""The queries and keys of a running attention module, taken by hooks on its parts, whatever implementation it runs with.

Every attention module of the upstreams makes its queries and keys in linear modules of its own (`q_proj` and `k_proj`;
Phi-3 `qkv_proj`; MPT `Wqkv`) and asks its own `rotary_emb` for cosines and sines. Hooks on those see the same values in
eager, SDPA and flash attention and in transformers 4.36 to 4.41, whose rotary signatures differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llava_region.errors import LlavaRegionError

PROJECTIONS = (("q_proj", "k_proj"), ("qkv_proj",), ("Wqkv",))
NORMS = ("q_layernorm", "k_layernorm", "q_norm", "k_norm")  # change queries and keys after the projections


@dataclass
class AttentionInputs:
    """What a layer's attention scores are made of: see `image_attention.image_attention` for the shapes."""

    queries: Tensor
    keys: Tensor
    scale: float
    layer_mask: Tensor | None
    bias: Tensor | None


def attention_of(layer: nn.Module) -> nn.Module:
    """The attention module of a decoder layer.

    Raises:
        LlavaRegionError: it makes its queries and keys in another way than the supported ones.
    """
    module = getattr(layer, "self_attn", None) or getattr(layer, "attn", None)
    known = any(all(hasattr(module, name) for name in names) for names in PROJECTIONS)
    if module is None or not known or any(getattr(module, name, None) is not None for name in NORMS):
        raise LlavaRegionError(
            f"image_attention does not know the attention of {type(layer).__name__}; allowed: q_proj and k_proj with rotary "
            "embeddings (Llama, Mistral, Phi, Qwen2, StableLM, MiniCPM), qkv_proj (Phi-3), Wqkv (MPT); leave this metric out"
        )
    return module


@contextmanager
def watch_attention(attention: nn.Module, receive: Callable[[AttentionInputs], None]) -> Iterator[None]:
    """Within the block, call `receive(AttentionInputs)` each time that `attention` has run."""
    seen: dict[str, Any] = {}

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.update(kwargs)

    def after(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        receive(_inputs(module, seen))
        seen.clear()

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args, output: seen.__setitem__(name, output)

    with ExitStack() as hooks:
        hooks.callback(attention.register_forward_pre_hook(before, with_kwargs=True).remove)
        for name in ("rotary_emb", *(name for names in PROJECTIONS for name in names)):
            if isinstance(getattr(attention, name, None), nn.Module):
                hooks.callback(getattr(attention, name).register_forward_hook(keep(name)).remove)
        hooks.callback(attention.register_forward_hook(after, with_kwargs=True).remove)
        yield


def _inputs(attention: Any, seen: dict[str, Any]) -> AttentionInputs:
    heads = getattr(attention, "num_heads", None) or attention.n_heads
    key_heads = getattr(attention, "num_key_value_heads", None) or heads
    queries, keys = (_split_heads(x, n) for x, n in zip(_projected(attention, seen, heads, key_heads), (heads, key_heads), strict=True))
    if "rotary_emb" in seen:
        cos, sin = (_at_positions(table, seen["position_ids"]) for table in seen["rotary_emb"])
        queries, keys = _rotate(queries, cos, sin), _rotate(keys, cos, sin)
    scale = getattr(attention, "softmax_scale", None) or queries.shape[-1] ** -0.5
    return AttentionInputs(queries, keys, scale, _layer_mask(attention, seen, queries.shape[2]), seen.get("position_bias"))


def _projected(attention: nn.Module, seen: dict[str, Any], heads: int, key_heads: int) -> tuple[Tensor, Tensor]:
    """Outputs of the projections: queries (B, T, heads * D) and keys (B, T, key heads * D).

    Raises:
        LlavaRegionError: the module went round its own projections (`pretraining_tp` above 1).
    """
    fused = seen.get("qkv_proj", seen.get("Wqkv"))
    if fused is not None:
        size = fused.shape[-1] // (heads + 2 * key_heads)
        return fused.split([heads * size, key_heads * size, key_heads * size], dim=-1)[:2]
    if "q_proj" not in seen or "k_proj" not in seen:
        raise LlavaRegionError(
            f"{type(attention).__name__} did not call its own q_proj and k_proj, so image_attention cannot see them; "
            "set 'pretraining_tp' to 1 in the model's config.json, or leave this metric out"
        )
    return seen["q_proj"], seen["k_proj"]


def _split_heads(projected: Tensor, heads: int) -> Tensor:
    """(B, T, heads * D) as (B, heads, T, D), float32."""
    return projected.float().unflatten(-1, (heads, -1)).transpose(1, 2)


def _at_positions(table: Tensor, position_ids: Tensor) -> Tensor:
    """Cosines or sines as (B or 1, 1, T, R): transformers hands out one row per position, or already one per token."""
    table = table.float()
    if table.dim() == 4:  # StableLM: (1, 1, positions, R)
        table = table[0, 0]
    return (table[position_ids] if table.dim() == 2 else table).unsqueeze(1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the first R of D dimensions (Phi and StableLM rotate a part), halves against each other."""
    size = cos.shape[-1]
    rotated, rest = x[..., :size], x[..., size:]
    low, high = rotated.chunk(2, dim=-1)
    rotated = rotated * cos + torch.cat((-high, low), dim=-1) * sin
    return torch.cat((rotated, rest), dim=-1) if rest.shape[-1] else rotated


def _layer_mask(attention: nn.Module, seen: dict[str, Any], length: int) -> Tensor | None:
    """Where the layer lets a query see a key, as (B or 1, 1, T, >= T), or None where that is causal and padding only.

    Raises:
        LlavaRegionError: flash attention with a sliding window, which it keeps to itself, over a longer sequence.
    """
    mask = seen.get("attention_mask")
    if mask is not None and mask.dim() == 4:
        if mask.dtype == torch.bool:
            return ~mask if hasattr(attention, "Wqkv") else mask  # MPT marks what is hidden
        return mask == 0
    window = getattr(getattr(attention, "config", None), "sliding_window", None)
    if window and length > window and "Flash" in type(attention).__name__:
        raise LlavaRegionError(
            f"a sequence of {length} tokens is longer than the sliding window of {window}, which flash attention does not show; "
            "give --attn-implementation eager"
        )
    return None
