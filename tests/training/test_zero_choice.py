"""`--deepspeed auto`, and what a dry run says of the stages of ZeRO."""

import json
from pathlib import Path

import pytest

pytest.importorskip("llava.train.train")
pytest.importorskip("deepspeed")

from llava_region.train import main
from llava_region.training import zero_choice
from llava_region.training.recompute_plan import Activations
from llava_region.training.zero_choice import Need, all_linked, choose, with_config
from tests.helpers.command_line import run
from tests.helpers.training_runs import LORA, llava_flags, needs_zero_on_cpu, torchrun, train

GB = 10**9
LAYERS = Activations(kept=(5 * GB,) * 4, costs=(1.0,) * 4, layer_input=GB // 10)  # 20.4 GB with no layer recomputed, 5.4 with all


def needs(*states: int) -> list[Need]:
    return [Need(name, size * GB, LAYERS) for name, size in zip(("zero2", "zero3", "zero3_offload"), states, strict=False)]


@pytest.mark.parametrize(
    ("states", "room", "joined", "expected", "why"),
    [
        ((15, 4, 0), 70, True, "zero2", "weights are not gathered in every step, and it fits into 70 GB"),
        ((15, 4, 0), 24, False, "zero2", "with 2 layers more recomputed"),
        ((15, 4, 0), 24, True, "zero3", "2 layers fewer are recomputed in the largest batch than under zero2, and NVLink joins the GPUs"),
        ((15, 4, 0), 20, False, "zero3", "zero2 does not fit into 20 GB"),
        ((15, 4, 0), 8, True, "zero3_offload", "zero2 does not fit into 8 GB"),
        ((15, 4, 0), 5, True, "zero3_offload", "5.4 GB per GPU of 5 GB that may be filled, which may not be enough"),
        ((15,), 24, True, "zero2", "weights are not gathered"),
        ((15,), 8, True, "zero2", "which may not be enough"),
    ],
)
def test_by_memory_and_network(states, room, joined, expected, why):
    name, reason = choose(needs(*states), room * GB, joined)
    assert name == expected and why in reason, reason


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        # as nvidia-smi prints it: on a DGX, on a board with PCIe alone, with pairs joined, and without a GPU
        ("\t\x1b[4mGPU0\tGPU1\tNIC0\x1b[0m\nGPU0\t X \tNV18\tSYS\nGPU1\tNV18\t X \tSYS\nNIC0\tSYS\tSYS\t X\n", True),
        ("\tGPU0\tGPU1\nGPU0\t X \tPHB\nGPU1\tPHB\t X \n", False),
        ("\tGPU0\tGPU1\tGPU2\nGPU0\tX\tNV4\tSYS\nGPU1\tNV4\tX\tNV4\nGPU2\tSYS\tNV4\tX\n", False),
        ("\tGPU0\tCPU Affinity\nGPU0\tX\t0-15\n", True),
        ("No devices were found\n", False),
    ],
)  # fmt: skip
def test_what_nvidia_smi_says(matrix, expected):
    assert all_linked(matrix) is expected


def test_the_flag_is_replaced_where_it_says_auto():
    assert with_config(["--a", "auto", "--deepspeed", "mine.json"], "zero2") == ["--a", "auto", "--deepspeed", "mine.json"]
    for given in (["--deepspeed", "auto"], ["--deepspeed=auto"]):
        *_, path, last, value = with_config(["--local_rank=1", *given, "--b", "1"], "zero2")
        assert Path(path).name == "zero2.json" and Path(path).is_file() and (last, value) == ("--b", "1")


OPTIONS = {**LORA, "use_cpu": None, "bf16": True, "deepspeed": "auto"}


def dry_run(capsys, tiny, folder: Path, gpus: int = 8, **changes) -> str:
    flags = llava_flags(tiny, folder / "run", **{**OPTIONS, **changes, "dry_run": True, "dry_run_step": False, "dry_run_gpus": gpus})
    done = run(capsys, "llava", *flags, "--tune_layers", "2,6", main=main)
    assert done.code == 0, done.err
    return done.out


def test_a_dry_run_compares_them(capsys, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(zero_choice, "room_on_gpu", lambda args: None)
    said = dry_run(capsys, tiny, tmp_path)
    assert "--deepspeed auto: zero3, as there is no GPU here to choose by" in said
    assert "8 GPUs, ZeRO-3, without activations" in said
    sizes = [line.split(maxsplit=1)[1] for line in said.splitlines() if line.startswith(("  zero2 ", "  zero3 ", "  zero3_offload "))]
    assert len(sizes) == 3 and all(" to " in size for size in sizes) and len(set(sizes)) == 3
    assert "zero2 on GPUs of" in said and ", else zero3_offload" in said
    # one that a user names is shown with the same comparison; one GPU has nothing to share
    assert "  advice" in dry_run(capsys, tiny, tmp_path, deepspeed=None)
    assert "  advice" not in dry_run(capsys, tiny, tmp_path, gpus=1)
    # weights in few bits cannot be sharded
    monkeypatch.setattr(zero_choice, "room_on_gpu", lambda args: 10**12)
    assert "--deepspeed auto: zero2, weights are not gathered in every step, and it fits into 1 TB" in dry_run(capsys, tiny, tmp_path)


@pytest.mark.slow
@needs_zero_on_cpu
def test_two_ranks_train_under_it_and_go_on(tiny, tmp_path):
    """Under the one that the memory allows; a run that goes on keeps what it has, whatever would be chosen now."""
    options = {**OPTIONS, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    flags = [*llava_flags(tiny, tmp_path / "run", **options), "--tune_layers", "1,6"]
    first = train(flags, launcher=torchrun(2))
    assert first.returncode == 0, first.stderr[-3000:]
    assert first.stdout.count("--deepspeed auto: zero3, as there is no GPU here to choose by") == 1
    record = json.loads((tmp_path / "run" / "checkpoint-2" / "run.json").read_text())
    assert record["deepspeed"]["zero_optimization.stage"] == 3
    more = [*llava_flags(tiny, tmp_path / "run", **{**options, "max_steps": 3}), "--tune_layers", "1,6"]
    again = train(more, launcher=torchrun(2))
    assert again.returncode == 0, again.stderr[-3000:]
    assert f"--deepspeed auto: zero3, as in {tmp_path / 'run' / 'checkpoint-2'}" in again.stdout
