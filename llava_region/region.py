"""The visual region: which decoder layers of the language model are tuned.

A region is written as a short spec (`sparse:25%`, `0,4,8-11`, `scores.json:block_influence:8`), parsed
against the number of decoder layers of a model, and stored in the folder of every model that was made
with it as `region.json`, which the later commands read. Paper: sections 4.1 and 4.2.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from llava_region.errors import LlavaRegionError
from llava_region.files import read_json
from llava_region.run_files import CONFIG_FILE, REGION_FILE

ALLOWED = (
    "'all', layers such as '0,4,8-11', 'sparse:8' or 'sparse:25%', 'lower:8', 'lower-middle:8', 'upper-middle:8', "
    "'top:8', 'hybrid:8', or 'scores.json:METRIC:8[:spread]'"
)

MOST_LAYERS = 100_000  # far beyond any model; a damaged file may say anything
_COPY = "copy the file again from the run"


@dataclass(frozen=True)
class Region:
    """A set of decoder layers of a model with `num_layers` of them.

    Attributes:
        layers: the layers' indices, ascending, each within `0 .. num_layers - 1`.
        num_layers: decoder layers of the language model.
        spec: the text the region was parsed from.
        scores: for a region taken from a scores file: `{"file", "sha256", "metric", "spread"}`, else None.
    """

    layers: tuple[int, ...]
    num_layers: int
    spec: str
    scores: dict | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.num_layers, int) and self.num_layers > MOST_LAYERS:
            raise LlavaRegionError(f"a model has 1 to {MOST_LAYERS} decoder layers, got {self.num_layers!r:.40}")
        if not self.layers:
            raise LlavaRegionError(f"the region '{self.spec}' holds no layer; allowed: at least one of 0 to {self.num_layers - 1}")
        if list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 0 or self.layers[-1] >= self.num_layers:
            raise LlavaRegionError(
                f"layers {list(self.layers)} do not fit a model of {self.num_layers} decoder layers; "
                f"allowed: ascending, distinct, 0 to {self.num_layers - 1}"
            )

    def __contains__(self, layer: int) -> bool:
        return layer in self.layers

    def __len__(self) -> int:
        return len(self.layers)

    @classmethod
    def parse(cls, spec: str, num_layers: int) -> Region:
        """Parse `spec` for a model of `num_layers` decoder layers.

        Raises:
            LlavaRegionError: the spec is malformed or does not fit; names the offending part and the valid range.
        """
        if not isinstance(num_layers, int) or not 1 <= num_layers <= MOST_LAYERS:
            raise LlavaRegionError(f"a model has 1 to {MOST_LAYERS} decoder layers, got {num_layers!r:.40}")
        text = spec.strip()
        if not text:
            raise LlavaRegionError(f"the layer spec is empty; allowed: {ALLOWED}")
        if text == "all":
            return cls(tuple(range(num_layers)), num_layers, text)
        name, colon, rest = text.partition(":")
        if colon and name in _NAMED:
            count = parse_count(rest, num_layers, text)
            return cls(tuple(sorted(_NAMED[name](count, num_layers, text))), num_layers, text)
        if colon and ".json" in text:
            return _from_scores(cls, text, num_layers)
        if colon:
            raise LlavaRegionError(f"unknown layer spec '{spec}': no strategy is called '{name}'; allowed: {ALLOWED}")
        return cls(_explicit(text, num_layers), num_layers, text)

    def to_dict(self) -> dict:
        """The region as `region.json` holds it: `layers`, `num_layers`, `spec`, and `scores` if taken from scores."""
        out = {"layers": list(self.layers), "num_layers": self.num_layers, "spec": self.spec}
        if self.scores:
            out["scores"] = dict(self.scores)
        return out

    @classmethod
    def from_dict(cls, data: dict) -> Region:
        """Inverse of `to_dict`; other keys of `region.json` are ignored.

        Raises:
            LlavaRegionError: a key is missing or of a wrong type, or the layers do not fit.
        """
        data = check_record(data, "the region")
        spec = data.get("spec") or ",".join(map(str, data["layers"]))
        return cls(tuple(data["layers"]), data["num_layers"], spec, data.get("scores"))

    @classmethod
    def load(cls, folder: str | Path) -> Region:
        """Read the region of a model folder (`region.json`, else `visual_region` in `config.json`).

        Raises:
            LlavaRegionError: neither is there, or it is malformed.
        """
        return cls.from_dict(read_region_json(folder))

    def map_line(self) -> str:
        """One character per decoder layer, `#` tuned and `.` frozen, for people to look at."""
        return "".join("#" if i in self.layers else "." for i in range(self.num_layers))


def region_record(folder: Path, config: Mapping[str, Any] | None = None) -> dict | None:
    """Everything that `region.json` of a folder says, else `visual_region` of its `config.json`; None where neither is there.

    Args:
        config: the content of that `config.json`, where it was read already.

    Raises:
        LlavaRegionError: it is malformed, see `check_record`.
    """
    if (folder / REGION_FILE).is_file():
        return check_record(read_json(folder / REGION_FILE), str(folder / REGION_FILE))
    if config is None:
        config = read_json(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else {}
    record = config.get("visual_region") if isinstance(config, dict) else None
    return None if record is None else check_record(record, f"'visual_region' of {folder / CONFIG_FILE}")


def check_record(record: Any, name: str) -> dict:
    """The record of a region itself, where what it says of layers can be true.

    Args:
        record: the content of `region.json`.
        name: how to call it in the message.

    Raises:
        LlavaRegionError: it is no object; `num_layers` is no whole number from 1 on; layers (its own, reverted ones, those before
            pruning) are no ascending, distinct indices of as many; or another field is of a wrong type.
    """
    if not isinstance(record, dict):
        raise LlavaRegionError(f"{name} is {_shortened(record)}; allowed: an object with 'layers' and 'num_layers'; {_COPY}")
    count = _count_in(record, "num_layers", name)
    for key, kind in (("spec", str), ("base_model", str), ("scores", dict), ("reverted", dict), ("pruned", dict), ("merged_from", dict)):
        if record.get(key) is not None and not isinstance(record[key], kind):
            allowed = "a text" if kind is str else "an object"
            raise LlavaRegionError(f"'{key}' in {name} is {_shortened(record[key])}; allowed: {allowed}; {_COPY}")
    layers, pruned = _layers_in(record, "layers", count, name), record.get("pruned")
    if record.get("reverted") is not None:
        _layers_in(record["reverted"], "layers", count, f"'reverted' of {name}")
    if pruned is not None:
        name = f"'pruned' of {name}"
        before = _count_in(pruned, "original_num_layers", name)
        original, old = (_layers_in(pruned, key, before, name) for key in ("original_layers", "new_to_old"))
        if len(old) != count:
            raise LlavaRegionError(f"'new_to_old' in {name} has {len(old)} layers for {count}; {_COPY}")
        left = [old.index(layer) for layer in original if layer in old]
        if list(layers) != left:
            raise LlavaRegionError(f"'layers' next to {name} are {layers}, but those that pruning left are {left}; {_COPY}")
    elif not layers:
        raise LlavaRegionError(f"'layers' in {name} is []; allowed: at least one of 0 to {count - 1}; {_COPY}")
    return record


def _count_in(record: Mapping[str, Any], key: str, name: str) -> int:
    count = record.get(key)
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise LlavaRegionError(f"'{key}' in {name} is {_shortened(count)}; allowed: a whole number from 1 on; {_COPY}")
    return count


def _layers_in(record: Mapping[str, Any], key: str, count: int, name: str) -> Sequence[int]:
    layers: Any = record.get(key)
    whole = isinstance(layers, (list, tuple)) and all(isinstance(i, int) and not isinstance(i, bool) for i in layers)
    if not whole or list(layers) != sorted(set(layers)) or not all(0 <= i < count for i in layers):
        allowed = f"a list of ascending, distinct layers from 0 to {count - 1}"
        raise LlavaRegionError(f"'{key}' in {name} is {_shortened(layers)}; allowed: {allowed}; {_COPY}")
    return layers


def _shortened(value: Any) -> str:
    text = "missing" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def read_region_json(folder: str | Path) -> dict:
    """Everything `region.json` of a model folder says (base model, upstream, pruning...), as a dict.

    Raises:
        LlavaRegionError: the folder holds neither `region.json` nor a `config.json` with `visual_region`.
    """
    record = region_record(Path(folder))
    if record is None:
        raise LlavaRegionError(
            f"{folder} holds no {REGION_FILE} and no 'visual_region' in {CONFIG_FILE}; give the output folder of a run with --tune_layers"
        )
    return record


def layer_ranges(layers: Iterable[int]) -> str:
    """Ascending layers as text that a spec may hold: `0,4,8-11`; `none` for no layer."""
    ranges: list[list[int]] = []
    for layer in layers:
        if ranges and ranges[-1][1] == layer - 1:
            ranges[-1][1] = layer
        else:
            ranges.append([layer, layer])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges) or "none"


def parse_count(text: str, num_layers: int, spec: str) -> int:
    """`8` or `25%` (decimal allowed, rounded to the nearest count) as a number of layers, 1 to `num_layers`.

    Raises:
        LlavaRegionError: malformed or out of range.
    """
    match = re.fullmatch(r"\s*(?:(\d+)|(\d+(?:\.\d*)?|\.\d+)\s*%)\s*", text, re.ASCII)
    if not match:
        raise LlavaRegionError(f"'{text}' in '{spec}' is not a layer count; allowed: 1 to {num_layers}, or a percentage such as 25%")
    if match[1]:
        count = int(match[1])
    else:
        percent = Fraction(match[2])
        if percent > 100:
            raise LlavaRegionError(f"'{text}' in '{spec}' is more than all layers; allowed: up to 100%")
        count = math.floor(percent * num_layers / 100 + Fraction(1, 2))
    if not 1 <= count <= num_layers:
        raise LlavaRegionError(f"'{text}' in '{spec}' makes {count} layers; allowed: 1 to {num_layers}")
    return count


def _explicit(text: str, num_layers: int) -> tuple[int, ...]:
    chosen: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part, re.ASCII)
        if not match:
            raise LlavaRegionError(f"'{part}' in the layer spec '{text}' is not a layer or a range; allowed: {ALLOWED}")
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last:
            raise LlavaRegionError(f"the range '{part.strip()}' in '{text}' runs backwards; write it as {last}-{first}")
        if last >= num_layers:
            raise LlavaRegionError(
                f"layer {last} in '{text}' is beyond the model, which has {num_layers} decoder layers; allowed: 0 to {num_layers - 1}"
            )
        chosen.extend(range(first, last + 1))
    twice = sorted({layer for layer in chosen if chosen.count(layer) > 1})
    if twice:
        raise LlavaRegionError(f"layer {twice[0]} is named twice in '{text}'; name each layer once")
    return tuple(sorted(chosen))


def sparse_layers(count: int, num_layers: int) -> list[int]:
    """`count` layers spread evenly, on even indices where they suffice: the rule behind the paper's sets (section 4.2, footnote 2)."""
    if count == 1:
        return [num_layers - 1]
    if count == 2:
        return [0, num_layers - 1]
    if count > num_layers / 2:
        return [round(i * (num_layers - 1) / (count - 1)) for i in range(count)]
    return [2 * round(i * (num_layers / 2 - 1) / (count - 1)) for i in range(count)]


