"""How fast an endpoint may be asked: what it says of its limits, what its refusals show, and no more than that.

One controller stands for one model at one endpoint. Three things hold a call back. **Concurrency** doubles with each round of answers until a refusal
that no known rate explains. **Buckets**, one of requests and one of tokens, let calls go at the rates that the endpoint's headers tell, evenly rather than
in bursts; where headers tell nothing, the first refusal teaches the rate that was let in. **Retry-After** is waited for. Of refusals that come together
only the first has any effect: those of calls that were sent before it say nothing new.

What was learnt from refusals is then looked for anew, as CUBIC does (RFC 9438): a refusal lowers what held the call back, a little, or much where it comes
soon after another; and as long as that alone holds calls back it grows again, fast at first, hardly at all where the limit was, and ever faster beyond it.
It does so over seconds, or over the time that an answer takes where that is longer.

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

LARGEST_DECREASE = 0.5
DECREASE = 0.75  # at a first refusal, and where the endpoint is overloaded
SLIGHT_DECREASE = 0.95  # at another; what it takes off doubles with each that comes soon after one before
WINDOW_SECONDS = 60.0  # what limits are counted over, unless the headers show a longer one
BURST_SECONDS = 0.5  # what a bucket saves up at most; endpoints allow no less than a second's worth where they allow bursts at all
LEARNT_SHARE = 0.95  # of the rate that was let in when the first refusal came
QUIET_SECONDS = 2.0  # without a refusal, before a trim grows
RETURN_SECONDS = 5.0  # of holding calls back, after which a limit that was lowered slightly is where it was
FIRST_CONCURRENCY = 4
_SHORTEST_SECONDS, _FEWEST = 0.3, 5  # of time and of calls, over which the rate that is let in can be counted
_MANY = 8  # calls in flight, of which there are never many fewer or more than the rate makes them: then a refusal shows how many there may be
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


class _Learnt:
    """By what a limit that refusals taught is lowered, and grows again while it holds calls back."""

    def __init__(self) -> None:
        self.held_seconds = math.inf  # since it was last lowered, during which it alone held calls back
        self._soon = 0  # how often it was lowered, each time soon after the last

    def lowered(self, return_seconds: float) -> float:
        """What a refusal leaves of it."""
        self._soon = self._soon + 1 if self.held_seconds < return_seconds / 2 else 0
        self.held_seconds = 0.0
        return max(1 - (1 - SLIGHT_DECREASE) * 2.0**self._soon, LARGEST_DECREASE)

    def grown(self, seconds: float, return_seconds: float) -> float:
        """By what it grows in some more seconds of holding calls back. Its logarithm is a cubic function of that time, flat where it was before it was
        lowered slightly.
        """
        if math.isinf(self.held_seconds):
            self.held_seconds = return_seconds  # taken over from a run before: it is where it was
        begin, end = (held / return_seconds - 1 for held in (self.held_seconds, self.held_seconds + seconds))
        self.held_seconds += seconds
        return math.exp(min(-math.log(SLIGHT_DECREASE) * (end**3 - begin**3), 1.0))


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
        self._in_flight = 0
        self._learnt = _Learnt()
        self._held = False  # whether what refusals taught is all that holds calls back now
        self._looked_at = -math.inf
        self._latency_seconds = 0.0  # of answers
        self._streak = 0  # bursts of refusals since the last answer
        self._token_share = 1.0  # what calls used of the most that they could
        self._shares = 0  # how many answers that is from, up to where it is smoothed
        self._paused_until = -math.inf
        self._cut_at = -math.inf
        self._trimmed_at = -math.inf
        self._sent: deque[float] = deque()  # when calls were let go, of late
        self._turned_back: deque[float] = deque()  # when those were let go that were refused
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
        self._grow(now)
        if self._in_flight >= self.concurrency:
            self._held = True
            return math.inf
        paused, requests, tokens = self._paused_until - now, self._requests.wait(now), self._tokens.wait(now)
        if (wait := max(paused, requests, tokens)) > 0:
            self._held = wait == requests and not self._requests.told
            return wait
        self._held = False
        self._sent.append(now)
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
        self._grow(now)
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
                self._turned_back.append(ticket.at)
                self._tokens.level += ticket.expected_tokens
                explained = self._refused(ticket, rates, lowered, now)
                if retry_after_seconds is None and not explained:
                    self._pause(now)
            case "overloaded":
                self._overloaded(ticket, now)
                if retry_after_seconds is None:
                    self._pause(now)
            case "failed":
                pass
            case "unsent":
                self._tokens.level += ticket.expected_tokens
                self._requests.level += 1
        if retry_after_seconds is not None and signal in ("refused", "overloaded", "failed"):
            self._paused_until = max(self._paused_until, now + min(retry_after_seconds, _LARGEST_WAIT_SECONDS))

    # -- what answers teach --------------------------------------------------------------------------------------------

    def _answered(self, ticket: Ticket, used_tokens: int | None, binding: bool, now: float) -> None:
        self._streak = 0
        self._latency_seconds += (_SMOOTHING if self._latency_seconds else 1.0) * (now - ticket.at - self._latency_seconds)
        if used_tokens is not None:
            self._tokens.level += ticket.expected_tokens - used_tokens
            if ticket.worst_tokens > 0:
                share = min(used_tokens / ticket.worst_tokens, 1.0)
                self._shares += 1
                self._token_share += max(_SMOOTHING, 1 / self._shares) * (share - self._token_share)
        # One that was sent with less in flight than is allowed does not show that there is room for more.
        if self._ceiling is None and binding:
            self._concurrency = min(self._concurrency + 1, float(self._largest))

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
        if ticket.at < self._cut_at:
            return True
        short = self._short(ticket, rates)
        for bucket in short:
            bucket.refill(now)
            if not lowered:  # the endpoint counts otherwise than we do
                bucket.trim = max(bucket.trim * (0.97 if bucket is self._requests else 0.9), 0.05)
            bucket.level = min(bucket.level, -_CUSHION_SECONDS * (bucket.effective or 0.0))
        explained = bool(short) or lowered
        if not explained:
            self._lower(now, much=self._ceiling is None)
        self._cut_at = self._trimmed_at = now
        return explained

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

    def _overloaded(self, ticket: Ticket, now: float) -> None:
        if ticket.at >= self._cut_at:
            self._lower_concurrency(min(self._learnt.lowered(self._return_seconds), DECREASE))
            self._cut_at = now

    def _lower(self, now: float, *, much: bool) -> None:
        """Both limits, for nobody says which of them was met: concurrency, and the rate where no header tells one, to no more than was let in of late."""
        decrease = min(self._learnt.lowered(self._return_seconds), DECREASE if much else 1.0)
        self._lower_concurrency(decrease)
        self._lower_rate(now, decrease)

    def _lower_concurrency(self, decrease: float) -> None:
        reached = self._in_flight + 1.0
        if self._ceiling is None or reached >= _MANY:
            self._concurrency = self._ceiling = min(self._concurrency, reached + (0.5 * math.sqrt(reached) if self._ceiling else 0.0))
        self._concurrency = max(1.0, self._concurrency * decrease)

    def _lower_rate(self, now: float, decrease: float) -> None:
        bucket = self._requests
        if bucket.told:
            return
        rate = math.inf if bucket.rate is None else bucket.rate * decrease
        let_in, seconds = len(self._sent) - len(self._turned_back), now - self._sent[0] if self._sent else 0.0
        if let_in >= _FEWEST and seconds >= _SHORTEST_SECONDS:
            rate = min(rate, (LEARNT_SHARE if bucket.rate is None else 1.0) * let_in / seconds)
        if math.isfinite(rate):
            bucket.set_rate(max(rate, 1 / WINDOW_SECONDS), now, told=False)

    # -- what the time teaches ------------------------------------------------------------------------------------------

    @property
    def _return_seconds(self) -> float:
        """No faster than answers come, for some endpoints refuse no sooner than they answer."""
        return max(RETURN_SECONDS, self._latency_seconds)

    def _grow(self, now: float) -> None:
        """What has held calls back since the last look grows, and trims do by a thousandth of the told rate a second."""
        passed, self._looked_at = now - max(self._looked_at, self._cut_at), now
        if self._held and self._ceiling is not None and 0 < passed < math.inf:
            growth = self._learnt.grown(passed, self._return_seconds)
            self._concurrency = min(self._concurrency * growth, float(self._largest))
            bucket = self._requests
            if bucket.rate is not None and not bucket.told:
                bucket.refill(now)
                bucket.rate = min(bucket.rate * growth, _LARGEST_RATE)
        since = now - max(self._trimmed_at, self._cut_at + QUIET_SECONDS)
        if 0 < since < math.inf:
            self._trimmed_at = now
            for bucket in (self._requests, self._tokens):
                bucket.refill(now)
                bucket.trim = min(bucket.trim + 0.001 * since, 1.0)
        for times in (self._sent, self._turned_back):
            while times and times[0] < now - self._return_seconds:
                times.popleft()

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
