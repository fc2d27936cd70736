"""Records of LLaVA's format as ids, labels and pixels."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

from bunny import conversation


@dataclass
class DataArguments:
    data_path: str = field(default=None)
    image_folder: str = field(default=None)
    image_aspect_ratio: str = field(default=None)
    lazy_preprocess: bool = False


def preprocess_multimodal(sources, data_args):
    return [[{**turn, "value": turn["value"].replace("<image>\n", "")} for turn in turns] for turns in sources]


def preprocess(sources, tokenizer, has_image=False):
    template, ids, labels = conversation.default_conversation, [], []
    for turns in sources:
        question, answer = (turn["value"] for turn in turns[:2])
        before = [-200] * has_image + tokenizer(template.question.format(question)).input_ids
        after = tokenizer(answer + template.sep2).input_ids
        ids.append(torch.tensor(before + after))
        labels.append(torch.tensor([-100] * len(before) + after))
    return {"input_ids": ids, "labels": labels}


class Records(torch.utils.data.Dataset):
    def __init__(self, tokenizer, data_args, processor):
        self.records = json.loads(Path(data_args.data_path).read_text())
        self.tokenizer, self.folder, self.processor = tokenizer, Path(data_args.image_folder), processor

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        record, size = self.records[i], self.processor.size
        turns = [record["conversations"]]
        if "image" in record:
            with Image.open(self.folder / record["image"]) as image:
                pixels = self.processor.preprocess(image.convert("RGB"), return_tensors="pt")["pixel_values"][0]
            turns = preprocess_multimodal(turns, None)
        else:
            pixels = torch.zeros(3, size["height"], size["width"])
        made = preprocess(turns, self.tokenizer, has_image="image" in record)
        return {"input_ids": made["input_ids"][0], "labels": made["labels"][0], "image": pixels}


def collate(samples):
    ids = pad_sequence([sample["input_ids"] for sample in samples], batch_first=True)
    mask = pad_sequence([torch.ones_like(sample["input_ids"], dtype=torch.bool) for sample in samples], batch_first=True)
    labels = pad_sequence([sample["labels"] for sample in samples], batch_first=True, padding_value=-100)
    return {"input_ids": ids, "labels": labels, "attention_mask": mask, "images": torch.stack([sample["image"] for sample in samples])}
