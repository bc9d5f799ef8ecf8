"""The proxy: nothing is changed on its way, one of two samples is served, and the book of it is right whatever fails, leaves or comes again."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeAlias

import aiohttp
import pytest
from aiohttp import web

from stillroom.core.errors import GuardError, ResourceError
from stillroom.guard.keys import Key
from stillroom.guard.laws import log_binomial_tail
from stillroom.guard.proxy import Proxy, ProxySettings, answer_text, eligible, serve, streamed_text
from stillroom.guard.serving_log import Coins, Contents, Pair, ServingLog, disclose, missing, open_pairs, verify_serving_log
from stillroom.testing import fake_endpoint
from stillroom.testing.settings import Settings

openai = pytest.importorskip("openai")

KEY = Key(hashlib.sha256(b"a key for tests of the proxy").digest())
FRESH = Settings(fresh_draws=True, answer_tokens=12, fixed_length=True)
MESSAGES = [{"role": "user", "content": "Wie heißt du?"}]
BODY: dict[str, Any] = {"model": "fake-teacher", "messages": MESSAGES, "temperature": 1.0, "max_tokens": 24}
Seen: TypeAlias = tuple[int, bytes, dict[str, str]]


@asynccontextmanager
async def proxied(upstream: str, directory: Path, *, share: float = 1.0, **more: Any) -> AsyncIterator[tuple[Proxy, str]]:
    with ServingLog(directory, KEY, share=share) as log:
        async with serve(ProxySettings(upstream=upstream, **more), log) as running:
            yield running


def book(directory: Path) -> tuple[Contents, list[Pair]]:
    """What is in the log, which verifies, and its pairs, which all can be opened; nothing selected is missing."""
    path = directory / "serving.jsonl"
    contents, coins = verify_serving_log(path), [Coins.of(KEY, 0)]
    assert missing(contents, coins) == []
    return contents, open_pairs(path, contents, coins, disclose(directory, KEY))


async def ask(url: str, body: Any = BODY, *, method: str = "POST", headers: dict[str, str] | None = None) -> Seen:
    """Status, body and headers, as they came."""
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    async with aiohttp.ClientSession(auto_decompress=False) as session, session.request(method, url, data=data, headers=headers) as response:
        return response.status, await response.read(), {name.lower(): value for name, value in response.headers.items()}


def content(body: bytes) -> str:
    return str(json.loads(body)["choices"][0]["message"]["content"])


def served_text(pair: Pair) -> str:
    return (pair.first, pair.second)[pair.served]


# --- nothing is changed


@pytest.mark.parametrize(
    ("method", "path", "body", "settings"),
    [
        ("GET", "/v1/models", None, {}),
        ("GET", "/v1/models/none%20such?a=%2F+b", None, {}),
        ("POST", "/v1/completions", {"model": "fake-teacher", "prompt": "Grüße", "max_tokens": 9}, {}),
        ("POST", "/v1/chat/completions", BODY | {"temperature": 0}, {}),
        ("POST", "/v1/chat/completions", BODY | {"n": 3}, {}),
        ("POST", "/v1/chat/completions", BODY, {}),
        ("POST", "/v1/chat/completions", b"{no json", {}),
        ("POST", "/v1/chat/completions", b"", {}),
        ("POST", "/v1/chat/completions", BODY, {"faults_in_order": ("html-error-page",)}),
        ("POST", "/v1/chat/completions", BODY, {"faults_in_order": ("empty-body",)}),
        ("POST", "/v1/chat/completions", BODY, {"api_keys": ("right",)}),
        ("POST", "/v1/chat/completions", BODY, {"quota_requests": 0}),
        ("PUT", "/elsewhere", {"a": 1}, {}),
    ],
)
def test_what_is_not_twinned_goes_through_byte_for_byte(tmp_path: Path, method: str, path: str, body: Any, settings: dict[str, Any]) -> None:
    async def both() -> tuple[Seen, Seen]:
        made = Settings(**settings)
        async with fake_endpoint.serve(made) as (_, plain), fake_endpoint.serve(made) as (_, upstream):
            async with proxied(upstream, tmp_path, share=0.0) as (_, proxy):
                return await ask(plain.removesuffix("/v1") + path, body, method=method), await ask(
                    proxy.removesuffix("/v1") + path, body, method=method
                )

    (status, raw, headers), (proxied_status, proxied_raw, proxied_headers) = asyncio.run(both())
    assert (proxied_status, proxied_raw) == (status, raw)
    # When, and how fast a bucket has filled since, is another matter.
    told = {name for name in headers if name != "date" and "reset" not in name}
    assert {name: proxied_headers.get(name) for name in told} == {name: headers[name] for name in told}
    assert proxied_headers.keys() == headers.keys()


Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def upstream_of(handler: Handler) -> AsyncIterator[str]:
    """A server of a test's own, for what the fake endpoint does not do: streams, encodings, cookies."""
    server = web.Application(client_max_size=1 << 26)
    server.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(server, access_log=None, shutdown_timeout=0.1, auto_decompress=False)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    finally:
        await runner.cleanup()


