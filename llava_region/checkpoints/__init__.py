"""Checkpoints on disk: their tensors, adapters, and the folder around them."""
