"""What is sent to an OpenAI-compatible endpoint and what comes back, as plain values: no client and no loop.

A **call** is one thing to buy: a request body as it goes over the wire, whom it goes to, and which of several samples of it this is. Its key is a
digest of exactly that, so that a call is known again by whoever makes it, and another body, endpoint or sample is another call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol, TypeAlias

from stillroom.core.hashing import canonical_json, sha256_hex
from stillroom.core.identities import Json

Route: TypeAlias = Literal["chat", "completions"]
ROUTES: dict[Route, str] = {"chat": "/chat/completions", "completions": "/completions"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Whom calls go to. `base_url` ends where the routes begin (https://host/v1) and has neither credentials nor query nor a final slash.

    `key_variable` names the environment variable that holds the key; the key itself is in no value that is stored or printed.
    """

    base_url: str
    model: str
    route: Route = "chat"
    key_variable: str | None = None

    @property
    def identity(self) -> Json:
        """What a call's key depends on: not where its key is kept."""
        return {"base_url": self.base_url, "model": self.model, "route": self.route}

    @property
    def url(self) -> str:
        return self.base_url + ROUTES[self.route]


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """A token at one place: its text, its bytes where the endpoint gives them, its id where it gives one, its natural log-probability."""

    text: str
    logprob: float
    bytes: bytes | None = None
    id: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What an endpoint says of one generated token: the token, and the likeliest ones in its place."""

    chosen: Alternative
    top: tuple[Alternative, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One completion as it came: nothing here is believed yet. `places` is None where no log-probabilities came."""

    text: str
    finish_reason: str | None
    usage: Usage | None
    reasoning: str | None = None
    places: tuple[Place, ...] | None = None
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
