"""English number words as digits, zero to 999."""

from __future__ import annotations

import re

UNITS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"

VALUES = {word: value for value, word in enumerate(UNITS.split())} | {word: 10 * value for value, word in enumerate(TENS.split(), 2)}
DIGIT = "|".join(UNITS.split()[1:10])
BELOW_100 = rf"(?:{'|'.join(TENS.split())})(?:[\s-](?:{DIGIT}))?|{'|'.join(UNITS.split())}"
NUMBER = re.compile(rf"\b(?:({DIGIT}|a) hundred(?:(?: and)? ({BELOW_100}))?|({BELOW_100}))\b")


def to_digits(text: str) -> str:
    """Lower-case `text` with its number words as digits: "Twenty-one dogs" is "21 dogs", "two hundred and five" is "205".

    Words that only contain a number word ("someone", "stone") stay as they are.
    """
    return NUMBER.sub(_value, text.lower())


def _value(match: re.Match[str]) -> str:
    """The digits of one number in words."""
    hundreds, rest, alone = match.groups()
    value = sum(VALUES[word] for word in re.split(r"[\s-]", alone or rest or "") if word)
    return str(value + 100 * VALUES.get(hundreds, 1) if hundreds else value)
