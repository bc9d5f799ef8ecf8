"""Randomised schedules of faults and deaths of a collection, and what must be true after each.

A schedule is drawn from its kind and its number: which faults, how likely, which limits, how many rows, which cap; and, of the kinds that have them, at
which write or after how long the collecting process is killed with SIGKILL, how large its files may become, which byte of its store is altered.

    faults    the collection runs to its end among faults
    deaths    its process is killed two to five times, and it is gone on with
    disk      its process can write no more at some size of a file, and it is gone on with
    bytes     killed, and one byte of its store is altered: told, or of no consequence
"""

from __future__ import annotations

import asyncio
import multiprocessing
import random
import shutil
import signal
import sqlite3
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from runs import collect_job
from stillroom.collect.store import Counts, RequestStore
from stillroom.core.errors import RequestStoreError
from stillroom.core.hashing import sha256_hex
from stillroom.testing.fake_endpoint import Endpoint, serve
from stillroom.testing.settings import Limit, Settings

Kind: TypeAlias = Literal["faults", "deaths", "disk", "bytes"]
AFTER_WORK = ("drop-after-work", "drop-in-body", "hang-after-work", "http-502-after-work", "cut-utf8", "cut-json", "empty-body")
BEFORE_WORK = ("http-500", "http-502", "http-503", "http-529", "html-error-page", "error-in-200", "drop-before-work")
# Ends of an attempt after which nobody knows whether the endpoint did it, and after which it is known that it did not.
UNKNOWN, UNDONE = ("unanswered", "unmetered"), ("released",)
ALL: dict[Kind, int] = {"faults": 1000, "deaths": 400, "disk": 60, "bytes": 100}
"""How many of each kind `make soak` goes through: the numbers from 0 on."""
_LIMIT_SECONDS = 180
# Children are forked from a process that has the imports and no threads: a death costs what it does, and no start of Python.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["runs.collect_job"])


@dataclass(frozen=True, slots=True)
class End:
    """How one process of a collection ends, if it is not done before: at a write point, after so many seconds, or where a file would be larger."""

    write: int | None = None
    seconds: float | None = None
    largest_file_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Schedule:
    settings: Settings
    rows: int
    cap: int
    ends: tuple[End, ...] = ()
    altered: float | None = None
    """Which byte of the store is altered after the last end, as a share of its length."""


@dataclass(slots=True)
class Tally:
    """What a number of schedules came to."""

    schedules: Counter[Kind] = field(default_factory=Counter)
    rows: int = 0
    attempts: int = 0
    unknown: int = 0
    received: int = 0
    done: int = 0
    refused: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    kills: Counter[int] = field(default_factory=Counter)
    """Schedules by how often their process was killed."""
    disk_full: int = 0
    altered_told: int = 0
    cap_reached: int = 0
    worst_reserved_share_of_cap: float = 0.0
    worst_reserved_picos: int = 0


def drawn(kind: Kind, number: int) -> Schedule:
    """The schedule of a kind with a number."""
    chance = random.Random(f"{kind} {number}")
    faults = chance.sample(AFTER_WORK + BEFORE_WORK, chance.randint(0, 5))
    limits: tuple[Limit, ...] = ()
    if chance.random() < 0.4:
        limits = (Limit(requests_per_minute=chance.choice([3000, 12000])), Limit(after_seconds=0.1, requests_per_minute=chance.choice([6000, 30000])))
    settings = Settings(
        seed=number,
        answer_tokens=4,
        faults={name: chance.uniform(0.02, 0.15) for name in faults},  # type: ignore[misc]
        faults_by=chance.choice(["body", "number"]),
        limits=limits,
        concurrency=chance.choice([None, None, 4]),
        rate_headers=chance.random() < 0.7,
        retry_after=chance.choice(["seconds", "none"]),
        latency_ms=chance.choice([0, 2, 20]),
        hang_seconds=0.8,  # longer than the client waits; an endless one would take up a place of `concurrency` for ever
        remember_requests=100_000,
    )
    cap = chance.choice([10**10, 10**12])
    match kind:
        case "faults":
            return Schedule(settings, chance.randint(1, 24), cap)
        case "deaths":
            return Schedule(settings, chance.randint(12, 40), cap, tuple(_death(chance) for _ in range(chance.randint(2, 5))))
        case "disk":
            sizes = sorted(chance.randrange(4 << 10, 400 << 10) for _ in range(chance.randint(1, 3)))
            return Schedule(settings, chance.randint(12, 40), cap, tuple(End(largest_file_bytes=size) for size in sizes))
        case "bytes":
            return Schedule(settings, chance.randint(12, 40), cap, (_death(chance),), altered=chance.random())


