"""SentencePiece models made by hand, for tests of what a vocabulary can and cannot spell."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import decoders, models

# In GPT-2's alphabet, where "\u0120" stands for the byte of a space.
GPT2_PIECES = [chr(code) for code in range(33, 127)] + ["\u0120", "th", "the", "\u0120the", "\u0120cat"]


def write_model(path: Path, pieces: Sequence[str], dummy_prefix: bool = False, byte_fallback: bool = False) -> Path:
    """Write a BPE model with these pieces after UNK, BOS and EOS; the earlier a piece, the sooner it is merged."""
    proto = sentencepiece_model_pb2.ModelProto()
    proto.trainer_spec.model_type = proto.trainer_spec.BPE
    proto.trainer_spec.unk_id, proto.trainer_spec.bos_id, proto.trainer_spec.eos_id = 0, 1, 2
    proto.trainer_spec.byte_fallback = byte_fallback
    proto.normalizer_spec.add_dummy_prefix = dummy_prefix
    proto.normalizer_spec.remove_extra_whitespaces = False
    kinds = proto.SentencePiece
    special = [("<unk>", kinds.UNKNOWN), ("<s>", kinds.CONTROL), ("</s>", kinds.CONTROL)]
    special += [(f"<0x{byte:02X}>", kinds.BYTE) for byte in range(256 if byte_fallback else 0)]
    for i, (piece, kind) in enumerate([*special, *((piece, kinds.NORMAL) for piece in pieces)]):
        proto.pieces.add(piece=piece, score=-float(i), type=kind)
    path.write_bytes(proto.SerializeToString())
    return path


def foreign_pieces(path: Path) -> Path:
    """Write a stand-in for another program's tokenizer: it has the same ids but cannot spell a space."""
    return write_model(path, GPT2_PIECES)


def byte_fallback_json(path: Path) -> Path:
    """Write a tokenizer.json that spells all but ASCII in bytes, as those of LLaMA do what they lack."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *map(chr, range(32, 127))]
    ids = {piece: i for i, piece in enumerate(pieces)}
    made = tokenizers.Tokenizer(models.BPE(ids, [], byte_fallback=True, unk_token="<unk>"))
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens(["<s>", "</s>"])
    made.save(str(path))
    return path
