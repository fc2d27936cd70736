"""What hooks on an upstream have to hold, tried on one of them: `python -m tests.helpers.hook_contract NAME` prints findings as JSON.

In a process of its own, so that a stand-in never hides the real codebase. `NAME=MODULE` adds an upstream to the table first.
"""

import json
import sys
from collections.abc import Callable
from unittest import mock

from llava_region import LlavaRegionError, UnsupportedUpstream, upstreams

# what the hooks and the preflight call or read besides the names that they bind: of LLaVA's kin, of the toy
NEEDED = ("ModelArguments", "get_peft_state_non_lora_maybe_zero_3", "conversation_lib", "ids_and_labels")


def refusal(action: Callable[[], object]) -> str | None:
    """The message that an action is refused with, or None."""
    try:
        action()
    except LlavaRegionError as e:
        return f"{type(e).__name__}: {e}"
    return None


def enter(upstream, spec: str = "1") -> None:
    with upstream.applied(spec):
        pass


def contract(name: str) -> dict:
    upstream = upstreams.get(name)
    module = upstream.train_module()
    hooked = [n for n in ("TrainingArguments", upstream.linear_names, upstream.trainer, upstream.save) if n]
    before = {n: getattr(module, n) for n in (*hooked, "train")}

    def unchanged() -> list[str]:
        return [n for n, value in before.items() if getattr(module, n) is value]

    found = {"hooked": hooked}
    with upstream.applied("sparse:25%"):
        found["unchanged within"] = unchanged()
        found["nested"] = refusal(lambda: enter(upstream, "1,6"))
        found["unchanged after a nested one"] = unchanged()
    found["unchanged after"] = unchanged()
    try:
        with upstream.applied("1,6"):
            raise RuntimeError("boom")
    except RuntimeError as e:
        found["error"] = str(e)
    found["unchanged after an error"] = unchanged()
    missing = {}
    for symbol in [n for n in (*hooked, *NEEDED) if hasattr(module, n)]:
        value = getattr(module, symbol)
        delattr(module, symbol)
        missing[symbol] = refusal(lambda: enter(upstream))
        setattr(module, symbol, value)
    found["missing"] = missing
    if hasattr(upstream, "data_module"):
        data = upstream.data_module()
        for symbol in ("preprocess", "preprocess_multimodal"):
            with mock.patch.object(data, symbol):
                delattr(data, symbol)
                found[f"no {symbol}"] = refusal(lambda: enter(upstream)), data.__name__
        with mock.patch.object(data, "preprocess", lambda sources, tokenizer: {}):
            found["changed preprocess"] = refusal(lambda: enter(upstream))
    with mock.patch.object(module, upstream.linear_names, lambda args, model: []):
        found["changed"] = refusal(lambda: enter(upstream))
    found["no field"] = {}
    for class_name in ("ModelArguments", "TrainingArguments"):
        fields = getattr(module, class_name).__dataclass_fields__
        whole = dict(fields)
        fields.clear()
        found["no field"][class_name] = refusal(lambda: enter(upstream))
        fields.update(whole)
    found["unknown script"] = refusal(lambda: upstream.entry("pretrain.py"))
    found["unsupported"] = UnsupportedUpstream.__name__
    found["tested"], found["module"], found["title"] = upstream.tested, module.__name__, upstream.title
    return found


if __name__ == "__main__":
    name, _, home = sys.argv[1].partition("=")
    if home:
        upstreams.TABLE[name] = home
    print(json.dumps(contract(name)))
