"""A tiny random LLaVA backbone, vision tower and easy-vqa data on disk: for the demo, the tests, and trying a cluster.

Nothing is downloaded: weights are random, the tokenizer is trained here, pictures and questions come from the
`easy-vqa` package (PyPI).
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import NamedTuple

WORDS = [
    "A chat between a curious human and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the human's questions. USER: ASSISTANT:",
    "Answer the question using a single word or phrase. Provide the bounding box coordinate of the region.",
    "Answer with the option's letter from the given choices directly. A. B. C. D. [0.12, 0.34, 0.56, 0.78]",
    "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ 0123456789 .,:;!?'\"()[]-_/\\<>%&*+=#@$^~`{}|",
]


class TinyFiles(NamedTuple):
    """What `write_tiny` wrote: folders of the backbone and the vision tower, the data file, and the image folder."""

    backbone: Path
    vision_tower: Path
    data: Path
    images: Path


def easy_vqa_folder(split: str = "train") -> Path:
    """Folder of the `easy-vqa` package with `questions.json` and `images/` of a split.

    Raises:
        ImportError: the package is not installed.
    """
    import easy_vqa

    return Path(easy_vqa.__file__).parent / "data" / split


def write_tiny(
    folder: str | Path, *, num_layers: int = 8, hidden_size: int = 64, samples: int = 64, text_samples: int = 8, seed: int = 0
) -> TinyFiles:
    """Write backbone, vision tower, tokenizer and LLaVA-format data under `folder`.

    Args:
        num_layers: decoder layers of the backbone.
        hidden_size: its width; a multiple of 16.
        samples: easy-vqa records with an image.
        text_samples: records without one, mixed in.
        seed: of the weights and of the choice of records.
    """
    folder = Path(folder)
    images = easy_vqa_folder() / "images"
    files = TinyFiles(folder / "vicuna-tiny", folder / "clip-tiny", folder / "data.json", images)
    write_tokenizer(files.backbone)
    write_backbone(files.backbone, num_layers=num_layers, hidden_size=hidden_size, seed=seed)
    write_vision_tower(files.vision_tower, seed=seed)
    records = easy_vqa_records(samples, seed) + text_records(text_samples)
    random.Random(seed).shuffle(records)
    files.data.write_text(json.dumps(records))
    return files


def write_tokenizer(folder: Path, vocab_size: int = 512) -> None:
    """Train a sentencepiece tokenizer on easy-vqa's questions and save it the way Llama's slow tokenizer reads it."""
    import sentencepiece
    from transformers import LlamaTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    questions = json.loads((easy_vqa_folder() / "questions.json").read_text())
    sentences = [f"{q} {a}" for q, a, _ in questions[:2000]] + WORDS * 50
    model = folder / "tokenizer.model"
    with model.open("wb") as out:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences), model_writer=out, vocab_size=vocab_size, model_type="bpe", byte_fallback=True,
            character_coverage=1.0, pad_id=-1, minloglevel=2,
            normalization_rule_name="identity", remove_extra_whitespaces=False,  # as Llama's: LLaVA counts on spaces being kept
        )  # fmt: skip
    LlamaTokenizer(str(model), legacy=False).save_pretrained(folder)


def write_backbone(folder: Path, *, num_layers: int, hidden_size: int, vocab_size: int = 512, seed: int = 0) -> None:
    """Write a random Llama of `num_layers` decoder layers in fp32 (safetensors)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=hidden_size, intermediate_size=hidden_size * 2, num_hidden_layers=num_layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def write_vision_tower(folder: Path, seed: int = 0) -> None:
    """Write a random CLIP vision tower (16 patches per image, width 32, 3 layers) with its image processor."""
    import torch
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(seed + 1)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=56, patch_size=14
    )
    CLIPVisionModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}).save_pretrained(folder)


def easy_vqa_records(count: int, seed: int = 0) -> list[dict]:
    """`count` records of easy-vqa's training questions in LLaVA's format; images are relative to its `images` folder."""
    questions = json.loads((easy_vqa_folder() / "questions.json").read_text())
    chosen = random.Random(seed).sample(range(len(questions)), count)
    return [_record(i, *questions[i]) for i in chosen]


def _record(number: int, question: str, answer: str, image: int) -> dict:
    prompt = f"<image>\n{question}\nAnswer the question using a single word or phrase."
    turns = [{"from": "human", "value": prompt}, {"from": "gpt", "value": answer}]
    return {"id": f"easy-vqa-{number}", "image": f"{image}.png", "conversations": turns}


def text_records(count: int) -> list[dict]:
    """`count` records without an image: small sums."""
    turns = [(f"What is {i} plus {i + 1}?", str(2 * i + 1)) for i in range(count)]
    return [
        {"id": f"sum-{i}", "conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]} for i, (q, a) in enumerate(turns)
    ]
