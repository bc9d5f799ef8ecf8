"""The request store: bytes on disk per answer with log-probabilities, and seconds to resume a finished collection.

    .venv/bin/python benchmarks/collect_store.py [--json]

1. Bytes: answers of 256 tokens with 20 alternatives each go through the store and into shards of log-probabilities, as a collector would write them;
   all files are counted, per answer. Ids follow Zipf's law, as tokens do; beside it, ids that are uniformly random, which nothing can compress.
   Log-probabilities are those of a softmax over random logits.
2. Resuming: a store with `--rows` finished rows and one that waits is opened in a fresh process, which counts its rows and takes the first call that waits.
   The peak memory is that of this process.
3. Writing: rows requested a second, and calls begun and settled a second, with durable commits, while the store of 2. is made.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy

from _common import ROOT, finish, parser

sys.path.insert(0, str(ROOT / "src"))

from stillroom.collect.logprobs import Verified, write_shard
from stillroom.collect.packing import pack, unpack
from stillroom.collect.spend import Caps, Price
from stillroom.collect.store import PendingCall, RequestStore, Row
from stillroom.collect.wire import Answer, Call, Endpoint, Usage

LIMITS = {"bytes_per_answer": 20 * 1024, "resume_seconds": 10.0}
CAVEATS = (
    "Ids are drawn, each for itself, by Zipf's law (1 / (rank + 2.7)) over the vocabulary: a real teacher's depend on each other, and on the text.",
    "Prompts and answers are random numbers of five digits, some 1.2 kB together; text compresses better.",
    "Packed log-probabilities wait in the store until their shard is written; what they took is given back when the store is closed, and not counted.",
    "Files are in the page cache when a store is opened: this is no measurement of a disk. The time has no imports in it.",
    "The store that is opened has short answers without log-probabilities, one attempt each.",
)
ENDPOINT = Endpoint(base_url="http://127.0.0.1:9/v1", model="large")
PRICE = Price(currency="USD", as_of=date(2026, 11, 1), input=150_000, cached_input=75_000, output=600_000, reasoning=600_000)


def rows(count: int, words: int, begin: int = 0) -> Iterator[Row]:
    chance = random.Random(begin)
    for number in range(begin, begin + count):
        text = " ".join(f"{chance.randrange(10**5)}" for _ in range(words))
        body = {"model": "large", "messages": [{"role": "user", "content": f"{number}: {text}"}], "max_tokens": 256, "temperature": 1}
        yield Row(row=f"row-{number:09}", prompt=f"prompt-{number:09}", call=Call(endpoint=ENDPOINT, body=body))


def open_permitted(path: Path) -> RequestStore:
    store = RequestStore.open(path)
    store.permit(ENDPOINT, PRICE, Caps.of("1000000", 10**15))
    return store


# -- 1: bytes ------------------------------------------------------------------------------------------------------------------


def verified(generator: numpy.random.Generator, arguments: argparse.Namespace, uniform: bool) -> Verified:
    tokens, alternatives, vocabulary = arguments.tokens, arguments.alternatives, arguments.vocabulary
    logits = -numpy.sort(-generator.normal(0.0, 3.0, (tokens, 2000)), axis=1)
    logprobs = logits - numpy.log(numpy.exp(logits).sum(axis=1, keepdims=True))
    top, rest = logprobs[:, :alternatives], logprobs[:, alternatives:]
    weight = numpy.ones(vocabulary) if uniform else 1 / (numpy.arange(vocabulary) + 2.7)
    heights = numpy.cumsum(weight / weight.sum())
    ids = numpy.minimum(numpy.searchsorted(heights, generator.random((tokens, alternatives))), vocabulary - 1).astype(numpy.int32)
    return Verified(
        ids_T=ids[:, 0],
        logprobs_T=top[:, 0],
        top_ids_N=ids.ravel(),
        top_logprobs_N=top.ravel(),
        starts_T1=numpy.arange(0, tokens * alternatives + 1, alternatives),
        rest_log_mass_T=numpy.log(numpy.exp(rest).sum(axis=1)),
        temperature=1.0,
        ended=True,
    )


async def settle_all(store: RequestStore, calls: Sequence[PendingCall], answers: Sequence[tuple[Answer, bytes | None]], in_flight: int) -> None:
    """Begins and settles calls, `in_flight` at a time, as tasks of a collector do."""
    work = iter(zip(calls, answers, strict=True))

    async def task() -> None:
        for call, (answer, packed) in work:
            await store.settle(await store.begin(call), answer, packed=packed, status=200)

    await asyncio.gather(*[task() for _ in range(in_flight)])


def sizes(arguments: argparse.Namespace, folder: Path, *, uniform: bool) -> dict[str, Any]:
    generator, chance = numpy.random.default_rng(0), random.Random(1)
    with open_permitted(folder / "requests.sqlite") as store:
        store.request(rows(arguments.answers, 60))
        while calls := store.pending(arguments.shard_answers):
            answers = []
            for _ in calls:
                text = " ".join(f"{chance.randrange(10**5)}" for _ in range(arguments.tokens // 2))
                usage = Usage(prompt_tokens=150, completion_tokens=arguments.tokens)
                answers.append((Answer(text=text, finish_reason="stop", usage=usage, model="large"), pack(verified(generator, arguments, uniform))))
            asyncio.run(settle_all(store, calls, answers, 64))
            waiting = store.unshelved(len(calls))
            name = f"{waiting[0][0][:16]}.parquet"
            write_shard(folder / name, [(key, unpack(packed)) for key, packed in waiting])
            store.shelve(name, [key for key, _ in waiting])
        store.verify()
    found = {path.name: path.stat().st_size for path in folder.iterdir()}
    shards = sum(size for name, size in found.items() if name.endswith(".parquet"))
    return {
        "answers": arguments.answers,
        "bytes_per_answer": sum(found.values()) / arguments.answers,
        "shard_bytes_per_answer": shards / arguments.answers,
        "store_bytes_per_answer": (sum(found.values()) - shards) / arguments.answers,
    }


# -- 2 and 3: resuming and writing ---------------------------------------------------------------------------------------------


_RESUME = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
from stillroom.collect.store import RequestStore
began = time.perf_counter()
store = RequestStore.open(sys.argv[2])
opened = time.perf_counter()
counts = store.counts()
counts.require_conserved()
counted = time.perf_counter()
first = store.pending(1)
ended = time.perf_counter()
peak = int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0]) * 1024  # ru_maxrss has the parent's in it
print(json.dumps([ended - began, opened - began, counted - opened, ended - counted, peak, counts.requested, counts.answered, len(first)]))
"""


