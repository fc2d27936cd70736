"""Comparing an answer with reference texts: one a part of the other, equality, ANLS."""

from __future__ import annotations

import unicodedata

from rapidfuzz.distance import Levenshtein

ANLS_THRESHOLD = 0.5


def plain(text: str) -> str:
    """Case-folded, in Unicode's composed form, with single spaces."""
    return unicodedata.normalize("NFC", " ".join(unicodedata.normalize("NFC", text).casefold().split()))


def contains(prediction: str, references: list[str]) -> float:
    """1 if the prediction is part of a reference or the other way round: the paper's "margin of error" (section 3.2.1).

    An empty text is part of every text, so an empty prediction is wrong and an empty reference is ignored.
    """
    p = plain(prediction)
    return float(any(p in a or a in p for a in map(plain, references) if a)) if p else 0.0


def exact(prediction: str, references: list[str]) -> float:
    """1 if the prediction equals a reference, ignoring case and spacing."""
    p = plain(prediction)
    return float(p != "" and p in map(plain, references))


def anls(prediction: str, references: list[str]) -> float:
    """Average Normalized Levenshtein Similarity of one answer: the best reference's 1 - distance / longer length, 0 below 0.5.

    Lengths and distance are in characters of the lower-cased texts with single spaces.
    """
    p = " ".join(prediction.lower().split())
    if not p:
        return 0.0
    best = max((Levenshtein.normalized_similarity(p, " ".join(a.lower().split())) for a in references), default=0.0)
    return best if best >= ANLS_THRESHOLD else 0.0
