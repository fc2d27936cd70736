"""A training that gets a signal: after the step there is a whole checkpoint, and the run that resumes ends equal to the bit."""

import json
import os
import signal
import subprocess

import pytest

pytest.importorskip("llava.train.train")
pytest.importorskip("deepspeed")

from safetensors.torch import load_file
from transformers import Trainer

from llava_region import train as region_train
from llava_region.training import signals
from llava_region.training.trainer import RegionTrainerMixin
from tests.helpers.training_runs import LORA, adapter, environment, llava_flags, needs_zero_on_cpu, projector, same, torchrun, write_zero3

CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 138}
EXACT = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "warmup_ratio": 0.1, "lr_scheduler_type": "cosine"}


def run_here(tiny, out, **changes) -> int:
    """Train in this process, which saves the seconds that imports take."""
    return region_train.main(["llava", *llava_flags(tiny, out, **changes), "--tune_layers", "1,6"])


@pytest.fixture
def send(monkeypatch):
    """Have this process get a signal in the midst of a micro batch, counted from 1."""

    def at(micro_batch: int, number: int = signal.SIGTERM) -> None:
        count = 0
        step = RegionTrainerMixin.training_step

        def counted(self, *args):
            nonlocal count
            count += 1
            if count == micro_batch:
                os.kill(os.getpid(), number)
            return step(self, *args)

        monkeypatch.setattr(RegionTrainerMixin, "training_step", counted)

    return at


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_stopped_run_that_resumes_ends_as_one_never_stopped(tiny, tmp_path, send, monkeypatch, kind, capsys):
    """In the first micro batch of two of step 3 of 5, without any other checkpoint."""
    options = {**EXACT, "max_steps": 5, **({**LORA, "lora_dropout": 0.1} if kind == "lora" else {})}
    whole, out = tmp_path / "whole", tmp_path / "stopped"
    assert run_here(tiny, whole, **options) == 0
    with monkeypatch.context():
        send(5)
        assert run_here(tiny, out, **options) == 143
        monkeypatch.undo()
    said = capsys.readouterr().err
    assert f"stopped by SIGTERM at step 3 of 5; run the same command again to resume from {out / 'checkpoint-3'}\n" in said
    assert "Traceback" not in said
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-3"]
    assert json.loads((out / "checkpoint-3" / "cost.json").read_text())["stopped_by"] == "SIGTERM"
    # nothing that a finished run has
    finished = ("cost.json", "adapter_model.safetensors", "model.safetensors", "trainer_state.json")
    assert not [name for name in finished if (out / name).exists()]
    assert run_here(tiny, out, **options) == 0
    assert f"resuming from {out / 'checkpoint-3'}\n" in capsys.readouterr().out
    if kind == "lora":
        assert same(adapter(whole), adapter(out)) and same(projector(whole), projector(out))
    else:
        assert same(load_file(whole / "model.safetensors"), load_file(out / "model.safetensors"))
    costs = [json.loads((folder / "cost.json").read_text()) for folder in (whole, out)]
    assert costs[0]["samples"] == costs[1]["samples"] == 20 and "stopped_by" not in costs[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_every_signal_has_its_code(tiny, tmp_path, send, number, capsys):
    send(1, number)
    before = [signal.getsignal(one) for one in CODES]
    assert run_here(tiny, tmp_path / "run", **LORA) == CODES[number]
    assert (tmp_path / "run" / "checkpoint-1" / "region.json").exists() and "Traceback" not in capsys.readouterr().err
    assert [signal.getsignal(one) for one in CODES] == before and signals.current() is None


def test_in_the_last_step_the_run_is_finished(tiny, tmp_path, send):
    send(2)
    assert run_here(tiny, tmp_path / "run", **LORA) == 0
    assert (tmp_path / "run" / "cost.json").exists() and not list((tmp_path / "run").glob("checkpoint-*"))


def test_in_the_last_save_the_run_is_finished(tiny, tmp_path, monkeypatch):
    """Upstream saves the adapter after its trainer's `save_state`."""
    save_state = Trainer.save_state

    def interrupted(self):
        os.kill(os.getpid(), signal.SIGTERM)
        save_state(self)

    monkeypatch.setattr(Trainer, "save_state", interrupted)
    assert run_here(tiny, tmp_path / "run", **LORA) == 0
    assert (tmp_path / "run" / "cost.json").exists() and adapter(tmp_path / "run")


def test_a_run_stopped_twice_and_at_an_epochs_end_is_exact(tiny, tmp_path, send, monkeypatch, capsys):
    """72 records make 9 steps an epoch; saving by epochs must not write the checkpoint of that step twice."""
    options = {**LORA, "lora_dropout": 0.1, "max_steps": 11, "per_device_train_batch_size": 8, "save_strategy": "epoch"}
    whole, out = tmp_path / "whole", tmp_path / "stopped"
    assert run_here(tiny, whole, **options, save_total_limit=1) == 0
    for micro_batch in (2, 7):
        with monkeypatch.context():
            send(micro_batch)
            assert run_here(tiny, out, **options, save_total_limit=1) == 143
            monkeypatch.undo()
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-9"]
    assert "already exists" not in capsys.readouterr().err
    assert run_here(tiny, out, **options, save_total_limit=1) == 0
    assert same(adapter(whole), adapter(out)) and same(projector(whole), projector(out))


def test_a_run_that_would_save_models_alone_leaves_a_checkpoint_to_resume(tiny, tmp_path, send, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context():
        send(1)
        assert run_here(tiny, out, **LORA, save_only_model=True) == 143
        monkeypatch.undo()
    assert (out / "checkpoint-1" / "optimizer.pt").exists()
    assert run_here(tiny, out, **LORA, save_only_model=True) == 0


@needs_zero_on_cpu
@pytest.mark.slow
def test_one_of_two_ranks_gets_the_signal_and_all_stop(tiny, tmp_path):
    """ZeRO-3, LoRA with dropout, rank 1 alone, in the first micro batch of two of step 2 of 4; the code reaches a launcher's file."""
    options = {**EXACT, **LORA, "lora_dropout": 0.1, "use_cpu": None, "bf16": True, "max_steps": 4, "deepspeed": write_zero3(tmp_path)}

    def two_ranks(out, port, **variables):
        command = [*torchrun(2, port), "tests.helpers.signalled_run", "llava", *llava_flags(tiny, out, **options), "--tune_layers", "1,6"]
        done = subprocess.run(command, env=environment(**variables), capture_output=True, text=True, timeout=500)
        assert "terminate called" not in done.stderr
        return done

    whole, out, note = tmp_path / "whole", tmp_path / "stopped", tmp_path / "code"
    assert two_ranks(whole, 29651).returncode == 0
    stopped = two_ranks(out, 29652, SIGNALS="1:3:10", LLAVA_REGION_EXIT_CODE_FILE=str(note))
    assert (stopped.returncode, note.read_text()) == (0, "138"), stopped.stderr[-3000:]
    assert stopped.stderr.count("stopped by SIGUSR1 at step 2 of 4") == 1 and not (out / "cost.json").exists()
    assert two_ranks(out, 29653).returncode == 0
    assert same(adapter(whole), adapter(out)) and same(projector(whole), projector(out))
