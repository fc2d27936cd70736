"""The answer normalisation of the VQA challenges' EvalAI server, as TextVQA uses it, from its public description."""

from __future__ import annotations

import re

from llava_region.tasks.number_words import UNITS

ARTICLES = {"a", "an", "the"}
NUMBERS = {word: str(n) for n, word in enumerate(UNITS.split()[:11])} | {"none": "0"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
LONE_PERIOD = re.compile(r"\.(?!\d)")

# If one of these is written without one of its apostrophes ("dont", "couldnt've", "couldn'tve"), the apostrophe is put back.
CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd
how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't
'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've
they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd
who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've
you'll you're you've
"""


def _without_one_apostrophe(word: str) -> list[str]:
    """The ways to write the word with one apostrophe forgotten."""
    return [word[:i] + word[i + 1 :] for i, character in enumerate(word) if character == "'"]


REPAIRED = {broken: whole for whole in CONTRACTIONS.split() for broken in _without_one_apostrophe(whole)}


def normalise(answer: str) -> str:
    """Lower case, without punctuation and articles, with missing apostrophes put back and numbers up to ten as digits.

    A punctuation mark that is next to a space somewhere in the answer is deleted everywhere; any other becomes a space. Commas and
    question marks are always deleted; a full stop is kept before a digit.
    """
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    spaced = text
    for mark in PUNCTUATION:
        text = text.replace(mark, "" if f"{mark} " in spaced or f" {mark}" in spaced else " ")
    text = LONE_PERIOD.sub("", text)
    words = [NUMBERS.get(word, word) for word in text.split()]
    return " ".join(REPAIRED.get(word, word) for word in words if word not in ARTICLES)
