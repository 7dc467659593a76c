"""What is said of documents that a run may have been trained on. exposure -> exposure_report -> commands.exposure."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property

from pretrain.exposure import Trained, runs_of
from pretrain.run.run_folder import Ancestor
from shards import MaxOverflow, OverflowTolerance, SourceConfig, Stage, Tokenizer
from shards.exposure.grams import Overlap
from shards.exposure.naming import Documents, Reading
from shards.exposure.search import DocumentPlace
from shards.history import Appearance, History

_CUT_OFF = "packing cuts all of its tokens off, or drops it for its length"
_HEADER = ("source", "shard", "line", "epoch", "step", "row", "start", "stop", "trained")


class Report:
    """All that is known of some documents.

    Args:
        name: the run's.
        ancestors: the runs that it was forked from, the oldest first.
        checkpoints: steps of those that it has.
        stages: all of the run.
        places: the documents.
        overlaps: what each shares with a text, if one was asked for.
    """

    def __init__(
        self,
        name: str,
        ancestors: Sequence[Ancestor],
        checkpoints: Sequence[int],
        stages: Sequence[Stage],
        documents: Documents,
        trained: Trained,
        places: Sequence[DocumentPlace],
        overlaps: dict[DocumentPlace, Overlap],
        history: History,
    ) -> None:
        self._name, self._ancestors, self._checkpoints, self._stages = name, ancestors, checkpoints, stages
        self._documents, self._trained, self._places, self._overlaps = documents, trained, places, overlaps
        self._history = history
        self._pieces: dict[int, list[Appearance]] = defaultdict(list)
        for one in history.appearances:
            self._pieces[one.document].append(one)

    @cached_property
    def first_step(self) -> int | None:
        """Return the first step that was trained on any of the documents."""
        return min((one.step for one in self._history.appearances if not self._trained.reason(one)), default=None)

    def summary(self, most: int) -> Iterator[str]:
        """Yield lines about the documents, all of them together and up to `most` one by one."""
        seen = [number for number in range(len(self._places)) if self._learned(number)]
        if len(self._places) > 1:
            yield f"{len(seen):,} of {len(self._places):,} documents were trained on by step {self._trained.steps:,}"
            yield from self._of_pieces([one for number in seen for one in self._learned(number)])
        for number in range(min(most, len(self._places))):
            yield self._title(number)
            yield from self._of_document(number)
        if len(self._places) > most:
            yield f"and {len(self._places) - most:,} more documents; --table FILE has all"

    def _learned(self, number: int) -> list[Appearance]:
        return [one for one in self._pieces[number] if not self._trained.reason(one)]

    def _title(self, number: int) -> str:
        place = self._places[number]
        title = f"{self._source(place).name} {self._documents.path(place)}:{place.line}"
        if overlap := self._overlaps.get(place):
            part = "is the text" if overlap.whole else "contains the text" if overlap.contains else "shares"
            return f"{title} {part}" + ("" if overlap.contains else f" {overlap.shared_words:,} words of the text")
        return title

    def _of_document(self, number: int) -> Iterator[str]:
        pieces, learned = self._pieces[number], self._learned(number)
        read = self._history.read[number]
        if (reading := self._readings.get(self._places[number])) and reading.left_out:
            yield f"  not in the run's data: {reading.reason}"
            return
        if learned:
            yield from self._of_pieces(learned)
            if (length := self._cut_length(number)) is not None:
                yield f"  packing cuts off what follows its token {max(one.stop for one in pieces):,} of {length:,}"
        elif not pieces and not read:
            yield f"  not read in any of the {self._trained.steps:,} steps so far"
        for reason, count in Counter(self._trained.reason(one) for one in pieces).items():
            if reason:
                yield f"  read and not trained on, since {reason}: {count:,} pieces"
        if missed := self._missed(number):
            yield f"  in no row of {_epochs(missed)}: {self._why_missed(number)}"

    def _of_pieces(self, learned: list[Appearance]) -> Iterator[str]:
        """Say when pieces were trained on, and by whom."""
        if not learned:
            return
        steps = [one.step for one in learned]
        first, last = min(steps), max(steps)
        tokens = sum(one.stop - one.start for one in learned)
        times = len({(one.document, one.epoch) for one in learned})
        epochs = _epochs(sorted({one.epoch for one in learned}))
        yield (
            f"  trained on {times:,} times, in {epochs}: {len(steps):,} pieces of {tokens:,} tokens, first at step "
            f"{first:,}, last at step {last:,}"
        )
        if self._checkpoints:
            parts = [[s for s in self._checkpoints if (s >= first) == after] for after in (True, False)]
            after, before = (", ".join(map(str, part)) or "none" for part in parts)
            yield f"  checkpoints from before that: {before}; that have seen it: {after}"
        if self._ancestors:
            counts = runs_of(self._ancestors, self._name, steps)
            yield "  by " + ", ".join(f"{name} ({count:,} pieces)" for name, count in counts.items())

    def _missed(self, number: int) -> list[int]:
        """Return the epochs in which a document was read, and is in no row."""
        had = {one.epoch for one in self._pieces[number]}
        return [epoch for epoch in self._history.read[number] if epoch not in had]

    def _why_missed(self, number: int) -> str:
        drops = sorted(drop.reason for drop in self._history.drops[number])
        return drops[0] if drops else self._readings[self._places[number]].reason or _CUT_OFF

    def _cut_length(self, number: int) -> int | None:
        """Return the number of a document's tokens, if packing has cut some of them off."""
        reading = self._readings.get(self._places[number])
        if reading is None or not reading.text:
            return None
        length = len(self._tokenizer.encode_document(reading.text))
        return length if length > max(one.stop for one in self._pieces[number]) else None

    @cached_property
    def _readings(self) -> dict[DocumentPlace, Reading]:
        """Read the documents of which tokens may be missing."""
        cutting = (OverflowTolerance, MaxOverflow)
        cuts = any(isinstance(p := stage.data.packing, cutting) or p == "truncate" for stage in self._stages)
        return self._documents.read(
            place
            for number, place in enumerate(self._places)
            if cuts or self._missed(number) or (self._source(place).selection and not self._pieces[number])
        )

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer.of(self._stages[0].data)

    def _source(self, place: DocumentPlace) -> SourceConfig:
        return self._stages[-1].data.sources[place.source]

    def table(self) -> Iterator[str]:
        """Yield all pieces of all documents, tab-separated under a header line."""
        yield "\t".join(_HEADER)
        for number, place in enumerate(self._places):
            name = (self._source(place).name, self._documents.path(place), place.line)
            for one in self._pieces[number]:
                reason = self._trained.reason(one) or "yes"
                yield "\t".join(map(str, (*name, one.epoch, one.step, one.slot, one.start, one.stop, reason)))
            for epoch in self._missed(number):
                yield "\t".join(map(str, (*name, epoch, "", "", "", "", self._why_missed(number))))


def _epochs(numbers: Sequence[int]) -> str:
    """Write the numbers of epochs."""
    return f"epoch{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"
