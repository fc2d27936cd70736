"""Which checkpoints of a run may be resumed."""

from llava_region.training.resumable import checkpoints


def test_checkpoints_go_by_number(tmp_path):
    for name in ("checkpoint-10", "checkpoint-9", "checkpoint-x", "tmp-checkpoint-11"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]
