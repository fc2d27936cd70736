"""Peak memory and wall time of merge, revert and prune on a synthetic sharded checkpoint, against `cp -r` of the same files.

    python benchmarks/checkpoints.py                      # 0.5 GB, to try it
    python benchmarks/checkpoints.py --size-gb 4 --repeat 5 --json

The checkpoint is a Llama of 7B's width (from 2 GB on) in bf16 with as many layers as fit, in 1 GB shards; the LoRA run has
rank 128 on every linear module of a quarter of the layers. Each command runs in its own process; its peak is VmHWM of that
process. `seconds` is the process from start to end, `work_seconds` without the start of Python and torch, which does
not grow with the model. On a machine that does other work too, compare CPU times. `cp -r` copies the folder that the
command reads most of. Inputs are in the page cache as far as memory allows, and dirty pages are written out before each
measurement. The self test of prune, which loads the model, is off.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from llava_region.checkpoints.tensors import Computed, write_checkpoint
from llava_region.errors import LlavaRegionError
from llava_region.region import sparse_layers
from llava_region.training.sizes import format_size

RANK = 128
PEAK_LIMIT = "twice the largest tensor plus 500 MB"
RUN = """
import sys, time
from llava_region.cli import main
import llava_region.surgery.prune
start = time.perf_counter()
code = main(sys.argv[1:])
seconds = time.perf_counter() - start
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(seconds, int(status["VmHWM"].split()[0]) * 1024, file=sys.stderr)
sys.exit(code)
"""


def shape_of(size_gb: float) -> dict:
    """A Llama config whose bf16 weights take about `size_gb` GB."""
    hidden, intermediate = (4096, 11008) if size_gb >= 2 else (1024, 2752)
    layer = 2 * (4 * hidden**2 + 3 * hidden * intermediate + 2 * hidden)
    layers = max(4, round((size_gb * 1e9 - 4 * 32000 * hidden) / layer))
    return {
        "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers, "vocab_size": 32000,
        "num_attention_heads": hidden // 128, "num_key_value_heads": hidden // 128, "torch_dtype": "bfloat16",
    }  # fmt: skip


def linear_shapes(config: dict) -> dict[str, tuple[int, int]]:
    """Linear modules of one decoder layer: (out, in)."""
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    attention = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    return {
        **attention,
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }


def write_base(folder: Path, config: dict) -> None:
    """A backbone with random weights, in shards of 1 GB (below 2 GB: 0.1 GB)."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], config["hidden_size"])}
    for layer in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in linear_shapes(config).items()}
        shapes |= {f"model.layers.{layer}.{name}_layernorm.weight": (config["hidden_size"],) for name in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (config["hidden_size"],), "lm_head.weight": (config["vocab_size"], config["hidden_size"])}
    noise = torch.randn(1 << 20).bfloat16()

    def entry(shape: tuple[int, ...]) -> Computed:
        count = int(torch.Size(shape).numel())
        return Computed(torch.bfloat16, shape, lambda: noise.repeat(-(-count // len(noise)))[:count].view(shape))

    write_checkpoint(
        folder,
        {name: entry(shape) for name, shape in shapes.items()},
        shard_bytes=10**9 if config["hidden_size"] == 4096 else 10**8,
        description="writing the checkpoint",
    )


def write_run(folder: Path, config: dict, base: Path) -> None:
    """A LoRA run on a quarter of the layers, with a two-layer projector, in upstream's layout."""
    folder.mkdir()
    count = config["num_hidden_layers"]
    region = {"layers": sparse_layers(max(1, count // 4), count), "num_layers": count, "spec": "sparse:25%"}
    vision = {"model_type": "llava_llama", "mm_projector_type": "mlp2x_gelu", "mm_hidden_size": 1024}
    (folder / "config.json").write_text(json.dumps({**config, **vision, "visual_region": region}))
    (folder / "region.json").write_text(json.dumps({**region, "base_model": str(base), "upstream": "llava", "mode": "lora"}))
    adapter = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "bias": "none", "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    tensors = {}
    for layer in region["layers"]:
        for name, (out, into) in linear_shapes(config).items():
            stem = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(RANK, into) * 0.01
            tensors[f"{stem}.lora_B.weight"] = torch.randn(out, RANK) * 0.01
    save_file(tensors, folder / "adapter_model.safetensors")
    hidden = config["hidden_size"]
    projector = {"0.weight": (hidden, 1024), "0.bias": (hidden,), "2.weight": (hidden, hidden), "2.bias": (hidden,)}
    state = {f"base_model.model.model.mm_projector.{name}": torch.randn(shape).bfloat16() for name, shape in projector.items()}
    torch.save(state, folder / "non_lora_trainables.bin")


def timed(command: list[str]) -> tuple[float, float, str]:
    """Seconds a process takes, of CPU time too, and its stderr; dirty pages are written out before."""
    os.sync()
    before, start = os.times(), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds, after = time.perf_counter() - start, os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    if done.returncode:
        sys.exit(f"{' '.join(command[:6])} failed: {done.stderr}")
    return seconds, cpu, done.stderr


def measure(folder: Path, commands: dict[str, tuple[Path, list[str]]], repeat: int) -> dict[str, dict]:
    """Each command and `cp -r` of its input in turn, `repeat` times over."""
    keys = ("seconds", "cpu_seconds", "work_seconds", "cp_seconds", "cp_cpu_seconds", "peak")
    seen: dict[str, dict[str, list]] = {name: {key: [] for key in keys} for name in commands}
    out = folder / "out"
    for _ in range(repeat):
        for name, (source, arguments) in commands.items():
            seconds, cpu, stderr = timed([sys.executable, "-c", RUN, name, *arguments, "--out", str(out)])
            shutil.rmtree(out)
            cp_seconds, cp_cpu, _ = timed(["cp", "-r", str(source), str(out)])
            shutil.rmtree(out)
            work, peak = stderr.split()[-2:]
            for key, value in zip(keys, (seconds, cpu, float(work), cp_seconds, cp_cpu, int(peak)), strict=True):
                seen[name][key].append(value)
    return {name: summary(figures) for name, figures in seen.items()}


def summary(figures: dict[str, list]) -> dict:
    """Medians of the times, how many times `cp -r` each is, and the largest peak."""
    median = {key: statistics.median(figures[key]) for key in figures if key != "peak"}
    ratios = {"ratio": median["seconds"] / median["cp_seconds"], "work_ratio": median["work_seconds"] / median["cp_seconds"]}
    return {**median, **ratios, "peak_bytes": max(figures["peak"]), "all": figures}


def run(folder: Path, size_gb: float, repeat: int) -> dict:
    """Write the checkpoint and the run under `folder`, measure, and return the figures.

    Raises:
        LlavaRegionError: the disk has no room for four times the size.
    """
    free = shutil.disk_usage(folder).free
    if 4e9 * size_gb > free:
        raise LlavaRegionError(
            f"--size-gb {size_gb:g} takes {4 * size_gb:g} GB on disk, and {format_size(free)} are free in {folder.parent}; "
            "give a smaller --size-gb, or --folder on another disk"
        )
    config = shape_of(size_gb)
    base, lora, model = folder / "base", folder / "lora", folder / "model"
    write_base(base, config)
    write_run(lora, config, base)
    subprocess.run([sys.executable, "-m", "llava_region", "merge", str(lora), "--out", str(model)], check=True, stdout=subprocess.DEVNULL)
    commands = {
        "merge": (base, [str(lora)]),
        "revert": (model, [str(model), "--base", str(base), "--layers", "sparse:25%"]),
        "prune": (model, [str(model), "--layers", "1", "--no-self-test"]),
    }
    largest = 2 * config["vocab_size"] * config["hidden_size"]
    size = sum(file.stat().st_size for file in base.iterdir())
    return {
        "checkpoint_bytes": size, "shards": len(list(base.glob("*.safetensors"))), "decoder_layers": config["num_hidden_layers"],
        "largest_tensor_bytes": largest, "peak_limit_bytes": 2 * largest + 500 * 10**6, "repeat": repeat,
        "commands": measure(folder, commands, repeat),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-gb", type=float, default=0.5, help="size of the checkpoint")
    parser.add_argument("--repeat", type=int, default=3, help="measurements of each command")
    parser.add_argument("--folder", type=Path, help="where to write, four times the size; default: a temporary folder")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            figures = run(Path(folder), options.size_gb, options.repeat)
    except LlavaRegionError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    print(json.dumps(figures, indent=2)) if options.json else show(figures)
    return 0


def show(figures: dict) -> None:
    """Print the figures as a table."""
    size, largest, limit = figures["checkpoint_bytes"] / 1e9, figures["largest_tensor_bytes"] / 1e6, figures["peak_limit_bytes"] / 1e6
    print(f"{size:.2f} GB in {figures['shards']} shards, largest tensor {largest:.0f} MB, so the limit is {limit:.0f} MB: {PEAK_LIMIT}")
    print("median of    whole process    without start of torch      cp -r    CPU: whole  cp -r     peak")
    for name, row in figures["commands"].items():
        times = f"{row['seconds']:10.1f} s {row['ratio']:6.2f}x {row['work_seconds']:12.1f} s {row['work_ratio']:6.2f}x"
        cpu = f"{row['cpu_seconds']:8.1f} s {row['cp_cpu_seconds']:6.1f} s"
        print(f"{name:7} {times} {row['cp_seconds']:8.1f} s {cpu} {row['peak_bytes'] / 1e6:5.0f} MB")


if __name__ == "__main__":
    sys.exit(main())
