"""`prune` takes scores of the model that it prunes, wherever this lies and whether it was scored merged or not, and of no other."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from llava_region.errors import LlavaRegionError
from llava_region.scores.score import Options, score
from llava_region.surgery.merge import merge
from llava_region.surgery.prune import prune
from llava_region.surgery.revert import revert
from tests.helpers.finished_models import write_lora_run

pytest.importorskip("llava.model")
OTHER = "is of another model"


@pytest.fixture(scope="module")
def made(tiny, lora_run, tmp_path_factory) -> Path:
    """A run's merge, two more runs (one without region.json), and another base of the same shape. Never write into it."""
    folder = tmp_path_factory.mktemp("scored")
    merge(lora_run, folder / "merged", tiny.backbone)
    write_lora_run(tiny, folder / "other-lora", layers=(1, 5))
    merge(folder / "other-lora", folder / "other-merged", tiny.backbone)
    plain = Path(shutil.copytree(lora_run, folder / "plain-lora"))
    (plain / "region.json").unlink()
    config = json.loads((plain / "config.json").read_text())
    del config["visual_region"]
    (plain / "config.json").write_text(json.dumps(config))
    merge(plain, folder / "plain-merged", tiny.backbone)
    base = Path(shutil.copytree(tiny.backbone, folder / "other-base"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "rope_theta": 50000.0}))
    return folder


def scores_of(model: Path, tiny, out: Path, base: Path | None = None) -> Path:
    options = Options(metrics=("angular_distance",), image_folder=tiny.images, limit=2, base=str(base) if base else None)
    score(model, [tiny.data], out, options)
    return out


def drop_one(model: Path, scores: Path, base: Path | None = None) -> list[str]:
    """The remarks of pruning by these scores."""
    report = prune(model, scores.parent / "out", drop=1, scores=scores, base=base, protect="1,6", check=False, force=True)
    return report["remarks"]


def test_its_own_scores_wherever_it_lies(tiny, made, llava_checkpoint, tmp_path):
    for model in (made / "merged", llava_checkpoint):
        own = scores_of(model, tiny, tmp_path / f"{model.name}.json")
        assert drop_one(model, own) == []
        assert drop_one(Path(shutil.copytree(model, tmp_path / f"moved-{model.name}")), own) == []
    pruned = tmp_path / "out"
    assert not (pruned / "merged_from.json").exists()
    again = scores_of(pruned, tiny, tmp_path / "pruned.json")  # a pruned model is pruned further by scores of its own
    assert prune(pruned, tmp_path / "again", drop=1, scores=again, protect="none", check=False)["remarks"] == []


@pytest.mark.parametrize("name", ["", "plain-"], ids=["region", "no-region"])
def test_the_scores_of_a_run_are_those_of_its_merge(tiny, made, lora_run, tmp_path, name):
    run, merged = made / "plain-lora" if name else lora_run, made / f"{name}merged"
    unmerged = scores_of(run, tiny, tmp_path / "unmerged.json", tiny.backbone)
    assert drop_one(merged, unmerged) == [] and drop_one(run, unmerged, tiny.backbone) == []
    moved = Path(shutil.copytree(merged, tmp_path / "moved"))
    assert drop_one(moved, unmerged) == []
    assert drop_one(run, scores_of(moved, tiny, tmp_path / "merged.json"), tiny.backbone) == []
    record = json.loads((merged / "merged_from.json").read_text())
    assert (record["run"], record["base"]) == (str(run), str(tiny.backbone))


def test_scores_of_another_model_are_refused(tiny, made, lora_run, llava_checkpoint, tmp_path):
    others = (scores_of(llava_checkpoint, tiny, tmp_path / "a.json"), scores_of(made / "other-merged", tiny, tmp_path / "b.json"),
              scores_of(made / "other-lora", tiny, tmp_path / "c.json", tiny.backbone))  # fmt: skip
    for scores in others:
        for model, base in ((made / "merged", None), (lora_run, tiny.backbone), (made / "plain-merged", None)):
            with pytest.raises(LlavaRegionError, match=rf"{OTHER} .*--layers"):
                drop_one(model, scores, base)
    with pytest.raises(LlavaRegionError, match=OTHER):
        drop_one(llava_checkpoint, scores_of(made / "merged", tiny, tmp_path / "d.json"))
    assert not (tmp_path / "out").exists()


def test_the_run_on_another_base_is_another_model(tiny, made, lora_run, tmp_path):
    scores = scores_of(lora_run, tiny, tmp_path / "s.json", made / "other-base")
    for model, base in ((made / "merged", None), (lora_run, tiny.backbone)):
        with pytest.raises(LlavaRegionError, match=r"on another base .*--base"):
            drop_one(model, scores, base)
    assert drop_one(lora_run, scores, made / "other-base") == []


