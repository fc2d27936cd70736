"""How an upstream turns a record into token ids and labels: what the preflight's sample of records goes through."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

from llava_region.patches.seams import rebound
from llava_region.patches.vocabulary import tokens_without_rows

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Tokenisation:
    """An upstream's own tokenisation, set up as its train() sets it up.

    Attributes:
        tokenise: a record -> ids (T,) and labels (T,), -100 where nothing is trained, before a batch cuts them. Raises what the
            upstream raises.
        tokens_per_image: how many tokens stand in the place of an image's one.
        marks: texts that the template puts between turns; a turn that holds one is taken apart there.
        complaint: what the upstream prints where it gives up a record's labels; empty: it prints nothing.
        without_rows: tokens for which the model's embeddings have no row, and their numbers.
    """

    tokenise: Callable[[Mapping[str, Any]], tuple[torch.Tensor, torch.Tensor]]
    tokens_per_image: int = 1
    marks: tuple[str, ...] = ()
    complaint: str = ""
    without_rows: Mapping[str, int] = field(default_factory=dict)


@contextmanager
def family_tokenisation(
    data: ModuleType, conversation: ModuleType, tokenizer: PreTrainedTokenizerBase, template: Any, tokens_per_image: int,
    rows: int | None, **settings: Any,
) -> Iterator[Tokenisation]:  # fmt: skip
    """The tokenisation of LLaVA's kin, whose functions look up the template in `conversation.default_conversation`.

    Args:
        data: the module with `preprocess` and `preprocess_multimodal`; conversation: the module with the templates.
        template: the conversation template; train() sets it anew after the preflight.
        rows: of the embeddings; None: as many as there are tokens.
        settings: the data arguments that `preprocess_multimodal` reads.
    """
    arguments = SimpleNamespace(**settings)

    def tokenise(record: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        turns, has_image = copy.deepcopy([record["conversations"]]), "image" in record
        if has_image:
            turns = data.preprocess_multimodal(turns, arguments)
        found = data.preprocess(turns, tokenizer, has_image=has_image)
        return found["input_ids"][0], found["labels"][0]

    with rebound(conversation, default_conversation=template):
        without_rows = {} if rows is None else tokens_without_rows(tokenizer, rows)
        yield Tokenisation(tokenise, tokens_per_image, marks_of(template), "WARNING: tokenization mismatch", without_rows)


def marks_of(template: Any) -> tuple[str, ...]:
    """What a turn must not hold: the ends of turns, and the role before an answer, as the upstreams' masking splits by them."""
    separators = [mark for mark in (template.sep, template.sep2) if mark and mark.strip()]
    kind = template.sep_style.name
    if kind == "TWO":
        return (*separators, f"{template.sep}{template.roles[1]}: ")
    if kind == "LLAMA_2":
        return (*separators, "[/INST] ")
    return (*separators, f"{template.sep}{template.roles[1]}") if kind == "MPT" else ()
