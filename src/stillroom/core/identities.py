"""Who and what: plain frozen facts that the other rooms pass around."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

TokenIds: TypeAlias = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRef:
    """Where a model came from, exactly enough to know it again.

    `source` is a directory or a hub id as the user wrote it, or the name that an endpoint knows it by; `revision` the resolved commit of a hub id, None
    otherwise; `weights_sha256` a digest over the names and bytes of all weight files; `licence` the id that the model's card declares, None if it declares
    none. Of a model behind an endpoint architecture and parameters are not known.
    """

    source: str
    kind: str  # "directory" | "hub" | "from_scratch" | "from_teacher" | "endpoint"
    revision: str | None
    weights_sha256: str | None
    architecture: str | None
    parameters: int | None
    licence: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How completions are drawn. `temperature` 0 is greedy; `seed` makes a draw repeatable."""

    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSequence:
    """Token ids and which of them are to be scored.

    `answer_spans` are half-open ranges of token positions that a model had to produce (answers with their end token). A token at position
    p in a span is predicted by **row p - 1**, since row t is the distribution after token t: `scored_rows` says which rows that makes.
    """

    ids: TokenIds
    answer_spans: tuple[tuple[int, int], ...]

    @property
    def scored_rows(self) -> tuple[int, ...]:
        """Positions of the rows that predict answer tokens, in order. A token at position 0 has no row."""
        return tuple(p - 1 for start, stop in self.answer_spans for p in range(max(start, 1), stop))


Json: TypeAlias = dict[str, Any]
