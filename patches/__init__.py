"""The only code that touches an upstream: hooks for training, and loading, prompting and tokenising for the tools."""
