"""What a flag may be: a closed set of words, or numbers within bounds."""

from __future__ import annotations

import math
import re
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from llava_region.errors import LlavaRegionError


@dataclass(frozen=True)
class Values:
    """The values that a flag may have.

    Attributes:
        allowed: for people: `pad, square`.
        holds: whether a value is one of them.
        otherwise: what another value would do, to follow the value in a message.
    """

    allowed: str
    holds: Callable[[Any], bool]
    otherwise: str = "is not among its values"


def words(names: Iterable[str], otherwise: str = Values.otherwise, pattern: str | None = None, further: str = "") -> Values:
    """A closed set of words.

    Args:
        names: all of them, in the order in which they are shown.
        pattern: a regular expression for more of them; further: how to show those.
    """
    known = tuple(names)
    match = re.compile(pattern).fullmatch if pattern else lambda word: None
    return Values(", ".join([*known, further] if further else known), lambda word: word in known or bool(match(word)), otherwise)


# Comparisons with NaN are false, so it is in none of these.
POSITIVE = Values("a number above 0", lambda value: 0 < value < math.inf)
NOT_NEGATIVE = Values("0 or more", lambda value: 0 <= value < math.inf)
BELOW_ONE = Values("0 or more, but below 1", lambda value: 0 <= value < 1)
SHARE = Values("a number from 0 to 1", lambda value: 0 <= value <= 1)
AT_LEAST_ONE = Values("1 or more", lambda value: value >= 1)
FINITE = Values("a number", math.isfinite)
SEED = Values(f"0 to {2**32 - 1}", lambda value: 0 <= value < 2**32)


def check_values(args: Namespace, table: Mapping[str, Values]) -> None:
    """Check flags against their values. A flag that the upstream does not have, or that is not set, is passed over.

    Args:
        table: name of the flag, without dashes -> its values.

    Raises:
        LlavaRegionError: names the first flag with another value, and what is allowed.
    """
    for flag, values in table.items():
        value = getattr(args, flag, None)
        if value is not None and not values.holds(value):
            raise LlavaRegionError(f"--{flag} {value} {values.otherwise}; allowed: {values.allowed}")
