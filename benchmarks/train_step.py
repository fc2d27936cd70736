"""Time and memory of one training step: upstream's, the paper's region, and this package's, side by side in one process.

    python benchmarks/train_step.py --shape cpu --plot step.png
    python benchmarks/train_step.py --shape cpu --lengths mix665k

Random weights, nothing is downloaded. Every mode trains the same Llama on the same batch with LoRA of rank hidden/32 (alpha
twice that, dropout 0.05) on all linear modules, or all parameters, of its layers:

    upstream  LoRA on every layer, every layer recomputed
    paper     LoRA on the region, every layer recomputed: what the paper measures
    region    LoRA on the region, only its layers recomputed, logits at supervised positions only (so the next three)
    none      the same, nothing recomputed
    auto      the same, as few layers recomputed as memory asks for: what `--tune_layers` does by default
    full      every parameter of the region's layers trained, without LoRA, as few recomputed as memory asks for

With `--lengths mix665k`, batches have the lengths of LLaVA's data in LLaVA's own groups (`lengths.py`), so that the largest batch, for
which memory is planned, seldom comes. The limit on memory is such that the largest batch asks for as much recomputation as on a GPU
with 80 GB at LLaVA's recipe. The mode `largest` is then shown too: every batch is run as the largest has to be.

A shape whose weights, optimizer states and logits are more than the memory that is free is refused before any of it is allocated.

Modes take turns, one step each, so that a busy machine slows all of them; times are medians. On a CUDA GPU in bf16, else on CPU
in fp32. Peak memory is what a step takes in addition to weights, gradients and optimizer states: on a GPU as its allocator counts it
(activations and all temporaries), on CPU the tensors that autograd keeps (temporaries not counted).
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from lengths import mix665k

from llava_region import plotting
from llava_region.data.labels import IGNORE_INDEX
from llava_region.decoder import find_decoder_layers, linear_modules
from llava_region.errors import LlavaRegionError
from llava_region.progress import deepspeed_on_stderr, track
from llava_region.region import Region
from llava_region.training import recompute, supervised_loss
from llava_region.training.kept_memory import activations_of, free_memory
from llava_region.training.kept_tensors import saved_peak
from llava_region.training.recompute_plan import Plan, Workload, make_plan
from llava_region.training.sizes import format_size, parse_size

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

MODES = ("upstream", "paper", "region", "none", "auto", "full")
MODES_AT_REAL_LENGTHS = ("upstream", "paper", "largest", "auto")
OURS = ("region", "none", "largest", "auto", "full")
POLICY = {"upstream": "all", "paper": "all", "region": "region", "none": "none", "largest": "auto", "auto": "auto", "full": "auto"}
# Of what the largest batch would keep without recomputation, what a GPU of 80 GB has left for it: 60 of 188 GB (7B, 16 x 2048 tokens).
LIMIT = 60 / 188


@dataclass(frozen=True)
class Shape:
    """A backbone and a batch: `samples` sequences of `length` tokens, the image's included."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    samples: int
    length: int


SHAPES = {
    "tiny": Shape(64, 176, 8, 4, 2, 512, 2, 64),
    "cpu": Shape(512, 1376, 16, 8, 8, 4000, 2, 512),
    "llava-7b": Shape(4096, 11008, 32, 32, 32, 32000, 8, 1024),
    "llava-7b-recipe": Shape(4096, 11008, 32, 32, 32, 32000, 16, 2048),
    "llava-13b": Shape(5120, 13824, 40, 40, 40, 32000, 8, 1024),
    "bunny-8b": Shape(4096, 14336, 32, 32, 8, 128256, 8, 1024),
}


