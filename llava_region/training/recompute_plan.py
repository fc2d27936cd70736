"""Choose the decoder layers that recompute their activations in the backward pass, from what each of them keeps.

Upstream recomputes all of them. A layer outside the visual region has no weight gradients, so it keeps little, and
recomputing it is the largest avoidable cost of a step that trains a region: here only as many layers are recomputed as
the memory asks for, of each batch by its own size. Gradients are the same to the bit. Nothing here runs a model or imports torch.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
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
        lean: bytes each layer keeps where its norms and products are computed again (`lean_layers`); None: that does not pay.
    """

    kept: tuple[int, ...]
    costs: tuple[float, ...]
    layer_input: int
    first: int = 0
    mask: int = 0
    head: int = 0
    lean: tuple[int, ...] | None = None

    def peak(self, recompute: Iterable[int], lean: bool = False) -> int:
        """Most bytes alive at once for the backward pass: at the end of the forward pass, or while a layer is run again.

        Args:
            lean: whether the layers that are not recomputed keep less.
        """
        recompute, alive, peak = set(recompute), self.mask, 0
        kept = self.lean if lean and self.lean is not None else self.kept
        for layer in range(self.first, len(self.kept)):
            alive += self.layer_input
            peak = max(peak, alive + (self.kept if layer in recompute else kept)[layer])
            alive += 0 if layer in recompute else kept[layer]
        return max(peak, alive + self.head)


@dataclass(frozen=True)
class Choice:
    """How one batch is run.

    Attributes:
        recompute: indices of the layers that are recomputed.
        lean: whether the other layers keep less (`lean_layers`).
    """

    recompute: frozenset[int]
    lean: bool = False


@dataclass(frozen=True)
class Levels:
    """What can be given up, a little more from level to level: 0 keeps everything, each further one recomputes one layer more; where
    layers can be kept lean, the first does that instead.

    Attributes:
        order: the layers, in the order in which they are recomputed.
        lean: whether layers can be kept lean.
    """

    order: tuple[int, ...]
    lean: bool = False

    @classmethod
    def of(cls, activations: Activations) -> Levels:
        """Those layers first that free the most bytes for the time they take, the lower first among equals, since they are run again
        when less is alive."""
        saved = {i: activations.kept[i] / activations.costs[i] for i in range(activations.first, len(activations.kept))}
        return cls(tuple(sorted(saved, key=lambda i: (-saved[i], i))), activations.lean is not None)

    def choice(self, level: int) -> Choice:
        """What is done at a level."""
        lean = self.lean and level > 0
        return Choice(frozenset(self.order[: level - lean]), lean)

    def least(self, activations: Activations, budget: int) -> int:
        """The lowest level whose bytes fit; where none does, that of the fewest bytes."""
        peaks = []
        for level in range(len(self.order) + self.lean + 1):
            choice = self.choice(level)
            peaks.append(activations.peak(choice.recompute, choice.lean))
            if peaks[-1] <= budget:
                return level
        return max(range(len(peaks)), key=lambda level: (-peaks[level], level))


class BatchPlans:
    """The choice for each batch, by its size.

    Args:
        at: what the layers keep for so many samples of so many tokens.
        agree: makes the highest level of all ranks out of this rank's; collective. None: each rank may choose for itself.

    Attributes:
        counts: batches by the number of layers that were recomputed.
    """

    def __init__(
        self, at: Callable[[int, int], Activations], levels: Levels, budget: int, agree: Callable[[int], int] | None = None
    ) -> None:
        self.levels, self.agree = levels, agree
        self.counts: Counter[int] = Counter()
        self._needed = functools.cache(lambda samples, length: levels.least(at(samples, length), budget))
        self._last = 0

    def choose(self, samples: int, length: int) -> Choice:
        """The choice for the batch that begins. Collective where ranks have to agree."""
        level = self._needed(samples, length)
        if self.agree is not None:
            level = self.agree(level)
            # after each change of order ZeRO-3 gathers the weights of a step without looking ahead
            if level <= self._last <= level + len(self.levels.order) // 8:
                level = self._last
        self._last = level
        choice = self.levels.choice(level)
        self.counts[len(choice.recompute)] += 1
        return choice


@dataclass(frozen=True)
class Plan:
    """Which decoder layers are recomputed.

    Attributes:
        recompute: their indices, ascending; under `auto` for the largest batch that can come.
        policy: `all`, `region`, `none` or `auto`, as asked for.
        reason: one line for people.
        bytes_kept: peak bytes of activations under this plan, for the largest batch that can come.
        budget: bytes they may take; None where nothing limits the choice.
        first: lowest layer that is differentiated; the layers below run without autograd.
        lean: whether the other layers keep less (`lean_layers`), for the largest batch too.
        batches: chooses anew for each batch; None: they are all run as the largest.
    """

    recompute: tuple[int, ...]
    policy: str
    reason: str
    bytes_kept: int
    budget: int | None
    first: int = 0
    lean: bool = False
    batches: BatchPlans | None = field(default=None, compare=False)


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
        policy: `all`; `region`: the layers in `region`; `none`; `auto`: as few as fit `budget` (see `Levels`).
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
        levels = Levels.of(activations)
        choice = levels.choice(levels.least(activations, budget))
    else:
        choice = Choice(frozenset({"all": candidates, "none": (), "region": set(candidates) & set(region)}[policy]))
    recompute = tuple(sorted(choice.recompute))
    peak = activations.peak(recompute, choice.lean)
    reason = (
        f"--region_checkpointing {policy}: {_words(recompute, choice.lean, count)}; activations and logits take up to {format_size(peak)}"
    )
    if policy == "auto" and budget is not None:
        if peak > budget and origin == BY_HAND:
            raise LlavaRegionError(
                f"--region_memory {format_size(budget)} is too little: with every layer recomputed, activations and logits of the "
                f"largest batch take {format_size(peak)}; raise it, lower --per_device_train_batch_size, or have samples cut shorter"
            )
        reason += f" of {format_size(max(budget, 0))} ({origin})" + (", which may not be enough" if peak > budget else "")
    if first:
        reason += f"; layers below {first} run without autograd"
    if policy == "auto" and recompute:
        reason += "; of smaller batches, as few layers are recomputed as each needs"
    return Plan(recompute, policy, reason, peak, budget, first, choice.lean)


def _words(recompute: Collection[int], lean: bool, count: int) -> str:
    rest = "norms and gates of the other layers are" if recompute else "norms and gates are"
    said = f"{len(recompute)} of {count} layers are recomputed ({layer_ranges(recompute)})" if recompute else "no layer is recomputed"
    return f"{said}, {rest} computed again" if lean and len(recompute) < count else said
