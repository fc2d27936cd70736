"""One conversation template, under the name that Bunny gives to phi-2's."""

from types import SimpleNamespace

conv_templates = {"bunny": SimpleNamespace(question="USER: {} ASSISTANT: ", end="<|endoftext|>")}
