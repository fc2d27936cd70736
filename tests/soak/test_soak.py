"""Crash test: work that is killed, stopped, out of disk space or started twice ends, started again, with the same result.

The test suite strikes a few chosen blows. `make soak SOAK_MINUTES=20` strikes random ones for so long, and prints what it did.
"""

import os
import random
import re
import time
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("llava.train.train")
pytest.importorskip("deepspeed")

from tests.soak import blows
from tests.soak.operations import Content, Operation, Sources, operations

pytestmark = pytest.mark.slow

MINUTES = float(os.environ.get("SOAK_MINUTES") or 0)
KINDS = ("killed", "stopped", "full", "twice")
# every kind of work and every kind of blow, where they hurt most; the tests next to each command strike further ones
CHOSEN = [
    ("train", "stopped"), ("train", "full"), ("train", "twice"), ("zero3", "killed"), ("merge", "twice"), ("prune", "full"),
    ("revert", "killed"), ("score", "stopped"), ("score", "full"), ("eval", "killed"), ("eval", "full"),
]  # fmt: skip
STOPPED = {0, 130, 143, -15}  # done already; by Ctrl-C's handler; by SIGTERM's; as the system ends a process without one


class Reference:
    """Each operation's result, undisturbed, and how long it took."""

    def __init__(self, sources: Sources) -> None:
        self.operations = operations(sources)
        self.folder = sources.folder
        self._known: dict[str, tuple[Content, float, int]] = {}

    def of(self, operation: Operation) -> tuple[Content, float, int]:
        """What it leaves, its seconds, and the kilobytes that it writes."""
        if operation.name not in self._known:
            out = self.folder / "whole" / operation.name / operation.output
            out.parent.mkdir(parents=True)
            ended = blows.run(operation.command(out))
            assert ended.code == 0, ended.printed[-4000:]
            files = [out] if out.is_file() else [path for path in out.rglob("*") if path.is_file()]
            self._known[operation.name] = operation.content(out), ended.seconds, sum(f.stat().st_size for f in files) // 1024
        return self._known[operation.name]


@pytest.fixture(scope="module")
def reference(tiny, llava_checkpoint, lora_run, tmp_path_factory) -> Reference:
    return Reference(Sources(tiny, llava_checkpoint, lora_run, tmp_path_factory.mktemp("soak")))


@pytest.mark.parametrize(("name", "kind"), CHOSEN)
@pytest.mark.skipif(MINUTES > 0, reason="SOAK_MINUTES asks for random blows")
def test_chosen(reference: Reference, name: str, kind: str, tmp_path: Path) -> None:
    if kind == "full" and not blows.can_mount():
        pytest.skip("this user may not mount a small disk")
    # late enough that the work has begun, after some seconds of imports
    crash(reference, name, [kind], random.Random(f"{name} {kind}"), tmp_path / "work", (0.6, 0.95))


@pytest.mark.skipif(not MINUTES, reason="runs by make soak")
def test_random(reference: Reference, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    seed = int(os.environ.get("SOAK_SEED") or time.time())
    rng, count, deadline = random.Random(seed), Counter[str](), time.monotonic() + 60 * MINUTES
    kinds = [kind for kind in KINDS if kind != "full" or blows.can_mount()]
    trial = 0
    while time.monotonic() < deadline:
        trial += 1
        name = rng.choice(sorted(reference.operations))
        struck = crash(reference, name, rng.choices(kinds, k=rng.randint(1, 3)), rng, tmp_path / f"work{trial}", (0.0, 1.0))
        count.update(f"{name} {blow}" for blow in struck)
        count["trials"] += 1
        with capfd.disabled():
            left = max(0, deadline - time.monotonic()) / 60
            print(f"seed {seed}, trial {trial}: {name}, {', '.join(struck)}: same result; {left:.0f} min left", flush=True)
    with capfd.disabled():
        print("\n".join(f"{what}: {times}" for what, times in sorted(count.items())))


def crash(reference: Reference, name: str, kinds: list[str], rng: random.Random, work: Path, moments: tuple[float, float]) -> list[str]:
    """Strike blows of these kinds, one after the other, then let the work end; its result is as if nothing had been.

    Args:
        moments: when a blow may come, in shares of the undisturbed run's time.

    Returns:
        what was struck, "too late" added where the work had ended before.
    """
    operation = reference.operations[name]
    expected, seconds, kilobytes = reference.of(operation)
    work.mkdir()
    out = work / operation.output
    struck = []
    for number, kind in enumerate(kinds):
        command = operation.command(out) + (list(operation.again) if number else [])
        # a disk holds what earlier blows left, and some of what is missing
        moment, size = rng.uniform(*moments) * seconds, blows.kilobytes(work) + int(rng.uniform(0.1, 0.9) * kilobytes) + 4
        hit = strike(kind, command, work, moment, size)
        struck.append(kind if hit else f"{kind} too late")
        if out.exists() and not operation.grows:  # under its final name is all of it, or nothing
            assert operation.same(operation.content(out), expected), (name, struck)
            break  # it is done
    ended = blows.run(operation.command(out) + list(operation.again))
    there = out.exists() and not operation.grows  # finished before the blow, so that starting again is refused
    assert ended.code == 0 or (ended.code == 2 and there), (name, struck, ended.printed[-4000:])
    assert operation.same(operation.content(out), expected), (name, struck)
    assert [path.name for path in work.iterdir()] == [operation.output], (name, struck)
    return struck


# what torchrun prints of itself: that a process of its own failed, and how a signal ended it
OF_TORCHRUN = re.compile(
    r"E\d{4} \S+ .*\] failed \(exitcode[\s\S]*?ChildFailedError"
    r"|Traceback \(most recent call last\):\n(?: .*\n)+torch\.distributed\.elastic\.\S+\.SignalException: .*"
)


def has_traceback(printed: str) -> bool:
    """Leaves out torchrun's own."""
    return "Traceback" in OF_TORCHRUN.sub("", printed)


def strike(kind: str, command: list[str], work: Path, moment: float, kilobytes: int) -> bool:
    """One blow; whether it hit work that was still going on. How the work ends then is part of the contract."""
    if kind == "killed":
        return blows.killed(command, moment).hit
    if kind == "stopped":
        ended = blows.stopped(command, moment)
        stopped = ended.code in STOPPED or "SignalException" in ended.printed  # torchrun ends with 1 then
        assert stopped and not has_traceback(ended.printed), (ended.code, ended.printed[-4000:])
        return ended.hit
    if kind == "full":
        ended = blows.out_of_space(command, work, kilobytes)
        assert ended.code != 2 or "error: " in ended.printed, ended.printed[-4000:]
        assert not has_traceback(ended.printed), ended.printed[-4000:]
        return ended.hit
    both = blows.twice(command, moment)
    assert {one.code for one in both} in ({0}, {0, 2}), [(one.code, one.printed[-3000:]) for one in both]
    assert not any(has_traceback(one.printed) for one in both), [one.printed[-3000:] for one in both]
    return both[0].hit
