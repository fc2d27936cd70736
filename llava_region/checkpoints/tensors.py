"""Read and write checkpoints tensor by tensor: the weights of a model are never in memory together.

A checkpoint is a folder with `model.safetensors` or `pytorch_model.bin`, or with shards of either and their index, or
one such file by itself. `.bin` files are read with `weights_only`, so no code in them runs. Output is always
safetensors: the header holds only names, types and shapes, so it is written first and the tensors are streamed after it.
"""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from llava_region.errors import LlavaRegionError
from llava_region.files import read_json
from llava_region.progress import progress_bar
from llava_region.run_files import ADAPTER_CONFIG_FILE, WEIGHT_FILES, WEIGHTS_FILE, WEIGHTS_INDEX_FILE

STORED_DTYPES = {  # as the header of a safetensors file names them
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_CODES = {dtype: code for code, dtype in STORED_DTYPES.items()}
SHARD_BYTES = 5 * 10**9
# One read or write: calls of many MB were several times slower.
_IO_BYTES = 1 << 20
# Computed from the config: some checkpoints store it, some do not, loading ignores it.
NOT_TRAINED = "rotary_emb.inv_freq"
_AGAIN = "copy or download the checkpoint again"
# A mapped .bin file counts as resident where it was read; after this many bytes it is mapped anew.
_MAPPED_BYTES = 1 << 26


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file: `shape` elements of `dtype`, `nbytes` bytes from byte `start` of `file`."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def load(self) -> torch.Tensor:
        """The tensor, in memory of its own."""
        buffer = torch.empty(self.nbytes, dtype=torch.uint8)
        with self.file.open("rb", buffering=0) as f:
            f.seek(self.start)
            _read_into(f, buffer.numpy().data)
        return buffer.view(self.dtype).reshape(self.shape)


@dataclass(frozen=True)
class Computed:
    """A tensor that `load` makes when it is its turn to be written."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


Entry = Stored | Computed


class Checkpoint(Mapping[str, Entry]):
    """The tensors of a checkpoint by name, as `Stored` or `Computed`: shapes and dtypes are known, nothing is loaded.

    Iteration is shard by shard. `tensor(name)` loads one.

    Args:
        path: a model folder, or one `.safetensors` or `.bin` file.

    Raises:
        LlavaRegionError: not a checkpoint; index and shards do not agree on which tensor is where; a file is truncated or damaged;
            or a `.bin` holds more than tensors.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.shards: dict[Path, list[str]] = {}
        self._entries: dict[str, Entry] = {}
        files = weight_files(self.path)
        for file in files:
            entries = _read_safetensors(file) if file.suffix == ".safetensors" else _read_bin(file)
            for name in entries:
                if name in self._entries:
                    raise LlavaRegionError(f"'{name}' is in two shards of {self.path}, one of them {file.name}; {_AGAIN}")
            self.shards[file] = list(entries)
            self._entries.update(entries)
        _check_index(self.path, self.shards)

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def tensor(self, name: str) -> torch.Tensor:
        """Load one tensor to CPU memory of its own, in its stored dtype.

        Raises:
            LlavaRegionError: there is no tensor of that name.
        """
        if name not in self._entries:
            raise LlavaRegionError(f"{self.path} holds no tensor '{name}'; give the checkpoint of another model")
        return self._entries[name].load()


def weight_files(path: Path) -> list[Path]:
    """The files that hold the weights of a model folder, in the index's order; of a file that file itself.

    Raises:
        LlavaRegionError: not a checkpoint, or a shard that the index names is missing.
    """
    if path.is_file():
        if path.suffix not in (".safetensors", ".bin"):
            raise LlavaRegionError(f"{path} is not a weights file; allowed: .safetensors or .bin")
        return [path]
    if not path.is_dir():
        raise LlavaRegionError(f"there is no folder {path}; give the folder of a model")
    found = next((path / name for name in WEIGHT_FILES if (path / name).is_file()), None)
    if found is None:
        if (path / ADAPTER_CONFIG_FILE).is_file():
            raise LlavaRegionError(f"{path} is a LoRA run, not a whole model; merge it with 'llava-region merge' first")
        raise LlavaRegionError(f"{path} is not a checkpoint: it holds none of {', '.join(WEIGHT_FILES)}")
    if found.suffix != ".json":
        return [found]
    files = [path / name for name in dict.fromkeys(_weight_map(found).values())]
    for file in files:
        if not file.is_file():
            raise LlavaRegionError(f"{found.name} of {path} names {file.name}, which is missing; {_AGAIN}")
    return files


def _weight_map(index: Path) -> dict[str, str]:
    """File by tensor, as an index of shards says it."""
    content = read_json(index)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not names:
        raise LlavaRegionError(f"{index} is not an index of shards; allowed: 'weight_map' from tensor names to files next to it")
    for name, file in names.items():
        if not isinstance(file, str) or file != Path(file).name or not file.endswith((".safetensors", ".bin")):
            raise LlavaRegionError(f"{index} has '{name}' in {file!r}; allowed: a .safetensors or .bin file next to it")
    return names


def _check_index(path: Path, shards: Mapping[Path, list[str]]) -> None:
    """Refuse shards that hold other tensors than the index names. Loading takes a tensor from the shard that the index names."""
    index = next((path / name for name in WEIGHT_FILES if (path / name).is_file()), path) if path.is_dir() else path
    if index.suffix != ".json":
        return
    named = _weight_map(index)
    found = {name: file.name for file, names in shards.items() for name in names}
    for name, file in named.items():
        if found.get(name) != file and not (name not in found and name.endswith(NOT_TRAINED)):
            where = f"is in {found[name]}" if name in found else "is in no shard"
            raise LlavaRegionError(f"{index} has '{name}' in {file}, but it {where}; {_AGAIN}")
    for name, file in found.items():
        if name not in named and not name.endswith(NOT_TRAINED):
            raise LlavaRegionError(f"{path / file} holds '{name}', which {index.name} does not name; {_AGAIN}")


def _read_safetensors(file: Path) -> dict[str, Stored]:
    try:
        with safe_open(file, framework="np"):  # "pt" would need as much memory as the file has bytes
            pass  # the library checks the header and that the file ends where the header says
        with file.open("rb") as f:
            size = int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(size), object_pairs_hook=_unique)
    except (SafetensorError, OSError, ValueError) as e:
        raise LlavaRegionError(f"{file} is truncated or not a safetensors file ({e}); copy or download it again") from e
    header.pop("__metadata__", None)
    unknown = sorted({spec["dtype"] for spec in header.values()} - set(STORED_DTYPES))
    if unknown:
        raise LlavaRegionError(f"{file} holds tensors of type {unknown[0]}; allowed: {', '.join(STORED_DTYPES)}")
    specs = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    return {
        name: Stored(file, STORED_DTYPES[spec["dtype"]], tuple(spec["shape"]), 8 + size + spec["data_offsets"][0]) for name, spec in specs
    }


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of the header; the library takes the last of two tensors with one name."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"its header names '{next(name for name in names if names.count(name) > 1)}' twice")
    return found


