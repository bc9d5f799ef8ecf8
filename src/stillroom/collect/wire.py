"""What is sent to an OpenAI-compatible endpoint and what comes back, as plain values: no client and no loop.

A **call** is one thing to buy: a request body as it goes over the wire, whom it goes to, and which of several samples of it this is. Its key is a
digest of exactly that, so that a call is known again by whoever makes it, and another body, endpoint or sample is another call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol, TypeAlias
from urllib.parse import urlsplit

import numpy
from numpy.typing import NDArray

from stillroom.collect.providers import Provider, is_loopback, provider_of
from stillroom.core.errors import CollectError
from stillroom.core.hashing import canonical_json, sha256_hex
from stillroom.core.identities import Json

Route: TypeAlias = Literal["chat", "completions"]
ROUTES: dict[Route, str] = {"chat": "/chat/completions", "completions": "/completions"}
_DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Whom calls go to. `base_url` ends where the routes begin (https://host/v1) and has neither credentials nor query nor a final slash.

    `key_variable` names the environment variable that holds the key; the key itself is in no value that is stored or printed.
    """

    base_url: str
    model: str
    route: Route = "chat"
    key_variable: str | None = None

    @classmethod
    def parse(cls, url: str, model: str, *, route: Route = "chat", key_variable: str | None = None, allow_http: bool = False) -> Endpoint:
        """An endpoint from what a user wrote. Scheme and host become lower case; a default port, final slashes and a route at the end are left out.

        Raises CollectError 'endpoint-invalid' for a URL with credentials, a query or a fragment, for another scheme than http and https, and for http
        to another machine unless `allow_http`. The message does not repeat what may be a secret.
        """
        return cls(base_url=_base_url(url, allow_http), model=_model_name(model), route=route, key_variable=key_variable)

    @property
    def identity(self) -> Json:
        """What a call's key depends on: not where its key is kept."""
        return {"base_url": self.base_url, "model": self.model, "route": self.route}

    @property
    def url(self) -> str:
        return self.base_url + ROUTES[self.route]

    @property
    def provider(self) -> Provider:
        """What is documented of whoever answers at this host; the generic one where the host is not known."""
        return provider_of(urlsplit(self.base_url).hostname or "")


def _base_url(url: str, allow_http: bool) -> str:
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").lower(), parts.port
    except ValueError:
        raise _invalid("a URL that cannot be read", "https://host/v1", "Write the URL that the provider documents for OpenAI clients.") from None
    if any(character.isspace() or not character.isprintable() for character in url) or "\\" in url:
        raise _invalid("a URL with a space, a backslash or a control character", "https://host/v1", "Write the URL without it.")
    if "@" in parts.netloc:
        do = "Put the key into an environment variable and name that variable."
        raise _invalid("a URL with credentials in it", "no user name, password or key in the URL, which is stored and printed", do)
    if "?" in url or "#" in url:
        do = "Leave it out. A key belongs into an environment variable; where a version must be named (Azure), use the provider's /v1 URL."
        raise _invalid("a URL with a query or a fragment", "a URL that the routes can be added to", do)
    if parts.scheme.lower() not in _DEFAULT_PORTS or not host:
        found = f"the scheme {parts.scheme[:16]!r}" if parts.scheme else "a URL without a scheme"
        raise _invalid(found if host or not parts.scheme else "a URL without a host", "http:// or https:// and a host", "Write the URL in full.")
    scheme = parts.scheme.lower()
    if scheme == "http" and not (allow_http or is_loopback(host)):
        do = "Use https; or, where the network between is yours, allow http in so many words."
        raise _invalid(f"http to the host {host}", "https to another machine", do, why="key, prompts and answers would go over the network in clear")
    path = parts.path.rstrip("/")
    for ending in ROUTES.values():
        path = path.removesuffix(ending).rstrip("/")
    named = f"[{host}]" if ":" in host else host
    return f"{scheme}://{named}{'' if port in (None, _DEFAULT_PORTS[scheme]) else f':{port}'}{path}"


def _model_name(model: str) -> str:
    if not model.strip() or not model.isprintable():
        raise _invalid("an empty or unprintable model name", "the name that the endpoint knows the model by", "Name the model.")
    return model


