"""A rehearsal for `--dry_run True`: the upstream's own train() on a miniature of the model, with records of the user's data.

What reading files cannot find shows here: a template that fails on this tokenizer, records that the upstream's dataset cannot
take, flags that fail at the first step. It runs in a process of its own, on the CPU, and nothing of it is kept.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
import traceback
from argparse import Namespace
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.version import Version

from llava_region.errors import LlavaRegionError
from llava_region.files import read_json
from llava_region.training.arguments import OWN_FLAGS
from llava_region.training.preflight import Preflight, parse
from llava_region.training.trainer_flags import computes_fp16_on_cpu

if TYPE_CHECKING:
    from llava_region.data.training_data import Survey
    from llava_region.upstreams import Upstream

RECORDS = 4
BATCH = 2
LAYERS = 2
TIMEOUT = 600  # seconds
# flags of transformers' trainer that differ from the user's: one process, a CPU, a rate above zero at the only steps, nothing saved
CHANGES = {
    "use_cpu": True, "no_cuda": False, "fp16": False, "tf32": None, "deepspeed": None, "fsdp": "", "torch_compile": False, "local_rank": -1,
    "optim": "adamw_torch", "lr_scheduler_type": "constant", "warmup_ratio": 0.0, "warmup_steps": 0, "gradient_accumulation_steps": 1,
    "save_strategy": "no", "logging_steps": 1, "report_to": ["none"], "push_to_hub": False, "dataloader_num_workers": 0,
    "dataloader_prefetch_factor": None, "dataloader_persistent_workers": False, "dataloader_drop_last": False, "disable_tqdm": True,
    "output_dir": "out", "logging_dir": None,
}  # fmt: skip
# how variables begin that a launcher sets: the rehearsal is one process
LAUNCHER = ("RANK", "LOCAL_", "WORLD_SIZE", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "ACCELERATE_")
RESULT = "result.json"


def rehearse(upstream: Upstream, preflight: Preflight) -> str | None:
    """Train some steps on a miniature of the model.

    Returns:
        what was run, in one line; None where the upstream makes no miniatures.

    Raises:
        LlavaRegionError: a step failed; says where and why.
    """
    start = time.perf_counter()
    records = [preflight.records[number] for number in choose(preflight.records.survey)] if preflight.records else []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        changes = upstream.write_miniature(preflight.args, preflight.config, LAYERS, folder)
        if changes is None or not records:
            return None
        (folder / "data.json").write_text(json.dumps(records))
        changes = {**CHANGES, "per_device_train_batch_size": min(preflight.args.per_device_train_batch_size, BATCH), **changes}
        changes["bf16"] = preflight.args.bf16 or not computes_fp16_on_cpu()  # fp16 may be for GPUs
        changes["max_steps"] = -(-len(records) // changes["per_device_train_batch_size"])
        result = _run(upstream, command_line(upstream, Namespace(**{**vars(preflight.args), **changes})), folder)
    if "unable" in result:
        return f"not run: {result['unable']}"
    miniature = f"on a miniature ({LAYERS} decoder layers, random weights, CPU)"
    what = f"{len(records)} records of the data through {upstream.title}'s train() {miniature}"
    if "error" in result:
        raise LlavaRegionError(f"a rehearsal failed, as training would: {what}: {result['error']}; --dry_run_step False leaves it out")
    losses = f"{result['losses'][0]:.2f} to {result['losses'][-1]:.2f}"
    return f"{what}: {len(result['losses'])} steps, loss {losses}, {time.perf_counter() - start:.0f} s"


def choose(survey: Survey) -> list[int]:
    """Numbers of the longest record, one with and one without an image, and some more, always the same."""
    total = len(survey.lengths)
    first = [max(range(total), key=survey.lengths.__getitem__), survey.with_image.find(1), survey.with_image.find(0)]
    others = random.Random(0).sample(range(total), min(total, 2 * RECORDS))
    return list(dict.fromkeys(number for number in first + others if number >= 0))[:RECORDS]


def command_line(upstream: Upstream, args: Namespace) -> list[str]:
    """The flags, as the upstream's train() parses them: those that differ from the defaults."""
    defaults = vars(parse(upstream.argument_classes(), ["--output_dir", ""]))
    line = []
    for name, value in vars(args).items():
        if value is None or value == defaults.get(name) or f"--{name}" in OWN_FLAGS or name not in defaults:
            continue
        values = value if isinstance(value, list) else [value]
        line += [f"--{name}", *(str(one.value if isinstance(one, Enum) else one) for one in values)]
    return line


def _run(upstream: Upstream, flags: list[str], folder: Path) -> dict[str, Any]:
    """Run `main` in a process of its own, in `folder`; returns what it found."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHER)}
    path = os.pathsep.join(str(Path(entry or ".").resolve()) for entry in sys.path)
    child = {
        **kept, "PYTHONPATH": os.pathsep.join(filter(None, [path, *kept.get("PYTHONPATH", "").split(os.pathsep)])),
        "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", **deepspeed_on_cpu(),
    }  # fmt: skip
    command = [sys.executable, "-m", "llava_region.training.small_step", upstream.name, *flags]
    try:
        done = subprocess.run(command, cwd=folder, env=child, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        return {"unable": f"it took longer than {TIMEOUT} s"}
    if not (folder / RESULT).is_file():
        return {"unable": f"its process ended with {done.returncode} ({''.join(done.stderr.strip().splitlines()[-1:])})"}
    return read_json(folder / RESULT)


def deepspeed_on_cpu() -> dict[str, str]:
    """The variable that has DeepSpeed use the CPU. Before 0.14 it would ask for a package of Intel's, and none is needed."""
    try:
        old = Version(version("deepspeed")) < Version("0.14")
    except PackageNotFoundError:
        old = True
    return {} if old else {"DS_ACCELERATOR": "cpu"}


def main(argv: list[str]) -> None:
    """In the child: `argv` is the upstream's name and its flags. Writes what was found to `RESULT`."""
    from llava_region import upstreams

    name, *flags = argv
    result: dict[str, Any]
    try:
        upstream = upstreams.get(name)
        upstream.train_module()
    except Exception as e:
        result = {"unable": f"{type(e).__name__}: {e}"}
    else:
        result = _train(upstream, flags)
    Path(RESULT).write_text(json.dumps(result))


def _train(upstream: Upstream, flags: list[str]) -> dict[str, Any]:
    sys.argv = [sys.argv[0], *flags]
    try:
        with upstream.applied("all") as run:
            upstream.entry(upstream.scripts[0])()
            history = run.trainer.state.log_history
    except LlavaRegionError as e:
        return {"error": str(e)}
    except Exception as e:
        last = traceback.extract_tb(e.__traceback__)[-1]
        return {"error": f"{type(e).__name__}: {e} ({Path(last.filename).name}, line {last.lineno}: {last.line})"}
    return {"losses": [entry["loss"] for entry in history if "loss" in entry]}


if __name__ == "__main__":
    main(sys.argv[1:])