def _read_bin(file: Path) -> dict[str, Computed]:
    tensors = _load_bin(file)
    mapped = _MappedBin(file)

    def entry(name: str) -> Computed:
        return Computed(tensors[name].dtype, tuple(tensors[name].shape), lambda: mapped.tensor(name))

    return {name: entry(name) for name in tensors}


class _MappedBin:
    """A `.bin` file, mapped while it is read and mapped anew every `_MAPPED_BYTES`."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._tensors: dict[str, torch.Tensor] = {}
        self._read = 0

    def tensor(self, name: str) -> torch.Tensor:
        if not self._tensors or self._read > _MAPPED_BYTES:
            self._tensors, self._read = {}, 0
            self._tensors = _load_bin(self.file)
        tensor = self._tensors[name]
        self._read += tensor.nbytes
        return tensor.clone(memory_format=torch.contiguous_format)


# What `load_mapped` raises for a file that is damaged, or holds more than tensors.
UNREADABLE = (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, LookupError, AttributeError)


def load_mapped(file: Path) -> Any:
    """The content of a `.bin` file, of which no code is run, mapped where its format can be."""
    # the format before torch 1.6 is no zip file and cannot be mapped; torch 2.1 maps a file that is named by a string, not a Path
    return torch.load(str(file), map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))


def _load_bin(file: Path) -> dict[str, torch.Tensor]:
    try:
        tensors = load_mapped(file)
    except UNREADABLE as e:
        raise LlavaRegionError(
            f"{file} is damaged or holds more than tensors (torch.load with weights_only refuses it, no code of it was run); "
            "give a file of plain weights"
        ) from e
    if not isinstance(tensors, Mapping) or not all(
        isinstance(name, str) and isinstance(t, torch.Tensor) and t.layout == torch.strided for name, t in tensors.items()
    ):
        raise LlavaRegionError(f"{file} is not a file of named, dense tensors; give a file of plain weights")
    return dict(tensors)


def refuse_not_finite(tensor: torch.Tensor, name: str, where: object, hint: str) -> torch.Tensor:
    """The tensor itself, every number of which is finite.

    Args:
        name: how to call it in the message, `where` with the file or folder it comes from and `hint` with the way out.

    Raises:
        LlavaRegionError: it holds NaN or infinity.
    """
    if tensor.dtype.is_floating_point and tensor.numel():
        # the ends of the range carry NaN too, and cost a thirtieth of `isfinite` of all
        ends = torch.stack(torch.aminmax(tensor if _has_range(tensor.dtype) else tensor.float()))
        if not torch.isfinite(ends).all():
            raise LlavaRegionError(f"'{name}' {where} holds NaN or infinity; {hint}")
    return tensor


@cache
def _has_range(dtype: torch.dtype) -> bool:
    """Whether torch finds the smallest and largest number of this type on CPU: never of 8 bits, and of fp16 from 2.2 on."""
    try:
        torch.aminmax(torch.zeros(1, dtype=dtype))
    except RuntimeError:
        return False
    return True


def name_in_backbone(name: str, backbone: Mapping[str, Any]) -> str | None:
    """The name under which a LLM backbone holds a LLaVA or Bunny tensor, or None.

    Names are the same, but a backbone that was saved without its language modelling head lacks the first part.
    """
    headless = name.partition(".")[2]
    return name if name in backbone else headless if headless in backbone else None


def write_checkpoint(folder: Path, tensors: Mapping[str, Entry], *, shard_bytes: int = SHARD_BYTES, description: str = "writing") -> int:
    """Write tensors as safetensors under `folder`, in order, with an index where there are several shards.

    Tensors that are `Stored` are copied byte for byte; `Computed` ones are made one at a time.

    Args:
        folder: an existing folder.
        shard_bytes: no shard is larger, unless one tensor is.

    Returns:
        Bytes of all tensors.

    Raises:
        LlavaRegionError: the disk is full or cannot be written.
    """
    total = sum(entry.nbytes for entry in tensors.values())
    if shutil.disk_usage(folder).free < total:
        raise LlavaRegionError(
            f"{folder.parent} has less than the {total / 1e9:.1f} GB free that the output takes; give --out on another disk"
        )
    shards = _plan_shards(tensors, shard_bytes)
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else [WEIGHTS_FILE]
    try:
        with progress_bar(description, len(tensors)) as advance:
            for name, shard in zip(names, shards, strict=True):
                _write_safetensors(folder / name, shard, advance)
        if len(shards) > 1:
            weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (folder / WEIGHTS_INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    except OSError as e:
        raise LlavaRegionError(f"cannot write {folder.parent}: {e.strerror or e}") from e
    return total


def _plan_shards(tensors: Mapping[str, Entry], shard_bytes: int) -> list[dict[str, Entry]]:
    shards: list[dict[str, Entry]] = [{}]
    size = 0
    for name, entry in tensors.items():
        if shards[-1] and size + entry.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = entry
        size += entry.nbytes
    return shards


def _write_safetensors(path: Path, tensors: dict[str, Entry], advance: Callable[[], None]) -> None:
    # wide types first, as the safetensors library does: every tensor then starts at a multiple of its element size
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    header: dict = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, entry in ordered:
        start, end = end, end + entry.nbytes
        header[name] = {"dtype": _CODES[entry.dtype], "shape": list(entry.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as f:
        _write_all(f, memoryview(len(text).to_bytes(8, "little") + text))
        for name, entry in ordered:
            _write_entry(entry, name, f)
            advance()


def _write_entry(entry: Entry, name: str, out: FileIO) -> None:
    if isinstance(entry, Stored):
        _copy_bytes(entry, out)
        return
    tensor = entry.load()
    if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
        raise LlavaRegionError(f"'{name}' came out as {tensor.dtype} {tuple(tensor.shape)}, planned was {entry.dtype} {entry.shape}")
    _write_all(out, tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _copy_bytes(entry: Stored, out: FileIO) -> None:
    left = entry.nbytes
    with entry.file.open("rb", buffering=0) as f:
        f.seek(entry.start)
        try:
            while left and (count := os.copy_file_range(f.fileno(), out.fileno(), left)):
                left -= count
        except (AttributeError, OSError) as e:  # not Linux, or not between these two filesystems: by hand from where it stopped
            if getattr(e, "errno", errno.EXDEV) not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
                raise
        buffer = memoryview(bytearray(min(_IO_BYTES, left)))
        while left:
            part = buffer[: min(left, len(buffer))]
            _read_into(f, part)
            _write_all(out, part)
            left -= len(part)


def _read_into(file: FileIO, view: memoryview) -> None:
    while view:
        count = file.readinto(view[:_IO_BYTES])
        if not count:
            raise LlavaRegionError(f"{file.name} ended early while it was read; copy or download it again")
        view = view[count:]


def _write_all(file: FileIO, view: memoryview) -> None:
    while view:
        view = view[os.write(file.fileno(), view[:_IO_BYTES]) :]