def _invalid(found: str, expected: str, do: str, why: str = "") -> CollectError:
    return CollectError("endpoint-invalid", found=found, expected=expected, why=why, do=do)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How answers are asked for, whatever the endpoint names it. None means that the body does not say, so the endpoint's default holds.

    `top_logprobs` None asks for no log-probabilities, 0 for those of the chosen tokens alone. `extra` is added to the body as it is, and names nothing
    that another field names.
    """

    max_tokens: int
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    n: int = 1
    top_logprobs: int | None = None
    response_format: Json | None = None
    extra: Json = field(default_factory=dict)


Messages: TypeAlias = Sequence[Mapping[str, Any]]


def chat_body(endpoint: Endpoint, messages: Messages, settings: Settings) -> Json:
    """The body of a call to the chat route, final as it goes over the wire."""
    provider = endpoint.provider
    body: Json = {"model": endpoint.model, "messages": [dict(message) for message in messages], provider.max_tokens: settings.max_tokens}
    if settings.top_logprobs is not None:
        if provider.chat_logprobs_as_count:
            body["logprobs"] = settings.top_logprobs
        else:
            body |= {"logprobs": True, "top_logprobs": settings.top_logprobs}
    return _finished(body, settings)


def completion_body(endpoint: Endpoint, prompt: str | Sequence[int], settings: Settings) -> Json:
    """The body of a call to the completions route, final as it goes over the wire. `prompt` is text, or token ids where the endpoint takes them."""
    body: Json = {"model": endpoint.model, "prompt": prompt if isinstance(prompt, str) else list(prompt), "max_tokens": settings.max_tokens}
    if settings.top_logprobs is not None:
        body["logprobs"] = settings.top_logprobs
    return _finished(body, settings)


def _finished(body: Json, settings: Settings) -> Json:
    optional = {
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "seed": settings.seed,
        "stop": list(settings.stop) or None,
        "n": settings.n if settings.n != 1 else None,
        "response_format": settings.response_format,
    }
    body |= {name: value for name, value in optional.items() if value is not None}
    twice = sorted(body.keys() & settings.extra.keys())
    if twice or "stream" in settings.extra:
        named = ", ".join(twice) or "stream"
        do = "Set it by its own field." if twice else "Leave it out: answers are read whole."
        raise CollectError("request-invalid", found=f"the extra field {named}", expected="fields that the settings do not have", do=do)
    return body | settings.extra


@dataclass(frozen=True, kw_only=True)
class Call:
    """One thing to buy. `body` is final: nothing is added to it or taken from it on its way. `sample` counts several answers to the same body."""

    endpoint: Endpoint
    body: Json
    sample: int = 0

    @cached_property
    def key(self) -> str:
        """SHA-256 of the canonical JSON (RFC 8785) of endpoint, body and sample."""
        return sha256_hex(canonical_json({"body": self.body, "endpoint": self.endpoint.identity, "sample": self.sample}))

    @cached_property
    def content(self) -> bytes:
        """The bytes that are sent: the canonical JSON of the body."""
        return canonical_json(self.body)


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """A whole answer, whatever its status. Header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    seconds: float


class Transport(Protocol):
    """The one seam to the network: what can be replaced in tests, and by users."""

    async def send(self, url: str, headers: Mapping[str, str], body: bytes, timeout_seconds: float) -> Response:
        """POSTs `body` once: no retry, no redirect. Raises NotSent or OutcomeUnknown where there is no whole answer."""
        ...

    async def close(self) -> None: ...


class NotSent(Exception):
    """Nothing can have been done at the other end: no connection was made. Its text has no header and no body in it."""


class OutcomeUnknown(Exception):
    """The request, or a part of it, went out, and no whole answer came back: it may have been done, and billed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What an endpoint says it counted. `reasoning_tokens` are among the completion's, `cached_tokens` among the prompt's."""

    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Places:
    """What an endpoint says of the tokens that it generated, packed: an object for each alternative would cost more than all else in a call.

    T generated tokens, N alternatives of all of them end to end: those of token t are the entries starts_T1[t] to starts_T1[t + 1] (exclusive), in the
    order that they came in. Log-probabilities are natural. Tokens are the bytes that the endpoint gives or, where it gives none, its text in UTF-8;
    None where it names no token. Ids are its own, -1 where it gives none; None where it gives none at all.
    """

    tokens_T: list[bytes] | None
    logprobs_T: NDArray[numpy.float64]
    ids_T: NDArray[numpy.int64] | None
    top_tokens_N: list[bytes] | None
    top_logprobs_N: NDArray[numpy.float64]
    top_ids_N: NDArray[numpy.int64] | None
    starts_T1: NDArray[numpy.int64]

    def __len__(self) -> int:
        return len(self.logprobs_T)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One completion as it came: nothing here is believed yet. `places` is None where no log-probabilities came, or (`places_unreadable`) none that can
    be read.

    `text` and `reasoning` are as the endpoint separates them. `thinking` says what of a think block is inside `text`: none, a whole one, or one that
    never ends, so that all that follows its beginning may be thinking. `usage` is the response's: where one response has several answers, it stands at
    the first alone. `reasoning_places` are those of the reasoning where an endpoint keeps them apart.
    """

    text: str
    finish_reason: str | None
    usage: Usage | None
    reasoning: str | None = None
    thinking: Literal["none", "closed", "unterminated"] = "none"
    places: Places | None = None
    places_unreadable: bool = False
    reasoning_places: Places | None = None
    token_ids: tuple[int, ...] | None = None
    model: str | None = None
    fingerprint: str | None = None
    provider: str | None = None
    response_id: str | None = None


# Why a call has no answer. Those of `AGAIN` may be made again; the others are final, of the row or (`STOPS`) of the whole job.
FailureReason: TypeAlias = Literal[
    "throttled",
    "server-error",
    "overloaded",
    "not-sent",
    "outcome-unknown",
    "malformed",
    "quota-exhausted",
    "bad-key",
    "not-found",
    "context-overflow",
    "content-filtered",
    "invalid-request",
]
AGAIN: frozenset[FailureReason] = frozenset({"throttled", "server-error", "overloaded", "not-sent", "outcome-unknown", "malformed"})
STOPS: frozenset[FailureReason] = frozenset({"quota-exhausted", "bad-key", "not-found"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A call without an answer. `message` is the endpoint's own words, shortened, with everything that looks like a key taken out.

    `retry_after_seconds` is what the endpoint asks for; `usage` what came with it, and is charged all the same.
    """

    reason: FailureReason
    message: str
    status: int | None = None
    retry_after_seconds: float | None = None
    usage: Usage | None = None


Outcome: TypeAlias = Answer | Failure


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What a response's headers say of the endpoint's limits: how many requests and tokens are left, and in how many seconds there are more."""

    requests_limit: int | None = None
    requests_left: int | None = None
    requests_reset_seconds: float | None = None
    tokens_limit: int | None = None
    tokens_left: int | None = None
    tokens_reset_seconds: float | None = None
