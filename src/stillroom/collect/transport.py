"""How bytes get to an endpoint and back: once, with nothing added, and with an answer to "can it have been done?" where they do not come back.

A transport follows no redirect, keeps no cookie, reads no `.netrc`, takes no proxy from the environment unless asked to, verifies certificates, and
never sends anything twice. Its errors name what happened and nothing that was sent: no header, no body, no URL. `benchmarks/collect.py` measures both;
aiohttp takes a fraction of the time on a processor, which is why it is the default.
"""

from __future__ import annotations

import base64
import json
import os
import ssl
import time
from asyncio import timeout as time_limit
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, Literal, TypeAlias, get_args
from urllib.parse import quote, quote_plus, urlsplit
from urllib.request import getproxies_environment, proxy_bypass

import aiohttp

from stillroom import __version__
from stillroom.collect.wire import Endpoint, NotSent, OutcomeUnknown, Response, Transport
from stillroom.core import optional
from stillroom.core.errors import CollectError

TransportName: TypeAlias = Literal["aiohttp", "httpx2"]
DEFAULT_TRANSPORT: TransportName = "aiohttp"
CONNECT_SECONDS = 20.0
LARGEST_BODY_BYTES = 128 << 20
_KEEP_ALIVE_SECONDS = 15.0

_HEADERS = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "gzip, deflate"}


def open_transport(name: TransportName = DEFAULT_TRANSPORT, *, environment_proxies: bool = False) -> Transport:
    """A transport by its name. Raises StillroomError 'missing-extra' where its package is not installed."""
    match name:
        case "aiohttp":
            return AiohttpTransport(environment_proxies=environment_proxies)
        case "httpx2":
            return Httpx2Transport(environment_proxies=environment_proxies)
    raise ValueError(f"no transport {name!r}; there are {', '.join(get_args(TransportName))}")


def request_headers() -> dict[str, str]:
    """What every request says of itself; nothing here is secret."""
    return {**_HEADERS, "User-Agent": f"stillroom/{__version__}"}


def authorised(endpoint: Endpoint, headers: Mapping[str, str]) -> Mapping[str, str]:
    """`headers` with the endpoint's key, read from the environment now: for the moment of sending, never to be kept.

    Raises CollectError 'key-unusable' where the variable is not set, or holds what no header can; the text says nothing of its value.
    """
    name = endpoint.key_variable
    if name is None:
        return headers
    key = os.environ.get(name, "").strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise CollectError(
            "key-unusable",
            found=f"the environment variable {name}, " + ("which has characters that no key has" if key else "which is not set or empty"),
            expected="the endpoint's key in it",
            do=f"Set it in the shell that Stillroom is started from: export {name}=...",
        )
    return {**headers, "Authorization": f"Bearer {key}"}


_KEY_CHARACTERS = 8  # a shorter key is a placeholder for servers that want none, and a word that answers may have


def without_key(response: Response, endpoint: Endpoint) -> Response:
    """An endpoint may say the key that it was sent, in an answer, an error or a header: nothing that is read, kept or printed has it, however it is written.

    Taken out is the key as it is, and as it stands in JSON, in a URL and in base64.
    """
    key = os.environ.get(endpoint.key_variable or "", "").strip()
    if len(key) < _KEY_CHARACTERS:
        return response
    forms, said = _forms_of(key), "\n".join(response.headers.values())
    if not any(written in response.body for _, written in forms) and not any(form in said for form, _ in forms):
        return response
    body, headers = response.body, dict(response.headers)
    for form, written in forms:
        body = body.replace(written, b"[key]")
        headers = {name: value.replace(form, "[key]") for name, value in headers.items()}
    return replace(response, body=body, headers=headers)


@lru_cache(maxsize=8)
def _forms_of(key: str) -> tuple[tuple[str, bytes], ...]:
    """How a key may be written, as text and as bytes, the longest first."""
    in_json = json.dumps(key)[1:-1]
    found = {key, in_json, in_json.replace("/", "\\/"), quote(key, safe=""), quote(key), quote_plus(key), *_in_base64(key.encode())}
    return tuple((form, form.encode()) for form in sorted(found, key=len, reverse=True))


