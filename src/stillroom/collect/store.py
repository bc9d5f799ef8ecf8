"""What was asked of endpoints, what came back and what it cost: nothing is lost, and nothing is paid for twice.

A **row** is what somebody wants: one sample of the answer to one prompt. A **call** is what is bought for it, known by its key; rows that want the same
thing share one. An **attempt** is one sending of a call: its worst case is reserved, durably, before anything is sent, and stays reserved until it is
settled by what the endpoint counted, or released because it is certain that nothing was done. So at any moment, and after any crash,

    settled <= what the endpoint bills <= settled + reserved <= cap
    rows requested = accepted + rejected + failed + pending

Answers are compressed JSON without their log-probabilities, which live packed in Parquet beside the store: what is to be packed waits in the store until
its shard is on the disk. The raw body of an answer is kept only where its log-probabilities were not believed, and of a probe's calls. No header is
stored, and what is in an endpoint's key variable is taken out of what endpoints say.
"""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import threading
import uuid
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeAlias, TypeVar

from stillroom.collect import merging
from stillroom.collect.database import GroupCommit, StoreLock, Work, connect, errors_reported
from stillroom.collect.explain import Explanation, differences
from stillroom.collect.merging import Merged
from stillroom.collect.spend import Amount, Caps, Price, Spend, cost, in_units, projected, worst_case
from stillroom.collect.wire import AGAIN, STOPS, Answer, Call, Endpoint, Failure, FailureReason, Outcome, Usage
from stillroom.core.clock import Clock, now
from stillroom.core.errors import RequestStoreError, SpendCapReached, SpendError
from stillroom.core.hashing import canonical_json, sha256_hex
from stillroom.core.identities import Json

T = TypeVar("T")
CallState: TypeAlias = Literal["pending", "in-flight", "answered", "failed"]
Fact: TypeAlias = Literal["rates", "probe", "pilot", "tokenizer"]

