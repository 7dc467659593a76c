"""Runs as pages, pictures and terminal frames, made from what they have written down."""
