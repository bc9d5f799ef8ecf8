"""An OpenAI-compatible pass-through that serves one of two samples, for a keyed share of requests, and keeps the book of it (`serving_log`).

Everything goes to the upstream and back byte for byte: any method and path, streams as they come, errors as they are. What one hop says to the next
(RFC 9110, section 7.6.1) is left out, Host is the upstream's, and neither cookies nor credentials are kept or logged.

**Which requests get two samples.** Eligible is POST .../chat/completions for one answer (no `n`, or 1) drawn at a temperature above 0 (or none given:
servers then draw) without `seed`, which asks for one certain answer; of conversations the first turn alone, because a later prompt holds an answer that a
coin chose (`twins`). Eligible requests are numbered, and the coins' key selects its share of the numbers.

**What happens to one.** Its body is sent twice at the same time. The coin says before that which call is served; the two are drawn alike, so this is the
same as to choose between two answers that are there, and a stream need not wait for its twin. The client gets that call's answer, bytes, headers and
`usage`. The other call may be late or fail: the request does not notice (what the upstream counts against the client's key, it counts twice). Where the call that was to be served fails, the client gets the other one.

**What goes into the book.** Both calls are read to their ends, even where the client has left, and logged as a pair if both gave a text. Had a client's
leaving an influence, pairs would be missing more often where the coin chose the longer text, and the coins of those that are left would not be fair.

**Retries.** The text that was kept is never served to anybody. A request with the Idempotency-Key (and account and body) of one that is under way or
remembered gets the very same answer: no second draw, no second coin. Any other retry, and a stream's, is a new request with a number of its own. The two
calls have keys of their own made of the client's, or an upstream that honours such keys would give one answer to both.

**One call with n=2** would be cheaper for the prompt, and is not done: `usage` would count both answers and cannot be split, and the bytes that are
served would have to be made here.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
import zlib
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias
from urllib.parse import urlsplit

import aiohttp
from aiohttp import web
from yarl import URL

from stillroom.core.errors import GuardError, StillroomError
from stillroom.core.hashing import canonical_json
from stillroom.core.identities import Json
from stillroom.guard.serving_log import Sampled, ServingLog

Headers: TypeAlias = list[tuple[str, str]]
Sending: TypeAlias = AbstractAsyncContextManager[aiohttp.ClientResponse]

_ROUTE = "/chat/completions"
_HOP_BY_HOP = frozenset(
    {"connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"}
)
# These are the upstream connection's own, or were answered here.
_NOT_PASSED_ON = _HOP_BY_HOP | {"host", "expect"}
_OURS = frozenset({"content-length"})
_LARGEST_HEADER = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxySettings:
    """What a proxy does. `upstream` is the address whose origin all paths are asked of: https://host/v1 for clients of http://proxy/v1."""

    upstream: str
    account_header: str = "authorization"
    """What tells accounts apart; the log has a keyed pseudonym of it."""
    first_turns_only: bool = True
    connect_seconds: float = 10.0
    silence_seconds: float = 600.0
    """An upstream that sends nothing for so long has failed."""
    largest_body_bytes: int = 64 << 20
    """A request with a larger body is passed on as it comes, and gets one sample."""
    remembered_bytes: int = 64 << 20
    """Of answers that are kept for retries with the same Idempotency-Key."""
    drain_seconds: float = 30.0
    """How long pairs under way may still take when the proxy stops."""

    @property
    def origin(self) -> str:
        """Scheme, host and port. Raises GuardError 'guard-upstream' where `upstream` is no address that can be asked."""
        parts = urlsplit(self.upstream)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query or parts.fragment:
            raise GuardError(
                "guard-upstream",
                found="an upstream that is no http or https address, or has credentials or a query in it",
                expected="https://host/v1",
                do="Give the address that clients were given before; their keys are passed on with their requests.",
            )
        return f"{parts.scheme}://{parts.netloc}"


