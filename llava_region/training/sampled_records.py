"""A sample of the records through the upstream's own tokenisation: what of them would be trained, before weights load.

A record whose labels are all masked trains nothing, and upstream goes on without it: a template that does not fit the tokenizer, an
empty answer, a mark of the template in the text, an answer past the longest length.
"""

from __future__ import annotations

import io
import random
import re
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from llava_region.data.labels import IGNORE_INDEX
from llava_region.data.records import first_names, record_name
from llava_region.errors import LlavaRegionError
from llava_region.progress import track

if TYPE_CHECKING:
    import torch

    from llava_region.data.training_data import TrainingData
    from llava_region.upstreams import Recipe, Tokenisation, Upstream

# Shares of the sample from which a run is refused. Real data has some masked records, and upstream trains the others rightly; where
# half of them train nothing, or a template does not fit the tokenizer (which masks every record of a kind), something else is meant.
MOST_MASKED = 0.5
MOST_MISFITS = 0.1
LONGEST_TEXT = 300_000  # characters; a slow tokenizer takes minutes for a text of ten million, which training would cut in any case
MISFIT, EMPTY, MARK, CUT = "misfit", "empty", "mark", "cut"


@dataclass
class Sample:
    """What the sampled records become.

    Attributes:
        of: records in the data; lengths: tokens of each sampled record with its image's features, before it is cut.
        cut: how many are longer than the longest length allowed; images: number of images -> records.
        masked: why a record has no label to train -> names of such records; complaints: how often the upstream itself said so.
    """

    of: int
    lengths: list[int] = field(default_factory=list)
    cut: int = 0
    images: Counter[int] = field(default_factory=Counter)
    masked: dict[str, list[str]] = field(default_factory=dict)
    complaints: int = 0

    @property
    def unlabelled(self) -> int:
        """Records without a label to train."""
        return sum(map(len, self.masked.values()))


def check_records(upstream: Upstream, args: Namespace, recipe: Recipe, config: Mapping[str, Any], records: TrainingData) -> str | None:
    """Tokenise `--check_records` records and the longest one as training would.

    Args:
        config: the model's `config.json`.
        records: the data's, each of good form.

    Returns:
        one line about them; None where none was asked for.

    Raises:
        LlavaRegionError: too few of them have a label to train, or one of them cannot be tokenised.
    """
    if args.check_records < 0:
        raise LlavaRegionError(f"--check_records {args.check_records} is negative; allowed: 0 (none) or more")
    if not args.check_records:
        return None
    with upstream.tokenisation(args, config) as tokenisation, _quiet():
        if tokenisation.without_rows:
            _refuse_without_rows(tokenisation.without_rows, records, recipe)
        sample = _sample(upstream, tokenisation, records, choose(records.survey.lengths, args.check_records), recipe)
    reasons = _reasons(recipe)
    _refuse(sample, reasons, recipe)
    return describe(sample, reasons, recipe)


def choose(lengths: Sequence[int], count: int, seed: int = 0) -> list[int]:
    """Numbers of `count` records, one at random from each of as many equal parts of the data, and of the one with most text.

    Args:
        lengths: characters of text of each record.

    Records of more than `LONGEST_TEXT` characters are left out, unless all are such.
    """
    numbers = [number for number, length in enumerate(lengths) if length <= LONGEST_TEXT] or list(range(len(lengths)))
    draw, total = random.Random(seed), len(numbers)
    count = min(count, total)
    bounds = [total * part // count for part in range(count + 1)]
    longest = max(numbers, key=lengths.__getitem__)
    return sorted({longest, *(numbers[draw.randrange(start, end)] for start, end in pairwise(bounds))})


def _refuse_without_rows(tokens: Mapping[str, int], records: Sequence[Mapping[str, Any]], recipe: Recipe) -> None:
    """Search all records, as one is enough to end training at its step; on a GPU by an error that does not name it."""
    found = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))
    for number, record in enumerate(records):
        for turn in record["conversations"]:
            if match := found.search(turn["value"]):
                raise LlavaRegionError(
                    f"{record_name(number, record)} of {recipe.data} holds '{match[0]}', token {tokens[match[0]]} of {recipe.model}, for "
                    "which its embeddings have no row; remove it from the text, or give a model whose embeddings were resized"
                )


