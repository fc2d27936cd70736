"""Reading and comparing answers: hand-computed cases and known difficulties."""

import random

import pytest

from llava_region.tasks.choices import letter_or_text, lettered, stated_letter
from llava_region.tasks.number_words import to_digits
from llava_region.tasks.short_answer import matches
from llava_region.tasks.text_match import anls, contains, exact
from llava_region.tasks.vqa_normalise import normalise


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("Ann Lee", ["ann lee"], (1, 1, 1)),
        ("by Ann Lee.", ["Ann Lee"], (1, 0, 1 - 4 / 11)),  # part of the prediction; 4 characters deleted of 11
        ("Lee", ["Ann Lee"], (1, 0, 0)),  # part of the reference; 4 of 7 inserted: similarity 3/7 is below 0.5
        ("", ["Ann Lee"], (0, 0, 0)),
        ("   \n", ["Ann Lee"], (0, 0, 0)),
        ("anything", [""], (0, 0, 0)),  # an empty reference is part of every answer
        ("", [""], (0, 0, 0)),
        ("travel", ["cooking", "Travel"], (1, 1, 1)),  # several references
        ("ab", ["abcd"], (1, 0, 0.5)),  # 0.5 itself counts
        ("Cafe\u0301  Noir", ["Café Noir"], (1, 1, 1 - 2 / 10)),  # decomposed é; ANLS compares characters as they are
        ("STRASSE", ["Straße"], (1, 1, 1 - 2 / 7)),
        ("café", ["cafe"], (0, 0, 0.75)),
    ],
)
def test_reading_metrics(prediction, references, expected):
    got = contains(prediction, references), exact(prediction, references), anls(prediction, references)
    assert got == pytest.approx(expected)


def test_anls_takes_the_best_reference():
    assert anls("kitten", ["sitting", "mitten"]) == pytest.approx(1 - 1 / 6)
    assert anls("kitten", ["sitting"]) == pytest.approx(1 - 3 / 7)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Two", "2"),
        ("twenty-one dogs", "21 dogs"),
        ("twenty one", "21"),
        ("two hundred and five", "205"),
        ("a hundred", "100"),
        ("nineteen", "19"),
        ("someone on a stone", "someone on a stone"),
        ("one, two", "1, 2"),
        ("12", "12"),
        ("Zwei", "zwei"),
        ("", ""),
    ],
)
def test_number_words(text, expected):
    assert to_digits(text) == expected


def test_lettered_options():
    assert lettered(["red", "blue"]) == "A. red\nB. blue"


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(c).", "C"),
        ("B. blue", "B"),
        ("The answer is (D)", "D"),
        ("Answer: **C**", "C"),
        ("'B'", "B"),
        ("Option A", "A"),
        ("A", "A"),
        ("A.", "A"),
        ("A is right", "A"),
        ("A because it barks", "A"),
        ("A dog", None),  # the article
        ("A dog, so B", "B"),
        ("Blue", None),  # inside a word
        ("BAD CAB", None),
        ("Washington, D.C.", None),
        ("vitamin-C", None),
        ("C++", None),
        ("A's", None),
        ("E", None),  # past the last option
        ("E or B", "B"),
        ("b or c", None),  # lower case counts only alone
        ("Б", None),  # Cyrillic
        ("", None),
        ("3B", None),
    ],
)
def test_stated_letter_of_four(text, letter):
    assert stated_letter(text, 4) == letter


def test_the_pronoun_is_not_an_option():
    assert stated_letter("I think it is C", 10) == "C"
    assert stated_letter("I", 10) == "I"


def test_letter_or_text_takes_the_option_spelt_out():
    assert letter_or_text("Light Blue.", ["red", "light blue"]) == "B"
    assert letter_or_text("blue", ["red", "light blue"]) is None
    assert letter_or_text("red", ["red", "Red"]) is None  # two options alike
    assert letter_or_text("", ["", "red"]) is None
    assert letter_or_text("A", ["B", "A"]) == "A"  # the letter, not the option's text


OPTIONS = "Which?\nOptions:\n(A) one\n(B) the blue jay\n(C) twenty one"


@pytest.mark.parametrize(
    ("prediction", "target", "right"),
    [
        ("(B)", "(B)", True),
        ("B", "(B)", True),
        ("b.", "(B)", True),
        ("(B) the blue jay, because (A) is too few", "(B)", True),
        ("(A) is wrong. The answer is (B).", "(B)", True),
        ("(A) is wrong. The answer is (B).", "(A)", False),
        ("It is The Blue Jay!", "(B)", True),
        ("Twenty one", "(C)", True),
        ("one", "(A)", True),
        ("twenty one or the blue jay", "(C)", False),  # several options named
        ("twenty one or the blue jay", "(A)", False),
        (f"{OPTIONS}\n(B)", "(B)", True),  # the question said again
        ("A bird", "(A)", False),
        ("Birds", "(B)", False),
        ("", "(A)", False),
        ("  ", "(A)", False),
        ("(D)", "(A)", False),
    ],
)
def test_short_answer_option(prediction, target, right):
    assert matches(prediction, target, OPTIONS) is right