def test_headers_are_passed_on_but_those_of_one_hop_and_cookies_are_nobodys(tmp_path: Path) -> None:
    received: list[dict[str, str]] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        received.append({name.lower(): value for name, value in request.headers.items()})
        raw = gzip.compress(await request.read())
        headers = [
            ("Content-Encoding", "gzip"),
            ("Set-Cookie", "a=1"),
            ("Set-Cookie", "b=2"),
            ("X-Own", "ö"),
            ("Connection", "close, x-hop"),
            ("X-Hop", "1"),
        ]
        return web.Response(status=203, reason="So So", body=raw, headers=headers)

    async def main() -> tuple[Seen, Seen]:
        async with upstream_of(handler) as upstream, proxied(upstream, tmp_path) as (_, proxy):
            sent = {"Authorization": "Bearer sk-1", "X-Mine": "1", "Connection": "x-only-here", "X-Only-Here": "1", "TE": "trailers"}
            first = await ask(f"{proxy}/embeddings", b"\x00\xff" * 9, headers=sent | {"User-Agent": "mine", "Content-Encoding": "br"})
            return first, await ask(f"{proxy}/models", None, method="GET")

    (status, raw, headers), _ = asyncio.run(main())
    assert (status, gzip.decompress(raw)) == (203, b"\x00\xff" * 9)
    assert headers["content-encoding"] == "gzip"
    assert headers["x-own"] == "ö"
    assert "x-hop" not in headers
    assert received[0]["authorization"] == "Bearer sk-1"
    assert (received[0]["x-mine"], received[0]["user-agent"], received[0]["content-encoding"]) == ("1", "mine", "br")
    assert received[0].keys().isdisjoint({"x-only-here", "te"})
    assert received[0]["host"] != headers.get("host")
    assert "cookie" not in received[1]


def test_large_bodies_go_through(tmp_path: Path) -> None:
    async def echo(request: web.Request) -> web.StreamResponse:
        return web.Response(body=await request.read())

    async def main() -> tuple[Seen, Seen, Seen]:
        async with upstream_of(echo) as upstream, proxied(upstream, tmp_path, largest_body_bytes=1 << 20) as (_, proxy):
            large = bytes(range(256)) * 20_000
            question = json.dumps(BODY | {"messages": [{"role": "user", "content": "x" * (1 << 21)}]}).encode()
            return (
                await ask(f"{proxy}/files", large),
                await ask(f"{proxy}/chat/completions", question),
                await ask(f"{proxy}/chat/completions", question[: 1 << 19]),
            )

    files, question, smaller = asyncio.run(main())
    assert hashlib.sha256(files[1]).digest() == hashlib.sha256(bytes(range(256)) * 20_000).digest()
    assert (len(question[1]) > 1 << 21, len(smaller[1])) == (True, 1 << 19)
    assert book(tmp_path)[0].requests == {}


# --- two samples, one served


