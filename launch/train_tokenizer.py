"""Trains a SentencePiece tokenizer: `python launch/train_tokenizer.py PATTERN --vocab-size 4096 --out FILE`."""

from __future__ import annotations

if __name__ == "__main__":
    from _run import run  # of this folder

    run("train-tokenizer")
