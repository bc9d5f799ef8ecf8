"""The transfer set: the frozen list of what the student may see.

`transfer_set.json` names records; their tokens are in the target store under the same ids. It is JSON with

    version    1
    requested  answers asked of the teacher, one for each distinct prompt
    accepted   records in the list
    dropped    {reason: how many} for the rest: requested = accepted + all dropped
    decision   digest of the entitlement verdict it was made under
    records    [{id, prompt_id, ledger}]: the record's id, its prompt's id, the hash of its collect entry in the ledger
    sha256     SHA-256 of the canonical JSON (RFC 8785) of all the other fields
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeAlias

from stillroom.core import durable
from stillroom.core.errors import DataError, LedgerError, RunError
from stillroom.core.hashing import canonical_json, sha256_hex
from stillroom.core.identities import Json
from stillroom.ledger import Ledger

VERSION = 1

DropReason: TypeAlias = Literal[
    "too-long",
    "truncated",
    "unterminated-reasoning",
    "empty-answer",
    "refusal",
    "identity",
    "prompt-echo",
    "duplicate",
    "near-duplicate",
    "verifier",
    "verifier-error",
    "contaminated",
    "no-answer",
    "unverified-logprobs",
]
DROP_REASONS: dict[DropReason, str] = {
    "too-long": "prompt and answer are longer than the student's context",
    "truncated": "the answer was cut off at max_new_tokens",
    "unterminated-reasoning": "the answer opens a reasoning block and never closes it",
    "empty-answer": "the teacher answered nothing",
    "refusal": "the teacher declined to answer",
    "identity": "the answer says which model it is, or that it is one",
    "prompt-echo": "the answer says the prompt again",
    "duplicate": "the same is there already",
    "near-duplicate": "nearly the same is there already",
    "verifier": "the recipe's verifier rejected it",
    "verifier-error": "the recipe's verifier failed on it",
    "contaminated": "it has an evaluation item in it",
    "no-answer": "the endpoint gave no answer",
    "unverified-logprobs": "the log-probabilities that came with the answer did not pass verification",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A record that may be let in. `finished` is whether the answer reached its end token; `answer` its text without that token.

    `left_out` is why a curation step before this gate left it out; None where none did.
    """

    id: str
    prompt_id: str
    tokens: int
    answer: str
    finished: bool
    left_out: DropReason | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Curated:
    """Every candidate, once: those kept, in order, and those dropped, each with its reason."""

    kept: tuple[Candidate, ...]
    dropped: tuple[tuple[Candidate, DropReason], ...]


def curate(candidates: Iterable[Candidate], *, max_tokens: int) -> Curated:
    """The last gate: what earlier steps left out, for their reason, and what nobody should learn from, for the first reason that holds.

    Those are sequences of more than `max_tokens`, answers that are cut off or empty, and records that are there already.
    """
    kept: dict[str, Candidate] = {}
    dropped: list[tuple[Candidate, DropReason]] = []
    for candidate in candidates:
        reason = _reason(candidate, max_tokens, kept)
        if reason is None:
            kept[candidate.id] = candidate
        else:
            dropped.append((candidate, reason))
    return Curated(kept=tuple(kept.values()), dropped=tuple(dropped))


