"""Texts -> token ids, with tokenizers of any kind."""
