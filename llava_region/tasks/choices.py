"""Multiple choice: writing the options of a question with letters, and reading the letter in an answer."""

from __future__ import annotations

import re

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

# A capital that is not part of a word, abbreviation, contraction or hyphenation ("vitamin-C", "A's", "D.C." and "C++" do not match).
STANDALONE = re.compile(r"(?<!\w)(?<!\w[-'’])(?<![^\W\d]\.)([A-Z])(?![\w+#]|[-'’.]\w)")
# "A dog" and "I think" begin with an article and a pronoun; "A is right" and "A because ..." name the option.
WORD_AFTER = re.compile(r"\s+(?!(?:is|was|because|since|as|and|or|seems|would)\b)[a-z]")
ONLY_LOWER = re.compile(r"[\s(\[*\"']*([a-z])[\s)\]*\"'.:,]*")


def lettered(options: list[str]) -> str:
    """`A. first\\nB. second`, one option per line."""
    return "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))


def first_letter(text: str, count: int) -> str | None:
    """The first standalone option letter in an answer, or None.

    A letter is standalone if it is a capital that is not part of a word, abbreviation or hyphenation: `B`, `(B)`,
    `B.`, `Answer: B` and `**B**` have one, `Blue`, `D.C.`, `vitamin-C` and `A's` do not. A lower-case letter counts only if it
    is the whole answer. An `A` or `I` before a lower-case word is the article or the pronoun and is ignored (`A dog, so B` is
    B), unless that word shows that the option is meant (`A is right`, `A because ...`).

    Args:
        count: number of options; letters after the last one do not count.
    """
    allowed = LETTERS[:count]
    if (lower := ONLY_LOWER.fullmatch(text)) and lower[1].upper() in allowed:
        return lower[1].upper()
    for match in STANDALONE.finditer(text):
        if match[1] in allowed and not (match[1] in "AI" and WORD_AFTER.match(text, match.end())):
            return match[1]
    return None


def letter_or_text(text: str, options: list[str]) -> str | None:
    """`first_letter`; for an answer without a letter, the letter of the only option whose text equals the answer."""
    letter = first_letter(text, len(options))
    if letter is None:
        spelled = [name for name, option in zip(LETTERS, options, strict=False) if _plain(option) == _plain(text) != ""]
        letter = spelled[0] if len(spelled) == 1 else None
    return letter


def _plain(text: str) -> str:
    """Case-folded, with single spaces, without full stops and quotation marks around it."""
    return " ".join(text.casefold().split()).strip(" .\"'")
