"""Records of all the kinds that upstream's preprocessing takes, some of which it masks."""


def turns(*texts: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


RECORDS = [
    {"id": 7, "image": "1.png", "conversations": turns("<image>\nWhat is it?", "A circle")},
    {
        "id": "two rounds",
        "image": "2.png",
        "conversations": turns("Say <image>\nwhat", "A circle", "Its colour?", "Blue"),
        "more": {},
    },
    {"id": "text", "conversations": turns("How are you? 你好 🎉 ", " Fine\n")},
    {"id": None, "conversations": [{"from": "gpt", "value": "first"}, *turns("What?", "That")]},
    {"id": "marks", "conversations": turns("What does </s> or <|endoftext|> end?", "A turn. ASSISTANT: ends it")},
    {"id": "empty", "image": "3.png", "conversations": turns("<image>", "")},
    {"id": "blank", "image": "3.png", "conversations": turns("<image>", " \n")},
    {"id": "unanswered", "image": "3.png", "conversations": turns("<image>\nWhat?", "That", "And?")},
    {"id": "seen", "image": "4.png", "conversations": turns("Draw it", "<image>\nHere")},
    {"id": "unseen", "image": "4.png", "conversations": turns("What?", "That")},
    {"id": "no image", "conversations": turns("<image>\nWhat?", "That")},
    {"id": "long", "conversations": turns("word " * 700, "short " * 700)},
    {"id": "long image", "image": "5.png", "conversations": turns("<image>\n" + "word " * 30, "short " * 300)},
]
# those that a template of captions takes
CAPTIONS = [record for record in RECORDS if len(record["conversations"]) == 2 and "<image>" in record["conversations"][0]["value"]]
