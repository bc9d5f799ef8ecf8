"""Collection from an endpoint: requests a second with durable writes, beside other clients without any, and the share of moving limits that is used.

    .venv/bin/python benchmarks/collect.py [--json]

The endpoint is `stillroom.testing.fake_endpoint`, in a process of its own on the loopback, with 50 ms of latency; both share the machine's cores.

1. Text: calls of which each gives 32 tokens. `stillroom` is the product: reservation, sending, reading, settling, every commit flushed to the disk.
   `stillroom-httpx2` is the same over the other transport. `aiohttp` and `openai` send the same bodies and decode the answers, and write nothing.
2. Log-probabilities: the same calls, with 20 alternatives for each token. `stillroom` verifies and packs them, in a process beside the loop.
3. Moving limits: requests and tokens a minute that halve and double; answers over what the limits allowed in that time, and how many were refused.

All clients take turns within each repetition, in an order that is turned round each time; what is printed is the median with its range.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

from _common import ROOT, finish, parser

sys.path.insert(0, str(ROOT / "src"))

from stillroom.collect.collector import Collector
from stillroom.collect.rate import RateController
from stillroom.collect.spend import Caps
from stillroom.collect.store import RequestStore, Row
from stillroom.collect.transport import TransportName, open_transport
from stillroom.collect.wire import Call, Endpoint
from stillroom.core.identities import Json
from stillroom.testing.fake_endpoint import Running, fake_endpoint
from stillroom.testing.settings import Limit, Settings

LIMITS = {"text_requests_per_second": 1200.0, "logprob_requests_per_second": 400.0, "allowed_rate_used": 0.95}
MODEL = "fake-teacher"
PEERS = ("stillroom", "stillroom-httpx2", "aiohttp", "openai")
Client = Callable[[str, list[Json], int], Awaitable[None]]


def main(argv: list[str] | None = None) -> None:
    arguments = parsed(argv)
    found = measure(arguments)
    caveats = [
        "The endpoint shares the cores with whoever asks it, and answers from the loopback: no network, no TLS.",
        "aiohttp and openai keep nothing: they neither reserve nor write, and verify no log-probability.",
        f"n = {arguments.repeats} repetitions; other work on the machine moves all of them.",
    ]
    finish("collect", found, caveats=caveats, as_json=arguments.json)
    if not arguments.json:
        for name, one in found["limits"].items():
            print(f"{name:30} {one['value']:10.3f}   at least {one['limit']:g}: {'holds' if one['holds'] else 'DOES NOT HOLD'}")
        for kind in ("text", "logprobs"):
            for name, one in found[kind].items():
                print(f"{kind:10} {name:18} {one['median']:8.0f} requests/s ({one['least']:.0f} to {one['most']:.0f})")


def parsed(argv: list[str] | None) -> argparse.Namespace:
    options = parser((__doc__ or "").splitlines()[0])
    options.add_argument("--requests", type=int, default=6000, help="of text, in each turn of stillroom and aiohttp")
    options.add_argument("--logprob-requests", type=int, default=2000)
    options.add_argument("--slow-share", type=float, default=0.25, help="of those, for the slower clients")
    options.add_argument("--tokens", type=int, default=32)
    options.add_argument("--alternatives", type=int, default=20)
    options.add_argument("--latency-ms", type=float, default=50.0)
    options.add_argument("--in-flight", type=int, default=256)
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--limit-seconds", type=float, default=60.0, help="of moving limits, in six parts")
    options.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    return options.parse_args(argv)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    began = time.perf_counter()
    rates: dict[str, dict[str, list[float]]] = {"text": {}, "logprobs": {}}
    processor: dict[str, dict[str, list[float]]] = {"text": {}, "logprobs": {}}
    settings = Settings(latency_ms=arguments.latency_ms, answer_tokens=arguments.tokens, fixed_length=True, remember_requests=0)
    with fake_endpoint(settings, process=True) as server:
        for repeat in range(arguments.repeats):
            for kind in ("text", "logprobs"):
                for name in arguments.peers if repeat % 2 == 0 else reversed(arguments.peers):
                    per_second, seconds = turn(server, kind, name, repeat, arguments)
                    rates[kind].setdefault(name, []).append(per_second)
                    processor[kind].setdefault(name, []).append(seconds)
    limited = moving_limits(arguments)
    found = {"allowed_rate_used": limited["allowed_rate_used"]}
    if "stillroom" in arguments.peers:
        found["text_requests_per_second"] = statistics.median(rates["text"]["stillroom"])
        found["logprob_requests_per_second"] = statistics.median(rates["logprobs"]["stillroom"])
    return {
        "limits": {name: {"value": value, "limit": LIMITS[name], "holds": value >= LIMITS[name]} for name, value in found.items()},
        "settings": {name: value for name, value in vars(arguments).items() if name != "json"},
        **{kind: {name: summary(values, processor[kind][name]) for name, values in rates[kind].items()} for kind in rates},
        "moving_limits": limited,
        "seconds_in_all": time.perf_counter() - began,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def summary(rates: list[float], processor: list[float]) -> dict[str, Any]:
    """Of the repetitions; `processor_seconds` is the client's own, per request, with that of its decoding processes."""
    return {
        "median": statistics.median(rates), "least": min(rates), "most": max(rates), "n": len(rates),
        "processor_seconds": statistics.median(processor), "each": rates,
    }  # fmt: skip


