"""What the fake endpoint counts: its bill, its buckets of requests and tokens, its quota."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import ROUND_HALF_UP, Decimal
from email.utils import formatdate
from typing import Literal

from stillroom.core.clock import now
from stillroom.core.identities import Json
from stillroom.testing.asking import Refused
from stillroom.testing.settings import Limit, Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Bill:
    """What was done and what it costs, whether or not the answers arrived.

    `micro_dollars` is the exact sum of tokens times price, rounded once, half up; `exact_micro_dollars` is not rounded. `bodies` has, by the
    SHA-256 of a body's canonical JSON (followed by a colon and the Idempotency-Key, where there was one), how often it was received and done.
    `allowed_requests` and `allowed_tokens` are what the limits have allowed since the first request: None where there is no limit.
    """

    received: int
    done: int
    prompt_tokens: int
    completion_tokens: int
    micro_dollars: int
    exact_micro_dollars: Decimal
    throttled: int
    statuses: dict[str, int]
    faults: dict[str, int]
    in_flight: int
    most_in_flight: int
    allowed_requests: float | None
    allowed_tokens: float | None
    bodies: dict[str, dict[Literal["received", "done"], int]]

    def as_json(self) -> Json:
        """Plain values; the exact sum as a decimal text."""
        return {name: getattr(self, name) for name in self.__slots__} | {"exact_micro_dollars": str(self.exact_micro_dollars)}

    @staticmethod
    def from_json(values: Json) -> Bill:
        """The inverse of `as_json`."""
        return Bill(**values | {"exact_micro_dollars": Decimal(values["exact_micro_dollars"])})


@dataclass(slots=True)
class Account:
    """Keeps the bill."""

    settings: Settings
    received: Counter[str] = field(default_factory=Counter)
    done: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    in_flight: int = 0
    most_in_flight: int = 0
    requests: int = 0
    finished: int = 0

    def receive(self, key: str) -> tuple[int, int]:
        """Counts a request: how many there were before it, and how many of the same body."""
        self.requests += 1
        self.received[key] += 1
        return self.requests - 1, self.received[key] - 1

    def finish(self, key: str, prompt_tokens: int, completion_tokens: int) -> None:
        """Puts a request on the bill."""
        self.finished += 1
        self.done[key] += 1
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += completion_tokens

    def bill(self, limits: Limits, *, bodies: bool = True) -> Bill:
        """As of now."""
        exact = self.prompt_tokens * self.settings.price_in + self.completion_tokens * self.settings.price_out
        limits.refill()
        return Bill(
            received=self.requests,
            done=self.finished,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            micro_dollars=int(exact.to_integral_value(ROUND_HALF_UP)),
            exact_micro_dollars=exact,
            throttled=self.statuses["429"],
            statuses=dict(self.statuses),
            faults=dict(self.faults),
            in_flight=self.in_flight,
            most_in_flight=self.most_in_flight,
            allowed_requests=limits.requests.allowed,
            allowed_tokens=limits.tokens.allowed,
            bodies={key: {"received": count, "done": self.done[key]} for key, count in self.received.items()} if bodies else {},
        )


class _Bucket:
    """One rate's bucket. It begins full, and is full at most."""

    def __init__(self, burst_seconds: float, least: float) -> None:
        self._burst, self._least = burst_seconds, least
        self.per_minute: float | None = None
        self.level = 0.0
        self.allowed: float | None = None

    @property
    def capacity(self) -> float:
        return max((self.per_minute or 0) * self._burst / 60, self._least)

    def set_rate(self, per_minute: float | None) -> None:
        if self.per_minute is None and per_minute is not None:
            self.per_minute = per_minute
            self.level = self.capacity
            self.allowed = (self.allowed or 0.0) + self.level
        self.per_minute = per_minute
        self.level = min(self.level, self.capacity)

    def pass_seconds(self, seconds: float) -> None:
        if self.per_minute is not None:
            more = self.per_minute * seconds / 60
            self.allowed = (self.allowed or 0.0) + more
            self.level = min(self.level + more, self.capacity)

    def seconds_until(self, amount: float) -> float:
        """Until `amount` can be taken; more than the bucket holds is let in when it is full."""
        if self.per_minute is None:
            return 0.0
        return max(min(amount, self.capacity) - self.level, 0.0) * 60 / self.per_minute