def test_the_openai_client_gets_the_text_that_the_coin_chose(tmp_path: Path) -> None:
    async def main() -> list[Any]:
        async with fake_endpoint.serve(FRESH) as (endpoint, upstream), proxied(upstream, tmp_path) as (proxy, url):
            async with openai.AsyncOpenAI(base_url=url, api_key="sk-secret", max_retries=0) as client:
                ask = client.chat.completions.create
                answers = [await ask(model="fake-teacher", messages=MESSAGES, max_tokens=24, temperature=0.9) for _ in range(10)]
            assert endpoint.account.finished == 20
            assert proxy.counts == {"pair": 10}
            return answers

    answers = asyncio.run(main())
    contents, pairs = book(tmp_path)
    assert [served_text(pair) for pair in pairs] == [answer.choices[0].message.content for answer in answers]
    assert {pair.served for pair in pairs} == {0, 1}
    assert contents.count("twin") == 10
    assert all(json.loads(pair.prompt) == BODY | {"temperature": 0.9} for pair in pairs)
    # What is counted is the answer that was served, not both.
    assert all(answer.usage.completion_tokens <= 24 for answer in answers)
    kept = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"sk-secret" not in kept
    assert len({entry["account"] for _, entry in contents.requests.values()}) == 1


def test_the_coins_are_fair_and_the_share_is_kept_over_many_requests(tmp_path: Path) -> None:
    async def main() -> list[str]:
        async with fake_endpoint.serve(FRESH) as (_, upstream), proxied(upstream, tmp_path, share=0.5) as (_, url):
            async with aiohttp.ClientSession() as session:

                async def one() -> str:
                    async with session.post(f"{url}/chat/completions", json=BODY) as response:
                        return content(await response.read())

                return [text for _ in range(6) for text in await asyncio.gather(*(one() for _ in range(20)))]

    texts = asyncio.run(main())
    contents, pairs = book(tmp_path)
    assert contents.sessions[0].requests == 120
    assert {served_text(pair) for pair in pairs} <= set(texts)
    assert {(pair.second, pair.first)[pair.served] for pair in pairs}.isdisjoint(texts)  # a twin that was kept is served to nobody
    for count, trials in ((len(pairs), 120), (sum(pair.served for pair in pairs), len(pairs))):
        assert min(log_binomial_tail(trials, 0.5, count), log_binomial_tail(trials, 0.5, trials - count)) > -14.5  # 5e-7 on either side


def test_two_samples_that_are_one_are_logged_as_equal(tmp_path: Path) -> None:
    async def main() -> None:
        async with fake_endpoint.serve(Settings()) as (_, upstream), proxied(upstream, tmp_path) as (_, url):
            await ask(f"{url}/chat/completions")

    asyncio.run(main())
    contents, pairs = book(tmp_path)
    assert (contents.count("equal"), pairs) == (1, [])


@pytest.mark.parametrize(
    "faults", [("http-500", "none"), ("none", "http-500"), ("drop-before-work", "none"), ("none", "drop-in-body"), ("none", "cut-json")]
)
def test_a_sample_that_fails_fails_no_request(tmp_path: Path, faults: tuple[Any, ...]) -> None:
    async def main() -> list[Seen]:
        settings = FRESH.model_copy(update={"faults_in_order": faults * 6})
        async with fake_endpoint.serve(settings) as (_, upstream), proxied(upstream, tmp_path) as (_, url):
            return [await ask(f"{url}/chat/completions") for _ in range(6)]

    answers = asyncio.run(main())
    contents, _ = book(tmp_path)
    assert contents.count("single") == 6
    if faults[1] != "cut-json":  # a complete answer as HTTP goes: it is served as it would be without a proxy, and has no text
        assert [status for status, _, _ in answers] == [200] * 6
        assert all(content(raw) for _, raw, _ in answers)
        assert {entry["reason"] for _, entry in contents.requests.values()} == {"a sample failed"}


def test_where_both_fail_the_client_sees_what_the_upstream_said(tmp_path: Path) -> None:
    async def main() -> tuple[Seen, Seen, Seen]:
        settings = FRESH.model_copy(update={"faults_in_order": ("http-503", "http-503", "drop-before-work", "drop-before-work")})
        async with fake_endpoint.serve(settings) as (_, upstream), proxied(upstream, tmp_path) as (_, url):
            return tuple([await ask(f"{url}/chat/completions") for _ in range(3)])  # type: ignore[return-value]

    said, dropped, well = asyncio.run(main())
    assert said[0] == 503
    assert b"server had an error" in said[1]
    assert dropped[0] == 502
    assert json.loads(dropped[1])["error"]["type"] == "proxy_error"
    assert well[0] == 200
    contents, pairs = book(tmp_path)
    assert (contents.count("single"), len(pairs)) == (2, 1)