def test_a_reverted_model_is_another_model(tiny, made, lora_run, tmp_path):
    revert(made / "merged", tiny.backbone, "6", tmp_path / "reverted")
    assert not (tmp_path / "reverted/merged_from.json").exists()
    for scores in (scores_of(made / "merged", tiny, tmp_path / "a.json"), scores_of(lora_run, tiny, tmp_path / "b.json", tiny.backbone)):
        with pytest.raises(LlavaRegionError, match=OTHER):
            drop_one(tmp_path / "reverted", scores)


def by_times(folder: Path) -> dict[str, str]:
    """How 0.1.0 told a model."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin"), *folder.glob("adapter_config.json")]):
        digest.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}\n".encode())
    return {"folder": str(folder), "fingerprint": digest.hexdigest()}


def old_scores(file: Path, model: Path, base: Path | None = None) -> Path:
    """A scores file as 0.1.0 wrote it."""
    metrics = {"angular_distance": {"scores": [0.1 * i for i in range(8)]}}
    entries = {"model": by_times(model), "base": by_times(base) if base else None, "metrics": metrics}
    file.write_text(json.dumps({"num_layers": 8, **entries, "llava_region_version": "0.1.0"}))
    return file


def test_scores_of_0_1_0_are_compared_where_they_can_be(tiny, made, lora_run, tmp_path):
    own, run = old_scores(tmp_path / "own.json", made / "merged"), old_scores(tmp_path / "run.json", lora_run, tiny.backbone)
    moved = Path(shutil.copytree(made / "merged", tmp_path / "moved"))
    for model in (made / "merged", moved):
        assert drop_one(model, own) == drop_one(model, run) == []
    assert drop_one(lora_run, run, tiny.backbone) == []
    for other in (old_scores(tmp_path / "a.json", made / "other-merged"), old_scores(tmp_path / "b.json", made / "other-lora")):
        with pytest.raises(LlavaRegionError, match=OTHER):
            drop_one(moved, other)
    shutil.rmtree(copy := Path(shutil.copytree(made / "merged", tmp_path / "scored-then-removed")))
    gone = old_scores(tmp_path / "gone.json", made / "merged")
    data = json.loads(gone.read_text())
    gone.write_text(json.dumps({**data, "model": {**data["model"], "folder": str(copy), "fingerprint": "0" * 64}}))
    assert "does not say of which model" in drop_one(moved, gone)[0]


def merged_by_0_1_0(merged: Path, folder: Path, run: Path) -> Path:
    shutil.copytree(merged, folder)
    (folder / "merged_from.json").unlink()
    region = json.loads((folder / "region.json").read_text())
    (folder / "region.json").write_text(json.dumps({**region, "merged_from": {**region["merged_from"], "run": str(run)}}))
    return folder


def test_a_model_that_0_1_0_merged(tiny, made, lora_run, tmp_path):
    scores = scores_of(lora_run, tiny, tmp_path / "s.json", tiny.backbone)
    other = scores_of(made / "other-lora", tiny, tmp_path / "o.json", tiny.backbone)
    there = merged_by_0_1_0(made / "merged", tmp_path / "there", lora_run)
    assert drop_one(there, scores) == []
    gone = merged_by_0_1_0(made / "merged", tmp_path / "gone", Path("elsewhere") / lora_run.name)
    assert "cannot be checked" in drop_one(gone, scores)[0]
    for model in (there, gone):
        with pytest.raises(LlavaRegionError, match=OTHER):
            drop_one(model, other)


@pytest.mark.parametrize("model", [None, "text", {"folder": "f"}, {"folder": "f", "fingerprint": 7}], ids=["none", "text", "less", "int"])
def test_a_file_without_an_identity_is_used_and_says_so(made, tmp_path, model):
    file = tmp_path / "s.json"
    file.write_text(json.dumps({"model": model, "metrics": {"angular_distance": {"scores": [0.1] * 8}}}))
    assert "does not say of which model" in drop_one(made / "merged", file)[0]


def test_a_damaged_record_of_a_merge_is_named(tiny, made, tmp_path):
    scores = scores_of(made / "merged", tiny, tmp_path / "s.json")
    model = Path(shutil.copytree(made / "merged", tmp_path / "model"))
    (model / "merged_from.json").write_text('{"fingerprint": 3}')
    with pytest.raises(LlavaRegionError, match=r"merged_from.json does not hold the texts"):
        drop_one(model, scores)
