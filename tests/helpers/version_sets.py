"""Sets of installed versions, as `llava-region doctor` would find them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from llava_region.doctor.facts import Facts

LLAVA = {
    "python": "3.11.9", "torch": "2.13.0+cu126", "transformers": "4.37.2", "tokenizers": "0.15.1", "peft": "0.10.0",
    "accelerate": "0.34.2", "deepspeed": "0.16.9", "numpy": "1.26.4", "bitsandbytes": "0.45.0", "flash-attn": "2.7.0",
    "llava": "1.2.2.post1",
}  # fmt: skip
BUNNY = {**LLAVA, "transformers": "4.40.2", "tokenizers": "0.19.1", "accelerate": "0.30.1", "deepspeed": "0.18.9", "bunny": "1.0"}
del BUNNY["llava"]
GPU = {"cuda": "12.6", "gpus": ("NVIDIA A800",) * 8, "driver_gpus": ("NVIDIA A800",) * 8, "programs": ("g++", "ninja")}


def facts(
    base: Mapping[str, str] = LLAVA,
    without: Collection[str] = (),
    conflicts: tuple[tuple[str, str, str], ...] = (),
    broken: dict[str, str] | None = None,
    machine: Mapping[str, Any] = GPU,
    **versions: str,
) -> Facts:
    """The tested set of an upstream with some versions changed; `flash_attn` means flash-attn."""
    versions = {**base, **{name.replace("_", "-"): version for name, version in versions.items()}}
    return Facts({k: v for k, v in versions.items() if k not in without}, broken=broken or {}, conflicts=conflicts, **machine)


def requirements(name: str) -> str:
    """The text of `tests/requirements-NAME.txt` with the files that it reads."""
    text = (Path(__file__).parents[1] / f"requirements-{name}.txt").read_text()
    return re.sub(r"^-r requirements-(\w+)\.txt$", lambda read: requirements(read[1]), text, flags=re.MULTILINE)
