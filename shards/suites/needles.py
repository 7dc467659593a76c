"""Synthetic texts that hide a number and ask for it at their end, needles in haystacks. tokenizer -> needles -> tasks.

A text is a haystack of built-in sentences, one statement among them (the needle), and a question whose answer is the
number. Everything that is drawn is a hash of what the text is called, so it is the same on every machine. Lengths are
exact in tokens, so sentences are encoded apart from each other, each as a text that follows another.

Source: Mohtashami and Jaggi 2023 (passkey retrieval), arXiv 2305.16300; Kamradt 2023, "Needle in a haystack".
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shards.errors import ConfigError
from shards.hashing import key_of
from shards.tokenize.tokenizer import Tokenizer

Tokens = npt.NDArray[np.integer]

_WORDS = (
    "anchor", "barrel", "basket", "bottle", "bridge", "button", "candle", "carpet", "castle", "cradle", "engine",
    "feather", "garden", "hammer", "harbour", "island", "jacket", "kettle", "ladder", "lantern", "meadow", "mirror",
    "needle", "orchard", "palace", "pencil", "pillow", "ribbon", "saddle", "shovel", "temple", "window",
)  # fmt: skip
_WHO = ("The farmer", "A sailor", "The baker", "My neighbour", "The old painter", "A tall woman", "The clerk", "Nobody")
_WHAT = (
    "walks along the river in the morning.",
    "carries bread and apples to the market.",
    "looks at the clouds above the hills.",
    "reads a long letter by the fire.",
    "waits for the boat to come home.",
    "sings an old song about the sea.",
)
FILLERS = tuple(f" {who} {what}" for who in _WHO for what in _WHAT)  # all sentences of a haystack
_LEAST_NUMBER, _NUMBERS = 10_000, 90_000  # numbers have five digits


class Needle(NamedTuple):
    """What is hidden in a text, and asked for."""

    word: str
    number: int

    @property
    def statement(self) -> str:
        return f"{self._beginning} {self.number}."

    @property
    def question(self) -> str:
        return f" What is the secret number of the {self.word}?{self._beginning}"

    @property
    def answer(self) -> str:
        return f" {self.number}"

    @property
    def _beginning(self) -> str:
        return f" The secret number of the {self.word} is"


def needle_of(*name: int | str) -> Needle:
    """Draw a needle by a hash of its name."""
    word, number = key_of("word", *name) % len(_WORDS), key_of("number", *name) % _NUMBERS
    return Needle(_WORDS[word], _LEAST_NUMBER + number)


class HaystackText(NamedTuple):
    """A text of an exact number of tokens.

    Attributes:
        context: all but the answer, with BOS as the tokenizer is told to begin documents.
        answer: the tokens of the number.
    """

    needle: Needle
    context: Tokens
    answer: Tokens


class Haystacks:
    """Makes texts for a tokenizer.

    Attributes:
        tokenizer: spells them.
        spelled: a text with every sentence and every word there is, to check the tokenizer on.
    """

    spelled = "".join((*FILLERS, *(Needle(word, 1234567890).statement for word in _WORDS)))

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._fillers = tokenizer.encode_following(FILLERS)

    def text(self, length: int, depth: float, *name: int | str) -> HaystackText:
        """Make the text of a name.

        Args:
            length: its tokens, answer included; of what does not fit the first sentence loses its beginning.
            depth: where the needle stands among the sentences, from 0 at the beginning to 1 before the question: at the
                end of the sentence that is nearest.
        Raises: ConfigError if needle and question alone are longer than that.
        """
        needle = needle_of(*name)
        spelled = self.tokenizer.encode_following([needle.statement, needle.question, needle.answer])
        statement, question, answer = spelled
        beginning = np.array(self.tokenizer.beginning, self.tokenizer.dtype)
        room = length - len(beginning) - sum(map(len, spelled))
        if room < 0:
            raise ConfigError(
                f"a needle with its question and answer is {length - room} tokens of the tokenizer"
                f" {self.tokenizer.path}, so none of {length} tokens can be made; name greater lengths"
            )
        sentences = self._sentences(room, *name)
        ends = np.cumsum([0, *map(len, sentences)])
        place = int(np.argmin(np.abs(ends - depth * room)))
        context = [beginning, *sentences[:place], statement, *sentences[place:], question]
        return HaystackText(needle, np.concatenate(context), answer)

    def _sentences(self, size: int, *name: int | str) -> list[Tokens]:
        """Draw sentences of so many tokens together."""
        found: list[Tokens] = []
        while size > 0:
            drawn = self._fillers[key_of("filler", len(found), *name) % len(self._fillers)]
            found.append(drawn[-size:])
            size -= len(found[-1])
        return found[::-1]