def _death(chance: random.Random) -> End:
    return End(write=chance.randint(1, 30)) if chance.random() < 0.6 else End(seconds=chance.uniform(0.02, 0.4))


async def follow(kind: Kind, number: int, directory: Path, tally: Tally) -> None:
    """Goes through one schedule. AssertionError where anything is not as it must be."""
    schedule = drawn(kind, number)
    path = directory / f"{kind}-{number}.sqlite"
    killed = 0
    async with serve(schedule.settings) as (endpoint, base_url):
        for order, end in enumerate(schedule.ends):
            code = await _end(path, base_url, schedule, order, end)
            killed += code == -signal.SIGKILL
            tally.disk_full += code == collect_job.DISK_FULL
            if path.exists():
                _hold(path, endpoint, schedule, tally)
            if code == 0:
                break
        if schedule.altered is not None and path.exists() and path.stat().st_size:
            tally.altered_told += _alter(path, schedule.altered)
        whole = await collect_job.collect(path, base_url, schedule.rows, schedule.cap, number)
        counts = _hold(path, endpoint, schedule, tally)
        if whole:
            assert counts.answered == counts.requested == schedule.rows, counts
            _require_exact_bill(path, endpoint)
    _count(kind, path, endpoint, schedule, whole, killed, tally)


async def _end(path: Path, base_url: str, schedule: Schedule, order: int, end: End) -> int:
    """Runs a process of the collection to its end; returns its exit code, which is negative for a signal."""
    values = (path, base_url, schedule.rows, schedule.cap, order, end.write, end.largest_file_bytes)
    process = _PROCESSES.Process(target=collect_job.job, args=values)
    process.start()
    if end.seconds is not None:
        await asyncio.sleep(end.seconds)
        process.kill()
    while process.exitcode is None:
        await asyncio.sleep(0.005)
    assert process.exitcode in (0, -signal.SIGKILL, collect_job.CAP_REACHED, collect_job.DISK_FULL), f"exit code {process.exitcode} after {end}"
    code = process.exitcode
    process.close()
    return code


# -- what must be true -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Attempt:
    state: str
    reason: str | None
    cost_picos: int
    server_number: int | None
    """The server's number of the request, where a response with it came back."""


def _hold(path: Path, endpoint: Endpoint, schedule: Schedule, tally: Tally) -> Counts:
    """What must be true at every moment at which the collection stands still."""
    with RequestStore.open(path) as store:
        store.verify()
        counts, spend = store.counts(), store.spend()
        counts.require_conserved()
        if counts.requested:
            names = [row.row for row in store.rows()]
            assert names == [str(number) for number in range(schedule.rows)], "every row is there once"
    bill = endpoint.bill
    billed = int(bill.exact_micro_dollars * 10**6)
    assert spend.settled.money <= billed <= spend.settled.money + spend.reserved.money <= schedule.cap, (spend, billed)
    if spend.unknown == 0:
        assert spend.settled.money == billed, (spend, billed)
    attempts, received = _attempts(path), _received(endpoint)
    assert received.keys() <= attempts.keys(), "the server knows of no call that the store does not"
    for key, tries in attempts.items():
        _hold_call(tries, received.get(key, []))
    tally.worst_reserved_picos = max(tally.worst_reserved_picos, spend.reserved.money)
    tally.worst_reserved_share_of_cap = max(tally.worst_reserved_share_of_cap, spend.reserved.money / schedule.cap)
    return counts


def _hold_call(tries: list[_Attempt], received: list[tuple[int, bool]]) -> None:
    """One call: what the store says of its attempts, and the server of what it received (its number, and whether it did it)."""
    assert len(received) <= len(tries), "nothing is sent without an attempt on the disk"
    for earlier in tries[:-1]:
        assert earlier.state in (*UNKNOWN, *UNDONE), f"sent again after it had ended as {earlier}"
    done = dict(received)
    for tried in tries:
        if tried.server_number is not None:
            assert tried.state not in UNDONE or not done[tried.server_number], f"the server did what counts as undone: {tried}"
            assert tried.state != "settled" or done[tried.server_number], f"the server did not do what was settled: {tried}"
    settled = sum(tried.state == "settled" for tried in tries)
    assert settled <= sum(done.values()) <= settled + sum(tried.state in UNKNOWN for tried in tries), (tries, received)


