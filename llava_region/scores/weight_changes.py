"""One pass over two checkpoints, tensor by tensor: how each decoder layer's weights differ from the backbone's.

Neither model is built and no tensor is held whole: rows are read, reduced to sums and dropped. A LoRA run is not merged
first: its change is scaling * B @ A on the region's tensors, exact in fp32 where a merged checkpoint rounds, and 0 elsewhere.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from threading import Lock
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from llava_region.checkpoints.adapter import LoraUpdate, check_complete, read_adapter, trained_whole
from llava_region.checkpoints.model_source import ModelLike, ModelSource
from llava_region.checkpoints.tensors import Entry, Stored, name_in_backbone
from llava_region.decoder import layer_index
from llava_region.errors import LlavaRegionError
from llava_region.progress import track

READ_ELEMENTS = 1 << 22
SUM_ELEMENTS = 1 << 18  # stays in a core's cache through the sums, and short enough for them in fp32
WORKERS = min(4, os.cpu_count() or 1)
_one_at_a_time = Lock()  # `.bin` files are mapped anew while they are read
T = TypeVar("T")


@dataclass(frozen=True)
class TensorChange:
    """Sums over the elements of one tensor: theta in the backbone, delta = theta' - theta.

    Attributes:
        masked: elements with |theta| < eps, which `ratio` leaves out.
        square, cross, change_square: sums of theta^2, theta * delta and delta^2.
        absolute, change_absolute: sums of |theta| and |delta|.
        ratio: sum of |delta / theta|.
    """

    name: str
    layer: int
    numel: int
    masked: int
    square: float
    cross: float
    change_square: float
    absolute: float
    change_absolute: float
    ratio: float


class _Pair(NamedTuple):
    name: str
    layer: int
    base: Entry
    tuned: Entry | None = None
    update: LoraUpdate | None = None


def weight_changes(model: ModelLike, base: ModelLike, eps: float) -> list[list[TensorChange]]:
    """What changed in each decoder layer: one list of tensors per layer.

    Args:
        model: a LLaVA or Bunny checkpoint, or a LoRA run (not merged).
        base: its backbone; for a LoRA run the model it was trained on.
        eps: elements of the backbone smaller than this are left out of `ratio`.

    Raises:
        LlavaRegionError: not checkpoints, or their decoder layers do not match tensor for tensor.
    """
    model, base = ModelSource.of(model), ModelSource.of(base)
    pairs = _pairs(model, base)
    num_layers = base.num_layers
    layers: list[list[TensorChange]] = [[] for _ in range(num_layers)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors go over the cores, not the elements of one
    try:
        with ThreadPoolExecutor(WORKERS, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for change in track(pool.map(lambda pair: _change(pair, eps), pairs), "comparing weights", len(pairs)):
                layers[change.layer].append(change)
    finally:
        torch.set_num_threads(threads)
    empty = [i for i, layer in enumerate(layers) if not layer]
    if empty:
        raise LlavaRegionError(f"{base} holds no weights of decoder layer {empty[0]}, of {num_layers}; give a whole checkpoint")
    return layers


def _pairs(model: ModelSource, base: ModelSource) -> list[_Pair]:
    """Every tensor of the backbone's decoder layers with its counterpart, in the backbone's order."""
    backbone = base.checkpoint
    wanted = {name: layer for name in backbone if (layer := layer_index(name)) is not None and not name.endswith("inv_freq")}
    if model.kind == "adapter":
        tuned, updates = _lora_run(model, backbone)
    else:
        tuned, updates = _decoder_tensors(model.checkpoint), {}
        missing = sorted(wanted.keys() - _known(tuned, wanted, model, base).keys())
        if missing:
            raise LlavaRegionError(f"{model} lacks {missing[0]} ({len(missing)} tensors) that {base} has; give the model's own backbone")
    tuned, updates = _known(tuned, wanted, model, base), _known(updates, wanted, model, base)
    pairs = [_Pair(name, layer, backbone[name], tuned.get(name), updates.get(name)) for name, layer in wanted.items()]
    for pair in pairs:
        _check(pair, model, base)
    return pairs


def _lora_run(run: ModelSource, base: Mapping[str, Entry]) -> tuple[dict[str, Entry], dict[str, LoraUpdate]]:
    """Decoder tensors that a run trained whole, without LoRA, and its LoRA updates, by name of the weight."""
    adapter = read_adapter(run)
    trained = trained_whole(run, adapter)
    check_complete(adapter, run, trained, base)
    updates = {f"{module}.weight": update for module, update in adapter.updates.items()}
    return _decoder_tensors(trained), updates


def _decoder_tensors(tensors: Mapping[str, Entry]) -> dict[str, Entry]:
    return {name: tensors[name] for name in tensors if layer_index(name) is not None and not name.endswith("inv_freq")}


def _known(tensors: Mapping[str, T], wanted: Mapping[str, int], model: ModelSource, base: ModelSource) -> dict[str, T]:
    """The same under the backbone's names."""
    found = {own: tensors[name] for name in tensors if (own := name_in_backbone(name, wanted)) is not None}
    unknown = [name for name in tensors if name_in_backbone(name, wanted) is None]
    if unknown:
        raise LlavaRegionError(f"{base} lacks {unknown[0]} ({len(unknown)} tensors) that {model} has; give the model's own backbone")
    return found


