"""Whether a scores file is of the model that is to be pruned.

A LoRA run may be scored as it is and merged later, or merged on the way: its scores are those of every merge onto the same base.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from llava_region.checkpoints.identity import read_merge_record, weights_digest
from llava_region.checkpoints.model_source import ModelLike, ModelSource
from llava_region.errors import LlavaRegionError
from llava_region.files import read_json
from llava_region.run_files import ADAPTER_CONFIG_FILE

_TOLD_BY_TIMES = "0.1.0"  # this version told a model by the times of its files


class _Identity(NamedTuple):
    """A digest of weights, and that of the base under a LoRA run; None: whatever the base, or it is not known."""

    digest: str
    base: str | None = None

    def is_other_base_of(self, other: _Identity) -> bool:
        return self.digest == other.digest and None not in (self.base, other.base) and self.base != other.base


def check_scored_model(scores: str | Path, model: ModelSource, merged: dict[str, str] | None) -> list[str]:
    """Refuse scores of another model.

    Args:
        scores: a file that `read_scores` accepts.
        model: the model or LoRA run to be pruned.
        merged: for a LoRA run, the `merge_record` of the merge that is on the way.

    Returns:
        Remarks for the user: a file that says nothing of its model can be used, but not checked.

    Raises:
        LlavaRegionError: the scores are of another model, or of the run on another base.
    """
    data = read_json(scores)
    run = _merged_run(model)
    scored = _scored(data, [model, *([run] if run else [])])
    if not scored:
        return [f"{scores} does not say of which model it is in a way that can be checked: it is taken to be of {model}"]
    own = _identities(model, merged)
    if any(a.digest == b.digest and not a.is_other_base_of(b) for a in scored for b in own):
        return []
    folder = data["model"].get("folder")
    if any(a.is_other_base_of(b) for a in scored for b in own):
        raise LlavaRegionError(
            f"{scores} is of the LoRA run on another base than {model} is merged onto; score it with --base as for merging"
        )
    if run and len(own) == 1 and Path(str(folder)).name == Path(run).name:
        return [f"{model} was merged from {run}, which is not there: {scores} is of a run of that name, but this cannot be checked"]
    raise LlavaRegionError(
        f"{scores} is of another model ({folder}), not of {model}; write one with 'llava-region score' for this model, "
        "or name the layers with --layers"
    )


def _identities(model: ModelSource, merged: dict[str, str] | None) -> list[_Identity]:
    """Under which identities a model may have been scored: itself, and the run that it was merged from."""
    if merged:
        return [_Identity(merged["fingerprint"], merged["base_fingerprint"])]
    itself, record, run = _Identity(weights_digest(model)), read_merge_record(model), _merged_run(model)
    if record:
        return [itself, _Identity(record["fingerprint"], record["base_fingerprint"])]
    digest = _digest_of(run) if run else None
    return [itself, _Identity(digest)] if digest else [itself]


def _merged_run(model: ModelSource) -> str | None:
    """The run that a model was merged from, as its `region.json` names it; None where the weights were changed afterwards."""
    region = model.region
    merged = region.get("merged_from") if isinstance(region, dict) and not {"reverted", "pruned"} & set(region) else None
    run = merged.get("run") if isinstance(merged, dict) else None
    return run if isinstance(run, str) else None


def _digest_of(folder: str) -> str | None:
    try:
        return weights_digest(folder)
    except LlavaRegionError:  # it is gone, or no model any more
        return None


def _scored(data: dict[str, Any], places: Iterable[ModelLike]) -> list[_Identity]:
    """The identities of the model that a scores file is of; none where the file does not tell.

    Args:
        data: the file's content.
        places: where the model of a file of 0.1.0 may lie besides the folder that the file names.
    """
    model, base = _entry(data, "model"), _entry(data, "base")
    if model is None:
        return []
    if data.get("llava_region_version") == _TOLD_BY_TIMES:
        digest = _unchanged(model, places)
        return [_Identity(digest, _unchanged(base, ()) if base else None)] if digest else []
    merged = _entry(model, "merged_from")
    origin = [_Identity(merged["fingerprint"], merged.get("base_fingerprint"))] if merged else []
    return [_Identity(model["fingerprint"], base["fingerprint"] if base else None), *origin]


def _entry(data: dict[str, Any], key: str) -> dict[str, Any] | None:
    entry = data.get(key)
    return entry if isinstance(entry, dict) and isinstance(entry.get("fingerprint"), str) else None


def _unchanged(entry: dict[str, Any], places: Iterable[ModelLike]) -> str | None:
    """The digest of the model that 0.1.0 scored, if it still lies in one of these places as it did then."""
    for place in (*places, entry.get("folder")):
        if place and Path(str(place)).is_dir() and _by_times(ModelSource.of(place)) == entry["fingerprint"]:
            return weights_digest(place)
    return None


def _by_times(model: ModelSource) -> str | None:
    """The fingerprint that 0.1.0 wrote: config, and names, sizes and times of the weights."""
    try:
        digest = hashlib.sha256(model.config_bytes)
    except LlavaRegionError:  # the folder is no model any more
        return None
    path = model.path
    for file in sorted([*path.glob("*.safetensors"), *path.glob("*.bin"), *path.glob(ADAPTER_CONFIG_FILE)]):
        status = file.stat()
        digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()
