"""Where the loop's batches come from: a store of targets, a live teacher, or text alone. Nothing else differs between the kinds of run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import starmap

from stillroom.core.identities import TokenSequence
from stillroom.models.local import text_targets
from stillroom.targets.codecs import DrawnCodec
from stillroom.targets.kinds import TargetRequest, Targets
from stillroom.targets.protocols import Batch, Teacher
from stillroom.targets.store import TargetStore
from stillroom.targets.vocabulary import Vocabulary


@dataclass(frozen=True)
class StoredSource:
    """What the teacher said once, read back."""

    store: TargetStore
    vocabulary: Vocabulary

    @cached_property
    def _lengths(self) -> dict[str, int]:
        ids = self.store.record_ids
        return dict(zip(ids, self.store.lengths(ids), strict=True))

    def length(self, record_id: str) -> int:
        """Tokens of a record."""
        return self._lengths[record_id]

    def scored_tokens(self, record_ids: Sequence[str]) -> int:
        """Scored rows of these records."""
        return self.store.scored_tokens(record_ids)

    def batch(self, record_ids: Sequence[str]) -> Batch:
        """The records with their stored targets."""
        return self._batch(*self.store.read(record_ids))

    def batches(self, parts: Sequence[Sequence[str]]) -> Iterator[Batch]:
        """Each part in turn. Drawn targets take long to decode and little room: they are decoded together, ahead of their turn, in the background."""
        if len(parts) > 1 and isinstance(self.store.identity.codec, DrawnCodec):
            return starmap(self._batch, self.store.batches(parts))
        return map(self.batch, parts)

    def _batch(self, sequences: Sequence[TokenSequence], targets: Targets) -> Batch:
        return Batch(sequences=tuple(sequences), targets=targets, labels=text_targets(sequences, self.vocabulary))


@dataclass(frozen=True)
class LiveSource:
    """What the teacher says now, asked again for every batch."""

    teacher: Teacher
    sequences: Mapping[str, TokenSequence]
    request: TargetRequest

    def length(self, record_id: str) -> int:
        """Tokens of a record."""
        return len(self.sequences[record_id].ids)

    def scored_tokens(self, record_ids: Sequence[str]) -> int:
        """Scored rows of these records."""
        return sum(len(self.sequences[record].scored_rows) for record in record_ids)

    def batch(self, record_ids: Sequence[str]) -> Batch:
        """The records with fresh targets."""
        sequences = [self.sequences[record] for record in record_ids]
        targets = self.teacher.targets(sequences, self.request)
        return Batch(sequences=tuple(sequences), targets=targets, labels=text_targets(sequences, self.teacher.vocabulary))

    def batches(self, parts: Sequence[Sequence[str]]) -> Iterator[Batch]:
        """Each part in turn."""
        return map(self.batch, parts)


@dataclass(frozen=True)
class TextSource:
    """The text alone, with no teacher behind it."""

    sequences: Mapping[str, TokenSequence]
    vocabulary: Vocabulary

    def length(self, record_id: str) -> int:
        """Tokens of a record."""
        return len(self.sequences[record_id].ids)

    def scored_tokens(self, record_ids: Sequence[str]) -> int:
        """Scored rows of these records."""
        return sum(len(self.sequences[record].scored_rows) for record in record_ids)

    def batch(self, record_ids: Sequence[str]) -> Batch:
        """The records with their own tokens as targets."""
        sequences = [self.sequences[record] for record in record_ids]
        labels = text_targets(sequences, self.vocabulary)
        return Batch(sequences=tuple(sequences), targets=labels, labels=labels)

    def batches(self, parts: Sequence[Sequence[str]]) -> Iterator[Batch]:
        """Each part in turn."""
        return map(self.batch, parts)
