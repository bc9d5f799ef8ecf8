"""Randomised schedules of faults and deaths: no row is lost, nothing is sent twice unless nobody knows what became of it, and the account brackets the bill.

Each schedule is drawn from its number: which faults, how likely, which limits on the rate, how many rows, which cap, and whether (and at which write) the
collecting process is killed with SIGKILL, once or more often, and started again.
"""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from runs import collect_job
from stillroom.collect.store import RequestStore
from stillroom.testing.fake_endpoint import serve
from stillroom.testing.settings import Limit, Settings

JOB = Path(collect_job.__file__)
AFTER_WORK = ("drop-after-work", "drop-in-body", "hang-after-work", "http-502-after-work", "cut-utf8", "cut-json", "empty-body")
BEFORE_WORK = ("http-500", "http-502", "http-503", "http-529", "html-error-page", "error-in-200", "drop-before-work")


@dataclass(frozen=True, slots=True)
class Schedule:
    settings: Settings
    rows: int
    cap: int
    deaths: tuple[int, ...]


def drawn(number: int, *, deaths: bool) -> Schedule:
    chance = random.Random(number)
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
        latency_ms=chance.choice([0, 2]),
        hang_seconds=0.8,  # longer than the client waits; an endless one would take up a place of `concurrency` for ever
    )
    dying = tuple(chance.randint(1, 40) for _ in range(chance.randint(1, 3))) if deaths else ()
    return Schedule(settings, chance.randint(1, 24), chance.choice([10**10, 10**12]), dying)


async def follow(number: int, schedule: Schedule, directory: Path) -> None:
    path = directory / f"schedule-{number}.sqlite"
    async with serve(schedule.settings) as (endpoint, base_url):
        for death in schedule.deaths:
            command = [sys.executable, str(JOB), str(path), base_url, str(schedule.rows), str(schedule.cap), str(death)]
            process = await asyncio.create_subprocess_exec(*command, stderr=subprocess.PIPE)
            _, told = await process.communicate()
            assert process.returncode in (0, 3, -signal.SIGKILL), told.decode()
            if path.exists():
                _hold(path, endpoint, schedule)
        whole = await collect_job.collect(path, base_url, schedule.rows, schedule.cap, number)
        counts = _hold(path, endpoint, schedule)
        if whole:
            assert counts.answered == counts.requested == schedule.rows, counts


def _hold(path: Path, endpoint: Any, schedule: Schedule) -> Any:
    """What must be true at every moment at which nothing is in flight."""
    with RequestStore.open(path) as store:
        counts, spend = store.counts(), store.spend()
        counts.require_conserved()
        attempts = _attempts(path)
        bill = endpoint.bill
        billed = int(bill.exact_micro_dollars * 10**6)
        assert spend.settled.money <= billed <= spend.settled.money + spend.reserved.money <= schedule.cap
        if spend.unknown == 0:
            assert spend.settled.money == billed
        # A call that was settled was sent once more only where an earlier attempt ended otherwise, and never after.
        assert all(states.count("settled-answer") <= 1 for states in attempts.values())
        for states in attempts.values():
            assert "settled-answer" not in states[:-1], states
        # Every request that the server did is one that was answered, or whose outcome is unknown.
        assert bill.done <= sum(state in ("settled", "settled-answer", "unanswered", "unmetered") for states in attempts.values() for state in states)
        assert bill.received <= sum(map(len, attempts.values()))
    return counts


def _attempts(path: Path) -> dict[int, list[str]]:
    """By call, how its attempts ended, in order."""
    import sqlite3

    found: dict[int, list[str]] = {}
    connection = sqlite3.connect(path)
    for call, state, reason in connection.execute("SELECT call, state, reason FROM attempts ORDER BY id"):
        found.setdefault(call, []).append("settled-answer" if state == "settled" and reason is None else state)
    connection.close()
    return found


def _follow_all(numbers: range, directory: Path, *, deaths: bool) -> None:
    async def main() -> None:
        for number in numbers:
            try:
                await asyncio.wait_for(follow(number, drawn(number, deaths=deaths), directory), 120)
            except BaseException as error:
                error.add_note(f"schedule {number}: {drawn(number, deaths=deaths)}")
                raise

    asyncio.run(main())


def test_a_sample_of_schedules_without_a_death(tmp_path: Path) -> None:
    _follow_all(range(12), tmp_path, deaths=False)


def test_a_sample_of_schedules_with_deaths(tmp_path: Path) -> None:
    _follow_all(range(3), tmp_path, deaths=True)


@pytest.mark.soak
def test_a_thousand_schedules(tmp_path: Path) -> None:
    _follow_all(range(1000, 1900), tmp_path, deaths=False)
    _follow_all(range(5000, 5150), tmp_path, deaths=True)