# Refused before anything was done, so that nothing can have been billed.
REFUSED: frozenset[FailureReason] = frozenset(
    {"throttled", "not-sent", "quota-exhausted", "bad-key", "not-found", "context-overflow", "invalid-request"}
)
_ROWS_TOGETHER = 2000
_LONGEST_MESSAGE = 500
_COSTS_LOOKED_AT = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What somebody wants: an id that means this row in every run, the id of its prompt, and the call that gives the answer."""

    row: str
    prompt: str
    call: Call


@dataclass(frozen=True, kw_only=True)
class PendingCall(Call):
    """A call that waits. `position` orders them; `row` and `prompt` are of the first row that wants it; `tried` is how often it was begun."""

    position: int
    row: str
    prompt: str
    tried: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Requested:
    """What became of rows that were requested: `new` ones, of which `hits` had been answered already, and those that were `known` before."""

    new: int = 0
    hits: int = 0
    known: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """One attempt, begun: the worst case of its call is reserved."""

    attempt: int
    call: Call
    worst: Amount
    price: Price | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Where the rows are. `pending` are all without an end: of them, `in_flight` are under way, and `answered` wait to be accepted or rejected."""

    requested: int
    accepted: int
    rejected: Mapping[str, int]
    failed: Mapping[str, int]
    pending: int
    in_flight: int
    answered: int

    def require_conserved(self) -> None:
        """AssertionError unless requested = accepted + rejected + failed + pending."""
        ends = self.accepted + sum(self.rejected.values()) + sum(self.failed.values()) + self.pending
        if self.requested != ends:
            raise AssertionError(f"{self.requested} rows were requested, and {ends} are accounted for: {self}")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRow:
    """A row and what there is of it. `answer` has no log-probabilities: `logprobs` is the shard that has them and the place in it.

    `demoted` says why they were not believed. `verdict` and `reason` are those of the curation, or why the call failed.
    """

    row: str
    prompt: str
    key: str
    sample: int
    state: CallState
    verdict: Literal["accepted", "rejected"] | None
    reason: str | None
    answer: Answer | None
    logprobs: tuple[str, int] | None
    demoted: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One sending of a call that has ended. `usage` is what was counted, None where nothing was; `held` what stays reserved for it."""

    answered: bool
    usage: Usage | None
    held: Amount
    seconds: float
    began: float
    """Seconds since 1970."""


@dataclass(slots=True)
class _Totals:
    """Of all attempts: settled, reserved, and of the latter what is under way."""

    settled: Amount = field(default_factory=Amount)
    reserved: Amount = field(default_factory=Amount)
    open: Amount = field(default_factory=Amount)


class RequestStore:
    """Calls, outcomes, spend and state of one collection, in one SQLite file with one process that writes it. Made by `open`."""

    def __init__(self, path: Path, lock: StoreLock | None, connections: Sequence[sqlite3.Connection], clock: Clock) -> None:
        self.path = path
        self._lock, self._clock = lock, clock
        self._reader = connections[0]
        self._reading = threading.RLock()
        self._connections = connections
        self._totals = _Totals()
        self._caps = Caps()
        self._prices: dict[str, Price | None] = {}  # by the identity of an endpoint that has been permitted
        self._session = 0
        self._number = 0
        self._writer: GroupCommit | None = None

    # -- opening and closing ----------------------------------------------------------------------------------------------------

    @classmethod
    def open(cls, path: Path | str, *, read_only: bool = False, clock: Clock = now) -> RequestStore:
        """Opens a request store; makes it where there is none. What was under way when its last owner died becomes unanswered.

        `read_only` may be beside another process that writes. Raises RequestStoreError 'request-store-locked', 'request-store-other',
        'request-store-corrupt', and ResourceError 'disk-full'.
        """
        path = Path(path)
        lock = None if read_only else StoreLock(path)
        connections: list[sqlite3.Connection] = []
        try:
            if not read_only:
                connections.append(connect(path, read_only=False))
            connections.insert(0, connect(path, read_only=True))
            store = cls(path, lock, connections, clock)
            with errors_reported(path):
                store._load(connections[-1], recover=not read_only)
            return store
        except BaseException:
            for connection in connections:
                connection.close()
            if lock is not None:
                lock.close()
            raise

    def close(self) -> None:
        """Writes what waits to be written, and lets go of the file. Attempts that are still under way become unanswered."""
        if self._writer is not None:
            self._writer.close()
            with suppress(sqlite3.Error):  # a full disk: the next one to open the store does this first
                _make_open_unanswered(self._connections[-1], self._now_ms())
                # What waited for its shard has gone. It frees one page a step, and only a script is stepped to its end.
                self._connections[-1].executescript("PRAGMA incremental_vacuum")
        for connection in self._connections:
            connection.close()
        if self._lock is not None:
            self._lock.close()
        self._writer = self._lock = None

    def __enter__(self) -> RequestStore:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _load(self, db: sqlite3.Connection, *, recover: bool) -> None:
        if recover:
            _make_open_unanswered(db, self._now_ms())
        self._recount(db)
        if recover:
            self._session = int(db.execute("INSERT INTO sessions (uid) VALUES (?) RETURNING id", (uuid.uuid4().hex,)).fetchone()[0])
            self._writer = GroupCommit(db, self.path, self._recount)

    def _recount(self, db: sqlite3.Connection) -> None:
        """What is kept in memory, as it is on the disk."""
        self._totals = _totals(db)
        stored = _fact(db, "store", "caps")
        self._caps = Caps(**stored) if stored else Caps()
        prices = {name: _price(self.path, text) for name, text in db.execute("SELECT id, price FROM prices")}
        self._prices = {identity: prices.get(price) for identity, price in db.execute("SELECT identity, price FROM endpoints")}

    # -- requests ---------------------------------------------------------------------------------------------------------------

    def request(self, rows: Iterable[Row]) -> Requested:
        """Adds rows, and calls that are not there yet as pending ones. What was answered before is not bought again; to repeat this changes nothing.

        Takes any number of rows in little memory. Raises RequestStoreError 'request-conflict' where a row was requested before with another call,
        and has then added all that came before the 2,000 rows that it is among.
        """
        total, source = Requested(), iter(rows)
        while chunk := list(islice(source, _ROWS_TOGETHER)):
            keys = [bytes.fromhex(row.call.key) for row in chunk]
            done = self._run(partial(self._request, chunk, keys))
            total = Requested(new=total.new + done.new, hits=total.hits + done.hits, known=total.known + done.known)
        return total

    def _request(self, chunk: Sequence[Row], keys: Sequence[bytes], db: sqlite3.Connection) -> Requested:
        new = hits = known = 0
        for row, key in zip(chunk, keys, strict=True):
            call, state = self._add_call(db, row.call, key, wanted=True)
            made = db.execute("INSERT OR IGNORE INTO rows (row, prompt, call) VALUES (?, ?, ?)", (row.row, row.prompt, call)).rowcount
            if made:
                new += 1
                hits += state == "answered"
            else:
                _require_same_call(db, row, call)
                known += 1
        merging.add_requested(db, new)
        return Requested(new=new, hits=hits, known=known)

    def _add_call(self, db: sqlite3.Connection, call: Call, key: bytes, *, wanted: bool) -> tuple[int, str]:
        """The number and state of a call, which is added where it is not there."""
        found = db.execute("SELECT id, state, wanted FROM calls WHERE key = ?", (key,)).fetchone()
        if found is None:
            endpoint = self._endpoint(db, call.endpoint)
            number = db.execute(
                "INSERT INTO calls (key, endpoint, sample, state, wanted, text) VALUES (?, ?, ?, 'pending', ?, ?)",
                (key, endpoint, call.sample, wanted, _text_digest(call.body)),
            ).lastrowid
            assert number is not None
            db.execute("INSERT INTO bodies VALUES (?, ?)", (number, _deflate(call.content)))
            return number, "pending"
        if wanted and not found[2]:
            db.execute("UPDATE calls SET wanted = 1 WHERE id = ?", (found[0],))
        return int(found[0]), str(found[1])

    def _endpoint(self, db: sqlite3.Connection, endpoint: Endpoint) -> int:
        identity = _identity(endpoint)
        found = db.execute("SELECT id FROM endpoints WHERE identity = ?", (identity,)).fetchone()
        if found is None:
            found = db.execute(
                "INSERT INTO endpoints (identity, key_variable) VALUES (?, ?) RETURNING id", (identity, endpoint.key_variable)
            ).fetchone()
        return int(found[0])

    def pending(self, limit: int, after: int = 0) -> list[PendingCall]:
        """The first calls that wait and that a row wants, at most `limit` of them, whose `position` is greater than `after`."""
        found = self._rows_of(
            "SELECT c.id, c.key, e.identity, e.key_variable, c.sample, c.attempts, b.body, r.row, r.prompt FROM calls c"
            " JOIN endpoints e ON e.id = c.endpoint JOIN bodies b ON b.call = c.id"
            " JOIN rows r ON r.id = (SELECT min(id) FROM rows WHERE call = c.id)"
            " WHERE c.state = 'pending' AND c.wanted = 1 AND c.id > ? ORDER BY c.id LIMIT ?",
            (after, limit),
        )
        calls = []
        for position, key, identity, variable, sample, tried, packed, row, prompt in found:
            endpoint, content = self._endpoint_of(identity, variable), self._inflate(packed)
            call = PendingCall(endpoint=endpoint, body=self._json(content), sample=sample, position=position, row=row, prompt=prompt, tried=tried)
            call.__dict__.update(key=key.hex(), content=content)  # where cached_property keeps them
            calls.append(call)
        return calls

    def supersede(self, row: str, call: Call, reason: str) -> None:
        """Asks for a row again with another call, such as one with a larger limit, and takes back what was decided about the row.

        What the earlier call gave stays in the store. ValueError where there is no such row, or where its call has not ended.
        """

        def work(db: sqlite3.Connection) -> None:
            found = db.execute("SELECT r.id, r.call, c.state FROM rows r JOIN calls c ON c.id = r.call WHERE r.row = ?", (row,)).fetchone()
            if found is None or found[2] not in ("answered", "failed"):
                raise ValueError(f"row {row!r} is not there" if found is None else f"the call of row {row!r} is {found[2]}")
            number, _ = self._add_call(db, call, bytes.fromhex(call.key), wanted=True)
            if number != found[1]:
                db.execute("INSERT OR IGNORE INTO superseded VALUES (?, ?, ?)", (found[0], found[1], _clean(reason)))
                db.execute("UPDATE rows SET call = ?, verdict = NULL, reason = NULL WHERE id = ?", (number, found[0]))

        self._run(work)

    # -- spend ------------------------------------------------------------------------------------------------------------------

    def permit(self, endpoint: Endpoint, price: Price | None, caps: Caps) -> None:
        """Lets calls be begun at `endpoint`, at this price and under these caps, which hold for all calls of the store from now on.

        Raises SpendError as `Caps.require_for` does, and 'price-unknown' where the store has prices in another currency.
        """
        caps.require_for(price, endpoint)
        others = {known.currency for known in self._prices.values() if known is not None}
        if price is not None and others - {price.currency}:
            raise SpendError(
                "price-unknown",
                found=f"a price of {endpoint.model!r} in {price.currency}, beside prices in {', '.join(sorted(others))}",
                why="one cap cannot hold for two currencies",
                do="Give all prices in one currency, or collect into two stores.",
            )

        def work(db: sqlite3.Connection) -> None:
            number = self._endpoint(db, endpoint)
            if price is not None:
                db.execute("INSERT OR IGNORE INTO prices VALUES (?, ?)", (price.id, json.dumps(price.as_json())))
            db.execute("UPDATE endpoints SET price = ?, key_variable = ? WHERE id = ?", (price and price.id, endpoint.key_variable, number))
            _keep_fact(db, "store", "caps", {"money": caps.money, "tokens": caps.tokens})
            self._prices[_identity(endpoint)], self._caps = price, caps

        self._run(work)

    async def begin(self, call: Call) -> Reservation:
        """Reserves the worst case of a call, durably, before anything is sent. A call that is not in the store is added, as one that no row wants.

        Raises SpendCapReached where it does not fit under a cap, SpendError where its endpoint was not permitted or the call has no bound, and
        AssertionError where it is under way or has ended: nothing is bought twice.
        """
        key, content, began = bytes.fromhex(call.key), call.content, self._now_ms()

        def work(db: sqlite3.Connection) -> Reservation:
            number, state = self._add_call(db, call, key, wanted=False)
            if state != "pending":
                raise AssertionError(f"call {call.key} is {state}: it is not begun again")
            return self._reserve(db, call, number, len(content), began)

        submitted = self._submit(work)
        try:
            return await asyncio.shield(submitted)
        except asyncio.CancelledError:
            submitted.add_done_callback(self._give_back)
            raise

    def _reserve(self, db: sqlite3.Connection, call: Call, number: int, body_bytes: int, began_ms: int) -> Reservation:
        price = self._prices.get(_identity(call.endpoint))
        self._caps.require_for(price, call.endpoint)
        worst = worst_case(call, price, body_bytes)
        self._require_room(worst)
        db.execute("UPDATE calls SET state = 'in-flight', attempts = attempts + 1 WHERE id = ?", (number,))
        self._number += 1
        attempt = db.execute(
            "INSERT INTO attempts (session, number, call, state, reserved_tokens, reserved_money, price, began_ms) VALUES (?, ?, ?, 'open', ?, ?, ?, ?)",
            (self._session, self._number, number, worst.tokens, worst.money, price and price.id, began_ms),
        ).lastrowid
        assert attempt is not None
        self._totals.reserved += worst
        self._totals.open += worst
        return Reservation(attempt=attempt, call=call, worst=worst, price=price)

    def _require_room(self, worst: Amount) -> None:
        """Called in the writer's thread, where totals stand still."""
        totals = self._totals
        if (totals.settled + totals.reserved + worst).fits(self._caps):
            return
        later = (totals.settled + totals.reserved - totals.open + worst).fits(self._caps)
        raise SpendCapReached(
            "spend-cap-reached",
            may_fit_later=later,
            found=f"{_told(totals.settled)} spent, {_told(totals.reserved)} reserved, and a call that may cost {_told(worst)}",
            expected=f"no more than {_told(Amount(self._caps.tokens or 0, self._caps.money or 0))} in all (0 is no cap)",
            why="a reservation is held for each call that is under way, or may have been billed without our knowing",
            do="Raise the cap and run again: what was bought is kept.",
        )

    def _give_back(self, submitted: asyncio.Future[Reservation]) -> None:
        """What was reserved for a task that was cancelled while it waited: it has sent nothing."""
        if not submitted.cancelled() and submitted.exception() is None:
            self._submit(self._ended(submitted.result(), "released", "pending", reason="not-sent"))

    async def settle(
        self,
        reservation: Reservation,
        outcome: Outcome,
        raw: bytes | None = None,
        *,
        demoted: str | None = None,
        packed: bytes | None = None,
        status: int | None = None,
        request_id: str | None = None,
        keep_raw: bool = False,
    ) -> None:
        """Ends an attempt whose answer, or whose refusal, came whole; durable when it returns.

        An answer is kept without its log-probabilities: `packed` is what is to go into a shard of them. `demoted` is why they were not believed; only
        then, or with `keep_raw`, `raw` is kept. A failure that may be tried again leaves the call pending; another is its end. What was counted is
        charged. Where nothing was counted, a refusal (`REFUSED`) costs nothing, and the reservation of anything else stays: it may have been billed.
        """
        secret = os.environ.get(reservation.call.endpoint.key_variable or "")
        charged = _charge(outcome, reservation)
        columns = _columns_of(outcome, secret) | {"status": status, "request_id": _clean(request_id)}
        if isinstance(outcome, Failure) and status is None:
            columns["status"] = outcome.status
        match outcome:
            case Answer():
                stored = _pack_answer(outcome, secret)
                kept = _without(raw, secret) if raw is not None and (demoted is not None or keep_raw) else None
                state = "settled" if charged is not None else "unmetered"
                finish = self._ended(reservation, state, "answered", charged, columns)

                def work(db: sqlite3.Connection) -> None:
                    call = finish(db)
                    body = None if kept is None else _deflate(kept)
                    db.execute("INSERT INTO outcomes (call, answer, demoted, raw) VALUES (?, ?, ?, ?)", (call, stored, _clean(demoted), body))
                    if packed is not None:
                        db.execute("INSERT INTO unshelved VALUES (?, ?)", (call, packed))

                await asyncio.shield(self._submit(work))
            case Failure():
                state = "settled" if charged is not None else "released" if outcome.reason in REFUSED else "unmetered"
                ends: CallState = "pending" if outcome.reason in AGAIN | STOPS else "failed"
                await asyncio.shield(self._submit(self._ended(reservation, state, ends, charged, columns, reason=outcome.reason)))

    async def release(self, reservation: Reservation, reason: FailureReason) -> None:
        """Ends an attempt of which it is certain that nothing was done or billed. The call is pending again."""
        await asyncio.shield(self._submit(self._ended(reservation, "released", "pending", reason=reason)))

    async def unanswered(self, reservation: Reservation, reason: FailureReason = "outcome-unknown") -> None:
        """Ends an attempt of which nobody knows whether it was done: its reservation stays, and the call is pending again."""
        await asyncio.shield(self._submit(self._ended(reservation, "unanswered", "pending", reason=reason)))

    def _ended(
        self,
        reservation: Reservation,
        state: str,
        call_state: CallState,
        charged: Amount | None = None,
        columns: Mapping[str, Any] | None = None,
        *,
        reason: str | None = None,
    ) -> Work[int]:
        """The work that ends an attempt and returns the number of its call. AssertionError where it has ended before."""
        values = dict(columns or {}) | {"state": state, "ended_ms": self._now_ms(), "reason": reason}
        if charged is not None:
            values |= {"cost_tokens": charged.tokens, "cost_money": charged.money}
        assignments = ", ".join(f"{name} = ?" for name in values)

        def work(db: sqlite3.Connection) -> int:
            ended = db.execute(
                f"UPDATE attempts SET {assignments} WHERE id = ? AND state = 'open' RETURNING call", (*values.values(), reservation.attempt)
            ).fetchall()
            if not ended:
                raise AssertionError(f"attempt {reservation.attempt} of call {reservation.call.key} has ended before")
            call = int(ended[0][0])
            db.execute("UPDATE calls SET state = ?, reason = ? WHERE id = ?", (call_state, reason if call_state == "failed" else None, call))
            self._totals.open -= reservation.worst
            if state in ("settled", "released"):
                self._totals.reserved -= reservation.worst
            if charged is not None:
                self._totals.settled += charged
            return call

        return work

    async def give_up(self, call: Call, reason: str) -> None:
        """Ends a pending call as failed. AssertionError where it is not pending."""

        def work(db: sqlite3.Connection) -> None:
            key = bytes.fromhex(call.key)
            if not db.execute("UPDATE calls SET state = 'failed', reason = ? WHERE key = ? AND state = 'pending'", (_clean(reason), key)).rowcount:
                raise AssertionError(f"call {call.key} is not pending")

        await asyncio.shield(self._submit(work))

    def retry_failed(self, reasons: Iterable[str]) -> int:
        """Makes calls that failed for these reasons pending again; returns how many."""
        wanted = list(reasons)

        def work(db: sqlite3.Connection) -> int:
            marks = ", ".join("?" * len(wanted))
            return db.execute(f"UPDATE calls SET state = 'pending', reason = NULL WHERE state = 'failed' AND reason IN ({marks})", wanted).rowcount

        return self._run(work)

    def spend(self, more: int = 0) -> Spend:
        """What was spent, what is reserved, and what the calls that wait, and `more` that are not there yet, are expected to cost.

        Both are expected to cost what rows' calls did on average: a probe's calls, which no row wants, are no guide.
        """
        with self._reading, errors_reported(self.path):
            db = self._reader
            totals = _totals(db)
            attempts, unknown, overruns = db.execute(
                "SELECT count(*), coalesce(sum(state IN ('unanswered', 'unmetered')), 0),"
                " coalesce(sum(cost_tokens > reserved_tokens OR cost_money > reserved_money), 0) FROM attempts"
            ).fetchone()
            waiting = db.execute("SELECT count(*) FROM calls WHERE state = 'pending' AND wanted = 1").fetchone()[0]
            step = max(1, attempts // _COSTS_LOOKED_AT)
            costs = db.execute(
                "SELECT a.cost_tokens, a.cost_money FROM attempts a JOIN calls c ON c.id = a.call"
                " WHERE a.state = 'settled' AND a.reason IS NULL AND a.id % ? = 0 AND c.wanted = 1",
                (step,),
            ).fetchall()
        currencies = {price.currency for price in self._prices.values() if price is not None}
        return Spend(
            settled=totals.settled,
            reserved=totals.reserved,
            caps=self._caps,
            currency=next(iter(currencies), None),
            attempts=attempts,
            unknown=unknown,
            overruns=overruns,
            projected_tokens=projected([tokens for tokens, _ in costs], waiting + more),
            projected_money=projected([money / 1e12 for _, money in costs], waiting + more) if currencies else None,
        )

    def spent_on_rows(self) -> Amount:
        """What of it was spent on calls that rows want, and not on a probe's."""
        found = self._rows_of(
            "SELECT coalesce(sum(a.cost_tokens), 0), coalesce(sum(a.cost_money), 0) FROM attempts a JOIN calls c ON c.id = a.call WHERE c.wanted = 1"
        )
        return Amount(*found[0])

    # -- rows -------------------------------------------------------------------------------------------------------------------

    def counts(self) -> Counts:
        """Where the rows are, by what is in the store; `require_conserved` holds it against how many were ever requested."""
        found = self._rows_of(
            "SELECT r.verdict, r.reason, c.state, c.reason, count(*) FROM rows r LEFT JOIN calls c ON c.id = r.call GROUP BY 1, 2, 3, 4"
        )
        accepted = pending = in_flight = answered = 0
        rejected: dict[str, int] = {}
        failed: dict[str, int] = {}
        for verdict, why, state, failure, number in found:
            if verdict == "accepted":
                accepted += number
            elif verdict == "rejected":
                rejected[why] = rejected.get(why, 0) + number
            elif state == "failed":
                failed[failure] = failed.get(failure, 0) + number
            elif state is not None:  # a row whose call is gone is nowhere
                pending += number
                in_flight += number * (state == "in-flight")
                answered += number * (state == "answered")
        requested = self._rows_of("SELECT value FROM facts WHERE kind = 'store' AND subject = 'requested'")
        return Counts(
            requested=int(requested[0][0]) if requested else 0,
            accepted=accepted,
            rejected=rejected,
            failed=failed,
            pending=pending,
            in_flight=in_flight,
            answered=answered,
        )

    def accept(self, rows: Iterable[str]) -> None:
        """Decides that rows, which must have been answered, are to be learnt from. ValueError for one that has not been."""
        self._decide((row, "accepted", None) for row in rows)

    def reject(self, rows: Iterable[tuple[str, str]]) -> None:
        """Decides that rows, which must have been answered, are not: pairs of a row and the reason. ValueError for one that has not been."""
        self._decide((row, "rejected", _clean(reason)) for row, reason in rows)

    def _decide(self, verdicts: Iterable[tuple[str, str, str | None]]) -> None:
        source = iter(verdicts)
        while chunk := list(islice(source, _ROWS_TOGETHER)):

            def work(db: sqlite3.Connection, chunk: Sequence[tuple[str, str, str | None]] = tuple(chunk)) -> None:
                for row, verdict, reason in chunk:
                    changed = db.execute(
                        "UPDATE rows SET verdict = ?, reason = ? WHERE row = ? AND (SELECT state FROM calls WHERE id = rows.call) = 'answered'",
                        (verdict, reason, row),
                    )
                    if not changed.rowcount:
                        raise ValueError(f"row {row!r} is not there, or has no answer")

            self._run(work)

    def rows(self) -> Iterator[StoredRow]:
        """All rows in the order in which they were requested, in little memory."""
        last = 0
        while found := self._rows_of(_STORED_ROWS + " WHERE r.id > ? ORDER BY r.id LIMIT ?", (last, _ROWS_TOGETHER)):
            for number, *columns in found:
                yield self._stored_row(columns)
                last = number

    def _stored_row(self, columns: Sequence[Any]) -> StoredRow:
        row, prompt, verdict, why, key, sample, state, failure, answer, demoted, shard, place = columns
        return StoredRow(
            row=row,
            prompt=prompt,
            key=key.hex(),
            sample=sample,
            state=state,
            verdict=verdict,
            reason=why if verdict is not None else failure,
            answer=None if answer is None else self._answer_of(answer),
            logprobs=None if shard is None else (shard, place),
            demoted=demoted,
        )

    def answer(self, key: str) -> Answer | None:
        """The answer to a call, without log-probabilities; None where there is none."""
        found = self._rows_of("SELECT o.answer FROM outcomes o JOIN calls c ON c.id = o.call WHERE c.key = ?", (bytes.fromhex(key),))
        return self._answer_of(found[0][0]) if found else None

    def raw(self, key: str) -> bytes | None:
        """The raw body of an answer whose log-probabilities were not believed, or that was to be kept whole; None where none was."""
        found = self._rows_of("SELECT o.raw FROM outcomes o JOIN calls c ON c.id = o.call WHERE c.key = ?", (bytes.fromhex(key),))
        return self._inflate(found[0][0]) if found and found[0][0] is not None else None

    def failure(self, key: str) -> Failure | None:
        """Why a call failed, in the words of its last attempt; None where it has not."""
        found = self._rows_of(
            "SELECT c.reason, a.message, a.status FROM calls c LEFT JOIN attempts a ON a.call = c.id"
            " WHERE c.key = ? AND c.state = 'failed' ORDER BY a.id DESC LIMIT 1",
            (bytes.fromhex(key),),
        )
        return Failure(reason=found[0][0], message=found[0][1] or "", status=found[0][2]) if found else None

    def verify(self) -> None:
        """Reads everything: SQLite's own check, every value, every key, and that no row was lost. Raises 'request-store-corrupt'."""
        checked = self._rows_of("PRAGMA integrity_check(1)")[0][0]
        if checked != "ok":
            raise _corrupt(self.path, checked)
        last = read = 0
        statement = (
            "SELECT c.id, c.key, c.sample, c.state, e.identity, b.body, o.answer, o.raw FROM calls c JOIN endpoints e ON e.id = c.endpoint"
            " JOIN bodies b ON b.call = c.id LEFT JOIN outcomes o ON o.call = c.id WHERE c.id > ? ORDER BY c.id LIMIT ?"
        )
        while found := self._rows_of(statement, (last, _ROWS_TOGETHER)):
            for _, *columns in found:
                self._verify_call(*columns)
            last, read = found[-1][0], read + len(found)
        if read != self._rows_of("SELECT count(*) FROM calls")[0][0]:
            raise _corrupt(self.path, "a call has lost its body or its endpoint")
        self._verify_costs()
        try:
            self.counts().require_conserved()
        except AssertionError as error:
            raise _corrupt(self.path, str(error)) from error

    def _verify_costs(self) -> None:
        """What attempts cost is what was counted, at the price of that day."""
        prices = {name: _price(self.path, text) for name, text in self._rows_of("SELECT id, price FROM prices")}
        last, columns = 0, ", ".join(_USAGE)
        statement = f"SELECT id, cost_tokens, cost_money, price, {columns} FROM attempts WHERE state = 'settled' AND id > ? ORDER BY id LIMIT ?"
        while found := self._rows_of(statement, (last, _ROWS_TOGETHER)):
            for number, tokens, money, price, *counts in found:
                try:
                    right = cost(Usage(**dict(zip(_USAGE, counts, strict=True))), None if price is None else prices[price])
                except (KeyError, TypeError, ValueError) as error:
                    raise _corrupt(self.path, f"attempt {number} cannot have cost what it says: {error!r}") from error
                if right != Amount(tokens, money):
                    raise _corrupt(self.path, f"attempt {number} cost {right} and says {Amount(tokens, money)}")
            last = found[-1][0]

    def _verify_call(self, key: bytes, sample: int, state: str, identity: str, body: bytes, answer: bytes | None, raw: bytes | None) -> None:
        call = Call(endpoint=self._endpoint_of(identity), body=self._unpack(body), sample=sample)
        if call.key != key.hex() or (state == "answered") != (answer is not None):
            raise _corrupt(self.path, f"call {key.hex()} is not what its key says, or has lost its answer")
        if answer is not None:
            self._answer_of(answer)
        if raw is not None:
            self._inflate(raw)

    def attempts(self, key: str) -> list[Attempt]:
        """How a call was sent, in order; without what is under way, and what was certainly never done."""
        found = self._rows_of(
            f"SELECT a.state, a.reason, a.reserved_tokens, a.reserved_money, a.began_ms, a.ended_ms, {', '.join(f'a.{name}' for name in _USAGE)}"
            " FROM attempts a JOIN calls c ON c.id = a.call WHERE c.key = ? AND a.state IN ('settled', 'unanswered', 'unmetered') ORDER BY a.id",
            (bytes.fromhex(key),),
        )
        return [
            Attempt(
                answered=state != "unanswered" and reason is None,
                usage=Usage(**dict(zip(_USAGE, counts, strict=True))) if state == "settled" else None,
                held=Amount() if state == "settled" else Amount(tokens, money),
                seconds=(ended - began) / 1000,
                began=began / 1000,
            )
            for state, reason, tokens, money, began, ended, *counts in found
        ]

    # -- log-probabilities ------------------------------------------------------------------------------------------------------

    def unshelved(self, limit: int) -> list[tuple[str, bytes]]:
        """Keys of answers whose packed log-probabilities wait for their shard, and these, in the order of the calls; at most `limit`."""
        found = self._rows_of("SELECT c.key, u.packed FROM unshelved u JOIN calls c ON c.id = u.call ORDER BY u.call LIMIT ?", (limit,))
        return [(key.hex(), packed) for key, packed in found]

    def shelve(self, shard: str, keys: Sequence[str]) -> None:
        """Notes that a shard, which must be on the disk, has the log-probabilities of these answers, in this order, and lets go of the packed ones."""

        def work(db: sqlite3.Connection) -> None:
            for place, key in enumerate(keys):
                found = db.execute("SELECT id FROM calls WHERE key = ?", (bytes.fromhex(key),)).fetchone()
                if found is None or not db.execute("UPDATE outcomes SET shard = ?, place = ? WHERE call = ?", (shard, place, found[0])).rowcount:
                    raise ValueError(f"there is no answer to a call {key}")
                db.execute("DELETE FROM unshelved WHERE call = ?", found)

        self._run(work)

    # -- explanations -----------------------------------------------------------------------------------------------------------

    def explain(self, what: str | Call) -> Explanation | None:
        """What is known of a call, or of a key (or its beginning), and how it differs from the stored call that is nearest to it.

        Near are calls of the same rows' prompts and calls about the same text; else the last ones that were answered. None for a key that is not there,
        ValueError for one that is no hexadecimal number or begins several.
        """
        asked = self._call_of_key(what) if isinstance(what, str) else replace(what, body=self._json(what.content))
        if asked is None:
            return None
        known = self._rows_of("SELECT id, state, reason, attempts FROM calls WHERE key = ?", (bytes.fromhex(asked.key),))
        number, state, reason, attempts = known[0] if known else (-1, None, None, 0)
        near = []
        for other, how, packed, identity, sample in self._rows_of(_NEAR, {"text": _text_digest(asked.body), "call": number, "most": _NEAR_CALLS}):
            call = Call(endpoint=self._endpoint_of(identity), body=self._unpack(packed), sample=sample)
            near.append((differences(asked, call), how != "answered", other, call.key, how))
        least = min(near, key=lambda one: (len(one[0]), *one[1:3])) if near else None
        return Explanation(
            key=asked.key,
            state=state,
            reason=reason,
            attempts=attempts,
            nearest=least[3] if least else None,
            nearest_state=least[4] if least else None,
            differences=least[0] if least else (),
        )

    def _call_of_key(self, beginning: str) -> Call | None:
        low, high = (bytes.fromhex(beginning.lower().ljust(64, digit)) for digit in "0f")
        found = self._rows_of(
            "SELECT e.identity, c.sample, b.body FROM calls c JOIN endpoints e ON e.id = c.endpoint JOIN bodies b ON b.call = c.id"
            " WHERE c.key BETWEEN ? AND ? LIMIT 2",
            (low, high),
        )
        if len(found) > 1:
            raise ValueError(f"{beginning!r} begins several keys")
        return Call(endpoint=self._endpoint_of(found[0][0]), sample=found[0][1], body=self._unpack(found[0][2])) if found else None

    # -- facts ------------------------------------------------------------------------------------------------------------------

    def remember(self, kind: Fact, endpoint: Endpoint, value: Json) -> None:
        """Keeps what was learnt of an endpoint (its rates, what a probe or a pilot found, which tokenizer its ids are of) in the place of what was kept."""
        self._run(lambda db: _keep_fact(db, kind, _identity(endpoint), value))

    def recall(self, kind: Fact, endpoint: Endpoint) -> Json | None:
        """What `remember` kept; None where nothing was."""
        with self._reading, errors_reported(self.path):
            return _fact(self._reader, kind, _identity(endpoint))

    # -- several machines -------------------------------------------------------------------------------------------------------

    def merge(self, sources: Iterable[Path | str]) -> Merged:
        """Takes over what is in other stores, which nobody may be using. What was taken over before is not again, and counts once.

        Where both have an answer to a call and they differ, or both decided about a row and not the same, this store's stays and the conflict is told
        (and kept). Shards of log-probabilities are files beside a store, which whoever merges copies: `Merged.shards` names them. The spend is the
        sum, the caps are this store's; what a probe found is taken where this store has nothing of the kind.
        """
        merged = Merged()
        for source in sources:
            with RequestStore.open(source, clock=self._clock) as other:
                merged = merged + self._merge_one(other)
        return merged

    def asked(self) -> list[Endpoint]:
        """The endpoints that rows want calls of."""
        return [
            self._endpoint_of(identity)
            for (identity,) in self._rows_of("SELECT identity FROM endpoints WHERE id IN (SELECT endpoint FROM calls WHERE wanted = 1)")
        ]

    def shards(self) -> list[str]:
        """The names of the files of log-probabilities that answers are in."""
        return [name for (name,) in self._rows_of("SELECT DISTINCT shard FROM outcomes WHERE shard IS NOT NULL ORDER BY shard")]

    def _merge_one(self, other: RequestStore) -> Merged:
        merged = Merged()
        steps = (("prices", merging.prices), ("calls", merging.calls), ("attempts", merging.attempts), ("rows", merging.rows))
        for table, step in steps:
            last = 0
            # `rowid` is the primary key where that is an integer.
            while taken := other._rows_of(f"SELECT rowid FROM {table} WHERE rowid > ? ORDER BY rowid LIMIT ?", (last, _ROWS_TOGETHER)):
                read = partial(other._rows_of, values=(last, taken[-1][0]))
                try:
                    merged = merged + self._run(partial(step, read))
                except (zlib.error, json.JSONDecodeError) as error:
                    raise _corrupt(other.path, f"or {self.path}: an answer cannot be read: {error}") from error
                last = taken[-1][0]
        self._run(partial(merging.probes, other._rows_of))
        self._run(self._recount)
        return merged

    # -- within -----------------------------------------------------------------------------------------------------------------

    def _run(self, work: Work[T]) -> T:
        return self._owner().run(self._atomic(work))

    def _submit(self, work: Work[T]) -> asyncio.Future[T]:
        return self._owner().submit(self._atomic(work))

    def _atomic(self, work: Work[T]) -> Work[T]:
        """A work that leaves the totals as they were where it fails."""

        def atomic(db: sqlite3.Connection) -> T:
            before = replace(self._totals)
            try:
                return work(db)
            except BaseException:
                self._totals = before
                raise

        return atomic

    def _owner(self) -> GroupCommit:
        if self._writer is None:
            raise RuntimeError(f"{self.path} is closed, or was opened to be read only")
        return self._writer

    def _rows_of(self, statement: str, values: Sequence[Any] | Mapping[str, Any] = ()) -> list[Any]:
        with self._reading, errors_reported(self.path):
            return self._reader.execute(statement, values).fetchall()

    def _inflate(self, data: bytes) -> bytes:
        try:
            return zlib.decompress(data)
        except zlib.error as error:
            raise _corrupt(self.path, f"a value cannot be unpacked: {error}") from error

    def _unpack(self, data: bytes) -> Json:
        return self._json(self._inflate(data))

    def _json(self, text: bytes) -> Json:
        try:
            tree = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _corrupt(self.path, f"a value is not JSON: {error}") from error
        if not isinstance(tree, dict):
            raise _corrupt(self.path, f"a value is {type(tree).__name__}")
        return tree

    def _answer_of(self, packed: bytes) -> Answer:
        try:
            return _answer(self._unpack(packed))
        except (KeyError, TypeError, ValueError) as error:
            raise _corrupt(self.path, f"an answer cannot be read: {error!r}") from error

    def _endpoint_of(self, identity: str, key_variable: str | None = None) -> Endpoint:
        try:
            return Endpoint(key_variable=key_variable, **json.loads(identity))
        except (TypeError, ValueError) as error:
            raise _corrupt(self.path, f"an endpoint cannot be read: {error!r}") from error

    def _now_ms(self) -> int:
        return int(self._clock().timestamp() * 1000)


_NEAR_CALLS = 200
_NEAR = """
WITH near (id) AS (
    SELECT * FROM (SELECT id FROM calls WHERE text = :text LIMIT :most)
    UNION SELECT * FROM (SELECT same.call FROM rows mine JOIN rows same ON same.prompt = mine.prompt WHERE mine.call = :call LIMIT :most)
    UNION SELECT s.call FROM superseded s JOIN rows r ON r.id = s.row WHERE r.call = :call
    UNION SELECT * FROM (SELECT call FROM outcomes ORDER BY call DESC LIMIT :most)
)
SELECT c.id, c.state, b.body, e.identity, c.sample FROM near JOIN calls c USING (id) JOIN bodies b ON b.call = c.id
JOIN endpoints e ON e.id = c.endpoint WHERE c.id <> :call
"""
_STORED_ROWS = (
    "SELECT r.id, r.row, r.prompt, r.verdict, r.reason, c.key, c.sample, c.state, c.reason, o.answer, o.demoted, o.shard, o.place"
    " FROM rows r JOIN calls c ON c.id = r.call LEFT JOIN outcomes o ON o.call = c.id"
)


def _make_open_unanswered(db: sqlite3.Connection, ended_ms: int) -> None:
    """Nobody knows how attempts ended whose owner has gone: their reservations stay, and their calls are pending again."""
    db.execute("BEGIN IMMEDIATE")
    db.execute("UPDATE attempts SET state = 'unanswered', reason = 'outcome-unknown', ended_ms = ? WHERE state = 'open'", (ended_ms,))
    db.execute("UPDATE calls SET state = 'pending' WHERE state = 'in-flight'")
    db.execute("COMMIT")


def shard(rows: Iterable[Row], index: int, count: int) -> Iterator[Row]:
    """The rows of one of `count` machines, by equal ranges of their calls' keys: rows that share a call are together, in every order of rows."""
    if not 0 <= index < count:
        raise ValueError(f"there is no shard {index} of {count}")
    return (row for row in rows if int(row.call.key[:16], 16) * count >> 64 == index)


def _totals(db: sqlite3.Connection) -> _Totals:
    settled = reserved = opened = Amount()
    statement = "SELECT state, sum(cost_tokens), sum(cost_money), sum(reserved_tokens), sum(reserved_money) FROM attempts GROUP BY state"
    for state, cost_tokens, cost_money, reserved_tokens, reserved_money in db.execute(statement):
        settled += Amount(cost_tokens, cost_money)
        if state in ("open", "unanswered", "unmetered"):
            reserved += Amount(reserved_tokens, reserved_money)
        if state == "open":
            opened += Amount(reserved_tokens, reserved_money)
    return _Totals(settled, reserved, opened)


def _require_same_call(db: sqlite3.Connection, row: Row, call: int) -> None:
    """A row that is there already wants this call, or did before it was superseded."""
    number, wants = db.execute("SELECT id, call FROM rows WHERE row = ?", (row.row,)).fetchone()
    if wants == call or db.execute("SELECT 1 FROM superseded WHERE row = ? AND call = ?", (number, call)).fetchone():
        return
    before = db.execute("SELECT key FROM calls WHERE id = ?", (wants,)).fetchone()[0].hex()
    raise RequestStoreError(
        "request-conflict",
        found=f"row {row.row!r} with the call {row.call.key}",
        expected=f"the call {before}, with which it was requested before",
        why="one row would mean two things",
        do="`stillroom requests STORE --explain KEY` says how the two differ. Use another store, or ids of rows that depend on what is asked.",
    )


def _charge(outcome: Outcome, reservation: Reservation) -> Amount | None:
    """What was counted; None where nothing was, or nothing that can be."""
    if outcome.usage is None:
        return None
    try:
        return cost(outcome.usage, reservation.price)
    except ValueError:
        return None


def _columns_of(outcome: Outcome, secret: str | None) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    if outcome.usage is not None:
        columns |= {name: getattr(outcome.usage, name) for name in _USAGE}
    match outcome:
        case Answer():
            columns |= {"model": outcome.model, "fingerprint": outcome.fingerprint, "provider": outcome.provider}
        case Failure():
            columns["message"] = _without_text(outcome.message, secret)[:_LONGEST_MESSAGE]
    return {name: _clean(value) if isinstance(value, str) else value for name, value in columns.items()}


_USAGE = ("prompt_tokens", "completion_tokens", "reasoning_tokens", "cached_tokens")
_ANSWER = ("text", "finish_reason", "reasoning", "thinking", "model", "fingerprint", "provider", "response_id")


def _pack_answer(answer: Answer, secret: str | None) -> bytes:
    """The answer without its places. ASCII, for text may have halves of surrogate pairs, which UTF-8 cannot."""
    tree: Json = {name: _without_text(value, secret) for name in _ANSWER if (value := getattr(answer, name)) is not None}
    if answer.usage is not None:
        tree["usage"] = [getattr(answer.usage, name) for name in _USAGE]
    if answer.token_ids is not None:
        tree["token_ids"] = answer.token_ids
    if answer.places_unreadable:
        tree["places_unreadable"] = True
    return _deflate(json.dumps(tree, separators=(",", ":")).encode())


def _answer(tree: Json) -> Answer:
    """The inverse. KeyError, TypeError or ValueError for anything else."""
    usage, ids = tree.pop("usage", None), tree.pop("token_ids", None)
    return Answer(
        text=tree.pop("text"),
        finish_reason=tree.pop("finish_reason", None),
        usage=None if usage is None else Usage(**dict(zip(_USAGE, usage, strict=True))),
        token_ids=None if ids is None else tuple(ids),
        **tree,
    )


def _deflate(data: bytes) -> bytes:
    """As zlib.compress, which for short data mostly clears memory: a window no larger than needed takes a tenth of the time."""
    bits = min(max(len(data).bit_length(), 9), 15)
    squeeze = zlib.compressobj(6, zlib.DEFLATED, bits, max(bits - 7, 1))
    return squeeze.compress(data) + squeeze.flush()


def _without_text(text: str, secret: str | None) -> str:
    # A key of a few characters is a placeholder for servers that want none, and a word that answers may have.
    return text.replace(secret, "[key]") if secret and len(secret) >= _SECRET_CHARACTERS else text


def _without(data: bytes, secret: str | None) -> bytes:
    return data.replace(secret.encode(), b"[key]") if secret and len(secret) >= _SECRET_CHARACTERS else data


_SECRET_CHARACTERS = 8


def _clean(text: str | None) -> str | None:
    """Text that SQLite can hold: halves of surrogate pairs become question marks."""
    return None if text is None else text.encode(errors="replace").decode()


def _text_digest(body: Json) -> bytes:
    """Eight bytes that bodies which ask about the same text share."""
    return bytes.fromhex(sha256_hex(canonical_json([body.get("messages"), body.get("prompt")]))[:16])


def _identity(endpoint: Endpoint) -> str:
    return canonical_json(endpoint.identity).decode()


def _fact(db: sqlite3.Connection, kind: str, subject: str) -> Json | None:
    found = db.execute("SELECT value FROM facts WHERE kind = ? AND subject = ?", (kind, subject)).fetchone()
    return None if found is None else json.loads(found[0])


def _keep_fact(db: sqlite3.Connection, kind: str, subject: str, value: Json) -> None:
    db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?, ?)", (kind, subject, json.dumps(value)))


def _price(path: Path, text: str) -> Price:
    try:
        return Price.from_json(json.loads(text))
    except (ValueError, KeyError, TypeError) as error:
        raise _corrupt(path, f"a price cannot be read: {error}") from error


def _corrupt(path: Path, what: str) -> RequestStoreError:
    return RequestStoreError(
        "request-store-corrupt",
        found=f"{path}: {what}",
        expected="what Stillroom wrote",
        do="Restore the file from a copy (with its -wal file, if there is one), or begin a new one.",
    )


def _told(amount: Amount) -> str:
    return f"{amount.tokens:,} tokens ({in_units(amount.money)} in money)"