def turn(server: Running, kind: str, name: str, repeat: int, arguments: argparse.Namespace) -> tuple[float, float]:
    """Requests a second of one client, and its processor seconds per request."""
    number = arguments.requests if kind == "text" else arguments.logprob_requests
    if name in ("openai", "stillroom-httpx2"):
        number = max(int(number * arguments.slow_share), 1)
    asked = list(bodies(number, f"{kind} {name} {repeat}", arguments, logprobs=kind == "logprobs"))
    before, busy = server.bill.done, _processor_seconds()
    if name.startswith("stillroom"):
        with tempfile.TemporaryDirectory(prefix="stillroom-bench-") as folder:
            seconds = asyncio.run(product(server.base_url, asked, arguments.in_flight, Path(folder), "httpx2" if "httpx2" in name else "aiohttp"))
    else:
        began = time.perf_counter()
        asyncio.run(CLIENTS[name](server.base_url, asked, arguments.in_flight))
        seconds = time.perf_counter() - began
    if server.bill.done - before != number:
        raise AssertionError(f"{name}: {server.bill.done - before} of {number} were done")
    return number / seconds, (_processor_seconds() - busy) / number


def _processor_seconds() -> float:
    return sum(used.ru_utime + used.ru_stime for used in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))


def bodies(number: int, name: str, arguments: argparse.Namespace, *, logprobs: bool) -> Iterator[Json]:
    wanted = {"logprobs": True, "top_logprobs": arguments.alternatives} if logprobs else {}
    for index in range(number):
        messages = [{"role": "user", "content": f"{name}: question {index}"}]
        yield {"model": MODEL, "max_tokens": arguments.tokens, "messages": messages, **wanted}


async def product(base_url: str, asked: list[Json], in_flight: int, folder: Path, transport: TransportName) -> float:
    """Seconds from the first call to the last commit. Rows are requested before; the controller knows the concurrency, as after a first minute."""
    endpoint, used = Endpoint(base_url=base_url, model=MODEL), open_transport(transport)
    with RequestStore.open(folder / "requests.sqlite") as store:
        store.permit(endpoint, None, Caps.of(tokens=10**12))
        store.request(Row(row=str(index), prompt=str(index), call=Call(endpoint=endpoint, body=body)) for index, body in enumerate(asked))
        controller = RateController(time.monotonic, largest_concurrency=in_flight, state={"concurrency": in_flight})
        began = time.perf_counter()
        counts = await Collector(used, store, endpoint, controller=controller).collect()
        seconds = time.perf_counter() - began
        await used.close()
        if counts.answered != len(asked):
            raise AssertionError(counts)
        if demoted := [row.demoted for row in store.rows() if row.demoted]:
            raise AssertionError(f"{len(demoted)} were demoted: {demoted[0]}")
    return seconds


