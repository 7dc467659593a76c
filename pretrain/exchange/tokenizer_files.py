"""A tokenizer as the files that `transformers.AutoTokenizer` reads, giving the same ids for every text.

Of a tokenizer.json or a rank file it is that file's content, but for the tokens at a text's ends. Of a SentencePiece
model, tokenizer.json expresses in terms of the `tokenizers` library what the model does: normalization, merges in order
of their scores, bytes for unknown characters, BOS. It is written by hand, since transformers guesses when it loads a
`tokenizer.model`: it drops the space that SentencePiece puts before a text that begins with one.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from shards import ConfigError, HeadraceError, Tokenizer
from shards.tokenize.split_points import SPACE

_logger = logging.getLogger(__name__)

Json = dict[str, Any]


def write_tokenizer(tokenizer: Tokenizer, folder: Path, bos: bool, max_length: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and, if the tokenizer is a SentencePiece model, tokenizer.model.

    Args:
        bos: whether a prompt begins with BOS, as a training document does.
        max_length: context length of the training, in tokens.
    """
    content = tokenizer.library_json()
    if content is None:
        content = _from_sentencepiece(tokenizer.path, folder, bos)
    else:
        begin = _begin(tokenizer.piece(tokenizer.bos_id), tokenizer.bos_id) if bos else None
        content = {**content, "post_processor": begin}
    if content is None:
        return
    special = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "unk_token": tokenizer.unk_id}
    config: Json = {
        # This class uses tokenizer.json unchanged; LlamaTokenizer would build its own normalization.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{key: tokenizer.piece(index) for key, index in special.items() if index >= 0},
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # "<s>" in a text is text, as in training
        "model_max_length": max_length,
    }
    _write_json(folder / "tokenizer.json", content)
    _write_json(folder / "tokenizer_config.json", config)


def _from_sentencepiece(path: Path, folder: Path, bos: bool) -> Json | None:
    """Write tokenizer.model; return the content of a tokenizer.json with its ids, None if there is no such."""
    model = path.read_bytes()
    (folder / "tokenizer.model").write_bytes(model)
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    reason = _inexpressible(proto)
    if reason:
        _logger.warning("%s: no tokenizer.json, since %s; load tokenizer.model with sentencepiece", path, reason)
        return None
    return _tokenizer_json(proto, bos)


def is_json(path: Path) -> bool:
    """Return whether a tokenizer's file is a tokenizer.json, whatever its name."""
    return path.read_bytes().lstrip()[:1] == b"{"


def _write_json(path: Path, content: Json) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _inexpressible(proto: sentencepiece_model_pb2.ModelProto) -> str | None:
    """Describe where the `tokenizers` library would differ from this model, as found by comparison; None if nowhere."""
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    kinds = {piece.type for piece in proto.pieces}
    if trainer.model_type != trainer.BPE:
        return "it is not a BPE model, and other kinds break ties differently there"
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces:
        return f"it normalizes texts ({normalizer.name!r}), which works differently there"
    if trainer.treat_whitespace_as_suffix or not normalizer.escape_whitespaces:
        return "it treats spaces differently"
    if not trainer.byte_fallback:
        return "it has no bytes for unknown characters"
    if kinds & {proto.SentencePiece.UNUSED, proto.SentencePiece.USER_DEFINED}:
        return "it has unused or user-defined pieces"
    return None


def _tokenizer_json(proto: sentencepiece_model_pb2.ModelProto, bos: bool) -> Json:
    special, first = (proto.SentencePiece.UNKNOWN, proto.SentencePiece.CONTROL), proto.trainer_spec.bos_id
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": piece.piece, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True}
            for i, piece in enumerate(proto.pieces) if piece.type in special
        ],
        "normalizer": {"type": "Sequence", "normalizers": list(_normalizers(proto.normalizer_spec))},
        "pre_tokenizer": None,
        "post_processor": _begin(proto.pieces[first].piece, first) if bos else None,
        "decoder": {"type": "Sequence", "decoders": list(_decoders(proto.normalizer_spec))},
        "model": _merges(proto),
    }  # fmt: skip


