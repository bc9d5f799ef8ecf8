"""Taking over what another request store has: each function moves one range of a table, and changes nothing when it is done again.

`read` gives rows of the other store for a statement that has two marks, the range of its rowids (exclusive, inclusive). Stores have numbers of their
own for calls, rows and sessions; keys, names of rows and random ids of sessions are what they share.
"""

from __future__ import annotations

import json
import sqlite3
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

Read: TypeAlias = Callable[[str], list[Any]]

_ATTEMPT = (
    "state, reserved_tokens, reserved_money, cost_tokens, cost_money, price, began_ms, ended_ms, reason, message, status,"
    " prompt_tokens, completion_tokens, reasoning_tokens, cached_tokens, request_id, model, fingerprint, provider"
)
# What two answers must share to be one: the rest (an id, a fingerprint) differs whenever something is asked twice.
_SAME = ("text", "finish_reason", "reasoning")


@dataclass(frozen=True, slots=True)
class Conflict:
    """Two stores that say different things of one call or row; what this store says stays."""

    of: str
    what: str
    here: str
    there: str


@dataclass(frozen=True, slots=True)
class Merged:
    """What was new to this store, where the stores differ, and the shards of log-probabilities that it now names."""

    calls: int = 0
    answers: int = 0
    attempts: int = 0
    rows: int = 0
    conflicts: tuple[Conflict, ...] = ()
    shards: frozenset[str] = frozenset()

    def __add__(self, other: Merged) -> Merged:
        return Merged(
            self.calls + other.calls,
            self.answers + other.answers,
            self.attempts + other.attempts,
            self.rows + other.rows,
            self.conflicts + other.conflicts,
            self.shards | other.shards,
        )


def prices(read: Read, db: sqlite3.Connection) -> Merged:
    """Snapshots of prices; which of them an endpoint has now is this store's own."""
    db.executemany("INSERT OR IGNORE INTO prices VALUES (?, ?)", read("SELECT id, price FROM prices WHERE rowid > ? AND rowid <= ?"))
    return Merged()


def probes(read: Read, db: sqlite3.Connection) -> None:
    """What probes found, of endpoints of which this store has nothing of the kind."""
    db.executemany("INSERT OR IGNORE INTO facts VALUES ('probe', ?, ?)", read("SELECT subject, value FROM facts WHERE kind = 'probe'"))


def calls(read: Read, db: sqlite3.Connection) -> Merged:
    """Calls with their bodies, and how they ended."""
    merged = Merged()
    for key, identity, variable, sample, state, reason, text, body, *outcome in read(
        "SELECT c.key, e.identity, e.key_variable, c.sample, c.state, c.reason, c.text, b.body,"
        " o.answer, o.demoted, o.raw, o.shard, o.place, u.packed FROM calls c"
        " JOIN endpoints e ON e.id = c.endpoint JOIN bodies b ON b.call = c.id LEFT JOIN outcomes o ON o.call = c.id"
        " LEFT JOIN unshelved u ON u.call = c.id WHERE c.id > ? AND c.id <= ? ORDER BY c.id"
    ):
        found = db.execute("SELECT id, state FROM calls WHERE key = ?", (key,)).fetchone()
        if found is None:
            db.execute("INSERT OR IGNORE INTO endpoints (identity, key_variable) VALUES (?, ?)", (identity, variable))
            found = db.execute(
                "INSERT INTO calls (key, endpoint, sample, state, wanted, text)"
                " SELECT ?, id, ?, 'pending', 0, ? FROM endpoints WHERE identity = ? RETURNING id, state",
                (key, sample, text, identity),
            ).fetchone()
            db.execute("INSERT INTO bodies VALUES (?, ?)", (found[0], body))
            merged += Merged(calls=1)
        merged += _end(db, key, found, state, reason, outcome)
    return merged


def _end(db: sqlite3.Connection, key: bytes, found: tuple[int, str], state: str, reason: str | None, outcome: Sequence[Any]) -> Merged:
    """An answer is worth more than a failure, and an end more than none."""
    number, here = found
    answer, demoted, raw, shard, place, packed = outcome
    if state == "answered" and here == "answered":
        stored = db.execute("SELECT answer FROM outcomes WHERE call = ?", (number,)).fetchone()[0]
        mine, other = (_said(packed) for packed in (stored, answer))
        return Merged() if mine == other else _conflict(db, key, "answer", mine, other)
    if state == "answered":
        db.execute("INSERT INTO outcomes VALUES (?, ?, ?, ?, ?, ?)", (number, answer, demoted, raw, shard, place))
        if packed is not None:
            db.execute("INSERT INTO unshelved VALUES (?, ?)", (number, packed))
    elif not (state == "failed" and here == "pending"):
        return Merged()
    db.execute("UPDATE calls SET state = ?, reason = ? WHERE id = ?", (state, reason, number))
    return Merged(answers=int(state == "answered"), shards=frozenset() if shard is None else frozenset((shard,)))


def _said(packed: bytes) -> str:
    tree = json.loads(zlib.decompress(packed))
    return json.dumps([tree.get(name) for name in _SAME])


