"""Checkpoints: what counts as one, how it is written and read back."""
