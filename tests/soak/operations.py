"""The long work that a crash may interrupt: each a command line, what it must leave, and what must be gone at its end."""

import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llava_region.data.tiny import TinyFiles
from tests.helpers.data_roots import write_mmlu
from tests.helpers.training_runs import LORA, adapter, llava_flags, projector, torchrun, write_zero3

Content = Mapping[str, Any]
TOOL = (sys.executable, "-m", "llava_region")
TRAINING = {**LORA, "lora_dropout": 0.1, "max_steps": 12, "save_strategy": "steps", "save_steps": 3, "save_total_limit": 2}


class Sources(NamedTuple):
    """What the work starts from; never written to."""

    tiny: TinyFiles
    checkpoint: Path
    lora_run: Path
    folder: Path


@dataclass(frozen=True)
class Operation:
    """One kind of work.

    Attributes:
        command: for an output; started again after a crash as it is, with `again` behind it.
        content: what an output holds, comparable by `==`; tensors that may differ in the last bits where not `exact`.
        output: name of the file or folder.
        grows: the output is there before the work is done (training, evaluation), so that only the end is compared.
    """

    name: str
    command: Callable[[Path], list[str]]
    content: Callable[[Path], Content]
    output: str = "out"
    again: tuple[str, ...] = ()
    grows: bool = False
    exact: bool = True

    def same(self, found: Content, expected: Content) -> bool:
        """Whether two outputs hold the same."""
        if self.exact:
            return found == expected
        close = (torch.allclose(found[name], expected[name], atol=2e-5, rtol=2e-2) for name in expected)
        return found.keys() == expected.keys() and all(close)


def operations(sources: Sources) -> dict[str, Operation]:
    """All kinds of work, by name."""
    tiny, checkpoint, run = sources.tiny, sources.checkpoint, sources.lora_run
    mmlu = sources.folder / "root"
    write_mmlu(mmlu, questions=1)

    def tool(name: str, *arguments: object, content: Callable[[Path], Content] = model_folder, **options: object) -> Operation:
        return Operation(name, lambda out: [*TOOL, name, *map(str, arguments), "--out", str(out)], content, **options)

    images = ("--data", tiny.data, "--image-folder", tiny.images)
    found = [
        Operation("train", lambda out: _train(tiny, out), run_bytes, grows=True),
        Operation("zero3", lambda out: _zero3(tiny, out, sources.folder), run_tensors, grows=True, exact=False),
        tool("merge", run, "--base", tiny.backbone),
        tool("prune", checkpoint, "--layers", "2,5"),
        tool("revert", checkpoint, "--base", tiny.backbone, "--layers", "0,7"),
        tool("score", checkpoint, *images, "--base", tiny.backbone, "--device", "cpu", "--batch-size", 2, content=scores,
             output="out.json", again=("--resume",)),
        tool("eval", checkpoint, "--task", "mmlu", "--data-root", mmlu, "--limit", 24, "--batch-size", 2, "--device", "cpu",
             content=answers, grows=True),
    ]  # fmt: skip
    return {operation.name: operation for operation in found}


def _train(tiny: TinyFiles, out: Path) -> list[str]:
    return [sys.executable, "-m", "llava_region.train", "llava", *llava_flags(tiny, out, **TRAINING), "--tune_layers", "1,6"]


def _zero3(tiny: TinyFiles, out: Path, folder: Path) -> list[str]:
    # bf16: upstream casts the vision tower to half precision, which ZeRO-3 does not mix with fp32
    options = {**TRAINING, "use_cpu": None, "bf16": True, "deepspeed": write_zero3(folder), "max_steps": 6, "save_steps": 2}
    return [*torchrun(2), "llava_region.train", "llava", *llava_flags(tiny, out, **options), "--tune_layers", "1,6"]


def run_tensors(out: Path) -> dict[str, torch.Tensor]:
    """Adapter and projector of a finished LoRA run; `cost.json` is written last."""
    assert (out / "cost.json").is_file(), f"{out} is not a finished run"
    return {**adapter(out), **projector(out)}


def run_bytes(out: Path) -> Content:
    """The same, comparable to the bit."""
    return {name: tensor.float().numpy().tobytes() for name, tensor in run_tensors(out).items()}


def model_folder(out: Path) -> Content:
    """Digest of every file of a model."""
    return {path.relative_to(out).as_posix(): digest(path) for path in sorted(out.rglob("*")) if path.is_file()}


def answers(out: Path) -> Content:
    """The answers, and what they score."""
    assert (out / "results.json").is_file(), f"{out} is not finished"
    return {path.name: digest(path) for path in sorted(out.iterdir())}


def scores(out: Path) -> Content:
    """What a scores file says."""
    return json.loads(out.read_text())


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
