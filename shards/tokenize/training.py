"""New tokenizers, learned from texts: a SentencePiece model or a tokenizer.json. training_sample -> training.

Both spell every text and give it back unchanged. The same texts in the same order make the same file, byte for byte,
whatever the number of threads.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import sentencepiece
import tokenizers

from shards.errors import ConfigError
from shards.tokenize.rank_file import BOS, EOS, LLAMA3, byte_symbols
from shards.tokenize.training_sample import MAX_STRETCH_BYTES


def train_sentencepiece(texts: Iterator[str], vocab_size: int, character_coverage: float) -> bytes:
    """Return the model file of a BPE tokenizer with BOS 1, EOS 2, UNK 0 and no padding token.

    It has byte fallback, split digits, identity normalization and no leading space.

    Args:
        texts: texts of at most MAX_STRETCH_BYTES, since SentencePiece passes over longer ones.
        character_coverage: share of the characters that get pieces; the others are spelled by bytes.
    Raises: ConfigError if SentencePiece cannot make such a model from these texts.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=texts,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=MAX_STRETCH_BYTES,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rpartition("]")[2].strip() or "there is no text"
        raise ConfigError(f"--vocab-size {vocab_size}: SentencePiece makes no such model: {reason}") from None
    return model.getvalue()


def train_byte_level(texts: Iterator[str], vocab_size: int) -> bytes:
    """Return a tokenizer.json of a byte-level BPE that splits texts by Llama 3's pattern and does not normalize them.

    Ids 0 and 1 are Llama 3's BOS and EOS, which the post-processor puts around a text; the bytes follow, then what was
    learned.

    Raises: ConfigError if the texts have too few pairs to merge for so many tokens.
    """
    smallest = 2 + len(byte_symbols())
    if vocab_size < smallest:
        raise ConfigError(
            f"--vocab-size {vocab_size} is too small for BOS, EOS and 256 bytes; set it to {smallest} or more"
        )
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    split: Any = tokenizers.pre_tokenizers.Split(tokenizers.Regex(LLAMA3), "isolated")
    level: Any = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, level])
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[BOS, EOS], initial_alphabet=byte_symbols(), show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    if (found := made.get_vocab_size()) < vocab_size:
        raise ConfigError(f"--vocab-size {vocab_size}: the texts have no more to merge; set it to a value <= {found}")
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}", special_tokens=[(name, made.token_to_id(name)) for name in (BOS, EOS)]
    )
    return f"{made.to_str(pretty=True)}\n".encode()
