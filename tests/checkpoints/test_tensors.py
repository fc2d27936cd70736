"""Checkpoints are read lazily and exactly, written in a stream, and refused when broken."""

import errno
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_region.checkpoints.tensors import Checkpoint, Computed, name_in_backbone, refuse_not_finite, write_checkpoint
from llava_region.errors import LlavaRegionError


def tensors() -> dict[str, torch.Tensor]:
    """Odd sizes and mixed types, so that a wrong offset or alignment shows."""
    torch.manual_seed(0)
    return {
        "a.half": torch.randn(3, 5).half(),
        "b.bytes": torch.arange(7, dtype=torch.uint8),
        "c.float": torch.randn(4, 3),
        "d.bfloat": torch.randn(9).bfloat16(),
        "e.scalar": torch.tensor(2.5),
        "f.empty": torch.empty(0, 4),
        "g.bool": torch.tensor([True, False, True]),
        "h.int": torch.tensor([[1, -2], [3, 4]]),
    }


def write_folder(folder: Path, kind: str) -> Path:
    folder.mkdir()
    data = tensors()
    halves = [dict(list(data.items())[:4]), dict(list(data.items())[4:])]
    save, suffix, stem = (save_file, "safetensors", "model") if kind.startswith("safetensors") else (torch.save, "bin", "pytorch_model")
    if not kind.endswith("sharded"):
        save(data, folder / f"{stem}.{suffix}")
        return folder
    names = [f"{stem}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    for name, half in zip(names, halves, strict=True):
        save(half, folder / name)
    weight_map = {key: name for name, half in zip(names, halves, strict=True) for key in half}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("kind", ["safetensors", "safetensors-sharded", "bin", "bin-sharded"])
def test_reads_every_kind_exactly(tmp_path, kind):
    checkpoint = Checkpoint(write_folder(tmp_path / "m", kind))
    expected = tensors()
    assert set(checkpoint) == set(expected) and len(checkpoint.shards) == (2 if kind.endswith("sharded") else 1)
    for name, tensor in expected.items():
        assert checkpoint[name].dtype == tensor.dtype and checkpoint[name].shape == tuple(tensor.shape)
        assert checkpoint[name].nbytes == tensor.nbytes
        assert torch.equal(checkpoint.tensor(name), tensor)
    assert [name for names in checkpoint.shards.values() for name in names] == list(checkpoint)
    with pytest.raises(LlavaRegionError, match="holds no tensor 'x'"):
        checkpoint.tensor("x")


def test_a_mapped_file_is_named_by_a_string(tmp_path, monkeypatch):
    """torch 2.1 refuses a Path there."""
    load, mapped = torch.load, []
    monkeypatch.setattr(torch, "load", lambda file, **options: mapped.append((type(file), options["mmap"])) or load(file, **options))
    checkpoint = Checkpoint(write_folder(tmp_path / "m", "bin"))
    assert torch.equal(checkpoint.tensor("a.half"), tensors()["a.half"])
    assert mapped == [(str, True)] * 2


@pytest.mark.parametrize("kind", ["safetensors", "bin-sharded"])
@pytest.mark.parametrize("shard_bytes", [10**9, 60])
def test_writes_what_the_safetensors_library_reads(tmp_path, kind, shard_bytes):
    checkpoint = Checkpoint(write_folder(tmp_path / "m", kind))
    out = tmp_path / "out"
    out.mkdir()
    computed = {"z.computed": Computed(torch.float16, (2, 3), lambda: torch.ones(3, 2).half().T)}
    expected = {**tensors(), "z.computed": torch.ones(2, 3).half()}
    assert write_checkpoint(out, {**checkpoint, **computed}, shard_bytes=shard_bytes) == sum(t.nbytes for t in expected.values())
    files = sorted(out.glob("*.safetensors"))
    assert len(files) == 1 if shard_bytes > 60 else len(files) > 2
    written = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert set(written) == set(expected)
    assert all(torch.equal(written[n], t) and written[n].dtype == t.dtype for n, t in expected.items())
    again = Checkpoint(out)
    assert all(torch.equal(again.tensor(n), t) for n, t in expected.items())
    assert all(entry.start % entry.dtype.itemsize == 0 for entry in again.values())  # readers that map the file need it
    if len(files) > 1:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(expected) and index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())
        assert all(sum(t.nbytes for t in load_file(f).values()) <= 60 for f in files)


