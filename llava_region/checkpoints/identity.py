"""Tell whether two folders hold the same model, wherever they lie and whenever they were written."""

from __future__ import annotations

import hashlib
import io
from typing import Any

from llava_region.checkpoints.model_source import ModelLike, ModelSource
from llava_region.errors import LlavaRegionError
from llava_region.files import read_json
from llava_region.run_files import ADAPTER_CONFIG_FILE, CONFIG_FILE, MERGED_FROM_FILE, TRAINER_BIN_FILES

_SAMPLES, _SAMPLE_BYTES = 64, 4096


def weights_digest(*models: ModelLike) -> str:
    """A digest of the config and of samples of every weights file, 256 KB of each, of a model (and its base).

    Raises:
        LlavaRegionError: one of them is not a model.
    """
    digest = hashlib.sha256()
    for source in map(ModelSource.of, models):
        read = {CONFIG_FILE: source.config_bytes}
        if source.kind == "adapter":
            read[ADAPTER_CONFIG_FILE] = source.adapter_config_bytes
        files = [*source.path.glob("*.safetensors"), *source.path.glob("*.bin")]
        names = {file.name for file in files} - set(TRAINER_BIN_FILES)
        for name in sorted(names | set(read)):
            with io.BytesIO(read[name]) if name in read else (source.path / name).open("rb") as file:
                size = file.seek(0, io.SEEK_END)
                digest.update(f"{name} {size}".encode())
                for sample in range(_SAMPLES):
                    file.seek(max(0, size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                    digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def merge_record(run: ModelLike, base: ModelLike) -> dict[str, str]:
    """What `merged_from.json` of a merged model says: where its run and base lay, and their digests.

    Raises:
        LlavaRegionError: one of them is not a model.
    """
    return {"run": str(run), "fingerprint": weights_digest(run), "base": str(base), "base_fingerprint": weights_digest(base)}


def read_merge_record(model: ModelSource) -> dict[str, Any] | None:
    """`merged_from.json` of a model; None where it was not merged, or by 0.1.0, which wrote none.

    Raises:
        LlavaRegionError: the file is malformed.
    """
    file = model.path / MERGED_FROM_FILE
    if not file.is_file():
        return None
    record = read_json(file)
    if not isinstance(record, dict) or not all(isinstance(record.get(key), str) for key in ("fingerprint", "base_fingerprint")):
        raise LlavaRegionError(f"{file} does not hold the texts 'fingerprint' and 'base_fingerprint'; merge again, or remove the file")
    return record
