"""Multiple choice: writing the options of a question with letters, and reading the letter in an answer."""

from __future__ import annotations

import re

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

# What may not follow an option letter: the rest of a word, abbreviation, contraction or hyphenation ("C++", "A's", "D.C.", "C-clamp").
_END = r"(?![\w+#]|[-'’]\w|\.[A-Z]\.)"
# Words after a letter that say something of the option. After "A" and "I" any other word makes them the article and the pronoun.
_LINK = (
    r"(?:is|was|are|because|since|as|and|or|but|if|so|for|seems|looks|appears|fits|matches|suits|makes|has|does|shows|describes|represents|"
    r"explains|follows|states|says|works|would|could|should|must|will|can|cannot|best|only|here|in\s+my|due|given|based|correctly)\b"
)
_MARKS = r"[\s*_(\[\"'`]{0,12}"  # bold, brackets and quotation marks before a letter; bounded, so that long runs cost no more
_AFTER = rf"(?=[*_)\]\"'`]{{0,4}}\s{{0,4}}(?:$|[.,:;!?)\]\n–—-]|{_LINK}))"  # an end, or a link

# "the answer is B", "Answer: (B)", "the correct option is **B**", "answer B"
STATED = re.compile(
    r"\b(?:(?i:answer)(?:\s{1,4}(?i:is|was|must\s+be|should\s+be|would\s+be|will\s+be|choice\s+is|option\s+is))?"
    r"|(?i:option|choice|letter)\s{0,4}(?:\s(?i:is|must\s+be|should\s+be|would\s+be)|(?=[:=])))"
    rf"\s{{0,4}}[:=]?{_MARKS}(?:(?i:option|choice|letter)\s{{1,4}}{_MARKS})?(?:([A-Z]){_END}|([a-z]){_END}(?=[*_)\]\"'`]{{0,4}}\s{{0,4}}(?:$|[.,;!?)\n])))"
)
# at the very beginning: "B", "B. Paris", "B.Paris", "(B) Paris", "B: because", "B Paris"
OPENING = re.compile(
    rf"\s*[*_(\[\"'`]{{0,4}}([A-Z])(?:{_END}{_AFTER}|{_END}(?=[*_)\]\"'`]{{0,4}}\s{{1,4}}[A-Z])|[.):](?![A-Z]\.|\s*$)(?=\S))"
)
# "(B)", "[B]", "**B**", "option B", unless it is said to be wrong
MARKED = re.compile(
    rf"(?:\(([A-Z])\)|\[([A-Z])\]|\*\*\(?([A-Z])\)?[.:]?\*\*|\b(?i:option|choice|letter)\s{{1,4}}[\"'*(]{{0,4}}([A-Z]){_END})"
    r"(?![\"'*)]{0,4}\s{0,4}(?:(?:is|was|seems|are)\s+)?(?:not|wrong|incorrect|false|out|impossible|cannot|can't)\b)"
)
# a capital by itself where an answer stands: after a mark, or a word that leads to one; not after a noun ("Hepatitis B", "Team A")
BARE = re.compile(
    r"(?:[.,;!?]\s{1,4}|[:\n–—]\s{0,4}|(?<!\w)(?i:is|be|so|thus|hence|therefore|then|or|and|choose|chose|pick|picked|select|say|guess|with|probably|likely|"
    rf"definitely|clearly|surely)\s{{1,4}})[*_(\[\"'`]{{0,4}}([A-Z]){_END}{_AFTER}"
)
ARTICLE = re.compile(rf"[^\S\n]{{1,4}}(?!{_LINK})[a-z]")  # after "A" or "I" on the same line
ONLY_LOWER = re.compile(r"[\s(\[*\"']*([a-z])[\s)\]*\"'.:,]*")


def lettered(options: list[str]) -> str:
    """`A. first\\nB. second`, one option per line."""
    return "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))


def stated_letter(text: str, count: int) -> str | None:
    """The option letter that an answer gives, or None where it gives none.

    What states it most clearly counts: the last "the answer is B" or "Answer: B"; the letter that the answer begins with (`B`,
    `B. Paris`, `B.Paris`, `(B) Paris`); the first in brackets, bold or after "option", unless it is said to be wrong; the first capital
    by itself where an answer stands ("so B"). Capitals that are part of a name ("Hepatitis B", "Vitamin C", "D.C.") are none. `A` and
    `I` before a word are the article and the pronoun ("A dog, so B" is B), unless the word says something of the option ("A fits best").
    A lower-case letter counts if it is the whole answer, or all that is stated ("the answer is b.").

    Args:
        count: number of options; letters after the last one do not count.
    """
    allowed = LETTERS[:count]
    if (lower := ONLY_LOWER.fullmatch(text)) and lower[1].upper() in allowed:
        return lower[1].upper()

    def letter_of(match: re.Match[str]) -> str | None:
        at = match.lastindex or 0
        letter = match[at].upper()
        is_word = letter in "AI" and match[at].isupper() and ARTICLE.match(text, match.end(at))
        return letter if letter in allowed and not is_word else None

    stated = [letter for match in STATED.finditer(text) if (letter := letter_of(match))]
    if stated:
        return stated[-1]
    opening = OPENING.match(text)
    if opening and (letter := letter_of(opening)):
        return letter
    for kind in (MARKED, BARE):
        if letter := next((letter for match in kind.finditer(text) if (letter := letter_of(match))), None):
            return letter
    return None


def letter_or_text(text: str, options: list[str]) -> str | None:
    """`stated_letter`; for an answer without a letter, the letter of the only option whose text equals the answer."""
    letter = stated_letter(text, len(options))
    if letter is None:
        spelled = [name for name, option in zip(LETTERS, options, strict=False) if _plain(option) == _plain(text) != ""]
        letter = spelled[0] if len(spelled) == 1 else None
    return letter


def _plain(text: str) -> str:
    """Case-folded, with single spaces, without full stops and quotation marks around it."""
    return " ".join(text.casefold().split()).strip(" .\"'")
