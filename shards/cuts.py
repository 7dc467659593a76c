"""Where a long text can be cut without changing a single token id. tokenizer -> cuts.

A BPE model merges neighbours only into pieces of its vocabulary. Where no piece holds character a followed by b, no
merge ever reaches from a to b, so a text may be cut there and its parts encoded apart. Sure only for models that leave
text as it is before they merge, and that spell unknown characters in bytes.
"""

from collections.abc import Iterator

from sentencepiece import sentencepiece_model_pb2

SPACE = "\u2581"  # how a model writes " "; the character itself in a text means the same


class Cuts:
    """Finds the places where one model's texts may be cut."""

    def __init__(self, model: bytes) -> None:
        """Args: model: a serialized SentencePiece model."""
        proto = sentencepiece_model_pb2.ModelProto.FromString(model)
        normalizer, trainer = proto.normalizer_spec, proto.trainer_spec
        pieces = [piece.piece for piece in proto.pieces]
        self.exact: bool = (
            trainer.model_type == trainer.BPE
            and trainer.byte_fallback
            and not trainer.treat_whitespace_as_suffix
            and not normalizer.precompiled_charsmap
            and not normalizer.remove_extra_whitespaces
            and normalizer.escape_whitespaces
            and SPACE in pieces
        )
        self._dummy_prefix: bool = normalizer.add_dummy_prefix
        self._pairs = {piece[i : i + 2] for piece in pieces for i in range(len(piece) - 1)}

    def parts(self, text: str, size: int) -> Iterator[str]:
        """Cuts a text into parts of `size` characters or little more, whose ids joined are those of the text.

        Where the model puts a space before a text, each part but the first lacks the space that it begins with.
        """
        begin = 0
        while begin < len(text):
            end = begin + size
            while end < len(text) and not self._may_cut(text, end):
                end += 1
            yield text[begin:end]
            begin = end + self._dummy_prefix

    def _may_cut(self, text: str, at: int) -> bool:
        if self._dummy_prefix and (text[at] != " " or at + 1 == len(text)):
            return False  # the model would put a space there, or none before an empty part
        return text[at - 1 : at + 1].replace(" ", SPACE) not in self._pairs
