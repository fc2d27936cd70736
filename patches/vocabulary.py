"""The tokenizer of the model to tune, and what an upstream does to its vocabulary before the first step."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from llava_region.errors import LlavaRegionError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Growth(NamedTuple):
    """A flag for which an upstream adds tokens, and sets the number of the embeddings' rows to that of the tokenizer's tokens.

    Attributes:
        flag: with its value; instead: what to give so that nothing is added.
        tokens: those that it adds where they are not there.
        overwrites: whether the rows of added tokens are set to the mean of the others.
    """

    flag: str
    tokens: tuple[str, ...]
    instead: str
    overwrites: bool


def load_tokenizer(model: str, flag: str, load: Callable[[], PreTrainedTokenizerBase]) -> PreTrainedTokenizerBase:
    """Load the tokenizer as the upstream does.

    Raises:
        LlavaRegionError: it cannot be loaded.
    """
    try:
        return load()
    except Exception as e:  # a missing or damaged file is anything from OSError to sentencepiece's RuntimeError and TypeError
        raise LlavaRegionError(
            f"{flag} {model} holds no tokenizer that can be loaded ({type(e).__name__}: {str(e).strip().partition(chr(10))[0]}); "
            "copy or download its tokenizer files"
        ) from e


def tokens_without_rows(tokenizer: PreTrainedTokenizerBase, rows: int) -> dict[str, int]:
    """The tokens past the last row of the embeddings, in order, and their numbers. A text that holds one ends training at that step."""
    return dict(sorted((item for item in tokenizer.get_vocab().items() if item[1] >= rows), key=lambda item: item[1]))


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: str, rows: int, growths: list[Growth], *, lora: bool) -> None:
    """Refuse a vocabulary that a run would not train, or not save: LoRA runs save no rows of the embeddings.

    Args:
        model: flag and value, for messages.
        rows: of the embeddings of the model to tune.
        growths: what the upstream does with these flags.
        lora: whether the run trains LoRA.

    Raises:
        LlavaRegionError: says which tokens, and how to go without.
    """
    known = tokenizer.get_vocab()
    new = {token: growth for growth in growths for token in growth.tokens if token not in known}
    size = len(tokenizer) + len(new)
    if lora and growths and (size != rows or any(growth.overwrites for growth in new.values())):
        growth = next(iter(new.values()), growths[0])
        does = f"adds {', '.join(new)} to the vocabulary" if new else "sets the embeddings to the tokenizer's length"
        raise LlavaRegionError(
            f"{growth.flag} {does} ({rows} rows before, {size} after), and a LoRA run saves no rows of the embeddings, so that its result "
            f"could not be loaded; {growth.instead}"
        )
    added: Any = getattr(tokenizer, "get_added_vocab", dict)()
    beyond = {} if growths else tokens_without_rows(tokenizer, rows)
    always_used = {tokenizer.bos_token, tokenizer.eos_token}
    needed = [token for token in beyond if token not in added or token in always_used]
    if needed:
        raise LlavaRegionError(
            f"{model}: its tokenizer has {len(tokenizer)} tokens, but its embeddings have {rows} rows: '{needed[0]}' (token "
            f"{known[needed[0]]}) has none; give the tokenizer that belongs to the model, or a model whose embeddings were resized"
        )
