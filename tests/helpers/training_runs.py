"""Command lines for training the tiny LLaVA, in this process or under a launcher, and readers of what a run leaves."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file

from llava_region.decoder import layer_index
from llava_region.training.small_step import deepspeed_on_cpu
from llava_region.training.trainer_flags import computes_fp16_on_cpu

# integer buckets, as upstream's "auto" becomes a fraction for hidden size 64; small ones, so that partitioning is real
ZERO3 = {
    "bf16": {"enabled": "auto"},
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
    "gradient_accumulation_steps": "auto",
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "sub_group_size": 1000000000,
        "reduce_bucket_size": 1000000,
        "stage3_prefetch_bucket_size": 1000000,
        "stage3_param_persistence_threshold": 100,
        "stage3_max_live_parameters": 1000000000,
        "stage3_max_reuse_distance": 1000000000,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}


def llava_flags(tiny, out, **changes) -> list[str]:
    """Upstream flags of a short run on the tiny LLaVA; `changes` override or add, None removes."""
    flags = {
        "model_name_or_path": tiny.backbone,
        "version": "v1",
        "data_path": tiny.data,
        "image_folder": tiny.images,
        "vision_tower": tiny.vision_tower,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad",
        "group_by_modality_length": True,
        "output_dir": out,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "evaluation_strategy": "no",
        "save_strategy": "no",
        "learning_rate": 2e-4,
        "weight_decay": 0.0,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "model_max_length": 512,
        "gradient_checkpointing": True,
        "lazy_preprocess": True,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        **({} if computes_fp16_on_cpu() else {"bf16": True}),
        **changes,
    }
    return [part for name, value in flags.items() if value is not None for part in (f"--{name}", str(value))]


needs_fp16 = pytest.mark.skipif(not computes_fp16_on_cpu(), reason="this torch (2.1, which LLaVA pins) computes nothing in fp16 on a CPU")
needs_zero_on_cpu = pytest.mark.skipif(
    not Version("0.22") <= Version(version("accelerate")) < Version("1"),
    reason="accelerate 0.21, which LLaVA pins, and 1.15, the newest that is taken, start ZeRO's ranks on GPUs only",
)
needs_bf16_over_gloo = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.2"), reason="gloo of torch 2.1, which LLaVA pins, sums no bfloat16"
)
LORA = {"lora_enable": True, "lora_r": 8, "lora_alpha": 16, "mm_projector_lr": 2e-5}


def environment(**extra) -> dict:
    """Environment for a training process: CPU, offline, one thread a rank, this checkout importable."""
    root = Path(__file__).parents[2]
    path = os.pathsep.join(filter(None, [str(root), str(root / "tests" / "startup"), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, **deepspeed_on_cpu(), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **extra}


def train(flags: list[str], upstream: str = "llava", launcher: tuple[str, ...] = (), **kwargs) -> subprocess.CompletedProcess:
    """Run `python -m llava_region.train` (or under a launcher that takes `-m`-like arguments before the module) to its end."""
    command = [*(launcher or (sys.executable, "-m")), "llava_region.train", upstream, *flags]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600, **kwargs)


def torchrun(ranks: int, port: int | None = None) -> tuple[str, ...]:
    """Launcher prefix of torchrun on this machine; without a port it takes a free one, so that two can run at once."""
    where = ("--standalone",) if port is None else ("--master_port", str(port))
    return (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), *where, "-m")


def write_zero3(folder: Path) -> Path:
    """Write the ZeRO-3 config into a folder."""
    path = Path(folder) / "zero3.json"
    path.write_text(json.dumps(ZERO3))
    return path


def adapter(run: Path) -> dict[str, torch.Tensor]:
    """Adapter tensors of a LoRA run or checkpoint."""
    return load_file(Path(run) / "adapter_model.safetensors")


def projector(run: Path) -> dict[str, torch.Tensor]:
    """What trained beside LoRA, of a LoRA run or checkpoint."""
    return torch.load(Path(run) / "non_lora_trainables.bin", weights_only=True)


def layers_of(tensors) -> set:
    """Decoder layers that tensor names belong to."""
    return {layer_index(name) for name in tensors}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Equal to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
