"""Grams and overlaps of texts, compared with a plain search through lists of words."""

from __future__ import annotations

import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.exposure.grams import (
    GRAM_WORDS,
    MIN_WORDS,
    STRIDE,
    HashedText,
    Overlap,
    all_grams,
    overlap_of,
    sampled_grams,
    words_of,
)
from shards.suites.decontaminate import ngrams
from tests.examples import examples


def drawn(seed: int, count: int) -> list[str]:
    """Draw words of which there are few, so that runs of them repeat within a text and between texts."""
    return random.Random(seed % 3).choices("ab", k=count)


TEXTS = st.lists(st.builds(drawn, st.integers(0, 99), st.integers(0, 200)).map(" ".join), min_size=1, max_size=5)


@settings(max_examples=examples(100))
@given(texts=TEXTS)
def test_a_text_is_sampled_at_every_stride_and_all_its_grams_are_those_of_the_suites(texts: list[str]) -> None:
    words = words_of(texts)
    assert [len(words.of(i)) for i in range(len(texts))] == [len(text.split()) for text in texts]
    hashes, owners = sampled_grams(words)
    grams, of_grams = ngrams(texts, GRAM_WORDS)
    for i in range(len(texts)):
        assert all_grams(words.of(i)).tolist() == grams[of_grams == i].tolist()
        assert hashes[owners == i].tolist() == grams[of_grams == i][::STRIDE].tolist()


def plain_overlap(text: list[str], document: list[str]) -> Overlap:
    """Compare lists of words by trying all places."""
    if text == document:
        return Overlap(len(text), True, True)
    if len(text) < MIN_WORDS:
        return Overlap(0, False, False)
    shared = set()
    for i in range(len(text) - MIN_WORDS + 1):
        run = text[i : i + MIN_WORDS]
        if any(run == document[j : j + MIN_WORDS] for j in range(len(document) - MIN_WORDS + 1)):
            shared |= set(range(i, i + MIN_WORDS))
    contains = any(text == document[j : j + len(text)] for j in range(len(document)))
    return Overlap(len(shared), contains, False)


@settings(max_examples=examples(200))
@given(
    words=st.builds(drawn, st.integers(0, 99), st.integers(0, 200)),
    first=st.integers(0, 120),
    length=st.integers(0, 120),
    around=st.builds(drawn, st.integers(0, 99), st.integers(0, 40)),
)
def test_overlaps_are_those_of_a_plain_search(words: list[str], first: int, length: int, around: list[str]) -> None:
    text = [*around, *words[first : first + length], *around]
    hashed = [HashedText(words_of([" ".join(one)]).hashes) for one in (text, words)]
    expected = plain_overlap(text, words)
    assert overlap_of(*hashed) == expected
    if expected.shared_words and len(text) >= MIN_WORDS:
        sampled, _ = sampled_grams(words_of([" ".join(words)]))
        assert np.isin(sampled, all_grams(hashed[0].words)).any(), "whatever overlaps is found"
