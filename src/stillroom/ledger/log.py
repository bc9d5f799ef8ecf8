"""The ledger as a file: appended to, chained, verified. What its lines mean is in `entries`.

Beside `ledger.jsonl` lie `ledger.secret` (private, see `entries`) and `ledger.head.json`, {entries, head}: how long the ledger was and what its last
hash was after the last append, without which lines dropped from the end could not be missed. All three survive a death at any point: the head is
written after the lines, so it may lag behind the file and never runs ahead of it.

Who can write these files can rewrite all of them. The chain shows accidents and partial edits; against its owner a ledger needs a head that
somebody else holds.
"""

from __future__ import annotations

import re
import secrets
from bisect import bisect_right
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from stillroom.core import durable
from stillroom.core.clock import Clock, iso, now
from stillroom.core.errors import LedgerError
from stillroom.core.identities import Json
from stillroom.ledger.chain import Head, corrupt, keep_head, kept_head, read_chain
from stillroom.ledger.entries import (
    COMMON_FIELDS,
    GENESIS,
    STAGE_FIELDS,
    VERSION,
    Collected,
    Entry,
    Field,
    Frozen,
    Stage,
    Trained,
    commitment,
    derive_salt,
    record_facts,
    shared_facts,
)

_ENTRIES_PER_WRITE = 8192
_HASH_BYTES = 32
_DIGEST = re.compile("[0-9a-f]{64}")


class _Index:
    """Where each (stage, record) is, and the hash of every entry, in 32 bytes each: a ledger may have millions of lines."""

    def __init__(self) -> None:
        self._hashes = bytearray()
        self._places: dict[str, dict[bytes, int]] = {stage: {} for stage in STAGE_FIELDS}
        # From which entry on collect entries name which decision: they are few.
        self._decisions: list[tuple[int, str]] = []

    def __len__(self) -> int:
        return len(self._hashes) // _HASH_BYTES

    def add(self, stage: str, record: str, entry_hash: str, decision: str | None) -> None:
        """`decision` is that of a collect entry."""
        if decision is not None and (not self._decisions or self._decisions[-1][1] != decision):
            self._decisions.append((len(self), decision))
        self._places[stage][bytes.fromhex(record)] = len(self)
        self._hashes += bytes.fromhex(entry_hash)

    def find(self, stage: str, record: str) -> str | None:
        """The hash of the entry of that stage and record commitment."""
        place = self._places[stage].get(bytes.fromhex(record))
        return None if place is None else self._hash_at(place)

    def decision(self, record: str) -> str | None:
        """The decision that the collect entry of that record commitment names."""
        place = self._places["collect"].get(bytes.fromhex(record))
        return None if place is None else self._decisions[bisect_right(self._decisions, place, key=lambda one: one[0]) - 1][1]

    @property
    def head(self) -> Head:
        return Head(len(self), self._hash_at(len(self) - 1) if len(self) else GENESIS)

    def _hash_at(self, place: int) -> str:
        return self._hashes[place * _HASH_BYTES : (place + 1) * _HASH_BYTES].hex()


