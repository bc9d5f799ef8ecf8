"""An endpoint with limits, simulated on a clock of its own: nothing waits. Used by tests/unit/test_rate.py and benchmarks/rate_control.py."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from stillroom.collect.rate import RateController, Signal, Ticket
from stillroom.collect.wire import Rates


@dataclass
class Phase:
    """Limits from a moment on, per minute, and on how many are worked on at a time; None is no limit."""

    at: float
    requests: float | None = None
    tokens: float | None = None
    concurrency: int | None = None


@dataclass
class Bucket:
    burst_seconds: float
    per_second: float | None = None
    level: float = 0.0
    allowed: float = 0.0
    begun: bool = False

    def set_rate(self, per_minute: float | None) -> None:
        self.per_second = None if per_minute is None else per_minute / 60
        if self.per_second is not None:
            self.level = min(self.level, self.capacity) if self.begun else self.capacity
            self.begun = True

    @property
    def capacity(self) -> float:
        return max((self.per_second or 0) * self.burst_seconds, 1.0)

    def pass_seconds(self, seconds: float) -> None:
        if self.per_second is not None:
            self.level = min(self.level + self.per_second * seconds, self.capacity)
            self.allowed += self.per_second * seconds

    def wait(self, amount: float) -> float:
        return 0.0 if self.per_second is None else max(min(amount, self.capacity) - self.level, 0.0) / self.per_second


@dataclass
class Simulation:
    """An endpoint behind a network, and a client that always has something to send."""

    phases: Sequence[Phase]
    seconds: float
    latency: float = 0.05
    jitter: float = 0.3
    headers: bool = True
    retry_after: bool = True
    network_seconds: float | None = None
    """One way; a tenth of the latency where it is not given."""
    tokens: int = 100
    worst: int = 300
    charged: int | None = None
    burst_seconds: float = 1.0
    largest: int = 256
    seed: int = 0
    now: float = 0.0
    refusals: list[float] = field(default_factory=list)
    served: list[float] = field(default_factory=list)
    starts: list[float] = field(default_factory=list)
    admitted: int = 0
    usable: float = 0.0
    watch_from: float = math.inf
    """From when on `late_rate_taken` looks."""
    watched: tuple[int, float] = (0, 0.0)
    wake_at: float = -1.0

    def run(self, controller: RateController | None = None) -> Simulation:
        self.controller = controller or RateController(lambda: self.now, largest_concurrency=self.largest)
        self.requests, self.token = Bucket(self.burst_seconds), Bucket(self.burst_seconds)
        self.random, self.events, self.working, self.counter = random.Random(self.seed), [], 0, 0
        self.phase, self.concurrency = -1, None
        for at in [phase.at for phase in self.phases]:
            self.put(at, "phase", None)
        while self.events and self.events[0][0] < self.seconds:
            at, _, kind, what = heapq.heappop(self.events)
            self.move(at)
            getattr(self, f"on_{kind}")(what)
            self.send()
        self.move(self.seconds)
        return self

    def put(self, at: float, kind: str, what: object) -> None:
        self.counter += 1
        heapq.heappush(self.events, (at, self.counter, kind, what))

    def move(self, at: float) -> None:
        if self.now <= self.watch_from < at:
            self.watched = (self.admitted, self.usable)
        passed, self.now = at - self.now, at
        self.requests.pass_seconds(passed)
        self.token.pass_seconds(passed)
        rates = [rate for rate in (self.requests.per_second, self.token.per_second and self.token.per_second / (self.charged or self.tokens)) if rate]
        if self.concurrency is not None:
            # A place is free for the client once its answer has come, and taken when the next request has.
            rates.append(self.concurrency / (self.latency + 2 * (self.latency / 10 if self.network_seconds is None else self.network_seconds)))
        self.usable += min(rates, default=0.0) * passed

    def send(self) -> None:
        while not isinstance(answer := self.controller.start(self.worst), float):
            self.starts.append(self.now)
            self.put(self.now + self.network(), "arrive", answer)
        at = self.now + max(answer, 1e-6)
        if at < self.wake_at or self.wake_at <= self.now:  # an earlier one looks again anyway
            self.wake_at = at
            if math.isfinite(at):
                self.put(at, "wake", None)

    def network(self) -> float:
        seconds = self.latency / 10 if self.network_seconds is None else self.network_seconds
        return seconds * self.random.uniform(1 - self.jitter, 1 + self.jitter)

    def on_phase(self, _: object) -> None:
        self.phase += 1
        self.requests.set_rate(self.phases[self.phase].requests)
        self.token.set_rate(self.phases[self.phase].tokens)
        self.concurrency = self.phases[self.phase].concurrency

    def on_wake(self, _: object) -> None:
        pass

    def on_arrive(self, ticket: Ticket) -> None:
        charge = self.charged or self.tokens
        wait = max(self.requests.wait(1), self.token.wait(charge))
        full = self.concurrency is not None and self.working >= self.concurrency
        if wait > 1e-9 or full:
            self.put(self.now + self.network(), "answer", (ticket, "refused", self.rates(), wait if self.retry_after else None))
            return
        self.requests.level -= 1
        self.token.level -= charge
        self.working += 1
        self.admitted += 1
        self.put(self.now + self.latency * self.random.uniform(1 - self.jitter, 1 + self.jitter), "worked", ticket)

    def on_worked(self, ticket: Ticket) -> None:
        self.working -= 1
        self.put(self.now + self.network(), "answer", (ticket, "answered", self.rates(), None))

    def on_answer(self, what: tuple[Ticket, Signal, Rates | None, float | None]) -> None:
        ticket, signal, rates, wait = what
        (self.refusals if signal == "refused" else self.served).append(self.now)
        used = self.tokens if signal == "answered" else None
        self.controller.finish(ticket, signal, used_tokens=used, rates=rates, retry_after_seconds=wait)

    def rates(self) -> Rates | None:
        if not self.headers:
            return None
        known = {}
        for name, bucket in (("requests", self.requests), ("tokens", self.token)):
            if bucket.per_second is not None:
                known[f"{name}_limit"] = round(bucket.per_second * 60)
                known[f"{name}_left"] = max(math.floor(bucket.level), 0)
                known[f"{name}_reset_seconds"] = bucket.wait(bucket.capacity)
        return Rates(**known)

    @property
    def allowed_rate_used(self) -> float:
        """Answers there were, of those that could have been."""
        return len(self.served) / self.usable

    @property
    def allowed_rate_taken(self) -> float:
        """Requests that were let in, of those that would have been: answers that are still being made at the end count too."""
        return self.admitted / self.usable

    @property
    def late_rate_taken(self) -> float:
        """The same from `watch_from` on."""
        admitted, usable = self.watched
        return (self.admitted - admitted) / (self.usable - usable)

    @property
    def refused_share(self) -> float:
        """Of all requests."""
        return len(self.refusals) / max(1, len(self.refusals) + len(self.served))