def _normalizers(spec: sentencepiece_model_pb2.NormalizerSpec) -> Iterator[Json]:
    if spec.add_dummy_prefix:
        yield {"type": "Prepend", "prepend": SPACE}
    yield {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}


def _decoders(spec: sentencepiece_model_pb2.NormalizerSpec) -> Iterator[Json]:
    yield {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    yield {"type": "ByteFallback"}
    yield {"type": "Fuse"}
    if spec.add_dummy_prefix:
        yield {"type": "Strip", "content": " ", "start": 1, "stop": 0}


def _begin(begin: str, index: int) -> Json:
    """Return a post-processor that begins each text with BOS, whose piece and id are given."""
    bos, first, second = ({"SpecialToken": {"id": begin, "type_id": 0}}, _sequence("A", 0), _sequence("B", 1))
    return {
        "type": "TemplateProcessing",
        "single": [bos, first],
        "pair": [bos, first, {"SpecialToken": {"id": begin, "type_id": 1}}, second],
        "special_tokens": {begin: {"id": begin, "ids": [index], "tokens": [begin]}},
    }


def _sequence(name: str, type_id: int) -> Json:
    return {"Sequence": {"id": name, "type_id": type_id}}


def _merges(proto: sentencepiece_model_pb2.ModelProto) -> Json:
    """Order the merges: SentencePiece merges the best-scoring neighbours first, the library the earliest listed."""
    normal = {p.piece: p.score for p in proto.pieces if p.type == proto.SentencePiece.NORMAL}
    merges = [
        (-score, -cut, piece[:cut], piece[cut:])
        for piece, score in normal.items()
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": proto.pieces[proto.trainer_spec.unk_id].piece,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": proto.trainer_spec.byte_fallback,
        "ignore_merges": False,
        "vocab": {piece.piece: i for i, piece in enumerate(proto.pieces)},
        "merges": [[left, right] for _, _, left, right in sorted(merges)],
    }


def check_tokenizer(folder: Path, tokenizer: Tokenizer, key: str) -> None:
    """Compare the pieces of the tokenizer in a model's folder with ours, id by id.

    Args:
        folder: the model's folder, or the tokenizer's file.
        key: the config key, with its value, that names our tokenizer.
    Raises:
        ConfigError: naming the first id that means something else, or is missing in ours.
    """
    theirs = _pieces(folder)
    if theirs is None:
        _logger.warning("%s has no tokenizer to compare with %s, so it is unknown whether their ids agree", folder, key)
        return
    file, pieces = theirs
    for index in range(tokenizer.vocab_size):
        ours = tokenizer.piece(index)
        if pieces.get(index, "") != ours:
            raise ConfigError(
                f"{key} differs from the model's tokenizer: id {index} is {ours!r} there and"
                f" {pieces.get(index)!r} in {file}; use the model's own tokenizer"
            )
    if max(pieces, default=-1) >= tokenizer.vocab_size:
        raise ConfigError(
            f"{key} lacks tokens of the model's tokenizer: it has {tokenizer.vocab_size}, and {file} has ids up to"
            f" {max(pieces)}; use the model's own SentencePiece model"
        )


def _pieces(folder: Path) -> tuple[Path, dict[int, str]] | None:
    """Return the file and its pieces by id; None if the folder has no tokenizer in a readable format."""
    model, library = folder / "tokenizer.model", folder / "tokenizer.json"
    if folder.is_file():
        model, library = folder, folder
    if model.exists():
        try:
            tokenizer = Tokenizer(model, bos=False, eos=False)
            return model, {index: tokenizer.piece(index) for index in range(tokenizer.vocab_size)}
        except HeadraceError:
            _logger.info("%s is no tokenizer that can be read", model)
    if library.exists():
        content = json.loads(library.read_text(encoding="utf-8"))
        vocabulary = content["model"]["vocab"]
        added = {token["id"]: token["content"] for token in content.get("added_tokens", [])}
        if isinstance(vocabulary, dict):
            return library, {index: piece for piece, index in vocabulary.items()} | added
        return library, {index: pair[0] for index, pair in enumerate(vocabulary)} | added
    return None
