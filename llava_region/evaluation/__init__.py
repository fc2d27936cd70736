"""Benchmarks and perplexity of a finished model."""
