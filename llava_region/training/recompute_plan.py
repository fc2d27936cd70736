"""Choose the decoder layers that recompute their activations in the backward pass, from what each of them keeps.

Upstream recomputes all of them. A layer outside the visual region has no weight gradients, so it keeps little, and
recomputing it is the largest avoidable cost of a step that trains a region: here only as many layers are recomputed as
the memory asks for. Gradients are the same to the bit. Nothing here runs a model or imports torch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from llava_region.errors import LlavaRegionError
from llava_region.region import layer_ranges
from llava_region.training.sizes import format_size, parse_size

POLICIES = ("auto", "all", "region", "none")
BY_HAND = "--region_memory"  # the origin of a budget that has to hold


@dataclass(frozen=True)
class Workload:
    """The largest training step that can come, as far as its memory depends on it.

    Attributes:
        samples: of one micro batch on one rank.
        length: tokens of each. A sample is cut to that length before the image's tokens are put in, and again after.
        dtype: name of the torch dtype that the model trains in.
        supervised_logits: whether logits are computed only at positions that have a label.
    """

    samples: int
    length: int
    dtype: str = "float32"
    supervised_logits: bool = True

    @classmethod
    def of(cls, args: Any, max_length: int) -> Workload:
        """The workload of a command line.

        Args:
            args: the TrainingArguments with this package's flags.
            max_length: tokens to which a sample is cut.
        """
        dtype = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
        return cls(args.per_device_train_batch_size, max_length, dtype, args.supervised_logits)

    @property
    def tokens(self) -> int:
        """Tokens of one micro batch."""
        return self.samples * self.length


@dataclass(frozen=True)
class Activations:
    """What there is to choose from, for the largest batch that can come.

    Attributes:
        kept: bytes each decoder layer keeps for its backward pass where it is not recomputed, in addition to its input.
        costs: relative time of each layer's forward pass, which recomputing it adds.
        layer_input: bytes of one layer's input, kept in any case.
        first: lowest layer that is differentiated; below it nothing is kept.
        mask: bytes of the attention mask that all layers share.
        head: bytes that the final norm, the logits and the loss take at the end of the forward pass.
    """

    kept: tuple[int, ...]
    costs: tuple[float, ...]
    layer_input: int
    first: int = 0
    mask: int = 0
    head: int = 0

    def peak(self, recompute: Iterable[int]) -> int:
        """Most bytes alive at once for the backward pass: at the end of the forward pass, or while a layer is run again."""
        recompute, alive, peak = set(recompute), self.mask, 0
        for layer in range(self.first, len(self.kept)):
            alive += self.layer_input
            peak = max(peak, alive + self.kept[layer])
            alive += 0 if layer in recompute else self.kept[layer]
        return max(peak, alive + self.head)


@dataclass(frozen=True)
class Plan:
    """Which decoder layers are recomputed.

    Attributes:
        recompute: their indices, ascending.
        policy: `all`, `region`, `none` or `auto`, as asked for.
        reason: one line for people.
        bytes_kept: peak bytes of activations under this plan, for the largest batch that can come.
        budget: bytes they may take; None where nothing limits the choice.
        first: lowest layer that is differentiated; the layers below run without autograd.
    """

    recompute: tuple[int, ...]
    policy: str
    reason: str
    bytes_kept: int
    budget: int | None
    first: int = 0


def check_flags(policy: str, memory: str | None, gradient_checkpointing: bool = True) -> None:
    """Refuse malformed values of `--region_checkpointing` and `--region_memory`.

    Raises:
        LlavaRegionError: names the flag, the value and what is allowed.
    """
    if policy not in POLICIES:
        raise LlavaRegionError(f"--region_checkpointing '{policy}' is unknown; allowed: {', '.join(POLICIES)}")
    if policy in ("all", "region") and not gradient_checkpointing:
        raise LlavaRegionError(f"--region_checkpointing {policy} needs --gradient_checkpointing True; add it, or leave the policy out")
    if memory is None:
        return
    parse_size(memory)
    if policy != "auto" or not gradient_checkpointing:
        raise LlavaRegionError(
            f"--region_memory {memory} limits what --region_checkpointing auto keeps; "
            "it needs that policy and --gradient_checkpointing True, or leave it out"
        )


def make_plan(policy: str, region: Collection[int], activations: Activations, budget: int | None = None, origin: str | None = None) -> Plan:
    """Choose the layers to recompute.

    Args:
        policy: `all`; `region`: the layers in `region`; `none`; `auto`: as few as fit `budget`, those first that free the
            most bytes for the time they take, the lower first among equals, since they are run again when less is alive.
        region: indices of the tuned layers.
        budget: bytes of activations that fit; `auto` needs it.
        origin: where the budget comes from, in words; that of `BY_HAND` must hold, one that was estimated may be missed.

    Raises:
        LlavaRegionError: recomputing every layer does not meet `--region_memory`.
    """
    count, first = len(activations.kept), activations.first
    candidates = range(first, count)
    if policy == "auto":
        assert budget is not None
        recompute = tuple(sorted(_as_few_as_fit(activations, budget)))
    else:
        recompute = {"all": tuple(candidates), "none": (), "region": tuple(i for i in candidates if i in region)}[policy]
    peak = activations.peak(recompute)
    again = "no layer is recomputed" if not recompute else f"{len(recompute)} of {count} layers are recomputed ({layer_ranges(recompute)})"
    reason = f"--region_checkpointing {policy}: {again}; activations and logits take up to {format_size(peak)}"
    if policy == "auto" and budget is not None:
        if peak > budget and origin == BY_HAND:
            raise LlavaRegionError(
                f"--region_memory {format_size(budget)} is too little: with every layer recomputed, activations and logits of the "
                f"largest batch take {format_size(peak)}; raise it, lower --per_device_train_batch_size, or have samples cut shorter"
            )
        reason += f" of {format_size(max(budget, 0))} ({origin})" + (", which may not be enough" if peak > budget else "")
    if first:
        reason += f"; layers below {first} run without autograd"
    return Plan(recompute, policy, reason, peak, budget, first)


def _as_few_as_fit(activations: Activations, budget: int) -> list[int]:
    saved = {i: activations.kept[i] / activations.costs[i] for i in range(activations.first, len(activations.kept))}
    recompute: list[int] = []
    for layer in sorted(saved, key=lambda i: (-saved[i], i)):
        if activations.peak(recompute) <= budget:
            break
        recompute.append(layer)
    return recompute
