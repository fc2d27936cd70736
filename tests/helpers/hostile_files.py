"""Files that no program should trip over: damaged, of another kind, in another encoding, endless, nested, of wrong types."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import random
import struct
import zipfile
from typing import Any

from PIL import Image

# What a value in a JSON file may be in place of the one that belongs there.
WRONG = (None, True, -1, 0, 10**30, 1.5, float("nan"), "", "x", "\ud800", "a\0b", [], [None], ["x", 1], {}, {"x": None})


def hostile_files() -> dict[str, bytes]:
    """Name -> content; the same in every run. None of them is a useful file of any kind."""
    chance = random.Random(11)
    record = {"id": "a", "image": "a.png", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    good = json.dumps([record] * 3)
    found: dict[str, bytes] = {
        "nested lists": b"[" * 100_000 + b"]" * 100_000,
        "nested objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        "nested without end": b"[" * 100_000,
        "nested in a record": b'[{"conversations": ' + b"[" * 100_000 + b"]" * 100_000 + b"}]",
        "empty": b"",
        "blank": b" \n\t\r\n" * 10,
        "zeros": bytes(4096),
        "a mark alone": b"\xef\xbb\xbf",
        "utf-16": good.encode("utf-16"),
        "utf-32": good.encode("utf-32"),
        "latin-1": good.replace('"q"', '"caf\xe9"').encode("latin-1"),
        "surrogate bytes": b'["\xed\xa0\x80"]',
        "cut": good[: len(good) // 2].encode(),
        "cut in a character": b'["caf\xc3',
        "trailing comma": b'[{"id": 1},]',
        "comments": b"[1, // one\n 2]",
        "single quotes": b"[{'id': 'a'}]",
        "python": b"[None, True]",
        "a long number": b"[" + b"9" * 10_000 + b"]",
        "a number too large": b"[1e999]",
        "not a number": b"[NaN, Infinity, -Infinity]",
        "control characters": b'["\x00\x01\x1b[31m"]',
        "yaml": b"model: x\nlayers:\n  - 1\n",
        "html": b"<!DOCTYPE html><html><title>404 Not Found</title></html>",
        "lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n",
        "csv": b"question_id,text\n1,a\n",
        "shell": b"#!/bin/sh\nexit 1\n",
        "gzip": gzip.compress(good.encode(), mtime=0),
        "gzip cut": gzip.compress(good.encode(), mtime=0)[:20],
        "elf": b"\x7fELF" + bytes(60),
        "png": _png(),
        "zip": _zip({"a.json": good.encode()}),
        "zip of a pickle": _zip({"archive/data.pkl": pickle.dumps({"a": 1}), "archive/version": b"3\n"}),
        "zip cut": _zip({"a.json": good.encode()})[:50],
        "pickle": pickle.dumps({"a": 1}),
        "pickle that calls": b"cbuiltins\nexec\n(V1/0\ntR.",
        "header too long": struct.pack("<Q", 1 << 62) + b"{}",
        "header beyond the end": struct.pack("<Q", 1000) + b"{}",
        "header of nested lists": struct.pack("<Q", 200_000) + b"[" * 100_000 + b"]" * 100_000,
        "header of a wrong type": _tensors([1, 2]),
        "header with a wrong entry": _tensors({"a": 1}),
        "header with wrong offsets": _tensors({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 1 << 40]}}),
        "header with a negative shape": _tensors({"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}}, 16),
        "header with an unknown dtype": _tensors({"a": {"dtype": "F3", "shape": [4], "data_offsets": [0, 16]}}, 16),
    }
    for value in (None, True, 0, "text", [], {}, [[]], [None], [1], ["", ""], {"": None}, {"a": {"b": []}}, "\ud800"):
        text = json.dumps(value)
        found[f"json {text}"] = text.encode()
    for number in range(5):
        found[f"noise {number}"] = chance.randbytes(chance.choice((1, 7, 64, 1000, 20_000)))
    return found


def with_wrong_values(good: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Copies of an object, in each of which one field has a value of another kind, or is missing."""
    found = {f"no {key}": {name: value for name, value in good.items() if name != key} for key in good}
    for key in good:
        found.update({f"{key}={json.dumps(value)}": {**good, key: value} for value in WRONG})
    return found


def _tensors(header: Any, size: int = 0) -> bytes:
    """A file in the layout of safetensors."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(size)


def _zip(files: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return content.getvalue()


def _png() -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (8, 8)).save(content, "png")
    return content.getvalue()
