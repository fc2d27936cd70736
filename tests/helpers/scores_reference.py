"""Slow references for the scores: whole hidden states and attention matrices of one sample at a time, float64."""

import math
from itertools import pairwise

import torch

from llava_region.decoder import find_decoder_layers

PATCHES = 16  # image tokens of the tiny vision tower


def image_positions(ids: torch.Tensor) -> torch.Tensor:
    """Which tokens are of an image once each placeholder (-200) has become 16 of them: (T,) bool."""
    return torch.tensor([flag for i in ids.tolist() for flag in ([True] * PATCHES if i == -200 else [False])])


@torch.no_grad()
def run_alone(loaded, ids, images):
    """Hidden states between the layers, (L + 1) of (T, H), and attention, L of (heads, T, T); eager, no batch, no padding."""
    batch = loaded.embed([ids], [images])
    prefix, layers = find_decoder_layers(loaded.model)
    decoder = loaded.model.get_submodule(prefix.rpartition(".")[0])
    last = {}
    hook = layers[-1].register_forward_hook(lambda module, args, output: last.update(output=output[0]))
    out = decoder(
        inputs_embeds=batch.inputs_embeds, output_hidden_states=True, output_attentions=True, use_cache=False, return_dict=True
    )  # fmt: skip
    hook.remove()
    hidden = [*out.hidden_states[:-1], last["output"]]
    return [h[0].double() for h in hidden], [a[0].double() for a in out.attentions]


def reference_scores(loaded, samples) -> dict[str, list[float]]:
    """Scores by the definitions, over samples of (ids (T,), images); `loaded` has to run eager attention."""
    bi, image_cos, text_cos, angle, attention = [], [], [], [], []
    for ids, images in samples:
        hidden, attentions = run_alone(loaded, ids, images)
        where = image_positions(ids)
        cos = torch.stack([_cosine(x, y) for x, y in pairwise(hidden)])
        bi.append(1 - cos.mean(-1))
        text_cos.append(cos[:, ~where].mean(-1))
        angle.append(torch.arccos(torch.stack([_cosine(x[-1], y[-1]) for x, y in pairwise(hidden)])) / math.pi)
        if where.any():
            image_cos.append(cos[:, where].mean(-1))
            attention.append(torch.stack([a[:, :, where].sum() / (where.sum() * a.shape[0]) for a in attentions]))
    means = {name: torch.stack(rows).mean(0) for name, rows in (("i", image_cos), ("t", text_cos))}
    return {
        "block_influence": torch.stack(bi).mean(0).tolist(),
        "multimodal_block_influence": (1 - (means["i"] + means["t"]) / 2).tolist(),
        "angular_distance": torch.stack(angle).mean(0).tolist(),
        "image_attention": torch.stack(attention).mean(0).tolist(),
    }


def _cosine(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """0 where one of the two is zero, as the embedding of a padding token that is also EOS can be."""
    return (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1)).clamp(min=1e-30)


def mixed_records(names: list[str]) -> list[dict]:
    """Records with an image first, an image in a later turn, two images apart, text only, and different lengths."""

    def record(turns, image=None):
        roles = ("human", "gpt")
        conversation = [{"from": roles[i % 2], "value": text} for i, text in enumerate(turns)]
        return {"conversations": conversation, **({"image": image} if image else {})}

    return [
        record(["<image>\nWhat shape is in the image?", "circle"], names[0]),
        record(["What is 2 plus 3?", "5", "<image>\nWhat color is the shape?", "The shape is teal, as one can see."], names[1]),
        record(["What is 1 plus 1? Answer in one word.", "2"]),
        record(["<image>\nIs there a circle?", "yes", "<image>\nAnd is there a rectangle in this one?", "no"], [names[2], names[3]]),
        record(["<image>\nDoes the image contain a triangle? Answer the question using a single word or phrase.", "no"], [names[4]]),
        record(["Who are you, and what can you do for me?", "An assistant.", "What is 7 plus 8?", "15"]),
        record(["<image>\nWhat is this?"], names[5]),
    ]
