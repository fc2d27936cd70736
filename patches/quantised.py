"""Load a backbone in 4 or 8 bits with the versions of transformers, PEFT and bitsandbytes of today, which the upstreams do not know."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def quantised_loading() -> Iterator[None]:
    """Within the block, `from_pretrained` takes what the upstreams give it for `--bits 4` and `--bits 8`.

    They say it twice, by `load_in_4bit` or `load_in_8bit` and in a `quantization_config`, which transformers refuses from 4.38 on: the
    second holds it all. Nothing changes for other models.
    """
    from transformers import PreTrainedModel

    before = vars(PreTrainedModel)["from_pretrained"]
    original = before.__func__

    @functools.wraps(original)
    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        asked = kwargs.get("quantization_config")
        if asked is not None:
            kwargs = {name: value for name, value in kwargs.items() if name not in ("load_in_4bit", "load_in_8bit")}
            if getattr(asked, "load_in_8bit", False):
                _give_peft_its_field()
        return original(cls, *args, **kwargs)

    PreTrainedModel.from_pretrained = classmethod(from_pretrained)  # type: ignore[method-assign]
    try:
        yield
    finally:
        PreTrainedModel.from_pretrained = before


def _give_peft_its_field() -> None:
    """PEFT before 0.14 hands a field of bitsandbytes' 8-bit layers on to its own, which ignore it; bitsandbytes dropped the field."""
    from bitsandbytes.autograd import _functions

    state: Any = _functions.MatmulLtState
    if not hasattr(state, "memory_efficient_backward"):
        state.memory_efficient_backward = False
