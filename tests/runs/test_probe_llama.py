"""The probe and the verification on a real llama.cpp server: the bundled teacher, and a byte-level model whose tokens break characters."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from helpers import save_tiny, tiny_model, tiny_tokenizer
from servers import TEACHER, llama_server
from stillroom.collect.logprobs import Demoted, Expectations, TokenIndex, Verified, verify
from stillroom.collect.probe import MOST_CALLS, ProbeReport, probe, signal
from stillroom.collect.reading import read_response
from stillroom.collect.wire import Answer, Call, Endpoint, Response, Settings, completion_body
from stillroom.models.tokenizers import load_tokenizer
from stillroom.targets.vocabulary import Vocabulary

pytest.importorskip("xllamacpp")
pytest.importorskip("gguf")


async def sent(session: aiohttp.ClientSession, call: Call, seed: int = 5) -> Response:
    content = json.dumps({"seed": seed} | call.body).encode()  # what has no seed gets one here, so that the test is one test
    async with session.post(call.endpoint.url, data=content, headers={"content-type": "application/json"}) as got:
        headers = {name.lower(): value for name, value in got.headers.items()}
        return Response(status=got.status, headers=headers, body=await got.read(), seconds=0.0)


def probed(endpoint: Endpoint, seed: int = 5, **more: Any) -> ProbeReport:
    async def run() -> ProbeReport:
        async with aiohttp.ClientSession() as session:
            return await probe(endpoint, lambda call: sent(session, call, seed), **more)

    return asyncio.run(run())


@pytest.fixture(scope="module")
def teacher() -> Iterator[str]:
    with llama_server(TEACHER) as server:
        yield server.base_url


@pytest.fixture(scope="module")
def index() -> TokenIndex:
    tokenizer = load_tokenizer(str(TEACHER))
    return TokenIndex(Vocabulary.from_tokenizer(tokenizer, len(tokenizer)))


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_the_bundled_teacher_served_by_llama_cpp(teacher: str, index: TokenIndex, with_tokenizer: bool) -> None:
    messages = ({"role": "user", "content": "every other Friday at noon"},)
    report = probed(Endpoint.parse(teacher, "teacher"), messages=messages, overflow_tokens=600, index=index if with_tokenizer else None)
    verdicts = {finding.name: (finding.verdict, finding.value) for finding in report.findings}
    assert verdicts == {
        "chat": ("proved", "chat"),
        "completions": ("proved", "chat"),
        "answers": ("proved", None),
        "logprobs": ("proved", None),
        "top_logprobs": ("proved", 128),
        "entries": ("proved", 1.0),
        "temperature": ("proved", "before"),
        "token_ids": ("proved", "entries"),
        "usage": ("proved", None),
        "n": ("proved", None),
        "seed": ("proved", None),
        "stop": ("proved", None),
        "max_tokens": ("proved", None),
        "finish_reason": ("proved", None),
        "response_format": ("proved", None),
        "echo": ("refuted", None),
        "prompt_logprobs": ("refuted", None),
        "context": ("proved", "error"),
        "one_model": ("proved", None),
    }, report
    assert "counts" in report["n"].evidence  # llama.cpp's usage counts one of several choices
    assert report.calls <= MOST_CALLS
    assert signal(report).kind == "top_k"


def test_the_server_that_is_installed_is_the_one_of_the_reference(teacher: str, index: TokenIndex) -> None:
    """docs/reference/servers.md is written from the newest result of benchmarks/servers.py."""
    newest = max((Path(__file__).parents[2] / "benchmarks" / "results").glob("*-servers.json"))
    stored = next(server for server in json.loads(newest.read_text(encoding="utf-8"))["servers"] if server["name"] == "llama.cpp")
    report = probed(Endpoint.parse(teacher, "teacher"), overflow_tokens=600, index=index)
    assert stored["version"] == f"xllamacpp {metadata.version('xllamacpp')}", (
        "another version: run benchmarks/servers.py and scripts/generate_docs.py"
    )
    assert [(one.name, one.verdict, one.value) for one in report.findings] == [(f["name"], f["verdict"], f["value"]) for f in stored["findings"]]
    assert signal(report).kind == stored["signal"]["kind"]


def test_entries_are_short_where_tokens_break_characters(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    directory = save_tiny(tmp_path, tokenizer=tokenizer, model=tiny_model("llama", rows=len(tokenizer), width=64, heads=4, spread=0.2))
    vocabulary = Vocabulary.from_tokenizer(tokenizer, len(tokenizer))
    with llama_server(directory) as server:
        endpoint = Endpoint.parse(server.base_url, "tiny", route="completions")
        # This route does not enforce a schema, so nothing forces a fragment: they come by chance, and the probe sees them when they do.
        reports = [probed(endpoint, seed, index=TokenIndex(vocabulary)) for seed in range(4)]
        assert "refuted" in [report["entries"].verdict for report in reports]
        for report in reports:
            assert report["usage"].verdict != "refuted", report["usage"]
            assert report["temperature"].value == "before"

        async def answers() -> list[Answer]:
            found = []
            async with aiohttp.ClientSession() as session:
                for seed in range(30):
                    settings = Settings(max_tokens=6, temperature=1.0, seed=seed, top_logprobs=20, extra={"top_k": 0, "min_p": 0})
                    call = Call(endpoint=endpoint, body=completion_body(endpoint, "a b c", settings))
                    found += [outcome for outcome in read_response(call, await sent(session, call)) if isinstance(outcome, Answer)]
            return found

        results = [
            (answer, verify(answer, Expectations(alternatives=20, temperature=1.0, index=TokenIndex(vocabulary))))
            for answer in asyncio.run(answers())
        ]
    assert len(results) == 30
    reasons = {result.reason for _, result in results if isinstance(result, Demoted)}
    assert reasons <= {"text-differs", "count-differs"}
    assert reasons
    for answer, result in results:
        if isinstance(result, Verified) and answer.usage is not None:
            assert len(result) == answer.usage.completion_tokens
