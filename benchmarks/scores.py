"""What scoring costs: activation metrics against a plain forward pass, weight metrics against reading the two checkpoints.

    python benchmarks/scores.py                           # a small model and 0.5 GB checkpoints, to try it
    python benchmarks/scores.py --size-gb 4 --repeat 5 --json

Activations: a random Llama with SDPA attention runs over the same batch with and without the hooks of all four activation
metrics, alternating; `ratio` is the median of the ratios of the turns. The plain pass leaves out the LM head and the vision tower,
which cost the same either way, so the ratio over whole models is lower.

Weights: two bf16 checkpoints of a Llama, `size-gb` each, are compared by `weight_changes` in its own process, and read by a
loop that only reads, alternating. `cold`: the files are dropped from the page cache before every measurement, so that both
read the disk; `warm`: they are in the page cache as far as memory allows. The peak is VmHWM of the process, Python and torch
included. Start and imports are not in the times.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch

from llava_region.checkpoints.tensors import Computed, weight_files, write_checkpoint

CHUNK = 1 << 23
COMPARE = """
import sys, time
from llava_region.scores.weight_changes import weight_changes
start = time.perf_counter()
layers = weight_changes(sys.argv[1], sys.argv[2], 1e-6)
seconds = time.perf_counter() - start
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(seconds, int(status["VmHWM"].split()[0]) * 1024, len(layers))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-gb", type=float, default=0.5, help="size of each of the two checkpoints")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=600, help="tokens per sample; 60 %% of them belong to an image")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--only", choices=("activations", "weights"))
    parser.add_argument("--folder", help="where the checkpoints are written temporarily; default: the system's folder")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    result = {"threads": torch.get_num_threads(), "cores": os.cpu_count(), "torch": torch.__version__}
    if options.only != "weights":
        result["activations"] = time_activations(options)
    if options.only != "activations":
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            result["weights"] = time_weights(Path(folder), options)
    print(json.dumps(result, indent=2) if options.json else "\n".join(f"{name}: {value}" for name, value in result.items()))


def time_activations(options) -> dict:
    """Seconds of a plain pass and of one with all activation metrics, alternating."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from llava_region.scores.activations import forward_decoder, measure
    from llava_region.scores.metrics import ACTIVATION_METRICS
    from llava_region.scores.sums import Sums

    torch.manual_seed(0)
    device, dtype = torch.device(options.device), torch.bfloat16 if options.device.startswith("cuda") else torch.float32
    heads = options.hidden // (128 if options.hidden >= 2048 else 64)
    config = LlamaConfig(
        vocab_size=64, hidden_size=options.hidden, intermediate_size=options.hidden * 43 // 16, num_hidden_layers=options.layers,
        num_attention_heads=heads, attn_implementation="sdpa",
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(device, dtype).eval()
    shape = (options.batch_size, options.tokens)
    image = torch.zeros(shape, dtype=torch.bool, device=device)
    image[:, 35 : 35 + int(0.6 * options.tokens)] = True
    batch = SimpleNamespace(
        inputs_embeds=torch.randn(*shape, options.hidden, device=device, dtype=dtype), image_mask=image,
        attention_mask=torch.ones_like(image), position_ids=torch.arange(options.tokens, device=device).expand(shape),
    )  # fmt: skip

    def score() -> None:
        measure(model, batch, ACTIVATION_METRICS, Sums(options.layers))

    plain, scored = [], []
    with torch.inference_mode():
        for turn in range(options.repeat + 1):
            times = timed(lambda: forward_decoder(model, batch), device), timed(score, device)
            if turn:  # the first one warms up
                plain.append(times[0])
                scored.append(times[1])
    ratios = [b / a for a, b in zip(plain, scored, strict=True)]
    return {
        "plain_seconds": statistics.median(plain), "scored_seconds": statistics.median(scored), "ratio": statistics.median(ratios),
        "ratios": ratios, "hidden": options.hidden, "layers": options.layers, "tokens": options.tokens, "batch_size": options.batch_size,
        "device": str(device), "dtype": str(dtype),
    }  # fmt: skip


def timed(run, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def time_weights(folder: Path, options) -> dict:
    """Seconds and peak memory of comparing two checkpoints, and seconds of reading them, alternating, cold and warm."""
    shapes = write_pair(folder, options.size_gb)
    files = [*weight_files(folder / "tuned"), *weight_files(folder / "base")]
    out = {"bytes_of_both": sum(file.stat().st_size for file in files), "layers": shapes, "peak_bytes": 0}
    for state in ("cold", "warm"):
        read, compared = [], []
        for _ in range(options.repeat):
            prepare(files, state)
            start = time.perf_counter()
            read_all(files)
            read.append(time.perf_counter() - start)
            prepare(files, state)
            argv = [sys.executable, "-c", COMPARE, str(folder / "tuned"), str(folder / "base")]
            seconds, peak, _ = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split()
            compared.append(float(seconds))
            out["peak_bytes"] = max(out["peak_bytes"], int(peak))
        ratios = [b / a for a, b in zip(read, compared, strict=True)]
        medians = {"read_seconds": statistics.median(read), "compare_seconds": statistics.median(compared)}
        out[state] = {**medians, "ratio": statistics.median(ratios), "ratios": ratios}
    return out


def write_pair(folder: Path, size_gb: float) -> int:
    """Write `base` and `tuned`, in bf16 and shards of 1 GB; returns the number of decoder layers."""
    hidden, intermediate = (4096, 11008) if size_gb >= 2 else (1024, 2752)
    shapes = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    shapes |= {"mlp.gate_proj": (intermediate, hidden), "mlp.up_proj": (intermediate, hidden), "mlp.down_proj": (hidden, intermediate)}
    shapes |= {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    elements = sum(torch.Size(shape).numel() for shape in shapes.values())
    layers = max(2, round(size_gb * 1e9 / 2 / elements))
    torch.manual_seed(0)
    base = (torch.randn(hidden * intermediate) * 0.02).bfloat16()
    tuned = (base.float() + torch.randn(len(base)) * 1e-3).bfloat16()
    for name, pool in (("base", base), ("tuned", tuned)):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps({"num_hidden_layers": layers}))
        entries = {
            f"model.layers.{layer}.{module}.weight": Computed(torch.bfloat16, shape, lambda pool=pool, shape=shape: part(pool, shape))
            for layer in range(layers)
            for module, shape in shapes.items()
        }
        write_checkpoint(folder / name, entries, shard_bytes=10**9)
    os.sync()
    return layers


def part(pool: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return pool[: torch.Size(shape).numel()].reshape(shape)


def prepare(files: list[Path], state: str) -> None:
    """Drop the files from the page cache, or read them into it."""
    if state == "warm":
        read_all(files)
        return
    for file in files:
        with file.open("rb") as f:
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_all(files: list[Path]) -> None:
    buffer = bytearray(CHUNK)
    for file in files:
        with file.open("rb", buffering=0) as f:
            while f.readinto(buffer):
                pass


if __name__ == "__main__":
    main()
