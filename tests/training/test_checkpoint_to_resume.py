"""Which checkpoints of a run may be resumed."""

import json

import pytest

from llava_region import LlavaRegionError, Region
from llava_region.training.checkpoint_to_resume import check_asked, check_resumable, checkpoints
from llava_region.training.resume import missing_random_states

REGION = Region((1, 6), 8, "1,6")
PLAIN = ("trainer_state.json", "optimizer.pt", "scheduler.pt")
LORA = (*PLAIN, "adapter_model.safetensors", "non_lora_trainables.bin")


def write_checkpoint(run, number=2, files=LORA, mode="lora"):
    """A checkpoint of empty files, but for its region."""
    folder = run / f"checkpoint-{number}"
    folder.mkdir(parents=True)
    for name in files:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    (folder / "region.json").write_text(json.dumps({**REGION.to_dict(), "mode": mode}))
    return folder


def test_checkpoints_go_by_number(tmp_path):
    for name in ("checkpoint-10", "checkpoint-9", "checkpoint-x", "tmp-checkpoint-11"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]


@pytest.mark.parametrize("missing", LORA)
def test_a_lora_checkpoint_is_whole_or_refused(tmp_path, missing):
    folder = write_checkpoint(tmp_path / "whole")
    assert check_resumable(tmp_path / "whole", REGION, True, False) == folder
    write_checkpoint(tmp_path / "run", files=[name for name in LORA if name != missing])
    with pytest.raises(LlavaRegionError, match=f"checkpoint-2 lacks {missing}, .* remove that checkpoint to resume from the one before"):
        check_resumable(tmp_path / "run", REGION, True, False)


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"])
def test_a_full_checkpoint_holds_its_weights(tmp_path, name):
    write_checkpoint(tmp_path / "run", files=PLAIN, mode="full")
    with pytest.raises(LlavaRegionError, match=r"lacks model\.safetensors"):
        check_resumable(tmp_path / "run", REGION, False, False)
    (tmp_path / "run" / "checkpoint-2" / name).touch()
    assert check_resumable(tmp_path / "run", REGION, False, False)


def test_a_checkpoint_of_deepspeed_holds_the_folder_that_latest_names(tmp_path):
    folder = write_checkpoint(tmp_path, files=("trainer_state.json", "scheduler.pt", "global_step1/states.pt"))
    with pytest.raises(LlavaRegionError, match="lacks latest"):
        check_resumable(tmp_path, REGION, True, True)
    (folder / "latest").write_text("global_step2")
    with pytest.raises(LlavaRegionError, match="lacks global_step2"):
        check_resumable(tmp_path, REGION, True, True)
    (folder / "latest").write_text("global_step1\n")
    assert check_resumable(tmp_path, REGION, True, True) == folder
    # without DeepSpeed its states would silently not be read
    with pytest.raises(LlavaRegionError, match=r"lacks optimizer\.pt"):
        check_resumable(tmp_path, REGION, True, False)


def test_only_the_checkpoint_that_is_resumed_from_may_be_asked_for(tmp_path, monkeypatch):
    first, last = (write_checkpoint(tmp_path / "run", number) for number in (1, 2))
    monkeypatch.chdir(tmp_path)
    for asked in (None, str(last), "run/checkpoint-2", "run/checkpoint-2/"):
        check_asked(asked, last, "run")
    for asked in (str(first), "elsewhere/checkpoint-2", "checkpoint-2", "true", "False", ""):
        with pytest.raises(LlavaRegionError, match=r"cannot be followed: .* which is .*checkpoint-2; leave the flag out"):
            check_asked(asked, last, "run")
    with pytest.raises(LlavaRegionError, match="and run holds none"):
        check_asked(str(first), None, "run")


def test_missing_random_states(tmp_path):
    assert missing_random_states(tmp_path, 0, 1) == ["epoch_rng_state.pth", "rng_state.pth"]
    for name in ("epoch_rng_state.pth", "rng_state_0.pth"):
        (tmp_path / name).touch()
    assert missing_random_states(tmp_path, 0, 2) == []
    assert missing_random_states(tmp_path, 1, 2) == ["rng_state_1.pth"]
