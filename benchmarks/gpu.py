#!/usr/bin/env python
"""Everything that needs an NVIDIA GPU, in one go: the `gpu` tests, step times, the memory plan against measured peaks.

    make gpu                                      # in the environment of the tests: writes gpu-report.json and gpu-report.md
    python benchmarks/gpu.py --out gpu-report     # in your own

Random weights and tiny files, nothing is downloaded. With the 7B shapes it takes under 20 minutes on an H100, and 75 GB of its memory.
Each part is a process of its own with a time limit. What it prints is written after every part, so that a stopped run leaves what it
has measured. The tables are fit to be pasted into benchmarks/README.md. A part that cannot run says why: a package that is missing, an
error. The shapes `tiny` and `cpu` need no GPU: they try the command itself.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from llava_region.errors import LlavaRegionError
from llava_region.files import write_json, write_text
from llava_region.training.sizes import format_size

HERE = Path(__file__).parent
ROOT = HERE.parent
SHAPES = {"llava-7b": "llava-7b-recipe", "tiny": "tiny", "cpu": "cpu"}  # and the one whose batches have LLaVA's lengths
ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")  # torch before 2.10, and from then on


@dataclass(frozen=True)
class Part:
    """One process.

    Attributes:
        name: in the report; command: after Python; minutes: its limit.
        needs: modules without which it is not run.
        rows: the lines of its table, from what it printed; the first is the head.
        environment: variables that differ.
    """

    name: str
    command: list[str]
    minutes: float
    rows: Callable[[Any], Iterator[tuple[Any, ...]]]
    needs: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


def parts(shape: str, folder: Path) -> list[Part]:
    """All of them, the most telling first."""
    on_gpu = SHAPES[shape] != shape
    step, plan = str(HERE / "train_step.py"), str(HERE / "plan_memory.py")
    limits = ["--limits", "20GB", "30GB"] if on_gpu else []
    lengths = [plan, "--shape", shape, "--policies", "--steps", "12", "--json"]
    return [
        Part("versions", ["-m", "llava_region", "doctor", "--json"], 2, doctor_rows),
        Part("step", [step, "--shape", shape, "--repeats", "5", "--json"], 3, step_rows, ("peft",)),
        Part("plan", [plan, "--shape", shape, *limits, "--json"], 3, plan_rows, ("peft",)),
        Part("tests", ["-m", "pytest", "-q", "-m", "gpu", f"--junitxml={folder / 'tests.xml'}", str(ROOT / "tests")], 8, test_rows,
             ("pytest", "llava", "easy_vqa", "deepspeed", "bitsandbytes")),
        Part("real lengths", [step, "--shape", SHAPES[shape], "--lengths", "mix665k", "--repeats", "1", "--batches", "6", "--json"], 4,
             step_rows, ("peft",)),
        Part("segments that grow", lengths, 2, allocator_rows, ("peft",), dict.fromkeys(ALLOCATOR, "expandable_segments:True")),
        Part("fixed segments", lengths, 2, allocator_rows, ("peft",), dict.fromkeys(ALLOCATOR, "")),
    ]  # fmt: skip


def run_part(part: Part, folder: Path) -> dict[str, Any]:
    """Run a part; what it found, or why it did not run to its end."""
    missing = [name for name in part.needs if importlib.util.find_spec(name) is None]
    if missing:
        return {"not_run": f"{', '.join(missing)} not installed"}
    began = time.monotonic()
    command, environment = [sys.executable, *part.command], {**os.environ, "HF_HUB_OFFLINE": "1", **part.environment}
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=60 * part.minutes)
    except subprocess.TimeoutExpired:
        return {"not_run": f"stopped after {part.minutes:g} minutes"}
    found: dict[str, Any] = {"seconds": round(time.monotonic() - began, 1)}
    try:
        printed = read_tests(folder / "tests.xml") if part.name == "tests" else json.loads(done.stdout[done.stdout.index("{") :])
        return {**found, "printed": printed}
    except (ValueError, OSError, ElementTree.ParseError):
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        return {**found, "not_run": f"exit status {done.returncode}: {' '.join(last)[:300]}"}


def read_tests(path: Path) -> dict[str, Any]:
    """Names of the tests in a JUnit file, by how they ended."""
    ended: dict[str, Any] = {"passed": [], "failed": [], "skipped": {}}
    for case in ElementTree.parse(path).iter("testcase"):
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        if (skipped := case.find("skipped")) is not None:
            if skipped.get("message") == "collection skipped":  # a file of an upstream that is not here
                continue
            ended["skipped"][name] = skipped.get("message", "")
        elif case.find("failure") is not None or case.find("error") is not None:
            ended["failed"].append(name)
        else:
            ended["passed"].append(name)
    return ended


def doctor_rows(found: Any) -> Iterator[tuple[Any, ...]]:
    facts = found["facts"]
    yield "package", "version"
    yield from facts["versions"].items()
    yield "CUDA", facts["cuda"]


def step_rows(found: Any) -> Iterator[tuple[Any, ...]]:
    lengths = sorted(found["lengths"])
    long = f"{lengths[0]} to {lengths[-1]}" if len(lengths) > 1 else lengths[0]
    yield (
        "mode",
        "s/step",
        "ratio",
        "peak",
        f"layers recomputed of {found['layers']} ({found['samples']} x {long} tokens)",
    )
    for name, mode in found["modes"].items():
        counts = mode["batches_by_layers_recomputed"] or {len(mode["recomputed"]): found["repeats"]}
        layers = ", ".join(f"{count} in {batches}" for count, batches in counts.items())
        yield name, f"{mode['seconds']:.3f}", f"{mode['ratio']:.2f}", format_size(mode["peak_bytes"]), layers


def plan_rows(found: Any) -> Iterator[tuple[Any, ...]]:
    yield "policy", "limit", "layers recomputed", "planned", "measured", "measured / planned"
    for plan in found["plans"]:
        if "refused" in plan:
            yield plan["policy"], plan["limit"] or "-", f"refused: {plan['refused']}", "", "", ""
        else:
            yield (plan["policy"], plan["limit"] or "-", plan["recomputed"], format_size(plan["planned_bytes"]),
                   format_size(plan["measured_bytes"]), f"{plan['measured_to_planned']:.2f}")  # fmt: skip


def allocator_rows(found: Any) -> Iterator[tuple[Any, ...]]:
    yield "random lengths", "value"
    for name, value in (found["random_lengths"] or {}).items():
        yield name.replace("_", " "), format_size(value) if name.endswith("bytes") else value


def test_rows(found: Any) -> Iterator[tuple[Any, ...]]:
    yield "test", "ended"
    for name in found["failed"]:
        yield name, "failed"
    for name, why in found["skipped"].items():
        yield name, f"skipped: {why}"
    yield f"{len(found['passed'])} tests", "passed"


def markdown(report: dict[str, Any], every: list[Part]) -> str:
    """The report as tables."""
    lines = [f"# {report['shape']} on {report['device']}", "", f"{report['date']}, llava_region {report['version']}"]
    for part in every:
        found = report["parts"].get(part.name)
        if found is None:
            continue
        command = [word.replace(f"{ROOT}/", "") for word in part.command if not word.startswith("--junitxml")]
        lines += ["", f"## {part.name}", "", f"    python {' '.join(command)}", ""]
        if "not_run" in found:
            lines.append(f"Not run: {found['not_run']}.")
            continue
        head, *rows = part.rows(found["printed"])
        for row in (head, ["---"] * len(head), *rows):
            lines.append("| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row) + " |")
    return "\n".join(lines) + "\n"


def gpu_name(shape: str) -> str:
    """The GPU's name, or the CPU's where the shape needs none.

    Raises:
        LlavaRegionError: there is no GPU, and the shape needs one.
    """
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    if SHAPES[shape] != shape:
        raise LlavaRegionError(f"no NVIDIA GPU is here that torch {torch.__version__} can use; --shape tiny tries the command without one")
    return "CPU"


def run(shape: str, out: Path) -> int:
    """Run all parts and write the report after each; returns 1 where one of them did not run to its end, or a test failed."""
    from llava_region import __version__

    report: dict[str, Any] = {
        "device": gpu_name(shape),
        "shape": shape,
        "version": __version__,
        "date": time.strftime("%Y-%m-%d"),
        "parts": {},
    }
    with TemporaryDirectory() as name:
        every = parts(shape, Path(name))
        for number, part in enumerate(every, 1):
            print(f"{number} of {len(every)}: {part.name} (at most {part.minutes:g} minutes)", flush=True)
            found = report["parts"][part.name] = run_part(part, Path(name))
            if "not_run" in found:
                print(f"  not run: {found['not_run']}", flush=True)
            write_json(out.with_suffix(".json"), report)
            write_text(out.with_suffix(".md"), markdown(report, every))
    print(f"{out.with_suffix('.json')} and {out.with_suffix('.md')}")
    failed = report["parts"]["tests"].get("printed", {}).get("failed")
    return int(bool(failed) or any("not_run" in found for found in report["parts"].values()))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llava-7b", help="backbone and batch (default: llava-7b)")
    parser.add_argument(
        "--out", type=Path, default=Path("gpu-report"), help="where to write the report, .json and .md (default: gpu-report)"
    )
    args = parser.parse_args(argv)
    try:
        return run(args.shape, args.out)
    except LlavaRegionError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
