"""Tiny random backbones, a SigLIP tower and fast tokenizers for each of Bunny's model types. Needs the real Bunny."""

import json
from pathlib import Path
from typing import NamedTuple

from llava_region.data.tiny import WORDS, easy_vqa_folder, easy_vqa_records, text_records

LAYERS = 8
TEXT_SIZE = 600
# --model_type: (prefix of Bunny's classes, model_type in config.json, conversation template, special tokens, further config)
GPT = {"eos": "<|endoftext|>", "unk": "<|endoftext|>", "bos": "<|endoftext|>"}
# as in Llama 3 Instruct, whose own end is not the 128001 that Bunny sets
LLAMA3 = {"bos": "<|begin_of_text|>", "pad": "<|end_of_text|>", "eos": "<|eot_id|>"}
MODEL_TYPES = {
    "llama3-8b": ("Llama", "llama", "llama", LLAMA3, {"num_key_value_heads": 2}),
    "phi-3": ("Phi3", "phi3", "phi3", {"bos": "<s>", "eos": "<|endoftext|>", "unk": "<unk>"}, {"num_key_value_heads": 4}),
    "phi-2": ("Phi", "phi", "bunny", GPT, {"partial_rotary_factor": 0.5}),
    "phi-1.5": ("Phi", "phi", "bunny", GPT, {"partial_rotary_factor": 0.5}),
    "qwen1.5-1.8b": ("Qwen2", "qwen2", "bunny", {"eos": "<|endoftext|>", "pad": "<|endoftext|>"}, {"num_key_value_heads": 4}),
    "stablelm-2": ("StableLM", "stablelm_epoch", "bunny", {**GPT, "pad": "<|endoftext|>"}, {"num_key_value_heads": 4}),
    "minicpm": (
        "MiniCPM", "minicpm", "minicpm", {"bos": "<s>", "eos": "</s>", "unk": "<unk>"},
        {"scale_emb": 12, "dim_model_base": 16, "scale_depth": 1.4},
    ),
}  # fmt: skip
WITH_BOS = ("llama3-8b", "minicpm")


class BunnyFiles(NamedTuple):
    """What `write_bunny` wrote, and the template that its model type is trained with."""

    backbone: Path
    vision_tower: Path
    data: Path
    images: Path
    model_type: str
    version: str


def write_bunny(folder: Path, model_type: str, samples: int = 24, text_samples: int = 4) -> BunnyFiles:
    """Write backbone, tokenizer, SigLIP tower and data of one model type under `folder`."""
    name, config_type, version, special, extra = MODEL_TYPES[model_type]
    files = BunnyFiles(
        folder / f"{model_type}-tiny", folder / "siglip-tiny", folder / "data.json", easy_vqa_folder() / "images", model_type, version
    )
    tokenizer = write_tokenizer(files.backbone, model_type, special)
    write_backbone(files.backbone, name, config_type, tokenizer, extra)
    if not files.vision_tower.exists():
        write_siglip(files.vision_tower)
        records = easy_vqa_records(samples) + text_records(text_samples)
        files.data.write_text(json.dumps(records))
    return files


def write_tokenizer(folder: Path, model_type: str, special: dict):
    """A byte-level BPE. Bunny sets `eos_token_id = 128001` for llama3-8b, so there the special tokens stand where Llama 3 has them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokens = list(dict.fromkeys(special.values()))
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    questions = json.loads((easy_vqa_folder() / "questions.json").read_text())[:500]
    trainer = trainers.BpeTrainer(vocab_size=TEXT_SIZE, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator([f"{q} {a}" for q, a, _ in questions] + WORDS * 20, trainer)
    model = json.loads(trained.to_str())["model"]
    vocab = model["vocab"]
    if model_type == "llama3-8b":
        vocab.update({f"<unused_{i}>": i for i in range(len(vocab), 128000)})
    tokenizer = Tokenizer(models.BPE(vocab, [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]))
    tokenizer.pre_tokenizer, tokenizer.decoder = trained.pre_tokenizer, decoders.ByteLevel()
    tokenizer.add_special_tokens(tokens)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{f"{name}_token": token for name, token in special.items()})
    if model_type in WITH_BOS:
        bos = special["bos"]
        pair = (bos, fast.convert_tokens_to_ids(bos))
        fast.backend_tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[pair])
    fast.save_pretrained(folder)
    return fast


def write_backbone(folder: Path, name: str, config_type: str, tokenizer, extra: dict) -> None:
    """A random language model of `LAYERS` decoder layers, hidden size 64, fp32, whose config.json reads as the original's does."""
    import bunny.model
    import torch

    torch.manual_seed(0)
    model_class = getattr(bunny.model, f"Bunny{name}ForCausalLM")
    config = model_class.config_class(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=LAYERS, num_attention_heads=4,
        max_position_embeddings=2048, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, **extra,
    )  # fmt: skip
    model_class(config).save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": config_type, "architectures": [f"{name}ForCausalLM"]}))


def write_siglip(folder: Path) -> None:
    """A random SigLIP tower: 16 patches an image, width 32, 3 layers."""
    import torch
    from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(1)
    config = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=56, patch_size=14
    )
    SiglipVisionModel(config).save_pretrained(folder)
    SiglipImageProcessor(size={"height": 56, "width": 56}).save_pretrained(folder)


def bunny_flags(files: BunnyFiles, output: Path, **flags) -> list[str]:
    """Flags of bunny/train/train.py for a short run on CPU; `flags` override or add, None removes."""
    arguments = {
        "model_name_or_path": files.backbone, "model_type": files.model_type, "version": files.version, "data_path": files.data,
        "image_folder": files.images, "vision_tower": files.vision_tower, "mm_projector_type": "mlp2x_gelu",
        "image_aspect_ratio": "pad", "output_dir": output, "max_steps": 2, "per_device_train_batch_size": 2,
        "evaluation_strategy": "no", "save_strategy": "no", "learning_rate": 2e-4,
        "mm_projector_lr": 2e-5, "weight_decay": 0.0, "warmup_ratio": 0.03, "lr_scheduler_type": "cosine", "logging_steps": 1,
        "model_max_length": 256, "gradient_checkpointing": True, "lazy_preprocess": True, "report_to": "none", "use_cpu": True,
        "disable_tqdm": True, **flags,
    }  # fmt: skip
    return [part for name, value in arguments.items() if value is not None for part in (f"--{name}", str(value))]
