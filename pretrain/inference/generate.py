"""Continue a prompt with a model, token by token: logits -> sampling -> text, as it is generated.

This is the only code that generates: for the continuation at a run's end, and for `commands.generate`. Every rank runs
the same loop; the slices of the logits are gathered, and rank 0's choice applies to all.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from pretrain.model.architecture import Cache
from pretrain.model.parallel import gather_vocab
from pretrain.topology import Topology
from shards import Config, ConfigError, Tokenizer

_logger = logging.getLogger(__name__)

# Tokens [B, T] after those in the cache -> this rank's slice of the last token's logits [B, vocab_size / tp_size]
NextLogits = Callable[[Tensor, Cache], Tensor]

# Tokens of the prompt with which a continuation is decoded: more than the bytes of a character, and few to decode again
# after each token
_CONTEXT_TOKENS = 32
_CHARACTER_BYTES = 4  # at most, in UTF-8

_UNFINISHED = "\ufffd"  # what a character decodes to while some of its bytes are missing


class Sampling(Config):
    """How to choose the next token, and when to stop. Every continuation also ends with its document."""

    max_tokens: int = Field(256, ge=1)  # length of the continuation
    temperature: float = Field(0.8, ge=0)  # divides the logits; 0 takes the most likely token
    top_k: int | None = Field(None, ge=1)  # sample from this many of the most likely tokens; None: all
    top_p: float = Field(1.0, gt=0, le=1)  # and from the fewest tokens whose probabilities reach this sum
    seed: int = Field(0, ge=0)
    stop: tuple[str, ...] = ()  # stop before the first of these strings in the continuation


@dataclass(frozen=True)
class Codec:
    """Text <-> token ids.

    Attributes:
        encode: encodes a prompt as the beginning of a document.
        decode: decodes token ids to text.
        ends: ids that end a document.
        size: number of ids that both tokenizer and model have; a model may have more rows, which were never trained.
        unknown: the id for what the tokenizer cannot spell; None if it can spell everything.
    """

    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    ends: frozenset[int]
    size: int
    unknown: int | None = None


def codec_of(tokenizer: Tokenizer, bos: bool) -> Codec:
    """Return a codec for a tokenizer; `bos` says whether documents begin with BOS."""
    prefix = [tokenizer.bos_id] if bos else []
    return Codec(
        encode=lambda prompt: [*prefix, *tokenizer.encode(prompt)],
        decode=tokenizer.decode,
        ends=frozenset({tokenizer.eos_id} - {-1}),
        size=tokenizer.vocab_size,
        unknown=tokenizer.unk_id,
    )


def generate(
    next_logits: NextLogits,
    new_cache: Callable[[int], Cache],
    max_length: int,
    codec: Codec,
    prompt: str,
    sampling: Sampling,
    topology: Topology,
) -> Iterator[str]:
    """Yield a prompt's continuation in chunks of whole characters, the same on every rank.

    Args:
        next_logits: the model's forward pass with a cache.
        new_cache: makes an empty cache of the model for so many tokens.
        max_length: maximum number of tokens of prompt and continuation together.
    Raises:
        ConfigError: if the tokenizer has more tokens than the model, and the prompt one of those.
    """
    ids = codec.encode(prompt) or [0]  # a model needs a token to start from
    if max(ids) >= codec.size:
        raise ConfigError(
            f"the prompt has the token id {max(ids)}, but the model has only {codec.size} tokens; leave it out of the"
            " prompt, or use the tokenizer of this model"
        )
    if codec.unknown in ids:
        _logger.warning("the tokenizer cannot spell a part of the prompt, so the model does not see it")
    if len(ids) >= max_length:
        _logger.warning("the prompt's %d tokens fill the context of %d, so nothing can follow", len(ids), max_length)
        return
    stream = TextStream(codec, _context(codec, ids), sampling.stop)
    end = min(max_length, len(ids) + sampling.max_tokens)
    cache = new_cache(end)  # not max_length, since a long context's cache can take more memory than the model
    # Drawn on the CPU, so that the text is the same on every device.
    generator = torch.Generator().manual_seed(sampling.seed)
    new = ids
    for _ in range(end - len(ids)):
        tokens = torch.tensor([new], device=topology.device)
        logits = gather_vocab(next_logits(tokens, cache))[0, : codec.size].float().cpu()
        # Ranks whose logits differ in the last bit could draw different tokens and then wait for each other forever.
        chosen = topology.broadcast_object(sample(logits, sampling, generator))
        if chosen in codec.ends:
            break
        new = [chosen]
        yield stream.add(chosen)
        if stream.stopped:
            return
    yield stream.rest()


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Sample one token id from logits [vocab_size]."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    best, ids = logits.topk(min(sampling.top_k or len(logits), len(logits)))  # sorted, the most likely first
    probabilities = (best / sampling.temperature).softmax(-1)
    # A token is kept while those before it do not reach the sum, so the first always is.
    # Source: Holtzman et al. 2019, arXiv 1904.09751, section 3.1
    before = probabilities.cumsum(-1) - probabilities
    kept = torch.where(before < sampling.top_p, probabilities, 0.0)
    return int(ids[torch.multinomial(kept, 1, generator=generator)])


def _context(codec: Codec, ids: Sequence[int]) -> Sequence[int]:
    """Return the last tokens of a prompt, from where a character begins.

    From within a character, the whole ones after it may be lost too: where some of the byte tokens in a row are part of
    no character, the tokenizers library decodes each of them to U+FFFD. A prompt may have that itself, so they are
    counted.
    """
    last = max(0, len(ids) - _CONTEXT_TOKENS)
    starts = range(max(0, last - _CHARACTER_BYTES + 1), last + 1)
    return ids[min(starts, key=lambda start: codec.decode(ids[start:]).count(_UNFINISHED)) :]


class TextStream:
    """Converts token ids one by one to text that never has to be retracted.

    A character may be spelled by several tokens, one for each byte, and a stop string may arrive in parts: what could
    still become part of either is held back.

    Args:
        context: ids before the first, which decide whether a space begins the text.
        stop: strings before which the text ends.
    Attributes:
        stopped: whether one of them has appeared.
    """

    def __init__(self, codec: Codec, context: Sequence[int], stop: Sequence[str]) -> None:
        self.stopped = False
        self._codec = codec
        self._ids = list(context)
        self._stop = stop
        self._prompt = len(codec.decode(self._ids))  # characters
        self._given = 0  # characters of the continuation

    def add(self, token_id: int) -> str:
        """Return the text that one more token makes certain."""
        self._ids.append(token_id)
        text = self._text()
        found = [text.index(string) for string in self._stop if string in text]
        if found:
            self.stopped = True
            return self._give(text, min(found))
        if text.endswith(_UNFINISHED):
            return ""
        held = max((_overlap(text, string) for string in self._stop), default=0)
        return self._give(text, len(text) - held)

    def rest(self) -> str:
        """Return the text that was held back; for the end."""
        text = self._text()
        return self._give(text, len(text))

    def _text(self) -> str:
        return self._codec.decode(self._ids)[self._prompt :]

    def _give(self, text: str, end: int) -> str:
        start, self._given = self._given, max(end, self._given)
        return text[start:end]


def _overlap(text: str, string: str) -> int:
    """Count the characters at the end of a text that a string begins with."""
    return next((n for n in range(min(len(string), len(text)), 0, -1) if text.endswith(string[:n])), 0)