def resuming(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    path, answer = (
        folder / "requests.sqlite",
        Answer(text="an answer of a few words", finish_reason="stop", usage=Usage(prompt_tokens=20, completion_tokens=6)),
    )
    with open_permitted(path) as store:
        began = time.perf_counter()
        store.request(rows(arguments.rows + 1, 4))
        requested = time.perf_counter()
        done = 0
        while done < arguments.rows:
            calls = store.pending(min(20_000, arguments.rows - done))
            asyncio.run(settle_all(store, calls, [(answer, None)] * len(calls), arguments.in_flight))
            done += len(calls)
        settled = time.perf_counter()
    build_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    runs = []
    for _ in range(arguments.repeats):
        command = [sys.executable, "-c", _RESUME, str(ROOT / "src"), str(path)]
        runs.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))
        assert runs[-1][5:] == [arguments.rows + 1, arguments.rows, 1], f"found {runs[-1][5:]}"
    columns = list(zip(*runs, strict=True))
    return {
        "rows": arguments.rows,
        "bytes": sum(file.stat().st_size for file in folder.iterdir()),
        "rows_requested_per_second": (arguments.rows + 1) / (requested - began),
        "calls_settled_per_second": arguments.rows / (settled - requested),
        "peak_memory_bytes_while_building": build_peak,
        "seconds": list(columns[0]),
        "resume_seconds": statistics.median(columns[0]),
        "open_seconds": statistics.median(columns[1]),
        "count_seconds": statistics.median(columns[2]),
        "first_pending_seconds": statistics.median(columns[3]),
        "resume_peak_memory_bytes": max(columns[4]),
    }


# -- the program ---------------------------------------------------------------------------------------------------------------


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All three."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="stillroom-bench-", dir=arguments.folder) as temporary:
        folders = [Path(temporary) / name for name in ("resuming", "zipf", "uniform")]
        for folder in folders:
            folder.mkdir()
        resumed = resuming(arguments, folders[0])
        sized, uniform = (sizes(arguments, folder, uniform=folder.name == "uniform") for folder in folders[1:])
    found = {"bytes_per_answer": sized["bytes_per_answer"], "resume_seconds": resumed["resume_seconds"]}
    return {
        "limits": {name: {"value": value, "limit": LIMITS[name], "holds": value <= LIMITS[name]} for name, value in found.items()},
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items() if name != "json"},
        "sizes": sized,
        "sizes_with_uniform_ids": uniform,
        "resuming": resumed,
        "seconds_in_all": time.perf_counter() - began,
    }


def arguments_of(argv: Sequence[str] | None) -> argparse.Namespace:
    options = parser(__doc__.partition("\n")[0])
    options.add_argument("--answers", type=int, default=1024, help="whose bytes are counted")
    options.add_argument("--tokens", type=int, default=256)
    options.add_argument("--alternatives", type=int, default=20)
    options.add_argument("--vocabulary", type=int, default=151_936)
    options.add_argument("--shard-answers", type=int, default=256)
    options.add_argument("--rows", type=int, default=1_000_000, help="finished ones of the store that is opened")
    options.add_argument("--in-flight", type=int, default=256)
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--folder", type=Path, default=None, help="where to write, if not where temporary files go")
    return options.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = arguments_of(argv)
    data = measure(arguments)
    if not arguments.json:
        for name, found in data["limits"].items():
            print(f"{name}: {found['value']:.4g}, at most {found['limit']:g}: {found['holds']}")
    finish("collect-store", data, caveats=CAVEATS, as_json=arguments.json)


if __name__ == "__main__":
    main()
