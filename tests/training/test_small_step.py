"""The rehearsal of a dry run: upstream's own train() on a miniature, with records of the data."""

from argparse import Namespace

import pytest

pytest.importorskip("llava.train.train")
pytest.importorskip("deepspeed")

from llava_region import LlavaRegionError, upstreams
from llava_region.data.training_data import Survey
from llava_region.train import main
from llava_region.training import preflight
from llava_region.training.small_step import RECORDS, choose, rehearse
from tests.helpers.command_line import refused, run
from tests.helpers.sparse_models import write_sparse_llama
from tests.helpers.training_runs import LORA, llava_flags, write_zero3

DONE = "4 records of the data through LLaVA's train() on a miniature (2 decoder layers, random weights, CPU): 2 steps, loss "


def command(tiny, tmp_path, **flags) -> list[str]:
    return ["llava", *llava_flags(tiny, tmp_path / "run", **{"dry_run": True, **flags}), "--tune_layers", "1,6"]


@pytest.mark.parametrize("mode", ["lora", "full", "lora-bf16-zero3", "fp16", "continued"])
def test_what_trains_is_rehearsed(tiny, llava_checkpoint, tmp_path, capsys, mode):
    flags = {
        "lora": LORA,
        "full": {"mm_use_im_patch_token": True, "lora_enable": False},
        # what is for GPUs and many processes is left out; the dry run itself is for those
        "lora-bf16-zero3": {**LORA, "bf16": True, "tf32": True, "use_cpu": None, "deepspeed": write_zero3(tmp_path), "max_steps": None},
        "fp16": {**LORA, "bf16": None, "fp16": True, "use_cpu": None},
        "continued": {**LORA, "model_name_or_path": llava_checkpoint},
    }[mode]
    code, out, _ = run(capsys, *command(tiny, tmp_path, **flags), main=main)
    assert code == 0 and out.splitlines()[-1].startswith("rehearsal") and DONE in out
    assert not (tmp_path / "run").exists()


def test_what_reading_does_not_find(tiny, tmp_path, capsys):
    """Tracebacks of the trainer and of upstream, as one line."""
    line = refused(capsys, *command(tiny, tmp_path, use_ipex=True, **LORA), main=main)
    assert line.startswith("error: a rehearsal failed, as training would: 4 records of the data through LLaVA's train()")
    assert "ImportError: Using IPEX but IPEX is not installed" in line
    # a template that asks for an image, on records without one, whatever other checks say of them
    upstream = upstreams.get("llava")
    checked = preflight.check(upstream, command(tiny, tmp_path, **LORA)[1:])
    plain = checked._replace(args=Namespace(**{**vars(checked.args), "version": "plain"}))
    with pytest.raises(LlavaRegionError, match=r"AssertionError:  \(train.py, line \d+: assert"):
        rehearse(upstream, plain)


def test_it_can_be_left_out(tiny, tmp_path, capsys):
    code, out, _ = run(capsys, *command(tiny, tmp_path, dry_run_step=False, **LORA), main=main)
    assert code == 0 and "rehearsal" not in out


def test_shapes_of_large_models(tiny, tmp_path, capsys):
    """Grouped key-value heads, and a width that is not a multiple of what a miniature has."""
    shape = {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4}
    folder = write_sparse_llama(tmp_path / "model", tiny.backbone, vocab_size=32000, num_hidden_layers=8, **shape)
    flags = {**LORA, "model_name_or_path": folder, "gradient_checkpointing": False}
    code, out, _ = run(capsys, *command(tiny, tmp_path, **flags), main=main)
    assert code == 0 and DONE in out


def test_paths_that_tell_upstream_something(tiny, tmp_path, capsys, monkeypatch):
    """A temporary folder with 'mpt' in its path."""
    folder = tmp_path / "prompts"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    code, out, _ = run(capsys, *command(tiny, tmp_path, **LORA), main=main)
    assert code == 0 and DONE in out and not list(folder.iterdir())


def test_what_cannot_run_is_said(tiny, tmp_path, capsys, monkeypatch):
    """A process that does not come to train(), such as where a package cannot be imported without a GPU."""
    broken = tmp_path / "broken" / "llava" / "train"
    broken.mkdir(parents=True)
    for package in (broken.parent, broken):
        (package / "__init__.py").write_text("")
    (broken / "train.py").write_text("raise ImportError('needs a GPU')")
    monkeypatch.syspath_prepend(str(tmp_path / "broken"))
    code, out, _ = run(capsys, *command(tiny, tmp_path, **LORA), main=main)
    assert code == 0 and "not run: UnsupportedUpstream: cannot import llava.train.train of LLaVA: needs a GPU" in out


def test_it_is_one_process_wherever_the_dry_run_is_started(tiny, tmp_path, monkeypatch):
    upstream = upstreams.get("llava")
    checked = preflight.check(upstream, command(tiny, tmp_path, **LORA)[1:])
    ranks = {"RANK": "3", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    line = rehearse(upstream, checked)
    assert line is not None and DONE in line


def test_which_records():
    def survey(count):
        found = Survey()
        for i in range(count):
            found.add({"conversations": [{"value": "x" * (i + 1)}], **({"image": "a"} if i % 50 == 7 else {})})
        return found

    chosen = choose(survey(100))
    assert len(chosen) == RECORDS == len(set(chosen)) and chosen[0] == 99 and chosen == choose(survey(100))
    assert 7 in chosen and any(number % 50 != 7 for number in chosen)
    assert choose(survey(1)) == [0] and sorted(choose(survey(2))) == [0, 1]