# --- streams


def event(delta: dict[str, Any], finish: str | None = None) -> bytes:
    return (
        b"data: " + json.dumps({"id": "c", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}, ensure_ascii=False).encode() + b"\n\n"
    )


def streaming(*, pause: float = 0.0, breaks: set[int] = frozenset(), refuses: set[int] = frozenset()) -> tuple[Handler, list[bytes]]:  # type: ignore[assignment]
    """An upstream whose n-th request streams "n é w w w"; some break off in the middle or are refused. And all that it sent, by request."""
    sent: list[bytes] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        number = len(sent)
        sent.append(b"")
        await request.read()
        if number in refuses:
            return web.json_response({"error": {"message": "busy"}}, status=429)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        words = [f"{number}", " é", " w", " w", " w"]
        for place, piece in enumerate(
            [event({"role": "assistant"}), *(event({"content": word}) for word in words), event({}, "stop"), b"data: [DONE]\n\n"]
        ):
            if number in breaks and place == 4:
                assert request.transport is not None
                request.transport.close()
                return response
            sent[number] += piece
            await response.write(piece)
            await asyncio.sleep(pause)
        return response

    return handler, sent


def test_a_stream_is_served_as_it_comes_and_its_twin_is_kept(tmp_path: Path) -> None:
    handler, sent = streaming(pause=0.01)

    async def main() -> list[Seen]:
        async with upstream_of(handler) as upstream, proxied(upstream, tmp_path) as (_, url):
            async with openai.AsyncOpenAI(base_url=url, api_key="any", max_retries=0) as client:
                stream = await client.chat.completions.create(model="m", messages=MESSAGES, stream=True)
                texts.append("".join([chunk.choices[0].delta.content or "" async for chunk in stream]))
            return [await ask(f"{url}/chat/completions", BODY | {"stream": True}) for _ in range(5)]

    texts: list[str] = []
    answers = asyncio.run(main())
    _, pairs = book(tmp_path)
    assert [raw for _, raw, _ in answers] == [next(one for one in sent if streamed_text(one) == served_text(pair)) for pair in pairs[1:]]
    assert texts == [served_text(pairs[0])]
    assert {pair.served for pair in pairs} == {0, 1}
    assert all(headers["content-type"] == "text/event-stream" for _, _, headers in answers)


def test_a_stream_that_breaks_off_breaks_off_for_the_client_and_is_no_pair(tmp_path: Path) -> None:
    handler, _ = streaming(breaks={0, 1, 2, 3})

    async def main() -> None:
        async with upstream_of(handler) as upstream, proxied(upstream, tmp_path) as (_, url):
            for _ in range(2):
                with pytest.raises(aiohttp.ClientError):
                    await ask(f"{url}/chat/completions", BODY | {"stream": True})
            assert (await ask(f"{url}/chat/completions", BODY | {"stream": True}))[0] == 200

    asyncio.run(main())
    contents, pairs = book(tmp_path)
    assert (contents.count("single"), len(pairs)) == (2, 1)