def _in_base64(data: bytes) -> Iterator[str]:
    """The signs that have bits of `data` alone, whatever stands before and behind it: six bits a sign, and one of three places to begin at."""
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        for before in range(3):
            signs = encode(b"\0" * before + data).decode()
            yield signs[-(-8 * before // 6) : 8 * (before + len(data)) // 6]


class AiohttpTransport:
    """The default. As many connections as calls are in flight, each used again while the endpoint keeps it open."""

    def __init__(self, *, connect_seconds: float = CONNECT_SECONDS, largest_body_bytes: int = LARGEST_BODY_BYTES, environment_proxies: bool = False):
        self._connect_seconds = connect_seconds
        self._largest = largest_body_bytes
        self._environment_proxies = environment_proxies
        self._session: aiohttp.ClientSession | None = None

    async def send(self, url: str, headers: Mapping[str, str], body: bytes, timeout_seconds: float) -> Response:
        """As Transport.send says; at most `timeout_seconds` for all of it."""
        try:
            return await self._send(url, headers, body, timeout_seconds)
        except Exception as error:
            failure = _aiohttp_failure(error)
        raise failure  # outside of the handler, so that it drags along no exception that may quote what was sent

    async def _send(self, url: str, headers: Mapping[str, str], body: bytes, timeout_seconds: float) -> Response:
        begun = time.monotonic()
        limits = aiohttp.ClientTimeout(total=timeout_seconds, connect=_connect_limit(self._connect_seconds, timeout_seconds))
        proxy = _proxy_of(url) if self._environment_proxies else None
        async with self._opened().post(url, data=body, headers=headers, timeout=limits, allow_redirects=False, proxy=proxy) as response:
            if (response.content_length or 0) > self._largest:
                raise _TooLarge(self._largest)
            pieces, size = [], 0
            while piece := await response.content.readany():
                size += len(piece)
                if size > self._largest:
                    raise _TooLarge(self._largest)
                pieces.append(piece)
            received = b"".join(pieces)
            return Response(status=response.status, headers=_joined(response.headers.items()), body=received, seconds=time.monotonic() - begun)

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:  # it belongs to the running event loop, so it cannot be made before there is one
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_SECONDS)
            self._session = aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar(), trust_env=False)
        return self._session

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None


def _aiohttp_failure(error: Exception) -> NotSent | OutcomeUnknown:
    match error:
        case _TooLarge():
            return OutcomeUnknown(str(error))
        case aiohttp.ClientConnectorDNSError():
            return NotSent("the name of the host cannot be resolved")
        case aiohttp.ClientConnectorCertificateError():
            return NotSent("the endpoint's certificate was not accepted")
        case aiohttp.ClientConnectorSSLError():
            return NotSent("no TLS connection could be made")
        case aiohttp.ConnectionTimeoutError():
            return NotSent("no connection within the time allowed")
        case aiohttp.ClientConnectorError() | aiohttp.ClientHttpProxyError():
            return NotSent(f"no connection: {_reason(error)}")
        case aiohttp.InvalidURL() | aiohttp.NonHttpUrlClientError():
            return NotSent("the URL cannot be used")
        case TimeoutError():
            return OutcomeUnknown("no whole answer within the time allowed")
        case aiohttp.ClientPayloadError():
            return OutcomeUnknown("the answer broke off in its body")
        case aiohttp.ServerDisconnectedError():
            return OutcomeUnknown("the connection was closed before an answer")
        case _:
            return OutcomeUnknown(f"the exchange failed: {_reason(error)}")