@dataclass(frozen=True, slots=True)
class _Head:
    status: int
    reason: str | None
    headers: Headers

    def get(self, name: str, default: str) -> str:
        return next((value for found, value in self.headers if found.lower() == name), default)


class _Call:
    """One call of a pair: read to its end whoever listens, and whether or not anybody still does."""

    def __init__(self) -> None:
        self.head: asyncio.Future[_Head | None] = asyncio.get_running_loop().create_future()
        self.pieces: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.body = bytearray()
        self.whole = False

    async def run(self, send: Callable[[], Sending]) -> None:
        try:
            async with send() as response:
                self.head.set_result(_Head(response.status, response.reason, _passed_on(response.headers.items(), _HOP_BY_HOP)))
                async for piece in response.content.iter_any():
                    self.body += piece
                    self.pieces.put_nowait(piece)
            self.whole = True
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
            pass
        finally:
            if not self.head.done():
                self.head.set_result(None)
            self.pieces.put_nowait(None)

    @property
    def answered(self) -> bool:
        """Whether there is a whole answer that is no error."""
        head = self.head.result() if self.head.done() else None
        return self.whole and head is not None and head.status == 200

    def text(self, *, stream: bool) -> str | None:
        """The text of its answer; None where it has none that can be compared."""
        if not self.answered:
            return None
        head = self.head.result()
        assert head is not None
        body = _decoded(bytes(self.body), head.get("content-encoding", "identity"))
        return None if body is None else (streamed_text(body) if stream else answer_text(body))


