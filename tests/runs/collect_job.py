"""A collection in a process of its own, which may be killed: python collect_job.py STORE BASE_URL ROWS CAP_PICOS [DIE_AT].

It dies by SIGKILL at its DIE_AT-th write point: before a commit, between a commit and whoever waits for it, or while requests are in flight.
"""

from __future__ import annotations

import asyncio
import os
import random
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
from stillroom.core.errors import SpendCapReached

MODEL = "fake-teacher"
PRICE = Price(as_of=date(2026, 11, 1), currency="USD", input=10**6, cached_input=10**6, output=4 * 10**6, reasoning=4 * 10**6, per_request=0)


def rows(base_url: str, count: int, name: str) -> list[Row]:
    endpoint = Endpoint(base_url=base_url, model=MODEL)
    made = []
    for number in range(count):
        body = {"model": MODEL, "max_tokens": 8, "messages": [{"role": "user", "content": f"{name}: question {number // 2}"}]}
        made.append(Row(row=str(number), prompt=str(number // 2), call=Call(endpoint=endpoint, body=body, sample=number % 2)))
    return made


async def collect(path: Path, base_url: str, count: int, cap: int, seed: int) -> bool:
    """Whether all has been bought; False where the cap was reached."""
    policy = Policy(timeout_seconds=0.5, attempts=40, first_wait_seconds=0.001, longest_wait_seconds=0.01, decoders=0)
    transport = open_transport()
    with RequestStore.open(path) as store:
        endpoint = Endpoint(base_url=base_url, model=MODEL)
        store.permit(endpoint, PRICE, Caps(money=cap))
        store.request(rows(base_url, count, path.stem))
        try:
            await Collector(transport, store, endpoint, policy=policy, jitter=random.Random(seed), largest_concurrency=16).collect()
        except SpendCapReached:
            return False
        finally:
            await transport.close()
    return True


def _die_at(number: int) -> None:
    left = number

    def die() -> None:
        nonlocal left
        left -= 1
        if left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    database.write_point = die


if __name__ == "__main__":
    if len(sys.argv) > 5:
        _die_at(int(sys.argv[5]))
    sys.exit(0 if asyncio.run(collect(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), 0)) else 3)