@pytest.mark.parametrize("failure", ["EXDEV", "no such call", "copies nothing", "stops half-way"])
def test_copies_by_hand_where_the_kernel_cannot(tmp_path, monkeypatch, failure):
    def copy(source, target, count):
        if failure == "stops half-way" and count > 20:
            return os.write(target, os.read(source, 8))
        if failure in ("EXDEV", "stops half-way"):
            raise OSError(errno.EXDEV, "other filesystem")
        return 0

    monkeypatch.setattr("os.copy_file_range", copy)
    if failure == "no such call":
        monkeypatch.delattr("os.copy_file_range")
    monkeypatch.setattr("llava_region.checkpoints.tensors._IO_BYTES", 16)
    (tmp_path / "out").mkdir()
    write_checkpoint(tmp_path / "out", Checkpoint(write_folder(tmp_path / "m", "safetensors")))
    written = load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors().items())


def test_a_failing_disk_is_said_in_one_line(tmp_path, monkeypatch):
    def copy(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.copy_file_range", copy)
    with pytest.raises(LlavaRegionError, match=r"cannot write .*: No space left"):
        write_checkpoint(tmp_path, Checkpoint(write_folder(tmp_path / "m", "safetensors")))


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    checkpoint = Checkpoint(write_folder(tmp_path / "m", "safetensors"))
    file = tmp_path / "m/model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    (tmp_path / "out").mkdir()
    with pytest.raises(LlavaRegionError, match="ended early"):
        write_checkpoint(tmp_path / "out", checkpoint)
    with pytest.raises(LlavaRegionError, match="ended early"):
        {name: checkpoint.tensor(name) for name in checkpoint}


def test_a_bin_file_is_mapped_again_and_still_right(tmp_path, monkeypatch):
    monkeypatch.setattr("llava_region.checkpoints.tensors._MAPPED_BYTES", 16)
    checkpoint = Checkpoint(write_folder(tmp_path / "m", "bin"))
    first = {name: checkpoint.tensor(name) for name in checkpoint}
    for name, tensor in tensors().items():
        assert torch.equal(first[name], tensor) and torch.equal(checkpoint.tensor(name), tensor)


def test_a_file_of_the_format_before_torch_1_6_is_read(tmp_path):
    torch.save({"a": torch.ones(3)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    assert torch.equal(Checkpoint(tmp_path / "old.bin").tensor("a"), torch.ones(3))


def test_a_planned_shape_is_kept_to(tmp_path):
    with pytest.raises(LlavaRegionError, match="planned was"):
        write_checkpoint(tmp_path, {"a": Computed(torch.float32, (2,), lambda: torch.ones(3))})


def test_a_full_disk_is_noticed_before_writing(tmp_path):
    with pytest.raises(LlavaRegionError, match="GB free"):
        write_checkpoint(tmp_path, {"a": Computed(torch.float32, (10**15,), lambda: torch.ones(1))})
    assert not list(tmp_path.iterdir())


def test_folders_that_are_no_checkpoint(tmp_path):
    with pytest.raises(LlavaRegionError, match="there is no folder"):
        Checkpoint(tmp_path / "none")
    with pytest.raises(LlavaRegionError, match="not a checkpoint"):
        Checkpoint(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(LlavaRegionError, match="not a weights file"):
        Checkpoint(tmp_path / "notes.txt")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(LlavaRegionError, match="is a LoRA run"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("kind", ["safetensors-sharded", "bin-sharded"])
def test_missing_shard_is_named(tmp_path, kind):
    folder = write_folder(tmp_path / "m", kind)
    shard = next(folder.glob("*00002*"))
    shard.unlink()
    with pytest.raises(LlavaRegionError, match=f"{shard.name}, which is missing"):
        Checkpoint(folder)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (["a"], "not an index of shards"),
        (None, "not an index of shards"),
        ({}, "not an index of shards"),
        ({"a": "../model.safetensors"}, "'a' in '../model.safetensors'; allowed: a .safetensors or .bin file next to it"),
        ({"a": "/model.safetensors"}, "'a' in '/model.safetensors'"),
        ({"a": 3}, "'a' in 3"),
        ({"a": ""}, "'a' in ''"),
        ({"a": "config.json"}, "'a' in 'config.json'"),
    ],
)
def test_malformed_index(tmp_path, weight_map, message):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(LlavaRegionError, match=message):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("kind", ["safetensors-sharded", "bin-sharded"])
def test_an_index_that_does_not_agree_with_its_shards(tmp_path, kind):
    folder = write_folder(tmp_path / "m", kind)
    index, first = next(folder.glob("*.index.json")), next(folder.glob("*00001-of*")).name
    whole = json.loads(index.read_text())["weight_map"]
    without = {name: file for name, file in whole.items() if name != "b.bytes"}
    for weight_map, message in (
        ({**whole, "x.none": first}, f"has 'x.none' in {first}, but it is in no shard"),
        ({**whole, "h.int": first}, f"has 'h.int' in {first}, but it is in .*00002"),
        (without, f"{first} holds 'b.bytes', which {index.name} does not name"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(LlavaRegionError, match=message):
            Checkpoint(folder)
    index.write_text(json.dumps({"weight_map": {**whole, "model.layers.0.self_attn.rotary_emb.inv_freq": first}}))
    assert set(Checkpoint(folder)) == set(tensors()), "what loading computes anew may be named or not"


@pytest.mark.parametrize("kind", ["safetensors-sharded", "bin-sharded"])
def test_a_tensor_in_two_shards(tmp_path, kind):
    folder = write_folder(tmp_path / "m", kind)
    second = next(folder.glob("*00002-of*"))
    save, load = (save_file, load_file) if kind.startswith("safe") else (torch.save, torch.load)
    save({**load(second), "a.half": torch.zeros(3, 5)}, second)
    with pytest.raises(LlavaRegionError, match=f"'a.half' is in two shards of .*{second.name}"):
        Checkpoint(folder)


def test_a_name_twice_in_a_header(tmp_path):
    spec = '{"dtype":"F32","shape":[2],"data_offsets":[%d,%d]}'
    header = f'{{"a":{spec % (0, 8)},"a":{spec % (8, 16)}}}'.encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(LlavaRegionError, match="truncated or not a safetensors file"):
        Checkpoint(tmp_path)
    header = f'{{"a":{spec % (0, 8)},"a":{spec % (0, 8)}}}'.encode()  # the library reads this one
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(LlavaRegionError, match="names 'a' twice"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_what_is_not_finite_is_named(dtype):
    fine = torch.full((7, 300), 5.0)
    fine[0, 0], fine[-1, -1] = 1024, -1024
    assert refuse_not_finite(fine.to(dtype), "w", "here", "do this").dtype == dtype
    for value in (float("nan"), float("inf"), -float("inf")):
        for place in ((0, 0), (3, 17), (6, 299)):
            spoiled = fine.clone()
            spoiled[place] = value
            with pytest.raises(LlavaRegionError, match=r"^'w' here holds NaN or infinity; do this$"):
                refuse_not_finite(spoiled.to(dtype), "w", "here", "do this")
    for other in (torch.tensor([1, 2]), torch.empty(0, 4), torch.tensor(2.0)):
        assert refuse_not_finite(other, "w", "here", "do this") is other


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("left", [0, 6, 40, -1])
def test_truncated_file(tmp_path, kind, left):
    file = next(write_folder(tmp_path / "m", kind).iterdir())
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(LlavaRegionError, match=r"truncated|damaged"):
        Checkpoint(file.parent)


class _Touch:
    """Unpickling this writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("form", ["zip", "old", "pickle"])
def test_no_code_of_a_bin_file_runs(tmp_path, form):
    trap, file = tmp_path / "ran", tmp_path / "pytorch_model.bin"
    data = {"a": torch.ones(1), "b": _Touch(trap)}
    if form == "pickle":
        file.write_bytes(pickle.dumps(data))
    else:
        torch.save(data, file, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(LlavaRegionError, match="no code of it was run"):
        Checkpoint(tmp_path)
    assert not trap.exists()


OTHER_THINGS = (
    [torch.ones(1)], {"epoch": 3}, {"model": {"a": torch.ones(1)}}, {0: torch.ones(1)}, {"a": torch.eye(2).to_sparse()},
)  # fmt: skip


def test_bin_files_of_other_things(tmp_path):
    for i, data in enumerate(OTHER_THINGS):
        file = tmp_path / f"{i}.bin"
        torch.save(data, file)
        with pytest.raises(LlavaRegionError, match="not a file of named, dense tensors"):
            Checkpoint(file)


def test_names_in_a_backbone():
    full, headless = {"model.layers.1.w": 0}, {"layers.1.w": 0}
    assert name_in_backbone("model.layers.1.w", full) == "model.layers.1.w"
    assert name_in_backbone("model.layers.1.w", headless) == "layers.1.w"
    assert name_in_backbone("model.layers.2.w", full) is None
