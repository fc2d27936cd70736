"""A third upstream in the table, next to the real ones."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from llava_region import upstreams
from llava_region.patches.upstream import Upstream


@pytest.fixture
def third(monkeypatch: pytest.MonkeyPatch) -> Upstream:
    """An upstream of which doctor knows nothing but what it says itself."""
    facts = {
        "name": "third", "title": "Third", "commit": "abcdef0", "tested": "Third abcdef0", "how_to_get": "write to its authors",
        "get_command": Upstream.get_command, "variables": (), "distributions": ("third",), "probe": "import third.train",
        "train_module_name": "third.train", "without": {"flash-attn": "Third is slow"},
        "supported": {"python": ">=3.10,<3.13", "torch": ">=2.7", "transformers": ">=4.37,<4.40", "jax": ">=0.4"},
        "pinned": {"torch": "2.8.0", "transformers": "4.39.3", "jax": "0.4.1"}, "transformers_finding": Upstream.transformers_finding,
    }  # fmt: skip
    upstream = type("Third", (type(upstreams.get("llava")),), facts)()
    monkeypatch.setitem(sys.modules, "third_upstream", SimpleNamespace(UPSTREAM=upstream))
    monkeypatch.setitem(upstreams.TABLE, "third", "third_upstream")
    return upstream
