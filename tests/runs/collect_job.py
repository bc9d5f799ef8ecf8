"""A collection that may end at any moment, in a process of its own or in this one: `collect` buys, `job` is what a process to be ended is started with."""

from __future__ import annotations

import asyncio
import os
import random
import resource
import signal
import sys
from datetime import date
from pathlib import Path

from stillroom.collect import database
from stillroom.collect.collector import Collector, Policy
from stillroom.collect.spend import Caps, Price
from stillroom.collect.store import RequestStore, Row
from stillroom.collect.transport import open_transport
from stillroom.collect.wire import Call, Endpoint
from stillroom.core.errors import ResourceError, SpendCapReached

MODEL = "fake-teacher"
PRICE = Price(as_of=date(2026, 11, 1), currency="USD", input=10**6, cached_input=10**6, output=4 * 10**6, reasoning=4 * 10**6, per_request=0)
CAP_REACHED, DISK_FULL = 3, 4


def rows(base_url: str, count: int, name: str) -> list[Row]:
    """Two rows of each question, each with a body of its own, so that what the server received is known to be of one call."""
    endpoint = Endpoint(base_url=base_url, model=MODEL)
    made = []
    for number in range(count):
        question = [{"role": "user", "content": f"{name}: question {number // 2}"}]
        body = {"model": MODEL, "max_tokens": 8, "seed": number % 2, "messages": question}
        made.append(Row(row=str(number), prompt=str(number // 2), call=Call(endpoint=endpoint, body=body, sample=number % 2)))
    return made


async def collect(path: Path, base_url: str, count: int, cap: int, seed: int) -> bool:
    """Whether all has been bought; False where the cap was reached."""
    policy = Policy(timeout_seconds=0.5, attempts=40, first_wait_seconds=0.001, longest_wait_seconds=0.01, decoders=0)
    transport = open_transport()
    try:
        with RequestStore.open(path) as store:
            endpoint = Endpoint(base_url=base_url, model=MODEL)
            store.permit(endpoint, PRICE, Caps(money=cap))
            store.request(rows(base_url, count, path.stem))
            await Collector(transport, store, endpoint, policy=policy, jitter=random.Random(seed), largest_concurrency=16).collect()
    except SpendCapReached:
        return False
    finally:
        await transport.close()
    return True


def job(path: Path, base_url: str, count: int, cap: int, seed: int, die_at: int | None, largest_file_bytes: int | None) -> None:
    """Collects; exits with 0, or 3 at the cap, or 4 where no more can be written.

    It dies by SIGKILL at its `die_at`-th write point: before a commit, between a commit and whoever waits for it, or while requests are in flight.
    """
    if die_at is not None:
        _die_at(die_at)
    if largest_file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file_bytes, largest_file_bytes))
    try:
        whole = asyncio.run(collect(path, base_url, count, cap, seed))
    except ResourceError as error:
        if error.code != "disk-full":
            raise
        sys.exit(DISK_FULL)
    sys.exit(0 if whole else CAP_REACHED)


def _die_at(number: int) -> None:
    left = number

    def die() -> None:
        nonlocal left
        left -= 1
        if left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    database.write_point = die
