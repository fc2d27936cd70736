"""Two ranks agree before weights load, or both stop: flags, data, the output folder, the checkpoint."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("llava.train.train")

from llava_region import LlavaRegionError, processes
from llava_region.training import together
from tests.helpers.training_runs import LORA, adapter, environment, llava_flags, projector, same, torchrun, train

RUN = {**LORA, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
MODULE = ("-m", "llava_region.train")
IMPATIENT = ("-c", "import sys, llava_region.train as t, llava_region.training.together as g; g.VISIBLE = 2.0; sys.exit(t.main())")


def start(flags: list[str], rank: int, port: int, before: tuple[str, ...] = (), program: tuple[str, ...] = MODULE) -> subprocess.Popen[str]:
    """The one rank of one of two nodes, without a launcher's agent, as srun starts it."""
    ranks = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    variables = environment(**ranks, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    command = [*before, sys.executable, *program, "llava", *flags, "--tune_layers", "1,6"]
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def both(pair: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Exit codes and output."""
    printed = [one.communicate(timeout=300)[0] for one in pair]
    return [(one.returncode, text) for one, text in zip(pair, printed, strict=True)]


def errors(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if line.startswith("error: ")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("learning_rate", 1e-4, "--learning_rate is not the same on every rank: 0.0002 on rank 0 ("),
        ("save_steps", 3, "--save_steps is not the same on every rank: 2.0 on rank 0 ("),  # the ranks would wait for each other for ever
        ("data_path", None, "the content of --data_path is not the same on every rank: "),
        ("vision_tower", "/nowhere", "rank 1: --vision_tower /nowhere"),
    ],
)
def test_nodes_that_were_started_differently_are_refused(tiny, tmp_path, flag, value, said) -> None:
    if flag == "data_path":
        value = tmp_path / "data.json"
        value.write_text(json.dumps(json.loads(tiny.data.read_text())[1:]))
    flags = [llava_flags(tiny, tmp_path / "run", **RUN), llava_flags(tiny, tmp_path / "run", **{**RUN, flag: value})]
    ended = both([start(flags[0], 0, 29681), start(flags[1], 1, 29681)])
    assert [code for code, _ in ended] == [2, 2], ended
    assert said in errors(ended[0][1])[0], ended[0][1]
    assert not (tmp_path / "run").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_an_output_folder_that_a_node_does_not_share(tiny, tmp_path) -> None:
    """The second node has a disk of its own where the first has the shared one."""
    (tmp_path / "disk").mkdir()
    own = ("unshare", "-rm", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(tmp_path / "disk"))
    if subprocess.run([*own, "true"], capture_output=True).returncode:
        pytest.skip("this user may not mount a disk of its own")
    flags = llava_flags(tiny, tmp_path / "disk" / "run", **RUN)
    ended = both([start(flags, 0, 29683, program=IMPATIENT), start(flags, 1, 29683, before=own, program=IMPATIENT)])
    assert [code for code, _ in ended] == [2, 2], ended
    assert all("is not the same folder on every node: what rank 0 writes on" in printed for _, printed in ended), ended
    assert not list((tmp_path / "disk").iterdir())


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_with_two(tiny, tmp_path) -> None:
    """Without DeepSpeed every process has the whole optimizer: the same samples per step may be split otherwise, but for one process."""
    out = tmp_path / "run"

    def go(steps: int, ranks: int = 2, **changes: int) -> subprocess.CompletedProcess[str]:
        flags = [*llava_flags(tiny, out, **{**RUN, "max_steps": steps, **changes}), "--tune_layers", "1,6"]
        return train(flags, launcher=torchrun(2, 29684)) if ranks == 2 else train(flags)

    assert go(4, per_device_train_batch_size=2).returncode == 0
    other = go(6, per_device_train_batch_size=4)
    assert other.returncode != 0 and "samples per step: was 4 (" in other.stderr, other.stderr[-2000:]
    alone = go(6, ranks=1, per_device_train_batch_size=4)
    assert alone.returncode == 2 and "processes: was 2, is 1, and one draws the order of the samples otherwise" in alone.stderr, (
        alone.stderr
    )
    done = go(6, per_device_train_batch_size=1, gradient_accumulation_steps=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resuming from" in done.stdout and "a step's 4 samples were 4 (2 per device" in done.stdout
    assert json.loads((out / "cost.json").read_text())["steps"] == 6


@pytest.mark.slow
def test_two_runs_in_one_folder(tiny, tmp_path) -> None:
    """A requeued job next to one that lingers: the second waits, and then finds the run done. Equal to one run alone."""
    long = {**RUN, "max_steps": 60, "save_steps": 30, "lora_dropout": 0.1}  # longer than the second one takes to begin
    flags = {out: llava_flags(tiny, tmp_path / out, **long) for out in ("alone", "run")}
    assert train([*flags["alone"], "--tune_layers", "1,6"]).returncode == 0
    command = [sys.executable, "-m", "llava_region.train", "llava", *flags["run"], "--tune_layers", "1,6"]
    pair = []
    for _ in range(2):
        pair.append(subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        while not (tmp_path / ".run.lock").exists() and pair[0].poll() is None:
            time.sleep(0.02)
    printed = [one.communicate(timeout=300) for one in pair]
    assert [one.returncode for one in pair] == [0, 0], printed
    assert f"process {pair[0].pid} on " in printed[1][1] and "waiting up to" in printed[1][1], printed[1]
    assert "resuming from" not in printed[0][0] and "resuming from" in printed[1][0]
    for read in (adapter, projector):
        assert same(read(tmp_path / "alone"), read(tmp_path / "run"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "run"]


def test_a_run_that_is_in_use_is_refused(tiny, tmp_path, monkeypatch) -> None:
    """With one line, and nothing is written."""
    monkeypatch.setattr(together.locks, "STALE", 0.2)
    hold = "import sys, time; from llava_region import locks\nwith locks.held(sys.argv[1]): print('held', flush=True); time.sleep(90)"
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        from llava_region import train as region_train

        monkeypatch.setattr(region_train, "launch", lambda *_: pytest.fail("weights would be loaded"))
        assert region_train.main(["llava", *llava_flags(tiny, tmp_path / "run", **RUN), "--tune_layers", "1,6"]) == 2
    finally:
        holder.kill()
        holder.communicate()
    assert not (tmp_path / "run").exists()


def test_a_file_that_appears_late_is_waited_for(tmp_path, monkeypatch) -> None:
    """Network file systems show a new file to other nodes after a while."""
    import threading

    threading.Timer(0.5, (tmp_path / "region.json").touch).start()
    together.wait_until_seen(tmp_path / "region.json")
    monkeypatch.setattr(together, "VISIBLE", 0.1)
    with pytest.raises(LlavaRegionError, match="is not seen on"):
        together.wait_until_seen(tmp_path / "other")


def test_an_error_of_one_rank_is_raised_by_all(monkeypatch) -> None:
    monkeypatch.setattr(processes, "gather", lambda value: [None, "out of tune", value])
    with pytest.raises(LlavaRegionError, match="rank 1: out of tune"):
        together.on_all(lambda: 1)

    def own() -> None:
        raise OSError("own")

    with pytest.raises(OSError, match="own"):
        together.on_all(own)
