"""Documents of several parts -> token ids, and which of them belong to prompts. {tokenizer, forms} -> parts -> window.

Each part is encoded by itself: the first as the beginning of a document, any other as a text that follows. So a prompt
has the ids that it has when a model is asked for the response, and no token lies in both. Neighbours of one kind are
one part. Spaces at the end of a prompt belong to the response after it, since tokens of words begin with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shards.arrays import Ints
from shards.records.forms import Part
from shards.records.json_lines import Records
from shards.tokenize.tokenizer import Tokenizer


class Prompts(NamedTuple):
    """The stretches of a window's documents that are read and not predicted, ordered by document and place."""

    documents: Ints  # [stretches]: number of the document that each lies in
    starts: Ints  # [stretches]: its first token in the document, BOS counted
    stops: Ints  # [stretches]: one past its last

    def mark(self, document: int, start: int, segment_ids: npt.NDArray[np.int32]) -> None:
        """Negate the segment ids of a piece, in place, where its tokens belong to a prompt.

        Args:
            document: number of the piece's document.
            start: the piece's first token in the document.
            segment_ids: int32 [tokens of the piece], positive.
        """
        first, stop = np.searchsorted(self.documents, [document, document + 1])
        for i in range(first, stop):
            segment_ids[max(0, int(self.starts[i]) - start) : max(0, int(self.stops[i]) - start)] *= -1

    def only(self, kept: npt.NDArray[np.bool_]) -> Prompts:
        """Return those of some documents, numbered among these. Args: kept: bool [documents]."""
        here = kept[self.documents]
        return Prompts((np.cumsum(kept) - 1)[self.documents[here]], self.starts[here], self.stops[here])


NO_PROMPTS = Prompts(*(np.zeros(0, np.int64) for _ in Prompts._fields))


def encode_parts(
    tokenizer: Tokenizer, documents: Sequence[Sequence[Part]]
) -> tuple[npt.NDArray[np.integer], Ints, Prompts]:
    """Return the ids of all documents in one array, the length of each, and their prompts.

    BOS belongs to the first part, EOS to the last; a marker at the very beginning or end that is the same token stands
    for it.

    Args:
        documents: the parts of each, at least one.
    """
    if not documents:
        return np.zeros(0, tokenizer.dtype), np.zeros(0, np.int64), NO_PROMPTS
    divided = [_divided(parts, tokenizer) for parts in documents]
    heads = tokenizer.encode_beginnings([head.text for head, _ in divided])
    following = list(dict.fromkeys(part.text for _, tail in divided for part in tail if not part.is_marker))
    ids_of = dict(zip(following, tokenizer.encode_following(following), strict=True))
    ending = np.array(tokenizer.ending, tokenizer.dtype)
    ids: list[npt.NDArray[np.integer]] = []
    lengths, prompts = [], []
    for number, (beginning, (head, tail)) in enumerate(zip(heads, divided, strict=True)):
        encoded = [(beginning, head.is_response)]
        encoded += [(_ids(part, tokenizer, ids_of), part.is_response) for part in tail]
        encoded.append((ending, documents[number][-1].is_response))
        place = 0
        for part_ids, is_response in encoded:
            if not is_response and len(part_ids):
                prompts.append((number, place, place + len(part_ids)))
            place += len(part_ids)
        ids += [part_ids for part_ids, _ in encoded]
        lengths.append(place)
    columns = np.array(prompts, np.int64).reshape(-1, len(Prompts._fields)).T
    return np.concatenate(ids), np.array(lengths, np.int64), Prompts(*columns)


def encode_records(tokenizer: Tokenizer, spans: Sequence[Records]) -> tuple[npt.NDArray[np.integer], Ints, Prompts]:
    """Return what `encode_parts` does for the documents of a source that holds texts, whole or in parts.

    Args:
        spans: the source's records, in order.
    """
    if any(records.parts is not None for records in spans):
        return encode_parts(tokenizer, [document for records in spans for document in records.parts or ()])
    tokens, lengths = tokenizer.encode_documents([text for records in spans for text in records.texts])
    return tokens, lengths, NO_PROMPTS


def token_counts(tokenizer: Tokenizer, records: Records) -> Ints:
    """Return int64 [documents], the tokens that each has as a document of a run, BOS and EOS counted."""
    if records.token_ids is not None:
        return np.array([len(ids) for ids in records.token_ids], np.int64)
    return encode_records(tokenizer, [records])[1]


def spelled(tokenizer: Tokenizer, parts: Sequence[Part], only_responses: bool = False) -> str:
    """Return the text that a document's tokens spell, without special tokens; of all parts, or of its responses."""
    joined = _joined(parts, tokenizer)
    return "".join(part.text for part in joined if not part.is_marker and (part.is_response or not only_responses))


def _ids(part: Part, tokenizer: Tokenizer, ids_of: dict[str, npt.NDArray[np.integer]]) -> npt.NDArray[np.integer]:
    return np.array([tokenizer.index(part.text)], tokenizer.dtype) if part.is_marker else ids_of[part.text]


def _divided(parts: Sequence[Part], tokenizer: Tokenizer) -> tuple[Part, list[Part]]:
    """Return the text that begins a document, which may be empty, and the parts to encode after it."""
    joined = _joined(parts, tokenizer)
    if joined and joined[-1].is_marker and [tokenizer.index(joined[-1].text)] == tokenizer.ending:
        del joined[-1]
    if joined and joined[0].is_marker and [tokenizer.index(joined[0].text)] == tokenizer.beginning:
        del joined[0]
    if joined and not joined[0].is_marker:
        return joined[0], joined[1:]
    return Part("", parts[0].is_response), joined


def _joined(parts: Sequence[Part], tokenizer: Tokenizer) -> list[Part]:
    """Return the parts to encode: without empty ones, and markers only where the tokenizer has the special token."""
    joined: list[Part] = []
    for part in parts:
        if not part.text:
            continue
        is_text = not part.is_marker or tokenizer.index(part.text) is None
        if is_text and part.is_response and joined and not (joined[-1].is_response or joined[-1].is_marker):
            prompt = joined.pop().text
            kept = prompt.rstrip(" ")
            joined += [Part(kept, False)] if kept else []
            part = part._replace(text=prompt[len(kept) :] + part.text)
        if is_text and joined and not joined[-1].is_marker and joined[-1].is_response == part.is_response:
            joined[-1] = Part(joined[-1].text + part.text, part.is_response)
        else:
            joined.append(part._replace(is_marker=not is_text))
    return joined
