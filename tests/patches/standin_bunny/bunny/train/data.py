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


class Records(torch.utils.data.Dataset):
    def __init__(self, tokenizer, data_args, processor):
        self.records = json.loads(Path(data_args.data_path).read_text())
        self.tokenizer, self.folder, self.processor = tokenizer, Path(data_args.image_folder), processor

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        record, template = self.records[i], conversation.conv_templates["bunny"]
        question, answer = (turn["value"] for turn in record["conversations"][:2])
        before = self.tokenizer(template.question.format(question.replace("<image>\n", ""))).input_ids
        after = self.tokenizer(answer + template.end).input_ids
        size = self.processor.size
        if "image" in record:
            with Image.open(self.folder / record["image"]) as image:
                pixels = self.processor.preprocess(image.convert("RGB"), return_tensors="pt")["pixel_values"][0]
            before = [-200, *before]
        else:
            pixels = torch.zeros(3, size["height"], size["width"])
        return {"input_ids": torch.tensor(before + after), "labels": torch.tensor([-100] * len(before) + after), "image": pixels}


def collate(samples):
    ids = pad_sequence([sample["input_ids"] for sample in samples], batch_first=True)
    mask = pad_sequence([torch.ones_like(sample["input_ids"], dtype=torch.bool) for sample in samples], batch_first=True)
    labels = pad_sequence([sample["labels"] for sample in samples], batch_first=True, padding_value=-100)
    return {"input_ids": ids, "labels": labels, "attention_mask": mask, "images": torch.stack([sample["image"] for sample in samples])}
