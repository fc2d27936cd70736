"""One batch through the decoder layers, with hooks that reduce each layer to a few numbers per sample while it runs.

A layer's own input and output are used: the last of transformers' `hidden_states` is after the final norm. Nothing of the
size of a hidden state outlives its layer, so memory does not grow with layers or samples.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llava_region.decoder import find_decoder_layers, parent_of
from llava_region.scores.angular_distance import angular_distance
from llava_region.scores.attention_inputs import AttentionInputs, attention_of, watch_attention
from llava_region.scores.block_influence import block_influence, modality_cosines, token_cosines
from llava_region.scores.image_attention import image_attention
from llava_region.scores.sums import Sums

if TYPE_CHECKING:
    from llava_region.models.loaded import Embedded


def measure(model: nn.Module, batch: Embedded, metrics: Collection[str], sums: Sums) -> Tensor | None:
    """Run the language model over a batch and add its samples to `sums`.

    The LM head is left out: no metric needs it.

    Args:
        model: upstream's model, or a plain language model.
        batch: (B, T, H) embeddings with their masks and positions.
        metrics: which of `ACTIVATION_METRICS`.
        sums: added to in place.

    Returns:
        Image attention per sample and layer for the heat map, (B, L), NaN for samples without an image; None if not asked for.
    """
    with watch_layers(model, batch, metrics) as seen:
        forward_decoder(model, batch)
    values = {quantity: torch.stack([row.double().cpu() for row in rows]) for quantity, rows in seen.items()}
    mask, image = batch.attention_mask.cpu(), batch.image_mask.cpu()
    has_image, has_text = (mask & image).any(-1), (mask & ~image).any(-1)
    counted = {"image_cosine": has_image, "text_cosine": has_text, "image_attention": has_image}
    for quantity, rows in values.items():
        sums.add(quantity, rows, counted.get(quantity, has_image | has_text))
    if "image_attention" not in metrics:
        return None
    attention = values.get("image_attention", torch.zeros(sums.table.shape[1] - 1, len(mask), dtype=torch.float64))
    return attention.T.masked_fill(~has_image[:, None], torch.nan)


def forward_decoder(model: nn.Module, batch: Embedded) -> None:
    """Run the decoder layers (without the LM head) over an embedded batch."""
    decoder = parent_of(model)
    positions = {"position_ids": batch.position_ids} if "position_ids" in inspect.signature(decoder.forward).parameters else {}
    decoder(inputs_embeds=batch.inputs_embeds, attention_mask=batch.attention_mask.long(), use_cache=False, **positions)


@contextmanager
def watch_layers(model: nn.Module, batch: Embedded, metrics: Collection[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Hook every decoder layer; yields a dict that fills with one (B,) per layer for each quantity while the model runs.

    Raises:
        LlavaRegionError: image attention is asked for, and the model's attention is of no known kind.
    """
    seen: dict[str, list[Tensor]] = defaultdict(list)
    mask, image = batch.attention_mask.bool(), batch.image_mask
    reduce_hidden = _hidden_reducer(seen, mask, image, metrics)
    reduce_attention = _attention_reducer(seen, mask, image)
    attention = "image_attention" in metrics and bool((mask & image).any())
    with ExitStack() as hooks:
        for layer in find_decoder_layers(model).modules:
            if attention:
                hooks.enter_context(watch_attention(attention_of(layer), reduce_attention))
            hooks.callback(layer.register_forward_hook(reduce_hidden, with_kwargs=True).remove)
        yield seen


def _hidden_reducer(seen: dict[str, list[Tensor]], mask: Tensor, image: Tensor, metrics: Collection[str]) -> Callable[..., None]:
    """A forward hook for decoder layers: block influence and angular distance from their input and output."""

    def reduce(layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        after = output[0] if isinstance(output, tuple) else output
        before = (args[0] if args else kwargs["hidden_states"]).to(after.device)
        tokens, images = mask.to(after.device), image.to(after.device)
        if "block_influence" in metrics or "multimodal_block_influence" in metrics:
            cosines = token_cosines(before, after)
            if "block_influence" in metrics:
                seen["block_influence"].append(block_influence(cosines, tokens))
            if "multimodal_block_influence" in metrics:
                for quantity, mean in zip(("image_cosine", "text_cosine"), modality_cosines(cosines, tokens, images), strict=True):
                    seen[quantity].append(mean)
        if "angular_distance" in metrics:
            seen["angular_distance"].append(angular_distance(before, after, tokens))

    return reduce


def _attention_reducer(seen: dict[str, list[Tensor]], mask: Tensor, image: Tensor) -> Callable[[AttentionInputs], None]:
    """What `watch_attention` calls after each layer's attention."""
    first = int((mask & image).any(0).int().argmax())  # once per batch: it waits for the device

    def reduce(inputs: AttentionInputs) -> None:
        device = inputs.queries.device
        score = image_attention(
            inputs.queries, inputs.keys, inputs.scale, mask.to(device), image.to(device),
            first=first, layer_mask=inputs.layer_mask, bias=inputs.bias,
        )  # fmt: skip
        seen["image_attention"].append(score)

    return reduce
