"""Sizes in bytes, as people write them: `--region_memory 20GB`."""

from __future__ import annotations

import re

from llava_region.errors import LlavaRegionError

_UNITS = {"": 1, "B": 1, **{f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)}, **{f"{p}IB": 1024**i for i, p in enumerate("KMGT", 1)}}


def parse_size(text: str) -> int:
    """`2GB`, `1.5 GiB`, `800MB` or a plain number, in bytes (GB = 10^9, GiB = 2^30).

    Raises:
        LlavaRegionError: malformed, or not above 0.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)\s*", str(text), re.ASCII)
    size = int(float(match[1]) * _UNITS[match[2].upper()]) if match and match[2].upper() in _UNITS else 0
    if size <= 0:
        raise LlavaRegionError(f"'{text}' is not a memory size; allowed: a number above 0 with B, KB, MB, GB, TB, KiB, MiB, GiB or TiB")
    return size


def format_size(size: float) -> str:
    """Bytes for people, in the units `parse_size` reads: 2.5 GB."""
    for unit in ("B", "KB", "MB", "GB"):
        if abs(size) < 1000:
            return f"{size:.3g} {unit}" if unit != "B" else f"{size:.0f} B"
        size /= 1000
    return f"{size:.4g} TB"
