"""Curation of what a teacher wrote: steps that each keep some rows and drop the others, with a reason and the evidence for it.

A step is a frozen value: its name, its settings, and a function of the rows alone. It keeps the order of the rows, changes none of them, and speaks of
a row by its key and never by its position. `Pipeline` runs steps in order and holds that rows in = rows kept + rows dropped at each of them. Filters are
in `filters`, `duplicates`, `verifiers` and `decontamination`; the last gate, which needs the student's tokens, is `transfer_set.curate`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol

from stillroom.core.hashing import canonical_json, sha256_hex
from stillroom.core.identities import Json
from stillroom.data.prompts import Prompt
from stillroom.data.transfer_set import DropReason


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One answer to one prompt, as the teacher gave it. `key` names the row and no other.

    `answer` is what a student would learn. `reasoning` and `finish_reason` are None where the teacher's endpoint says nothing of them.
    """

    key: str
    prompt: Prompt
    answer: str
    reasoning: str | None = None
    finish_reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Why a row is not fit. `evidence` is what in the row shows it; `against` names the rows or evaluation items that it is too like."""

    reason: DropReason
    evidence: str
    against: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Drop:
    """A row that a step left out, by its key, and what the step found."""

    key: str
    step: str
    finding: Finding

    @property
    def reason(self) -> DropReason:
        return self.finding.reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Sifted:
    """Every row once: those kept, and those dropped; each in the order in which they came."""

    kept: tuple[Row, ...]
    dropped: tuple[Drop, ...]


class Step(Protocol):
    """One step: a frozen dataclass whose fields are its settings, all of which have a form in JSON."""

    name: ClassVar[str]

    def sift(self, rows: Sequence[Row]) -> Sifted:
        """Each row either kept or dropped, decided by the rows and the settings alone."""
        ...


def sift_each(step: str, rows: Iterable[Row], judge: Callable[[Row], Finding | None]) -> Sifted:
    """Sifts by what `judge` finds in a row, None being nothing."""
    kept: list[Row] = []
    dropped: list[Drop] = []
    for row in rows:
        finding = judge(row)
        if finding is None:
            kept.append(row)
        else:
            dropped.append(Drop(key=row.key, step=step, finding=finding))
    return Sifted(kept=tuple(kept), dropped=tuple(dropped))


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCounts:
    """What a step did: rows before and after it, and how many it dropped for each reason. before = after + all dropped."""

    step: str
    settings: Json
    before: int
    after: int
    dropped: dict[str, int]

    def rate(self, reason: str) -> float | None:
        """Which share of the rows before this step it dropped for this reason; None where there were none."""
        return self.dropped.get(reason, 0) / self.before if self.before else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Curation:
    """What a pipeline did: every row that came in, once, and an account of each step."""

    kept: tuple[Row, ...]
    dropped: tuple[Drop, ...]
    steps: tuple[StepCounts, ...]

    @property
    def rows(self) -> int:
        """How many rows came in."""
        return len(self.kept) + len(self.dropped)

    @property
    def reasons(self) -> dict[str, DropReason]:
        """Why each dropped row was dropped, by its key."""
        return {drop.key: drop.reason for drop in self.dropped}

    @property
    def counts(self) -> dict[str, int]:
        """How many rows were dropped, by reason, over all steps."""
        return dict(Counter(drop.reason for drop in self.dropped))


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Steps in the order in which they run. A row that a step drops is not seen by those after it."""

    steps: tuple[Step, ...]

    @property
    def sha256(self) -> str:
        """The identity of the steps and their settings, in order."""
        return sha256_hex(canonical_json([[step.name, settings_of(step)] for step in self.steps]))

    def run(self, rows: Iterable[Row]) -> Curation:
        """Sifts `rows`. ValueError where two rows have one key."""
        left = tuple(rows)
        if repeated := [key for key, count in Counter(row.key for row in left).items() if count > 1]:
            raise ValueError(f"{len(repeated)} keys name more than one row, among them {repeated[0]!r}")
        dropped: list[Drop] = []
        accounts: list[StepCounts] = []
        for step in self.steps:
            sifted = step.sift(left)
            _require_conserved(step.name, left, sifted)
            reasons: Counter[str] = Counter(drop.reason for drop in sifted.dropped)
            accounts.append(StepCounts(step=step.name, settings=settings_of(step), before=len(left), after=len(sifted.kept), dropped=dict(reasons)))
            dropped += sifted.dropped
            left = sifted.kept
        return Curation(kept=left, dropped=tuple(dropped), steps=tuple(accounts))


def settings_of(step: Step) -> Json:
    """A step's settings as JSON. A step whose fields do not say all that it depends on has a `settings` of its own."""
    own = getattr(step, "settings", None)
    return dict(own) if own is not None else _plain(asdict(step))  # type: ignore[call-overload]


def _plain(value: Any) -> Any:
    """`value` with tuples as lists and sets as sorted lists."""
    match value:
        case dict():
            return {str(name): _plain(part) for name, part in value.items()}
        case tuple() | list():
            return [_plain(part) for part in value]
        case frozenset() | set():
            return sorted(_plain(part) for part in value)
    return value


def _require_conserved(step: str, before: Sequence[Row], sifted: Sifted) -> None:
    """Asserts that each row was kept or dropped, once, and that those kept are in order: a step that breaks this is broken."""
    gone = {drop.key for drop in sifted.dropped}
    assert len(gone) == len(sifted.dropped), f"{step} dropped a row twice"
    assert tuple(row for row in before if row.key not in gone) == sifted.kept, f"{step} lost, added, changed or moved a row"
    assert len(gone) + len(sifted.kept) == len(before), f"{step} dropped a row that was not there"