def _require_exact_bill(path: Path, endpoint: Endpoint) -> None:
    """Where every call has been settled, what each costs is known, and so is what those cost whose answers never came: the bill is their sum."""
    costs = {key: [tried.cost_picos for tried in tries if tried.state == "settled"] for key, tries in _attempts(path).items()}
    assert all(len(cost) == 1 for cost in costs.values()), costs
    times = {key: counts["done"] for key, counts in endpoint.bill.bodies.items()}
    assert int(endpoint.bill.exact_micro_dollars * 10**6) == sum(costs[key][0] * number for key, number in times.items())


def _attempts(path: Path) -> dict[str, list[_Attempt]]:
    """By the digest of the body, which here is one call's alone, its attempts in order."""
    found: dict[str, list[_Attempt]] = {}
    connection = sqlite3.connect(path)
    statement = (
        "SELECT b.body, a.state, a.reason, a.cost_money, a.request_id FROM bodies b LEFT JOIN attempts a ON a.call = b.call ORDER BY b.call, a.id"
    )
    for body, state, reason, cost, request in connection.execute(statement):
        tries = found.setdefault(sha256_hex(zlib.decompress(body)), [])
        if state is not None:
            tries.append(_Attempt(state, reason, cost, None if request is None else int(request.removeprefix("req_"))))
    connection.close()
    return found


def _received(endpoint: Endpoint) -> dict[str, list[tuple[int, bool]]]:
    found: dict[str, list[tuple[int, bool]]] = {}
    for request in endpoint.requests:
        found.setdefault(request.key, []).append((request.number, request.done))
    return found


def _alter(path: Path, share: float) -> bool:
    """Alters a byte of the store and opens it again: whether that was told. Where it was not, all answers and the account must be the same."""

    def content() -> object:
        with RequestStore.open(path) as store:
            store.verify()
            return [(row.row, row.key, row.state, row.answer) for row in store.rows()], store.spend().settled

    before, copy = content(), path.with_suffix(".copy")
    shutil.copy(path, copy)
    data = bytearray(path.read_bytes())
    at = int(share * len(data))
    data[at] ^= 0x55
    path.write_bytes(data)
    try:
        assert content() == before, f"byte {at} was altered, and nobody was told of what it changed"
        told = False
    except RequestStoreError as error:
        assert error.code in ("request-store-corrupt", "request-store-other"), error  # noqa: PT017 - not every byte matters
        told = True
    for left in path.parent.glob(f"{path.name}-*"):
        left.unlink()
    copy.replace(path)  # as the error says
    return told


# -- many ---------------------------------------------------------------------------------------------------------------------------


def _count(kind: Kind, path: Path, endpoint: Endpoint, schedule: Schedule, whole: bool, killed: int, tally: Tally) -> None:
    with RequestStore.open(path, read_only=True) as store:
        spend = store.spend()
    bill = endpoint.bill
    tally.schedules[kind] += 1
    tally.rows += schedule.rows
    tally.attempts += spend.attempts
    tally.unknown += spend.unknown
    tally.received += bill.received
    tally.done += bill.done
    tally.refused += bill.throttled
    tally.faults.update(bill.faults)
    tally.cap_reached += not whole
    if kind == "deaths":
        tally.kills[killed] += 1


def every() -> Iterator[tuple[Kind, int]]:
    """The schedules of `make soak`."""
    return ((kind, number) for kind, count in ALL.items() for number in range(count))


def follow_all(numbers: Iterable[tuple[Kind, int]], directory: Path, *, at_once: int = 1) -> Tally:
    """Goes through schedules, some at once: most of their time is waiting. The first that fails is named, by kind and number, and ends it."""
    tally = Tally()
    waiting = iter(numbers)

    async def some() -> None:
        for kind, number in waiting:
            try:
                await asyncio.wait_for(follow(kind, number, directory, tally), _LIMIT_SECONDS)
            except BaseException as error:
                error.add_note(f"schedule {number} of {kind!r}: {drawn(kind, number)}")
                raise
            for left in directory.glob(f"{kind}-{number}.*"):
                left.unlink()

    async def main() -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(at_once):
                group.create_task(some())

    asyncio.run(main())
    return tally
