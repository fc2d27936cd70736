"""A training codebase that is neither LLaVA nor Bunny: other flags, other names of parts, LoRA by PEFT, transformers' Trainer."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, Trainer


class ToyConfig(PretrainedConfig):
    model_type = "toy"

    def __init__(self, num_hidden_layers=4, hidden_size=16, vocab_size=32, **kwargs):
        self.num_hidden_layers, self.hidden_size, self.vocab_size = num_hidden_layers, hidden_size, vocab_size
        super().__init__(**kwargs)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mix = nn.Linear(width, width)

    def forward(self, hidden):
        return hidden + torch.tanh(self.mix(hidden.cumsum(1)))


class ToyModel(PreTrainedModel):
    config_class = ToyConfig

    def __init__(self, config):
        super().__init__(config)
        width = config.hidden_size
        self.eye = nn.Linear(12, width)
        self.bridge = nn.Linear(width, width)
        self.words = nn.Embedding(config.vocab_size, width)
        self.stack = nn.ModuleList(Block(width) for _ in range(config.num_hidden_layers))
        self.answer = nn.Linear(width, config.vocab_size)

    def get_input_embeddings(self):
        return self.words

    def forward(self, input_ids, labels, picture):
        hidden = self.words(input_ids.clamp(min=0))
        hidden = torch.where((input_ids < 0)[..., None], self.bridge(self.eye(picture))[:, None], hidden)
        for block in self.stack:
            hidden = block(hidden)
        logits = self.answer(hidden)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"loss": loss, "logits": logits}


class ToyTrainer(Trainer):
    pass


@dataclass
class ModelArguments:
    start_from: Optional[str] = field(default=None)  # noqa: UP045 - what HfArgumentParser reads


@dataclass
class DataArguments:
    talk: Optional[str] = field(default=None)  # noqa: UP045
    pictures: Optional[str] = field(default=None)  # noqa: UP045


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    rank: int = 0
    remove_unused_columns: bool = False


def lora_targets(model):
    return ["mix", "bridge"]


def ids_and_labels(record):
    text = "".join(turn["value"] for turn in record["conversations"])
    ids = torch.tensor([-1, *(ord(c) % 32 for c in text[:20].ljust(20))])
    return ids, ids.clamp(min=0)


class Records(torch.utils.data.Dataset):
    def __init__(self, path):
        self.records = json.loads(Path(path).read_text())

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        ids, labels = ids_and_labels(self.records[i])
        return {"input_ids": ids, "labels": labels, "picture": torch.full((12,), float(i % 3))}


def train():
    parser = transformers.HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    model_args, data_args, args = parser.parse_args_into_dataclasses()
    start = Path(model_args.start_from)
    model = ToyModel(ToyConfig.from_pretrained(start))
    model.load_state_dict(load_file(start / "model.safetensors"))
    if args.rank:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=lora_targets(model)))
        model.base_model.model.bridge.requires_grad_(True)
    else:
        model.eye.requires_grad_(False)
    trainer = ToyTrainer(model=model, args=args, train_dataset=Records(data_args.talk))
    trainer.train(resume_from_checkpoint=bool(list(Path(args.output_dir).glob("checkpoint-*"))))
    trainer.save_model(args.output_dir)
    if args.rank:
        trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
        torch.save(trained, Path(args.output_dir) / "non_lora_trainables.bin")
