"""Every command line ends with one line and an exit code, whatever happens in it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llava_region import LlavaRegionError, train
from llava_region.errors.ending import Program, guarded
from tests.helpers.command_line import Ran, run
from tests.helpers.training_runs import LORA, environment, llava_flags, torchrun
from tests.helpers.training_runs import train as training

PROGRAM = Program("tool", ["model", "--hub_token", "hf_abc", "--api-key=xyz", "--out", "a b"])


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def ended(capsys: pytest.CaptureFixture[str], raised: BaseException, program: Program = PROGRAM) -> Ran:
    """What a command ends with that raises something."""

    def work() -> int:
        raise raised

    return Ran(guarded(work, program, whole_process=False), *capsys.readouterr())


def logs(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.log"))


def process(*argv: str, redirect: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m llava_region`, with the shell's redirections."""
    command = ["bash", "-c", f'"$@" {redirect}', "-", sys.executable, "-m", "llava_region", *argv]
    return subprocess.run(command, env=environment(**variables), capture_output=True, text=True, timeout=120)


def test_an_unforeseen_exception_is_a_line_and_a_file(tmp_path, capsys):
    code, out, err = ended(capsys, KeyError("x\ny"))
    assert code == 70 and out == "" and err.count("\n") == 1 and err.startswith("error: KeyError: 'x\\ny' (unforeseen; ")
    (log,) = logs(tmp_path)
    assert str(log) in err and log.name.startswith("tool-")
    text = log.read_text()
    assert "Traceback (most recent call last)" in text and text.endswith("KeyError: 'x\\ny'\n")
    assert text.startswith("command line: tool model --hub_token '***' '--api-key=***' --out 'a b'\n")
    assert f"torch=={torch.__version__.split('+')[0]}" in text and "hf_abc" not in text and "xyz" not in text


def test_debug_shows_it_instead(tmp_path, capsys):
    code, _, err = ended(capsys, KeyError("x"), Program("tool", [], debug=True))
    assert code == 70 and "Traceback" in err and err.endswith("error: KeyError: 'x'\n") and not logs(tmp_path)


def test_a_folder_that_cannot_be_written_is_passed_over(tmp_path, capsys, monkeypatch):
    (tmp_path / "run").mkdir()
    ended(capsys, KeyError("x"), Program("tool", [], folders=["/nope", str(tmp_path / "run")]))
    assert len(logs(tmp_path / "run")) == 1 and not logs(tmp_path)
    monkeypatch.chdir("/proc")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    ended(capsys, KeyError("x"))
    assert len(logs(tmp_path)) == 1
    monkeypatch.setattr("tempfile.tempdir", "/proc")
    err = ended(capsys, KeyError("x")).err
    assert "could not be written anywhere" in err and "Traceback" in err  # it is not lost


def full(argument: int) -> OSError:
    return OSError(argument, os.strerror(argument), "/data/model")


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "the GPU's memory is full; give a smaller"),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), "the GPU's memory is full"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "the GPU's memory is full"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "the GPU's memory is full"),
        (
            RuntimeError("NCCL error in: x.cpp:1, unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'"),
            "the GPU's memory is full",
        ),
        (MemoryError(), "this machine's memory is full; give a smaller"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried"), "machine's memory"),
        (full(errno.ENOSPC), "/data/model: No space left on device; free some space"),
        (full(errno.EDQUOT), "/data/model: Disk quota exceeded; free some space"),
        (full(errno.ENAMETOOLONG), "/data/model: File name too long; give a shorter name"),
        (full(errno.EMFILE), "/data/model: Too many open files; raise the limit with 'ulimit -n'"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "a file could not be written whole; free some space"),
        (RuntimeError("[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file data/3"), "a file could not be"),
    ],
    ids=lambda value: value.split(";")[0] if isinstance(value, str) else type(value).__name__,
)
def test_limits_of_a_machine_are_named(raised, message, tmp_path, capsys):
    code, _, err = ended(capsys, raised)
    assert code == 2 and err.startswith("error: ") and message in err and err.count("\n") == 1 and not logs(tmp_path)
    # of a training the traceback is kept
    code, _, err = ended(capsys, raised, Program("train", [], long=True))
    assert code == 2 and message in err and err.count("\n") == 1 and str(logs(tmp_path)[0]) in err


