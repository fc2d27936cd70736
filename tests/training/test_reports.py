"""What a run reports to W&B and TensorBoard, and what of that is found before weights load."""

import json
import os
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest

pytest.importorskip("llava.train.train")
pytest.importorskip("wandb")
pytest.importorskip("tensorboard")

import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llava_region.train import main
from llava_region.training.reports import Reports
from tests.helpers.training_runs import LORA, llava_flags

# the limit just holds the largest batch, 2 x 256 tokens, with every layer recomputed
OPTIONS = {**LORA, "max_steps": 3, "logging_steps": 1, "save_strategy": "steps", "save_steps": 2, "region_memory": "5.6MB", "bf16": True}
OPTIONS |= {"model_max_length": 256, "per_device_train_batch_size": 2, "report_to": None}


def reported(folder: Path) -> tuple[list[float], dict]:
    """`layers_recomputed` of each log, and our text, of what TensorBoard was sent."""
    found = EventAccumulator(str(folder))
    found.Reload()
    (text,) = found.Tensors("llava_region/text_summary")
    return [event.value for event in found.Scalars("train/layers_recomputed")], json.loads(text.tensor_proto.string_val[0])


@pytest.fixture(scope="module", autouse=True)
def _environment():
    """transformers leaves accelerate's precision there, which later tests' processes would inherit."""
    with patch.dict(os.environ):
        yield


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """Folder of a run in this process that reports to both; W&B's run is still open."""
    folder = tmp_path_factory.mktemp("reports")
    flags = [*llava_flags(tiny, folder / "run", **OPTIONS), "--report_to", "tensorboard", "wandb", "--logging_dir", str(folder / "logs")]
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("WANDB_DIR", str(folder))
        patched.setenv("WANDB_MODE", "offline")
        assert main(["llava", *flags, "--tune_layers", "1,6"]) == 0
        yield folder
        wandb.finish()


def test_tensorboard(run):
    recomputed, facts = reported(run / "logs")
    assert facts["layers"] == [1, 6] and facts["mode"] == "lora" and facts["spec"] == "1,6"
    plan = facts["recomputation"]
    assert plan["policy"] == "auto" and plan["per_batch"] and plan["budget_bytes"] == 5_600_000
    counts = json.loads((run / "run" / "cost.json").read_text())["batches_by_layers_recomputed"]
    assert len(recomputed) == 3 and sorted(recomputed) == sorted(float(n) for n, batches in counts.items() for _ in range(batches))
    assert max(recomputed) > 0


def test_wandb(run):
    facts = wandb.run.config["llava_region"]
    assert facts["layers"] == [1, 6] and facts["recomputation"]["budget_bytes"] == 5_600_000
    assert wandb.run.config["visual_region"]["layers"] == [1, 6]  # of the model's config, by transformers
    assert wandb.run.summary["train/layers_recomputed"] == reported(run / "logs")[0][-1]


def test_each_log_has_the_batches_since_the_last():
    batches = SimpleNamespace(counts=Counter({2: 3, 4: 1}))
    reports = Reports(SimpleNamespace(first_step=SimpleNamespace(plan=SimpleNamespace(batches=batches))))
    assert reports.layers_recomputed() == 2.5
    batches.counts[0] += 3
    assert reports.layers_recomputed() == 0.0 and reports.layers_recomputed() is None


def test_a_run_that_reports_nowhere(tiny, tmp_path, capsys):
    flags = llava_flags(tiny, tmp_path / "run", **{**OPTIONS, "report_to": "none", "max_steps": 1, "region_checkpointing": "all"})
    flags = [flag for flag in flags if flag not in ("--region_memory", "5.6MB")]
    assert main(["llava", *flags, "--tune_layers", "1,6"]) == 0
    assert "layers_recomputed" not in capsys.readouterr().out and not list(tmp_path.rglob("*tfevents*"))


@pytest.fixture
def nobody(tmp_path, monkeypatch):
    """A user who never logged in to W&B; the home folder."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("sys.stdin", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.mark.parametrize(("given", "said"), [(None, "left out or all, and so it reports"), ("wandb", "--report_to wandb reports")])
def test_wandb_without_a_login(line_of, nobody, given, said):
    line = line_of(report_to=given)
    assert said in line and line.endswith("log in with 'wandb login' or WANDB_API_KEY, set WANDB_MODE=offline, or give --report_to none")
    assert line_of(report_to="none") is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WANDB_MODE", "offline"), ("WANDB_MODE", "disabled"), ("WANDB_DISABLED", "true"), ("WANDB_API_KEY", "0" * 40),
        ("NETRC", "machine api.wandb.ai\n  login user\n  password " + "0" * 40), (".config/wandb/settings", "[default]\nmode = offline\n"),
    ],
)  # fmt: skip
def test_ways_to_report_to_wandb_or_not(line_of, nobody, monkeypatch, name, value):
    if name.islower() or name == "NETRC":
        path = nobody / name.lower()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(value)
    if not name.islower():
        monkeypatch.setenv(name, str(nobody / "netrc") if name == "NETRC" else value)
    assert line_of() is None


def test_a_terminal_is_asked(line_of, nobody, monkeypatch):
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    assert line_of(report_to="wandb") is None


def test_a_dry_run_says_it(tiny, tmp_path, nobody, capsys):
    flags = llava_flags(tiny, tmp_path / "run", **{**OPTIONS, "report_to": "wandb", "dry_run": True, "dry_run_step": False})
    assert main(["llava", *flags, "--tune_layers", "1,6"]) == 0
    assert "nobody is logged in" in next(line for line in capsys.readouterr().out.splitlines() if line.startswith("W&B"))


def test_a_folder_for_logs_that_cannot_be_written(line_of, tmp_path):
    (tmp_path / "file").write_text("")
    assert f"--logging_dir {tmp_path / 'file'} is a file; give a folder" in line_of(report_to="tensorboard", logging_dir=tmp_path / "file")