class Httpx2Transport:
    """The same over httpx2, for where that is the HTTP client of a house. Raises StillroomError 'missing-extra' where it is not installed."""

    def __init__(self, *, connect_seconds: float = CONNECT_SECONDS, largest_body_bytes: int = LARGEST_BODY_BYTES, environment_proxies: bool = False):
        self._httpx2: Any = optional.load("httpx2", extra="httpx2")
        self._connect_seconds = connect_seconds
        self._largest = largest_body_bytes
        self._environment_proxies = environment_proxies
        # Not the package's client: that follows cookies and the environment. One pool for each proxy, and one without.
        self._pools: dict[str | None, Any] = {}

    async def send(self, url: str, headers: Mapping[str, str], body: bytes, timeout_seconds: float) -> Response:
        """As Transport.send says; at most `timeout_seconds` for all of it."""
        try:
            async with time_limit(timeout_seconds):
                return await self._send(url, headers, body, timeout_seconds)
        except Exception as error:
            failure = self._failure(error)
        raise failure

    async def _send(self, url: str, headers: Mapping[str, str], body: bytes, timeout_seconds: float) -> Response:
        begun = time.monotonic()
        connect = _connect_limit(self._connect_seconds, timeout_seconds)
        limits = {"connect": connect, "pool": connect, "read": timeout_seconds, "write": timeout_seconds}
        request = self._httpx2.Request("POST", url, headers=headers, content=body, extensions={"timeout": limits})
        response = await self._pool(_proxy_of(url) if self._environment_proxies else None).handle_async_request(request)
        try:
            pieces, size = [], 0
            async for piece in response.aiter_bytes():
                size += len(piece)
                if size > self._largest:
                    raise _TooLarge(self._largest)
                pieces.append(piece)
        finally:
            await response.aclose()
        found = _joined(response.headers.multi_items())
        return Response(status=response.status_code, headers=found, body=b"".join(pieces), seconds=time.monotonic() - begun)

    def _pool(self, proxy: str | None) -> Any:
        if proxy not in self._pools:
            limits = self._httpx2.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=_KEEP_ALIVE_SECONDS)
            self._pools[proxy] = self._httpx2.AsyncHTTPTransport(limits=limits, proxy=proxy, trust_env=False, retries=0)
        return self._pools[proxy]

    def _failure(self, error: Exception) -> NotSent | OutcomeUnknown:
        httpx2 = self._httpx2
        if isinstance(error, _TooLarge):
            return OutcomeUnknown(str(error))
        if isinstance(error, (httpx2.ConnectTimeout, httpx2.PoolTimeout)):
            return NotSent("no connection within the time allowed")
        if isinstance(error, (httpx2.ConnectError, httpx2.ProxyError)):
            return NotSent(f"no connection: {_reason(error)}")
        if isinstance(error, (httpx2.InvalidURL, httpx2.UnsupportedProtocol)):
            return NotSent("the URL cannot be used")
        if isinstance(error, (TimeoutError, httpx2.TimeoutException)):
            return OutcomeUnknown("no whole answer within the time allowed")
        return OutcomeUnknown(f"the exchange failed: {_reason(error)}")

    async def close(self) -> None:
        for pool in self._pools.values():
            await pool.aclose()
        self._pools.clear()


def _connect_limit(connect_seconds: float, timeout_seconds: float) -> float:
    """It must end well before the limit on the whole, at which nobody can tell any more whether something was sent."""
    return min(connect_seconds, timeout_seconds / 2)


class _TooLarge(Exception):
    def __init__(self, largest: int) -> None:
        super().__init__(f"the answer is larger than {largest:,} bytes")


def _reason(error: Exception) -> str:
    """An exception in words that are not its own: those may quote an address, a header or a body."""
    name = type(error).__name__
    number = error.errno if isinstance(error, OSError) and not isinstance(error, ssl.SSLError) else None
    return f"{name} ({os.strerror(number)})" if number is not None and number > 0 else name


def _joined(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Headers by their names in lower case; several of one name are joined by commas, as RFC 9110 has it."""
    headers: dict[str, str] = {}
    for name, value in pairs:
        name = name.lower()
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers


def _proxy_of(url: str) -> str | None:
    """The proxy that the environment (https_proxy, http_proxy, no_proxy) names for a URL. Not aiohttp's own look, which takes keys from .netrc too."""
    parts = urlsplit(url)
    if parts.hostname is None or proxy_bypass(parts.netloc.rpartition("@")[2]):
        return None
    return getproxies_environment().get(parts.scheme)