async def bare_aiohttp(base_url: str, asked: list[Json], in_flight: int) -> None:
    import aiohttp

    waiting = iter(asked)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def work() -> None:
            for body in waiting:
                async with session.post(f"{base_url}/chat/completions", json=body) as response:
                    json.loads(await response.read())["choices"][0]

        await asyncio.gather(*(work() for _ in range(in_flight)))


async def openai_client(base_url: str, asked: list[Json], in_flight: int) -> None:
    import openai

    waiting = iter(asked)
    async with openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0) as client:

        async def work() -> None:
            for body in waiting:
                answer = await client.chat.completions.create(**body)
                answer.choices[0]

        await asyncio.gather(*(work() for _ in range(in_flight)))


CLIENTS: dict[str, Client] = {"aiohttp": bare_aiohttp, "openai": openai_client}


def moving_limits(arguments: argparse.Namespace) -> dict[str, Any]:
    """The share of what six limits allowed, the scarcer of requests and tokens in each, that was answered by the end of the last."""
    part = arguments.limit_seconds / 6
    tokens = 100.0  # of one request, about: requests are scarce in some parts, tokens in others
    scale = ((6000, 1.2), (3000, 1.2), (6000, 0.6), (12000, 1.2), (6000, 0.6), (12000, 1.2))
    limits = tuple(
        Limit(after_seconds=index * part, requests_per_minute=rate, tokens_per_minute=rate * tokens * share)
        for index, (rate, share) in enumerate(scale)
    )
    settings = Settings(latency_ms=arguments.latency_ms, answer_tokens=arguments.tokens, fixed_length=True, limits=limits)
    with fake_endpoint(settings, process=True) as server, tempfile.TemporaryDirectory(prefix="stillroom-bench-") as folder:
        return asyncio.run(_use_limits(server, settings, arguments, Path(folder)))


async def _use_limits(server: Running, settings: Settings, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    endpoint, used = Endpoint(base_url=server.base_url, model=MODEL), open_transport()
    most = int(arguments.limit_seconds * 12000 / 60) + 1000
    with RequestStore.open(folder / "requests.sqlite") as store:
        store.permit(endpoint, None, Caps.of(tokens=10**12))
        asked = bodies(most, "limits", arguments, logprobs=False)
        store.request(Row(row=str(index), prompt=str(index), call=Call(endpoint=endpoint, body=body)) for index, body in enumerate(asked))
        collecting = asyncio.create_task(Collector(used, store, endpoint, largest_concurrency=arguments.in_flight).collect())
        while (await asyncio.to_thread(lambda: server.bill)).done == 0:
            await asyncio.sleep(0.01)
        await asyncio.sleep(arguments.limit_seconds)
        bill = await asyncio.to_thread(lambda: server.bill)
        collecting.cancel()
        await asyncio.gather(collecting, return_exceptions=True)
        await used.close()
    each = Decimal(bill.prompt_tokens + bill.completion_tokens) / bill.done
    part = arguments.limit_seconds / 6
    rates = [min(limit.requests_per_minute or 0.0, (limit.tokens_per_minute or 0.0) / float(each)) / 60 for limit in settings.limits]
    return {
        "allowed_rate_used": bill.done / (rates[0] * settings.burst_seconds + sum(rate * part for rate in rates)),  # its buckets begin full
        "answered": bill.done,
        "refused": bill.throttled,
        "refused_per_change": bill.throttled / len(settings.limits),
        "tokens_of_one": float(each),
    }


if __name__ == "__main__":
    main()
