"""What a label can be other than a token id."""

IGNORE_INDEX = -100  # nothing to learn at this position; the default of torch's cross-entropy, which exports no name for it
