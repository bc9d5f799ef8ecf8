"""How fast an endpoint may be asked: what it says of its limits, what its refusals show, and no more than that.

One controller stands for one model at one endpoint. Three things hold a call back. **Concurrency** grows by one after a run of clean answers and shrinks
to three quarters at a refusal that no known rate explains (additive increase, multiplicative decrease). **Buckets**, one of requests and one of tokens,
let calls go at the rates that the endpoint's headers tell, evenly rather than in bursts; where headers tell nothing, a refusal teaches the rate that was
reached, and quiet lets it grow again. **Retry-After** is waited for. Of refusals that come together only the first has any effect: those of calls that
were sent before it say nothing new.

Pure arithmetic on a clock that is handed in: no waiting, no input or output, nothing random. Seconds, on a clock that never goes back.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from stillroom.collect.wire import Rates
from stillroom.core.identities import Json

Clock: TypeAlias = Callable[[], float]
# "refused": a 429. "overloaded": a 503 or 529. "failed": anything else without an answer. "unsent": no connection was made.
Signal: TypeAlias = Literal["answered", "refused", "overloaded", "failed", "unsent"]

DECREASE = 0.75
WINDOW_SECONDS = 60.0  # what limits are counted over, unless the headers show a longer one
BURST_SECONDS = 0.5  # what a bucket saves up at most; endpoints allow no less than a second's worth where they allow bursts at all
LEARNT_SHARE = 0.95  # of the rate that was reached when a refusal came
QUIET_SECONDS = 2.0  # without a refusal, before a learnt rate or a trim grows
FIRST_CONCURRENCY = 4
_OBSERVED_SECONDS = 3.0
_CUSHION_SECONDS = 0.15  # of its rate, that an endpoint is let save up after a refusal: what it allows is then not at its edge
_LARGEST_WAIT_SECONDS = 3600.0
_LARGEST_RATE = 1e9
FIRST_PAUSE_SECONDS = 0.1  # after a refusal that says nothing of when to come again; doubled for each that follows without an answer between
LARGEST_PAUSE_SECONDS = 60.0
_SMOOTHING = 0.05


@dataclass(frozen=True, slots=True)
class Ticket:
    """A call that was let go: when, and how many tokens it was taken to need at most and in all likelihood."""

    at: float
    worst_tokens: int
    expected_tokens: float


class _Bucket:
    """Calls or tokens that may go at a rate per second; all may where the rate is None. It may be overdrawn by one call, so that none is too large.

    `trim` is a share of the rate that the endpoint was found to stand for, where that is less than it says: it may count otherwise than we do.
    """

    def __init__(self) -> None:
        self.rate: float | None = None
        self.told = False  # by a header; otherwise learnt from a refusal
        self.trim = 1.0
        self.level = 0.0
        self.at = 0.0

    @property
    def effective(self) -> float | None:
        return None if self.rate is None else self.rate * self.trim

    def refill(self, now: float) -> None:
        if (rate := self.effective) is not None:
            self.level = min(self.level + rate * (now - self.at), rate * BURST_SECONDS)
        self.at = now

    def wait(self, now: float) -> float:
        """Seconds until a call may go. A level of 0 or more lets one."""
        self.refill(now)
        rate = self.effective
        if rate is None or self.level >= -1e-9:
            return 0.0
        return -self.level / rate

    def set_rate(self, rate: float, now: float, *, told: bool) -> None:
        self.refill(now)
        if self.rate is None:
            self.level = 0.0
        self.rate, self.told = rate, told
        self.level = min(self.level, rate * self.trim * BURST_SECONDS)


class RateController:
    """Lets calls go. `start` gives a ticket or the seconds to wait; each ticket is given back by `finish` with what came of it.

    `largest_concurrency` is never exceeded. The state (`to_json`) is what was learnt: limits, trims, concurrency; a controller made of it starts there.
    """

    def __init__(self, clock: Clock, *, largest_concurrency: int = 256, state: Mapping[str, object] | None = None) -> None:
        if largest_concurrency < 1:
            raise ValueError(f"a concurrency of {largest_concurrency} lets nothing go")
        self._clock = clock
        self._largest = largest_concurrency
        self._requests, self._tokens = _Bucket(), _Bucket()
        self._concurrency = float(min(FIRST_CONCURRENCY, largest_concurrency))
        self._ceiling: float | None = None
        self._clean = 0
        self._in_flight = 0
        self._streak = 0  # bursts of refusals since the last answer
        self._token_share = 1.0  # what calls used of the most that they could
        self._paused_until = -math.inf
        self._cut_at = -math.inf
        self._grown_at = -math.inf
        self._finished: deque[float] = deque()  # when answers came
        self.refusals = 0
        if state is not None:
            self._restore(state)

    @property
    def in_flight(self) -> int:
        return self._in_flight

    @property
    def concurrency(self) -> int:
        """How many calls may be in flight now."""
        return max(1, int(self._concurrency))

    def start(self, worst_tokens: int) -> Ticket | float:
        """A ticket for a call that can cost `worst_tokens`, or in how many seconds to ask again; infinity where only an answer can make room."""
        now = self._clock()
        self._grow_learnt(now)
        if self._in_flight >= self.concurrency:
            return math.inf
        wait = max(self._paused_until - now, self._requests.wait(now), self._tokens.wait(now))
        if wait > 0:
            return wait
        expected = worst_tokens * self._token_share
        self._requests.level -= 1
        self._tokens.level -= expected
        self._in_flight += 1
        return Ticket(now, worst_tokens, expected)

    def finish(
        self, ticket: Ticket, signal: Signal, *, used_tokens: int | None = None, rates: Rates | None = None, retry_after_seconds: float | None = None
    ) -> None:
        """Takes a ticket back. `used_tokens` is what the endpoint counted; `rates` what its headers say."""
        now = self._clock()
        self._in_flight -= 1
        binding = self._in_flight + 1 >= self.concurrency
        before = self._requests.rate, self._tokens.rate
        if rates is not None:
            self._told(rates, now)
        lowered = any(
            new is not None and old is not None and new < old for old, new in zip(before, (self._requests.rate, self._tokens.rate), strict=True)
        )
        match signal:
            case "answered":
                self._answered(ticket, used_tokens, binding, now)
            case "refused":
                self.refusals += 1
                self._tokens.level += ticket.expected_tokens
                explained = self._refused(ticket, rates, lowered, now)
                if retry_after_seconds is None and not explained:
                    self._pause(now)
            case "overloaded":
                self._overloaded(ticket, now)
                if retry_after_seconds is None:
                    self._pause(now)
            case "failed":
                self._clean = 0
            case "unsent":
                self._tokens.level += ticket.expected_tokens
                self._requests.level += 1
        if retry_after_seconds is not None and signal in ("refused", "overloaded", "failed"):
            self._paused_until = max(self._paused_until, now + min(retry_after_seconds, _LARGEST_WAIT_SECONDS))

    # -- what answers teach --------------------------------------------------------------------------------------------

    def _answered(self, ticket: Ticket, used_tokens: int | None, binding: bool, now: float) -> None:
        self._streak = 0
        self._finished.append(now)
        self._forget(now)
        if used_tokens is not None:
            self._tokens.level += ticket.expected_tokens - used_tokens
            if ticket.worst_tokens > 0:
                share = min(used_tokens / ticket.worst_tokens, 1.0)
                self._token_share += _SMOOTHING * (share - self._token_share)
        if ticket.at < self._cut_at or not binding:
            return  # sent before the last cut, or less in flight than is allowed: it does not show that there is room for more
        self._clean += 1
        if self._clean >= self._run():
            self._clean = 0
            self._concurrency = min(self._concurrency + 1, float(self._largest))

    def _run(self) -> float:
        """After how many clean answers there may be one more in flight: one while no limit was ever met, few well below the last limit
        or long after it, else a round.
        """
        if self._ceiling is None:
            return 1
        far = self._concurrency < 0.9 * self._ceiling or self._clock() - self._cut_at > 2 * QUIET_SECONDS
        return max(1.0, self._concurrency / 8) if far else self._concurrency

    def _forget(self, now: float) -> None:
        while self._finished and self._finished[0] < now - _OBSERVED_SECONDS:
            self._finished.popleft()

    def _reached(self, now: float) -> float:
        """Answers per second, of late."""
        self._forget(now)
        return len(self._finished) / max(now - self._finished[0], 1e-3) if self._finished else 0.0

    def _told(self, rates: Rates, now: float) -> None:
        for bucket, limit, left, reset in (
            (self._requests, rates.requests_limit, rates.requests_left, rates.requests_reset_seconds),
            (self._tokens, rates.tokens_limit, rates.tokens_left, rates.tokens_reset_seconds),
        ):
            if limit is not None and limit > 0:
                rate = limit / _window(limit, left, reset)
                if not (bucket.told and bucket.rate is not None and abs(rate / bucket.rate - 1) < 0.02):
                    bucket.set_rate(rate, now, told=True)
                if self._ceiling is None:  # the rate holds calls back; concurrency has shown no limit of its own
                    self._concurrency = float(self._largest)
            if left == 0:
                bucket.refill(now)
                bucket.level = min(bucket.level, 0.0)

    # -- what refusals teach -------------------------------------------------------------------------------------------

    def _refused(self, ticket: Ticket, rates: Rates | None, lowered: bool, now: float) -> bool:
        """Whether the refusal is explained by a told rate, which then holds calls back by itself."""
        self._clean = 0
        if ticket.at < self._cut_at:
            return True
        self._cut_at = self._grown_at = now
        short = self._short(ticket, rates)
        for bucket in short:
            bucket.refill(now)
            if not lowered:  # the endpoint counts otherwise than we do
                bucket.trim = max(bucket.trim * (0.97 if bucket is self._requests else 0.9), 0.05)
            bucket.level = min(bucket.level, -_CUSHION_SECONDS * (bucket.effective or 0.0))
        if not short and not lowered:
            self._learn(now)
            self._cut()
        return bool(short) or lowered

    def _pause(self, now: float) -> None:
        pause = min(FIRST_PAUSE_SECONDS * 2.0 ** min(self._streak, 16), LARGEST_PAUSE_SECONDS)
        self._streak += 1
        self._paused_until = max(self._paused_until, now + pause)

    def _short(self, ticket: Ticket, rates: Rates | None) -> list[_Bucket]:
        """The buckets whose told rate explains a refusal."""
        if rates is None:
            return []
        found = []
        if self._requests.told and rates.requests_left is not None and rates.requests_left < 1:
            found.append(self._requests)
        if self._tokens.told and rates.tokens_left is not None and rates.tokens_left < ticket.worst_tokens:
            found.append(self._tokens)
        return found

    def _learn(self, now: float) -> None:
        """The rate that was reached, where no header tells one."""
        if self._requests.told or len(self._finished) < 2:
            return
        reached, known = self._reached(now), self._requests.rate
        self._requests.set_rate(max(LEARNT_SHARE * (reached if known is None else min(reached, known)), 1 / WINDOW_SECONDS), now, told=False)

    def _overloaded(self, ticket: Ticket, now: float) -> None:
        self._clean = 0
        if ticket.at >= self._cut_at:
            self._cut_at = now
            self._cut()

    def _cut(self) -> None:
        reached = min(self._concurrency, self._in_flight + 1.0)
        self._ceiling = reached
        self._concurrency = max(1.0, math.floor(reached * DECREASE))

    def _grow_learnt(self, now: float) -> None:
        """After QUIET_SECONDS without a refusal a learnt rate grows by 2% of itself a second, and faster the longer the quiet; a trim by a
        thousandth of the told rate.
        """
        quiet = now - self._cut_at
        since = now - max(self._grown_at, self._cut_at + QUIET_SECONDS)
        if since <= 0 or not math.isfinite(quiet):
            return
        self._grown_at = now
        for bucket in (self._requests, self._tokens):
            bucket.refill(now)
            if bucket.rate is None:
                continue
            if not bucket.told and self._reached(now) > 0.7 * bucket.rate:  # a rate that is not reached is not what holds calls back
                bucket.rate *= math.exp(min(0.02 * 2 ** (quiet / 5), 0.3) * since)
            bucket.trim = min(bucket.trim + 0.001 * since, 1.0)

    # -- what is kept --------------------------------------------------------------------------------------------------

    def to_json(self) -> Json:
        """What was learnt, as plain JSON."""
        buckets = {name: {"rate": b.rate, "told": b.told, "trim": b.trim} for name, b in (("requests", self._requests), ("tokens", self._tokens))}
        return {"buckets": buckets, "ceiling": self._ceiling, "concurrency": self._concurrency, "token_share": self._token_share}

    def _restore(self, state: Mapping[str, object]) -> None:
        """Takes what `to_json` gave. What is not of its form is left out: it is only where to begin."""
        buckets = state.get("buckets")
        for name, bucket in (("requests", self._requests), ("tokens", self._tokens)):
            kept = buckets.get(name) if isinstance(buckets, Mapping) else None
            if not isinstance(kept, Mapping):
                continue
            if (rate := _positive(kept.get("rate"), _LARGEST_RATE)) is not None:
                bucket.at = self._clock()
                bucket.set_rate(rate, bucket.at, told=kept.get("told") is True)
            bucket.trim = _positive(kept.get("trim"), 1.0) or 1.0
        self._concurrency = max(1.0, min(_positive(state.get("concurrency"), math.inf) or self._concurrency, float(self._largest)))
        self._ceiling = _positive(state.get("ceiling"), math.inf)
        self._token_share = _positive(state.get("token_share"), 1.0) or 1.0


def _window(limit: int, left: int | None, reset_seconds: float | None) -> float:
    """The seconds that a limit is counted over. A minute; longer where the reset, which is when all is left again, shows it (a limit of a day).

    Where little is used the reset shows nothing, and one that is shorter than a minute is that of a bucket that saves up less than its limit.
    """
    if left is None or reset_seconds is None or left > 0.99 * limit:
        return WINDOW_SECONDS
    shown = reset_seconds * limit / (limit - left)
    return shown if shown > 2 * WINDOW_SECONDS else WINDOW_SECONDS


def _positive(value: object, largest: float) -> float | None:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= largest and math.isfinite(value):
        return float(value)
    return None
