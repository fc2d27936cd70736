"""`make demo`: train a small random model with real LLaVA code on easy-vqa pictures, all layers against a quarter of them.

Trains twice through `python -m llava_region.train llava`, with the flags of LLaVA's own finetune_lora.sh, and prints
what a region saves. On two CPU cores this takes a few minutes; nothing is downloaded.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from llava_region.data.tiny import write_tiny

OUT = Path("demo-output")
STEPS = 40
console = Console()


def flags(files, out: Path) -> list[str]:
    """LLaVA's LoRA recipe, at the demo's size."""
    given = {
        "lora_enable": True, "lora_r": 16, "lora_alpha": 32, "mm_projector_lr": 2e-4, "learning_rate": 2e-3,
        "model_name_or_path": files.backbone, "version": "v1", "data_path": files.data, "image_folder": files.images,
        "vision_tower": files.vision_tower, "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2,
        "mm_use_im_start_end": False, "mm_use_im_patch_token": False, "image_aspect_ratio": "pad",
        "group_by_modality_length": True, "output_dir": out, "max_steps": STEPS, "per_device_train_batch_size": 8,
        "evaluation_strategy": "no", "save_strategy": "no", "weight_decay": 0.0, "warmup_ratio": 0.03,
        "lr_scheduler_type": "cosine", "logging_steps": 1, "model_max_length": 512, "gradient_checkpointing": True,
        "lazy_preprocess": True, "report_to": "none", "use_cpu": True,
    }  # fmt: skip
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


def train(spec: str, files, out: Path) -> dict:
    """Train one model, its progress on the screen and its messages in a log file; returns its cost.json."""
    console.rule(f"--tune_layers {spec}")
    command = [sys.executable, "-W", "ignore", "-m", "llava_region.train", "llava", *flags(files, out), "--tune_layers", spec]
    log = OUT / f"{out.name}.log"
    with log.open("w") as messages, console.status("loading LLaVA") as status:
        run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=messages, text=True)
        for line in run.stdout:
            messages.write(line)
            if "'loss'" in line:
                console.print("  " + line.strip().split("\r")[-1].strip())
            elif line.startswith("first step"):
                status.stop()
                console.print("  " + line.strip())
        code = run.wait()
    if code:
        console.print(f"training ended with code {code}; the end of {log}:")
        console.print("".join(log.read_text().splitlines(keepends=True)[-15:]), markup=False)
        sys.exit(code)
    return json.loads((out / "cost.json").read_text())


def show(costs: dict[str, dict]) -> None:
    """Print the comparison."""
    table = Table(title=f"LoRA on a random LLaVA, {STEPS} steps on easy-vqa", box=box.SIMPLE, padding=(0, 1))
    for column in ("region", "layers", "trainable", "s/step", "of all", "memory", "loss"):
        table.add_column(column, justify="left" if column == "region" else "right", no_wrap=True)
    base = costs["all"]["seconds_per_step"]
    for spec, cost in costs.items():
        table.add_row(
            spec, f"{len(cost['layers'])}/{cost['num_layers']}", f"{cost['trainable_parameters']:,}", f"{cost['seconds_per_step']:.3f}",
            f"{cost['seconds_per_step'] / base:.0%}", f"{cost['peak_memory_bytes'] / 2**20:.0f} MiB",
            f"{cost['first_loss']:.2f}→{cost['last_loss']:.2f}",
        )  # fmt: skip
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.epilog = f"It takes no options. What an earlier demo left in {OUT}/ of the current folder is replaced."
    parser.parse_args()
    started = time.time()
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    with console.status("writing a random model and data"):
        files = write_tiny(OUT / "inputs", num_layers=16, hidden_size=256, samples=STEPS * 8)
    runs = {"all": OUT / "llava-demo-all-lora", "sparse:25%": OUT / "llava-demo-region-lora"}
    show({spec: train(spec, files, out) for spec, out in runs.items()})
    for spec, out in runs.items():
        console.print(f"{spec:<11} {out.resolve()}")
    region = runs["sparse:25%"]
    console.print(f"inputs      {(OUT / 'inputs').resolve()}\ntook {time.time() - started:.0f} s. Next: "
                  f"llava-region layers {region}", soft_wrap=True)  # fmt: skip


if __name__ == "__main__":
    main()
