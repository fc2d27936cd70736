"""The training lines that LLaVA publishes, and the DeepSpeed configs that they name, as facts; and how to read a line from its script."""

from __future__ import annotations

from pathlib import Path
from typing import Any

FILLED = {"train_micro_batch_size_per_gpu": "auto", "train_batch_size": "auto", "gradient_accumulation_steps": "auto"}
FP16 = {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2, "min_loss_scale": 1}
SHARED = {"overlap_comm": True, "contiguous_gradients": True, "sub_group_size": 1e9, "reduce_bucket_size": "auto"}
STAGE3 = {
    **SHARED, "stage": 3, "stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto",
    "stage3_max_live_parameters": 1e9, "stage3_max_reuse_distance": 1e9,
}  # fmt: skip
# LLaVA's scripts/zero2.json, zero3.json and zero3_offload.json; Bunny's script/deepspeed/ has the first two
CONFIGS: dict[str, dict[str, Any]] = {
    "zero2": {**FILLED, "fp16": FP16, "bf16": {"enabled": "auto"}, "zero_optimization": {**SHARED, "stage": 2}},
    "zero3": {
        **FILLED, "fp16": FP16, "bf16": {"enabled": "auto"},
        "zero_optimization": {**STAGE3, "stage3_gather_16bit_weights_on_model_save": True},
    },
    "zero3_offload": {
        **FILLED, "fp16": FP16, "bf16": {"enabled": "auto"}, "gradient_clipping": "auto", "steps_per_print": 1e5,
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"}},
        "zero_optimization": {
            **STAGE3, "offload_optimizer": {"device": "cpu", "pin_memory": True}, "offload_param": {"device": "cpu", "pin_memory": True},
            "gather_16bit_weights_on_model_save": True,
        },
    },
}  # fmt: skip
COMMON = {
    "bf16": "True", "num_train_epochs": "1", "per_device_eval_batch_size": "4", "evaluation_strategy": "no", "save_strategy": "steps",
    "save_total_limit": "1", "weight_decay": "0.", "warmup_ratio": "0.03", "lr_scheduler_type": "cosine", "logging_steps": "1",
    "tf32": "True", "model_max_length": "2048", "gradient_checkpointing": "True", "dataloader_num_workers": "4", "lazy_preprocess": "True",
}  # fmt: skip
LORA = {"lora_enable": "True", "lora_r": "128", "lora_alpha": "256", "mm_projector_lr": "2e-5", "learning_rate": "2e-4"}
LLAVA = {
    **COMMON, "version": "v1", "mm_vision_select_layer": "-2", "mm_use_im_start_end": "False", "mm_use_im_patch_token": "False",
    "per_device_train_batch_size": "16", "gradient_accumulation_steps": "1", "save_steps": "50000", "report_to": "wandb",
}  # fmt: skip
V1_5 = {**LLAVA, "mm_projector_type": "mlp2x_gelu", "image_aspect_ratio": "pad", "group_by_modality_length": "True"}
# LLaVA's script: its flags and the name of its config. Paths are the user's own.
LINES: dict[str, tuple[dict[str, str], str]] = {
    "v1_5/finetune.sh": ({**V1_5, "learning_rate": "2e-5"}, "zero3"),
    "v1_5/finetune_lora.sh": ({**V1_5, **LORA}, "zero3"),
    "finetune_qlora.sh": ({**LLAVA, "lora_enable": "True", "bits": "4", "learning_rate": "2e-5"}, "zero2"),
}


def words_of(flags: dict[str, Any]) -> list[str]:
    """The flags as words of a command line; None leaves one out."""
    return [word for name, value in flags.items() if value is not None for word in (f"--{name}", str(value))]


def flags_in(script: Path) -> dict[str, str]:
    """The flags of a published script, read from the script itself."""
    words = script.read_text().replace("\\\n", " ").split("deepspeed ", 1)[1].split("|")[0].replace('"', "").split()[1:]
    return {name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2], strict=True)}