def _conflict(db: sqlite3.Connection, of: bytes, what: str, here: str, there: str) -> Merged:
    db.execute("INSERT OR IGNORE INTO conflicts (key, what, here, there) VALUES (?, ?, ?, ?)", (of, what, here, there))
    return Merged(conflicts=(Conflict(of.hex() if what == "answer" else of.decode(), what, here, there),))


def attempts(read: Read, db: sqlite3.Connection) -> Merged:
    """Attempts, each once: one is known by its session, which is random, and its number in it."""
    new = 0
    marks = ", ".join("?" * (_ATTEMPT.count(",") + 1))
    for session, number, key, tried, *values in read(
        f"SELECT s.uid, a.number, c.key, c.attempts, {', '.join(f'a.{name.strip()}' for name in _ATTEMPT.split(','))} FROM attempts a"
        " JOIN sessions s ON s.id = a.session JOIN calls c ON c.id = a.call WHERE a.id > ? AND a.id <= ? ORDER BY a.id"
    ):
        db.execute("INSERT OR IGNORE INTO sessions (uid) VALUES (?)", (session,))
        made = db.execute(
            f"INSERT OR IGNORE INTO attempts (session, number, call, {_ATTEMPT})"
            f" SELECT s.id, ?, c.id, {marks} FROM sessions s, calls c WHERE s.uid = ? AND c.key = ?",
            (number, *values, session, key),
        ).rowcount
        if made:
            db.execute("UPDATE calls SET attempts = max(attempts + 1, ?) WHERE key = ?", (tried, key))
        new += made
    return Merged(attempts=new)


def rows(read: Read, db: sqlite3.Connection) -> Merged:
    """Rows with what was decided about them. Where one store asked again for a row, the later call is the row's."""
    merged = Merged()
    for row, prompt, key, verdict, reason, earlier in read(
        "SELECT r.row, r.prompt, c.key, r.verdict, r.reason, (SELECT group_concat(hex(o.key) || ' ' || hex(s.reason)) FROM superseded s"
        " JOIN calls o ON o.id = s.call WHERE s.row = r.id) FROM rows r JOIN calls c ON c.id = r.call WHERE r.id > ? AND r.id <= ? ORDER BY r.id"
    ):
        call = db.execute("SELECT id FROM calls WHERE key = ?", (key,)).fetchone()[0]
        made = db.execute(
            "INSERT OR IGNORE INTO rows (row, prompt, call, verdict, reason) VALUES (?, ?, ?, ?, ?)", (row, prompt, call, verdict, reason)
        ).rowcount
        before = _superseded(db, row, earlier)
        db.execute("UPDATE calls SET wanted = 1 WHERE id = (SELECT call FROM rows WHERE row = ?)", (row,))
        merged += Merged(rows=made) if made else _same_row(db, (row, call, key, verdict, reason), before)
    if merged.rows:
        add_requested(db, merged.rows)
    return merged


def add_requested(db: sqlite3.Connection, rows: int) -> None:
    """Counts rows that were requested, beside the rows themselves: so that one that vanishes is missed."""
    db.execute(
        "INSERT INTO facts VALUES ('store', 'requested', ?) ON CONFLICT DO UPDATE SET value = CAST(value AS INTEGER) + excluded.value", (str(rows),)
    )


def _superseded(db: sqlite3.Connection, row: str, earlier: str | None) -> set[int]:
    """Notes the calls that the other store superseded for a row; returns their numbers here."""
    numbers = set()
    for pair in (earlier or "").split(",") if earlier else ():
        key, reason = (bytes.fromhex(part) for part in pair.split(" "))
        number = db.execute("SELECT id FROM calls WHERE key = ?", (key,)).fetchone()[0]
        db.execute("INSERT OR IGNORE INTO superseded SELECT id, ?, ? FROM rows WHERE row = ?", (number, reason.decode(), row))
        numbers.add(number)
    return numbers


def _same_row(db: sqlite3.Connection, there: tuple[str, int, bytes, str | None, str | None], before: set[int]) -> Merged:
    row, call, key, verdict, reason = there
    number, mine, my_verdict, my_reason = db.execute("SELECT id, call, verdict, reason FROM rows WHERE row = ?", (row,)).fetchone()
    if mine != call:
        if mine in before:
            db.execute("UPDATE rows SET call = ?, verdict = ?, reason = ? WHERE id = ?", (call, verdict, reason, number))
            db.execute("UPDATE calls SET wanted = 1 WHERE id = ?", (call,))
        elif not db.execute("SELECT 1 FROM superseded WHERE row = ? AND call = ?", (number, call)).fetchone():
            my_key = db.execute("SELECT key FROM calls WHERE id = ?", (mine,)).fetchone()[0]
            return _conflict(db, row.encode(), "call", my_key.hex(), key.hex())
        return Merged()
    if my_verdict is None and verdict is not None:
        db.execute("UPDATE rows SET verdict = ?, reason = ? WHERE id = ?", (verdict, reason, number))
    elif verdict is not None and (my_verdict, my_reason) != (verdict, reason):
        return _conflict(db, row.encode(), "verdict", f"{my_verdict} {my_reason or ''}".strip(), f"{verdict} {reason or ''}".strip())
    return Merged()
