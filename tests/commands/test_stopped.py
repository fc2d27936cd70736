"""A tool that is told to stop, by Ctrl-C or as schedulers do it: one line, a code of its own, and nothing half-written."""

import json
import signal
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("llava.train.train")

from tests.helpers.data_roots import write_mmlu
from tests.soak.blows import Running

pytestmark = pytest.mark.slow

SAID = {signal.SIGINT: "interrupted", signal.SIGTERM: "stopped by SIGTERM"}
RESUMED = {"score", "eval"}  # these leave what they have found so far
ATTEMPTS = 6  # tiny models are soon done


@pytest.fixture(scope="module")
def commands(tiny, llava_checkpoint, lora_run, tmp_path_factory):
    """Arguments of each tool, for an output."""
    root = tmp_path_factory.mktemp("root")
    write_mmlu(root, questions=20)
    many = root / "many.json"
    many.write_text(json.dumps(json.loads(tiny.data.read_text()) * 300))
    data = ("--data", tiny.data, "--image-folder", tiny.images)
    return {
        "merge": (lora_run, "--base", tiny.backbone),
        "prune": (llava_checkpoint, "--layers", "2,5"),
        "revert": (llava_checkpoint, "--base", tiny.backbone, "--layers", "0,7"),
        "score": (llava_checkpoint, *data, "--device", "cpu", "--batch-size", 1, "--metrics", "block_influence"),
        "eval": (llava_checkpoint, "--task", "mmlu", "--data-root", root, "--device", "cpu", "--batch-size", 1),
        "perplexity": (llava_checkpoint, *data, "--device", "cpu", "--batch-size", 1),
        "subset": (many, "--fraction", "0.5"),
    }


def output_of(name: str) -> str:
    return "out.json" if name == "score" else "out"


def start(name: str, arguments: tuple, out: Path) -> Running:
    return Running([sys.executable, "-m", "llava_region", name, *map(str, arguments), "--out", str(out)])


def begun(running: Running, work: Path) -> bool:
    """Wait until it holds its output, and a little; whether it is at work."""
    while running.process.poll() is None:
        if any(work.iterdir()):
            return running.after(0.02)
        time.sleep(0.002)
    return False


def strike(name: str, arguments: tuple, work: Path, number: signal.Signals):
    """Stop it while it works."""
    for _ in range(ATTEMPTS):
        running = start(name, arguments, work / output_of(name))
        if begun(running, work):
            running.process.send_signal(number)
        ended = running.end()
        if ended.code != 0:
            return ended
        work.rename(work.with_name(f"done-{time.monotonic_ns()}"))
        work.mkdir()
    raise AssertionError(f"{name} was done each time before the signal came: {ended.printed[-2000:]}")


@pytest.mark.parametrize("number", SAID)
@pytest.mark.parametrize("name", ["merge", "prune", "revert", "score", "eval", "perplexity", "subset"])
def test_one_line_and_nothing_half_written(commands, tmp_path, name, number):
    work = tmp_path / "work"
    work.mkdir()
    ended = strike(name, commands[name], work, number)
    assert ended.code == 128 + number and "Traceback" not in ended.printed, ended.printed[-3000:]
    last = ended.printed.splitlines()[-1]
    assert last == SAID[number] or (name == "score" and "go on with --resume" in last)
    left = sorted(path.name for path in work.iterdir())
    if name not in RESUMED:
        assert left == []
    assert not (work / "out" / "results.json").exists()
    if name == "merge" and number == signal.SIGTERM:  # nothing is held, and it does it all again
        again = start(name, commands[name], work / output_of(name)).end()
        assert again.code == 0 and [path.name for path in work.iterdir()] == ["out"], again.printed[-2000:]
