"""Errors that a user can fix: shown as one line, `error: ...`, with exit code 2."""


class LlavaRegionError(ValueError):
    """Bad input. The message says what was given, what is allowed and how to fix it, in one line."""


class UnsupportedUpstream(LlavaRegionError):
    """The installed LLaVA or Bunny lacks a symbol that a hook needs, or has it with another signature."""


class UnusableTokenizer(LlavaRegionError):
    """The tokenizer of a model is missing or cannot be loaded."""
