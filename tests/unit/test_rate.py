"""The rate controller, on a simulated endpoint and a simulated clock: nothing here waits."""

from __future__ import annotations

import heapq
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.collect.rate import BURST_SECONDS, RateController, Signal, Ticket
from stillroom.collect.wire import Rates


@dataclass
class Phase:
    """Limits from a moment on, per minute; None is no limit."""

    at: float
    requests: float | None
    tokens: float | None = None


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
    concurrency: int | None = None
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
    usable: float = 0.0
    wake_at: float = -1.0

    def run(self, controller: RateController | None = None) -> Simulation:
        self.controller = controller or RateController(lambda: self.now, largest_concurrency=self.largest)
        self.requests, self.token = Bucket(self.burst_seconds), Bucket(self.burst_seconds)
        self.random, self.events, self.working, self.counter = random.Random(self.seed), [], 0, 0
        self.phase = -1
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
        passed, self.now = at - self.now, at
        self.requests.pass_seconds(passed)
        self.token.pass_seconds(passed)
        rates = [rate for rate in (self.requests.per_second, self.token.per_second and self.token.per_second / (self.charged or self.tokens)) if rate]
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
        return self.latency / 10 * self.random.uniform(1 - self.jitter, 1 + self.jitter)

    def on_phase(self, _: object) -> None:
        self.phase += 1
        self.requests.set_rate(self.phases[self.phase].requests)
        self.token.set_rate(self.phases[self.phase].tokens)

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
        return len(self.served) / self.usable


MOVING = (Phase(0, 6000), Phase(20, 3000), Phase(40, 6000), Phase(60, 1500), Phase(80, 6000), Phase(100, 12000))
MOVING_TOKENS = tuple(Phase(phase.at, 60_000, (phase.requests or 0) * 100) for phase in MOVING)
