"""Lossless codes for indices and small integers, each a pair of pure functions over numpy arrays."""
