"""The config of a model without some of its decoder layers: their count, what it says of each layer, and which it names by index.

Names are those of transformers' configs, and of models that bring their own code. A list is never taken for one of layers because
of its length alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from llava_region.checkpoints.model_source import LAYER_COUNT_KEYS

# One entry per decoder layer, where they are lists of that length; in most models some of them are single numbers.
PER_LAYER = frozenset({
    "activation_sparsity_pattern", "attention_layers", "block_configs", "ffn_multipliers", "head_dim", "indexer_types", "intermediate_size",
    "kv_sharing_modes", "layer_rope_theta", "layer_types", "layers_block_type", "layers_num_experts", "mlp_layer_types",
    "moe_intermediate_size", "moe_topk", "no_rope_layers", "num_attention_heads", "num_attention_heads_per_layer", "num_experts",
    "num_experts_per_tok", "num_key_value_heads", "num_key_value_heads_per_layer", "num_kv_heads", "num_query_heads", "num_shared_expert",
    "per_layer_config", "rope_theta", "sliding_window", "sliding_windows", "swiglu_limits", "swiglu_limits_shared",
})  # fmt: skip
# Indices of decoder layers, and the number of the first layer there.
INDICES = {
    "attn_layer_indices": 0, "cross_attention_layers": 0, "full_attention_layers": 0, "full_attn_idxs": 0, "global_attn_idx": 0,
    "hybrid_layer_ids": 0, "local_layer_ids": 0, "mlp_only_layers": 0, "moe_layers": 0, "ple_layer_ids": 1, "reverted_layers": 0,
    "rope_scaling_layers": 0, "sliding_window_layers": 0,
}  # fmt: skip
# Where something begins or ends: how many of the first layers are of a kind.
_FIRST_LAYERS = ("first_k_dense_replace", "max_window_layers")
# Known lists of other things, whatever their length is.
_OTHER_LISTS = frozenset({
    "architectures", "bad_words", "bad_words_ids", "begin_suppress_tokens", "eos_token_id", "force_words_ids", "forced_decoder_ids",
    "image_grid_pinpoints", "sequence_bias", "suppress_tokens", "tags",
})  # fmt: skip
# Of the parts of a config: that of the language model.
_TEXT_CONFIG = "text_config"


def pruned_config(config: dict[str, Any], kept: list[int], num_layers: int) -> dict[str, Any]:
    """The config for the kept layers.

    Args:
        config: the content of a `config.json`.
        kept: old numbers of the layers that stay, ascending.
        num_layers: decoder layers of `config`.
    """
    return {key: _pruned(key, value, kept, num_layers) for key, value in config.items()}


def unknown_lists(config: dict[str, Any], num_layers: int) -> list[str]:
    """Remarks on lists with as many entries as decoder layers whose meaning is not known; see `_cut_by_name`."""
    config = config | (config[_TEXT_CONFIG] if isinstance(config.get(_TEXT_CONFIG), dict) else {})
    known = {*PER_LAYER, *INDICES, *_OTHER_LISTS}
    return [
        f"config.json: '{key}' has {num_layers} entries and is not known here; "
        + ("the dropped layers' entries were removed" if _cut_by_name(key) else "it was left as it is")
        for key, value in config.items()
        if isinstance(value, list) and len(value) == num_layers and key not in known
    ]


def renumbered(layers: Iterable[int], kept: list[int], first: int = 0) -> list[int]:
    """The kept ones among `layers` in new numbers, where the first layer of a model has the number `first`."""
    return [kept.index(i - first) + first for i in layers if i - first in kept]


def _pruned(key: str, value: Any, kept: list[int], num_layers: int) -> Any:
    if key == _TEXT_CONFIG and isinstance(value, dict):
        return pruned_config(value, kept, num_layers)
    if isinstance(value, int) and not isinstance(value, bool):
        if key in LAYER_COUNT_KEYS:
            return len(kept)
        return sum(i < value for i in kept) if key in _FIRST_LAYERS else value
    if not isinstance(value, list):
        return value
    if key in INDICES:
        return renumbered(value, kept, INDICES[key])
    # some lists go on after the decoder's layers, such as for layers that predict further tokens
    if (key in PER_LAYER and len(value) >= num_layers) or (len(value) == num_layers and _cut_by_name(key)):
        return [*(value[i] for i in kept), *value[num_layers:]]
    return value


def _cut_by_name(key: str) -> bool:
    """Whether a list of the right length that is not known counts as one entry per decoder layer: only if it is called so."""
    return key not in _OTHER_LISTS and "layer" in key and not key.startswith(("vision", "mm_"))