class Proxy:
    """The proxy without its socket: `handle` answers requests, `close` ends what is under way. Lives in one event loop."""

    def __init__(self, settings: ProxySettings, log: ServingLog, report: Callable[[str], None] | None = None) -> None:
        self.settings, self.log = settings, log
        self.counts: Counter[str] = Counter()
        """Of requests by what was done with them: "passed on", "pair"; and "not logged"."""
        self._origin = settings.origin
        self._report = report or (lambda text: print(text, file=sys.stderr, flush=True))
        self._tasks: set[asyncio.Task[None]] = set()
        self._remembered = _Remembered(settings.remembered_bytes)
        self._ended: asyncio.Queue[Sampled | None] = asyncio.Queue()
        self._writer: asyncio.Task[None] | None = None
        self._session: aiohttp.ClientSession | None = None

    async def start(self) -> None:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self.settings.connect_seconds, sock_read=self.settings.silence_seconds)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), cookie_jar=aiohttp.DummyCookieJar(), timeout=timeout, auto_decompress=False, trust_env=False,
            skip_auto_headers=("accept", "accept-encoding", "user-agent", "content-type"),
            max_line_size=_LARGEST_HEADER, max_field_size=_LARGEST_HEADER,
        )  # fmt: skip
        self._writer = asyncio.create_task(self._write())

    async def close(self) -> None:
        """Waits for pairs under way, at most `drain_seconds`, and until all that ended is on disk."""
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=self.settings.drain_seconds)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        self._ended.put_nowait(None)
        if self._writer is not None:
            await self._writer
        if self._session is not None:
            await self._session.close()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answers one request."""
        if not request.raw_path.startswith("/"):
            return _error(400, "The request's target is not a path.")
        if request.method != "POST" or not request.path.endswith(_ROUTE) or (request.content_length or 0) > self.settings.largest_body_bytes:
            return await self._pass_on(request, request.content if request.body_exists else None)
        raw = await request.read()
        body = None if "content-encoding" in request.headers else _parsed(raw)
        if body is None or not eligible(body, first_turns_only=self.settings.first_turns_only):
            return await self._pass_on(request, raw)
        stream = body.get("stream") is True
        retry = None if stream else self._retry_key(request, raw)
        if retry is not None and (known := self._remembered.get(retry)) is not None:
            return await self._answer(request, known)
        name = self.log.next_request()
        if not self.log.selects(name):
            return await self._pass_on(request, raw)
        self.counts["pair"] += 1
        return await self._pair(request, name, raw, body, retry)

    async def _pair(self, request: web.Request, name: str, raw: bytes, body: Json, retry: bytes | None) -> web.StreamResponse:
        calls = _Call(), _Call()
        tasks = [
            self._spawn(call.run(partial(self._sent, request, raw, self._pair_headers(request, name, place)))) for place, call in enumerate(calls)
        ]
        account = self.log.pseudonym(request.headers.get(self.settings.account_header, "").encode("utf-8", "surrogateescape"))
        stream = body.get("stream") is True
        self._spawn(self._log_pair(name, account, body, calls, tasks, stream=stream))
        served = self.log.coins.served(name)
        in_order = calls[served], calls[1 - served]
        if stream:
            return await self._stream(request, in_order)
        chosen = asyncio.ensure_future(_first_answered(in_order, (tasks[served], tasks[1 - served])))
        if retry is not None:
            self._remembered.put(retry, chosen)
        return await self._answer(request, chosen)

    async def _log_pair(
        self, name: str, account: str, body: Json, calls: tuple[_Call, _Call], tasks: Iterable[asyncio.Task[None]], *, stream: bool
    ) -> None:
        await asyncio.gather(*tasks, return_exceptions=True)
        first, second = (call.text(stream=stream) for call in calls)
        prompt, reason = "", None
        if first is None or second is None:
            first = second = None
            reason = "an answer has no text" if calls[0].answered and calls[1].answered else "a sample failed"
        try:
            prompt = canonical_json(body).decode()
        except (ValueError, RecursionError):
            first, second, reason = None, None, "the request has no canonical form"
        self._ended.put_nowait(Sampled(request=name, account=account, prompt=prompt, first=first, second=second, reason=reason))

    async def _write(self) -> None:
        """Puts pairs that ended into the log, as many as there are at once: no request waits for the disk."""
        stopping = False
        while not stopping:
            ended = [await self._ended.get()]
            while not self._ended.empty():
                ended.append(self._ended.get_nowait())
            stopping = None in ended
            pairs = [one for one in ended if one is not None]
            try:
                await asyncio.to_thread(self.log.append, pairs)
            except (StillroomError, OSError) as error:
                self.counts["not logged"] += len(pairs)
                self._report(f"{len(pairs)} pairs are not in the serving log and cannot be audited: {error}")

    async def _answer(self, request: web.Request, chosen: asyncio.Future[_Call]) -> web.StreamResponse:
        call = await asyncio.shield(chosen)
        head = call.head.result()
        if head is None or not call.whole:
            return _error(502, "The upstream could not be reached, or its answer broke off.")
        headers = _passed_on(head.headers, _OURS)
        return web.Response(status=head.status, reason=head.reason, headers=headers, body=bytes(call.body))

    async def _stream(self, request: web.Request, in_order: tuple[_Call, _Call]) -> web.StreamResponse:
        """The chosen call's stream from its beginning; where that call fails before it begins, the other's."""
        for call in in_order:
            head = await asyncio.shield(call.head)
            if head is not None and head.status == 200:
                break
        else:
            call = in_order[0]
            head = call.head.result()
        if head is None:
            return _error(502, "The upstream could not be reached.")

        async def pieces() -> AsyncIterator[bytes]:
            while (piece := await call.pieces.get()) is not None:
                yield piece
            if not call.whole:
                raise aiohttp.ClientPayloadError

        return await _relayed(request, head, pieces())

    async def _pass_on(self, request: web.Request, data: Any) -> web.StreamResponse:
        self.counts["passed on"] += 1
        headers = _passed_on(request.headers.items(), _NOT_PASSED_ON if isinstance(data, aiohttp.StreamReader) else _NOT_PASSED_ON | _OURS)
        try:
            async with self._sent(request, data, headers) as response:
                head = _Head(response.status, response.reason, _passed_on(response.headers.items(), _HOP_BY_HOP))
                return await _relayed(request, head, response.content.iter_any())
        except TimeoutError:
            return _error(504, "The upstream did not answer in time.")
        except (aiohttp.ClientError, ValueError):
            return _error(502, "The upstream could not be reached, or did not answer.")

    def _sent(self, request: web.Request, data: Any, headers: Headers) -> Sending:
        assert self._session is not None, "started"
        url = URL(self._origin + request.raw_path, encoded=True)
        return self._session.request(request.method, url, data=data, headers=headers, allow_redirects=False)

    def _pair_headers(self, request: web.Request, name: str, place: int) -> Headers:
        # Both texts are read here, so neither is to be compressed.
        headers = _passed_on(request.headers.items(), _NOT_PASSED_ON | _OURS | {"accept-encoding", "idempotency-key"})
        headers.append(("Accept-Encoding", "identity"))
        if (key := request.headers.get("idempotency-key")) is not None:
            headers.append(("Idempotency-Key", f"{key}:{name}:{place}"))
        return headers

    def _retry_key(self, request: web.Request, raw: bytes) -> bytes | None:
        given = request.headers.get("idempotency-key")
        if given is None:
            return None
        account = request.headers.get(self.settings.account_header, "")
        return hashlib.sha256(json.dumps([account, given, request.raw_path, hashlib.sha256(raw).hexdigest()]).encode()).digest()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


class _Remembered:
    """Answers to requests with an Idempotency-Key, from when they are asked; the oldest go when they are too many bytes. Failures are forgotten."""

    def __init__(self, most_bytes: int) -> None:
        self._most, self._bytes = most_bytes, 0
        self._kept: OrderedDict[bytes, asyncio.Future[_Call]] = OrderedDict()

    def get(self, key: bytes) -> asyncio.Future[_Call] | None:
        return self._kept.get(key)

    def put(self, key: bytes, chosen: asyncio.Future[_Call]) -> None:
        self._kept[key] = chosen
        chosen.add_done_callback(lambda done: self._settle(key, done))

    def _settle(self, key: bytes, done: asyncio.Future[_Call]) -> None:
        if done.cancelled() or done.exception() is not None or not done.result().answered:
            self._kept.pop(key, None)
            return
        self._bytes += len(done.result().body)
        while self._bytes > self._most:
            oldest = next((one for one, kept in self._kept.items() if kept.done()), None)
            if oldest is None:
                break
            self._bytes -= len(self._kept.pop(oldest).result().body)


@asynccontextmanager
async def serve(
    settings: ProxySettings, log: ServingLog, *, host: str = "127.0.0.1", port: int = 0, report: Callable[[str], None] | None = None
) -> AsyncIterator[tuple[Proxy, str]]:
    """In a running event loop: the proxy over an open log, and the base URL that clients are given. At the end all pairs under way are logged."""
    proxy = Proxy(settings, log, report)
    application = web.Application(client_max_size=settings.largest_body_bytes + 1)
    application.router.add_route("*", "/{path:.*}", proxy.handle)
    # A client that leaves ends its request, but for pairs, which have tasks of their own.
    runner = web.AppRunner(
        application, access_log=None, handler_cancellation=True, auto_decompress=False, shutdown_timeout=settings.drain_seconds,
        max_line_size=_LARGEST_HEADER, max_field_size=_LARGEST_HEADER,
    )  # fmt: skip
    await runner.setup()
    await proxy.start()
    try:
        site = web.TCPSite(runner, host, port, backlog=1024)
        try:
            await site.start()
        except OSError as error:
            raise GuardError(
                "port-in-use", found=f"port {port} of {host}: {error.strerror}", expected="a free port", do="Choose another one, or 0 for any."
            ) from error
        bound = runner.addresses[0]
        yield proxy, f"http://{f'[{host}]' if ':' in host else host}:{bound[1]}{urlsplit(settings.upstream).path.rstrip('/')}"
    finally:
        await runner.cleanup()
        await proxy.close()


def eligible(body: Json, *, first_turns_only: bool = True) -> bool:
    """Whether a body asks for one answer, drawn at random, that no earlier coin is in."""
    messages, temperature = body.get("messages"), body.get("temperature")
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        return False
    if temperature is not None and not (isinstance(temperature, int | float) and temperature > 0):
        return False
    if body.get("n") not in (None, 1) or body.get("seed") is not None or body.get("stream") not in (None, False, True):
        return False
    return not (first_turns_only and any(message.get("role") in ("assistant", "tool", "function") for message in messages))


def answer_text(body: bytes) -> str | None:
    """The text of the one choice of a chat completion; None where there is none, or calls of tools beside it."""
    tree = _parsed(body)
    choices = tree.get("choices") if tree is not None else None
    if not (isinstance(choices, list) and len(choices) == 1 and isinstance(choices[0], dict)):
        return None
    message = choices[0].get("message")
    if not isinstance(message, dict) or message.get("tool_calls") or message.get("function_call"):
        return None
    return _usable(message.get("content"))


def streamed_text(body: bytes) -> str | None:
    """The same of a stream of server-sent events that came to its end."""
    parts: list[str] = []
    finished = False
    for line in body.split(b"\n"):
        data = line.strip().removeprefix(b"data:").strip()
        if not line.startswith(b"data:") or data == b"[DONE]":
            continue
        event = _parsed(data)
        if event is None or not isinstance(event.get("choices"), list):
            return None
        for choice in event["choices"]:
            delta = choice.get("delta") if isinstance(choice, dict) else None
            if not isinstance(delta, dict) or choice.get("index", 0) != 0 or delta.get("tool_calls") or delta.get("function_call"):
                return None
            parts.append(delta["content"] if isinstance(delta.get("content"), str) else "")
            finished = finished or choice.get("finish_reason") is not None
    return _usable("".join(parts)) if finished else None


async def _first_answered(in_order: tuple[_Call, _Call], tasks: tuple[asyncio.Task[None], asyncio.Task[None]]) -> _Call:
    """The call to be served if it answered, else the other if that did, else the first with its error."""
    for call, task in zip(in_order, tasks, strict=True):
        with suppress(asyncio.CancelledError):
            await asyncio.shield(task)
        if call.answered:
            return call
    return in_order[0]


async def _relayed(request: web.Request, head: _Head, pieces: AsyncIterator[bytes]) -> web.StreamResponse:
    """The answer as it comes. Where it breaks off the client's connection is closed, so that it cannot take a part for the whole."""
    response = web.StreamResponse(status=head.status, reason=head.reason, headers=head.headers)
    await response.prepare(request)
    try:
        async for piece in pieces:
            await response.write(piece)
    except (aiohttp.ClientError, TimeoutError):
        if request.transport is not None:
            request.transport.close()
        return response
    await response.write_eof()
    return response


def _passed_on(headers: Iterable[tuple[str, str]], without: frozenset[str]) -> Headers:
    """The headers but for `without` and those that Connection names."""
    given = list(headers)
    named = {one.strip().lower() for name, value in given if name.lower() == "connection" for one in value.split(",")}
    return [(name, value) for name, value in given if name.lower() not in without and name.lower() not in named]


def _decoded(body: bytes, encoding: str) -> bytes | None:
    match encoding.lower():
        case "identity" | "":
            return body
        case "gzip" | "deflate":
            try:
                return zlib.decompress(body, wbits=47)  # either header is recognised
            except zlib.error:
                return None
        case _:
            return None


def _parsed(raw: bytes) -> Json | None:
    try:
        tree = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return tree if isinstance(tree, dict) else None


def _usable(text: Any) -> str | None:
    """A text that is not empty and has an encoding."""
    if not isinstance(text, str) or not text:
        return None
    try:
        text.encode()
    except UnicodeEncodeError:
        return None
    return text


def _error(status: int, message: str) -> web.Response:
    body = {"error": {"message": message, "type": "proxy_error", "param": None, "code": None}}
    return web.Response(status=status, body=json.dumps(body).encode(), content_type="application/json")
