"""Load a model that was just written and see that its cache works.

A decoder layer that keeps its old number writes to another layer's place in the key-value cache: the model then answers
differently with the cache, or not at all.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_region.errors import LlavaRegionError

if TYPE_CHECKING:
    import torch

    from llava_region.models.loaded import Embedded, LoadedModel

NEW_TOKENS = 8
_HINT = "; --no-self-test skips this"


def self_test(folder: str | Path) -> None:
    """Load the model in fp32 on the CPU and generate `NEW_TOKENS` tokens greedily, with the cache and without, to one image.

    fp32, so that a difference is a fault and not rounding.

    Raises:
        LlavaRegionError: it does not load, or the two answers differ.
    """
    import torch

    from llava_region.models.loading import load

    try:
        loaded = load(folder, device="cpu", dtype=torch.float32)
        images = [] if loaded.image_processor is None else [_picture(loaded)]
        prompt = loaded.prompt("What is in the image?", images=len(images))
        batch = loaded.embed([loaded.input_ids(prompt)], [images])
        with torch.inference_mode():
            cached, plain = _with_cache(loaded.model, batch), _without_cache(loaded.model, batch)
    except (LlavaRegionError, RuntimeError, LookupError, MemoryError) as e:
        raise LlavaRegionError(f"the self test failed, nothing was written: {' '.join(str(e).split())}{_HINT}") from e
    if cached != plain:
        raise LlavaRegionError(f"the self test failed, nothing was written: tokens {cached} with the cache, {plain} without{_HINT}")


def _picture(loaded: LoadedModel) -> torch.Tensor:
    from PIL import Image

    return loaded.pixel_values(Image.linear_gradient("L").convert("RGB"))


def _with_cache(model: Any, batch: Embedded) -> list[int]:
    """Token ids of a greedy answer, one token a step on top of the cache."""
    import torch

    mask = batch.attention_mask.long()
    out = model(inputs_embeds=batch.inputs_embeds, attention_mask=mask, use_cache=True)
    tokens = [int(out.logits[0, -1].argmax())]
    while len(tokens) < NEW_TOKENS:
        mask = torch.cat([mask, mask.new_ones(1, 1)], dim=1)
        step = model.get_input_embeddings()(torch.tensor([tokens[-1:]]))
        out = model(inputs_embeds=step, attention_mask=mask, past_key_values=out.past_key_values, use_cache=True)
        tokens.append(int(out.logits[0, -1].argmax()))
    return tokens


def _without_cache(model: Any, batch: Embedded) -> list[int]:
    """Token ids of a greedy answer, the whole sequence anew for each token."""
    import torch

    embeds, tokens = batch.inputs_embeds, []
    while len(tokens) < NEW_TOKENS:
        logits = model(inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long), use_cache=False).logits
        tokens.append(int(logits[0, -1].argmax()))
        embeds = torch.cat([embeds, model.get_input_embeddings()(torch.tensor([tokens[-1:]]))], dim=1)
    return tokens
