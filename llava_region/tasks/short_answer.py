"""Finding a short answer in a text that may also explain it, for BIG-Bench-Hard's scorer.

The right answer decides how the text is read: as an option letter, one of a pair of words, a number, brackets, or words. If
the text names several candidates, one at its beginning counts; otherwise the last one does, as the explanation came first.
Of option letters the first counts. If the text says "the answer is ..." or "Answer: ...", only what follows is read.
"""

from __future__ import annotations

import re

from llava_region.tasks.choices import stated_letter
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
    """Whether an answer gives the target of a BIG-Bench-Hard question, alone or with an explanation.

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
    """The letter of an option: one spelt out as the whole answer, a letter in brackets, a letter alone, or the only option spelt out."""
    options = {letter: " ".join(WORD.findall(option.lower())) for letter, option in OPTION.findall(question)}
    words = " ".join(WORD.findall(text.lower()))
    if equal := [letter for letter, option in options.items() if option == words]:
        return equal[0]
    if bracketed := [letter for letter in BRACKETED.findall(text) if letter in options]:
        return bracketed[0]
    if letter := stated_letter(text, len(options)):
        return letter
    spelt = [letter for letter, option in options.items() if option and f" {option} " in f" {words} "]
    return spelt[0] if len(spelt) == 1 else None


def _one_of_pair(text: str, pair: tuple[str, str]) -> str | None:
    """The word of the pair at the beginning of an answer, or else the last one in it; "not valid" means `invalid`."""
    found = list(re.finditer(rf"\b(not\s+(?:\w+\s+)?)?({'|'.join(pair)})\b", text.lower()))
    if not found:
        return None
    opens = not text[: found[0].start()].strip(OPENING + "(")
    negation, word = (found[0] if opens else found[-1]).groups()
    return pair[1 - pair.index(word)] if negation else word


def _number(text: str) -> float | None:
    """The number at the beginning of an answer (unless the answer is a calculation, with an `=`), or else the last one in it."""
    text = to_digits(text.replace("−", "-"))
    found = list(NUMBER.finditer(text))
    if not found:
        return None
    opens = not text[: found[0].start()].strip(OPENING) and "=" not in text
    return float((found[0] if opens else found[-1])[0].replace(",", ""))


def _brackets(text: str) -> str | None:
    """The sequence of brackets, without spaces, at the beginning of an answer, or else the last one in it."""
    found = list(BRACKETS.finditer(text))
    if not found:
        return None
    opens = not text[: found[0].start()].strip(OPENING)
    return "".join((found[0] if opens else found[-1])[0].split())


def _has_words(text: str, target: str) -> bool:
    """Whether the target's words follow one another in the answer, whatever punctuation is between them."""
    return f" {' '.join(WORD.findall(target.lower()))} " in f" {' '.join(WORD.findall(text.lower()))} "
