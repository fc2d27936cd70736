"""Which option letter an answer states: what people and models write, and sentences that hold a capital and state nothing."""

import itertools

import pytest

from llava_region.tasks.choices import stated_letter

STATES = {
    "Hepatitis B spreads by blood. The answer is D.": "D",
    "Vitamin C is an acid, so the answer is A.": "A",
    "Plan A failed. Answer: B": "B",
    "Team A beat Team B. The correct answer is C.": "C",
    "In Washington, D.C., it is cold. The answer is (B).": "B",
    "B.Paris": "B",
    "D.none of the above": "D",
    "C)Rome": "C",
    "A:Berlin": "A",
    "(B)Paris": "B",
    "B. Paris": "B",
    "B Paris": "B",
    "A\nthe reason is that it rains": "A",
    "A fits best": "A",
    "A makes the most sense.": "A",
    "A seems right": "A",
    "A is correct because B is wrong": "A",
    "A because it barks": "A",
    "A, as the picture shows": "A",
    "A. dog": "A",
    "A dog is shown, so the answer is C": "C",
    "Option B": "B",
    "I choose option C because A is wrong.": "C",
    "The correct option is **D**.": "D",
    "**C**": "C",
    "**C.** Rome": "C",
    "Answer: **C**": "C",
    "answer is b.": "B",
    "The answer is b": "B",
    "the answer is (a)": "A",
    "The answer is A.": "A",
    "The answer is A dog? No. The answer is D.": "D",
    "The answer: D": "D",
    "Answer = B": "B",
    "My answer would be C.": "C",
    "The answer should be A": "A",
    "The answer must be B, not A.": "B",
    "It is (B).": "B",
    "I think it is C": "C",
    "I would go with D.": "D",
    "So B.": "B",
    "Therefore, C": "C",
    "Thus A.": "A",
    "probably D": "D",
    "Option A is wrong, option B is right": "B",
    "Option (A) is not correct. Option (C) is.": "C",
    "Choice B is the best": "B",
    "The letter is C": "C",
    "letter D": "D",
    "A dog, so B": "B",
    "E or B": "B",
    "'B'": "B",
    '"C"': "C",
    "[D]": "D",
    "`A`": "A",
    "C is the capital": "C",
    "C, since Hepatitis B is a virus": "C",
    "B - Paris": "B",
    "B: because A has no legs": "B",
    "The final answer is: B": "B",
    "The answer is option C.": "C",
    "The answer is: (D) none": "D",
    "The blood group is AB. The answer is B": "B",
    "A. dog\nB. cat\nThe answer is B.": "B",
    "Answer:\nC": "C",
    "the best choice is A": "A",
    "The right choice: D": "D",
    "b": "B",
    "(c).": "C",
    "Correct answer: A. Eiffel Tower": "A",
}
# letters in names, abbreviations, articles, pronouns and words
STATES_NONE = [
    "Hepatitis B spreads by blood",
    "Vitamin C",
    "vitamin C is good for you",
    "Washington, D.C.",
    "A dog",
    "A cat sits on a mat.",
    "A large brown dog",
    "I think so",
    "I do not know",
    "Team A won",
    "Plan B failed",
    "Figure C shows a dog",
    "Type A blood",
    "The Type B virus",
    "Group C has four members",
    "Blue",
    "BAD CAB",
    "C++ is a language",
    "A's",
    "vitamin-C",
    "3B",
    "A4 paper",
    "B2B sales",
    "She got an A in math",
    "Grade A beef",
    "point A to point B",
    "from A to B",
    "Route C leads home",
    "The letters spell ABC",
    "Appendix D",
    "Schedule A",
    "Class B license",
    "U.S.A.",
    "B.C.E.",
    "A.I. is new",
    "D.J. Smith",
    "B.B. King plays",
    "Exhibit A shows it",
    "Section C covers taxes",
    "Hepatitis C and hepatitis B are diseases",
    "The C major scale",
    "A minor chord",
    "Big D",
    "Mr. T",
    "Player B moves first",
    "Line A crosses line B",
    "Angle C measures 40 degrees",
    "Box D holds three balls",
    "It's a cat",
    "none of them",
    "the dog",
    "a dog",
    "",
    "E",
    "Б",
    "Person A greets person B",
    "Company A owns company B",
    "Sample C was heated",
    "Solution D turned blue",
    "Vector A has length 3",
    "The A-team",
    "an A-frame house",
    "Malcolm X",
]
NAMES = (
    "Hepatitis {} spreads by blood.",
    "Vitamin {} is a vitamin.",
    "Team {} won, Plan {} did not.",
    "{}-frame houses are old.",
    "In {}.C. it rains.",
)
STATEMENTS = (
    "The answer is {}.", "Answer: {}", "Answer: **{}**", "So the correct option is ({}).", "The correct answer is {}. It is known.",
    "I choose option {}.", "Therefore, {}", "It must be ({}).",
)  # fmt: skip
BEGINNINGS = (
    "{}",
    "{}.",
    "{}. {name}",
    "({}) {name}",
    "{}: {name}",
    "**{}** {name}",
    "{}\n{name}",
    "{}, because {name}",
    "{} is right. {name}",
)


@pytest.mark.parametrize("text", STATES)
def test_a_letter_that_is_stated(text):
    assert stated_letter(text, 4) == STATES[text]


@pytest.mark.parametrize("text", STATES_NONE)
def test_no_letter_where_none_is_stated(text):
    assert stated_letter(text, 4) is None


def test_every_letter_is_read_alike():
    """Whatever other letter stands in front of it, or behind."""
    for said, other in itertools.product("ABCD", repeat=2):
        for name in NAMES:
            for statement in STATEMENTS:
                text = f"{name.replace('{}', other)} {statement.format(said)}"
                assert stated_letter(text, 4) == said, text
            for beginning in BEGINNINGS:
                text = beginning.format(said, name=name.replace("{}", other))
                assert stated_letter(text, 4) == said, text


def test_letters_past_the_last_option():
    assert stated_letter("The answer is E. No, the answer is B.", 4) == "B" and stated_letter("The answer is E.", 5) == "E"
    assert stated_letter("I", 9) == "I" and stated_letter("I think it is C", 9) == "C"


@pytest.mark.parametrize("unit", ["A ", "answer is ", "* ", "( ", "option A is not ", " ", "\n", "the answer is (", "so ", "**A", "a.B"])
def test_a_megabyte_is_read_in_linear_time(unit):
    """Half a second; a square of its length would be hours."""
    stated_letter(unit * (1_000_000 // len(unit)), 4)
