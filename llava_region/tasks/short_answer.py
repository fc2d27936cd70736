"""Reading a short answer out of a text that may explain itself, as BIG-Bench-Hard's scorer has to.

What a right answer looks like says how it is read: an option letter, one of a pair of words, a number, brackets, or words.
Where several candidates are named, an answer that opens with one is taken at that, and otherwise the last one counts, the
explanation having come first; of option letters the first counts. If the text says "the answer is ..." or "Answer: ...",
only what follows is read.
"""

from __future__ import annotations

import re

from llava_region.tasks.choices import first_letter
from llava_region.tasks.number_words import to_digits

PAIRS = (("yes", "no"), ("true", "false"), ("valid", "invalid"))
CUE = re.compile(r"\banswer(?:\s+is\b|\s*:)[\s:]*(?=\S)", re.IGNORECASE)
OPTION = re.compile(r"^\(([A-Z])\) (.*)$", re.MULTILINE)
BRACKETED = re.compile(r"\(([A-Z])\)")
NUMBER = re.compile(r"(?<![\w.)])-?\d+(?:,\d{3})*(?:\.\d+)?")
BRACKETS = re.compile(r"[\[\](){}<>](?:\s*[\[\](){}<>])*")
WORD = re.compile(r"[\w&']+")
OPENING = " \n\t*\"'`$"


def matches(prediction: str, target: str, question: str) -> bool:
    """Whether an answer gives the target of a BIG-Bench-Hard question, alone or beside an explanation.

    Args:
        target: `(B)`, `Yes`, `invalid`, `-50`, `] >`, or words in their order.
        question: the task's input; its lines `(A) ...` are the options.
    """
    text = prediction.strip().removeprefix(question).strip()
    text = text[max((match.end() for match in CUE.finditer(text)), default=0) :]
    if not text:
        return False
    if BRACKETED.fullmatch(target):
        return _option(text, question) == target[1]
    for pair in PAIRS:
        if target.lower() in pair:
            return _one_of_pair(text, pair) == target.lower()
    if NUMBER.fullmatch(target):
        return _number(text) == float(target)
    if BRACKETS.fullmatch(target):
        return _brackets(text) == "".join(target.split())
    return _has_words(text, target)


def _option(text: str, question: str) -> str | None:
    """The letter of an option: spelt out as the whole answer, in brackets, standing alone, or the only one spelt out."""
    options = {letter: " ".join(WORD.findall(option.lower())) for letter, option in OPTION.findall(question)}
    words = " ".join(WORD.findall(text.lower()))
    if equal := [letter for letter, option in options.items() if option == words]:
        return equal[0]
    if bracketed := [letter for letter in BRACKETED.findall(text) if letter in options]:
        return bracketed[0]
    if letter := first_letter(text, len(options)):
        return letter
    spelt = [letter for letter, option in options.items() if option and f" {option} " in f" {words} "]
    return spelt[0] if len(spelt) == 1 else None


def _one_of_pair(text: str, pair: tuple[str, str]) -> str | None:
    """The word of the pair that an answer opens with or, failing that, names last; "not valid" names `invalid`."""
    found = list(re.finditer(rf"\b(not\s+(?:\w+\s+)?)?({'|'.join(pair)})\b", text.lower()))
    if not found:
        return None
    opens = not text[: found[0].start()].strip(OPENING + "(")
    negation, word = (found[0] if opens else found[-1]).groups()
    return pair[1 - pair.index(word)] if negation else word


def _number(text: str) -> float | None:
    """The number that an answer opens with (unless it is worked out, with an `=`) or, failing that, names last."""
    text = to_digits(text.replace("−", "-"))
    found = list(NUMBER.finditer(text))
    if not found:
        return None
    opens = not text[: found[0].start()].strip(OPENING) and "=" not in text
    return float((found[0] if opens else found[-1])[0].replace(",", ""))


def _brackets(text: str) -> str | None:
    """The run of brackets, without spaces, that an answer opens with or, failing that, ends with."""
    found = list(BRACKETS.finditer(text))
    if not found:
        return None
    opens = not text[: found[0].start()].strip(OPENING)
    return "".join((found[0] if opens else found[-1])[0].split())


def _has_words(text: str, target: str) -> bool:
    """Whether the target's words stand in the answer one after another, whatever marks are between them."""
    return f" {' '.join(WORD.findall(target.lower()))} " in f" {' '.join(WORD.findall(text.lower()))} "