def _sample(upstream: Upstream, tokenisation: Tokenisation, records: Sequence[dict], chosen: Sequence[int], recipe: Recipe) -> Sample:
    sample = Sample(len(records))
    for number in track(chosen, "tokenising a sample"):
        record, printed = records[number], io.StringIO()
        try:
            with redirect_stdout(printed):
                ids, labels = tokenisation.tokenise(record)
        except Exception as e:  # whatever the upstream asserts, or its tokenizer does not take
            why = " ".join(f"{type(e).__name__}: {e}".split())
            template = recipe.flags.get("template", "the template")
            raise LlavaRegionError(
                f"{record_name(number, record)} of {recipe.data} cannot be tokenised as {upstream.title} does ({why[:200]}); "
                f"correct the record, or {template} where every record fails"
            ) from e
        complained = bool(tokenisation.complaint) and tokenisation.complaint in printed.getvalue()
        is_image = upstream.image_tokens({"input_ids": ids[None]})
        at = places(ids, None if is_image is None else is_image[0], tokenisation.tokens_per_image)
        length = int(at[-1]) + 1 if len(at) else 0
        # upstream's tokenizer has cut a record without an image already
        too_long = length > recipe.max_length or (length == recipe.max_length and "image" not in record)
        sample.lengths.append(length)
        sample.cut += too_long
        sample.images[int(is_image.sum()) if is_image is not None else 0] += 1
        sample.complaints += complained
        trained = labels != IGNORE_INDEX
        if is_image is not None:
            trained &= ~is_image[0]
        # the first position is never a target, as nothing comes before it
        if not bool((trained & (at > 0) & (at < recipe.max_length)).any()):
            reason = _why(record, bool(trained.any()), too_long, tokenisation.marks)
            sample.masked.setdefault(reason, []).append(record_name(number, record))
    return sample


def places(ids: torch.Tensor, is_image: torch.Tensor | None, tokens_per_image: int) -> torch.Tensor:
    """Where each token (T,) ends once an image's features stand in the place of its token: positions (T,), of an image its last."""
    import torch

    widths = torch.ones_like(ids)
    if is_image is not None:
        widths[is_image] = tokens_per_image
    return widths.cumsum(0) - 1


def _why(record: Mapping[str, Any], labelled: bool, too_long: bool, marks: Sequence[str]) -> str:
    """The probable reason for a record without a label to train."""
    turns = record["conversations"]
    if labelled:
        return CUT
    speakers = [turn.get("from") for turn in turns]
    unanswered = speakers[-1] != "gpt" or "human" not in speakers  # a first turn that is not human is left out
    if unanswered or any(not turn["value"] for turn in turns):
        return EMPTY
    if any(mark in turn["value"] for turn in turns for mark in marks):
        return MARK
    return CUT if too_long else MISFIT


def _reasons(recipe: Recipe) -> dict[str, str]:
    """What each reason is called in messages."""
    length, template = recipe.flags.get("max_length", "the longest length"), recipe.flags.get("template", "the template")
    return {
        MISFIT: f"{template} does not fit the tokenizer",
        EMPTY: "an answer is empty or missing",
        MARK: "the text holds the template's own marks",
        CUT: f"the answers lie past {length} {recipe.max_length}",
    }


def _refuse(sample: Sample, reasons: Mapping[str, str], recipe: Recipe) -> None:
    count, masked, misfits = len(sample.lengths), sample.unlabelled, len(sample.masked.get(MISFIT, ()))
    if not masked:
        return
    every = masked == count
    if not every and masked <= MOST_MASKED * count and (misfits < 2 or misfits <= MOST_MISFITS * count):
        return
    allowed = f"; allowed: {MOST_MASKED:.0%}, or {MOST_MISFITS:.0%} where the template does not fit; if it is meant, give --check_records 0"
    raise LlavaRegionError(
        f"{'all' if every else f'{masked} of'} {count} sampled records of {recipe.data} have no label to train: "
        f"{_masked(sample, reasons)}; correct the data or the flags{'' if every else allowed}"
    )


def _masked(sample: Sample, reasons: Mapping[str, str]) -> str:
    """`2 as an answer is empty (record 3, record 9)`, by reason, the most frequent first."""
    ordered = sorted(sample.masked.items(), key=lambda item: -len(item[1]))
    return ", ".join(f"{len(names)} as {reasons[reason]} ({first_names(names)})" for reason, names in ordered)


def describe(sample: Sample, reasons: Mapping[str, str], recipe: Recipe) -> str:
    """The sample in one line: records without a label, lengths, images."""
    lengths, count = sorted(sample.lengths), len(sample.lengths)
    labels = "all have a label to train"
    if sample.unlabelled:
        labels = f"{sample.unlabelled} ({sample.unlabelled / count:.1%}) have no label to train: {_masked(sample, reasons)}"
    if sample.complaints:
        labels += f" ({sample.complaints} reported by upstream)"
    images = ", ".join(f"{number} in {found:,}" for number, found in sorted(sample.images.items()))
    return (
        f"{count:,} of {sample.of:,} records: {labels}; tokens with image features: median {lengths[(count - 1) // 2]:,}, "
        f"95% {lengths[-(-95 * count // 100) - 1]:,}, longest {lengths[-1]:,}, {sample.cut:,} cut to {recipe.max_length:,}; "
        f"images per record: {images}"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers says of every text past the longest length that it is too long; the sample says so itself."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