def _check(pair: _Pair, model: ModelSource, base: ModelSource) -> None:
    """Refuse tensors of different shapes, and quantised ones."""
    shape = pair.base.shape
    other = pair.tuned.shape if pair.tuned else pair.update.shape_for(shape) if pair.update else shape
    if other != shape:
        raise LlavaRegionError(f"{pair.name} is {list(other)} in {model} and {list(shape)} in {base}; give the model's own backbone")
    if 0 in shape or not shape:
        raise LlavaRegionError(f"{pair.name} of {base} is empty; give a whole checkpoint")
    if not all(entry.dtype.is_floating_point for entry in (pair.base, pair.tuned) if entry):
        raise LlavaRegionError(f"{pair.name} holds integers (a quantised model), which have no ratio; give the model in 16 bit")


def _change(pair: _Pair, eps: float) -> TensorChange:
    rows, numel = pair.base.shape[0], math.prod(pair.base.shape)
    step = max(1, READ_ELEMENTS * rows // numel)
    base, delta = _reader(pair.base), _delta_reader(pair)
    below = float(torch.nextafter(torch.tensor(eps), torch.tensor(0.0)))  # the largest fp32 number that is masked
    buffer = torch.empty(2, SUM_ELEMENTS)
    total = torch.zeros(7, dtype=torch.float64)
    for begin in range(0, rows, step):
        theta = base(begin, min(begin + step, rows)).reshape(-1)
        other, is_delta = delta(begin, min(begin + step, rows))
        for part, counterpart in zip(theta.split(SUM_ELEMENTS), other.reshape(-1).split(SUM_ELEMENTS), strict=True):
            total += _sums(part, counterpart, is_delta, below, buffer)
    if not total.isfinite().all():
        raise LlavaRegionError(f"{pair.name} holds numbers that are not finite, in the model or in its backbone; give whole checkpoints")
    square, cross, change_square, absolute, change_absolute, ratio, signs = total.tolist()
    masked = round((numel - signs) / 2)
    return TensorChange(pair.name, pair.layer, numel, masked, square, cross, change_square, absolute, change_absolute, ratio)


def _delta_reader(pair: _Pair) -> Callable[[int, int], tuple[Tensor, bool]]:
    """A function from a range of rows to what they become: theta' and False, or delta itself and True."""
    if pair.update:
        update = pair.update
        a, b = update.halves()
        if update.shape_for(pair.base.shape) != (len(b), a.shape[1]):
            a, b = b.T, a.T
        b = b * update.scaling
        return lambda begin, end: (b[begin:end] @ a, True)
    if not pair.tuned:
        return lambda begin, end: (torch.zeros(end - begin, *pair.base.shape[1:]), True)
    tuned = _reader(pair.tuned)
    return lambda begin, end: (tuned(begin, end), False)


def _reader(entry: Entry) -> Callable[[int, int], Tensor]:
    """A function from a range of rows to these rows, read then and there from safetensors."""
    if not isinstance(entry, Stored):
        with _one_at_a_time:
            whole = entry.load()
        return lambda begin, end: whole[begin:end]
    row = entry.nbytes // entry.shape[0]
    return lambda begin, end: replace(entry, shape=(end - begin, *entry.shape[1:]), start=entry.start + begin * row).load()


def _sums(theta: Tensor, other: Tensor, is_delta: bool, below: float, buffer: Tensor) -> Tensor:
    """The sums of `TensorChange` over one part, and last the number of elements kept less that of masked ones: (7,), float64.

    Plain vector operations in one buffer: comparisons and boolean masks cost several times as much.
    """
    a, d = buffer[0, : len(theta)], buffer[1, : len(theta)]
    a.copy_(theta)
    d.copy_(other)
    if not is_delta:
        d.sub_(a)
    products = [a.dot(a), a.dot(d), d.dot(d)]
    sums = [a.abs_().sum(), d.abs_().sum()]
    # |theta| <= below becomes -inf: delta / -inf adds nothing, and its sign counts it
    torch.threshold_(a, below, -math.inf)
    sums.append(d.div_(a).sum())
    return torch.stack([*products, *sums, a.sign_().sum()]).double()
