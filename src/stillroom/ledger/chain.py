"""A file whose lines are chained by hashes: one `{"entry":{...},"hash":"..."}` per line, as `entries` describes. What an entry says is its owner's.

Every entry has `sequence`, its position in the file from 0, and `previous`, the hash of the entry before, 64 zeros in the first. Beside the file lies
a head, {entries, head}: how many entries there were and what the last hash was after the last append, without which lines dropped from the end could
not be missed. It is written after the lines, so it may lag behind the file and never runs ahead of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, cast

from stillroom.core import durable
from stillroom.core.errors import LedgerError
from stillroom.core.hashing import canonical_json
from stillroom.core.identities import Json
from stillroom.ledger.entries import GENESIS, leaf_hash

_PREFIX, _INFIX, _SUFFIX = b'{"entry":', b',"hash":"', b'"}\n'


@dataclass(frozen=True, slots=True)
class Head:
    """How many entries there are and the hash of the last: enough to hold a chain to what it was."""

    entries: int
    hash: str

    def follow(self, facts: Json) -> tuple[str, Head]:
        """The line, without its line feed, of an entry that says `facts` and comes next; and the head it makes."""
        text = canonical_json({"sequence": self.entries, "previous": self.hash} | facts)
        entry_hash = leaf_hash(text)
        return f'{{"entry":{text.decode()},"hash":"{entry_hash}"}}', Head(self.entries + 1, entry_hash)


EMPTY = Head(0, GENESIS)


def read_chain(path: Path, head: Head | None, *, canonical: bool) -> Iterator[tuple[int, Json, str]]:
    """The entries of `path` with their line numbers (from 1) and hashes, each held to itself and to those before it; all of them to `head`.

    With `canonical` the spelling of each is checked, too. Raises LedgerError 'ledger-corrupt' that names the first line at fault, when it comes there.
    """
    last = EMPTY
    for number, line in _raw_lines(path):
        entry_json, entry_hash = _split(path, number, line)
        entry = _parse(path, number, entry_json, canonical=canonical)
        if entry.get("sequence") != last.entries:
            corrupt(path, number, f"holds entry {entry.get('sequence')} where entry {last.entries} belongs: lines were dropped, moved or doubled")
        if entry.get("previous") != last.hash:
            corrupt(path, number, "does not follow from the line before it")
        last = Head(last.entries + 1, entry_hash)
        yield number, entry, entry_hash
        if head is not None and last.entries == head.entries and entry_hash != head.hash:
            corrupt(path, number, f"is not the entry that was last in the {path.stem}'s head")
    if head is not None and last.entries < head.entries:
        corrupt(path, last.entries + 1, f"is missing: the {path.stem} had {head.entries} entries and has {last.entries}")


def keep_head(path: Path, head: Head) -> None:
    """Writes the head of a chain to the file `path`, atomically."""
    durable.write_json_atomic(path, {"entries": head.entries, "head": head.hash})


def kept_head(path: Path) -> Head | None:
    """The head in a file that `keep_head` wrote; None where there is none. Raises LedgerError 'ledger-corrupt'."""
    if not path.exists():
        return None
    kept = durable.read_json(path)
    try:
        return Head(int(kept["entries"]), str(kept["head"]))
    except (TypeError, KeyError, ValueError) as error:
        raise LedgerError("ledger-corrupt", found=f"{path} is not a head", expected="{entries, head}", do="Restore the file from a copy.") from error


def corrupt(path: Path, number: int, what: str) -> NoReturn:
    """Raises LedgerError 'ledger-corrupt' for one line."""
    raise LedgerError(
        "ledger-corrupt",
        found=f"line {number} of {path} {what}",
        expected="the lines as they were written, and no others",
        why="a book that was altered proves nothing",
        do="Restore the file from a copy, or run again in a new directory.",
    )


def _raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    if path.exists():
        with path.open("rb") as file:
            yield from enumerate(file, start=1)


def _split(path: Path, number: int, line: bytes) -> tuple[bytes, str]:
    """The entry's JSON and its hash, which agree."""
    tail = len(_INFIX) + 64 + len(_SUFFIX)
    entry_json, infix, entry_hash = line[len(_PREFIX) : -tail], line[-tail : -tail + len(_INFIX)], line[-tail + len(_INFIX) : -len(_SUFFIX)]
    if not (line.startswith(_PREFIX) and infix == _INFIX and line.endswith(_SUFFIX)):
        corrupt(path, number, "is not an entry with its hash")
    if leaf_hash(entry_json).encode() != entry_hash:
        corrupt(path, number, "does not have the hash it states: it was changed")
    return entry_json, entry_hash.decode()


def _parse(path: Path, number: int, entry_json: bytes, *, canonical: bool) -> Json:
    """The entry: what has the right hash need not have been written by us."""
    try:
        entry = json.loads(entry_json)
        if canonical and canonical_json(entry) != entry_json:
            corrupt(path, number, "is not canonical JSON")
    except (ValueError, RecursionError):
        corrupt(path, number, "is not canonical JSON")
    if not isinstance(entry, dict):
        corrupt(path, number, "is not an entry")
    return cast(Json, entry)
