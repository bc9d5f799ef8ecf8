"""A deterministic OpenAI-compatible endpoint to rehearse a collection against: it answers, bills, throttles, fails and lies as its settings say.

    python -m stillroom.testing.fake_endpoint --config settings.yaml

In Python `fake_endpoint(settings)` is a context manager for a server in a thread (or, with process=True, in a process), and `serve` one for use
inside an event loop. What it serves: POST /v1/chat/completions, POST /v1/completions, GET /v1/models, GET /_stillroom/bill (?bodies=no leaves the
bodies out) and GET /_stillroom/requests.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from aiohttp import web

from stillroom.core.errors import StillroomError
from stillroom.core.identities import Json
from stillroom.testing.account import Account, Bill, Limits, throttled
from stillroom.testing.answers import Answered, Answerer
from stillroom.testing.asking import Asked, Body, Refused, Route, parse_body, read_request
from stillroom.testing.language import draws
from stillroom.testing.settings import WORK_DONE, Fault, Settings, make_settings, read_settings

_ROUTES: dict[str, Route] = {"/v1/chat/completions": "chat", "/v1/completions": "completions"}
_LARGEST_BODY = 64 << 20
_KEPT_ANSWERS_BYTES = 64 << 20
_JSON = {"content-type": "application/json"}
_HTML = b"<html><head><title>502 Bad Gateway</title></head><body><center><h1>502 Bad Gateway</h1></center></body></html>"
_STATUSES = {"http-500": 500, "http-502": 502, "http-503": 503, "http-529": 529, "http-502-after-work": 502}


@dataclass(slots=True, kw_only=True)
class Received:
    """A request as the endpoint saw it. Of the Authorization header it is kept only whether there was one."""

    number: int
    attempt: int
    """How often the same body had been received before."""
    path: str
    key: str
    headers: dict[str, str]
    body: bytes
    status: int | None = None
    """What it was answered with; None before that, and where no answer was sent."""
    fault: Fault | None = None
    done: bool = False

    def as_json(self) -> Json:
        """Plain values; the body as text."""
        return {name: getattr(self, name) for name in self.__slots__} | {"body": self.body.decode(errors="replace")}


class _Kept:
    """The answers given last, up to a number of bytes."""

    def __init__(self) -> None:
        self._answers: OrderedDict[tuple[Route, str, int], Answered] = OrderedDict()
        self._bytes = 0

    def get(self, key: tuple[Route, str, int]) -> Answered | None:
        return self._answers.get(key)

    def put(self, key: tuple[Route, str, int], answered: Answered) -> None:
        self._answers[key] = answered
        self._bytes += len(answered.body)
        while self._bytes > _KEPT_ANSWERS_BYTES:
            _, old = self._answers.popitem(last=False)
            self._bytes -= len(old.body)


class Endpoint:
    """The server's state and what it does with a request; `serve` puts it on a socket."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.account = Account(settings)
        self.limits = Limits(settings, time.monotonic)
        self.requests: deque[Received] = deque(maxlen=settings.remember_requests)
        self._answerer = Answerer(settings)
        self._kept = _Kept()
        self._idempotent: set[str] = set()

    @property
    def bill(self) -> Bill:
        """As of now."""
        return self.account.bill(self.limits)

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answers one HTTP request."""
        try:
            if request.method == "POST" and (route := _ROUTES.get(request.path)) is not None:
                return await self._generate(request, route)
            return self._other(request)
        except Refused as refused:
            return _error(refused)

    def _other(self, request: web.BaseRequest) -> web.Response:
        match (request.method, request.path):
            case ("GET", "/_stillroom/bill"):
                return _json(self.account.bill(self.limits, bodies=request.query.get("bodies") != "no").as_json())
            case ("GET", "/_stillroom/requests"):
                return _json([received.as_json() for received in list(self.requests)])
            case ("GET", "/v1/models"):
                self._check_key(request)
                return _json({"object": "list", "data": [self._model(name) for name in self.settings.models]})
            case ("GET", path) if path.startswith("/v1/models/"):
                self._check_key(request)
                name = path.removeprefix("/v1/models/")
                if name not in self.settings.models:
                    raise Refused(404, "model_not_found", f"The model `{name}` does not exist.", param="model")
                return _json(self._model(name))
            case _:
                raise Refused(404, "unknown_url", f"Unknown request URL: {request.method} {request.path}.")

    def _model(self, name: str) -> Json:
        return {"id": name, "object": "model", "created": 1767225600, "owned_by": "stillroom"}

    def _check_key(self, request: web.BaseRequest) -> None:
        keys = self.settings.api_keys
        if keys and request.headers.get("authorization", "").removeprefix("Bearer ") not in keys:
            raise Refused(401, "invalid_api_key", "Incorrect API key provided.")

    async def _generate(self, request: web.BaseRequest, route: Route) -> web.StreamResponse:
        raw = await request.read()
        account = self.account
        body = parse_body(raw)
        received = self._receive(request, raw, body)
        account.in_flight += 1
        account.most_in_flight = max(account.most_in_flight, account.in_flight)
        try:
            return await self._answer(request, received, route, body)
        except Refused as refused:
            received.status = refused.status
            account.statuses[str(refused.status)] += 1
            refused.headers["x-request-id"] = f"req_{received.number:012d}"
            raise
        finally:
            account.in_flight -= 1

    def _receive(self, request: web.BaseRequest, raw: bytes, body: Body) -> Received:
        key = body.key
        idempotency = request.headers.get("idempotency-key")
        if idempotency is not None:
            key = f"{key}:{idempotency}"
        number, attempt = self.account.receive(key)
        headers = {name.lower(): value for name, value in request.headers.items()}
        if "authorization" in headers:
            headers["authorization"] = "(not kept)"
        received = Received(number=number, attempt=attempt, path=request.path, key=key, headers=headers, body=raw)
        self.requests.append(received)
        return received

    async def _answer(self, request: web.BaseRequest, received: Received, route: Route, parsed: Body) -> web.StreamResponse:
        self._check_key(request)
        asked = read_request(route, parsed, self.settings)
        self._check_capacity()
        answered = self._answered(asked, received)
        self.limits.admit(self._tokens(asked, answered))
        received.fault = fault = self._fault(received)
        if fault is not None:
            self.account.faults[fault] += 1
        if fault is None or fault in WORK_DONE:
            await asyncio.sleep(self.settings.latency_ms / 1000)
            self._finish(received, answered)
        body = b'{"id":"%s-%s-%d",' % (b"chatcmpl" if route == "chat" else b"cmpl", asked.key[:24].encode(), received.attempt) + answered.body
        headers = {"x-request-id": f"req_{received.number:012d}", **self.limits.headers()}
        if fault is None:
            return self._respond(received, 200, body, _JSON | headers)
        return await self._fail(request, received, fault, body, headers)

    def _check_capacity(self) -> None:
        quota, most = self.settings.quota_requests, self.settings.concurrency
        if quota is not None and self.account.finished >= quota:
            message = "You exceeded your current quota, please check your plan and billing details."
            raise Refused(429, "insufficient_quota", message, kind="insufficient_quota")
        if most is not None and self.account.in_flight > most:
            raise throttled("Too many requests at a time.", "concurrency", self.settings.latency_ms / 1000, self.settings, self.limits.headers())

    def _answered(self, asked: Asked, received: Received) -> Answered:
        key = (asked.route, asked.key, self._answerer.variant(asked, received.attempt, received.number))
        found = self._kept.get(key)
        if found is None:
            found = self._answerer.answer(asked, key[2])
            self._kept.put(key, found)
        return found

    def _tokens(self, asked: Asked, answered: Answered) -> int:
        if self.settings.tokens_charged == "used":
            return answered.prompt_tokens + answered.completion_tokens
        return len(asked.prompt) + asked.most_tokens * asked.choices

    def _finish(self, received: Received, answered: Answered) -> None:
        received.done = True
        if self.settings.idempotency and ":" in received.key:
            if received.key in self._idempotent:
                return
            self._idempotent.add(received.key)
        self.account.finish(received.key, answered.prompt_tokens, answered.completion_tokens)

    def _fault(self, received: Received) -> Fault | None:
        settings = self.settings
        if received.number < len(settings.faults_in_order):
            planned = settings.faults_in_order[received.number]
            return None if planned == "none" else planned
        if not settings.faults or (settings.most_faults is not None and received.attempt >= settings.most_faults):
            return None
        what = (received.key, received.attempt) if settings.faults_by == "body" else (received.number,)
        left = next(draws(settings.seed, "fault", *what))
        for fault, probability in settings.faults.items():
            left -= probability
            if left < 0:
                return fault
        return None

    def _respond(self, received: Received, status: int, body: bytes, headers: dict[str, str]) -> web.Response:
        received.status = status
        self.account.statuses[str(status)] += 1
        return web.Response(status=status, body=body, headers=headers)

    async def _fail(self, request: web.BaseRequest, received: Received, fault: Fault, body: bytes, headers: dict[str, str]) -> web.StreamResponse:
        match fault:
            case "http-500" | "http-502" | "http-503" | "http-529" | "http-502-after-work":
                error = Refused(_STATUSES[fault], None, "The server had an error while processing your request.", kind="server_error")
                return self._respond(received, error.status, error.body, _JSON | headers)
            case "html-error-page":
                return self._respond(received, 502, _HTML, {"content-type": "text/html"})
            case "error-in-200":
                error = Refused(500, None, "The server had an error while processing your request.", kind="server_error")
                return self._respond(received, 200, error.body, _JSON | headers)
            case "drop-before-work" | "drop-after-work":
                return _dropped(request)
            case "drop-in-body" | "slow-body":
                return await self._in_pieces(request, received, body, _JSON | headers, whole=fault == "slow-body")
            case "hang-after-work":
                await asyncio.sleep(self.settings.hang_seconds)
                return self._respond(received, 200, body, _JSON | headers)
            case "cut-utf8" | "cut-json":
                return self._respond(received, 200, body[: self._cut(received, body, fault)], _JSON | headers)
            case "empty-body":
                return self._respond(received, 200, b"", _JSON | headers)
            case "wrong-content-type":
                return self._respond(received, 200, body, {"content-type": "text/plain; charset=utf-8"} | headers)

    def _cut(self, received: Received, body: bytes, fault: Fault) -> int:
        """Where a body is cut: anywhere before its end, by chance."""
        chance = next(draws(self.settings.seed, "cut", received.key, received.attempt))
        inside = [at for at, value in enumerate(body) if value & 0xC0 == 0x80] if fault == "cut-utf8" else []
        return inside[int(chance * len(inside))] if inside else int(chance * len(body))

    async def _in_pieces(
        self, request: web.BaseRequest, received: Received, body: bytes, headers: dict[str, str], *, whole: bool
    ) -> web.StreamResponse:
        """The body slowly to its end, or to where it is cut, and then no more and no connection."""
        response = web.StreamResponse(headers=headers | {"content-length": str(len(body))})
        cut = len(body) if whole else self._cut(received, body, "drop-in-body")
        received.status = 200
        self.account.statuses["200"] += 1
        await response.prepare(request)
        pieces = 20 if whole else 1
        for piece in range(pieces):
            await response.write(body[cut * piece // pieces : cut * (piece + 1) // pieces])
            if whole:
                await asyncio.sleep(self.settings.slow_seconds / pieces)
        if not whole:
            _close(request)
        return response


def _close(request: web.BaseRequest) -> None:
    if request.transport is not None:
        request.transport.close()


def _dropped(request: web.BaseRequest) -> web.Response:
    _close(request)
    return web.Response()  # goes nowhere


def _error(refused: Refused) -> web.Response:
    return web.Response(status=refused.status, body=refused.body, headers=_JSON | refused.headers)


def _json(value: Any) -> web.Response:
    return web.Response(body=json.dumps(value, ensure_ascii=False).encode(), headers=_JSON)


@asynccontextmanager
async def serve(settings: Settings | None = None, *, port: int = 0) -> AsyncIterator[tuple[Endpoint, str]]:
    """In a running event loop: the endpoint, and its base URL (ending in /v1) on 127.0.0.1."""
    endpoint = Endpoint(settings or Settings())
    loop = asyncio.get_running_loop()

    def make(message: Any, payload: Any, protocol: Any, writer: Any, task: Any) -> web.BaseRequest:
        return web.BaseRequest(message, payload, protocol, writer, task, loop, client_max_size=_LARGEST_BODY)

    server = web.Server(endpoint.handle, request_factory=make, access_log=None, keepalive_timeout=75.0)
    # A server without an application has half the cost per request; what hangs on purpose is not waited for at the end.
    runner = web.ServerRunner(server, shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", port, backlog=1024)
        await site.start()
        yield endpoint, f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    finally:
        await runner.cleanup()


class Running(Protocol):
    """A fake endpoint that runs beside the caller."""

    @property
    def base_url(self) -> str:
        """Ends in /v1."""
        ...

    @property
    def bill(self) -> Bill:
        """As of now."""
        ...

    @property
    def requests(self) -> list[Received]:
        """The last `remember_requests`, oldest first."""
        ...


@dataclass(frozen=True, slots=True)
class _InThread:
    base_url: str
    endpoint: Endpoint
    loop: asyncio.AbstractEventLoop

    @property
    def bill(self) -> Bill:
        return asyncio.run_coroutine_threadsafe(self._read_bill(), self.loop).result()

    @property
    def requests(self) -> list[Received]:
        return asyncio.run_coroutine_threadsafe(self._read_requests(), self.loop).result()

    async def _read_bill(self) -> Bill:
        return self.endpoint.bill

    async def _read_requests(self) -> list[Received]:
        return list(self.endpoint.requests)


@dataclass(frozen=True, slots=True)
class _InProcess:
    base_url: str

    @property
    def bill(self) -> Bill:
        return Bill.from_json(self._get("bill"))

    @property
    def requests(self) -> list[Received]:
        return [Received(**values | {"body": values["body"].encode()}) for values in self._get("requests")]

    def _get(self, what: str) -> Any:
        with urllib.request.urlopen(f"{self.base_url.removesuffix('/v1')}/_stillroom/{what}", timeout=60) as answer:
            return json.load(answer)


@contextmanager
def fake_endpoint(settings: Settings | None = None, *, process: bool = False) -> Iterator[Running]:
    """A fake endpoint in a thread, or in a process of its own, until the block ends."""
    with _in_process(settings or Settings()) if process else _in_thread(settings or Settings()) as running:
        yield running


@contextmanager
def _in_thread(settings: Settings) -> Iterator[Running]:
    started: list[Running | BaseException] = []
    ready = threading.Event()
    stop: list[asyncio.Event] = []

    async def main() -> None:
        stop.append(asyncio.Event())
        async with serve(settings) as (endpoint, base_url):
            started.append(_InThread(base_url, endpoint, asyncio.get_running_loop()))
            ready.set()
            await stop[0].wait()

    def run() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:
            started.append(error)
            ready.set()

    thread = threading.Thread(target=run, name="fake-endpoint", daemon=True)
    thread.start()
    ready.wait()
    first = started[0]
    if isinstance(first, BaseException):
        raise first
    try:
        yield first
    finally:
        assert isinstance(first, _InThread)
        first.loop.call_soon_threadsafe(stop[0].set)
        thread.join()


@contextmanager
def _in_process(settings: Settings) -> Iterator[Running]:
    with tempfile.TemporaryDirectory() as directory:
        config = Path(directory) / "settings.json"
        config.write_text(settings.model_dump_json(), encoding="utf-8")
        source = str(Path(__file__).resolve().parents[2])
        paths = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
        process = subprocess.Popen(
            [sys.executable, "-m", "stillroom.testing.fake_endpoint", "--config", str(config)],
            stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": paths},
        )  # fmt: skip
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"the fake endpoint did not start: exit status {process.wait()}")
            yield _InProcess(json.loads(line)["base_url"])
        finally:
            process.terminate()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


def main(arguments: list[str] | None = None) -> int:
    """Serves until SIGINT or SIGTERM; prints one line of JSON with the address when it is ready, and the bill on stderr at the end."""
    parser = argparse.ArgumentParser(prog="python -m stillroom.testing.fake_endpoint", description="A deterministic OpenAI-compatible endpoint.")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--config", type=Path, help="a YAML or JSON file; src/stillroom/testing/settings.py describes every setting")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--price-in", help="US dollars for a million tokens of prompt")
    parser.add_argument("--price-out", help="US dollars for a million tokens of answer")
    parser.add_argument("--latency-ms", type=float)
    parser.add_argument("--answer-tokens", type=int)
    given = vars(parser.parse_args(arguments))
    port, config = given.pop("port"), given.pop("config")
    try:
        settings = read_settings(config) if config else Settings()
        changed = {name: value for name, value in given.items() if value is not None}
        settings = make_settings(settings.model_dump() | changed, where="the command line")
        asyncio.run(_serve_until_signal(settings, port))
    except (StillroomError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


async def _serve_until_signal(settings: Settings, port: int) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with serve(settings, port=port) as (endpoint, base_url):
        print(json.dumps({"base_url": base_url, "models": settings.models}), flush=True)
        await stop.wait()
        bill = endpoint.bill
    with suppress(OSError):
        print(f"done {bill.done} of {bill.received} requests, {bill.micro_dollars / 1e6:.6f} US dollars", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
