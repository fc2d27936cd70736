"""One conversation template, under the name that Bunny gives to phi-2's."""

from types import SimpleNamespace

default_conversation = SimpleNamespace(
    question="USER: {} ASSISTANT: ", sep=" ", sep2="<|endoftext|>", roles=("USER", "ASSISTANT"), sep_style=SimpleNamespace(name="TWO")
)
conv_templates = {"bunny": default_conversation}
