"""A sample is the stretches of the lowest hashes that fit, whatever the order in which texts come."""

from __future__ import annotations

import random

import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.tokenize.training_sample import MAX_STRETCH_BYTES, STRETCH_CHARACTERS, TrainingSample
from tests.examples import examples

TEXTS = st.lists(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=40).map(lambda text: text * 300), max_size=30
)


def expected(texts: list[str], max_bytes: int) -> list[str]:
    """Take what fits from the front of all stretches by their hashes."""
    size = STRETCH_CHARACTERS
    stretches = [text[i : i + size] for text in texts for i in range(0, len(text), size)]
    taken: list[str] = []
    for stretch in sorted(stretches, key=lambda part: xxhash.xxh3_64_intdigest(part.encode())):
        if sum(len(part.encode()) for part in [*taken, stretch]) > max_bytes:
            break
        taken.append(stretch)
    return taken


@settings(max_examples=examples(200))
@given(texts=TEXTS, max_bytes=st.integers(MAX_STRETCH_BYTES, 10 * MAX_STRETCH_BYTES), seed=st.integers(0, 9))
def test_the_sample_is_what_fits_of_the_lowest_hashes(texts: list[str], max_bytes: int, seed: int) -> None:
    sample = TrainingSample(max_bytes)
    for text in random.Random(seed).sample(texts, len(texts)):
        sample.add(text)
        assert sample.num_bytes <= max_bytes
    assert sample.num_documents == len(texts)
    assert sample.read_bytes == sum(len(text.encode()) for text in texts)
    wanted = expected(texts, max_bytes)
    assert sample.num_bytes == sum(len(part.encode()) for part in wanted)
    assert list(sample.drain()) == wanted
