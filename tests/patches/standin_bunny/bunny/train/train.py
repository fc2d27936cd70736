"""The seams: train() looks up the dataclasses, find_all_linear_names and the trainer in this module's globals, as Bunny's does."""

import os
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import torch
import transformers

from bunny import conversation as conversation_lib  # noqa: F401 - llava_region looks it up here
from bunny.model import BunnyPhiForCausalLM
from bunny.train.bunny_trainer import BunnyTrainer
from bunny.util.data_utils import DataArguments, Records, collate


@dataclass
class ModelArguments:
    model_name_or_path: Optional[str] = field(default=None)  # noqa: UP045 - what HfArgumentParser reads
    model_type: Optional[str] = field(default=None)  # noqa: UP045
    version: Optional[str] = field(default=None)  # noqa: UP045
    vision_tower: Optional[str] = field(default=None)  # noqa: UP045
    pretrain_mm_mlp_adapter: Optional[str] = field(default=None)  # noqa: UP045
    mm_projector_type: Optional[str] = field(default="mlp2x_gelu")  # noqa: UP045
    unfreeze_vision_tower: bool = field(default=False)
    use_s2: bool = field(default=False)
    tune_mm_mlp_adapter: bool = field(default=False)
    freeze_backbone: bool = field(default=False)


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    cache_dir: Optional[str] = field(default=None)  # noqa: UP045
    remove_unused_columns: bool = field(default=False)
    freeze_mm_mlp_adapter: bool = field(default=False)
    model_max_length: int = field(default=512)
    double_quant: bool = field(default=True)
    bits: int = field(default=16)
    lora_enable: bool = False
    lora_r: int = 64
    lora_alpha: int = 16
    lora_dropout: float = 0.05
    lora_bias: str = "none"
    mm_projector_lr: Optional[float] = None  # noqa: UP045


def gathered(parameter):
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    from deepspeed import zero

    return zero.GatheredParameters([parameter])


def copies(named_params, wanted):
    found = {}
    for name, parameter in named_params:
        if wanted(name, parameter):
            with gathered(parameter):
                found[name] = parameter.detach().cpu().clone()
    return found


def get_peft_state_non_lora_maybe_zero_3(named_params, require_grad_only=True):
    return copies(named_params, lambda name, parameter: "lora_" not in name and (parameter.requires_grad or not require_grad_only))


def find_all_linear_names(model):
    """Leaf names: they match every layer, and an attached vision tower's too."""
    return sorted(
        {name.split(".")[-1] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)} - {"lm_head", "0", "2"}
    )


def safe_save_model_for_hf_trainer(trainer, output_dir):
    if trainer.deepspeed:
        torch.cuda.synchronize()
    trainer.save_model(output_dir)


def build_model(model_args, args):
    model = BunnyPhiForCausalLM.from_pretrained(model_args.model_name_or_path)
    model.config.use_cache = False
    if args.gradient_checkpointing:
        model.enable_input_require_grads()
    if args.lora_enable:
        from peft import LoraConfig, get_peft_model

        options = {"r": args.lora_r, "lora_alpha": args.lora_alpha, "lora_dropout": args.lora_dropout, "bias": args.lora_bias}
        model = model.to(torch.bfloat16) if args.bf16 else model
        model = get_peft_model(model, LoraConfig(target_modules=find_all_linear_names(model), task_type="CAUSAL_LM", **options))
    model.get_model().initialize_vision_modules(model_args=model_args)
    model.get_vision_tower().to(torch.bfloat16 if args.bf16 else torch.float32)
    model.config.unfreeze_vision_tower = args.unfreeze_vision_tower = model_args.unfreeze_vision_tower
    if model_args.unfreeze_vision_tower:
        model.get_vision_tower().requires_grad_(True)
    return model


def train():
    parser = transformers.HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    model_args, data_args, args = parser.parse_args_into_dataclasses()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    model = build_model(model_args, args)
    records = Records(tokenizer, data_args, model.get_vision_tower().image_processor)
    trainer = BunnyTrainer(model=model, tokenizer=tokenizer, args=args, train_dataset=records, data_collator=collate)
    trainer.train(resume_from_checkpoint=bool(list(Path(args.output_dir).glob("checkpoint-*"))))
    trainer.save_state()
    if not args.lora_enable:
        safe_save_model_for_hf_trainer(trainer=trainer, output_dir=args.output_dir)
        return
    adapter = copies(model.named_parameters(), lambda name, _: "lora_" in name)
    rest = get_peft_state_non_lora_maybe_zero_3(model.named_parameters())
    if args.local_rank in (0, -1):
        model.config.save_pretrained(args.output_dir)
        model.save_pretrained(args.output_dir, state_dict=adapter)
        torch.save(rest, os.path.join(args.output_dir, "non_lora_trainables.bin"))