def test_a_stream_that_is_refused_is_replaced_by_its_twin(tmp_path: Path) -> None:
    handler, _ = streaming(refuses={0, 3, 4, 5})

    async def main() -> list[int]:
        async with upstream_of(handler) as upstream, proxied(upstream, tmp_path) as (_, url):
            return [(await ask(f"{url}/chat/completions", BODY | {"stream": True}))[0] for _ in range(3)]

    assert asyncio.run(main()) == [200, 200, 429]
    assert book(tmp_path)[0].count("single") == 3


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_takes_no_pair_out_of_the_book(tmp_path: Path, stream: bool) -> None:
    """Who leaves may leave because of what is served, which the coin chose: that must not choose which pairs are audited."""
    handler, _ = streaming(pause=0.05)

    async def slow(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(0.3)
        return web.json_response({"choices": [{"index": 0, "message": {"content": f"{id(request)}"}, "finish_reason": "stop"}]})

    async def main() -> None:
        async with upstream_of(handler if stream else slow) as upstream, proxied(upstream, tmp_path) as (_, url):
            async with aiohttp.ClientSession() as session:
                with pytest.raises(TimeoutError):
                    async with session.post(
                        f"{url}/chat/completions", json=BODY | {"stream": stream}, timeout=aiohttp.ClientTimeout(total=0.1)
                    ) as response:
                        await response.read()

    asyncio.run(main())
    assert len(book(tmp_path)[1]) == 1


# --- retries


def numbering(delay: float = 0.0) -> tuple[Handler, list[str]]:
    """An upstream whose n-th request is answered "answer n"; and the Idempotency-Keys that it saw."""
    keys: list[str] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        keys.append(request.headers.get("idempotency-key", ""))
        number = len(keys)
        await asyncio.sleep(delay)
        return web.json_response(
            {"choices": [{"index": 0, "message": {"role": "assistant", "content": f"answer {number}"}, "finish_reason": "stop"}]}
        )

    return handler, keys


def test_a_retry_with_its_key_gets_the_same_bytes_and_no_second_coin(tmp_path: Path) -> None:
    key = {"Idempotency-Key": "one"}
    handler, keys = numbering(0.05)

    async def main() -> list[Seen]:
        async with upstream_of(handler) as upstream, proxied(upstream, tmp_path) as (_, url):
            address = f"{url}/chat/completions"
            together = await asyncio.gather(ask(address, headers=key), ask(address, headers=key))
            later = await ask(address, headers=key)
            others = [
                await ask(address, headers={"Idempotency-Key": "two"}),
                await ask(address, headers=key | {"Authorization": "Bearer other"}),
                await ask(address, BODY | {"max_tokens": 20}, headers=key),
                await ask(address),
            ]
            return [*together, later, *others]

    answers = asyncio.run(main())
    assert len({raw for _, raw, _ in answers[:3]}) == 1
    assert len({raw for _, raw, _ in answers}) == 5
    assert len(book(tmp_path)[1]) == 5
    # An upstream that honours such keys would otherwise give both samples of a pair, or of two pairs, one answer.
    assert len(keys) == 10
    assert len(set(keys) - {""}) == 8
    assert all(key == "" or key.startswith(("one:", "two:")) for key in keys)


def test_a_failure_is_not_remembered(tmp_path: Path) -> None:
    async def main() -> list[int]:
        settings = FRESH.model_copy(update={"faults_in_order": ("http-500", "http-500")})
        async with fake_endpoint.serve(settings) as (_, upstream), proxied(upstream, tmp_path) as (_, url):
            return [(await ask(f"{url}/chat/completions", headers={"Idempotency-Key": "k"}))[0] for _ in range(2)]

    assert asyncio.run(main()) == [500, 200]


def test_what_is_remembered_is_bounded(tmp_path: Path) -> None:
    handler, _ = numbering()

    async def main() -> list[bytes]:
        async with upstream_of(handler) as upstream, proxied(upstream, tmp_path, remembered_bytes=1) as (_, url):
            return [(await ask(f"{url}/chat/completions", headers={"Idempotency-Key": "k"}))[1] for _ in range(2)]

    assert len(set(asyncio.run(main()))) == 2
    assert len(book(tmp_path)[1]) == 2


# --- upstreams and disks that fail


def test_an_upstream_that_is_not_there_or_says_nothing(tmp_path: Path) -> None:
    async def silent(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(5)
        return web.Response()

    async def main() -> list[int]:
        async with proxied("http://127.0.0.1:9/v1", tmp_path / "a") as (_, url):
            statuses = [(await ask(f"{url}{path}"))[0] for path in ("/chat/completions", "/completions")]
        async with upstream_of(silent) as upstream, proxied(upstream, tmp_path / "b", silence_seconds=0.1) as (_, url):
            return statuses + [(await ask(f"{url}{path}"))[0] for path in ("/chat/completions", "/completions")]

    assert asyncio.run(main()) == [502, 502, 502, 504]
    assert [book(tmp_path / name)[0].count("single") for name in "ab"] == [1, 1]


def test_an_answer_that_breaks_off_is_not_taken_for_whole(tmp_path: Path) -> None:
    async def main() -> None:
        async with (
            fake_endpoint.serve(Settings(faults_in_order=("drop-in-body",))) as (_, upstream),
            proxied(upstream, tmp_path, share=0.0) as (_, url),
        ):
            with pytest.raises(aiohttp.ClientError):
                await ask(f"{url}/chat/completions")

    asyncio.run(main())


def test_a_log_that_cannot_be_written_stops_no_answer_and_is_reported(tmp_path: Path) -> None:
    reports: list[str] = []

    def full(sampled: object) -> None:
        raise ResourceError("disk-full", found="the disk is full", do="Free some space.")

    async def main() -> int:
        with ServingLog(tmp_path, KEY, share=1.0) as log:
            log.append = full  # type: ignore[method-assign, assignment]
            async with fake_endpoint.serve(FRESH) as (_, upstream):
                async with serve(ProxySettings(upstream=upstream), log, report=reports.append) as (proxy, url):
                    status, _, _ = await ask(f"{url}/chat/completions")
                assert proxy.counts["not logged"] == 1
                return status

    assert asyncio.run(main()) == 200
    assert len(reports) >= 1
    assert "cannot be audited" in reports[0]
    contents = verify_serving_log(tmp_path / "serving.jsonl")
    assert len(missing(contents, [Coins.of(KEY, 0)])) == 1


@pytest.mark.parametrize("upstream", ["", "host/v1", "ftp://host", "https://user:secret@host/v1", "https://host/v1?key=1"])
def test_an_upstream_that_cannot_be_one_is_refused(upstream: str) -> None:
    with pytest.raises(GuardError) as raised:
        _ = ProxySettings(upstream=upstream).origin
    assert raised.value.code == "guard-upstream"
    assert "secret" not in str(raised.value)


def test_a_port_that_is_taken_is_reported(tmp_path: Path) -> None:
    async def main() -> None:
        async with fake_endpoint.serve() as (_, upstream):
            port = int(upstream.split(":")[2].removesuffix("/v1"))
            with ServingLog(tmp_path, KEY, share=1.0) as log:
                async with serve(ProxySettings(upstream=upstream), log, port=port):
                    pass

    with pytest.raises(GuardError) as raised:
        asyncio.run(main())
    assert raised.value.code == "port-in-use"


# --- what is eligible, and what a text is


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"temperature": None}, True),
        ({"temperature": 0.01, "n": 1, "stream": True}, True),
        ({"temperature": 0}, False),
        ({"temperature": "1"}, False),
        ({"n": 2}, False),
        ({"seed": 0}, False),
        ({"messages": []}, False),
        ({"messages": "hello"}, False),
        ({"messages": [{"role": "system", "content": "s"}, *MESSAGES]}, True),
        ({"messages": [*MESSAGES, {"role": "assistant", "content": "a"}, *MESSAGES]}, False),
    ],
)
def test_eligible_is_one_answer_drawn_at_random_that_holds_no_earlier_one(change: dict[str, Any], expected: bool) -> None:
    assert eligible(BODY | change) is expected
    if isinstance(change.get("messages"), list) and change["messages"]:
        assert eligible(BODY | change, first_turns_only=False)


def test_the_text_of_an_answer() -> None:
    def whole(*choices: Any) -> bytes:
        return json.dumps({"choices": list(choices)}).encode()

    assert answer_text(whole({"message": {"content": "é"}})) == "é"
    for nothing in (
        b"", b"[]", b"{}", whole(), whole({"message": {"content": ""}}), whole({"message": {"content": None}}), whole({}), whole(1),
        whole({"message": {"content": "a", "tool_calls": [{}]}}), whole(*[{"message": {"content": "a"}}] * 2),
        b'{"choices":[{"message":{"content":"\\ud800"}}]}',
    ):  # fmt: skip
        assert answer_text(nothing) is None
    ended = event({"content": "a"}) + event({"content": "é"}) + event({}, "stop") + b'data: {"choices": [], "usage": {}}\n\ndata: [DONE]\n\n'
    assert streamed_text(b": comment\r\n\r\n" + ended.replace(b"\n", b"\r\n")) == "aé"
    for nothing in (
        b"",
        ended[:-70].split(b'data: {"id": "c", "choices": [{"index": 0, "delta": {}')[0],
        event({"tool_calls": [1]}, "stop"),
        b"data: x\n\n",
    ):
        assert streamed_text(nothing) is None