def _reason(candidate: Candidate, max_tokens: int, kept: Container[str]) -> DropReason | None:
    if candidate.left_out is not None:
        return candidate.left_out
    if candidate.tokens > max_tokens:
        return "too-long"
    if not candidate.finished:
        return "truncated"
    if not candidate.answer.strip():
        return "empty-answer"
    return "duplicate" if candidate.id in kept else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One record of a transfer set: its id, its prompt's id, and the hash of its collect entry in the ledger."""

    id: str
    prompt_id: str
    ledger: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferSet:
    """What the student may see, in order, and what was left out: see the module's text for the fields."""

    requested: int
    dropped: dict[str, int]
    decision: str
    records: tuple[Record, ...]

    @property
    def accepted(self) -> int:
        return len(self.records)

    @property
    def ids(self) -> tuple[str, ...]:
        """The records' ids, in order."""
        return tuple(record.id for record in self.records)

    @property
    def sha256(self) -> str:
        """The set's identity."""
        return sha256_hex(canonical_json(self._body()))

    @classmethod
    def load(cls, path: Path) -> TransferSet:
        """The set in `path`. Raises DataError 'transfer-set-corrupt' where it does not match its own hash or its own counts."""
        try:
            tree = durable.read_json(path)
        except RunError as error:
            _corrupt(error.found)
        if not isinstance(tree, dict) or tree.get("version") != VERSION:
            _corrupt(f"{path} is not a transfer set of version {VERSION}")
        body = {name: value for name, value in tree.items() if name != "sha256"}
        if _digest(body) != tree.get("sha256"):
            _corrupt(f"{path} does not have the hash it states")
        loaded = _from_body(path, body)
        if len(set(loaded.ids)) != loaded.accepted:
            _corrupt(f"{path} lists a record twice")
        if tree.get("accepted") != loaded.accepted or loaded.requested != loaded.accepted + sum(loaded.dropped.values()):
            _corrupt(
                f"{path} counts {loaded.requested} requested, {tree.get('accepted')} accepted, {loaded.dropped} dropped, and lists {loaded.accepted}"
            )
        return loaded

    def save(self, path: Path) -> None:
        """Writes it, atomically."""
        durable.write_json_atomic(path, self._body() | {"sha256": self.sha256})

    def require_backed(self, ledger: Ledger, stored: Container[str]) -> None:
        """Raises DataError 'transfer-set-corrupt' unless each record has the collect entry that it names, and its tokens are among `stored`."""
        for record in self.records:
            try:
                entry_hash = ledger.hash_of(record.id, "collect")
            except LedgerError as error:
                _corrupt(error.found)
            if entry_hash != record.ledger:
                _corrupt(f"record {record.id} names the ledger entry {record.ledger}, and its entry is {entry_hash}")
            if record.id not in stored:
                _corrupt(f"record {record.id} is not in the target store")

    def _body(self) -> Json:
        return {
            "version": VERSION,
            "requested": self.requested,
            "accepted": self.accepted,
            "dropped": dict(self.dropped),
            "decision": self.decision,
            "records": [asdict(record) for record in self.records],
        }


def freeze(curated: Curated, ledger: Ledger, *, decision: str) -> TransferSet:
    """The transfer set of what was kept; every record must have its collect entry in `ledger`.

    Raises DataError 'transfer-set-empty' where nothing was kept, LedgerError 'ledger-unknown-record'.
    """
    dropped: Counter[str] = Counter(reason for _, reason in curated.dropped)
    requested = len(curated.kept) + len(curated.dropped)
    if not curated.kept:
        raise DataError(
            "transfer-set-empty",
            found=f"{requested} answers, of which none is fit to learn from: {_counts(dropped)}",
            expected="at least one",
            do="Look at what was left out, in the run's curation.jsonl; raise generation.max_new_tokens where answers were truncated.",
        )
    records = (Record(id=kept.id, prompt_id=kept.prompt_id, ledger=ledger.hash_of(kept.id, "collect")) for kept in curated.kept)
    return TransferSet(requested=requested, dropped=dict(dropped), decision=decision, records=tuple(records))


def _counts(dropped: Counter[str]) -> str:
    return ", ".join(f"{count} because {text}" for reason, text in DROP_REASONS.items() if (count := dropped[reason])) or "there were none"


def _digest(body: Json) -> str | None:
    try:
        return sha256_hex(canonical_json(body))
    except (ValueError, RecursionError):  # what has no canonical text has no digest
        return None


def _from_body(path: Path, body: Json) -> TransferSet:
    try:
        records = tuple(Record(id=_text(r["id"]), prompt_id=_text(r["prompt_id"]), ledger=_text(r["ledger"])) for r in body["records"])
        dropped = {_text(reason): _count(count) for reason, count in body["dropped"].items()}
        return TransferSet(requested=_count(body["requested"]), dropped=dropped, decision=_text(body["decision"]), records=records)
    except (TypeError, KeyError, AttributeError) as error:
        _corrupt(f"{path} lacks a field of a transfer set, or has one of another type: {error}")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.60} is not a text")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise TypeError(f"{value!r:.60} is not a count")
    return value


def _corrupt(found: str) -> NoReturn:
    raise DataError(
        "transfer-set-corrupt",
        found=found,
        expected="the transfer set as it was frozen",
        why="the report would speak of other data than the student saw",
        do="Restore the file from a copy, or collect again in a new directory.",
    )