def backbone(shape: Shape, device: torch.device, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """A frozen Llama of the shape with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, max_position_embeddings=4096, use_cache=False,
        attn_implementation="sdpa",
    )  # fmt: skip
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return LlamaForCausalLM(config).requires_grad_(False)
    finally:
        torch.set_default_dtype(default)


def variant(base: LlamaForCausalLM, layers: Collection[int], lora: bool) -> Any:
    """The backbone with LoRA on the given decoder layers, or with those layers trained whole; frozen weights are shared with it.

    As under upstream, the embeddings' output requires grad, so that the projector in front of the layers could train.
    """
    from peft import LoraConfig, get_peft_model

    modules = find_decoder_layers(base).modules
    own = set() if lora else {id(p) for i in layers for p in modules[i].parameters()}
    shared = {id(t): t for t in (*base.parameters(), *base.buffers()) if id(t) not in own}
    model: Any = copy.deepcopy(base, shared)
    model.enable_input_require_grads()
    if lora:
        rank = max(base.config.hidden_size // 32, 1)
        options = {"r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.05}
        model = get_peft_model(model, LoraConfig(target_modules=linear_modules(model, layers), **options))
    else:
        for i in layers:
            find_decoder_layers(model).modules[i].requires_grad_(True)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})  # upstream's kind
    return model.train()


def build(shape: Shape, region: Region, modes: Collection[str], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The models that the modes train: LoRA on `all` layers, LoRA on the `region`, and, where it is asked for, its layers in `full`."""
    base = backbone(shape, device, dtype)
    with device:
        models = {"all": variant(base, range(shape.layers), True), "region": variant(base, region.layers, True)}
        return models | ({"full": variant(base, region.layers, False)} if "full" in modes else {})


def least_memory(shape: Shape, region: Region, modes: Collection[str], dtype: torch.dtype) -> int:
    """Bytes without which no run is possible: weights, AdamW's two states, one model's gradients, upstream's logits.

    The models are made on the meta device, so this allocates nothing.
    """
    models = build(shape, region, modes, torch.device("meta"), dtype)
    weights = {id(p): p.nbytes for model in models.values() for p in model.parameters()}
    trained = [sum(p.nbytes for p in model.parameters() if p.requires_grad) for model in models.values()]
    # in their own type, and the fp32 copy that the loss is computed of with its gradient
    logits = shape.samples * shape.length * shape.vocab * (dtype.itemsize + 2 * torch.float32.itemsize)
    return sum(weights.values()) + 2 * sum(trained) + max(trained) + logits


def check_memory(shape_name: str, region: Region, modes: Collection[str], device: torch.device, dtype: torch.dtype) -> None:
    """Refuse a shape that does not fit, as a machine without a GPU would else take all memory until the system ends some process.

    Raises:
        LlavaRegionError: less is free than it takes at least.
    """
    least, free = least_memory(SHAPES[shape_name], region, modes, dtype), free_memory(device)
    if least > free:
        raise LlavaRegionError(
            f"--shape {shape_name} takes {format_size(least)} at least, and {format_size(free)} are free on {device}; "
            f"give a smaller one, such as --shape cpu, or run it on a GPU with more memory"
        )


class Mode:
    """One column of the comparison: a model, its optimizer, and which layers it recomputes."""

    def __init__(self, name: str, model: Any, region: Region, shape: Shape, region_memory: str | None) -> None:
        self.name, self.model = name, model
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4, weight_decay=0.0)
        self.workload = Workload(shape.samples, shape.length, supervised_logits=name in OURS)
        self.region, self.region_memory = region, region_memory
        self.plan: Plan | None = None
        self.seconds: list[float] = []
        self.peak = 0
        self.loss = float("nan")

    def prepare(self) -> None:
        """Put the mode's hooks on the model, which other modes share."""
        if self.name not in OURS:
            recompute.uninstall(self.model)
            supervised_loss.uninstall(self.model)
        elif self.plan is None:
            self.plan = recompute.set_up(self.model, self.region.layers, self.workload, POLICY[self.name], self.region_memory)
            if self.name == "largest":
                self.plan = as_the_largest(self.model, self.region, self.workload, self.plan)
                recompute.install(self.model, self.plan)
            supervised_loss.install(self.model)
        else:
            recompute.install(self.model, self.plan)
            supervised_loss.install(self.model)

    def step(self, batch: dict) -> None:
        self.loss = self.model(**batch).loss
        self.loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def recompute(self) -> tuple[int, ...]:
        return self.plan.recompute if self.plan else tuple(range(self.region.num_layers))


def as_the_largest(model: Any, region: Region, workload: Workload, plan: Plan) -> Plan:
    """The plan without what `auto` does for each batch, and with whole layers kept: what 0.1.0 did."""
    activations = replace(activations_of(model, workload), lean=None)
    return replace(make_plan("auto", region.layers, activations, plan.budget, "as for auto"), lean=False, batches=None)


def real_batches(shape: Shape, lengths: int, supervised: float, device: torch.device) -> list[dict[str, torch.Tensor]]:
    """Batches of LLaVA's lengths, scaled so that the longest is the shape's; positions behind a sequence's end have no label."""
    batches = []
    for batch in mix665k(lengths, longest=shape.length):
        batch = batch[: shape.samples]
        made = random_batch(replace(shape, samples=len(batch), length=max(batch)), 1.0, device)
        for row, length in enumerate(batch):
            made["attention_mask"][row, length:] = 0
            made["labels"][row, : round(length * (1 - supervised))] = IGNORE_INDEX
            made["labels"][row, length:] = IGNORE_INDEX
        batches.append(made)
    return batches