def _sparse(count: int, num_layers: int, spec: str) -> list[int]:
    return sparse_layers(count, num_layers)


def _block(start: Callable[[int, int], int]) -> Callable[[int, int, str], range]:
    def layers(count: int, num_layers: int, spec: str) -> range:
        first = start(count, num_layers)
        if first + count > num_layers:
            left = num_layers - first
            raise LlavaRegionError(f"'{spec}' starts at layer {first} of {num_layers}; allowed: 1 to {left} layers")
        return range(first, first + count)

    return layers


def _hybrid(count: int, num_layers: int, spec: str) -> list[int]:
    top = count // 2
    return [*range(count - top), *range(num_layers - top, num_layers)]


_NAMED = {
    "sparse": _sparse,
    "lower": _block(lambda k, n: 0),
    "lower-middle": _block(lambda k, n: n // 4),
    "upper-middle": _block(lambda k, n: n // 2),
    "top": _block(lambda k, n: n - k),
    "hybrid": _hybrid,
}


def _from_scores(cls: type[Region], spec: str, num_layers: int) -> Region:
    """`FILE.json:METRIC:K[:spread]`: the K layers that a file of `llava-region score` ranks highest; ties to the lower index."""
    parts = spec.split(":")
    spread = parts[-1].strip() == "spread"
    parts = parts[:-1] if spread else parts
    if len(parts) < 3:
        raise LlavaRegionError(f"'{spec}' is incomplete; allowed: 'FILE.json:METRIC:8' or 'FILE.json:METRIC:8:spread'")
    path, metric = Path(":".join(parts[:-2])), parts[-2].strip()
    count = parse_count(parts[-1], num_layers, spec)
    if not path.is_file():
        raise LlavaRegionError(f"there is no scores file {path} (from '{spec}'); write one with 'llava-region score'")
    values = read_scores(path, metric, num_layers)
    blocks = [range(i * num_layers // count, (i + 1) * num_layers // count) for i in range(count)]
    ranked = sorted(range(num_layers), key=lambda layer: (-values[layer], layer))
    best = [min(block, key=ranked.index) for block in blocks] if spread else ranked[:count]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    source = {"file": str(path), "sha256": digest, "metric": metric, "spread": spread}
    return cls(tuple(sorted(best)), num_layers, spec, source)


def read_scores(path: str | Path, metric: str, num_layers: int | None = None) -> list[float]:
    """Scores per layer, shape (num_layers,), of one metric in a file written by `llava-region score`.

    Raises:
        LlavaRegionError: the file is malformed, lacks the metric, or was made for another number of layers.
    """
    data = read_json(Path(path))
    metrics = data.get("metrics") if isinstance(data, dict) else None
    if not isinstance(metrics, dict):
        raise LlavaRegionError(f"{path} is not a scores file: it has no 'metrics'; write one with 'llava-region score'")
    if metric not in metrics:
        raise LlavaRegionError(f"{path} has no metric '{metric}'; allowed: {', '.join(sorted(metrics)) or 'none'}")
    values = metrics[metric].get("scores") if isinstance(metrics[metric], dict) else None
    if not isinstance(values, list) or not values or not all(isinstance(v, (int, float)) and math.isfinite(v) for v in values):
        raise LlavaRegionError(f"the scores of '{metric}' in {path} are not a list of finite numbers; write the file again")
    if num_layers is not None and len(values) != num_layers:
        raise LlavaRegionError(f"{path} scores {len(values)} layers, the model has {num_layers}; score this model")
    return [float(v) for v in values]