class Limits:
    """The buckets, moved along the schedule of `settings` by `seconds`, a clock that never goes back."""

    def __init__(self, settings: Settings, seconds: Callable[[], float]) -> None:
        self._settings, self._seconds = settings, seconds
        self._schedule = deque(settings.limits)
        self._started: float | None = None
        self._at = 0.0
        self.requests = _Bucket(settings.burst_seconds, 1.0)
        self.tokens = _Bucket(settings.burst_seconds, 1.0)

    def refill(self) -> None:
        """Up to now, through every change of the limits on the way."""
        if self._started is None:
            return
        passed = self._seconds() - self._started
        while self._schedule and self._schedule[0].after_seconds <= passed:
            limit = self._schedule.popleft()
            self._pass_to(limit.after_seconds)
            self._set(limit)
        self._pass_to(passed)

    def admit(self, tokens: int) -> None:
        """Takes one request and `tokens`, or raises Refused with when to come again, and takes nothing."""
        if not self._settings.limits:
            return
        if self._started is None:
            self._started = self._seconds()
            self._set(self._schedule.popleft())
        self.refill()
        waits = {"requests": self.requests.seconds_until(1), "tokens": self.tokens.seconds_until(tokens)}
        which, wait = max(waits.items(), key=lambda item: item[1])
        if wait > 1e-9:
            raise throttled(
                f"Rate limit reached for {which} per minute. Please try again in {wait:.3f}s.", which, wait, self._settings, self.headers()
            )
        self.requests.level -= 1
        self.tokens.level -= tokens  # below 0 after a request that is larger than the bucket

    def _set(self, limit: Limit) -> None:
        self.requests.set_rate(limit.requests_per_minute)
        self.tokens.set_rate(limit.tokens_per_minute)

    def _pass_to(self, seconds: float) -> None:
        passed, self._at = seconds - self._at, seconds
        self.requests.pass_seconds(passed)
        self.tokens.pass_seconds(passed)

    def headers(self) -> dict[str, str]:
        """In OpenAI's style; none for what has no limit."""
        if not self._settings.rate_headers:
            return {}
        found = {}
        for name, bucket in (("requests", self.requests), ("tokens", self.tokens)):
            if bucket.per_minute is not None:
                found[f"x-ratelimit-limit-{name}"] = f"{bucket.per_minute:.0f}"
                found[f"x-ratelimit-remaining-{name}"] = f"{max(math.floor(bucket.level), 0)}"
                found[f"x-ratelimit-reset-{name}"] = duration(bucket.seconds_until(bucket.capacity))
        return found


def throttled(message: str, which: str, wait: float, settings: Settings, headers: dict[str, str]) -> Refused:
    """A 429 that says when to come again, as the settings have it."""
    refused = Refused(429, "rate_limit_exceeded", message, kind=which)
    refused.headers = dict(headers)
    match settings.retry_after:
        case "seconds":
            refused.headers |= {"retry-after": str(math.ceil(wait)), "retry-after-ms": str(math.ceil(wait * 1000))}
        case "date":
            refused.headers["retry-after"] = formatdate(math.ceil(now().timestamp() + wait), usegmt=True)
        case "none":
            pass
    return refused


def duration(seconds: float) -> str:
    """As x-ratelimit-reset-* has it: 17ms, 1.5s, 6m0s, 1h2m3s."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    hours, rest = divmod(math.ceil(seconds * 1000) / 1000, 3600)
    minutes, rest = divmod(rest, 60)
    return (f"{hours:.0f}h" if hours else "") + (f"{minutes:.0f}m" if hours or minutes else "") + f"{rest:.3f}".rstrip("0").rstrip(".") + "s"