class Ledger:
    """The ledger of one run, open for appending by one process (the run's lock sees to that)."""

    def __init__(self, directory: Path, clock: Clock, secret: bytes, index: _Index) -> None:
        self._path, self._head_path = directory / "ledger.jsonl", directory / "ledger.head.json"
        self._clock, self._secret, self._index = clock, secret, index

    @classmethod
    def open(cls, directory: Path, clock: Clock = now) -> Ledger:
        """The ledger in `directory`, which must exist; begun if there is none. A line torn by a crash is cut off: it had not been promised.

        Raises LedgerError 'ledger-corrupt' where the chain is broken, lines are missing or the secret is.
        """
        path = directory / "ledger.jsonl"
        durable.repair_tail(path)
        index = _scan(path, kept_head(directory / "ledger.head.json"), canonical=False)
        ledger = cls(directory, clock, _secret(directory, begun=len(index) > 0), index)
        if len(index):
            ledger._keep_head()
        return ledger

    @property
    def head(self) -> str:
        """The hash of the last entry; 64 zeros where there is none."""
        return self._index.head.hash

    @property
    def count(self) -> int:
        """The number of entries."""
        return len(self._index)

    def has(self, record_id: str, stage: Stage) -> bool:
        """True where the record has an entry of that stage."""
        return self._index.find(stage, self._commit("record", record_id, record_id)) is not None

    def hash_of(self, record_id: str, stage: Stage) -> str:
        """The hash of the record's entry of that stage. Raises LedgerError 'ledger-unknown-record' where there is none."""
        found = self._index.find(stage, self._commit("record", record_id, record_id))
        if found is None:
            raise self._unknown_record(record_id)
        return found

    def decision_of(self, record_id: str) -> str:
        """The decision that the record was collected under. Raises LedgerError 'ledger-unknown-record' where there is no such record."""
        found = self._index.decision(self._commit("record", record_id, record_id))
        if found is None:
            raise self._unknown_record(record_id)
        return found

    def salt(self, record_id: str, field: Field) -> str:
        """The salt behind one commitment, in hexadecimal: disclosing it with the text proves that commitment and betrays nothing else."""
        return derive_salt(self._secret, field, record_id).hex()

    def append(self, entries: Iterable[Entry]) -> list[str]:
        """Writes the entries that are not yet there, in order, and returns the hash of each, old or new; on disk when it returns.

        A record that has an entry of the same stage keeps it, so a stage that is resumed may hand in again what it handed in before.
        Raises LedgerError 'ledger-unknown-record' for a Frozen or Trained record that was never Collected, ResourceError 'disk-full';
        of a long iterable a first part may then have been written.
        """
        hashes: list[str] = []
        rest, before = iter(entries), self.count
        while some := list(islice(rest, _ENTRIES_PER_WRITE)):
            hashes += self._append(some)
        if self.count > before:
            self._keep_head()
        return hashes

    def verify(self) -> Head:
        """Reads the whole file again and holds it to its own hashes, its schema, and to what this object has read and written.

        Raises LedgerError 'ledger-corrupt' that names the first line at fault.
        """
        return _scan(self._path, self._index.head, canonical=True).head

    def _append(self, entries: list[Entry]) -> list[str]:
        time = iso(self._clock())
        hashes: list[str] = []
        lines: list[str] = []
        added: dict[tuple[Stage, str], str] = {}
        decisions: dict[str, str] = {}
        head = self._index.head

        def known(stage: Stage, record: str) -> str | None:
            return added.get((stage, record)) or self._index.find(stage, record)

        for entry in entries:
            record = self._commit("record", entry.record_id, entry.record_id)
            entry_hash = known(entry.stage, record)
            if entry_hash is None:
                common = {"version": VERSION, "time": time, "stage": entry.stage, "record": record}
                line, head = head.follow(common | self._facts(entry, known("collect", record)))
                lines.append(line)
                entry_hash = head.hash
                added[entry.stage, record] = entry_hash
                if isinstance(entry, Collected):
                    decisions[record] = entry.circumstances.decision
            hashes.append(entry_hash)
        durable.append_lines(self._path, lines)
        for (stage, record), entry_hash in added.items():
            self._index.add(stage, record, entry_hash, decisions.get(record) if stage == "collect" else None)
        return hashes

    def _facts(self, entry: Entry, collected: str | None) -> Json:
        """What the entry says beyond the common fields; `collected` is the hash of its record's collect entry, if there is one."""
        if isinstance(entry, Collected):
            return shared_facts(entry.circumstances) | record_facts(entry, lambda field, content: self._commit(field, entry.record_id, content))
        if collected is None:
            raise self._unknown_record(entry.record_id)
        match entry:
            case Frozen():
                return {"collected": collected, "kept": entry.reason is None, "reason": entry.reason}
            case Trained():
                return {"collected": collected}

    def _unknown_record(self, record_id: str) -> LedgerError:
        return LedgerError(
            "ledger-unknown-record",
            found=f"record {record_id} is not in {self._path} at that stage",
            expected="a record that was collected by this run",
            why="a student may learn only from what is in the book",
            do="Collect again: stillroom collect RECIPE --out DIR.",
        )

    def _commit(self, field: Field, record_id: str, content: str) -> str:
        return commitment(derive_salt(self._secret, field, record_id), content)

    def _keep_head(self) -> None:
        keep_head(self._head_path, self._index.head)


def verify_ledger(path: Path, head: Head | None = None) -> Head:
    """Verifies a `ledger.jsonl` alone, without its secret; `head` is what it is held to, if anyone knows. Returns the head it has.

    Every line that was changed, dropped, moved or doubled is found; lines dropped from the end only if `head` says that they were there.
    Raises LedgerError 'ledger-corrupt' that names the first line at fault.
    """
    return _scan(path, head, canonical=True).head


def _scan(path: Path, head: Head | None, *, canonical: bool) -> _Index:
    """Reads all lines and checks each against itself and against those before it; with `canonical` its spelling too."""
    index = _Index()
    for number, entry, entry_hash in read_chain(path, head, canonical=canonical):
        _check_schema(path, number, entry)
        _check_references(path, number, entry, index)
        index.add(entry["stage"], entry["record"], entry_hash, entry.get("decision"))
    return index


def _check_schema(path: Path, number: int, entry: Json) -> None:
    stage = entry.get("stage")
    if not isinstance(stage, str) or stage not in STAGE_FIELDS or entry.keys() != COMMON_FIELDS | STAGE_FIELDS[stage] or entry["version"] != VERSION:
        corrupt(path, number, f"is not an entry of schema version {VERSION}")
    digests = [entry[field] for field in ("record", "prompt", "output", "collected", "decision") if field in entry]
    if not all(isinstance(digest, str) and _DIGEST.fullmatch(digest) for digest in digests):
        corrupt(path, number, "has a digest that is none")


def _check_references(path: Path, number: int, entry: Json, index: _Index) -> None:
    if index.find(entry["stage"], entry["record"]) is not None:
        corrupt(path, number, f"is a second {entry['stage']} entry of one record")
    if entry["stage"] != "collect" and index.find("collect", entry["record"]) != entry["collected"]:
        corrupt(path, number, "does not refer to the collect entry of its record")


def _secret(directory: Path, *, begun: bool) -> bytes:
    path = directory / "ledger.secret"
    if path.exists():
        try:
            secret = bytes.fromhex(path.read_text(encoding="ascii"))
        except (ValueError, OSError):
            secret = b""
        if len(secret) == _HASH_BYTES:
            return secret
    if begun or path.exists():
        raise LedgerError(
            "ledger-corrupt",
            found=f"{path} is missing or is not a secret",
            expected="the 64 hexadecimal digits that the ledger's salts are derived from",
            why="without them no entry can be matched with its record",
            do="Restore the file from a copy, or run again in a new directory.",
        )
    secret = secrets.token_bytes(_HASH_BYTES)
    durable.write_bytes_atomic(path, secret.hex().encode(), mode=0o600)
    return secret
