"""Texts -> token ids, with SentencePiece models."""