@pytest.mark.parametrize(
    "text",
    [
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:41390. GLHF!",
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Read error [10.0.0.2]:58312: Connection reset by peer",
        "NCCL error in: ProcessGroupNCCL.cpp:1970, remote process exited or there was a network error, NCCL version 2.20.5\n"
        "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
    ],
)
def test_a_process_that_waited_for_one_that_ended(capsys, text):
    """Its own words are no news: what went wrong is said by the other."""
    code, _, err = ended(capsys, RuntimeError(text))
    assert code == 70 and err.startswith("error: another process of this run has ended, and its own output says why: ")
    assert "unforeseen" not in err and "(traceback: " in err
    assert "another process" not in ended(capsys, ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")).err  # a hub's


def test_real_limits(capsys):
    def allocate() -> int:
        return len(bytearray(1 << 60))

    def long_name() -> int:
        return int(Path("n" * 300).exists())

    for work, message in ((allocate, "machine's memory is full"), (long_name, "File name too long")):
        assert guarded(work, PROGRAM, whole_process=False) == 2
        assert message in capsys.readouterr().err


def test_it_works_where_little_is_left(tmp_path, capsys, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    monkeypatch.setenv("RANK", "zero")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code, _, err = ended(capsys, KeyError("x"))
    assert code == 70 and str(logs(tmp_path)[0]) in err
    assert ended(capsys, LlavaRegionError("a")).code == 2 and ended(capsys, KeyboardInterrupt()).code == 130
    code, _, err = ended(capsys, BrokenPipeError(errno.EPIPE, "Broken pipe", "/run/pipe"))
    assert code == 2 and "/run/pipe: Broken pipe; what reads it has ended" in err


def test_what_passes(capsys):
    assert ended(capsys, LlavaRegionError("a\nb")) == Ran(2, "", "error: a b\n")
    assert ended(capsys, KeyboardInterrupt()) == Ran(130, "", "interrupted\n")
    with pytest.raises(SystemExit, match="upstream says"):  # argparse and upstreams end so
        ended(capsys, SystemExit("upstream says"))


def test_both_command_lines_have_it(tmp_path, capsys, monkeypatch):
    def broken(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("by accident")

    monkeypatch.setattr("llava_region.region.Region.load", broken)
    (tmp_path / "region.json").write_text("{}")
    code, _, err = run(capsys, "layers", tmp_path)
    assert code == 70 and "ZeroDivisionError: by accident (unforeseen" in err and len(logs(tmp_path)) == 1
    for argv in (("--debug", "layers", tmp_path), ("layers", tmp_path, "--debug")):
        assert "Traceback" in run(capsys, *argv).err
    monkeypatch.setattr(train, "train_untouched", broken)
    (tmp_path / "out").mkdir()
    for output in (["--output_dir", tmp_path / "out"], [f"--output-dir={tmp_path / 'out'}"]):
        code, _, err = run(capsys, "llava", *output, main=train.main)
        assert code == 70 and str(tmp_path / "out") in err
    assert len(logs(tmp_path / "out")) == 2
    assert "Traceback" in run(capsys, "llava", "--debug", "--bf16", "True", main=train.main).err
    assert len(logs(tmp_path / "out")) == 2 and len(logs(tmp_path)) == 1


@pytest.mark.parametrize(
    ("given", "left", "ours"),
    [
        ("llava --debug", "llava", True),
        ("--debug llava --bf16 True", "llava --bf16 True", True),
        ("llava --debug True --bf16 True", "llava --bf16 True", True),
        ("llava --debug underflow_overflow --bf16 True", None, False),
        ("llava --bf16 True", None, False),
    ],
)
def test_debug_of_transformers_is_left_alone(given, left, ours):
    assert train.take_debug(given.split()) == ((left or given).split(), ours)


def test_ranks_end_together(tmp_path):
    """A rank that fails says so and ends with 70; the launcher then stops the one that waits for it."""
    script = tmp_path / "run.py"
    script.write_text(
        "import sys\n"
        "from torch import distributed\n"
        "from llava_region import train\n"
        "def work(request):\n"
        "    distributed.init_process_group('gloo')\n"
        "    if distributed.get_rank() == 1:\n"
        "        raise KeyError('lost')\n"
        "    distributed.barrier()\n"
        "train.train_untouched = work\n"
        "sys.exit(train.main())\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29731", str(script), "llava"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and "exitcode  : 70" in done.stderr
    assert "error: rank 1: KeyError: 'lost' (unforeseen; " in done.stderr
    (log,) = [log for log in logs(tmp_path) if "-rank1-" in log.name]
    assert "KeyError: 'lost'" in log.read_text() and "rank 1 of 2" in log.read_text()


def test_what_a_real_training_ends_with(tiny, tmp_path):
    """LLaVA's own traceback is in one file per rank, in the run's folder, and no rank is left waiting."""
    pytest.importorskip("llava.train.train")
    records = [{**record, "image": "gone.png"} for record in json.loads(tiny.data.read_text()) if "image" in record][:8]
    (tmp_path / "data.json").write_text(json.dumps(records))
    (tmp_path / "images").mkdir()
    out = tmp_path / "out-lora"
    flags = llava_flags(tiny, out, **LORA, data_path=tmp_path / "data.json", image_folder=tmp_path / "images")
    done = training([*flags, "--tune_layers", "1,6", "--check_images", "none"], launcher=torchrun(2, 29732))
    assert done.returncode != 0 and "exitcode  : 70" in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert lines and all("FileNotFoundError" in line and str(out) in line for line in lines)
    assert all(f"rank {rank}: " in " ".join(lines) for rank in range(len(lines)))
    found = logs(out)
    assert len(found) == len(lines) and all("llava/train/train.py" in log.read_text() and "gone.png" in log.read_text() for log in found)


@pytest.mark.parametrize("argv", [["--help"], ["eval", "--list"], ["recipes", "--help"]], ids=" ".join)
def test_a_reader_that_leaves_is_no_error(argv):
    done = process(*argv, redirect="| true; exit ${PIPESTATUS[0]}")
    assert (done.returncode, done.stderr) in ((141, ""), (0, ""))


def test_a_training_does_not_end_silently(capsys):
    code = (
        "import sys, time; from llava_region.errors.ending import Program, guarded\n"
        "def work():\n"
        "    while True: print('loss' * 99, flush=True)\n"
        "sys.exit(guarded(work, Program('x', [], long=sys.argv[1] == '1'), whole_process=True))"
    )
    for long, said in (("0", ""), ("1", "error: nobody reads the output any more")):
        command = ["bash", "-c", '"$@" | head -1 >/dev/null; exit ${PIPESTATUS[0]}', "-", sys.executable, "-c", code, long]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
        assert done.returncode == 141 and done.stderr[: len(said) or None] == said


@pytest.mark.parametrize("argv", [["--help"], ["eval", "--list"], ["--version"]], ids=" ".join)
@pytest.mark.parametrize("redirect", [">/dev/full", ">/dev/full 2>/dev/full", ">&-", ">&- 2>&-", "2>&-"])
def test_outputs_that_take_nothing(argv, redirect):
    done = process(*argv, redirect=redirect)
    assert done.returncode == (2 if ">/dev/full" in redirect else 0)
    if redirect == ">/dev/full":
        assert done.stderr.startswith("error: ") and "No space left on device" in done.stderr and done.stderr.count("\n") == 1
    else:
        assert done.stderr == ""


def test_any_name_can_be_printed(tmp_path):
    strange = os.fsdecode(b"caf\xe9-\xff")
    for name in ("modèle-模型", strange):
        folder = tmp_path / name
        folder.mkdir()
        done = process("layers", str(folder), PYTHONIOENCODING="ascii")
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
        for encoding in ("ascii", "utf-8"):
            made = process("recipes", str(folder / encoding), PYTHONIOENCODING=encoding)
            assert made.returncode == 0 and made.stderr == "", made


def send(work: Callable[[], int], after: float) -> int:
    """Run a command in this process, with one Ctrl-C while it runs."""
    timer = threading.Timer(after, signal.raise_signal, (signal.SIGINT,))
    timer.start()
    try:
        return guarded(work, PROGRAM, whole_process=False)
    finally:
        timer.join()


def busy(seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(0.01)


def test_an_interrupt_that_a_library_swallows_comes_again(capsys):
    def swallows() -> int:
        with contextlib.suppress(BaseException):
            busy(20)
        busy(20)
        return 0

    def converts() -> int:
        try:
            busy(20)
        except BaseException:
            raise ImportError("cannot import name 'x' from partially initialized module") from None
        return 0

    for work in (swallows, converts):
        start = time.monotonic()
        assert send(work, after=0.2) == 130 and time.monotonic() - start < 10
        assert capsys.readouterr() == ("", "interrupted\n")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_lets_cleaning_up_end(capsys):
    cleaned = []

    def work() -> int:
        try:
            busy(20)
        finally:
            try:
                raise ValueError("while cleaning up")
            except ValueError:
                busy(1)
            cleaned.append(True)
        return 0

    assert send(work, after=0.1) == 130 and cleaned == [True]


def test_an_interrupt_of_somebody_else(capsys):
    def handler(number: int, frame: object) -> None:
        taken.append(number)

    taken: list[int] = []
    before = signal.signal(signal.SIGINT, handler)
    try:
        assert send(lambda: busy(0.5) or 0, after=0.1) == 0 and taken == [signal.SIGINT]
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


def interrupted_once(module: str, argv: list[str], after: float) -> subprocess.CompletedProcess[str]:
    """Start a command line and send SIGINT so many seconds after its module was imported."""
    code = f"import sys, llava_region.{module} as line; print('started', flush=True); sys.exit(line.main())"
    with subprocess.Popen(
        [sys.executable, "-c", code, *argv], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(after)
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=300)
    return subprocess.CompletedProcess(argv, child.returncode, out, err)


@pytest.mark.slow
def test_an_interrupt_at_any_moment_of_the_imports(tiny):
    chance = random.Random(0)
    for at in range(12):
        after = chance.uniform(0, 4)
        model = str(tiny.backbone)
        lines = (
            ("train", ["llava", "--help"]),
            ("cli", ["score", model, "--data", str(tiny.data), "--image-folder", str(tiny.images), "--out", "scores.json"]),
        )
        done = interrupted_once(*lines[at % 2], after=after)
        # a command may be done before, or bad input may have been found; libraries print lines of their own where an import fails
        last = done.stderr.splitlines()[-1:]
        assert (done.returncode, last) == (130, ["interrupted"]) or done.returncode in (0, 2, -signal.SIGINT), (after, done)
        assert "Traceback" not in done.stderr