def random_batch(shape: Shape, supervised: float, device: torch.device) -> dict[str, torch.Tensor]:
    """Token ids (samples, length); the last `supervised` of each sequence are the answers that have labels."""
    ids = torch.randint(0, shape.vocab, (shape.samples, shape.length), device=device)
    labels = ids.clone()
    labels[:, : round(shape.length * (1 - supervised))] = IGNORE_INDEX
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def measure_peak(mode: Mode, batch: dict, device: torch.device) -> int:
    """Most bytes that a step takes in addition to weights, gradients and optimizer states (see the module's docstring)."""
    if device.type != "cuda":
        with saved_peak() as peak:
            mode.step(batch)
        return peak()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    mode.model(**batch).loss.backward()
    return torch.cuda.max_memory_allocated(device) - before


def measure_seconds(mode: Mode, batch: dict, device: torch.device) -> float:
    """Seconds of one whole step: forward, backward, optimizer."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    mode.step(batch)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure_all(columns: list[Mode], batches: list[dict[str, torch.Tensor]], repeats: int, device: torch.device) -> None:
    """Peak memory of every mode, then its times, the modes in turn."""
    for mode in track(columns, "peak memory"):
        mode.prepare()
        mode.step(batches[0])  # allocator, optimizer states
        for batch in batches:
            mode.peak = max(mode.peak, measure_peak(mode, batch, device))
            mode.optimizer.zero_grad(set_to_none=True)
        if mode.plan and mode.plan.batches:
            mode.plan.batches.counts.clear()
    for _ in track(range(repeats), "steps"):
        for mode in columns:
            mode.prepare()
            mode.seconds.append(sum(measure_seconds(mode, batch, device) for batch in batches))


def machine() -> tuple[torch.device, torch.dtype, str]:
    """Where steps run, in which type, and its name."""
    if torch.cuda.is_available():
        return torch.device("cuda"), torch.bfloat16, torch.cuda.get_device_name()
    return torch.device("cpu"), torch.float32, f"CPU, {torch.get_num_threads()} threads"


def run(
    shape_name: str,
    *,
    region: str,
    repeats: int,
    supervised: float,
    region_memory: str | None,
    modes: tuple[str, ...] = MODES,
    lengths: int = 0,
) -> dict:
    """Run the comparison.

    Args:
        lengths: how many batches of LLaVA's lengths to train in turn; 0: one whose sequences are all as long as the shape says.

    Returns:
        `{"shape", "device", ..., "modes": {name: {"seconds", "peak_bytes", "ratio", "tokens_per_second", "recomputed", ...}}}`,
        seconds being medians and ratios medians of the ratio to upstream's step of the same round.

    Raises:
        LlavaRegionError: the region does not fit the shape, or the shape the free memory.
    """
    shape = SHAPES[shape_name]
    device, dtype, name = machine()
    chosen = Region.parse(region, shape.layers)
    check_memory(shape_name, chosen, modes, device, dtype)
    torch.manual_seed(0)
    models = build(shape, chosen, modes, device, dtype)
    if lengths and region_memory is None:
        region_memory = f"{round(LIMIT * kept_at_most(models['region'], chosen, shape))}B"
    columns = [Mode(mode, models[{"upstream": "all", "full": "full"}.get(mode, "region")], chosen, shape, region_memory) for mode in modes]
    batches = real_batches(shape, lengths, supervised, device) if lengths else [random_batch(shape, supervised, device)]
    measure_all(columns, batches, repeats, device)
    return {
        "shape": shape_name,
        "device": name,
        "peak_is": "allocator's peak without weights and optimizer" if device.type == "cuda" else "tensors autograd keeps",
        "dtype": str(dtype).removeprefix("torch."),
        "region": list(chosen.layers),
        "supervised": supervised,
        "region_memory_bytes": parse_size(region_memory) if region_memory else None,
        "repeats": repeats,
        "versions": {"torch": torch.__version__, "transformers": __import__("transformers").__version__},
        **asdict(shape),
        "lengths": [batch["input_ids"].shape[1] for batch in batches],
        "modes": {mode.name: summary(mode, columns[0], sum(batch["input_ids"].numel() for batch in batches)) for mode in columns},
    }


def kept_at_most(model: Any, region: Region, shape: Shape) -> int:
    """Bytes that the largest batch keeps where nothing is recomputed."""
    return make_plan("none", region.layers, activations_of(model, Workload(shape.samples, shape.length))).bytes_kept


def summary(mode: Mode, upstream: Mode, tokens: int) -> dict:
    """A mode's figures; `ratio` is to upstream's."""
    seconds = statistics.median(mode.seconds)
    return {
        "seconds": seconds,
        "ratio": statistics.median(a / b for a, b in zip(mode.seconds, upstream.seconds, strict=True)),
        "peak_bytes": mode.peak,
        "tokens_per_second": tokens / seconds,
        "recomputed": list(mode.recompute),
        "batches_by_layers_recomputed": dict(sorted(mode.plan.batches.counts.items())) if mode.plan and mode.plan.batches else None,
        "trainable_parameters": sum(p.numel() for p in mode.model.parameters() if p.requires_grad),
    }


def show(result: dict) -> None:
    """Print the comparison as a table."""
    lengths = sorted(result["lengths"])
    long = f"{lengths[0]} to {lengths[-1]}" if len(lengths) > 1 else lengths[0]
    batch = f"{len(lengths)} x {result['samples']} x {long} tokens, {result['supervised']:.0%} supervised"
    layers = ",".join(map(str, result["region"]))
    print(f"{result['shape']} on {result['device']}, {result['dtype']}, region {layers}, {batch}, median of {result['repeats']} steps")
    print(f"{'mode':<9} {'s/step':>9} {'ratio':>6} {'tokens/s':>9} {'peak':>9}  layers recomputed")
    for name, mode in result["modes"].items():
        print(f"{name:<9} {mode['seconds']:>9.3f} {mode['ratio']:>6.2f} {mode['tokens_per_second']:>9.0f} "
              f"{format_size(mode['peak_bytes']):>9}  {recomputed(mode, result['layers'])}")  # fmt: skip
    if result["region_memory_bytes"]:
        print(f"limit on memory: {format_size(result['region_memory_bytes'])}")


def recomputed(mode: dict[str, Any], layers: int) -> str:
    """How many layers a mode recomputes, in words."""
    counts = mode["batches_by_layers_recomputed"]
    if counts is None or len(counts) < 2:
        return f"{next(iter(counts)) if counts else len(mode['recomputed'])} of {layers}"
    return f"{', '.join(f'{count} in {batches}' for count, batches in counts.items())} batches"


def plot(result: dict[str, Any], path: Path) -> None:
    """Step time and peak memory of every mode as bars, upstream 1.

    Raises:
        LlavaRegionError: unknown format, or the folder is not writable.
    """
    figure, (left, right) = plotting.new_figure(9, 3.2, ("", ""), share_y=True)
    modes = result["modes"]
    names = list(modes)[::-1]
    left.barh(names, [modes[name]["ratio"] for name in names], color=plotting.COLOURS[0])
    right.barh(names, [modes[name]["peak_bytes"] / 1e9 for name in names], color=plotting.COLOURS[4])
    for row, name in enumerate(names):
        left.text(modes[name]["ratio"], row, f" {modes[name]['ratio']:.2f}", va="center", fontsize=plotting.SMALL)
        size = format_size(modes[name]["peak_bytes"])
        right.text(modes[name]["peak_bytes"] / 1e9, row, f" {size}", va="center", fontsize=plotting.SMALL)
    left.set(xlabel="step time, upstream = 1", xlim=(0, 1.25 * max(mode["ratio"] for mode in modes.values())))
    right.set(xlabel=f"GB, {result['peak_is']}", xlim=(0, 1.35 * max(mode["peak_bytes"] for mode in modes.values()) / 1e9))
    if result["region_memory_bytes"]:
        right.axvline(result["region_memory_bytes"] / 1e9, color="black", linestyle="--", linewidth=1)
    title = f"{result['shape']}, {result['device']}: {len(result['region'])} of {result['layers']} layers tuned"
    figure.suptitle(title, fontsize=plotting.TITLE)
    plotting.save(figure, path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="cpu", help="backbone and batch (default: cpu)")
    parser.add_argument("--region", default="sparse:25%", help="layer spec (default: sparse:25%%)")
    parser.add_argument("--repeats", type=int, default=9, help="steps per mode (default: 9)")
    parser.add_argument("--supervised", type=float, default=0.25, help="share of positions with a label (default: 0.25)")
    parser.add_argument("--region_memory", help="most memory activations may take under auto, such as 2GB (default: what is free)")
    parser.add_argument("--lengths", choices=["mix665k"], help="batches of LLaVA's lengths (default: all as long as the shape says)")
    parser.add_argument("--batches", type=int, default=10, help="how many of them (default: 10)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--plot", type=Path, help="write a figure to this file (.png, .pdf or .svg)")
    args = parser.parse_args(argv)
    deepspeed_on_stderr()
    try:
        if args.repeats < 1 or not 0 < args.supervised <= 1:
            raise LlavaRegionError("--repeats must be 1 or more, and --supervised above 0 and at most 1")
        if args.plot:
            plotting.check_format(args.plot)
        options = {"region": args.region, "repeats": args.repeats, "supervised": args.supervised, "region_memory": args.region_memory}
        if args.lengths:
            options |= {"modes": MODES_AT_REAL_LENGTHS, "lengths": args.batches}
        result = run(args.shape, **options)
    except LlavaRegionError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    print(json.dumps(result, indent=2)) if args.json else show(result)
    if args.plot:
        plot(result, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
