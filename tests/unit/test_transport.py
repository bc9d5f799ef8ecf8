"""Each way in which an exchange can fail, against a socket server that does exactly that; and that no error quotes what was sent."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import socket
import traceback
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias
from urllib.parse import quote

import pytest

from stillroom.collect.transport import AiohttpTransport, Httpx2Transport, authorised, open_transport, request_headers, without_key
from stillroom.collect.wire import Endpoint, NotSent, OutcomeUnknown, Response
from stillroom.core.errors import CollectError

Behaviour: TypeAlias = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
KEY = "sk-planted-0123456789"
HEADERS = request_headers() | {"Authorization": f"Bearer {KEY}"}
BODY = b'{"prompt": "planted-in-the-body"}'

transports = pytest.mark.parametrize("kind", [AiohttpTransport, Httpx2Transport])


class Server:
    """Reads requests whole, and does with the connection what it is told."""

    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.received: list[bytes] = []
        self.connections = 0

    async def __aenter__(self) -> Server:
        self.server = await asyncio.start_server(self.handle, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}/v1/x?planted-in-the-query={KEY}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self.server.close()
        await self.server.wait_closed()

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(next(line.split(b":")[1] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")))
                self.received.append(head + await reader.readexactly(length))
                await self.behaviour(reader, writer)
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, asyncio.CancelledError, ConnectionError):
            pass
        finally:
            writer.close()


def replies(*pieces: bytes, close: bool = False, wait: float = 0.0) -> Behaviour:
    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        await asyncio.sleep(wait)
        if close:
            writer.close()

    return behave


async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    raw = writer.get_extra_info("socket")
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    writer.transport.abort()


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX-A: 1\r\nX-a: 2\r\nSet-Cookie: planted=1\r\n\r\nhello"


def exchange(kind: Any, behaviour: Behaviour, *, times: int = 1, timeout: float = 20.0, **options: Any) -> tuple[list[Response], Server]:
    async def main() -> tuple[list[Response], Server]:
        transport = kind(**options)
        try:
            async with Server(behaviour) as server:
                return [await transport.send(server.url, HEADERS, BODY, timeout) for _ in range(times)], server
        finally:
            await transport.close()

    return asyncio.run(main())


@transports
def test_a_whole_answer_comes_as_it_is_and_connections_are_used_again(kind: Any) -> None:
    responses, server = exchange(kind, replies(OK), times=3)
    assert [(response.status, response.body) for response in responses] == [(200, b"hello")] * 3
    assert responses[0].headers["x-a"] == "1, 2"
    assert responses[0].headers["content-length"] == "5"
    assert 0 <= responses[0].seconds < 20
    assert server.connections == 1
    assert len(server.received) == 3
    assert all(request.endswith(BODY) and f"Bearer {KEY}".encode() in request for request in server.received)
    assert not any(b"cookie" in request.lower() for request in server.received)


@transports
@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_redirects_are_answers_and_not_followed(kind: Any, status: int) -> None:
    (response,), server = exchange(kind, replies(f"HTTP/1.1 {status} Moved\r\nLocation: /elsewhere\r\nContent-Length: 0\r\n\r\n".encode()))
    assert response.status == status
    assert len(server.received) == 1


@transports
def test_a_compressed_answer_is_unpacked(kind: Any) -> None:
    packed = gzip.compress(b"hello" * 1000)
    head = f"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: {len(packed)}\r\n\r\n".encode()
    (response,), _ = exchange(kind, replies(head + packed))
    assert response.body == b"hello" * 1000


UNKNOWN = {
    "closed before the headers": replies(close=True),
    "reset": reset,
    "closed inside the headers": replies(OK[:30], close=True),
    "closed inside the body": replies(OK[:-3], close=True),
    "closed inside a chunk": replies(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel", close=True),
    "never answers": replies(wait=30),
    "stops inside the body": replies(OK[:-3], wait=30),
    "no HTTP": replies(b"planted nonsense\r\n\r\n", close=True),
    "bad compression": replies(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 5\r\n\r\nhello"),
    "too large by its header": replies(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n" + b"x" * 5000),
    "too large without a length": replies(b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 5000, close=True),
    "too large when unpacked": replies(
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(gzip.compress(b"x" * 5000)) + gzip.compress(b"x" * 5000)
    ),
}


@transports
@pytest.mark.parametrize("name", UNKNOWN)
def test_what_goes_wrong_after_sending_leaves_the_outcome_unknown_and_is_sent_once(kind: Any, name: str) -> None:
    async def main() -> tuple[BaseException, Server]:
        transport = kind(largest_body_bytes=1000)
        async with Server(UNKNOWN[name]) as server:
            with pytest.raises(OutcomeUnknown) as raised:
                await transport.send(server.url, HEADERS, BODY, 0.5)
            await transport.close()
            return raised.value, server

    error, server = asyncio.run(main())
    assert len(server.received) == 1
    _says_nothing(error)


@transports
@pytest.mark.parametrize("url", ["refused", "no-such-host.invalid", "tls", "not a URL"])
def test_where_no_connection_was_made_nothing_was_sent(kind: Any, url: str) -> None:
    async def main() -> BaseException:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            port = unused.getsockname()[1]
        async with Server(replies(OK)) as server:
            target = {
                "refused": f"http://127.0.0.1:{port}/?k={KEY}",
                "tls": server.url.replace("http:", "https:"),
                "not a URL": f"http://[{KEY}/",
            }.get(url, f"http://{url}/?k={KEY}")
            transport = kind()
            with pytest.raises(NotSent) as raised:
                await transport.send(target, HEADERS, BODY, 1)
            await transport.close()
            assert not server.received
        return raised.value

    _says_nothing(asyncio.run(main()))


def _says_nothing(error: BaseException) -> None:
    told = "".join(traceback.format_exception(error)) + repr(error) + repr(error.__context__) + repr(error.__cause__)
    assert KEY not in told
    assert "planted" not in told.replace("test_", "")


@transports
def test_the_environment_names_a_proxy_only_where_that_was_asked_for(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main(asked: bool) -> tuple[int, int]:
        async with Server(replies(OK)) as proxy, Server(replies(OK)) as server:
            monkeypatch.setenv("http_proxy", proxy.url.split("/v1")[0])
            monkeypatch.delenv("no_proxy", raising=False)
            transport = kind(environment_proxies=asked)
            await transport.send(server.url, HEADERS, BODY, 5)
            await transport.close()
            return len(proxy.received), len(server.received)

    assert asyncio.run(main(False)) == (0, 1)
    assert asyncio.run(main(True)) == (1, 0)


@transports
def test_a_cancelled_exchange_is_cancelled(kind: Any) -> None:
    async def main() -> None:
        transport = kind()
        async with Server(replies(wait=30)) as server:
            task = asyncio.create_task(transport.send(server.url, HEADERS, BODY, 20))
            while not server.received:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await transport.close()

    asyncio.run(main())


def test_transports_by_name() -> None:
    assert isinstance(open_transport(), AiohttpTransport)
    assert isinstance(open_transport("httpx2"), Httpx2Transport)
    with pytest.raises(ValueError, match="no transport"):
        open_transport("carrier pigeon")  # type: ignore[arg-type]


def test_the_key_is_read_when_it_is_needed_and_a_message_never_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = Endpoint(base_url="http://127.0.0.1/v1", model="m", key_variable="THE_KEY")
    monkeypatch.setenv("THE_KEY", KEY + "\n")
    assert authorised(endpoint, {"A": "b"}) == {"A": "b", "Authorization": f"Bearer {KEY}"}
    assert authorised(Endpoint(base_url="http://127.0.0.1/v1", model="m"), {"A": "b"}) == {"A": "b"}
    for bad in ("", "  ", f"{KEY}\r\nX: y", f"{KEY}\u00e9", f"{KEY} x"):
        monkeypatch.setenv("THE_KEY", bad)
        with pytest.raises(CollectError) as raised:
            authorised(endpoint, {})
        assert raised.value.code == "key-unusable"
        assert "THE_KEY" in str(raised.value)
        assert KEY not in str(raised.value)
    monkeypatch.delenv("THE_KEY")
    with pytest.raises(CollectError):
        authorised(endpoint, {})


@pytest.mark.parametrize("before", ["", "a", "ab", "Bearer "])
def test_a_key_that_an_endpoint_says_is_taken_out_however_it_is_written(monkeypatch: pytest.MonkeyPatch, before: str) -> None:
    key = 'sk-pl4nted+k/3y"=='
    monkeypatch.setenv("THE_KEY", key)
    endpoint = Endpoint(base_url="http://127.0.0.1/v1", model="m", key_variable="THE_KEY")
    said = before + key
    written = [said, json.dumps(said), json.dumps(said).replace("/", "\\/"), quote(said, safe=""), quote(said)]
    written += [encode(said.encode()).decode() for encode in (base64.b64encode, base64.urlsafe_b64encode)]
    for form in written:
        cleaned = without_key(Response(status=401, headers={"x-echo": form, "x-other": "kept"}, body=f"<{form}>".encode(), seconds=0.0), endpoint)
        # Of base64 up to two signs of the key are left, which have bits of what stands beside it.
        assert "[key]" in cleaned.body.decode()
        assert "[key]" in cleaned.headers["x-echo"]
        for rest in (cleaned.body.decode(), cleaned.headers["x-echo"]):
            assert key[3:] not in rest
            assert len(rest) <= len(before) * 3 + 16
        assert cleaned.headers["x-other"] == "kept"
    honest = Response(status=200, headers={"x-request-id": "1"}, body=b'{"choices": []}', seconds=0.0)
    assert without_key(honest, endpoint) is honest


def test_a_key_of_a_few_characters_is_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THE_KEY", "none")
    response = Response(status=200, headers={}, body=b"none of them", seconds=0.0)
    assert without_key(response, Endpoint(base_url="http://127.0.0.1/v1", model="m", key_variable="THE_KEY")) is response