@pytest.mark.parametrize(
    ("prediction", "target", "right"),
    [
        ("yes", "Yes", True),
        ("Yes, since he did not say no", "yes", True),
        ("He turned around, so no.", "No", True),
        ("One might say yes, but no", "No", True),
        ("One might say yes, but no", "Yes", False),
        ("No", "Yes", False),
        ("Nobody knows", "No", False),  # inside a word
        ("invalid", "valid", False),
        ("The argument is deductively invalid.", "invalid", True),
        ("The argument is not deductively valid.", "invalid", True),
        ("not valid", "valid", False),
        ("True", "True", True),
        ("(True)", "True", True),
        ("not ( True ) and ( True ) is False", "False", True),
        ("", "No", False),
    ],
)
def test_short_answer_pair(prediction, target, right):
    assert matches(prediction, target, "not ( True ) and ( True ) is") is right


@pytest.mark.parametrize(
    ("prediction", "target", "right"),
    [
        ("8", "8", True),
        ("eight", "8", True),
        ("You have twenty-one fruits", "21", True),
        ("15. There are 4 stoves and 11 others", "15", True),
        ("4 stoves + 11 others = 15", "15", True),
        ("4 + 11 = 15", "15", True),
        ("((1 - 2)) = -1", "-1", True),
        ("−50", "-50", True),
        ("-11,520", "-11520", True),
        ("50", "-50", False),
        ("150", "50", False),
        ("3.0", "3", True),
        ("the answer is 3, not 4", "3", True),
        ("none", "0", False),
        ("", "0", False),
    ],
)
def test_short_answer_number(prediction, target, right):
    assert matches(prediction, target, "((1 - 2)) =") is right


@pytest.mark.parametrize(
    ("prediction", "target", "right"),
    [
        ("] ] >", "] ] >", True),
        ("]]>", "] ] >", True),
        ("] ]", "] ] >", False),
        ("] ] > )", "] ] >", False),
        ("] ] > closes all (three)", "] ] >", True),
        ("The rest (in order) is: ] ] >", "] ] >", True),
        ("closing", "] ] >", False),
        ("barn, damp, dot", "barn damp dot", True),
        ("Sorted: Barn Damp Dot.", "barn damp dot", True),
        ("barn dot damp", "barn damp dot", False),
        ("barns damp dot", "barn damp dot", False),
        ("it&t, o'neil", "it&t o'neil", True),
        ("", "barn damp dot", False),
    ],
)
def test_short_answer_brackets_and_words(prediction, target, right):
    assert matches(prediction, target, "Input") is right


def test_short_answer_an_empty_text_is_not_an_option_without_words():
    question = "Which face?\nOptions:\n(A) :-)\n(B) :-("
    assert not matches("", "(A)", question)
    assert not matches("", "(A)", "Which face?\nOptions:\n(A) :-)")
    assert matches("(A)", "(A)", question)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The Dog", "dog"),
        ("a  cat\nand an owl", "cat and owl"),
        ("Two.", "2"),
        ("none", "0"),
        ("eleven", "eleven"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("dr. who", "dr who"),
        ("red/blue", "red blue"),
        ("red / blue", "red blue"),
        ("red/blue /green", "redblue green"),  # next to a space once: deleted everywhere
        ("red/ blue/green", "red bluegreen"),
        ("x-/b-c", "x b c"),  # the space that another mark leaves does not count
        ("t-shirt", "t shirt"),
        ("dont", "don't"),
        ("couldn'tve", "couldn't've"),
        ("couldntve", "couldntve"),
        ("twas", "'twas"),
        ("john's", "john 's"),
        ("what?!", "what"),
        ("", ""),
        ("Café", "café"),
    ],
)
def test_vqa_normalise(answer, expected):
    assert normalise(answer) == expected


def test_vqa_normalise_equals_upstream():
    """Over random strings of the characters and words that the rules are about."""
    upstream = pytest.importorskip("llava.eval.m4c_evaluator").EvalAIAnswerProcessor()
    pieces = [*";/[]\"{}()=+\\_-><@`,?!.:'&%$#* \n\t", *" 0123", "the", "a", "an", "two", "none", "ten", "red", "it's", "U.S.", "3.14"]
    pieces += [word for word in upstream.CONTRACTIONS if word != "somebody'd"]  # whose apostrophe the official table takes away
    rng = random.Random(0)
    for _ in range(3000):
        text = "".join(rng.choice(pieces) + rng.choice(["", " "]) for _ in range(rng.randint(1, 8)))
        assert normalise(text) == upstream(text), text
    for word in pieces:
        assert normalise(word) == upstream(word), word
